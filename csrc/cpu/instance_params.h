// Plain description of one pass of instance_nce. Shared by the host entry, which allocates and
// fills it, and by the kernel, which never sees a torch header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "relation_params.h"

namespace crrcd {

// The order in which (query, negative) entries are worked off.
enum class Order : int {
  kShared = 0,    // all queries have the same negatives: tiles of keys, by matrix products
  kDirect = 1,    // each query's own, as they come, rows prefetched
  kBucketed = 2,  // the same sorted by tiles of the bank, each of which is read once
};

// Queries from which on shared negatives are multiplied in tile registers: fewer do not fill one.
constexpr int64_t kLeastQueries = 16;

// Matrices are row major, zero between true and padded size. Strides are in elements.
template <typename T>
struct InstanceParams {
  int64_t B = 0, K = 0, D = 0, N = 0;
  int64_t Bp = 0, Dp = 0;    // padded to the vector width
  int64_t ldB = 0, ldD = 0;  // row strides
  int64_t parts = 1;         // ranges of tiles (shared) or entries
  Order order = Order::kShared;
  // kNce; kLogSumExp: InfoNCE but for the bank's gradient, with a running maximum;
  // kSoftmax: the bank's gradient, with the normaliser known
  Pass pass = Pass::kNce;
  bool need_query = false;
  bool tile_registers = false;  // shared negatives are multiplied in them (instance_tiles.h):
  int query_parts = 3;          // bfloat16 whose sum a number of a query is,
  int gradient_parts = 3;       // and those that are taken of a derivative

  BankView bank;  // with the index of shared negatives
  // each query's own negatives: that of (b, k) is own[b * own_stride + k * own_step]
  const int64_t* own = nullptr;
  int64_t own_stride = 0, own_step = 0;
  // kBucketed: entries of a batch, sorted by tile, then by query. Those of tile t begin at
  // tile_begin[t], those of part i at part_begin[i], at a tile's when d_bank is wanted. Either rows
  // within their tile, those of query first_query + i ending at run_end[i, t] within tile t; or, of
  // all queries, query << tile_shift | row within the tile.
  const uint8_t* rows = nullptr;
  const uint32_t* run_end = nullptr;  // [queries, tiles]
  const uint32_t* entries = nullptr;
  const int64_t* tile_begin = nullptr;  // [tiles + 1]
  const int64_t* part_begin = nullptr;  // [parts + 1]
  int64_t first_query = 0, tiles = 0;
  int tile_shift = 0;

  const T* query = nullptr;    // [B, ldD]
  const T* query_t = nullptr;  // [D, ldB], shared
  T scale = 1, offset = 0;
  // logits in units of log 2: powers of two are cheaper than those of e
  T scale_log2 = 1, offset_log2 = 0;
  T gradient_scale = 1;       // 1 / B where every gradient is that of the mean
  const T* weight = nullptr;  // [ldB] of the queries' losses, null: 1

  // masks; null when there is nothing to mask
  const int64_t* query_id = nullptr;     // [B]
  const int64_t* key_id = nullptr;       // [N], null: the row's position in the bank
  const int64_t* query_label = nullptr;  // [B]
  const int64_t* key_label = nullptr;    // [N]
  Excluded excluded;

  const T* log_normalizer = nullptr;  // [ldB], in units of log 2 (kSoftmax)

  // sums; one slice a part, added up by the host in a fixed order
  double* scalars = nullptr;        // [parts, 3]: loss, d_scale, d_offset (kNce)
  double* losses = nullptr;         // [parts, B]: of each query, unweighted, which `scalars` are
                                    // without then; null where the sum is enough (kNce)
  T* running_max = nullptr;         // [parts, ldB] in units of log 2 (kLogSumExp)
  double* running_sum = nullptr;    // [parts, B]: of e = exp(logit - maximum)
  double* running_slope = nullptr;  // [parts, B]: of e <q, m>
  T* d_query = nullptr;             // [parts, B, ldD]; kLogSumExp: sum of e m
  T* d_rows = nullptr;              // [K, Dp], shared: gradient of the gathered rows
  T* d_bank = nullptr;              // [N, Dp], kBucketed

  std::byte* scratch = nullptr;  // parts * scratch_bytes
  size_t scratch_bytes = 0;
};

}  // namespace crrcd
