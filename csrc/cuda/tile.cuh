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

// Two neighbouring elements that lie on a boundary of their common size.
template <typename S>
struct alignas(2 * sizeof(S)) Two {
  S x[2];
};

template <typename S>
__device__ __forceinline__ Two<S> load_two(const S* from) {
  return *reinterpret_cast<const Two<S>*>(from);
}

template <Precision kPrecision, typename T>
__device__ __forceinline__ void store_two(StoredOf<kPrecision>* to, T x, T y) {
  if constexpr (kPrecision == Precision::kBF16)
    *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(x, y);
  else
    *reinterpret_cast<Two<StoredOf<kPrecision>>*>(to) = {to_stored<kPrecision>(x),
                                                         to_stored<kPrecision>(y)};
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

// The fragments of one step of mma.sync, 16 deep for two-byte operands and 8 deep for tf32. A lies
// as [16, depth] or, transposed, as [depth, 16]; so does B, for two neighbouring tiles of 8
// columns. What a lane reads begins so many elements behind the first, wherever the fragment lies.
template <bool kTransposed, typename S>
__device__ __forceinline__ unsigned lane_in_a(unsigned lda) {
  const unsigned lane = gpu::lane_id(), row = lane % 8, odd = lane / 8 % 2, high = lane / 16;
  if constexpr (kTransposed && sizeof(S) == 4) return lane % 4 * lda + lane / 4;
  if constexpr (kTransposed) return (row + 8 * high) * lda + 8 * odd;
  return (row + 8 * odd) * lda + kUnit / sizeof(S) * high;
}

template <bool kTransposed, typename S>
__device__ __forceinline__ unsigned lane_in_b(unsigned ldb) {
  const unsigned lane = gpu::lane_id(), row = lane % 8, odd = lane / 8 % 2, high = lane / 16;
  if constexpr (kTransposed && sizeof(S) == 4) return lane % 4 * ldb + lane / 4;
  if constexpr (kTransposed) return (row + 8 * odd) * ldb + 8 * high;
  return (row + 8 * high) * ldb + kUnit / sizeof(S) * odd;
}

// From the lane's own address.
template <bool kTransposed, typename S>
__device__ __forceinline__ void load_a(std::uint32_t (&r)[4], const S* a, int lda) {
  if constexpr (sizeof(S) == 2 && kTransposed)
    gpu::ldmatrix_x4_trans(r, a);
  else if constexpr (!kTransposed)
    gpu::ldmatrix_x4(r, a);
  else
    for (int i = 0; i < 4; ++i) r[i] = __float_as_uint(a[4 * (i / 2) * lda + 8 * (i % 2)]);
}

template <bool kTransposed, typename S>
__device__ __forceinline__ void load_b(std::uint32_t (&r)[4], const S* b, int ldb) {
  if constexpr (sizeof(S) == 2 && kTransposed)
    gpu::ldmatrix_x4_trans(r, b);
  else if constexpr (!kTransposed)
    gpu::ldmatrix_x4(r, b);
  else
    for (int i = 0; i < 4; ++i) r[i] = __float_as_uint(b[4 * (i % 2) * ldb + 8 * (i / 2)]);
}

// sum[j] += A B for the first `tiles` tiles (an even number) of 8 columns, or for all. A lies as
// [16, depth] or, transposed, as [depth, 16]; B as [8 tiles, depth] or, transposed, as
// [depth, 8 tiles]. depth is a multiple of 16, and a constant for all tiles.
template <Precision kPrecision, int kTiles, bool kATransposed, bool kBTransposed, bool kAll,
          typename S, typename T>
__device__ __forceinline__ void multiply_tiles(T (&sum)[kTiles][4], const S* a, int lda, const S* b,
                                               int ldb, int depth, int tiles) {
  if constexpr (kPrecision != Precision::kF64 && kPrecision != Precision::kF32) {
    constexpr int kStep = sizeof(S) == 2 ? 16 : 8;
    [[maybe_unused]]  // by g++
    constexpr int kSteps = !kAll            ? 1
                           : sizeof(S) == 2 ? 256
                                            : 2;  // tf32 runs out of registers
    a += lane_in_a<kATransposed, S>(lda);
    b += lane_in_b<kBTransposed, S>(ldb);
#pragma unroll kSteps
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

// kDepth: the usual depth, for which a product of all tiles asks nothing and has no loop.
template <Precision kPrecision, int kTiles, bool kATransposed, bool kBTransposed,
          int kDepth = piece_columns(kPrecision), typename S, typename T>
__device__ __forceinline__ void multiply(T (&sum)[kTiles][4], const S* a, int lda, const S* b,
                                         int ldb, int depth, int tiles) {
  if constexpr (!is_direct(kPrecision))
    if (tiles >= kTiles && depth == kDepth)
      return multiply_tiles<kPrecision, kTiles, kATransposed, kBTransposed, true>(
          sum, a, lda, b, ldb, kDepth, tiles);
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

constexpr unsigned kUnitsOfPiece = 16;  // that many threads have a row's

// Columns [0, columns) of `rows` rows, from global to shared memory by the whole block, without
// waiting for it.
template <typename S>
__device__ __forceinline__ void fetch_rows(S* to, int ld_to, const S* from, int64_t ld_from,
                                           int rows, int columns, unsigned threads = blockDim.x) {
  constexpr int kCount = Unit<S>::kCount;
  const int first_row = threadIdx.x / kUnitsOfPiece, step = threads / kUnitsOfPiece;
  for (int column = threadIdx.x % kUnitsOfPiece * kCount; column < columns;
       column += kUnitsOfPiece * kCount) {
    S* const shared = to + first_row * ld_to + column;
    const S* const global = from + first_row * ld_from + column;
#pragma unroll
    for (int row = 0; row < rows; row += step)
      if (rows % step == 0 || first_row + row < rows)
        gpu::cp_async16(shared + row * ld_to, global + row * ld_from);
  }
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
  constexpr int kCount = Unit<S>::kCount, kRows = kWarp / kUnitsOfPiece;
  const unsigned lane = gpu::lane_id();
  for (int column = lane % kUnitsOfPiece * kCount; column < width;
       column += kUnitsOfPiece * kCount) {
    const Unit<S> unit = load_unit(anchor + column);
    const int cell = lane / kUnitsOfPiece * ld + column;
#pragma unroll
    for (int row = 0; row < kKeysOfWarp; row += kRows)
      store_unit(to + cell + row * ld,
                 hidden_unit<kPrecision>(unit, load_unit(x + cell + row * ld)));
  }
}

}  // namespace
}  // namespace crrcd::cuda
