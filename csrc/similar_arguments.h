// The arguments of similar_mask, checked; the same on every device.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace crrcd {

struct SimilarArguments {
  at::Tensor query, bank;
  at::Tensor index;  // undefined, [K] contiguous, or [B, K] of any strides
  double threshold;
  int64_t B, K, D, N;

  bool own() const { return index.defined() && index.dim() == 2; }
  // of 32 bits, for each query
  int64_t words() const { return (K + 31) / 32; }
};

// Shapes and dtypes: queries of float32 or float64, which products have too. Whether the index
// stays within the bank is the device's own question.
SimilarArguments similar_arguments(const at::Tensor& query, const at::Tensor& bank,
                                   const std::optional<at::Tensor>& index, double threshold);

}  // namespace crrcd
