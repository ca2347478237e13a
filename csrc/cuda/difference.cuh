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
// A block has a chunk of anchors, a chunk of queries (or one query after the other with negatives
// of its own), and goes through a range of tiles of keys. Lanes have anchors, warps queries or
// keys.
#pragma once

#include "difference_measure.cuh"
#include "softplus.cuh"

namespace crrcd::cuda {
namespace {

// ----------------------------------------------------------------------------------------- logits

// A pair (a, b), and its sums.
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

// What a pair and a key add to the loss and to the pair's sums; c and f = c <u, w> / |w|^2 in units
// of scale / log 2.
template <Precision kPrecision, Pass kPass, typename T>
__device__ __forceinline__ void add_logit(PairOf<T>& pair, T half_anchor, T half_query, T inverse,
                                          T left_out, LogitSums<T>& sums, T& c, T& f) {
  const T along = pair.half_square + (half_anchor - half_query);
  const T slope = pair.slope * inverse;
  const T logit = along * slope + pair.offset + left_out;
  if constexpr (kPass == Pass::kLogSumExp) {
    T &top = pair.sum_inverse, &sum = pair.sum_along;
    if (logit > top) {
      sum *= exp2_of<kPrecision>(top - logit);
      top = logit;
    }
    // where nothing has been found, top is as low as what was left out
    sum += logit <= T(kLeftOutLogit) / 2 ? T(0) : exp2_of<kPrecision>(logit - top);
  } else {
    T g;
    if constexpr (kPass == Pass::kNce)
      g = softplus<kPrecision>(logit, sums.product);
    else
      g = exp2_of<kPrecision>(logit);
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
template <Precision kPrecision, Pass kPass, typename T>
__device__ __forceinline__ void shared_logits(const DifferenceParams<T>& p, DifferenceTile<T>& s,
                                              int a0, int b0, int chunk, bool masked, bool fresh,
                                              LogitSums<T>& sums) {
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
          add_logit<kPrecision, kPass>(pair[i][j], half_anchor, half_query[j], inverse, left_out,
                                       sums, c, f);
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
        if (kPass == Pass::kNce &&
            k % (64 / (kAnchors * kQueries)) == 64 / (kAnchors * kQueries) - 1)
          sums.flush();
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
template <Precision kPrecision, Pass kPass, typename T>
__device__ __forceinline__ void own_logits(const DifferenceParams<T>& p, DifferenceTile<T>& s,
                                           int a0, int b, int chunk, bool masked, bool fresh,
                                           LogitSums<T>& sums) {
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
      add_logit<kPrecision, kPass>(pair[i], s.half_anchor[at], half_query, s.inverse[at],
                                   drop + bias, sums, c, f);
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
                                              int64_t anchor_slice, int count, int64_t place,
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
    if (p.need_anchor)
      add_product(s, s.half_anchor, anchor_sums, a0, anchors, d, width, fresh_anchor);
    if (!p.d_rows) continue;

    // d m_n = sum_b W q_b - sum_a Y a_a - f m_n
    const int column = threadIdx.x % 16 * 4, line = threadIdx.x / 16 * 2;
    T sum[2][4];
    for (int n = 0; n < 2; ++n)
      for (int j = 0; j < 4; ++j)
        sum[n][j] = -s.f[line + n] * s.rows[(line + n) * kRowLead + column + j];
    const auto add = [&](const T* matrix, int first, int rows, const T* weight, T sign) {
      __syncthreads();
      load_rows<Tile::kChunk, Tile::kColumns, false>(matrix, first, rows, d, width, s.rows,
                                                     kRowLead);
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
          p.d_rows[(place + line + n) * p.D + d + column + j] = sum[n][j];
  }
}

// ----------------------------------------------------------------------------------------- a block

// Two, where the registers of both do: a thread has 16 pairs of shared negatives, 2 of own ones.
template <Precision kPrecision, bool kOwn, Pass kPass>
constexpr int blocks_of_difference =
    kOwn && kPrecision != Precision::kF64 && kPass != Pass::kLogSumExp ? 2 : 1;

template <Precision kPrecision, bool kOwn, Pass kPass>
__global__ void __launch_bounds__(kDifferenceThreads, blocks_of_difference<kPrecision, kOwn, kPass>)
    difference_tiles(DifferenceParams<SumOf<kPrecision>> p) {
  using T = SumOf<kPrecision>;
  using Tile = DifferenceTile<T>;
  CRRCD_DYNAMIC_SHARED(bytes);
  auto& s = *reinterpret_cast<Tile*>(bytes);
  // block = (anchor chunk * groups + group) * chunks + chunk; narrow numbers, as registers are
  // scarce
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
      measure<kPrecision, kOwn>(p, s, a0, b0, count);
      // of the blocks that see the same keys one remembers which are near
      const int64_t entries = kOwn ? p.B * p.count : p.count;
      const int64_t entry = (kOwn ? b0 * p.count : 0) + k0;
      uint64_t* const near_key =
          kOwn || group == 0 ? p.near_key + anchor_chunk * entries + entry : nullptr;
      const bool masked = leave_out<kOwn>(p, s, a0, b0, p.first + k0, count, near_key);
      const bool fresh = tile == begin && !p.accumulate;
      LogitSums<T> sums;
      if constexpr (kOwn)
        own_logits<kPrecision, kPass>(p, s, a0, b0, chunk, masked, fresh, sums);
      else
        shared_logits<kPrecision, kPass>(p, s, a0, b0, chunk, masked, fresh, sums);
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

template <Precision kPrecision, bool kOwn, Pass kPass>
void launch_tiles(const DifferenceParams<SumOf<kPrecision>>& p, void* stream) {
  using T = SumOf<kPrecision>;
  const auto blocks = p.Ap / kDifferenceChunk<T> * p.groups * p.chunks;
  gpu::launch("difference_tiles", difference_tiles<kPrecision, kOwn, kPass>,
              dim3(static_cast<unsigned>(blocks)), dim3(kDifferenceThreads),
              sizeof(DifferenceTile<T>), stream, p);
}

}  // namespace
}  // namespace crrcd::cuda
