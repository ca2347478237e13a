#include "difference_nce.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "../checks.h"
#include "bank_update.h"
#include "difference_params.h"
#include "host.h"
#include "instance_order.h"
#include "kernels.h"

namespace crrcd {

namespace {

constexpr const char* kOp = "difference_nce";
constexpr double kLog2 = 0.69314718055994530942;
constexpr double kLeftOut = -1e30;

// Bits of `need`, in the order of the gradients returned.
enum DifferenceNeed : int64_t {
  kQuery = 1,
  kPositive = 2,
  kAnchor = 4,
  kBank = 8,
  kScale = 16,
  kOffset = 32,
};

struct Arguments {
  at::Tensor query, positive, anchor, bank, scale, offset, index;
  at::Tensor anchor_id, query_id, key_id, query_label, key_label;
  bool self_pairs, infonce;
  double eps;
  int64_t need;
  int64_t A, B, K, D, N;

  bool needs(int64_t bits) const { return (need & bits) != 0; }
  bool own() const { return index.defined() && index.dim() == 2; }
};

template <typename T>
struct Functions;
template <>
struct Functions<float> {
  static constexpr auto scratch = &Kernels::difference_scratch_f32;
  static constexpr auto pairs = &Kernels::difference_pairs_f32;
  static constexpr auto run = &Kernels::difference_f32;
  static constexpr auto finish = &Kernels::difference_finish_f32;
};
template <>
struct Functions<double> {
  static constexpr auto scratch = &Kernels::difference_scratch_f64;
  static constexpr auto pairs = &Kernels::difference_pairs_f64;
  static constexpr auto run = &Kernels::difference_f64;
  static constexpr auto finish = &Kernels::difference_finish_f64;
};

// Rows of the bank that are sorted together: enough for several tiles, and enough buckets for all
// parts to get the same share.
Tiling choose_buckets(int64_t queries, int64_t rows, int64_t parts) {
  Tiling buckets;
  const auto count = [&] { return rows >> buckets.shift; };
  while (buckets.shift < 11 && count() > 64 * parts &&
         queries <= (int64_t(1) << (30 - buckets.shift)))
    ++buckets.shift;
  buckets.tiles = (rows + (int64_t(1) << buckets.shift) - 1) >> buckets.shift;
  return buckets;
}

template <typename T>
class DifferenceNce {
 public:
  explicit DifferenceNce(const Arguments& arguments)
      : x(arguments), kernels(active_kernels()), dtype(c10::CppTypeToScalarType<T>::value) {}

  DifferenceResult run() {
    scale = x.scale.item<double>();
    offset = x.offset.item<double>();
    set_up();
    compare_pairs();
    double loss = 0;
    at::Tensor d_logit;
    const at::Tensor logit = cosine * scale - offset;
    if (x.infonce) {
      const at::Tensor normalizer = sweep_log_sum_exp(logit.to(at::kDouble));
      loss = ((normalizer - logit) * pair).sum().template item<double>();
      d_logit = ((logit - normalizer).exp() - 1).to(dtype) * pair;
      if (p.want != Want::kLoss) {
        set_offsets((normalizer + offset) / -kLog2);
        sweep(Pass::kSoftmax);
      }
    } else {
      sweep(Pass::kNce);
      loss = at::log_sigmoid(logit).neg_().mul_(pair).sum(at::kDouble).template item<double>();
      d_logit = at::sigmoid(-logit).neg_().mul_(pair);
    }
    double sum_g = 0;
    for (int64_t i = 0; scalars.defined() && i < p.parts; ++i) {
      const double* part = scalars.const_data_ptr<double>() + 2 * i;
      loss += x.infonce ? 0 * part[0] : part[0];
      sum_g += part[1];
    }
    // what no sum has seen, of operands that are not finite
    for (const at::Tensor& t : {query, positive, anchor})
      loss += (t * 0).sum().template item<double>();
    return gradients(pairs > 0 ? loss / pairs : 0 * loss, sum_g, d_logit.mul_(inverse_pairs));
  }

 private:
  at::Tensor zeros(at::IntArrayRef shape) {
    return at::zeros(shape, at::TensorOptions().dtype(dtype));
  }

  template <typename F>
  void for_parts(int64_t parts, F function) {
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) (kernels.*function)(p, part);
    });
  }

  void set_up() {
    const int64_t size = sizeof(T), lanes = kernels.vector_bytes / size;
    const int64_t threads = at::get_num_threads();
    p.A = x.A, p.B = x.B, p.K = x.K, p.D = x.D;
    p.Ap = round_up(x.A, lanes), p.Dp = round_up(x.D, lanes);
    p.ldA = leading_dimension(p.Ap, size), p.ldD = leading_dimension(p.Dp, size);
    p.need_query = x.needs(kQuery);
    p.want = x.needs(kAnchor | kBank)             ? Want::kKeys
             : x.needs(kQuery | kScale | kOffset) ? Want::kQuery
                                                  : Want::kLoss;
    p.pair_parts = std::clamp<int64_t>(x.A * x.B * x.D / 16384, 1, threads);

    bank = x.bank.stride(1) == 1 ? x.bank : x.bank.contiguous();
    p.bank.data = bank.const_data_ptr();
    p.bank.storage = storage_of(kOp, bank);
    p.bank.row_stride = bank.stride(0);
    p.tile = 64;
    if (x.own()) {
      sort_negatives(threads);
    } else {
      p.bank.index = pointer<int64_t>(x.index);
      // what a tile takes should stay within the cache, and each part have several of them
      const int64_t column = size * (3 * x.A + 2 * x.B + 2 * x.D);
      while (p.tile < 256 && 2 * p.tile * column <= 800 * 1024 && 4 * p.tile * threads <= x.K)
        p.tile *= 2;
      p.parts = std::clamp<int64_t>((x.K + p.tile - 1) / p.tile, 1, threads);
    }

    query = padded(x.query, dtype, x.B, p.ldD);
    positive = padded(x.positive, dtype, x.B, p.ldD);
    anchor = padded(x.anchor, dtype, x.A, p.ldD);
    const at::Tensor middle = x.A > 0 ? anchor.narrow(1, 0, x.D).mean(0, false, at::kDouble)
                                      : at::zeros({x.D}, at::TensorOptions().dtype(at::kDouble));
    origin = padded(middle - x.eps, dtype, 1, p.ldD);
    eps = padded(at::full({x.D}, x.eps, middle.options()), dtype, 1, p.ldD);
    query_seen = query - origin;
    anchor_seen = anchor - padded(middle, dtype, 1, p.ldD);
    anchor_seen_t = padded(anchor_seen.t(), dtype, p.ldD, p.ldA);
    query_square = query_seen.square().sum(1);
    anchor_square = padded(anchor_seen.square().sum(1), dtype, 1, p.ldA);
    p.query = pointer<T>(query), p.positive = pointer<T>(positive), p.anchor = pointer<T>(anchor);
    p.eps = pointer<T>(eps), p.origin = pointer<T>(origin);
    p.query_seen = pointer<T>(query_seen), p.query_square = pointer<T>(query_square);
    p.anchor_seen = pointer<T>(anchor_seen), p.anchor_square = pointer<T>(anchor_square);
    p.anchor_seen_t = pointer<T>(anchor_seen_t);

    p.anchor_id = pointer<int64_t>(x.anchor_id);
    p.query_id = pointer<int64_t>(x.query_id);
    p.key_id = pointer<int64_t>(x.key_id);
    if (x.query_label.defined() && x.key_label.defined()) {
      p.query_label = pointer<int64_t>(x.query_label);
      p.key_label = pointer<int64_t>(x.key_label);
    }
  }

  void sort_negatives(int64_t threads) {
    p.parts = std::clamp<int64_t>(x.B * x.K / 256, 1, threads);
    const Tiling buckets = choose_buckets(x.B, x.N, p.parts);
    const OwnIndex index{x.index.const_data_ptr<int64_t>(), x.index.stride(0), x.index.stride(1)};
    sorted = sort_entries(index, x.B, 0, x.K, buckets, p.parts, true);
    p.entries = static_cast<const uint32_t*>(sorted.entries.const_data_ptr());
    p.bucket_begin = sorted.tile_begin.data();
    p.part_begin = sorted.part_begin.data();
    p.buckets = buckets.tiles;
    p.bucket_shift = buckets.shift;
    for (int64_t i = 0; i < p.buckets; ++i)
      p.most = std::max(p.most, p.bucket_begin[i + 1] - p.bucket_begin[i]);
  }

  // What depends on an anchor, a query and its positive alone.
  void compare_pairs() {
    half_square = zeros({x.B, p.ldA});
    inverse = zeros({x.B, p.ldA});
    inverse_positive = zeros({x.B, p.ldA});
    cosine = zeros({x.B, p.ldA});
    near = at::zeros({x.B, p.ldA}, at::TensorOptions().dtype(at::kByte));
    p.half_square = mutable_pointer<T>(half_square);
    p.inverse = mutable_pointer<T>(inverse);
    p.inverse_positive = mutable_pointer<T>(inverse_positive);
    p.cosine = mutable_pointer<T>(cosine);
    p.near = mutable_pointer<uint8_t>(near);
    for_parts(p.pair_parts, Functions<T>::pairs);

    pair =
        padded(pair_mask(x.A, x.B, x.anchor_id, x.query_id, x.self_pairs).t(), dtype, x.B, p.ldA);
    pair.mul_(inverse.gt(0)).mul_(inverse_positive.gt(0));
    counts = pair.gt(0);
    pairs = pair.sum(at::kDouble).template item<double>();
    inverse_pairs = pairs > 0 ? 1 / pairs : 0;
    slope = inverse * (scale / kLog2);
    weight = inverse * pair * (scale * inverse_pairs);
    p.slope = pointer<T>(slope);
    p.weight = pointer<T>(weight);

    near.mul_(counts);
    const uint8_t* close = near.const_data_ptr<uint8_t>();
    near_begin.push_back(0);
    for (int64_t b = 0; b < x.B; ++b) {
      for (int64_t a = 0; a < x.A; ++a)
        if (close[b * p.ldA + a]) near_anchor.push_back(static_cast<int32_t>(a));
      near_begin.push_back(static_cast<int64_t>(near_anchor.size()));
    }
    if (!near_anchor.empty()) {
      p.near_begin = near_begin.data();
      p.near_anchor = near_anchor.data();
    }
    set_offsets(at::full_like(pair, -offset / kLog2));
  }

  void set_offsets(const at::Tensor& values) {
    offsets = values.to(dtype).masked_fill(counts.logical_not(), kLeftOut);
    gram_offsets = p.near_begin ? offsets.masked_fill(near.gt(0), kLeftOut) : offsets;
    p.offset = pointer<T>(offsets);
    p.gram_offset = pointer<T>(gram_offsets);
  }

  void dispatch() {
    if (x.K == 0 || x.A == 0 || x.B == 0) return;
    p.scratch_bytes = (kernels.*Functions<T>::scratch)(p);
    const at::Tensor memory = scratch(p.parts * static_cast<int64_t>(p.scratch_bytes));
    p.scratch = static_cast<std::byte*>(memory.mutable_data_ptr());
    for_parts(p.parts, Functions<T>::run);
  }

  // log of the sum of exponentials over the positive and the kept negatives, [B, ldA] in double.
  at::Tensor sweep_log_sum_exp(const at::Tensor& own) {
    const Want want = p.want;
    at::Tensor top = at::full({p.parts, x.B, p.ldA}, kLeftOut, at::TensorOptions().dtype(dtype));
    at::Tensor sum = at::zeros_like(top);
    at::Tensor unused = at::zeros({p.parts, 2}, at::TensorOptions().dtype(at::kDouble));
    p.pass = Pass::kLogSumExp;
    p.want = Want::kLoss;
    p.running_max = mutable_pointer<T>(top);
    p.running_sum = mutable_pointer<T>(sum);
    p.scalars = mutable_pointer<double>(unused);
    dispatch();
    p.want = want;
    const at::Tensor tops = top.to(at::kDouble), positive_logit = own / kLog2;
    const at::Tensor most = at::maximum(std::get<0>(tops.max(0)), positive_logit);
    const at::Tensor total =
        (sum * at::exp2(tops - most)).sum(0).add_(at::exp2(positive_logit - most));
    return (most + at::log2(total)).mul_(kLog2);
  }

  void sweep(Pass pass) {
    p.pass = pass;
    scalars = at::zeros({p.parts, 2}, at::TensorOptions().dtype(at::kDouble));
    p.scalars = mutable_pointer<double>(scalars);
    if (p.want != Want::kLoss) {
      sum_inverse = zeros({p.parts, x.B, p.ldA});
      sum_along = zeros({p.parts, x.B, p.ldA});
      if (p.need_query) d_query = zeros({p.parts, x.B, p.ldD});
    }
    if (p.want == Want::kKeys) {
      d_anchor = zeros({p.parts, x.A, p.ldD});
      sum_f = zeros({p.parts, p.ldA});
      if (x.needs(kBank)) (x.own() ? d_bank : d_rows) = zeros({x.own() ? x.N : x.K, x.D});
    }
    p.sum_inverse = mutable_pointer<T>(sum_inverse);
    p.sum_along = mutable_pointer<T>(sum_along);
    p.d_query = mutable_pointer<T>(d_query);
    p.d_anchor = mutable_pointer<T>(d_anchor);
    p.sum_f = mutable_pointer<T>(sum_f);
    p.d_bank = mutable_pointer<T>(d_bank);
    p.d_rows = mutable_pointer<T>(d_rows);
    dispatch();
  }

  at::Tensor result(const at::Tensor& gradient, const at::Tensor& like) {
    return gradient.narrow(1, 0, x.D).to(like.scalar_type()).contiguous();
  }

  DifferenceResult gradients(double loss, double sum_g, const at::Tensor& d_logit) {
    const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
    const auto sum = [](const at::Tensor& t) { return t.sum(at::kDouble).template item<double>(); };
    at::Tensor c = zeros({x.B, p.ldA}), e = c;
    if (sum_inverse.defined()) {
      c = sum_parts(sum_inverse) * weight;
      e = sum_parts(sum_along).mul(weight).mul_(inverse).mul_(inverse);
    }
    const at::Tensor pull = d_logit * scale;
    const at::Tensor along = pull * cosine;
    const at::Tensor c_positive = pull * inverse * inverse_positive;
    const at::Tensor e_positive = along * inverse * inverse;
    const at::Tensor f_positive = along * inverse_positive * inverse_positive;
    if (d_query.defined()) d_query = sum_parts(d_query);
    if (d_anchor.defined()) d_anchor = sum_parts(d_anchor);
    if (sum_f.defined()) sum_f = sum_parts(sum_f);
    at::Tensor d_positive;
    if (x.needs(kPositive)) d_positive = scratch_rows(x.B);
    p.c = pointer<T>(c), p.e = pointer<T>(e);
    p.c_positive = pointer<T>(c_positive), p.e_positive = pointer<T>(e_positive);
    p.f_positive = pointer<T>(f_positive);
    p.sum_f = mutable_pointer<T>(sum_f);
    p.d_query = mutable_pointer<T>(d_query);
    p.d_positive = mutable_pointer<T>(d_positive);
    p.d_anchor = x.needs(kAnchor) ? mutable_pointer<T>(d_anchor) : nullptr;
    if (p.d_query || p.d_positive || p.d_anchor) for_parts(p.pair_parts, Functions<T>::finish);

    if (d_rows.defined())
      d_bank = x.index.defined() ? zeros({x.N, x.D}).index_add_(0, x.index, d_rows) : d_rows;
    const double d_scale = sum_along.defined() ? sum(inverse * sum_along.select(0, 0)) : 0;
    return {at::scalar_tensor(loss, query.options()),
            x.needs(kQuery) ? result(d_query, x.query) : none(x.query),
            x.needs(kPositive) ? result(d_positive, x.positive) : none(x.positive),
            x.needs(kAnchor) ? result(d_anchor, x.anchor) : none(x.anchor),
            x.needs(kBank) ? result(d_bank, x.bank) : none(x.bank),
            x.needs(kScale) ? at::scalar_tensor(d_scale * inverse_pairs + sum(d_logit * cosine),
                                                x.scale.options())
                            : none(x.scale),
            x.needs(kOffset)
                ? at::scalar_tensor(-sum_g * inverse_pairs - sum(d_logit), x.offset.options())
                : none(x.offset)};
  }

  at::Tensor scratch_rows(int64_t rows) {
    return scratch(rows * p.ldD * static_cast<int64_t>(sizeof(T)))
        .view(dtype)
        .narrow(0, 0, rows * p.ldD)
        .view({rows, p.ldD});
  }

  const Arguments& x;
  const Kernels& kernels;
  const at::ScalarType dtype;
  DifferenceParams<T> p;
  double scale = 1, offset = 0, pairs = 0, inverse_pairs = 0;
  SortedEntries sorted;
  std::vector<int64_t> near_begin;
  std::vector<int32_t> near_anchor;
  at::Tensor bank, query, positive, anchor, origin, eps, query_seen, anchor_seen, anchor_seen_t;
  at::Tensor query_square, anchor_square;
  at::Tensor half_square, inverse, inverse_positive, cosine, near, pair, counts;
  at::Tensor slope, weight, offsets, gram_offsets;
  at::Tensor scalars, sum_inverse, sum_along, d_query, d_anchor, sum_f, d_bank, d_rows;
};

}  // namespace

DifferenceResult difference_nce_cpu(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& anchor,
    const at::Tensor& bank, const at::Tensor& scale, const at::Tensor& offset,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& anchor_id,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    bool self_pairs, double eps, const std::string& objective, int64_t need) {
  Arguments x;
  TORCH_CHECK_VALUE(query.dim() == 2, "crrcd_ext.", kOp, ": query: expected shape [B, D], got ",
                    query.sizes());
  TORCH_CHECK_VALUE(anchor.dim() == 2, "crrcd_ext.", kOp, ": anchor: expected shape [A, D], got ",
                    anchor.sizes());
  TORCH_CHECK_VALUE(bank.dim() == 2, "crrcd_ext.", kOp, ": bank: expected shape [N, D], got ",
                    bank.sizes());
  x.A = anchor.size(0), x.B = query.size(0), x.D = query.size(1), x.N = bank.size(0);
  CRRCD_CHECK_SHAPE(kOp, "positive", positive, {x.B, x.D});
  CRRCD_CHECK_SHAPE(kOp, "anchor", anchor, {x.A, x.D});
  CRRCD_CHECK_SHAPE(kOp, "bank", bank, {x.N, x.D});
  TORCH_CHECK_VALUE(objective == "nce" || objective == "infonce", "crrcd_ext.", kOp,
                    ": objective: expected \"nce\" or \"infonce\", got \"", objective, "\"");
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "crrcd_ext.", kOp,
                    ": eps: expected a number of 0 or more, got ", eps);
  const at::ScalarType dtype = check_operands(kOp, {query, positive, anchor});
  x.query = query, x.positive = positive, x.anchor = anchor, x.bank = bank;
  x.scale = scale, x.offset = offset, x.eps = eps;
  x.K = x.N;
  if (index) {
    TORCH_CHECK_VALUE(index->dim() == 1 || (index->dim() == 2 && index->size(0) == x.B),
                      "crrcd_ext.", kOp, ": index: expected shape [K] or [", x.B, ", K], got ",
                      index->sizes());
    x.index = index->dim() == 1 ? index->contiguous() : *index;
    check_rows(kOp, "index", x.index, x.N);
    x.K = x.index.size(-1);
  }
  x.anchor_id = check_ids(kOp, "anchor_id", anchor_id, x.A);
  x.query_id = check_ids(kOp, "query_id", query_id, x.B);
  x.key_id = check_ids(kOp, "key_id", key_id, x.N);
  x.query_label = check_ids(kOp, "query_label", query_label, x.B);
  x.key_label = check_ids(kOp, "key_label", key_label, x.N);
  x.self_pairs = self_pairs;
  x.infonce = objective == "infonce";
  x.need = need;
  return dtype == at::kDouble ? DifferenceNce<double>(x).run() : DifferenceNce<float>(x).run();
}

DifferenceResult difference_nce_update_cpu(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& anchor,
    const at::Tensor& bank, const at::Tensor& scale, const at::Tensor& offset,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& anchor_id,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    bool self_pairs, double eps, const std::string& objective, int64_t need,
    const at::Tensor& update_index, const at::Tensor& update_value, double momentum,
    bool normalize) {
  TORCH_CHECK_VALUE((need & kBank) == 0, "crrcd_ext.", kOp,
                    ": update: a bank that is updated in the call cannot have a gradient");
  const BankUpdate update(kOp, bank, update_index, update_value, momentum, normalize);
  DifferenceResult result =
      difference_nce_cpu(query, positive, anchor, bank, scale, offset, index, anchor_id, query_id,
                         key_id, query_label, key_label, self_pairs, eps, objective, need);
  update.commit();
  return result;
}

}  // namespace crrcd
