// What the emulator (simt.cpp) and the checker (checker.cpp) know of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

inline constexpr int kLanes = 32;
inline constexpr unsigned kFull = 0xffffffffu;

// One cp.async of 16 bytes, between its issue and its wait.
struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
};

enum class State : std::uint8_t { ready, collective, barrier, done };

struct Warp;
// What all lanes of a warp do together: run by the last to arrive, over the arguments of each.
using Collective = void (*)(Warp& warp, unsigned lanes, void** arguments);

// One CUDA thread: a stack of its own and where it waits.
struct Fiber {
  void* stack_pointer = nullptr;
  int index = 0;  // in the block
  int lane = 0;
  Warp* warp = nullptr;
  uint3 position{};
  State state = State::ready;
  const void* pc = nullptr;  // where the kernel called the emulator last

  // In a collective or at a barrier.
  const char* waits_for = "";
  Collective collective = nullptr;
  unsigned mask = 0;
  void* arguments = nullptr;
  int predicate = 0;

  // cp.async: what is not yet committed, and committed groups, oldest first.
  std::vector<AsyncCopy> open_group;
  std::deque<std::vector<AsyncCopy>> groups;

  // The checker's: for each lane of the warp, its time of which this thread knows by __syncwarp;
  // and what __threadfence has to order between blocks.
  std::uint16_t seen[kLanes] = {};
  int fence_epoch = -1;
  bool wrote_since_fence = false;
};

struct Warp {
  int index = 0;
  Fiber* lanes = nullptr;
  unsigned live = 0;    // not yet returned
  unsigned ready = 0;   // can go on
  unsigned parked = 0;  // wait in a collective
  std::uint16_t time = 0;
};

// The thread that runs now; null between turns and on the host.
extern Fiber* self;

struct Range {
  std::uintptr_t begin = 0, end = 0;
  bool holds(std::uintptr_t address) const { return address - begin < end - begin; }
  bool holds(std::uintptr_t address, std::size_t bytes) const {
    return address >= begin && address <= end && bytes <= end - address;
  }
};

extern Range stacks;           // of all fibers
extern Range shared_memory;    // the dynamic part of the running launch
extern Range argument_memory;  // what the kernel was called with
extern std::vector<Fiber> fibers;

// Ends the launch: the host gets std::runtime_error with kernel, file:line, block, thread, message.
[[noreturn]] void fail(const void* pc, const Fiber& who, const std::string& message);

// "file:line" of a code address, through all inlined callers.
std::string source_line(const void* pc);
std::string thread_name(const Fiber& fiber);
std::string block_name(std::uint64_t linear);
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// Gives other threads a turn, where the schedule wants it.
void maybe_interrupt();

namespace checker {

enum class Access : std::uint8_t { read, write, atomic };

// Whether the kernels of this library are compiled with the checker's hooks.
extern bool on;

void begin_launch();
bool in_shared_memory(const void* pointer, std::size_t bytes);
void begin_block(std::uint64_t linear);
void barrier();
void sync_warp(Warp& warp, unsigned lanes);
void fence(Fiber& who);
void access(const void* pointer, std::size_t bytes, Access kind, Fiber& who, const void* pc);
void async_issued(void* to, Fiber& who, const void* pc);  // 16 bytes that nobody may touch yet
void async_done(void* to, Fiber& who);

}  // namespace checker
}  // namespace simt
