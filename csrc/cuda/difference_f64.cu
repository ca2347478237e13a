#include "difference_exact.cuh"

namespace crrcd::cuda {

template struct DifferenceKernels<Precision::kF64>;

}  // namespace crrcd::cuda
