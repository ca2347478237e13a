#include "difference_nce.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../aten.h"
#include "../checks.h"
#include "../relation_arguments.h"
#include "bank_update.h"
#include "difference_params.h"
#include "host.h"
#include "instance_order.h"
#include "kernels.h"
#include "plan.h"

namespace crrcd {

namespace {

constexpr const char* kOp = "difference_nce";
constexpr double kLeftOut = -1e30;
constexpr int kFar = 256;  // how much more than |u|^2 another square is where distances lose digits

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
  buckets.rows = rows;
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
  explicit DifferenceNce(const DifferenceArguments& arguments)
      : x(arguments), kernels(active_kernels()), dtype(c10::CppTypeToScalarType<T>::value) {}

  DifferenceResult run() {
    scale = x.scale.item<double>();
    offset = x.offset.item<double>();
    set_up();
    compare_pairs();
    double loss = 0, sum_g = 0;
    if (x.infonce) {
      const at::Tensor normalizer = sweep_log_sum_exp();
      const double* value = normalizer.const_data_ptr<double>();
      loss = compare_positives([&](int64_t at, double logit, double& d_logit) {
        d_logit = std::exp(logit - value[at]) - 1;
        return value[at] - logit;
      });
      if (p.want != Want::kLoss) {
        set_offsets([&](int64_t at) { return (value[at] + offset) / -kLog2; });
        sweep(Pass::kSoftmax);
      }
    } else {
      sweep(Pass::kNce);
      loss = compare_positives([&](int64_t, double logit, double& d_logit) {
        const double e = std::exp(-std::abs(logit));
        d_logit = (logit > 0 ? -e : -1) / (1 + e);
        return std::log1p(e) + (logit > 0 ? 0 : -logit);
      });
    }
    for (int64_t i = 0; scalars.defined() && i < p.parts * p.sums; ++i) {
      const double* part = scalars.const_data_ptr<double>() + 2 * i;
      double& to = p.each ? query_loss[i % p.sums] : loss;
      to += x.infonce ? 0 * part[0] : part[0];
      sum_g += weight_of(i % p.sums) * part[1];
    }
    // what no sum has seen, of operands that are not finite
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    if (!all_finite<T>(query) || !all_finite<T>(positive) || !all_finite<T>(anchor)) loss = kNaN;
    if (p.each && std::isnan(loss)) {
      const bool all = !all_finite<T>(anchor);
      for (int64_t b = 0; b < x.B; ++b)
        if (all || !all_finite<T>(query.select(0, b)) || !all_finite<T>(positive.select(0, b)))
          query_loss[b] = kNaN;
    }
    return gradients(reduced(loss), sum_g);
  }

 private:
  // The losses [B], or the one that they become; `loss` is their sum where they are not known.
  at::Tensor reduced(double loss) {
    if (p.each) {
      for (int64_t b = 0; b < x.B; ++b) query_loss[b] *= weight_of(b);
      loss = std::accumulate(query_loss.begin(), query_loss.end(), 0.0);
    }
    if (x.reduction == Reduction::kNone) {
      const at::Tensor losses = at::empty({x.B}, at::TensorOptions().dtype(at::kDouble));
      std::copy(query_loss.begin(), query_loss.end(), losses.mutable_data_ptr<double>());
      return losses.to(dtype);
    }
    if (x.reduction == Reduction::kMean) loss = pairs > 0 ? loss / pairs : 0 * loss;
    return at::scalar_tensor(loss, query.options());
  }

  double weight_of(int64_t b) const { return weights.empty() ? 1 : weights[b]; }

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
    p.need_query = x.needs(kDifferenceQuery), p.need_bank = x.needs(kDifferenceBank);
    p.want = x.needs(kDifferenceAnchor | kDifferenceBank)                       ? Want::kKeys
             : x.needs(kDifferenceQuery | kDifferenceScale | kDifferenceOffset) ? Want::kQuery
                                                                                : Want::kLoss;
    p.pair_parts = std::clamp<int64_t>(x.A * x.B * x.D / 16384, 1, threads);
    if (x.each()) {
      p.each = true, p.sums = x.B;
      query_loss.assign(static_cast<size_t>(x.B), 0);
    }
    if (x.weights.defined()) {
      const at::Tensor given = x.weights.to(at::kDouble).contiguous();
      const double* values = given.const_data_ptr<double>();
      weights.assign(values, values + x.B);
    }

    bank = x.bank.stride(1) == 1 ? x.bank : x.bank.contiguous();
    p.bank.data = bank.const_data_ptr();
    p.bank.storage = storage_of(kOp, bank);
    p.bank.row_stride = bank.stride(0);
    p.as_stored = bank.scalar_type() == dtype && p.D == p.Dp;
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
    p.query = pointer<T>(query), p.positive = pointer<T>(positive), p.anchor = pointer<T>(anchor);
    see_from_middle();

    p.anchor_id = pointer<int64_t>(x.anchor_id);
    p.query_id = pointer<int64_t>(x.query_id);
    p.key_id = pointer<int64_t>(x.key_id);
    if (x.query_label.defined() && x.key_label.defined()) {
      p.query_label = pointer<int64_t>(x.query_label);
      p.key_label = pointer<int64_t>(x.key_label);
    }
    p.excluded = excluded_bits(x.excluded);
  }

  // Queries and anchors seen from the anchors' middle. One anchor is the middle: eps taken from it
  // keeps all its digits, which in the origin would be rounded to what the middle's digits hold.
  void see_from_middle() {
    std::vector<double> middle(static_cast<size_t>(x.D), 0);
    for (int64_t a = 0; a < x.A; ++a)
      for (int64_t d = 0; d < x.D; ++d) middle[d] += static_cast<double>(p.anchor[a * p.ldD + d]);
    T* const eps = take(p.ldD);
    T* const origin = take(p.ldD);
    T* const from = take(p.ldD);
    const double of_origin = x.A == 1 ? 0 : x.eps, of_anchor = x.eps - of_origin;
    for (int64_t d = 0; d < x.D; ++d) {
      eps[d] = static_cast<T>(x.eps);
      middle[d] /= static_cast<double>(std::max<int64_t>(x.A, 1));
      origin[d] = static_cast<T>(middle[d] - of_origin);
      from[d] = static_cast<T>(middle[d]);
    }
    p.eps = eps, p.origin = origin;
    p.query_seen = seen_rows(x.B, p.query, origin, 0, p.query_square);
    p.anchor_seen = seen_rows(x.A, p.anchor, from, of_anchor, p.anchor_square);
    T* const transposed = take(p.ldD * p.ldA);
    for (int64_t a = 0; a < x.A; ++a)
      for (int64_t d = 0; d < x.D; ++d) transposed[d * p.ldA + a] = p.anchor_seen[a * p.ldD + d];
    p.anchor_seen_t = transposed;
  }

  const T* seen_rows(int64_t count, const T* rows, const T* from, double eps, const T*& squares) {
    T* const seen = take(count * p.ldD);
    T* const square = take(round_up(count, p.ldA));
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t d = 0; d < x.D; ++d) {
        const T value = static_cast<T>(static_cast<double>(rows[i * p.ldD + d]) -
                                       static_cast<double>(from[d]) - eps);
        seen[i * p.ldD + d] = value;
        sum += static_cast<double>(value) * static_cast<double>(value);
      }
      square[i] = static_cast<T>(sum);
    }
    squares = square;
    return seen;
  }

  // Zeros that stay until the call ends.
  T* take(int64_t count) {
    kept.push_back(zeros({count}));
    return mutable_pointer<T>(kept.back());
  }

  void sort_negatives(int64_t threads) {
    // several parts for each of many threads, but not too many sums
    const int64_t sums = sizeof(T) * (x.B * (2 * p.ldA + p.ldD) + x.A * p.ldD);
    const int64_t room = (int64_t(16) << 20) / std::max<int64_t>(sums, 1);
    const int64_t most = threads == 1 ? 1 : std::clamp<int64_t>(room, threads, 4 * threads);
    p.parts = std::clamp<int64_t>(x.B * x.K / 1024, 1, most);
    const Tiling buckets = choose_buckets(x.B, x.N, std::min(threads, p.parts));
    sorted = sort_entries(kOp, x.index, excluded_bits(x.excluded), {0, x.B, 0, x.K}, buckets,
                          p.parts, /*whole_tiles=*/true);
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
    const int64_t cells = x.B * p.ldA;
    p.half_square = take(cells), p.half_square_far = take(cells);
    p.inverse = take(cells), p.inverse_positive = take(cells);
    p.cosine = take(cells);
    near = at::zeros({x.B, p.ldA}, at::TensorOptions().dtype(at::kByte));
    p.near = mutable_pointer<uint8_t>(near);
    for_parts(p.pair_parts, Functions<T>::pairs);

    counts.assign(static_cast<size_t>(cells), 0);
    const at::Tensor mask =
        pair_mask(x.A, x.B, x.anchor_id, x.query_id, x.self_pairs, at::kCPU).t().contiguous();
    const bool* keep = mask.const_data_ptr<bool>();
    near_begin.push_back(0);
    for (int64_t b = 0; b < x.B; ++b) {
      for (int64_t a = 0; a < x.A; ++a) {
        const int64_t at = b * p.ldA + a;
        counts[at] = keep[b * x.A + a] && p.inverse[at] > 0 && p.inverse_positive[at] > 0;
        pairs += counts[at];
        p.near[at] = p.near[at] && counts[at];
        if (p.near[at]) near_anchor.push_back(static_cast<int32_t>(a));
      }
      near_begin.push_back(static_cast<int64_t>(near_anchor.size()));
    }
    if (!near_anchor.empty()) {
      p.near_begin = near_begin.data();
      p.near_anchor = near_anchor.data();
    }
    factor = x.factor(pairs);
    T* const slope_weights = take(x.B);
    for (int64_t b = 0; b < x.B; ++b)
      slope_weights[b] = static_cast<T>(kLog2 * factor * weight_of(b));
    p.slope_weight = slope_weights;
    T* const slopes = take(cells);
    T* const pair_weights = take(cells);
    T least = std::numeric_limits<T>::infinity(), most = 0;
    for_pairs([&](int64_t at) {
      slopes[at] = p.inverse[at] * static_cast<T>(scale / kLog2);
      pair_weights[at] = counts[at] ? slopes[at] * slope_weights[at / p.ldA] : T(0);
      p.most_u = std::max(p.most_u, p.half_square[at]);
      p.most_inverse = std::max(p.most_inverse, p.inverse[at]);
      if (!counts[at] || p.near[at]) return;
      least = std::min(least, p.half_square[at]);
      most = std::max(most, p.half_square[at]);
    });
    p.most_u = std::sqrt(2 * p.most_u);
    p.least_square = 2 * most / kFar, p.most_square = 2 * least * kFar;
    p.slope = slopes;
    p.weight = pair_weights;
    p.logit_bits = logit_bits(scale, offset);
    set_offsets([&](int64_t) { return -offset / kLog2; });
  }

  // f(position in [B, ldA]) for every pair.
  template <typename F>
  void for_pairs(const F& f) {
    for (int64_t b = 0; b < x.B; ++b)
      for (int64_t a = 0; a < x.A; ++a) f(b * p.ldA + a);
  }

  template <typename F>
  void set_offsets(const F& value) {
    offsets = at::full({x.B, p.ldA}, kLeftOut, at::TensorOptions().dtype(dtype));
    T* all = mutable_pointer<T>(offsets);
    for_pairs([&](int64_t at) {
      if (counts[at]) all[at] = static_cast<T>(value(at));
    });
    p.offset = p.gram_offset = all;
    if (!p.near_begin) return;
    gram_offsets = offsets.masked_fill(near.gt(0), kLeftOut);
    p.gram_offset = pointer<T>(gram_offsets);
  }

  // loss_of(position, logit, d_logit&) of every pair that counts: their sum, and what
  // difference_finish needs of the positives.
  template <typename F>
  double compare_positives(const F& loss_of) {
    const int64_t cells = x.B * p.ldA;
    T* const c = take(cells);
    T* const e = take(cells);
    T* const f = take(cells);
    struct Sums {
      double loss = 0, d_scale = 0, d_offset = 0;
    };
    std::vector<Sums> of_query(static_cast<size_t>(x.B));
    at::parallel_for(0, x.B, std::max<int64_t>(1024 / std::max<int64_t>(x.A, 1), 1),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t b = begin; b < end; ++b)
                         for (int64_t at = b * p.ldA; at < b * p.ldA + x.A; ++at) {
                           if (!counts[at]) continue;
                           double d_logit = 0;
                           Sums& sums = of_query[b];
                           sums.loss += loss_of(at, positive_logit(at), d_logit);
                           d_logit *= factor * weight_of(b);
                           sums.d_offset -= d_logit;
                           sums.d_scale += d_logit * p.cosine[at];
                           const double inverse_u = p.inverse[at];
                           const double inverse_v = p.inverse_positive[at];
                           const double pull = d_logit * scale, along = pull * p.cosine[at];
                           c[at] = static_cast<T>(pull * inverse_u * inverse_v);
                           e[at] = static_cast<T>(along * inverse_u * inverse_u);
                           f[at] = static_cast<T>(along * inverse_v * inverse_v);
                         }
                     });
    p.c_positive = c, p.e_positive = e, p.f_positive = f;
    double loss = 0;
    for (int64_t b = 0; b < x.B; ++b) {
      const Sums& sums = of_query[b];
      (p.each ? query_loss[b] : loss) += sums.loss;
      d_scale_positive += sums.d_scale;
      d_offset_positive += sums.d_offset;
    }
    return loss;
  }

  double positive_logit(int64_t at) const {
    return static_cast<double>(p.cosine[at]) * scale - offset;
  }

  void dispatch() {
    if (x.K == 0 || x.A == 0 || x.B == 0) return;
    const auto bytes = static_cast<int64_t>((kernels.*Functions<T>::scratch)(p));
    const int64_t workers = std::min<int64_t>(p.parts, at::get_num_threads());
    const at::Tensor memory = scratch(workers * bytes);
    auto* base = static_cast<std::byte*>(memory.mutable_data_ptr());
    in_turn(p.parts, workers, [&](int64_t part, int64_t worker) {
      (kernels.*Functions<T>::run)(p, part, base + worker * bytes);
    });
  }

  // log of the sum of exponentials over the positive and the kept negatives, [B, ldA] in double.
  at::Tensor sweep_log_sum_exp() {
    const DifferenceParams<T> all = p;
    at::Tensor top = at::full({p.parts, x.B, p.ldA}, kLeftOut, at::TensorOptions().dtype(dtype));
    at::Tensor sum = at::zeros_like(top);
    at::Tensor unused = at::zeros({p.parts, 2}, at::TensorOptions().dtype(at::kDouble));
    p.pass = Pass::kLogSumExp;
    p.want = Want::kLoss;
    p.each = false, p.sums = 1;
    p.running_max = mutable_pointer<T>(top);
    p.running_sum = mutable_pointer<T>(sum);
    p.scalars = mutable_pointer<double>(unused);
    dispatch();
    p.want = all.want, p.each = all.each, p.sums = all.sums;
    at::Tensor normalizer = at::zeros({x.B, p.ldA}, at::TensorOptions().dtype(at::kDouble));
    double* out = normalizer.mutable_data_ptr<double>();
    const int64_t slice = x.B * p.ldA;
    for_pairs([&](int64_t at) {
      const double own = positive_logit(at) / kLog2;
      double most = own, total = 0;
      for (int64_t i = 0; i < p.parts; ++i)
        most = std::max<double>(most, p.running_max[i * slice + at]);
      for (int64_t i = 0; i < p.parts; ++i)
        total += p.running_sum[i * slice + at] * std::exp2(p.running_max[i * slice + at] - most);
      out[at] = (most + std::log2(total + std::exp2(own - most))) * kLog2;
    });
    return normalizer;
  }

  void sweep(Pass pass) {
    p.pass = pass;
    scalars = at::zeros({p.parts, p.sums, 2}, at::TensorOptions().dtype(at::kDouble));
    p.scalars = mutable_pointer<double>(scalars);
    if (p.want != Want::kLoss) {
      sum_inverse = zeros({p.parts, x.B, p.ldA});
      sum_along = zeros({p.parts, x.B, p.ldA});
      if (p.need_query) d_query = zeros({p.parts, x.B, p.ldD});
    }
    if (p.want == Want::kKeys) {
      d_anchor = zeros({p.parts, x.A, p.ldD});
      sum_f = zeros({p.parts, p.ldA});
      if (x.needs(kDifferenceBank)) (x.own() ? d_bank : d_rows) = zeros({x.own() ? x.N : x.K, x.D});
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

  DifferenceResult gradients(const at::Tensor& loss, double sum_g) {
    const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
    const int64_t cells = x.B * p.ldA;
    T* const c = take(cells);
    T* const e = take(cells);
    double d_scale = d_scale_positive;
    if (p.sum_inverse) {
      for (int64_t i = 0; i < p.parts; ++i)
        for (int64_t at = 0; at < cells; ++at) {
          c[at] += p.sum_inverse[i * cells + at];
          e[at] += p.sum_along[i * cells + at];
        }
      for_pairs([&](int64_t at) {
        const T u = p.inverse[at];
        d_scale += factor * weight_of(at / p.ldA) * u * e[at];
        c[at] *= p.weight[at];
        e[at] *= p.weight[at] * u * u;
      });
    }
    p.c = c, p.e = e;
    if (d_query.defined()) d_query = sum_parts(d_query);
    if (d_anchor.defined()) d_anchor = sum_parts(d_anchor);
    if (sum_f.defined()) sum_f = sum_parts(sum_f);
    at::Tensor d_positive;
    if (x.needs(kDifferencePositive)) d_positive = scratch_rows(x.B);
    p.sum_f = mutable_pointer<T>(sum_f);
    p.d_query = mutable_pointer<T>(d_query);
    p.d_positive = mutable_pointer<T>(d_positive);
    p.d_anchor = x.needs(kDifferenceAnchor) ? mutable_pointer<T>(d_anchor) : nullptr;
    if (p.d_query || p.d_positive || p.d_anchor) for_parts(p.pair_parts, Functions<T>::finish);

    if (d_rows.defined())
      d_bank = x.index.defined() ? zeros({x.N, x.D}).index_add_(0, x.index, d_rows) : d_rows;
    return nan_throughout(DifferenceResult{
        loss, x.needs(kDifferenceQuery) ? result(d_query, x.query) : none(x.query),
        x.needs(kDifferencePositive) ? result(d_positive, x.positive) : none(x.positive),
        x.needs(kDifferenceAnchor) ? result(d_anchor, x.anchor) : none(x.anchor),
        x.needs(kDifferenceBank) ? result(d_bank, x.bank) : none(x.bank),
        x.needs(kDifferenceScale) ? at::scalar_tensor(d_scale, x.scale.options()) : none(x.scale),
        x.needs(kDifferenceOffset)
            ? at::scalar_tensor(d_offset_positive - sum_g * factor, x.offset.options())
            : none(x.offset)});
  }

  at::Tensor scratch_rows(int64_t rows) {
    return scratch(rows * p.ldD * static_cast<int64_t>(sizeof(T)))
        .view(dtype)
        .narrow(0, 0, rows * p.ldD)
        .view({rows, p.ldD});
  }

  const DifferenceArguments& x;
  const Kernels& kernels;
  const at::ScalarType dtype;
  DifferenceParams<T> p;
  double scale = 1, offset = 0, pairs = 0;
  double factor = 0;  // what a sum over pairs is multiplied with
  double d_scale_positive = 0, d_offset_positive = 0;
  SortedEntries sorted;
  std::vector<int64_t> near_begin;
  std::vector<int32_t> near_anchor;
  std::vector<uint8_t> counts;     // [B, ldA], whether a pair counts
  std::vector<double> weights;     // [B], none: 1
  std::vector<double> query_loss;  // [B], where it is wanted one by one
  std::vector<at::Tensor> kept;
  at::Tensor bank, query, positive, anchor, near, offsets, gram_offsets;
  at::Tensor scalars, sum_inverse, sum_along, d_query, d_anchor, sum_f, d_bank, d_rows;
};

}  // namespace

DifferenceResult difference_nce_cpu(
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
                           weights, reduction, need, /*with_half=*/false);
  if (x.index.defined() && !x.own()) check_rows(kOp, "index", x.index, x.N);  // own: when sorted
  return x.dtype == at::kDouble ? DifferenceNce<double>(x).run() : DifferenceNce<float>(x).run();
}

DifferenceResult difference_nce_update_cpu(
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
  const BankUpdate update(kOp, bank, update_index, update_value, momentum, normalize);
  DifferenceResult result = difference_nce_cpu(
      query, positive, anchor, bank, scale, offset, index, anchor_id, query_id, key_id, query_label,
      key_label, excluded, self_pairs, eps, objective, weights, reduction, need);
  update.commit();
  return result;
}

}  // namespace crrcd
