// The checker. Kernel files are compiled with -fsanitize=thread,alignment,bounds,shift, but linked
// without the sanitizers' libraries: the hooks that the compiler calls at each access are defined
// here, over a shadow of shared and global memory. What it finds does not depend on the order in
// which threads happened to run: two accesses race unless something in the program orders them.
//
// Ordered are: launches; within a block, __syncthreads; within a warp, __syncwarp (shuffles, votes
// and products do not order memory); between blocks, __threadfence and an atomic of one block
// before the same atomic and __threadfence of the other. Everything else of two threads is
// concurrent.
#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#include <bitset>
#include <cstring>
#include <new>
#include <stdexcept>
#include <unordered_map>

#include "engine.h"

namespace simt::checker {

bool on = false;

namespace {

constexpr std::size_t kGranule = 2;  // bytes of one cell: neighbouring bf16 belong to two threads
constexpr std::size_t kPage = 4096;
constexpr std::size_t kCells = kPage / kGranule;

// Who touched a cell, and when. One block's execution is a run, numbered over all launches.
struct Stamp {
  std::uint32_t run = 0;    // 0: nobody
  std::uint32_t lanes = 0;  // of the warp, all at the same moment
  std::uint32_t pc = 0;     // offset in the library
  std::uint16_t epoch = 0;  // barriers of the block so far
  std::uint16_t time = 0;   // of the warp: its __syncwarps so far
  std::uint8_t warp = 0;
  std::uint8_t bytes = 0;  // which of the granule's, as bits
  bool atomic = false;
};

struct Cell {
  Stamp write;
  Stamp reads[2];
  std::uint8_t written = 0;  // bytes that hold a value
  bool pending = false;      // a cp.async into it is not waited for
};

struct Extent {
  std::uintptr_t begin, end;
  std::string name;
  bool initialised;
  std::uint32_t since;  // writes of earlier runs belong to what lay here before
};

// What the rules for one access depend on.
struct Memory {
  std::uint32_t floor;  // accesses of earlier runs are over
  std::uint32_t since;  // and what they wrote does not count as initialised
  bool initialised;
  bool shared;
};

// The block `run` released, at a fence, what its threads did before `epoch`, and what `thread` did.
struct Release {
  std::uint32_t run;
  std::uint16_t epoch;
  int thread;
};

// A thread's atomic saw the first `count` releases at an address.
struct Heard {
  std::uintptr_t address;
  std::size_t count;
  std::uint16_t epoch;
  int thread;
};

// What a release covers is ordered before what `threads` do after their fence of `epoch`, and from
// the next barrier on before what the whole block does.
struct Acquired {
  Release release;
  std::uint16_t epoch;
  std::bitset<1024> threads;
};

std::vector<Extent> extents;
constexpr std::size_t kRecent = 64;
std::size_t recent_extents[kRecent];  // found last for an address like this one: looked at first
std::unordered_map<std::uintptr_t, Cell*> pages;
std::vector<Range> variables;  // of this library: static shared memory
std::vector<Range> constants;
std::uintptr_t library = 0;

std::uint32_t run = 1;         // of the current block
std::uint32_t launch_run = 1;  // of the launch's first
std::uint16_t epoch = 0;
std::vector<std::uint64_t> blocks;  // the block of each run of this launch
std::unordered_map<std::uintptr_t, std::vector<Release>> releases;  // by the atomic's address
std::vector<Heard> heard;                                           // by this block
std::unordered_map<std::uint32_t, std::vector<Acquired>> acquired;  // by run, for this block
int unfenced_writers = 0;

// ---------------------------------------------------------------------------------------------
// Memory and its shadow

int find_segments(dl_phdr_info* info, std::size_t, void*) {
  const auto here = reinterpret_cast<std::uintptr_t>(&find_segments);
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const std::uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    ours |= segment.p_type == PT_LOAD && Range{begin, begin + segment.p_memsz}.holds(here);
  }
  if (!ours) return 0;
  library = info->dlpi_addr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const std::uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    const Range range{begin, begin + segment.p_memsz};
    if (segment.p_type == PT_GNU_RELRO) constants.push_back(range);
    if (segment.p_type != PT_LOAD) continue;
    ((segment.p_flags & PF_W) != 0 ? variables : constants).push_back(range);
  }
  return 1;
}

bool any_holds(const std::vector<Range>& ranges, std::uintptr_t address, std::size_t bytes) {
  for (const Range& range : ranges) {
    if (range.holds(address, bytes)) return true;
  }
  return false;
}

const Extent* extent_of(std::uintptr_t address, std::size_t bytes) {
  const auto inside = [&](const Extent& e) { return Range{e.begin, e.end}.holds(address, bytes); };
  std::size_t& recent = recent_extents[address / kPage % kRecent];
  if (recent < extents.size() && inside(extents[recent])) return &extents[recent];
  for (std::size_t i = extents.size(); i-- > 0;) {
    if (!inside(extents[i])) continue;
    recent = i;
    return &extents[i];
  }
  return nullptr;
}

Cell* new_page() {
  void* memory = mmap(nullptr, kCells * sizeof(Cell), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<Cell*>(memory);  // zeros: cells nobody touched
}

// The pages used last, found without a search.
struct Recent {
  std::uintptr_t page = 0;
  Cell* cells = nullptr;
};
Recent recent_pages[kRecent];

Cell& cell_of(std::uintptr_t address) {
  const std::uintptr_t page = address / kPage;
  Recent& entry = recent_pages[page % kRecent];
  if (entry.page != page) {
    Cell*& cells = pages[page];
    if (cells == nullptr) cells = new_page();
    entry = {page, cells};
  }
  return entry.cells[address % kPage / kGranule];
}

// "`bank` + 128 bytes"
std::string place_name(std::uintptr_t address) {
  if (shared_memory.holds(address)) {
    return format("dynamic shared memory + %zu bytes", address - shared_memory.begin);
  }
  if (const Extent* extent = extent_of(address, 1)) {
    return format("`%s` + %zu bytes", extent->name.c_str(), address - extent->begin);
  }
  return "a shared variable";
}

const char* verb(Access kind) {
  if (kind == Access::atomic) return "atomic access";
  return kind == Access::read ? "read" : "write";
}

[[noreturn]] void out_of_bounds(std::uintptr_t address, std::size_t bytes, Access kind,
                                const Fiber& who, const void* pc) {
  std::string nearest = "; no tensor is registered";
  std::uintptr_t best = ~std::uintptr_t{0};
  const auto consider = [&](std::uintptr_t begin, std::uintptr_t end, const std::string& name) {
    const bool before = address < begin;
    const std::uintptr_t distance = before ? begin - address : address - end;
    const std::uintptr_t size = before ? distance : address < end ? 0 : distance;
    if (size >= best) return;
    best = size;
    nearest = before          ? format(", %zu bytes before the begin of ", begin - address)
              : address < end ? std::string(", across the end of ")
                              : format(", %zu bytes behind the end of ", address - end);
    nearest += name + format(" (%zu bytes)", end - begin);
  };
  if (shared_memory.begin < shared_memory.end) {
    consider(shared_memory.begin, shared_memory.end, "dynamic shared memory");
  }
  for (const Extent& e : extents) consider(e.begin, e.end, "`" + e.name + "`");
  fail(pc, who, format("out of bounds: %s of %zu bytes", verb(kind), bytes) + nearest);
}

// False for memory without a shadow: constants and the kernel's arguments.
bool find_memory(std::uintptr_t address, std::size_t bytes, Access kind, const Fiber& who,
                 const void* pc, Memory& memory) {
  if (shared_memory.holds(address, bytes)) {
    memory = {run, run, false, true};
    return true;
  }
  if (const Extent* extent = extent_of(address, bytes)) {
    memory = {launch_run, extent->since, extent->initialised, false};
    return true;
  }
  if (kind == Access::read &&
      (any_holds(constants, address, bytes) || argument_memory.holds(address, bytes))) {
    return false;
  }
  if (any_holds(variables, address, bytes)) {
    memory = {run, run, false, true};
    return true;
  }
  out_of_bounds(address, bytes, kind, who, pc);
}

// ---------------------------------------------------------------------------------------------
// Order

bool released(const Stamp& stamp, const Fiber& who) {
  const auto found = acquired.find(stamp.run);
  if (found == acquired.end()) return false;
  for (const Acquired& a : found->second) {
    const int thread = a.release.thread;
    const bool by_releaser = stamp.warp == thread / kLanes && stamp.lanes == 1u << thread % kLanes;
    const bool before = stamp.epoch < a.release.epoch || by_releaser;
    if (before && (a.epoch < epoch || a.threads[who.index])) return true;
  }
  return false;
}

// The lanes of `stamp` whose access nothing orders before what `who` does now.
unsigned unordered_lanes(const Stamp& stamp, const Fiber& who, const Memory& memory) {
  if (stamp.run < memory.floor) return 0;
  if (stamp.run != run) return released(stamp, who) ? 0 : stamp.lanes;
  if (stamp.epoch != epoch) return 0;
  if (stamp.warp != who.warp->index) return stamp.lanes;
  unsigned lanes = stamp.lanes & ~(1u << who.lane);
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    if (who.seen[lane] > stamp.time) lanes &= ~(1u << lane);
  }
  return lanes;
}

[[noreturn]] void race(std::uintptr_t address, Access kind, const Fiber& who, const void* pc,
                       const Stamp& other, const char* other_kind, unsigned lanes) {
  const Fiber& first = fibers[other.warp * kLanes + __builtin_ctz(lanes)];
  std::string text = format("race: %s of ", verb(kind)) + place_name(address);
  text += format(", not ordered after the %s by ", other_kind);
  if (other.run != run) text += "block " + block_name(blocks[other.run - launch_run]) + ", ";
  text += "thread " + thread_name(first) + " at ";
  text += source_line(reinterpret_cast<const void*>(library + other.pc));
  fail(pc, who, text);
}

bool same_moment(const Stamp& a, const Stamp& b) {
  return a.run == b.run && a.epoch == b.epoch && a.time == b.time && a.warp == b.warp &&
         a.bytes == b.bytes;
}

// Keeps two readers of different warps where there are two: whichever warp writes next, one of
// them belongs to another.
void note_read(Cell& cell, const Stamp& now, const Memory& memory) {
  for (Stamp& old : cell.reads) {
    if (!same_moment(old, now)) continue;
    old.lanes |= now.lanes;
    return;
  }
  for (Stamp& old : cell.reads) {
    if (old.run != now.run || old.warp != now.warp || old.bytes != now.bytes) continue;
    old = now;
    return;
  }
  const Stamp& first = cell.reads[0];
  const bool over = first.run < memory.floor || (first.run == run && first.epoch != epoch);
  cell.reads[over ? 0 : 1] = now;
}

void note_write(Cell& cell, const Stamp& now, const Memory& memory) {
  if (cell.write.run < memory.since) cell.written = 0;
  cell.written |= now.bytes;
  if (now.atomic && cell.write.atomic && same_moment(cell.write, now)) {
    cell.write.lanes |= now.lanes;
  } else {
    cell.write = now;
  }
  cell.reads[0].run = cell.reads[1].run = 0;
  cell.pending = false;
}

void check_cell(Cell& cell, std::uintptr_t address, Access kind, const Stamp& now,
                const Memory& memory, Fiber& who, const void* pc) {
  const unsigned bytes = now.bytes;
  if (cell.pending && cell.write.run >= memory.floor && cell.write.run == run) {
    fail(pc, who,
         format("%s of ", verb(kind)) + place_name(address) +
             " under a cp.async that was not waited for, issued at " +
             source_line(reinterpret_cast<const void*>(library + cell.write.pc)));
  }
  if (kind != Access::write && !memory.initialised) {
    const unsigned written = cell.write.run < memory.since ? 0 : cell.written;
    if ((written & bytes) != bytes) {
      fail(pc, who,
           format("uninitialised: %s of ", verb(kind)) + place_name(address) +
               ", which nothing has written so far");
    }
  }
  if ((cell.write.bytes & bytes) != 0 && !(now.atomic && cell.write.atomic)) {
    const unsigned lanes = unordered_lanes(cell.write, who, memory);
    const char* what = cell.write.atomic ? "atomic access" : "write";
    if (lanes != 0) race(address, kind, who, pc, cell.write, what, lanes);
  }
  if (kind == Access::read) return note_read(cell, now, memory);
  for (const Stamp& read : cell.reads) {
    if (read.run == 0 || (read.bytes & bytes) == 0) continue;
    const unsigned lanes = unordered_lanes(read, who, memory);
    if (lanes != 0) race(address, kind, who, pc, read, "read", lanes);
  }
  note_write(cell, now, memory);
}

// A thread repeats what it did before anything else happened: nothing new to learn.
bool repeated(const Cell& cell, Access kind, const Stamp& now) {
  if (kind == Access::read) {
    return same_moment(cell.reads[0], now) && (cell.reads[0].lanes & now.lanes) != 0;
  }
  return kind == Access::write && same_moment(cell.write, now) && cell.write.lanes == now.lanes &&
         !cell.write.atomic && !cell.pending && cell.reads[0].run == 0 && cell.reads[1].run == 0;
}

// ---------------------------------------------------------------------------------------------
// Order between blocks, by fences and atomics

void note_atomic(std::uintptr_t address, Fiber& who) {
  if (const auto found = releases.find(address); found != releases.end()) {
    heard.push_back({address, found->second.size(), epoch, who.index});
  }
  if (who.fence_epoch < 0 || who.wrote_since_fence) return;
  // A fence after a barrier covers what came before the barrier. One before it covers what came
  // after too if every thread that wrote had its own.
  const int covered = unfenced_writers == 0 ? epoch : who.fence_epoch;
  releases[address].push_back({run, static_cast<std::uint16_t>(covered), who.index});
}

void acquire(const Release& release, const Fiber& who) {
  auto& known = acquired[release.run];
  for (Acquired& a : known) {
    if (a.release.thread != release.thread || a.release.epoch != release.epoch) continue;
    if (a.epoch < epoch) return;
    a.threads.set(who.index);
    return;
  }
  known.push_back({release, epoch, {}});
  known.back().threads.set(who.index);
}

void note_global_write(Fiber& who) {
  if (who.wrote_since_fence) return;
  who.wrote_since_fence = true;
  ++unfenced_writers;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// What the emulator tells

void begin_launch() {
  if (library == 0) dl_iterate_phdr(find_segments, nullptr);
  launch_run = run + 1;
  blocks.clear();
  releases.clear();
}

bool in_shared_memory(const void* pointer, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  return shared_memory.holds(address, bytes) || any_holds(variables, address, bytes);
}

void begin_block(std::uint64_t linear) {
  ++run;
  epoch = 0;
  blocks.push_back(linear);
  heard.clear();
  acquired.clear();
  unfenced_writers = 0;
}

void barrier() {
  if (++epoch == 0) throw std::runtime_error("simt: more barriers in a block than it can count");
}

// All of `lanes` now know what each of them knew, and what each has done.
void sync_warp(Warp& warp, unsigned lanes) {
  if (!on) return;
  ++warp.time;
  std::uint16_t known[kLanes] = {};
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    const Fiber& fiber = warp.lanes[__builtin_ctz(left)];
    for (int i = 0; i < kLanes; ++i) known[i] = std::max(known[i], fiber.seen[i]);
  }
  for (unsigned left = lanes; left != 0; left &= left - 1) known[__builtin_ctz(left)] = warp.time;
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    std::memcpy(warp.lanes[__builtin_ctz(left)].seen, known, sizeof(known));
  }
}

void fence(Fiber& who) {
  if (!on) return;
  who.fence_epoch = epoch;
  if (who.wrote_since_fence) --unfenced_writers;
  who.wrote_since_fence = false;
  for (const Heard& h : heard) {
    if (h.epoch == epoch && h.thread != who.index) continue;
    const auto& list = releases[h.address];
    for (std::size_t i = 0; i < h.count; ++i) acquire(list[i], who);
  }
}

void access(const void* pointer, std::size_t bytes, Access kind, Fiber& who, const void* pc) {
  if (!on) return;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  Memory memory;
  if (!find_memory(address, bytes, kind, who, pc, memory)) return;
  if (!memory.shared) {
    if (kind == Access::atomic) note_atomic(address, who);
    if (kind == Access::write) note_global_write(who);
  }
  Stamp now;
  now.run = run;
  now.lanes = 1u << who.lane;
  now.pc = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(pc) - library);
  now.epoch = epoch;
  now.time = who.warp->time;
  now.warp = static_cast<std::uint8_t>(who.warp->index);
  now.atomic = kind == Access::atomic;
  const std::uintptr_t end = address + bytes;
  for (std::uintptr_t at = address / kGranule * kGranule; at < end; at += kGranule) {
    now.bytes = (at >= address ? 1 : 0) | (at + 1 < end ? 2 : 0);
    Cell& cell = cell_of(at);
    if (!repeated(cell, kind, now)) {
      check_cell(cell, std::max(at, address), kind, now, memory, who, pc);
    }
  }
}

void async_issued(void* to, Fiber& who, const void* pc) {
  if (!on) return;
  access(to, 16, Access::write, who, pc);
  const auto address = reinterpret_cast<std::uintptr_t>(to);
  for (std::size_t i = 0; i < 16; i += kGranule) cell_of(address + i).pending = true;
}

// The write counts from now: before, nobody could touch the cells.
void async_done(void* to, Fiber& who) {
  if (!on) return;
  const auto address = reinterpret_cast<std::uintptr_t>(to);
  for (std::size_t i = 0; i < 16; i += kGranule) {
    Cell& cell = cell_of(address + i);
    cell.pending = false;
    cell.write.epoch = epoch;
    cell.write.time = who.warp->time;
  }
}

namespace {

// Every hook ends here. Stacks first: arrays in registers on a GPU are in memory here.
inline void hook(const void* pointer, std::size_t bytes, Access kind, const void* pc) {
  if (self == nullptr || stacks.holds(reinterpret_cast<std::uintptr_t>(pointer))) return;
  maybe_interrupt();
  access(pointer, bytes, kind, *self, pc);
}

}  // namespace
}  // namespace simt::checker

namespace simt {

void watch(const void* pointer, std::size_t bytes, const char* name, bool initialised) {
  const auto begin = reinterpret_cast<std::uintptr_t>(pointer);
  using namespace checker;
  extents.push_back({begin, begin + bytes, name, initialised, checker::run + 1});
  // Where ranges overlap the newest counts: what was found before may be no longer right.
  std::fill(std::begin(recent_extents), std::end(recent_extents), extents.size() - 1);
}

void forget() {
  using namespace checker;
  extents.clear();
  // A shadow is 32 times its memory: not to be kept for whatever a long test run has touched.
  constexpr std::size_t kPagesToKeep = 1024;
  if (pages.size() <= kPagesToKeep) return;
  for (const auto& [page, cells] : pages) munmap(cells, kCells * sizeof(Cell));
  pages.clear();
  std::fill(std::begin(recent_pages), std::end(recent_pages), Recent{});
}

}  // namespace simt

// ---------------------------------------------------------------------------------------------
// The compiler's hooks

using simt::checker::Access;
using simt::checker::hook;

extern "C" {

void __tsan_init() { simt::checker::on = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// Whether a static variable is constructed: the compiler's own question, no access of the kernel.
char __tsan_atomic8_load(const volatile void* p, int) {
  return *static_cast<const volatile char*>(p);
}

#define SIMT_HOOKS(bytes)                                                                         \
  void __tsan_read##bytes(void* p) { hook(p, bytes, Access::read, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* p) {                                                             \
    hook(p, bytes, Access::write, __builtin_return_address(0));                                   \
  }                                                                                               \
  void __tsan_unaligned_read##bytes(void* p) {                                                    \
    hook(p, bytes, Access::read, __builtin_return_address(0));                                    \
  }                                                                                               \
  void __tsan_unaligned_write##bytes(void* p) {                                                   \
    hook(p, bytes, Access::write, __builtin_return_address(0));                                   \
  }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
#undef SIMT_HOOKS

void __tsan_read_range(void* p, std::size_t bytes) {
  hook(p, bytes, Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, std::size_t bytes) {
  hook(p, bytes, Access::write, __builtin_return_address(0));
}

// The first members of what GCC hands to the first handler below.
struct UbsanTypeMismatch {
  const char* file;
  std::uint32_t line, column;
  const void* type;
  unsigned char log_alignment;
};

void __ubsan_handle_type_mismatch_v1(void* data, void* pointer) {
  if (simt::self == nullptr) return;
  const auto* mismatch = static_cast<const UbsanTypeMismatch*>(data);
  const std::size_t needed = std::size_t{1} << mismatch->log_alignment;
  simt::fail(__builtin_return_address(0), *simt::self,
             simt::format("misaligned: %p is no multiple of %zu bytes", pointer, needed));
}

void __ubsan_handle_out_of_bounds(void*, void* index) {
  if (simt::self == nullptr) return;
  simt::fail(__builtin_return_address(0), *simt::self,
             simt::format("out of bounds: index %lld of an array",
                          static_cast<long long>(reinterpret_cast<std::intptr_t>(index))));
}

void __ubsan_handle_shift_out_of_bounds(void*, void*, void* by) {
  if (simt::self == nullptr) return;
  simt::fail(__builtin_return_address(0), *simt::self,
             simt::format("shift by %lld bits",
                          static_cast<long long>(reinterpret_cast<std::intptr_t>(by))));
}

}  // extern "C"
