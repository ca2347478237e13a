#include "similar_mask.h"

#include "../aten.h"
#include "../checks.h"
#include "device.h"
#include "operands.h"
#include "similar_params.h"

namespace crrcd::cuda {

namespace {

constexpr const char* kOp = "similar_mask";

template <typename T>
at::Tensor similar_mask(const SimilarArguments& x, const Device& device) {
  const at::Tensor mask = at::empty({x.B, x.words()}, x.query.options().dtype(at::kInt));
  if (mask.numel() == 0) return mask;
  const at::Tensor query = x.query.contiguous(), bank = with_units(x.bank);
  SimilarParams<T> p;
  p.B = x.B, p.K = x.K, p.D = x.D, p.N = x.N, p.words = x.words();
  p.bank.data = bank.const_data_ptr();
  p.bank.storage = storage_of(kOp, bank);
  p.bank.row_stride = bank.stride(0);
  p.whole_quads = whole_quads(bank);
  if (x.own()) {
    p.own = x.index.const_data_ptr<int64_t>();
    p.own_stride = x.index.stride(0), p.own_step = x.index.stride(1);
  } else if (x.index.defined()) {
    p.bank.index = x.index.const_data_ptr<int64_t>();
  }
  p.query = query.const_data_ptr<T>();
  p.threshold = static_cast<T>(x.threshold);
  p.mask = mask.mutable_data_ptr<int32_t>();
  similar_launch(p, device.stream());
  return mask;
}

}  // namespace

at::Tensor similar_mask(const at::Tensor& query, const at::Tensor& bank,
                        const std::optional<at::Tensor>& index, double threshold) {
  const SimilarArguments x = similar_arguments(query, bank, index, threshold);
  const Device device(query);
  return query.scalar_type() == at::kDouble ? similar_mask<double>(x, device)
                                            : similar_mask<float>(x, device);
}

}  // namespace crrcd::cuda
