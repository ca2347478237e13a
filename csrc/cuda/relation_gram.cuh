// relation_nce, pass for the gradient of G = W'W: d G = 1/2 sum_an c_an hid_an hid_an', of which
// the lower triangle of sum_an c hid hid' is made, and of W'c: sum_an c hid.
#pragma once

#include "tile.cuh"

namespace crrcd::cuda {
namespace {

template <Precision kPrecision>
__global__ void __launch_bounds__(32 * GramLayout::kWarps, 2)
    relation_gram(RelationNceParams<SumOf<kPrecision>> p) {
  using S = StoredOf<kPrecision>;
  using T = SumOf<kPrecision>;
  constexpr int kColumns = piece_columns(kPrecision), kTiles = kColumns / 8;
  constexpr int kThreads = 32 * GramLayout::kWarps;
  CRRCD_DYNAMIC_SHARED(memory);
  const GramLayout& layout = p.gram_layout;
  const int ld = layout.ld_hidden(), keys = layout.keys;
  S* const tiles_of_keys = reinterpret_cast<S*>(memory + layout.keys_at());
  S* const scaled = reinterpret_cast<S*>(memory + layout.scaled_at());
  T* const factor = reinterpret_cast<T*>(memory + layout.factor_at());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;

  // block = (row range * column ranges + column range) * chunks + chunk
  int64_t block = blockIdx.x;
  const int64_t chunk = block % p.gram_chunks;
  block /= p.gram_chunks;
  const int column_ranges = (p.Hp + kColumns - 1) / kColumns;
  const int first_column = static_cast<int>(block % column_ranges) * kColumns;
  const int first_row = static_cast<int>(block / column_ranges) * GramLayout::kRows;
  if (first_column >= first_row + GramLayout::kRows) return;  // above the diagonal
  const int row = first_row + 16 * warp;                      // of this warp
  int tiles = p.Hp - first_column < kColumns ? (p.Hp - first_column) / 8 : kTiles;
  const int below = (row + 16 - first_column) / 8;  // tiles up to the diagonal
  if (tiles > below) tiles = below;
  if (row >= p.Hp || tiles < 0) tiles = 0;
  const bool sum_hidden = p.hidden_sum && first_column == 0;

  // key tile by key tile, an anchor after the other, in chunks
  const int64_t key_tiles = (p.keys + keys - 1) / keys, all = key_tiles * p.A;
  const int64_t begin = all * chunk / p.gram_chunks, end = all * (chunk + 1) / p.gram_chunks;
  const int panels = static_cast<int>(p.query_panels());
  const auto fetch = [&](int stage, int64_t i) {
    fetch_rows(tiles_of_keys + stage * keys * ld, ld,
               static_cast<const S*>(p.x) + i / p.A * keys * p.Hp, p.Hp, keys, p.Hp);
    gpu::cp_async_commit();
  };
  if (begin < end) fetch(0, begin);
  T sum[kTiles][4] = {};
  T total[kTiles][4] = {};  // two short sums round less than one long one
  T hidden_sum = 0, hidden_total = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int stage = layout.stages == 2 ? static_cast<int>((i - begin) & 1) : 0;
    const int64_t a = i % p.A, first_key = i / p.A * keys;
    for (int n = threadIdx.x; n < keys; n += kThreads) {
      T c = 0;
      for (int panel = 0; panel < panels && first_key + n < p.keys; ++panel)
        c += p.c[(panel * p.A + a) * p.Kp + first_key + n];
      factor[n] = c;
    }
    gpu::cp_async_wait<0>();
    __syncthreads();
    if (layout.stages == 2 && i + 1 < end) fetch(stage ^ 1, i + 1);
    S* const hidden = tiles_of_keys + stage * keys * ld;
    const S* const anchor = static_cast<const S*>(p.anchor) + a * p.Hp;
    constexpr int kCount = Unit<S>::kCount;
    Walk at(threadIdx.x, p.Hp / kCount, kThreads);
    for (; at.row < keys; at.advance()) {
      const int column = at.column * kCount, cell = at.row * ld + column;
      const Unit<S> unit =
          hidden_unit<kPrecision>(load_unit(anchor + column), load_unit(hidden + cell));
      Unit<S> times;
      for (int n = 0; n < kCount; ++n)
        times.x[n] = to_stored<kPrecision>(static_cast<T>(widen(unit.x[n])) * factor[at.row]);
      store_unit(hidden + cell, unit);
      store_unit(scaled + cell, times);
    }
    __syncthreads();
    if (tiles > 0)
      multiply<kPrecision, kTiles, true, true>(sum, scaled + row, ld, hidden + first_column, ld,
                                               keys, tiles);
    if (sum_hidden && threadIdx.x < GramLayout::kRows && first_row + threadIdx.x < p.Hp)
      for (int n = 0; n < keys; ++n)
        hidden_sum += factor[n] * static_cast<T>(widen(hidden[n * ld + first_row + threadIdx.x]));
    if ((i - begin) % 16 == 15 || i + 1 == end) {
      for (int j = 0; j < kTiles; ++j)
        for (int n = 0; n < 4; ++n) total[j][n] += sum[j][n], sum[j][n] = 0;
      hidden_total += hidden_sum;
      hidden_sum = 0;
    }
    __syncthreads();
    if (layout.stages == 1 && i + 1 < end) fetch(0, i + 1);
  }

  const int64_t rows = (p.Hp + GramLayout::kRows - 1) / GramLayout::kRows * GramLayout::kRows;
  for (int j = 0; j < kTiles; ++j)
    for (int n = 0; n < 4; ++n) {
      const int column = first_column + 8 * j + 2 * t + n % 2;
      if (column >= p.Hp) continue;
      T& out = p.d_gram[(chunk * rows + row + g + 8 * (n / 2)) * p.Hp + column];
      out = p.accumulate ? out + total[j][n] : total[j][n];
    }
  if (sum_hidden && threadIdx.x < GramLayout::kRows) {
    T& out = p.hidden_sum[chunk * rows + first_row + threadIdx.x];
    out = p.accumulate ? out + hidden_total : hidden_total;
  }
}

template <Precision kPrecision>
void launch_gram(const RelationNceParams<SumOf<kPrecision>>& p, void* stream) {
  const int64_t ranges = (p.Hp + piece_columns(kPrecision) - 1) / piece_columns(kPrecision);
  const int64_t rows = (p.Hp + GramLayout::kRows - 1) / GramLayout::kRows;
  gpu::launch("relation_gram", relation_gram<kPrecision>,
              dim3(static_cast<unsigned>(rows * ranges * p.gram_chunks)),
              dim3(32 * GramLayout::kWarps), static_cast<std::size_t>(p.gram_layout.bytes()),
              stream, p);
}

}  // namespace
}  // namespace crrcd::cuda
