#include "bank_update.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <unordered_map>
#include <vector>

#include "../checks.h"

namespace crrcd {

BankUpdate::BankUpdate(const char* op, const at::Tensor& bank, const at::Tensor& index,
                       const at::Tensor& value, double momentum, bool normalize)
    : bank_(bank), momentum_(momentum), normalize_(normalize) {
  check_update(op, bank, index, value, momentum);
  const at::Tensor rows = index.contiguous();
  check_rows(op, "index", rows, bank.size(0));
  // a copy, since value may be rows of the bank itself
  value_ = value.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).contiguous();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  std::unordered_map<int64_t, int64_t> last;
  for (int64_t i = 0; i < rows.numel(); ++i) last[row[i]] = i;
  for (int64_t i = 0; i < rows.numel(); ++i)
    if (last[row[i]] == i) writes_.emplace_back(row[i], i);
}

void BankUpdate::commit() const {
  const int64_t width = bank_.size(1), stride = bank_.stride(0), step = bank_.stride(1);
  const double* value = value_.const_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, bank_.scalar_type(), "crrcd_bank_update", [&] {
        scalar_t* data = bank_.mutable_data_ptr<scalar_t>();
        const auto count = static_cast<int64_t>(writes_.size());
        at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
          std::vector<double> blend(static_cast<size_t>(width));
          for (int64_t i = begin; i < end; ++i) {
            scalar_t* row = data + writes_[i].first * stride;
            const double* fresh = value + writes_[i].second * width;
            double squared = 0;
            for (int64_t d = 0; d < width; ++d) {
              blend[d] = (1 - momentum_) * fresh[d];
              // 0 times an infinity that the row holds would be NaN
              if (momentum_ > 0) blend[d] += momentum_ * static_cast<double>(row[d * step]);
              squared += blend[d] * blend[d];
            }
            double factor = 1;
            if (normalize_) factor = squared <= kZeroNormSquared ? 0 : 1 / std::sqrt(squared);
            for (int64_t d = 0; d < width; ++d)
              row[d * step] = static_cast<scalar_t>(blend[d] * factor);
          }
        });
      });
}

void bank_update_cpu(const at::Tensor& bank, const at::Tensor& index, const at::Tensor& value,
                     double momentum, bool normalize) {
  BankUpdate(/*op=*/"bank_update_", bank, index, value, momentum, normalize).commit();
}

}  // namespace crrcd
