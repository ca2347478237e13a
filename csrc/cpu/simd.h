// Vectors of the instruction set that the including file was compiled for, written with the
// compiler's vector extensions; intrinsics are where these would be slow.
// Included once per instruction set, inside that set's namespace: no include guard.

#define CRRCD_INLINE inline __attribute__((always_inline))

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(CRRCD_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(CRRCD_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(CRRCD_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(CRRCD_VECTOR_BYTES)));
  static constexpr int kLanes = CRRCD_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(CRRCD_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(CRRCD_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(CRRCD_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(CRRCD_VECTOR_BYTES)));
  static constexpr int kLanes = CRRCD_VECTOR_BYTES / 8;
};

template <typename T>
CRRCD_INLINE typename Simd<T>::V load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <typename T>
CRRCD_INLINE void store(T* p, typename Simd<T>::V v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

template <typename T>
CRRCD_INLINE typename Simd<T>::V splat(T x) {
  return x - typename Simd<T>::V{};
}

// Pairwise, so that the order does not depend on the compiler.
template <typename T>
CRRCD_INLINE T horizontal_sum(typename Simd<T>::V v) {
#if CRRCD_VECTOR_BYTES == 64 && defined(__x86_64__)
  if constexpr (sizeof(T) == 4)
    return _mm512_reduce_add_ps((__m512)v);
  else
    return _mm512_reduce_add_pd((__m512d)v);
#elif CRRCD_VECTOR_BYTES == 32 && defined(__x86_64__)
  if constexpr (sizeof(T) == 4) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  } else {
    const __m128d x =
        _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
  }
#else
  T lane[Simd<T>::kLanes];
  store(lane, v);
  for (int width = Simd<T>::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
#endif
}

// out[0..3] = sums of the lanes of four vectors.
template <typename T>
CRRCD_INLINE void sums_of_four(typename Simd<T>::V a, typename Simd<T>::V b, typename Simd<T>::V c,
                               typename Simd<T>::V d, T* out) {
#if CRRCD_VECTOR_BYTES == 64 && defined(__x86_64__)
  if constexpr (sizeof(T) == 4) {  // they share their steps
    const auto ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b),
                                           _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const auto cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d),
                                           _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const auto all =
        _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
    const auto half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    return;
  }
#endif
  out[0] = horizontal_sum<T>(a), out[1] = horizontal_sum<T>(b);
  out[2] = horizontal_sum<T>(c), out[3] = horizontal_sum<T>(d);
}

// One bit a lane: lane > 0, or with kOrNan also where it is NaN.
template <bool kOrNan = false>
CRRCD_INLINE uint32_t positive_bits(Simd<float>::V v) {
#if CRRCD_VECTOR_BYTES == 64 && defined(__x86_64__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), kOrNan ? _CMP_NLE_UQ : _CMP_GT_OQ);
#elif CRRCD_VECTOR_BYTES == 32 && defined(__x86_64__)
  return _mm256_movemask_ps(
      _mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), kOrNan ? _CMP_NLE_UQ : _CMP_GT_OQ));
#elif CRRCD_VECTOR_BYTES == 16 && defined(__x86_64__)
  const __m128 x = (__m128)v, zero = _mm_setzero_ps();
  return _mm_movemask_ps(kOrNan ? _mm_cmpnle_ps(x, zero) : _mm_cmpgt_ps(x, zero));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Simd<float>::kLanes; ++i)
    bits |= uint32_t(kOrNan ? !(v[i] <= 0) : v[i] > 0) << i;
  return bits;
#endif
}

template <bool kOrNan = false>
CRRCD_INLINE uint32_t positive_bits(Simd<double>::V v) {
#if CRRCD_VECTOR_BYTES == 64 && defined(__x86_64__)
  return _mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), kOrNan ? _CMP_NLE_UQ : _CMP_GT_OQ);
#elif CRRCD_VECTOR_BYTES == 32 && defined(__x86_64__)
  return _mm256_movemask_pd(
      _mm256_cmp_pd((__m256d)v, _mm256_setzero_pd(), kOrNan ? _CMP_NLE_UQ : _CMP_GT_OQ));
#elif CRRCD_VECTOR_BYTES == 16 && defined(__x86_64__)
  const __m128d x = (__m128d)v, zero = _mm_setzero_pd();
  return _mm_movemask_pd(kOrNan ? _mm_cmpnle_pd(x, zero) : _mm_cmpgt_pd(x, zero));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Simd<double>::kLanes; ++i)
    bits |= uint32_t(kOrNan ? !(v[i] <= 0) : v[i] > 0) << i;
  return bits;
#endif
}

// max(v, 0); NaN stays NaN.
template <typename V>
CRRCD_INLINE V relu(V v) {
  return v < 0 ? V{} : v;
}

// x[i] = 1 / x[i] for x in [1, 2].
template <int kVectors>
CRRCD_INLINE void reciprocal(Simd<float>::V (&x)[kVectors]) {
  using V = Simd<float>::V;
#if CRRCD_VECTOR_BYTES == 64 && defined(__x86_64__)
  V r[kVectors];
  for (int i = 0; i < kVectors; ++i) r[i] = (V)_mm512_rcp14_ps((__m512)x[i]);
  for (int i = 0; i < kVectors; ++i) x[i] = 1.0f - x[i] * r[i];
  for (int i = 0; i < kVectors; ++i) x[i] = r[i] + r[i] * x[i];  // Newton: 14 bits become 24
#else
  for (V& y : x) y = 1.0f / y;
#endif
}

template <int kVectors>
CRRCD_INLINE void reciprocal(Simd<double>::V (&x)[kVectors]) {
  for (Simd<double>::V& y : x) y = 1.0 / y;
}

template <typename V>
CRRCD_INLINE V reciprocal(V x) {
  V alone[1] = {x};
  reciprocal(alone);
  return alone[0];
}

// exp(r) for |r| <= log(2) / 2.
CRRCD_INLINE Simd<double>::V exp_near_zero(Simd<double>::V r) {
  Simd<double>::V p = splat(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  return p * (r * r) + r + 1.0;
}

#if CRRCD_VECTOR_BYTES == 64 && defined(__x86_64__)
alignas(64) constexpr float kPowersOfTwo[32] = {
    // 2^(i / 32)
    1.0f,        1.02189715f, 1.04427378f, 1.0671404f,  1.09050773f, 1.11438674f, 1.13878863f,
    1.16372486f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f,
    1.35425555f, 1.38390988f, 1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f,
    1.57598085f, 1.61049033f, 1.64575548f, 1.68179283f, 1.7186193f,  1.75625216f, 1.79470908f,
    1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};
#endif

// x[i] = 2^x[i] for x < 127, to one and a half units in the last place; 0 where the result is not a
// normal number, which with kNormal the caller knows to happen for no x but those below -1e6. Each
// step is taken for all vectors before the next: one chain of steps after the other they would fill
// a processor's scheduler, which then never sees the start of the next chain.
template <bool kNormal = false, int kVectors>
CRRCD_INLINE void exp2_of(Simd<float>::V (&x)[kVectors]) {
  using V = Simd<float>::V;
  V t[kVectors], n[kVectors], r[kVectors], p[kVectors];
#if CRRCD_VECTOR_BYTES == 64 && defined(__x86_64__)
  // 2^x = 2^floor(n) 2^(i / 32) 2^r with n the multiple of 1/32 next to x, i in the lowest bits of
  // t
  const V rounder = splat(393216.0f);  // 1.5 * 2^18: adding it rounds to a multiple of 1/32
  const __m512 powers[2] = {_mm512_load_ps(kPowersOfTwo), _mm512_load_ps(kPowersOfTwo + 16)};
  for (int i = 0; i < kVectors; ++i) t[i] = x[i] + rounder;
  for (int i = 0; i < kVectors; ++i) n[i] = t[i] - rounder;
  for (int i = 0; i < kVectors; ++i)
    t[i] = (V)_mm512_permutex2var_ps(powers[0], (__m512i)t[i], powers[1]);
  for (int i = 0; i < kVectors; ++i) r[i] = x[i] - n[i];
  for (int i = 0; i < kVectors; ++i) p[i] = r[i] * 2.4022651e-1f + 6.9315735e-1f;
  for (int i = 0; i < kVectors; ++i) r[i] = r[i] * t[i];
  for (int i = 0; i < kVectors; ++i) p[i] = p[i] * r[i] + t[i];
  for (int i = 0; i < kVectors; ++i) {
    const __mmask16 normal =
        kNormal ? __mmask16(0xffff)
                : _mm512_cmp_ps_mask((__m512)x[i], _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    x[i] = kNormal ? (V)_mm512_scalef_ps((__m512)p[i], (__m512)n[i])
                   : (V)_mm512_maskz_scalef_ps(normal, (__m512)p[i], (__m512)n[i]);
  }
#else
  using U = Simd<float>::U;
  const V rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int i = 0; i < kVectors; ++i) t[i] = x[i] + rounder;
  for (int i = 0; i < kVectors; ++i) n[i] = t[i] - rounder;
  for (int i = 0; i < kVectors; ++i) r[i] = x[i] - n[i];
  for (int i = 0; i < kVectors; ++i) p[i] = r[i] * 1.5353362e-4f + 1.3398875e-3f;
  for (int i = 0; i < kVectors; ++i) p[i] = p[i] * r[i] + 9.6184369e-3f;
  for (int i = 0; i < kVectors; ++i) p[i] = p[i] * r[i] + 5.5503324e-2f;
  for (int i = 0; i < kVectors; ++i) p[i] = p[i] * r[i] + 2.4022648e-1f;
  for (int i = 0; i < kVectors; ++i) p[i] = p[i] * r[i] + 6.9314718e-1f;
  for (int i = 0; i < kVectors; ++i) p[i] = p[i] * r[i] + 1.0f;
  for (int i = 0; i < kVectors; ++i) p[i] *= (V)(((U)t[i] << 23) + 0x3f800000u);
  for (int i = 0; i < kVectors; ++i) x[i] = x[i] < -126.0f ? V{} : p[i];
#endif
}

template <bool kNormal = false, int kVectors>
CRRCD_INLINE void exp2_of(Simd<double>::V (&x)[kVectors]) {
  using V = Simd<double>::V;
  using U = Simd<double>::U;
  const V rounder = splat(6755399441055744.0);
  for (V& y : x) {
    const V t = y + rounder;
    const V n = t - rounder;
    const V p = exp_near_zero((y - n) * kLog2);
    const V result = p * (V)(((U)t << 52) + 0x3ff0000000000000u);
    y = y < -1022.0 ? V{} : result;
  }
}

template <typename V>
CRRCD_INLINE V exp2_of(V x) {
  V alone[1] = {x};
  exp2_of(alone);
  return alone[0];
}

template <typename T>
CRRCD_INLINE typename Simd<T>::V square_root(typename Simd<T>::V x) {
#if CRRCD_VECTOR_BYTES == 64 && defined(__x86_64__)
  if constexpr (sizeof(T) == 4)
    return (typename Simd<T>::V)_mm512_sqrt_ps((__m512)x);
  else
    return (typename Simd<T>::V)_mm512_sqrt_pd((__m512d)x);
#elif CRRCD_VECTOR_BYTES == 32 && defined(__x86_64__)
  if constexpr (sizeof(T) == 4)
    return (typename Simd<T>::V)_mm256_sqrt_ps((__m256)x);
  else
    return (typename Simd<T>::V)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < Simd<T>::kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// 1 / sqrt(x) for x > 0 that is neither tiny nor infinite.
template <typename T>
CRRCD_INLINE typename Simd<T>::V inverse_root(typename Simd<T>::V x) {
#if CRRCD_VECTOR_BYTES == 64 && defined(__x86_64__)
  if constexpr (sizeof(T) == 4) {
    const typename Simd<T>::V r = (typename Simd<T>::V)_mm512_rsqrt14_ps((__m512)x);
    return r + r * T(0.5) * (T(1) - x * r * r);  // one Newton step: 14 bits become 24
  }
#endif
  return T(1) / square_root<T>(x);
}

// -|x|; NaN stays NaN.
CRRCD_INLINE Simd<float>::V minus_magnitude(Simd<float>::V x) {
  return (Simd<float>::V)((Simd<float>::I)x | INT32_MIN);
}

CRRCD_INLINE Simd<double>::V minus_magnitude(Simd<double>::V x) {
  return (Simd<double>::V)((Simd<double>::I)x | INT64_MIN);
}
