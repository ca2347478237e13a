// Products of matrices of bfloat16 pairs on tile registers (AMX), 16 x 16 float32 sums at a time.
// Included once per instruction set, inside that set's namespace: no include guard.

#ifdef CRRCD_TILE_REGISTERS

constexpr bool kHasTiles = true;

// Every register holds 16 rows of 64 bytes: of A, 16 rows of 16 pairs; of B, 16 pairs of rows of 16
// columns; of C, 16 x 16 sums. A thread that wants them has them as long as this lives.
class TileRegisters {
 public:
  explicit TileRegisters(bool wanted) : used(wanted) {
    if (!used) return;
    static constexpr Layout kLayout;
    // the compiler must not think that only the first bytes of the layout are read
    asm volatile("" ::"r"(&kLayout) : "memory");
    _tile_loadconfig(&kLayout);
  }
  ~TileRegisters() {
    if (used) _tile_release();
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Layout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  const bool used;
};

// A matrix of pairs, or a sum of several: part i lies i * distance further.
struct Pairs {
  const float* at = nullptr;
  int64_t ld = 0, distance = 0;
};

// C (+)= A B for kRows x kColumns registers of C, from row i and column j on, and a multiple of 16
// pairs k; A or B may be a sum.
template <int kPartsA, int kPartsB, int kRows, int kColumns>
CRRCD_INLINE void tile_block(int64_t i, int64_t j, int64_t k, const Pairs& a, const Pairs& b,
                             float* c, int64_t ldc, bool zero) {
  static_assert(kRows <= 2 && kColumns <= 2 && (kPartsA == 1 || kPartsB == 1));
  const int64_t a_bytes = a.ld * 4, b_bytes = b.ld * 4, c_bytes = ldc * 4;
  c += i * ldc + j;
  float* c_below = c + 16 * ldc;
  if (zero) {
    _tile_zero(0);
    if constexpr (kColumns > 1) _tile_zero(1);
    if constexpr (kRows > 1) _tile_zero(2);
    if constexpr (kRows > 1 && kColumns > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kRows > 1) _tile_loadd(2, c_below, c_bytes);
    if constexpr (kRows > 1 && kColumns > 1) _tile_loadd(3, c_below + 16, c_bytes);
  }
  const float* left = a.at + i * a.ld;
  const float* right = b.at + j;
  for (int64_t h = 0; h < k; h += 16, left += 16, right += 16 * b.ld) {
#pragma GCC unroll 3
    for (int part = kPartsA * kPartsB - 1; part >= 0; --part) {
      const bool first = part == kPartsA * kPartsB - 1;
      if (first || kPartsA > 1) {
        _tile_loadd(4, left + part % kPartsA * a.distance, a_bytes);
        if constexpr (kRows > 1)
          _tile_loadd(5, left + part % kPartsA * a.distance + 16 * a.ld, a_bytes);
      }
      if (first || kPartsB > 1) {
        _tile_loadd(6, right + part % kPartsB * b.distance, b_bytes);
        if constexpr (kColumns > 1)
          _tile_loadd(7, right + part % kPartsB * b.distance + 16, b_bytes);
      }
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kColumns > 1) _tile_dpbf16ps(1, 4, 7);
      if constexpr (kRows > 1) _tile_dpbf16ps(2, 5, 6);
      if constexpr (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kRows > 1) _tile_stored(2, c_below, c_bytes);
  if constexpr (kRows > 1 && kColumns > 1) _tile_stored(3, c_below + 16, c_bytes);
}

// C[m, n] (+)= A[m, k] B[k, n] of pairs; m, n and k are multiples of 16. TileRegisters must be
// alive in this thread.
template <int kPartsA = 1, int kPartsB = 1>
__attribute__((noinline)) void tile_product(int64_t m, int64_t n, int64_t k, const Pairs& a,
                                            const Pairs& b, float* c, int64_t ldc, bool zero) {
  // Compilers do not know that loads of tiles read memory.
  asm volatile("" ::: "memory");
  int64_t i = 0;
  const auto rows = [&]<int kRows>() {
    int64_t j = 0;
    for (; j + 32 <= n; j += 32)
      tile_block<kPartsA, kPartsB, kRows, 2>(i, j, k, a, b, c, ldc, zero);
    if (j < n) tile_block<kPartsA, kPartsB, kRows, 1>(i, j, k, a, b, c, ldc, zero);
  };
  for (; i + 32 <= m; i += 32) rows.template operator()<2>();
  if (i < m) rows.template operator()<1>();
  asm volatile("" ::: "memory");
}

// C[m, n] (+)= A[m, k] B[k, n] of pairs, as dense_gemm; rows and pairs that do not fill a register
// go there.
inline void tile_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, int64_t ldc, bool zero) {
  const int64_t whole_m = m / 16 * 16, whole_k = k / 16 * 16;
  tile_product(whole_m, n, whole_k, {a, lda}, {b, ldb}, c, ldc, zero);
  if (whole_k < k)
    dense_gemm<float, Product::kPairs>(whole_m, n, k - whole_k, a + whole_k, lda, b + whole_k * ldb,
                                       ldb, c, ldc, false);
  if (whole_m < m)
    dense_gemm<float, Product::kPairs>(m - whole_m, n, k, a + whole_m * lda, lda, b, ldb,
                                       c + whole_m * ldc, ldc, zero);
}

#else

constexpr bool kHasTiles = false;

struct TileRegisters {
  explicit TileRegisters(bool) {}
};

#endif
