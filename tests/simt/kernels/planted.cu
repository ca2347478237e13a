// Planted bugs, one to a kernel, each with its correct twin (kBug false). The checker must report
// every bug in every schedule, and no twin in any. One block of 64 threads where nothing else is
// said.
#include "cuda/gpu.cuh"
#include "entry.h"

namespace gpu = crrcd::gpu;

namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kThreads = 64;

template <bool kBug>
__global__ void missing_barrier(const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  if (!kBug) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// The next round's writes must wait for this round's reads.
template <bool kBug>
__global__ void missing_end_of_loop_barrier(const float* in, float* out) {
  __shared__ float tile[kThreads];
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    tile[threadIdx.x] = in[threadIdx.x] * i;
    __syncthreads();
    sum += tile[(threadIdx.x + 33) % kThreads];
    if (!kBug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// One warp writes anew what another reads.
template <bool kBug>
__global__ void race_between_warps(const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 32) tile[threadIdx.x] = 2 * in[threadIdx.x];
  if (!kBug) __syncthreads();
  if (threadIdx.x >= 32) out[threadIdx.x] = tile[threadIdx.x - 32];
}

// Atomics are ordered among each other, not with what else touches their memory.
template <bool kBug>
__global__ void plain_read_beside_atomic(const float* in, float* out) {
  __shared__ float counter;
  if (threadIdx.x == 0) counter = 0;
  __syncthreads();
  if (threadIdx.x < 32) atomicAdd(&counter, in[threadIdx.x]);
  if (!kBug) __syncthreads();
  if (threadIdx.x >= 32) out[threadIdx.x] = counter;
}

// Two groups may be under way where one must be there.
template <bool kBug>
__global__ void async_wait_off_by_one(const float* in, float* out) {
  CRRCD_DYNAMIC_SHARED(memory);
  float* buffer = reinterpret_cast<float*>(memory);
  const auto fetch = [&](int stage) {
    if (threadIdx.x < 16) {
      gpu::cp_async16(buffer + stage % 2 * kThreads + threadIdx.x * 4, in + threadIdx.x * 4);
    }
    gpu::cp_async_commit();
  };
  float sum = 0;
  fetch(0);
  for (int stage = 0; stage < 3; ++stage) {
    fetch(stage + 1);
    gpu::cp_async_wait<kBug ? 2 : 1>();
    __syncthreads();
    sum += buffer[stage % 2 * kThreads + (threadIdx.x + 5) % kThreads];
    __syncthreads();
  }
  gpu::cp_async_wait<0>();
  out[threadIdx.x] = sum;
}

// Waited for by the threads that copied, but the others were not told.
template <bool kBug>
__global__ void async_without_barrier(const float* in, float* out) {
  __shared__ __align__(16) float tile[kThreads];
  if (threadIdx.x < 16) gpu::cp_async16(tile + threadIdx.x * 4, in + threadIdx.x * 4);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  if (!kBug) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// One row more than there are.
template <bool kBug>
__global__ void global_row_out_of_bounds(const float* in, float* out) {
  const int rows = 4;
  float sum = 0;
  for (int row = 0; kBug ? row <= rows : row < rows; ++row) sum += in[row * 16 + threadIdx.x % 16];
  out[threadIdx.x] = sum;
}

template <bool kBug>
__global__ void shared_out_of_bounds(const float* in, float* out) {
  CRRCD_DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  tile[threadIdx.x + (kBug ? 1 : 0)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

template <bool kBug>
__global__ void array_out_of_bounds(const float* in, float* out) {
  __shared__ float tile[kThreads];
  __shared__ float other[kThreads];
  tile[threadIdx.x] = other[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + (kBug ? 1 : 0)] + other[threadIdx.x];
}

template <bool kBug>
__global__ void divergent_barrier(const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  if (kBug && threadIdx.x < 32) {
    __syncthreads();
  }
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void missing_syncwarp(const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  if (!kBug) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Reads of other lanes before this lane's next write; a shuffle orders nothing.
template <bool kBug>
__global__ void missing_syncwarp_before_write(const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  float sum = tile[threadIdx.x ^ 2];
  sum = __shfl_xor_sync(kFull, sum, 1);
  if (!kBug) __syncwarp();
  tile[threadIdx.x] = sum;
  out[threadIdx.x] = tile[threadIdx.x];
}

// ldmatrix hands a lane what other lanes have written.
template <bool kBug>
__global__ void missing_syncwarp_before_ldmatrix(const float* in, float* out) {
  __shared__ __align__(16) __nv_bfloat16 tile[2][32][8];
  auto& mine = tile[threadIdx.x / 32];
  for (int i = 0; i < 8; ++i) mine[threadIdx.x % 32][i] = __float2bfloat16(in[threadIdx.x]);
  if (!kBug) __syncwarp();
  std::uint32_t r[4];
  gpu::ldmatrix_x4(r, mine[threadIdx.x % 32]);
  out[threadIdx.x] = __uint_as_float(r[0] ^ r[1] ^ r[2] ^ r[3]);
}

// One element is read that no thread wrote.
template <bool kBug>
__global__ void uninitialised_shared(const float* in, float* out) {
  __shared__ float tile[kThreads];
  if (!kBug || threadIdx.x != 40) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

// Scratch is read that no kernel wrote.
template <bool kBug>
__global__ void uninitialised_global(const float* in, float* out, float* scratch) {
  if (!kBug) scratch[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = scratch[threadIdx.x];
}

template <bool kBug>
__global__ void misaligned_vector(const float* in, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(in + (kBug ? 2 : 0));
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

// Four blocks, each with a number of its own.
template <bool kBug>
__global__ void blocks_write_the_same(const float* in, float* out) {
  if (threadIdx.x == 0) out[kBug ? 0 : blockIdx.x] = in[blockIdx.x];
}

template <bool kBug>
__global__ void accumulation_without_atomic(const float* in, float* out) {
  if (threadIdx.x != 0) return;
  if (kBug) {
    out[0] += in[blockIdx.x];
  } else {
    atomicAdd(out, in[blockIdx.x]);
  }
}

// The last block to arrive reads what others wrote: only after both their fence and its own.
template <bool kBug>
__global__ void last_block_without_fence(const float* in, float* out, float* parts,
                                         unsigned* arrived) {
  __shared__ bool last;
  parts[blockIdx.x * kThreads + threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (!kBug) __threadfence();
    last = atomicAdd(arrived, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * kThreads + threadIdx.x];
  out[threadIdx.x] = sum;
}

template <bool kBug>
__global__ void shuffle_from_absent_lane(const float* in, float* out) {
  const float value = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, value, kBug ? 16 : 8);
  }
}

// Half of each warp waits for the other half, which waits at a barrier.
template <bool kBug>
__global__ void deadlock(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (!kBug || threadIdx.x % 32 < 16) value = __shfl_xor_sync(kFull, value, 1);
  __syncthreads();
  out[threadIdx.x] = value;
}

// c [16, 8] = a [16, 16] b [8, 16]': the halves of b exchanged. No checker sees that, numbers do.
template <bool kBug>
__global__ void wrong_fragment(const float* a, float* c, const float* b) {
  const int lane = gpu::lane_id();
  const int row = lane / 4;
  const int column = lane % 4 * 2;
  const auto pair = [](const float* p) {
    const __nv_bfloat162 values = __floats2bfloat162_rn(p[0], p[1]);
    return *reinterpret_cast<const std::uint32_t*>(&values);
  };
  const std::uint32_t left[4] = {pair(a + row * 16 + column), pair(a + (row + 8) * 16 + column),
                                 pair(a + row * 16 + column + 8),
                                 pair(a + (row + 8) * 16 + column + 8)};
  const std::uint32_t right[2] = {pair(b + row * 16 + column + (kBug ? 8 : 0)),
                                  pair(b + row * 16 + column + (kBug ? 0 : 8))};
  float sums[4] = {};
  gpu::mma_bf16(sums, left, right);
  for (int r = 0; r < 4; ++r) c[(row + r / 2 * 8) * 8 + column + r % 2] = sums[r];
}

}  // namespace

// run_NAME(bug, in, out, more ...): as many blocks, threads and bytes of shared memory as written.
#define PLANTED(name, blocks, threads, shared_bytes)                                             \
  ENTRY run_##name(std::int64_t bug, const float* in, float* out) {                              \
    return guarded([=] {                                                                         \
      gpu::launch(#name, bug ? name<true> : name<false>, blocks, threads, shared_bytes, nullptr, \
                  in, out);                                                                      \
    });                                                                                          \
  }

PLANTED(missing_barrier, 1, kThreads, 0)
PLANTED(missing_end_of_loop_barrier, 1, kThreads, 0)
PLANTED(race_between_warps, 1, kThreads, 0)
PLANTED(plain_read_beside_atomic, 1, kThreads, 0)
PLANTED(async_wait_off_by_one, 1, kThreads, 2 * kThreads * sizeof(float))
PLANTED(async_without_barrier, 1, kThreads, 0)
PLANTED(global_row_out_of_bounds, 1, kThreads, 0)
PLANTED(shared_out_of_bounds, 1, kThreads, kThreads * sizeof(float))
PLANTED(array_out_of_bounds, 1, kThreads, 0)
PLANTED(divergent_barrier, 1, kThreads, 0)
PLANTED(missing_syncwarp, 1, kThreads, 0)
PLANTED(missing_syncwarp_before_write, 1, kThreads, 0)
PLANTED(missing_syncwarp_before_ldmatrix, 1, kThreads, 0)
PLANTED(uninitialised_shared, 1, kThreads, 0)
PLANTED(misaligned_vector, 1, kThreads, 0)
PLANTED(blocks_write_the_same, 4, kThreads, 0)
PLANTED(accumulation_without_atomic, 4, kThreads, 0)
PLANTED(shuffle_from_absent_lane, 1, kThreads, 0)
PLANTED(deadlock, 1, kThreads, 0)

ENTRY run_uninitialised_global(std::int64_t bug, const float* in, float* out, float* scratch) {
  return guarded([=] {
    gpu::launch("uninitialised_global",
                bug ? uninitialised_global<true> : uninitialised_global<false>, 1, kThreads, 0,
                nullptr, in, out, scratch);
  });
}

ENTRY run_last_block_without_fence(std::int64_t bug, const float* in, float* out, float* parts,
                                   unsigned* arrived) {
  return guarded([=] {
    gpu::launch("last_block_without_fence",
                bug ? last_block_without_fence<true> : last_block_without_fence<false>, 4, kThreads,
                0, nullptr, in, out, parts, arrived);
  });
}

ENTRY run_wrong_fragment(std::int64_t bug, const float* a, float* c, const float* b) {
  return guarded([=] {
    gpu::launch("wrong_fragment", bug ? wrong_fragment<true> : wrong_fragment<false>, 1, 32, 0,
                nullptr, a, c, b);
  });
}
