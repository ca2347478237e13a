#include "kernels.h"
#ifdef CRRCD_HAS_AMX
#define CRRCD_ISA_NAMESPACE amx_bf16
#define CRRCD_ISA_NAME "amx_bf16"
#define CRRCD_VECTOR_BYTES 64
#define CRRCD_TARGET \
  "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,bmi,bmi2,amx-tile,amx-bf16"
#define CRRCD_BF16_PAIRS
#define CRRCD_TILE_REGISTERS
#include "kernel_set.h"
#endif
