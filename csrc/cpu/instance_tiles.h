// Shared negatives from banks of bfloat16 on tile registers, which multiply bfloat16 only. Queries
// and derivatives in float32 are sums of three bfloat16 each, without loss, so that nothing is
// rounded that float32 would not round. (A float32 bank would make six products of one, which is no
// gain.) Included once per instruction set, inside that set's namespace: no include guard.

#ifdef CRRCD_TILE_REGISTERS

// x as a sum of parts of 8 bits each, in the upper halves of their numbers; of three nothing is
// lost.
template <int kParts>
CRRCD_INLINE void split(Simd<float>::V x, Simd<float>::V (&part)[kParts]) {
  using U = Simd<float>::U;
  constexpr uint32_t kUpper = 0xffff0000u, kHalf = 0x8000u;
  for (int i = 0; i + 1 < kParts; ++i) {
    part[i] = (Simd<float>::V)(((U)x + kHalf) & kUpper);
    x -= part[i];
  }
  part[kParts - 1] = (Simd<float>::V)((U)x & kUpper);
}

// Upper halves of the numbers of two vectors, one after the other.
CRRCD_INLINE __m512i upper_halves(Simd<float>::V first, Simd<float>::V second) {
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                    23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                    45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16((__m512i)first, _mm512_load_si512(kOdd), (__m512i)second);
}

// The upper halves of `first` below those of `second`.
CRRCD_INLINE __m512i interleaved(Simd<float>::V first, Simd<float>::V second) {
  return _mm512_or_si512(_mm512_srli_epi32((__m512i)first, 16), (__m512i)second);
}

// Pairs of neighbouring rows of values [m, width], in parts; up to `rows` those that are missing
// are zero.
template <int kParts>
void split_columns(int64_t m, int64_t rows, int64_t width, const float* values, int64_t ld,
                   uint32_t* pairs, int64_t ld_pairs, int64_t distance) {
  using V = Simd<float>::V;
  for (int64_t n = 0; n < rows; n += 2)
    for (int64_t j = 0; j < width; j += 16) {
      V first[kParts], second[kParts];
      split(n < m ? load(values + n * ld + j) : V{}, first);
      split(n + 1 < m ? load(values + (n + 1) * ld + j) : V{}, second);
      for (int i = 0; i < kParts; ++i)
        _mm512_storeu_si512(pairs + i * distance + n / 2 * ld_pairs + j,
                            interleaved(first[i], second[i]));
    }
}

// 16 vectors of 16 numbers, transposed.
CRRCD_INLINE void transpose(__m512 (&row)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d low = (__m512d)t[i + j], high = (__m512d)t[i + j + 2];
      row[i + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
      row[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
    }
  // row[4 i + j]: of each quarter q of the columns, column 4 q + j of rows 4 i to 4 i + 3
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(row[j], row[4 + j], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(row[j], row[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(row[8 + j], row[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(row[8 + j], row[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) row[i] = t[i];
}

// Pairs along the columns of z [n, width], in parts: [width, n / 2]; n is a multiple of 32.
template <int kParts>
void split_transposed(int64_t n, int64_t width, const float* z, int64_t ld, uint32_t* pairs,
                      int64_t ld_pairs, int64_t distance) {
  for (int64_t b = 0; b < width; b += 16)
    for (int64_t k = 0; k < n; k += 32) {
      __m512 first[16], second[16];
      for (int i = 0; i < 16; ++i) first[i] = (__m512)load(z + (k + i) * ld + b);
      for (int i = 0; i < 16; ++i) second[i] = (__m512)load(z + (k + 16 + i) * ld + b);
      transpose(first);
      transpose(second);
      for (int i = 0; i < 16; ++i) {
        Simd<float>::V low[kParts], high[kParts];
        split((Simd<float>::V)first[i], low);
        split((Simd<float>::V)second[i], high);
        for (int j = 0; j < kParts; ++j)
          _mm512_storeu_si512(pairs + j * distance + (b + i) * ld_pairs + k / 2,
                              upper_halves(low[j], high[j]));
      }
    }
}

// f.operator()<n>() for n parts.
template <typename F>
CRRCD_INLINE void with_parts(int parts, const F& f) {
  if (parts == 1) f.template operator()<1>();
  if (parts == 2) f.template operator()<2>();
  if (parts == 3) f.template operator()<3>();
}

inline void split_queries(const InstanceParams<float>& p, const InstanceScratch<float>& s) {
  with_parts(p.query_parts, [&]<int kParts>() {
    split_columns<kParts>(p.D, whole_strips(p.D), p.Bp, p.query_t, p.ldB, s.query_pairs, p.ldB,
                          whole_strips(p.D) / 2 * p.ldB);
  });
}

// A tile of rows: pairs along their columns, and of neighbouring rows.
struct TileRows {
  Pairs along, across;
};

inline TileRows load_pairs(const InstanceParams<float>& p, const InstanceScratch<float>& s,
                           int64_t first, int64_t m) {
  const auto* bank = static_cast<const uint16_t*>(p.bank.data);
  const int64_t rows = whole_strips(m);
  TileRows tile{{as_float(s.row_pairs), pair_stride(whole_strips(p.D))},
                {as_float(s.key_pairs), p.ldD}};
  if (!p.bank.index && m == rows && p.D % 32 == 0 && p.bank.row_stride % 2 == 0) {
    tile.along.at = reinterpret_cast<const float*>(bank + first * p.bank.row_stride);
    tile.along.ld = p.bank.row_stride / 2;
  } else {
    for (int64_t n = 0; n < rows; ++n) {
      auto* out = reinterpret_cast<uint16_t*>(s.row_pairs + n * tile.along.ld);
      const int64_t row = n >= m ? 0 : p.bank.index ? p.bank.index[first + n] : first + n;
      const int64_t width = n < m ? p.D : 0;
      __builtin_memcpy(out, bank + row * p.bank.row_stride, width * sizeof(uint16_t));
      __builtin_memset(out + width, 0, (whole_strips(p.D) - width) * sizeof(uint16_t));
    }
  }
  const auto* pairs = reinterpret_cast<const uint16_t*>(tile.along.at);
  for (int64_t n = 0; n < rows; n += 2)
    for (int64_t j = 0; j < p.Dp; j += 16) {
      const auto widened = [&](int64_t row) {
        return widen(_mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(pairs + row * 2 * tile.along.ld + j)));
      };
      _mm512_storeu_si512(s.key_pairs + n / 2 * p.ldD + j,
                          _mm512_or_si512(widened(n), _mm512_slli_epi32(widened(n + 1), 16)));
    }
  return tile;
}

// Products of rows from n on with queries, into z; those of rows that are missing are zero.
inline void tile_products(const InstanceParams<float>& p, const InstanceScratch<float>& s,
                          const TileRows& tile, int64_t n, int64_t count, int64_t b0, int64_t width,
                          float* z, int64_t ld) {
  const Pairs rows{tile.along.at + n * tile.along.ld, tile.along.ld};
  const Pairs queries{as_float(s.query_pairs) + b0, p.ldB, whole_strips(p.D) / 2 * p.ldB};
  with_parts(p.query_parts, [&]<int kParts>() {
    tile_product<1, kParts>(whole_strips(count), width, whole_strips(p.D) / 2, rows, queries, z, ld,
                            true);
  });
}

// Adds z' rows to the gradient of `count` queries.
inline void tile_query_gradient(const InstanceParams<float>& p, const InstanceScratch<float>& s,
                                const TileRows& tile, int64_t m, int64_t count, int64_t width,
                                const float* z, int64_t ld, float* d_query) {
  const int64_t rows = whole_strips(m), ld_pairs = pair_stride(kKeyTile);
  const int64_t distance = kQueryBlock * ld_pairs;
  with_parts(p.gradient_parts, [&]<int kParts>() {
    split_transposed<kParts>(rows, width, z, ld, s.z_pairs, ld_pairs, distance);
    for_strips(width, [&](int64_t b, int64_t queries) {
      const Pairs left{as_float(s.z_pairs) + b * ld_pairs, ld_pairs, distance};
      tile_product<kParts, 1>(queries, p.Dp, rows / 2, left, tile.across, s.sum, p.ldD, true);
      for (int64_t i = 0; i < queries && b + i < count; ++i)
        for (int64_t d = 0; d < p.Dp; d += 16) {
          float* out = d_query + (b + i) * p.ldD + d;
          store(out, load(out) + load(s.sum + i * p.ldD + d));
        }
    });
  });
}

#else

struct TileRows {};
inline void split_queries(const InstanceParams<float>&, const InstanceScratch<float>&) {}
inline TileRows load_pairs(const InstanceParams<float>&, const InstanceScratch<float>&, int64_t,
                           int64_t) {
  return {};
}
inline void tile_products(const InstanceParams<float>&, const InstanceScratch<float>&,
                          const TileRows&, int64_t, int64_t, int64_t, int64_t, float*, int64_t) {}
inline void tile_query_gradient(const InstanceParams<float>&, const InstanceScratch<float>&,
                                const TileRows&, int64_t, int64_t, int64_t, const float*, int64_t,
                                float*) {}

#endif
