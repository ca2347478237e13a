#include "relation.h"

#include <ATen/Parallel.h>

#include <limits>

#include "../aten.h"
#include "../checks.h"
#include "../relation_arguments.h"
#include "host.h"
#include "kernels.h"

namespace crrcd {

namespace {

constexpr const char* kOp = "relation";

template <typename T>
struct Functions;
template <>
struct Functions<float> {
  static constexpr auto scratch = &Kernels::relation_scratch_f32;
  static constexpr auto forward = &Kernels::relation_f32;
  static constexpr auto backward = &Kernels::relation_backward_f32;
};
template <>
struct Functions<double> {
  static constexpr auto scratch = &Kernels::relation_scratch_f64;
  static constexpr auto forward = &Kernels::relation_f64;
  static constexpr auto backward = &Kernels::relation_backward_f64;
};

// Operands padded for the kernels, and the scratch that both directions use.
template <typename T>
struct Call {
  RelationParams<T> p;
  const Kernels& kernels = active_kernels();
  at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  at::Tensor anchor, sample, weight, weight_t, bias, memory;

  Call(const at::Tensor& anchor_in, const at::Tensor& sample_in, const at::Tensor& weight_in,
       const at::Tensor& bias_in) {
    p.A = anchor_in.size(0), p.M = sample_in.size(0);
    p.H = weight_in.size(1), p.R = weight_in.size(0);
    const int64_t lanes = kernels.vector_bytes / static_cast<int64_t>(sizeof(T));
    p.Hp = round_up(p.H, lanes), p.Rp = round_up(p.R, lanes);
    p.ldH = leading_dimension(p.Hp, sizeof(T)), p.ldR = leading_dimension(p.Rp, sizeof(T));
    p.tile = 64;
    const int64_t items = p.A * ((p.M + p.tile - 1) / p.tile);
    p.parts = std::max<int64_t>(1, std::min<int64_t>(items, at::get_num_threads()));
    anchor = padded(nan_for_infinity(anchor_in), dtype, p.A, p.ldH);
    sample = padded(nan_for_infinity(sample_in), dtype, p.M, p.ldH);
    weight = padded(weight_in, dtype, p.Rp, p.ldH);
    weight_t = padded(weight_in.t(), dtype, p.Hp, p.ldR);
    p.anchor = pointer<T>(anchor), p.sample = pointer<T>(sample);
    p.weight = pointer<T>(weight), p.weight_t = pointer<T>(weight_t);
    if (bias_in.defined()) {
      bias = padded(bias_in, dtype, 1, p.ldR);
      p.bias = pointer<T>(bias);
    }
  }

  void run(void (*Kernels::*function)(const RelationParams<T>&, int64_t)) {
    if (p.A == 0 || p.M == 0) return;
    p.scratch_bytes = (kernels.*Functions<T>::scratch)(p);
    memory = scratch(p.parts * static_cast<int64_t>(p.scratch_bytes));
    p.scratch = static_cast<std::byte*>(memory.mutable_data_ptr());
    const auto f = kernels.*function;
    at::parallel_for(0, p.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) f(p, part);
    });
  }
};

template <typename T>
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& anchor, const at::Tensor& sample,
                                           const at::Tensor& weight, const at::Tensor& bias) {
  Call<T> call(anchor, sample, weight, bias);
  const auto options = at::TensorOptions().dtype(call.dtype);
  at::Tensor relation = at::empty({call.p.A, call.p.M, call.p.R}, options);
  at::Tensor inverse_norm = at::empty({call.p.A, call.p.M}, options);
  call.p.relation = mutable_pointer<T>(relation);
  call.p.inverse_norm = mutable_pointer<T>(inverse_norm);
  call.run(Functions<T>::forward);
  // products skip the zeros of hid, and 0 times what is not finite is NaN
  if (!all_finite<T>(call.weight)) {
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    relation.fill_(kNan), inverse_norm.fill_(kNan);
  }
  return {relation.to(anchor.scalar_type()), inverse_norm};
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& relation, const at::Tensor& inverse_norm,
    const at::Tensor& anchor, const at::Tensor& sample, const at::Tensor& weight, int64_t need) {
  Call<T> call(anchor, sample, weight, at::Tensor());
  RelationParams<T>& p = call.p;
  const at::Tensor g = grad.to(call.dtype).contiguous(), v = relation.to(call.dtype).contiguous();
  at::Tensor norm = inverse_norm.contiguous();
  p.grad = pointer<T>(g);
  p.relation = const_cast<T*>(pointer<T>(v));
  p.inverse_norm = const_cast<T*>(pointer<T>(norm));
  p.need_anchor = need & 1, p.need_sample = need & 2, p.need_weight = need & 12;
  const auto zeros = [&](at::IntArrayRef shape, bool wanted) {
    return wanted ? at::zeros(shape, at::TensorOptions().dtype(call.dtype)) : at::Tensor();
  };
  at::Tensor d_anchor = zeros({p.parts, p.A, p.ldH}, p.need_anchor);
  at::Tensor d_sample = zeros({p.parts, p.M, p.ldH}, p.need_sample);
  at::Tensor d_w_t = zeros({p.parts, p.Hp, p.ldR}, p.need_weight);
  at::Tensor d_bias = zeros({p.parts, p.ldR}, p.need_weight);
  p.d_anchor = mutable_pointer<T>(d_anchor), p.d_sample = mutable_pointer<T>(d_sample);
  p.d_w_t = mutable_pointer<T>(d_w_t), p.d_bias = mutable_pointer<T>(d_bias);
  call.run(Functions<T>::backward);
  const at::ScalarType dtype = anchor.scalar_type();
  const auto take = [&](bool wanted, const at::Tensor& parts, int64_t rows, int64_t columns) {
    if (!wanted) return at::empty({0}, anchor.options());
    at::Tensor total = sum_parts(parts);
    if (total.dim() == 2) total = total.narrow(0, 0, rows);
    return total.narrow(-1, 0, columns).to(dtype).contiguous();
  };
  at::Tensor d_weight = take(need & 4, d_w_t, p.H, p.R);
  if (need & 4) d_weight = d_weight.t().contiguous();
  return {take(need & 1, d_anchor, p.A, p.H), take(need & 2, d_sample, p.M, p.H), d_weight,
          take(need & 8, d_bias, 0, p.R)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> relation_cpu(const at::Tensor& anchor, const at::Tensor& sample,
                                                const at::Tensor& weight,
                                                const std::optional<at::Tensor>& bias) {
  const at::ScalarType dtype = check_relation(anchor, sample, weight, bias, /*with_half=*/false);
  const at::Tensor c = bias.value_or(at::Tensor());
  return dtype == at::kDouble ? forward<double>(anchor, sample, weight, c)
                              : forward<float>(anchor, sample, weight, c);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relation_backward_cpu(
    const at::Tensor& grad, const at::Tensor& relation, const at::Tensor& inverse_norm,
    const at::Tensor& anchor, const at::Tensor& sample, const at::Tensor& weight, int64_t need) {
  const at::ScalarType dtype = check_operands(kOp, {anchor, sample, weight});
  return dtype == at::kDouble
             ? backward<double>(grad, relation, inverse_norm, anchor, sample, weight, need)
             : backward<float>(grad, relation, inverse_norm, anchor, sample, weight, need);
}

}  // namespace crrcd
