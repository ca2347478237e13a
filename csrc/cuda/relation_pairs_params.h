// Plain description of a call of relation on a GPU.
#pragma once

#include <cstdint>

#include "relation_layout.h"

namespace crrcd::cuda {

// Matrices as in relation_nce_params.h.
template <typename T>
struct RelationPairsParams {
  PairsLayout layout;
  int64_t A = 0, M = 0;
  int R = 0, Hp = 0, Rp = 0;
  const void* anchor = nullptr;  // [A, Hp]
  const void* sample = nullptr;  // [M up to a tile, Hp]
  const void* weight = nullptr;  // [Rp, Hp]
  const T* bias = nullptr;       // [Rp] or null
  T* relation = nullptr;         // [A, M, R]
  T* inverse_norm = nullptr;     // [A, M]
};

template <Precision kPrecision>
struct RelationPairsKernel {
  static void launch(const RelationPairsParams<SumOf<kPrecision>>& params, void* stream);
};

}  // namespace crrcd::cuda
