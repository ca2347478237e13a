// The kernels of relation and relation_nce for one precision, to be instantiated in a file of its
// own.
#pragma once

#include "relation_direct.cuh"
#include "relation_gram.cuh"
#include "relation_keys.cuh"
#include "relation_logits.cuh"
#include "relation_pairs.cuh"
#include "relation_project.cuh"

namespace crrcd::cuda {

template <Precision kPrecision>
void RelationPairsKernel<kPrecision>::launch(const RelationPairsParams<SumOf<kPrecision>>& params,
                                             void* stream) {
  launch_pairs<kPrecision>(params, stream);
}

template <Precision kPrecision>
void RelationNceKernels<kPrecision>::project(const Params& params, void* stream) {
  launch_project<kPrecision>(params, stream);
}

// float64 is for proofs, not for speed: its tiles have one size.
template <Precision kPrecision>
void RelationNceKernels<kPrecision>::logits(const Params& params, void* stream) {
  if constexpr (kPrecision != Precision::kF64)
    if (params.logit_layout.warps == 4) return launch_logits<kPrecision, 4>(params, stream);
  launch_logits<kPrecision, 1>(params, stream);
}

template <Precision kPrecision>
void RelationNceKernels<kPrecision>::keys(const Params& params, void* stream) {
  if constexpr (kPrecision == Precision::kF64) {
    launch_direct<kPrecision, 1, false>(params, stream);
  } else if constexpr (kPrecision == Precision::kF32) {
    if (params.direct_layout.warps == 4) return launch_direct<kPrecision, 4, false>(params, stream);
    launch_direct<kPrecision, 1, false>(params, stream);
  } else {
    if (params.key_layout.warps == 8) return launch_keys<kPrecision, 8>(params, stream);
    launch_keys<kPrecision, 1>(params, stream);
  }
}

template <Precision kPrecision>
void RelationNceKernels<kPrecision>::weight(const Params& params, void* stream) {
  if constexpr (kPrecision == Precision::kF64) {
    launch_direct<kPrecision, 1, true>(params, stream);
  } else if constexpr (kPrecision == Precision::kF32) {
    if (params.direct_layout.warps == 4) return launch_direct<kPrecision, 4, true>(params, stream);
    launch_direct<kPrecision, 1, true>(params, stream);
  } else {
    launch_gram<kPrecision>(params, stream);
  }
}

}  // namespace crrcd::cuda
