// The momentum update of a memory bank, checked first and committed when every read is over.
#pragma once

#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace crrcd {

class BankUpdate {
 public:
  // Checks everything and throws before anything is changed. Of a row that index names several
  // times the last value wins.
  BankUpdate(const char* op, const at::Tensor& bank, const at::Tensor& index,
             const at::Tensor& value, double momentum, bool normalize);

  // m <- normalize(momentum * m + (1 - momentum) * value), computed in double.
  void commit() const;

 private:
  at::Tensor bank_, value_;
  double momentum_;
  bool normalize_;
  std::vector<std::pair<int64_t, int64_t>> writes_;  // row of the bank, row of value
};

void bank_update_cpu(const at::Tensor& bank, const at::Tensor& index, const at::Tensor& value,
                     double momentum, bool normalize);

}  // namespace crrcd
