#include "relation_arguments.h"

#include "aten.h"
#include "checks.h"

namespace crrcd {

RelationArguments relation_arguments(
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& anchor,
    const at::Tensor& bank, const at::Tensor& weight, const OptionalTensor& bias,
    const at::Tensor& scale, const at::Tensor& offset, const OptionalTensor& index,
    const OptionalTensor& key_weight, const OptionalTensor& anchor_id,
    const OptionalTensor& query_id, const OptionalTensor& key_id, const OptionalTensor& query_label,
    const OptionalTensor& key_label, const OptionalTensor& excluded, bool self_pairs,
    const std::string& objective, const OptionalTensor& weights, const std::string& reduction,
    int64_t need, bool with_half) {
  constexpr const char* kOp = "relation_nce";
  const auto given = [](const OptionalTensor& t) { return t ? *t : at::Tensor(); };
  RelationArguments x;
  TORCH_CHECK_VALUE(query.dim() == 3, "crrcd_ext.", kOp, ": query: expected shape [A, B, R], got ",
                    query.sizes());
  TORCH_CHECK_VALUE(bank.dim() == 2, "crrcd_ext.", kOp, ": bank: expected shape [N, D], got ",
                    bank.sizes());
  TORCH_CHECK_VALUE(anchor.dim() == 2, "crrcd_ext.", kOp, ": anchor: expected shape [A, H], got ",
                    anchor.sizes());
  x.A = query.size(0), x.B = query.size(1), x.R = query.size(2);
  x.H = anchor.size(1), x.N = bank.size(0), x.D = bank.size(1);
  CRRCD_CHECK_SHAPE(kOp, "positive", positive, {x.A, x.B, x.R});
  CRRCD_CHECK_SHAPE(kOp, "anchor", anchor, {x.A, x.H});
  CRRCD_CHECK_SHAPE(kOp, "weight", weight, {x.R, x.H});
  if (bias) CRRCD_CHECK_SHAPE(kOp, "bias", *bias, {x.R});
  if (key_weight) {
    CRRCD_CHECK_SHAPE(kOp, "key_weight", *key_weight, {x.H, x.D});
  } else {
    CRRCD_CHECK_SHAPE(kOp, "bank", bank, {x.N, x.H});
  }
  TORCH_CHECK_VALUE(objective == "nce" || objective == "infonce", "crrcd_ext.", kOp,
                    ": objective: expected \"nce\" or \"infonce\", got \"", objective, "\"");
  x.dtype = check_operands(
      kOp, {query, positive, anchor, weight, bias.value_or(weight), key_weight.value_or(weight)},
      with_half);
  x.query = query, x.positive = positive, x.anchor = anchor, x.bank = bank, x.weight = weight;
  x.bias = given(bias), x.scale = scale, x.offset = offset, x.key_weight = given(key_weight);
  x.K = x.N;
  if (index) {
    TORCH_CHECK_VALUE(index->dim() == 1, "crrcd_ext.", kOp, ": index: expected shape [K], got ",
                      index->sizes());
    TORCH_CHECK_TYPE(index->scalar_type() == at::kLong, "crrcd_ext.", kOp,
                     ": index: expected int64, got ", index->scalar_type());
    x.index = index->contiguous();
    x.K = index->size(0);
  }
  x.anchor_id = check_ids(kOp, "anchor_id", anchor_id, x.A);
  x.query_id = check_ids(kOp, "query_id", query_id, x.B);
  x.key_id = check_ids(kOp, "key_id", key_id, x.N);
  x.query_label = check_ids(kOp, "query_label", query_label, x.B);
  x.key_label = check_ids(kOp, "key_label", key_label, x.N);
  x.excluded = check_excluded(kOp, excluded, x.B, x.K);
  x.self_pairs = self_pairs;
  x.infonce = objective == "infonce";
  static_cast<Reduced&>(x) =
      check_reduction(kOp, weights, reduction, {x.A, x.B}, need, kNeedQuery | kNeedPositive);
  x.need = need;
  return x;
}

at::ScalarType check_relation(const at::Tensor& anchor, const at::Tensor& sample,
                              const at::Tensor& weight, const OptionalTensor& bias,
                              bool with_half) {
  constexpr const char* kOp = "relation";
  TORCH_CHECK_VALUE(weight.dim() == 2, "crrcd_ext.", kOp, ": weight: expected shape [R, H], got ",
                    weight.sizes());
  TORCH_CHECK_VALUE(anchor.dim() == 2, "crrcd_ext.", kOp, ": anchor: expected shape [A, H], got ",
                    anchor.sizes());
  TORCH_CHECK_VALUE(sample.dim() == 2, "crrcd_ext.", kOp, ": sample: expected shape [M, H], got ",
                    sample.sizes());
  CRRCD_CHECK_SHAPE(kOp, "anchor", anchor, {anchor.size(0), weight.size(1)});
  CRRCD_CHECK_SHAPE(kOp, "sample", sample, {sample.size(0), weight.size(1)});
  if (bias) CRRCD_CHECK_SHAPE(kOp, "bias", *bias, {weight.size(0)});
  return check_operands(kOp, {anchor, sample, weight, bias.value_or(weight)}, with_half);
}

at::Tensor nan_for_infinity(const at::Tensor& t) { return at::add(t, t, 0); }

at::Tensor pair_mask(int64_t anchors, int64_t queries, const at::Tensor& anchor_id,
                     const at::Tensor& query_id, bool self_pairs, at::Device device) {
  if (!self_pairs && anchor_id.defined() && query_id.defined())
    return anchor_id.unsqueeze(1).ne(query_id);
  at::Tensor mask =
      at::ones({anchors, queries}, at::TensorOptions().dtype(at::kBool).device(device));
  if (!self_pairs && !anchor_id.defined() && !query_id.defined() && anchors == queries)
    mask.fill_diagonal_(0);
  return mask;
}

}  // namespace crrcd
