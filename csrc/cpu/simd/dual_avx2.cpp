#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>

#include "cpu/dual.h"
#include "shared/philox.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FEWSTEP_ISA avx2
#define FEWSTEP_VECTOR_BYTES 32
#include "cpu/dual.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
