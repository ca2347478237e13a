#include "similar_mask.h"

#include <ATen/Parallel.h>

#include "../aten.h"
#include "../checks.h"
#include "host.h"
#include "kernels.h"
#include "similar_params.h"

namespace crrcd {

namespace {

constexpr const char* kOp = "similar_mask";

template <typename T>
struct Functions;
template <>
struct Functions<float> {
  static constexpr auto scratch = &Kernels::instance_scratch_f32;
  static constexpr auto run = &Kernels::similar_f32;
};
template <>
struct Functions<double> {
  static constexpr auto scratch = &Kernels::instance_scratch_f64;
  static constexpr auto run = &Kernels::similar_f64;
};

// Bits of the rows that `index` [B, K] names, of those of all rows.
at::Tensor picked(const SimilarArguments& x, const at::Tensor& all) {
  const at::Tensor bits = at::empty({x.B, x.words()}, all.options());
  const int64_t* index = x.index.const_data_ptr<int64_t>();
  const int64_t stride = x.index.stride(0), step = x.index.stride(1), words = x.words();
  const int32_t* from = all.const_data_ptr<int32_t>();
  auto* to = reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>());
  at::parallel_for(0, x.B * words, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / words, first = at % words * 32;
      const Excluded of_query{reinterpret_cast<const uint32_t*>(from) + b * all.size(1), 0};
      uint32_t word = 0;
      for (int64_t i = 0; i < 32 && first + i < x.K; ++i)
        word |= uint32_t(of_query.at(0, index[b * stride + (first + i) * step])) << i;
      to[at] = word;
    }
  });
  return bits;
}

template <typename T>
at::Tensor similar(const SimilarArguments& x) {
  const Kernels& kernels = active_kernels();
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const int64_t lanes = kernels.vector_bytes / static_cast<int64_t>(sizeof(T));
  SimilarParams<T> p;
  p.B = x.B, p.K = x.K, p.D = x.D, p.N = x.N;
  p.Bp = round_up(x.B, lanes), p.Dp = round_up(x.D, lanes);
  p.ldB = leading_dimension(p.Bp, sizeof(T)), p.ldD = leading_dimension(p.Dp, sizeof(T));
  p.threshold = static_cast<T>(x.threshold);
  p.words = x.words();
  const at::Tensor bank = x.bank.stride(1) == 1 || x.D == 1 ? x.bank : x.bank.contiguous();
  p.bank.data = bank.const_data_ptr();
  p.bank.storage = storage_of(kOp, bank);
  p.bank.row_stride = bank.stride(0);
  if (x.index.defined()) check_rows(kOp, "index", x.index, x.N);
  // In tiles a product takes a tenth of the time that one with a row at random takes.
  if (x.own() && p.Bp * x.N <= 8 * x.B * x.K) {
    SimilarArguments all = x;
    all.index = at::Tensor(), all.K = x.N;
    return picked(x, similar<T>(all));
  }
  at::Tensor query;
  if (x.own()) {
    p.order = Order::kDirect;
    p.own = x.index.const_data_ptr<int64_t>();
    p.own_stride = x.index.stride(0), p.own_step = x.index.stride(1);
    query = padded(x.query, dtype, x.B, p.ldD);
    p.query = pointer<T>(query);
  } else {
    p.bank.index = pointer<int64_t>(x.index);
    query = padded(x.query.t(), dtype, x.D, p.ldB);
    p.query_t = pointer<T>(query);
    p.tile_registers = kernels.tile_registers && sizeof(T) == 4 &&
                       p.bank.storage == Storage::kBFloat16 && x.B >= kLeastQueries;
  }
  // a thread is not worth waking for less
  constexpr int64_t kProductsOfAPart = int64_t(1) << 18;
  const int64_t work = x.B * x.K * std::max<int64_t>(x.D, 16) / kProductsOfAPart;
  p.parts = std::clamp<int64_t>(work, 1, at::get_num_threads());

  const at::Tensor bits = at::empty({x.B, p.words}, x.query.options().dtype(at::kInt));
  p.bits = reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>());
  if (bits.numel() == 0) return bits;
  p.scratch_bytes = (kernels.*Functions<T>::scratch)(p);
  const at::Tensor memory = scratch(p.parts * static_cast<int64_t>(p.scratch_bytes));
  p.scratch = static_cast<std::byte*>(memory.mutable_data_ptr());
  const auto function = kernels.*Functions<T>::run;
  at::parallel_for(0, p.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) function(p, part);
  });
  return bits;
}

}  // namespace

at::Tensor similar_mask_cpu(const at::Tensor& query, const at::Tensor& bank,
                            const std::optional<at::Tensor>& index, double threshold) {
  const SimilarArguments x = similar_arguments(query, bank, index, threshold);
  return query.scalar_type() == at::kDouble ? similar<double>(x) : similar<float>(x);
}

}  // namespace crrcd
