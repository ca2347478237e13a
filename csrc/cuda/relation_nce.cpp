#include "relation_nce.h"

#include <ATen/TensorOperators.h>

#include <algorithm>

#include "../aten.h"
#include "../checks.h"
#include "bank_update.h"
#include "device.h"
#include "operands.h"
#include "relation_nce_params.h"
#include "relation_plan.h"

namespace crrcd::cuda {

namespace {

constexpr const char* kOp = "relation_nce";
constexpr double kLog2 = 0.69314718055994530942;

template <Precision kPrecision>
class RelationNce {
  using T = SumOf<kPrecision>;
  using Kernels = RelationNceKernels<kPrecision>;
  static constexpr bool kDirect = is_direct(kPrecision);

 public:
  RelationNce(const RelationArguments& arguments, const Device& device)
      : x(arguments), device(device), dtype(c10::CppTypeToScalarType<T>::value) {}

  NceResult run() {
    options = x.query.options().dtype(dtype);
    query = x.query.to(dtype).contiguous();
    positive = x.positive.to(dtype).contiguous();
    weight = x.weight.to(dtype).contiguous();
    if (x.bias.defined()) bias = x.bias.to(dtype).contiguous();
    if (kPrecision == Precision::kF16) set_weight_unit();
    scale = scalar_operand(x.scale, options), offset = scalar_operand(x.offset, options);
    pair = pair_mask(x.A, x.B, x.anchor_id, x.query_id, x.self_pairs, x.query.device());
    const at::Tensor pairs = pair.sum(dtype);
    pair_factor = x.reduction == Reduction::kSum
                      ? at::ones_like(pairs)
                      : at::where(pairs.gt(0), pairs.reciprocal(), at::zeros_like(pairs));
    cosine = (query * positive).sum(-1);
    const at::Tensor logit = cosine * scale - offset;
    set_up();

    at::Tensor loss, d_logit;  // of the positives
    if (x.infonce) {
      const at::Tensor normalizer = sweep_log_sum_exp(logit);
      loss = (normalizer - logit).masked_fill(~pair, 0).sum(at::kDouble);
      d_logit = (logit - normalizer).exp() - 1;
      set_offset(normalizer + offset);
      if (x.need & ~kNeedPositive) sweep(Pass::kSoftmax);
    } else {
      set_offset(offset);
      sweep(Pass::kNce);
      loss = -at::log_sigmoid(logit).masked_fill(~pair, 0).sum(at::kDouble);
      d_logit = -at::sigmoid(-logit);
    }
    at::Tensor total;
    if (scalars.defined()) {
      total = scalars.sum(0);
      if (!x.infonce) loss = loss + total.select(0, 0);
    } else {
      total = at::zeros({4}, options.dtype(at::kDouble));
    }
    return gradients((loss * pair_factor).to(dtype), total,
                     d_logit.masked_fill(~pair, 0) * pair_factor);
  }

 private:
  at::Tensor operand(const at::Tensor& t, int64_t rows, int64_t columns, bool rounded = true) {
    return cuda::operand(kPrecision, t, rows, columns, rounded);
  }

  template <typename U>
  U* make(at::Tensor& t, at::IntArrayRef shape) {
    t = at::empty(shape, options.dtype(c10::CppTypeToScalarType<U>::value));
    return t.mutable_data_ptr<U>();
  }

  void* make_stored(at::Tensor& t, at::IntArrayRef shape) {
    t = at::empty(shape, options.dtype(stored_type(kPrecision)));
    return t.mutable_data_ptr();
  }

  static const int64_t* ids(const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr<int64_t>() : nullptr;
  }

  static const T* data(const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr<T>() : nullptr;
  }

  // Cosines do not know how long relations are. The range of float16 holds W'W up to a column of
  // 255 and slopes / |w| of none far below 1: longer or shorter W and c are scaled by a power of
  // two.
  void set_weight_unit() {
    if (weight.numel() == 0) return;
    at::Tensor longest = weight.square().sum(0).amax().sqrt();
    if (bias.defined()) longest = at::maximum(longest, bias.square().sum().sqrt());
    const at::Tensor unit = (longest / longest.clamp(0.25, 127)).log2().floor().exp2();
    inverse_unit = unit.reciprocal().masked_fill(longest.le(0), 1);
    weight = weight * inverse_unit;
    if (bias.defined()) bias = bias * inverse_unit;
  }

  void set_up() {
    RelationShape shape{kPrecision, x.A, x.B, x.K, x.H, x.R};
    shape.weight = x.needs(kNeedWeight | kNeedBias);
    shape.query = x.needs(kNeedQuery) || (shape.weight && !kDirect);
    shape.keys = x.needs(kNeedBank | kNeedKeyWeight);
    shape.anchor = x.needs(kNeedAnchor);
    wanted = shape;
    plan = plan_relation(shape, device.limits());
    TORCH_CHECK_VALUE(plan.fits, "crrcd_ext.", kOp,
                      ": anchor: expected widths whose tiles fit this GPU's shared memory (",
                      device.limits().shared_block, " bytes a block), got ", x.H, " hidden units, ",
                      x.R, " of the relation and ", x.B,
                      " queries; choose backend 'reference', smaller ones or a lower precision");
    // what kernels count in 32 bits
    constexpr int64_t kWords = int64_t(1) << 32;
    TORCH_CHECK_VALUE(x.B < kWords / 4 && (!wanted.live() || x.A * plan.segment <= kWords),
                      "crrcd_ext.", kOp, ": query: expected fewer than ", kWords / 4,
                      " queries, and for the gradients wanted up to ", kWords / plan.segment,
                      " anchors, got ", x.B, " and ", x.A, "; split the batch");
    p.A = x.A, p.B = x.B, p.D = x.D, p.N = x.N;
    p.H = static_cast<int>(x.H), p.R = static_cast<int>(x.R);
    p.Hp = plan.logit.hidden, p.Rp = plan.logit.relation;
    p.Bp = static_cast<int>(
        round_up_int(static_cast<int>(std::max<int64_t>(x.B, 1)), panel_rows(kPrecision)));
    p.Kp = plan.segment;
    p.logit_layout = plan.logit, p.key_layout = plan.key, p.gram_layout = plan.gram;
    p.direct_layout = plan.direct;
    p.chunks = plan.chunks, p.key_blocks = plan.key_parts;
    p.anchor_parts = plan.anchor_parts, p.gram_chunks = plan.gram_chunks;
    p.boost = kPrecision == Precision::kF16 ? 256 : 1;
    if (x.A == 0 || x.B == 0 || x.K == 0) return;

    bank = with_units(x.bank);
    p.bank.data = bank.const_data_ptr();
    p.bank.storage = storage_of(kOp, bank);
    p.bank.row_stride = bank.stride(0);
    p.bank.index = ids(x.index);
    const int piece = piece_columns(kPrecision);
    if (x.key_weight.defined()) {
      p.Dp = round_up_int(static_cast<int>(x.D), 16);
      key_weight = operand(x.key_weight, round_up_int(p.Hp, piece), p.Dp);
      p.key_weight = key_weight.const_data_ptr();
    }
    p.x = make_stored(keys, {p.Kp, p.Hp});
    p.query_id = ids(x.query_id);
    p.key_id = ids(x.key_id);
    if (x.query_label.defined() && x.key_label.defined()) {
      p.query_label = ids(x.query_label);
      p.key_label = ids(x.key_label);
    }
    p.excluded = excluded_bits(x.excluded);
    if (p.query_id || p.query_label || p.excluded.bits)
      p.keep = reinterpret_cast<uint64_t*>(make<int64_t>(keep, {p.query_panels(), p.Kp}));

    anchor = operand(nan_for_infinity(x.anchor), x.A, p.Hp, /*rounded=*/false);
    weight_stored = operand(weight, p.Rp, p.Hp);
    // products of weights in double, since their rounding would shift all keys alike
    qw_stored =
        kDirect ? operand(query, p.Bp, p.Rp)
                : operand(at::matmul(query.to(at::kDouble), weight.to(at::kDouble)), p.Bp, p.Hp);
    p.anchor = anchor.const_data_ptr();
    p.weight = weight_stored.const_data_ptr();
    p.qw = qw_stored.const_data_ptr();
    if (bias.defined()) {
      bias_padded = padded(bias, p.Rp);
      p.bias = data(bias_padded);
      if (!kDirect) qc = padded(at::matmul(query, bias), p.Bp);
      p.qc = data(qc);
    }
    if (!kDirect && (wanted.keys || wanted.anchor)) {
      const at::Tensor w = weight.to(at::kDouble), exact = at::mm(w.t(), w);
      gram = operand(exact, round_up_int(p.Hp, piece), p.Hp);
      p.gram = gram.const_data_ptr();
      if (bias.defined()) {
        gram_bias = padded(at::mv(w.t(), bias.to(at::kDouble)).to(dtype), p.Hp);
        p.gram_bias = data(gram_bias);
      }
      if (plan.keys_first) set_norm_limits(exact);
    }
    p.scale = data(scale);
  }

  // With E what rounding has done to W'W, <hid, W'W hid> is off by |E|_F |hid|^2 at most, and by
  // the rounding of its sums.
  void set_norm_limits(const at::Tensor& exact) {
    constexpr double kSums = 0x1p-20;
    const at::Tensor stored = gram.narrow(0, 0, x.H).narrow(1, 0, x.H).to(at::kDouble);
    const at::Tensor error = (exact - stored).norm() + exact.norm() * kSums;
    gram_least = error.div(kCancelled).to(dtype);
    p.gram_least = data(gram_least);
    if (!bias.defined()) return;
    bias_square = bias.square().sum();
    p.bias_square = data(bias_square);
  }

  // What is taken from the logits, [A, B] or a number.
  void set_offset(const at::Tensor& value) {
    const at::Tensor kept = (value / kLog2).expand({x.A, x.B}).masked_fill(~pair, kLeftOut);
    offset_padded = padded(kept, p.Bp, kLeftOut);
    p.offset = data(offset_padded);
  }

  // Calls f for one segment of keys after the other, their keys made.
  template <typename F>
  void for_segments(const F& f) {
    if (x.A == 0 || x.B == 0) return;
    for (int64_t first = 0; first < x.K; first += p.Kp) {
      p.first_key = first;
      p.keys = std::min(p.Kp, x.K - first);
      p.accumulate = first > 0;
      if (first != made) Kernels::project(p, device.stream());
      made = first;
      f();
    }
  }

  // log of the sum of exponentials over the positive and the kept negatives, [A, B].
  at::Tensor sweep_log_sum_exp(const at::Tensor& logit) {
    set_offset(offset);
    p.pass = Pass::kLogSumExp;
    if (x.K == 0 || x.A == 0 || x.B == 0) return logit;
    const int64_t slices = p.chunks * plan.logit.warps;
    at::Tensor top, sum;
    p.running_max = make<T>(top, {slices, x.A, p.Bp});
    p.running_sum = make<T>(sum, {slices, x.A, p.Bp});
    for_segments([&] { Kernels::logits(p, device.stream()); });
    const at::Tensor own = logit.to(at::kDouble);
    const at::Tensor tops = top.narrow(2, 0, x.B).to(at::kDouble).mul(kLog2);
    const at::Tensor sums = sum.narrow(2, 0, x.B).to(at::kDouble);
    const at::Tensor most = at::maximum(tops.amax(0), own);
    return (most + ((own - most).exp() + (sums * (tops - most).exp()).sum(0)).log()).to(dtype);
  }

  void sweep(Pass pass) {
    p.pass = pass;
    p.need_query = wanted.query;
    p.need_offset = x.needs(kNeedOffset);
    p.live = wanted.live();
    p.keys_first = plan.keys_first;
    const int64_t slices = p.chunks * plan.logit.warps;
    const bool some = x.K > 0 && x.A > 0 && x.B > 0;
    if (!some) return;
    p.scalars = make<double>(scalars, {p.query_panels() * x.A * p.chunks, 4});
    if (p.need_query) p.d_qw = make<T>(d_qw, {p.chunks, x.A, p.Bp, kDirect ? p.Rp : p.Hp});
    if (bias.defined() && p.need_query && !kDirect)
      p.d_logit = make<T>(d_logit, {slices, x.A, p.Bp});
    if (p.live) {
      p.inverse_norm = make<T>(inverse_norm, {x.A, p.Kp});
      p.c = make<T>(c, {p.query_panels(), x.A, p.Kp});
    }
    if (wanted.keys) p.d_x = make<T>(d_x, {p.anchor_parts, p.Kp, p.Hp});
    if (wanted.anchor) p.d_anchor = make<T>(d_anchor, {p.key_blocks, x.A, p.Hp});
    if (wanted.weight && kDirect) {
      const int64_t slices = p.anchor_parts * p.key_blocks;
      p.d_weight = make<T>(d_weight_parts, {slices, p.Rp, p.Hp});
      if (bias.defined()) p.d_bias = make<T>(d_bias_parts, {slices, p.Rp});
    } else if (wanted.weight) {
      const int64_t rows = round_up_int(p.Hp, GramLayout::kRows);
      p.d_gram = make<T>(d_gram, {p.gram_chunks, rows, p.Hp});
      if (bias.defined()) p.hidden_sum = make<T>(hidden_sum, {p.gram_chunks, rows});
    }
    if (x.needs(kNeedBank)) d_bank = at::zeros({x.N, x.D}, options);
    if (x.needs(kNeedKeyWeight)) d_key_weight = at::zeros({x.H, x.D}, options);
    for_segments([&] {
      if (p.keys_first) Kernels::keys(p, device.stream());
      Kernels::logits(p, device.stream());
      if ((wanted.keys || wanted.anchor) && !p.keys_first) Kernels::keys(p, device.stream());
      if (wanted.weight) Kernels::weight(p, device.stream());
      if (wanted.keys) add_key_gradients();
    });
  }

  // From the gradient of a segment's keys to that of the bank's rows and of what projects them.
  void add_key_gradients() {
    const at::Tensor d_keys =
        (p.anchor_parts > 1 ? d_x.sum(0) : d_x.select(0, 0)).narrow(0, 0, p.keys).narrow(1, 0, x.H);
    at::Tensor index;
    if (x.index.defined()) index = x.index.narrow(0, p.first_key, p.keys);
    if (x.needs(kNeedKeyWeight)) {
      const at::Tensor rows =
          index.defined() ? bank.index_select(0, index) : bank.narrow(0, p.first_key, p.keys);
      d_key_weight.addmm_(d_keys.t(), rows.to(x.dtype).to(dtype));
    }
    if (!x.needs(kNeedBank)) return;
    const at::Tensor d_rows =
        x.key_weight.defined() ? at::mm(d_keys, x.key_weight.to(dtype)) : d_keys;
    if (index.defined())
      d_bank.index_add_(0, index, d_rows);
    else
      d_bank.narrow(0, p.first_key, p.keys).copy_(d_rows);
  }

  NceResult gradients(const at::Tensor& loss, const at::Tensor& total,
                      const at::Tensor& d_logit_positive) {
    const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
    const auto result = [](const at::Tensor& gradient, const at::Tensor& like) {
      return gradient.to(like.options()).contiguous();
    };
    const at::Tensor factor = pair_factor / p.boost;
    const at::Tensor of_weight = inverse_unit.defined() ? factor * inverse_unit : factor;
    // the positives' part goes last: it is the large term of a sum of many small ones
    const at::Tensor pull = (d_logit_positive * scale).unsqueeze(-1);
    const auto summed = [](const at::Tensor& parts) {
      return parts.size(0) > 1 ? parts.sum(0) : parts.select(0, 0);
    };
    at::Tensor d_query_weight, logits;
    if (d_qw.defined())
      d_query_weight = summed(d_qw).narrow(1, 0, x.B).narrow(2, 0, kDirect ? x.R : x.H);
    if (d_logit.defined()) logits = summed(d_logit).narrow(1, 0, x.B);

    at::Tensor d_query = none(x.query);
    if (x.needs(kNeedQuery)) {
      at::Tensor g = pull * positive;
      if (d_qw.defined()) {
        at::Tensor negatives = kDirect ? d_query_weight : at::matmul(d_query_weight, weight.t());
        if (logits.defined()) negatives = negatives + logits.unsqueeze(-1) * bias;
        g = negatives * factor + g;
      }
      d_query = result(g, x.query);
    }
    at::Tensor d_positive = none(x.positive);
    if (x.needs(kNeedPositive)) d_positive = result(pull * query, x.positive);
    at::Tensor d_anchors = none(x.anchor);
    if (x.needs(kNeedAnchor))
      d_anchors = d_anchor.defined() ? result(summed(d_anchor).narrow(1, 0, x.H) * factor, x.anchor)
                                     : at::zeros_like(x.anchor);
    at::Tensor d_rows = none(x.bank);
    if (x.needs(kNeedBank))
      d_rows = d_bank.defined() ? result(d_bank * factor, x.bank) : at::zeros_like(x.bank);
    at::Tensor d_keys = x.key_weight.defined() ? none(x.key_weight) : none(x.query);
    if (x.needs(kNeedKeyWeight))
      d_keys = d_key_weight.defined() ? result(d_key_weight * factor, x.key_weight)
                                      : at::zeros_like(x.key_weight);

    at::Tensor d_weight = none(x.weight), d_biases = bias.defined() ? none(x.bias) : none(x.query);
    if (d_weight_parts.defined()) {
      // the positives have no part in it
      if (x.needs(kNeedWeight))
        d_weight =
            result(summed(d_weight_parts).narrow(0, 0, x.R).narrow(1, 0, x.H) * factor, x.weight);
      if (x.needs(kNeedBias))
        d_biases = result(summed(d_bias_parts).narrow(0, 0, x.R) * factor, x.bias);
    } else if (d_gram.defined()) {
      const at::Tensor lower = summed(d_gram).narrow(0, 0, x.H).narrow(1, 0, x.H).tril();
      const at::Tensor whole = lower + lower.tril(-1).t();
      at::Tensor g = at::addbmm(at::mm(weight, whole), query.transpose(1, 2), d_query_weight);
      if (bias.defined()) {
        const at::Tensor sums = summed(hidden_sum).narrow(0, 0, x.H);
        g = g + at::outer(bias, sums);
        // two large terms that nearly cancel, so in double
        at::Tensor b = at::mv(weight.to(at::kDouble), sums.to(at::kDouble)) +
                       bias.to(at::kDouble) * total.select(0, 3) +
                       at::bmm(logits.unsqueeze(1), query).to(at::kDouble).sum(0).squeeze(0);
        if (x.needs(kNeedBias)) d_biases = result(b * of_weight, x.bias);
      }
      if (x.needs(kNeedWeight)) d_weight = result(g * of_weight, x.weight);
    } else if (wanted.weight) {
      if (x.needs(kNeedWeight)) d_weight = at::zeros_like(x.weight);
      if (x.needs(kNeedBias)) d_biases = at::zeros_like(x.bias);
    }
    const at::Tensor inverse = pair_factor.to(at::kDouble);
    at::Tensor d_scale = none(x.scale), d_offset = none(x.offset);
    if (x.needs(kNeedScale))
      d_scale = result(total.select(0, 1) * inverse + (d_logit_positive * cosine).sum(at::kDouble),
                       x.scale);
    if (x.needs(kNeedOffset))
      d_offset =
          result(-total.select(0, 2) * inverse - d_logit_positive.sum(at::kDouble), x.offset);
    return {loss,   d_query,  d_positive, d_anchors, d_rows,
            d_keys, d_weight, d_biases,   d_scale,   d_offset};
  }

  const RelationArguments& x;
  const Device& device;
  const at::ScalarType dtype;
  at::TensorOptions options;
  RelationShape wanted;
  RelationPlan plan;
  RelationNceParams<T> p;
  int64_t made = -1;  // first key of the segment whose keys are there
  at::Tensor query, positive, weight, bias, scale, offset, pair, pair_factor, cosine, bank;
  at::Tensor key_weight, keys, keep, anchor, weight_stored, qw_stored, bias_padded, qc, gram;
  at::Tensor inverse_unit, gram_least, bias_square;
  at::Tensor gram_bias, offset_padded, scalars, d_qw, d_logit, inverse_norm, c, d_x, d_anchor;
  at::Tensor d_gram, hidden_sum, d_weight_parts, d_bias_parts, d_bank, d_key_weight;
};

Precision precision_for(const RelationArguments& x) {
  const Precision precision = precision_of(x.dtype);
  if (is_direct(precision)) return precision;
  if (x.narrow()) return Precision::kF32;
  // of few rows W'W is nearly singular, which two bytes would show
  return 4 * x.R <= x.H ? Precision::kTf32 : precision;
}

}  // namespace

NceResult relation_nce(const at::Tensor& query, const at::Tensor& positive,
                       const at::Tensor& anchor, const at::Tensor& bank, const at::Tensor& weight,
                       const OptionalTensor& bias, const at::Tensor& scale,
                       const at::Tensor& offset, const OptionalTensor& index,
                       const OptionalTensor& key_weight, const OptionalTensor& anchor_id,
                       const OptionalTensor& query_id, const OptionalTensor& key_id,
                       const OptionalTensor& query_label, const OptionalTensor& key_label,
                       const OptionalTensor& excluded, bool self_pairs,
                       const std::string& objective, const OptionalTensor& weights,
                       const std::string& reduction, int64_t need) {
  const RelationArguments x =
      relation_arguments(query, positive, anchor, bank, weight, bias, scale, offset, index,
                         key_weight, anchor_id, query_id, key_id, query_label, key_label, excluded,
                         self_pairs, objective, weights, reduction, need, /*with_half=*/true);
  refuse_each(kOp, x);
  const Device device(query);
  switch (precision_for(x)) {
    case Precision::kF64:
      return RelationNce<Precision::kF64>(x, device).run();
    case Precision::kF32:
      return RelationNce<Precision::kF32>(x, device).run();
    case Precision::kTf32:
      return RelationNce<Precision::kTf32>(x, device).run();
    case Precision::kBF16:
      return RelationNce<Precision::kBF16>(x, device).run();
    default:
      return RelationNce<Precision::kF16>(x, device).run();
  }
}

NceResult relation_nce_update(const at::Tensor& query, const at::Tensor& positive,
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
  const Device device(query);
  const BankUpdate update(kOp, bank, update_index, update_value, momentum, normalize);
  NceResult result = relation_nce(query, positive, anchor, bank, weight, bias, scale, offset, index,
                                  key_weight, anchor_id, query_id, key_id, query_label, key_label,
                                  excluded, self_pairs, objective, weights, reduction, need);
  update.commit(device.stream());
  return result;
}

}  // namespace crrcd::cuda
