// Vectors of one instruction set and the two transcendental functions that Sinkhorn needs, in base 2.
// Include after FEWSTEP_BEGIN_ISA of unit.h; what is included here would be compiled for the instruction set too.
#pragma once

#define FEWSTEP_INLINE inline __attribute__((always_inline))

namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using Int = int32_t;
  typedef float Vec __attribute__((vector_size(FEWSTEP_VECTOR_BYTES)));
  typedef int32_t IntVec __attribute__((vector_size(FEWSTEP_VECTOR_BYTES)));
  static constexpr int kMantissa = 23, kBias = 127, kLogTerms = 5;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kMaxExponent = 127.0f;
  // Degree 5, p(0) = 1, relative error 9.2e-8 on [-1/2, 1/2].
  static constexpr float kExp2[] = {1.0f, 0.693147f, 0.24022242f, 0.055507336f, 0.009671513f, 0.0013264727f};
};

template <>
struct Simd<double> {
  using Int = int64_t;
  typedef double Vec __attribute__((vector_size(FEWSTEP_VECTOR_BYTES)));
  typedef int64_t IntVec __attribute__((vector_size(FEWSTEP_VECTOR_BYTES)));
  static constexpr int kMantissa = 52, kBias = 1023, kLogTerms = 11;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMaxExponent = 1023.0;
  // Taylor: (ln 2)^n / n!, relative error 1e-17 on [-1/2, 1/2].
  static constexpr double kExp2[] = {1.0,
                                     6.931471805599453094e-01,
                                     2.402265069591007123e-01,
                                     5.550410866482157995e-02,
                                     9.618129107628477162e-03,
                                     1.333355814642844342e-03,
                                     1.540353039338160995e-04,
                                     1.525273380405984028e-05,
                                     1.321548679014430949e-06,
                                     1.017808600923969973e-07,
                                     7.054911620801123330e-09,
                                     4.445538271870811498e-10,
                                     2.567843599348820514e-11,
                                     1.369148885390412888e-12};
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using IntVec = typename Simd<T>::IntVec;
template <class T>
constexpr int kLanes = FEWSTEP_VECTOR_BYTES / sizeof(T);

template <class T>
FEWSTEP_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
FEWSTEP_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class T>
FEWSTEP_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

// The larger of each lane; NaN in v wins.
template <class T>
FEWSTEP_INLINE Vec<T> at_least(T low, Vec<T> v) {
#if FEWSTEP_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return _mm512_max_ps(splat(low), v);
  } else {
    return _mm512_max_pd(splat(low), v);
  }
#elif FEWSTEP_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    return _mm256_max_ps(splat(low), v);
  } else {
    return _mm256_max_pd(splat(low), v);
  }
#else
  return v < low ? splat(low) : v;
#endif
}

template <class T>
FEWSTEP_INLINE T sum(Vec<T> v) {
#if FEWSTEP_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return _mm512_reduce_add_ps(v);
  } else {
    return _mm512_reduce_add_pd(v);
  }
#else
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
#endif
}

template <class T>
FEWSTEP_INLINE T maximum(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// Lane i is the sum of v[i]: a tree of pairwise shuffles, three instructions for each vector.
template <class T>
FEWSTEP_INLINE Vec<T> sum_each(Vec<T> (&v)[kLanes<T>]) {
#if FEWSTEP_VECTOR_BYTES == 64
  __m512d pairs[8];  // per 128 bits: sums of 4 vectors of float or 2 of double
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 8; ++i) {
      const __m512 even = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), odd = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
      pairs[i] = _mm512_castps_pd(even + odd);
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d even = _mm512_unpacklo_pd(pairs[2 * i], pairs[2 * i + 1]);
      const __m512d odd = _mm512_unpackhi_pd(pairs[2 * i], pairs[2 * i + 1]);
      pairs[i] = _mm512_castps_pd(_mm512_castpd_ps(even) + _mm512_castpd_ps(odd));
    }
    __m512 q[4];
    for (int i = 0; i < 4; ++i) q[i] = _mm512_castpd_ps(pairs[i]);
    for (int i = 0; i < 2; ++i) {
      q[i] = _mm512_shuffle_f32x4(q[2 * i], q[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(q[2 * i], q[2 * i + 1], 0xdd);
    }
    return _mm512_shuffle_f32x4(q[0], q[1], 0x88) + _mm512_shuffle_f32x4(q[0], q[1], 0xdd);
  } else {
    for (int i = 0; i < 4; ++i) {
      pairs[i] = _mm512_unpacklo_pd(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_pd(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      const __m512d a = pairs[2 * i], b = pairs[2 * i + 1];
      pairs[i] = _mm512_shuffle_f64x2(a, b, 0x88) + _mm512_shuffle_f64x2(a, b, 0xdd);
    }
    return _mm512_shuffle_f64x2(pairs[0], pairs[1], 0x88) + _mm512_shuffle_f64x2(pairs[0], pairs[1], 0xdd);
  }
#elif FEWSTEP_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    __m256d q[4];
    for (int i = 0; i < 4; ++i) {
      q[i] = _mm256_castps_pd(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    }
    __m256 lanes[2];
    for (int i = 0; i < 2; ++i) {
      lanes[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(q[2 * i], q[2 * i + 1])) +
                 _mm256_castpd_ps(_mm256_unpackhi_pd(q[2 * i], q[2 * i + 1]));
    }
    return _mm256_permute2f128_ps(lanes[0], lanes[1], 0x20) + _mm256_permute2f128_ps(lanes[0], lanes[1], 0x31);
  } else {
    const __m256d a = _mm256_unpacklo_pd(v[0], v[1]) + _mm256_unpackhi_pd(v[0], v[1]);
    const __m256d b = _mm256_unpacklo_pd(v[2], v[3]) + _mm256_unpackhi_pd(v[2], v[3]);
    return _mm256_permute2f128_pd(a, b, 0x20) + _mm256_permute2f128_pd(a, b, 0x31);
  }
#else
  Vec<T> out = {};
  for (int i = 0; i < kLanes<T>; ++i) out[i] = sum<T>(v[i]);
  return out;
#endif
}

// Lanes of vectors a and, counted from kLanes on, b that an exchange of blocks of `half` lanes takes.
template <class T>
struct Exchange {
  alignas(64) typename Simd<T>::Int low[kLanes<T>], high[kLanes<T>];

  constexpr explicit Exchange(int half) : low(), high() {
    for (int j = 0; j < kLanes<T>; ++j) {
      low[j] = (j & half) != 0 ? kLanes<T> + j - half : j;
      high[j] = low[j] + half;
    }
  }
};

// Lane j of v[i] becomes lane i of v[j].
template <int kHalf, class T>
FEWSTEP_INLINE void transpose(Vec<T> (&v)[kLanes<T>]) {
  static constexpr Exchange<T> kLanesOf(kHalf);
  IntVec<T> low, high;
  __builtin_memcpy(&low, kLanesOf.low, sizeof(low));
  __builtin_memcpy(&high, kLanesOf.high, sizeof(high));
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((i & kHalf) != 0) continue;
    const Vec<T> a = v[i], b = v[i + kHalf];
#ifdef __clang__
    for (int j = 0; j < kLanes<T>; ++j) {
      v[i][j] = (j & kHalf) != 0 ? b[j - kHalf] : a[j];
      v[i + kHalf][j] = (j & kHalf) != 0 ? b[j] : a[j + kHalf];
    }
#else
    v[i] = __builtin_shuffle(a, b, low);
    v[i + kHalf] = __builtin_shuffle(a, b, high);
#endif
  }
  if constexpr (kHalf > 1) transpose<kHalf / 2, T>(v);
}

#if FEWSTEP_VECTOR_BYTES == 64
FEWSTEP_INLINE Vec<float> nearest(Vec<float> v) { return _mm512_roundscale_ps(v, 8); }
FEWSTEP_INLINE Vec<double> nearest(Vec<double> v) { return _mm512_roundscale_pd(v, 8); }
FEWSTEP_INLINE Vec<float> scale_by_power(Vec<float> v, Vec<float> n) { return _mm512_scalef_ps(v, n); }
FEWSTEP_INLINE Vec<double> scale_by_power(Vec<double> v, Vec<double> n) { return _mm512_scalef_pd(v, n); }
#endif

// 2^z for z >= low > -kMaxExponent, which the caller's floor makes sure of; saturates above, NaN stays NaN.
template <class T>
FEWSTEP_INLINE Vec<T> exp2(Vec<T> z) {
  using S = Simd<T>;
  constexpr int kDegree = sizeof(S::kExp2) / sizeof(T) - 1;
#if FEWSTEP_VECTOR_BYTES == 64
  const Vec<T> n = nearest(z);
#else
  z = z > S::kMaxExponent ? splat(S::kMaxExponent) : z;
  const Vec<T> shifted = z + S::kRound;
  const Vec<T> n = shifted - S::kRound;
#endif
  const Vec<T> r = z - n;  // [-1/2, 1/2]
  Vec<T> p = splat(S::kExp2[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) p = p * r + S::kExp2[i];
#if FEWSTEP_VECTOR_BYTES == 64
  return scale_by_power(p, n);
#else
  return (Vec<T>)((IntVec<T>)p + ((IntVec<T>)shifted << S::kMantissa));
#endif
}

// log2 of positive normal numbers: 2^e m with m in [sqrt(1/2), sqrt(2)), log m by the series of artanh.
template <class T>
FEWSTEP_INLINE Vec<T> log2(Vec<T> v) {
  using S = Simd<T>;
  constexpr T kInvLn2 = 1.4426950408889634074;
  constexpr typename S::Int kMask = (typename S::Int(1) << S::kMantissa) - 1;
  constexpr typename S::Int kHalfRoot = S::kMantissa == 23 ? 0x3504f3 : 0x6a09e667f3bcdLL;  // mantissa of sqrt(2)
  const IntVec<T> bits = (IntVec<T>)v;
  const IntVec<T> above = (bits & kMask) >= kHalfRoot ? IntVec<T>{} + 1 : IntVec<T>{};
  const IntVec<T> exponent = (bits >> S::kMantissa) - S::kBias + above;
  const Vec<T> m = (Vec<T>)(bits - (exponent << S::kMantissa));
  const Vec<T> t = (m - T(1)) / (m + T(1));
  const Vec<T> t2 = t * t;
  Vec<T> p = splat(T(1) / (2 * S::kLogTerms - 1));
#pragma GCC unroll 16
  for (int i = S::kLogTerms - 2; i >= 0; --i) p = p * t2 + T(1) / (2 * i + 1);
  const Vec<T> result = __builtin_convertvector(exponent, Vec<T>) + 2 * kInvLn2 * t * p;
  return v == v ? result : v;
}

template <int R, class T>
FEWSTEP_INLINE void log2_all(const T (&in)[R], T (&out)[R]) {
  for (int r = 0; r < R; r += kLanes<T>) {
    Vec<T> v = splat(T(1));
    for (int i = 0; i < kLanes<T> && r + i < R; ++i) v[i] = in[r + i];
    v = log2<T>(v);
    for (int i = 0; i < kLanes<T> && r + i < R; ++i) out[r + i] = v[i];
  }
}

struct Whole {
  static constexpr bool kWhole = true;
};
struct Part {
  static constexpr bool kWhole = false;
};

// body(Whole or Part, j, lanes) over a row of n.
template <class T, class Body>
FEWSTEP_INLINE void for_each_vector(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) body(Whole{}, j, int64_t(kLanes<T>));
  if (j < n) body(Part{}, j, n - j);
}

}  // namespace
}  // namespace fewstep::cpu::FEWSTEP_ISA
