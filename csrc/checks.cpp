#include "checks.h"

namespace crrcd {

Storage storage_of(const char* op, const at::Tensor& bank) {
  switch (bank.scalar_type()) {
    case at::kDouble:
      return Storage::kFloat64;
    case at::kFloat:
      return Storage::kFloat32;
    case at::kBFloat16:
      return Storage::kBFloat16;
    case at::kHalf:
      return Storage::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "crrcd_ext.", op,
                       ": bank: expected float64, float32, bfloat16 or float16, got ",
                       bank.scalar_type());
  }
}

void check_rows(const char* op, const char* name, const at::Tensor& index, int64_t rows) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "crrcd_ext.", op, ": ", name,
                   ": expected int64, got ", index.scalar_type());
  const int64_t* p = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i)
    TORCH_CHECK_INDEX(p[i] >= 0 && p[i] < rows, "crrcd_ext.", op, ": ", name,
                      ": expected rows of the bank in [0, ", rows, "), got ", p[i], " at position ",
                      i);
}

at::ScalarType check_operands(const char* op, std::initializer_list<at::Tensor> operands) {
  const at::ScalarType dtype = operands.begin()->scalar_type();
  for (const at::Tensor& t : operands)
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, "crrcd_ext.", op,
                     ": expected operands of one dtype, got ", dtype, " and ", t.scalar_type());
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16,
                   "crrcd_ext.", op,
                   ": backend cpu: expected operands of float64, float32 or bfloat16, got ", dtype);
  return dtype;
}

}  // namespace crrcd
