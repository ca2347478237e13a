// instance_nce on a GPU.
#pragma once

#include "../instance_arguments.h"

namespace crrcd::cuda {

InstanceResult instance_nce(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& bank,
    const at::Tensor& scale, const at::Tensor& offset, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, const std::string& objective,
    const std::optional<at::Tensor>& weights, const std::string& reduction, int64_t need);

InstanceResult instance_nce_update(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& bank,
    const at::Tensor& scale, const at::Tensor& offset, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, const std::string& objective,
    const std::optional<at::Tensor>& weights, const std::string& reduction, int64_t need,
    const at::Tensor& update_index, const at::Tensor& update_value, double momentum,
    bool normalize);

}  // namespace crrcd::cuda
