// Sums over a warp and over a block, always in the same order.
#pragma once

#include "gpu.cuh"

namespace crrcd::cuda {

constexpr int kWarp = 32;

// The sum of x over `kLanes` neighbouring lanes, in each of them.
template <int kLanes = kWarp, typename T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <int kLanes = kWarp, typename T>
__device__ __forceinline__ T warp_max(T x) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// x[i] = sums of x[i] over the block, in every thread; shared holds kCount * kThreads / 32 numbers
// and may be used again at once.
template <int kThreads, int kCount, typename T>
__device__ __forceinline__ void block_sum(T (&x)[kCount], T* shared) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int i = 0; i < kCount; ++i) {
    x[i] = warp_sum(x[i]);
    if (lane == 0) shared[i * kWarps + warp] = x[i];
  }
  __syncthreads();
  for (int i = 0; i < kCount; ++i) {
    x[i] = 0;
    for (int w = 0; w < kWarps; ++w) x[i] += shared[i * kWarps + w];
  }
  __syncthreads();
}

}  // namespace crrcd::cuda
