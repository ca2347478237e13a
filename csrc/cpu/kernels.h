// The instruction sets that this build has, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "relation_params.h"

// Compilers that know the tile registers (AMX), on systems that are asked for them.
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define CRRCD_HAS_AMX
#endif

namespace crrcd {

namespace baseline {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
#ifdef CRRCD_HAS_AMX
namespace amx_bf16 {
const Kernels& kernels();
}
#endif
namespace avx512_bf16 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

// Best first; only those that this processor can run.
std::vector<const Kernels*> available_kernels();

// The forced one, else CRRCD_CPU_ISA, else the best. Throws std::runtime_error naming what is
// available when the one asked for is not.
const Kernels& active_kernels();

// Forces one by name; an empty name returns to the environment's or the best.
void force_kernels(const std::string& isa);

}  // namespace crrcd
