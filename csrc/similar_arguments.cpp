#include "similar_arguments.h"

#include <cmath>

#include "checks.h"

namespace crrcd {

SimilarArguments similar_arguments(const at::Tensor& query, const at::Tensor& bank,
                                   const std::optional<at::Tensor>& index, double threshold) {
  constexpr const char* kOp = "similar_mask";
  SimilarArguments x;
  TORCH_CHECK_VALUE(query.dim() == 2, "crrcd_ext.", kOp, ": query: expected shape [B, D], got ",
                    query.sizes());
  TORCH_CHECK_VALUE(bank.dim() == 2, "crrcd_ext.", kOp, ": bank: expected shape [N, D], got ",
                    bank.sizes());
  x.B = query.size(0), x.D = query.size(1), x.N = bank.size(0);
  CRRCD_CHECK_SHAPE(kOp, "bank", bank, {x.N, x.D});
  TORCH_CHECK_TYPE(query.scalar_type() == at::kFloat || query.scalar_type() == at::kDouble,
                   "crrcd_ext.", kOp, ": query: expected float32 or float64, got ",
                   query.scalar_type());
  storage_of(kOp, bank);
  TORCH_CHECK_VALUE(std::isfinite(threshold), "crrcd_ext.", kOp,
                    ": threshold: expected a finite number, got ", threshold);
  x.query = query, x.bank = bank, x.threshold = threshold;
  x.K = x.N;
  if (index) {
    check_index(kOp, *index, x.B);
    x.index = index->dim() == 1 ? index->contiguous() : *index;
    x.K = index->size(-1);
  }
  return x;
}

}  // namespace crrcd
