// The device that a host entry works on; with CRRCD_SIMT the emulated one of the tests.
#pragma once

#include <ATen/core/Tensor.h>
#include "relation_plan.h"

#ifndef CRRCD_SIMT
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

namespace crrcd::cuda {

// Makes the tensor's device the current one for a while.
class Device {
 public:
#ifdef CRRCD_SIMT
  explicit Device(const at::Tensor&) {}
  void* stream() const { return nullptr; }
  int64_t multiprocessors() const { return 3; }
  GpuLimits limits() const {
    return {emulated_shared_bytes, 2 * emulated_shared_bytes, 3, 0, emulated_segment};
  }
  static inline int64_t emulated_shared_bytes = 99 * 1024, emulated_segment = 0;
#else
  explicit Device(const at::Tensor& tensor) : guard_(tensor.device()) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  int64_t multiprocessors() const {
    int count = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount,
                                          c10::cuda::current_device()));
    return count;
  }
  GpuLimits limits() const {
    const auto attribute = [](cudaDeviceAttr name) {
      int value = 0;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, c10::cuda::current_device()));
      return int64_t(value);
    };
    return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), multiprocessors(),
            attribute(cudaDevAttrL2CacheSize)};
  }

 private:
  c10::cuda::CUDAGuard guard_;
#endif
};

}  // namespace crrcd::cuda
