// The relation operator on the CPU: unit relation vectors of every (anchor, sample) pair.
#pragma once

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace crrcd {

std::tuple<at::Tensor, at::Tensor> relation_cpu(const at::Tensor& anchor, const at::Tensor& sample,
                                                const at::Tensor& weight,
                                                const std::optional<at::Tensor>& bias);

// need: bits 1 anchor, 2 sample, 4 weight, 8 bias.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relation_backward_cpu(
    const at::Tensor& grad, const at::Tensor& relation, const at::Tensor& inverse_norm,
    const at::Tensor& anchor, const at::Tensor& sample, const at::Tensor& weight, int64_t need);

}  // namespace crrcd
