// Counter-based random rows, the numbers of crrcd_ext/modules/_counter.py.
#pragma once

#include <cstdint>

#include "../aten.h"

namespace crrcd {

// int64 [count], uniform over [0, bound): the same bits as _counter.uniform_index.
at::Tensor uniform_index(int64_t seed, int64_t step, int64_t count, int64_t bound);

}  // namespace crrcd
