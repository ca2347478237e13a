#include "instance.cuh"

namespace crrcd::cuda {

void instance_launch(const InstanceParams<float>& params, void* stream) {
  launch_storage(params, stream);
}

}  // namespace crrcd::cuda
