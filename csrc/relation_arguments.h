// The arguments of relation_nce, checked; the same on every device.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <ATen/core/Tensor.h>
#include "checks.h"

namespace crrcd {

// loss, d_query, d_positive, d_anchor, d_bank, d_key_weight, d_weight, d_bias, d_scale, d_offset;
// empty where nobody needs it.
using NceResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                             at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

// Bits of `need`, in the order of the gradients returned.
enum Need : int64_t {
  kNeedQuery = 1,
  kNeedPositive = 2,
  kNeedAnchor = 4,
  kNeedBank = 8,
  kNeedKeyWeight = 16,
  kNeedWeight = 32,
  kNeedBias = 64,
  kNeedScale = 128,
  kNeedOffset = 256,
};

struct RelationArguments : Reduced {
  at::Tensor query, positive, anchor, bank, weight, scale, offset;
  at::Tensor bias, key_weight;  // undefined where there is none
  at::Tensor index;             // undefined or [K] contiguous
  at::Tensor anchor_id, query_id, key_id, query_label, key_label;
  at::Tensor excluded;  // undefined or [B, words] contiguous: bits of negatives, by their position
  bool self_pairs, infonce;
  int64_t need;
  at::ScalarType dtype;  // of the operands
  int64_t A, B, K, H, R, D, N;

  bool needs(int64_t bits) const { return (need & bits) != 0; }

  // With so few rows or columns of W most norms cancel, which hidden units rounded to bfloat16 or
  // tf32 would show; and narrower products save nothing.
  bool narrow() const { return H < kFewest || R < kFewest; }
  static constexpr int64_t kFewest = 6;
};

// Shapes and dtypes; whether the index stays within the bank is the device's own question.
// with_half: float16 operands are fine.
RelationArguments relation_arguments(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& anchor,
    const at::Tensor& bank, const at::Tensor& weight, const OptionalTensor& bias,
    const at::Tensor& scale, const at::Tensor& offset, const OptionalTensor& index,
    const OptionalTensor& key_weight, const OptionalTensor& anchor_id,
    const OptionalTensor& query_id, const OptionalTensor& key_id, const OptionalTensor& query_label,
    const OptionalTensor& key_label, const OptionalTensor& excluded, bool self_pairs,
    const std::string& objective, const OptionalTensor& weights, const std::string& reduction,
    int64_t need, bool with_half);

// Shapes and dtypes of the relation operator; the dtype of its operands.
at::ScalarType check_relation(const at::Tensor& anchor, const at::Tensor& sample,
                              const at::Tensor& weight, const OptionalTensor& bias, bool with_half);

// t with NaN for its infinities: relu, which keeps that, might cut them to 0.
at::Tensor nan_for_infinity(const at::Tensor& t);

// bool [A, B], true for the pairs (anchor, query) that count. Ids may be undefined.
at::Tensor pair_mask(int64_t anchors, int64_t queries, const at::Tensor& anchor_id,
                     const at::Tensor& query_id, bool self_pairs, at::Device device);

}  // namespace crrcd
