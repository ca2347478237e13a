// The emulator. Every CUDA thread of a block is a fiber on its own stack; one of them runs at a
// time, until it must wait for others. Blocks run one after another.
#include "simt.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>

#include "engine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "tests/simt: the context switch is written for x86-64"
#endif

// void simt_switch(void** save, void* load): parks this stack and goes on with another. simt_resume
// is its second half, which the handler of SIGSEGV jumps to when a thread's own half is lost.
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
.hidden simt_resume
.globl simt_resume
simt_resume:
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void simt_switch(void** save, void* load);
extern "C" void simt_resume();

namespace simt {

Fiber* self = nullptr;
Range stacks, shared_memory, argument_memory;
std::vector<Fiber> fibers;

namespace {

constexpr int kMaxThreads = 1024;
constexpr std::size_t kStackBytes = 128 * 1024;  // the lowest page of each is its guard
constexpr std::size_t kPage = 4096;
constexpr std::size_t kMaxShared = 227 * 1024;  // the most that any supported GPU gives a block

Settings settings;
std::mt19937_64 random_numbers;
std::deque<const char*> launch_names;
void (*launch_hook)() = nullptr;

Launch running{};
uint3 block_position{};
std::vector<Warp> warps;
void* scheduler = nullptr;  // its stack pointer while a thread runs
int live = 0;               // threads of the block that have not returned
int cursor = 0;             // of the schedule: the thread that ran last
int barrier_count = 0;      // predicates that held at the last barrier
int barrier_total = 0;

std::string failure;  // what ended the launch, empty so far
bool faulted = false;
const void* fault_address = nullptr;
const void* fault_pc = nullptr;
Fiber* fault_thread = nullptr;

const void* stack_of(int thread) {
  return reinterpret_cast<const void*>(stacks.begin + kStackBytes * thread);
}

void reserve_stacks() {
  if (stacks.begin != 0) return;
  void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for the threads' stacks");
  stacks.begin = reinterpret_cast<std::uintptr_t>(memory);
  stacks.end = stacks.begin + kStackBytes * kMaxThreads;
  for (int thread = 0; thread < kMaxThreads; ++thread) {
    mprotect(const_cast<void*>(stack_of(thread)), kPage, PROT_NONE);
  }
}

// AddressSanitizer has to be told which stack is in use, and that what an abandoned thread had on
// its stack is gone.
namespace sanitizer {
#if defined(__SANITIZE_ADDRESS__)
const void* host_stack = nullptr;
std::size_t host_bytes = 0;

void to_thread(const Fiber& fiber) {
  const auto* lowest = static_cast<const char*>(stack_of(fiber.index)) + kPage;
  __sanitizer_start_switch_fiber(nullptr, lowest, kStackBytes - kPage);
}
void in_thread() { __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_bytes); }
void to_host() { __sanitizer_start_switch_fiber(nullptr, host_stack, host_bytes); }
void on_host() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
void clear_stack(int thread) {
  __asan_unpoison_memory_region(static_cast<const char*>(stack_of(thread)) + kPage,
                                kStackBytes - kPage);
}
// Of the shared memory that there is a launch has what it asked for.
void limit_shared(const Range& all, const Range& used) {
  __asan_poison_memory_region(reinterpret_cast<void*>(all.begin), all.end - all.begin);
  __asan_unpoison_memory_region(reinterpret_cast<void*>(used.begin), used.end - used.begin);
}
#else
void to_thread(const Fiber&) {}
void in_thread() {}
void to_host() {}
void on_host() {}
void clear_stack(int) {}
void limit_shared(const Range&, const Range&) {}
#endif
}  // namespace sanitizer

// Dynamic shared memory ends at a page that cannot be touched, so that overruns show unchecked too.
void reserve_shared(std::size_t bytes) {
  static std::uintptr_t end = 0;
  constexpr std::size_t reserved = (kMaxShared + kPage - 1) / kPage * kPage;
  if (end == 0) {
    void* memory =
        mmap(nullptr, reserved + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for shared memory");
    end = reinterpret_cast<std::uintptr_t>(memory) + reserved;
    mprotect(reinterpret_cast<void*>(end), kPage, PROT_NONE);
  }
  shared_memory.begin = (end - bytes) / 16 * 16;
  shared_memory.end = shared_memory.begin + bytes;
  sanitizer::limit_shared({end - reserved, end + kPage}, shared_memory);
}

// ---------------------------------------------------------------------------------------------
// Turns

// Back to the scheduler; returns at this thread's next turn.
void leave() {
  sanitizer::to_host();
  simt_switch(&self->stack_pointer, scheduler);
  sanitizer::in_thread();
}

void set_ready(Fiber& fiber) {
  fiber.state = State::ready;
  fiber.warp->parked &= ~(1u << fiber.lane);
  fiber.warp->ready |= 1u << fiber.lane;
}

void park(State state) {
  self->state = state;
  self->warp->ready &= ~(1u << self->lane);
  if (state == State::collective) self->warp->parked |= 1u << self->lane;
}

// Runs the collective that `fiber` waits in if all of its lanes wait in the same; a lane that has
// returned is not waited for.
bool complete(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  const unsigned lanes = fiber.mask & warp.live;
  if ((lanes & ~warp.parked) != 0) return false;
  void* arguments[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const Fiber& other = warp.lanes[lane];
    if (other.collective != fiber.collective || other.mask != fiber.mask) return false;
    arguments[lane] = other.arguments;
  }
  fiber.collective(warp, lanes, arguments);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes >> lane & 1) set_ready(warp.lanes[lane]);
  }
  return true;
}

void collective(const char* name, Collective run, unsigned mask, void* arguments, const void* pc) {
  Fiber& me = *self;
  me.pc = pc;
  maybe_interrupt();
  if (!(mask >> me.lane & 1)) {
    fail(pc, me, format("%s with mask 0x%08x, which lacks the calling lane", name, mask));
  }
  me.waits_for = name;
  me.collective = run;
  me.mask = mask;
  me.arguments = arguments;
  park(State::collective);
  if (!complete(me)) leave();
}

// A thread's first turn, and its end. Lanes that wait for a returned one can go on without it.
void thread_main() {
  sanitizer::in_thread();
  running.invoke(running.arguments);
  const auto under_way = [](const std::vector<AsyncCopy>& group) { return !group.empty(); };
  if (under_way(self->open_group) ||
      std::any_of(self->groups.begin(), self->groups.end(), under_way))
    fail(self->pc, *self, "the thread ended with a cp.async under way");
  Warp& warp = *self->warp;
  park(State::done);
  warp.live &= ~(1u << self->lane);
  --live;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (warp.parked >> lane & 1) complete(warp.lanes[lane]);
  }
  leave();
  __builtin_unreachable();
}

// The first thread that is ready from `first` on, around the block.
int next_up(int first) {
  const int count = static_cast<int>(warps.size());
  for (int i = 0; i <= count; ++i) {
    const Warp& warp = warps[(first / kLanes + i) % count];
    const unsigned lanes = i == 0 ? warp.ready & kFull << first % kLanes : warp.ready;
    if (lanes != 0) return warp.index * kLanes + __builtin_ctz(lanes);
  }
  return -1;
}

int next_down(int first) {
  const int count = static_cast<int>(warps.size());
  for (int i = 0; i <= count; ++i) {
    const Warp& warp = warps[(first / kLanes + count - i % count) % count];
    const unsigned lanes = i == 0 ? warp.ready & kFull >> (31 - first % kLanes) : warp.ready;
    if (lanes != 0) return warp.index * kLanes + 31 - __builtin_clz(lanes);
  }
  return -1;
}

int next_random() {
  int ready = 0;
  for (const Warp& warp : warps) ready += __builtin_popcount(warp.ready);
  if (ready == 0) return -1;
  int chosen = static_cast<int>(random_numbers() % ready);
  for (const Warp& warp : warps) {
    const int here = __builtin_popcount(warp.ready);
    if (chosen >= here) {
      chosen -= here;
      continue;
    }
    unsigned lanes = warp.ready;
    while (chosen-- > 0) lanes &= lanes - 1;
    return warp.index * kLanes + __builtin_ctz(lanes);
  }
  return -1;
}

int next_thread() {
  switch (settings.schedule) {
    case Schedule::forward:
      return next_up(cursor + 1);
    case Schedule::reverse:
      return next_down(cursor > 0 ? cursor - 1 : static_cast<int>(fibers.size()) - 1);
    case Schedule::greedy: {
      const Warp& warp = warps[cursor / kLanes];
      if (warp.ready != 0) return warp.index * kLanes + __builtin_ctz(warp.ready);
      return next_up(cursor + 1);
    }
    case Schedule::random:
      return next_random();
  }
  return -1;
}

// ---------------------------------------------------------------------------------------------
// Barriers and deadlocks

// "threads 0-31, 40" of those for which `in` holds.
template <class In>
std::string threads_where(In in) {
  std::string text;
  const int count = static_cast<int>(fibers.size());
  for (int i = 0; i < count; ++i) {
    if (!in(fibers[i])) continue;
    int last = i;
    while (last + 1 < count && in(fibers[last + 1])) ++last;
    text += text.empty() ? "" : ", ";
    text += last > i ? format("%d-%d", i, last) : format("%d", i);
    i = last;
  }
  return "threads " + text;
}

// Where each waiting thread stands, one part for each place.
std::string who_waits_where() {
  std::map<std::string, std::vector<bool>> places;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::done) continue;
    std::string place = std::string(fiber.waits_for) + " at " + source_line(fiber.pc);
    if (fiber.state == State::collective) place += format(" (mask 0x%08x)", fiber.mask);
    auto& members = places.try_emplace(place, fibers.size()).first->second;
    members[fiber.index] = true;
  }
  std::string text;
  for (const auto& [place, members] : places) {
    text += text.empty() ? "" : "; ";
    text += threads_where([&](const Fiber& f) { return members[f.index]; }) + " in " + place;
  }
  if (live < static_cast<int>(fibers.size())) {
    text += "; returned: " + threads_where([](const Fiber& f) { return f.state == State::done; });
  }
  return text;
}

// What it takes to see the same again.
std::string schedule_name() {
  const char* names[] = {"forward", "reverse", "greedy", "random"};
  std::string text = std::string(" [") + names[static_cast<int>(settings.schedule)];
  if (settings.schedule == Schedule::random) {
    text += format(", seed %llu", static_cast<unsigned long long>(settings.seed));
  }
  return text + (settings.cp_async_late ? ", cp.async late]" : ", cp.async early]");
}

void report(const void* pc, const Fiber& who, const std::string& message) {
  failure =
      format("simt: kernel %s: %s: block %s, thread %s: ", running.name, source_line(pc).c_str(),
             block_name(block_position.x +
                        std::uint64_t{running.grid.x} *
                            (block_position.y + std::uint64_t{running.grid.y} * block_position.z))
                 .c_str(),
             thread_name(who).c_str());
  failure += message + schedule_name();
}

// Called when no thread can go on: all that live must stand at the same barrier.
void release_barrier() {
  const Fiber* first = nullptr;
  bool together = true;
  bool same_call = true;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::done) continue;
    if (first == nullptr) first = &fiber;
    together &= fiber.state == State::barrier;
    same_call &= fiber.pc == first->pc;
  }
  if (!together) return report(first->pc, *first, "deadlock: " + who_waits_where());
  if (!same_call) {
    // One line can have become several calls, of an unrolled loop for example.
    const std::string line = source_line(first->pc);
    for (const Fiber& fiber : fibers) {
      if (fiber.state != State::barrier || source_line(fiber.pc) == line) continue;
      return report(first->pc, *first, "divergent barrier: " + who_waits_where());
    }
  }
  barrier_count = barrier_total = 0;
  for (Fiber& fiber : fibers) {
    if (fiber.state != State::barrier) continue;
    barrier_count += fiber.predicate != 0;
    ++barrier_total;
    set_ready(fiber);
  }
  checker::barrier();
}

// ---------------------------------------------------------------------------------------------
// Blocks

void start_thread(int index) {
  Fiber& fiber = fibers[index];
  sanitizer::clear_stack(index);
  fiber.open_group.clear();
  fiber.groups.clear();
  std::memset(fiber.seen, 0, sizeof(fiber.seen));
  fiber.fence_epoch = -1;
  fiber.wrote_since_fence = false;
  // What simt_switch expects: six registers and the address to return to, the stack aligned as at
  // the entry of a function.
  void** top = reinterpret_cast<void**>(stacks.begin + kStackBytes * (index + 1));
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(&thread_main);
  std::fill(top - 8, top - 2, nullptr);
  fiber.stack_pointer = top - 8;
  set_ready(fiber);
}

void set_up_block(int threads) {
  const dim3 block = running.block;
  fibers.resize(threads);
  warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = i;
    fiber.lane = i % kLanes;
    fiber.warp = &warps[i / kLanes];
    fiber.position = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    Warp& warp = *fiber.warp;
    if (fiber.lane == 0) warp.lanes = &fiber;
    warp.index = i / kLanes;
    warp.live |= 1u << fiber.lane;
    start_thread(i);
  }
  live = threads;
  cursor = settings.schedule == Schedule::reverse ? 0 : threads - 1;
}

void report_fault() {
  const auto address = reinterpret_cast<std::uintptr_t>(fault_address);
  const bool overflow = stacks.holds(address) && (address - stacks.begin) % kStackBytes < kPage;
  report(fault_pc, *fault_thread,
         overflow ? format("stack overflow: a thread has %zu bytes", kStackBytes - kPage)
                  : format("invalid address %p", fault_address));
}

void run_block(std::uint64_t linear, int threads) {
  const dim3 grid = running.grid;
  block_position = {static_cast<unsigned>(linear % grid.x),
                    static_cast<unsigned>(linear / grid.x % grid.y),
                    static_cast<unsigned>(linear / grid.x / grid.y)};
  set_up_block(threads);
  std::memset(reinterpret_cast<void*>(shared_memory.begin), 0xff,
              shared_memory.end - shared_memory.begin);
  checker::begin_block(linear);
  while (live > 0 && failure.empty()) {
    const int thread = next_thread();
    if (thread < 0) {
      release_barrier();
      continue;
    }
    cursor = thread;
    self = &fibers[thread];
    sanitizer::to_thread(*self);
    simt_switch(&scheduler, self->stack_pointer);
    sanitizer::on_host();
    self = nullptr;
    if (faulted) report_fault();
  }
}

std::vector<std::uint64_t> block_order(std::uint64_t blocks) {
  std::vector<std::uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (settings.schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  if (settings.schedule == Schedule::random) {
    std::shuffle(order.begin(), order.end(), random_numbers);
  }
  return order;
}

// While kernels run, an invalid address in one of their threads ends the launch, not the process.
class FaultHandler {
 public:
  FaultHandler() {
    static char memory[64 * 1024];
    stack_t alternative{};
    alternative.ss_sp = memory;
    alternative.ss_size = sizeof(memory);
    sigaltstack(&alternative, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = &handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static void handle(int signal_number, siginfo_t* info, void* context) {
    if (self == nullptr) {
      signal(signal_number, SIG_DFL);
      return;
    }
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    faulted = true;
    fault_address = info->si_addr;
    fault_thread = self;
    fault_pc = reinterpret_cast<const char*>(registers[REG_RIP]) + 1;
    sanitizer::to_host();
    registers[REG_RSP] = reinterpret_cast<greg_t>(scheduler);
    registers[REG_RIP] = reinterpret_cast<greg_t>(&simt_resume);
  }

  stack_t old_stack_{};
  struct sigaction old_segv_{}, old_bus_{};
};

void check_launch(const Launch& launch, std::uint64_t threads) {
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(format("simt: kernel %s: %s", launch.name, what.c_str()));
  };
  if (threads < 1 || threads > kMaxThreads) {
    refuse(format("expected 1 to %d threads in a block, got %llu", kMaxThreads,
                  static_cast<unsigned long long>(threads)));
  }
  const dim3 grid = launch.grid;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    refuse(format("a grid of (%u, %u, %u) blocks cannot be started", grid.x, grid.y, grid.z));
  }
  if (launch.shared_bytes > kMaxShared) {
    refuse(format("expected at most %zu bytes of shared memory, got %zu", kMaxShared,
                  launch.shared_bytes));
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// For the host and for engine.h

void configure(const Settings& wanted) {
  settings = wanted;
  random_numbers.seed(wanted.seed);
}

std::string launched() {
  std::string names;
  for (const char* name : launch_names) names += std::string(name) + " ";
  launch_names.clear();
  return names;
}

void on_launch(void (*hook)()) { launch_hook = hook; }

void run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const std::uint64_t threads = std::uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  check_launch(launch, threads);
  if (launch_hook != nullptr) launch_hook();
  launch_names.push_back(launch.name);
  if (launch_names.size() > 64) launch_names.pop_front();
  running = launch;
  reserve_stacks();
  reserve_shared(launch.shared_bytes);
  const auto arguments = reinterpret_cast<std::uintptr_t>(launch.arguments);
  argument_memory = {arguments, arguments + launch.argument_bytes};
  failure.clear();
  faulted = false;
  checker::begin_launch();
  {
    const FaultHandler handler;
    const std::uint64_t blocks = std::uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    for (const std::uint64_t block : block_order(blocks)) {
      run_block(block, static_cast<int>(threads));
      if (!failure.empty()) break;
    }
  }
  self = nullptr;
  if (!failure.empty()) throw std::runtime_error(failure);
}

// The thread that failed and all others are left where they stand: kernels own nothing.
void fail(const void* pc, const Fiber& who, const std::string& message) {
  if (self == nullptr) {
    std::fprintf(stderr, "simt: outside of a kernel: %s\n", message.c_str());
    std::abort();
  }
  report(pc, who, message);
  leave();
  __builtin_unreachable();
}

void maybe_interrupt() {
  if (settings.schedule == Schedule::random && random_numbers() % 16 == 0) leave();
}

std::string format(const char* pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof(text), pattern, arguments);
  va_end(arguments);
  return text;
}

std::string thread_name(const Fiber& fiber) {
  return format("(%u, %u, %u)", fiber.position.x, fiber.position.y, fiber.position.z);
}

std::string block_name(std::uint64_t linear) {
  const dim3 grid = running.grid;
  return format("(%llu, %llu, %llu)", static_cast<unsigned long long>(linear % grid.x),
                static_cast<unsigned long long>(linear / grid.x % grid.y),
                static_cast<unsigned long long>(linear / grid.x / grid.y));
}

// Asks addr2line, innermost frame first, and leaves out what belongs to the emulator and CUDA.
std::string source_line(const void* pc) {
  static std::map<const void*, std::string> known;
  if (const auto found = known.find(pc); found != known.end()) return found->second;
  Dl_info library{};
  if (dladdr(pc, &library) == 0 || library.dli_fname == nullptr) return format("%p", pc);
  const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(library.dli_fbase);
  // pc is where the call returns to: the call itself ends one byte before.
  const std::string command = format("addr2line -i -e '%s' 0x%zx 2>/dev/null", library.dli_fname,
                                     static_cast<std::size_t>(offset - 1));
  std::string text;
  if (FILE* answer = popen(command.c_str(), "r")) {
    char line[1024];
    while (std::fgets(line, sizeof(line), answer) != nullptr) {
      std::string frame = line;
      frame.erase(frame.find_last_not_of("\n") + 1);
      frame.erase(std::min(frame.size(), frame.find(" (discriminator")));
      const std::string file = frame.substr(frame.rfind('/') + 1);
      const bool foreign = file.starts_with("simt.h:") || file.starts_with("simt.cpp:") ||
                           file.starts_with("gpu.cuh:") || file.starts_with("cuda_") ||
                           file.starts_with("?") || frame.find("/c++/") != std::string::npos;
      if (!foreign) text += (text.empty() ? "" : ", called at ") + file;
    }
    pclose(answer);
  }
  if (text.empty()) text = format("%s+0x%zx", library.dli_fname, static_cast<std::size_t>(offset));
  return known[pc] = text;
}

// ---------------------------------------------------------------------------------------------
// What kernels call

uint3 thread_index() { return self->position; }
uint3 block_index() { return block_position; }
dim3 block_size() { return running.block; }
dim3 grid_size() { return running.grid; }
unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(shared_memory.begin); }

int barrier(int predicate, int kind) {
  self->pc = __builtin_return_address(0);
  self->waits_for = "__syncthreads";
  self->predicate = predicate;
  maybe_interrupt();
  park(State::barrier);
  leave();
  // The next barrier cannot be released before every thread has read this one's result.
  if (kind == 0) return barrier_count;
  return kind == 1 ? barrier_count == barrier_total : barrier_count > 0;
}

namespace {

struct ShuffleArguments {
  std::uint64_t bits, result;
  Shuffle kind;
  int operand, width;
};

// The lane that `lane` reads, as the PTX ISA's shfl.sync defines it.
int source_lane(int lane, const ShuffleArguments& call) {
  const int first = lane & ~(call.width - 1);
  const int last = first + call.width - 1;
  int source = lane;
  switch (call.kind) {
    case Shuffle::index:
      return first + (call.operand & (call.width - 1));
    case Shuffle::up:
      source = lane - call.operand;
      return source < first ? lane : source;
    case Shuffle::down:
      source = lane + call.operand;
      return source > last ? lane : source;
    case Shuffle::exclusive_or:
      source = lane ^ call.operand;
      return source > last ? lane : source;
  }
  return lane;
}

void run_shuffle(Warp& warp, unsigned lanes, void** arguments) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto& call = *static_cast<ShuffleArguments*>(arguments[lane]);
    const int source = source_lane(lane, call);
    if (!(lanes >> source & 1)) {
      const Fiber& who = warp.lanes[lane];
      fail(who.pc, who, format("shuffle from lane %d, which does not take part", source));
    }
    call.result = static_cast<ShuffleArguments*>(arguments[source])->bits;
  }
}

struct VoteArguments {
  int predicate;
  unsigned ballot, lanes;
};

void run_vote(Warp&, unsigned lanes, void** arguments) {
  unsigned ballot = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    if (static_cast<VoteArguments*>(arguments[lane])->predicate != 0) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    static_cast<VoteArguments*>(arguments[lane])->ballot = ballot;
    static_cast<VoteArguments*>(arguments[lane])->lanes = lanes;
  }
}

VoteArguments vote(const char* name, unsigned mask, int predicate, const void* pc) {
  VoteArguments arguments{predicate, 0, 0};
  collective(name, run_vote, mask, &arguments, pc);
  return arguments;
}

struct ReduceArguments {
  std::uint32_t value, result;
  Reduce kind;
  bool is_signed;
};

std::uint32_t reduced(std::uint32_t a, std::uint32_t b, const ReduceArguments& call) {
  const bool less =
      call.is_signed ? static_cast<std::int32_t>(a) < static_cast<std::int32_t>(b) : a < b;
  switch (call.kind) {
    case Reduce::add:
      return a + b;
    case Reduce::minimum:
      return less ? a : b;
    case Reduce::maximum:
      return less ? b : a;
    case Reduce::bit_and:
      return a & b;
    case Reduce::bit_or:
      return a | b;
    case Reduce::bit_xor:
      return a ^ b;
  }
  return a;
}

void run_reduce(Warp&, unsigned lanes, void** arguments) {
  const ReduceArguments* first = nullptr;
  std::uint32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const auto& call = *static_cast<ReduceArguments*>(arguments[lane]);
    total = first == nullptr ? call.value : reduced(total, call.value, call);
    first = &call;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes >> lane & 1) static_cast<ReduceArguments*>(arguments[lane])->result = total;
  }
}

void run_sync(Warp& warp, unsigned lanes, void**) { checker::sync_warp(warp, lanes); }

}  // namespace

std::uint64_t shuffle(unsigned mask, std::uint64_t bits, Shuffle kind, int operand, int width) {
  const void* pc = __builtin_return_address(0);
  if (width < 1 || width > kLanes || (width & (width - 1)) != 0) {
    fail(pc, *self, format("shuffle of width %d, which is no power of two up to 32", width));
  }
  ShuffleArguments arguments{bits, 0, kind, operand, width};
  collective("a shuffle", run_shuffle, mask, &arguments, pc);
  return arguments.result;
}

std::uint32_t reduce(unsigned mask, std::uint32_t value, Reduce kind, bool is_signed) {
  ReduceArguments arguments{value, 0, kind, is_signed};
  collective("a warp reduction", run_reduce, mask, &arguments, __builtin_return_address(0));
  return arguments.result;
}

// ---------------------------------------------------------------------------------------------
// Atomics: no other thread runs meanwhile

namespace {

template <class T, class Change>
T atomically(T* address, const void* pc, Change change) {
  self->pc = pc;
  maybe_interrupt();
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) {
    fail(pc, *self, format("misaligned atomic access of %zu bytes", sizeof(T)));
  }
  checker::access(address, sizeof(T), checker::Access::atomic, *self, pc);
  const T old = *address;
  *address = change(old);
  return old;
}

// ---------------------------------------------------------------------------------------------
// cp.async

void carry_out(const AsyncCopy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, 16);
  } else {
    std::memcpy(copy.to, copy.from, 16);
  }
}

}  // namespace

void cp_async_wait(int newest) {
  self->pc = __builtin_return_address(0);
  maybe_interrupt();
  while (static_cast<int>(self->groups.size()) > newest) {
    for (const AsyncCopy& copy : self->groups.front()) {
      if (settings.cp_async_late) carry_out(copy);
      checker::async_done(copy.to, *self);
    }
    self->groups.pop_front();
  }
}

}  // namespace simt

// ---------------------------------------------------------------------------------------------
// CUDA's words

using simt::self;

void __syncwarp(unsigned mask) {
  simt::collective("__syncwarp", simt::run_sync, mask, nullptr, __builtin_return_address(0));
}

unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::vote("__ballot_sync", mask, predicate, __builtin_return_address(0)).ballot;
}

int __any_sync(unsigned mask, int predicate) {
  return simt::vote("__any_sync", mask, predicate, __builtin_return_address(0)).ballot != 0;
}

int __all_sync(unsigned mask, int predicate) {
  const auto result = simt::vote("__all_sync", mask, predicate, __builtin_return_address(0));
  return result.ballot == result.lanes;
}

void __threadfence() {
  self->pc = __builtin_return_address(0);
  simt::maybe_interrupt();
  simt::checker::fence(*self);
}

void __threadfence_block() { simt::maybe_interrupt(); }

#define SIMT_ATOMIC(T, name, result)                                            \
  T name(T* address, T value) {                                                 \
    return simt::atomically(address, __builtin_return_address(0),               \
                            [value](T old) { return static_cast<T>(result); }); \
  }
SIMT_ATOMIC(int, atomicAdd, static_cast<unsigned>(old) + static_cast<unsigned>(value))
SIMT_ATOMIC(unsigned, atomicAdd, old + value)
SIMT_ATOMIC(unsigned long long, atomicAdd, old + value)
SIMT_ATOMIC(float, atomicAdd, old + value)
SIMT_ATOMIC(double, atomicAdd, old + value)
SIMT_ATOMIC(float, atomicExch, (static_cast<void>(old), value))
SIMT_ATOMIC(int, atomicOr, old | value)
SIMT_ATOMIC(unsigned, atomicOr, old | value)
SIMT_ATOMIC(int, atomicAnd, old& value)
SIMT_ATOMIC(unsigned, atomicAnd, old& value)
SIMT_ATOMIC(long long, atomicMax, old < value ? value : old)
SIMT_ATOMIC(long long, atomicMin, value < old ? value : old)
#define SIMT_ATOMICS(T)                                                           \
  SIMT_ATOMIC(T, atomicMax, old < value ? value : old)                            \
  SIMT_ATOMIC(T, atomicMin, value < old ? value : old)                            \
  SIMT_ATOMIC(T, atomicExch, (static_cast<void>(old), value))                     \
  T atomicCAS(T* address, T compare, T value) {                                   \
    return simt::atomically(address, __builtin_return_address(0),                 \
                            [=](T old) { return old == compare ? value : old; }); \
  }
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(unsigned long long)
#undef SIMT_ATOMICS
#undef SIMT_ATOMIC

// ---------------------------------------------------------------------------------------------
// gpu.cuh's names

namespace crrcd::gpu {

namespace {

using simt::kFull;
using simt::kLanes;
using simt::Warp;

struct LdmatrixArguments {
  std::uint32_t* registers;
  const char* row;
};

// Row r of matrix m is given by lane 8 m + r and goes to lanes 4 r .. 4 r + 3, four bytes to each.
void run_ldmatrix(Warp& warp, unsigned, void** arguments) {
  for (int given = 0; given < kLanes; ++given) {
    const char* row = static_cast<LdmatrixArguments*>(arguments[given])->row;
    const int matrix = given / 8;
    for (int part = 0; part < 4; ++part) {
      const int lane = given % 8 * 4 + part;
      simt::Fiber& reader = warp.lanes[lane];
      simt::checker::access(row + 4 * part, 4, simt::checker::Access::read, reader, reader.pc);
      std::memcpy(static_cast<LdmatrixArguments*>(arguments[lane])->registers + matrix,
                  row + 4 * part, 4);
    }
  }
}

// Transposed: element c of row r goes to lane 4 c + r / 2, half r % 2.
void run_ldmatrix_trans(Warp& warp, unsigned, void** arguments) {
  for (int given = 0; given < kLanes; ++given) {
    const char* row = static_cast<LdmatrixArguments*>(arguments[given])->row;
    const int matrix = given / 8;
    const int r = given % 8;
    for (int c = 0; c < 8; ++c) {
      const int lane = 4 * c + r / 2;
      simt::Fiber& reader = warp.lanes[lane];
      simt::checker::access(row + 2 * c, 2, simt::checker::Access::read, reader, reader.pc);
      auto* registers = static_cast<LdmatrixArguments*>(arguments[lane])->registers;
      std::memcpy(reinterpret_cast<char*>(registers + matrix) + r % 2 * 2, row + 2 * c, 2);
    }
  }
}

void need_whole_warp(const char* name, const void* pc) {
  if (self->warp->live == kFull) return;
  simt::fail(pc, *self, simt::format("%s needs all 32 lanes of its warp", name));
}

void ldmatrix(const char* name, simt::Collective run, std::uint32_t (&r)[4], const void* row,
              const void* pc) {
  need_whole_warp(name, pc);
  const auto address = reinterpret_cast<std::uintptr_t>(row);
  if (address % 16 != 0) simt::fail(pc, *self, std::string(name) + " of a misaligned row");
  if (!simt::checker::in_shared_memory(row, 16)) {
    simt::fail(pc, *self, std::string(name) + " of a row that is not in shared memory");
  }
  LdmatrixArguments arguments{r, static_cast<const char*>(row)};
  simt::collective(name, run, kFull, &arguments, pc);
}

struct MmaArguments {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

float from_bf16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

float from_f16(std::uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (int i = 0; i < 65536; ++i) {
      values[i] = __half2float(std::bit_cast<__half>(static_cast<std::uint16_t>(i)));
    }
    return values;
  }();
  return table[bits];
}

// a [16, K] and b [K, 8] of one warp's product. Products of 16-bit and of tf32 numbers are exact in
// double; tensor cores round the sum in ways of their own, which this does not copy.
template <int K>
struct Operands {
  float a[16][K];
  float b[K][8];
};

template <int K>
void multiply(const Operands<K>& in, void** arguments) {
  double sum[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < K; ++k) {
      for (int j = 0; j < 8; ++j) {
        sum[i][j] += static_cast<double>(in.a[i][k]) * static_cast<double>(in.b[k][j]);
      }
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<MmaArguments*>(arguments[lane])->d;
    const int row = lane / 4;
    const int column = lane % 4 * 2;
    for (int r = 0; r < 4; ++r) {
      d[r] = static_cast<float>(d[r] + sum[row + r / 2 * 8][column + r % 2]);
    }
  }
}

template <float (*kConvert)(std::uint16_t)>
void run_mma_16bit(Warp&, unsigned, void** arguments) {
  Operands<16> in;
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& call = *static_cast<MmaArguments*>(arguments[lane]);
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) {
        in.a[group + r % 2 * 8][pair + r / 2 * 8 + half] =
            kConvert(static_cast<std::uint16_t>(call.a[r] >> 16 * half));
      }
      for (int r = 0; r < 2; ++r) {
        in.b[pair + r * 8 + half][group] =
            kConvert(static_cast<std::uint16_t>(call.b[r] >> 16 * half));
      }
    }
  }
  multiply(in, arguments);
}

// Tensor cores do not look at the 13 bits that tf32 lacks.
float from_tf32(std::uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

void run_mma_tf32(Warp&, unsigned, void** arguments) {
  Operands<8> in;
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& call = *static_cast<MmaArguments*>(arguments[lane]);
    const int group = lane / 4;
    const int k = lane % 4;
    for (int r = 0; r < 4; ++r) in.a[group + r % 2 * 8][k + r / 2 * 4] = from_tf32(call.a[r]);
    for (int r = 0; r < 2; ++r) in.b[k + r * 4][group] = from_tf32(call.b[r]);
  }
  multiply(in, arguments);
}

void mma(const char* name, simt::Collective run, float* d, const std::uint32_t* a,
         const std::uint32_t* b, const void* pc) {
  need_whole_warp(name, pc);
  MmaArguments arguments{d, a, b};
  simt::collective(name, run, kFull, &arguments, pc);
}

}  // namespace

int lane_id() { return self->lane; }

void trap(const char* message) {
  simt::fail(__builtin_return_address(0), *self, std::string("trap: ") + message);
}

void cp_async16(void* shared, const void* global, bool valid) {
  const void* pc = __builtin_return_address(0);
  self->pc = pc;
  simt::maybe_interrupt();
  const auto to = reinterpret_cast<std::uintptr_t>(shared);
  const auto from = reinterpret_cast<std::uintptr_t>(global);
  if (to % 16 != 0 || (valid && from % 16 != 0)) {
    simt::fail(pc, *self, "cp_async16 with a misaligned address");
  }
  if (!simt::checker::in_shared_memory(shared, 16) ||
      (valid && simt::checker::in_shared_memory(global, 16))) {
    simt::fail(pc, *self, "cp_async16 copies from global to shared memory, not otherwise");
  }
  if (valid) simt::checker::access(global, 16, simt::checker::Access::read, *self, pc);
  simt::checker::async_issued(shared, *self, pc);
  const simt::AsyncCopy copy{shared, valid ? global : nullptr};
  if (!simt::settings.cp_async_late) simt::carry_out(copy);
  self->open_group.push_back(copy);
}

void cp_async_commit() {
  self->groups.push_back(std::move(self->open_group));
  self->open_group.clear();
}

void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
  ldmatrix("ldmatrix_x4", run_ldmatrix, r, shared_row, __builtin_return_address(0));
}

void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row) {
  ldmatrix("ldmatrix_x4_trans", run_ldmatrix_trans, r, shared_row, __builtin_return_address(0));
}

void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  mma("mma_bf16", run_mma_16bit<from_bf16>, d, a, b, __builtin_return_address(0));
}

void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  mma("mma_f16", run_mma_16bit<from_f16>, d, a, b, __builtin_return_address(0));
}

void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  mma("mma_tf32", run_mma_tf32, d, a, b, __builtin_return_address(0));
}

}  // namespace crrcd::gpu

// ---------------------------------------------------------------------------------------------
// For Python, through ctypes

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT void simt_configure(int schedule, unsigned long long seed, int cp_async_late) {
  simt::configure({static_cast<simt::Schedule>(schedule), seed, cp_async_late != 0});
}

SIMT_EXPORT void simt_watch(const void* pointer, std::size_t bytes, const char* name,
                            int initialised) {
  simt::watch(pointer, bytes, name, initialised != 0);
}

SIMT_EXPORT void simt_forget() { simt::forget(); }

SIMT_EXPORT const char* simt_launched() {
  static std::string names;
  names = simt::launched();
  return names.c_str();
}
