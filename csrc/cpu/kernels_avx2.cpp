#if defined(__x86_64__)
#define CRRCD_ISA_NAMESPACE avx2
#define CRRCD_ISA_NAME "avx2"
#define CRRCD_VECTOR_BYTES 32
#define CRRCD_TARGET "avx2,fma,bmi,bmi2"
#include "kernel_set.h"
#endif
