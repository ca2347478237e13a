#include "instance_nce.h"

#include <algorithm>

#include "../aten.h"
#include "../checks.h"
#include "bank_update.h"
#include "device.h"
#include "instance_params.h"
#include "operands.h"

namespace crrcd::cuda {

namespace {

constexpr const char* kOp = "instance_nce";

template <typename T>
class InstanceNce {
 public:
  InstanceNce(const InstanceArguments& arguments, const Device& device)
      : x(arguments), device(device), dtype(c10::CppTypeToScalarType<T>::value) {}

  InstanceResult run() {
    query = x.query.to(dtype).contiguous();
    positive = x.positive.to(dtype).contiguous();
    set_up();
    if (x.B > 0) instance_launch(p, device.stream());
    const auto scalar = [&](int64_t i, const at::TensorOptions& type) {
      return x.B > 0 ? result.select(0, i).to(type) : at::zeros({}, type);
    };
    const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
    const at::Tensor loss =
        losses.defined() ? losses.to(query.scalar_type()) : scalar(0, query.options());
    return {loss,
            p.need_query ? d_query.to(x.dtype) : none(x.query),
            x.needs(kInstancePositive) ? d_positive.to(x.dtype) : none(x.positive),
            x.needs(kInstanceBank) ? bank_gradient() : none(x.bank),
            x.needs(kInstanceScale) ? scalar(1, x.scale.options()) : none(x.scale),
            x.needs(kInstanceOffset) ? scalar(2, x.offset.options()) : none(x.offset)};
  }

 private:
  template <typename U>
  U* make(at::Tensor& t, at::IntArrayRef shape, bool zero = false) {
    const auto options = query.options().dtype(c10::CppTypeToScalarType<U>::value);
    t = zero ? at::zeros(shape, options) : at::empty(shape, options);
    return t.mutable_data_ptr<U>();
  }

  static const int64_t* ids(const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr<int64_t>() : nullptr;
  }

  void set_up() {
    p.B = x.B, p.K = x.K, p.D = x.D, p.N = x.N;
    p.infonce = x.infonce;
    p.need_query = x.needs(kInstanceQuery);
    p.factor = x.factor(static_cast<double>(x.B));
    if (x.weights.defined()) {
      weights = x.weights.to(dtype).contiguous();
      p.weights = weights.const_data_ptr<T>();
    }
    bank = with_units(x.bank);
    p.bank.data = bank.const_data_ptr();
    p.bank.storage = storage_of(kOp, bank);
    p.bank.row_stride = bank.stride(0);
    p.whole_quads = whole_quads(bank);
    if (x.own()) {
      p.own = x.index.const_data_ptr<int64_t>();
      p.own_stride = x.index.stride(0), p.own_step = x.index.stride(1);
    } else {
      p.bank.index = ids(x.index);
    }
    choose_parts();

    p.query = query.const_data_ptr<T>();
    p.positive = positive.const_data_ptr<T>();
    const auto scalar = query.options().dtype(at::kDouble);  // they may come from the CPU
    scale = scalar_operand(x.scale, scalar), offset = scalar_operand(x.offset, scalar);
    p.scale = scale.const_data_ptr<double>();
    p.offset = offset.const_data_ptr<double>();
    p.query_id = ids(x.query_id);
    p.key_id = ids(x.key_id);
    if (x.query_label.defined() && x.key_label.defined()) {
      p.query_label = ids(x.query_label);
      p.key_label = ids(x.key_label);
    }
    p.excluded = excluded_bits(x.excluded);

    if (x.infonce) {
      p.running_max = make<T>(running_max, {p.parts, x.B});
      p.running_sum = make<double>(running_sum, {p.parts, x.B});
      p.running_slope = make<double>(running_slope, {p.parts, x.B});
      p.log_normalizer = make<T>(log_normalizer, {x.B});
    } else if (x.K > 0) {
      p.scalar_rows = x.own() ? p.parts * x.B : p.parts;
      p.scalars = make<double>(scalars, {p.scalar_rows, 3});
    }
    if (p.need_query) {
      p.d_query_parts = make<T>(d_query_parts, {p.parts, x.B, x.D});
      p.d_query = make<T>(d_query, {x.B, x.D});
    }
    if (x.needs(kInstancePositive)) p.d_positive = make<T>(d_positive, {x.B, x.D});
    if (x.needs(kInstanceBank)) {
      if (x.own() && p.B * p.K > 0 && at::globalContext().deterministicAlgorithms()) {
        p.weight = make<T>(weight, {x.B, x.K});
        std::tie(sorted_row, sorted_entry) =
            at::sort(x.index.reshape({-1}), /*stable=*/true, /*dim=*/0, /*descending=*/false);
        p.sorted_row = ids(sorted_row), p.sorted_entry = ids(sorted_entry);
        p.d_bank = make<T>(d_bank, {x.N, x.D});
      } else if (x.own()) {
        p.d_bank = make<T>(d_bank, {x.N, x.D}, /*zero=*/true);
      } else {
        p.d_rows = make<T>(d_bank, {x.K, x.D}, /*zero=*/x.B == 0);
      }
    }
    p.per_query = make<double>(per_query, {x.B, 3});
    if (x.reduction == Reduction::kNone) {
      p.losses = make<double>(losses, {x.B});
      if (!x.infonce && !x.own()) p.part_losses = make<double>(part_losses, {p.parts, x.B});
    } else {
      p.result = make<double>(result, {3});
    }
  }

  // Enough groups of threads to fill the device, none of them with less than a warp's entries.
  void choose_parts() {
    const int64_t processors = device.multiprocessors();
    if (x.own()) {
      const int64_t groups = 32 * processors;
      p.parts = std::clamp<int64_t>(groups / std::max<int64_t>(x.B, 1), 1,
                                    std::max<int64_t>(x.K / 32, 1));
    } else {
      const int64_t tiles = (x.K + kInstanceTile - 1) / kInstanceTile;
      p.parts = std::clamp<int64_t>(tiles, 1, 2 * processors);
    }
  }

  at::Tensor bank_gradient() {
    if (x.own() || !x.index.defined()) return d_bank.to(x.bank.scalar_type());
    return at::zeros({x.N, x.D}, d_bank.options())
        .index_add_(0, x.index, d_bank)
        .to(x.bank.scalar_type());
  }

  const InstanceArguments& x;
  const Device& device;
  const at::ScalarType dtype;
  InstanceParams<T> p;
  at::Tensor query, positive, bank, scale, offset, running_max, running_sum, running_slope;
  at::Tensor log_normalizer, scalars, d_query_parts, d_query, d_positive, d_bank, per_query, result;
  at::Tensor weights, losses, part_losses, weight, sorted_row, sorted_entry;
};

}  // namespace

InstanceResult instance_nce(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& bank,
    const at::Tensor& scale, const at::Tensor& offset, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& query_id, const std::optional<at::Tensor>& key_id,
    const std::optional<at::Tensor>& query_label, const std::optional<at::Tensor>& key_label,
    const std::optional<at::Tensor>& excluded, const std::string& objective,
    const std::optional<at::Tensor>& weights, const std::string& reduction, int64_t need) {
  const InstanceArguments x = instance_arguments(
      query, positive, bank, scale, offset, index, query_id, key_id, query_label, key_label,
      excluded, objective, weights, reduction, need, /*with_half=*/true);
  const Device device(query);
  return x.dtype == at::kDouble ? InstanceNce<double>(x, device).run()
                                : InstanceNce<float>(x, device).run();
}

InstanceResult instance_nce_update(
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
  const Device device(query);
  const BankUpdate update(kOp, bank, update_index, update_value, momentum, normalize);
  InstanceResult result =
      instance_nce(query, positive, bank, scale, offset, index, query_id, key_id, query_label,
                   key_label, excluded, objective, weights, reduction, need);
  update.commit(device.stream());
  return result;
}

}  // namespace crrcd::cuda
