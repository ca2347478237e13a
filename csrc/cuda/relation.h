// The relation operator on a GPU: unit relation vectors of every (anchor, sample) pair.
#pragma once

#include "../relation_arguments.h"

namespace crrcd::cuda {

std::tuple<at::Tensor, at::Tensor> relation(const at::Tensor& anchor, const at::Tensor& sample,
                                            const at::Tensor& weight, const OptionalTensor& bias);

// need: bits 1 anchor, 2 sample, 4 weight, 8 bias.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relation_backward(
    const at::Tensor& grad, const at::Tensor& relation, const at::Tensor& inverse_norm,
    const at::Tensor& anchor, const at::Tensor& sample, const at::Tensor& weight, int64_t need);

}  // namespace crrcd::cuda
