// Argument checks of the host entries. Messages name operator, argument, what was expected and what
// came.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>
#include "bank.h"

#define CRRCD_CHECK_SHAPE(op, name, tensor, ...)                                                   \
  TORCH_CHECK_VALUE((tensor).sizes().equals(at::IntArrayRef(__VA_ARGS__)), "crrcd_ext.", op, ": ", \
                    name, ": expected shape ", at::IntArrayRef(__VA_ARGS__), ", got ",             \
                    (tensor).sizes())

namespace crrcd {

Storage storage_of(const char* op, const at::Tensor& bank);

// An index int64 [K], or [queries, K] where each query has its own.
void check_index(const char* op, const at::Tensor& index, int64_t queries);

// Whether n entries, each `step` after the one before, are rows of a bank with `rows` rows.
bool rows_inside(const int64_t* index, int64_t step, int64_t n, int64_t rows);

// Every entry of [K] or [B, K] a row of a bank with `rows` rows; IndexError otherwise.
void check_rows(const char* op, const char* name, const at::Tensor& index, int64_t rows);

// Ids or labels [size], contiguous; undefined when there are none.
at::Tensor check_ids(const char* op, const char* name, const std::optional<at::Tensor>& ids,
                     int64_t size);

// Bits of negatives that are none, int32 [queries, ceil(negatives / 32)], contiguous; undefined
// when there are none.
at::Tensor check_excluded(const char* op, const std::optional<at::Tensor>& excluded,
                          int64_t queries, int64_t negatives);

// The same as kernels see them; `bits` may be undefined.
Excluded excluded_bits(const at::Tensor& bits);

// How the losses of pairs, or queries, become one.
enum class Reduction { kMean, kSum, kNone };

// What a loss operator returns: losses l times weights w, reduced.
struct Reduced {
  at::Tensor weights;  // undefined: 1
  Reduction reduction = Reduction::kMean;

  // Whether the losses are wanted one by one; their sum alone takes less.
  bool each() const { return weights.defined() || reduction == Reduction::kNone; }
  // What a sum over `count` of them is multiplied with.
  double factor(double count) const {
    return reduction != Reduction::kMean ? 1 : count > 0 ? 1 / count : 0;
  }
};

// `shape`: that of the losses, to which the weights are expanded; without a reduction no gradient
// may be wanted beyond those in `own`, whose rows belong to one loss each.
Reduced check_reduction(const char* op, const std::optional<at::Tensor>& weights,
                        const std::string& reduction, at::IntArrayRef shape, int64_t need,
                        int64_t own);

// The operands' common dtype: float64, float32, bfloat16 or, except on the CPU, float16; TypeError
// otherwise.
at::ScalarType check_operands(const char* op, std::initializer_list<at::Tensor> operands,
                              bool with_half = false);

// An update of rows of the bank: index [B], value [B, D], momentum; not whether index stays within
// the bank.
void check_update(const char* op, const at::Tensor& bank, const at::Tensor& index,
                  const at::Tensor& value, double momentum);

}  // namespace crrcd
