// The loss of a logit and its derivative.
#pragma once

#include "tile.cuh"

namespace crrcd::cuda {
namespace {

// The loss as the logarithm of a product of factors 1 + e: q is that product minus 1, so that small
// factors are not lost; `above` what was left out of them, in units of log 2.
template <typename T>
struct LossProduct {
  T q = 0, above = 0;

  __device__ __forceinline__ T take() {
    const T loss = T(0.69314718055994530942) * above + log1p(q);
    q = above = 0;
    return loss;
  }
};

// sigmoid of a logit in units of log 2; its softplus goes into the product.
template <Precision kPrecision, typename T>
__device__ __forceinline__ T softplus(T logit, LossProduct<T>& product) {
  const T e = exp2_of<kPrecision>(-fabs(logit)), factor = T(1) + e;
  T r = reciprocal<kPrecision>(factor);
  if (logit > 0)
    product.above += logit;
  else
    r *= e;
  product.q = product.q * factor + e;
  return r;
}

}  // namespace
}  // namespace crrcd::cuda
