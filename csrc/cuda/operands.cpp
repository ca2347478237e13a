#include "operands.h"

#include <ATen/Context.h>

#include "../aten.h"

namespace crrcd::cuda {

at::ScalarType stored_type(Precision precision) {
  switch (precision) {
    case Precision::kF64:
      return at::kDouble;
    case Precision::kBF16:
      return at::kBFloat16;
    case Precision::kF16:
      return at::kHalf;
    default:
      return at::kFloat;
  }
}

Precision precision_of(at::ScalarType dtype) {
  if (dtype == at::kDouble) return Precision::kF64;
  if (dtype == at::kBFloat16) return Precision::kBF16;
  if (dtype == at::kHalf) return Precision::kF16;
  switch (at::globalContext().float32MatmulPrecision()) {
    case at::Float32MatmulPrecision::HIGHEST:
      return Precision::kF32;
    case at::Float32MatmulPrecision::HIGH:
      return Precision::kTf32;
    default:
      return Precision::kBF16;
  }
}

at::Tensor operand(Precision precision, const at::Tensor& t, int64_t rows, int64_t columns,
                   bool rounded) {
  std::vector<int64_t> shape = t.sizes().vec();
  const int64_t last = t.dim() - 1;
  shape[last] = columns, shape[last - 1] = rows;
  at::Tensor out = at::zeros(shape, t.options().dtype(stored_type(precision)));
  out.narrow(last, 0, t.size(last)).narrow(last - 1, 0, t.size(last - 1)).copy_(t);
  if (precision != Precision::kTf32 || !rounded) return out;
  // to the nearest, as tensor cores would cut off what they do not use
  const at::Tensor nearest = out.view(at::kInt).add(0x1000).bitwise_and(~0x1fff);
  return at::where(out.isfinite(), nearest.view(at::kFloat), out);
}

at::Tensor padded(const at::Tensor& t, int64_t columns, double value) {
  std::vector<int64_t> shape = t.sizes().vec();
  const int64_t width = shape.back();
  shape.back() = columns;
  at::Tensor out = at::full(shape, value, t.options());
  out.narrow(-1, 0, width).copy_(t);
  return out;
}

at::Tensor scalar_operand(const at::Tensor& value, const at::TensorOptions& options) {
  // a fill, where a copy from the host would wait
  return value.is_cpu() ? at::full({}, value.item<double>(), options) : value.to(options);
}

void refuse_each(const char* op, const Reduced& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !x.each(), "crrcd_ext.", op,
      ": reduction: expected \"mean\" or \"sum\" without weights on backend cuda, which has no "
      "others for it; use backend='triton' or 'reference'");
}

at::Tensor with_units(const at::Tensor& bank) {
  return bank.stride(1) == 1 || bank.size(1) == 1 ? bank : bank.contiguous();
}

bool whole_quads(const at::Tensor& bank) {
  const auto quad = static_cast<uintptr_t>(4 * bank.element_size());
  return bank.size(1) % 4 == 0 && bank.stride(0) % 4 == 0 &&
         reinterpret_cast<uintptr_t>(bank.const_data_ptr()) % quad == 0;
}

}  // namespace crrcd::cuda
