// difference_nce: logits, loss and every gradient of the normalised difference.
// Included once per instruction set, inside that set's namespace: no include guard.
//
// With u_ab = q_b - a_a + eps and w_an = m_n - a_a + eps the law of cosines
//     2 <u, w> = |u|^2 + |w|^2 - |q - m|^2
// makes all logits of a tile from squared distances, which are sums of squares of differences and
// lose no digits where q, m and a are close to each other. They lose them where m lies much farther
// away than q, or q than m: seen from the anchors' middle, there
//     <u, w> = (|u|^2 - |q|^2) / 2 + <q, m> + (|w|^2 - |m|^2) / 2
// of products does not. With g = (d loss / d cosine) / pairs and
// c_abn = g / (|u| |w|)
//     d u_ab = sum_n c w_an - e u_ab        e_ab = sum_n g cosine / |u|^2
//     d w_an = sum_b c u_ab - f w_an        f_an = sum_b g cosine / |w|^2
// of which only W_bn = sum_a c, C_ab = sum_n c, Y_an = sum_b c, e and f are summed here: what they
// multiply are rows of q, m and a. Where |w| or |u| is small beside the vectors that it is the
// difference of, these sums would cancel: such (a, b, n) go through exact differences, one by one.

constexpr double kLeftOut = -1e30;  // the logit of what is no negative

#if CRRCD_VECTOR_BYTES == 64
constexpr int kSharedAnchors = 4;                     // that share one walk over the keys of a tile
constexpr int kCompareRows = 4, kCompareVectors = 4;  // of a block of distances or products
#else
constexpr int kSharedAnchors = 2;
constexpr int kCompareRows = 6, kCompareVectors = 2;
#endif

// Each query's own negatives among some neighbouring rows of the bank, sorted by row.
struct Bucket {
  uint32_t* entries;  // [most] query << bucket_shift | row within the bucket
  int64_t* begin;     // [rows of a bucket + 1] where the entries of a row are
  int64_t* row;       // [rows of a bucket] those that have entries, as positions in the bank
  int64_t first = 0, rows = 0;
};

// Sums over entries.
template <typename T>
struct DifferenceSums {
  using V = typename Simd<T>::V;

  LogProduct<T> products;
  double loss = 0;
  double sum_g = 0;

  // q: a vector of products minus 1, of which 1 + q <= 2^count; above: what was left out of them,
  // in units of log 2.
  CRRCD_INLINE void add(V q, int count, V above, V g) {
    products.add(q, count);
    loss += kLog2 * static_cast<double>(horizontal_sum<T>(above));
    sum_g += static_cast<double>(horizontal_sum<T>(g));
  }
};

// Those of a part: of all queries together, or of each.
template <typename T>
struct PartSums {
  DifferenceSums<T>* first;
  bool each;

  CRRCD_INLINE DifferenceSums<T>& of(int64_t b) const { return first[each ? b : 0]; }
};

template <typename T>
struct DifferenceScratch {
  T* rows;           // [tile, ldD] keys of the tile seen from the origin
  T* rows_t;         // [Dp, ldT], shared
  T* row;            // [ldD] one key as it came
  T* row_square;     // [tile] |m|^2
  T* inverse;        // [A, ldT] shared, [tile, ldA] own: |w|^2, then 1 / |w|
  T* half_norm;      // the same shape: |w| / 2
  T* drop;           // the same shape: 0, or kLeftOut for a pair (anchor, key) that is left out
  uint32_t* exact;   // the same shape, a bit each: |w| is small, exact differences
  T* y;              // the same shape: Y, then f - Y
  T* f;              // the same shape
  T* distance;       // [B, ldT] |q - m|^2, shared
  T* bias;           // [B, ldT] as drop for pairs (query, key), shared
  T* weight;         // [B, ldT] W, shared
  T* logit;          // [tile] one anchor's and query's, shared
  T* d_rows;         // [tile, ldD], null where no gradient of the bank is wanted
  T* exact_u;        // [lanes, ldD]
  T* exact_w;        // [lanes, ldD]
  Bucket bucket[2];  // the one that is worked off and the next, own
  // Sums of the call and, where entries add to them one by one, of a block of entries: two short
  // sums round less than one long one.
  T* sum_inverse;           // [B, ldA]
  T* sum_along;             // [B, ldA]
  T* d_query;               // [B, ldD]
  T* running_max;           // [B, ldA]
  T* running_sum;           // [B, ldA]
  T* d_anchor;              // [A, ldD]
  T* sum_f;                 // [ldA]
  DifferenceSums<T>* sums;  // as PartSums has them
};

template <typename T>
CRRCD_INLINE int64_t tile_stride(const DifferenceParams<T>& p) {
  return odd_lines<T>(p.tile);
}

template <typename T>
size_t carve(const DifferenceParams<T>& p, std::byte* base, DifferenceScratch<T>& s) {
  Carver c{base};
  const bool own = p.entries != nullptr;
  const int64_t ld_t = tile_stride(p);
  // whole blocks of rows meet the anchors
  const int64_t rows = own ? (p.tile + kCompareRows - 1) / kCompareRows * kCompareRows : p.tile;
  const int64_t cells = own ? rows * p.ldA : p.A * ld_t;
  const int64_t shared = own ? 0 : p.B * ld_t;
  const bool keys = p.want == Want::kKeys;
  s.rows = c.take<T>(rows * p.ldD);
  s.rows_t = c.take<T>(own ? 0 : p.Dp * ld_t);
  s.row = c.take<T>(p.ldD);
  s.row_square = c.take<T>(p.tile);
  s.inverse = c.take<T>(cells);
  s.half_norm = c.take<T>(cells);
  s.drop = c.take<T>(cells);
  s.exact = c.take<uint32_t>(cells / Simd<T>::kLanes);
  s.y = c.take<T>(keys ? cells : 0);
  s.f = c.take<T>(keys ? cells : 0);
  s.distance = c.take<T>(shared);
  s.bias = c.take<T>(shared);
  s.weight = c.take<T>(shared);
  s.logit = c.take<T>(p.tile);
  s.d_rows = keys && p.need_bank ? c.take<T>(p.tile * p.ldD) : nullptr;
  s.exact_u = c.take<T>(Simd<T>::kLanes * p.ldD);
  s.exact_w = c.take<T>(Simd<T>::kLanes * p.ldD);
  for (Bucket& bucket : s.bucket) {
    bucket.entries = c.take<uint32_t>(own ? p.most : 0);
    bucket.begin = c.take<int64_t>(own ? (int64_t(1) << p.bucket_shift) + 1 : 0);
    bucket.row = c.take<int64_t>(own ? int64_t(1) << p.bucket_shift : 0);
  }
  s.sum_inverse = c.take<T>(own ? p.B * p.ldA : 0);
  s.sum_along = c.take<T>(own ? p.B * p.ldA : 0);
  s.d_query = c.take<T>(own ? p.B * p.ldD : 0);
  s.sums = c.take<DifferenceSums<T>>(p.sums);
  return c.used;
}

// One vector of logits (units of log 2) or pairs of them to loss and slopes g = d loss / d logit.
template <typename T, Pass kPass, bool kBounded, int kVectors>
CRRCD_INLINE void logit_slopes(const typename Simd<T>::V (&logit)[kVectors], typename Simd<T>::V& q,
                               typename Simd<T>::V& above, typename Simd<T>::V (&g)[kVectors]) {
  if constexpr (kPass == Pass::kSoftmax) {  // the normaliser is in the offset
    for (int i = 0; i < kVectors; ++i) g[i] = logit[i];
    exp2_of(g);
  } else if constexpr (kBounded) {
    softplus_bounded<T, true>(logit, q, g);
  } else {
    softplus<T>(logit, q, above, g);
  }
}

// ---------------------------------------------------------------------------- pairs, before and
// after

template <typename T>
void difference_pairs(const DifferenceParams<T>& p, int64_t part) {
  using V = typename Simd<T>::V;
  const int64_t begin = p.B * part / p.pair_parts, end = p.B * (part + 1) / p.pair_parts;
  for (int64_t b = begin; b < end; ++b)
    for (int64_t a = 0; a < p.A; ++a) {
      const T* anchor = p.anchor + a * p.ldD;
      V uu{}, vv{}, uv{}, qa{};
      for (int64_t d = 0; d < p.Dp; d += Simd<T>::kLanes) {
        const V seen_from = load(anchor + d), eps = load(p.eps + d);
        const V u = load(p.query + b * p.ldD + d) - seen_from + eps;
        const V v = load(p.positive + b * p.ldD + d) - seen_from + eps;
        uu += u * u;
        vv += v * v;
        uv += u * v;
        qa += load(p.query_seen + b * p.ldD + d) * load(p.anchor_seen + a * p.ldD + d);
      }
      const T square = horizontal_sum<T>(uu);
      const T inverse = inverse_norm_of(square);
      const T inverse_positive = inverse_norm_of(horizontal_sum<T>(vv));
      const int64_t at = b * p.ldA + a;
      p.half_square[at] = square * T(0.5);
      p.half_square_far[at] = p.anchor_square[a] * T(0.5) - horizontal_sum<T>(qa);
      p.inverse[at] = inverse;
      p.inverse_positive[at] = inverse_positive;
      p.cosine[at] = horizontal_sum<T>(uv) * inverse * inverse_positive;
      p.near[at] = square < T(kNearDifference) * (p.query_square[b] + p.anchor_square[a]);
    }
}

// What a pair's positive adds to d u and d v.
template <typename T>
struct PairTerms {
  typename Simd<T>::V u, v, d_u, d_v;

  CRRCD_INLINE PairTerms(const DifferenceParams<T>& p, int64_t b, int64_t a, int64_t d) {
    const auto seen_from = load(p.anchor + a * p.ldD + d), eps = load(p.eps + d);
    u = load(p.query + b * p.ldD + d) - seen_from + eps;
    v = load(p.positive + b * p.ldD + d) - seen_from + eps;
    const int64_t at = b * p.ldA + a;
    d_u = p.c_positive[at] * v - p.e_positive[at] * u;
    d_v = p.c_positive[at] * u - p.f_positive[at] * v;
  }
};

// Gradients of queries, positives and anchors from the sums over the keys.
template <typename T>
void difference_finish(const DifferenceParams<T>& p, int64_t part) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  // the positives' part goes last: it is the large term of a sum of many small ones
  if (p.d_query || p.d_positive)
    for (int64_t b = p.B * part / p.pair_parts; b < p.B * (part + 1) / p.pair_parts; ++b)
      for (int64_t d = 0; d < p.Dp; d += kLanes) {
        V query{}, pull{}, positive{};
        for (int64_t a = 0; a < p.A; ++a) {
          const PairTerms<T> terms(p, b, a, d);
          const int64_t at = b * p.ldA + a;
          if (p.d_query) query -= p.c[at] * load(p.anchor_seen + a * p.ldD + d) + p.e[at] * terms.u;
          pull += terms.d_u;
          positive += terms.d_v;
        }
        if (p.d_query) {
          T* out = p.d_query + b * p.ldD + d;
          store(out, load(out) + query + pull);
        }
        if (p.d_positive) store(p.d_positive + b * p.ldD + d, positive);
      }
  if (p.d_anchor)
    for (int64_t a = p.A * part / p.pair_parts; a < p.A * (part + 1) / p.pair_parts; ++a) {
      T total = -p.sum_f[a];
      for (int64_t b = 0; b < p.B; ++b) total += p.c[b * p.ldA + a];
      for (int64_t d = 0; d < p.Dp; d += kLanes) {
        V anchor = total * load(p.anchor_seen + a * p.ldD + d), pull{};
        for (int64_t b = 0; b < p.B; ++b) {
          const PairTerms<T> terms(p, b, a, d);
          const int64_t at = b * p.ldA + a;
          anchor += (p.e[at] - p.c[at]) * terms.u;
          pull += terms.d_u + terms.d_v;
        }
        T* out = p.d_anchor + a * p.ldD + d;
        store(out, load(out) + anchor - pull);
      }
    }
}

// ------------------------------------------------------------------------------------- exact
// differences

// Up to one vector of (anchor, query, key) that wait for their exact differences.
template <typename T>
struct ExactQueue {
  int count = 0;
  int64_t a[Simd<T>::kLanes], b[Simd<T>::kLanes], n[Simd<T>::kLanes];
  T along[Simd<T>::kLanes], inverse[Simd<T>::kLanes];  // <u, w> / |w|, 1 / |w|
};

template <typename T>
CRRCD_INLINE void add_multiple(int64_t width, T factor, const T* x, T* sum) {
  for (int64_t d = 0; d < width; d += Simd<T>::kLanes)
    store(sum + d, load(sum + d) + factor * load(x + d));
}

template <typename T>
CRRCD_INLINE T sum_of(int64_t width, const T* x) {
  typename Simd<T>::V sum{};
  for (int64_t i = 0; i < width; i += Simd<T>::kLanes) sum += load(x + i);
  return horizontal_sum<T>(sum);
}

template <typename T, Pass kPass, Want kWant>
__attribute__((noinline)) void work_off(const DifferenceParams<T>& p, const DifferenceScratch<T>& s,
                                        ExactQueue<T>& queue, const PartSums<T>& sums) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  T logit[kLanes], g[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int64_t at = i < queue.count ? queue.b[i] * p.ldA + queue.a[i] : 0;
    logit[i] = i < queue.count ? queue.along[i] * p.slope[at] + p.offset[at] : T(kLeftOut);
  }
  const int count = queue.count;
  queue.count = 0;
  if (kPass == Pass::kLogSumExp) {
    for (int i = 0; i < count; ++i) {
      const int64_t at = queue.b[i] * p.ldA + queue.a[i];
      T &top = s.running_max[at], &sum = s.running_sum[at];
      if (logit[i] > top) {
        sum *= std::exp2(top - logit[i]);
        top = logit[i];
      }
      sum += std::exp2(logit[i] - top);
    }
    return;
  }
  V q{}, above{}, slope[1];
  const V logits[1] = {load(logit)};
  logit_slopes<T, kPass, false>(logits, q, above, slope);
  store(g, slope[0]);
  if (sums.each) {
    T product[kLanes], more[kLanes];
    store(product, q);
    store(more, above);
    for (int i = 0; i < count; ++i) {
      DifferenceSums<T>& of = sums.of(queue.b[i]);
      of.loss +=
          kLog2 * static_cast<double>(more[i]) + __builtin_log1p(static_cast<double>(product[i]));
      of.sum_g += static_cast<double>(g[i]);
    }
  } else {
    sums.first->add(q, 1, above, slope[0]);
  }
  if (kWant == Want::kLoss) return;
  for (int i = 0; i < count; ++i) {
    const int64_t a = queue.a[i], b = queue.b[i], n = queue.n[i], at = b * p.ldA + a;
    const T* u = s.exact_u + i * p.ldD;
    const T* w = s.exact_w + i * p.ldD;
    const T along = g[i] * queue.along[i], c = g[i] * queue.inverse[i] * p.weight[at];
    s.sum_along[at] += along;
    if (p.need_query) add_multiple(p.Dp, c, w, s.d_query + b * p.ldD);
    if (kWant == Want::kKeys) {
      const T f = along * p.weight[at] * queue.inverse[i] * queue.inverse[i];
      if (s.d_rows) {
        add_multiple(p.Dp, c, u, s.d_rows + n * p.ldD);
        add_multiple(p.Dp, -f, w, s.d_rows + n * p.ldD);
      }
      add_multiple(p.Dp, -c, u, s.d_anchor + a * p.ldD);
      add_multiple(p.Dp, f - c, w, s.d_anchor + a * p.ldD);
    }
  }
}

template <typename T, Pass kPass, Want kWant>
__attribute__((noinline)) void push(const DifferenceParams<T>& p, const DifferenceScratch<T>& s,
                                    ExactQueue<T>& queue, const PartSums<T>& sums, int64_t a,
                                    int64_t b, int64_t n, const T* w, T inverse) {
  using V = typename Simd<T>::V;
  const int i = queue.count++;
  queue.a[i] = a, queue.b[i] = b, queue.n[i] = n, queue.inverse[i] = inverse;
  V product{};
  for (int64_t d = 0; d < p.Dp; d += Simd<T>::kLanes) {
    const V u = load(p.query + b * p.ldD + d) - load(p.anchor + a * p.ldD + d) + load(p.eps + d);
    store(s.exact_u + i * p.ldD + d, u);
    store(s.exact_w + i * p.ldD + d, load(w + d));
    product += u * load(w + d);
  }
  queue.along[i] = horizontal_sum<T>(product) * inverse;
  if (queue.count == Simd<T>::kLanes) work_off<T, kPass, kWant>(p, s, queue, sums);
}

// Row k of the negatives as it came, or bank row `row`, minus the anchor: its inverse norm.
template <typename T>
T exact_difference(const DifferenceParams<T>& p, const BankView& bank, int64_t k, int64_t a, T* w) {
  load_row<T>(bank, k, p.D, p.ldD, w);
  typename Simd<T>::V square{};
  for (int64_t d = 0; d < p.Dp; d += Simd<T>::kLanes) {
    const auto x = load(w + d) - load(p.anchor + a * p.ldD + d) + load(p.eps + d);
    store(w + d, x);
    square += x * x;
  }
  return inverse_norm_of(horizontal_sum<T>(square));
}

// The key of the tile minus the anchor, where that is precise enough.
template <typename T>
const T* seen_difference(const DifferenceParams<T>& p, const DifferenceScratch<T>& s, int64_t n,
                         int64_t a) {
  for (int64_t d = 0; d < p.Dp; d += Simd<T>::kLanes)
    store(s.row + d, load(s.rows + n * p.ldD + d) - load(p.anchor_seen + a * p.ldD + d));
  return s.row;
}

// ---------------------------------------------------------------------------------------------- a
// tile

// Rows of the bank that are fetched while distances are computed, a few at a time: many at once
// would have to wait for each other.
struct Ahead {
  const BankView* bank = nullptr;
  const int64_t* row = nullptr;
  int64_t rows = 0, width = 0, step = 0;

  CRRCD_INLINE void fetch() {
    for (int64_t i = 0; i < step && rows > 0; ++i, ++row, --rows) prefetch_row(*bank, *row, width);
  }
};

constexpr int64_t kDistanceDepth = 32;  // two short sums round less than one long one

// out[i, j] = |x_i - y_j|^2, or <x_i, y_j>, for y given as [depth, columns].
enum class Compare { kDistance, kProduct };

template <typename T, Compare kCompare, int kRows, int kVectors>
CRRCD_INLINE void compare_block(int64_t depth, const T* x, int64_t ld_x, const T* y, int64_t ld_y,
                                T* out, int64_t ld_out, Ahead& ahead) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t first = 0;
  do {
    const int64_t stop = first + kDistanceDepth < depth ? first + kDistanceDepth : depth;
    ahead.fetch();
    V sum[kRows][kVectors] = {};
    for (int64_t d = first; d < stop; ++d)
      for (int i = 0; i < kRows; ++i) {
        const V level = splat(x[i * ld_x + d]);
        for (int j = 0; j < kVectors; ++j) {
          const V other = load(y + d * ld_y + j * kLanes), w = other - level;
          sum[i][j] += kCompare == Compare::kProduct ? level * other : w * w;
        }
      }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) {
        T* cell = out + i * ld_out + j * kLanes;
        store(cell, first == 0 ? sum[i][j] : load(cell) + sum[i][j]);
      }
    first += kDistanceDepth;
  } while (first < depth);
}

template <typename T, Compare kCompare, int kVectors>
__attribute__((noinline)) void compare_panel(int64_t rows, int64_t depth, const T* x, int64_t ld_x,
                                             const T* y, int64_t ld_y, T* out, int64_t ld_out,
                                             Ahead& ahead) {
  int64_t i = 0;
  for (; i + kCompareRows <= rows; i += kCompareRows)
    compare_block<T, kCompare, kCompareRows, kVectors>(depth, x + i * ld_x, ld_x, y, ld_y,
                                                       out + i * ld_out, ld_out, ahead);
  for (; i < rows; ++i)
    compare_block<T, kCompare, 1, kVectors>(depth, x + i * ld_x, ld_x, y, ld_y, out + i * ld_out,
                                            ld_out, ahead);
}

template <typename T, Compare kCompare>
void compare(int64_t rows, int64_t columns, int64_t depth, const T* x, int64_t ld_x, const T* y,
             int64_t ld_y, T* out, int64_t ld_out, Ahead ahead = {}) {
  constexpr int kLanes = Simd<T>::kLanes, kWidth = kCompareVectors * kLanes;
  int64_t j = 0;
  for (; j + kWidth <= columns; j += kWidth)
    compare_panel<T, kCompare, kCompareVectors>(rows, depth, x, ld_x, y + j, ld_y, out + j, ld_out,
                                                ahead);
  for (; j < columns; j += kLanes)
    compare_panel<T, kCompare, 1>(rows, depth, x, ld_x, y + j, ld_y, out + j, ld_out, ahead);
}

// Whether |w|^2 = |m|^2 + |a|^2 - 2 <m, a> of such squares cannot overflow before |w|^2 does.
template <typename T>
bool has_room(int64_t count, const T* square) {
  bool room = true;
  for (int64_t i = 0; i < count; ++i) room &= square[i] < std::numeric_limits<T>::max() / 8;
  return room;
}

// Whether distances to one of the keys would lose digits, and products cannot overflow.
template <typename T>
bool is_far(const DifferenceParams<T>& p, const DifferenceScratch<T>& s, int64_t count) {
  bool far = false;
  for (int64_t n = 0; n < count; ++n)
    far |= s.row_square[n] < p.least_square || s.row_square[n] > p.most_square;
  return far && has_room(count, s.row_square) && has_room(p.A, p.anchor_square) &&
         has_room(p.B, p.query_square);
}

// How a tile's keys are compared with the queries.
template <typename T>
struct Form {
  const T* half_square;  // [B, ldA] of p
  T half;                // factor of what is in s.distance
  CRRCD_INLINE Form(const DifferenceParams<T>& p, bool far)
      : half_square(far ? p.half_square_far : p.half_square), half(far ? T(-1) : T(0.5)) {}
};

struct Norms {
  bool exact = false;    // whether there are any that need exact differences
  bool bounded = false;  // whether p.logit_bits holds for the logits of the others
  bool far = false;      // whether the keys are compared by products
};

// From squared distances in s.inverse, or products: 1/|w| and |w|/2, 0 for those that need exact
// differences, whose bits are set in s.exact. kFar: instead of |w|/2 (|w|^2 - |m|^2) / (2 |w|) with
// the keys as columns.
template <typename T, Compare kCompare, bool kFar, bool kKeyColumns>
Norms inverse_norms(const DifferenceParams<T>& p, const DifferenceScratch<T>& s, int64_t rows,
                    int64_t columns, int64_t ld, const T* row_square, const T* column_square) {
  static_assert(!kFar || kCompare == Compare::kProduct);
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  uint32_t any = 0;
  V most_inverse{}, most_half{};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t at = i * ld + j;
      const V sum = load(column_square + j) + row_square[i], compared = load(s.inverse + at);
      const V square = kCompare == Compare::kProduct ? sum - T(2) * compared : compared;
      const V near = sum * T(kNearDifference) + T(2 * kZeroNormSquared) - square;
      const V inverse = near > 0 ? V{} : inverse_root<T>(square);
      const V half = square * T(0.5) * inverse;
      store(s.inverse + at, inverse);
      if constexpr (kFar) {
        const V of_anchor = kKeyColumns ? splat(row_square[i]) : load(column_square + j);
        store(s.half_norm + at, (of_anchor * T(0.5) - compared) * inverse);
      } else {
        store(s.half_norm + at, half);
      }
      most_inverse = inverse > most_inverse ? inverse : most_inverse;
      most_half = half > most_half ? half : most_half;
      const uint32_t bits = positive_bits(near);
      s.exact[at / kLanes] = bits;
      any |= bits;
    }
  // cosines are rounded to about epsilon |u| / |w| and epsilon |w| / |u|, whichever is more
  T inverses[kLanes], halves[kLanes];
  store(inverses, most_inverse);
  store(halves, most_half);
  T ratio = 0;
  for (int i = 0; i < kLanes; ++i) {
    ratio = inverses[i] * p.most_u > ratio ? inverses[i] * p.most_u : ratio;
    ratio = 2 * halves[i] * p.most_inverse > ratio ? 2 * halves[i] * p.most_inverse : ratio;
  }
  constexpr T kMostRatio = T(1e-3) / std::numeric_limits<T>::epsilon();
  return {any != 0, p.logit_bits > 0 && (kFar || ratio < kMostRatio), kFar};
}

template <typename T>
CRRCD_INLINE bool is_exact(const DifferenceScratch<T>& s, int64_t at) {
  return s.exact[at / Simd<T>::kLanes] >> at % Simd<T>::kLanes & 1;
}

template <typename T>
void leave_out(const DifferenceScratch<T>& s, int64_t at) {
  constexpr int kLanes = Simd<T>::kLanes;
  s.inverse[at] = s.half_norm[at] = 0;
  s.drop[at] = T(kLeftOut);
  s.exact[at / kLanes] &= ~(uint32_t(1) << at % kLanes);
}

CRRCD_INLINE bool contains(int64_t count, const int64_t* ids, int64_t id) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= ids[i] == id;
  return found;
}

template <typename T>
CRRCD_INLINE int64_t key_name(const DifferenceParams<T>& p, int64_t row) {
  return p.key_id ? p.key_id[row] : row;
}

template <typename T>
CRRCD_INLINE bool is_negative(const DifferenceParams<T>& p, int64_t b, int64_t row) {
  return !(p.query_id && p.query_id[b] == key_name(p, row)) &&
         !(p.query_label && p.query_label[b] == p.key_label[row]);
}

// Row k of the negatives as row n of the tile: seen from the origin, and its square. What is not
// finite stays in both.
template <typename T>
void see_row(const DifferenceParams<T>& p, const DifferenceScratch<T>& s, const BankView& bank,
             int64_t k, int64_t n) {
  constexpr int kLanes = Simd<T>::kLanes;
  T* row = s.rows + n * p.ldD;
  const T* from = row;
  if (p.as_stored)
    from = static_cast<const T*>(bank.data) + (bank.index ? bank.index[k] : k) * bank.row_stride;
  else
    load_row<T>(bank, k, p.D, p.ldD, row);
  typename Simd<T>::V square[2] = {};
  for (int64_t d = 0; d < p.Dp; d += kLanes) {
    const auto x = load(from + d) - load(p.origin + d);
    store(row + d, x);
    square[d / kLanes % 2] += x * x;
  }
  s.row_square[n] = horizontal_sum<T>(square[0] + square[1]);
}

// Hands the sums over f and Y on to anchors and keys: y becomes f - Y.
template <typename T>
void combine(const DifferenceScratch<T>& s, int64_t rows, int64_t columns, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t at = i * ld; at < i * ld + columns; at += Simd<T>::kLanes) {
      const auto inverse = load(s.inverse + at);
      const auto f = load(s.f + at) * inverse * inverse;
      store(s.f + at, f);
      store(s.y + at, f - load(s.y + at));
    }
}

// ------------------------------------------------------------------------------------ shared
// negatives

// Anchors a .. a + kAnchors against all queries.
template <typename T, Pass kPass, Want kWant, bool kMasked, bool kBounded, int kAnchors>
__attribute__((noinline)) void shared_anchors(const DifferenceParams<T>& p,
                                              const DifferenceScratch<T>& s, const Form<T>& form,
                                              int64_t a, int64_t width, const PartSums<T>& sums) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes, kTogether = kAnchors < 2 ? 1 : 2;
  constexpr int kGroups = kAnchors / kTogether;
  const int64_t ld_t = tile_stride(p);
  const int step_bits = kTogether * (kBounded ? p.logit_bits : 1);
  const int64_t most = LogProduct<T>::kBits / step_bits * kLanes;
  const T* inverse_rows = s.inverse + a * ld_t;
  const T* half_rows = s.half_norm + a * ld_t;
  const T* drop_rows = s.drop + a * ld_t;
  V q[kGroups] = {}, above{}, sum_g{};
  int bits = 0;
  const auto flush = [&](int64_t b) {
    for (int i = 0; i < kGroups; ++i) {
      sums.of(b).add(q[i], bits, i == 0 ? above : V{}, i == 0 ? sum_g : V{});
      q[i] = V{};
    }
    above = sum_g = V{};
    bits = 0;
  };
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t pair = b * p.ldA + a;
    const T* distance_row = s.distance + b * ld_t;
    T* weight_row = s.weight + b * ld_t;
    V half_square[kAnchors], slope[kAnchors], weight[kAnchors], offset[kAnchors];
    V sum_inverse[kAnchors] = {}, sum_along[kAnchors] = {};
    for (int j = 0; j < kAnchors; ++j) {
      half_square[j] = splat(form.half_square[pair + j]);
      slope[j] = splat(p.slope[pair + j]);
      weight[j] = splat(p.weight[pair + j]);
      offset[j] = splat(p.gram_offset[pair + j]);
    }
    for (int64_t begin = 0; begin < width; begin += most) {
      const int64_t end = begin + most < width ? begin + most : width;
      const int more = static_cast<int>((end - begin) / kLanes) * step_bits;
      if (bits + more > LogProduct<T>::kBits) flush(b);
      bits += more;
      for (int64_t n = begin; n < end; n += kLanes) {
        const V half_distance = load(distance_row + n) * form.half;
        V total = kWant == Want::kLoss || a == 0 ? V{} : load(weight_row + n);
        for (int group = 0; group < kGroups; ++group) {
          V inverse[kTogether], along[kTogether], logit[kTogether], g[kTogether];
          for (int i = 0; i < kTogether; ++i) {
            const int j = group * kTogether + i;
            inverse[i] = load(inverse_rows + j * ld_t + n);
            along[i] =
                (half_square[j] - half_distance) * inverse[i] + load(half_rows + j * ld_t + n);
            V shift = offset[j];
            if (kMasked) shift += load(s.bias + b * ld_t + n) + load(drop_rows + j * ld_t + n);
            logit[i] = along[i] * slope[j] + shift;
          }
          logit_slopes<T, kPass, kBounded>(logit, q[group], above, g);
          for (int i = 0; i < kTogether && kWant != Want::kLoss; ++i) {
            const int j = group * kTogether + i;
            const V g_inverse = g[i] * inverse[i], g_along = g[i] * along[i];
            sum_inverse[j] += g_inverse;
            sum_along[j] += g_along;
            sum_g += g[i];
            total += g_inverse * weight[j];
            if (kWant == Want::kKeys) {
              T* y = s.y + (a + j) * ld_t + n;
              T* f = s.f + (a + j) * ld_t + n;
              store(y, load(y) + g_inverse * weight[j]);
              store(f, load(f) + g_along * weight[j]);
            }
          }
        }
        if (kWant != Want::kLoss) store(weight_row + n, total);
      }
    }
    if (kWant != Want::kLoss)
      for (int j = 0; j < kAnchors; ++j) {
        s.sum_inverse[pair + j] += horizontal_sum<T>(sum_inverse[j]);
        s.sum_along[pair + j] += horizontal_sum<T>(sum_along[j]);
      }
    if (sums.each) flush(b);
  }
  if (!sums.each) flush(0);
}

// InfoNCE's first sweep.
template <typename T, bool kMasked>
__attribute__((noinline)) void shared_log_sum_exp(const DifferenceParams<T>& p,
                                                  const DifferenceScratch<T>& s,
                                                  const Form<T>& form, int64_t width) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t ld_t = tile_stride(p);
  for (int64_t a = 0; a < p.A; ++a)
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t pair = b * p.ldA + a;
      const T* drop = s.drop + a * ld_t;
      V top = splat(T(kLeftOut));
      for (int64_t n = 0; n < width; n += kLanes) {
        const V along = (form.half_square[pair] - load(s.distance + b * ld_t + n) * form.half) *
                            load(s.inverse + a * ld_t + n) +
                        load(s.half_norm + a * ld_t + n);
        V logit = along * p.slope[pair] + p.gram_offset[pair];
        if (kMasked) logit += load(s.bias + b * ld_t + n) + load(drop + n);
        store(s.logit + n, logit);
        top = logit > top ? logit : top;
      }
      T lane[kLanes];
      store(lane, top);
      T most = s.running_max[pair];
      for (T x : lane) most = x > most ? x : most;
      V sum{};
      for (int64_t n = 0; n < width; n += kLanes) sum += exp2_of(load(s.logit + n) - most);
      s.running_sum[pair] =
          s.running_sum[pair] * std::exp2(s.running_max[pair] - most) + horizontal_sum<T>(sum);
      s.running_max[pair] = most;
    }
}

// Keys first .. first + m: rows, distances, norms, masks. Returns whether anything is left out.
template <typename T>
bool load_shared_tile(const DifferenceParams<T>& p, const DifferenceScratch<T>& s, int64_t first,
                      int64_t m, int64_t width, Norms& norms) {
  const int64_t ld_t = tile_stride(p);
  for (int64_t n = 0; n < m; ++n) see_row(p, s, p.bank, first + n, n);
  for (int64_t n = m; n < width; ++n) {
    for (int64_t d = 0; d < p.ldD; ++d) s.rows[n * p.ldD + d] = 0;
    s.row_square[n] = 0;
  }
  transpose<T>(width, p.D, s.rows, p.ldD, s.rows_t, ld_t);
  const auto compare_all = [&]<Compare kCompare>() {
    compare<T, kCompare>(p.B, width, p.D, p.query_seen, p.ldD, s.rows_t, ld_t, s.distance, ld_t);
    compare<T, kCompare>(p.A, width, p.D, p.anchor_seen, p.ldD, s.rows_t, ld_t, s.inverse, ld_t);
    return inverse_norms<T, kCompare, kCompare == Compare::kProduct, true>(
        p, s, p.A, width, ld_t, p.anchor_square, s.row_square);
  };
  norms = is_far(p, s, m) ? compare_all.template operator()<Compare::kProduct>()
                          : compare_all.template operator()<Compare::kDistance>();
  const bool exact = norms.exact;

  bool masked = false;
  const auto prepare = [&] {
    if (masked) return;
    masked = true;
    for (int64_t i = 0; i < p.A; ++i) clear(width, s.drop + i * ld_t);
    for (int64_t i = 0; i < p.B; ++i) clear(width, s.bias + i * ld_t);
  };
  if (exact || m < width) prepare();
  if (exact)
    for (int64_t a = 0; a < p.A; ++a)
      for (int64_t n = 0; n < m; ++n)
        if (is_exact(s, a * ld_t + n)) s.drop[a * ld_t + n] = T(kLeftOut);
  for (int64_t a = 0; a < p.A; ++a)
    for (int64_t n = m; n < width; ++n) leave_out(s, a * ld_t + n);
  if (p.query_id || p.query_label || p.anchor_id)
    for (int64_t n = 0; n < m; ++n) {
      const int64_t row = p.bank.index ? p.bank.index[first + n] : first + n;
      const int64_t id = key_name(p, row);
      if ((p.query_id && contains(p.B, p.query_id, id)) ||
          (p.query_label && contains(p.B, p.query_label, p.key_label[row]))) {
        prepare();
        for (int64_t b = 0; b < p.B; ++b)
          if (!is_negative(p, b, row)) s.bias[b * ld_t + n] = T(kLeftOut);
      }
      if (p.anchor_id && contains(p.A, p.anchor_id, id)) {
        prepare();
        for (int64_t a = 0; a < p.A; ++a)
          if (p.anchor_id[a] == id) leave_out(s, a * ld_t + n);
      }
    }
  for_excluded(p.excluded, 0, p.B, first, m, [&](int64_t b, int64_t n) {
    prepare();
    s.bias[b * ld_t + n] = T(kLeftOut);
  });
  return masked;
}

// What needs exact differences in a tile of shared negatives.
template <typename T, Pass kPass, Want kWant>
void shared_exact(const DifferenceParams<T>& p, const DifferenceScratch<T>& s, int64_t first,
                  int64_t m, bool masked, bool exact, const PartSums<T>& sums) {
  const int64_t ld_t = tile_stride(p);
  ExactQueue<T> queue;
  for (int64_t a = 0; exact && a < p.A; ++a)
    for (int64_t n = 0; n < m; ++n) {
      if (!is_exact(s, a * ld_t + n)) continue;
      const T inverse = exact_difference(p, p.bank, first + n, a, s.row);
      for (int64_t b = 0; inverse != 0 && b < p.B; ++b)
        if (p.offset[b * p.ldA + a] > T(kLeftOut) && s.bias[b * ld_t + n] == 0)
          push<T, kPass, kWant>(p, s, queue, sums, a, b, n, s.row, inverse);
    }
  for (int64_t b = 0; p.near_begin && b < p.B; ++b)
    for (int64_t i = p.near_begin[b]; i < p.near_begin[b + 1]; ++i) {
      const int64_t a = p.near_anchor[i];
      for (int64_t n = 0; n < m; ++n) {
        if (masked && (s.drop[a * ld_t + n] != 0 || s.bias[b * ld_t + n] != 0)) continue;
        push<T, kPass, kWant>(p, s, queue, sums, a, b, n, seen_difference(p, s, n, a),
                              s.inverse[a * ld_t + n]);
      }
    }
  if (queue.count > 0) work_off<T, kPass, kWant>(p, s, queue, sums);
}

template <typename T, Pass kPass, Want kWant, bool kMasked>
void shared_sweep(const DifferenceParams<T>& p, const DifferenceScratch<T>& s, int64_t width,
                  const Norms& norms, const PartSums<T>& sums) {
  const Form<T> form(p, norms.far);
  if constexpr (kPass == Pass::kLogSumExp) {
    shared_log_sum_exp<T, kMasked>(p, s, form, width);
  } else {
    const auto sweep = [&]<bool kBounded>() {
      int64_t a = 0;
      for (; a + kSharedAnchors <= p.A; a += kSharedAnchors)
        shared_anchors<T, kPass, kWant, kMasked, kBounded, kSharedAnchors>(p, s, form, a, width,
                                                                           sums);
      for (; a < p.A; ++a)
        shared_anchors<T, kPass, kWant, kMasked, kBounded, 1>(p, s, form, a, width, sums);
    };
    constexpr bool kMayBeBounded = kPass == Pass::kNce;
    if (kMayBeBounded && norms.bounded)
      sweep.template operator()<kMayBeBounded>();
    else
      sweep.template operator()<false>();
  }
}

// The gradient of the tile's keys.
template <typename T>
void shared_rows(const DifferenceParams<T>& p, const DifferenceScratch<T>& s, int64_t m) {
  const int64_t ld_t = tile_stride(p);
  dense_gemm<T, Product::kFull, true>(m, p.Dp, p.B, s.weight, ld_t, p.query_seen, p.ldD, s.d_rows,
                                      p.ldD, true);
  dense_gemm<T, Product::kFull, true>(m, p.Dp, p.A, s.y, ld_t, p.anchor_seen, p.ldD, s.d_rows,
                                      p.ldD, false);
  clear(m, s.row_square);
  for (int64_t a = 0; a < p.A; ++a) add_to(m, s.f + a * ld_t, s.row_square);
  for (int64_t n = 0; n < m; ++n)
    add_multiple(p.Dp, -s.row_square[n], s.rows + n * p.ldD, s.d_rows + n * p.ldD);
}

template <typename T, Pass kPass, Want kWant>
void shared_pass(const DifferenceParams<T>& p, const DifferenceScratch<T>& s, int64_t part,
                 const PartSums<T>& sums) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const int64_t ld_t = tile_stride(p), tiles = (p.K + p.tile - 1) / p.tile;
  for (int64_t tile = tiles * part / p.parts; tile < tiles * (part + 1) / p.parts; ++tile) {
    const int64_t first = tile * p.tile, m = p.K - first < p.tile ? p.K - first : p.tile;
    const int64_t width = (m + kLanes - 1) / kLanes * kLanes;
    Norms norms;
    const bool masked = load_shared_tile(p, s, first, m, width, norms);
    if (kWant == Want::kKeys)
      for (int64_t a = 0; a < p.A; ++a) {
        clear(width, s.y + a * ld_t);
        clear(width, s.f + a * ld_t);
      }
    if (masked)
      shared_sweep<T, kPass, kWant, true>(p, s, width, norms, sums);
    else
      shared_sweep<T, kPass, kWant, false>(p, s, width, norms, sums);
    if (kWant != Want::kLoss && p.need_query)
      dense_gemm<T>(p.B, p.Dp, m, s.weight, ld_t, s.rows, p.ldD, s.d_query, p.ldD, false);
    if (kWant == Want::kKeys) {
      combine(s, p.A, width, ld_t);
      dense_gemm<T>(p.A, p.Dp, m, s.y, ld_t, s.rows, p.ldD, s.d_anchor, p.ldD, false);
      for (int64_t a = 0; a < p.A; ++a) s.sum_f[a] += sum_of(width, s.f + a * ld_t);
      if (s.d_rows) shared_rows(p, s, m);
    }
    if (norms.exact || p.near_begin)
      shared_exact<T, kPass, kWant>(p, s, first, m, masked, norms.exact, sums);
    if (s.d_rows)
      for (int64_t n = 0; n < m; ++n)
        for (int64_t d = 0; d < p.D; ++d) p.d_rows[(first + n) * p.D + d] = s.d_rows[n * p.ldD + d];
  }
}

// ---------------------------------------------------------------------------- each query's own
// negatives

// |x - y|^2 or <x, y>, in four sums: one would have to wait for itself.
template <typename T, Compare kCompare>
CRRCD_INLINE T compare_rows(int64_t n, const T* x, const T* y) {
  constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::V sum[4] = {};
  const auto add = [&](int64_t at, typename Simd<T>::V& to) {
    const auto level = load(x + at), other = load(y + at), w = level - other;
    to += kCompare == Compare::kProduct ? level * other : w * w;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) add(i + j * kLanes, sum[j]);
  for (; i < n; i += kLanes) add(i, sum[0]);
  return horizontal_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Row u of the tile against query b and anchors begin .. end. Returns sum_a c as a vector.
template <typename T, Pass kPass, Want kWant, bool kMasked, bool kBounded>
CRRCD_INLINE typename Simd<T>::V own_entry(const DifferenceParams<T>& p,
                                           const DifferenceScratch<T>& s, const T* half_square,
                                           int64_t u, int64_t b, int64_t begin, int64_t end,
                                           T half_distance, typename Simd<T>::V& q,
                                           typename Simd<T>::V& above, typename Simd<T>::V& sum_g) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t row = u * p.ldA, pair = b * p.ldA;
  // in registers: what is stored below could change p and s, as far as the compiler knows
  const T* const inverses = s.inverse + row;
  const T* const half_norms = s.half_norm + row;
  const T* const drops = s.drop + row;
  const T* const half_squares = half_square + pair;
  const T* const slopes = p.slope + pair;
  const T* const offsets = p.gram_offset + pair;
  T* const sums_inverse = s.sum_inverse + pair;
  T* const sums_along = s.sum_along + pair;
  const T slope_weight = p.slope_weight[b];
  V total{};
  const auto vectors = [&]<int kVectors>(int64_t first) {
    V inverse[kVectors], along[kVectors], slope[kVectors], logit[kVectors], g[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const int64_t a = first + i * kLanes;
      inverse[i] = load(inverses + a);
      along[i] = (load(half_squares + a) - half_distance) * inverse[i] + load(half_norms + a);
      slope[i] = load(slopes + a);
      logit[i] = along[i] * slope[i] + load(offsets + a);
      if (kMasked) logit[i] += load(drops + a);
    }
    if constexpr (kPass == Pass::kLogSumExp) {
      V top[kVectors];
      for (int i = 0; i < kVectors; ++i) {
        T* const at = s.running_max + pair + first + i * kLanes;
        T* const sum = s.running_sum + pair + first + i * kLanes;
        top[i] = load(at);
        if (positive_bits(logit[i] - top[i])) {
          const V most = logit[i] > top[i] ? logit[i] : top[i];
          store(sum, load(sum) * exp2_of(top[i] - most));
          store(at, most);
          top[i] = most;
        }
        logit[i] -= top[i];
      }
      exp2_of(logit);
      for (int i = 0; i < kVectors; ++i) {
        T* const sum = s.running_sum + pair + first + i * kLanes;
        store(sum, load(sum) + logit[i]);
      }
      return;
    }
    logit_slopes<T, kPass, kBounded>(logit, q, above, g);
    for (int i = 0; i < kVectors && kWant != Want::kLoss; ++i) {
      const int64_t a = first + i * kLanes;
      const V weight = slope[i] * slope_weight;
      const V g_inverse = g[i] * inverse[i], g_along = g[i] * along[i];
      store(sums_inverse + a, load(sums_inverse + a) + g_inverse);
      store(sums_along + a, load(sums_along + a) + g_along);
      sum_g += g[i];
      total += g_inverse * weight;
      if (kWant == Want::kKeys) {
        T* const y = s.y + row;
        T* const f = s.f + row;
        store(y + a, load(y + a) + g_inverse * weight);
        store(f + a, load(f + a) + g_along * weight);
      }
    }
  };
  for (; begin + 2 * kLanes <= end; begin += 2 * kLanes) vectors.template operator()<2>(begin);
  if (begin < end) vectors.template operator()<1>(begin);
  return total;
}

// Entries of one query in the tile that need exact differences.
template <typename T, Pass kPass, Want kWant>
__attribute__((noinline)) void own_exact(const DifferenceParams<T>& p,
                                         const DifferenceScratch<T>& s, ExactQueue<T>& queue,
                                         int64_t bank_row, int64_t u, int64_t b, bool masked,
                                         bool exact, const PartSums<T>& sums) {
  BankView bank = p.bank;
  bank.index = nullptr;
  for (int64_t a = 0; exact && a < p.A; ++a)
    if (is_exact(s, u * p.ldA + a) && p.offset[b * p.ldA + a] > T(kLeftOut)) {
      const T inverse = exact_difference(p, bank, bank_row, a, s.row);
      if (inverse != 0) push<T, kPass, kWant>(p, s, queue, sums, a, b, u, s.row, inverse);
    }
  for (int64_t i = p.near_begin ? p.near_begin[b] : 0; p.near_begin && i < p.near_begin[b + 1];
       ++i) {
    const int64_t a = p.near_anchor[i];
    if (masked && s.drop[u * p.ldA + a] != 0) continue;
    push<T, kPass, kWant>(p, s, queue, sums, a, b, u, seen_difference(p, s, u, a),
                          s.inverse[u * p.ldA + a]);
  }
}

// Rows of the bank that meet the anchors together, with their entries; the next tile's rows are
// fetched meanwhile.
struct OwnTile {
  const Bucket& bucket;
  const int64_t* row;
  int64_t rows;
  const int64_t* next;
  int64_t next_rows;
};

template <typename T, Pass kPass, Want kWant, bool kMasked, bool kBounded>
__attribute__((noinline)) void own_entries(const DifferenceParams<T>& p,
                                           const DifferenceScratch<T>& s, const OwnTile& tile,
                                           const Norms& norms, const PartSums<T>& sums) {
  const T* const half_square = Form<T>(p, norms.far).half_square;
  const Bucket& bucket = tile.bucket;
  using V = typename Simd<T>::V;
  const int step_bits = kBounded ? p.logit_bits : 1;
  const int64_t most = LogProduct<T>::kBits / step_bits * Simd<T>::kLanes;
  ExactQueue<T> queue;
  V q{}, above{}, sum_g{};
  int bits = 0;
  const auto flush = [&](int64_t b) {
    sums.of(b).add(q, bits, above, sum_g);
    q = above = sum_g = V{};
    bits = 0;
  };
  for (int64_t u = 0; u < tile.rows; ++u) {
    const int64_t local = tile.row[u] - bucket.first;
    const T* m = s.rows + u * p.ldD;
    for (int64_t i = bucket.begin[local]; i < bucket.begin[local + 1]; ++i) {
      const int64_t b = bucket.entries[i] >> p.bucket_shift;
      const T* query = p.query_seen + b * p.ldD;
      const T half_distance = norms.far
                                  ? -compare_rows<T, Compare::kProduct>(p.Dp, query, m)
                                  : T(0.5) * compare_rows<T, Compare::kDistance>(p.Dp, query, m);
      V total{};
      for (int64_t begin = 0; begin < p.Ap; begin += most) {
        const int64_t end = begin + most < p.Ap ? begin + most : p.Ap;
        const int more = static_cast<int>((end - begin) / Simd<T>::kLanes) * step_bits;
        if (bits + more > LogProduct<T>::kBits) flush(b);
        bits += more;
        total += own_entry<T, kPass, kWant, kMasked, kBounded>(p, s, half_square, u, b, begin, end,
                                                               half_distance, q, above, sum_g);
      }
      if (sums.each) flush(b);
      if (kWant != Want::kLoss) {
        const T weight = horizontal_sum<T>(total);
        if (p.need_query) add_multiple(p.Dp, weight, m, s.d_query + b * p.ldD);
        if (kWant == Want::kKeys && s.d_rows)
          add_multiple(p.Dp, weight, query, s.d_rows + u * p.ldD);
      }
      if (norms.exact || p.near_begin)
        own_exact<T, kPass, kWant>(p, s, queue, tile.row[u], u, b, kMasked, norms.exact, sums);
    }
  }
  if (queue.count > 0) work_off<T, kPass, kWant>(p, s, queue, sums);
  if (!sums.each) flush(0);
}

// Rows loaded, compared with all anchors, worked off.
template <typename T, Pass kPass, Want kWant>
void own_tile(const DifferenceParams<T>& p, const DifferenceScratch<T>& s, const OwnTile& tile,
              const PartSums<T>& sums) {
  const int64_t rows = tile.rows;
  BankView bank = p.bank;
  bank.index = nullptr;
  for (int64_t u = 0; u < rows; ++u) see_row(p, s, bank, tile.row[u], u);
  // whole blocks of rows: what is computed of the last ones is not looked at
  const int64_t blocks = (rows + kCompareRows - 1) / kCompareRows;
  for (int64_t u = rows; u < blocks * kCompareRows; ++u) clear(p.ldD, s.rows + u * p.ldD);
  constexpr int kWidth = kCompareVectors * Simd<T>::kLanes;
  const int64_t panels = p.Ap / kWidth + p.Ap % kWidth / Simd<T>::kLanes;
  const int64_t depths = (p.D + kDistanceDepth - 1) / kDistanceDepth;
  const int64_t steps = blocks * panels * (depths > 1 ? depths : 1);
  // A product is cheaper than a distance. The digits that |w|^2 loses where it is not much above
  // kNearDifference are lost in the sums of all gradients but the keys', which keep them.
  const auto compare_all = [&]<Compare kCompare, bool kFar>() {
    compare<T, kCompare>(
        blocks * kCompareRows, p.Ap, p.D, s.rows, p.ldD, p.anchor_seen_t, p.ldA, s.inverse, p.ldA,
        Ahead{&p.bank, tile.next, tile.next_rows, p.D, (tile.next_rows + steps - 1) / steps});
    return inverse_norms<T, kCompare, kFar, false>(p, s, rows, p.Ap, p.ldA, s.row_square,
                                                   p.anchor_square);
  };
  const bool products =
      !p.need_bank && has_room(rows, s.row_square) && has_room(p.A, p.anchor_square);
  const Norms norms = is_far(p, s, rows)
                          ? compare_all.template operator()<Compare::kProduct, true>()
                      : products ? compare_all.template operator()<Compare::kProduct, false>()
                                 : compare_all.template operator()<Compare::kDistance, false>();
  bool masked = false;
  const auto prepare = [&] {
    if (!masked)
      for (int64_t u = 0; u < rows; ++u) clear(p.Ap, s.drop + u * p.ldA);
    masked = true;
  };
  if (norms.exact) {
    prepare();
    for (int64_t u = 0; u < rows; ++u)
      for (int64_t a = 0; a < p.A; ++a)
        if (is_exact(s, u * p.ldA + a)) s.drop[u * p.ldA + a] = T(kLeftOut);
  }
  for (int64_t u = 0; p.anchor_id && u < rows; ++u) {
    const int64_t id = key_name(p, tile.row[u]);
    if (!contains(p.A, p.anchor_id, id)) continue;
    prepare();
    for (int64_t a = 0; a < p.A; ++a)
      if (p.anchor_id[a] == id) leave_out(s, u * p.ldA + a);
  }
  if (kWant == Want::kKeys)
    for (int64_t u = 0; u < rows; ++u) {
      clear(p.Ap, s.y + u * p.ldA);
      clear(p.Ap, s.f + u * p.ldA);
      if (s.d_rows) clear(p.ldD, s.d_rows + u * p.ldD);
    }
  constexpr bool kMayBeBounded = kPass == Pass::kNce;
  const auto entries = [&]<bool kMasked>() {
    if (kMayBeBounded && norms.bounded)
      own_entries<T, kPass, kWant, kMasked, kMayBeBounded>(p, s, tile, norms, sums);
    else
      own_entries<T, kPass, kWant, kMasked, false>(p, s, tile, norms, sums);
  };
  if (masked)
    entries.template operator()<true>();
  else
    entries.template operator()<false>();
  if (kWant != Want::kKeys) return;
  combine(s, rows, p.Ap, p.ldA);
  dense_gemm<T, Product::kFull, true>(p.A, p.Dp, rows, s.y, p.ldA, s.rows, p.ldD, s.d_anchor, p.ldD,
                                      false);
  for (int64_t u = 0; u < rows; ++u) add_to(p.Ap, s.f + u * p.ldA, s.sum_f);
  if (!s.d_rows) return;
  dense_gemm<T>(rows, p.Dp, p.A, s.y, p.ldA, p.anchor_seen, p.ldD, s.d_rows, p.ldD, false);
  for (int64_t u = 0; u < rows; ++u) {
    const T f = sum_of(p.Ap, s.f + u * p.ldA);
    add_multiple(p.Dp, -f, s.rows + u * p.ldD, s.d_rows + u * p.ldD);
    for (int64_t d = 0; d < p.D; ++d) p.d_bank[tile.row[u] * p.D + d] = s.d_rows[u * p.ldD + d];
  }
}

// Sorts the negatives of a bucket by row, without those that are masked.
template <typename T>
void sort_bucket(const DifferenceParams<T>& p, int64_t index, Bucket& bucket) {
  const int64_t rows = int64_t(1) << p.bucket_shift;
  const uint32_t* from = p.entries + p.bucket_begin[index];
  const int64_t count = p.bucket_begin[index + 1] - p.bucket_begin[index];
  const uint32_t mask = static_cast<uint32_t>(rows - 1);
  const bool masks = p.query_id || p.query_label;
  bucket.first = index << p.bucket_shift;
  const auto kept = [&](uint32_t entry) {
    return !masks || is_negative(p, entry >> p.bucket_shift, bucket.first + (entry & mask));
  };
  int64_t* begin = bucket.begin;
  for (int64_t i = 0; i <= rows; ++i) begin[i] = 0;
  for (int64_t i = 0; i < count; ++i)
    if (kept(from[i])) ++begin[(from[i] & mask) + 1];
  bucket.rows = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (begin[i + 1] > 0) bucket.row[bucket.rows++] = bucket.first + i;
    begin[i + 1] += begin[i];
  }
  for (int64_t i = 0; i < count; ++i)
    if (kept(from[i])) bucket.entries[begin[from[i] & mask]++] = from[i];
  for (int64_t i = rows; i > 0; --i) begin[i] = begin[i - 1];
  begin[0] = 0;
}

template <typename T, Pass kPass, Want kWant>
void own_pass(const DifferenceParams<T>& p, DifferenceScratch<T> s, int64_t part, std::byte* memory,
              const PartSums<T>& sums) {
  const int64_t pairs = p.B * p.ldA, width = p.B * p.ldD;
  T* const totals[] = {s.sum_inverse, s.sum_along, s.d_query};
  DifferenceScratch<T> block;  // of the same memory, with the sums of a block of entries
  carve(p, memory, block);
  block.running_max = s.running_max, block.running_sum = s.running_sum;
  block.d_anchor = s.d_anchor, block.sum_f = s.sum_f;
  const auto start = [&] {
    clear(pairs, block.sum_inverse);
    clear(pairs, block.sum_along);
    clear(width, block.d_query);
  };
  const auto finish = [&] {
    add_to(pairs, block.sum_inverse, totals[0]);
    add_to(pairs, block.sum_along, totals[1]);
    if (p.need_query) add_to(width, block.d_query, totals[2]);
  };
  constexpr bool kSums = kWant != Want::kLoss;
  if (kSums) start();
  int64_t index = 0, waiting = 0;
  while (p.bucket_begin[index] < p.part_begin[part]) ++index;
  // The next bucket of this part that has negatives left, sorted; one without rows at the end.
  const auto sort_next = [&](Bucket& bucket) {
    bucket.rows = 0;
    for (; bucket.rows == 0 && p.bucket_begin[index] < p.part_begin[part + 1]; ++index)
      if (p.bucket_begin[index] < p.bucket_begin[index + 1]) sort_bucket(p, index, bucket);
  };
  sort_next(block.bucket[0]);
  for (int64_t turn = 0; block.bucket[turn % 2].rows > 0; ++turn) {
    const Bucket& bucket = block.bucket[turn % 2];
    Bucket& next = block.bucket[(turn + 1) % 2];
    for (int64_t first = 0; first < bucket.rows; first += p.tile) {
      const int64_t left = bucket.rows - first;
      OwnTile tile{bucket, bucket.row + first, left < p.tile ? left : p.tile};
      if (left > p.tile) {
        tile.next = tile.row + p.tile;
        tile.next_rows = left - p.tile < p.tile ? left - p.tile : p.tile;
      } else {
        sort_next(next);
        tile.next = next.row;
        tile.next_rows = next.rows < p.tile ? next.rows : p.tile;
      }
      own_tile<T, kPass, kWant>(p, block, tile, sums);
      waiting += bucket.begin[tile.row[tile.rows - 1] - bucket.first + 1] -
                 bucket.begin[tile.row[0] - bucket.first];
      if (!kSums || waiting < 32 * p.B) continue;
      finish();
      start();
      waiting = 0;
    }
  }
  if (kSums) finish();
}

// --------------------------------------------------------------------------------------- one part
// of all

template <typename T, Pass kPass, Want kWant>
void difference_part(const DifferenceParams<T>& p, int64_t part, std::byte* memory) {
  DifferenceScratch<T> s;
  carve(p, memory, s);
  const int64_t pairs = p.B * p.ldA;
  s.sum_inverse = p.sum_inverse ? p.sum_inverse + part * pairs : nullptr;
  s.sum_along = p.sum_along ? p.sum_along + part * pairs : nullptr;
  s.d_query = p.d_query ? p.d_query + part * p.B * p.ldD : nullptr;
  s.d_anchor = p.d_anchor ? p.d_anchor + part * p.A * p.ldD : nullptr;
  s.sum_f = p.sum_f ? p.sum_f + part * p.ldA : nullptr;
  s.running_max = p.running_max ? p.running_max + part * pairs : nullptr;
  s.running_sum = p.running_sum ? p.running_sum + part * pairs : nullptr;
  for (int64_t i = 0; i < p.sums; ++i) s.sums[i] = {};
  const PartSums<T> sums{s.sums, p.each};
  if (p.entries)
    own_pass<T, kPass, kWant>(p, s, part, memory, sums);
  else
    shared_pass<T, kPass, kWant>(p, s, part, sums);
  for (int64_t i = 0; i < p.sums; ++i) {
    double* scalars = p.scalars + (part * p.sums + i) * 2;
    scalars[0] += s.sums[i].loss + s.sums[i].products.log();
    scalars[1] += s.sums[i].sum_g;
  }
}

template <typename T>
void difference(const DifferenceParams<T>& p, int64_t part, std::byte* memory) {
  switch (p.pass) {
    case Pass::kNce:
      if (p.want == Want::kLoss)
        return difference_part<T, Pass::kNce, Want::kLoss>(p, part, memory);
      if (p.want == Want::kQuery)
        return difference_part<T, Pass::kNce, Want::kQuery>(p, part, memory);
      return difference_part<T, Pass::kNce, Want::kKeys>(p, part, memory);
    case Pass::kLogSumExp:
      return difference_part<T, Pass::kLogSumExp, Want::kLoss>(p, part, memory);
    case Pass::kSoftmax:
      if (p.want == Want::kKeys)
        return difference_part<T, Pass::kSoftmax, Want::kKeys>(p, part, memory);
      return difference_part<T, Pass::kSoftmax, Want::kQuery>(p, part, memory);
  }
}

template <typename T>
size_t difference_scratch(const DifferenceParams<T>& p) {
  DifferenceScratch<T> s;
  return carve(p, static_cast<std::byte*>(nullptr), s);
}
