#include "difference_exact.cuh"

namespace crrcd::cuda {

template struct DifferenceKernels<Precision::kF32>;

}  // namespace crrcd::cuda
