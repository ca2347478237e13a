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

// Rounds to bfloat16: packed and, if kInPlace, as float32 in place.
template <bool kInPlace>
void pack_rows(int64_t m, int64_t width, std::conditional_t<kInPlace, float, const float>* values,
               int64_t ld, uint32_t* pairs) {
  const int64_t stride = pair_stride(width);
  for (int64_t n = 0; n < m; ++n)
    for (int64_t h = 0; h < width; h += 16) {
      const __m256i packed = to_bf16(load(values + n * ld + h));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + n * stride + h / 2), packed);
      if constexpr (kInPlace)
        store(values + n * ld + h, (Simd<float>::V)_mm512_slli_epi32(widen(packed), 16));
    }
}

// hidden_rows without masks, rounded to bfloat16: packed and, where hid is not null, as float32.
inline void hidden_row_pairs(int64_t m, int64_t hp, const float* anchor, const float* x, int64_t ld,
                             float* hid, uint32_t* pairs) {
  const int64_t stride = pair_stride(hp);
  for (int64_t n = 0; n < m; ++n)
    for (int64_t h = 0; h < hp; h += 16) {
      const auto v = load(anchor + h) - load(x + n * ld + h);
      const __m256i packed = to_bf16(relu(v));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + n * stride + h / 2), packed);
      if (hid) store(hid + n * ld + h, (Simd<float>::V)_mm512_slli_epi32(widen(packed), 16));
    }
}

// Pairs of neighbouring rows of `rows`, of which those from m on are taken for zero.
inline void pack_columns(int64_t m, int64_t rows, int64_t width, const float* values, int64_t ld,
                         uint32_t* pairs) {
  for (int64_t n = 0; n < rows; n += 2)
    for (int64_t j = 0; j < width; j += 16) {
      const __m512i first =
          n < m ? widen(to_bf16(load(values + n * ld + j))) : _mm512_setzero_si512();
      const __m512i second =
          n + 1 < m ? widen(to_bf16(load(values + (n + 1) * ld + j))) : _mm512_setzero_si512();
      _mm512_storeu_si512(pairs + n / 2 * ld + j,
                          _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
}

CRRCD_INLINE const float* as_float(const uint32_t* pairs) {
  return reinterpret_cast<const float*>(pairs);
}

// C (+)= A B of pairs: by tiles, which multiply faster than zeros can be skipped and do not read
// the mask, or by sparse_gemm.
inline void pair_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                      const uint64_t* mask, int64_t words, const float* b, int64_t ldb, float* c,
                      int64_t ldc, bool zero) {
#ifdef CRRCD_TILE_REGISTERS
  tile_gemm(m, n, k, a, lda, b, ldb, c, ldc, zero);
#else
  sparse_gemm<float, Product::kPairs>(m, n, k, a, lda, mask, words, b, ldb, c, ldc, zero, false);
#endif
}

// forward_products of pairs.
inline void products_of_pairs(const NceParams<float>& p, const ChunkScratch<float>& s, int64_t m,
                              int64_t a) {
  constexpr Product kPairs = Product::kPairs;
  const int64_t pair_words = words_of(p.Hp / 2), stride = pair_stride(p.Hp);
  const float* hid = as_float(s.hid_pairs);
  const float* norm_pairs = as_float(p.norm_pairs);
  if (p.norm_bias) fill_rows(m, p.Hp, p.norm_bias, s.norm, p.ldH);
  if (p.qc) fill_rows(m, p.Bp, p.qc + a * p.ldB, s.z, p.ldB);
  const int64_t rank = p.R < p.H ? p.Rp : p.Hp;
  if (p.form == Form::kTriangular && kHasTiles) {
    constexpr int64_t kPanel = 64;
    for (int64_t j = 0; j < rank; j += kPanel)  // T[i, h] = 0 for h < i
      pair_gemm(m, rank - j < kPanel ? rank - j : kPanel, (p.Hp - j) / 2, hid + j / 2, stride,
                nullptr, 0, norm_pairs + j / 2 * p.ldH + j, p.ldH, s.norm + j, p.ldH, !p.norm_bias);
    triangular_norms(p, s, m);
  } else if (p.form == Form::kTriangular) {
    triangular_product<float, kPairs>(m, rank, p.Hp / 2, 2, hid, stride, s.pair_mask, pair_words,
                                      norm_pairs, p.ldH, s.norm, p.ldH, !p.norm_bias);
    triangular_norms(p, s, m);
  } else {
    pair_gemm(m, p.Hp, p.Hp / 2, hid, stride, s.pair_mask, pair_words, norm_pairs, p.ldH, s.norm,
              p.ldH, !p.norm_bias);
    gram_norms<float, !kHasTiles>(p, s, m);
  }
  pair_gemm(m, p.Bp, p.Hp / 2, hid, stride, s.pair_mask, pair_words,
            as_float(p.qw_t_pairs + a * p.Hp / 2 * p.ldB), p.ldB, s.z, p.ldB, !p.qc);
}

// f(first, count) for strips of n.
template <typename F>
CRRCD_INLINE void for_strips(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kStrip) f(i, n - i < kStrip ? n - i : kStrip);
}

inline void forward_pairs(const NceParams<float>& p, const ChunkScratch<float>& s, int64_t t,
                          int64_t m, int64_t a) {
  const float* anchor = p.anchor + a * p.ldH;
  const float* x = s.x + t * p.tile * p.ldH;
  if (kHasTiles) {
    const bool triangular = p.form == Form::kTriangular;
    for_strips(m, [&](int64_t n, int64_t count) {
      ChunkScratch<float> strip = s;
      if (!triangular) strip.hid += n * p.ldH, strip.norm += n * p.ldH;
      strip.hid_pairs += n * pair_stride(p.Hp);
      strip.z += n * p.ldB;
      strip.w += n * p.ldR;
      strip.inverse += n;
      hidden_row_pairs(count, p.Hp, anchor, x + n * p.ldH, p.ldH, triangular ? nullptr : strip.hid,
                       strip.hid_pairs);
      products_of_pairs(p, strip, count, a);
    });
  } else {
    const int64_t words = words_of(p.Hp);
    hidden_rows<float>(m, p.Hp, anchor, x, p.ldH, s.hid, s.mask);
    pack_rows<true>(m, p.Hp, s.hid, p.ldH, s.hid_pairs);
    pair_masks(m, words, s.mask, s.pair_mask);
    products_of_pairs(p, s, m, a);
  }
}

// hid_t of hidden_columns, rounded and packed along n; masks are left out with tile registers.
inline void hidden_column_pairs(int64_t tile, int64_t hidden, const float* anchor, const float* x_t,
                                int64_t ld_m, uint32_t* hid_t, uint64_t* mask) {
  const int64_t words = words_of(tile / 2), stride = pair_stride(tile);
  for (int64_t h = 0; h < hidden; ++h) {
    const auto level = splat(anchor[h]);
    uint64_t bits[2] = {0, 0};
    for (int64_t n = 0; n < tile; n += 16) {
      const auto v = level - load(x_t + h * ld_m + n);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(hid_t + h * stride + n / 2), to_bf16(relu(v)));
      if (kHasTiles) continue;
      bits[n / 64 % 2] |= static_cast<uint64_t>(positive_bits<true>(v)) << (n % 64);
      if (n % 128 == 112 || n + 16 >= tile) {
        mask[h * words + n / 128] = pair_bits(bits[0], bits[1]);
        bits[0] = bits[1] = 0;
      }
    }
  }
}

// What hid lets through of d hid + coefficient * norm: subtracted from d_x and summed into
// d_anchor.
inline void cut_gradient(int64_t m, int64_t hp, const float* d_hid, const float* norm,
                         const float* hid, int64_t ld, const float* coefficient, float* d_x,
                         float* d_anchor) {
  for_panels<float>(hp, [&]<int kVectors>(int64_t first) {
    Simd<float>::V sum[kVectors] = {};
    for (int64_t n = 0; n < m; ++n)
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = n * ld + first + j * 16;
        const auto gradient = load(d_hid + at) + load(norm + at) * coefficient[n];
        const auto cut = load(hid + at) <= 0 ? Simd<float>::V{} : gradient;
        sum[j] += cut;
        if (d_x) store(d_x + at, load(d_x + at) - cut);
      }
    if (!d_anchor) return;
    for (int j = 0; j < kVectors; ++j) {
      float* out = d_anchor + first + j * 16;
      store(out, load(out) + sum[j]);
    }
  });
}

inline void backward_pairs(const NceParams<float>& p, const ChunkScratch<float>& s, int64_t t,
                           int64_t m, int64_t a, int64_t slice, float* d_x, float* d_anchor) {
  constexpr Product kPairs = Product::kPairs;
  const int64_t ld_m = odd_lines<float>(p.tile), stride_m = pair_stride(p.tile);
  if (p.need_query || p.need_weight) pack_columns(m, p.tile, p.Bp, s.ds, p.ldB, s.ds_t_pairs);
  if (p.need_weight) {
    weigh_rows<float>(m, p.Hp, s.hid, p.ldH, s.coefficient, s.weighted);
    if (p.bias) add_rows<float>(m, p.Hp, s.weighted, p.ldH, s.d_hid_sum);
    pack_columns(m, p.tile, p.Hp, s.weighted, p.ldH, s.weighted_pairs);
  }
  if (p.need_key || p.need_anchor) {
    pack_rows<false>(m, p.Bp, s.ds, p.ldB, s.ds_pairs);
    const float* ds = as_float(s.ds_pairs);
    const float* qw = as_float(p.qw_pairs + a * p.Bp / 2 * p.ldH);
    const int64_t stride = pair_stride(p.Bp);
    if (kHasTiles)
      for_strips(m, [&](int64_t n, int64_t count) {
        pair_gemm(count, p.Hp, p.Bp / 2, ds + n * stride, stride, nullptr, 0, qw, p.ldH, s.d_hid,
                  p.ldH, true);
        cut_gradient(count, p.Hp, s.d_hid, s.norm + n * p.ldH, s.hid + n * p.ldH, p.ldH,
                     s.coefficient + n, d_x ? d_x + n * p.ldH : nullptr, d_anchor);
      });
    else
      hidden_gradient<float, kPairs>(m, p.Hp, p.Bp / 2, ds, stride, qw, p.ldH, s.hid, p.ldH, s.norm,
                                     s.coefficient, d_x, d_anchor);
  }
  if (!p.need_query && !p.need_weight) return;
  const float* anchor = p.anchor + a * p.ldH;
  const float* x_t = s.x_t + t * p.Hp * ld_m;
  const float* hid_t = as_float(s.hid_t_pairs);
  if (kHasTiles) {
    for_strips(p.H, [&](int64_t h, int64_t count) {
      hidden_column_pairs(p.tile, count, anchor + h, x_t + h * ld_m, ld_m, s.hid_t_pairs, nullptr);
      if (p.need_query)
        pair_gemm(count, p.Bp, p.tile / 2, hid_t, stride_m, nullptr, 0, as_float(s.ds_t_pairs),
                  p.ldB, p.d_qw_t + (slice * p.Hp + h) * p.ldB, p.ldB, false);
      const int64_t width = (h / kGramBlock<float> + 1) * kGramBlock<float>;
      if (p.need_weight)
        pair_gemm(count, p.Hp < width ? p.Hp : width, p.tile / 2, hid_t, stride_m, nullptr, 0,
                  as_float(s.weighted_pairs), p.ldH, s.d_gram + h * p.ldH, p.ldH, false);
    });
  } else {
    hidden_column_pairs(p.tile, p.H, anchor, x_t, ld_m, s.hid_t_pairs, s.pair_mask_t);
    transposed_products<float, kPairs>(p, p.tile / 2, hid_t, stride_m, s.pair_mask_t,
                                       words_of(p.tile / 2), as_float(s.ds_t_pairs),
                                       as_float(s.weighted_pairs), slice, s.d_gram);
  }
}
