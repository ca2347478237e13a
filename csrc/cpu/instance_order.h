// The entries (query, row of the bank) of each query's own negatives, sorted by tiles of the bank.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>
#include "../bank.h"

namespace crrcd {

struct Tiling {
  int shift = 0;                // a tile has 1 << shift rows
  int64_t rows = 0, tiles = 0;  // of the bank
};

// Tiles of at most 256 rows that fit the cache next to everything else, and enough of them for all
// parts.
Tiling choose_tiling(int64_t queries, int64_t rows, int64_t row_bytes, int64_t parts);

// Queries [first_query, last_query) and columns [first, last) of the index.
struct Batch {
  int64_t first_query, last_query, first, last;
};

// A batch's entries but for those that are excluded, sorted by tile, within a tile by query, and
// cut into parts of about the same number of entries.
struct SortedEntries {
  at::Tensor entries;
  at::Tensor run_end;               // scratch, uint32 [queries of the batch, tiles], of rows alone
  std::vector<int64_t> tile_begin;  // [tiles + 1]
  std::vector<int64_t> part_begin;  // [parts + 1]
};

// Both take the index [B, K] of each query's own negatives and raise IndexError for an entry of the
// batch that is no row of the bank.

// Entries of 32 bits, query << shift | row within the tile. Parts begin with a tile when
// whole_tiles.
SortedEntries sort_entries(const char* op, const at::Tensor& index, const Excluded& excluded,
                           const Batch& batch, const Tiling& tiling, int64_t parts,
                           bool whole_tiles);

// Entries of 8 bits, the row within the tile, and where each query's end in each tile: the faster
// where a query has several entries in a tile.
SortedEntries sort_rows(const char* op, const at::Tensor& index, const Excluded& excluded,
                        const Batch& batch, const Tiling& tiling, int64_t parts, bool whole_tiles);

}  // namespace crrcd
