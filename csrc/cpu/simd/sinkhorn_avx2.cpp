#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <limits>

#include "cpu/sinkhorn.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FEWSTEP_ISA avx2
#define FEWSTEP_VECTOR_BYTES 32
#define FEWSTEP_ROWS 4
#include "cpu/sinkhorn.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
