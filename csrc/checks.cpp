#include "checks.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <string>

namespace crrcd {

Storage storage_of(const char* op, const at::Tensor& bank) {
  switch (bank.scalar_type()) {
    case at::kDouble:
      return Storage::kFloat64;
    case at::kFloat:
      return Storage::kFloat32;
    case at::kBFloat16:
      return Storage::kBFloat16;
    case at::kHalf:
      return Storage::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "crrcd_ext.", op,
                       ": bank: expected float64, float32, bfloat16 or float16, got ",
                       bank.scalar_type());
  }
}

void check_index(const char* op, const at::Tensor& index, int64_t queries) {
  TORCH_CHECK_VALUE(index.dim() == 1 || (index.dim() == 2 && index.size(0) == queries),
                    "crrcd_ext.", op, ": index: expected shape [K] or [", queries, ", K], got ",
                    index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "crrcd_ext.", op,
                   ": index: expected int64, got ", index.scalar_type());
}

bool rows_inside(const int64_t* index, int64_t step, int64_t n, int64_t rows) {
  // The top bit stays when an entry is negative or beyond the last row.
  const auto last = static_cast<uint64_t>(rows) - 1;
  uint64_t bits = 0;
  const auto look = [&](int64_t row) {
    bits |= static_cast<uint64_t>(row) | (last - static_cast<uint64_t>(row));
  };
  if (step == 1)
    for (int64_t i = 0; i < n; ++i) look(index[i]);
  else
    for (int64_t i = 0; i < n; ++i) look(index[i * step]);
  return bits >> 63 == 0;
}

void check_rows(const char* op, const char* name, const at::Tensor& index, int64_t rows) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "crrcd_ext.", op, ": ", name,
                   ": expected int64, got ", index.scalar_type());
  const int64_t lines = index.dim() == 2 ? index.size(0) : 1, count = index.size(-1);
  const int64_t stride = index.dim() == 2 ? index.stride(0) : 0, step = index.stride(-1);
  const int64_t* data = index.const_data_ptr<int64_t>();
  std::atomic<bool> found{false};
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(count, 1));
  at::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line)
      if (!rows_inside(data + line * stride, step, count, rows)) found = true;
  });
  if (!found) return;
  for (int64_t line = 0; line < lines; ++line)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = data[line * stride + i * step];
      const std::string place =
          index.dim() == 2 ? c10::str("[", line, ", ", i, "]") : std::to_string(i);
      TORCH_CHECK_INDEX(row >= 0 && row < rows, "crrcd_ext.", op, ": ", name,
                        ": expected rows of the bank in [0, ", rows, "), got ", row,
                        " at position ", place);
    }
}

at::Tensor check_ids(const char* op, const char* name, const std::optional<at::Tensor>& ids,
                     int64_t size) {
  if (!ids) return {};
  CRRCD_CHECK_SHAPE(op, name, *ids, {size});
  TORCH_CHECK_TYPE(ids->scalar_type() == at::kLong, "crrcd_ext.", op, ": ", name,
                   ": expected int64, got ", ids->scalar_type());
  return ids->contiguous();
}

at::Tensor check_excluded(const char* op, const std::optional<at::Tensor>& excluded,
                          int64_t queries, int64_t negatives) {
  if (!excluded) return {};
  CRRCD_CHECK_SHAPE(op, "excluded", *excluded, {queries, (negatives + 31) / 32});
  TORCH_CHECK_TYPE(excluded->scalar_type() == at::kInt, "crrcd_ext.", op,
                   ": excluded: expected int32, got ", excluded->scalar_type());
  return excluded->contiguous();
}

Excluded excluded_bits(const at::Tensor& bits) {
  if (!bits.defined()) return {};
  return {reinterpret_cast<const uint32_t*>(bits.const_data_ptr<int32_t>()), bits.size(1)};
}

Reduced check_reduction(const char* op, const std::optional<at::Tensor>& weights,
                        const std::string& reduction, at::IntArrayRef shape, int64_t need,
                        int64_t own) {
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum" || reduction == "none", "crrcd_ext.",
                    op, ": reduction: expected \"mean\", \"sum\" or \"none\", got \"", reduction,
                    "\"");
  TORCH_CHECK_VALUE(reduction != "none" || (need & ~own) == 0, "crrcd_ext.", op,
                    ": reduction: expected \"mean\" or \"sum\" where more than query and positive "
                    "get a gradient, got \"none\"");
  Reduced reduced;
  reduced.reduction = reduction == "mean"  ? Reduction::kMean
                      : reduction == "sum" ? Reduction::kSum
                                           : Reduction::kNone;
  if (!weights) return reduced;
  const bool whole = weights->sizes().equals(shape);
  TORCH_CHECK_VALUE(whole || weights->sizes().equals(shape.slice(shape.size() - 1)), "crrcd_ext.",
                    op, ": weights: expected shape ", shape, " or its last size alone, got ",
                    weights->sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(weights->scalar_type()), "crrcd_ext.", op,
                   ": weights: expected a floating dtype, got ", weights->scalar_type());
  reduced.weights = weights->expand(shape);
  return reduced;
}

at::ScalarType check_operands(const char* op, std::initializer_list<at::Tensor> operands,
                              bool with_half) {
  const at::ScalarType dtype = operands.begin()->scalar_type();
  for (const at::Tensor& t : operands)
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, "crrcd_ext.", op,
                     ": expected operands of one dtype, got ", dtype, " and ", t.scalar_type());
  const bool known = dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16;
  TORCH_CHECK_TYPE(known || (with_half && dtype == at::kHalf), "crrcd_ext.", op, ": backend ",
                   with_half ? "cuda: expected operands of float64, float32, bfloat16 or float16"
                             : "cpu: expected operands of float64, float32 or bfloat16",
                   ", got ", dtype);
  return dtype;
}

void check_update(const char* op, const at::Tensor& bank, const at::Tensor& index,
                  const at::Tensor& value, double momentum) {
  storage_of(op, bank);
  TORCH_CHECK_VALUE(bank.dim() == 2, "crrcd_ext.", op, ": bank: expected shape [N, D], got ",
                    bank.sizes());
  TORCH_CHECK_VALUE(index.dim() == 1, "crrcd_ext.", op, ": index: expected shape [B], got ",
                    index.sizes());
  CRRCD_CHECK_SHAPE(op, "value", value, {index.size(0), bank.size(1)});
  TORCH_CHECK_VALUE(momentum >= 0 && momentum <= 1, "crrcd_ext.", op,
                    ": momentum: expected a number in [0, 1], got ", momentum);
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "crrcd_ext.", op,
                   ": index: expected int64, got ", index.scalar_type());
}

}  // namespace crrcd
