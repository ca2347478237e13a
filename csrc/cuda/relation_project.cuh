// relation_nce, before a segment of keys: X = rows Wb' of the bank's rows, or the rows themselves,
// as operands; and which keys are negatives of which queries, a bit each.
#pragma once

#include "tile.cuh"

namespace crrcd::cuda {
namespace {

constexpr const char* kOutside =
    "crrcd_ext.relation_nce: index: expected rows of the bank in [0, N)";

// An infinity becomes NaN, which relu(anchor - key) keeps; that one it might cut to 0.
template <typename T>
__device__ __forceinline__ T nan_for_infinity(T x) {
  return x + T(0) * x;
}

template <typename T>
__device__ __forceinline__ int64_t bank_position(const RelationNceParams<T>& p, int64_t key) {
  const int64_t k = p.first_key + key;
  return p.bank.index ? checked_row(p.bank.index[k], p.N, kOutside) : k;
}

template <Precision kPrecision, typename Row>
__device__ __forceinline__ Unit<StoredOf<kPrecision>> row_unit(const BankView& bank, int64_t row,
                                                               int64_t first, int64_t width, Row) {
  using S = StoredOf<kPrecision>;
  using T = SumOf<kPrecision>;
  const Row* from = bank_row<Row>(bank, row);
  Unit<S> unit;
  for (int i = 0; i < Unit<S>::kCount; ++i)
    unit.x[i] = to_stored<kPrecision>(
        first + i < width ? nan_for_infinity(static_cast<T>(widen(from[first + i]))) : T(0));
  return unit;
}

// Elements [first, first + a unit) of a row of the bank, zero beyond its end.
template <Precision kPrecision>
__device__ __forceinline__ Unit<StoredOf<kPrecision>> row_unit(const BankView& bank, int64_t row,
                                                               int64_t first, int64_t width) {
  switch (bank.storage) {
    case Storage::kFloat64:
      return row_unit<kPrecision>(bank, row, first, width, double());
    case Storage::kFloat32:
      return row_unit<kPrecision>(bank, row, first, width, float());
    case Storage::kBFloat16:
      return row_unit<kPrecision>(bank, row, first, width, __nv_bfloat16());
    default:
      return row_unit<kPrecision>(bank, row, first, width, __half());
  }
}

template <Precision kPrecision>
__global__ void __launch_bounds__(32 * ProjectLayout::kWarps, 2)
    relation_project(RelationNceParams<SumOf<kPrecision>> p) {
  using S = StoredOf<kPrecision>;
  using T = SumOf<kPrecision>;
  constexpr ProjectLayout layout{kPrecision};
  constexpr int kColumns = piece_columns(kPrecision), kTiles = kColumns / 8;
  constexpr int kKeys = ProjectLayout::kKeys, kThreads = 32 * ProjectLayout::kWarps;
  constexpr int kLead = layout.ld_piece(), kCount = Unit<S>::kCount;
  CRRCD_DYNAMIC_SHARED(memory);
  S* const rows = reinterpret_cast<S*>(memory + layout.rows_at());
  S* const weight = reinterpret_cast<S*>(memory + layout.weight_at());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t first_key = int64_t(blockIdx.x) * kKeys;
  const int first_column = blockIdx.y * kColumns;
  const int rest = p.Hp - first_column, columns = rest < kColumns ? rest : kColumns;
  S* const x = static_cast<S*>(p.x);
  // tf32 keys stay float32: rounded is what is multiplied next, relu(anchor - key)
  constexpr Precision kKept = kPrecision == Precision::kTf32 ? Precision::kF32 : kPrecision;
  if (!p.key_weight) {
    Walk at(threadIdx.x, columns / kCount, kThreads);
    for (; at.row < kKeys; at.advance()) {
      const int64_t key = first_key + at.row, column = first_column + at.column * kCount;
      Unit<S> unit{};
      if (key < p.keys) unit = row_unit<kKept>(p.bank, bank_position(p, key), column, p.H);
      store_unit(x + key * p.Hp + column, unit);
    }
    return;
  }
  T sum[kTiles][4] = {};
  for (int d = 0; d < p.Dp; d += kColumns) {
    const int depth = p.Dp - d < kColumns ? p.Dp - d : kColumns;
    fetch_rows(weight, kLead,
               static_cast<const S*>(p.key_weight) + int64_t(first_column) * p.Dp + d, p.Dp,
               columns, depth);
    gpu::cp_async_commit();
    Walk at(threadIdx.x, depth / kCount, kThreads);
    for (; at.row < kKeys; at.advance()) {
      const int64_t key = first_key + at.row;
      Unit<S> unit{};
      if (key < p.keys)
        unit = row_unit<kPrecision>(p.bank, bank_position(p, key), d + at.column * kCount, p.D);
      store_unit(rows + at.row * kLead + at.column * kCount, unit);
    }
    gpu::cp_async_wait<0>();
    __syncthreads();
    multiply<kPrecision, kTiles, false, false>(sum, rows + warp * kKeysOfWarp * kLead, kLead,
                                               weight, kLead, depth, columns / 8);
    __syncthreads();
  }
  for (int j = 0; j < kTiles; ++j)
    if (8 * j < columns)
      for (int half = 0; half < 2; ++half) {
        const int64_t key = first_key + warp * kKeysOfWarp + g + 8 * half;
        S* out = x + key * p.Hp + first_column + 8 * j + 2 * t;
        store_two<kKept>(out, nan_for_infinity(sum[j][2 * half]),
                         nan_for_infinity(sum[j][2 * half + 1]));
      }
}

template <typename T>
__global__ void __launch_bounds__(128, 4) relation_keep(RelationNceParams<T> p, int panel_rows) {
  // block = panel of queries * blocks of keys + block of keys
  const int64_t blocks = (p.keys + 127) / 128, panel = blockIdx.x / blocks;
  const int64_t key = blockIdx.x % blocks * 128 + threadIdx.x;
  if (key >= p.keys) return;
  const int64_t row = bank_position(p, key), first = panel * panel_rows;
  const int64_t id = p.key_id ? p.key_id[row] : row;
  const int64_t label = p.query_label ? p.key_label[row] : 0;
  std::uint64_t bits = ~std::uint64_t(0);
  for (int b = 0; b < panel_rows && first + b < p.B; ++b) {
    const bool out = (p.query_id && p.query_id[first + b] == id) ||
                     (p.query_label && p.query_label[first + b] == label) ||
                     is_excluded(p, first + b, p.first_key + key);
    if (out) bits &= ~(std::uint64_t(1) << b);
  }
  p.keep[panel * p.Kp + key] = bits;
}

template <Precision kPrecision>
void launch_project(const RelationNceParams<SumOf<kPrecision>>& p, void* stream) {
  constexpr ProjectLayout layout{kPrecision};
  const auto tiles = static_cast<unsigned>(p.Kp / ProjectLayout::kKeys);
  const auto ranges = static_cast<unsigned>((p.Hp + layout.columns() - 1) / layout.columns());
  gpu::launch("relation_project", relation_project<kPrecision>, dim3(tiles, ranges),
              dim3(32 * ProjectLayout::kWarps),
              static_cast<std::size_t>(p.key_weight ? layout.bytes() : 0), stream, p);
  if (p.keep)
    gpu::launch("relation_keep", relation_keep<SumOf<kPrecision>>,
                dim3(static_cast<unsigned>((p.keys + 127) / 128 * p.query_panels())), dim3(128), 0,
                stream, p, panel_rows(kPrecision));
}

}  // namespace
}  // namespace crrcd::cuda
