// Kernels that say whether the emulator does what a GPU does. Each uses a few of gpu.cuh's words
// and test_simt.py knows what must come out. nvcc compiles this file too.
#include "cuda/gpu.cuh"
#include "entry.h"

namespace gpu = crrcd::gpu;

namespace {

constexpr unsigned kFull = 0xffffffffu;

// Row r of out [rows, 32]: what each lane has after one warp-wide word.
constexpr int kWarpRows = 15;
__global__ void warp_words(const int* in, int* out) {
  const int lane = gpu::lane_id();
  const int value = in[lane];
  int results[kWarpRows] = {
      __shfl_sync(kFull, value, (lane + 5) % 32),
      __shfl_sync(kFull, value, 9, 8),  // lane 1 of each eight
      __shfl_up_sync(kFull, value, 3),
      __shfl_up_sync(kFull, value, 3, 16),
      __shfl_down_sync(kFull, value, 7),
      __shfl_xor_sync(kFull, value, 16),
      static_cast<int>(__ballot_sync(kFull, value % 3 == 0)),
      __any_sync(kFull, value == in[31]),
      __all_sync(kFull, value == in[31]),
      __reduce_add_sync(kFull, value),
      __reduce_max_sync(kFull, value),
      __popc(static_cast<unsigned>(value)),
      -1,
      0,
      __shfl_xor_sync(kFull, value, 12, 8),  // beyond the eight: its own
  };
  // Only the even lanes: the others do something else meanwhile.
  if (lane % 2 == 0) {
    results[12] = __shfl_xor_sync(0x55555555u, value, 2);
  } else {
    results[12] = static_cast<int>(__ballot_sync(0xaaaaaaaau, lane > 16));
  }
  const double wide = __shfl_sync(kFull, value + 0.25, 31 - lane);
  results[13] = static_cast<int>(wide * 4);
  for (int r = 0; r < kWarpRows; ++r) out[r * 32 + lane] = results[r];
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFull, value, offset);
  return value;
}

// out[block] = sum of the block's part of in.
__global__ void __launch_bounds__(1024) block_sum(const float* in, float* out, long long count) {
  __shared__ float parts[32];
  const int thread = threadIdx.x;
  float sum = 0;
  for (long long i = blockIdx.x * blockDim.x + thread; i < count; i += gridDim.x * blockDim.x) {
    sum += in[i];
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) parts[thread / 32] = sum;
  __syncthreads();
  if (thread < 32) {
    sum = thread < static_cast<int>(blockDim.x) / 32 ? parts[thread] : 0.0f;
    sum = warp_sum(sum);
    if (thread == 0) out[blockIdx.x] = sum;
  }
}

// One number from many blocks: each leaves its part, the last to arrive adds them in order.
__global__ void last_block_sum(const float* in, float* parts, unsigned* arrived, float* out) {
  __shared__ bool last;
  const float sum = warp_sum(in[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(arrived, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) total += parts[b];
    *out = total;
  }
}

__global__ void atomics(const int* in, int* ints, unsigned long long* longs, float* floats,
                        double* doubles) {
  const int value = in[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(ints, value);
  atomicMax(ints + 1, value);
  atomicMin(ints + 2, value);
  atomicCAS(ints + 3, 7, value);
  atomicAdd(longs, static_cast<unsigned long long>(value));
  atomicMax(longs + 1, static_cast<unsigned long long>(value));
  atomicAdd(floats, static_cast<float>(value));
  atomicAdd(doubles, static_cast<double>(value));
  __shared__ int counter;
  if (threadIdx.x == 0) counter = 0;
  __syncthreads();
  atomicAdd(&counter, 1);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(ints + 4, counter);
}

// out[0] = the raw dynamic shared memory, out[1] = votes at barriers, in one block.
__global__ void shared_poison(unsigned* out, int words) {
  CRRCD_DYNAMIC_SHARED(memory);
  const unsigned* shared = reinterpret_cast<const unsigned*>(memory);
  for (int i = threadIdx.x; i < words; i += blockDim.x) out[i] = shared[i];
}

// Reverses `words` numbers through shared memory.
__global__ void reverse_in_shared(const unsigned* in, unsigned* out, int words) {
  CRRCD_DYNAMIC_SHARED(memory);
  unsigned* shared = reinterpret_cast<unsigned*>(memory);
  for (int i = threadIdx.x; i < words; i += blockDim.x) shared[words - 1 - i] = in[i];
  __syncthreads();
  for (int i = threadIdx.x; i < words; i += blockDim.x) out[i] = shared[i];
}

// out[thread] += every tile of in [tiles, 128 floats], fetched one ahead. The last tile is invalid
// and so counts as zeros.
__global__ void async_sum(const float* in, float* out, int tiles) {
  __shared__ __align__(16) float buffer[2][128];
  const int thread = threadIdx.x;
  const auto fetch = [&](int tile) {
    if (thread < 32 && tile < tiles) {
      gpu::cp_async16(&buffer[tile % 2][thread * 4], in + tile * 128 + thread * 4,
                      tile < tiles - 1);
    }
    gpu::cp_async_commit();
  };
  fetch(0);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    gpu::cp_async_wait<1>();
    __syncthreads();
    sum += buffer[tile % 2][127 - thread];
    __syncthreads();
  }
  out[thread] = sum;
}

// Ends without waiting for what it has fetched.
__global__ void async_left(const float* in, int committed) {
  __shared__ __align__(16) float buffer[4];
  gpu::cp_async16(buffer, in);
  if (committed) gpu::cp_async_commit();
}

__device__ __forceinline__ std::uint32_t pair_of(const __nv_bfloat16* p) {
  return *reinterpret_cast<const std::uint32_t*>(p);
}
__device__ __forceinline__ std::uint32_t pair_of(const __half* p) {
  return *reinterpret_cast<const std::uint32_t*>(p);
}

// c [64, 64] = a [64, depth] b [64, depth]' with 256 threads, each warp 16 x 32 of it. Rows lie
// padded in shared memory, so that ldmatrix meets all banks.
template <class T>
__global__ void __launch_bounds__(256) matmul(const T* a, const T* b, float* c, int depth) {
  CRRCD_DYNAMIC_SHARED(memory);
  const int stride = depth + 8;
  T* a_tile = reinterpret_cast<T*>(memory);
  T* b_tile = a_tile + 64 * stride;
  const int chunks = depth / 8;
  for (int i = threadIdx.x; i < 64 * chunks; i += blockDim.x) {
    const int row = i / chunks;
    const int column = i % chunks * 8;
    gpu::cp_async16(a_tile + row * stride + column, a + row * depth + column);
    gpu::cp_async16(b_tile + row * stride + column, b + row * depth + column);
  }
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();

  const int warp = threadIdx.x / 32;
  const int lane = gpu::lane_id();
  const int first_row = warp % 4 * 16;
  const int first_column = warp / 4 * 32;
  float sums[4][4] = {};
  for (int k = 0; k < depth; k += 16) {
    // Matrices 0-3: rows 0-7 and 8-15 of the left half, then of the right one.
    std::uint32_t left[4];
    const int row = first_row + lane % 16;
    gpu::ldmatrix_x4(left, a_tile + row * stride + k + lane / 16 * 8);
    for (int n = 0; n < 4; n += 2) {
      // Both halves of columns 0-7, then of columns 8-15.
      std::uint32_t right[4];
      const int column = first_column + n * 8 + lane / 16 * 8 + lane % 8;
      gpu::ldmatrix_x4(right, b_tile + column * stride + k + lane / 8 % 2 * 8);
      gpu::mma_m16n8k16(sums[n], left, {right[0], right[1]}, T{});
      gpu::mma_m16n8k16(sums[n + 1], left, {right[2], right[3]}, T{});
    }
  }
  for (int n = 0; n < 4; ++n) {
    for (int r = 0; r < 4; ++r) {
      const int row = first_row + lane / 4 + r / 2 * 8;
      const int column = first_column + n * 8 + lane % 4 * 2 + r % 2;
      c[row * 64 + column] = sums[n][r];
    }
  }
}

// c [16, 8] = a [16, 16] b [16, 8] with b transposed by ldmatrix on its way.
__global__ void matmul_trans(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  __shared__ __align__(16) __nv_bfloat16 b_tile[32][8];
  const int lane = gpu::lane_id();
  for (int i = lane; i < 256; i += 32) {
    b_tile[i / 8][i % 8] = i < 128 ? b[i] : __float2bfloat16(0.0f);
  }
  __syncwarp();
  std::uint32_t right[4];
  gpu::ldmatrix_x4_trans(right, b_tile[lane]);
  const int row = lane / 4;
  const int column = lane % 4 * 2;
  const std::uint32_t left[4] = {
      pair_of(a + row * 16 + column), pair_of(a + (row + 8) * 16 + column),
      pair_of(a + row * 16 + column + 8), pair_of(a + (row + 8) * 16 + column + 8)};
  float sums[4] = {};
  gpu::mma_bf16(sums, left, {right[0], right[1]});
  for (int r = 0; r < 4; ++r) c[(row + r / 2 * 8) * 8 + column + r % 2] = sums[r];
}

// c [16, 8] = a [16, 8] b [8, 8] in tf32.
__global__ void matmul_tf32(const float* a, const float* b, float* c) {
  const int row = gpu::lane_id() / 4;
  const int k = gpu::lane_id() % 4;
  const std::uint32_t left[4] = {gpu::to_tf32(a[row * 8 + k]), gpu::to_tf32(a[(row + 8) * 8 + k]),
                                 gpu::to_tf32(a[row * 8 + k + 4]),
                                 gpu::to_tf32(a[(row + 8) * 8 + k + 4])};
  const std::uint32_t right[2] = {gpu::to_tf32(b[k * 8 + row]), gpu::to_tf32(b[(k + 4) * 8 + row])};
  float sums[4] = {};
  gpu::mma_tf32(sums, left, right);
  for (int r = 0; r < 4; ++r) c[(row + r / 2 * 8) * 8 + k * 2 + r % 2] = sums[r];
}

__global__ void fast_functions(const float* in, float* out) {
  const float x = in[threadIdx.x];
  const float results[6] = {gpu::exp2_approx(x),  gpu::log2_approx(x), gpu::rcp_approx(x),
                            gpu::rsqrt_approx(x), log1pf(x),           __ldg(in + threadIdx.x)};
  for (int i = 0; i < 6; ++i) out[i * blockDim.x + threadIdx.x] = results[i];
}

// A stack needs a frame for each call; the array keeps the compiler from making it a loop.
__device__ int deep(int depth, volatile int* last) {
  volatile int frame[64];
  frame[depth % 64] = last[0] + 1;
  return depth == 0 ? frame[0] : deep(depth - 1, frame) + frame[depth % 64];
}

__global__ void recurse(int* out, int depth) {
  volatile int start[1] = {0};
  *out = deep(depth, start);
}

__global__ void indices(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = block * 1000 + thread;
}

__global__ void trap_at(int thread) {
  if (static_cast<int>(threadIdx.x) == thread) gpu::trap("id 12 is outside of [0, 10)");
}

}  // namespace

using std::int64_t;

ENTRY run_warp_words(const int* in, int* out) {
  return guarded([=] { gpu::launch("warp_words", warp_words, 1, 32, 0, nullptr, in, out); });
}

ENTRY run_block_sum(const float* in, float* out, int64_t count, int64_t blocks, int64_t threads) {
  return guarded([=] {
    gpu::launch("block_sum", block_sum, static_cast<unsigned>(blocks),
                static_cast<unsigned>(threads), 0, nullptr, in, out, count);
  });
}

ENTRY run_last_block_sum(const float* in, float* parts, unsigned* arrived, float* out,
                         int64_t blocks) {
  return guarded([=] {
    gpu::launch("last_block_sum", last_block_sum, static_cast<unsigned>(blocks), 32, 0, nullptr, in,
                parts, arrived, out);
  });
}

ENTRY run_atomics(const int* in, int* ints, unsigned long long* longs, float* floats,
                  double* doubles) {
  return guarded([=] {
    gpu::launch("atomics", atomics, 2, 64, 0, nullptr, in, ints, longs, floats, doubles);
  });
}

ENTRY run_shared_poison(unsigned* out, int64_t words) {
  return guarded([=] {
    gpu::launch("shared_poison", shared_poison, 1, 64, words * 4, nullptr, out,
                static_cast<int>(words));
  });
}

ENTRY run_reverse_in_shared(const unsigned* in, unsigned* out, int64_t words) {
  return guarded([=] {
    gpu::launch("reverse_in_shared", reverse_in_shared, 1, 256, words * 4, nullptr, in, out,
                static_cast<int>(words));
  });
}

ENTRY run_async_sum(const float* in, float* out, int64_t tiles) {
  return guarded([=] {
    gpu::launch("async_sum", async_sum, 1, 128, 0, nullptr, in, out, static_cast<int>(tiles));
  });
}

ENTRY run_async_left(const float* in, int64_t committed) {
  return guarded([=] {
    gpu::launch("async_left", async_left, 1, 1, 0, nullptr, in, static_cast<int>(committed));
  });
}

ENTRY run_matmul(const void* a, const void* b, float* c, int64_t depth, int64_t half) {
  return guarded([=] {
    const std::size_t bytes = 2 * 64 * (depth + 8) * 2;
    if (half != 0) {
      gpu::launch("matmul_f16", matmul<__half>, 1, 256, bytes, nullptr,
                  static_cast<const __half*>(a), static_cast<const __half*>(b), c,
                  static_cast<int>(depth));
    } else {
      gpu::launch("matmul_bf16", matmul<__nv_bfloat16>, 1, 256, bytes, nullptr,
                  static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), c,
                  static_cast<int>(depth));
    }
  });
}

ENTRY run_matmul_trans(const void* a, const void* b, float* c) {
  return guarded([=] {
    gpu::launch("matmul_trans", matmul_trans, 1, 32, 0, nullptr,
                static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), c);
  });
}

ENTRY run_matmul_tf32(const float* a, const float* b, float* c) {
  return guarded([=] { gpu::launch("matmul_tf32", matmul_tf32, 1, 32, 0, nullptr, a, b, c); });
}

ENTRY run_fast_functions(const float* in, float* out, int64_t count) {
  return guarded([=] {
    gpu::launch("fast_functions", fast_functions, 1, static_cast<unsigned>(count), 0, nullptr, in,
                out);
  });
}

ENTRY run_recurse(int* out, int64_t depth) {
  return guarded(
      [=] { gpu::launch("recurse", recurse, 1, 1, 0, nullptr, out, static_cast<int>(depth)); });
}

ENTRY run_indices(int* out) {
  return guarded(
      [=] { gpu::launch("indices", indices, dim3(3, 2, 2), dim3(5, 4, 3), 0, nullptr, out); });
}

ENTRY run_trap_at(int64_t thread) {
  return guarded(
      [=] { gpu::launch("trap_at", trap_at, 1, 40, 0, nullptr, static_cast<int>(thread)); });
}

ENTRY run_too_much(int64_t threads, int64_t shared_bytes) {
  return guarded([=] {
    gpu::launch("trap_at", trap_at, 1, static_cast<unsigned>(threads), shared_bytes, nullptr, -1);
  });
}
