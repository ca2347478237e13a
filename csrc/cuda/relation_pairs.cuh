// relation: v_am = unit(W relu(P_a - X_m) + c) for all pairs of an anchor and a sample.
#pragma once

#include "tile.cuh"

namespace crrcd::cuda {
namespace {

// A block has an anchor and 16 samples a warp. It goes through W twice: the norm is known only when
// all of w has been made, and to keep w would take more than it costs to make it again.
template <Precision kPrecision, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1)
    relation_pairs(RelationPairsParams<SumOf<kPrecision>> p) {
  using S = StoredOf<kPrecision>;
  using T = SumOf<kPrecision>;
  constexpr int kRows = panel_rows(kPrecision), kTiles = kRows / 8;
  constexpr int kColumns = piece_columns(kPrecision);
  CRRCD_DYNAMIC_SHARED(memory);
  const PairsLayout& layout = p.layout;
  const int ld = layout.ld_hidden(), samples = layout.samples();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t tiles = (p.M + samples - 1) / samples;
  const int64_t a = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  S* const tile_memory = reinterpret_cast<S*>(memory + layout.samples_at());
  S* const hidden = tile_memory + warp * kKeysOfWarp * ld;
  fetch_rows(tile_memory, ld, static_cast<const S*>(p.sample) + tile * samples * p.Hp, p.Hp,
             samples, p.Hp);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();
  make_hidden<kPrecision>(hidden, hidden, ld, static_cast<const S*>(p.anchor) + a * p.Hp, p.Hp);
  __syncwarp();

  const int a_panel = (p.Hp + kColumns - 1) / kColumns, panels = p.Rp / kRows;
  const auto width_of = [&](int i) {
    const int left = p.Hp - i % a_panel * kColumns;
    return left < kColumns ? left : kColumns;
  };
  const auto address = [&](int i) {
    const int panel = i / a_panel % panels;
    return static_cast<const S*>(p.weight) + int64_t(panel) * kRows * p.Hp + i % a_panel * kColumns;
  };
  Pieces<S> stream{reinterpret_cast<S*>(memory + layout.pieces_at()), kPieceLead<kPrecision>, kRows,
                   layout.buffers};
  T square[2] = {}, inverse[2] = {};
  int at = 0;
  for (int turn = 0; turn < 2; ++turn) {
    for (int panel = 0; panel < panels; ++panel) {
      T w[kTiles][4] = {};
      if (p.bias)
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          for (int i = 0; i < 4; ++i) w[j][i] = p.bias[panel * kRows + 8 * j + 2 * t + i % 2];
      for (int k = 0; k < a_panel; ++k, ++at)
        multiply<kPrecision, kTiles, false, false>(
            w, hidden + k * kColumns, ld,
            stream.next(
                at, 2 * panels * a_panel, address, [&](int) { return p.Hp; }, width_of),
            kPieceLead<kPrecision>, width_of(k), kTiles);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        for (int i = 0; i < 4; ++i) {
          const int64_t m = tile * samples + warp * kKeysOfWarp + g + 8 * (i / 2);
          const int r = panel * kRows + 8 * j + 2 * t + i % 2;
          if (turn == 0)
            square[i / 2] += w[j][i] * w[j][i];
          else if (m < p.M && r < p.R)
            p.relation[(a * p.M + m) * p.R + r] = w[j][i] * inverse[i / 2];
        }
    }
    if (turn > 0) continue;
    for (int half = 0; half < 2; ++half) {
      const int64_t m = tile * samples + warp * kKeysOfWarp + g + 8 * half;
      inverse[half] = inverse_norm<kPrecision>(warp_sum<4>(square[half]));
      if (t == 0 && m < p.M) p.inverse_norm[a * p.M + m] = inverse[half];
    }
  }
}

template <Precision kPrecision>
void launch_pairs(const RelationPairsParams<SumOf<kPrecision>>& p, void* stream) {
  const int64_t tiles = (p.M + p.layout.samples() - 1) / p.layout.samples();
  const auto start = [&](auto kernel) {
    gpu::launch("relation_pairs", kernel, dim3(static_cast<unsigned>(tiles * p.A)),
                dim3(32 * p.layout.warps), static_cast<std::size_t>(p.layout.bytes()), stream, p);
  };
  if constexpr (kPrecision != Precision::kF64)
    if (p.layout.warps == 4) return start(relation_pairs<kPrecision, 4>);
  start(relation_pairs<kPrecision, 1>);
}

}  // namespace
}  // namespace crrcd::cuda
