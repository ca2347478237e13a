// Rows of a bank in any storage, read as T.
#pragma once

#include "../bank.h"
#include "gpu.cuh"

namespace crrcd::cuda {

// What a Storage holds in memory.
template <Storage>
struct Stored;
template <>
struct Stored<Storage::kFloat64> {
  using Type = double;
};
template <>
struct Stored<Storage::kFloat32> {
  using Type = float;
};
template <>
struct Stored<Storage::kBFloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct Stored<Storage::kFloat16> {
  using Type = __half;
};

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <typename S>
__device__ __forceinline__ S narrow(double x) {
  if constexpr (sizeof(S) == 8)
    return x;
  else if constexpr (sizeof(S) == 4)
    return static_cast<float>(x);
  else if constexpr (std::is_same_v<S, __half>)
    return __double2half(x);
  else
    return __double2bfloat16(x);
}

// Four neighbouring elements that lie on a boundary of their common size.
template <typename S>
struct alignas(4 * sizeof(S)) Quad {
  S x[4];
};

// out = elements [first, first + 4) of a row of `width`, zero beyond it. whole: rows begin on the
// boundary of a quad and are a multiple of four wide.
template <typename S, typename T>
__device__ __forceinline__ void load_quad(const S* row, int64_t first, int64_t width, bool whole,
                                          T (&out)[4]) {
  if (whole && first < width) {
    const Quad<S> quad = *reinterpret_cast<const Quad<S>*>(row + first);
    for (int j = 0; j < 4; ++j) out[j] = static_cast<T>(widen(quad.x[j]));
    return;
  }
  for (int j = 0; j < 4; ++j)
    out[j] = first + j < width ? static_cast<T>(widen(row[first + j])) : T(0);
}

template <typename S>
__device__ __forceinline__ const S* bank_row(const BankView& bank, int64_t row) {
  return static_cast<const S*>(bank.data) + row * bank.row_stride;
}

// Whether the bit of negative k, counted over all of the call, leaves it out for query b.
template <typename Params>
__device__ __forceinline__ bool is_excluded(const Params& p, int64_t b, int64_t k) {
  return p.excluded.bits && (p.excluded.bits[b * p.excluded.words + k / 32] >> k % 32 & 1);
}

// Whether negative k of query b, a row of the bank, counts: it is neither its own, nor of its
// class, nor excluded.
template <typename Params>
__device__ __forceinline__ bool is_negative(const Params& p, int64_t b, int64_t row, int64_t k) {
  if (p.query_id && p.query_id[b] == (p.key_id ? p.key_id[row] : row)) return false;
  if (p.query_label && p.query_label[b] == p.key_label[row]) return false;
  return !is_excluded(p, b, k);
}

// An id that the caller had to keep below `rows` and that no host has looked at.
__device__ __forceinline__ int64_t checked_row(int64_t row, int64_t rows, const char* message) {
  if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(rows)) gpu::trap(message);
  return row;
}

}  // namespace crrcd::cuda
