#if defined(__x86_64__)
#define CRRCD_ISA_NAMESPACE avx512
#define CRRCD_ISA_NAME "avx512"
#define CRRCD_VECTOR_BYTES 64
#define CRRCD_TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi,bmi2"
#include "kernel_set.h"
#endif
