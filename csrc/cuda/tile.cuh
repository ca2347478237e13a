// Products of tiles in shared memory: on tensor cores, or for float32 and float64 at full precision
// by fused multiply-adds. One warp makes 16 rows of the result; whichever way it is made, a thread
// holds the cells that mma.sync gives it: of every 8 columns
//     sum[j][0], sum[j][1]: row lane / 4,     columns 8 j + 2 (lane % 4) and the next
//     sum[j][2], sum[j][3]: row lane / 4 + 8, the same columns.
#pragma once

#include "reduce.cuh"
#include "relation_nce_params.h"
#include "relation_pairs_params.h"
#include "rows.cuh"

namespace crrcd::cuda {
namespace {

template <Precision>
struct Operand;
template <>
struct Operand<Precision::kF64> {
  using Stored = double;
};
template <>
struct Operand<Precision::kF32> {
  using Stored = float;
};
template <>
struct Operand<Precision::kTf32> {
  using Stored = float;
};
template <>
struct Operand<Precision::kBF16> {
  using Stored = __nv_bfloat16;
};
template <>
struct Operand<Precision::kF16> {
  using Stored = __half;
};

// Leading dimensions that do not depend on the call: of pieces, and of a panel of queries.
template <Precision kPrecision>
constexpr int kPieceLead = leading(piece_columns(kPrecision), stored_bytes(kPrecision));
template <Precision kPrecision>
constexpr int kPanelLead = leading(panel_rows(kPrecision), stored_bytes(kPrecision));

template <Precision kPrecision>
using StoredOf = typename Operand<kPrecision>::Stored;

// 16 bytes of a row.
template <typename S>
struct alignas(kUnit) Unit {
  static constexpr int kCount = kUnit / static_cast<int>(sizeof(S));
  S x[kCount];
};

template <typename S>
__device__ __forceinline__ Unit<S> load_unit(const S* from) {
  return *reinterpret_cast<const Unit<S>*>(from);
}

template <typename S>
__device__ __forceinline__ void store_unit(S* to, const Unit<S>& unit) {
  *reinterpret_cast<Unit<S>*>(to) = unit;
}

// A sum as an operand of the next product.
template <Precision kPrecision, typename T>
__device__ __forceinline__ StoredOf<kPrecision> to_stored(T x) {
  if constexpr (kPrecision == Precision::kTf32) return __uint_as_float(gpu::to_tf32(x));
  if constexpr (kPrecision == Precision::kBF16) return __float2bfloat16(x);
  if constexpr (kPrecision == Precision::kF16)  // infinity would make NaN of what is zero beside it
    return __float2half(x > 65504 ? T(65504) : x < -65504 ? T(-65504) : x);
  if constexpr (kPrecision == Precision::kF32 || kPrecision == Precision::kF64) return x;
}

// Two neighbouring operands in memory.
template <Precision kPrecision, typename T>
__device__ __forceinline__ void store_two(StoredOf<kPrecision>* to, T x, T y) {
  using S = StoredOf<kPrecision>;
  struct alignas(2 * sizeof(S)) Two {
    S x, y;
  };
  *reinterpret_cast<Two*>(to) = Two{to_stored<kPrecision>(x), to_stored<kPrecision>(y)};
}

// 2^x, 1 / x and 1 / sqrt(x): as exact as the products are.
template <Precision kPrecision, typename T>
__device__ __forceinline__ T exp2_of(T x) {
  if constexpr (kPrecision == Precision::kF64 || kPrecision == Precision::kF32)
    return exp2(x);
  else
    return gpu::exp2_approx(x);
}

template <Precision kPrecision, typename T>
__device__ __forceinline__ T reciprocal(T x) {
  if constexpr (kPrecision == Precision::kF64 || kPrecision == Precision::kF32)
    return T(1) / x;
  else
    return gpu::rcp_approx(x);
}

template <Precision kPrecision, typename T>
__device__ __forceinline__ T inverse_norm(T square) {
  if (square <= T(kZeroNormSquared)) return 0;
  if constexpr (kPrecision == Precision::kF64 || kPrecision == Precision::kF32)
    return T(1) / sqrt(square);
  else
    return gpu::rsqrt_approx(square);
}

// ---------------------------------------------------------------------------------------- products

// The fragments of one step of mma.sync, 16 deep for two-byte operands and 8 deep for tf32; a lies
// as [16, depth] or, transposed, as [depth, 16].
template <bool kTransposed, typename S>
__device__ __forceinline__ void load_a(std::uint32_t (&r)[4], const S* a, int lda) {
  const int lane = gpu::lane_id(), row = lane % 8, odd = lane / 8 % 2, high = lane / 16;
  if constexpr (sizeof(S) == 2) {
    if constexpr (kTransposed)
      gpu::ldmatrix_x4_trans(r, a + (row + 8 * high) * lda + 8 * odd);
    else
      gpu::ldmatrix_x4(r, a + (row + 8 * odd) * lda + 8 * high);
  } else if constexpr (kTransposed) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      r[i] = __float_as_uint(a[(t + 4 * (i / 2)) * lda + g + 8 * (i % 2)]);
  } else {
    gpu::ldmatrix_x4(r, a + (row + 8 * odd) * lda + 4 * high);
  }
}

// Of two neighbouring tiles of 8 columns; b lies as [16, depth] or, transposed, as [depth, 16].
template <bool kTransposed, typename S>
__device__ __forceinline__ void load_b(std::uint32_t (&r)[4], const S* b, int ldb) {
  const int lane = gpu::lane_id(), row = lane % 8, odd = lane / 8 % 2, high = lane / 16;
  if constexpr (sizeof(S) == 2) {
    if constexpr (kTransposed)
      gpu::ldmatrix_x4_trans(r, b + (row + 8 * odd) * ldb + 8 * high);
    else
      gpu::ldmatrix_x4(r, b + (row + 8 * high) * ldb + 8 * odd);
  } else if constexpr (kTransposed) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      r[i] = __float_as_uint(b[(t + 4 * (i % 2)) * ldb + g + 8 * (i / 2)]);
  } else {
    gpu::ldmatrix_x4(r, b + (row + 8 * high) * ldb + 4 * odd);
  }
}

// sum[j] += A B for the first `tiles` tiles (an even number) of 8 columns. A lies as [16, depth]
// or, transposed, as [depth, 16]; B as [8 tiles, depth] or, transposed, as [depth, 8 tiles]. depth
// is a multiple of 16.
template <Precision kPrecision, int kTiles, bool kATransposed, bool kBTransposed, bool kAll,
          typename S, typename T>
__device__ __forceinline__ void multiply_tiles(T (&sum)[kTiles][4], const S* a, int lda, const S* b,
                                               int ldb, int depth, int tiles) {
  if constexpr (kPrecision != Precision::kF64 && kPrecision != Precision::kF32) {
    constexpr int kStep = sizeof(S) == 2 ? 16 : 8;
#pragma unroll 2
    for (int k = 0; k < depth; k += kStep) {
      std::uint32_t x[4];
      load_a<kATransposed>(x, a + (kATransposed ? k * lda : k), lda);
#pragma unroll
      for (int j = 0; j < kTiles; j += 2)
        if (kAll || j < tiles) {
          std::uint32_t y[4];
          load_b<kBTransposed>(y, b + (kBTransposed ? k * ldb + 8 * j : 8 * j * ldb + k), ldb);
          const std::uint32_t left[2] = {y[0], y[1]}, right[2] = {y[2], y[3]};
          if constexpr (sizeof(S) == 2) {
            gpu::mma_m16n8k16(sum[j], x, left, S());
            gpu::mma_m16n8k16(sum[j + 1], x, right, S());
          } else {
            gpu::mma_tf32(sum[j], x, left);
            gpu::mma_tf32(sum[j + 1], x, right);
          }
        }
    }
  } else {
    const int lane = gpu::lane_id(), g = lane / 4, t = lane % 4;
    constexpr int kCount = Unit<S>::kCount;
    for (int k = 0; k < depth; k += kCount) {
      S x[2][kCount];  // of both rows
      for (int i = 0; i < 2; ++i) {
        if constexpr (kATransposed) {
          for (int d = 0; d < kCount; ++d) x[i][d] = a[(k + d) * lda + g + 8 * i];
        } else {
          const Unit<S> unit = load_unit(a + (g + 8 * i) * lda + k);
          for (int d = 0; d < kCount; ++d) x[i][d] = unit.x[d];
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if (kAll || j < tiles) {
          const int column = 8 * j + 2 * t;
          for (int c = 0; c < 2; ++c) {
            S y[kCount];
            if constexpr (kBTransposed) {
              for (int d = 0; d < kCount; ++d) y[d] = b[(k + d) * ldb + column + c];
            } else {
              const Unit<S> unit = load_unit(b + (column + c) * ldb + k);
              for (int d = 0; d < kCount; ++d) y[d] = unit.x[d];
            }
            // sums of few, then of those: they round less than one long one
            T upper = x[0][0] * y[0], lower = x[1][0] * y[0];
            for (int d = 1; d < kCount; ++d) upper += x[0][d] * y[d], lower += x[1][d] * y[d];
            sum[j][c] += upper;
            sum[j][2 + c] += lower;
          }
        }
    }
  }
}

template <Precision kPrecision, int kTiles, bool kATransposed, bool kBTransposed, typename S,
          typename T>
__device__ __forceinline__ void multiply(T (&sum)[kTiles][4], const S* a, int lda, const S* b,
                                         int ldb, int depth, int tiles) {
  // the usual case without a question for every tile
  if constexpr (!is_direct(kPrecision))
    if (tiles >= kTiles)
      return multiply_tiles<kPrecision, kTiles, kATransposed, kBTransposed, true>(
          sum, a, lda, b, ldb, depth, tiles);
  multiply_tiles<kPrecision, kTiles, kATransposed, kBTransposed, false>(sum, a, lda, b, ldb, depth,
                                                                        tiles);
}

// ------------------------------------------------------------------------------------------- tiles

// Element `at` of a matrix with `width` columns, then the one `step` after it, and so on, without a
// division each.
struct Walk {
  int row, column, width, step_rows, step_columns;

  __device__ __forceinline__ Walk(int at, int width, int step)
      : row(at / width),
        column(at - row * width),
        width(width),
        step_rows(step / width),
        step_columns(step - step_rows * width) {}

  __device__ __forceinline__ void advance() {
    row += step_rows;
    column += step_columns;
    if (column >= width) column -= width, ++row;
  }
};

// Columns [0, columns) of `rows` rows, from global to shared memory by the whole block, without
// waiting for it.
template <typename S>
__device__ __forceinline__ void fetch_rows(S* to, int ld_to, const S* from, int64_t ld_from,
                                           int rows, int columns) {
  constexpr int kCount = Unit<S>::kCount;
  Walk at(threadIdx.x, columns / kCount, blockDim.x);
  for (; at.row < rows; at.advance())
    gpu::cp_async16(to + at.row * ld_to + at.column * kCount,
                    from + at.row * ld_from + at.column * kCount);
}

// Rectangles of matrices, 256 bytes wide, that a block goes through again and again. With two
// buffers each is fetched while the one before is used.
template <typename S>
struct Pieces {
  S* memory;
  int ld, rows, buffers;

  // The piece `index` of `count`; address(i), stride(i), width(i): where piece i begins, elements
  // between its rows, its columns. For all threads of the block at the same time; the one before
  // may not be used any more.
  template <class Address, class Stride, class Width>
  __device__ __forceinline__ const S* next(int index, int count, const Address& address,
                                           const Stride& stride, const Width& width) {
    const bool ahead = buffers == 2;
    if (!ahead) __syncthreads();
    if (index == 0 || !ahead) start(index, address(index), stride(index), width(index));
    gpu::cp_async_wait<0>();
    __syncthreads();
    if (ahead && index + 1 < count)
      start(index + 1, address(index + 1), stride(index + 1), width(index + 1));
    return memory + index % buffers * rows * ld;
  }

 private:
  __device__ __forceinline__ void start(int index, const S* from, int64_t stride, int width) {
    fetch_rows(memory + index % buffers * rows * ld, ld, from, stride, rows, width);
    gpu::cp_async_commit();
  }
};

// relu(anchor - x) of one unit.
template <Precision kPrecision, typename S>
__device__ __forceinline__ Unit<S> hidden_unit(const Unit<S>& anchor, const Unit<S>& x) {
  Unit<S> out;
  if constexpr (sizeof(S) == 2) {
    using Pair = std::conditional_t<kPrecision == Precision::kBF16, __nv_bfloat162, __half2>;
    const auto* p = reinterpret_cast<const Pair*>(anchor.x);
    const auto* q = reinterpret_cast<const Pair*>(x.x);
    auto* h = reinterpret_cast<Pair*>(out.x);
    const S nothing = to_stored<kPrecision>(0.0f);
    for (int i = 0; i < Unit<S>::kCount / 2; ++i)
      h[i] = __hmax2_nan(__hsub2(p[i], q[i]), Pair{nothing, nothing});
  } else {
    for (int i = 0; i < Unit<S>::kCount; ++i)
      out.x[i] = to_stored<kPrecision>(gpu::relu_nan(anchor.x[i] - x.x[i]));
  }
  return out;
}

// to = relu(anchor - x) for 16 rows of `width` columns by one warp; to may be x.
template <Precision kPrecision, typename S>
__device__ __forceinline__ void make_hidden(S* to, const S* x, int ld, const S* anchor, int width) {
  constexpr int kCount = Unit<S>::kCount;
  Walk at(gpu::lane_id(), width / kCount, kWarp);
  for (; at.row < kKeysOfWarp; at.advance()) {
    const int column = at.column * kCount, cell = at.row * ld + column;
    store_unit(to + cell, hidden_unit<kPrecision>(load_unit(anchor + column), load_unit(x + cell)));
  }
}

}  // namespace
}  // namespace crrcd::cuda
