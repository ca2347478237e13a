#include "similar.cuh"

namespace crrcd::cuda {

void similar_launch(const SimilarParams<double>& params, void* stream) {
  launch_storage(params, stream);
}

}  // namespace crrcd::cuda
