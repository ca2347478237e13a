// difference_nce: what belongs to a pair (query, anchor) alone, and those (anchor, query, key)
// whose differences are small, one by one.
#pragma once

#include "difference.cuh"

namespace crrcd::cuda {
namespace {

// Element d of query - anchor + eps.
template <typename T>
__device__ __forceinline__ T difference_of(const DifferenceParams<T>& p, const T* rows, int64_t b,
                                           int64_t a, int64_t d) {
  return rows[b * p.D + d] - p.anchor[a * p.D + d] + p.eps;
}

// A warp a pair.
template <typename T>
__global__ void __launch_bounds__(kDifferenceThreads) difference_pairs(DifferenceParams<T> p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t pair = int64_t(blockIdx.x) * kDifferenceWarps + threadIdx.x / kWarp;
  if (pair >= p.A * p.B) return;
  const int64_t b = pair / p.A, a = pair % p.A, at = b * p.Ap + a;
  T uu = 0, vv = 0, uv = 0;
  for (int64_t d = lane; d < p.D; d += kWarp) {
    const T u = difference_of(p, p.query, b, a, d), v = difference_of(p, p.positive, b, a, d);
    uu += u * u, vv += v * v, uv += u * v;
  }
  uu = warp_sum(uu), vv = warp_sum(vv), uv = warp_sum(uv);
  if (lane != 0) return;
  const T inverse = inverse_norm<Precision::kF32>(uu);
  const T inverse_positive = inverse_norm<Precision::kF32>(vv);
  p.half_square[at] = uu / 2;
  p.inverse[at] = inverse;
  p.inverse_positive[at] = inverse_positive;
  p.cosine[at] = uv * inverse * inverse_positive;
  p.near[at] = uu < T(kNearDifference) * (p.query_square[b] + p.anchor_square[a]);
}

// The position in a list of those for whom `wanted` holds, in the order of the threads; `count` is
// how many there are. shared: a number a warp.
__device__ __forceinline__ int place_in_list(bool wanted, int* shared, int& count) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned votes = __ballot_sync(0xffffffffu, wanted);
  if (lane == 0) shared[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1));
  count = 0;
  for (int w = 0; w < kDifferenceWarps; ++w) {
    if (w < warp) before += shared[w];
    count += shared[w];
  }
  __syncthreads();
  return before;
}

// The list of near pairs, a block a query.
template <typename T>
__global__ void __launch_bounds__(kDifferenceThreads) difference_near(DifferenceParams<T> p) {
  __shared__ int of_warps[kDifferenceWarps];
  const int64_t b = blockIdx.x;
  int64_t begin = p.near_begin[b];
  for (int64_t first = 0; first < p.A; first += kDifferenceThreads) {
    const int64_t a = first + threadIdx.x, at = b * p.Ap + a;
    int count = 0;
    const bool near = a < p.A && p.near[at];
    const int place = place_in_list(near, of_warps, count);
    if (near) p.near_pair[begin + place] = at;
    begin += count;
  }
}

// Pairs that are worked off together.
template <typename T>
struct ExactPairs {
  int64_t at[kDifferenceThreads];  // b Ap + a
  T c[kDifferenceThreads], e[kDifferenceThreads], f[kDifferenceThreads];
  int64_t entry[kDifferenceThreads];  // those that have such pairs
  int of_warps[kDifferenceWarps];
  double scalars[3 * kDifferenceWarps];
};

template <typename T, Pass kPass>
__global__ void __launch_bounds__(kDifferenceThreads, 1) difference_exact(DifferenceParams<T> p) {
  __shared__ ExactPairs<T> s;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t block = blockIdx.x, entries = p.own ? p.B * p.count : p.count;
  const int64_t words = p.Ap / kDifferenceChunk<T>;
  // slices behind those of the tiles
  T* const d_query = p.d_query + (words * p.chunks + block) * p.B * p.D;
  T* const d_anchor = p.d_anchor + (p.groups * p.chunks + block) * p.A * p.D;
  double total[3] = {};  // loss, g, g cosine

  // one candidate a thread: pairs with this entry's key, negative k of the segment
  const auto work_off = [&](int64_t entry, int64_t k, int64_t row, bool wanted, int64_t a,
                            int64_t b) {
    wanted = wanted && p.offset[b * p.Ap + a] > T(kLeftOutLogit) &&
             is_negative(p, b, row, p.first + k) && !is_anchors_own(p, a, row);
    int count = 0;
    const int place = place_in_list(wanted, s.of_warps, count);
    if (count == 0) return;
    if (wanted) s.at[place] = b * p.Ap + a;
    __syncthreads();
    for (int i = warp; i < count; i += kDifferenceWarps) {
      const int64_t at = s.at[i], query = at / p.Ap, anchor = at % p.Ap;
      T square = 0, along = 0;
      for (int64_t d = lane; d < p.D; d += kWarp) {
        const T w = bank_element(p, row, d) - p.anchor[anchor * p.D + d] + p.eps;
        square += w * w;
        along += w * difference_of(p, p.query, query, anchor, d);
      }
      square = warp_sum(square), along = warp_sum(along);
      if (lane != 0) continue;
      s.c[i] = s.e[i] = s.f[i] = 0;
      const T inverse = inverse_norm<Precision::kF32>(square);
      if (inverse == 0) continue;
      const T slope = p.slope[at] * inverse, logit = along * slope + p.offset[at];
      if constexpr (kPass == Pass::kLogSumExp) {
        const int64_t cell = (p.chunks + block) * p.Bp * p.Ap + at;
        const T top = p.running_max[cell], most = logit > top ? logit : top;
        p.running_sum[cell] = p.running_sum[cell] * exp2(top - most) + exp2(logit - most);
        p.running_max[cell] = most;
      } else {
        T g;
        if constexpr (kPass == Pass::kNce) {
          LossProduct<T> product;
          g = softplus<Precision::kF32>(logit, product);
          total[0] += product.take();
        } else {
          g = exp2(logit);
        }
        const T inverse_u = p.inverse[at], c = g * slope;
        total[1] += g, total[2] += g * along * inverse * inverse_u;
        s.c[i] = c;
        s.e[i] = c * along * inverse_u * inverse_u;
        s.f[i] = c * along * inverse * inverse;
      }
    }
    __syncthreads();
    if (kPass != Pass::kLogSumExp && (p.need_query || p.need_anchor || p.d_rows))
      for (int64_t d = threadIdx.x; d < p.D; d += kDifferenceThreads) {
        const T m = bank_element(p, row, d);
        T d_row = 0;
        for (int i = 0; i < count; ++i) {
          const int64_t query = s.at[i] / p.Ap, anchor = s.at[i] % p.Ap;
          const T w = m - p.anchor[anchor * p.D + d] + p.eps;
          const T u = difference_of(p, p.query, query, anchor, d);
          const T d_u = s.c[i] * w - s.e[i] * u, d_w = s.c[i] * u - s.f[i] * w;
          if (p.need_query) d_query[query * p.D + d] += d_u;
          if (p.need_anchor) d_anchor[anchor * p.D + d] += d_u + d_w;
          d_row += d_w;
        }
        if (p.d_rows) p.d_rows[entry * p.D + d] += d_row;
      }
    __syncthreads();
  };

  // near pairs of the entry's query, or of all
  const auto near_from = [&](int64_t entry) { return p.near_begin[p.own ? entry / p.count : 0]; };
  const auto near_to = [&](int64_t entry) {
    return p.near_begin[p.own ? entry / p.count + 1 : p.B];
  };
  const int64_t last = entries * (block + 1) / p.exact_blocks;
  for (int64_t start = entries * block / p.exact_blocks; start < last;
       start += kDifferenceThreads) {
    const int64_t candidate = start + threadIdx.x;
    bool hit = candidate < last && near_from(candidate) < near_to(candidate);
    for (int64_t i = 0; candidate < last && i < words; ++i)
      hit |= p.near_key[i * entries + candidate] != 0;
    int hits = 0;
    const int place = place_in_list(hit, s.of_warps, hits);
    if (hit) s.entry[place] = candidate;
    __syncthreads();
    for (int at_hit = 0; at_hit < hits; ++at_hit) {
      const int64_t entry = s.entry[at_hit];
      const int64_t own = p.own ? entry / p.count : 0, k = p.own ? entry % p.count : entry;
      const int64_t row = row_of(p, own, p.first + k);
      const int64_t near_last = near_to(entry);
      for (int64_t first = near_from(entry); first < near_last; first += kDifferenceThreads) {
        const int64_t i = first + threadIdx.x;
        const int64_t at = i < near_last ? p.near_pair[i] : 0, b = at / p.Ap, a = at % p.Ap;
        const uint64_t word = p.near_key[a / kDifferenceChunk<T> * entries + entry];
        const bool near_key_too = word >> a % kDifferenceChunk<T> & 1;  // its turn comes below
        work_off(entry, k, row, i < near_last && !near_key_too, a, b);
      }
      for (int64_t i = 0; i < words; ++i)
        for (uint64_t word = p.near_key[i * entries + entry]; word != 0; word &= word - 1) {
          const int64_t a = i * kDifferenceChunk<T> + __popcll((word & -word) - 1);
          const int64_t queries = p.own ? 1 : p.B;
          for (int64_t first = 0; first < queries; first += kDifferenceThreads) {
            const int64_t b = p.own ? own : first + threadIdx.x;
            const bool present = first + threadIdx.x < queries;
            work_off(entry, k, row, present, a, present ? b : 0);
          }
        }
    }
    __syncthreads();
  }
  if constexpr (kPass == Pass::kLogSumExp) return;
  block_sum<kDifferenceThreads>(total, s.scalars);
  if (threadIdx.x != 0) return;
  double* out = p.scalars + 3 * (words * p.groups * p.chunks + block);
  for (int i = 0; i < 3; ++i) out[i] = p.accumulate ? out[i] + total[i] : total[i];
}

// A thread an element of the gradients of queries, positives and anchors. The positives' part goes
// last: it is the large term of a sum of many small ones.
template <typename T>
__global__ void __launch_bounds__(kDifferenceThreads) difference_finish(DifferenceParams<T> p) {
  const int64_t at = int64_t(blockIdx.x) * kDifferenceThreads + threadIdx.x;
  const int64_t row = at / p.D, d = at % p.D;
  const auto terms = [&](int64_t b, int64_t a, T& u, T& d_u, T& d_v) {
    const int64_t pair = b * p.Ap + a;
    u = difference_of(p, p.query, b, a, d);
    const T v = difference_of(p, p.positive, b, a, d);
    d_u = p.c_positive[pair] * v - p.e_positive[pair] * u;
    d_v = p.c_positive[pair] * u - p.f_positive[pair] * v;
  };
  T u, d_u, d_v;
  if (row < p.B) {
    T negatives = 0, pull = 0, positive = 0;
    for (int64_t a = 0; a < p.A; ++a) {
      terms(row, a, u, d_u, d_v);
      const int64_t pair = row * p.Ap + a;
      if (p.c) negatives -= p.c[pair] * p.anchor_seen[a * p.D + d] + p.e[pair] * u;
      pull += d_u;
      positive += d_v;
    }
    if (p.out_query)
      p.out_query[at] = (p.total_query ? p.total_query[at] + negatives : negatives) + pull;
    if (p.out_positive) p.out_positive[at] = positive;
  } else if (row < p.B + p.A && p.out_anchor) {
    const int64_t a = row - p.B, cell = a * p.D + d;
    T negatives = 0, pull = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      terms(b, a, u, d_u, d_v);
      const int64_t pair = b * p.Ap + a;
      if (p.c) negatives += (p.c[pair] - p.e[pair]) * u;
      pull += d_u + d_v;
    }
    if (p.total_anchor) negatives += p.total_anchor[cell] - p.anchor_seen[cell] * p.total_y[a];
    p.out_anchor[cell] = -(negatives + pull);
  }
}

template <typename T>
void launch_pairs(const DifferenceParams<T>& p, void* stream) {
  const auto blocks = (p.A * p.B + kDifferenceWarps - 1) / kDifferenceWarps;
  gpu::launch("difference_pairs", difference_pairs<T>, dim3(static_cast<unsigned>(blocks)),
              dim3(kDifferenceThreads), 0, stream, p);
}

template <typename T>
void launch_near(const DifferenceParams<T>& p, void* stream) {
  gpu::launch("difference_near", difference_near<T>, dim3(static_cast<unsigned>(p.B)),
              dim3(kDifferenceThreads), 0, stream, p);
}

template <typename T>
void launch_finish(const DifferenceParams<T>& p, void* stream) {
  const auto blocks = ((p.A + p.B) * p.D + kDifferenceThreads - 1) / kDifferenceThreads;
  gpu::launch("difference_finish", difference_finish<T>, dim3(static_cast<unsigned>(blocks)),
              dim3(kDifferenceThreads), 0, stream, p);
}

template <Precision kPrecision, Pass kPass>
void launch_pass(const DifferenceParams<SumOf<kPrecision>>& p, void* stream) {
  if (p.own)
    launch_tiles<kPrecision, true, kPass>(p, stream);
  else
    launch_tiles<kPrecision, false, kPass>(p, stream);
  gpu::launch("difference_exact", difference_exact<SumOf<kPrecision>, kPass>,
              dim3(static_cast<unsigned>(p.exact_blocks)), dim3(kDifferenceThreads), 0, stream, p);
}

}  // namespace

template <Precision kPrecision>
void DifferenceKernels<kPrecision>::pairs(const Params& params, void* stream) {
  launch_pairs(params, stream);
}

template <Precision kPrecision>
void DifferenceKernels<kPrecision>::near(const Params& params, void* stream) {
  launch_near(params, stream);
}

template <Precision kPrecision>
void DifferenceKernels<kPrecision>::segment(const Params& params, void* stream) {
  switch (params.pass) {
    case Pass::kNce:
      return launch_pass<kPrecision, Pass::kNce>(params, stream);
    case Pass::kLogSumExp:
      return launch_pass<kPrecision, Pass::kLogSumExp>(params, stream);
    case Pass::kSoftmax:
      return launch_pass<kPrecision, Pass::kSoftmax>(params, stream);
  }
}

template <Precision kPrecision>
void DifferenceKernels<kPrecision>::finish(const Params& params, void* stream) {
  launch_finish(params, stream);
}

}  // namespace crrcd::cuda
