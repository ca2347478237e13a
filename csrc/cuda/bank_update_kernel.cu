// bank_update_: m <- unit(momentum m + (1 - momentum) value); the last of equal ids wins.
#include "bank_update_params.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace crrcd::cuda {
namespace {

constexpr int kThreads = 128;

// A block for each row of value; it leaves when the same id comes again later.
template <typename S>
__global__ void __launch_bounds__(kThreads) update_row(BankUpdateParams p) {
  __shared__ double sums[kThreads / kWarp];
  const int64_t u = blockIdx.x;
  const int64_t row = checked_row(
      p.index[u], p.N, "crrcd_ext.bank_update_: index: expected rows of the bank in [0, N)");
  double later[1] = {};
  for (int64_t i = u + 1 + threadIdx.x; i < p.U; i += kThreads) later[0] += p.index[i] == row;
  block_sum<kThreads>(later, sums);
  if (later[0] > 0) return;

  S* const out = static_cast<S*>(p.bank) + row * p.row_stride;
  const auto blend = [&](int64_t d) {
    const double fresh = (1 - p.momentum) * p.value[u * p.D + d];
    // 0 times an infinity that the row holds would be NaN
    return p.momentum > 0 ? fresh + p.momentum * widen(out[d * p.column_stride]) : fresh;
  };
  double factor = 1;
  if (p.normalize) {
    double square[1] = {};
    for (int64_t d = threadIdx.x; d < p.D; d += kThreads) square[0] += blend(d) * blend(d);
    block_sum<kThreads>(square, sums);
    factor = square[0] <= kZeroNormSquared ? 0 : 1 / sqrt(square[0]);
  }
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads)
    out[d * p.column_stride] = narrow<S>(blend(d) * factor);
}

template <typename S>
void launch(const BankUpdateParams& p, void* stream) {
  gpu::launch("update_row", update_row<S>, dim3(p.U), dim3(kThreads), 0, stream, p);
}

}  // namespace

void bank_update_launch(const BankUpdateParams& p, void* stream) {
  if (p.U == 0) return;
  switch (p.storage) {
    case Storage::kFloat64:
      return launch<double>(p, stream);
    case Storage::kFloat32:
      return launch<float>(p, stream);
    case Storage::kBFloat16:
      return launch<__nv_bfloat16>(p, stream);
    case Storage::kFloat16:
      return launch<__half>(p, stream);
  }
}

}  // namespace crrcd::cuda
