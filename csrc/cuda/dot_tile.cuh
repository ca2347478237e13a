// Products of 64 queries and 64 rows of a bank by fused multiply-adds, each block of 256 threads a
// tile of them.
#pragma once

#include "rows.cuh"

namespace crrcd::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = kTile / 2;  // columns of two operands that a tile holds at a time
constexpr int kLead = kTile + 4;   // row stride of a tile: rows stay on the boundary of a quad
constexpr int kTileThreads = 256;  // 16 x 16, each with 4 x 4 cells

// The first row and column of a thread's cells.
__device__ __forceinline__ int tile_line() { return threadIdx.x / 16 * 4; }
__device__ __forceinline__ int tile_column() { return threadIdx.x % 16 * 4; }

// sum[i][j] += x[i] y[j]
template <typename T>
__device__ __forceinline__ void add_outer(const T (&x)[4], const T (&y)[4], T (&sum)[4][4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) sum[i][j] += x[i] * y[j];
}

template <typename T>
__device__ __forceinline__ void load_four(const T* from, T (&x)[4]) {
  const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(from);
  for (int j = 0; j < 4; ++j) x[j] = quad.x[j];
}

// Rows [first, first + kTile) of a matrix of `rows` rows, columns [d, d + kCount): element (row,
// column) goes to out[row * kLead + column], or to out[column * kLead + row] when transposed.
template <int kCount, bool kTransposed, typename T, typename Row>
__device__ __forceinline__ void load_tile(int64_t first, int64_t rows, int64_t d, int64_t width,
                                          const Row& row, T* out) {
  for (int at = threadIdx.x; at < kTile * kCount; at += kTileThreads) {
    const int r = at / kCount, c = at % kCount;
    T x = 0;
    if (first + r < rows && d + c < width) x = static_cast<T>(widen(row(first + r)[d + c]));
    out[kTransposed ? c * kLead + r : r * kLead + c] = x;
  }
}

// z[i][j] += <query b0 + line + i, key k0 + column + j>. operand: memory of a tile, which may be
// used again at once.
template <typename T, typename QueryRow, typename KeyRow>
__device__ __forceinline__ void add_products(int64_t b0, int64_t queries, const QueryRow& query_row,
                                             int64_t k0, int64_t keys, const KeyRow& key_row,
                                             int64_t width, T* operand, T (&z)[4][4]) {
  for (int64_t d = 0; d < width; d += kDepth) {
    load_tile<kDepth, true>(b0, queries, d, width, query_row, operand);
    load_tile<kDepth, true>(k0, keys, d, width, key_row, operand + kDepth * kLead);
    __syncthreads();
    for (int c = 0; c < kDepth; ++c) {
      T x[4], y[4];
      load_four(operand + c * kLead + tile_line(), x);
      load_four(operand + (kDepth + c) * kLead + tile_column(), y);
      add_outer(x, y, z);
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace crrcd::cuda
