// What the CPU host entries share: padded copies and scratch memory.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include <ATen/core/Tensor.h>
#include "plan.h"

namespace crrcd {

// A zeroed [..., rows, ld] copy of the last two dimensions of t, in dtype.
at::Tensor padded(const at::Tensor& t, at::ScalarType dtype, int64_t rows, int64_t ld);

// Sum over the leading dimension in its order, in place in the first slice.
at::Tensor sum_parts(const at::Tensor& parts);

// Memory whose contents do not matter; filled with NaN when poisoning is on, which the tests do.
at::Tensor scratch(int64_t bytes);
void set_poison(bool on);

// function(part, worker) for every part. A worker that is ready takes the next part: threads are
// not equally fast, nor parts equally long.
template <typename F>
void in_turn(int64_t parts, int64_t workers, const F& function) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t part; (part = next++) < parts;) function(part, worker);
  });
}

// Whether t, which is contiguous, has no NaN and no infinity: no exponent has all bits set.
template <typename T>
bool all_finite(const at::Tensor& t) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Bits kExponent = sizeof(T) == 4 ? Bits(0xff) << 23 : Bits(uint64_t(0x7ff) << 52);
  const T* value = t.const_data_ptr<T>();
  Bits found = 0;
  for (int64_t i = 0; i < t.numel(); ++i) {
    Bits bits;
    std::memcpy(&bits, value + i, sizeof(T));
    found |= (bits & kExponent) == kExponent;
  }
  return found == 0;
}

// A loss and its gradients, which are NaN where the loss is: kernels skip what they multiply by
// zero, and so lose some of the NaN that made it. Of losses one by one each has its rows.
template <typename... Gradients>
std::tuple<at::Tensor, Gradients...> nan_throughout(std::tuple<at::Tensor, Gradients...> result) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  const at::Tensor loss = std::get<0>(result);
  if (loss.dim() == 0) {
    if (std::isnan(loss.item<double>()))
      std::apply([&](auto&... t) { (t.fill_(kNan), ...); }, result);
    return result;
  }
  const at::Tensor lost = loss.ne(loss).unsqueeze(-1);
  std::apply(
      [&](auto&, auto&... t) {
        ((t.numel() > 0 ? void(t.masked_fill_(lost, kNan)) : void()), ...);
      },
      result);
  return result;
}

template <typename T>
const T* pointer(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

template <typename T>
T* mutable_pointer(const at::Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<T>() : nullptr;
}

}  // namespace crrcd
