#include "difference_nce.h"

#include <ATen/TensorOperators.h>

#include <algorithm>

#include "../aten.h"
#include "../checks.h"
#include "../relation_arguments.h"
#include "bank_update.h"
#include "device.h"
#include "difference_params.h"
#include "operands.h"

namespace crrcd::cuda {

namespace {

constexpr const char* kOp = "difference_nce";
constexpr double kLog2 = 0.69314718055994530942;

template <Precision kPrecision>
class DifferenceNce {
  using T = SumOf<kPrecision>;
  using Kernels = DifferenceKernels<kPrecision>;
  static constexpr int64_t kChunk = kDifferenceChunk<T>;

 public:
  DifferenceNce(const DifferenceArguments& arguments, const Device& device)
      : x(arguments), device(device), dtype(c10::CppTypeToScalarType<T>::value) {}

  DifferenceResult run() {
    options = x.query.options().dtype(dtype);
    scale = scalar_operand(x.scale, options.dtype(at::kDouble));
    offset = scalar_operand(x.offset, scale.options());
    set_up();
    compare_pairs();

    const at::Tensor logit = cosine.to(at::kDouble) * scale - offset;
    at::Tensor loss, d_logit;  // of the positives
    if (x.infonce) {
      const at::Tensor normalizer = sweep_log_sum_exp(logit);
      loss = normalizer - logit;
      d_logit = (logit - normalizer).exp() - 1;
      set_offset(-(normalizer + offset) / kLog2);
      if (sums_wanted()) sweep(Pass::kSoftmax);
    } else {
      sweep(Pass::kNce);
      loss = -at::log_sigmoid(logit);
      d_logit = -at::sigmoid(-logit);
    }
    loss = loss.masked_fill(~mask, 0).sum();
    total = scalars.defined() ? scalars.sum(0) : at::zeros({3}, scale.options());
    if (!x.infonce) loss = loss + total.select(0, 0);
    // what no sum has seen, of operands that are not finite
    for (const at::Tensor& t : {query, positive, anchor}) loss = loss + (t * 0).sum();
    return gradients((loss * pair_factor).to(dtype), d_logit.masked_fill(~mask, 0) * pair_factor);
  }

 private:
  template <typename U>
  U* make(at::Tensor& t, at::IntArrayRef shape, bool zero = false) {
    const auto like = options.dtype(c10::CppTypeToScalarType<U>::value);
    t = zero ? at::zeros(shape, like) : at::empty(shape, like);
    return t.mutable_data_ptr<U>();
  }

  static const int64_t* ids(const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr<int64_t>() : nullptr;
  }

  static const T* data(const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr<T>() : nullptr;
  }

  bool sums_wanted() const { return (x.need & ~kDifferencePositive) != 0; }
  bool some() const { return x.A > 0 && x.B > 0 && x.K > 0; }

  void set_up() {
    const auto up = [](int64_t n) {
      return std::max<int64_t>((n + kChunk - 1) / kChunk, 1) * kChunk;
    };
    p.A = x.A, p.B = x.B, p.K = x.K, p.D = x.D, p.N = x.N;
    p.Ap = up(x.A), p.Bp = up(x.B);
    p.need_query = x.needs(kDifferenceQuery), p.need_anchor = x.needs(kDifferenceAnchor);
    bank = with_units(x.bank);
    p.bank.data = bank.const_data_ptr();
    p.bank.storage = storage_of(kOp, bank);
    p.bank.row_stride = bank.stride(0);
    p.operand = storage_of(kOp, x.query);
    if (x.own()) {
      p.own = x.index.const_data_ptr<int64_t>();
      p.own_stride = x.index.stride(0), p.own_step = x.index.stride(1);
    } else {
      p.bank.index = ids(x.index);
    }

    query = x.query.to(dtype).contiguous();
    positive = x.positive.to(dtype).contiguous();
    anchor = x.anchor.to(dtype).contiguous();
    const at::Tensor middle = x.A > 0 ? anchor.mean(0, /*keepdim=*/false, at::kDouble)
                                      : at::zeros({x.D}, options.dtype(at::kDouble));
    // One anchor is the middle: eps taken from it keeps all its digits.
    const double of_origin = x.A == 1 ? 0 : x.eps, of_anchor = x.eps - of_origin;
    origin = (middle - of_origin).to(dtype);
    query_seen = query - origin;
    anchor_seen = anchor - middle.to(dtype) - of_anchor;
    query_square = query_seen.square().sum(1);
    anchor_square = anchor_seen.square().sum(1);
    p.query = data(query), p.positive = data(positive), p.anchor = data(anchor);
    p.eps = static_cast<T>(x.eps);
    p.origin = data(origin), p.query_seen = data(query_seen), p.anchor_seen = data(anchor_seen);
    p.query_square = data(query_square), p.anchor_square = data(anchor_square);
    if constexpr (stored_bytes(kPrecision) == 2) {
      query_raw_square = query.square().sum(1);
      anchor_raw_square = anchor.square().sum(1);
      anchor_sum = anchor.sum(1);
      p.query_raw_square = data(query_raw_square), p.anchor_sum = data(anchor_sum);
      p.anchor_raw_square = data(anchor_raw_square);
    }

    p.anchor_id = ids(x.anchor_id);
    p.query_id = ids(x.query_id);
    p.key_id = ids(x.key_id);
    if (x.query_label.defined() && x.key_label.defined()) {
      p.query_label = ids(x.query_label);
      p.key_label = ids(x.key_label);
    }
    p.excluded = excluded_bits(x.excluded);
    if (some()) choose_blocks();
  }

  // Enough blocks to fill the device, none without a tile; and segments, of a tile at least, whose
  // rows, and what is remembered of them, stay small.
  void choose_blocks() {
    const int64_t words = p.Ap / kChunk, wanted = 2 * device.multiprocessors();
    p.groups = x.own() ? std::clamp<int64_t>(wanted / words, 1, x.B) : p.Bp / kChunk;
    row_parts = x.own() ? words : words * p.groups;
    constexpr int64_t kBudget = int64_t(8) << 20;
    int64_t of_key = words * static_cast<int64_t>(sizeof(uint64_t));
    if (x.needs(kDifferenceBank)) of_key += row_parts * x.D * static_cast<int64_t>(sizeof(T));
    if (x.own()) of_key *= x.B;
    segment = std::clamp<int64_t>(kBudget / of_key / kDifferenceKeys * kDifferenceKeys,
                                  kDifferenceKeys, std::max<int64_t>(x.K, kDifferenceKeys));
    const int64_t emulated = device.limits().segment;
    if (emulated > 0) segment = emulated;
    const int64_t tiles = (std::min(segment, x.K) + kDifferenceKeys - 1) / kDifferenceKeys;
    p.chunks = std::clamp<int64_t>(wanted / (words * p.groups), 1, tiles);
    const int64_t slice = std::max((x.A + x.B) * x.D, 2 * p.Ap * p.Bp);
    p.exact_blocks =
        std::clamp<int64_t>(kBudget / std::max<int64_t>(slice * static_cast<int64_t>(sizeof(T)), 1),
                            1, std::min<int64_t>(wanted, 32));
  }

  // What depends on an anchor, a query and its positive alone.
  void compare_pairs() {
    p.half_square = make<T>(half_square, {p.Bp, p.Ap}, true);
    p.inverse = make<T>(inverse, {p.Bp, p.Ap}, true);
    p.inverse_positive = make<T>(inverse_positive, {p.Bp, p.Ap}, true);
    p.cosine = make<T>(cosine, {p.Bp, p.Ap}, true);
    p.near = make<bool>(near, {p.Bp, p.Ap}, true);
    if (x.A > 0 && x.B > 0) Kernels::pairs(p, device.stream());
    mask = inverse.ne(0).logical_and_(inverse_positive.ne(0));
    mask.narrow(0, 0, x.B).narrow(1, 0, x.A).logical_and_(
        pair_mask(x.A, x.B, x.anchor_id, x.query_id, x.self_pairs, x.query.device()).t());
    const at::Tensor pairs = mask.sum(at::kDouble);
    pair_factor = x.reduction == Reduction::kSum
                      ? at::ones_like(pairs)
                      : at::where(pairs.gt(0), pairs.reciprocal(), at::zeros_like(pairs));
    near.logical_and_(mask);
    if (some()) {
      near_begin = at::zeros({x.B + 1}, options.dtype(at::kLong));
      near_begin.narrow(0, 1, x.B).copy_(near.narrow(0, 0, x.B).sum(1).cumsum(0));
      p.near_begin = ids(near_begin);
      p.near_pair = make<int64_t>(near_pair, {x.B * x.A});
      Kernels::near(p, device.stream());
    }
    slope = (inverse * (scale / kLog2)).to(dtype);
    p.slope = data(slope);
    set_offset((-offset / kLog2).expand({p.Bp, p.Ap}));
  }

  // What is added to the logits of pairs that count, in units of log 2.
  void set_offset(const at::Tensor& value) {
    offsets = value.to(dtype).masked_fill(~mask, kLeftOutLogit);
    gram_offsets = offsets.masked_fill(near, kLeftOutLogit);
    p.offset = data(offsets), p.gram_offset = data(gram_offsets);
  }

  // Calls f for one segment of the negatives after the other.
  template <typename F>
  void for_segments(const F& f) {
    for (p.first = 0; p.first < x.K; p.first += segment) {
      p.count = std::min(segment, x.K - p.first);
      p.accumulate = p.first > 0;
      Kernels::segment(p, device.stream());
      f();
    }
  }

  void make_near_keys() {
    const int64_t longest = std::min(segment, x.K) * (x.own() ? x.B : 1);
    p.near_key = reinterpret_cast<uint64_t*>(make<int64_t>(near_key, {p.Ap / kChunk * longest}));
  }

  // log of the sum of exponentials over the positive and the kept negatives, [Bp, Ap].
  at::Tensor sweep_log_sum_exp(const at::Tensor& logit) {
    if (!some()) return logit;
    p.pass = Pass::kLogSumExp;
    make_near_keys();
    at::Tensor top = at::full({p.chunks + p.exact_blocks, p.Bp, p.Ap}, kLeftOutLogit, options);
    at::Tensor sum = at::zeros_like(top);
    p.running_max = top.mutable_data_ptr<T>();
    p.running_sum = sum.mutable_data_ptr<T>();
    for_segments([] {});
    const at::Tensor tops = top.to(at::kDouble).mul_(kLog2);
    const at::Tensor most = at::maximum(tops.amax(0), logit);
    return most + ((logit - most).exp() + (sum.to(at::kDouble) * (tops - most).exp()).sum(0)).log();
  }

  void sweep(Pass pass) {
    if (!some()) return;
    p.pass = pass;
    make_near_keys();
    const int64_t words = p.Ap / kChunk;
    p.scalars = make<double>(scalars, {words * p.groups * p.chunks + p.exact_blocks, 3});
    // own: nobody writes to the rows beyond B
    p.sum_inverse = make<T>(sum_inverse, {p.chunks, p.Bp, p.Ap}, x.own());
    p.sum_along = make<T>(sum_along, {p.chunks, p.Bp, p.Ap}, x.own());
    const auto slices = [&](at::Tensor& t, int64_t tiles, int64_t rows) {
      T* memory = make<T>(t, {tiles + p.exact_blocks, rows, x.D});
      t.narrow(0, tiles, p.exact_blocks).zero_();
      return memory;
    };
    if (p.need_query) p.d_query = slices(d_query, words * p.chunks, x.B);
    if (p.need_anchor) {
      p.d_anchor = slices(d_anchor, p.groups * p.chunks, x.A);
      p.sum_y = make<T>(sum_y, {p.groups * p.chunks, p.Ap});
    }
    if (x.needs(kDifferenceBank)) {
      const int64_t longest = std::min(segment, x.K) * (x.own() ? x.B : 1);
      p.d_rows = make<T>(d_rows, {row_parts * longest * x.D});
      d_bank = at::zeros({x.N, x.D}, options);
    }
    for_segments([&] {
      if (p.d_rows) add_rows();
    });
  }

  // From the gradient of a segment's rows to that of the bank.
  void add_rows() {
    const int64_t entries = p.count * (x.own() ? x.B : 1);
    at::Tensor rows =
        d_rows.narrow(0, 0, row_parts * entries * x.D).view({row_parts, entries, x.D});
    rows = row_parts > 1 ? rows.sum(0) : rows.select(0, 0);
    if (x.index.defined())
      d_bank.index_add_(0, x.index.narrow(-1, p.first, p.count).reshape({-1}), rows);
    else
      d_bank.narrow(0, p.first, p.count).copy_(rows);
  }

  DifferenceResult gradients(const at::Tensor& loss, const at::Tensor& d_logit) {
    const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
    const auto summed = [](const at::Tensor& parts) {
      return parts.size(0) > 1 ? parts.sum(0) : parts.select(0, 0);
    };
    // of all that is in units of scale / log 2
    const at::Tensor unit = (pair_factor * kLog2).to(dtype);
    at::Tensor c, e, total_query, total_anchor, total_y;
    at::Tensor d_scale = (d_logit * cosine).sum();
    if (sum_inverse.defined()) {
      const at::Tensor along = summed(sum_along) * inverse;
      c = summed(sum_inverse) * slope * unit;
      e = along * (slope * unit) * inverse;
      d_scale = d_scale + (along.sum(at::kDouble) + total.select(0, 2)) * pair_factor;
    }
    if (d_query.defined()) total_query = summed(d_query) * unit;
    if (d_anchor.defined()) {
      total_anchor = summed(d_anchor) * unit;
      total_y = summed(sum_y) * unit;
    }
    const at::Tensor pull = d_logit * scale, along = pull * cosine;
    const at::Tensor c_positive = (pull * inverse * inverse_positive).to(dtype);
    const at::Tensor e_positive = (along * inverse.square()).to(dtype);
    const at::Tensor f_positive = (along * inverse_positive.square()).to(dtype);
    p.c = data(c), p.e = data(e);
    p.c_positive = data(c_positive), p.e_positive = data(e_positive);
    p.f_positive = data(f_positive);
    p.total_query = data(total_query), p.total_anchor = data(total_anchor);
    p.total_y = data(total_y);
    at::Tensor out_query, out_positive, out_anchor;
    if (p.need_query) p.out_query = make<T>(out_query, {x.B, x.D});
    if (x.needs(kDifferencePositive)) p.out_positive = make<T>(out_positive, {x.B, x.D});
    if (p.need_anchor) p.out_anchor = make<T>(out_anchor, {x.A, x.D});
    if ((p.out_query || p.out_positive || p.out_anchor) && (x.A + x.B) * x.D > 0)
      Kernels::finish(p, device.stream());

    at::Tensor d_rows_out = none(x.bank);
    if (x.needs(kDifferenceBank))
      d_rows_out = d_bank.defined() ? (d_bank * unit).to(x.bank.scalar_type())
                                    : at::zeros({x.N, x.D}, x.bank.options());
    const auto scalar = [](const at::Tensor& value, const at::Tensor& like) {
      return value.to(like.options());
    };
    return {loss,
            p.need_query ? out_query.to(x.dtype) : none(x.query),
            x.needs(kDifferencePositive) ? out_positive.to(x.dtype) : none(x.positive),
            p.need_anchor ? out_anchor.to(x.dtype) : none(x.anchor),
            d_rows_out,
            x.needs(kDifferenceScale) ? scalar(d_scale, x.scale) : none(x.scale),
            x.needs(kDifferenceOffset)
                ? scalar(-total.select(0, 1) * pair_factor - d_logit.sum(), x.offset)
                : none(x.offset)};
  }

  const DifferenceArguments& x;
  const Device& device;
  const at::ScalarType dtype;
  at::TensorOptions options;
  DifferenceParams<T> p;
  int64_t segment = 0, row_parts = 1;
  at::Tensor bank, query, positive, anchor, scale, offset, origin, query_seen, anchor_seen;
  at::Tensor query_square, anchor_square, query_raw_square, anchor_raw_square, anchor_sum,
      half_square, inverse, inverse_positive, cosine, near;
  at::Tensor mask, pair_factor, near_pair, near_begin, slope, offsets, gram_offsets, near_key;
  at::Tensor scalars, total, sum_inverse, sum_along, d_query, d_anchor, sum_y, d_rows, d_bank;
};

}  // namespace

DifferenceResult difference_nce(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& anchor,
    const at::Tensor& bank, const at::Tensor& scale, const at::Tensor& offset,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& anchor_id,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, bool self_pairs, double eps,
    const std::string& objective, const std::optional<at::Tensor>& weights,
    const std::string& reduction, int64_t need) {
  const DifferenceArguments x =
      difference_arguments(query, positive, anchor, bank, scale, offset, index, anchor_id, query_id,
                           key_id, query_label, key_label, excluded, self_pairs, eps, objective,
                           weights, reduction, need, /*with_half=*/true);
  refuse_each(kOp, x);
  const Device device(query);
  switch (x.dtype) {
    case at::kDouble:
      return DifferenceNce<Precision::kF64>(x, device).run();
    case at::kBFloat16:
      return DifferenceNce<Precision::kBF16>(x, device).run();
    case at::kHalf:
      return DifferenceNce<Precision::kF16>(x, device).run();
    default:  // float32 products rounded to tf32 would lose the digits of small differences
      return DifferenceNce<Precision::kF32>(x, device).run();
  }
}

DifferenceResult difference_nce_update(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& anchor,
    const at::Tensor& bank, const at::Tensor& scale, const at::Tensor& offset,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& anchor_id,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, bool self_pairs, double eps,
    const std::string& objective, const std::optional<at::Tensor>& weights,
    const std::string& reduction, int64_t need, const at::Tensor& update_index,
    const at::Tensor& update_value, double momentum, bool normalize) {
  TORCH_CHECK_VALUE((need & kDifferenceBank) == 0, "crrcd_ext.", kOp,
                    ": update: a bank that is updated in the call cannot have a gradient");
  const Device device(query);
  const BankUpdate update(kOp, bank, update_index, update_value, momentum, normalize);
  DifferenceResult result = difference_nce(
      query, positive, anchor, bank, scale, offset, index, anchor_id, query_id, key_id, query_label,
      key_label, excluded, self_pairs, eps, objective, weights, reduction, need);
  update.commit(device.stream());
  return result;
}

}  // namespace crrcd::cuda
