#include "relation.h"

#include <ATen/TensorOperators.h>

#include <algorithm>

#include "../aten.h"
#include "../checks.h"
#include "device.h"
#include "operands.h"
#include "relation_pairs_params.h"

namespace crrcd::cuda {

namespace {

constexpr const char* kOp = "relation";

template <Precision kPrecision>
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& anchor, const at::Tensor& sample,
                                           const at::Tensor& weight, const at::Tensor& bias,
                                           const Device& device) {
  using T = SumOf<kPrecision>;
  const auto dtype = c10::CppTypeToScalarType<T>::value;
  RelationPairsParams<T> p;
  p.A = anchor.size(0), p.M = sample.size(0), p.R = static_cast<int>(weight.size(0));
  p.Hp = padded_hidden(weight.size(1));
  p.Rp = round_up_int(std::max(p.R, 1), panel_rows(kPrecision));
  const at::TensorOptions options = anchor.options().dtype(dtype);
  at::Tensor relation = at::empty({p.A, p.M, p.R}, options);
  at::Tensor inverse_norm = at::empty({p.A, p.M}, options);
  if (p.A > 0 && p.M > 0) {
    const GpuLimits gpu = device.limits();
    const PairsLayout layouts[] = {{kPrecision, kPrecision == Precision::kF64 ? 1 : 4, p.Hp},
                                   {kPrecision, 1, p.Hp},
                                   {kPrecision, 1, p.Hp, 1}};
    const auto fits = [&](const PairsLayout& x) {
      return weight.size(1) <= kTooWide && x.bytes() <= gpu.shared_block;
    };
    const auto* found = std::find_if(std::begin(layouts), std::end(layouts), fits);
    TORCH_CHECK_VALUE(
        found != std::end(layouts), "crrcd_ext.", kOp,
        ": anchor: expected a hidden width whose tiles fit this GPU's shared memory (",
        gpu.shared_block, " bytes a block), got ", weight.size(1),
        "; choose backend 'reference' or fewer hidden units");
    p.layout = *found;
    const int64_t samples = p.layout.samples();
    const at::Tensor anchors =
        operand(kPrecision, nan_for_infinity(anchor), p.A, p.Hp, /*rounded=*/false);
    const at::Tensor rows =
        operand(kPrecision, nan_for_infinity(sample), (p.M + samples - 1) / samples * samples, p.Hp,
                /*rounded=*/false);
    const at::Tensor weights = operand(kPrecision, weight, p.Rp, p.Hp);
    at::Tensor biases;
    if (bias.defined()) biases = padded(bias.to(dtype), p.Rp);
    p.anchor = anchors.const_data_ptr(), p.sample = rows.const_data_ptr();
    p.weight = weights.const_data_ptr();
    p.bias = biases.defined() ? biases.const_data_ptr<T>() : nullptr;
    p.relation = relation.mutable_data_ptr<T>();
    p.inverse_norm = inverse_norm.mutable_data_ptr<T>();
    RelationPairsKernel<kPrecision>::launch(p, device.stream());
  }
  return {relation.to(anchor.scalar_type()), inverse_norm};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> relation(const at::Tensor& anchor, const at::Tensor& sample,
                                            const at::Tensor& weight, const OptionalTensor& bias) {
  const at::ScalarType dtype = check_relation(anchor, sample, weight, bias, /*with_half=*/true);
  const Device device(anchor);
  const at::Tensor c = bias.value_or(at::Tensor());
  switch (precision_of(dtype)) {
    case Precision::kF64:
      return forward<Precision::kF64>(anchor, sample, weight, c, device);
    case Precision::kF32:
      return forward<Precision::kF32>(anchor, sample, weight, c, device);
    case Precision::kTf32:
      return forward<Precision::kTf32>(anchor, sample, weight, c, device);
    case Precision::kBF16:
      return forward<Precision::kBF16>(anchor, sample, weight, c, device);
    default:
      return forward<Precision::kF16>(anchor, sample, weight, c, device);
  }
}

// Matrix products of the library, for some anchors at a time: there are as few pairs here as
// queries, and what a pair needs of memory is what its relation takes already.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relation_backward(
    const at::Tensor& grad, const at::Tensor& relation, const at::Tensor& inverse_norm,
    const at::Tensor& anchor, const at::Tensor& sample, const at::Tensor& weight, int64_t need) {
  check_operands(kOp, {anchor, sample, weight}, /*with_half=*/true);
  const Device device(anchor);
  const at::ScalarType wide = inverse_norm.scalar_type();
  const auto zeros = [&](bool wanted, at::IntArrayRef shape) {
    return wanted ? at::zeros(shape, anchor.options().dtype(wide)) : at::Tensor();
  };
  const int64_t A = anchor.size(0), M = sample.size(0), R = weight.size(0), H = weight.size(1);
  const at::Tensor P = nan_for_infinity(anchor.to(wide)), X = nan_for_infinity(sample.to(wide));
  const at::Tensor W = weight.to(wide);
  at::Tensor d_anchor = zeros(need & 1, {A, H}), d_sample = zeros(need & 2, {M, H});
  at::Tensor d_weight = zeros(need & 4, {R, H}), d_bias = zeros(need & 8, {R});
  constexpr int64_t kElements = int64_t(1) << 22;
  const int64_t step = std::max<int64_t>(1, kElements / std::max<int64_t>(M * std::max(H, R), 1));
  for (int64_t first = 0; first < A && M > 0; first += step) {
    const int64_t count = std::min(step, A - first);
    const at::Tensor g = grad.narrow(0, first, count).to(wide);
    const at::Tensor v = relation.narrow(0, first, count).to(wide);
    const at::Tensor r = inverse_norm.narrow(0, first, count).unsqueeze(-1);
    const at::Tensor d_w = (g - (g * v).sum(-1, true) * v) * r;  // [count, M, R]
    if (d_bias.defined()) d_bias += d_w.sum(at::IntArrayRef{0, 1});
    if (!(need & 7)) continue;
    const at::Tensor seen = P.narrow(0, first, count).unsqueeze(1) - X;
    if (d_weight.defined())
      d_weight.addmm_(d_w.reshape({count * M, R}).t(), at::relu(seen).reshape({count * M, H}));
    if (!(need & 3)) continue;
    const at::Tensor d_hidden = at::matmul(d_w, W).masked_fill(seen.le(0), 0);
    if (d_anchor.defined()) d_anchor.narrow(0, first, count).copy_(d_hidden.sum(1));
    if (d_sample.defined()) d_sample -= d_hidden.sum(0);
  }
  const auto result = [&](const at::Tensor& t) {
    return t.defined() ? t.to(anchor.scalar_type()) : at::empty({0}, anchor.options());
  };
  return {result(d_anchor), result(d_sample), result(d_weight), result(d_bias)};
}

}  // namespace crrcd::cuda
