// relation_nce, pass over all (anchor, key): norms, logits, loss and the gradient of the queries.
//
//     hid_an = relu(P_a - X_n)        w = W hid + c        r = 1 / |w|
//     cosine_abn = r (hid . QW_ab + q.c)        s_abn = scale cosine - offset
//     g = d loss / d s        d QW_ab = sum_n scale g r hid_an
//     c_an = -r^2 sum_b scale g cosine
//
// At full precision w . Q_ab takes the place of hid . QW_ab + q.c, and d Q_ab = sum_n scale g r
// w_an that of d QW_ab, since those could cancel.
//
// Where the keys' pass came first (relation_keys.cuh) it has left r, and nothing is made of W.
//
// A block has one anchor and a panel of queries, and goes through a range of key tiles. A warp has
// 16 keys of a tile, so that norms and c are sums along its own rows. hid is made in place of X.
#pragma once

#include "softplus.cuh"
#include "tile.cuh"

namespace crrcd::cuda {
namespace {

template <Precision kPrecision, int kWarps>
constexpr int kLogitColumns = kPrecision == Precision::kF64 ? 32 : 32 * kWarps;

// Width of d QW, or of d Q.
template <Precision kPrecision, typename Params>
__host__ __device__ int gradient_width(const Params& p) {
  return is_direct(kPrecision) ? p.Rp : p.Hp;
}

// Ranges of its columns, each with blocks of its own.
template <Precision kPrecision, Pass kPass, int kWarps, typename Params>
__host__ __device__ int64_t column_ranges(const Params& p) {
  constexpr int kColumns = kLogitColumns<kPrecision, kWarps>;
  return kPass != Pass::kLogSumExp && p.need_query
             ? (gradient_width<kPrecision>(p) + kColumns - 1) / kColumns
             : 1;
}

// c_an from sum_b g <w, Q_ab>.
template <typename T>
__device__ __forceinline__ T norm_gradient(T along, T inverse, T to_slope) {
  return -along * to_slope * (inverse * inverse);
}

constexpr unsigned kTilesBetweenFlushes = 16;  // two short sums round less than one long one
constexpr unsigned kTilesOfProduct = 2;  // whose 64 factors of a thread, at most 2, do not overflow

template <Precision kPrecision, Pass kPass, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps == 4 ? 2 : 1)
    relation_logits(RelationNceParams<SumOf<kPrecision>> p) {
  using S = StoredOf<kPrecision>;
  using T = SumOf<kPrecision>;
  constexpr int kQueries = panel_rows(kPrecision), kTiles = kQueries / 8;
  constexpr int kColumns = kLogitColumns<kPrecision, kWarps>;  // of d QW that a block makes
  constexpr int kBlocks = kQueries / 16 < kWarps ? 1 : kQueries / 16 / kWarps;  // of 16 queries
  constexpr bool kDirect = is_direct(kPrecision);
  // Whether all logits counting is a case of its own; tf32 and single warps lack registers for it.
  constexpr bool kTwoVariants = kWarps > 1 && kPrecision != Precision::kTf32;
  constexpr bool kGradient = kPass != Pass::kLogSumExp;
  const bool norms_there = kGradient && kWarps > 1 && !kDirect && p.keys_first;
  CRRCD_DYNAMIC_SHARED(memory);
  const LogitLayout& layout = p.logit_layout;
  constexpr int ld_slopes = kPanelLead<kPrecision>, ld_piece = kPieceLead<kPrecision>;
  const int ld = layout.ld_hidden();
  constexpr int keys = kKeysOfWarp * kWarps, width = piece_columns(kPrecision);
  S* const tiles_of_keys = reinterpret_cast<S*>(memory + layout.keys_at());
  S* const slopes = reinterpret_cast<S*>(memory + layout.slopes_at());
  S* const relation_tile = reinterpret_cast<S*>(memory + layout.relation_at());  // w, direct form
  const int ld_relation = layout.ld_relation();
  S* const pieces = reinterpret_cast<S*>(memory + layout.pieces_at());
  T* const offset = reinterpret_cast<T*>(memory + layout.offset_at());
  T* const constant = offset + kQueries;  // q . c

  // block = ((panel * column ranges + range) * A + anchor) * chunks + chunk
  const int64_t ranges = column_ranges<kPrecision, kPass, kWarps>(p);
  int64_t block = blockIdx.x;
  const int64_t chunk = block % p.chunks;
  block /= p.chunks;
  const int64_t a = block % p.A;
  block /= p.A;
  const int first_column = static_cast<int>(block % ranges) * kColumns;
  const int64_t panel = block / ranges;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t tiles = (p.keys + keys - 1) / keys;
  const int begin = static_cast<int>(tiles * chunk / p.chunks);
  const int end = static_cast<int>(tiles * (chunk + 1) / p.chunks);
  const int64_t left = p.B - panel * kQueries;
  const int queries = left < kQueries ? static_cast<int>(left) : kQueries;
  const int query_tiles = (queries + 15) / 16 * 2;
  // before them nothing asks which logits count
  const int whole_tiles =
      !kTwoVariants || p.keep || query_tiles < kTiles ? 0 : static_cast<int>(p.keys / keys);
  const bool first_range = first_column == 0;  // which also sums what has no columns
  const int wide = gradient_width<kPrecision>(p), rest = wide - first_column;
  const int column_tiles = (rest < kColumns ? rest : kColumns) / 8;

  const S* const anchor = static_cast<const S*>(p.anchor) + a * p.Hp;
  const S* const x = static_cast<const S*>(p.x);
  const int64_t pair = a * p.Bp + panel * kQueries;
  const T scale = *p.scale, to_log2 = scale * T(1.4426950408889634), scaled = scale * p.boost;
  for (int b = threadIdx.x; b < kQueries; b += 32 * kWarps) {
    offset[b] = p.offset[pair + b];
    constant[b] = p.qc ? p.qc[pair + b] : T(0);
  }

  // W, then QW of these queries, in pieces; or after each panel of W what it meets of Q
  const int a_panel = layout.pieces_a_panel();
  const int weight_panels = norms_there ? 0 : p.Rp / kQueries, weight_tiles = (p.R + 15) / 16 * 2;
  const int count = norms_there ? a_panel : layout.pieces();
  const int stride = kDirect ? p.Rp : p.Hp;  // of the queries' rows
  const auto is_query = [&](int i) {
    return kDirect ? i % (a_panel + 1) == a_panel : i >= weight_panels * a_panel;
  };
  const auto column_of = [&](int i) {
    if constexpr (kDirect)
      return is_query(i) ? i / (a_panel + 1) * width : i % (a_panel + 1) * width;
    else
      return i % a_panel * width;
  };
  const auto address = [&](int i) {
    if (is_query(i)) return static_cast<const S*>(p.qw) + pair * stride + column_of(i);
    const int rows = i / (kDirect ? a_panel + 1 : a_panel);
    return static_cast<const S*>(p.weight) + int64_t(rows) * kQueries * p.Hp + column_of(i);
  };
  const auto stride_of = [&](int i) { return is_query(i) ? stride : p.Hp; };
  const auto up_to_width = [&](int rest) { return rest < width ? rest : width; };
  const auto columns_of = [&](int i) { return up_to_width(stride_of(i) - column_of(i)); };
  Pieces<S> stream{pieces, ld_piece, kQueries, layout.buffers};
  const auto piece = [&](int i) -> const S* {
    return layout.resident ? pieces + i * kQueries * ld_piece
                           : stream.next(i, count, address, stride_of, columns_of);
  };
  if (layout.resident && begin < end)  // a block without tiles would leave copies under way
    for (int i = 0; i < count; ++i)
      fetch_rows(pieces + i * layout.piece(), ld_piece, address(i), stride_of(i), kQueries,
                 columns_of(i));
  const auto fetch_keys = [&](int stage, int tile) {
    fetch_rows(tiles_of_keys + stage * keys * ld, ld, x + unsigned(tile) * keys * p.Hp, p.Hp, keys,
               p.Hp, 32 * kWarps);
    gpu::cp_async_commit();
  };
  if (begin < end) fetch_keys(0, begin);

  T d_qw[kBlocks][kColumns / 8][4] = {};
  T column_sum[kGradient ? kTiles : 1][2] = {};  // of slopes
  T top[kGradient ? 1 : kTiles][2], sum[kGradient ? 1 : kTiles][2] = {};
  for (auto& column : top) column[0] = column[1] = T(-kLeftOut);
  // Of all tiles, and of the last few: loss, g cosine, g, c
  double total[4] = {};
  LossProduct<T> product;
  T cosines = 0, sum_g = 0, sum_c = 0;
  const auto add_up = [&] {
    total[0] += product.take(), total[1] += cosines, total[2] += sum_g, total[3] += sum_c;
    cosines = sum_g = sum_c = 0;
  };
  bool fresh = !p.accumulate;
  const bool want_query = kGradient && p.need_query;
  const auto flush = [&] {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
        for (int half = 0; half < 2; ++half) {
          const int b = 16 * (warp + kWarps * i) + g + 8 * half;
          if (b < 8 * query_tiles && j < column_tiles) {
            T* out = p.d_qw + ((chunk * p.A + a) * p.Bp + panel * kQueries + b) * wide +
                     first_column + 8 * j + 2 * t;
            for (int c = 0; c < 2; ++c) {
              T& cell = d_qw[i][j][2 * half + c];
              out[c] = fresh ? cell : out[c] + cell;
            }
          }
          d_qw[i][j][2 * half] = d_qw[i][j][2 * half + 1] = 0;
        }
    fresh = false;
  };

  for (int tile = begin; tile < end; ++tile) {
    const unsigned turn = tile - begin, stage = layout.stages == 2 ? turn % 2 : 0;
    gpu::cp_async_wait<0>();
    __syncthreads();
    if (layout.stages == 2 && tile + 1 < end) fetch_keys(stage ^ 1, tile + 1);
    const int key = tile * keys + warp * kKeysOfWarp + g;  // of this thread, and the 8th after
    S* const hidden_tile = tiles_of_keys + stage * keys * ld;
    S* const hidden = hidden_tile + warp * kKeysOfWarp * ld;
    make_hidden<kPrecision>(hidden, hidden, ld, anchor, p.Hp);
    __syncwarp();

    S* const relation = relation_tile + warp * kKeysOfWarp * ld_relation;
    S* const own_slopes = slopes + (warp * kKeysOfWarp + g) * ld_slopes + 2 * t;
    // segments are short enough for 32 bits
    const unsigned norm_at = static_cast<unsigned>(a) * static_cast<unsigned>(p.Kp) + key;
    T square[2] = {}, z[kTiles][4] = {};  // norms that are there already stand for their squares
    if (norms_there)
      for (int half = 0; half < 2; ++half) square[half] = p.inverse_norm[norm_at + 8 * half];
    int at = 0;
    const auto multiply_hidden = [&](T(&product)[kTiles][4], int product_tiles) {
      int k = 0;
      do {  // one piece or more: a loop that might have none costs copies of the product
        multiply<kPrecision, kTiles, false, false>(product, hidden + k * width, ld, piece(at++),
                                                   ld_piece, up_to_width(p.Hp - k * width),
                                                   product_tiles);
      } while (++k < a_panel);
    };
    for (int rows = 0; rows < weight_panels; ++rows) {
      const int r0 = rows * kQueries;
      const int relation_tiles = weight_tiles - rows * kTiles;  // or more than there are
      T w[kTiles][4] = {};
      const auto add_bias = [&] {
        if (p.bias)
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
            for (int i = 0; i < 4; ++i) w[j][i] += p.bias[r0 + 8 * j + 2 * t + i % 2];
      };
      if constexpr (kDirect) add_bias();  // first, as the pass for gradients has it to the last bit
      multiply_hidden(w, relation_tiles);
      if constexpr (!kDirect) add_bias();
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        for (int i = 0; i < 4; ++i) square[i / 2] += w[j][i] * w[j][i];
      if constexpr (kDirect) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          for (int half = 0; half < 2; ++half)
            store_two<kPrecision>(relation + (g + 8 * half) * ld_relation + r0 + 8 * j + 2 * t,
                                  w[j][2 * half], w[j][2 * half + 1]);
        __syncwarp();
        multiply<kPrecision, kTiles, false, false>(z, relation + r0, ld_relation, piece(at++),
                                                   ld_piece, kQueries, query_tiles);
      }
    }
    if constexpr (!kDirect) {
      multiply_hidden(z, query_tiles);
      if (p.qc)
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          for (int i = 0; i < 4; ++i) z[j][i] += load_two(constant + 8 * j + 2 * t).x[i % 2];
    }
    T inverse[2], to_logit[2], to_slope[2];
    for (int half = 0; half < 2; ++half) {
      inverse[half] =
          norms_there ? square[half] : inverse_norm<kPrecision>(warp_sum<4>(square[half]));
      to_logit[half] = inverse[half] * to_log2;
      to_slope[half] = inverse[half] * scaled;
    }
    std::uint64_t keep[2] = {};  // from this thread's first query
    bool whole = tile < whole_tiles;
    if (!whole) {
      whole = query_tiles == kTiles;
      for (int half = 0; half < 2; ++half) {
        const int n = key + 8 * half;
        if (n < p.keys) keep[half] = p.keep ? p.keep[panel * p.Kp + n] : ~std::uint64_t(0);
        whole = whole && keep[half] == ~std::uint64_t(0);
        keep[half] >>= 2 * t;
      }
      whole = __all_sync(0xffffffffu, whole);
    }
    T along[2] = {};
    const auto weigh = [&](auto all_count) {
      constexpr bool kWhole = decltype(all_count)::value;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (!kWhole && j >= query_tiles) continue;
        const Two<T> less = load_two(offset + 8 * j + 2 * t);
        T logit[4];
        for (int i = 0; i < 4; ++i) {
          logit[i] = z[j][i] * to_logit[i / 2] - less.x[i % 2];
          if (!kWhole && !(keep[i / 2] >> (8 * j + i % 2) & 1)) logit[i] = T(-kLeftOut);
        }
        if constexpr (kPass == Pass::kLogSumExp) {
          for (int c = 0; c < 2; ++c) {
            const T most = logit[c] > logit[2 + c] ? logit[c] : logit[2 + c];
            if (most > top[j][c]) {
              sum[j][c] *= exp2_of<kPrecision>(top[j][c] - most);
              top[j][c] = most;
            }
            for (int half = 0; half < 2; ++half) {
              const T e = exp2_of<kPrecision>(logit[2 * half + c] - top[j][c]);
              // where nothing has been found, top is as low as what was left out
              sum[j][c] += logit[2 * half + c] == T(-kLeftOut) ? T(0) : e;
            }
          }
        } else {
          for (int i = 0; i < 4; ++i) {
            T weight;
            if constexpr (kPass == Pass::kNce)
              weight = softplus<kPrecision>(logit[i], product);
            else
              weight = exp2_of<kPrecision>(logit[i]);
            along[i / 2] += weight * z[j][i];
            z[j][i] = weight;
          }
        }
      }
      if constexpr (kGradient) {
        const auto for_columns = [&](const auto& f) {
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
            if (kWhole || j < query_tiles) f(j);
        };
        if (p.need_offset)
          for_columns([&](int j) {
            for (int i = 0; i < 4; ++i) sum_g += z[j][i];
          });
        for_columns([&](int j) {
          for (int half = 0; half < 2; ++half) {
            T &first = z[j][2 * half], &second = z[j][2 * half + 1];
            first *= to_slope[half], second *= to_slope[half];
            store_two<kPrecision>(own_slopes + 8 * half * ld_slopes + 8 * j, first, second);
          }
        });
        if (p.d_logit)
          for_columns([&](int j) {
            for (int i = 0; i < 4; ++i) column_sum[j][i % 2] += z[j][i];
          });
      }
    };
    if (kTwoVariants && whole)
      weigh(std::true_type());
    else
      weigh(std::false_type());
    if constexpr (kGradient) {
      for (int half = 0; half < 2; ++half) cosines += along[half] * inverse[half];
      if (p.live)
        for (int half = 0; half < 2; ++half) {
          const int64_t n = key + 8 * half;
          const T c = norm_gradient(warp_sum<4>(along[half]), inverse[half], to_slope[half]);
          if (t == 0 && first_range) {
            p.c[(panel * p.A + a) * p.Kp + n] = c;
            if (panel == 0 && !norms_there) p.inverse_norm[norm_at + 8 * half] = inverse[half];
            sum_c += c;
          }
        }
      if (turn % kTilesOfProduct == kTilesOfProduct - 1) add_up();
    }
    if (want_query) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int first = 16 * (warp + kWarps * i);
        if (first < 8 * query_tiles)
          multiply<kPrecision, kColumns / 8, true, true, keys>(
              d_qw[i], slopes + first, ld_slopes,
              (kDirect ? relation_tile : hidden_tile) + first_column, kDirect ? ld_relation : ld,
              keys, column_tiles);
      }
      if (turn % kTilesBetweenFlushes == kTilesBetweenFlushes - 1) flush();
    }
    if (layout.stages == 1) {
      __syncthreads();
      if (tile + 1 < end) fetch_keys(0, tile + 1);
    }
  }

  if (want_query) flush();
  if constexpr (kGradient) {
    if (!first_range) return;
    add_up();
    __syncthreads();
    block_sum<32 * kWarps>(total, reinterpret_cast<double*>(memory));
    if (threadIdx.x == 0)
      for (int i = 0; i < 4; ++i) {
        double& out = p.scalars[((panel * p.A + a) * p.chunks + chunk) * 4 + i];
        out = p.accumulate ? out + total[i] : total[i];
      }
    if (!p.d_logit) return;
  } else if (!first_range) {
    return;
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
    for (int c = 0; c < 2; ++c) {
      const int64_t cell = pair + 8 * j + 2 * t + c;
      if constexpr (kGradient) {
        T& x = column_sum[j][c];
        for (int step = 4; step < kWarp; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
        T& out = p.d_logit[(chunk * kWarps + warp) * p.A * p.Bp + cell];
        if (g == 0) out = p.accumulate ? out + x : x;
      } else {
        T high = top[j][c], all = sum[j][c];
        for (int step = 4; step < kWarp; step *= 2) {
          const T other = __shfl_xor_sync(0xffffffffu, high, step);
          const T more = __shfl_xor_sync(0xffffffffu, all, step);
          const T most = high > other ? high : other;
          all = all * exp2_of<kPrecision>(high - most) + more * exp2_of<kPrecision>(other - most);
          high = most;
        }
        if (g != 0) continue;
        const int64_t at = (chunk * kWarps + warp) * p.A * p.Bp + cell;
        if (p.accumulate) {
          const T before = p.running_max[at], most = high > before ? high : before;
          all = all * exp2_of<kPrecision>(high - most) +
                p.running_sum[at] * exp2_of<kPrecision>(before - most);
          high = most;
        }
        p.running_max[at] = high, p.running_sum[at] = all;
      }
    }
}

template <Precision kPrecision, Pass kPass, int kWarps>
void launch_logits(const RelationNceParams<SumOf<kPrecision>>& p, void* stream) {
  const int64_t ranges = column_ranges<kPrecision, kPass, kWarps>(p);
  const int64_t blocks = p.query_panels() * ranges * p.A * p.chunks;
  gpu::launch("relation_logits", relation_logits<kPrecision, kPass, kWarps>,
              dim3(static_cast<unsigned>(blocks)), dim3(32 * kWarps),
              static_cast<std::size_t>(p.logit_layout.bytes()), stream, p);
}

template <Precision kPrecision, int kWarps>
void launch_logits(const RelationNceParams<SumOf<kPrecision>>& p, void* stream) {
  if (p.pass == Pass::kNce) return launch_logits<kPrecision, Pass::kNce, kWarps>(p, stream);
  if (p.pass == Pass::kSoftmax) return launch_logits<kPrecision, Pass::kSoftmax, kWarps>(p, stream);
  launch_logits<kPrecision, Pass::kLogSumExp, kWarps>(p, stream);
}

}  // namespace
}  // namespace crrcd::cuda
