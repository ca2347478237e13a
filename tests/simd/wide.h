// What the CPU kernels take of AVX-512 and of tile registers (AMX), in the compiler's vector
// extensions: so that their variants for processors of these run on any x86-64, as the tests of
// another variant do and under sanitizers. tests/sanitize.py has it included before every file of
// csrc, with CRRCD_EMULATE_WIDE. What a kernel uses and this file lacks does not compile.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace crrcd_wide {

#define WIDE static inline __attribute__((always_inline))

typedef float F16 __attribute__((vector_size(64)));
typedef double D8 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H32 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));

template <typename V>
WIDE V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
WIDE void write(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename V>
WIDE auto reduce_add(V v) {
  constexpr int kLanes = sizeof(V) / sizeof(v[0]);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

// Of each quarter of both, its lower or upper half, alternating.
template <typename V, bool kUpper>
WIDE V unpack(V a, V b) {
  constexpr int kLanes = sizeof(V) / sizeof(a[0]), kQuarter = kLanes / 4;
  V out;
  for (int q = 0; q < 4; ++q)
    for (int i = 0; i < kQuarter; ++i) {
      const int from = q * kQuarter + i / 2 + (kUpper ? kQuarter / 2 : 0);
      out[q * kQuarter + i] = i % 2 ? b[from] : a[from];
    }
  return out;
}

WIDE F16 shuffle_quarters(F16 a, F16 b, int control) {
  F16 out;
  for (int q = 0; q < 4; ++q)
    for (int i = 0; i < 4; ++i) {
      const int from = 4 * (control >> 2 * q & 3) + i;
      out[4 * q + i] = q < 2 ? a[from] : b[from];
    }
  return out;
}

template <typename V>
WIDE uint32_t compare(V a, V b, int how) {
  constexpr int kLanes = sizeof(V) / sizeof(a[0]);
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) {
    const bool yes = how == _CMP_NLE_UQ   ? !(a[i] <= b[i])
                     : how == _CMP_NLT_UQ ? !(a[i] < b[i])
                     : how == _CMP_GT_OQ  ? a[i] > b[i]
                                          : (std::abort(), false);
    bits |= uint32_t(yes) << i;
  }
  return bits;
}

// Of the two vectors' numbers those that the lowest bits of `index` name.
template <typename V, typename Index>
WIDE V permute(V a, Index index, V b) {
  constexpr int kLanes = sizeof(V) / sizeof(a[0]);
  V out;
  for (int i = 0; i < kLanes; ++i) {
    const int from = index[i] & (2 * kLanes - 1);
    out[i] = from < kLanes ? a[from] : b[from - kLanes];
  }
  return out;
}

WIDE F16 scale(uint32_t lanes, F16 a, F16 b) {
  F16 out = {};
  for (int i = 0; i < 16; ++i)
    if (lanes >> i & 1) {
      // std::ldexp takes an int: whatever lies beyond ends as 0 or infinity
      const float n = std::floor(b[i]);
      out[i] = n != n ? n : std::ldexp(a[i], n > 1e4f ? 10000 : n < -1e4f ? -10000 : int(n));
    }
  return out;
}

// The processor's has 14 bits right: a Newton step that was left out shows.
WIDE float to_14_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (finite) bits = (bits + 0x200u) & ~0x3ffu;
  std::memcpy(&x, &bits, 4);
  return x;
}

WIDE F16 approximate(F16 x, bool root) {
  for (int i = 0; i < 16; ++i) x[i] = to_14_bits(1.0f / (root ? std::sqrt(x[i]) : x[i]));
  return x;
}

template <typename V>
WIDE V root(V x) {
  for (int i = 0; i < int(sizeof(V) / sizeof(x[0])); ++i) x[i] = std::sqrt(x[i]);
  return x;
}

WIDE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

WIDE float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

WIDE H16 narrow(F16 x) {
  H16 out;
  for (int i = 0; i < 16; ++i) out[i] = to_bf16(x[i]);
  return out;
}

WIDE I16 widen(H16 x) {
  I16 out;
  for (int i = 0; i < 16; ++i) out[i] = x[i];
  return out;
}

WIDE F16 pair_products(F16 sum, H32 x, H32 y) {
  for (int i = 0; i < 16; ++i) {
    sum[i] += from_bf16(x[2 * i + 1]) * from_bf16(y[2 * i + 1]);
    sum[i] += from_bf16(x[2 * i]) * from_bf16(y[2 * i]);
  }
  return sum;
}

// The tile registers of a thread.
struct Tiles {
  bool configured = false;
  uint16_t row_bytes[8];
  uint8_t rows[8];
  float value[8][16][16];

  void need(int tile) const {
    if (configured && tile < 8 && rows[tile] && row_bytes[tile]) return;
    std::fprintf(stderr, "crrcd_wide: tile %d is used before it was configured\n", tile);
    std::abort();
  }
  void configure(const void* layout) {
    const auto* bytes = static_cast<const uint8_t*>(layout);
    if (bytes[0] != 1) std::abort();
    std::memcpy(row_bytes, bytes + 16, sizeof row_bytes);
    std::memcpy(rows, bytes + 48, sizeof rows);
    std::memset(value, 0, sizeof value);
    configured = true;
  }
  void zero(int tile) { need(tile), std::memset(value[tile], 0, sizeof value[tile]); }
  void load(int tile, const void* from, int64_t stride) {
    zero(tile);
    for (int i = 0; i < rows[tile]; ++i)
      std::memcpy(value[tile][i], static_cast<const char*>(from) + i * stride, row_bytes[tile]);
  }
  void store(int tile, void* to, int64_t stride) const {
    need(tile);
    for (int i = 0; i < rows[tile]; ++i)
      std::memcpy(static_cast<char*>(to) + i * stride, value[tile][i], row_bytes[tile]);
  }
  void multiply(int c, int a, int b) {
    need(c), need(a), need(b);
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k) {
        F16 left;
        for (int j = 0; j < 16; ++j) left[j] = value[a][i][k];
        write(value[c][i],
              pair_products(read<F16>(value[c][i]), (H32)left, read<H32>(value[b][k])));
      }
  }
};

inline Tiles& tiles() {
  thread_local Tiles of_this_thread;
  return of_this_thread;
}

#undef WIDE

}  // namespace crrcd_wide

// clang-format off: one line for each
#define __builtin_cpu_supports(name) true
#undef _mm512_cmp_ps_mask
#undef _mm512_cmp_pd_mask
#undef _mm512_extractf32x8_ps
#undef _mm512_shuffle_f32x4
#define _mm512_set1_ps(x) (__m512(crrcd_wide::F16{} + float(x)))
#define _mm512_setzero_ps() (__m512(crrcd_wide::F16{}))
#define _mm512_setzero_pd() (__m512d(crrcd_wide::D8{}))
#define _mm512_setzero_si512() (__m512i(crrcd_wide::I16{}))
#define _mm512_load_ps(p) (__m512(crrcd_wide::read<crrcd_wide::F16>(p)))
#define _mm512_load_si512(p) (__m512i(crrcd_wide::read<crrcd_wide::I16>(p)))
#define _mm512_storeu_si512(p, v) crrcd_wide::write((p), (v))
#define _mm512_add_ps(a, b) (__m512((crrcd_wide::F16)(a) + (crrcd_wide::F16)(b)))
#define _mm512_or_si512(a, b) (__m512i((crrcd_wide::I16)(a) | (crrcd_wide::I16)(b)))
#define _mm512_slli_epi32(a, n) (__m512i((crrcd_wide::U16)(a) << (n)))
#define _mm512_srli_epi32(a, n) (__m512i((crrcd_wide::U16)(a) >> (n)))
#define _mm512_reduce_add_ps(a) crrcd_wide::reduce_add((crrcd_wide::F16)(a))
#define _mm512_reduce_add_pd(a) crrcd_wide::reduce_add((crrcd_wide::D8)(a))
#define _mm512_unpacklo_ps(a, b) (__m512(crrcd_wide::unpack<crrcd_wide::F16, false>((crrcd_wide::F16)(a), (crrcd_wide::F16)(b))))
#define _mm512_unpackhi_ps(a, b) (__m512(crrcd_wide::unpack<crrcd_wide::F16, true>((crrcd_wide::F16)(a), (crrcd_wide::F16)(b))))
#define _mm512_unpacklo_pd(a, b) (__m512d(crrcd_wide::unpack<crrcd_wide::D8, false>((crrcd_wide::D8)(a), (crrcd_wide::D8)(b))))
#define _mm512_unpackhi_pd(a, b) (__m512d(crrcd_wide::unpack<crrcd_wide::D8, true>((crrcd_wide::D8)(a), (crrcd_wide::D8)(b))))
#define _mm512_shuffle_f32x4(a, b, c) (__m512(crrcd_wide::shuffle_quarters((crrcd_wide::F16)(a), (crrcd_wide::F16)(b), (c))))
#define _mm512_castps512_ps256(a) (__m256(crrcd_wide::read<__m256>(&(const __m512&)(a))))
#define _mm512_extractf32x8_ps(a, n) (__m256(crrcd_wide::read<__m256>((const char*)&(const __m512&)(a) + 32 * (n))))
#define _mm512_cmp_ps_mask(a, b, how) crrcd_wide::compare((crrcd_wide::F16)(a), (crrcd_wide::F16)(b), (how))
#define _mm512_cmp_pd_mask(a, b, how) crrcd_wide::compare((crrcd_wide::D8)(a), (crrcd_wide::D8)(b), (how))
#define _mm512_permutex2var_ps(a, i, b) (__m512(crrcd_wide::permute((crrcd_wide::F16)(a), (crrcd_wide::I16)(i), (crrcd_wide::F16)(b))))
#define _mm512_permutex2var_epi16(a, i, b) (__m512i(crrcd_wide::permute((crrcd_wide::H32)(a), (crrcd_wide::H32)(i), (crrcd_wide::H32)(b))))
#define _mm512_scalef_ps(a, b) (__m512(crrcd_wide::scale(0xffff, (crrcd_wide::F16)(a), (crrcd_wide::F16)(b))))
#define _mm512_maskz_scalef_ps(m, a, b) (__m512(crrcd_wide::scale((m), (crrcd_wide::F16)(a), (crrcd_wide::F16)(b))))
#define _mm512_rcp14_ps(a) (__m512(crrcd_wide::approximate((crrcd_wide::F16)(a), false)))
#define _mm512_rsqrt14_ps(a) (__m512(crrcd_wide::approximate((crrcd_wide::F16)(a), true)))
#define _mm512_sqrt_ps(a) (__m512(crrcd_wide::root((crrcd_wide::F16)(a))))
#define _mm512_sqrt_pd(a) (__m512d(crrcd_wide::root((crrcd_wide::D8)(a))))
#define _mm512_cvtneps_pbh(a) (crrcd_wide::narrow((crrcd_wide::F16)(a)))
#define _mm512_cvtepu16_epi32(a) (__m512i(crrcd_wide::widen((crrcd_wide::H16)(a))))
#define _mm512_dpbf16_ps(c, a, b) (__m512(crrcd_wide::pair_products((crrcd_wide::F16)(c), (crrcd_wide::H32)(a), (crrcd_wide::H32)(b))))
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(layout) crrcd_wide::tiles().configure(layout)
#define _tile_release() (crrcd_wide::tiles().configured = false)
#define _tile_zero(tile) crrcd_wide::tiles().zero(tile)
#define _tile_loadd(tile, from, stride) crrcd_wide::tiles().load(tile, from, stride)
#define _tile_stored(tile, to, stride) crrcd_wide::tiles().store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) crrcd_wide::tiles().multiply(c, a, b)
// clang-format on
