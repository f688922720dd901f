// Standard normals, kLanes<double> Philox blocks at a time. Include after math.h; shared/philox.h must be known.
#pragma once

namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

// The low 32 bits of each lane of a times those of b, 64 bits each.
FEWSTEP_INLINE IntVec<double> multiply_low(IntVec<double> a, IntVec<double> b) {
#if FEWSTEP_VECTOR_BYTES == 64
  return (IntVec<double>)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif FEWSTEP_VECTOR_BYTES == 32
  return (IntVec<double>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  constexpr int64_t kLow = 0xFFFFFFFF;
  for (int i = 0; i < kLanes<double>; ++i) a[i] = int64_t(uint64_t(a[i] & kLow) * uint64_t(b[i] & kLow));
  return a;
#endif
}

// sin and cos of 2 pi u for u in [0, 1]: a quarter turn exactly, then Taylor on [-pi/4, pi/4], within 1e-16.
FEWSTEP_INLINE void sine_cosine(Vec<double> u, Vec<double>& sine, Vec<double>& cosine) {
  constexpr double kHalfPi = 1.57079632679489661923, kRound = Simd<double>::kRound;
  const Vec<double> shifted = 4 * u + kRound, f = (4 * u - (shifted - kRound)) * kHalfPi, f2 = f * f;
  Vec<double> s = splat(1.0 / 355687428096000), c = splat(1.0 / 6402373705728000);  // 1/17!, 1/18!
  constexpr double kSine[] = {-1.0 / 1307674368000, 1.0 / 6227020800, -1.0 / 39916800, 1.0 / 362880,
                              -1.0 / 5040,          1.0 / 120,        -1.0 / 6,        1.0};
  constexpr double kCosine[] = {-1.0 / 20922789888000,
                                1.0 / 87178291200,
                                -1.0 / 479001600,
                                1.0 / 3628800,
                                -1.0 / 40320,
                                1.0 / 720,
                                -1.0 / 24,
                                1.0 / 2,
                                -1.0};
  c = -c;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) s = s * f2 + kSine[i];
  s = s * f;
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) c = c * f2 - kCosine[i];
  const IntVec<double> quarter = (IntVec<double>)shifted;
  const IntVec<double> odd = -(quarter & 1), minus_sine = (quarter & 2) << 62, minus_cosine = ((quarter + 1) & 2) << 62;
  const IntVec<double> si = (IntVec<double>)s, ci = (IntVec<double>)c;
  sine = (Vec<double>)(((si & ~odd) | (ci & odd)) ^ minus_sine);
  cosine = (Vec<double>)(((ci & ~odd) | (si & odd)) ^ minus_cosine);
}

// philox::normals of probe k for the blocks from `first` on: out[4 kLanes<double>].
FEWSTEP_INLINE void normals(const philox::Stream& s, uint32_t k, uint32_t first, double* out) {
  constexpr int kWide = kLanes<double>;
  constexpr int64_t kLow = 0xFFFFFFFF;
  const IntVec<double> zero = {};
  IntVec<double> c0 = zero, c1 = zero + int64_t(s.step), c2 = zero + int64_t(k | uint32_t(s.sample >> 32) << 16);
  IntVec<double> c3 = zero + int64_t(uint32_t(s.sample));
  for (int i = 0; i < kWide; ++i) c0[i] = int64_t((first + uint32_t(i)) | s.stage << 28);
  uint32_t key0 = uint32_t(s.seed), key1 = uint32_t(s.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const IntVec<double> p0 = multiply_low(c0, zero + 0xD2511F53), p1 = multiply_low(c2, zero + 0xCD9E8D57);
    // Words stay in the low halves; the arithmetic shift's sign bits are cut off where they would be seen.
    c0 = ((p1 >> 32) & kLow) ^ c1 ^ int64_t(key0);
    c1 = p1 & kLow;
    c2 = ((p0 >> 32) & kLow) ^ c3 ^ int64_t(key1);
    c3 = p0 & kLow;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  constexpr double kUnit = 1.0 / 4294967296.0, kMinus2Ln2 = -1.38629436111989061883;
  const IntVec<double> words[4] = {c0, c1, c2, c3};
  for (int i = 0; i < 4; i += 2) {
    const Vec<double> u = (__builtin_convertvector(words[i], Vec<double>) + 0.5) * kUnit;
    const Vec<double> v = (__builtin_convertvector(words[i + 1], Vec<double>) + 0.5) * kUnit;
    Vec<double> radius = kMinus2Ln2 * log2<double>(u), sine, cosine;
    for (int j = 0; j < kWide; ++j) radius[j] = __builtin_sqrt(radius[j]);
    sine_cosine(v, sine, cosine);
    sine *= radius;
    cosine *= radius;
    for (int j = 0; j < kWide; ++j) {
      out[4 * j + i] = cosine[j];
      out[4 * j + i + 1] = sine[j];
    }
  }
}

}  // namespace
}  // namespace fewstep::cpu::FEWSTEP_ISA
