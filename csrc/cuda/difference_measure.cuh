// difference_nce: rows of the bank, and a tile of them measured: squared distances from anchors and
// queries, norms, masks.
//
// At full precision a distance is a sum of squares of differences, which loses no digits where rows
// are close to each other. Two-byte operands are multiplied as they are on tensor cores, exactly
// but for the sum: |m - a|^2 = |m|^2 + |a|^2 - 2 <m, a>.
#pragma once

#include "difference_params.h"
#include "reduce.cuh"
#include "rows.cuh"
#include "tile.cuh"

namespace crrcd::cuda {
namespace {

constexpr const char* kOutsideBank =
    "crrcd_ext.difference_nce: index: expected rows of the bank in [0, N)";

constexpr int kDifferenceThreads = 256;
constexpr int kDifferenceWarps = kDifferenceThreads / kWarp;

// ------------------------------------------------------------------------------------------- rows

// An element of a row of the bank, in any storage, as the operands' type sees it.
template <typename T>
__device__ __forceinline__ T bank_element(const DifferenceParams<T>& p, int64_t row, int64_t d) {
  const int64_t at = row * p.bank.row_stride + d;
  T x;
  switch (p.bank.storage) {
    case Storage::kFloat64:
      x = static_cast<T>(static_cast<const double*>(p.bank.data)[at]);
      break;
    case Storage::kFloat32:
      x = static_cast<const float*>(p.bank.data)[at];
      break;
    case Storage::kBFloat16:
      x = __bfloat162float(static_cast<const __nv_bfloat16*>(p.bank.data)[at]);
      break;
    default:
      x = __half2float(static_cast<const __half*>(p.bank.data)[at]);
  }
  if (p.operand == Storage::kBFloat16) x = __bfloat162float(__float2bfloat16(float(x)));
  if (p.operand == Storage::kFloat16) x = __half2float(__float2half(float(x)));
  return x;
}

// Element d of a key, seen from the origin.
template <typename T>
__device__ __forceinline__ T key_element(const DifferenceParams<T>& p, int64_t row, int64_t d) {
  return bank_element(p, row, d) - p.origin[d];
}

// The row of the bank that negative k of query b is; b does not matter where they are shared.
template <typename T>
__device__ __forceinline__ int64_t row_of(const DifferenceParams<T>& p, int64_t b, int64_t k) {
  if (p.own) return checked_row(p.own[b * p.own_stride + k * p.own_step], p.N, kOutsideBank);
  return p.bank.index ? checked_row(p.bank.index[k], p.N, kOutsideBank) : k;
}

template <typename T>
__device__ __forceinline__ bool is_anchors_own(const DifferenceParams<T>& p, int64_t a,
                                               int64_t row) {
  return p.anchor_id && p.anchor_id[a] == (p.key_id ? p.key_id[row] : row);
}

// A number that S can hold, exactly.
template <typename S>
__device__ __forceinline__ S rounded(float x) {
  if constexpr (std::is_same_v<S, __half>)
    return __float2half(x);
  else
    return __float2bfloat16(x);
}

// ----------------------------------------------------------------------------------------- a tile

// Shared memory of a block. Rows are padded so that threads meet different banks.
template <typename T>
struct DifferenceTile {
  static constexpr int kChunk = kDifferenceChunk<T>, kKeys = kDifferenceKeys;
  static constexpr int kLead = kChunk + 4, kKeyLead = kKeys + 4;
  static constexpr int kDepth = 32;    // columns of all operands at a time, for distances
  static constexpr int kColumns = 64;  // of one operand at a time, for sums and on tensor cores
  static constexpr int kProductLead = kColumns + 8;
  static constexpr int kGroup = 8;  // keys whose sums over the warps wait together

  struct Distances {
    T anchor[kDepth * kLead], query[kDepth * kLead], key[kDepth * kKeyLead];
  };
  struct Products {  // of two-byte numbers
    std::uint16_t anchor[kChunk * kProductLead], query[kChunk * kProductLead],
        key[kKeys * kProductLead];
  };
  struct Sums {
    T y[kGroup][kDifferenceWarps][kChunk];
    T f[kGroup][kDifferenceWarps];
  };
  union alignas(16) {
    Distances operands;
    Products products;
    Sums sums;
    T rows[kChunk * (kColumns + 4)];  // of a product
    T pairs[2][kDifferenceWarps][kChunk];
    double scalars[2 * kDifferenceWarps];
  };
  alignas(16) T half_anchor[kKeys * kLead];  // |w|^2 / 2, then Y
  alignas(16) T inverse[kKeys * kLead];      // 1 / |w|
  alignas(16) T drop[kKeys * kLead];         // 0, or what leaves (anchor, key) out
  alignas(16) T half_query[kKeys * kLead];   // |q - m|^2 / 2
  alignas(16) T bias[kKeys * kLead];         // as drop for (query, key)
  alignas(16) T weight[kKeys * kLead];       // W
  T key_square[kKeys], key_sum[kKeys];       // of two-byte rows
  T f[kKeys];                                // sum over anchors and queries
  int64_t row[kKeys];
  double totals[2][kDifferenceThreads];  // loss and g of a thread, where registers are scarce
};

// At most the 99 KB that a block of any GPU here can have; bench/static_model.py has the numbers.
static_assert(sizeof(DifferenceTile<float>) == 80000 && sizeof(DifferenceTile<double>) == 88064);

// kCount neighbouring numbers that lie on a boundary of their common size.
template <int kCount, typename T>
__device__ __forceinline__ void load_some(const T* from, T (&x)[kCount]) {
  struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
    T x[kCount];
  };
  const Pack pack = *reinterpret_cast<const Pack*>(from);
  for (int i = 0; i < kCount; ++i) x[i] = pack.x[i];
}

// In lane l the sum over the lanes of x[l's top bits]: kCount numbers, a power of two, are summed
// in about kCount exchanges.
template <int kCount, typename T>
__device__ __forceinline__ T warp_sums(T (&x)[kCount]) {
  const int lane = gpu::lane_id();
  int step = kWarp / 2;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T sent = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(0xffffffffu, sent, step);
    }
  }
  for (; step > 0; step /= 2) x[0] += __shfl_xor_sync(0xffffffffu, x[0], step);
  return x[0];
}

// Whose sum warp_sums left in this lane.
template <int kCount>
__device__ __forceinline__ int summed_by_lane() {
  return gpu::lane_id() / (kWarp / kCount);
}

// Columns [d, d + kCount) of rows [first, first + kRows) of a matrix [rows, D]: element (row,
// column) goes to out[row * ld + column], or to out[column * ld + row] when transposed.
template <int kRows, int kCount, bool kTransposed, typename T>
__device__ __forceinline__ void load_rows(const T* matrix, int first, int rows, int d, int width,
                                          T* out, int ld) {
  for (int at = threadIdx.x; at < kRows * kCount; at += kDifferenceThreads) {
    const int r = at / kCount, c = at % kCount;
    const bool inside = first + r < rows && d + c < width;
    out[kTransposed ? c * ld + r : r * ld + c] =
        inside ? matrix[int64_t(first + r) * width + d + c] : T(0);
  }
}

// The same of the tile's keys, seen from the origin.
template <int kCount, bool kTransposed, typename T>
__device__ __forceinline__ void load_keys(const DifferenceParams<T>& p,
                                          const DifferenceTile<T>& tile, int count, int d, T* out,
                                          int ld) {
  for (int at = threadIdx.x; at < kDifferenceKeys * kCount; at += kDifferenceThreads) {
    const int r = at / kCount, c = at % kCount;
    const bool inside = r < count && d + c < p.D;
    out[kTransposed ? c * ld + r : r * ld + c] = inside ? key_element(p, tile.row[r], d + c) : T(0);
  }
}

// Squared distances of the tile's keys from the block's anchors and queries, and 1 / |w|: -1 for
// what is small.
template <bool kOwn, typename T>
__device__ __forceinline__ void measure_distances(const DifferenceParams<T>& p,
                                                  DifferenceTile<T>& s, int a0, int b0, int count) {
  using Tile = DifferenceTile<T>;
  constexpr int kEach = Tile::kChunk / 16;  // anchors, and queries, of a thread; and two keys
  const int column = threadIdx.x % 16 * kEach, line = threadIdx.x / 16 * 2;
  T to_anchor[2][kEach] = {}, to_query[2][kEach] = {}, square[2] = {}, to_own[2] = {};
  auto& x = s.operands;
  const int width = p.D, anchors = p.A, queries = p.B;
  for (int d = 0; d < width; d += Tile::kDepth) {
    __syncthreads();
    load_rows<Tile::kChunk, Tile::kDepth, true>(p.anchor_seen, a0, anchors, d, width, x.anchor,
                                                Tile::kLead);
    if constexpr (kOwn)
      load_rows<1, Tile::kDepth, true>(p.query_seen, b0, queries, d, width, x.query, Tile::kLead);
    else
      load_rows<Tile::kChunk, Tile::kDepth, true>(p.query_seen, b0, queries, d, width, x.query,
                                                  Tile::kLead);
    load_keys<Tile::kDepth, true>(p, s, count, d, x.key, Tile::kKeyLead);
    __syncthreads();
    // sums of a few columns, then of those: they round less than one long one
    T anchor_part[2][kEach] = {}, query_part[2][kEach] = {}, square_part[2] = {}, own_part[2] = {};
#pragma unroll 2
    for (int c = 0; c < Tile::kDepth; ++c) {
      T m[2], a[kEach], q[kEach];
      load_some(x.key + c * Tile::kKeyLead + line, m);
      load_some(x.anchor + c * Tile::kLead + column, a);
      if constexpr (!kOwn) load_some(x.query + c * Tile::kLead + column, q);
      for (int n = 0; n < 2; ++n) {
        square_part[n] += m[n] * m[n];
        if constexpr (kOwn) {
          const T difference = x.query[c * Tile::kLead] - m[n];
          own_part[n] += difference * difference;
        }
        for (int i = 0; i < kEach; ++i) {
          const T w = m[n] - a[i];
          anchor_part[n][i] += w * w;
          if constexpr (!kOwn) {
            const T difference = q[i] - m[n];
            query_part[n][i] += difference * difference;
          }
        }
      }
    }
    for (int n = 0; n < 2; ++n) {
      square[n] += square_part[n], to_own[n] += own_part[n];
      for (int i = 0; i < kEach; ++i) {
        to_anchor[n][i] += anchor_part[n][i];
        if constexpr (!kOwn) to_query[n][i] += query_part[n][i];
      }
    }
  }
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < kEach; ++i) {
      const int64_t a = a0 + column + i;
      const int at = (line + n) * Tile::kLead + column + i;
      const T beside = square[n] + (a < p.A ? p.anchor_square[a] : T(0)), w = to_anchor[n][i];
      const bool near = w < beside * T(kNearDifference) + T(2 * kZeroNormSquared);
      s.half_anchor[at] = w / 2;
      s.inverse[at] = near ? T(-1) : T(1) / sqrt(w);
      if constexpr (!kOwn)
        s.half_query[at] = to_query[n][i] / 2;
      else if (column + i == 0)
        s.half_query[at] = to_own[n] / 2;
    }
  __syncthreads();
}

// The same of two-byte operands.
template <Precision kPrecision, bool kOwn>
__device__ __forceinline__ void measure_products(const DifferenceParams<float>& p,
                                                 DifferenceTile<float>& s, int a0, int b0,
                                                 int count) {
  using Tile = DifferenceTile<float>;
  using S = StoredOf<kPrecision>;
  constexpr int kDepth = Tile::kColumns, kLead = Tile::kProductLead;
  constexpr int kTiles =
      kOwn ? 2 : 4;  // of 8 anchors or queries, that a warp compares with 16 keys
  S* const anchors = reinterpret_cast<S*>(s.products.anchor);
  S* const queries = reinterpret_cast<S*>(s.products.query);
  S* const keys = reinterpret_cast<S*>(s.products.key);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int key_block = warp % 2 * 16, block = warp / 2 * 8 * kTiles;
  const bool of_anchors = kOwn || block < Tile::kChunk;
  const int column = of_anchors ? block : block - Tile::kChunk;
  const int own_key = threadIdx.x / 8, own_column = threadIdx.x % 8 * 8;
  const int width = p.D, anchor_count = p.A, query_count = p.B;
  const auto load = [&](const float* matrix, int rows, int first, int row_count, int d, S* out) {
    for (int at = threadIdx.x; at < rows * kDepth; at += kDifferenceThreads) {
      const int r = at / kDepth, c = at % kDepth;
      const bool inside = first + r < row_count && d + c < width;
      out[r * kLead + c] = rounded<S>(inside ? matrix[int64_t(first + r) * width + d + c] : 0);
    }
  };
  float sum[kTiles][4] = {}, square = 0, total = 0, to_own = 0;
  for (int d = 0; d < width; d += kDepth) {
    __syncthreads();
    load(p.anchor, Tile::kChunk, a0, anchor_count, d, anchors);
    load(p.query, kOwn ? 1 : Tile::kChunk, b0, query_count, d, queries);
    for (int at = threadIdx.x; at < Tile::kKeys * kDepth; at += kDifferenceThreads) {
      const int r = at / kDepth, c = at % kDepth;
      const bool inside = r < count && d + c < width;
      keys[r * kLead + c] = rounded<S>(inside ? bank_element(p, s.row[r], d + c) : 0);
    }
    __syncthreads();
    multiply<kPrecision, kTiles, false, false, kDepth>(
        sum, keys + key_block * kLead, kLead, (of_anchors ? anchors : queries) + column * kLead,
        kLead, kDepth, kTiles);
    for (int c = own_column; c < own_column + 8; ++c) {
      const float m = widen(keys[own_key * kLead + c]);
      square += m * m, total += m;
      if constexpr (kOwn) {
        const float difference = widen(queries[c]) - m;
        to_own += difference * difference;
      }
    }
  }
  square = warp_sum<8>(square), total = warp_sum<8>(total), to_own = warp_sum<8>(to_own);
  if (own_column == 0) {
    s.key_square[own_key] = square, s.key_sum[own_key] = total;
    if constexpr (kOwn) s.half_query[own_key * Tile::kLead] = to_own / 2;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
    for (int i = 0; i < 4; ++i) {
      const int n = key_block + lane / 4 + 8 * (i / 2), c = column + 8 * j + lane % 4 * 2 + i % 2;
      const int at = n * Tile::kLead + c;
      if (of_anchors) {
        const bool present = a0 + c < anchor_count;
        const float beside = s.key_square[n] + (present ? p.anchor_raw_square[a0 + c] : 0);
        const float shift = s.key_sum[n] - (present ? p.anchor_sum[a0 + c] : 0);
        const float w = beside - 2 * sum[j][i] + p.eps * (2 * shift + p.eps * width);
        const bool near = w < beside * float(kNearDifference) + float(2 * kZeroNormSquared);
        s.half_anchor[at] = w / 2;
        s.inverse[at] = near ? -1 : inverse_norm<kPrecision>(w);
      } else {
        const float own = b0 + c < query_count ? p.query_raw_square[b0 + c] : 0;
        s.half_query[at] = (s.key_square[n] + own) / 2 - sum[j][i];
      }
    }
  __syncthreads();
}

template <Precision kPrecision, bool kOwn, typename T>
__device__ __forceinline__ void measure(const DifferenceParams<T>& p, DifferenceTile<T>& s, int a0,
                                        int b0, int count) {
  if constexpr (stored_bytes(kPrecision) == 2)
    measure_products<kPrecision, kOwn>(p, s, a0, b0, count);
  else
    measure_distances<kOwn>(p, s, a0, b0, count);
}

// Masks, and the small |w|, which are left to difference_exact and remembered for it in near_key
// (or null). first: the tile's first negative, among all of the call. Whether there are any.
template <bool kOwn, typename T>
__device__ __forceinline__ bool leave_out(const DifferenceParams<T>& p, DifferenceTile<T>& s,
                                          int a0, int b0, int64_t first, int count,
                                          uint64_t* near_key) {
  using Tile = DifferenceTile<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  bool any = false;
  for (int n = warp; n < Tile::kKeys; n += kDifferenceWarps) {
    uint64_t near = 0;
    for (int i = 0; i < Tile::kChunk; i += kWarp) {
      const int at = n * Tile::kLead + i + lane;
      const int64_t a = a0 + i + lane;
      const bool present = n < count && a < p.A;
      const bool own = present && is_anchors_own(p, a, s.row[n]);
      const bool small = s.inverse[at] < 0;
      near |= uint64_t(__ballot_sync(0xffffffffu, present && small && !own)) << i;
      const bool out = !present || own || small;
      s.drop[at] = out ? T(kLeftOutLogit) : T(0);
      if (out) s.inverse[at] = s.half_anchor[at] = 0;
      any |= out && a < p.A;
      if constexpr (!kOwn) {
        const int64_t b = b0 + i + lane;
        const bool left = n < count && b < p.B && !is_negative(p, b, s.row[n], first + n);
        s.bias[at] = left ? T(kLeftOutLogit) : T(0);
        any |= left;
      }
    }
    if constexpr (kOwn) {
      const bool left = n < count && !is_negative(p, b0, s.row[n], first + n);
      if (lane == 0) s.bias[n * Tile::kLead] = left ? T(kLeftOutLogit) : T(0);
      any |= left;
    }
    if (near_key && lane == 0 && n < count) near_key[n] = near;
  }
  return __syncthreads_or(any);
}

}  // namespace
}  // namespace crrcd::cuda
