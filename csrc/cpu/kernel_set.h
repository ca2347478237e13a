// Compiles every kernel for one instruction set. The including file sets CRRCD_ISA_NAMESPACE,
// CRRCD_VECTOR_BYTES and CRRCD_TARGET. Headers come before the target is switched on: an inline
// function of theirs that was compiled for AVX-512 here could be the copy that the linker keeps for
// everybody.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "difference_params.h"
#include "instance_params.h"
#include "kernels.h"
#include "relation_params.h"
#include "similar_params.h"

// tests/simd/wide.h stands for what the compiler must not use.
#ifdef CRRCD_EMULATE_WIDE
#undef CRRCD_TARGET
#endif

#define CRRCD_PRAGMA(x) _Pragma(#x)
#ifdef CRRCD_TARGET
#if defined(__clang__)
#define CRRCD_PUSH(t) \
  CRRCD_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
CRRCD_PUSH(CRRCD_TARGET)
#else
#pragma GCC push_options
#define CRRCD_PUSH(t) CRRCD_PRAGMA(GCC target(t))
CRRCD_PUSH(CRRCD_TARGET)
#endif
#endif

namespace crrcd {
namespace CRRCD_ISA_NAMESPACE {
namespace {

// clang-format off: each of them needs those before it
#include "simd.h"
#include "softplus.h"
#include "gemm.h"
#include "tile_registers.h"
#include "relation_kernel.h"
#include "pairwise_kernel.h"
#include "instance_kernel.h"
#include "similar_kernel.h"
#include "difference_kernel.h"
// clang-format on

}  // namespace

const Kernels& kernels() {
  static constexpr Kernels table = {
      CRRCD_ISA_NAME,
      CRRCD_VECTOR_BYTES,
      kHasPairs,
      kHasTiles,
      nce_scratch<float>,
      nce_scratch<double>,
      nce<float>,
      nce<double>,
      relation_scratch<float>,
      relation_scratch<double>,
      relation_forward<float>,
      relation_forward<double>,
      relation_backward<float>,
      relation_backward<double>,
      instance_scratch<float>,
      instance_scratch<double>,
      instance<float>,
      instance<double>,
      similar<float>,
      similar<double>,
      difference_scratch<float>,
      difference_scratch<double>,
      difference_pairs<float>,
      difference_pairs<double>,
      difference<float>,
      difference<double>,
      difference_finish<float>,
      difference_finish<double>,
  };
  return table;
}

}  // namespace CRRCD_ISA_NAMESPACE
}  // namespace crrcd

#ifdef CRRCD_TARGET
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
