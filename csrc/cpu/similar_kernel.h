// Products of queries and negatives, compared with a threshold, to one bit each: similar_mask.
// Included once per instruction set, inside that set's namespace: no include guard.

// Bits of products z [m, width] of keys first + n and queries b0 + b; first is a multiple of 32.
template <typename T>
void pack_tile(const SimilarParams<T>& p, const T* z, int64_t ld, int64_t first, int64_t m,
               int64_t b0, int64_t width) {
  using U = typename Simd<T>::U;
  constexpr int kLanes = Simd<T>::kLanes;
  const auto threshold = splat(p.threshold);
  for (int64_t n0 = 0; n0 < m; n0 += 32) {
    const int64_t count = m - n0 < 32 ? m - n0 : 32;
    for (int64_t b = 0; b < width; b += kLanes) {
      U bits{}, bit = bits + 1;
      for (int64_t n = 0; n < count; ++n, bit += bit)
        bits |= (U)(load(z + (n0 + n) * ld + b) > threshold) & bit;
      for (int i = 0; i < kLanes && b0 + b + i < p.B; ++i)
        p.bits[(b0 + b + i) * p.words + (first + n0) / 32] = static_cast<uint32_t>(bits[i]);
    }
  }
}

template <typename T, bool kTiles>
void similar_shared(const SimilarParams<T>& p, const InstanceScratch<T>& s, int64_t part) {
  const int64_t ld = z_stride(p);
  shared_tiles<T, kTiles>(p, s, part, [&](const SharedTile<T>& tile, int64_t b0, int64_t width) {
    pack_tile(p, s.z, ld, tile.first, tile.m, b0, width);
  });
}

// Each query's own, chunks of 64 of a query's after another; rows of the next one are fetched
// meanwhile.
template <typename T>
void similar_own(const SimilarParams<T>& p, const InstanceScratch<T>& s, int64_t part) {
  constexpr int kLanes = Simd<T>::kLanes;
  static_assert(kChunk % 32 == 0, "chunks end with a word");
  const int64_t of_query = (p.K + kChunk - 1) / kChunk, all = p.B * of_query;
  const int64_t stop = all * (part + 1) / p.parts;
  const auto fill = [&](Chunk<T>& chunk, int64_t at) {
    const int64_t first = at % of_query * kChunk;
    chunk.b = at / of_query;
    chunk.n = at >= stop ? 0 : p.K - first < kChunk ? p.K - first : kChunk;
    const int64_t* own = p.own + chunk.b * p.own_stride + first * p.own_step;
    for (int64_t i = 0; i < chunk.n; ++i) chunk.row[i] = own[i * p.own_step];
  };
  Chunk<T> chunks[2];
  int64_t at = all * part / p.parts;
  fill(chunks[at % 2], at);
  for (; at < stop; ++at) {
    Chunk<T>& chunk = chunks[at % 2];
    Chunk<T>& next = chunks[(at + 1) % 2];
    fill(next, at + 1);
    locate(p, s, chunk);
    own_products(p, s, chunk, next.n > 0 ? &next : nullptr);
    uint32_t* const bits = p.bits + chunk.b * p.words + at % of_query * (kChunk / 32);
    for (int64_t i = 0; i < chunk.n; i += 32) {
      uint32_t word = 0;
      for (int64_t j = 0; j < 32 && i + j < chunk.n; j += kLanes)
        word |= static_cast<uint32_t>(positive_bits(load(s.z + i + j) - p.threshold)) << j;
      if (chunk.n - i < 32) word &= (uint32_t(1) << (chunk.n - i)) - 1;
      bits[i / 32] = word;
    }
  }
}

template <typename T>
void similar(const SimilarParams<T>& p, int64_t part) {
  InstanceScratch<T> s;
  carve(p, p.scratch + part * p.scratch_bytes, s);
  if (p.order != Order::kShared) return similar_own(p, s, part);
  if constexpr (kHasTiles && sizeof(T) == 4)
    if (p.tile_registers) return similar_shared<T, true>(p, s, part);
  similar_shared<T, false>(p, s, part);
}
