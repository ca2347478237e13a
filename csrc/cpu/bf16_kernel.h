// The passes of relation_kernel.h for bfloat16 operands, two of which one instruction multiplies
// and adds to a float32 sum. Included once per instruction set that has it: no include guard.

constexpr bool kHasPairs = true;

CRRCD_INLINE __m256i to_bf16(Simd<float>::V v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }

CRRCD_INLINE __m512i widen(__m256i v) { return _mm512_cvtepu16_epi32(v); }

// Bit j: bit 2j or 2j + 1 of the two words.
CRRCD_INLINE uint64_t pair_bits(uint64_t low, uint64_t high) {
  constexpr uint64_t kEven = 0x5555555555555555ull;
  return _pext_u64(low | low >> 1, kEven) | _pext_u64(high | high >> 1, kEven) << 32;
}

inline void pair_masks(int64_t rows, int64_t words, const uint64_t* mask, uint64_t* pair_mask) {
  const int64_t pair_words = (words + 1) / 2;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t w = 0; w < pair_words; ++w)
      pair_mask[i * pair_words + w] =
          pair_bits(mask[i * words + 2 * w], 2 * w + 1 < words ? mask[i * words + 2 * w + 1] : 0);
}

// Rounds hid to bfloat16: as float32 in place, and packed.
inline void pack_rows(int64_t m, int64_t width, float* values, int64_t ld, uint32_t* pairs) {
  for (int64_t n = 0; n < m; ++n)
    for (int64_t h = 0; h < width; h += 16) {
      const __m256i packed = to_bf16(load(values + n * ld + h));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + (n * ld + h) / 2), packed);
      store(values + n * ld + h, (Simd<float>::V)_mm512_slli_epi32(widen(packed), 16));
    }
}

// Pairs of neighbouring rows; rows from m on count as zero.
inline void pack_columns(int64_t m, int64_t width, const float* values, int64_t ld,
                         uint32_t* pairs) {
  for (int64_t n = 0; n < m; n += 2)
    for (int64_t j = 0; j < width; j += 16) {
      const __m512i first = widen(to_bf16(load(values + n * ld + j)));
      const __m512i second =
          n + 1 < m ? widen(to_bf16(load(values + (n + 1) * ld + j))) : _mm512_setzero_si512();
      _mm512_storeu_si512(pairs + n / 2 * ld + j,
                          _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
}

CRRCD_INLINE const float* as_float(const uint32_t* pairs) {
  return reinterpret_cast<const float*>(pairs);
}

inline void forward_pairs(const NceParams<float>& p, const ChunkScratch<float>& s, int64_t t,
                          int64_t m, int64_t a) {
  constexpr Product kPairs = Product::kPairs;
  const int64_t words = words_of(p.Hp), pair_words = (words + 1) / 2;
  hidden_rows<float>(m, p.Hp, p.anchor + a * p.ldH, s.x + t * p.tile * p.ldH, p.ldH, s.hid, s.mask);
  pack_rows(m, p.Hp, s.hid, p.ldH, s.hid_pairs);
  pair_masks(m, words, s.mask, s.pair_mask);
  const float* hid = as_float(s.hid_pairs);
  if (p.norm_bias) fill_rows(m, p.Hp, p.norm_bias, s.norm, p.ldH);
  if (p.qc) fill_rows(m, p.Bp, p.qc + a * p.ldB, s.z, p.ldB);
  if (p.form == Form::kTriangular) {
    triangular_product<float, kPairs>(m, p.R < p.H ? p.Rp : p.Hp, p.Hp / 2, 2, hid, p.ldH / 2,
                                      s.pair_mask, pair_words, as_float(p.norm_pairs), p.ldH,
                                      s.norm, p.ldH, !p.norm_bias);
    triangular_norms(p, s, m);
  } else {
    sparse_gemm<float, kPairs>(m, p.Hp, p.Hp / 2, hid, p.ldH / 2, s.pair_mask, pair_words,
                               as_float(p.norm_pairs), p.ldH, s.norm, p.ldH, !p.norm_bias, false);
    gram_norms(p, s, m);
  }
  sparse_gemm<float, kPairs>(m, p.Bp, p.Hp / 2, hid, p.ldH / 2, s.pair_mask, pair_words,
                             as_float(p.qw_t_pairs + a * p.Hp / 2 * p.ldB), p.ldB, s.z, p.ldB,
                             !p.qc, false);
}

// hid_t of hidden_columns, rounded and packed along n.
inline void hidden_column_pairs(int64_t tile, int64_t hidden, const float* anchor, const float* x_t,
                                int64_t ld_m, uint32_t* hid_t, uint64_t* mask) {
  const int64_t words = words_of(tile / 2);
  for (int64_t h = 0; h < hidden; ++h) {
    const auto level = splat(anchor[h]);
    uint64_t bits[2] = {0, 0};
    for (int64_t n = 0; n < tile; n += 16) {
      const auto v = level - load(x_t + h * ld_m + n);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(hid_t + (h * ld_m + n) / 2),
                          to_bf16(v > 0 ? v : decltype(v){}));
      bits[n / 64 % 2] |= static_cast<uint64_t>(positive_bits(v)) << (n % 64);
      if (n % 128 == 112 || n + 16 >= tile) {
        mask[h * words + n / 128] = pair_bits(bits[0], bits[1]);
        bits[0] = bits[1] = 0;
      }
    }
  }
}

inline void backward_pairs(const NceParams<float>& p, const ChunkScratch<float>& s, int64_t t,
                           int64_t m, int64_t a, int64_t slice, float* d_x, float* d_anchor) {
  constexpr Product kPairs = Product::kPairs;
  const int64_t ld_m = odd_lines<float>(p.tile);
  if (p.need_query || p.need_weight) pack_columns(m, p.Bp, s.ds, p.ldB, s.ds_t_pairs);
  if (p.need_weight) {
    weigh_rows<float>(m, p.Hp, s.hid, p.ldH, s.coefficient, s.weighted);
    if (p.bias) add_rows<float>(m, p.Hp, s.weighted, p.ldH, s.d_hid_sum);
    pack_columns(m, p.Hp, s.weighted, p.ldH, s.weighted_pairs);
  }
  if (p.need_key || p.need_anchor) {
    pack_rows(m, p.Bp, s.ds, p.ldB, s.ds_pairs);
    hidden_gradient<float, kPairs>(m, p.Hp, p.Bp / 2, as_float(s.ds_pairs), p.ldB / 2,
                                   as_float(p.qw_pairs + a * p.Bp / 2 * p.ldH), p.ldH, s.hid, p.ldH,
                                   s.norm, s.coefficient, d_x, d_anchor);
  }
  if (p.need_query || p.need_weight) {
    hidden_column_pairs(p.tile, p.H, p.anchor + a * p.ldH, s.x_t + t * p.Hp * ld_m, ld_m,
                        s.hid_t_pairs, s.pair_mask_t);
    transposed_products<float, kPairs>(p, p.tile / 2, as_float(s.hid_t_pairs), ld_m / 2,
                                       s.pair_mask_t, words_of(p.tile / 2), as_float(s.ds_t_pairs),
                                       as_float(s.weighted_pairs), slice, s.d_gram);
  }
}
