#include "instance_order.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "host.h"

namespace crrcd {

Tiling choose_tiling(int64_t queries, int64_t rows, int64_t row_bytes, int64_t parts) {
  constexpr int64_t kTileBytes = 64 * 1024;
  const int64_t fitting = std::max<int64_t>(kTileBytes / std::max<int64_t>(row_bytes, 1), 1);
  const int64_t most = std::min(fitting, std::max<int64_t>(rows / (4 * parts), 1));
  Tiling tiling;
  // the query needs the entry's other bits
  while ((int64_t(2) << tiling.shift) <= most && queries <= (int64_t(1) << (31 - tiling.shift)))
    ++tiling.shift;
  tiling.tiles = (rows + (int64_t(1) << tiling.shift) - 1) >> tiling.shift;
  return tiling;
}

namespace {

// Calls f(b, row) for entries [begin, end) of the columns [first, last), in their order.
template <typename F>
void for_entries(const OwnIndex& index, int64_t first, int64_t last, int64_t begin, int64_t end,
                 const F& f) {
  const int64_t columns = last - first;
  while (begin < end) {
    const int64_t b = begin / columns, k = begin % columns;
    const int64_t n = std::min(columns - k, end - begin);
    const int64_t* own = index.data + b * index.stride + (first + k) * index.step;
    for (int64_t i = 0; i < n; ++i) f(b, own[i * index.step]);
    begin += n;
  }
}

}  // namespace

SortedEntries sort_entries(const OwnIndex& index, int64_t queries, int64_t first, int64_t last,
                           const Tiling& tiling, int64_t parts, bool whole_tiles) {
  const int64_t count = queries * (last - first), tiles = tiling.tiles;
  const int shift = tiling.shift;
  SortedEntries sorted;
  sorted.entries = scratch(count * 4);
  auto* entries = static_cast<uint32_t*>(sorted.entries.mutable_data_ptr());

  // A counting sort in which every share has its own counters; entries keep their order.
  const int64_t shares = std::min<int64_t>(parts, at::get_num_threads());
  std::vector<std::vector<int64_t>> place(shares);
  at::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    for (int64_t share = from; share < to; ++share) {
      place[share].assign(tiles, 0);
      int64_t* counter = place[share].data();
      for_entries(index, first, last, count * share / shares, count * (share + 1) / shares,
                  [&](int64_t, int64_t row) { ++counter[row >> shift]; });
    }
  });
  sorted.tile_begin.resize(tiles + 1);
  int64_t total = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    sorted.tile_begin[tile] = total;
    for (std::vector<int64_t>& counter : place) {
      const int64_t found = counter[tile];
      counter[tile] = total;
      total += found;
    }
  }
  sorted.tile_begin[tiles] = total;
  const uint32_t mask = (uint32_t(1) << shift) - 1;
  at::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    for (int64_t share = from; share < to; ++share) {
      int64_t* next = place[share].data();
      for_entries(index, first, last, count * share / shares, count * (share + 1) / shares,
                  [&](int64_t b, int64_t row) {
                    entries[next[row >> shift]++] =
                        static_cast<uint32_t>(b << shift) | (static_cast<uint32_t>(row) & mask);
                  });
    }
  });

  for (int64_t part = 0; part <= parts; ++part) {
    int64_t begin = count * part / parts;
    if (whole_tiles)
      begin = *std::lower_bound(sorted.tile_begin.begin(), sorted.tile_begin.end(), begin);
    sorted.part_begin.push_back(begin);
  }
  return sorted;
}

}  // namespace crrcd
