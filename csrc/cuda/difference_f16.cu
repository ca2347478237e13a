#include "difference_exact.cuh"

namespace crrcd::cuda {

template struct DifferenceKernels<Precision::kF16>;

}  // namespace crrcd::cuda
