#include "relation_nce.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <cmath>

#include "../aten.h"
#include "../checks.h"
#include "bank_update.h"
#include "host.h"
#include "kernels.h"

namespace crrcd {

namespace {

constexpr const char* kOp = "relation_nce";

template <typename T>
struct Functions;
template <>
struct Functions<float> {
  static constexpr auto scratch = &Kernels::nce_scratch_f32;
  static constexpr auto run = &Kernels::nce_f32;
};
template <>
struct Functions<double> {
  static constexpr auto scratch = &Kernels::nce_scratch_f64;
  static constexpr auto run = &Kernels::nce_f64;
};

// Rows 2i and 2i + 1 rounded to bfloat16 and interleaved: [..., rows / 2, ld, 2].
at::Tensor row_pairs(const at::Tensor& t) {
  std::vector<int64_t> shape = t.sizes().vec();
  shape.back() = 2;
  shape[shape.size() - 2] /= 2;
  shape.push_back(t.size(-1));
  return t.to(at::kBFloat16).view(shape).transpose(-1, -2).contiguous();
}

template <typename T>
class RelationNce {
 public:
  RelationNce(const RelationArguments& arguments, bool bf16)
      : x(arguments), kernels(active_kernels()), dtype(c10::CppTypeToScalarType<T>::value) {
    p.pairs = bf16 && kernels.bf16_pairs && !x.narrow();
  }

  NceResult run() {
    query = x.query.to(dtype).contiguous();
    positive = x.positive.to(dtype).contiguous();
    weight = x.weight.to(dtype).contiguous();
    bias = x.bias.defined() ? x.bias.to(dtype).contiguous() : at::Tensor();
    const auto scale = x.scale.item<double>(), offset = x.offset.item<double>();
    p.scale = static_cast<T>(scale);
    p.scale_log2 = static_cast<T>(scale / kLog2), p.offset_log2 = static_cast<T>(offset / kLog2);
    pair = pair_mask(x.A, x.B, x.anchor_id, x.query_id, x.self_pairs, at::kCPU).to(dtype);
    const double pairs = pair.sum(at::kDouble).item<double>();
    p.gradient_scale = static_cast<T>(x.factor(pairs));
    const at::Tensor counts = pair;
    if (x.weights.defined()) pair = pair * x.weights.to(dtype);
    positive_logit = (query * positive).sum(-1);
    const at::Tensor cosine = positive_logit;
    positive_logit = positive_logit * p.scale - static_cast<T>(offset);

    set_up();
    double loss = 0;
    at::Tensor losses;  // of each pair, in double, where they are wanted one by one
    at::Tensor d_logit_positive;
    if (x.infonce) {
      log_normalizer = sweep_log_sum_exp();
      if (x.each())
        losses = log_normalizer - positive_logit;
      else
        loss = ((log_normalizer - positive_logit) * pair).sum(at::kDouble).item<double>();
      d_logit_positive = (((positive_logit - log_normalizer).exp() - 1) * pair).to(dtype);
      if (x.need & ~kNeedPositive) sweep(Pass::kSoftmax);
    } else {
      sweep(Pass::kNce);
      const at::Tensor of_positive = at::log_sigmoid(positive_logit).neg_();
      if (x.each())
        losses = sum_parts(loss_parts).narrow(1, 0, x.B).add(of_positive);
      else
        loss = (of_positive * pair).sum(at::kDouble).item<double>();
      d_logit_positive = at::sigmoid(-positive_logit).neg_().mul_(pair);
    }
    const double* s = scalars.defined() ? scalars.const_data_ptr<double>() : nullptr;
    double total[4] = {0, 0, 0, 0};
    for (int64_t i = 0; s && i < parts * 4; ++i) total[i % 4] += s[i];
    loss += x.infonce ? 0 * total[0] : total[0];
    // what no sum has seen, of operands that are not finite
    const bool finite = all_finite<T>(anchor) && all_finite<T>(weight);
    const double lost =
        x.K > 0 && pairs > 0 && !finite ? std::numeric_limits<double>::quiet_NaN() : 0;
    loss += lost;
    if (losses.defined()) {
      losses = losses + (0 * total[0] + lost);  // NaN for a key that is not finite
      losses.masked_fill_(counts.eq(0), 0);
      if (x.weights.defined()) losses.mul_(x.weights);
      if (x.reduction != Reduction::kNone) loss = losses.sum().template item<double>();
    }
    if (x.reduction == Reduction::kMean) loss = pairs > 0 ? loss / pairs : 0 * loss;
    const at::Tensor reduced = x.reduction == Reduction::kNone
                                   ? losses.to(dtype)
                                   : at::scalar_tensor(loss, query.options());
    return gradients(reduced, total, cosine, d_logit_positive.mul_(p.gradient_scale));
  }

 private:
  void set_up() {
    describe(p, x.A, x.B, x.K, x.H, x.R, x.D, needs_of(x.need), at::get_num_threads(), kernels);
    parts = p.key_parts * p.anchor_parts;

    bank = x.bank.stride(1) == 1 ? x.bank : x.bank.contiguous();
    p.bank.data = bank.const_data_ptr();
    p.bank.storage = storage_of(kOp, bank);
    p.bank.row_stride = bank.stride(0);
    p.bank.index = pointer<int64_t>(x.index);
    p.projected = !x.key_weight.defined();
    if (!p.projected) {
      key_weight = padded(x.key_weight, dtype, p.Hp, p.ldD);
      key_weight_t = padded(x.key_weight.t(), dtype, p.Dp, p.ldH);
      p.key_weight = pointer<T>(key_weight);
      p.key_weight_t = pointer<T>(key_weight_t);
    }
    anchor = padded(x.anchor, dtype, x.A, p.ldH);
    pair_padded = padded(pair, dtype, x.A, p.ldB);
    p.anchor = pointer<T>(anchor);
    p.pair = pointer<T>(pair_padded);
    p.query_id = pointer<int64_t>(x.query_id);
    p.key_id = pointer<int64_t>(x.key_id);
    if (x.query_label.defined() && x.key_label.defined()) {
      p.query_label = pointer<int64_t>(x.query_label);
      p.key_label = pointer<int64_t>(x.key_label);
    }
    p.excluded = excluded_bits(x.excluded);

    weight_t_padded = padded(weight.t(), dtype, p.Hp, p.ldR);
    p.weight_t = pointer<T>(weight_t_padded);
    if (bias.defined()) {
      bias_padded = padded(bias, dtype, 1, p.ldR);
      p.bias = pointer<T>(bias_padded);
    }
    if (p.form == Form::kDirect) {
      weight_padded = padded(weight, dtype, p.Rp, p.ldH);
      query_padded = padded(query, dtype, p.Bp, p.ldR);
      query_t_padded = padded(query.transpose(1, 2), dtype, p.Rp, p.ldB);
      p.weight = pointer<T>(weight_padded);
      p.q = pointer<T>(query_padded);
      p.q_t = pointer<T>(query_t_padded);
    } else {
      set_up_norm();
      const at::Tensor projected_query = at::matmul(query, weight);  // [A, B, H]
      if (p.need_key || p.need_anchor) {
        qw = padded(projected_query, dtype, p.Bp, p.ldH);
        p.qw = pointer<T>(qw);
      }
      qw_t = padded(projected_query.transpose(1, 2), dtype, p.Hp, p.ldB);
      p.qw_t = pointer<T>(qw_t);
      if (bias.defined()) {
        qc = padded(at::matmul(query, bias), dtype, x.A, p.ldB);
        p.qc = pointer<T>(qc);
      }
    }
    if (p.form == Form::kDirect) p.pairs = false;
    if (p.pairs) {
      norm_pairs = row_pairs(norm_matrix);
      qw_t_pairs = row_pairs(qw_t);
      p.norm_pairs = reinterpret_cast<const uint32_t*>(norm_pairs.const_data_ptr());
      p.qw_t_pairs = reinterpret_cast<const uint32_t*>(qw_t_pairs.const_data_ptr());
      if (qw.defined()) {
        qw_pairs = row_pairs(qw);
        p.qw_pairs = reinterpret_cast<const uint32_t*>(qw_pairs.const_data_ptr());
      }
      norm_matrix = qw = qw_t = at::Tensor();
    }
    p.scratch_bytes = (kernels.*Functions<T>::scratch)(p);
    memory = scratch(parts * static_cast<int64_t>(p.scratch_bytes));
    p.scratch = static_cast<std::byte*>(memory.mutable_data_ptr());
  }

  // What |w|^2 is computed from: W'W and W'c, or the triangular factor of [W c].
  void set_up_norm() {
    if (p.form == Form::kTriangular) {
      at::Tensor extended = bias.defined() ? at::cat({weight, bias.unsqueeze(1)}, 1) : weight;
      const at::Tensor r = std::get<1>(at::linalg_qr(extended.to(at::kDouble), "r"));
      const int64_t rank = std::min(x.R, x.H);
      norm_matrix = padded(r.narrow(0, 0, rank).narrow(1, 0, x.H).t(), dtype, p.Hp, p.ldH);
      if (bias.defined()) {
        norm_bias = padded(r.narrow(0, 0, rank).select(1, x.H), dtype, 1, p.ldH);
        if (x.R > x.H) {
          const double below = r.select(0, x.H).select(0, x.H).template item<double>();
          p.norm_constant = static_cast<T>(below * below);
        }
      }
    } else {
      // in double, since its rounding would shift the norms of all keys alike
      const at::Tensor w = weight.to(at::kDouble);
      const at::Tensor gram = at::mm(w.t(), w);
      norm_matrix = padded(gram, dtype, p.Hp, p.ldH);
      if (bias.defined()) {
        const at::Tensor c = bias.to(at::kDouble);
        norm_bias = padded(at::mv(w.t(), c), dtype, 1, p.ldH);
        p.norm_constant = static_cast<T>(c.dot(c).template item<double>());
      }
      p.cancellation =
          static_cast<T>(kCancellation / static_cast<double>(std::max<int64_t>(x.H, 1)) *
                         gram.trace().template item<double>());
    }
    p.norm_matrix = pointer<T>(norm_matrix);
    p.norm_bias = pointer<T>(norm_bias);
  }

  void dispatch() {
    if (x.K == 0 || x.A == 0 || x.B == 0) return;
    const auto function = kernels.*Functions<T>::run;
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) function(p, part);
    });
  }

  at::Tensor zeros(at::IntArrayRef shape, bool wanted = true) {
    return wanted ? at::zeros(shape, at::TensorOptions().dtype(dtype)) : at::Tensor();
  }

  // log of the sum of exponentials over the positive and the kept negatives, [A, B], in double:
  // rounded before it is brought to the logits' unit, it would no longer be the largest logit where
  // that one decides.
  at::Tensor sweep_log_sum_exp() {
    NceParams<T> all = p;
    at::Tensor top = at::full({p.key_parts, x.A, p.ldB}, -1e30, at::TensorOptions().dtype(dtype));
    at::Tensor sum = at::zeros_like(top);
    at::Tensor found = at::zeros({parts, 4}, at::TensorOptions().dtype(at::kDouble));
    p.pass = Pass::kLogSumExp;
    p.running_max = mutable_pointer<T>(top);
    p.running_sum = mutable_pointer<T>(sum);
    p.scalars = mutable_pointer<double>(found);
    dispatch();
    p = all;
    const at::Tensor tops = top.narrow(2, 0, x.B).to(at::kDouble) * kLog2;
    const at::Tensor sums = sum.narrow(2, 0, x.B).to(at::kDouble);
    const at::Tensor own = positive_logit.to(at::kDouble);
    const at::Tensor most = at::maximum(std::get<0>(tops.max(0)), own);
    at::Tensor total = (own - most).exp();
    for (int64_t i = 0; i < p.key_parts; ++i)
      total = total + sums.select(0, i) * (tops.select(0, i) - most).exp();
    const at::Tensor finite = found.select(1, 0).sum();  // NaN if a key was not finite
    return most + total.log() + finite;
  }

  void sweep(Pass pass) {
    p.pass = pass;
    const bool direct = p.form == Form::kDirect;
    const auto doubles = at::TensorOptions().dtype(at::kDouble);
    scalars = at::zeros({parts, 4}, doubles);
    p.scalars = mutable_pointer<double>(scalars);
    if (pass == Pass::kNce && x.each()) {
      loss_parts = at::zeros({p.key_parts, x.A, p.ldB}, doubles);
      p.losses = mutable_pointer<double>(loss_parts);
    }
    if (pass == Pass::kSoftmax) {
      log_normalizer_padded = padded(log_normalizer / kLog2, dtype, x.A, p.ldB);
      // Queries that are not there get no share of anything, whatever the offset.
      log_normalizer_padded.narrow(-1, x.B, p.ldB - x.B).fill_(1e30);
      p.log_normalizer = pointer<T>(log_normalizer_padded);
    }
    d_qw_t = zeros({p.key_parts, x.A, p.Hp, p.ldB}, !direct && (p.need_query || p.need_weight));
    p.need_query = p.need_query || (p.need_weight && !direct);
    d_q = zeros({p.key_parts, x.A, p.Bp, p.ldR}, direct && p.need_query);
    d_logit = zeros({p.key_parts, x.A, p.ldB}, bias.defined());
    d_anchor = zeros({p.key_parts, x.A, p.ldH}, p.need_anchor);
    d_gram = zeros({parts, p.Hp, p.ldH}, !direct && p.need_weight);
    d_hid_sum = zeros({parts, p.ldH}, !direct && p.need_weight);
    d_w_t = zeros({parts, p.Hp, p.ldR}, direct && p.need_weight);
    d_bias = zeros({parts, p.ldR}, direct && p.need_weight);
    d_key_weight = zeros({parts, p.Hp, p.ldD}, x.needs(kNeedKeyWeight));
    d_rows = zeros({p.anchor_parts, x.K, x.D}, x.needs(kNeedBank));
    p.d_qw_t = mutable_pointer<T>(d_qw_t);
    p.d_q = mutable_pointer<T>(d_q);
    p.d_logit = mutable_pointer<T>(d_logit);
    p.d_anchor = mutable_pointer<T>(d_anchor);
    p.d_gram = mutable_pointer<T>(d_gram);
    p.d_hid_sum = mutable_pointer<T>(d_hid_sum);
    p.d_w_t = mutable_pointer<T>(d_w_t);
    p.d_bias = mutable_pointer<T>(d_bias);
    p.d_key_weight = mutable_pointer<T>(d_key_weight);
    p.d_rows = mutable_pointer<T>(d_rows);
    dispatch();
  }

  at::Tensor result(const at::Tensor& gradient, const at::Tensor& like) {
    return gradient.to(like.scalar_type()).contiguous();
  }

  NceResult gradients(const at::Tensor& loss, const double* total, const at::Tensor& cosine,
                      const at::Tensor& d_logit_positive) {
    const bool direct = p.form == Form::kDirect;
    const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
    const double inverse_pairs = static_cast<double>(p.gradient_scale);
    // the positives' part goes last: it is the large term of a sum of many small ones
    const at::Tensor pull = (d_logit_positive * p.scale).unsqueeze(-1);

    at::Tensor d_query_weight;  // sum over keys of ds' hid, [A, B, H]
    if (d_qw_t.defined())
      d_query_weight = sum_parts(d_qw_t).narrow(1, 0, x.H).narrow(2, 0, x.B).transpose(1, 2);
    at::Tensor logits;
    if (d_logit.defined()) logits = sum_parts(d_logit).narrow(1, 0, x.B);

    at::Tensor d_query = none(x.query);
    if (x.needs(kNeedQuery)) {
      at::Tensor g;
      if (direct) {
        g = sum_parts(d_q).narrow(1, 0, x.B).narrow(2, 0, x.R);
      } else {
        g = at::matmul(d_query_weight, weight.t());
        if (bias.defined()) g.add_(logits.unsqueeze(-1) * bias);
      }
      d_query = result(at::addcmul(g, pull, positive), x.query);
    }
    at::Tensor d_positive = none(x.positive);
    if (x.needs(kNeedPositive)) d_positive = result(pull * query, x.positive);
    at::Tensor d_anchors = none(x.anchor);
    if (x.needs(kNeedAnchor)) d_anchors = result(sum_parts(d_anchor).narrow(1, 0, x.H), x.anchor);

    at::Tensor d_bank = none(x.bank);
    if (x.needs(kNeedBank)) {
      at::Tensor rows = sum_parts(d_rows);
      if (x.index.defined())
        rows = at::zeros({x.N, x.D}, rows.options()).index_add_(0, x.index, rows);
      d_bank = result(rows, x.bank);
    }
    at::Tensor d_keys = x.key_weight.defined() ? none(x.key_weight) : none(x.query);
    if (x.needs(kNeedKeyWeight))
      d_keys = result(sum_parts(d_key_weight).narrow(0, 0, x.H).narrow(1, 0, x.D), x.key_weight);

    at::Tensor d_weight = none(x.weight),
               d_bias_out = bias.defined() ? none(x.bias) : none(x.query);
    if (p.need_weight && direct) {
      d_weight = result(sum_parts(d_w_t).narrow(0, 0, x.H).narrow(1, 0, x.R).t(), x.weight);
      if (x.needs(kNeedBias)) d_bias_out = result(sum_parts(d_bias).narrow(0, 0, x.R), x.bias);
    } else if (p.need_weight) {
      const at::Tensor lower = sum_parts(d_gram).narrow(0, 0, x.H).narrow(1, 0, x.H).tril();
      const at::Tensor gram = lower + lower.tril(-1).t();
      const at::Tensor hid_sum = sum_parts(d_hid_sum).narrow(0, 0, x.H);
      at::Tensor g = at::addbmm(at::mm(weight, gram), query.transpose(1, 2), d_query_weight);
      if (bias.defined()) {
        g.add_(at::outer(bias, hid_sum));
        // two large terms that nearly cancel, so in double
        const at::Tensor c = bias.to(at::kDouble);
        at::Tensor b = at::mv(weight.to(at::kDouble), hid_sum.to(at::kDouble)).add_(c, total[3]);
        b.add_(at::bmm(logits.unsqueeze(1), query).to(at::kDouble).sum(0).squeeze(0));
        if (x.needs(kNeedBias)) d_bias_out = result(b, x.bias);
      }
      d_weight = result(g, x.weight);
    }
    if (!x.needs(kNeedWeight)) d_weight = none(x.weight);

    at::Tensor d_scale = none(x.scale), d_offset = none(x.offset);
    if (x.needs(kNeedScale))
      d_scale = at::scalar_tensor(
          total[1] * inverse_pairs + (d_logit_positive * cosine).sum(at::kDouble).item<double>(),
          x.scale.options());
    if (x.needs(kNeedOffset))
      d_offset = at::scalar_tensor(
          total[2] * inverse_pairs - d_logit_positive.sum(at::kDouble).item<double>(),
          x.offset.options());
    return nan_throughout(NceResult{loss, d_query, d_positive, d_anchors, d_bank, d_keys, d_weight,
                                    d_bias_out, d_scale, d_offset});
  }

  const RelationArguments& x;
  const Kernels& kernels;
  const at::ScalarType dtype;
  NceParams<T> p;
  int64_t parts = 1;
  at::Tensor query, positive, weight, bias, bank, pair, positive_logit, log_normalizer;
  at::Tensor key_weight, key_weight_t, anchor, pair_padded, weight_padded, weight_t_padded;
  at::Tensor bias_padded, query_padded, query_t_padded, norm_matrix, norm_bias, qw, qw_t, qc,
      memory;
  at::Tensor norm_pairs, qw_pairs, qw_t_pairs;
  at::Tensor log_normalizer_padded, scalars, loss_parts, d_qw_t, d_q, d_logit, d_anchor, d_gram,
      d_hid_sum;
  at::Tensor d_w_t, d_bias, d_key_weight, d_rows;
};

}  // namespace

NceResult relation_nce_cpu(const at::Tensor& query, const at::Tensor& positive,
                           const at::Tensor& anchor, const at::Tensor& bank,
                           const at::Tensor& weight, const OptionalTensor& bias,
                           const at::Tensor& scale, const at::Tensor& offset,
                           const OptionalTensor& index, const OptionalTensor& key_weight,
                           const OptionalTensor& anchor_id, const OptionalTensor& query_id,
                           const OptionalTensor& key_id, const OptionalTensor& query_label,
                           const OptionalTensor& key_label, const OptionalTensor& excluded,
                           bool self_pairs, const std::string& objective,
                           const OptionalTensor& weights, const std::string& reduction,
                           int64_t need) {
  const RelationArguments x =
      relation_arguments(query, positive, anchor, bank, weight, bias, scale, offset, index,
                         key_weight, anchor_id, query_id, key_id, query_label, key_label, excluded,
                         self_pairs, objective, weights, reduction, need, /*with_half=*/false);
  if (x.index.defined()) check_rows(kOp, "index", x.index, x.N);
  if (x.dtype == at::kDouble) return RelationNce<double>(x, false).run();
  // "medium" allows bfloat16 products of float32 matrices everywhere else in torch, so here too
  const bool bf16 = x.dtype == at::kBFloat16 || at::globalContext().float32MatmulPrecision() ==
                                                    at::Float32MatmulPrecision::MEDIUM;
  return RelationNce<float>(x, bf16).run();
}

NceResult relation_nce_update_cpu(const at::Tensor& query, const at::Tensor& positive,
                                  const at::Tensor& anchor, const at::Tensor& bank,
                                  const at::Tensor& weight, const OptionalTensor& bias,
                                  const at::Tensor& scale, const at::Tensor& offset,
                                  const OptionalTensor& index, const OptionalTensor& key_weight,
                                  const OptionalTensor& anchor_id, const OptionalTensor& query_id,
                                  const OptionalTensor& key_id, const OptionalTensor& query_label,
                                  const OptionalTensor& key_label, const OptionalTensor& excluded,
                                  bool self_pairs, const std::string& objective,
                                  const OptionalTensor& weights, const std::string& reduction,
                                  int64_t need, const at::Tensor& update_index,
                                  const at::Tensor& update_value, double momentum, bool normalize) {
  TORCH_CHECK_VALUE((need & kNeedBank) == 0, "crrcd_ext.", kOp,
                    ": update: a bank that is updated in the call cannot have a gradient");
  const BankUpdate update(kOp, bank, update_index, update_value, momentum, normalize);
  NceResult result =
      relation_nce_cpu(query, positive, anchor, bank, weight, bias, scale, offset, index,
                       key_weight, anchor_id, query_id, key_id, query_label, key_label, excluded,
                       self_pairs, objective, weights, reduction, need);
  update.commit();
  return result;
}

}  // namespace crrcd
