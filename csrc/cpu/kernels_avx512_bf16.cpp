#if defined(__x86_64__)
#define CRRCD_ISA_NAMESPACE avx512_bf16
#define CRRCD_ISA_NAME "avx512_bf16"
#define CRRCD_VECTOR_BYTES 64
#define CRRCD_TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,bmi,bmi2"
#define CRRCD_BF16_PAIRS
#include "kernel_set.h"
#endif
