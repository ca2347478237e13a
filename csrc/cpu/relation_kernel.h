// One pass over a part of the negatives: logits, loss and every gradient of relation_nce.
// Included once per instruction set, inside that set's namespace: no include guard.
//
// Per (anchor a, key n): hid = relu(P_a - X_n), w = W hid + c, logit of query b =
// scale <q_b, w> / |w| - offset. The relation vector w is never formed in the Gram form: with
// G = W'W and QW = Q W,
//     |w|^2 = hid'(G hid)        <q_b, w> = (QW)_b . hid
// and with ds_b = (d loss / d logit_b) scale / |w| and k = -(sum_b ds_b <q_b, w>) / |w|^2,
//     d hid = ds QW + k G hid    d QW += ds' hid    d G += k hid hid'
// from which the host gets d Q = d QW W' and d W = Q' d QW + W d G. The output bias c is one more,
// constant, hidden unit.

template <typename T>
struct ChunkScratch {
  T* x;              // [tiles, tile, ldH] projected keys
  T* x_t;            // [tiles, Hp, ldM]
  T* d_x;            // [tiles, tile, ldH]
  T* keep;           // [tiles, tile, ldB] 1 for a negative, 0 for a masked one
  bool* masked;      // [tiles] some entry of keep is 0
  T* rows;           // [tile, ldD] gathered bank rows
  T* hid;            // [tile, ldH]
  T* hid_t;          // [Hp, ldM]
  T* norm;           // [tile, ldH] G hid, or T hid
  T* d_hid;          // [kStrip, ldH] ds QW, with tile registers
  T* weighted;       // [tile, ldH] k hid
  T* z;              // [tile, ldB] <q_b, w>
  T* ds;             // [tile, ldB]
  T* ds_t;           // [Bp, ldM]
  T* w;              // [tile, ldR]
  T* d_w;            // [tile, ldR]
  T* d_gram;         // [Hp, ldH] of this chunk: two levels of sums round less than one long sum
  T* d_hid_sum;      // [ldH]
  T* d_w_t;          // [Hp, ldR]
  T* d_bias;         // [ldR]
  T* coefficient;    // [tile] k above
  T* ds_z;           // [tile, lanes] partial sums of ds <q_b, w>
  T* inverse;        // [tile] 1 / |w|, 0 where the norm vanishes
  uint64_t* mask;    // [tile, ceil(Hp / 64)] hid is not zero
  uint64_t* mask_t;  // [Hp, tile / 64]
  // bfloat16 pairs (bf16_kernel.h)
  uint32_t* hid_pairs;       // [tile, pair_stride(Hp)] along h
  uint32_t* hid_t_pairs;     // [Hp, pair_stride(tile)] along n
  uint32_t* ds_pairs;        // [tile, pair_stride(Bp)] along b
  uint32_t* ds_t_pairs;      // [tile / 2, ldB] along n
  uint32_t* weighted_pairs;  // [tile / 2, ldH] along n
  uint64_t* pair_mask;       // [tile, ceil(Hp / 128)]
  uint64_t* pair_mask_t;     // [Hp, ceil(tile / 128)]
};

// Rows that go through several steps at a time with tile registers, of which they fill two: they
// stay in the first level of the cache.
constexpr int64_t kStrip = 32;

// Carves typed arrays out of one allocation; with a null base it only measures.
struct Carver {
  std::byte* base;
  size_t used = 0;
  template <typename U>
  U* take(int64_t count) {
    U* p = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(U) + 63) / 64 * 64;
    return p;
  }
};

// An odd number of cache lines, so that a column of the block touches every cache set.
template <typename T>
CRRCD_INLINE int64_t odd_lines(int64_t n) {
  const int64_t per_line = 64 / sizeof(T);
  return ((n + per_line - 1) / per_line | 1) * per_line;
}

// Pairs of a row of n bfloat16.
CRRCD_INLINE int64_t pair_stride(int64_t n) { return odd_lines<uint32_t>((n + 1) / 2); }

CRRCD_INLINE int64_t words_of(int64_t n) { return (n + 63) / 64; }

template <typename T>
size_t carve(const NceParams<T>& p, std::byte* base, ChunkScratch<T>& s) {
  Carver c{base};
  const int64_t tiles = p.tiles_per_chunk, m = p.tile, ld_m = odd_lines<T>(m);
  const bool key_side = p.need_key || p.need_anchor;
  const bool masks = p.query_id || p.query_label || p.excluded.bits;
  const bool direct = p.form == Form::kDirect;
  const bool transposed = p.need_query || p.need_weight;
  s.x = c.take<T>(tiles * m * p.ldH);
  s.x_t = c.take<T>(transposed ? tiles * p.Hp * ld_m : 0);
  s.d_x = c.take<T>(p.need_key ? tiles * m * p.ldH : 0);
  s.keep = c.take<T>(masks ? tiles * m * p.ldB : 0);
  s.masked = c.take<bool>(tiles);
  s.rows = c.take<T>(m * p.ldD);
  s.hid = c.take<T>(m * p.ldH);
  s.hid_t = c.take<T>(transposed || p.need_key ? p.Hp * ld_m : 0);
  s.norm = c.take<T>(direct ? 0 : m * p.ldH);
  s.weighted = c.take<T>(!direct && p.need_weight ? m * p.ldH : 0);
  s.z = c.take<T>(m * p.ldB);
  s.ds = c.take<T>(m * p.ldB);
  s.ds_t = c.take<T>(direct && p.need_query ? p.Bp * ld_m : 0);
  s.w = c.take<T>(m * p.ldR);
  s.d_hid = c.take<T>(kHasTiles && p.pairs && !direct && key_side ? kStrip * p.ldH : 0);
  s.d_w = c.take<T>(direct && (key_side || p.need_weight) ? m * p.ldR : 0);
  s.d_gram = c.take<T>(!direct && p.need_weight ? p.Hp * p.ldH : 0);
  s.d_hid_sum = c.take<T>(p.ldH);
  s.d_bias = c.take<T>(p.ldR);
  s.d_w_t = c.take<T>(direct && p.need_weight ? p.Hp * p.ldR : 0);
  s.coefficient = c.take<T>(m);
  s.ds_z = c.take<T>(m * Simd<T>::kLanes);
  s.inverse = c.take<T>(m);
  s.mask = c.take<uint64_t>(m * words_of(p.Hp));
  s.mask_t = c.take<uint64_t>(p.Hp * (m / 64));
  const bool pairs = p.pairs && !direct;
  s.hid_pairs = c.take<uint32_t>(pairs ? m * pair_stride(p.Hp) : 0);
  s.hid_t_pairs = c.take<uint32_t>(pairs && transposed ? p.Hp * pair_stride(m) : 0);
  s.ds_pairs = c.take<uint32_t>(pairs && key_side ? m * pair_stride(p.Bp) : 0);
  s.ds_t_pairs = c.take<uint32_t>(pairs ? m / 2 * p.ldB : 0);
  s.weighted_pairs = c.take<uint32_t>(pairs && p.need_weight ? m / 2 * p.ldH : 0);
  s.pair_mask = c.take<uint64_t>(pairs ? m * words_of(p.Hp / 2) : 0);
  s.pair_mask_t = c.take<uint64_t>(pairs ? p.Hp * words_of(m / 2) : 0);
  return c.used;
}

// hid[n, h] = relu(anchor[h] - x[n, h]) for m keys, with one mask bit an entry that is not zero.
template <typename T>
void hidden_rows(int64_t m, int64_t hp, const T* anchor, const T* x, int64_t ld, T* hid,
                 uint64_t* mask) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t words = words_of(hp);
  for (int64_t n = 0; n < m; ++n) {
    for (int64_t w = 0; w < words; ++w) {
      uint64_t bits = 0;
      const int64_t stop = (w + 1) * 64 < hp ? (w + 1) * 64 : hp;
      for (int64_t h = w * 64; h < stop; h += kLanes) {
        const V v = load(anchor + h) - load(x + n * ld + h);
        store(hid + n * ld + h, relu(v));
        bits |= static_cast<uint64_t>(positive_bits<true>(v)) << (h % 64);
      }
      mask[n * words + w] = bits;
    }
  }
}

// The same, hidden unit by hidden unit: hid_t[h, n].
template <typename T>
void hidden_columns(int64_t tile, int64_t hidden, const T* anchor, const T* x_t, int64_t ld_m,
                    T* hid_t, uint64_t* mask_t) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t words = tile / 64;
  for (int64_t h = 0; h < hidden; ++h) {
    const V level = splat(anchor[h]);
    for (int64_t w = 0; w < words; ++w) {
      uint64_t bits = 0;
      for (int64_t n = w * 64; n < (w + 1) * 64; n += kLanes) {
        const V v = level - load(x_t + h * ld_m + n);
        store(hid_t + h * ld_m + n, relu(v));
        bits |= static_cast<uint64_t>(positive_bits<true>(v)) << (n % 64);
      }
      mask_t[h * words + w] = bits;
    }
  }
}

template <typename T>
void transpose(int64_t rows, int64_t columns, const T* a, int64_t lda, T* b, int64_t ldb) {
  for (int64_t i0 = 0; i0 < rows; i0 += 16)
    for (int64_t j0 = 0; j0 < columns; j0 += 16)
      for (int64_t j = j0; j < j0 + 16 && j < columns; ++j)
        for (int64_t i = i0; i < i0 + 16 && i < rows; ++i) b[j * ldb + i] = a[i * lda + j];
}

template <typename T>
CRRCD_INLINE T dot(int64_t n, const T* a, const T* b) {
  typename Simd<T>::V sum{};
  for (int64_t i = 0; i < n; i += Simd<T>::kLanes) sum += load(a + i) * load(b + i);
  return horizontal_sum<T>(sum);
}

// Masks instead of branches, so that the compiler makes vectors of it.
CRRCD_INLINE float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  const uint32_t special = 0u - (magnitude >= 0x7c00);  // infinity, NaN
  const uint32_t tiny = 0u - (magnitude < 0x0400);      // subnormal
  const uint32_t normal = (magnitude << 13) + (112u << 23) + (special & 112u << 23);
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f;
  uint32_t subnormal;
  __builtin_memcpy(&subnormal, &small, 4);
  const uint32_t out = (subnormal & tiny) | (normal & ~tiny) | sign;
  float value;
  __builtin_memcpy(&value, &out, 4);
  return value;
}

template <typename T>
void load_row(const BankView& bank, int64_t k, int64_t width, int64_t padded, T* out) {
  const int64_t row = bank.index ? bank.index[k] : k;
  const int64_t start = row * bank.row_stride;
  switch (bank.storage) {
    case Storage::kFloat64: {
      const double* p = static_cast<const double*>(bank.data) + start;
      for (int64_t i = 0; i < width; ++i) out[i] = static_cast<T>(p[i]);
      break;
    }
    case Storage::kFloat32: {
      const float* p = static_cast<const float*>(bank.data) + start;
      for (int64_t i = 0; i < width; ++i) out[i] = static_cast<T>(p[i]);
      break;
    }
    case Storage::kBFloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(bank.data) + start;
      for (int64_t i = 0; i < width; ++i) {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        float value;
        __builtin_memcpy(&value, &bits, 4);
        out[i] = static_cast<T>(value);
      }
      break;
    }
    case Storage::kFloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(bank.data) + start;
      for (int64_t i = 0; i < width; ++i) out[i] = static_cast<T>(half_to_float(p[i]));
      break;
    }
  }
  for (int64_t i = width; i < padded; ++i) out[i] = 0;
}

CRRCD_INLINE int64_t storage_bytes(Storage storage) {
  return storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
}

// Fetches a row of the bank into the second level of the cache; the first one is too small for what
// is wanted that early.
CRRCD_INLINE void prefetch_row(const BankView& bank, int64_t row, int64_t width) {
  const int64_t element = storage_bytes(bank.storage), bytes = width * element;
  const char* start = static_cast<const char*>(bank.data) + row * bank.row_stride * element;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(start + at, 0, 2);
}

template <typename T>
void gather_rows(const NceParams<T>& p, int64_t first, int64_t m, T* out, int64_t ld,
                 int64_t padded) {
  for (int64_t n = 0; n < m; ++n) load_row<T>(p.bank, first + n, p.D, padded, out + n * ld);
}

// f(b, n) for each of queries b0 + b, b < count, and keys first + n, n < m, that is excluded; first
// is a multiple of 32.
template <typename F>
CRRCD_INLINE void for_excluded(const Excluded& excluded, int64_t b0, int64_t count, int64_t first,
                               int64_t m, const F& f) {
  if (!excluded.bits) return;
  for (int64_t b = 0; b < count; ++b) {
    const uint32_t* words = excluded.bits + (b0 + b) * excluded.words + first / 32;
    for (int64_t n = 0; n < m; n += 32) {
      uint32_t bits = words[n / 32];
      if (m - n < 32) bits &= (uint32_t(1) << (m - n)) - 1;
      for (; bits; bits &= bits - 1) f(b, n + __builtin_ctz(bits));
    }
  }
}

// Keys of one tile: gather, project, transpose, masks. Returns 0, or NaN when a key is not finite:
// relu would hide an infinity, and where hid is zero products are skipped.
template <typename T>
T load_tile(const NceParams<T>& p, const ChunkScratch<T>& s, int64_t t, int64_t first, int64_t m) {
  const int64_t ld_m = odd_lines<T>(p.tile);
  T* x = s.x + t * p.tile * p.ldH;
  if (p.projected) {
    gather_rows(p, first, m, x, p.ldH, p.Hp);
  } else {
    gather_rows(p, first, m, s.rows, p.ldD, p.Dp);
    dense_gemm<T>(m, p.Hp, p.Dp, s.rows, p.ldD, p.key_weight_t, p.ldH, x, p.ldH, true);
  }
  typename Simd<T>::V poison{};
  for (int64_t n = 0; n < m; ++n)
    for (int64_t h = 0; h < p.Hp; h += Simd<T>::kLanes) poison += load(x + n * p.ldH + h) * T(0);
  if (p.need_query || p.need_weight) {
    T* x_t = s.x_t + t * p.Hp * ld_m;
    transpose<T>(m, p.H, x, p.ldH, x_t, ld_m);
    for (int64_t h = 0; h < p.H; ++h)  // absent keys: far above any threshold, so never active
      for (int64_t n = m; n < p.tile; ++n) x_t[h * ld_m + n] = T(1e30);
  }
  if (p.need_key) {
    T* d_x = s.d_x + t * p.tile * p.ldH;
    for (int64_t i = 0; i < m * p.ldH; ++i) d_x[i] = 0;
  }
  s.masked[t] = false;
  if (p.query_id || p.query_label) {
    bool any = false;
    for (int64_t n = 0; n < m; ++n) {
      T* keep = s.keep + (t * p.tile + n) * p.ldB;
      const int64_t row = p.bank.index ? p.bank.index[first + n] : first + n;
      const int64_t id = p.key_id ? p.key_id[row] : row;
      for (int64_t b = 0; b < p.Bp; ++b) {
        bool drop = false;
        if (b < p.B) {
          drop = (p.query_id && p.query_id[b] == id) ||
                 (p.query_label && p.query_label[b] == p.key_label[row]);
        }
        keep[b] = drop ? T(0) : T(1);
        any |= drop;
      }
    }
    s.masked[t] = any;
  }
  T* keep = s.keep + t * p.tile * p.ldB;
  const bool filled = p.query_id || p.query_label;
  for_excluded(p.excluded, 0, p.B, first, m, [&](int64_t b, int64_t n) {
    if (!filled && !s.masked[t])
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < p.Bp; ++j) keep[i * p.ldB + j] = 1;
    s.masked[t] = true;
    keep[n * p.ldB + b] = 0;
  });
  return horizontal_sum<T>(poison);
}

// Loss and logit gradients of one tile from z = <q_b, w> and 1/|w|. Logits are in units of log 2.
// losses: null, or to add each query's to.
template <typename T, Pass kPass, bool kMasked>
void tile_logits(const NceParams<T>& p, const ChunkScratch<T>& s, int64_t a, int64_t m,
                 const T* keep, T* d_logit, T* running_max, T* running_sum, double* losses,
                 double* scalars) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int64_t kBlock = 16;  // two short sums round less than one long one
  const T* pair = p.pair + a * p.ldB;
  const T* log_normalizer = kPass == Pass::kSoftmax ? p.log_normalizer + a * p.ldB : nullptr;
  double loss = 0, d_scale = 0, d_offset = 0;
  LogProduct<T> products;
  for (int64_t b = 0; b < p.Bp; b += kLanes) {
    const V weight = load(pair + b);
    const auto logit_of = [&](int64_t n) {
      V logit = load(s.z + n * p.ldB + b) * (p.scale_log2 * s.inverse[n]) - p.offset_log2;
      if (kMasked) logit = load(keep + n * p.ldB + b) > 0 ? logit : splat(T(-1e30));
      return logit;
    };
    if constexpr (kPass == Pass::kLogSumExp) {
      V top = load(running_max + b), old_top = top;
      for (int64_t n = 0; n < m; ++n) {
        const V logit = logit_of(n);
        store(s.z + n * p.ldB + b, logit);
        top = logit > top ? logit : top;
      }
      V sum = load(running_sum + b) * exp2_of(old_top - top);
      for_vectors(m, [&]<int kVectors>(int64_t first) {
        V e[kVectors];
        for (int i = 0; i < kVectors; ++i) e[i] = load(s.z + (first + i) * p.ldB + b) - top;
        exp2_of(e);
        for (int i = 0; i < kVectors; ++i) {
          if (kMasked) e[i] *= load(keep + (first + i) * p.ldB + b);
          sum += e[i];
        }
      });
      store(running_max + b, top);
      store(running_sum + b, sum);
      continue;
    }
    V above{}, sum_g{}, sum_g_cosine{}, sum_ds{}, block_ds{}, q{};
    int steps = 0;
    double product[kLanes] = {};  // minus 1, of each query: below 2^(m / 64 * 102), in range
    const auto flush = [&] {
      if (losses) {
        T lane[kLanes];
        store(lane, q);
        for (int i = 0; i < kLanes; ++i) product[i] = product[i] * lane[i] + (product[i] + lane[i]);
      } else {
        products.add(weight > 0 ? q : V{}, kMostlyBoundedBits);
      }
      q = V{};
      steps = 0;
    };
    // always inline: a function of its own would keep in memory what it adds to
    const auto rows = [&]<int kVectors>(int64_t first) __attribute__((always_inline)) {
      V logit[kVectors], g[kVectors];
      for (int i = 0; i < kVectors; ++i) logit[i] = logit_of(first + i);
      if constexpr (kPass == Pass::kNce) {
        softplus_mostly_bounded<T>(logit, q, above, g);
      } else {
        const V normalizer = load(log_normalizer + b);
        for (int i = 0; i < kVectors; ++i) g[i] = logit[i] - normalizer;
        exp2_of(g);
        if (kMasked)  // g may be no number
          for (int i = 0; i < kVectors; ++i)
            g[i] = load(keep + (first + i) * p.ldB + b) > 0 ? g[i] : V{};
      }
      for (int i = 0; i < kVectors; ++i) {
        const int64_t n = first + i;
        const T inverse = s.inverse[n];
        const V z = load(s.z + n * p.ldB + b);
        const V ds = g[i] * (weight * (p.scale * inverse * p.gradient_scale));
        store(s.ds + n * p.ldB + b, ds);
        T* ds_z = s.ds_z + n * kLanes;
        store(ds_z, b == 0 ? ds * z : load(ds_z) + ds * z);
        block_ds += ds;
        sum_g += g[i];
        sum_g_cosine += g[i] * (z * inverse);
      }
    };
    for (int64_t n = 0; n < m; n += kBlock) {
      const int64_t count = m - n < kBlock ? m - n : kBlock;
      if (steps + count > kMostlyBoundedSteps) flush();
      steps += static_cast<int>(count);
      for_vectors(count, [&]<int kVectors>(int64_t i) __attribute__((always_inline)) {
        rows.template operator()<kVectors>(n + i);
      });
      sum_ds += block_ds;
      block_ds = V{};
    }
    if (kPass == Pass::kNce) flush();
    if (d_logit) store(d_logit + b, load(d_logit + b) + sum_ds);
    if (kPass == Pass::kNce && losses) {
      T lane[kLanes];
      store(lane, above);
      for (int i = 0; i < kLanes; ++i)
        losses[b + i] += kLog2 * static_cast<double>(lane[i]) + __builtin_log1p(product[i]);
    } else {
      loss += kLog2 * static_cast<double>(horizontal_sum<T>(above * weight));
    }
    d_scale += horizontal_sum<T>(sum_g_cosine * weight);
    d_offset -= horizontal_sum<T>(sum_g * weight);
  }
  if (kPass == Pass::kNce) loss += products.log();
  if (kPass == Pass::kLogSumExp) return;
  double coefficients = 0;
  for (int64_t n = 0; n < m; ++n) {
    s.coefficient[n] = -horizontal_sum<T>(load(s.ds_z + n * kLanes)) * s.inverse[n] * s.inverse[n];
    coefficients += s.coefficient[n];
  }
  scalars[0] += loss;
  scalars[1] += d_scale;
  scalars[2] += d_offset;
  scalars[3] += coefficients;
}

// d hid = rows of `left` [m, k] times `right` [k, Hp] plus coefficient * extra, cut where hid is
// zero; subtracted from d_x and summed into d_anchor.
template <typename T, Product kProduct, int kRows, int kVectors>
CRRCD_INLINE void hidden_gradient_block(int64_t k, const T* left, int64_t ld_left, const T* right,
                                        int64_t ld_right, const T* hid, int64_t ldH, const T* extra,
                                        const T* coefficient, T* d_x,
                                        typename Simd<T>::V (&anchor_sum)[kVectors]) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  V sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = extra ? load(extra + i * ldH + j * kLanes) * coefficient[i] : V{};
  multiply_add<T, kProduct, kRows, kVectors, false>(sum, left, ld_left, right, ld_right, k, 0);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      const V cut = load(hid + i * ldH + j * kLanes) <= 0 ? V{} : sum[i][j];
      anchor_sum[j] += cut;
      if (d_x) {
        T* out = d_x + i * ldH + j * kLanes;
        store(out, load(out) - cut);
      }
    }
}

// Rows from n on in blocks of kRows, what is left in smaller ones.
template <typename T, Product kProduct, int kRows, int kVectors>
CRRCD_INLINE void hidden_gradient_rows(int64_t n, int64_t m, int64_t k, const T* left,
                                       int64_t ld_left, const T* right, int64_t ld_right,
                                       const T* hid, int64_t ldH, const T* extra,
                                       const T* coefficient, T* d_x,
                                       typename Simd<T>::V (&anchor_sum)[kVectors]) {
  for (; n + kRows <= m; n += kRows)
    hidden_gradient_block<T, kProduct, kRows, kVectors>(
        k, left + n * ld_left, ld_left, right, ld_right, hid + n * ldH, ldH,
        extra ? extra + n * ldH : nullptr, coefficient + n, d_x ? d_x + n * ldH : nullptr,
        anchor_sum);
  if constexpr (kRows > 1)
    hidden_gradient_rows<T, kProduct, fewer_rows(kRows), kVectors>(
        n, m, k, left, ld_left, right, ld_right, hid, ldH, extra, coefficient, d_x, anchor_sum);
}

template <typename T, Product kProduct, int kVectors>
__attribute__((noinline)) void hidden_gradient_panel(int64_t m, int64_t k, const T* left,
                                                     int64_t ld_left, const T* right,
                                                     int64_t ld_right, const T* hid, int64_t ldH,
                                                     const T* extra, const T* coefficient, T* d_x,
                                                     T* d_anchor) {
  constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::V anchor_sum[kVectors] = {};
  hidden_gradient_rows<T, kProduct, kDenseRows, kVectors>(
      0, m, k, left, ld_left, right, ld_right, hid, ldH, extra, coefficient, d_x, anchor_sum);
  if (d_anchor)
    for (int j = 0; j < kVectors; ++j)
      store(d_anchor + j * kLanes, load(d_anchor + j * kLanes) + anchor_sum[j]);
}

template <typename T, Product kProduct = Product::kFull>
void hidden_gradient(int64_t m, int64_t hp, int64_t k, const T* left, int64_t ld_left,
                     const T* right, int64_t ld_right, const T* hid, int64_t ldH, const T* extra,
                     const T* coefficient, T* d_x, T* d_anchor) {
  for_panels<T>(hp, [&]<int kVectors>(int64_t j) {
    hidden_gradient_panel<T, kProduct, kVectors>(
        m, k, left, ld_left, right + j, ld_right, hid + j, ldH, extra ? extra + j : nullptr,
        coefficient, d_x ? d_x + j : nullptr, d_anchor ? d_anchor + j : nullptr);
  });
}

template <typename T>
void fill_rows(int64_t m, int64_t n, const T* row, T* out, int64_t ld) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; j += Simd<T>::kLanes) store(out + i * ld + j, load(row + j));
}

template <typename T>
CRRCD_INLINE T inverse_norm_of(T squared) {
  return squared <= T(kZeroNormSquared) ? T(0) : T(1) / std::sqrt(squared);
}

// 1/|w| of every key of the tile, in s.inverse, from T hid in s.norm.
template <typename T>
void triangular_norms(const NceParams<T>& p, const ChunkScratch<T>& s, int64_t m) {
  const int64_t rank = p.R < p.H ? p.Rp : p.Hp;
  for (int64_t n = 0; n < m; ++n) {
    const T* y = s.norm + n * p.ldH;
    s.inverse[n] = inverse_norm_of(dot(rank, y, y) + p.norm_constant);
  }
}

// The same from G hid in s.norm: |w|^2 = hid' G hid, or from w itself where that cancels. Without
// masks every unit of hid is walked then.
template <typename T, bool kMasks = true>
void gram_norms(const NceParams<T>& p, const ChunkScratch<T>& s, int64_t m) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t words = words_of(p.Hp);
  for (int64_t n = 0; n < m; ++n) {
    const T* hid = s.hid + n * p.ldH;
    const T* norm = s.norm + n * p.ldH;
    V squared{}, length{};
    for (int64_t h = 0; h < p.Hp; h += kLanes) {
      const V v = load(hid + h);
      V u = load(norm + h);
      if (p.norm_bias) u += load(p.norm_bias + h);
      squared += v * u;
      length += v * v;
    }
    T total = horizontal_sum<T>(squared) + p.norm_constant;
    if (!(total > p.cancellation * (horizontal_sum<T>(length) + p.norm_constant))) {
      T* w = s.w + n * p.ldR;
      if (p.bias) fill_rows(1, p.Rp, p.bias, w, p.ldR);
      if (kMasks)
        sparse_gemm<T>(1, p.Rp, p.Hp, hid, p.ldH, s.mask + n * words, words, p.weight_t, p.ldR, w,
                       p.ldR, !p.bias, false);
      else
        dense_gemm<T>(1, p.Rp, p.Hp, hid, p.ldH, p.weight_t, p.ldR, w, p.ldR, !p.bias);
      total = dot(p.Rp, w, w);
    }
    s.inverse[n] = inverse_norm_of(total);
  }
}

// Four vectors of columns of T hid, from column j on, for kRows keys. T[i, h] = 0 for h < i: units
// before j do not count, and of the next few vectors' worth of units the later columns do not need
// the earlier ones. `per_vector` is how many k one vector of columns spans, `start` where column
// j's k is.
template <typename T, Product kProduct, int kRows>
CRRCD_INLINE void triangular_rows(int64_t k, int64_t start, int64_t per_vector, const T* a,
                                  int64_t lda, const uint64_t* mask, int64_t words, const T* b,
                                  int64_t ldb, T* c, int64_t ldc, bool zero) {
  const int64_t first_word = start / 64;
  for (int64_t w = first_word; w * 64 < k; ++w) {
    uint64_t active = 0;
    for (int i = 0; i < kRows; ++i) active |= mask[i * words + w];
    const T* a_word = a + w * 64;
    const T* b_word = b + w * 64 * ldb;
    if (w > first_word) {
      block<T, kProduct, kRows, 4, true>(a_word, lda, b_word, ldb, 64, active, c, ldc, false);
      continue;
    }
    const int64_t at = start % 64;  // at + 4 * per_vector <= 64
    const uint64_t step = (uint64_t(1) << per_vector) - 1;
    const uint64_t wide = active & (~uint64_t(0) << (at + 3 * per_vector));
    block<T, kProduct, kRows, 4, true>(a_word, lda, b_word, ldb, 64, wide, c, ldc, zero);
    block<T, kProduct, kRows, 3, true>(a_word, lda, b_word, ldb, 64,
                                       active & (step << (at + 2 * per_vector)), c, ldc, false);
    block<T, kProduct, kRows, 2, true>(a_word, lda, b_word, ldb, 64,
                                       active & (step << (at + per_vector)), c, ldc, false);
    block<T, kProduct, kRows, 1, true>(a_word, lda, b_word, ldb, 64, active & (step << at), c, ldc,
                                       false);
  }
}

template <typename T, Product kProduct>
__attribute__((noinline)) void triangular_panel(int64_t m, int64_t k, int64_t start,
                                                int64_t per_vector, const T* a, int64_t lda,
                                                const uint64_t* mask, int64_t words, const T* b,
                                                int64_t ldb, T* c, int64_t ldc, bool zero) {
  int64_t i = 0;
  for (; i + 2 <= m; i += 2)
    triangular_rows<T, kProduct, 2>(k, start, per_vector, a + i * lda, lda, mask + i * words, words,
                                    b, ldb, c + i * ldc, ldc, zero);
  for (; i < m; ++i)
    triangular_rows<T, kProduct, 1>(k, start, per_vector, a + i * lda, lda, mask + i * words, words,
                                    b, ldb, c + i * ldc, ldc, zero);
}

// C = T hid for upper triangular T. One k stands for units_per_k hidden units.
template <typename T, Product kProduct>
void triangular_product(int64_t m, int64_t rank, int64_t k, int64_t units_per_k, const T* a,
                        int64_t lda, const uint64_t* mask, int64_t words, const T* b, int64_t ldb,
                        T* c, int64_t ldc, bool zero) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  for (int64_t j = 0; j < rank; j += 4 * kLanes) {
    if (rank - j >= 4 * kLanes)
      triangular_panel<T, kProduct>(m, k, j / units_per_k, kLanes / units_per_k, a, lda, mask,
                                    words, b + j, ldb, c + j, ldc, zero);
    else
      sparse_gemm<T, kProduct>(m, rank - j, k, a, lda, mask, words, b + j, ldb, c + j, ldc, zero,
                               true, j / units_per_k / 64);
  }
}

// Products of hid with everything that the logits need: s.norm or s.w, s.z, s.inverse.
template <typename T>
void forward_products(const NceParams<T>& p, const ChunkScratch<T>& s, int64_t m, int64_t a) {
  const int64_t words = words_of(p.Hp);
  if (p.form == Form::kDirect) {
    if (p.bias) fill_rows(m, p.Rp, p.bias, s.w, p.ldR);
    sparse_gemm<T>(m, p.Rp, p.Hp, s.hid, p.ldH, s.mask, words, p.weight_t, p.ldR, s.w, p.ldR,
                   !p.bias, true);
    for (int64_t n = 0; n < m; ++n)
      s.inverse[n] = inverse_norm_of(dot(p.Rp, s.w + n * p.ldR, s.w + n * p.ldR));
    dense_gemm<T>(m, p.Bp, p.Rp, s.w, p.ldR, p.q_t + a * p.Rp * p.ldB, p.ldB, s.z, p.ldB, true);
    return;
  }
  if (p.norm_bias) fill_rows(m, p.Hp, p.norm_bias, s.norm, p.ldH);
  if (p.qc) fill_rows(m, p.Bp, p.qc + a * p.ldB, s.z, p.ldB);
  if (p.form == Form::kTriangular) {
    triangular_product<T, Product::kFull>(m, p.R < p.H ? p.Rp : p.Hp, p.Hp, 1, s.hid, p.ldH, s.mask,
                                          words, p.norm_matrix, p.ldH, s.norm, p.ldH, !p.norm_bias);
    triangular_norms(p, s, m);
  } else {
    sparse_gemm<T>(m, p.Hp, p.Hp, s.hid, p.ldH, s.mask, words, p.norm_matrix, p.ldH, s.norm, p.ldH,
                   !p.norm_bias, true);
    gram_norms(p, s, m);
  }
  sparse_gemm<T>(m, p.Bp, p.Hp, s.hid, p.ldH, s.mask, words, p.qw_t + a * p.Hp * p.ldB, p.ldB, s.z,
                 p.ldB, !p.qc, true);
}

// Columns of a block of d_gram, of whose blocks those above the diagonal are not made.
template <typename T>
constexpr int64_t kGramBlock = 4 * Simd<T>::kLanes;

// ds' hid into d_qw_t and hid' (k hid) into d_gram, Gram and triangular form.
template <typename T, Product kProduct>
void transposed_products(const NceParams<T>& p, int64_t k, const T* hid_t, int64_t ld_hid_t,
                         const uint64_t* mask_t, int64_t words, const T* ds, const T* weighted,
                         int64_t slice, T* d_gram) {
  if (p.need_query)
    sparse_gemm<T, kProduct>(p.H, p.Bp, k, hid_t, ld_hid_t, mask_t, words, ds, p.ldB,
                             p.d_qw_t + slice * p.Hp * p.ldB, p.ldB, false, false);
  if (p.need_weight) {
    constexpr int64_t kWidth = kGramBlock<T>;
    for (int64_t j = 0; j < p.H; j += kWidth)  // symmetric: rows from the diagonal block on
      sparse_gemm<T, kProduct>(p.H - j, p.Hp - j < kWidth ? p.Hp - j : kWidth, k,
                               hid_t + j * ld_hid_t, ld_hid_t, mask_t + j * words, words,
                               weighted + j, p.ldH, d_gram + j * p.ldH + j, p.ldH, false, false);
  }
}

// The sum of m rows on top of sum.
template <typename T>
void add_rows(int64_t m, int64_t width, const T* rows, int64_t ld, T* sum) {
  constexpr int64_t kBlock = 16;  // two short sums round less than one long one
  for (int64_t j = 0; j < width; j += Simd<T>::kLanes) {
    typename Simd<T>::V total{};
    for (int64_t first = 0; first < m; first += kBlock) {
      typename Simd<T>::V part{};
      for (int64_t n = first; n < m && n < first + kBlock; ++n) part += load(rows + n * ld + j);
      total += part;
    }
    store(sum + j, load(sum + j) + total);
  }
}

template <typename T>
void direct_backward(const NceParams<T>& p, const ChunkScratch<T>& s, int64_t m, int64_t a,
                     int64_t slice, T* d_x, T* d_anchor) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t ld_m = odd_lines<T>(p.tile);
  if (p.need_query) {
    transpose<T>(m, p.Bp, s.ds, p.ldB, s.ds_t, ld_m);
    dense_gemm<T>(p.Bp, p.Rp, m, s.ds_t, ld_m, s.w, p.ldR, p.d_q + slice * p.Bp * p.ldR, p.ldR,
                  false);
  }
  if (!(p.need_key || p.need_anchor || p.need_weight)) return;
  for (int64_t n = 0; n < m; ++n)
    for (int64_t r = 0; r < p.Rp; r += kLanes)
      store(s.d_w + n * p.ldR + r, load(s.w + n * p.ldR + r) * s.coefficient[n]);
  dense_gemm<T>(m, p.Rp, p.Bp, s.ds, p.ldB, p.q + a * p.Bp * p.ldR, p.ldR, s.d_w, p.ldR, false);
  if (p.need_key || p.need_anchor)
    hidden_gradient<T>(m, p.Hp, p.Rp, s.d_w, p.ldR, p.weight, p.ldH, s.hid, p.ldH, nullptr,
                       s.coefficient, d_x, d_anchor);
  if (p.need_weight) {
    sparse_gemm<T>(p.H, p.Rp, p.tile, s.hid_t, ld_m, s.mask_t, p.tile / 64, s.d_w, p.ldR, s.d_w_t,
                   p.ldR, false, false);
    add_rows<T>(m, p.Rp, s.d_w, p.ldR, s.d_bias);
  }
}

// weighted = coefficient * hid, row by row.
template <typename T>
void weigh_rows(int64_t m, int64_t width, const T* hid, int64_t ld, const T* coefficient,
                T* weighted) {
  for (int64_t n = 0; n < m; ++n)
    for (int64_t h = 0; h < width; h += Simd<T>::kLanes)
      store(weighted + n * ld + h, load(hid + n * ld + h) * coefficient[n]);
}

template <typename T>
void gram_backward(const NceParams<T>& p, const ChunkScratch<T>& s, int64_t m, int64_t a,
                   int64_t slice, T* d_x, T* d_anchor) {
  if (p.need_key || p.need_anchor)
    hidden_gradient<T>(m, p.Hp, p.Bp, s.ds, p.ldB, p.qw + a * p.Bp * p.ldH, p.ldH, s.hid, p.ldH,
                       s.norm, s.coefficient, d_x, d_anchor);
  if (p.need_weight) {
    weigh_rows<T>(m, p.Hp, s.hid, p.ldH, s.coefficient, s.weighted);
    if (p.bias) add_rows<T>(m, p.Hp, s.weighted, p.ldH, s.d_hid_sum);
  }
  transposed_products<T, Product::kFull>(p, p.tile, s.hid_t, odd_lines<T>(p.tile), s.mask_t,
                                         p.tile / 64, s.ds, s.weighted, slice, s.d_gram);
}

#ifdef CRRCD_BF16_PAIRS
#include "bf16_kernel.h"
#else
// Without an instruction for pairs bfloat16 operands are multiplied as the float32 that they are.
constexpr bool kHasPairs = false;
CRRCD_INLINE void forward_pairs(const NceParams<float>&, const ChunkScratch<float>&, int64_t,
                                int64_t, int64_t) {}
CRRCD_INLINE void backward_pairs(const NceParams<float>&, const ChunkScratch<float>&, int64_t,
                                 int64_t, int64_t, int64_t, float*, float*) {}
#endif

// One tile of keys against one anchor.
template <typename T, Pass kPass>
void process_tile(const NceParams<T>& p, const ChunkScratch<T>& s, int64_t t, int64_t m, int64_t a,
                  int64_t key_part, int64_t part) {
  const int64_t ld_m = odd_lines<T>(p.tile);
  const bool direct = p.form == Form::kDirect;
  const bool pairs = kHasPairs && p.pairs && !direct;
  const T* anchor = p.anchor + a * p.ldH;
  const int64_t slice = key_part * p.A + a;

  if constexpr (sizeof(T) == 4) {
    if (pairs) forward_pairs(p, s, t, m, a);
  }
  if (!pairs) {
    hidden_rows<T>(m, p.Hp, anchor, s.x + t * p.tile * p.ldH, p.ldH, s.hid, s.mask);
    forward_products(p, s, m, a);
  }

  T* d_logit = p.d_logit ? p.d_logit + slice * p.ldB : nullptr;
  T* top = kPass == Pass::kLogSumExp ? p.running_max + slice * p.ldB : nullptr;
  T* sum = kPass == Pass::kLogSumExp ? p.running_sum + slice * p.ldB : nullptr;
  double* losses = p.losses ? p.losses + slice * p.ldB : nullptr;
  if (s.masked[t])
    tile_logits<T, kPass, true>(p, s, a, m, s.keep + t * p.tile * p.ldB, d_logit, top, sum, losses,
                                p.scalars + part * 4);
  else
    tile_logits<T, kPass, false>(p, s, a, m, nullptr, d_logit, top, sum, losses,
                                 p.scalars + part * 4);
  if (kPass == Pass::kLogSumExp) return;

  T* d_x = p.need_key ? s.d_x + t * p.tile * p.ldH : nullptr;
  T* d_anchor = p.need_anchor ? p.d_anchor + slice * p.ldH : nullptr;
  if constexpr (sizeof(T) == 4) {
    if (pairs) return backward_pairs(p, s, t, m, a, slice, d_x, d_anchor);
  }
  if ((p.need_query && !direct) || p.need_weight)
    hidden_columns<T>(p.tile, p.H, anchor, s.x_t + t * p.Hp * ld_m, ld_m, s.hid_t, s.mask_t);
  if (direct)
    direct_backward(p, s, m, a, slice, d_x, d_anchor);
  else
    gram_backward(p, s, m, a, slice, d_x, d_anchor);
}

// Gradient of a finished tile's keys: into d_key_weight and d_rows.
template <typename T>
void store_key_gradient(const NceParams<T>& p, const ChunkScratch<T>& s, int64_t t, int64_t first,
                        int64_t m, int64_t anchor_part, int64_t part) {
  const int64_t ld_m = odd_lines<T>(p.tile);
  const T* d_x = s.d_x + t * p.tile * p.ldH;
  if (p.d_key_weight) {
    gather_rows(p, first, m, s.rows, p.ldD, p.Dp);
    transpose<T>(m, p.H, d_x, p.ldH, s.hid_t, ld_m);
    dense_gemm<T>(p.H, p.Dp, m, s.hid_t, ld_m, s.rows, p.ldD, p.d_key_weight + part * p.Hp * p.ldD,
                  p.ldD, false);
  }
  if (p.d_rows) {
    const T* d_row = d_x;
    int64_t ld = p.ldH;
    if (!p.projected) {
      dense_gemm<T>(m, p.Dp, p.Hp, d_x, p.ldH, p.key_weight, p.ldD, s.rows, p.ldD, true);
      d_row = s.rows;
      ld = p.ldD;
    }
    for (int64_t n = 0; n < m; ++n)
      for (int64_t d = 0; d < p.D; ++d)
        p.d_rows[(anchor_part * p.K + first + n) * p.D + d] = d_row[n * ld + d];
  }
}

template <typename T>
void clear(int64_t n, T* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] = 0;
}

template <typename T>
void add_to(int64_t n, const T* sum, T* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += sum[i];
}

template <typename T>
CRRCD_INLINE int64_t keys_in(const NceParams<T>& p, int64_t tile) {
  const int64_t left = p.K - tile * p.tile;
  return left < p.tile ? left : p.tile;
}

template <typename T, Pass kPass>
void nce_pass(const NceParams<T>& p, int64_t part) {
  const TileRegisters registers(kHasPairs && p.pairs);
  ChunkScratch<T> s;
  carve(p, p.scratch + part * p.scratch_bytes, s);
  const int64_t key_part = part / p.anchor_parts, anchor_part = part % p.anchor_parts;
  const int64_t tiles = (p.K + p.tile - 1) / p.tile;
  const int64_t tile_begin = tiles * key_part / p.key_parts;
  const int64_t tile_end = tiles * (key_part + 1) / p.key_parts;
  const int64_t a_begin = p.A * anchor_part / p.anchor_parts;
  const int64_t a_end = p.A * (anchor_part + 1) / p.anchor_parts;
  const bool direct = p.form == Form::kDirect;
  for (int64_t chunk = tile_begin; chunk < tile_end; chunk += p.tiles_per_chunk) {
    const int64_t stop =
        chunk + p.tiles_per_chunk < tile_end ? chunk + p.tiles_per_chunk : tile_end;
    for (int64_t tile = chunk; tile < stop; ++tile)
      p.scalars[part * 4] += load_tile(p, s, tile - chunk, tile * p.tile, keys_in(p, tile));
    const bool weight_gradient = p.need_weight && kPass != Pass::kLogSumExp;
    const int64_t gram_size = p.Hp * p.ldH, w_size = p.Hp * p.ldR;
    if (weight_gradient && direct) {
      clear(w_size, s.d_w_t);
      clear(p.ldR, s.d_bias);
    } else if (weight_gradient) {
      clear(gram_size, s.d_gram);
      clear(p.ldH, s.d_hid_sum);
    }
    for (int64_t a = a_begin; a < a_end; ++a)
      for (int64_t tile = chunk; tile < stop; ++tile)
        process_tile<T, kPass>(p, s, tile - chunk, keys_in(p, tile), a, key_part, part);
    if (weight_gradient && direct) {
      add_to(w_size, s.d_w_t, p.d_w_t + part * w_size);
      add_to(p.ldR, s.d_bias, p.d_bias + part * p.ldR);
    } else if (weight_gradient) {
      add_to(gram_size, s.d_gram, p.d_gram + part * gram_size);
      add_to(p.ldH, s.d_hid_sum, p.d_hid_sum + part * p.ldH);
    }
    if (p.need_key && kPass != Pass::kLogSumExp)
      for (int64_t tile = chunk; tile < stop; ++tile)
        store_key_gradient(p, s, tile - chunk, tile * p.tile, keys_in(p, tile), anchor_part, part);
  }
}

template <typename T>
void nce(const NceParams<T>& p, int64_t part) {
  switch (p.pass) {
    case Pass::kNce:
      return nce_pass<T, Pass::kNce>(p, part);
    case Pass::kLogSumExp:
      return nce_pass<T, Pass::kLogSumExp>(p, part);
    case Pass::kSoftmax:
      return nce_pass<T, Pass::kSoftmax>(p, part);
  }
}

template <typename T>
size_t nce_scratch(const NceParams<T>& p) {
  ChunkScratch<T> s;
  return carve(p, static_cast<std::byte*>(nullptr), s);
}
