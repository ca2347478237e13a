// The arguments of instance_nce, checked; the same on every device.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <ATen/core/Tensor.h>
#include "checks.h"

namespace crrcd {

// loss, d_query, d_positive, d_bank, d_scale, d_offset; empty where nobody needs it.
using InstanceResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Bits of `need`, in the order of the gradients returned.
enum InstanceNeed : int64_t {
  kInstanceQuery = 1,
  kInstancePositive = 2,
  kInstanceBank = 4,
  kInstanceScale = 8,
  kInstanceOffset = 16,
};

struct InstanceArguments : Reduced {
  at::Tensor query, positive, bank, scale, offset;
  at::Tensor index;  // undefined, [K] contiguous, or [B, K] of any strides
  at::Tensor query_id, key_id, query_label, key_label;
  at::Tensor excluded;  // undefined or [B, words] contiguous: bits of negatives, by their position
  bool infonce;
  int64_t need;
  at::ScalarType dtype;  // of query and positive
  int64_t B, K, D, N;

  bool needs(int64_t bits) const { return (need & bits) != 0; }
  bool own() const { return index.defined() && index.dim() == 2; }
};

// Shapes and dtypes; whether the index stays within the bank is the device's own question.
// with_half: float16 operands are fine.
InstanceArguments instance_arguments(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& bank,
    const at::Tensor& scale, const at::Tensor& offset, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, const std::string& objective,
    const std::optional<at::Tensor>& weights, const std::string& reduction, int64_t need,
    bool with_half);

}  // namespace crrcd
