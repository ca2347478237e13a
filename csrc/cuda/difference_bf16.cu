#include "difference_exact.cuh"

namespace crrcd::cuda {

template struct DifferenceKernels<Precision::kBF16>;

}  // namespace crrcd::cuda
