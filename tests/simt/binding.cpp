// The host entries of the CUDA kernels, built against the emulator and registered for tensors on
// the CPU under another library's name, so that tests run them as they run any other backend.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "../../csrc/cuda/bank_update.h"
#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/difference_nce.h"
#include "../../csrc/cuda/instance_nce.h"
#include "../../csrc/cuda/relation.h"
#include "../../csrc/cuda/relation_nce.h"
#include "../../csrc/cuda/similar_mask.h"
#include "simt.h"

namespace {

// Memory of tensors that are made while it is in use: filled with NaN, and known to the checker to
// the byte.
class WatchedAllocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = std::malloc(bytes + 1);
    TORCH_CHECK(memory, "out of memory");
    std::memset(memory, 0xff, bytes);
    const std::lock_guard<std::mutex> lock(mutex());
    live()[memory] = bytes;
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    std::memcpy(to, from, count);
  }

  static void watch_all() {
    const std::lock_guard<std::mutex> lock(mutex());
    simt::forget();
    for (const auto& [memory, bytes] : live()) simt::watch(memory, bytes, "a tensor");
  }

 private:
  static std::map<void*, size_t>& live() {
    static auto* const all = new std::map<void*, size_t>;  // outlives every tensor
    return *all;
  }
  static std::mutex& mutex() {
    static auto* const one = new std::mutex;
    return *one;
  }
  static void release(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex());
    live().erase(memory);
    std::free(memory);
  }
};

WatchedAllocator watched;
c10::Allocator* usual = nullptr;

}  // namespace

// From now on tensors are made in watched memory, and kernels may use that of no others; or no
// more.
extern "C" __attribute__((visibility("default"))) void simt_watch_tensors(int on) {
  if (usual == nullptr) usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &watched : usual, /*priority=*/100);
  simt::on_launch(on ? &WatchedAllocator::watch_all : nullptr);
  if (!on) simt::forget();
}

// Shared memory that a block of the emulated GPU can ask for.
extern "C" __attribute__((visibility("default"))) void simt_set_shared_bytes(int64_t bytes) {
  crrcd::cuda::Device::emulated_shared_bytes = bytes;
}

// Keys that relation_nce works off at a time; 0: as many as it likes.
extern "C" __attribute__((visibility("default"))) void simt_set_segment(int64_t keys) {
  crrcd::cuda::Device::emulated_segment = keys;
}

#define CRRCD_IMPL(library, key, m) TORCH_LIBRARY_IMPL(library, key, m)

CRRCD_IMPL(CRRCD_SIMT_LIBRARY, CPU, m) {
  m.impl("relation", crrcd::cuda::relation);
  m.impl("relation_backward", crrcd::cuda::relation_backward);
  m.impl("relation_nce", crrcd::cuda::relation_nce);
  m.impl("relation_nce_", crrcd::cuda::relation_nce_update);
  m.impl("instance_nce", crrcd::cuda::instance_nce);
  m.impl("instance_nce_", crrcd::cuda::instance_nce_update);
  m.impl("difference_nce", crrcd::cuda::difference_nce);
  m.impl("difference_nce_", crrcd::cuda::difference_nce_update);
  m.impl("similar_mask", crrcd::cuda::similar_mask);
  m.impl("bank_update_", crrcd::cuda::bank_update);
}
