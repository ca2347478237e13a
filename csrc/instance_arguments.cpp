#include "instance_arguments.h"

#include "checks.h"

namespace crrcd {

InstanceArguments instance_arguments(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& bank,
    const at::Tensor& scale, const at::Tensor& offset, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, const std::string& objective,
    const std::optional<at::Tensor>& weights, const std::string& reduction, int64_t need,
    bool with_half) {
  constexpr const char* kOp = "instance_nce";
  InstanceArguments x;
  TORCH_CHECK_VALUE(query.dim() == 2, "crrcd_ext.", kOp, ": query: expected shape [B, D], got ",
                    query.sizes());
  TORCH_CHECK_VALUE(bank.dim() == 2, "crrcd_ext.", kOp, ": bank: expected shape [N, D], got ",
                    bank.sizes());
  x.B = query.size(0), x.D = query.size(1), x.N = bank.size(0);
  CRRCD_CHECK_SHAPE(kOp, "positive", positive, {x.B, x.D});
  CRRCD_CHECK_SHAPE(kOp, "bank", bank, {x.N, x.D});
  TORCH_CHECK_VALUE(objective == "nce" || objective == "infonce", "crrcd_ext.", kOp,
                    ": objective: expected \"nce\" or \"infonce\", got \"", objective, "\"");
  x.dtype = check_operands(kOp, {query, positive}, with_half);
  x.query = query, x.positive = positive, x.bank = bank, x.scale = scale, x.offset = offset;
  x.K = x.N;
  if (index) {
    check_index(kOp, *index, x.B);
    x.index = index->dim() == 1 ? index->contiguous() : *index;
    x.K = index->size(-1);
  }
  x.query_id = check_ids(kOp, "query_id", query_id, x.B);
  x.key_id = check_ids(kOp, "key_id", key_id, x.N);
  x.query_label = check_ids(kOp, "query_label", query_label, x.B);
  x.key_label = check_ids(kOp, "key_label", key_label, x.N);
  x.excluded = check_excluded(kOp, excluded, x.B, x.K);
  x.infonce = objective == "infonce";
  static_cast<Reduced&>(x) =
      check_reduction(kOp, weights, reduction, {x.B}, need, kInstanceQuery | kInstancePositive);
  x.need = need;
  return x;
}

}  // namespace crrcd
