// How a call of relation_nce is cut up on a GPU: tiles, stages, warps, blocks, segments, work
// space. Plain C++ that needs no GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "relation_layout.h"

namespace crrcd::cuda {

struct GpuLimits {
  int64_t shared_block = 0;      // bytes that a block can ask for
  int64_t shared_processor = 0;  // that blocks share, 1 KB of each block being the driver's
  int64_t processors = 0;
  int64_t cache = 0;    // bytes of its L2
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
  bool keys_first =
      false;  // whether the keys' pass makes the norms, with the product that it needs
  int64_t logit_blocks = 0, key_blocks = 0, gram_blocks = 0;  // that a processor holds at a time
  int64_t segment = 0;                                        // keys at a time, Kp at most
  int64_t chunks = 1, key_parts = 1, anchor_parts = 1, gram_chunks = 1;
  int64_t work_bytes = 0;  // beyond operands and results, at most
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

// n / by, rounded up.
inline int64_t ratio(int64_t n, int64_t by) { return (n + by - 1) / std::max<int64_t>(by, 1); }

// How the pass over (key tile, anchor) is shared out.
struct KeySplit {
  int64_t segments = 1, key_parts = 1, anchor_parts = 1;
  int64_t turns = 0;  // tiles that the busiest block makes, an anchor at a time, in all segments
};

// The best of the splits into `fewest` segments or up to twice as many, whose blocks all run at a
// time. Each part of the anchors has sums of its own of all keys, so that of splits that take
// nearly the same time the one with the fewest parts is best.
template <typename MostParts>
KeySplit split_keys(int64_t keys, int64_t fewest, int64_t tile, int64_t anchors, int64_t blocks,
                    const MostParts& most_parts) {
  const auto for_all = [&](const auto& f) {
    for (int64_t segments = fewest; segments <= 2 * fewest; ++segments) {
      const int64_t of_segment = ratio(keys, segments), tiles = ratio(of_segment, tile);
      const int64_t most = std::min({most_parts(of_segment), anchors, blocks});
      for (int64_t parts = 1; parts <= most; ++parts) {
        const int64_t rounds = ratio(tiles, blocks / parts);
        f(KeySplit{segments, ratio(tiles, rounds), parts,
                   segments * rounds * ratio(anchors, parts)});
      }
    }
  };
  int64_t least = std::numeric_limits<int64_t>::max();
  for_all([&](const KeySplit& x) { least = std::min(least, x.turns); });
  KeySplit best;
  for_all([&](const KeySplit& x) {
    if (x.turns <= least + least / 20 && (best.turns == 0 || x.anchor_parts < best.anchor_parts))
      best = x;
  });
  return best;
}

inline RelationPlan plan_relation(const RelationShape& x, const GpuLimits& gpu) {
  RelationPlan plan;
  const bool rows_of_relations = is_direct(x.precision);
  const bool rows_of_queries = rows_of_relations && x.live();
  if (x.H > kTooWide || (rows_of_relations && x.R > kTooWide) ||
      (rows_of_queries && x.B > kTooWide))
    return plan;
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
      for (const int stages : {2, 1}) {
        const LogitLayout layout{x.precision, warps, hidden, relation, stages, resident};
        const int64_t matrices = int64_t(layout.pieces()) * layout.piece() * layout.size();
        if ((warps == 1 || wide) && (!resident || matrices <= gpu.shared_block))
          logits[count++] = {layout, warps};
      }
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
    // where a block has all columns and all queries
    plan.keys_first =
        hidden <= piece && queries == panel && plan.key.warps == 8 && plan.logit.warps == 4;
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

  // Keys at a time: what one pass leaves to the next of each should stay within the GPU's cache.
  constexpr int64_t kStep = 128, kMegabyte = int64_t(1) << 20;
  const int64_t panels = queries / panel;
  const int64_t anchors = std::max<int64_t>(x.A, 1), keys = std::max<int64_t>(x.K, 1);
  const int64_t passed_on =
      int64_t(hidden) * size + panels * 8 + (x.live() ? anchors * sum * (1 + panels) : 0);
  const int64_t of_key = passed_on + (x.keys ? int64_t(hidden) * sum : 0);
  const int64_t budget = std::clamp(gpu.cache / 3, 6 * kMegabyte, 16 * kMegabyte);
  const int64_t most = std::max(budget / passed_on / kStep * kStep, 8 * kStep);
  const int64_t fewest = ratio(keys, gpu.segment > 0 ? gpu.segment : most);
  KeySplit split{fewest};
  const bool key_pass = x.keys || x.anchor || (direct && x.weight);
  const int64_t slice = int64_t(relation) * hidden * sum;  // a block's gradient of W, direct form
  if (key_pass) {
    int64_t blocks = gpu.processors * plan.key_blocks / ratio(hidden, piece);
    if (direct && x.weight) blocks = std::min(blocks, 4 * kMegabyte / slice);
    split = split_keys(keys, fewest, direct ? plan.direct.keys() : plan.key.keys(), anchors,
                       std::max<int64_t>(blocks, 1), [&](int64_t of_segment) -> int64_t {
                         if (direct && x.weight) return 1;
                         return std::max<int64_t>(8 * kMegabyte / (of_segment * hidden * sum), 4);
                       });
  }
  plan.segment = ratio(ratio(keys, split.segments), kStep) * kStep;

  const int64_t logit_tiles = ratio(std::min(plan.segment, keys), plan.logit.keys());
  const int64_t columns = wide ? 32 * plan.logit.warps : 32;
  const int64_t gradient = direct ? relation : hidden;  // width of the queries'
  const int64_t bases = anchors * panels * (x.query ? ratio(gradient, columns) : 1);
  // as many chunks as there is room for at a time, or one more
  const auto time = [&](int64_t chunks) {
    return ratio(bases * chunks, gpu.processors) * ratio(logit_tiles, chunks);
  };
  plan.chunks = std::clamp<int64_t>(gpu.processors * plan.logit_blocks / bases, 1, logit_tiles);
  if (plan.chunks < logit_tiles && time(plan.chunks + 1) < time(plan.chunks)) ++plan.chunks;
  plan.work_bytes = plan.segment * of_key;
  const int64_t part = anchors * queries * sum;
  if (x.query) plan.work_bytes += plan.chunks * part * gradient;
  plan.work_bytes += plan.chunks * plan.logit.warps * part * 2;
  if (key_pass) {
    plan.key_parts = split.key_parts, plan.anchor_parts = split.anchor_parts;
    if (x.keys) plan.work_bytes += (plan.anchor_parts - 1) * plan.segment * hidden * sum;
    if (x.anchor) plan.work_bytes += plan.key_parts * anchors * hidden * sum;
    if (direct && x.weight) plan.work_bytes += plan.key_parts * slice;
  }
  if (!direct && x.weight) {
    const int64_t rows = ratio(hidden, GramLayout::kRows) * GramLayout::kRows;
    const int64_t tiles = ratio(std::min(plan.segment, keys), plan.gram.keys) * x.A;
    const int64_t gram = rows * hidden * sum;
    plan.gram_chunks = std::clamp<int64_t>(
        std::min(ratio(gpu.processors * plan.gram_blocks, rows / GramLayout::kRows),
                 std::max<int64_t>(4 * kMegabyte / gram, 1)),
        1, std::max<int64_t>(tiles, 1));
    plan.work_bytes += plan.gram_chunks * gram;
  }
  return plan;
}

}  // namespace crrcd::cuda
