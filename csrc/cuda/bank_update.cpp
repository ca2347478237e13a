#include "bank_update.h"

#include "../checks.h"
#include "bank_update_params.h"
#include "device.h"

namespace crrcd::cuda {

BankUpdate::BankUpdate(const char* op, const at::Tensor& bank, const at::Tensor& index,
                       const at::Tensor& value, double momentum, bool normalize)
    : bank_(bank), momentum_(momentum), normalize_(normalize) {
  check_update(op, bank, index, value, momentum);
  index_ = index.contiguous();
  // a copy, since value may be rows of the bank itself
  value_ = value.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).contiguous();
}

void BankUpdate::commit(void* stream) const {
  BankUpdateParams p;
  p.U = index_.numel(), p.D = bank_.size(1), p.N = bank_.size(0);
  p.bank = bank_.mutable_data_ptr();
  p.storage = storage_of("bank_update_", bank_);
  p.row_stride = bank_.stride(0), p.column_stride = bank_.stride(1);
  p.index = index_.const_data_ptr<int64_t>();
  p.value = value_.const_data_ptr<double>();
  p.momentum = momentum_;
  p.normalize = normalize_;
  bank_update_launch(p, stream);
}

void bank_update(const at::Tensor& bank, const at::Tensor& index, const at::Tensor& value,
                 double momentum, bool normalize) {
  const Device device(bank);
  BankUpdate("bank_update_", bank, index, value, momentum, normalize).commit(device.stream());
}

}  // namespace crrcd::cuda
