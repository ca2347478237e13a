// Operands as kernels take them.
#pragma once

#include <ATen/core/Tensor.h>
#include "../checks.h"
#include "relation_layout.h"

namespace crrcd::cuda {

at::ScalarType stored_type(Precision precision);

// What the operands' dtype asks for, and for float32 torch's own setting.
Precision precision_of(at::ScalarType dtype);

// A copy of the last two dimensions with zeros behind them. rounded: tf32 numbers in float32.
at::Tensor operand(Precision precision, const at::Tensor& t, int64_t rows, int64_t columns,
                   bool rounded = true);

// A copy of the last dimension with `value` behind it, in t's dtype.
at::Tensor padded(const at::Tensor& t, int64_t columns, double value = 0);

// A number on the device, wherever it comes from, without waiting for the device.
at::Tensor scalar_operand(const at::Tensor& value, const at::TensorOptions& options);

// Says that kernels make a sum of losses alone, without weights.
void refuse_each(const char* op, const Reduced& x);

// The bank where it lies, or a copy where the elements of a row do not lie side by side.
at::Tensor with_units(const at::Tensor& bank);

// Whether the rows of such a bank can be read four elements at a time.
bool whole_quads(const at::Tensor& bank);

}  // namespace crrcd::cuda
