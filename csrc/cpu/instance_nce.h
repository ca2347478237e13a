// instance_nce on the CPU: loss and gradients of a batch of queries against the rows of a bank.
#pragma once

#include "../instance_arguments.h"

namespace crrcd {

InstanceResult instance_nce_cpu(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& bank,
    const at::Tensor& scale, const at::Tensor& offset, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, const std::string& objective,
    const std::optional<at::Tensor>& weights, const std::string& reduction, int64_t need);

InstanceResult instance_nce_update_cpu(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& bank,
    const at::Tensor& scale, const at::Tensor& offset, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, const std::string& objective,
    const std::optional<at::Tensor>& weights, const std::string& reduction, int64_t need,
    const at::Tensor& update_index, const at::Tensor& update_value, double momentum,
    bool normalize);

// The order of each query's own negatives, for tests: "direct", "bucketed" or "" to choose by size.
// The bank's gradient is always computed in the bucketed order.
void set_instance_order(const std::string& order);

}  // namespace crrcd
