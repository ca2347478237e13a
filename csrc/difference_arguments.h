// The arguments of difference_nce, checked; the same on every device.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <ATen/core/Tensor.h>
#include "checks.h"

namespace crrcd {

// loss, d_query, d_positive, d_anchor, d_bank, d_scale, d_offset; empty where nobody needs it.
using DifferenceResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Bits of `need`, in the order of the gradients returned.
enum DifferenceNeed : int64_t {
  kDifferenceQuery = 1,
  kDifferencePositive = 2,
  kDifferenceAnchor = 4,
  kDifferenceBank = 8,
  kDifferenceScale = 16,
  kDifferenceOffset = 32,
};

struct DifferenceArguments : Reduced {
  at::Tensor query, positive, anchor, bank, scale, offset;
  at::Tensor index;  // undefined, [K] contiguous, or [B, K] of any strides
  at::Tensor anchor_id, query_id, key_id, query_label, key_label;
  at::Tensor excluded;  // undefined or [B, words] contiguous: bits of negatives, by their position
  bool self_pairs, infonce;
  double eps;
  int64_t need;
  at::ScalarType dtype;  // of query, positive and anchor
  int64_t A, B, K, D, N;

  bool needs(int64_t bits) const { return (need & bits) != 0; }
  bool own() const { return index.defined() && index.dim() == 2; }
};

// Shapes and dtypes; whether the index stays within the bank is the device's own question.
// with_half: float16 operands are fine.
DifferenceArguments difference_arguments(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& anchor,
    const at::Tensor& bank, const at::Tensor& scale, const at::Tensor& offset,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& anchor_id,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, bool self_pairs, double eps,
    const std::string& objective, const std::optional<at::Tensor>& weights,
    const std::string& reduction, int64_t need, bool with_half);

}  // namespace crrcd
