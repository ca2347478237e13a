#include "difference_exact.cuh"

namespace crrcd::cuda {

template struct DifferenceKernels<float>;

}  // namespace crrcd::cuda
