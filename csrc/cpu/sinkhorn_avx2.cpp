#include <immintrin.h>

#include <limits>

#include "cpu/sinkhorn.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define FEWSTEP_ISA avx2
#define FEWSTEP_VECTOR_BYTES 32
#define FEWSTEP_ROWS 4
#include "cpu/sinkhorn.inl"
#endif
