// difference_nce: logits, loss and the sums of which every gradient is made, from one read of the
// negatives.
//
// With u = q_b - a_a and w = m_n - a_a the law of cosines makes all logits of a tile from squared
// distances:
//     2 <u, w> = |u|^2 + |w|^2 - |q - m|^2        s_abn = scale <u, w> / (|u| |w|) - offset
// With g = d loss / d cosine and c_abn = g / (|u| |w|)
//     d u_ab = sum_n c w_an - e u_ab        e_ab = sum_n g cosine / |u|^2
//     d w_an = sum_b c u_ab - f w_an        f_an = sum_b g cosine / |w|^2
// of which only W_bn = sum_a c, C_ab = sum_n c, Y_an = sum_b c - f_an, and sums of e and f are
// needed: what they multiply are rows of q, m and a. Where |w| or |u| is small beside the vectors
// that it is the difference of, these sums would cancel: such (a, b, n) are left to
// difference_exact.
//
// A block has a chunk of anchors, a chunk of queries (or one query after the other with negatives of
// its own), and goes through a range of tiles of keys. Lanes have anchors, warps queries or keys.
#pragma once

#include "difference_params.h"
#include "reduce.cuh"
#include "rows.cuh"
#include "softplus.cuh"

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
  if (p.own)
    return checked_row(p.own[b * p.own_stride + k * p.own_step], p.N, kOutsideBank);
  return p.bank.index ? checked_row(p.bank.index[k], p.N, kOutsideBank) : k;
}

template <typename T>
__device__ __forceinline__ bool is_negative_of(const DifferenceParams<T>& p, int64_t b,
                                               int64_t row) {
  if (p.query_id && p.query_id[b] == (p.key_id ? p.key_id[row] : row)) return false;
  return !(p.query_label && p.query_label[b] == p.key_label[row]);
}

template <typename T>
__device__ __forceinline__ bool is_anchors_own(const DifferenceParams<T>& p, int64_t a,
                                               int64_t row) {
  return p.anchor_id && p.anchor_id[a] == (p.key_id ? p.key_id[row] : row);
}

template <typename T>
__device__ __forceinline__ bool keys_are_masked(const DifferenceParams<T>& p) {
  return p.anchor_id || p.query_id || p.query_label;
}

// ----------------------------------------------------------------------------------------- a tile

// Shared memory of a block. Rows are padded so that threads meet different banks.
template <typename T>
struct DifferenceTile {
  static constexpr int kChunk = kDifferenceChunk<T>, kKeys = kDifferenceKeys;
  static constexpr int kLead = kChunk + 4, kKeyLead = kKeys + 4;
  static constexpr int kDepth = 32;    // columns of all operands at a time, for distances
  static constexpr int kColumns = 64;  // of one operand at a time, for sums
  static constexpr int kGroup = 8;     // keys whose sums over the warps wait together

  struct Distances {
    T anchor[kDepth * kLead], query[kDepth * kLead], key[kDepth * kKeyLead];
  };
  struct Sums {
    T y[kGroup][kDifferenceWarps][kChunk];
    T f[kGroup][kDifferenceWarps];
  };
  union alignas(16) {
    Distances operands;
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
  T key_square[kKeys];
  T f[kKeys];  // sum over anchors and queries
  int64_t row[kKeys];
  double totals[2][kDifferenceThreads];  // loss and g of a thread, where registers are scarce
};

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
    out[kTransposed ? c * ld + r : r * ld + c] =
        inside ? key_element(p, tile.row[r], d + c) : T(0);
  }
}

// Squared distances of the tile's keys from the block's anchors and queries, |m|^2, and with them
// 1 / |w|: -1 for what is small.
template <typename T, bool kOwn>
__device__ __forceinline__ void measure(const DifferenceParams<T>& p, DifferenceTile<T>& s,
                                        int a0, int b0, int count) {
  using Tile = DifferenceTile<T>;
  constexpr int kEach = Tile::kChunk / 16;  // anchors, and queries, of a thread; and two keys
  const int column = threadIdx.x % 16 * kEach, line = threadIdx.x / 16 * 2;
  T to_anchor[2][kEach] = {}, to_query[2][kEach] = {}, square[2] = {}, to_own[2] = {};
  auto& x = s.operands;
  const int width = p.D, anchors = p.A, queries = p.B;
  for (int d = 0; d < width; d += Tile::kDepth) {
    __syncthreads();
    load_rows<Tile::kChunk, Tile::kDepth, true>(p.anchor_seen, a0, anchors, d, width, x.anchor, Tile::kLead);
    if constexpr (kOwn)
      load_rows<1, Tile::kDepth, true>(p.query_seen, b0, queries, d, width, x.query, Tile::kLead);
    else
      load_rows<Tile::kChunk, Tile::kDepth, true>(p.query_seen, b0, queries, d, width, x.query, Tile::kLead);
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

// Masks, and the small |w|, which are left to difference_exact and remembered for it in near_key
// (or null). Whether there are any.
template <typename T, bool kOwn>
__device__ __forceinline__ bool leave_out(const DifferenceParams<T>& p, DifferenceTile<T>& s,
                                          int a0, int b0, int count, uint64_t* near_key) {
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
        const bool left = n < count && b < p.B && !is_negative_of(p, b, s.row[n]);
        s.bias[at] = left ? T(kLeftOutLogit) : T(0);
        any |= left;
      }
    }
    if constexpr (kOwn) {
      const bool left = n < count && !is_negative_of(p, b0, s.row[n]);
      if (lane == 0) s.bias[n * Tile::kLead] = left ? T(kLeftOutLogit) : T(0);
      any |= left;
    }
    if (near_key && lane == 0 && n < count) near_key[n] = near;
  }
  return __syncthreads_or(any);
}

// ----------------------------------------------------------------------------------------- logits

// One logit: loss, g, and what it adds to the sums of its pair.
template <typename T>
struct PairOf {
  T half_square, slope, offset;
  T sum_inverse = 0, sum_along = 0;  // of this tile; InfoNCE's first sweep: maximum and sum
};

// Of a tile.
template <typename T>
struct LogitSums {
  LossProduct<T> product;
  T loss = 0, g = 0;

  __device__ __forceinline__ void flush() { loss += product.take(); }
};

// What a pair (a, b) and a key give; c and f = c <u, w> / |w|^2 in units of scale / log 2.
template <typename T, Pass kPass>
__device__ __forceinline__ void add_logit(PairOf<T>& pair, T half_anchor, T half_query, T inverse,
                                          T left_out, LogitSums<T>& sums, T& c, T& f) {
  const T along = pair.half_square + (half_anchor - half_query);
  const T slope = pair.slope * inverse;
  const T logit = along * slope + pair.offset + left_out;
  if constexpr (kPass == Pass::kLogSumExp) {
    T &top = pair.sum_inverse, &sum = pair.sum_along;
    if (logit > top) {
      sum *= exp2(top - logit);
      top = logit;
    }
    // where nothing has been found, top is as low as what was left out
    sum += logit <= T(kLeftOutLogit) / 2 ? T(0) : exp2(logit - top);
  } else {
    T g;
    if constexpr (kPass == Pass::kNce)
      g = softplus<Precision::kF32>(logit, sums.product);
    else
      g = exp2(logit);
    sums.g += g;
    const T of_norm = g * inverse;
    pair.sum_inverse += of_norm;
    pair.sum_along += of_norm * along;
    c = g * slope;
    f = c * along * (inverse * inverse);
  }
}

template <typename T, Pass kPass>
__device__ __forceinline__ PairOf<T> load_pair(const DifferenceParams<T>& p, int a, int b) {
  const int64_t at = b * p.Ap + a;
  PairOf<T> pair{p.half_square[at], p.slope[at], p.gram_offset[at]};
  if constexpr (kPass == Pass::kLogSumExp) pair.sum_inverse = T(kLeftOutLogit);
  return pair;
}

// The sums of a pair so far, and those of a tile.
template <typename T, Pass kPass>
__device__ __forceinline__ void store_pair(const DifferenceParams<T>& p, int64_t slice, int64_t a,
                                           int64_t b, const T& first, const T& second, bool fresh) {
  const int64_t at = (slice * p.Bp + b) * p.Ap + a;
  if constexpr (kPass == Pass::kLogSumExp) {
    T top = fresh ? T(kLeftOutLogit) : p.running_max[at], sum = fresh ? T(0) : p.running_sum[at];
    const T most = first > top ? first : top;
    p.running_sum[at] = sum * exp2(top - most) + second * exp2(first - most);
    p.running_max[at] = most;
  } else {
    T &inverse = p.sum_inverse[at], &along = p.sum_along[at];
    inverse = fresh ? first : inverse + first;
    along = fresh ? second : along + second;
  }
}

// Shared negatives: a thread has some anchors and some queries, and goes through the keys.
template <typename T, Pass kPass>
__device__ __forceinline__ void shared_logits(const DifferenceParams<T>& p, DifferenceTile<T>& s,
                                              int a0, int b0, int chunk, bool masked,
                                              bool fresh, LogitSums<T>& sums) {
  using Tile = DifferenceTile<T>;
  constexpr int kAnchors = Tile::kChunk / kWarp, kQueries = Tile::kChunk / kDifferenceWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, first = warp * kQueries;
  PairOf<T> pair[kAnchors][kQueries];
#pragma unroll
  for (int i = 0; i < kAnchors; ++i)
#pragma unroll
    for (int j = 0; j < kQueries; ++j)
      pair[i][j] = load_pair<T, kPass>(p, a0 + lane + kWarp * i, b0 + first + j);
  for (int begin = 0; begin < Tile::kKeys; begin += Tile::kGroup) {
#pragma unroll 1
    for (int k = 0; k < Tile::kGroup; ++k) {
      const int n = begin + k, row = n * Tile::kLead;
      T half_query[kQueries], weight[kQueries] = {};
      load_some(s.half_query + row + first, half_query);
      T f_sum = 0;
#pragma unroll
      for (int i = 0; i < kAnchors; ++i) {
        const int at = row + lane + kWarp * i;
        const T half_anchor = s.half_anchor[at], inverse = s.inverse[at];
        const T drop = masked ? s.drop[at] : T(0);
        T y = 0;
#pragma unroll
        for (int j = 0; j < kQueries; ++j) {
          const T left_out = masked ? drop + s.bias[row + first + j] : T(0);
          T c = 0, f = 0;
          add_logit<T, kPass>(pair[i][j], half_anchor, half_query[j], inverse, left_out, sums, c,
                              f);
          weight[j] += c;
          y += c - f;
          f_sum += f;
        }
        if constexpr (kPass != Pass::kLogSumExp) s.sums.y[k][warp][lane + kWarp * i] = y;
      }
      if constexpr (kPass != Pass::kLogSumExp) {
        const T summed = warp_sums(weight);
        if (lane % (kWarp / kQueries) == 0)
          s.weight[row + first + summed_by_lane<kQueries>()] = summed;
        if (p.d_rows) {
          f_sum = warp_sum(f_sum);
          if (lane == 0) s.sums.f[k][warp] = f_sum;
        }
        // a product of 1 + q, each at most 2, stays finite for so many
        if (kPass == Pass::kNce && k % (64 / (kAnchors * kQueries)) == 64 / (kAnchors * kQueries) - 1) sums.flush();
      }
    }
    if constexpr (kPass != Pass::kLogSumExp) {
      sums.flush();
      __syncthreads();
      for (int at = threadIdx.x; at < Tile::kGroup * Tile::kChunk; at += kDifferenceThreads) {
        const int k = at / Tile::kChunk, a = at % Tile::kChunk;
        T y = 0;
        for (int w = 0; w < kDifferenceWarps; ++w) y += s.sums.y[k][w][a];
        s.half_anchor[(begin + k) * Tile::kLead + a] = y;
      }
      if (p.d_rows && threadIdx.x < Tile::kGroup) {
        T f = 0;
        for (int w = 0; w < kDifferenceWarps; ++w) f += s.sums.f[threadIdx.x][w];
        s.f[begin + threadIdx.x] = f;
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int i = 0; i < kAnchors; ++i)
#pragma unroll
    for (int j = 0; j < kQueries; ++j)
      store_pair<T, kPass>(p, chunk, a0 + lane + kWarp * i, b0 + first + j, pair[i][j].sum_inverse,
                           pair[i][j].sum_along, fresh);
}

// A query's own negatives: a thread has some anchors, a warp some keys.
template <typename T, Pass kPass>
__device__ __forceinline__ void own_logits(const DifferenceParams<T>& p, DifferenceTile<T>& s,
                                           int a0, int b, int chunk, bool masked,
                                           bool fresh, LogitSums<T>& sums) {
  using Tile = DifferenceTile<T>;
  constexpr int kAnchors = Tile::kChunk / kWarp, kEach = Tile::kKeys / kDifferenceWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, first = warp * kEach;
  PairOf<T> pair[kAnchors];
  for (int i = 0; i < kAnchors; ++i) pair[i] = load_pair<T, kPass>(p, a0 + lane + kWarp * i, b);
  T weight[kEach] = {}, f_sum[kEach] = {};
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int row = (first + k) * Tile::kLead;
    const T half_query = s.half_query[row], bias = masked ? s.bias[row] : T(0);
#pragma unroll
    for (int i = 0; i < kAnchors; ++i) {
      const int at = row + lane + kWarp * i;
      const T drop = masked ? s.drop[at] : T(0);
      T c = 0, f = 0;
      add_logit<T, kPass>(pair[i], s.half_anchor[at], half_query, s.inverse[at], drop + bias, sums,
                          c, f);
      weight[k] += c;
      f_sum[k] += f;
      if constexpr (kPass != Pass::kLogSumExp) s.half_anchor[at] = c - f;
    }
  }
  if constexpr (kPass != Pass::kLogSumExp) {
    sums.flush();
    const T w = warp_sums(weight), f = warp_sums(f_sum);
    if (lane % (kWarp / kEach) == 0) {
      s.weight[(first + summed_by_lane<kEach>()) * Tile::kLead] = w;
      s.f[first + summed_by_lane<kEach>()] = f;
    }
  }
  for (int i = 0; i < kAnchors; ++i) {
    s.pairs[0][warp][lane + kWarp * i] = pair[i].sum_inverse;
    s.pairs[1][warp][lane + kWarp * i] = pair[i].sum_along;
  }
  __syncthreads();
  if (threadIdx.x < Tile::kChunk) {
    const int a = threadIdx.x;
    T first = s.pairs[0][0][a], second = s.pairs[1][0][a];
    for (int w = 1; w < kDifferenceWarps; ++w) {
      const T x = s.pairs[0][w][a], y = s.pairs[1][w][a];
      if constexpr (kPass == Pass::kLogSumExp) {
        const T most = x > first ? x : first;
        second = second * exp2(first - most) + y * exp2(x - most);
        first = most;
      } else {
        first += x, second += y;
      }
    }
    store_pair<T, kPass>(p, chunk, a0 + a, b, first, second, fresh);
  }
  __syncthreads();
}

// -------------------------------------------------------------------------------------- gradients

// out[row, column] of `slice` += sum over keys of weight[key, row] m[key, column], kChunk rows.
template <typename T>
__device__ __forceinline__ void add_product(const DifferenceTile<T>& s, const T* weight, T* slice,
                                            int first, int rows, int d, int width, bool fresh) {
  using Tile = DifferenceTile<T>;
  constexpr int kEach = Tile::kChunk / 16, kRowLead = Tile::kColumns + 4;
  const int column = threadIdx.x % 16 * 4, line = threadIdx.x / 16 * kEach;
  T sum[kEach][4] = {};
#pragma unroll 4
  for (int n = 0; n < Tile::kKeys; ++n) {
    T x[kEach], m[4];
    load_some(weight + n * Tile::kLead + line, x);
    load_some(s.rows + n * kRowLead + column, m);
    for (int i = 0; i < kEach; ++i)
      for (int j = 0; j < 4; ++j) sum[i][j] += x[i] * m[j];
  }
  T* out = slice + int64_t(first + line) * width + d + column;
  for (int i = 0; i < kEach; ++i, out += width)
    for (int j = 0; j < 4; ++j)
      if (first + line + i < rows && d + column + j < width)
        out[j] = fresh ? sum[i][j] : out[j] + sum[i][j];
}

// What a tile adds to the sums for queries, anchors and the rows of the bank. fresh_query,
// fresh_anchor: nothing has been written to their slice yet.
template <typename T, bool kOwn>
__device__ __forceinline__ void add_gradients(const DifferenceParams<T>& p, DifferenceTile<T>& s,
                                              int a0, int b0, int64_t query_slice,
                                              int64_t anchor_slice, int count, int64_t row,
                                              bool fresh_query, bool fresh_anchor) {
  using Tile = DifferenceTile<T>;
  constexpr int kRowLead = Tile::kColumns + 4;
  T* const query_sums = p.d_query + query_slice * p.B * p.D;
  T* const anchor_sums = p.d_anchor + anchor_slice * p.A * p.D;
  if (p.need_anchor && threadIdx.x < Tile::kChunk) {
    T y = 0;
    for (int n = 0; n < Tile::kKeys; ++n) y += s.half_anchor[n * Tile::kLead + threadIdx.x];
    T& out = p.sum_y[anchor_slice * p.Ap + a0 + threadIdx.x];
    out = fresh_anchor ? y : out + y;
  }
  const int queries = p.B, anchors = p.A, width = p.D;
  for (int d = 0; d < width; d += Tile::kColumns) {
    __syncthreads();
    load_keys<Tile::kColumns, false>(p, s, count, d, s.rows, kRowLead);
    __syncthreads();
    if (p.need_query) {
      if constexpr (kOwn) {
        if (threadIdx.x < Tile::kColumns && d + static_cast<int>(threadIdx.x) < width) {
          T sum = 0;
          for (int n = 0; n < Tile::kKeys; ++n)
            sum += s.weight[n * Tile::kLead] * s.rows[n * kRowLead + threadIdx.x];
          T& out = query_sums[b0 * p.D + d + threadIdx.x];
          out = fresh_query ? sum : out + sum;
        }
      } else {
        add_product(s, s.weight, query_sums, b0, queries, d, width, fresh_query);
      }
    }
    if (p.need_anchor) add_product(s, s.half_anchor, anchor_sums, a0, anchors, d, width, fresh_anchor);
    if (!p.d_rows) continue;

    // d m_n = sum_b W q_b - sum_a Y a_a - f m_n
    const int column = threadIdx.x % 16 * 4, line = threadIdx.x / 16 * 2;
    T sum[2][4];
    for (int n = 0; n < 2; ++n)
      for (int j = 0; j < 4; ++j)
        sum[n][j] = -s.f[line + n] * s.rows[(line + n) * kRowLead + column + j];
    const auto add = [&](const T* matrix, int first, int rows, const T* weight, T sign) {
      __syncthreads();
      load_rows<Tile::kChunk, Tile::kColumns, false>(matrix, first, rows, d, width, s.rows, kRowLead);
      __syncthreads();
      T part[2][4] = {};
#pragma unroll 4
      for (int i = 0; i < Tile::kChunk; ++i) {
        T x[4];
        load_some(s.rows + i * kRowLead + column, x);
        for (int n = 0; n < 2; ++n) {
          const T y = weight[(line + n) * Tile::kLead + i];
          for (int j = 0; j < 4; ++j) part[n][j] += y * x[j];
        }
      }
      for (int n = 0; n < 2; ++n)
        for (int j = 0; j < 4; ++j) sum[n][j] += sign * part[n][j];
    };
    if constexpr (kOwn) {
      for (int n = 0; n < 2; ++n)
        for (int j = 0; j < 4; ++j)
          if (d + column + j < width)
            sum[n][j] +=
                s.weight[(line + n) * Tile::kLead] * p.query_seen[b0 * p.D + d + column + j];
    } else {
      add(p.query_seen, b0, queries, s.weight, T(1));
    }
    add(p.anchor_seen, a0, anchors, s.half_anchor, T(-1));
    for (int n = 0; n < 2; ++n)
      for (int j = 0; j < 4; ++j)
        if (line + n < count && d + column + j < width)
          p.d_rows[(row + line + n) * p.D + d + column + j] = sum[n][j];
  }
}

// ----------------------------------------------------------------------------------------- a block

// Two, where the registers of both do.
template <typename T, bool kOwn, Pass kPass>
constexpr int blocks_of_difference =
    sizeof(T) == 4 && (kPass == Pass::kNce || (kOwn && kPass == Pass::kSoftmax)) ? 2 : 1;

template <typename T, bool kOwn, Pass kPass>
__global__ void __launch_bounds__(kDifferenceThreads, blocks_of_difference<T, kOwn, kPass>)
    difference_tiles(DifferenceParams<T> p) {
  using Tile = DifferenceTile<T>;
  CRRCD_DYNAMIC_SHARED(bytes);
  auto& s = *reinterpret_cast<Tile*>(bytes);
  // block = (anchor chunk * groups + group) * chunks + chunk; narrow numbers, as registers are scarce
  const int chunks = p.chunks, groups = p.groups, queries = p.B;
  const int chunk = blockIdx.x % chunks, group = blockIdx.x / chunks % groups;
  const int anchor_chunk = blockIdx.x / chunks / groups, a0 = anchor_chunk * Tile::kChunk;
  const int tiles = (p.count + Tile::kKeys - 1) / Tile::kKeys;
  const int begin = int64_t(tiles) * chunk / chunks, end = int64_t(tiles) * (chunk + 1) / chunks;
  const int first_query = kOwn ? int64_t(queries) * group / groups : group * Tile::kChunk;
  const int last_query = kOwn ? int64_t(queries) * (group + 1) / groups : first_query + 1;

  for (int i = 0; i < 2; ++i) s.totals[i][threadIdx.x] = 0;
  for (int b0 = first_query; b0 < last_query; ++b0)
    for (int tile = begin; tile < end; ++tile) {
      const int k0 = tile * Tile::kKeys, left = static_cast<int>(p.count) - k0;
      const int count = left < Tile::kKeys ? left : Tile::kKeys, thread = threadIdx.x;
      __syncthreads();
      if (thread < Tile::kKeys)
        s.row[thread] = thread < count ? row_of(p, b0, p.first + k0 + thread) : int64_t(0);
      measure<T, kOwn>(p, s, a0, b0, count);
      // of the blocks that see the same keys one remembers which are near
      const int64_t entries = kOwn ? p.B * p.count : p.count;
      const int64_t entry = (kOwn ? b0 * p.count : 0) + k0;
      uint64_t* const near_key =
          kOwn || group == 0 ? p.near_key + anchor_chunk * entries + entry : nullptr;
      const bool masked = leave_out<T, kOwn>(p, s, a0, b0, count, near_key);
      const bool fresh = tile == begin && !p.accumulate;
      LogitSums<T> sums;
      if constexpr (kOwn)
        own_logits<T, kPass>(p, s, a0, b0, chunk, masked, fresh, sums);
      else
        shared_logits<T, kPass>(p, s, a0, b0, chunk, masked, fresh, sums);
      s.totals[0][thread] += sums.loss, s.totals[1][thread] += sums.g;
      if constexpr (kPass != Pass::kLogSumExp)
        if (p.need_query || p.need_anchor || p.d_rows) {
          const int64_t part = kOwn ? anchor_chunk : anchor_chunk * p.groups + group;
          add_gradients<T, kOwn>(p, s, a0, b0, anchor_chunk * p.chunks + chunk,
                                 group * p.chunks + chunk, count, part * entries + entry, fresh,
                                 fresh && b0 == first_query);
        }
    }
  if constexpr (kPass == Pass::kLogSumExp) return;
  __syncthreads();
  double total[2] = {s.totals[0][threadIdx.x], s.totals[1][threadIdx.x]};
  block_sum<kDifferenceThreads>(total, s.scalars);
  if (threadIdx.x != 0) return;
  double* out = p.scalars + 3 * int64_t(blockIdx.x);
  for (int i = 0; i < 2; ++i) out[i] = p.accumulate ? out[i] + total[i] : total[i];
  out[2] = 0;
}

template <typename T, bool kOwn, Pass kPass>
void launch_tiles(const DifferenceParams<T>& p, void* stream) {
  const auto blocks = p.Ap / kDifferenceChunk<T> * p.groups * p.chunks;
  gpu::launch("difference_tiles", difference_tiles<T, kOwn, kPass>,
              dim3(static_cast<unsigned>(blocks)), dim3(kDifferenceThreads),
              sizeof(DifferenceTile<T>), stream, p);
}

}  // namespace
}  // namespace crrcd::cuda
