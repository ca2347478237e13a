// Plain description of a call of difference_nce on a GPU, or of a segment of its negatives. Shared
// by the host entry, which allocates and fills it, and by the kernels, which never see a torch
// header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../bank.h"
#include "relation_layout.h"

namespace crrcd::cuda {

constexpr double kLeftOutLogit = -1e30;  // of what does not count: no exponential of it is left

// Anchors, and queries, that a block compares with a tile of keys; float64 has half as many.
template <typename T>
constexpr int kDifferenceChunk = sizeof(T) == 4 ? 64 : 32;
constexpr int kDifferenceKeys = 32;  // of a tile

// Matrices are contiguous, row major; what belongs to a pair (query b, anchor a) lies in [Bp, Ap],
// sizes up to whole chunks. Logits are in units of log 2. An entry is a negative: of all queries
// (shared), or entry b K + k of query b (own).
//
// Differences do not know where the origin is: in sums rows are seen from the anchors' middle,
// where they are short and cancel as little as they can. eps is part of it for all but anchors, or
// taken from the anchor where there is one.
template <typename T>
struct DifferenceParams {
  int64_t A = 0, B = 0, K = 0, D = 0, N = 0;
  int64_t Ap = 0, Bp = 0;
  Pass pass = Pass::kNce;
  bool need_query = false, need_anchor = false;

  BankView bank;              // with the index of shared negatives
  Storage operand;            // what a row is rounded to before it is compared
  const T* origin = nullptr;  // [D]: the anchors' middle, or less eps
  // each query's own negatives: that of (b, k) is own[b * own_stride + k * own_step]
  const int64_t* own = nullptr;
  int64_t own_stride = 0, own_step = 0;

  // as they came, for differences that must be exact
  const T* query = nullptr;     // [B, D]
  const T* positive = nullptr;  // [B, D]
  const T* anchor = nullptr;    // [A, D]
  T eps = 0;
  const T* query_seen = nullptr;     // [B, D]: query - origin
  const T* anchor_seen = nullptr;    // [A, D]: anchor - middle, or less eps
  const T* query_square = nullptr;   // [B]: |query_seen|^2
  const T* anchor_square = nullptr;  // [A]
  // of two-byte operands as they came
  const T* query_raw_square = nullptr;   // [B]
  const T* anchor_raw_square = nullptr;  // [A]
  const T* anchor_sum = nullptr;         // [A]

  // u = query - anchor + eps, v = positive - anchor + eps; written by difference_pairs
  T* half_square = nullptr;       // |u|^2 / 2
  T* inverse = nullptr;           // 1 / |u|, 0 where it vanishes
  T* inverse_positive = nullptr;  // 1 / |v|
  T* cosine = nullptr;            // <u, v> / (|u| |v|)
  bool* near = nullptr;           // |u| is so small that sums would cancel
  // near pairs that count, b Ap + a each, in order; those of query b from near_begin[b] on
  const int64_t* near_begin = nullptr;  // [B + 1]
  int64_t* near_pair = nullptr;         // [B A], written by difference_near

  const T* slope = nullptr;        // scale / (|u| log 2)
  const T* offset = nullptr;       // added to a logit; kLeftOutLogit for a pair that does not count
  const T* gram_offset = nullptr;  // the same, and kLeftOutLogit for near pairs

  // masks; null when there is nothing to mask
  const int64_t* anchor_id = nullptr;    // [A]
  const int64_t* query_id = nullptr;     // [B]
  const int64_t* key_id = nullptr;       // [N], null: the row's position in the bank
  const int64_t* query_label = nullptr;  // [B]
  const int64_t* key_label = nullptr;    // [N]
  Excluded excluded;                     // by position among all negatives of the call

  // This segment of the negatives: k in [first, first + count)
  int64_t first = 0, count = 0;
  bool accumulate = false;  // sums go on from another segment

  // Blocks of difference_tiles: anchor chunks x groups x chunks. A group is a chunk of queries that
  // share their negatives, or a range of queries with their own.
  int64_t groups = 1, chunks = 1;
  // Blocks of difference_exact, each with a slice of d_query and d_anchor behind those of the tiles
  int64_t exact_blocks = 0;

  // sums, a slice a block, added up in their order
  double* scalars = nullptr;     // [blocks, 3]: loss, sum of g, sum of g cosine (exact ones alone)
  T* sum_inverse = nullptr;      // [chunks, Bp, Ap]: of g / |w|
  T* sum_along = nullptr;        // [chunks, Bp, Ap]: of g <u, w> / |w|
  T* d_query = nullptr;          // [anchor chunks x chunks + exact blocks, B, D]: of W m
  T* d_anchor = nullptr;         // [groups x chunks + exact blocks, A, D]: of Y m, as -d anchor
  T* sum_y = nullptr;            // [groups x chunks, Ap]
  T* d_rows = nullptr;           // [row parts, entries, D] or null: gradient of the segment's rows
  uint64_t* near_key = nullptr;  // [anchor chunks, entries]: bit a of the chunk, |w| is small
  T* running_max = nullptr;      // [chunks + exact blocks, Bp, Ap] (kLogSumExp)
  T* running_sum = nullptr;      // the same

  // read by difference_finish, [Bp, Ap]
  const T* c = nullptr;  // sum over keys of c_abn, exact ones apart
  const T* e = nullptr;  // sum over keys of e_abn, exact ones apart
  const T* c_positive = nullptr;
  const T* e_positive = nullptr;
  const T* f_positive = nullptr;
  const T* total_query = nullptr;   // [B, D]: sum of W m
  const T* total_anchor = nullptr;  // [A, D]: sum of Y m
  const T* total_y = nullptr;       // [Ap]
  T* out_query = nullptr;           // [B, D] or null
  T* out_positive = nullptr;        // [B, D] or null
  T* out_anchor = nullptr;          // [A, D] or null
};

// Each starts its kernels on the stream.
template <Precision kPrecision>
struct DifferenceKernels {
  using Params = DifferenceParams<SumOf<kPrecision>>;
  static void pairs(const Params& params, void* stream);
  static void near(const Params& params, void* stream);     // near_pair
  static void segment(const Params& params, void* stream);  // of the negatives
  static void finish(const Params& params, void* stream);
};

}  // namespace crrcd::cuda
