// What code for both the CPU and CUDA says before its functions.
#pragma once

#ifdef __CUDACC__
#define QUANTIZE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QUANTIZE_HOST_DEVICE inline __attribute__((always_inline))
#endif
