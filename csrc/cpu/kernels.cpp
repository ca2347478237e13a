#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace crrcd {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("bmi2");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::kernels());
  if (avx512) found.push_back(&avx512::kernels());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    found.push_back(&avx2::kernels());
#endif
  found.push_back(&baseline::kernels());
  return found;
}

namespace {

std::atomic<const Kernels*> forced{nullptr};

const Kernels& by_name(const std::string& isa, const char* origin) {
  std::string names;
  for (const Kernels* k : available_kernels()) {
    if (isa == k->isa) return *k;
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  throw std::runtime_error("crrcd_ext: " + std::string(origin) + ": instruction set \"" + isa +
                           "\" is not available on this processor; available: " + names);
}

}  // namespace

const Kernels& active_kernels() {
  if (const Kernels* k = forced.load()) return *k;
  static const Kernels* const best = available_kernels().front();
  const char* wanted = std::getenv("CRRCD_CPU_ISA");
  return wanted && *wanted ? by_name(wanted, "CRRCD_CPU_ISA") : *best;
}

void force_kernels(const std::string& isa) {
  forced.store(isa.empty() ? nullptr : &by_name(isa, "set_isa"));
}

}  // namespace crrcd
