// Softplus of NCE's logits and its slopes, several vectors at a time.
// Included once per instruction set, inside that set's namespace: no include guard.
//
// With e = 2^-|x| the loss of a logit x (in units of log 2) is log(1 + e), plus x where x > 0. The
// logarithm is taken of products of 1 + e: q = product - 1, which loses nothing of small e.

// The logarithm of a product of many 1 + q, in double and without losing small q.
template <typename T>
class LogProduct {
 public:
  static constexpr int kLanes = Simd<T>::kLanes;
  static constexpr int kBits = sizeof(T) == 4 ? 120 : 480;  // 1 + q of a vector is below 2^kBits

  // One q a lane, of which 1 + q <= 2^count.
  CRRCD_INLINE void add(typename Simd<T>::V q, int count) {
    if (bits + count > 900) fold();
    T lane[kLanes];
    store(lane, q);
    for (int i = 0; i < kLanes; ++i) product[i] = product[i] * lane[i] + (product[i] + lane[i]);
    bits += count;
  }

  double log() {
    fold();
    return sum;
  }

 private:
  __attribute__((noinline)) void fold() {
    double all = 0;  // prod (1 + product) / 2^exponent - 1
    int64_t exponent = 0;
    for (double& x : product) {
      all = all * x + (all + x);
      x = 0;
      if (all > 1e12 && all < std::numeric_limits<double>::infinity()) {
        const auto word = __builtin_bit_cast(uint64_t, all);
        exponent += static_cast<int64_t>(word >> 52) - 1023;
        all = __builtin_bit_cast(double, (word << 12 >> 12) | (uint64_t(1023) << 52)) - 1;
      }
    }
    sum += kLog2 * static_cast<double>(exponent) + __builtin_log1p(all);
    bits = 0;
  }

  double product[kLanes] = {};  // minus 1
  int bits = 0;                 // 1 + product < 2^bits
  double sum = 0;
};

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

// The same of one vector or pairs of them, of x < 30; with kNormal none is between -120 and -1e6.
// With e = 2^x the loss is log(1 + e) whatever the sign, and two vectors share a division. Each
// vector multiplies 1 + q by up to 1 + 2^x.
template <typename T, bool kNormal, int kVectors>
CRRCD_INLINE void softplus_bounded(const typename Simd<T>::V (&x)[kVectors], typename Simd<T>::V& q,
                                   typename Simd<T>::V (&g)[kVectors]) {
  using V = typename Simd<T>::V;
  constexpr int kPairs = kVectors / 2;
  static_assert(kVectors == 1 || kVectors == 2 * kPairs);
  V e[kVectors];
  for (int i = 0; i < kVectors; ++i) e[i] = x[i];
  exp2_of<kNormal>(e);
  if constexpr (kVectors == 1) {
    g[0] = e[0] * reciprocal(T(1) + e[0]);
    q = q * e[0] + (q + e[0]);
  } else {
    V both[kPairs], r[kPairs];
    for (int i = 0; i < kPairs; ++i) both[i] = e[2 * i] * e[2 * i + 1];
    for (int i = 0; i < kVectors; ++i) g[i] = e[i] + both[i / 2];
    for (int i = 0; i < kPairs; ++i) both[i] = g[2 * i] + e[2 * i + 1];  // (1 + e) (1 + e') - 1
    for (int i = 0; i < kPairs; ++i) r[i] = T(1) + both[i];
    reciprocal(r);
    for (int i = 0; i < kVectors; ++i) g[i] *= r[i / 2];
    for (int i = 0; i < kPairs; ++i) q = q * both[i] + (q + both[i]);
  }
}

// The same of any x, the bounded way where no x is above 1; 1 + q grows up to threefold a vector.
template <typename T, int kVectors>
CRRCD_INLINE void softplus_mostly_bounded(const typename Simd<T>::V (&x)[kVectors],
                                          typename Simd<T>::V& q, typename Simd<T>::V& above,
                                          typename Simd<T>::V (&g)[kVectors]) {
  typename Simd<T>::V most = x[0];
  for (int i = 1; i < kVectors; ++i) most = x[i] > most ? x[i] : most;
  if (positive_bits(most - T(1)))
    softplus<T>(x, q, above, g);
  else
    softplus_bounded<T, false>(x, q, g);
}

constexpr int kMostlyBoundedSteps = 64;  // vectors that may share one q,
constexpr int kMostlyBoundedBits = 102;  // of which then 1 + q <= 3^64 < 2^102

// f.operator()<n>(i) for n = 4, 2 or 1 vectors from i on, up to count.
template <typename F>
CRRCD_INLINE void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) f.template operator()<4>(i);
  if (i + 2 <= count) f.template operator()<2>(i), i += 2;
  if (i < count) f.template operator()<1>(i);
}
