#include "difference_exact.cuh"

namespace crrcd::cuda {

template struct DifferenceKernels<double>;

}  // namespace crrcd::cuda
