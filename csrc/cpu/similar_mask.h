// similar_mask on the CPU: a bit for each negative whose product with a query is above a threshold.
#pragma once

#include "../similar_arguments.h"

namespace crrcd {

at::Tensor similar_mask_cpu(const at::Tensor& query, const at::Tensor& bank,
                            const std::optional<at::Tensor>& index, double threshold);

}  // namespace crrcd
