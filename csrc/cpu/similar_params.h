// Plain description of a call of similar_mask: queries and negatives are those of instance_nce.
#pragma once

#include "instance_params.h"

namespace crrcd {

template <typename T>
struct SimilarParams : InstanceParams<T> {
  T threshold = 0;
  uint32_t* bits = nullptr;  // [B, words]
  int64_t words = 0;
};

}  // namespace crrcd
