#define CRRCD_ISA_NAMESPACE baseline
#define CRRCD_ISA_NAME "baseline"
#define CRRCD_VECTOR_BYTES 16
#include "kernel_set.h"
