#include "instance_order.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "../checks.h"
#include "host.h"

namespace crrcd {

Tiling choose_tiling(int64_t queries, int64_t rows, int64_t row_bytes, int64_t parts) {
  constexpr int64_t kTileBytes = 64 * 1024, kMostRows = 256;
  const int64_t fitting = kTileBytes / std::max<int64_t>(row_bytes, 1);
  const int64_t most = std::min({fitting, kMostRows, rows / (4 * parts)});
  Tiling tiling;
  tiling.rows = rows;
  // an entry of 32 bits has the query in those that the row leaves
  while ((int64_t(2) << tiling.shift) <= most && queries <= (int64_t(1) << (31 - tiling.shift)))
    ++tiling.shift;
  tiling.tiles = (rows + (int64_t(1) << tiling.shift) - 1) >> tiling.shift;
  return tiling;
}

namespace {

// Calls f(query, first, rows, n, last) for what entries [begin, end) of the batch have of each
// query, in their order: columns first to first + n of the batch; last: nothing of the query comes
// after.
template <typename F>
void for_queries(const at::Tensor& index, const Batch& batch, int64_t begin, int64_t end,
                 const F& f) {
  const int64_t columns = batch.last - batch.first;
  const int64_t* data = index.const_data_ptr<int64_t>();
  while (begin < end) {
    const int64_t query = begin / columns, k = begin % columns;
    const int64_t n = std::min(columns - k, end - begin);
    f(query, k,
      data + (batch.first_query + query) * index.stride(0) + (batch.first + k) * index.stride(1), n,
      k + n == columns);
    begin += n;
  }
}

// A counting sort in which every share has its own counters; entries keep their order.
// encode(query, row within the tile) is an entry; after_query(query, next) sees where the entries
// of each tile end when those of a query are in their places.
template <typename Entry, typename Encode, typename AfterQuery>
SortedEntries counting_sort(const char* op, const at::Tensor& index, const Excluded& excluded,
                            const Batch& batch, const Tiling& tiling, int64_t parts,
                            bool whole_tiles, const Encode& encode, const AfterQuery& after_query) {
  const int64_t tiles = tiling.tiles, step = index.stride(1);
  const int64_t count = (batch.last_query - batch.first_query) * (batch.last - batch.first);
  const int shift = tiling.shift;
  // f(row) for entries [i, stop) of a query's that are negatives, a word of bits at a time
  const auto for_kept = [&](int64_t query, int64_t first, const int64_t* rows, int64_t i,
                            int64_t stop, const auto& f) {
    while (i < stop) {
      const int64_t b = batch.first_query + query, position = batch.first + first + i;
      const int64_t end = excluded.bits ? std::min(stop, i + 32 - position % 32) : stop;
      uint32_t bits = 0;
      if (excluded.bits) bits = excluded.bits[b * excluded.words + position / 32] >> position % 32;
      if (bits == 0)
        for (; i < end; ++i) f(rows[i * step]);
      else
        for (; i < end; ++i, bits >>= 1)
          if (!(bits & 1)) f(rows[i * step]);
    }
  };
  SortedEntries sorted;
  sorted.entries = scratch(count * static_cast<int64_t>(sizeof(Entry)));
  auto* entries = static_cast<Entry*>(sorted.entries.mutable_data_ptr());

  const int64_t shares = std::min<int64_t>(parts, at::get_num_threads());
  std::vector<std::vector<int64_t>> place(shares);
  std::atomic<bool> outside{false};
  at::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    for (int64_t share = from; share < to; ++share) {
      place[share].assign(tiles, 0);
      int64_t* counter = place[share].data();
      for_queries(index, batch, count * share / shares, count * (share + 1) / shares,
                  [&](int64_t query, int64_t first, const int64_t* rows, int64_t n, bool) {
                    constexpr int64_t kAtOnce = 2048;  // which the cache holds
                    for (int64_t i = 0; i < n; i += kAtOnce) {
                      const int64_t some = std::min(n - i, kAtOnce);
                      if (!rows_inside(rows + i * step, step, some, tiling.rows)) {
                        outside = true;
                        return;
                      }
                      for_kept(query, first, rows, i, i + some,
                               [&](int64_t row) { ++counter[row >> shift]; });
                    }
                  });
    }
  });
  if (outside) check_rows(op, "index", index, tiling.rows);
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
  at::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    for (int64_t share = from; share < to; ++share) {
      int64_t* next = place[share].data();
      for_queries(index, batch, count * share / shares, count * (share + 1) / shares,
                  [&](int64_t query, int64_t first, const int64_t* rows, int64_t n, bool last) {
                    const int64_t mask = (int64_t(1) << shift) - 1;
                    for_kept(query, first, rows, 0, n, [&](int64_t row) {
                      entries[next[row >> shift]++] = encode(query, row & mask);
                    });
                    if (last) after_query(query, next);
                  });
    }
  });

  for (int64_t part = 0; part <= parts; ++part) {
    int64_t begin = total * part / parts;
    if (whole_tiles)
      begin = *std::lower_bound(sorted.tile_begin.begin(), sorted.tile_begin.end(), begin);
    sorted.part_begin.push_back(begin);
  }
  return sorted;
}

}  // namespace

SortedEntries sort_entries(const char* op, const at::Tensor& index, const Excluded& excluded,
                           const Batch& batch, const Tiling& tiling, int64_t parts,
                           bool whole_tiles) {
  return counting_sort<uint32_t>(
      op, index, excluded, batch, tiling, parts, whole_tiles,
      [shift = tiling.shift](int64_t query, int64_t row) {
        return static_cast<uint32_t>(query << shift | row);
      },
      [](int64_t, const int64_t*) {});
}

SortedEntries sort_rows(const char* op, const at::Tensor& index, const Excluded& excluded,
                        const Batch& batch, const Tiling& tiling, int64_t parts, bool whole_tiles) {
  const int64_t tiles = tiling.tiles;
  const at::Tensor ends = scratch((batch.last_query - batch.first_query) * tiles * 4);
  auto* run_end = static_cast<uint32_t*>(ends.mutable_data_ptr());
  // a byte an entry: with more, writing to as many places as there are tiles takes three times as
  // long
  SortedEntries sorted = counting_sort<uint8_t>(
      op, index, excluded, batch, tiling, parts, whole_tiles,
      [](int64_t, int64_t row) { return static_cast<uint8_t>(row); },
      [=](int64_t query, const int64_t* next) {
        for (int64_t i = 0; i < tiles; ++i)
          run_end[query * tiles + i] = static_cast<uint32_t>(next[i]);
      });
  sorted.run_end = ends;
  return sorted;
}

}  // namespace crrcd
