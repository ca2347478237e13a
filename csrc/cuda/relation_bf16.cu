#include "relation_launch.cuh"

namespace crrcd::cuda {

template struct RelationNceKernels<Precision::kBF16>;

}  // namespace crrcd::cuda
