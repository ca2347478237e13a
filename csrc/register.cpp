// The compiled module: kernels of the crrcd:: operators for their keys (their schemas are in
// crrcd_ext/_schema.py), and through pybind11 what is no operator.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "aten.h"
#include "cpu/bank_update.h"
#include "cpu/difference_nce.h"
#include "cpu/host.h"
#include "cpu/instance_nce.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "cpu/relation.h"
#include "cpu/relation_nce.h"
#include "cpu/sampling.h"
#include "cpu/similar_mask.h"
#include "cuda/relation_plan.h"
#if CRRCD_WITH_CUDA
#include "cuda/bank_update.h"
#include "cuda/difference_nce.h"
#include "cuda/instance_nce.h"
#include "cuda/relation.h"
#include "cuda/relation_nce.h"
#include "cuda/similar_mask.h"
#endif

// An operator, since what traces a call would leave out the numbers that a plain function writes.
TORCH_LIBRARY(crrcd_counter, m) {
  m.def("uniform_index(Tensor seed, Tensor step, int count, int bound) -> Tensor");
}
TORCH_LIBRARY_IMPL(crrcd_counter, CPU, m) { m.impl("uniform_index", crrcd::uniform_index); }
TORCH_LIBRARY_IMPL(crrcd_counter, Meta, m) {
  m.impl("uniform_index", [](const at::Tensor& seed, const at::Tensor&, int64_t count, int64_t) {
    return at::empty({count}, seed.options().dtype(at::kLong));
  });
}

TORCH_LIBRARY_IMPL(crrcd, CPU, m) {
  m.impl("relation", crrcd::relation_cpu);
  m.impl("relation_backward", crrcd::relation_backward_cpu);
  m.impl("relation_nce", crrcd::relation_nce_cpu);
  m.impl("relation_nce_", crrcd::relation_nce_update_cpu);
  m.impl("instance_nce", crrcd::instance_nce_cpu);
  m.impl("instance_nce_", crrcd::instance_nce_update_cpu);
  m.impl("difference_nce", crrcd::difference_nce_cpu);
  m.impl("difference_nce_", crrcd::difference_nce_update_cpu);
  m.impl("similar_mask", crrcd::similar_mask_cpu);
  m.impl("bank_update_", crrcd::bank_update_cpu);
}

#if CRRCD_WITH_CUDA
TORCH_LIBRARY_IMPL(crrcd, CUDA, m) {
  m.impl("relation", crrcd::cuda::relation);
  m.impl("relation_backward", crrcd::cuda::relation_backward);
  m.impl("relation_nce", crrcd::cuda::relation_nce);
  m.impl("relation_nce_", crrcd::cuda::relation_nce_update);
  m.impl("instance_nce", crrcd::cuda::instance_nce);
  m.impl("instance_nce_", crrcd::cuda::instance_nce_update);
  m.impl("difference_nce", crrcd::cuda::difference_nce);
  m.impl("difference_nce_", crrcd::cuda::difference_nce_update);
  m.impl("similar_mask", crrcd::cuda::similar_mask);
  m.impl("bank_update_", crrcd::cuda::bank_update);
}
#endif

namespace {

namespace py = pybind11;

std::vector<std::string> isa_available() {
  std::vector<std::string> names;
  for (const crrcd::Kernels* k : crrcd::available_kernels()) names.emplace_back(k->isa);
  return names;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = CRRCD_COMPILER;
  info["torch"] = CRRCD_TORCH_VERSION;
  info["cuda"] = CRRCD_WITH_CUDA != 0;
  info["debug"] = CRRCD_DEBUG != 0;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

py::dict plan(int64_t anchors, int64_t queries, int64_t keys, int64_t hidden, int64_t relation_dim,
              int64_t bank_dim, const std::string& dtype, int64_t need,
              std::optional<int64_t> threads) {
  if (dtype != "float64" && dtype != "float32" && dtype != "bfloat16")
    throw py::value_error("crrcd_ext.plan: dtype: expected float64, float32 or bfloat16, got " +
                          dtype);
  const int64_t used = threads.value_or(at::get_num_threads());
  const auto describe = [&](auto p, auto scratch_bytes) {
    const crrcd::Kernels& kernels = crrcd::active_kernels();
    if constexpr (sizeof(p.scale) == 4) p.pairs = dtype == "bfloat16" && kernels.bf16_pairs;
    crrcd::describe(p, anchors, queries, keys, hidden, relation_dim, bank_dim,
                    crrcd::needs_of(need), used, kernels);
    p.projected = false;
    static const char* const forms[] = {"gram", "triangular", "direct"};
    py::dict out;
    out["form"] = forms[static_cast<int>(p.form)];
    out["tile"] = p.tile;
    out["tiles_per_chunk"] = p.tiles_per_chunk;
    out["key_parts"] = p.key_parts;
    out["anchor_parts"] = p.anchor_parts;
    out["scratch_bytes"] = p.key_parts * p.anchor_parts * (kernels.*scratch_bytes)(p);
    out["sum_bytes"] = crrcd::sum_bytes(p, (need & crrcd::kNeedBank) != 0);
    return out;
  };
  return dtype == "float64" ? describe(crrcd::NceParams<double>(), &crrcd::Kernels::nce_scratch_f64)
                            : describe(crrcd::NceParams<float>(), &crrcd::Kernels::nce_scratch_f32);
}

// Also in a build without CUDA kernels: it is asked before there is a GPU.
py::dict gpu_plan(int64_t shared_block, int64_t shared_processor, int64_t processors, int64_t cache,
                  int64_t precision, int64_t anchors, int64_t queries, int64_t keys, int64_t hidden,
                  int64_t relation_dim, bool d_query, bool d_keys, bool d_anchor, bool d_weight) {
  using namespace crrcd::cuda;
  RelationShape shape{
      static_cast<Precision>(precision), anchors, queries, keys, hidden, relation_dim};
  shape.weight = d_weight, shape.keys = d_keys, shape.anchor = d_anchor;
  const bool direct = is_direct(shape.precision);
  shape.query = d_query || (d_weight && !direct);
  const RelationPlan plan =
      plan_relation(shape, {shared_block, shared_processor, processors, cache});
  py::dict out;
  out["fits"] = plan.fits;
  if (!plan.fits) return out;
  out["segment"] = plan.segment;
  out["work_bytes"] = plan.work_bytes;
  const auto pass = [&](const char* name, const char* form, int64_t warps, int64_t tile,
                        int64_t shared, int64_t blocks) {
    py::dict d;
    d["form"] = form;
    d["warps"] = warps;
    d["keys_of_a_tile"] = tile;
    d["shared_bytes"] = shared;
    d["blocks_a_multiprocessor"] = blocks;
    out[name] = d;
    return d;
  };
  py::dict logits = pass("logits", direct ? "direct" : "gram", plan.logit.warps, plan.logit.keys(),
                         plan.logit.bytes(), plan.logit_blocks);
  logits["stages"] = plan.logit.stages;
  logits["resident"] = static_cast<int>(plan.logit.resident);
  logits["chunks"] = plan.chunks;
  if (d_keys || d_anchor || (d_weight && direct)) {
    py::dict d = direct ? pass("keys", "direct", plan.direct.warps, plan.direct.keys(),
                               plan.direct.bytes(), plan.key_blocks)
                        : pass("keys", "gram", plan.key.warps, plan.key.keys(), plan.key.bytes(),
                               plan.key_blocks);
    if (!direct) {
      d["resident"] = static_cast<int>(plan.key.resident);
      d["first"] = static_cast<int>(plan.keys_first);
    }
    d["key_parts"] = plan.key_parts;
    d["anchor_parts"] = plan.anchor_parts;
  }
  if (d_weight && !direct) {
    py::dict d = pass("weight", "gram", GramLayout::kWarps, plan.gram.keys, plan.gram.bytes(),
                      plan.gram_blocks);
    d["stages"] = plan.gram.stages;
    d["chunks"] = plan.gram_chunks;
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("isa_available", &isa_available,
        "Instruction sets of this build that this processor can run, best first.");
  m.def(
      "isa_active", [] { return std::string(crrcd::active_kernels().isa); },
      "The instruction set in use: forced, else CRRCD_CPU_ISA, else the best.");
  m.def(
      "set_isa",
      [](const std::optional<std::string>& isa) { crrcd::force_kernels(isa.value_or("")); },
      py::arg("isa"), "Force an instruction set by name, or None to undo that.");
  m.def("build_info", &build_info, "Compiler, torch version and switches of this build.");
  m.def("num_threads", [] { return at::get_num_threads(); }, "Threads that an operator uses.");
  m.def("set_poison", &crrcd::set_poison, py::arg("on"),
        "Fill scratch memory with NaN before use, to find reads of what was never written.");
  m.def(
      "set_instance_order",
      [](const std::optional<std::string>& order) {
        crrcd::set_instance_order(order.value_or(""));
      },
      py::arg("order"),
      "Force the order of each query's own negatives in instance_nce, \"direct\" or \"bucketed\", "
      "or None to undo that.");
  m.def("plan", &plan, py::arg("anchors"), py::arg("queries"), py::arg("keys"), py::arg("hidden"),
        py::arg("relation_dim"), py::arg("bank_dim"), py::arg("dtype") = "float32",
        py::arg("need") = 511, py::arg("threads") = py::none(),
        "How relation_nce would cut up a call of these sizes, and the work space that it would "
        "take.");
  m.def("gpu_plan", &gpu_plan, "The same on a GPU with these limits, see crrcd_ext._plan.");
}
