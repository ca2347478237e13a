// The entries (query, row of the bank) of each query's own negatives, sorted by tiles of the bank.
#pragma once

#include <cstdint>
#include <vector>

#include "../aten.h"

namespace crrcd {

// Each query's own negatives: that of (b, k) is data[b * stride + k * step].
struct OwnIndex {
  const int64_t* data = nullptr;
  int64_t stride = 0, step = 0;
};

struct Tiling {
  int shift = 0;      // a tile has 1 << shift rows
  int64_t tiles = 0;  // of the bank
};

// Tiles whose rows fit the cache next to everything else, and enough of them for all parts.
Tiling choose_tiling(int64_t queries, int64_t rows, int64_t row_bytes, int64_t parts);

struct SortedEntries {
  at::Tensor entries;               // 32 bits each: query << shift | row within the tile
  std::vector<int64_t> tile_begin;  // [tiles + 1]
  std::vector<int64_t> part_begin;  // [parts + 1]
};

// Columns [first, last) of the index, sorted by tile, within a tile by query, and cut into parts of
// about the same number of entries; at the beginnings of tiles when whole_tiles.
SortedEntries sort_entries(const OwnIndex& index, int64_t queries, int64_t first, int64_t last,
                           const Tiling& tiling, int64_t parts, bool whole_tiles);

}  // namespace crrcd
