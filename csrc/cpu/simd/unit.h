// How a body (../*.inl) is compiled for one instruction set. A unit defines FEWSTEP_AVX2, FEWSTEP_AVX512 or neither and
// includes the body. That one includes all headers, this one among them, before FEWSTEP_BEGIN_ISA: what they define is
// for every CPU. It ends with FEWSTEP_END_ISA.
#pragma once

#if defined(FEWSTEP_AVX512)
#define FEWSTEP_ISA avx512
#define FEWSTEP_VECTOR_BYTES 64
#define FEWSTEP_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#elif defined(FEWSTEP_AVX2)
#define FEWSTEP_ISA avx2
#define FEWSTEP_VECTOR_BYTES 32
#define FEWSTEP_TARGET "avx2,fma"
#else
#define FEWSTEP_ISA base
#define FEWSTEP_VECTOR_BYTES 16
#endif

#ifndef FEWSTEP_TARGET
#define FEWSTEP_BEGIN_ISA
#define FEWSTEP_END_ISA
#else
#include <immintrin.h>
#define FEWSTEP_PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
#define FEWSTEP_PUSH(target_) \
  FEWSTEP_PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
#define FEWSTEP_BEGIN_ISA FEWSTEP_PUSH(FEWSTEP_TARGET)
#define FEWSTEP_END_ISA FEWSTEP_PRAGMA(clang attribute pop)
#else
#define FEWSTEP_PUSH(target_) FEWSTEP_PRAGMA(GCC target(target_))
#define FEWSTEP_BEGIN_ISA FEWSTEP_PUSH(FEWSTEP_TARGET)
#define FEWSTEP_END_ISA
#endif
#endif
