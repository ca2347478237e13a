#include "relation_launch.cuh"

namespace crrcd::cuda {

template struct RelationNceKernels<Precision::kF16>;
template struct RelationPairsKernel<Precision::kF16>;

}  // namespace crrcd::cuda
