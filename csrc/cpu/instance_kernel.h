// One pass over a part of the negatives: logits, loss and gradients of instance_nce.
// Included once per instruction set, inside that set's namespace: no include guard.
//
// Shared negatives are matrix products on tiles of gathered rows. Each query's own negatives are
// entries (b, row): dot products and scaled sums over chunks of entries of one query, whose row of
// the bank is read once from memory and once more from the cache. InfoNCE goes over the negatives
// once with a running maximum: what was summed is scaled down when a larger logit comes.

constexpr int64_t kKeyTile = 128;     // rows of a tile of shared negatives
constexpr int64_t kQueryBlock = 256;  // queries that meet a tile at a time
constexpr int64_t kChunk = 64;        // entries of one query that are worked off together
constexpr int64_t kFilterWords = 64;  // of 64 bits, one a hash

template <typename T>
struct InstanceScratch {
  T* rows;           // [kKeyTile, rows of a tile or kChunk, ldD] rows, converted to T
  T* z;              // [kKeyTile, ldZ] or [kChunk]: <q, m>, then what the gradients are summed with
  T* keep;           // the same: 1 for a negative, 0 for a masked one
  T* live;           // [Bp] 1 for a query, 0 for padding (shared)
  T* tile;           // [3, kQueryBlock] sums and rescaling of one tile (shared InfoNCE)
  T* partial;        // [kChunk, lanes] products of a row's vectors (own)
  uint64_t* ids;     // [kFilterWords] which query ids and labels may occur (shared)
  uint64_t* labels;  // the same
  // with tile registers; pairs of bfloat16
  uint32_t* query_pairs;  // [query_parts, D / 2, ldB]
  uint32_t* row_pairs;    // [kKeyTile, pair_stride(D)] along the columns
  uint32_t* key_pairs;    // [kKeyTile / 2, ldD] of neighbouring rows
  uint32_t* z_pairs;      // [gradient_parts, kQueryBlock, pair_stride(kKeyTile)]
  T* sum;                 // [kStrip, ldD]
};

template <typename T>
CRRCD_INLINE int64_t z_stride(const InstanceParams<T>& p) {
  return odd_lines<T>(p.Bp < kQueryBlock ? p.Bp : kQueryBlock);
}

// Rows of the bank can be multiplied where they lie: they are of type T and end with a vector.
template <typename T>
CRRCD_INLINE bool in_place(const InstanceParams<T>& p) {
  return p.bank.storage == (sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32) && p.D == p.Dp;
}

// A tile of shared rows can be multiplied where it lies.
template <typename T>
CRRCD_INLINE bool rows_in_place(const InstanceParams<T>& p) {
  return in_place(p) && !p.bank.index;
}

template <typename T>
CRRCD_INLINE int64_t tile_rows(const InstanceParams<T>& p) {
  return int64_t(1) << p.tile_shift;
}

// What tile registers read of n rows or columns: those that are missing are zero.
CRRCD_INLINE int64_t whole_strips(int64_t n) { return (n + kStrip - 1) / kStrip * kStrip; }

template <typename T>
size_t carve(const InstanceParams<T>& p, std::byte* base, InstanceScratch<T>& s) {
  Carver c{base};
  const bool shared = p.order == Order::kShared;
  const int64_t count = shared ? kKeyTile : kChunk, width = shared ? z_stride(p) : 1;
  const int64_t tile = p.order == Order::kBucketed ? tile_rows(p) : 0;
  s.rows = c.take<T>(
      (shared ? !rows_in_place(p) : !in_place(p)) ? (tile > count ? tile : count) * p.ldD : 0);
  s.z = c.take<T>(count * width);
  s.keep = c.take<T>(count * width);
  s.live = c.take<T>(shared ? p.Bp : 0);
  s.tile = c.take<T>(shared ? 3 * kQueryBlock : 0);
  s.partial = c.take<T>(shared ? 0 : kChunk * Simd<T>::kLanes);
  s.ids = c.take<uint64_t>(shared && p.query_id ? kFilterWords : 0);
  s.labels = c.take<uint64_t>(shared && p.query_label ? kFilterWords : 0);
  const int64_t depth = whole_strips(p.D), wanted = p.tile_registers ? 1 : 0;
  s.query_pairs = c.take<uint32_t>(wanted * p.query_parts * depth / 2 * p.ldB);
  s.row_pairs = c.take<uint32_t>(wanted * kKeyTile * pair_stride(depth));
  s.key_pairs = c.take<uint32_t>(wanted * kKeyTile / 2 * p.ldD);
  s.z_pairs = c.take<uint32_t>(wanted * p.gradient_parts * kQueryBlock * pair_stride(kKeyTile));
  s.sum = c.take<T>(wanted * kStrip * p.ldD);
  return c.used;
}

// ------------------------------------------------------------------------------------ objective

// What the derivatives of query b, or of lanes of queries from b on, are multiplied with.
template <typename T>
CRRCD_INLINE T slope_of(const InstanceParams<T>& p, int64_t b) {
  return p.scale * p.gradient_scale * (p.weight ? p.weight[b] : T(1));
}

template <typename T>
CRRCD_INLINE typename Simd<T>::V slopes_of(const InstanceParams<T>& p, int64_t b) {
  const auto slope = splat(p.scale * p.gradient_scale);
  return p.weight ? slope * load(p.weight + b) : slope;
}

// Sums over entries: in vectors for some steps, then in double.
template <typename T>
struct NceSums {
  using V = typename Simd<T>::V;
  V above{}, q{}, g{}, slope{};  // above and q as in softplus
  int64_t steps = 0;
  LogProduct<T> products;
  double loss = 0, d_scale = 0, d_offset = 0;

  CRRCD_INLINE void flush() {
    products.add(q, kMostlyBoundedBits);
    loss += kLog2 * static_cast<double>(horizontal_sum<T>(above));
    d_scale += horizontal_sum<T>(slope);
    d_offset -= horizontal_sum<T>(g);
    above = q = g = slope = V{};
    steps = 0;
  }

  // In place of flush, after up to kMostlyBoundedSteps numbers of a lane: lane i is of query i.
  CRRCD_INLINE void settle(int64_t queries, const T* weight, double* losses) {
    constexpr int kLanes = Simd<T>::kLanes;
    T more[kLanes], product[kLanes];
    store(more, above);
    store(product, q);
    for (int64_t i = 0; i < kLanes && i < queries; ++i)
      losses[i] +=
          kLog2 * static_cast<double>(more[i]) + __builtin_log1p(static_cast<double>(product[i]));
    start_over(load(weight));
  }

  // The same after up to kMostlyBoundedSteps numbers of all lanes, which are of one query.
  CRRCD_INLINE void settle(T weight, double& of_query) {
    T product[Simd<T>::kLanes];
    store(product, q);
    double all = 0;  // minus 1; in range, as all lanes together have no more than one may have
    for (const T x : product) all = all * static_cast<double>(x) + (all + static_cast<double>(x));
    of_query += kLog2 * static_cast<double>(horizontal_sum<T>(above)) + __builtin_log1p(all);
    start_over(splat(weight));
  }

 private:
  CRRCD_INLINE void start_over(V weight) {
    d_scale += horizontal_sum<T>(slope * weight);
    d_offset -= horizontal_sum<T>(g * weight);
    above = q = g = slope = V{};
    steps = 0;
  }
};

// Vectors of products z: adds the softplus of their logits to the sums and makes z its derivatives,
// times `factor`. Where keep is 0, which is read only when kMasked, nothing is added and z becomes
// 0.
template <typename T, bool kMasked, int kVectors>
CRRCD_INLINE void nce_steps(const InstanceParams<T>& p, typename Simd<T>::V factor,
                            typename Simd<T>::V (&z)[kVectors],
                            const typename Simd<T>::V (&keep)[kVectors], NceSums<T>& s) {
  using V = typename Simd<T>::V;
  V logit[kVectors], g[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    logit[i] = z[i] * p.scale_log2 - p.offset_log2;
    if (kMasked) {
      logit[i] = keep[i] > 0 ? logit[i] : splat(T(-1e30));
      z[i] = keep[i] > 0 ? z[i] : V{};
    }
  }
  if (s.steps + kVectors > kMostlyBoundedSteps) s.flush();
  s.steps += kVectors;
  softplus_mostly_bounded<T>(logit, s.q, s.above, g);
  for (int i = 0; i < kVectors; ++i) {
    s.g += g[i];
    s.slope += g[i] * z[i];
    z[i] = g[i] * factor;
  }
}

// nce_steps of n vectors in memory, z of which are `step` numbers apart and keep `keep_step`.
template <typename T, bool kMasked>
CRRCD_INLINE void nce_column(const InstanceParams<T>& p, typename Simd<T>::V factor, int64_t n,
                             T* z, int64_t step, const T* keep, int64_t keep_step, NceSums<T>& s) {
  using V = typename Simd<T>::V;
  for_vectors(n, [&]<int kVectors>(int64_t first) {
    V x[kVectors], kept[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      x[i] = load(z + (first + i) * step);
      kept[i] = kMasked ? load(keep + (first + i) * keep_step) : V{};
    }
    nce_steps<T, kMasked>(p, factor, x, kept, s);
    for (int i = 0; i < kVectors; ++i) store(z + (first + i) * step, x[i]);
  });
}

template <typename T>
CRRCD_INLINE bool dropped(const InstanceParams<T>& p, int64_t b, int64_t row) {
  const int64_t id = p.key_id ? p.key_id[row] : row;
  return (p.query_id && p.query_id[b] == id) ||
         (p.query_label && p.query_label[b] == p.key_label[row]);
}

// Something that `dropped` asks about.
template <typename T>
CRRCD_INLINE bool has_masks(const InstanceParams<T>& p) {
  return p.query_id || p.query_label;
}

template <typename T>
CRRCD_INLINE void scale_row(int64_t n, T factor, T* row) {
  for (int64_t i = 0; i < n; i += Simd<T>::kLanes) store(row + i, load(row + i) * factor);
}

// --------------------------------------------------------------------------- shared negatives

CRRCD_INLINE uint64_t filter_bit(int64_t value) {
  return static_cast<uint64_t>(value) * 0x9E3779B97F4A7C15u >> (64 - 12);
}

CRRCD_INLINE void fill_filter(int64_t count, const int64_t* values, uint64_t* filter) {
  for (int64_t i = 0; i < kFilterWords; ++i) filter[i] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bit = filter_bit(values[i]);
    filter[bit / 64] |= uint64_t(1) << bit % 64;
  }
}

CRRCD_INLINE bool may_contain(const uint64_t* filter, int64_t value) {
  const uint64_t bit = filter_bit(value);
  return filter[bit / 64] >> bit % 64 & 1;
}

// A product whose softplus and derivative vanish, or 0 where scale and offset allow none.
template <typename T>
T lost_product(const InstanceParams<T>& p) {
  const T z = (p.offset_log2 - T(1e9)) / p.scale_log2;
  const bool lost = z * p.scale_log2 - p.offset_log2 < T(-1e8) && std::abs(z) < T(1e30);
  return lost ? z : T(0);
}

// Masks of a tile against queries [b0, b0 + width), without what is excluded unless `excluded`;
// whether there are any.
template <typename T>
bool fill_keep(const InstanceParams<T>& p, const InstanceScratch<T>& s, int64_t first, int64_t m,
               int64_t b0, int64_t width, int64_t ld, bool excluded) {
  const int64_t count = p.B - b0 < width ? p.B - b0 : width;
  bool any = false;
  const auto prepare = [&] {
    for (int64_t i = 0; !any && i < m; ++i)
      for (int64_t b = 0; b < width; ++b) s.keep[i * ld + b] = 1;
    any = true;
  };
  for (int64_t n = 0; has_masks(p) && n < m; ++n) {
    const int64_t row = p.bank.index ? p.bank.index[first + n] : first + n;
    if (!(p.query_id && may_contain(s.ids, p.key_id ? p.key_id[row] : row)) &&
        !(p.query_label && may_contain(s.labels, p.key_label[row])))
      continue;
    prepare();
    for (int64_t b = 0; b < count; ++b) s.keep[n * ld + b] = dropped(p, b0 + b, row) ? T(0) : T(1);
  }
  if (excluded)
    for_excluded(p.excluded, b0, count, first, m, [&](int64_t b, int64_t n) {
      prepare();
      s.keep[n * ld + b] = 0;
    });
  return any;
}

// Loss and, in s.z, gradients of the logits of a tile.
template <typename T, bool kMasked>
void shared_nce(const InstanceParams<T>& p, const InstanceScratch<T>& s, int64_t m, int64_t b0,
                int64_t width, int64_t ld, int64_t part, NceSums<T>& sums) {
  const int64_t together = p.losses ? kMostlyBoundedSteps : m;  // rows between two settlements
  for (int64_t b = 0; b < width; b += Simd<T>::kLanes) {
    const bool padded = b0 + b + Simd<T>::kLanes > p.B;
    if (kMasked && padded)
      for (int64_t n = 0; n < m; ++n)
        store(s.keep + n * ld + b, load(s.keep + n * ld + b) * load(s.live + b0 + b));
    const auto factor = slopes_of(p, b0 + b);
    for (int64_t n = 0; n < m; n += together) {
      const int64_t count = m - n < together ? m - n : together;
      T* z = s.z + n * ld + b;
      if (kMasked)
        nce_column<T, true>(p, factor, count, z, ld, s.keep + n * ld + b, ld, sums);
      else if (padded)
        nce_column<T, true>(p, factor, count, z, ld, s.live + b0 + b, 0, sums);
      else
        nce_column<T, false>(p, factor, count, z, ld, nullptr, 0, sums);
      if (p.losses) sums.settle(p.B - b0 - b, p.weight + b0 + b, p.losses + part * p.B + b0 + b);
    }
  }
}

// n vectors of products z, `step` numbers apart, to e = 2^(scale z - offset - top), their sum and
// that of e z. Where keep is 0, which is read only when kMasked, e is 0.
template <typename T, bool kMasked>
CRRCD_INLINE void sum_exp(const InstanceParams<T>& p, int64_t n, T* z, int64_t step, const T* keep,
                          typename Simd<T>::V top, typename Simd<T>::V& sum,
                          typename Simd<T>::V& slope) {
  using V = typename Simd<T>::V;
  for_vectors(n, [&]<int kVectors>(int64_t first) {
    V x[kVectors], e[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      x[i] = load(z + (first + i) * step);
      e[i] = x[i] * p.scale_log2 - p.offset_log2 - top;
    }
    exp2_of(e);
    for (int i = 0; i < kVectors; ++i) {
      if (kMasked) {
        const V kept = load(keep + (first + i) * step);
        e[i] = kept > 0 ? e[i] : V{};
        x[i] = kept > 0 ? x[i] : V{};
      }
      sum += e[i];
      slope += e[i] * x[i];
      store(z + (first + i) * step, e[i]);
    }
  });
}

// Running maximum and sums; leaves e = 2^(logit - maximum) in s.z.
template <typename T, bool kMasked>
void shared_log_sum_exp(const InstanceParams<T>& p, const InstanceScratch<T>& s, int64_t m,
                        int64_t b0, int64_t width, int64_t ld, int64_t part) {
  using V = typename Simd<T>::V;
  T* tile_factor = s.tile;
  T* tile_sum = s.tile + kQueryBlock;
  T* tile_slope = s.tile + 2 * kQueryBlock;
  const T scale = p.scale_log2, offset = p.offset_log2;
  for (int64_t b = 0; b < width; b += Simd<T>::kLanes) {
    T* running_max = p.running_max + part * p.ldB + b0 + b;
    const V before = load(running_max);
    V top = before;
    for (int64_t n = 0; n < m; ++n) {
      V logit = load(s.z + n * ld + b) * scale - offset;
      if (kMasked) logit = load(s.keep + n * ld + b) > 0 ? logit : top;
      top = logit > top ? logit : top;
    }
    V sum{}, slope{};
    sum_exp<T, kMasked>(p, m, s.z + b, ld, s.keep + b, top, sum, slope);
    store(running_max, top);
    store(tile_factor + b, exp2_of(before - top));
    store(tile_sum + b, sum);
    store(tile_slope + b, slope);
  }
  const int64_t count = p.B - b0 < width ? p.B - b0 : width;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t at = part * p.B + b0 + b;
    const T factor = tile_factor[b];
    p.running_sum[at] = p.running_sum[at] * factor + tile_sum[b];
    p.running_slope[at] = p.running_slope[at] * factor + tile_slope[b];
    if (p.need_query && factor != 1) scale_row(p.Dp, factor, p.d_query + at * p.ldD);
  }
}

// n vectors of products z, `step` numbers apart, to gradients of the logits, the normaliser (in
// units of log 2) known, times `factor`. Where keep is 0, which is read only when kMasked, they are
// 0.
template <typename T, bool kMasked>
CRRCD_INLINE void softmax(const InstanceParams<T>& p, typename Simd<T>::V factor, int64_t n, T* z,
                          int64_t step, const T* keep, typename Simd<T>::V normalizer) {
  using V = typename Simd<T>::V;
  for_vectors(n, [&]<int kVectors>(int64_t first) {
    V g[kVectors];
    for (int i = 0; i < kVectors; ++i)
      g[i] = load(z + (first + i) * step) * p.scale_log2 - p.offset_log2 - normalizer;
    exp2_of(g);
    for (int i = 0; i < kVectors; ++i) {
      if (kMasked) g[i] = load(keep + (first + i) * step) > 0 ? g[i] : V{};
      store(z + (first + i) * step, g[i] * factor);
    }
  });
}

template <typename T, bool kMasked>
void shared_softmax(const InstanceParams<T>& p, const InstanceScratch<T>& s, int64_t m, int64_t b0,
                    int64_t width, int64_t ld) {
  for (int64_t b = 0; b < width; b += Simd<T>::kLanes)
    softmax<T, kMasked>(p, slopes_of(p, b0 + b), m, s.z + b, ld, s.keep + b,
                        load(p.log_normalizer + b0 + b));
}

template <typename T, Pass kPass, bool kMasked>
void shared_logits(const InstanceParams<T>& p, const InstanceScratch<T>& s, int64_t m, int64_t b0,
                   int64_t width, int64_t ld, int64_t part, NceSums<T>& sums) {
  if (kPass == Pass::kNce) shared_nce<T, kMasked>(p, s, m, b0, width, ld, part, sums);
  if (kPass == Pass::kLogSumExp) shared_log_sum_exp<T, kMasked>(p, s, m, b0, width, ld, part);
  if (kPass == Pass::kSoftmax) shared_softmax<T, kMasked>(p, s, m, b0, width, ld);
}

#include "instance_tiles.h"

// Rows `first` and on of the shared negatives, m of them.
template <typename T>
struct SharedTile {
  int64_t first, m;
  const T* rows;  // [m, ld]; with tile registers they are in `pairs`
  int64_t ld;
  TileRows pairs;
};

// f(tile, b0, width) for each tile of a part and queries b0 to b0 + width, the products in s.z.
template <typename T, bool kTiles, typename F>
CRRCD_INLINE void shared_tiles(const InstanceParams<T>& p, const InstanceScratch<T>& s,
                               int64_t part, const F& f) {
  const int64_t tiles = (p.K + kKeyTile - 1) / kKeyTile, ld = z_stride(p);
  const int64_t end = tiles * (part + 1) / p.parts * kKeyTile;
  const int64_t stop = end < p.K ? end : p.K;
  const TileRegisters registers(kTiles);
  if constexpr (kTiles) split_queries(p, s);
  for (int64_t first = tiles * part / p.parts * kKeyTile; first < stop; first += kKeyTile) {
    const int64_t m = stop - first < kKeyTile ? stop - first : kKeyTile;
    SharedTile<T> tile{first, m, s.rows, p.ldD, {}};
    if constexpr (kTiles) {
      tile.pairs = load_pairs(p, s, first, m);
    } else if (rows_in_place(p)) {
      tile.rows = static_cast<const T*>(p.bank.data) + first * p.bank.row_stride;
      tile.ld = p.bank.row_stride;
    } else {
      for (int64_t n = 0; n < m; ++n) load_row<T>(p.bank, first + n, p.D, p.Dp, s.rows + n * p.ldD);
    }
    for (int64_t b0 = 0; b0 < p.Bp; b0 += kQueryBlock) {
      const int64_t width = p.Bp - b0 < kQueryBlock ? p.Bp - b0 : kQueryBlock;
      for (int64_t n = 0; n < m; n += kStrip) {
        const int64_t strip = m - n < kStrip ? m - n : kStrip;
        if constexpr (kTiles)
          tile_products(p, s, tile.pairs, n, strip, b0, width, s.z + n * ld, ld);
        else
          dense_gemm<T>(strip, width, p.D, tile.rows + n * tile.ld, tile.ld, p.query_t + b0, p.ldB,
                        s.z + n * ld, ld, true);
        // the next tile's rows come while this one is multiplied
        for (int64_t k = first + kKeyTile + n; b0 == 0 && k < first + kKeyTile + n + strip; ++k)
          if (k < stop) prefetch_row(p.bank, p.bank.index ? p.bank.index[k] : k, p.D);
      }
      f(tile, b0, width);
    }
  }
}

template <typename T, Pass kPass, bool kTiles>
void shared_pass(const InstanceParams<T>& p, const InstanceScratch<T>& s, int64_t part,
                 NceSums<T>& sums) {
  const int64_t ld = z_stride(p);
  for (int64_t b = 0; b < p.Bp; ++b) s.live[b] = b < p.B ? T(1) : T(0);
  if (p.query_id) fill_filter(p.B, p.query_id, s.ids);
  if (p.query_label) fill_filter(p.B, p.query_label, s.labels);
  // cheaper than a tile of masks, which few entries are worth
  const T lost = kPass == Pass::kNce ? lost_product(p) : T(0);
  shared_tiles<T, kTiles>(p, s, part, [&](const SharedTile<T>& tile, int64_t b0, int64_t width) {
    const int64_t first = tile.first, m = tile.m;
    const int64_t count = p.B - b0 < width ? p.B - b0 : width;
    if (lost != 0)
      for_excluded(p.excluded, b0, count, first, m,
                   [&](int64_t b, int64_t n) { s.z[n * ld + b] = lost; });
    const bool excluded = p.excluded.bits && lost == 0;
    if ((has_masks(p) || excluded) && fill_keep(p, s, first, m, b0, width, ld, excluded))
      shared_logits<T, kPass, true>(p, s, m, b0, width, ld, part, sums);
    else
      shared_logits<T, kPass, false>(p, s, m, b0, width, ld, part, sums);
    T* d_query = p.d_query + (part * p.B + b0) * p.ldD;
    if (p.need_query && kPass != Pass::kSoftmax) {
      if constexpr (kTiles)
        tile_query_gradient(p, s, tile.pairs, m, count, width, s.z, ld, d_query);
      else
        dense_gemm<T, Product::kFull, true>(count, p.Dp, m, s.z, ld, tile.rows, tile.ld, d_query,
                                            p.ldD, false);
    }
    if (p.d_rows && kPass != Pass::kLogSumExp)
      dense_gemm<T>(m, p.Dp, count, s.z, ld, p.query + b0 * p.ldD, p.ldD, p.d_rows + first * p.Dp,
                    p.Dp, b0 == 0);
  });
}

// ---------------------------------------------------------------------- each query's own negatives

// Entries of one query.
template <typename T>
struct Chunk {
  int64_t b = 0, n = 0;
  int64_t row[kChunk];      // of the bank; not where row_at is known and nothing else is asked for
  const T* row_at[kChunk];  // where they lie, in T
  bool located = false;     // row_at is known beforehand
};

// Columns of a row are walked in panels of 8, 4, 2 or 1 vectors, which stay in registers.
#define CRRCD_PANELS(CALL)                                 \
  for (int64_t at = 0; at < p.Dp;) {                       \
    const int64_t vectors = (p.Dp - at) / Simd<T>::kLanes; \
    if (vectors >= 8) {                                    \
      CALL(8);                                             \
      at += 8 * Simd<T>::kLanes;                           \
    } else if (vectors >= 4) {                             \
      CALL(4);                                             \
      at += 4 * Simd<T>::kLanes;                           \
    } else if (vectors >= 2) {                             \
      CALL(2);                                             \
      at += 2 * Simd<T>::kLanes;                           \
    } else {                                               \
      CALL(1);                                             \
      at += Simd<T>::kLanes;                               \
    }                                                      \
  }

// Products of q with rows, lane by lane: partial[i] (+)= those of row i; after the last panel
// z[i] = the sum of them all.
template <typename T, int kVectors>
__attribute__((noinline)) void dot_panel(const InstanceParams<T>& p, const Chunk<T>& chunk,
                                         const Chunk<T>* next, int64_t at, const T* q, T* partial,
                                         T* z) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  const bool last = at + kVectors * kLanes == p.Dp;
  V query[kVectors];
  for (int j = 0; j < kVectors; ++j) query[j] = load(q + at + j * kLanes);
  // rows i .. i + kRows, side by side: each of their sums waits for itself alone
  const auto products = [&]<int kRows>(int64_t i, V(&sum)[kRows]) {
    const T* m[kRows];
    for (int r = 0; r < kRows; ++r) {
      if (next && at == 0 && i + r < next->n) prefetch_row(p.bank, next->row[i + r], p.D);
      m[r] = chunk.row_at[i + r] + at;
      sum[r] = at ? load(partial + (i + r) * kLanes) : V{};
    }
    for (int j = 0; j < kVectors; ++j)
      for (int r = 0; r < kRows; ++r) sum[r] += query[j] * load(m[r] + j * kLanes);
  };
  int64_t i = 0;
  for (; i + 4 <= chunk.n; i += 4) {
    V sum[4];
    products(i, sum);
    if (last)
      sums_of_four<T>(sum[0], sum[1], sum[2], sum[3], z + i);
    else
      for (int r = 0; r < 4; ++r) store(partial + (i + r) * kLanes, sum[r]);
  }
  for (; i < chunk.n; ++i) {
    V sum[1];
    products(i, sum);
    if (last)
      z[i] = horizontal_sum<T>(sum[0]);
    else
      store(partial + i * kLanes, sum[0]);
  }
}

// out += sum of weight[i] * row i
template <typename T, int kVectors>
__attribute__((noinline)) void add_rows_panel(int64_t n, const T* const* row, int64_t at,
                                              const T* weight, T* out) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  V sum[kVectors] = {};
  for (int64_t i = 0; i < n; ++i) {
    const T* m = row[i] + at;
    for (int j = 0; j < kVectors; ++j) sum[j] += load(m + j * kLanes) * weight[i];
  }
  for (int j = 0; j < kVectors; ++j) {
    T* o = out + at + j * kLanes;
    store(o, load(o) + sum[j]);
  }
}

// row i of out += weight[i] * q
template <typename T, int kVectors>
__attribute__((noinline)) void add_outer_panel(int64_t n, const int64_t* row, int64_t at,
                                               const T* weight, const T* q, T* out, int64_t ld) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  V query[kVectors];
  for (int j = 0; j < kVectors; ++j) query[j] = load(q + at + j * kLanes);
  for (int64_t i = 0; i < n; ++i)
    for (int j = 0; j < kVectors; ++j) {
      T* o = out + row[i] * ld + at + j * kLanes;
      store(o, load(o) + query[j] * weight[i]);
    }
}

template <typename T>
void own_log_sum_exp(const InstanceParams<T>& p, const InstanceScratch<T>& s, int64_t b, int64_t n,
                     int64_t part) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  T* running_max = p.running_max + part * p.ldB + b;
  const T scale = p.scale_log2, offset = p.offset_log2;
  const int64_t at = part * p.B + b;
  const T before = *running_max;
  V tops = splat(before);
  for (int64_t i = 0; i < n; i += kLanes) {
    const V logit = load(s.z + i) * scale - offset;
    tops = load(s.keep + i) > 0 && logit > tops ? logit : tops;
  }
  T lanes[kLanes];
  store(lanes, tops);
  T top = lanes[0];
  for (int i = 1; i < kLanes; ++i) top = lanes[i] > top ? lanes[i] : top;
  if (top > before) {
    const double factor = std::exp2(static_cast<double>(before) - static_cast<double>(top));
    p.running_sum[at] *= factor;
    p.running_slope[at] *= factor;
    if (p.need_query) scale_row(p.Dp, static_cast<T>(factor), p.d_query + at * p.ldD);
    *running_max = top;
  }
  V sum{}, slope{};
  sum_exp<T, true>(p, (n + kLanes - 1) / kLanes, s.z, kLanes, s.keep, splat(top), sum, slope);
  p.running_sum[at] += horizontal_sum<T>(sum);
  p.running_slope[at] += horizontal_sum<T>(slope);
}

// Where the chunk's rows lie, in T.
template <typename T>
CRRCD_INLINE void locate(const InstanceParams<T>& p, const InstanceScratch<T>& s, Chunk<T>& chunk) {
  if (chunk.located) return;
  for (int64_t i = 0; i < chunk.n; ++i) {
    if (in_place(p)) {
      chunk.row_at[i] = static_cast<const T*>(p.bank.data) + chunk.row[i] * p.bank.row_stride;
    } else {
      chunk.row_at[i] = s.rows + i * p.ldD;
      load_row<T>(p.bank, chunk.row[i], p.D, p.Dp, s.rows + i * p.ldD);
    }
  }
}

// Products of the chunk's query and rows, which are located, into s.z.
template <typename T>
void own_products(const InstanceParams<T>& p, const InstanceScratch<T>& s, const Chunk<T>& chunk,
                  const Chunk<T>* next) {
  const T* query = p.query + chunk.b * p.ldD;
#define CRRCD_DOT(NV) dot_panel<T, NV>(p, chunk, next, at, query, s.partial, s.z)
  CRRCD_PANELS(CRRCD_DOT)
#undef CRRCD_DOT
  for (int64_t i = 0; p.Dp == 0 && i < chunk.n; ++i) s.z[i] = 0;
}

template <typename T, Pass kPass>
void process_chunk(const InstanceParams<T>& p, const InstanceScratch<T>& s, Chunk<T>& chunk,
                   const Chunk<T>* next, int64_t part, NceSums<T>& sums) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t n = chunk.n, b = chunk.b;
  locate(p, s, chunk);
  own_products(p, s, chunk, next);
  const bool masked = has_masks(p);
  const int64_t padded = n / kLanes * kLanes;  // from here on the last vector may have padding
  for (int64_t i = masked || kPass != Pass::kNce ? 0 : padded; i < n; ++i) {
    const bool drop = masked && dropped(p, b, chunk.row[i]);
    s.keep[i] = drop ? 0 : 1;
    // 0 times what the row holds might be NaN in the gradient of the query
    if (drop) chunk.row_at[i] = p.query + b * p.ldD;
  }
  for (int64_t i = n; i % kLanes != 0; ++i) s.keep[i] = s.z[i] = 0;
  const auto factor = splat(slope_of(p, b));
  if (kPass == Pass::kNce) {
    const int64_t whole = masked ? 0 : n / kLanes;
    nce_column<T, false>(p, factor, whole, s.z, kLanes, nullptr, 0, sums);
    nce_column<T, true>(p, factor, (n + kLanes - 1) / kLanes - whole, s.z + whole * kLanes, kLanes,
                        s.keep + whole * kLanes, kLanes, sums);
    if (p.losses) sums.settle(p.weight[b], p.losses[part * p.B + b]);
  }
  if (kPass == Pass::kLogSumExp) own_log_sum_exp(p, s, b, n, part);
  if (kPass == Pass::kSoftmax)
    softmax<T, true>(p, factor, (n + kLanes - 1) / kLanes, s.z, kLanes, s.keep,
                     splat(p.log_normalizer[b]));

  if (p.need_query && kPass != Pass::kSoftmax) {
    T* d_query = p.d_query + (part * p.B + b) * p.ldD;
#define CRRCD_ADD(NV) add_rows_panel<T, NV>(n, chunk.row_at, at, s.z, d_query)
    CRRCD_PANELS(CRRCD_ADD)
#undef CRRCD_ADD
  }
  if (p.d_bank && kPass != Pass::kLogSumExp) {
    const T* query = p.query + b * p.ldD;
#define CRRCD_ADD(NV) add_outer_panel<T, NV>(n, chunk.row, at, s.z, query, p.d_bank, p.Dp)
    CRRCD_PANELS(CRRCD_ADD)
#undef CRRCD_ADD
  }
}

// The entries in the order of `own`, b after b; rows of the next chunk are fetched meanwhile.
template <typename T, Pass kPass>
void direct_pass(const InstanceParams<T>& p, const InstanceScratch<T>& s, int64_t part,
                 NceSums<T>& sums) {
  const int64_t entries = p.B * p.K;
  int64_t at = entries * part / p.parts;
  const int64_t stop = entries * (part + 1) / p.parts;
  const auto fill = [&](Chunk<T>& chunk) {
    chunk.n = 0;
    while (chunk.n == 0 && at < stop) {
      const int64_t b = at / p.K, k = at % p.K;
      int64_t n = stop - at < kChunk ? stop - at : kChunk;
      n = p.K - k < n ? p.K - k : n;
      const int64_t* own = p.own + b * p.own_stride + k * p.own_step;
      if (p.excluded.bits) {
        for (int64_t i = 0; i < n; ++i) {
          chunk.row[chunk.n] = own[i * p.own_step];
          chunk.n += !p.excluded.at(b, k + i);
        }
      } else {
        for (int64_t i = 0; i < n; ++i) chunk.row[i] = own[i * p.own_step];
        chunk.n = n;
      }
      chunk.b = b;
      at += n;
    }
  };
  Chunk<T> chunks[2];
  fill(chunks[0]);
  for (int64_t i = 0; chunks[i % 2].n > 0; ++i) {
    Chunk<T>& next = chunks[(i + 1) % 2];
    fill(next);
    process_chunk<T, kPass>(p, s, chunks[i % 2], next.n > 0 ? &next : nullptr, part, sums);
  }
}

// The sorted entries, tile after tile of the bank.
template <typename T, Pass kPass>
void bucketed_pass(const InstanceParams<T>& p, const InstanceScratch<T>& s, int64_t part,
                   NceSums<T>& sums) {
  const int64_t stop = p.part_begin[part + 1];
  const int64_t rows = tile_rows(p);
  const auto mask = static_cast<uint32_t>(rows - 1);
  int64_t at = p.part_begin[part], tile = 0;
  for (int64_t above = p.tiles; tile + 1 < above;) {  // the last tile that begins at or before `at`
    const int64_t middle = (tile + above) / 2;
    (p.tile_begin[middle] <= at ? tile : above) = middle;
  }
  Chunk<T> chunk;
  for (; at < stop; ++tile) {
    const int64_t begin = at, first = tile * rows;
    const int64_t end = p.tile_begin[tile + 1] < stop ? p.tile_begin[tile + 1] : stop;
    const int64_t left = p.N - first;
    const T* tile_at = nullptr;  // where the tile's rows lie in T, if they do
    if (in_place(p)) {
      tile_at = static_cast<const T*>(p.bank.data) + first * p.bank.row_stride;
    } else if (end - begin >= rows) {
      for (int64_t n = 0; n < rows && n < left; ++n)
        load_row<T>(p.bank, first + n, p.D, p.Dp, s.rows + n * p.ldD);
      tile_at = s.rows;
    }
    const int64_t ld = in_place(p) ? p.bank.row_stride : p.ldD;
    chunk.located = tile_at != nullptr;
    // the rows of the next tile come in step with the entries of this one
    int64_t fetched = 0;
    const int64_t ahead = end == stop ? 0 : left - rows < rows ? left - rows : rows;
    const double pace = static_cast<double>(ahead) / static_cast<double>(end - begin);
    const auto work_off = [&](int64_t b, int64_t run_end) {
      chunk.b = b;
      while (at < run_end) {
        // what is left of a run is cut into halves rather than into a chunk and a bit
        const int64_t run = run_end - at;
        const int64_t n = run <= kChunk ? run : run < 2 * kChunk ? (run + 1) / 2 : kChunk;
        const auto for_rows = [&](const auto& see) {
          if (p.rows)
            for (int64_t i = 0; i < n; ++i) see(i, int64_t(p.rows[at + i]));
          else
            for (int64_t i = 0; i < n; ++i) see(i, int64_t(p.entries[at + i] & mask));
        };
        if (chunk.located)
          for_rows([&](int64_t i, int64_t row) { chunk.row_at[i] = tile_at + row * ld; });
        if (!chunk.located || has_masks(p) || p.d_bank)
          for_rows([&](int64_t i, int64_t row) { chunk.row[i] = first + row; });
        chunk.n = n;
        at += n;
        const auto due = static_cast<int64_t>(pace * static_cast<double>(at - begin));
        for (; fetched < due; ++fetched) prefetch_row(p.bank, first + rows + fetched, p.D);
        process_chunk<T, kPass>(p, s, chunk, nullptr, part, sums);
      }
    };
    if (p.rows) {
      for (int64_t i = 0; at < end; ++i) {
        const int64_t run_end = p.run_end[i * p.tiles + tile];
        work_off(p.first_query + i, run_end < end ? run_end : end);
      }
    } else {
      while (at < end) {
        const uint32_t b = p.entries[at] >> p.tile_shift;
        int64_t run_end = at + 1;
        while (run_end < end && p.entries[run_end] >> p.tile_shift == b) ++run_end;
        work_off(b, run_end);
      }
    }
  }
}

template <typename T, Pass kPass>
void instance_pass(const InstanceParams<T>& p, int64_t part) {
  InstanceScratch<T> s;
  carve(p, p.scratch + part * p.scratch_bytes, s);
  NceSums<T> sums;
  switch (p.order) {
    case Order::kShared:
      if constexpr (kHasTiles && sizeof(T) == 4) {
        if (p.tile_registers) {
          shared_pass<T, kPass, true>(p, s, part, sums);
          break;
        }
      }
      shared_pass<T, kPass, false>(p, s, part, sums);
      break;
    case Order::kDirect:
      direct_pass<T, kPass>(p, s, part, sums);
      break;
    case Order::kBucketed:
      bucketed_pass<T, kPass>(p, s, part, sums);
      break;
  }
  if (kPass != Pass::kNce) return;
  sums.flush();
  p.scalars[part * 3] += sums.loss + sums.products.log();
  p.scalars[part * 3 + 1] += sums.d_scale;
  p.scalars[part * 3 + 2] += sums.d_offset;
}

template <typename T>
void instance(const InstanceParams<T>& p, int64_t part) {
  switch (p.pass) {
    case Pass::kNce:
      return instance_pass<T, Pass::kNce>(p, part);
    case Pass::kLogSumExp:
      return instance_pass<T, Pass::kLogSumExp>(p, part);
    case Pass::kSoftmax:
      return instance_pass<T, Pass::kSoftmax>(p, part);
  }
}

template <typename T>
size_t instance_scratch(const InstanceParams<T>& p) {
  InstanceScratch<T> s;
  return carve(p, static_cast<std::byte*>(nullptr), s);
}
