// A bank of rows and the passes over it, as the kernels of every device see them.
#pragma once

#include <cstdint>

namespace crrcd {

enum class Pass : int {
  kNce = 0,        // loss and gradients of sum softplus(logit)
  kLogSumExp = 1,  // InfoNCE, first sweep: running maximum and sum of exponentials per query
  kSoftmax = 2,    // InfoNCE, second sweep: gradients with the normaliser known
};

enum class Storage : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Squared norms at or below this belong to no relation: the unit vector is defined as zero.
constexpr double kZeroNormSquared = 1e-24;

// Where the square of a difference is below this share of the squares of what is subtracted, sums
// over what is subtracted have lost digits and the difference itself is taken.
constexpr double kNearDifference = 0.03;

// Rows of a bank, possibly selected by an index.
struct BankView {
  const void* data = nullptr;
  Storage storage = Storage::kFloat32;
  int64_t row_stride = 0;          // elements
  const int64_t* index = nullptr;  // [K] or null: row k is row index[k]
};

// Bits of negatives that are none, [queries, words]; bit j % 32 of word j / 32 is position j.
struct Excluded {
  const uint32_t* bits = nullptr;  // null: none is excluded
  int64_t words = 0;

  bool at(int64_t query, int64_t position) const {
    return bits[query * words + position / 32] >> position % 32 & 1;
  }
};

}  // namespace crrcd
