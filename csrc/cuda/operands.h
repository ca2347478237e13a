// Matrices as the relation kernels multiply them.
#pragma once

#include <ATen/ATen.h>

#include "relation_layout.h"

namespace crrcd::cuda {

at::ScalarType stored_type(Precision precision);

// What the operands' dtype asks for, and for float32 torch's own setting. narrow: W has few rows,
// so that W'W is nearly singular and would show it rounded to two bytes.
Precision precision_of(at::ScalarType dtype, bool narrow = false);

// A copy of the last two dimensions with zeros behind them. rounded: tf32 numbers in float32.
at::Tensor operand(Precision precision, const at::Tensor& t, int64_t rows, int64_t columns,
                   bool rounded = true);

// A copy of the last dimension with `value` behind it, in t's dtype.
at::Tensor padded(const at::Tensor& t, int64_t columns, double value = 0);

}  // namespace crrcd::cuda
