// Plain description of a call of instance_nce on a GPU. Shared by the host entry, which allocates
// and fills it, and by the kernels, which never see a torch header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../bank.h"

namespace crrcd::cuda {

constexpr int64_t kInstanceTile = 64;     // shared negatives, and queries, that meet at a time
constexpr int64_t kInstanceColumns = 16;  // of a row that a thread keeps in registers
constexpr int64_t kInstanceWidest = 256 * kInstanceColumns;  // D of rows that a block so keeps

// Matrices are contiguous, row major. T is float or double.
template <typename T>
struct InstanceParams {
  int64_t B = 0, K = 0, D = 0, N = 0;
  int64_t parts = 1;  // ranges of negatives
  bool infonce = false;
  bool need_query = false;
  double factor = 1;           // of the sum over the queries in the result
  const T* weights = nullptr;  // [B]: of a query's loss in that sum; null: 1

  BankView bank;             // with the index of shared negatives
  bool whole_quads = false;  // rows of the bank can be read four elements at a time
  // each query's own negatives: that of (b, k) is own[b * own_stride + k * own_step]
  const int64_t* own = nullptr;
  int64_t own_stride = 0, own_step = 0;

  const T* query = nullptr;     // [B, D]
  const T* positive = nullptr;  // [B, D]
  const double* scale = nullptr;
  const double* offset = nullptr;

  // masks; null when there is nothing to mask
  const int64_t* query_id = nullptr;     // [B]
  const int64_t* key_id = nullptr;       // [N], null: the row's position in the bank
  const int64_t* query_label = nullptr;  // [B]
  const int64_t* key_label = nullptr;    // [N]
  Excluded excluded;                     // by position among all negatives of the call

  // sums over the weighted queries, a slice a part, added up in their order
  int64_t scalar_rows = 0;
  double* scalars = nullptr;        // [scalar_rows, 3]: loss, d_scale, d_offset (NCE)
  T* running_max = nullptr;         // [parts, B] (InfoNCE)
  double* running_sum = nullptr;    // [parts, B]: of e = exp(logit - maximum)
  double* running_slope = nullptr;  // [parts, B]: of e <q, m>
  T* d_query_parts = nullptr;       // [parts, B, D]; InfoNCE: sum of e m
  T* d_rows = nullptr;              // [K, D], shared: gradient of the gathered rows
  T* d_bank = nullptr;              // [N, D], own: added to atomically without a `weight`
  double* per_query = nullptr;      // [B, 3]: as scalars
  double* part_losses = nullptr;    // [parts, B], shared negatives and NCE, for `losses`
  T* log_normalizer = nullptr;      // [B] (InfoNCE)

  // own, for a gradient of the bank that is added up in one order: the entries b * K + k by row
  T* weight = nullptr;                    // [B, K]: d loss / d <q, m>
  const int64_t* sorted_row = nullptr;    // [B K]
  const int64_t* sorted_entry = nullptr;  // [B K], those of a row in their order

  double* result = nullptr;  // [3]: loss, d_scale, d_offset
  double* losses = nullptr;  // [B]: one by one instead; only a query's own gradients are then right
  T* d_query = nullptr;      // [B, D]
  T* d_positive = nullptr;   // [B, D]
};

// Everything of a call, in the order of the stream.
void instance_launch(const InstanceParams<float>& params, void* stream);
void instance_launch(const InstanceParams<double>& params, void* stream);

}  // namespace crrcd::cuda
