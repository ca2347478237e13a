// The momentum update of a memory bank on a GPU, checked first and committed behind every read.
#pragma once

#include <ATen/core/Tensor.h>

namespace crrcd::cuda {

class BankUpdate {
 public:
  // Checks shapes and dtypes and throws before anything is changed; ids are checked on the device.
  BankUpdate(const char* op, const at::Tensor& bank, const at::Tensor& index,
             const at::Tensor& value, double momentum, bool normalize);

  // m <- normalize(momentum * m + (1 - momentum) * value), computed in double, on `stream`.
  void commit(void* stream) const;

 private:
  at::Tensor bank_, index_, value_;
  double momentum_;
  bool normalize_;
};

void bank_update(const at::Tensor& bank, const at::Tensor& index, const at::Tensor& value,
                 double momentum, bool normalize);

}  // namespace crrcd::cuda
