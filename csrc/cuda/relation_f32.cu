#include "relation_launch.cuh"

namespace crrcd::cuda {

template struct RelationNceKernels<Precision::kF32>;
template struct RelationPairsKernel<Precision::kF32>;

}  // namespace crrcd::cuda
