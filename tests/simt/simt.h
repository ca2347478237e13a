// The emulator's side of csrc/cuda/gpu.cuh: what g++ reads in place of cuda_runtime.h. Only names
// and thin wrappers stand here; what they do is in simt.cpp, which is compiled without the
// checker's hooks.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

// Conversions to 16 bits must be inlined: the compiler's hooks see assignments of structs, but not
// where a call leaves the struct that it returns. The headers mark these functions "unused".
#define unused unused, always_inline
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#undef unused

// Blocks run one after another, so a block's shared memory can be a static variable.
#undef __shared__
#define __shared__ static
#undef __constant__
#define __constant__ static const
#define __launch_bounds__(...)
#define CRRCD_DYNAMIC_SHARED(name) unsigned char* name = ::simt::dynamic_shared()

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

inline constexpr int warpSize = 32;

namespace simt {

// In which order the threads of a block take turns. Blocks follow the same order.
enum class Schedule {
  forward,  // one after another, each until it must wait
  reverse,  // likewise from the last
  greedy,   // a warp goes on as long as any of its lanes can
  random,   // any that can, interrupted now and then between two accesses
};

struct Settings {
  Schedule schedule = Schedule::forward;
  std::uint64_t seed = 0;      // of Schedule::random
  bool cp_async_late = false;  // copy at the wait and not at once
};

void configure(const Settings& settings);

// Device memory a kernel may use, for the checker: everything else is out of bounds. A range that
// is not initialised may be read only where a kernel has written it.
void watch(const void* pointer, std::size_t bytes, const char* name, bool initialised = true);
void forget();  // all of them

// Called before every launch, for whoever keeps the list of that memory elsewhere.
void on_launch(void (*hook)());

// Names of the kernels launched since the last call, each followed by a blank; the oldest are
// forgotten when they are many.
std::string launched();

// const: the compiler may keep the value, since it is the same for the whole life of a thread.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();
__attribute__((const)) unsigned char* dynamic_shared();

struct Launch {
  const char* name;
  dim3 grid, block;
  std::size_t shared_bytes;
  void (*invoke)(const void* arguments);
  const void* arguments;
  std::size_t argument_bytes;
};
void run(const Launch& launch);

enum class Shuffle { index, up, down, exclusive_or };
std::uint64_t shuffle(unsigned mask, std::uint64_t bits, Shuffle kind, int operand, int width);

enum class Reduce { add, minimum, maximum, bit_and, bit_or, bit_xor };
std::uint32_t reduce(unsigned mask, std::uint32_t value, Reduce kind, bool is_signed);

int barrier(int predicate, int kind);  // kind 0: how many predicates hold, 1: all of them, 2: any

void cp_async_wait(int newest);

template <class T>
__attribute__((always_inline)) inline T shuffle_of(unsigned mask, T value, Shuffle kind,
                                                   int operand, int width) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, kind, operand, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

// ---------------------------------------------------------------------------------------------
// CUDA's words

inline void __syncthreads() __attribute__((always_inline));
inline void __syncthreads() { simt::barrier(0, 0); }
__attribute__((always_inline)) inline int __syncthreads_count(int p) { return simt::barrier(p, 0); }
__attribute__((always_inline)) inline int __syncthreads_and(int p) { return simt::barrier(p, 1); }
__attribute__((always_inline)) inline int __syncthreads_or(int p) { return simt::barrier(p, 2); }

void __syncwarp(unsigned mask = 0xffffffffu);
unsigned __ballot_sync(unsigned mask, int predicate);
int __any_sync(unsigned mask, int predicate);
int __all_sync(unsigned mask, int predicate);

void __threadfence();
void __threadfence_block();

template <class T>
__attribute__((always_inline)) inline T __shfl_sync(unsigned mask, T value, int lane,
                                                    int width = 32) {
  return simt::shuffle_of(mask, value, simt::Shuffle::index, lane, width);
}
template <class T>
__attribute__((always_inline)) inline T __shfl_up_sync(unsigned mask, T value, unsigned delta,
                                                       int width = 32) {
  return simt::shuffle_of(mask, value, simt::Shuffle::up, static_cast<int>(delta), width);
}
template <class T>
__attribute__((always_inline)) inline T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                                                         int width = 32) {
  return simt::shuffle_of(mask, value, simt::Shuffle::down, static_cast<int>(delta), width);
}
template <class T>
__attribute__((always_inline)) inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask,
                                                        int width = 32) {
  return simt::shuffle_of(mask, value, simt::Shuffle::exclusive_or, lane_mask, width);
}

#define CRRCD_SIMT_REDUCE(name, kind)                                                     \
  __attribute__((always_inline)) inline unsigned name(unsigned mask, unsigned value) {    \
    return simt::reduce(mask, value, simt::Reduce::kind, false);                          \
  }                                                                                       \
  __attribute__((always_inline)) inline int name(unsigned mask, int value) {              \
    return static_cast<int>(                                                              \
        simt::reduce(mask, static_cast<std::uint32_t>(value), simt::Reduce::kind, true)); \
  }
CRRCD_SIMT_REDUCE(__reduce_add_sync, add)
CRRCD_SIMT_REDUCE(__reduce_min_sync, minimum)
CRRCD_SIMT_REDUCE(__reduce_max_sync, maximum)
CRRCD_SIMT_REDUCE(__reduce_and_sync, bit_and)
CRRCD_SIMT_REDUCE(__reduce_or_sync, bit_or)
CRRCD_SIMT_REDUCE(__reduce_xor_sync, bit_xor)
#undef CRRCD_SIMT_REDUCE

int atomicAdd(int* address, int value);
unsigned atomicAdd(unsigned* address, unsigned value);
unsigned long long atomicAdd(unsigned long long* address, unsigned long long value);
float atomicAdd(float* address, float value);
double atomicAdd(double* address, double value);
#define CRRCD_SIMT_ATOMICS(T)        \
  T atomicMax(T* address, T value);  \
  T atomicMin(T* address, T value);  \
  T atomicExch(T* address, T value); \
  T atomicCAS(T* address, T compare, T value);
CRRCD_SIMT_ATOMICS(int)
CRRCD_SIMT_ATOMICS(unsigned)
CRRCD_SIMT_ATOMICS(unsigned long long)
#undef CRRCD_SIMT_ATOMICS
long long atomicMax(long long* address, long long value);
long long atomicMin(long long* address, long long value);
float atomicExch(float* address, float value);
int atomicOr(int* address, int value);
unsigned atomicOr(unsigned* address, unsigned value);
int atomicAnd(int* address, int value);
unsigned atomicAnd(unsigned* address, unsigned value);

// Loads with a cache hint are loads.
template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
inline T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
inline T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
inline void __stcg(T* pointer, T value) {
  *pointer = value;
}
template <class T>
inline void __stcs(T* pointer, T value) {
  *pointer = value;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}

// Fast functions are exact here: their rounding is what an emulator cannot show.
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }

#define CRRCD_SIMT_MIN_MAX(T)                         \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
CRRCD_SIMT_MIN_MAX(int)
CRRCD_SIMT_MIN_MAX(unsigned)
CRRCD_SIMT_MIN_MAX(long)
CRRCD_SIMT_MIN_MAX(unsigned long)
CRRCD_SIMT_MIN_MAX(long long)
CRRCD_SIMT_MIN_MAX(unsigned long long)
#undef CRRCD_SIMT_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// ---------------------------------------------------------------------------------------------
// gpu.cuh's own names; their meaning stands there

namespace crrcd::gpu {

// Runs the kernel to its end. Throws std::runtime_error with what the emulator or the checker
// found.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
            std::size_t shared_bytes, void* /*stream*/, Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  };
  const Call call{kernel, {static_cast<Params>(std::forward<Args>(args))...}};
  const auto invoke = [](const void* memory) {
    const Call& made = *static_cast<const Call*>(memory);
    std::apply(made.kernel, made.arguments);
  };
  simt::run({name, grid, block, shared_bytes, invoke, &call, sizeof(call)});
}

__attribute__((const)) int lane_id();
[[noreturn]] void trap(const char* message);

void cp_async16(void* shared, const void* global, bool valid = true);
void cp_async_commit();
template <int N>
__attribute__((always_inline)) inline void cp_async_wait() {
  simt::cp_async_wait(N);
}

void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row);
void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row);

void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

inline std::uint32_t to_tf32(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & ~0x1fffu;
}

inline float relu_nan(float x) { return x < 0 ? 0 : x; }
inline double relu_nan(double x) { return x < 0 ? 0 : x; }

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float rsqrt_approx(float x) { return rsqrtf(x); }

}  // namespace crrcd::gpu
