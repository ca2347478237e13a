#include "relation_launch.cuh"

namespace crrcd::cuda {

template struct RelationNceKernels<Precision::kBF16>;
template struct RelationPairsKernel<Precision::kBF16>;

}  // namespace crrcd::cuda
