// Marks a function that host, kernels and planner call. A header of its own, so that it means the
// same whichever of them includes the layouts first.
#pragma once

#ifdef __CUDACC__
#define CRRCD_BOTH __host__ __device__ constexpr
#else
#define CRRCD_BOTH constexpr
#endif
