// Plain description of a call of similar_mask on a GPU. Shared by the host entry, which allocates
// and fills it, and by the kernels, which never see a torch header.
#pragma once

#include <cstdint>

#include "../bank.h"

namespace crrcd::cuda {

// Matrices are contiguous, row major. T is float or double.
template <typename T>
struct SimilarParams {
  int64_t B = 0, K = 0, D = 0, N = 0;
  int64_t words = 0;  // of 32 bits, for each query

  BankView bank;             // with the index of shared rows
  bool whole_quads = false;  // rows of the bank can be read four elements at a time
  // each query's own rows: that of (b, k) is own[b * own_stride + k * own_step]
  const int64_t* own = nullptr;
  int64_t own_stride = 0, own_step = 0;

  const T* query = nullptr;  // [B, D]
  T threshold = 0;
  int32_t* mask = nullptr;  // [B, words]: a bit for each k, set where <query, row> > threshold
};

// Starts the kernel on the stream.
void similar_launch(const SimilarParams<float>& params, void* stream);
void similar_launch(const SimilarParams<double>& params, void* stream);

}  // namespace crrcd::cuda
