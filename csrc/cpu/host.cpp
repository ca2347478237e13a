#include "host.h"

#include <atomic>
#include <limits>

#include "../aten.h"

namespace crrcd {

at::Tensor padded(const at::Tensor& t, at::ScalarType dtype, int64_t rows, int64_t ld) {
  std::vector<int64_t> shape = t.sizes().vec();
  const int64_t last = t.dim() - 1;
  const int64_t width = shape[last], height = t.dim() > 1 ? shape[last - 1] : 1;
  shape[last] = ld;
  if (t.dim() > 1) shape[last - 1] = rows;
  at::Tensor out = at::zeros(shape, t.options().dtype(dtype));
  at::Tensor inner = out.narrow(last, 0, width);
  if (t.dim() > 1) inner = inner.narrow(last - 1, 0, height);
  inner.copy_(t);
  return out;
}

at::Tensor sum_parts(const at::Tensor& parts) {
  at::Tensor total = parts.select(0, 0);
  for (int64_t i = 1; i < parts.size(0); ++i) total.add_(parts.select(0, i));
  return total;
}

namespace {
std::atomic<bool> poison{false};
}

void set_poison(bool on) { poison = on; }

at::Tensor scratch(int64_t bytes) {
  at::Tensor memory = at::empty({(bytes + 7) / 8}, at::TensorOptions().dtype(at::kDouble));
  // every byte 0xff is NaN as float32, float64 and bfloat16
  if (poison) memset(memory.mutable_data_ptr(), 0xff, static_cast<size_t>(memory.nbytes()));
  return memory;
}

}  // namespace crrcd
