// The relation operator: unit relation vectors of every (anchor, sample) pair, and their gradient.
// Included once per instruction set, inside that set's namespace: no include guard.

template <typename T>
struct PairwiseScratch {
  T* x_t;    // [Hp, ldM]
  T* hid;    // [tile, ldH]
  T* hid_t;  // [Hp, ldM]
  T* w;      // [tile, ldR] relation vectors, or their gradient
  T* d_x;    // [tile, ldH]
  uint64_t* mask;
  uint64_t* mask_t;
};

template <typename T>
size_t carve(const RelationParams<T>& p, std::byte* base, PairwiseScratch<T>& s) {
  Carver c{base};
  const int64_t ld_m = odd_lines<T>(p.tile);
  s.x_t = c.take<T>(p.need_weight ? p.Hp * ld_m : 0);
  s.hid = c.take<T>(p.tile * p.ldH);
  s.hid_t = c.take<T>(p.need_weight ? p.Hp * ld_m : 0);
  s.w = c.take<T>(p.tile * p.ldR);
  s.mask = c.take<uint64_t>(p.tile * words_of(p.Hp));
  s.mask_t = c.take<uint64_t>(p.Hp * (p.tile / 64));
  return c.used;
}

template <typename T>
CRRCD_INLINE int64_t samples_in(const RelationParams<T>& p, int64_t tile) {
  const int64_t left = p.M - tile * p.tile;
  return left < p.tile ? left : p.tile;
}

template <typename T>
void relation_forward(const RelationParams<T>& p, int64_t part) {
  PairwiseScratch<T> s;
  carve(p, p.scratch + part * p.scratch_bytes, s);
  const int64_t tiles = (p.M + p.tile - 1) / p.tile, items = p.A * tiles;
  for (int64_t item = items * part / p.parts; item < items * (part + 1) / p.parts; ++item) {
    const int64_t a = item / tiles, first = item % tiles * p.tile, m = samples_in(p, item % tiles);
    hidden_rows<T>(m, p.Hp, p.anchor + a * p.ldH, p.sample + first * p.ldH, p.ldH, s.hid, s.mask);
    if (p.bias) fill_rows(m, p.Rp, p.bias, s.w, p.ldR);
    sparse_gemm<T>(m, p.Rp, p.Hp, s.hid, p.ldH, s.mask, words_of(p.Hp), p.weight_t, p.ldR, s.w,
                   p.ldR, !p.bias, true);
    for (int64_t n = 0; n < m; ++n) {
      const T* w = s.w + n * p.ldR;
      const T inverse = inverse_norm_of(dot(p.Rp, w, w));
      T* out = p.relation + (a * p.M + first + n) * p.R;
      for (int64_t r = 0; r < p.R; ++r) out[r] = w[r] * inverse;
      p.inverse_norm[a * p.M + first + n] = inverse;
    }
  }
}

template <typename T>
void relation_backward(const RelationParams<T>& p, int64_t part) {
  PairwiseScratch<T> s;
  carve(p, p.scratch + part * p.scratch_bytes, s);
  const int64_t ld_m = odd_lines<T>(p.tile);
  const int64_t tiles = (p.M + p.tile - 1) / p.tile, items = p.A * tiles;
  T* d_bias = p.need_weight ? p.d_bias + part * p.ldR : nullptr;
  for (int64_t item = items * part / p.parts; item < items * (part + 1) / p.parts; ++item) {
    const int64_t a = item / tiles, first = item % tiles * p.tile, m = samples_in(p, item % tiles);
    const T* anchor = p.anchor + a * p.ldH;
    const T* x = p.sample + first * p.ldH;
    hidden_rows<T>(m, p.Hp, anchor, x, p.ldH, s.hid, s.mask);
    for (int64_t n = 0; n < m; ++n) {  // d w = (g - v <v, g>) / |w|
      const int64_t at = a * p.M + first + n;
      const T* g = p.grad + at * p.R;
      const T* v = p.relation + at * p.R;
      T* d_w = s.w + n * p.ldR;
      T along = 0;
      for (int64_t r = 0; r < p.R; ++r) along += g[r] * v[r];
      for (int64_t r = 0; r < p.R; ++r) d_w[r] = (g[r] - along * v[r]) * p.inverse_norm[at];
      for (int64_t r = p.R; r < p.Rp; ++r) d_w[r] = 0;
    }
    if (p.need_anchor || p.need_sample)
      hidden_gradient<T>(m, p.Hp, p.Rp, s.w, p.ldR, p.weight, p.ldH, s.hid, p.ldH, nullptr, nullptr,
                         p.need_sample ? p.d_sample + (part * p.M + first) * p.ldH : nullptr,
                         p.need_anchor ? p.d_anchor + (part * p.A + a) * p.ldH : nullptr);
    if (p.need_weight) {
      transpose<T>(m, p.H, x, p.ldH, s.x_t, ld_m);
      for (int64_t h = 0; h < p.H; ++h)
        for (int64_t n = m; n < p.tile; ++n) s.x_t[h * ld_m + n] = T(1e30);
      hidden_columns<T>(p.tile, p.H, anchor, s.x_t, ld_m, s.hid_t, s.mask_t);
      sparse_gemm<T>(p.H, p.Rp, p.tile, s.hid_t, ld_m, s.mask_t, p.tile / 64, s.w, p.ldR,
                     p.d_w_t + part * p.Hp * p.ldR, p.ldR, false, false);
      add_rows<T>(m, p.Rp, s.w, p.ldR, d_bias);
    }
  }
}

template <typename T>
size_t relation_scratch(const RelationParams<T>& p) {
  PairwiseScratch<T> s;
  return carve(p, static_cast<std::byte*>(nullptr), s);
}
