// Counter-based random rows, the numbers of crrcd_ext/modules/_counter.py.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace crrcd {

// int64 [count], uniform over [0, bound): the same bits as _counter.uniform_index. seed and step
// are int64 scalars.
at::Tensor uniform_index(const at::Tensor& seed, const at::Tensor& step, int64_t count,
                         int64_t bound);

}  // namespace crrcd
