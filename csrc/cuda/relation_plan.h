// How a call of relation_nce is cut up on a GPU: tiles, stages, warps, blocks, segments, work
// space. Plain C++ that needs no GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "relation_layout.h"

namespace crrcd::cuda {

struct GpuLimits {
  int64_t shared_block = 0;      // bytes that a block can ask for
  int64_t shared_processor = 0;  // that blocks share, 1 KB of each block being the driver's
  int64_t processors = 0;
  int64_t segment = 0;  // keys at a time, a multiple of 128; 0: as its cache is used best
  static constexpr int64_t kRegisters = 65536, kRegistersOfThread = 255, kWarps = 48;
};

struct RelationShape {
  Precision precision = Precision::kF32;
  int64_t A = 0, B = 0, K = 0, H = 0, R = 0;
  bool query = false;   // gradient of QW: for the queries or W
  bool keys = false;    // of the keys
  bool anchor = false;  // of the anchors
  bool weight = false;  // of W or its bias

  bool live() const { return keys || anchor || weight; }
};

struct RelationPlan {
  bool fits = false;  // whether any layout does
  LogitLayout logit;
  KeyLayout key;
  DirectLayout direct;  // instead of key and gram
  GramLayout gram;
  int64_t logit_blocks = 0, key_blocks = 0, gram_blocks = 0;  // that a processor holds at a time
  int64_t segment = 0;                                        // keys at a time, Kp at most
  int64_t chunks = 1, key_parts = 1, anchor_parts = 1, gram_chunks = 1;
  int64_t work_bytes = 0;  // beyond operands and results
};

inline int64_t blocks_at_a_time(int64_t bytes, int warps, const GpuLimits& gpu) {
  if (bytes > gpu.shared_block) return 0;
  const int64_t registers = (GpuLimits::kRegistersOfThread + 1) * 32 * warps;
  return std::min({gpu.shared_processor / (bytes + 1024), GpuLimits::kRegisters / registers,
                   GpuLimits::kWarps / warps});
}

// The best of the layouts, best first, of which one block or more fits. As many warps as two blocks
// of four have are enough; tiles of one warp read the matrices too often, so they come last.
template <typename Layout, typename Candidates>
bool choose_layout(const Candidates& candidates, const GpuLimits& gpu, Layout& best,
                   int64_t& blocks) {
  int64_t most = 0;
  for (const auto& [layout, warps] : candidates) {
    const int64_t fit = blocks_at_a_time(layout.bytes(), warps, gpu);
    const int64_t busy = std::min<int64_t>(fit * warps, 8) + (warps > 1 ? 100 : 0);
    if (fit == 0 || busy <= most) continue;
    most = busy, best = layout, blocks = fit;
  }
  return most > 0;
}

inline RelationPlan plan_relation(const RelationShape& x, const GpuLimits& gpu) {
  RelationPlan plan;
  const int size = stored_bytes(x.precision), sum = sum_bytes(x.precision);
  const int panel = panel_rows(x.precision), piece = piece_columns(x.precision);
  const int hidden = padded_hidden(x.H);
  const int relation = round_up_int(static_cast<int>(std::max<int64_t>(x.R, 1)), panel);
  const int queries = round_up_int(static_cast<int>(std::max<int64_t>(x.B, 1)), panel);
  const bool wide = x.precision != Precision::kF64;  // whether there are kernels of many warps

  struct LogitChoice {
    LogitLayout layout;
    int warps;
  };
  LogitChoice logits[9];
  int count = 0;
  for (const int warps : {4, 1})
    for (const bool resident : {true, false})
      for (const int stages : {2, 1})
        if (warps == 1 || wide)
          logits[count++] = {{x.precision, warps, hidden, relation, stages, resident}, warps};
  logits[count++] = {{x.precision, 1, hidden, relation, 1, false, 1}, 1};
  struct Range {
    LogitChoice *first, *last;
    LogitChoice* begin() const { return first; }
    LogitChoice* end() const { return last; }
  };
  plan.fits = choose_layout(Range{logits, logits + count}, gpu, plan.logit, plan.logit_blocks);
  const bool direct = is_direct(x.precision);
  if (direct && x.live()) {
    struct DirectChoice {
      DirectLayout layout;
      int warps;
    };
    const DirectChoice choices[] = {
        {{x.precision, wide ? 4 : 1, hidden, relation, queries}, wide ? 4 : 1},
        {{x.precision, 1, hidden, relation, queries}, 1},
        {{x.precision, 1, hidden, relation, queries, 1}, 1}};
    plan.fits = choose_layout(choices, gpu, plan.direct, plan.key_blocks) && plan.fits;
  }
  if (!direct && (x.keys || x.anchor)) {
    struct KeyChoice {
      KeyLayout layout;
      int warps;
    };
    const KeyChoice keys[] = {{{x.precision, 8, hidden, true}, 8},
                              {{x.precision, 8, hidden, false}, 8},
                              {{x.precision, 1, hidden, true}, 1},
                              {{x.precision, 1, hidden, false}, 1},
                              {{x.precision, 1, hidden, false, 1}, 1}};
    plan.fits = choose_layout(keys, gpu, plan.key, plan.key_blocks) && plan.fits;
  }
  if (!direct && x.weight) {
    struct GramChoice {
      GramLayout layout;
      int warps;
    };
    GramChoice grams[4];
    int n = 0;
    for (const int keys : {64, 16})
      for (const int stages : {2, 1})
        grams[n++] = {{x.precision, hidden, keys, stages}, GramLayout::kWarps};
    plan.fits = choose_layout(grams, gpu, plan.gram, plan.gram_blocks) && plan.fits;
  }
  if (!plan.fits) return plan;

  // Keys at a time: what is kept of each should stay within the GPU's cache.
  const auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  const auto ratio = [](int64_t n, int64_t by) { return (n + by - 1) / std::max<int64_t>(by, 1); };
  const int64_t panels = queries / panel, keys = std::max<int64_t>(x.K, 1);
  const int64_t of_key = int64_t(hidden) * size + panels * 8 +
                         (x.live() ? x.A * sum * (1 + panels) : 0) +
                         (x.keys ? int64_t(hidden) * sum : 0);
  constexpr int64_t kStep = 128, kBudget = int64_t(6) << 20;
  const int64_t most = std::max(kBudget / of_key / kStep * kStep, 8 * kStep);
  const int64_t segments = ratio(keys, gpu.segment > 0 ? gpu.segment : most);
  plan.segment = up(ratio(keys, segments), kStep);

  const int64_t logit_tiles = ratio(std::min(plan.segment, keys), plan.logit.keys());
  const int64_t columns = wide ? 32 * plan.logit.warps : 32;
  const int64_t gradient = direct ? relation : hidden;  // width of the queries'
  const int64_t bases =
      std::max<int64_t>(x.A, 1) * panels * (x.query ? ratio(gradient, columns) : 1);
  plan.chunks =
      std::clamp<int64_t>(ratio(gpu.processors * plan.logit_blocks, bases), 1, logit_tiles);
  plan.work_bytes = plan.segment * of_key;
  const int64_t part = std::max<int64_t>(x.A, 1) * queries * sum;
  if (x.query) plan.work_bytes += plan.chunks * part * gradient;
  plan.work_bytes += plan.chunks * plan.logit.warps * part;
  if (x.keys || x.anchor || (direct && x.weight)) {
    const int tile = direct ? plan.direct.keys() : plan.key.keys();
    const int64_t key_tiles = ratio(std::min(plan.segment, keys), tile);
    const int64_t ranges = ratio(hidden, piece), blocks = gpu.processors * plan.key_blocks;
    plan.key_parts = std::clamp<int64_t>(ratio(blocks, ranges), 1, key_tiles);
    plan.anchor_parts =
        std::clamp<int64_t>(blocks / (ranges * plan.key_parts), 1, std::clamp<int64_t>(x.A, 1, 4));
    if (x.keys) plan.work_bytes += (plan.anchor_parts - 1) * plan.segment * hidden * sum;
    if (x.anchor) plan.work_bytes += plan.key_parts * x.A * hidden * sum;
    if (direct && x.weight) {
      // a copy of the weight's gradient each
      const int64_t slice = int64_t(relation) * hidden * sum;
      plan.key_parts = std::min(plan.key_parts, std::max<int64_t>((int64_t(4) << 20) / slice, 1));
      plan.anchor_parts = 1;
      plan.work_bytes += plan.key_parts * slice;
    }
  }
  if (!direct && x.weight) {
    const int64_t rows = up(hidden, GramLayout::kRows);
    const int64_t tiles = ratio(std::min(plan.segment, keys), plan.gram.keys) * x.A;
    const int64_t slice = rows * hidden * sum;
    plan.gram_chunks = std::clamp<int64_t>(
        std::min(ratio(gpu.processors * plan.gram_blocks, rows / GramLayout::kRows),
                 std::max<int64_t>((int64_t(4) << 20) / slice, 1)),
        1, std::max<int64_t>(tiles, 1));
    plan.work_bytes += plan.gram_chunks * slice;
  }
  return plan;
}

}  // namespace crrcd::cuda
