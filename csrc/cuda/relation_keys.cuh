// relation_nce, pass over all (key tile, anchor): gradients of keys and anchors.
//
//     d hid_an = sum_b scale g r QW_ab + c_an (G hid_an + W'c)        G = W'W
//     d P_a = sum_n [hid > 0] d hid        d X_n = -sum_a [hid > 0] d hid
//
// Norms and c come from the pass before, or, where a block has all columns and all queries, are
// made here and r is left to that pass, which then comes after: |w|^2 = <hid, G hid + 2 W'c> +
// |c|^2 has G hid already. It is taken from W where that sum cancels. Logits are made in both
// passes. A block has a range of key tiles and a range of columns, and goes through the anchors
// with each tile: what belongs to a key is summed in registers.
#pragma once

#include "relation_logits.cuh"

namespace crrcd::cuda {
namespace {

// square = |W hid + bias|^2 of those of the warp's 16 keys for which it is asked, W from global
// memory.
template <Precision kPrecision, typename S, typename T, typename Params>
__device__ __forceinline__ void square_by_weight(T (&square)[2], const bool (&asked)[2],
                                                 const S* hidden, int ld, const Params& p) {
  constexpr int kStep = sizeof(S) == 2 ? 16 : 8, kNext = kStep / 2;
  const int lane = gpu::lane_id(), g = lane / 4, t = lane % 4;
  hidden += lane_in_a<false, S>(ld);
  T sum[2] = {};
#pragma unroll 1
  for (int row = 0; row < p.Rp; row += 8) {
    const S* const weight =
        static_cast<const S*>(p.weight) + int64_t(row + g) * p.Hp + (sizeof(S) == 2 ? 2 : 1) * t;
    T w[4] = {};
    for (int k = 0; k < p.Hp; k += kStep) {
      std::uint32_t x[4];
      load_a<false>(x, hidden + k, ld);
      const std::uint32_t y[2] = {*reinterpret_cast<const std::uint32_t*>(weight + k),
                                  *reinterpret_cast<const std::uint32_t*>(weight + k + kNext)};
      if constexpr (sizeof(S) == 2)
        gpu::mma_m16n8k16(w, x, y, S());
      else
        gpu::mma_tf32(w, x, y);
    }
    for (int i = 0; i < 4; ++i) {
      if (p.bias) w[i] += p.bias[row + 2 * t + i % 2];
      sum[i / 2] += w[i] * w[i];
    }
  }
  for (int half = 0; half < 2; ++half) {
    sum[half] = warp_sum<4>(sum[half]);
    if (asked[half]) square[half] = sum[half];
  }
}

template <Precision kPrecision, Pass kPass, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1)
    relation_keys(RelationNceParams<SumOf<kPrecision>> p) {
  using S = StoredOf<kPrecision>;
  using T = SumOf<kPrecision>;
  constexpr int kQueries = panel_rows(kPrecision), kTiles = kQueries / 8;
  constexpr int kColumns = piece_columns(kPrecision), kParts = kColumns / kQueries;
  // before the pass over all (anchor, key); only where blocks have all columns and all queries
  const bool first = kWarps > 1 && p.keys_first;
  CRRCD_DYNAMIC_SHARED(memory);
  const KeyLayout& layout = p.key_layout;
  constexpr int ld_slopes = kPanelLead<kPrecision>, ld_piece = kPieceLead<kPrecision>;
  const int ld = layout.ld_hidden();
  const int keys = kKeysOfWarp * kWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  S* const x_tile = reinterpret_cast<S*>(memory + layout.keys_at());
  S* const hidden = reinterpret_cast<S*>(memory + layout.hidden_at()) + warp * kKeysOfWarp * ld;
  S* const slopes =
      reinterpret_cast<S*>(memory + layout.slopes_at()) + warp * kKeysOfWarp * ld_slopes;
  S* const pieces = reinterpret_cast<S*>(memory + layout.pieces_at());
  T* const sums = reinterpret_cast<T*>(memory + layout.sums_at());  // [warps, columns]
  // Products below go through one loop for all numbers of tiles: two, as in multiply, take more
  // registers than there are.

  // block = (column range * anchor parts + anchor part) * key blocks + key block
  int64_t block = blockIdx.x;
  const int64_t key_block = block % p.key_blocks;
  block /= p.key_blocks;
  const int64_t part = block % p.anchor_parts;
  const int own_piece = static_cast<int>(block / p.anchor_parts);
  const int first_column = own_piece * kColumns;
  const int rest = p.Hp - first_column;
  const int columns = rest < kColumns ? rest : kColumns;
  const int64_t tiles = (p.keys + keys - 1) / keys;
  const int64_t begin = tiles * key_block / p.key_blocks;
  const int64_t end = tiles * (key_block + 1) / p.key_blocks;
  const int64_t first_anchor = p.A * part / p.anchor_parts;
  const int64_t last_anchor = p.A * (part + 1) / p.anchor_parts;
  const T scale = *p.scale, to_log2 = scale * T(1.4426950408889634);

  // Rows of G for the columns of this block, then for each panel of queries QW and, of it, the
  // columns of this block once more.
  const int a_panel = layout.pieces_a_panel(), gram_pieces = layout.gram_pieces();
  const int panels = static_cast<int>(p.query_panels());
  const int count = gram_pieces + panels * (a_panel + 1);
  const auto width_of = [&](int k) {
    const int left = p.Hp - k * kColumns;
    return left < kColumns ? left : kColumns;
  };
  const auto place = [&](int i, int64_t a, int& k) {  // where piece i begins, but for its column k
    if (i < gram_pieces) {
      k = i % a_panel;
      return static_cast<const S*>(p.gram) + int64_t(first_column + i / a_panel * kQueries) * p.Hp;
    }
    const int rows = (i - gram_pieces) / (a_panel + 1);
    k = (i - gram_pieces) % (a_panel + 1);
    if (k == a_panel) k = own_piece;
    return static_cast<const S*>(p.qw) + (a * p.Bp + rows * kQueries) * p.Hp;
  };
  const auto fetch_panel = [&](int set, int64_t a, int panel) {
    for (int k = 0; k < a_panel; ++k)
      fetch_rows(pieces + (gram_pieces + set * a_panel + k) * layout.piece(), ld_piece,
                 static_cast<const S*>(p.qw) + (a * p.Bp + panel * kQueries) * p.Hp + k * kColumns,
                 p.Hp, kQueries, width_of(k));
    gpu::cp_async_commit();
  };
  if (layout.resident && begin < end)  // a block without tiles would leave copies under way
    for (int i = 0; i < gram_pieces; ++i) {
      int k = 0;
      const S* from = place(i, 0, k);
      fetch_rows(pieces + i * layout.piece(), ld_piece, from + k * kColumns, p.Hp, kQueries,
                 width_of(k));
    }
  Pieces<S> stream{pieces, ld_piece, kQueries, layout.buffers};
  int set = 0;  // of QW's pieces, resident

  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t key = tile * keys + warp * kKeysOfWarp + g;
    __syncthreads();
    fetch_rows(x_tile, ld, static_cast<const S*>(p.x) + tile * keys * p.Hp, p.Hp, keys, p.Hp);
    gpu::cp_async_commit();
    if (layout.resident && first_anchor < last_anchor) fetch_panel(set, first_anchor, 0);
    T d_x[kParts][kTiles][4] = {};
    for (int64_t a = first_anchor; a < last_anchor; ++a) {
      const S* const anchor = static_cast<const S*>(p.anchor) + a * p.Hp;
      const auto piece = [&](int i) -> const S* {
        if (!layout.resident)
          return stream.next(
              i, count,
              [&](int n) {
                int k = 0;
                const S* from = place(n, a, k);
                return from + k * kColumns;
              },
              [&](int) { return p.Hp; },
              [&](int n) {
                int k = 0;
                place(n, a, k);
                return width_of(k);
              });
        if (i < gram_pieces) return pieces + i * layout.piece();
        const int k = (i - gram_pieces) % (a_panel + 1);
        return pieces +
               (gram_pieces + set * a_panel + (k == a_panel ? own_piece : k)) * layout.piece();
      };
      // of the panel of queries whose pieces are needed now, and those after it
      const auto turn = [&](int panel) {
        if (!layout.resident) return;
        gpu::cp_async_wait<0>();
        __syncthreads();
        if (panel > 0 || a > first_anchor) set ^= 1;
        if (panel + 1 < panels)
          fetch_panel(set ^ 1, a, panel + 1);
        else if (a + 1 < last_anchor)
          fetch_panel(set ^ 1, a + 1, 0);
      };

      int at = 0;
      if (layout.resident) {
        turn(0);
      } else {
        // hid is made of the tile of keys
        gpu::cp_async_wait<0>();
        __syncthreads();
      }
      make_hidden<kPrecision>(hidden, x_tile + warp * kKeysOfWarp * ld, ld, anchor, p.Hp);
      __syncwarp();
      T d_hidden[kParts][kTiles][4] = {};
#pragma unroll
      for (int i = 0; i < kParts; ++i)
        for (int k = 0; k < a_panel; ++k, ++at) {
          const int left = columns - i * kQueries;
          multiply_tiles<kPrecision, kTiles, false, false, false>(
              d_hidden[i], hidden + k * kColumns, ld, piece(at), ld_piece, width_of(k),
              left <= 0         ? 0
              : left < kQueries ? left / 8
                                : kTiles);
        }
      T inverse[2], c[2] = {};
      if (first) {
        T square[2] = {}, length[2] = {};
#pragma unroll
        for (int i = 0; i < kParts; ++i)
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const int column = i * kQueries + 8 * j + 2 * t;
            if (column >= columns) continue;
            Two<T> shift = {};
            if (p.gram_bias) shift = load_two(p.gram_bias + column);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const Two<S> hid = load_two(hidden + (g + 8 * half) * ld + column);
              for (int n = 0; n < 2; ++n) {
                const T h = widen(hid.x[n]);
                square[half] += (d_hidden[i][j][2 * half + n] + 2 * shift.x[n]) * h;
                length[half] += h * h;
              }
            }
          }
        const T bias_square = p.bias_square ? *p.bias_square : T(0);
        bool cancels[2];
        for (int half = 0; half < 2; ++half) {
          square[half] = warp_sum<4>(square[half]) + bias_square;
          length[half] = warp_sum<4>(length[half]);
          const T least = *p.gram_least * length[half] + T(kCancelled) * bias_square;
          // what is no number, of a W'W that is none, comes from W too
          cancels[half] =
              !(square[half] > least) && !(length[half] == 0 && square[half] == bias_square);
        }
        if (__any_sync(0xffffffffu, cancels[0] || cancels[1]))
          square_by_weight<kPrecision>(square, cancels, hidden, ld, p);
        for (int half = 0; half < 2; ++half) {
          const int64_t n = key + 8 * half;
          inverse[half] = n < p.keys ? inverse_norm<kPrecision>(square[half]) : T(0);
          if (t == 0) p.inverse_norm[a * p.Kp + n] = inverse[half];
        }
      } else {
        for (int half = 0; half < 2; ++half) {
          const int64_t n = key + 8 * half;
          inverse[half] = n < p.keys ? p.inverse_norm[a * p.Kp + n] : T(0);
          for (int panel = 0; panel < panels && n < p.keys; ++panel)
            c[half] += p.c[(panel * p.A + a) * p.Kp + n];
        }
      }
      const auto scale_by_c = [&] {
#pragma unroll
        for (int i = 0; i < kParts; ++i)
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              const int column = first_column + i * kQueries + 8 * j + 2 * t + n % 2;
              T& u = d_hidden[i][j][n];
              if (p.gram_bias && column < p.Hp) u += p.gram_bias[column];
              u *= c[n / 2];
            }
      };
      if (!first) scale_by_c();

      for (int panel = 0; panel < panels; ++panel) {
        if (panel > 0) turn(panel);
        const int64_t left = p.B - int64_t(panel) * kQueries;
        const int query_tiles = left < kQueries ? (static_cast<int>(left) + 15) / 16 * 2 : kTiles;
        T z[kTiles][4] = {};
        for (int k = 0; k < a_panel; ++k, ++at)
          multiply_tiles<kPrecision, kTiles, false, false, false>(
              z, hidden + k * kColumns, ld, piece(at), ld_piece, width_of(k), query_tiles);
        const int64_t pair = a * p.Bp + int64_t(panel) * kQueries;
        std::uint64_t keep[2];
        for (int half = 0; half < 2; ++half) {
          const int64_t n = key + 8 * half;
          keep[half] = n < p.keys ? p.keep ? p.keep[panel * p.Kp + n] : ~std::uint64_t(0) : 0;
        }
        __syncwarp();  // what the panel before left in slopes has been read
        T along[2] = {};
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          if (j < query_tiles) {
            const int b = 8 * j + 2 * t;
            T slope[4];
            for (int i = 0; i < 4; ++i) {
              const int half = i / 2;
              const T constant = p.qc ? p.qc[pair + b + i % 2] : T(0);
              const T product = z[j][i] + constant;
              T logit = product * (inverse[half] * to_log2) - p.offset[pair + b + i % 2];
              if (!(keep[half] >> (b + i % 2) & 1)) logit = T(-kLeftOut);
              const T weight = kPass == Pass::kNce
                                   ? reciprocal<kPrecision>(T(1) + exp2_of<kPrecision>(-logit))
                                   : exp2_of<kPrecision>(logit);
              if constexpr (kWarps > 1) along[half] += weight * product;
              slope[i] = weight * (inverse[half] * scale * p.boost);
            }
            for (int half = 0; half < 2; ++half)
              store_two<kPrecision>(slopes + (g + 8 * half) * ld_slopes + b, slope[2 * half],
                                    slope[2 * half + 1]);
          }
        __syncwarp();
        if (first) {
          for (int half = 0; half < 2; ++half)
            c[half] = norm_gradient(warp_sum<4>(along[half]), inverse[half],
                                    inverse[half] * scale * p.boost);
          scale_by_c();
        }
        const S* own = piece(at++);
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          const int width = columns - i * kQueries;
          multiply_tiles<kPrecision, kTiles, false, true, false>(
              d_hidden[i], slopes, ld_slopes, own + i * kQueries, ld_piece, 8 * query_tiles,
              width <= 0         ? 0
              : width < kQueries ? width / 8
                                 : kTiles);
        }
      }

#pragma unroll
      for (int i = 0; i < kParts; ++i)
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int column = i * kQueries + 8 * j + 2 * t;
          if (column >= columns) continue;
          T over_keys[2] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Two<S> hid = load_two(hidden + (g + 8 * half) * ld + first_column + column);
            for (int n = 0; n < 2; ++n) {
              const T value = widen(hid.x[n]) <= 0 ? T(0) : d_hidden[i][j][2 * half + n];
              d_x[i][j][2 * half + n] -= value;
              over_keys[n] += value;
            }
          }
          if (!p.d_anchor) continue;
          for (int c = 0; c < 2; ++c) {
            for (int step = 4; step < kWarp; step *= 2)
              over_keys[c] += __shfl_xor_sync(0xffffffffu, over_keys[c], step);
            if (g == 0) sums[warp * kColumns + column + c] = over_keys[c];
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
    if (p.d_x)
#pragma unroll
      for (int i = 0; i < kParts; ++i)
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int column = i * kQueries + 8 * j + 2 * t + n % 2;
            if (column < columns)
              p.d_x[(part * p.Kp + key + 8 * (n / 2)) * p.Hp + first_column + column] =
                  d_x[i][j][n];
          }
  }
}

template <Precision kPrecision, int kWarps>
void launch_keys(const RelationNceParams<SumOf<kPrecision>>& p, void* stream) {
  const int64_t ranges = p.key_layout.pieces_a_panel();
  const auto start = [&](auto kernel) {
    gpu::launch("relation_keys", kernel,
                dim3(static_cast<unsigned>(ranges * p.anchor_parts * p.key_blocks)),
                dim3(32 * kWarps), static_cast<std::size_t>(p.key_layout.bytes()), stream, p);
  };
  if (p.pass == Pass::kNce)
    start(relation_keys<kPrecision, Pass::kNce, kWarps>);
  else
    start(relation_keys<kPrecision, Pass::kSoftmax, kWarps>);
}

}  // namespace
}  // namespace crrcd::cuda
