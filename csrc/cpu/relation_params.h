// Plain description of one pass over the negatives. Shared by the host entries, which allocate and
// fill it, and by the kernels, which never see a torch header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../bank.h"

namespace crrcd {

// How the norm of a relation vector w = W hid + c is computed (see relation_kernel.h).
enum class Form : int {
  kGram = 0,        // |w|^2 = hid' (W'W) hid, and W'W hid is needed for the gradient of hid
  kTriangular = 1,  // |w|^2 = |T hid|^2 with W = (orthogonal) T; enough when keys have no gradient
  kDirect = 2,      // w itself, cheaper when R is much smaller than H
};

// Below this share of the expected squared norm the Gram form has lost digits to cancellation and
// the norm is recomputed from w itself.
constexpr double kCancellation = 0.05;

// The natural logarithm of 2.
constexpr double kLog2 = 0.69314718055994530942;

// Matrices are row major; a leading dimension ("ld") is an odd number of cache lines so that
// columns of a block spread over all cache sets, and what lies between the true and the padded size
// is zero.
template <typename T>
struct NceParams {
  int64_t A = 0, B = 0, K = 0, H = 0, R = 0, D = 0;
  int64_t Bp = 0, Hp = 0, Rp = 0, Dp = 0;      // padded to the vector width
  int64_t ldB = 0, ldH = 0, ldR = 0, ldD = 0;  // row strides
  int64_t tile = 0;                            // keys of a tile, a multiple of 64
  int64_t tiles_per_chunk = 0;                 // tiles that share one sweep over the anchors
  int64_t key_parts = 1, anchor_parts = 1;     // the work is cut into key_parts x anchor_parts
  Form form = Form::kGram;
  Pass pass = Pass::kNce;
  bool need_query = false;   // d_qw (Gram, triangular) or d_q (direct)
  bool need_key = false;     // d_rows or d_key_weight
  bool need_anchor = false;  // d_anchor
  bool need_weight = false;  // d_gram or d_w: weight or bias

  BankView bank;
  bool projected = true;            // rows already have width H
  const T* key_weight = nullptr;    // [Hp, ldD]
  const T* key_weight_t = nullptr;  // [Dp, ldH]

  const T* anchor = nullptr;  // [A, ldH]
  const T* pair = nullptr;    // [A, ldB], the weight of a pair that counts, 0 for another
  T scale = 1;
  // of logits in units of log 2: powers of two are cheaper than those of e
  T scale_log2 = 1, offset_log2 = 0;
  T gradient_scale = 1;  // 1 / number of pairs where every gradient is that of the mean

  // Gram and triangular form
  const T* norm_matrix = nullptr;  // [Hp, ldH]: W'W, or T' (row h, column i holds T[i, h])
  const T* norm_bias = nullptr;    // [ldH]: W'c, or the top of the column that c adds to T; or null
  T norm_constant = 0;             // |c|^2, or the square of what c adds below T
  const T* qw = nullptr;           // [A, Bp, ldH]: query W
  const T* qw_t = nullptr;         // [A, Hp, ldB]
  const T* qc = nullptr;           // [A, ldB]: <query, c>, or null
  T cancellation = 0;              // squared norms below cancellation * |hid|^2 are recomputed

  // bfloat16 operands as pairs along the summed dimension, where the instruction set multiplies
  // them
  bool pairs = false;
  const uint32_t* norm_pairs = nullptr;  // [Hp / 2, ldH]
  const uint32_t* qw_pairs = nullptr;    // [A, Bp / 2, ldH]
  const uint32_t* qw_t_pairs = nullptr;  // [A, Hp / 2, ldB]

  // direct form, and the recomputation of cancelled norms
  const T* weight = nullptr;    // [Rp, ldH]
  const T* weight_t = nullptr;  // [Hp, ldR]
  const T* bias = nullptr;      // [ldR] or null
  const T* q = nullptr;         // [A, Bp, ldR]
  const T* q_t = nullptr;       // [A, Rp, ldB]

  // masks; null when there is nothing to mask
  const int64_t* query_id = nullptr;     // [B]
  const int64_t* key_id = nullptr;       // [N], null: the row's position in the bank
  const int64_t* query_label = nullptr;  // [B]
  const int64_t* key_label = nullptr;    // [N]
  Excluded excluded;

  // InfoNCE, in units of log 2: read in the second sweep, written (per key part) in the first
  const T* log_normalizer = nullptr;  // [A, ldB]
  T* running_max = nullptr;           // [key_parts, A, ldB]
  T* running_sum = nullptr;           // [key_parts, A, ldB]

  // sums; one slice a part, added up by the host in a fixed order
  double* scalars = nullptr;  // [parts, 4]: loss, d_scale, d_offset, sum of norm coefficients
  double* losses = nullptr;   // [key_parts, A, ldB]: of each pair, unweighted, which `scalars` are
                              // without then; null where the sum is enough (kNce)
  T* d_qw_t = nullptr;        // [key_parts, A, Hp, ldB]   (Gram, triangular)
  T* d_q = nullptr;           // [key_parts, A, Bp, ldR]   (direct)
  T* d_logit = nullptr;       // [key_parts, A, ldB]: sum over keys of the scaled logit gradients
  T* d_anchor = nullptr;      // [key_parts, A, ldH]
  T* d_gram = nullptr;        // [parts, Hp, ldH], lower block triangle (Gram)
  T* d_hid_sum = nullptr;     // [parts, ldH]: sum of coefficient * hid (Gram with bias)
  T* d_w_t = nullptr;         // [parts, Hp, ldR] (direct)
  T* d_bias = nullptr;        // [parts, ldR] (direct)
  T* d_key_weight = nullptr;  // [parts, Hp, ldD]
  T* d_rows = nullptr;        // [anchor_parts, K, D]: gradient of the gathered rows

  std::byte* scratch = nullptr;  // parts * scratch_bytes
  size_t scratch_bytes = 0;
};

// Relation vectors of every (anchor, sample) pair, and their backward.
template <typename T>
struct RelationParams {
  int64_t A = 0, M = 0, H = 0, R = 0;
  int64_t Hp = 0, Rp = 0, ldH = 0, ldR = 0;
  int64_t tile = 0;
  int64_t parts = 1;            // ranges of (anchor, tile) work items
  const T* anchor = nullptr;    // [A, ldH]
  const T* sample = nullptr;    // [M, ldH]
  const T* weight = nullptr;    // [Rp, ldH]
  const T* weight_t = nullptr;  // [Hp, ldR]
  const T* bias = nullptr;      // [ldR] or null
  T* relation = nullptr;        // [A, M, R]; read by backward
  T* inverse_norm = nullptr;    // [A, M]; read by backward
  const T* grad = nullptr;      // [A, M, R]
  bool need_anchor = false, need_sample = false, need_weight = false;
  T* d_anchor = nullptr;  // [parts, A, ldH]
  T* d_sample = nullptr;  // [parts, M, ldH]
  T* d_w_t = nullptr;     // [parts, Hp, ldR]
  T* d_bias = nullptr;    // [parts, ldR]
  std::byte* scratch = nullptr;
  size_t scratch_bytes = 0;
};

template <typename T>
struct InstanceParams;  // instance_params.h

template <typename T>
struct DifferenceParams;  // difference_params.h

template <typename T>
struct SimilarParams;  // similar_params.h

// One instruction set's entry points.
struct Kernels {
  const char* isa;
  int vector_bytes;
  bool bf16_pairs;      // multiplies bfloat16 operands as they are
  bool tile_registers;  // and does so in tile registers
  size_t (*nce_scratch_f32)(const NceParams<float>&);
  size_t (*nce_scratch_f64)(const NceParams<double>&);
  void (*nce_f32)(const NceParams<float>&, int64_t part);
  void (*nce_f64)(const NceParams<double>&, int64_t part);
  size_t (*relation_scratch_f32)(const RelationParams<float>&);
  size_t (*relation_scratch_f64)(const RelationParams<double>&);
  void (*relation_f32)(const RelationParams<float>&, int64_t part);
  void (*relation_f64)(const RelationParams<double>&, int64_t part);
  void (*relation_backward_f32)(const RelationParams<float>&, int64_t part);
  void (*relation_backward_f64)(const RelationParams<double>&, int64_t part);
  size_t (*instance_scratch_f32)(const InstanceParams<float>&);
  size_t (*instance_scratch_f64)(const InstanceParams<double>&);
  void (*instance_f32)(const InstanceParams<float>&, int64_t part);
  void (*instance_f64)(const InstanceParams<double>&, int64_t part);
  void (*similar_f32)(const SimilarParams<float>&, int64_t part);
  void (*similar_f64)(const SimilarParams<double>&, int64_t part);
  size_t (*difference_scratch_f32)(const DifferenceParams<float>&);
  size_t (*difference_scratch_f64)(const DifferenceParams<double>&);
  void (*difference_pairs_f32)(const DifferenceParams<float>&, int64_t part);
  void (*difference_pairs_f64)(const DifferenceParams<double>&, int64_t part);
  void (*difference_f32)(const DifferenceParams<float>&, int64_t part, std::byte* scratch);
  void (*difference_f64)(const DifferenceParams<double>&, int64_t part, std::byte* scratch);
  void (*difference_finish_f32)(const DifferenceParams<float>&, int64_t part);
  void (*difference_finish_f64)(const DifferenceParams<double>&, int64_t part);
};

}  // namespace crrcd
