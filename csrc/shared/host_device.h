// Functions that the host and CUDA devices compile.
#pragma once

#ifdef __CUDACC__
#define FEWSTEP_HD __host__ __device__ __forceinline__
#define FEWSTEP_HD_INLINED FEWSTEP_HD
// Register arrays need indices known at compile time.
#define FEWSTEP_UNROLL _Pragma("unroll")
#define FEWSTEP_ROLLED _Pragma("unroll 1")
#else
#define FEWSTEP_HD inline
// Inside the kernels of each instruction set of a CPU.
#define FEWSTEP_HD_INLINED inline __attribute__((always_inline))
#define FEWSTEP_UNROLL
#define FEWSTEP_ROLLED
#endif
