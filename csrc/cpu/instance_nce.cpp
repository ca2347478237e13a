#include "instance_nce.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <atomic>

#include "../aten.h"
#include "../checks.h"
#include "bank_update.h"
#include "host.h"
#include "instance_order.h"
#include "instance_params.h"
#include "kernels.h"

namespace crrcd {

namespace {

constexpr const char* kOp = "instance_nce";

// Entries that are sorted at a time: the lists take up to four times as many bytes.
constexpr int64_t kEntriesAtOnce = int64_t(1) << 22;
// Entries of a query in a tile, on average, from which on its runs are listed.
constexpr int64_t kLeastRun = 8;

std::atomic<int> forced_order{-1};

// Sorting pays when a row of the bank is wanted several times and the cache does not hold the bank
// anyway.
Order choose_order(int64_t entries, int64_t rows, int64_t row_bytes) {
  constexpr int64_t kCached = 512 * 1024;
  const int forced = forced_order;
  if (forced >= 0) return static_cast<Order>(forced);
  return 2 * entries >= 3 * rows && rows * row_bytes > kCached ? Order::kBucketed : Order::kDirect;
}

template <typename T>
struct Functions;
template <>
struct Functions<float> {
  static constexpr auto scratch = &Kernels::instance_scratch_f32;
  static constexpr auto run = &Kernels::instance_f32;
};
template <>
struct Functions<double> {
  static constexpr auto scratch = &Kernels::instance_scratch_f64;
  static constexpr auto run = &Kernels::instance_f64;
};

template <typename T>
class InstanceNce {
 public:
  explicit InstanceNce(const InstanceArguments& arguments)
      : x(arguments), kernels(active_kernels()), dtype(c10::CppTypeToScalarType<T>::value) {}

  InstanceResult run() {
    query = x.query.to(dtype).contiguous();
    positive = x.positive.to(dtype).contiguous();
    const double scale = x.scale.item<double>(), offset = x.offset.item<double>();
    p.scale = static_cast<T>(scale), p.scale_log2 = static_cast<T>(scale / kLog2);
    p.offset = static_cast<T>(offset), p.offset_log2 = static_cast<T>(offset / kLog2);
    const double factor = x.factor(static_cast<double>(x.B));
    p.gradient_scale = static_cast<T>(factor);
    const at::Tensor product = (query * positive).sum(-1);
    const at::Tensor logit = product * p.scale - p.offset;

    set_up();
    double loss = 0, d_scale = 0, d_offset = 0;
    at::Tensor losses;  // of each query, in double, where they are wanted one by one
    at::Tensor d_logit, d_query;
    if (x.infonce) {
      sweep(Pass::kLogSumExp);
      const at::Tensor normalizer = log_normalizer(logit.to(at::kDouble));
      losses = normalizer - logit;
      if (!x.each()) loss = losses.sum().template item<double>();
      d_logit = ((logit - normalizer).exp() - 1).to(dtype);
      // of a part's sums of exp(logit - maximum) this makes probabilities
      const at::Tensor share = (running_max - normalizer).exp();
      if (x.weights.defined()) share.mul_(x.weights);
      d_scale = (running_slope * share).sum().template item<double>();
      d_offset = -(running_sum * share).sum().template item<double>();
      if (p.need_query)
        d_query = sum_parts(d_query_parts.mul_(
            (share * (static_cast<double>(p.scale) * p.gradient_scale)).unsqueeze(-1).to(dtype)));
      if (x.needs(kInstanceBank)) {
        const at::Tensor row = padded(normalizer / kLog2, dtype, 1, p.ldB);
        p.log_normalizer = pointer<T>(row);
        sweep(Pass::kSoftmax);
      }
    } else {
      sweep(Pass::kNce);
      const double* s = scalars.const_data_ptr<double>();
      for (int64_t i = 0; i < p.parts; ++i, s += 3) loss += s[0], d_scale += s[1], d_offset += s[2];
      const at::Tensor of_positive = at::log_sigmoid(logit).neg_();
      if (x.each())
        losses = sum_parts(loss_parts).add(of_positive);
      else
        loss += of_positive.sum(at::kDouble).template item<double>();
      d_logit = at::sigmoid(-logit).neg_();
      if (p.need_query) d_query = sum_parts(d_query_parts);
    }
    if (x.weights.defined()) {
      losses.mul_(x.weights);
      d_logit.mul_(x.weights);
      loss = losses.sum().template item<double>();
    }
    const at::Tensor reduced = x.reduction == Reduction::kNone
                                   ? losses.to(dtype)
                                   : at::scalar_tensor(loss * factor, query.options());
    // the positives' part goes last: it is the large term of a sum of many small ones
    const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
    const at::Tensor pull = (d_logit * (p.scale * p.gradient_scale)).unsqueeze(-1);
    return nan_throughout(InstanceResult{
        reduced,
        p.need_query ? result(at::addcmul(d_query.narrow(1, 0, x.D), pull, positive), x.query)
                     : none(x.query),
        x.needs(kInstancePositive) ? result(pull * query, x.positive) : none(x.positive),
        x.needs(kInstanceBank) ? bank_gradient() : none(x.bank),
        x.needs(kInstanceScale) ? total(d_scale, d_logit * product, x.scale) : none(x.scale),
        x.needs(kInstanceOffset) ? total(d_offset, -d_logit, x.offset) : none(x.offset)});
  }

 private:
  void set_up() {
    const int64_t lanes = kernels.vector_bytes / static_cast<int64_t>(sizeof(T));
    p.B = x.B, p.K = x.K, p.D = x.D, p.N = x.N;
    p.Bp = round_up(x.B, lanes), p.Dp = round_up(x.D, lanes);
    p.ldB = leading_dimension(p.Bp, sizeof(T)), p.ldD = leading_dimension(p.Dp, sizeof(T));
    p.need_query = x.needs(kInstanceQuery);
    if (x.each()) {
      weight = padded(x.weights.defined() ? x.weights : at::ones({x.B}, query.options()), dtype, 1,
                      p.ldB);
      p.weight = pointer<T>(weight);
    }

    bank = x.bank.stride(1) == 1 || x.D == 1 ? x.bank : x.bank.contiguous();
    p.bank.data = bank.const_data_ptr();
    p.bank.storage = storage_of(kOp, bank);
    p.bank.row_stride = bank.stride(0);
    const int64_t row_bytes = x.D * bank.element_size();
    if (x.own()) {
      p.own = x.index.const_data_ptr<int64_t>();
      p.own_stride = x.index.stride(0), p.own_step = x.index.stride(1);
      p.order = x.needs(kInstanceBank) ? Order::kBucketed : choose_order(x.B * x.K, x.N, row_bytes);
    } else {
      p.bank.index = pointer<int64_t>(x.index);
    }
    // bucketed: when they are sorted
    if (x.index.defined() && p.order != Order::kBucketed) check_rows(kOp, "index", x.index, x.N);
    // a thread is not worth waking for less
    constexpr int64_t kProductsOfAPart = int64_t(1) << 18;
    const int64_t work = x.B * x.K * std::max<int64_t>(x.D, 16) / kProductsOfAPart;
    p.parts = std::clamp<int64_t>(work, 1, at::get_num_threads());

    p.tile_registers = kernels.tile_registers && sizeof(T) == 4 && p.order == Order::kShared &&
                       p.bank.storage == Storage::kBFloat16 && x.B >= kLeastQueries;
    if (x.query.scalar_type() == at::kBFloat16) p.query_parts = 1, p.gradient_parts = 2;

    query_padded = padded(query, dtype, x.B, p.ldD);
    p.query = pointer<T>(query_padded);
    if (p.order == Order::kShared) {
      query_t = padded(query.t(), dtype, x.D, p.ldB);
      p.query_t = pointer<T>(query_t);
    }
    p.query_id = pointer<int64_t>(x.query_id);
    p.key_id = pointer<int64_t>(x.key_id);
    if (x.query_label.defined() && x.key_label.defined()) {
      p.query_label = pointer<int64_t>(x.query_label);
      p.key_label = pointer<int64_t>(x.key_label);
    }
    p.excluded = excluded_bits(x.excluded);
    if (p.need_query) {
      d_query_parts = at::zeros({p.parts, x.B, p.ldD}, query.options());
      p.d_query = mutable_pointer<T>(d_query_parts);
    }
    if (x.needs(kInstanceBank)) {
      const bool shared = p.order == Order::kShared;
      d_bank = at::zeros({shared ? x.K : x.N, p.Dp}, query.options());
      (shared ? p.d_rows : p.d_bank) = mutable_pointer<T>(d_bank);
    }
    if (p.order == Order::kBucketed) {
      tiling = choose_tiling(x.B, x.N, p.Dp * static_cast<int64_t>(sizeof(T)), p.parts);
      p.tiles = tiling.tiles;
      p.tile_shift = tiling.shift;
    }
    p.scratch_bytes = (kernels.*Functions<T>::scratch)(p);
    memory = scratch(p.parts * static_cast<int64_t>(p.scratch_bytes));
    p.scratch = static_cast<std::byte*>(memory.mutable_data_ptr());
  }

  void sweep(Pass pass) {
    const auto doubles = at::TensorOptions().dtype(at::kDouble);
    p.pass = pass;
    if (pass == Pass::kNce) {
      scalars = at::zeros({p.parts, 3}, doubles);
      p.scalars = mutable_pointer<double>(scalars);
      if (x.each()) {
        loss_parts = at::zeros({p.parts, x.B}, doubles);
        p.losses = mutable_pointer<double>(loss_parts);
      }
    } else if (pass == Pass::kLogSumExp) {
      running_max = at::full({p.parts, p.ldB}, -1e30, query.options());
      running_sum = at::zeros({p.parts, x.B}, doubles);
      running_slope = at::zeros({p.parts, x.B}, doubles);
      p.running_max = mutable_pointer<T>(running_max);
      p.running_sum = mutable_pointer<double>(running_sum);
      p.running_slope = mutable_pointer<double>(running_slope);
    }
    if (x.B == 0 || x.K == 0) return;
    if (p.order != Order::kBucketed) return dispatch();
    // all negatives of some queries, whose runs are long; otherwise some negatives of all queries
    const int64_t queries = std::clamp<int64_t>(kEntriesAtOnce / x.K, 1, x.B);
    const bool runs =
        x.K <= kEntriesAtOnce && x.K >= kLeastRun * tiling.tiles && 2 * queries * x.K >= 3 * x.N;
    const int64_t columns = runs ? x.K : std::max<int64_t>(kEntriesAtOnce / x.B, 1);
    const bool whole_tiles = p.d_bank != nullptr;
    const auto work_off = [&](const Batch& batch) {
      const SortedEntries sorted =
          runs ? sort_rows(kOp, x.index, p.excluded, batch, tiling, p.parts, whole_tiles)
               : sort_entries(kOp, x.index, p.excluded, batch, tiling, p.parts, whole_tiles);
      const void* entries = sorted.entries.const_data_ptr();
      p.rows = runs ? static_cast<const uint8_t*>(entries) : nullptr;
      p.entries = runs ? nullptr : static_cast<const uint32_t*>(entries);
      p.run_end = runs ? static_cast<const uint32_t*>(sorted.run_end.const_data_ptr()) : nullptr;
      p.first_query = batch.first_query;
      p.tile_begin = sorted.tile_begin.data();
      p.part_begin = sorted.part_begin.data();
      dispatch();
    };
    if (runs)
      for (int64_t b = 0; b < x.B; b += queries) work_off({b, std::min(b + queries, x.B), 0, x.K});
    else
      for (int64_t first = 0; first < x.K; first += columns)
        work_off({0, x.B, first, std::min(first + columns, x.K)});
  }

  void dispatch() {
    const auto function = kernels.*Functions<T>::run;
    at::parallel_for(0, p.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) function(p, part);
    });
  }

  // log of the sum of exponentials over the positive and the kept negatives, [B] in double.
  at::Tensor log_normalizer(const at::Tensor& logit) {
    running_max = running_max.narrow(1, 0, x.B).to(at::kDouble).mul_(kLog2);
    const at::Tensor most = at::maximum(std::get<0>(running_max.max(0)), logit);
    at::Tensor sum = (logit - most).exp();
    for (int64_t i = 0; i < p.parts; ++i)
      sum = sum + running_sum.select(0, i) * (running_max.select(0, i) - most).exp();
    return most + sum.log();
  }

  at::Tensor result(const at::Tensor& gradient, const at::Tensor& like) {
    return gradient.to(like.scalar_type()).contiguous();
  }

  at::Tensor total(double negatives, const at::Tensor& positives, const at::Tensor& like) {
    const double sum = negatives + positives.sum(at::kDouble).template item<double>();
    return at::scalar_tensor(sum * static_cast<double>(p.gradient_scale), like.options());
  }

  at::Tensor bank_gradient() {
    const at::Tensor rows = d_bank.narrow(1, 0, x.D);
    if (p.order != Order::kShared || !x.index.defined()) return result(rows, x.bank);
    return result(at::zeros({x.N, x.D}, rows.options()).index_add_(0, x.index, rows), x.bank);
  }

  const InstanceArguments& x;
  const Kernels& kernels;
  const at::ScalarType dtype;
  InstanceParams<T> p;
  Tiling tiling;
  at::Tensor query, positive, bank, query_padded, query_t, memory, scalars, d_query_parts, d_bank;
  at::Tensor weight, loss_parts, running_max, running_sum, running_slope;
};

}  // namespace

void set_instance_order(const std::string& order) {
  TORCH_CHECK_VALUE(order.empty() || order == "direct" || order == "bucketed",
                    "crrcd_ext.set_instance_order: expected direct or bucketed, got ", order);
  forced_order = order.empty()       ? -1
                 : order == "direct" ? static_cast<int>(Order::kDirect)
                                     : static_cast<int>(Order::kBucketed);
}

InstanceResult instance_nce_cpu(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& bank,
    const at::Tensor& scale, const at::Tensor& offset, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, const std::string& objective,
    const std::optional<at::Tensor>& weights, const std::string& reduction, int64_t need) {
  const InstanceArguments x = instance_arguments(
      query, positive, bank, scale, offset, index, query_id, key_id, query_label, key_label,
      excluded, objective, weights, reduction, need, /*with_half=*/false);
  return x.dtype == at::kDouble ? InstanceNce<double>(x).run() : InstanceNce<float>(x).run();
}

InstanceResult instance_nce_update_cpu(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& bank,
    const at::Tensor& scale, const at::Tensor& offset, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, const std::string& objective,
    const std::optional<at::Tensor>& weights, const std::string& reduction, int64_t need,
    const at::Tensor& update_index, const at::Tensor& update_value, double momentum,
    bool normalize) {
  TORCH_CHECK_VALUE((need & kInstanceBank) == 0, "crrcd_ext.", kOp,
                    ": update: a bank that is updated in the call cannot have a gradient");
  const BankUpdate update(kOp, bank, update_index, update_value, momentum, normalize);
  InstanceResult result =
      instance_nce_cpu(query, positive, bank, scale, offset, index, query_id, key_id, query_label,
                       key_label, excluded, objective, weights, reduction, need);
  update.commit();
  return result;
}

}  // namespace crrcd
