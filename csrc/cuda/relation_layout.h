// Sizes of relation_nce's tiles and what they take of shared memory. Plain C++: kernels lay their
// memory out by it, and the planner chooses by it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "both.h"

namespace crrcd::cuda {

// How products are made: in the operands' own precision on the usual units (kF64, kF32), or on
// tensor cores.
enum class Precision : int { kF64 = 0, kF32 = 1, kTf32 = 2, kBF16 = 3, kF16 = 4 };

constexpr int kUnit = 16;  // bytes that are moved at a time

CRRCD_BOTH int round_up_int(int n, int to) { return (n + to - 1) / to * to; }

CRRCD_BOTH int stored_bytes(Precision precision) {
  return precision == Precision::kF64                                    ? 8
         : precision == Precision::kF32 || precision == Precision::kTf32 ? 4
                                                                         : 2;
}

template <Precision kPrecision>
using SumOf = std::conditional_t<kPrecision == Precision::kF64, double, float>;

CRRCD_BOTH int sum_bytes(Precision precision) { return precision == Precision::kF64 ? 8 : 4; }

// Rows of a piece of W, QW or G, and queries of a panel.
CRRCD_BOTH int panel_rows(Precision precision) { return precision == Precision::kF64 ? 32 : 64; }

// Columns of a piece: 256 bytes.
CRRCD_BOTH int piece_columns(Precision precision) { return 256 / stored_bytes(precision); }

// An odd number of units: eight rows below each other then lie in different banks.
CRRCD_BOTH int leading(int columns, int bytes) {
  return (round_up_int(columns * bytes, kUnit) / kUnit | 1) * kUnit / bytes;
}

// Hidden units as the kernels see them, zeros behind the real ones.
CRRCD_BOTH int padded_hidden(int64_t hidden) {
  return round_up_int(hidden < 1 ? 1 : static_cast<int>(hidden), 16);
}

constexpr int kKeysOfWarp = 16;

// Layouts count bytes in 32 bits, which a tile of rows this wide would leave; none fits a GPU.
constexpr int64_t kTooWide = int64_t(1) << 20;

// Whether products are made as they stand on paper, <Q, W hid>: at full precision, where <QW, hid>
// and W'W would cancel for hidden vectors that W all but annihilates.
CRRCD_BOTH bool is_direct(Precision precision) {
  return precision == Precision::kF64 || precision == Precision::kF32;
}

// The pass over all (anchor, key): loss, gradient of the queries, norms.
struct LogitLayout {
  Precision precision = Precision::kF32;
  int warps = 4, hidden = 0, relation = 0;  // hidden, relation: as padded
  int stages = 2;                           // tiles of keys
  bool resident = true;                     // all of W and QW stay, or pieces come and go
  int buffers = 2;                          // for those

  CRRCD_BOTH int size() const { return stored_bytes(precision); }
  CRRCD_BOTH int keys() const { return kKeysOfWarp * warps; }
  CRRCD_BOTH int ld_hidden() const { return leading(hidden, size()); }
  CRRCD_BOTH int ld_queries() const { return leading(panel_rows(precision), size()); }
  CRRCD_BOTH int ld_piece() const { return leading(piece_columns(precision), size()); }
  CRRCD_BOTH int pieces_a_panel() const {
    return round_up_int(hidden, piece_columns(precision)) / piece_columns(precision);
  }
  CRRCD_BOTH int pieces() const {
    const int panels = relation / panel_rows(precision);
    return panels * pieces_a_panel() + (is_direct(precision) ? panels : pieces_a_panel());
  }
  CRRCD_BOTH int piece() const { return panel_rows(precision) * ld_piece(); }
  CRRCD_BOTH int keys_at() const { return 0; }  // bytes, as all that follow
  CRRCD_BOTH int ld_relation() const { return leading(relation, size()); }
  CRRCD_BOTH int relation_at() const { return keys_at() + stages * keys() * ld_hidden() * size(); }
  CRRCD_BOTH int slopes_at() const {
    return relation_at() + (is_direct(precision) ? keys() * ld_relation() * size() : 0);
  }
  CRRCD_BOTH int pieces_at() const { return slopes_at() + keys() * ld_queries() * size(); }
  CRRCD_BOTH int offset_at() const {
    return pieces_at() + (resident ? pieces() : buffers) * piece() * size();
  }
  CRRCD_BOTH int bytes() const {
    return offset_at() + 2 * panel_rows(precision) * sum_bytes(precision);
  }
};

// The pass over all (key tile, anchor) for gradients of keys and anchors.
struct KeyLayout {
  Precision precision = Precision::kF32;
  int warps = 8, hidden = 0;
  bool resident = true;  // all of G and two of QW's panels stay, or pieces come and go
  int buffers = 2;       // for those

  CRRCD_BOTH int size() const { return stored_bytes(precision); }
  CRRCD_BOTH int keys() const { return kKeysOfWarp * warps; }
  CRRCD_BOTH int columns() const { return piece_columns(precision); }  // of dX that a block makes
  CRRCD_BOTH int ld_hidden() const { return leading(hidden, size()); }
  CRRCD_BOTH int ld_queries() const { return leading(panel_rows(precision), size()); }
  CRRCD_BOTH int ld_piece() const { return leading(piece_columns(precision), size()); }
  CRRCD_BOTH int piece() const { return panel_rows(precision) * ld_piece(); }
  CRRCD_BOTH int pieces_a_panel() const {
    return round_up_int(hidden, piece_columns(precision)) / piece_columns(precision);
  }
  CRRCD_BOTH int gram_pieces() const {
    return columns() / panel_rows(precision) * pieces_a_panel();
  }
  CRRCD_BOTH int pieces() const {
    return resident ? gram_pieces() + 2 * pieces_a_panel() : buffers;
  }
  CRRCD_BOTH int keys_at() const { return 0; }
  CRRCD_BOTH int hidden_at() const { return keys_at() + keys() * ld_hidden() * size(); }
  CRRCD_BOTH int slopes_at() const { return hidden_at() + keys() * ld_hidden() * size(); }
  CRRCD_BOTH int pieces_at() const { return slopes_at() + keys() * ld_queries() * size(); }
  CRRCD_BOTH int sums_at() const { return pieces_at() + pieces() * piece() * size(); }
  CRRCD_BOTH int bytes() const { return sums_at() + warps * columns() * sum_bytes(precision); }
};

// The pass over all (anchor, key) for the gradient of the Gram matrix.
struct GramLayout {
  Precision precision = Precision::kF32;
  int hidden = 0, keys = 64, stages = 2;

  static constexpr int kWarps = 4, kRows = 16 * kWarps;  // rows of G's gradient that a block makes
  CRRCD_BOTH int size() const { return stored_bytes(precision); }
  CRRCD_BOTH int columns() const { return piece_columns(precision); }  // of it
  CRRCD_BOTH int ld_hidden() const { return leading(hidden, size()); }
  CRRCD_BOTH int keys_at() const { return 0; }
  CRRCD_BOTH int scaled_at() const { return keys_at() + stages * keys * ld_hidden() * size(); }
  CRRCD_BOTH int factor_at() const { return scaled_at() + keys * ld_hidden() * size(); }
  CRRCD_BOTH int bytes() const { return factor_at() + keys * sum_bytes(precision); }
};

// The same gradients as of both passes before, for the direct form.
struct DirectLayout {
  Precision precision = Precision::kF32;
  int warps = 4, hidden = 0, relation = 0, queries = 0;  // as padded
  int buffers = 2;                                       // for pieces of matrices

  // Of a weight's gradient, a block makes so many rows and pieces of columns.
  static CRRCD_BOTH int weight_rows(Precision precision, int warps) {
    return warps > 1 ? 64 : precision == Precision::kF64 ? 16 : 32;
  }
  static CRRCD_BOTH int pieces(int warps) { return warps > 1 ? 2 : 1; }
  CRRCD_BOTH int size() const { return stored_bytes(precision); }
  CRRCD_BOTH int keys() const { return kKeysOfWarp * warps; }
  CRRCD_BOTH int columns() const { return piece_columns(precision); }
  CRRCD_BOTH int ld_hidden() const { return leading(hidden, size()); }
  CRRCD_BOTH int ld_relation() const { return leading(relation, size()); }
  CRRCD_BOTH int ld_queries() const { return leading(queries, size()); }
  CRRCD_BOTH int ld_piece() const { return leading(piece_columns(precision), size()); }
  CRRCD_BOTH int piece() const { return panel_rows(precision) * ld_piece(); }
  CRRCD_BOTH int hidden_at() const { return 0; }
  CRRCD_BOTH int relation_at() const { return hidden_at() + keys() * ld_hidden() * size(); }
  CRRCD_BOTH int slopes_at() const { return relation_at() + keys() * ld_relation() * size(); }
  CRRCD_BOTH int pieces_at() const { return slopes_at() + keys() * ld_queries() * size(); }
  CRRCD_BOTH int sums_at() const { return pieces_at() + buffers * piece() * size(); }
  CRRCD_BOTH int bytes() const { return sums_at() + warps * columns() * sum_bytes(precision); }
};

// The relation of all pairs.
struct PairsLayout {
  Precision precision = Precision::kF32;
  int warps = 4, hidden = 0, buffers = 2;

  CRRCD_BOTH int size() const { return stored_bytes(precision); }
  CRRCD_BOTH int samples() const { return kKeysOfWarp * warps; }
  CRRCD_BOTH int ld_hidden() const { return leading(hidden, size()); }
  CRRCD_BOTH int ld_piece() const { return leading(piece_columns(precision), size()); }
  CRRCD_BOTH int samples_at() const { return 0; }
  CRRCD_BOTH int pieces_at() const { return samples_at() + samples() * ld_hidden() * size(); }
  CRRCD_BOTH int bytes() const {
    return pieces_at() + buffers * panel_rows(precision) * ld_piece() * size();
  }
};

// X = rows Wb'.
struct ProjectLayout {
  Precision precision = Precision::kF32;

  static constexpr int kWarps = 4, kKeys = kKeysOfWarp * kWarps;
  CRRCD_BOTH int size() const { return stored_bytes(precision); }
  CRRCD_BOTH int ld_piece() const { return leading(piece_columns(precision), size()); }
  CRRCD_BOTH int columns() const { return piece_columns(precision); }  // of X that a block makes
  CRRCD_BOTH int rows_at() const { return 0; }
  CRRCD_BOTH int weight_at() const { return rows_at() + kKeys * ld_piece() * size(); }
  CRRCD_BOTH int bytes() const { return weight_at() + columns() * ld_piece() * size(); }
};

}  // namespace crrcd::cuda
