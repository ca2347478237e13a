// similar_mask: a bit for each (query, row) whose product is above a threshold. Products stay in
// registers, only bits leave them.
//
// Rows for all queries alike are multiplied tile by tile; the threads that have the 32 rows of a
// word put its bits together. Rows of each query's own are dot products, a warp for a word.
#pragma once

#include "dot_tile.cuh"
#include "reduce.cuh"
#include "similar_params.h"

namespace crrcd::cuda {
namespace {

constexpr const char* kOutside =
    "crrcd_ext.similar_mask: index: expected rows of the bank in [0, N)";

// A tile of rows and a block of queries; blocks that share their rows are neighbours.
template <typename T, typename S>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 4 ? 2 : 1)
    similar_shared(SimilarParams<T> p) {
  alignas(16) __shared__ T operand[kTile * kLead];
  __shared__ int64_t row[kTile];
  const int64_t query_blocks = (p.B + kTile - 1) / kTile;
  const int64_t k0 = blockIdx.x / query_blocks * kTile, b0 = blockIdx.x % query_blocks * kTile;
  if (threadIdx.x < kTile) {
    const int64_t k = k0 + threadIdx.x;
    row[threadIdx.x] = k < p.K && p.bank.index ? checked_row(p.bank.index[k], p.N, kOutside) : k;
  }
  __syncthreads();
  const auto query_row = [&](int64_t b) { return p.query + b * p.D; };
  const auto key_row = [&](int64_t k) { return bank_row<S>(p.bank, row[k - k0]); };
  T z[4][4] = {};  // [query, row]
  add_products(b0, p.B, query_row, k0, p.K, key_row, p.D, operand, z);

  const int column = tile_column(), place = column % 32;
  const int64_t word = (k0 + column) / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // unrolled, so that z stays in registers
    unsigned bits = 0;
    for (int j = 0; j < 4; ++j)
      if (k0 + column + j < p.K && z[i][j] > p.threshold) bits |= 1u << (place + j);
    for (int step = 4; step > 0; step /= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, step);
    const int64_t b = b0 + tile_line() + i;
    if (place == 0 && b < p.B && word < p.words)
      p.mask[b * p.words + word] = static_cast<int32_t>(bits);
  }
}

// A warp for 32 rows of one query, several of which it reads at a time.
template <typename T, typename S>
__global__ void __launch_bounds__(128) similar_own(SimilarParams<T> p) {
  constexpr int kRows = 4;
  const int lane = threadIdx.x % kWarp;
  const int64_t at = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (at >= p.B * p.words) return;
  const int64_t b = at / p.words, first = at % p.words * kWarp;
  const int count = p.K - first < kWarp ? static_cast<int>(p.K - first) : kWarp;
  int64_t own_row = 0;
  if (lane < count)
    own_row = checked_row(p.own[b * p.own_stride + (first + lane) * p.own_step], p.N, kOutside);
  T own_z = 0;
  for (int entry = 0; entry < count; entry += kRows) {
    T z[kRows] = {};
    const S* row[kRows];
    for (int r = 0; r < kRows; ++r)
      row[r] = bank_row<S>(p.bank, __shfl_sync(0xffffffffu, own_row, entry + r));
    for (int64_t d = lane * 4; d < p.D; d += kWarp * 4) {
      T q[4], m[4];
      load_quad(p.query + b * p.D, d, p.D, false, q);
      for (int r = 0; r < kRows; ++r) {
        // what lies beyond the last entry is a row of zeros
        load_quad(row[r], d, entry + r < count ? p.D : 0, p.whole_quads, m);
        for (int j = 0; j < 4; ++j) z[r] += q[j] * m[j];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const T sum = warp_sum(z[r]);
      if (lane == entry + r) own_z = sum;
    }
  }
  const unsigned bits = __ballot_sync(0xffffffffu, lane < count && own_z > p.threshold);
  if (lane == 0) p.mask[at] = static_cast<int32_t>(bits);
}

template <typename T, typename S>
void launch_similar(const SimilarParams<T>& p, void* stream) {
  if (p.own) {
    gpu::launch("similar_own", similar_own<T, S>,
                dim3(static_cast<unsigned>((p.B * p.words + 3) / 4)), dim3(128), 0, stream, p);
    return;
  }
  const int64_t blocks = (p.K + kTile - 1) / kTile * ((p.B + kTile - 1) / kTile);
  gpu::launch("similar_shared", similar_shared<T, S>, dim3(static_cast<unsigned>(blocks)),
              dim3(kTileThreads), 0, stream, p);
}

template <typename T>
void launch_storage(const SimilarParams<T>& p, void* stream) {
  switch (p.bank.storage) {
    case Storage::kFloat64:
      return launch_similar<T, double>(p, stream);
    case Storage::kFloat32:
      return launch_similar<T, float>(p, stream);
    case Storage::kBFloat16:
      return launch_similar<T, __nv_bfloat16>(p, stream);
    case Storage::kFloat16:
      return launch_similar<T, __half>(p, stream);
  }
}

}  // namespace
}  // namespace crrcd::cuda
