#include "sampling.h"

#include <ATen/Parallel.h>

#include "../aten.h"

namespace crrcd {

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u, kSeedFactor = 0xD1342543DE82EF95u;

// splitmix64's finaliser without its last xor-shift, which the high bits do not need.
uint64_t mixed(uint64_t x) {
  x *= kGolden;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  return (x ^ x >> 27) * 0x94D049BB133111EBu;
}

}  // namespace

at::Tensor uniform_index(const at::Tensor& seed, const at::Tensor& step, int64_t count,
                         int64_t bound) {
  uint64_t key = static_cast<uint64_t>(seed.item<int64_t>()) * kSeedFactor +
                 static_cast<uint64_t>(step.item<int64_t>()) * kGolden;
  key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9u;
  key = (key ^ key >> 27) * 0x94D049BB133111EBu;
  key ^= key >> 31;

  at::Tensor index = at::empty({count}, at::TensorOptions().dtype(at::kLong));
  auto* out = index.mutable_data_ptr<int64_t>();
  const double scale = static_cast<double>(bound) * 0x1p-53;
  at::parallel_for(0, count, int64_t(1) << 15, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto bits = static_cast<int64_t>(mixed(static_cast<uint64_t>(i) + key) >> 11);
      out[i] = static_cast<int64_t>(static_cast<double>(bits) * scale);
    }
  });
  return index;
}

}  // namespace crrcd
