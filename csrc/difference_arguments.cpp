#include "difference_arguments.h"

#include <cmath>

#include "checks.h"

namespace crrcd {

DifferenceArguments difference_arguments(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& anchor,
    const at::Tensor& bank, const at::Tensor& scale, const at::Tensor& offset,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& anchor_id,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, bool self_pairs, double eps,
    const std::string& objective, const std::optional<at::Tensor>& weights,
    const std::string& reduction, int64_t need, bool with_half) {
  constexpr const char* kOp = "difference_nce";
  DifferenceArguments x;
  TORCH_CHECK_VALUE(query.dim() == 2, "crrcd_ext.", kOp, ": query: expected shape [B, D], got ",
                    query.sizes());
  TORCH_CHECK_VALUE(anchor.dim() == 2, "crrcd_ext.", kOp, ": anchor: expected shape [A, D], got ",
                    anchor.sizes());
  TORCH_CHECK_VALUE(bank.dim() == 2, "crrcd_ext.", kOp, ": bank: expected shape [N, D], got ",
                    bank.sizes());
  x.A = anchor.size(0), x.B = query.size(0), x.D = query.size(1), x.N = bank.size(0);
  CRRCD_CHECK_SHAPE(kOp, "positive", positive, {x.B, x.D});
  CRRCD_CHECK_SHAPE(kOp, "anchor", anchor, {x.A, x.D});
  CRRCD_CHECK_SHAPE(kOp, "bank", bank, {x.N, x.D});
  TORCH_CHECK_VALUE(objective == "nce" || objective == "infonce", "crrcd_ext.", kOp,
                    ": objective: expected \"nce\" or \"infonce\", got \"", objective, "\"");
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "crrcd_ext.", kOp,
                    ": eps: expected a number of 0 or more, got ", eps);
  x.dtype = check_operands(kOp, {query, positive, anchor}, with_half);
  x.query = query, x.positive = positive, x.anchor = anchor, x.bank = bank;
  x.scale = scale, x.offset = offset, x.eps = eps;
  x.K = x.N;
  if (index) {
    check_index(kOp, *index, x.B);
    x.index = index->dim() == 1 ? index->contiguous() : *index;
    x.K = index->size(-1);
  }
  x.anchor_id = check_ids(kOp, "anchor_id", anchor_id, x.A);
  x.query_id = check_ids(kOp, "query_id", query_id, x.B);
  x.key_id = check_ids(kOp, "key_id", key_id, x.N);
  x.query_label = check_ids(kOp, "query_label", query_label, x.B);
  x.key_label = check_ids(kOp, "key_label", key_label, x.N);
  x.excluded = check_excluded(kOp, excluded, x.B, x.K);
  x.self_pairs = self_pairs;
  x.infonce = objective == "infonce";
  static_cast<Reduced&>(x) =
      check_reduction(kOp, weights, reduction, {x.B}, need, kDifferenceQuery | kDifferencePositive);
  x.need = need;
  return x;
}

}  // namespace crrcd
