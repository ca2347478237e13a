// Softplus of NCE's logits and its slopes.
// Included once per instruction set, inside that set's namespace: no include guard.
//
// With e = 2^-|x| the loss of a logit x (in units of log 2) is log(1 + e), plus x where x > 0. The
// logarithm is taken of products of 1 + e: q = product - 1, which loses nothing of small e.

// log prod (1 + q) over the lanes, in double and without losing small q; each 1 + q < 2^900.
template <typename T>
double log_product(const T* q, int64_t n) {
  double product = 0;  // prod (1 + q) / 2^exponent - 1
  int64_t exponent = 0;
  for (int64_t i = 0; i < n; ++i) {
    product = product * q[i] + (product + q[i]);
    if (product > 1e12 && product < std::numeric_limits<double>::infinity()) {
      const auto bits = __builtin_bit_cast(uint64_t, product);
      exponent += static_cast<int64_t>(bits >> 52) - 1023;
      product = __builtin_bit_cast(double, (bits << 12 >> 12) | (uint64_t(1023) << 52)) - 1;
    }
  }
  return 0.69314718055994530942 * static_cast<double>(exponent) + __builtin_log1p(product);
}

// Vectors of logits x to slopes g = 1 / (1 + 2^-x). Each vector at most doubles 1 + q; `above` sums
// the x > 0.
template <typename T, int kVectors>
CRRCD_INLINE void softplus(const typename Simd<T>::V (&x)[kVectors], typename Simd<T>::V& q,
                           typename Simd<T>::V& above, typename Simd<T>::V (&g)[kVectors]) {
  using V = typename Simd<T>::V;
  V e[kVectors], r[kVectors];
  for (int i = 0; i < kVectors; ++i) e[i] = minus_magnitude(x[i]);
  exp2_of(e);
  for (int i = 0; i < kVectors; ++i) r[i] = T(1) + e[i];
  reciprocal(r);
  for (int i = 0; i < kVectors; ++i) above += x[i] > 0 ? x[i] : V{};
  for (int i = 0; i < kVectors; ++i) q = q * e[i] + (q + e[i]);
  for (int i = 0; i < kVectors; ++i) g[i] = x[i] > 0 ? r[i] : e[i] * r[i];
}

// The same of one or two vectors of x < 30 that are above -120 or below -1e6, for which g is 0. With
// e = 2^x the loss is log(1 + e) whatever the sign; two vectors share a division. Each vector
// multiplies 1 + q by up to 1 + 2^x.
template <typename T, int kVectors>
CRRCD_INLINE void softplus_bounded(const typename Simd<T>::V (&x)[kVectors],
                                   typename Simd<T>::V& q, typename Simd<T>::V (&g)[kVectors]) {
  static_assert(kVectors <= 2);
  using V = typename Simd<T>::V;
  V e[kVectors];
  for (int i = 0; i < kVectors; ++i) e[i] = x[i];
  exp2_of<true>(e);
  V all = e[0];  // (1 + e[0]) (1 + e[1]) - 1
  if constexpr (kVectors == 2) {
    const V both = e[0] * e[1];
    g[0] = e[0] + both, g[1] = e[1] + both;
    all = g[0] + e[1];
  } else {
    g[0] = all;
  }
  const V r = reciprocal(T(1) + all);
  for (int i = 0; i < kVectors; ++i) g[i] *= r;
  q = q * all + (q + all);
}
