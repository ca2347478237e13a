// Plain description of a call of relation_nce on a GPU, or of a segment of its keys. Shared by the
// host entry, which allocates and fills it, and by the kernels, which never see a torch header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../bank.h"
#include "relation_layout.h"

namespace crrcd::cuda {

// The offset of what does not count: no exponential of it is left.
constexpr double kLeftOut = 1e30;

// A norm by W'W is taken from W where it has cancelled to less than this share of its terms.
constexpr double kCancelled = 1.0 / 16;

// Matrices are contiguous, row major. Operands of products (void) hold what the precision
// multiplies; sums, and what is only added or scaled, are T. Hp, Rp, Bp, Kp, Dp: sizes with the
// zeros behind them.
template <typename T>
struct RelationNceParams {
  Pass pass = Pass::kNce;
  int64_t A = 0, B = 0, D = 0, N = 0;
  int64_t keys = 0, first_key = 0;  // of this segment, among the K of the call
  int64_t Kp = 0;                   // rows of x
  int H = 0, R = 0, Hp = 0, Rp = 0, Bp = 0;
  bool accumulate = false;  // sums go on from another segment
  T boost = 1;              // of what is stored narrow: slopes, and all that is made of them

  // rows of the bank, and what makes keys of them
  BankView bank;                     // index of all K
  const void* key_weight = nullptr;  // [Hp up to a piece, Dp], null: rows are keys
  int Dp = 0;
  void* x = nullptr;  // [Kp, Hp]

  // masks
  const int64_t* query_id = nullptr;     // [B]
  const int64_t* key_id = nullptr;       // [N], null: the row's position in the bank
  const int64_t* query_label = nullptr;  // [B]
  const int64_t* key_label = nullptr;    // [N]
  Excluded excluded;                     // by position among all negatives of the call
  uint64_t* keep = nullptr;              // [panels of queries, Kp] a bit a query; null: all

  const void* anchor = nullptr;  // [A, Hp]
  const void* weight = nullptr;  // [Rp, Hp]
  const T* bias = nullptr;       // [Rp] or null
  const void* qw = nullptr;      // [A, Bp, Hp]: Q W; [A, Bp, Rp]: Q, for the direct form
  const T* qc = nullptr;         // [A, Bp] or null: Q c
  const void* gram = nullptr;    // [Hp up to a piece, Hp]: W'W
  const T* gram_bias = nullptr;  // [Hp] or null: W'c
  // For norms by W'W, two numbers: the least |W hid|^2 / |hid|^2 that its rounding leaves right,
  // and |c|^2 or null
  const T* gram_least = nullptr;
  const T* bias_square = nullptr;
  const T* offset = nullptr;  // [A, Bp], in units of log 2; kLeftOut for what does not count
  const T* scale = nullptr;   // a number

  // Of the pass over (anchor, key): `chunks` ranges of tiles
  LogitLayout logit_layout;
  bool keys_first = false;  // the pass over (key tile, anchor) has been there and left the norms
  int64_t chunks = 1;
  bool need_query = false, need_offset = false, live = false;
  double* scalars = nullptr;  // [blocks, 4]: loss, sum of g cosine, sum of g, sum of c
  T* d_qw = nullptr;          // [chunks, A, Bp, Hp]; of Q, [chunks, A, Bp, Rp], for the direct form
  T* d_logit = nullptr;       // [chunks, warps, A, Bp] or null: sums of slopes
  T* running_max = nullptr;   // [chunks, warps, A, Bp], of log 2 (InfoNCE's first sweep)
  T* running_sum = nullptr;   // the same
  T* inverse_norm = nullptr;  // [A, Kp] 1 / |w| (live)
  T* c = nullptr;             // [panels of queries, A, Kp] (live): d |w|^2 / 2

  // Of the pass over (key tile, anchor)
  KeyLayout key_layout;
  int64_t key_blocks = 1, anchor_parts = 1;
  T* d_x = nullptr;       // [anchor_parts, Kp, Hp]
  T* d_anchor = nullptr;  // [key_blocks, A, Hp]

  // The direct form's, which makes all of these
  DirectLayout direct_layout;
  T* d_weight = nullptr;  // [anchor_parts key_blocks, Rp, Hp]
  T* d_bias = nullptr;    // [anchor_parts key_blocks, Rp] or null

  // Of the pass for G's gradient
  GramLayout gram_layout;
  int64_t gram_chunks = 1;
  T* d_gram = nullptr;      // [gram_chunks, Hp up to 64, Hp], of which only the lower triangle
  T* hidden_sum = nullptr;  // [gram_chunks, Hp up to 64] or null: sums of c hid

  CRRCD_BOTH int64_t query_panels() const { return Bp / panel_rows(logit_layout.precision); }
};

// Each starts its kernels for one segment of keys on the stream.
template <Precision kPrecision>
struct RelationNceKernels {
  using Params = RelationNceParams<SumOf<kPrecision>>;
  static void project(const Params& params, void* stream);  // x and keep
  static void logits(const Params& params, void* stream);
  static void keys(const Params& params, void* stream);
  static void weight(const Params& params, void* stream);
};

}  // namespace crrcd::cuda
