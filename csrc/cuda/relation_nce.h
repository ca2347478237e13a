// relation_nce on a GPU.
#pragma once

#include "../relation_arguments.h"

namespace crrcd::cuda {

NceResult relation_nce(const at::Tensor& query, const at::Tensor& positive,
                       const at::Tensor& anchor, const at::Tensor& bank, const at::Tensor& weight,
                       const OptionalTensor& bias, const at::Tensor& scale,
                       const at::Tensor& offset, const OptionalTensor& index,
                       const OptionalTensor& key_weight, const OptionalTensor& anchor_id,
                       const OptionalTensor& query_id, const OptionalTensor& key_id,
                       const OptionalTensor& query_label, const OptionalTensor& key_label,
                       const OptionalTensor& excluded, bool self_pairs,
                       const std::string& objective, const OptionalTensor& weights,
                       const std::string& reduction, int64_t need);

NceResult relation_nce_update(const at::Tensor& query, const at::Tensor& positive,
                              const at::Tensor& anchor, const at::Tensor& bank,
                              const at::Tensor& weight, const OptionalTensor& bias,
                              const at::Tensor& scale, const at::Tensor& offset,
                              const OptionalTensor& index, const OptionalTensor& key_weight,
                              const OptionalTensor& anchor_id, const OptionalTensor& query_id,
                              const OptionalTensor& key_id, const OptionalTensor& query_label,
                              const OptionalTensor& key_label, const OptionalTensor& excluded,
                              bool self_pairs, const std::string& objective,
                              const OptionalTensor& weights, const std::string& reduction,
                              int64_t need, const at::Tensor& update_index,
                              const at::Tensor& update_value, double momentum, bool normalize);

}  // namespace crrcd::cuda
