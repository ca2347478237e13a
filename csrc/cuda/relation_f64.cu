#include "relation_launch.cuh"

namespace crrcd::cuda {

template struct RelationNceKernels<Precision::kF64>;
template struct RelationPairsKernel<Precision::kF64>;

}  // namespace crrcd::cuda
