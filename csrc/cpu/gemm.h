// Small matrix products on tiles that fit the caches: C (+)= A B, row major.
// Included once per instruction set, inside that set's namespace: no include guard.
//
// About half of the entries of hid = relu(anchor - key) are zero, and along one hidden unit they
// are zero together (its threshold lies low or high for all keys). A register block of one or two
// rows of hid therefore walks only the bits of a mask word and skips a third to a half of the
// multiplications.

// Products of float32 or float64, or of pairs of bfloat16 with float32 sums. A pair lies in 32 bits
// and stands for two neighbouring values of k, so that the loops are the same with half as many k:
// A holds [m, k / 2] pairs, B [k / 2, n] pairs.
enum class Product { kFull, kPairs };

template <Product kProduct, typename V>
CRRCD_INLINE void accumulate(V& sum, V x, V y) {
#ifdef CRRCD_BF16_PAIRS
  if constexpr (kProduct == Product::kPairs) {
    sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
    return;
  }
#endif
  sum += x * y;
}

// sum += rows [0, kRows) of A times kVectors vectors of columns of B, over the set bits of active
// or over k_count rows of B. kTransposed: A lies in memory as [k, m].
template <typename T, Product kProduct, int kRows, int kVectors, bool kSparse,
          bool kTransposed = false>
CRRCD_INLINE void multiply_add(typename Simd<T>::V (&sum)[kRows][kVectors], const T* a, int64_t lda,
                               const T* b, int64_t ldb, int64_t k_count, uint64_t active) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t k = 0;
  while (kSparse ? active != 0 : k < k_count) {
    if (kSparse) {
      k = __builtin_ctzll(active);
      active &= active - 1;
    }
    const T* row = b + k * ldb;
    for (int i = 0; i < kRows; ++i) {
      const typename Simd<T>::V x = splat(kTransposed ? a[k * lda + i] : a[i * lda + k]);
      for (int j = 0; j < kVectors; ++j) accumulate<kProduct>(sum[i][j], x, load(row + j * kLanes));
    }
    if (!kSparse) ++k;
  }
}

template <typename T, Product kProduct, int kRows, int kVectors, bool kSparse,
          bool kTransposed = false>
CRRCD_INLINE void block(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t k_count,
                        uint64_t active, T* c, int64_t ldc, bool zero) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  // From zero, and C on top at the end: two short sums round less than one long one.
  V sum[kRows][kVectors] = {};
  multiply_add<T, kProduct, kRows, kVectors, kSparse, kTransposed>(sum, a, lda, b, ldb, k_count,
                                                                   active);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      T* out = c + i * ldc + j * kLanes;
      store(out, zero ? sum[i][j] : load(out) + sum[i][j]);
    }
}

// One panel (kVectors vectors wide) of C over all rows and all k; k in words of 64.
template <typename T, Product kProduct, int kVectors>
__attribute__((noinline)) void sparse_panel(int64_t m, int64_t k, const T* a, int64_t lda,
                                            const uint64_t* mask, int64_t words, int64_t first_word,
                                            const T* b, int64_t ldb, T* c, int64_t ldc, bool zero,
                                            bool pair_rows) {
  for (int64_t w = first_word; w * 64 < k; ++w) {
    const bool fresh = zero && w == first_word;
    const T* b_block = b + w * 64 * ldb;
    const T* a_block = a + w * 64;
    int64_t i = 0;
    // four sums are too few to hide the latency of a pair product
    if (kVectors <= 4 && (pair_rows || kProduct == Product::kPairs))
      for (; i + 2 <= m; i += 2)
        block<T, kProduct, 2, kVectors, true>(a_block + i * lda, lda, b_block, ldb, 64,
                                              mask[i * words + w] | mask[(i + 1) * words + w],
                                              c + i * ldc, ldc, fresh);
    for (; i < m; ++i)
      block<T, kProduct, 1, kVectors, true>(a_block + i * lda, lda, b_block, ldb, 64,
                                            mask[i * words + w], c + i * ldc, ldc, fresh);
  }
}

// C[m, n] (+)= A[m, k] B[k, n], where bit j of mask[i * words + j / 64] says that A[i, j] may
// differ from zero. n is a multiple of the vector width. pair_rows: neighbouring rows share most of
// their zeros, so that two of them can share one walk.
template <typename T, Product kProduct = Product::kFull>
void sparse_gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const uint64_t* mask,
                 int64_t words, const T* b, int64_t ldb, T* c, int64_t ldc, bool zero,
                 bool pair_rows, int64_t first_word = 0) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t j = 0;
  while (j < n) {
    int64_t vectors = (n - j) / kLanes;
    if (vectors > 8) vectors = 8;
#define CRRCD_PANEL(NV)                                                                          \
  case NV:                                                                                       \
    sparse_panel<T, kProduct, NV>(m, k, a, lda, mask, words, first_word, b + j, ldb, c + j, ldc, \
                                  zero, pair_rows);                                              \
    break
    switch (vectors) {
      CRRCD_PANEL(1);
      CRRCD_PANEL(2);
      CRRCD_PANEL(3);
      CRRCD_PANEL(4);
      CRRCD_PANEL(5);
      CRRCD_PANEL(6);
      CRRCD_PANEL(7);
      CRRCD_PANEL(8);
    }
#undef CRRCD_PANEL
    j += vectors * kLanes;
  }
}

// Register blocks of dense products.
#if CRRCD_VECTOR_BYTES == 64
constexpr int kDenseRows = 4, kDenseVectors = 4;  // 16 accumulators of 32 registers
#else
constexpr int kDenseRows = 6, kDenseVectors = 2;  // 12 accumulators, of 16 registers on x86-64
#endif

constexpr int fewer_rows(int rows) { return rows == 6 ? 4 : rows / 2; }

// f<vectors>(first column) for columns [0, n) in panels of kDenseVectors vectors or fewer.
template <typename T, typename F>
CRRCD_INLINE void for_panels(int64_t n, const F& f) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t j = 0;
  for (; j + kDenseVectors * kLanes <= n; j += kDenseVectors * kLanes)
    f.template operator()<kDenseVectors>(j);
  const int64_t left = (n - j) / kLanes;
  if (left == 1) f.template operator()<1>(j);
  if constexpr (kDenseVectors == 4) {
    if (left == 2) f.template operator()<2>(j);
    if (left == 3) f.template operator()<3>(j);
  }
}

// Rows of A from i on in blocks of kRows, what is left in smaller ones.
template <typename T, Product kProduct, int kRows, int kVectors, bool kTransposed>
CRRCD_INLINE void dense_rows(int64_t i, int64_t m, int64_t k, const T* a, int64_t lda, const T* b,
                             int64_t ldb, T* c, int64_t ldc, bool zero) {
  for (; i + kRows <= m; i += kRows)
    block<T, kProduct, kRows, kVectors, false, kTransposed>(a + (kTransposed ? i : i * lda), lda, b,
                                                            ldb, k, 0, c + i * ldc, ldc, zero);
  if constexpr (kRows > 1)
    dense_rows<T, kProduct, fewer_rows(kRows), kVectors, kTransposed>(i, m, k, a, lda, b, ldb, c,
                                                                      ldc, zero);
}

template <typename T, Product kProduct, int kVectors, bool kTransposed>
__attribute__((noinline)) void dense_panel(int64_t m, int64_t k, const T* a, int64_t lda,
                                           const T* b, int64_t ldb, T* c, int64_t ldc, bool zero) {
  dense_rows<T, kProduct, kDenseRows, kVectors, kTransposed>(0, m, k, a, lda, b, ldb, c, ldc, zero);
}

// The same without a mask; kTransposed: A is given as [k, m].
template <typename T, Product kProduct = Product::kFull, bool kTransposed = false>
void dense_gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
                T* c, int64_t ldc, bool zero) {
  for_panels<T>(n, [&]<int kVectors>(int64_t j) {
    dense_panel<T, kProduct, kVectors, kTransposed>(m, k, a, lda, b + j, ldb, c + j, ldc, zero);
  });
}
