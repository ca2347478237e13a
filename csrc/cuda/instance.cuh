// instance_nce: logits, loss and every gradient from one read of each row of the bank.
//
//     s_bn = scale <q_b, m_n> - offset       g_bn = d loss / d s_bn
//     NCE:      loss_b = sum_n softplus(s_bn)               g = sigmoid(s)
//     InfoNCE:  loss_b = log(exp s+_b + sum_n exp s_bn) - s+_b    g = exp(s - normaliser)
//     d q_b = scale sum_n g_bn m_n           d m_n = scale sum_b g_bn q_b
//
// Each query's own negatives are dot products: a warp (a block, for wide rows) goes through a part
// of one query's entries and keeps the row in registers for the gradient; rows too wide for that
// are read twice. Shared negatives are matrix products on tiles. InfoNCE goes over the negatives
// once with a running maximum: what was summed is scaled down when a larger logit comes; the
// gradient of the bank takes a second pass. It is added to atomically where each query has its own
// negatives, or, to be the same from run to run, summed up over the entries sorted by row.
#pragma once

#include "dot_tile.cuh"
#include "instance_params.h"
#include "reduce.cuh"

namespace crrcd::cuda {
namespace {

constexpr const char* kOutside =
    "crrcd_ext.instance_nce: index: expected rows of the bank in [0, N)";

// softplus(s) and its derivative.
template <typename T>
__device__ __forceinline__ T softplus(T s, T& derivative) {
  const T e = exp(s > 0 ? -s : s);
  const T r = T(1) / (T(1) + e);
  derivative = s > 0 ? r : e * r;
  return (s > 0 ? s : T(0)) + log1p(e);
}

// The derivative of the loss by a negative's logit s, or, of InfoNCE's first pass, what the logit
// adds to the sum that divides it. reference: what an InfoNCE logit is compared with.
template <Pass kPass, typename T>
__device__ __forceinline__ T slope_of(T s, T reference, T& loss) {
  if constexpr (kPass != Pass::kNce) return exp(s - reference);
  T g;
  loss = softplus(s, g);
  return g;
}

template <typename T>
__device__ __forceinline__ T weight_of(const InstanceParams<T>& p, int64_t b) {
  return p.weights ? p.weights[b] : T(1);
}

// What a sum up to `before` is to be multiplied with when the maximum becomes `top`.
template <typename T>
__device__ __forceinline__ T rescaling(T before, T top) {
  return before == top ? T(1) : exp(before - top);
}

// ---------------------------------------------------------------------- each query's own negatives

// x[i] = sums over the threads that share an entry: a warp or the block.
template <int kGroup, int kCount, typename T>
__device__ __forceinline__ void group_sum(T (&x)[kCount]) {
  if constexpr (kGroup == kWarp) {
    for (int i = 0; i < kCount; ++i) x[i] = warp_sum(x[i]);
  } else {
    __shared__ T shared[kCount * kGroup / kWarp];
    block_sum<kGroup>(x, shared);
  }
}

// The row of entry k of a query.
template <typename T>
__device__ __forceinline__ int64_t own_row_of(const InstanceParams<T>& p, int64_t b, int64_t k) {
  return checked_row(p.own[b * p.own_stride + k * p.own_step], p.N, kOutside);
}

// What one part of a query's entries comes to; top: their largest logit (InfoNCE).
template <Pass kPass, typename T>
__device__ __forceinline__ void store_part(const InstanceParams<T>& p, int64_t b, int64_t part,
                                           T top, double loss, double slope, double g) {
  if constexpr (kPass == Pass::kNce) {
    double* out = p.scalars + 3 * (b * p.parts + part);
    const T weight = weight_of(p, b);
    out[0] = weight * loss, out[1] = weight * slope, out[2] = -weight * g;
  } else {
    p.running_max[part * p.B + b] = top;
    p.running_sum[part * p.B + b] = g;
    p.running_slope[part * p.B + b] = slope;
  }
}

// Of one query's entries: in T for some of them, then in double, or in a longer sum.
template <typename T, int kColumns>
struct OwnSums {
  T loss = 0, slope = 0, g = 0, row[kColumns] = {};
  double total_loss = 0, total_slope = 0, total_g = 0;
  T total_row[kColumns] = {};

  __device__ __forceinline__ void flush() {
    total_loss += loss, total_slope += slope, total_g += g;
    loss = slope = g = 0;
    for (int c = 0; c < kColumns; ++c) {
      total_row[c] += row[c];
      row[c] = 0;
    }
  }

  __device__ __forceinline__ void rescale(T factor) {
    slope *= factor, g *= factor;
    total_slope *= factor, total_g *= factor;
    for (int c = 0; c < kColumns; ++c) {
      row[c] *= factor;
      total_row[c] *= factor;
    }
  }
};

// kGroup threads go through entries [K part / parts, K (part + 1) / parts) of one query; each has
// kColumns columns of the rows, four neighbouring ones at a time.
template <typename T, typename S, int kGroup, int kColumns, Pass kPass>
__global__ void __launch_bounds__(kGroup == kWarp ? 128 : kGroup, 1)
    own_entries(InstanceParams<T> p) {
  // as many rows at a time as registers hold
  constexpr int kRows = sizeof(T) == 4 ? 4 : kColumns > 4 ? 1 : 2, kQuads = kColumns / 4;
  const int thread = threadIdx.x % kGroup, lane = threadIdx.x % kWarp;
  const int64_t group = int64_t(blockIdx.x) * (blockDim.x / kGroup) + threadIdx.x / kGroup;
  if (group >= p.B * p.parts) return;
  const int64_t b = group / p.parts, part = group % p.parts;
  const int64_t begin = p.K * part / p.parts, end = p.K * (part + 1) / p.parts;
  const T scale = static_cast<T>(*p.scale), offset = static_cast<T>(*p.offset);
  const T slope = scale * static_cast<T>(p.factor) * weight_of(p, b);

  T q[kQuads][4];
  for (int i = 0; i < kQuads; ++i)
    load_quad(p.query + b * p.D, int64_t(i * kGroup + thread) * 4, p.D, false, q[i]);
  OwnSums<T, kColumns> sums;
  T top = -INFINITY;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int count = end - first < kWarp ? static_cast<int>(end - first) : kWarp;
    int64_t own_row = 0;
    bool keep = false;
    if (lane < count) {
      own_row = own_row_of(p, b, first + lane);
      keep = is_negative(p, b, own_row, first + lane);
    }
    const unsigned kept = __ballot_sync(0xffffffffu, keep);
    for (int at = 0; at < count; at += kRows) {
      T m[kRows][kQuads][4], z[kRows] = {}, weight[kRows];
      int64_t row[kRows];
      for (int r = 0; r < kRows; ++r) {
        row[r] = __shfl_sync(0xffffffffu, own_row, at + r);
        // what is no negative, or lies beyond the last entry, is a row of zeros
        const int64_t width = kept >> (at + r) & 1 ? p.D : 0;
        for (int i = 0; i < kQuads; ++i)
          load_quad(bank_row<S>(p.bank, row[r]), int64_t(i * kGroup + thread) * 4, width,
                    p.whole_quads, m[r][i]);
      }
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kQuads; ++i)
          for (int j = 0; j < 4; ++j) z[r] += q[i][j] * m[r][i][j];
      group_sum<kGroup>(z);
      if constexpr (kPass == Pass::kLogSumExp) {
        T above = top;
        for (int r = 0; r < kRows; ++r) {
          const T s = z[r] * scale - offset;
          if ((kept >> (at + r) & 1) && s > above) above = s;
        }
        if (above > top) sums.rescale(rescaling(top, above));
        top = above;
      }
      for (int r = 0; r < kRows; ++r) {
        const T s = z[r] * scale - offset;
        T g = 0, loss = 0;
        if (kept >> (at + r) & 1) {
          g = slope_of<kPass>(s, kPass == Pass::kSoftmax ? p.log_normalizer[b] : top, loss);
          sums.slope += g * z[r];
        }
        sums.loss += loss;
        sums.g += g;
        weight[r] = kPass == Pass::kLogSumExp ? g : g * slope;
      }
      if (p.need_query && kPass != Pass::kSoftmax)
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < kQuads; ++i)
            for (int j = 0; j < 4; ++j) sums.row[i * 4 + j] += weight[r] * m[r][i][j];
      if (p.weight && kPass != Pass::kLogSumExp) {
        for (int r = 0; r < kRows && at + r < count; ++r)
          if (thread == 0) p.weight[b * p.K + first + at + r] = weight[r];
      } else if (p.d_bank && kPass != Pass::kLogSumExp) {
        for (int r = 0; r < kRows && at + r < count; ++r)
          for (int i = 0; i < kQuads; ++i)
            for (int j = 0; j < 4; ++j) {
              const int64_t d = int64_t(i * kGroup + thread) * 4 + j;
              if (d < p.D) atomicAdd(p.d_bank + row[r] * p.D + d, weight[r] * q[i][j]);
            }
      }
    }
    sums.flush();
  }
  if constexpr (kPass == Pass::kSoftmax) return;
  if (p.need_query)
    for (int i = 0; i < kQuads; ++i)
      for (int j = 0; j < 4; ++j) {
        const int64_t d = int64_t(i * kGroup + thread) * 4 + j;
        if (d < p.D) p.d_query_parts[(part * p.B + b) * p.D + d] = sums.total_row[i * 4 + j];
      }
  if (thread == 0)
    store_part<kPass>(p, b, part, top, sums.total_loss, sums.total_slope, sums.total_g);
}

constexpr int kWideThreads = 256;

// The same for rows that registers do not hold: the logits of a warp's entries, then the gradients,
// for which the rows are read again. A block for a part of one query's entries; its first warp has
// an entry a lane.
template <typename T, typename S, Pass kPass>
__global__ void __launch_bounds__(kWideThreads, 1) own_wide_entries(InstanceParams<T> p) {
  constexpr int kRows = 4;
  __shared__ int64_t row[kWarp];
  __shared__ T product[kWarp], weight[kWarp], factor;
  __shared__ bool kept[kWarp];
  const int64_t b = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  const int64_t begin = p.K * part / p.parts, end = p.K * (part + 1) / p.parts;
  const T scale = static_cast<T>(*p.scale), offset = static_cast<T>(*p.offset);
  const T slope = scale * static_cast<T>(p.factor) * weight_of(p, b);
  const T* query = p.query + b * p.D;
  const bool to_query = p.need_query && kPass != Pass::kSoftmax;
  const bool to_bank = p.d_bank && kPass != Pass::kLogSumExp;
  const int lane = threadIdx.x;  // of the first warp
  const auto bank_quad = [&](int entry, int64_t d, int64_t width, T(&x)[4]) {
    load_quad(bank_row<S>(p.bank, row[entry]), d, width, p.whole_quads, x);
  };

  double loss = 0, along = 0, total = 0;
  T top = -INFINITY;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int count = end - first < kWarp ? static_cast<int>(end - first) : kWarp;
    if (lane < kWarp) row[lane] = lane < count ? own_row_of(p, b, first + lane) : 0;
    __syncthreads();
    for (int at = 0; at < count; at += kRows) {
      T z[kRows] = {};
      for (int64_t d = threadIdx.x * 4; d < p.D; d += kWideThreads * 4) {
        T q[4], m[4];
        load_quad(query, d, p.D, false, q);
        for (int r = 0; r < kRows; ++r) {
          // what lies beyond the last entry is a row of zeros
          bank_quad(at + r, d, at + r < count ? p.D : 0, m);
          for (int j = 0; j < 4; ++j) z[r] += q[j] * m[j];
        }
      }
      group_sum<kWideThreads>(z);
      for (int r = 0; r < kRows; ++r)
        if (lane == 0) product[at + r] = z[r];
    }
    __syncthreads();

    if (lane < kWarp) {
      const bool keep = lane < count && is_negative(p, b, row[lane], first + lane);
      const T z = keep ? product[lane] : T(0), s = z * scale - offset;
      const T before = top;
      if constexpr (kPass == Pass::kLogSumExp) top = warp_max(keep && s > before ? s : before);
      T of_entry = 0, g = 0;
      if (keep)
        g = slope_of<kPass>(s, kPass == Pass::kSoftmax ? p.log_normalizer[b] : top, of_entry);
      const T down = rescaling(before, top);
      loss += warp_sum(of_entry);
      along = along * down + warp_sum(g * z);
      total = total * down + warp_sum(g);
      if (lane == 0) factor = down;
      kept[lane] = keep;
      if (lane < count) {
        weight[lane] = kPass == Pass::kLogSumExp ? g : g * slope;
        if (to_bank && p.weight) p.weight[b * p.K + first + lane] = weight[lane];
      }
    }
    __syncthreads();

    for (int64_t d = threadIdx.x * 4; d < p.D; d += kWideThreads * 4) {
      if (to_query) {
        T sum[4] = {}, m[4];
        for (int i = 0; i < count; ++i) {
          bank_quad(i, d, kept[i] ? p.D : 0, m);  // 0 times what it holds might be NaN
          for (int j = 0; j < 4; ++j) sum[j] += weight[i] * m[j];
        }
        T* out = p.d_query_parts + (part * p.B + b) * p.D + d;
        for (int j = 0; j < 4; ++j)
          if (d + j < p.D) out[j] = first == begin ? sum[j] : out[j] * factor + sum[j];
      }
      if (to_bank && !p.weight)
        for (int i = 0; i < count; ++i)
          for (int j = 0; j < 4 && d + j < p.D; ++j)
            atomicAdd(p.d_bank + row[i] * p.D + d + j, weight[i] * query[d + j]);
    }
    __syncthreads();
  }
  if (kPass != Pass::kSoftmax && lane == 0) store_part<kPass>(p, b, part, top, loss, along, total);
}

// The gradient of the bank in one order: a warp for each row, over its entries.
template <typename T>
__global__ void __launch_bounds__(128, 1) sum_sorted(InstanceParams<T> p) {
  constexpr int kColumns = 4;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= p.N) return;
  const int64_t entries = p.B * p.K;
  int64_t begin = 0;
  for (int64_t end = entries; begin < end;) {
    const int64_t middle = begin + (end - begin) / 2;
    if (p.sorted_row[middle] < row)
      begin = middle + 1;
    else
      end = middle;
  }
  for (int64_t d = lane; d - lane < p.D; d += kColumns * kWarp) {
    T total[kColumns] = {};
    int count = kWarp;
    for (int64_t first = begin; count == kWarp; first += kWarp) {
      const bool mine = first + lane < entries && p.sorted_row[first + lane] == row;
      const int64_t entry = mine ? p.sorted_entry[first + lane] : 0;
      const T own_weight = mine ? p.weight[entry] : T(0);
      const int64_t own_query = entry / p.K;
      count = __popc(__ballot_sync(0xffffffffu, mine));
      T sum[kColumns] = {};
      for (int i = 0; i < count; ++i) {
        const T weight = __shfl_sync(0xffffffffu, own_weight, i);
        const T* query = p.query + __shfl_sync(0xffffffffu, own_query, i) * p.D;
        for (int c = 0; c < kColumns; ++c)
          if (d + c * kWarp < p.D) sum[c] += weight * query[d + c * kWarp];
      }
      for (int c = 0; c < kColumns; ++c) total[c] += sum[c];
    }
    for (int c = 0; c < kColumns; ++c)
      if (d + c * kWarp < p.D) p.d_bank[row * p.D + d + c * kWarp] = total[c];
  }
}

// ---------------------------------------------------------------------------------- shared
// negatives

static_assert(kTile == kInstanceTile);

template <typename T>
struct TileMemory {
  T operand[kTile * kLead];
  T weight[kTile * kLead];  // [key, query]
  T down[kTile];            // rescaling of what was summed before (InfoNCE)
  double sums[3 * kTileThreads / kWarp];
};

template <typename T, typename S, Pass kPass>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 4 ? 2 : 1)
    shared_tiles(InstanceParams<T> p) {
  CRRCD_DYNAMIC_SHARED(bytes);
  auto& s = *reinterpret_cast<TileMemory<T>*>(bytes);
  const int64_t part = blockIdx.x, tiles = (p.K + kTile - 1) / kTile;
  const int column = tile_column(), line = tile_line();
  const T scale = static_cast<T>(*p.scale), offset = static_cast<T>(*p.offset);
  const T unit = scale * static_cast<T>(p.factor);
  const auto key_row = [&](int64_t k) {
    const int64_t row = p.bank.index ? checked_row(p.bank.index[k], p.N, kOutside) : k;
    return bank_row<S>(p.bank, row);
  };
  const auto query_row = [&](int64_t b) { return p.query + b * p.D; };
  double total[3] = {};  // loss, slope, g

  const int64_t begin = tiles * part / p.parts;
  for (int64_t tile = begin; tile < tiles * (part + 1) / p.parts; ++tile)
    for (int64_t b0 = 0; b0 < p.B; b0 += kTile) {
      const int64_t k0 = tile * kTile;
      T z[4][4] = {};  // [query, key]
      add_products(b0, p.B, query_row, k0, p.K, key_row, p.D, s.operand, z);

      T sums[3] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // unrolled, so that z stays in registers
        const int64_t b = b0 + line + i;
        const T weight = b < p.B ? weight_of(p, b) : T(0), slope = unit * weight;
        bool keep[4];
        T logit[4];
        for (int j = 0; j < 4; ++j) {
          const int64_t k = k0 + column + j;
          keep[j] = b < p.B && k < p.K;
          if (keep[j]) keep[j] = is_negative(p, b, p.bank.index ? p.bank.index[k] : k, k);
          logit[j] = z[i][j] * scale - offset;
        }
        T reference = 0;  // what an InfoNCE logit is compared with
        if constexpr (kPass == Pass::kLogSumExp) {
          const int64_t at = part * p.B + b;
          // one lane keeps what the sixteen of a query share
          const bool keeper = column == 0 && b < p.B;
          T before = keeper && tile > begin ? p.running_max[at] : T(-INFINITY);
          before = __shfl_sync(0xffffffffu, before, threadIdx.x & 16);
          T top = before;
          for (int j = 0; j < 4; ++j)
            if (keep[j] && logit[j] > top) top = logit[j];
          reference = warp_max<16>(top);
          const T down = rescaling(before, reference);
          T e = 0, along = 0;
          for (int j = 0; j < 4; ++j)
            if (keep[j]) {
              const T power = exp(logit[j] - reference);
              e += power;
              along += power * z[i][j];
            }
          e = warp_sum<16>(e);
          along = warp_sum<16>(along);
          if (column == 0) s.down[line + i] = down;
          if (keeper) {
            const bool fresh = tile == begin;
            p.running_max[at] = reference;
            p.running_sum[at] = e + (fresh ? 0 : p.running_sum[at] * down);
            p.running_slope[at] = along + (fresh ? 0 : p.running_slope[at] * down);
          }
        }
        if constexpr (kPass == Pass::kSoftmax) reference = b < p.B ? p.log_normalizer[b] : T(0);
        T of_query[3] = {};
        for (int j = 0; j < 4; ++j) {
          T g = 0;
          if (keep[j]) {
            if constexpr (kPass == Pass::kNce) {
              of_query[0] += softplus(logit[j], g);
              of_query[1] += g * z[i][j];
              of_query[2] += g;
            } else {
              g = exp(logit[j] - reference);
            }
          }
          s.weight[(column + j) * kLead + line + i] = kPass == Pass::kLogSumExp ? g : g * slope;
        }
        for (int j = 0; j < 3; ++j) sums[j] += weight * of_query[j];
        if (kPass == Pass::kNce && p.part_losses) {
          const T loss = weight * warp_sum<16>(of_query[0]);
          double* out = p.part_losses + part * p.B + b;
          if (column == 0 && b < p.B) *out = loss + (tile == begin ? 0 : *out);
        }
      }
      for (int i = 0; i < 3; ++i) total[i] += sums[i];
      __syncthreads();

      if (p.need_query && kPass != Pass::kSoftmax)
        for (int64_t d = 0; d < p.D; d += kTile) {
          load_tile<kTile, false>(k0, p.K, d, p.D, key_row, s.operand);
          __syncthreads();
          T sum[4][4] = {};  // [query, column]
          for (int n = 0; n < kTile; ++n) {
            T x[4], y[4];
            load_four(s.weight + n * kLead + line, x);
            load_four(s.operand + n * kLead + column, y);
            add_outer(x, y, sum);
          }
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) {
              const int64_t b = b0 + line + i, c = d + column + j;
              if (b >= p.B || c >= p.D) continue;
              T* out = p.d_query_parts + (part * p.B + b) * p.D + c;
              const T down = kPass == Pass::kLogSumExp ? s.down[line + i] : T(1);
              *out = tile == begin ? sum[i][j] : *out * down + sum[i][j];
            }
          __syncthreads();
        }
      if (p.d_rows && kPass != Pass::kLogSumExp)
        for (int64_t d = 0; d < p.D; d += kTile) {
          load_tile<kTile, false>(b0, p.B, d, p.D, query_row, s.operand);
          __syncthreads();
          T sum[4][4] = {};  // [key, column]
          for (int n = 0; n < kTile; ++n) {
            T x[4], y[4];
            for (int i = 0; i < 4; ++i) x[i] = s.weight[(line + i) * kLead + n];
            load_four(s.operand + n * kLead + column, y);
            add_outer(x, y, sum);
          }
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) {
              const int64_t k = k0 + line + i, c = d + column + j;
              if (k >= p.K || c >= p.D) continue;
              T* out = p.d_rows + k * p.D + c;
              *out = b0 == 0 ? sum[i][j] : *out + sum[i][j];
            }
          __syncthreads();
        }
    }
  if constexpr (kPass != Pass::kNce) return;
  block_sum<kTileThreads>(total, s.sums);
  if (threadIdx.x != 0) return;
  double* out = p.scalars + 3 * part;
  out[0] = total[0], out[1] = total[1], out[2] = -total[2];
}

// ------------------------------------------------------------------------------------------- the
// end

// A warp for each query: its positive, its loss, and the parts' sums put together. The positive's
// part of a gradient goes last: it is the large term of a sum of many small ones.
template <typename T>
__global__ void __launch_bounds__(128) finish_queries(InstanceParams<T> p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t b = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (b >= p.B) return;
  const double scale = *p.scale, offset = *p.offset;
  const T* query = p.query + b * p.D;
  const T* positive = p.positive + b * p.D;
  T along = 0;
  for (int64_t d = lane; d < p.D; d += kWarp) along += query[d] * positive[d];
  const double z = warp_sum(along), s = z * scale - offset;

  const bool negatives = p.K > 0;
  double loss = 0, d_logit = 0, d_scale = 0, d_offset = 0, normalizer = s;
  if (p.infonce) {
    double top = s, total = 0;
    for (int64_t i = 0; negatives && i < p.parts; ++i) {
      const double most = p.running_max[i * p.B + b];
      top = most > top ? most : top;
    }
    for (int64_t i = 0; negatives && i < p.parts; ++i)
      if (p.running_sum[i * p.B + b] != 0)
        total += p.running_sum[i * p.B + b] * exp(p.running_max[i * p.B + b] - top);
    normalizer = top + log(total + exp(s - top));
    loss = normalizer - s;
    d_logit = exp(s - normalizer) - 1;
    for (int64_t i = 0; negatives && i < p.parts; ++i) {
      if (p.running_sum[i * p.B + b] == 0) continue;
      const double share = exp(p.running_max[i * p.B + b] - normalizer);
      d_scale += p.running_slope[i * p.B + b] * share;
      d_offset -= p.running_sum[i * p.B + b] * share;
    }
  } else {
    loss = softplus(-s, d_logit);
    d_logit = -d_logit;
  }
  const double weight = weight_of(p, b), unit = scale * p.factor * weight, pull = d_logit * unit;
  for (int64_t d = lane; d < p.D; d += kWarp) {
    if (p.need_query) {
      T sum = 0;
      for (int64_t i = 0; negatives && i < p.parts; ++i) {
        const T of_part = p.d_query_parts[(i * p.B + b) * p.D + d];
        if (!p.infonce)
          sum += of_part;
        else if (p.running_sum[i * p.B + b] != 0)
          sum += of_part * static_cast<T>(exp(p.running_max[i * p.B + b] - normalizer) * unit);
      }
      p.d_query[b * p.D + d] = sum + static_cast<T>(pull) * positive[d];
    }
    if (p.d_positive) p.d_positive[b * p.D + d] = static_cast<T>(pull) * query[d];
  }
  if (lane != 0) return;
  double* out = p.per_query + 3 * b;
  out[0] = weight * loss, out[1] = weight * (d_scale + d_logit * z);
  out[2] = weight * (d_offset - d_logit);
  if (p.losses) {
    double all = out[0];
    if (!p.infonce && negatives)
      for (int64_t i = 0; i < p.parts; ++i)
        all += p.own ? p.scalars[3 * (b * p.parts + i)] : p.part_losses[i * p.B + b];
    p.losses[b] = p.factor * all;
  }
  if (p.log_normalizer) p.log_normalizer[b] = static_cast<T>(normalizer);
}

// One block: the sums over all queries.
template <typename T>
__global__ void __launch_bounds__(256) finish_scalars(InstanceParams<T> p) {
  __shared__ double shared[3 * 256 / kWarp];
  double sum[3] = {};
  for (int64_t i = threadIdx.x; i < p.scalar_rows; i += 256)
    for (int j = 0; j < 3; ++j) sum[j] += p.scalars[3 * i + j];
  for (int64_t i = threadIdx.x; i < p.B; i += 256)
    for (int j = 0; j < 3; ++j) sum[j] += p.per_query[3 * i + j];
  block_sum<256>(sum, shared);
  if (threadIdx.x != 0) return;
  for (int j = 0; j < 3; ++j) p.result[j] = p.factor * sum[j];
}

// ---------------------------------------------------------------------------------------- launches

template <typename T, typename S, Pass kPass>
void launch_pass(const InstanceParams<T>& p, void* stream) {
  if (p.K == 0) return;
  if (!p.own) {
    gpu::launch("shared_tiles", shared_tiles<T, S, kPass>, dim3(p.parts), dim3(kTileThreads),
                sizeof(TileMemory<T>), stream, p);
    return;
  }
  const auto groups = p.B * p.parts;
  const dim3 warps((groups + 3) / 4);
  if (p.D <= kWarp * 4)
    gpu::launch("own_entries", own_entries<T, S, kWarp, 4, kPass>, warps, dim3(128), 0, stream, p);
  else if (p.D <= kWarp * kInstanceColumns)
    gpu::launch("own_entries", own_entries<T, S, kWarp, kInstanceColumns, kPass>, warps, dim3(128),
                0, stream, p);
  else if (p.D <= kInstanceWidest)
    gpu::launch("own_entries", own_entries<T, S, 256, kInstanceColumns, kPass>, dim3(groups),
                dim3(256), 0, stream, p);
  else
    gpu::launch("own_wide_entries", own_wide_entries<T, S, kPass>, dim3(groups), dim3(kWideThreads),
                0, stream, p);
}

template <typename T, typename S>
void launch_all(const InstanceParams<T>& p, void* stream) {
  const dim3 queries((p.B + 3) / 4);
  if (p.infonce)
    launch_pass<T, S, Pass::kLogSumExp>(p, stream);
  else
    launch_pass<T, S, Pass::kNce>(p, stream);
  gpu::launch("finish_queries", finish_queries<T>, queries, dim3(128), 0, stream, p);
  if (p.infonce && (p.d_bank || p.d_rows)) launch_pass<T, S, Pass::kSoftmax>(p, stream);
  if (p.weight)
    gpu::launch("sum_sorted", sum_sorted<T>, dim3((p.N + 3) / 4), dim3(128), 0, stream, p);
  if (!p.losses) gpu::launch("finish_scalars", finish_scalars<T>, dim3(1), dim3(256), 0, stream, p);
}

template <typename T>
void launch_storage(const InstanceParams<T>& p, void* stream) {
  switch (p.bank.storage) {
    case Storage::kFloat64:
      return launch_all<T, double>(p, stream);
    case Storage::kFloat32:
      return launch_all<T, float>(p, stream);
    case Storage::kBFloat16:
      return launch_all<T, __nv_bfloat16>(p, stream);
    case Storage::kFloat16:
      return launch_all<T, __half>(p, stream);
  }
}

}  // namespace
}  // namespace crrcd::cuda
