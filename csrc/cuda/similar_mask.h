// similar_mask on a GPU.
#pragma once

#include "../similar_arguments.h"

namespace crrcd::cuda {

at::Tensor similar_mask(const at::Tensor& query, const at::Tensor& bank,
                        const std::optional<at::Tensor>& index, double threshold);

}  // namespace crrcd::cuda
