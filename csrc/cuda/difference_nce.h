// difference_nce on a GPU.
#pragma once

#include "../difference_arguments.h"

namespace crrcd::cuda {

DifferenceResult difference_nce(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& anchor,
    const at::Tensor& bank, const at::Tensor& scale, const at::Tensor& offset,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& anchor_id,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, bool self_pairs, double eps,
    const std::string& objective, const std::optional<at::Tensor>& weights,
    const std::string& reduction, int64_t need);

DifferenceResult difference_nce_update(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& anchor,
    const at::Tensor& bank, const at::Tensor& scale, const at::Tensor& offset,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& anchor_id,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, bool self_pairs, double eps,
    const std::string& objective, const std::optional<at::Tensor>& weights,
    const std::string& reduction, int64_t need, const at::Tensor& update_index,
    const at::Tensor& update_value, double momentum, bool normalize);

}  // namespace crrcd::cuda
