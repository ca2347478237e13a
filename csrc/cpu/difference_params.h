// Plain description of one call of difference_nce. Shared by the host entry, which allocates and
// fills it, and by the kernels, which never see a torch header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "relation_params.h"

namespace crrcd {

// What a pass computes beyond the loss.
enum class Want : int {
  kLoss = 0,   // nothing
  kQuery = 1,  // the sums that the gradients of query, scale and offset need
  kKeys = 2,   // those of anchor and bank as well
};

// Matrices are row major, zero between true and padded size; strides are in elements. What belongs
// to a pair (query b, anchor a) lies in [B, ldA]. Logits are in units of log 2: a power of two is
// cheaper than one of e, and the factor goes into the slopes.
template <typename T>
struct DifferenceParams {
  int64_t A = 0, B = 0, K = 0, D = 0;
  int64_t Ap = 0, Dp = 0;    // padded to the vector width
  int64_t ldA = 0, ldD = 0;  // row strides
  int64_t tile = 0;          // keys, or rows of the bank, of a tile; a multiple of 64
  int64_t parts = 1;         // ranges of keys, or of rows of the bank
  int64_t pair_parts = 1;    // ranges of queries and of anchors
  Pass pass = Pass::kNce;
  Want want = Want::kLoss;
  bool need_query = false, need_bank = false;
  bool each = false;  // every query has sums of its own, unweighted,
  int64_t sums = 1;   // which are as many in a part, or one of all

  BankView bank;           // with the index of shared negatives
  bool as_stored = false;  // its rows are of type T and have width Dp
  // each query's own negatives: query << bucket_shift | row within the bucket, sorted by bucket.
  // Those of bucket t begin at bucket_begin[t], those of part i at part_begin[i].
  const uint32_t* entries = nullptr;
  const int64_t* bucket_begin = nullptr;  // [buckets + 1]
  const int64_t* part_begin = nullptr;    // [parts + 1]
  int64_t buckets = 0;
  int64_t most = 0;  // entries of a bucket
  int bucket_shift = 0;

  // as they came, for differences that must be exact
  const T* query = nullptr;     // [B, ldD]
  const T* positive = nullptr;  // [B, ldD]
  const T* anchor = nullptr;    // [A, ldD]
  const T* eps = nullptr;       // [ldD]: eps up to D
  // Differences do not know where the origin is. In the anchors' middle the vectors are short, and
  // sums over them cancel as little as they can. eps is in it for queries and keys, or taken from
  // the anchor where there is one.
  const T* origin = nullptr;         // [ldD]: the middle, or less eps
  const T* query_seen = nullptr;     // [B, ldD]: query - origin
  const T* anchor_seen = nullptr;    // [A, ldD]: anchor - middle, or less eps
  const T* anchor_seen_t = nullptr;  // [Dp, ldA]
  const T* query_square = nullptr;   // [B]: |query_seen|^2
  const T* anchor_square = nullptr;  // [ldA]

  // written by difference_pairs, for u = query - anchor + eps and v = positive - anchor + eps
  T* half_square = nullptr;       // |u|^2 / 2
  T* half_square_far = nullptr;   // (|u|^2 - |query_seen|^2) / 2
  T* inverse = nullptr;           // 1 / |u|, 0 where it vanishes
  T* inverse_positive = nullptr;  // 1 / |v|
  T* cosine = nullptr;            // <u, v> / (|u| |v|)
  uint8_t* near = nullptr;        // 1 where |u| is so small that sums would cancel

  const T* slope = nullptr;  // scale / (|u| log 2)
  // 1 + 2^logit <= 2^logit_bits for every logit, none of which is below -120 unless its pair does
  // not count; 0: not known
  int logit_bits = 0;
  T most_u = 0, most_inverse = 0;  // the largest |u| and 1 / |u|
  // keys whose squares, seen from the origin, lie between these are compared by distances
  T least_square = 0, most_square = std::numeric_limits<T>::infinity();
  const T* slope_weight = nullptr;  // [B]: weight of a pair that counts / slope
  // scale / (|u| pairs), times the query's weight; 0 for a pair that does not count
  const T* weight = nullptr;
  const T* offset = nullptr;       // added to a logit; -1e30 for a pair that does not count
  const T* gram_offset = nullptr;  // the same, and -1e30 for near pairs
  // near pairs that count, by query: anchors near_anchor[near_begin[b]] and on
  const int64_t* near_begin = nullptr;  // [B + 1]
  const int32_t* near_anchor = nullptr;

  // masks; null when there is nothing to mask
  const int64_t* anchor_id = nullptr;    // [A]
  const int64_t* query_id = nullptr;     // [B]
  const int64_t* key_id = nullptr;       // [N], null: the row's position in the bank
  const int64_t* query_label = nullptr;  // [B]
  const int64_t* key_label = nullptr;    // [N]
  Excluded excluded;

  // sums; one slice a part, added up by the host in a fixed order
  double* scalars = nullptr;  // [parts, sums, 2]: loss, sum of logit gradients
  T* running_max = nullptr;   // [parts, B, ldA] (kLogSumExp)
  T* running_sum = nullptr;   // [parts, B, ldA]
  T* sum_inverse = nullptr;   // [parts, B, ldA]: of g / |w|
  T* sum_along = nullptr;     // [parts, B, ldA]: of g <u, w> / |w|
  T* d_query = nullptr;       // [parts, B, ldD]: of W m
  T* d_anchor = nullptr;      // [parts, A, ldD]: of (f - Y) m
  T* sum_f = nullptr;         // [parts, ldA]
  T* d_rows = nullptr;        // [K, D], shared: gradient of the gathered rows
  T* d_bank = nullptr;        // [N, D], each query's own

  // read by difference_finish, which adds the pairs' own terms to d_query and d_anchor (first
  // slices) and writes d_positive
  const T* c = nullptr;           // sum over keys of c_abn, without those of exact differences
  const T* c_positive = nullptr;  // the same of the positive
  const T* e = nullptr;           // sum over keys of e_abn
  const T* e_positive = nullptr;
  const T* f_positive = nullptr;
  T* d_positive = nullptr;  // [B, ldD]
};

}  // namespace crrcd
