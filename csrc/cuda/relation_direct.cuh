// relation_nce at full precision, pass over all (key tile, anchor) for gradients of keys, anchors
// and weight, in the form that stands on paper:
//
//     d w_an = sum_b scale g r Q_ab + c_an w_an        w = W hid + c
//     d hid = d w W        d P_a = sum_n [hid > 0] d hid        d X_n = -sum_a [hid > 0] d hid
//     d W = sum_an d w_an hid_an'                      d c = sum_an d w_an
//
// Norms and c come from the pass before. A block has a range of key tiles and goes through the
// anchors with each of them. It makes either the gradients of a range of columns of keys and
// anchors, or those of some rows and columns of the weight.
#pragma once

#include "relation_logits.cuh"

namespace crrcd::cuda {
namespace {

template <Precision kPrecision, Pass kPass, int kWarps, bool kWeight>
__global__ void __launch_bounds__(32 * kWarps, 1)
    relation_direct(RelationNceParams<SumOf<kPrecision>> p) {
  using S = StoredOf<kPrecision>;
  using T = SumOf<kPrecision>;
  constexpr int kQueries = panel_rows(kPrecision), kTiles = kQueries / 8;
  constexpr int kColumns = piece_columns(kPrecision);
  static_assert(kColumns == kQueries, "a panel is as wide as high");
  constexpr int kRows = DirectLayout::weight_rows(kPrecision, kWarps),
                kBlocks = kRows / 16 / kWarps;
  constexpr int kPieces = DirectLayout::pieces(kWarps);
  CRRCD_DYNAMIC_SHARED(memory);
  const DirectLayout& layout = p.direct_layout;
  const int ld = layout.ld_hidden(), ld_relation = layout.ld_relation();
  constexpr int ld_piece = kPieceLead<kPrecision>;
  const int ld_slopes = layout.ld_queries();
  const int keys = kKeysOfWarp * kWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  S* const hidden_tile = reinterpret_cast<S*>(memory + layout.hidden_at());
  S* const relation_tile = reinterpret_cast<S*>(memory + layout.relation_at());
  S* const hidden = hidden_tile + warp * kKeysOfWarp * ld;
  S* const relation = relation_tile + warp * kKeysOfWarp * ld_relation;  // w, then d w
  S* const slopes =
      reinterpret_cast<S*>(memory + layout.slopes_at()) + warp * kKeysOfWarp * ld_slopes;
  T* const sums = reinterpret_cast<T*>(memory + layout.sums_at());  // [warps, columns]

  const int a_panel = (p.Hp + kColumns - 1) / kColumns, weight_panels = p.Rp / kQueries;
  const int panels = static_cast<int>(p.query_panels());
  // block = (what it makes * anchor parts + anchor part) * key blocks + key block
  int64_t block = blockIdx.x;
  const int64_t key_block = block % p.key_blocks;
  block /= p.key_blocks;
  const int64_t part = block % p.anchor_parts;
  const int own = static_cast<int>(block / p.anchor_parts);
  const int own_row = kWeight ? own % (p.Rp / kRows) * kRows : 0;
  const int own_panel = own_row / kQueries;
  const int own_piece = kWeight ? own / (p.Rp / kRows) * kPieces : own;
  const int first_column = own_piece * kColumns;
  const auto width_of = [&](int k) {
    const int left = p.Hp - k * kColumns;
    return left <= 0 ? 0 : left < kColumns ? left : kColumns;
  };
  const int columns = width_of(own_piece);
  const int64_t tiles = (p.keys + keys - 1) / keys;
  const int64_t begin = tiles * key_block / p.key_blocks;
  const int64_t end = tiles * (key_block + 1) / p.key_blocks;
  const int64_t first_anchor = p.A * part / p.anchor_parts;
  const int64_t last_anchor = p.A * (part + 1) / p.anchor_parts;
  const int64_t slice = part * p.key_blocks + key_block;  // of sums that parts have each
  const T scale = *p.scale, to_log2 = scale * T(1.4426950408889634);

  // W for w; Q for the logits; Q for d w; columns of W for d hid
  const int from_query = weight_panels * a_panel, pairs_of_panels = panels * weight_panels;
  const int from_slopes = from_query + pairs_of_panels;
  const int made_panels = kWeight ? 1 : weight_panels;  // of d w
  const int from_columns = from_slopes + made_panels * panels;
  const int count = from_columns + (kWeight ? 0 : weight_panels);
  const auto width_at = [&](int i) {
    if (i < from_query) return width_of(i % a_panel);
    return i < from_columns ? kColumns : columns;
  };
  const auto stride_at = [&](int i) { return i < from_query || i >= from_columns ? p.Hp : p.Rp; };
  Pieces<S> stream{reinterpret_cast<S*>(memory + layout.pieces_at()), ld_piece, kQueries,
                   layout.buffers};

  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t key = tile * keys + warp * kKeysOfWarp + g;
    T d_x[kTiles][4] = {};
    T d_w[kWeight ? kPieces : 1][kBlocks][kTiles][4] = {};
    for (int64_t a = first_anchor; a < last_anchor; ++a) {
      const auto address = [&](int i) -> const S* {
        const S* const weight = static_cast<const S*>(p.weight);
        if (i < from_query)
          return weight + int64_t(i / a_panel) * kQueries * p.Hp + i % a_panel * kColumns;
        if (i >= from_columns)
          return weight + int64_t(i - from_columns) * kQueries * p.Hp + first_column;
        int panel = (i - from_query) / weight_panels, r = (i - from_query) % weight_panels;
        if (i >= from_slopes)
          panel = (i - from_slopes) % panels, r = own_panel + (i - from_slopes) / panels;
        return static_cast<const S*>(p.qw) + (a * p.Bp + int64_t(panel) * kQueries) * p.Rp +
               r * kColumns;
      };
      int at = 0;
      const auto next = [&] { return stream.next(at++, count, address, stride_at, width_at); };
      __syncthreads();  // nobody uses the anchor before any more
      fetch_rows(hidden_tile, ld, static_cast<const S*>(p.x) + tile * keys * p.Hp, p.Hp, keys,
                 p.Hp);
      gpu::cp_async_commit();
      gpu::cp_async_wait<0>();
      __syncthreads();
      make_hidden<kPrecision>(hidden, hidden, ld, static_cast<const S*>(p.anchor) + a * p.Hp, p.Hp);
      __syncwarp();
      T inverse[2], c[2] = {};
      for (int half = 0; half < 2; ++half) {
        const int64_t n = key + 8 * half;
        inverse[half] = n < p.keys ? p.inverse_norm[a * p.Kp + n] : T(0);
        for (int panel = 0; panel < panels && n < p.keys; ++panel)
          c[half] += p.c[(panel * p.A + a) * p.Kp + n];
      }

      for (int r = 0; r < weight_panels; ++r) {
        T w[kTiles][4] = {};
        if (p.bias)
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
            for (int i = 0; i < 4; ++i) w[j][i] = p.bias[r * kQueries + 8 * j + 2 * t + i % 2];
        for (int k = 0; k < a_panel; ++k)
          multiply<kPrecision, kTiles, false, false>(w, hidden + k * kColumns, ld, next(), ld_piece,
                                                     width_of(k), kTiles);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          for (int half = 0; half < 2; ++half)
            store_two<kPrecision>(
                relation + (g + 8 * half) * ld_relation + r * kQueries + 8 * j + 2 * t,
                w[j][2 * half], w[j][2 * half + 1]);
      }
      __syncwarp();

      for (int panel = 0; panel < panels; ++panel) {
        T z[kTiles][4] = {};
        for (int r = 0; r < weight_panels; ++r)
          multiply<kPrecision, kTiles, false, false>(z, relation + r * kQueries, ld_relation,
                                                     next(), ld_piece, kQueries, kTiles);
        const int64_t pair = a * p.Bp + int64_t(panel) * kQueries;
        std::uint64_t keep[2];
        for (int half = 0; half < 2; ++half) {
          const int64_t n = key + 8 * half;
          keep[half] = n < p.keys ? p.keep ? p.keep[panel * p.Kp + n] : ~std::uint64_t(0) : 0;
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int b = 8 * j + 2 * t;
          T slope[4];
          for (int i = 0; i < 4; ++i) {
            const int half = i / 2;
            T logit = z[j][i] * (inverse[half] * to_log2) - p.offset[pair + b + i % 2];
            if (!(keep[half] >> (b + i % 2) & 1)) logit = T(-kLeftOut);
            const T weight = kPass == Pass::kNce
                                 ? reciprocal<kPrecision>(T(1) + exp2_of<kPrecision>(-logit))
                                 : exp2_of<kPrecision>(logit);
            slope[i] = weight * (inverse[half] * scale);
          }
          for (int half = 0; half < 2; ++half)
            store_two<kPrecision>(slopes + (g + 8 * half) * ld_slopes + panel * kQueries + b,
                                  slope[2 * half], slope[2 * half + 1]);
        }
      }
      __syncwarp();

      for (int made = 0; made < made_panels; ++made) {
        const int r = own_panel + made;
        T d[kTiles][4] = {};
        for (int panel = 0; panel < panels; ++panel)
          multiply<kPrecision, kTiles, false, true>(d, slopes + panel * kQueries, ld_slopes, next(),
                                                    ld_piece, kQueries, kTiles);
        // every cell of w is read and written by the thread that has it in d
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          for (int half = 0; half < 2; ++half) {
            S* const cell = relation + (g + 8 * half) * ld_relation + r * kQueries + 8 * j + 2 * t;
            const T first = d[j][2 * half] + c[half] * cell[0];
            const T second = d[j][2 * half + 1] + c[half] * cell[1];
            store_two<kPrecision>(cell, first, second);
          }
      }
      __syncwarp();

      if constexpr (kWeight) {
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kPieces; ++n)
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            const int row = own_row + 16 * (warp + kWarps * i);
            multiply<kPrecision, kTiles, true, true>(d_w[n][i], relation_tile + row, ld_relation,
                                                     hidden_tile + first_column + n * kColumns, ld,
                                                     keys, width_of(own_piece + n) / 8);
          }
        if (p.d_bias && own_piece == 0)
          for (int r = threadIdx.x; r < kRows; r += 32 * kWarps) {
            T total = 0;
            for (int n = 0; n < keys; ++n) total += relation_tile[n * ld_relation + own_row + r];
            sums[r] = tile == begin && a == first_anchor ? total : sums[r] + total;
          }
        continue;
      }

      T d_hidden[kTiles][4] = {};
      for (int r = 0; r < weight_panels; ++r)
        multiply<kPrecision, kTiles, false, true>(d_hidden, relation + r * kQueries, ld_relation,
                                                  next(), ld_piece, kQueries, columns / 8);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int column = 8 * j + 2 * t;
        T over_keys[2] = {};
        for (int n = 0; n < 4; ++n) {
          T value = d_hidden[j][n];
          if (column >= columns ||
              hidden[(g + 8 * (n / 2)) * ld + first_column + column + n % 2] <= 0)
            value = 0;
          d_x[j][n] -= value;
          over_keys[n % 2] += value;
        }
        if (!p.d_anchor) continue;
        for (int i = 0; i < 2; ++i) {
          for (int step = 4; step < kWarp; step *= 2)
            over_keys[i] += __shfl_xor_sync(0xffffffffu, over_keys[i], step);
          if (g == 0) sums[warp * kColumns + column + i] = over_keys[i];
        }
      }
      if (p.d_anchor) {
        __syncthreads();
        for (int column = threadIdx.x; column < columns; column += 32 * kWarps) {
          T total = 0;
          for (int w = 0; w < kWarps; ++w) total += sums[w * kColumns + column];
          T& out = p.d_anchor[(key_block * p.A + a) * p.Hp + first_column + column];
          out = tile == begin && !p.accumulate ? total : out + total;
        }
      }
    }
    if constexpr (kWeight) {
      // tile by tile, as sums of few round less than one long one
#pragma unroll
      for (int n = 0; n < kPieces; ++n)
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
            for (int k = 0; k < 4; ++k) {
              const int row = own_row + 16 * (warp + kWarps * i) + g + 8 * (k / 2);
              const int column = first_column + n * kColumns + 8 * j + 2 * t + k % 2;
              if (column >= p.Hp) continue;
              T& out = p.d_weight[(slice * p.Rp + row) * p.Hp + column];
              out = tile > begin || p.accumulate ? out + d_w[n][i][j][k] : d_w[n][i][j][k];
            }
    } else if (p.d_x) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        for (int n = 0; n < 4; ++n) {
          const int column = 8 * j + 2 * t + n % 2;
          if (column < columns)
            p.d_x[(part * p.Kp + key + 8 * (n / 2)) * p.Hp + first_column + column] = d_x[j][n];
        }
    }
  }

  if constexpr (kWeight) {
    if (p.d_bias && own_piece == 0)
      for (int r = threadIdx.x; r < kRows; r += 32 * kWarps) {
        T& out = p.d_bias[slice * p.Rp + own_row + r];
        const T sum = begin < end && first_anchor < last_anchor ? sums[r] : T(0);
        out = p.accumulate ? out + sum : sum;
      }
  }
}

template <Precision kPrecision, int kWarps, bool kWeight>
void launch_direct(const RelationNceParams<SumOf<kPrecision>>& p, void* stream) {
  constexpr int kPieces = DirectLayout::pieces(kWarps);
  const int64_t pieces = (p.Hp + piece_columns(kPrecision) - 1) / piece_columns(kPrecision);
  const int64_t made = kWeight ? p.Rp / DirectLayout::weight_rows(kPrecision, kWarps) *
                                     ((pieces + kPieces - 1) / kPieces)
                               : pieces;
  const auto start = [&](auto kernel) {
    gpu::launch("relation_direct", kernel,
                dim3(static_cast<unsigned>(made * p.anchor_parts * p.key_blocks)),
                dim3(32 * kWarps), static_cast<std::size_t>(p.direct_layout.bytes()), stream, p);
  };
  if (p.pass == Pass::kNce)
    start(relation_direct<kPrecision, Pass::kNce, kWarps, kWeight>);
  else
    start(relation_direct<kPrecision, Pass::kSoftmax, kWarps, kWeight>);
}

}  // namespace
}  // namespace crrcd::cuda
