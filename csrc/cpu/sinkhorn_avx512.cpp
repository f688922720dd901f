#include <immintrin.h>

#include <limits>

#include "cpu/sinkhorn.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define FEWSTEP_ISA avx512
#define FEWSTEP_VECTOR_BYTES 64
#define FEWSTEP_ROWS 8
#include "cpu/sinkhorn.inl"
#endif
