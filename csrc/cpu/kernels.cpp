#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef CRRCD_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace crrcd {

namespace {

#if defined(CRRCD_EMULATE_WIDE)  // tests/simd/wide.h
bool tiles_permitted() { return true; }
#elif defined(CRRCD_HAS_AMX)
// The processor has tiles of bfloat16 and the kernel of the system lets this process use them,
// which it wants to be asked for once (Documentation/arch/x86/xstate.rst in its sources).
bool tiles_permitted() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTileAndBf16 = 1u << 24 | 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTileAndBf16) != kTileAndBf16) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}
#endif

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("bmi2");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef CRRCD_HAS_AMX
  if (bf16 && tiles_permitted()) found.push_back(&amx_bf16::kernels());
#endif
  if (bf16) found.push_back(&avx512_bf16::kernels());
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
