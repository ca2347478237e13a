#include "relation_launch.cuh"

namespace crrcd::cuda {

template struct RelationNceKernels<Precision::kTf32>;
template struct RelationPairsKernel<Precision::kTf32>;

}  // namespace crrcd::cuda
