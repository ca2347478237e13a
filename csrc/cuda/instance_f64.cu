#include "instance.cuh"

namespace crrcd::cuda {

void instance_launch(const InstanceParams<double>& params, void* stream) {
  launch_storage(params, stream);
}

}  // namespace crrcd::cuda
