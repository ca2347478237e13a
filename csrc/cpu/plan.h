// How one pass over the negatives is cut up: form, tiles, parts. Plain C++.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "relation_params.h"

namespace crrcd {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// An odd number of cache lines: the columns of a block then touch every set of the cache.
inline int64_t leading_dimension(int64_t n, int64_t element_size) {
  const int64_t line = 64 / element_size;
  return (round_up(n, line) / line | 1) * line;
}

// For logits scale * cosine - offset in units of log 2: the least n with 1 + 2^logit <= 2^n for all
// of them, or 0 where n > 30 or a logit may be below -120. Cosines round to what is a little
// above 1.
inline int logit_bits(double scale, double offset) {
  const double reach = 1.01 * std::abs(scale) / kLog2, middle = -offset / kLog2;
  if (!(middle + reach <= 29 && middle - reach >= -120)) return 0;
  return std::max(1, static_cast<int>(std::ceil(std::log2(1 + std::exp2(middle + reach)))));
}

struct Needs {
  bool query = false, key = false, anchor = false, weight = false;
};

struct Plan {
  Form form = Form::kGram;
  int64_t tile = 128;
  int64_t tiles_per_chunk = 1;
  int64_t key_parts = 1;
  int64_t anchor_parts = 1;
};

// The form whose products take the least time. Tile registers multiply what the Gram and the
// triangular form need at several times the rate of the direct one, and do not skip zeros of hid.
inline Form choose_form(int64_t A, int64_t B, int64_t K, int64_t H, int64_t R, const Needs& need,
                        bool registers) {
  // measured shares of a dense product's time
  const double sparse = registers ? 1 : 0.62, sparse_t = registers ? 1 : 0.7;
  const double rate = registers ? 8 : 1;
  const double a = double(A), b = double(B), k = double(K), h = double(H), r = double(R);
  const double rank = std::min(h, r);
  const bool inner = need.key || need.anchor;
  const double pairs = std::max(a * k, 1.0);
  // Q W, its transpose and the gradients that come back through them, once a call
  const double once = a * b * h * r * (need.query ? 2 : 1) + (need.weight ? a * b * h * r : 0);
  double gram = (sparse * h * (h + b) + (inner ? b * h : 0) +
                 (need.query || need.weight ? sparse_t * b * h : 0) +
                 (need.weight ? sparse_t * 0.75 * h * h : 0)) /
                    rate +
                (once + r * h * h) / pairs;
  // of a square's products a triangle has 0.7, counting blocks on its edge; a wider factor has more
  const double factor = 0.7 * (2 - rank / h);
  double triangular =
      (factor * sparse * h * rank + sparse * h * b + (need.query ? sparse_t * b * h : 0)) / rate +
      (once + 8 * r * h * rank) / pairs;
  double direct = 0.62 * h * r + r * b + (need.query ? r * b : 0) +
                  (inner || need.weight ? r * b : 0) + (inner ? h * r : 0) +
                  (need.weight ? 0.7 * h * r : 0);
  if (inner || need.weight) return direct < gram ? Form::kDirect : Form::kGram;
  if (direct < gram && direct < triangular) return Form::kDirect;
  return triangular < gram ? Form::kTriangular : Form::kGram;
}

inline Plan make_plan(int64_t A, int64_t B, int64_t K, int64_t H, int64_t R, const Needs& need,
                      int64_t element_size, int64_t threads, bool registers) {
  Plan plan;
  plan.form = choose_form(A, B, K, H, R, need, registers);
  // What one tile needs at a time should stay within about half a megabyte.
  const int64_t row_bytes = element_size * (5 * H + 2 * B + 2 * R);
  plan.tile = K > 64 && 128 * row_bytes <= 640 * 1024 ? 128 : 64;
  const int64_t tiles = (K + plan.tile - 1) / plan.tile;
  // Parts of keys need a copy of every gradient that is summed over keys; parts of anchors project
  // the keys again. Prefer keys while each part has several tiles and the copies stay small.
  const int64_t copy_bytes = std::max<int64_t>(1, element_size * A * B * H);
  const int64_t most = std::max<int64_t>(1, std::min(tiles / 2, (int64_t(64) << 20) / copy_bytes));
  for (int64_t parts = 1; parts <= threads; ++parts)
    if (threads % parts == 0 && parts <= most) plan.key_parts = parts;
  plan.anchor_parts = std::max<int64_t>(1, std::min(A, threads / plan.key_parts));
  const int64_t tile_bytes = element_size * plan.tile * H * (need.key ? 3 : 2);
  plan.tiles_per_chunk = std::clamp<int64_t>((400 * 1024) / std::max<int64_t>(tile_bytes, 1), 1, 4);
  plan.tiles_per_chunk = std::min(plan.tiles_per_chunk, std::max<int64_t>(1, tiles));
  return plan;
}

// Writes sizes, strides and the plan into p, whose `pairs` is known.
template <typename T>
void describe(NceParams<T>& p, int64_t A, int64_t B, int64_t K, int64_t H, int64_t R, int64_t D,
              const Needs& need, int64_t threads, const Kernels& kernels) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t lanes = kernels.vector_bytes / kSize;
  p.A = A, p.B = B, p.K = K, p.H = H, p.R = R, p.D = D;
  p.Bp = round_up(B, lanes), p.Hp = round_up(H, lanes);
  p.Rp = round_up(R, lanes), p.Dp = round_up(D, lanes);
  p.ldB = leading_dimension(p.Bp, kSize), p.ldH = leading_dimension(p.Hp, kSize);
  p.ldR = leading_dimension(p.Rp, kSize), p.ldD = leading_dimension(p.Dp, kSize);
  p.need_query = need.query, p.need_key = need.key;
  p.need_anchor = need.anchor, p.need_weight = need.weight;
  const Plan plan =
      make_plan(A, B, K, H, R, need, kSize, threads, p.pairs && kernels.tile_registers);
  p.form = plan.form;
  p.tile = plan.tile;
  p.tiles_per_chunk = plan.tiles_per_chunk;
  p.key_parts = plan.key_parts;
  p.anchor_parts = plan.anchor_parts;
}

// Bytes of the sums that the parts keep, apart from their scratch: none of them grows with K but
// the gradient of the gathered rows, which is asked for or not.
template <typename T>
int64_t sum_bytes(const NceParams<T>& p, bool rows) {
  const bool direct = p.form == Form::kDirect;
  const int64_t parts = p.key_parts * p.anchor_parts;
  int64_t values = p.key_parts * p.A * (p.ldB + p.ldH);
  if (p.need_query || p.need_weight)
    values += p.key_parts * p.A * (direct ? p.Bp * p.ldR : p.Hp * p.ldB);
  if (p.need_weight) values += parts * p.Hp * (direct ? p.ldR : p.ldH);
  if (p.need_key) values += parts * p.Hp * p.ldD;
  if (rows) values += p.anchor_parts * p.K * p.D;
  return values * static_cast<int64_t>(sizeof(T));
}

}  // namespace crrcd
