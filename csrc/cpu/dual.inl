// Kernels of dual.h for one instruction set; see sinkhorn.inl for what may stand here.
#include "cpu/dual.h"
#include "cpu/simd/unit.h"
#include "shared/philox.h"

FEWSTEP_BEGIN_ISA

#include "cpu/simd/math.h"
#include "cpu/simd/product.h"

namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

template <class T>
FEWSTEP_INLINE Vec<T> load_part(const T* p, int64_t n) {
  Vec<T> v = {};
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}

// The whole vector at p, or its first n lanes.
template <bool kWhole, class T>
FEWSTEP_INLINE Vec<T> fetch(const T* p, int64_t n) {
  if constexpr (kWhole) return load(p);
  return load_part(p, n);
}

template <bool kWhole, class T>
FEWSTEP_INLINE void put(T* p, Vec<T> v, int64_t n) {
  if constexpr (kWhole) {
    store(p, v);
  } else {
    __builtin_memcpy(p, &v, n * sizeof(T));
  }
}

template <class T>
FEWSTEP_INLINE Vec<T> magnitude(Vec<T> v) {
  return (Vec<T>)((IntVec<T>)v & ~((IntVec<T>{} + 1) << (8 * int(sizeof(T)) - 1)));
}

// 1 / v for v in [1, 2]; in float32 with AVX-512 by an estimate and a Newton step, within 1e-7.
template <class T>
FEWSTEP_INLINE Vec<T> reciprocal(Vec<T> v) {
#if FEWSTEP_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const Vec<T> r = _mm512_rcp14_ps(v);
    return r * (T(2) - v * r);
  }
#endif
  return T(1) / v;
}

template <class T>
constexpr T kLowestExponent = sizeof(T) == 4 ? -120 : -1000;
template <class T>
constexpr T kLog2e = 1.4426950408889634074;

// e^-|v|
template <class T>
FEWSTEP_INLINE Vec<T> decay(Vec<T> v) {
  return exp2<T>(at_least<T>(kLowestExponent<T>, -magnitude<T>(v) * kLog2e<T>));
}

// e^z - 1 for z <= 0, without loss near 0, and e^z.
template <class T>
FEWSTEP_INLINE Vec<T> expm1(Vec<T> z, Vec<T>& e) {
  using S = Simd<T>;
  constexpr int kDegree = sizeof(S::kExp2) / sizeof(T) - 1;
  const Vec<T> y = at_least<T>(kLowestExponent<T>, z * kLog2e<T>), shifted = y + S::kRound, n = shifted - S::kRound;
  const Vec<T> r = y - n;
  Vec<T> p = splat(S::kExp2[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 1; --i) p = p * r + S::kExp2[i];
  const Vec<T> power = (Vec<T>)((IntVec<T>)splat(T(1)) + ((IntVec<T>)shifted << S::kMantissa));
  const Vec<T> change = p * r * power;
  e = change + power;
  return change + (power - T(1));
}

template <class T>
FEWSTEP_INLINE Vec<T> sigmoid(Vec<T> z) {
  const Vec<T> e = decay<T>(z);
  return (z < 0 ? e : splat(T(1))) * reciprocal<T>(e + T(1));
}

// tanh z, and 1 - tanh^2 z without cancellation.
template <class T>
FEWSTEP_INLINE Vec<T> tanh_of(Vec<T> z, Vec<T>& slope) {
  Vec<T> e;
  const Vec<T> change = expm1<T>(-2 * magnitude<T>(z), e), t = -change / (change + T(2));
  slope = 4 * e / ((e + T(1)) * (e + T(1)));
  return z < 0 ? -t : t;
}

// The normal distribution function; e = exp(-z^2 / 2). Abramowitz and Stegun 7.1.26 in float32, within 1e-7.
template <class T>
FEWSTEP_INLINE Vec<T> normal_cdf(Vec<T> z, Vec<T> e) {
  constexpr T kRootHalf = 0.70710678118654752440;
  if constexpr (sizeof(T) == 8) {
    Vec<T> out = z;
    for (int i = 0; i < kLanes<T>; ++i) out[i] = 0.5 * __builtin_erfc(-z[i] * kRootHalf);
    return out;
  } else {
    const Vec<T> t = T(1) / (kRootHalf * T(0.3275911) * magnitude<T>(z) + T(1));
    Vec<T> p = t * T(1.061405429) - T(1.453152027);
    p = p * t + T(1.421413741);
    p = p * t - T(0.284496736);
    p = p * t + T(0.254829592);
    const Vec<T> half = T(0.5) * (p * t * e);
    return z < 0 ? half : T(1) - half;
  }
}

// a(z), a'(z) and, where asked, a''(z).
template <Activation kKind, bool kSecond, class T>
FEWSTEP_INLINE void evaluate(const Elementwise<T>& in, Vec<T> z, Vec<T>& a, Vec<T>& d1, Vec<T>& d2) {
  if constexpr (kKind == Activation::silu) {
    const Vec<T> s = sigmoid<T>(z), c = T(1) - s;
    a = z * s;
    d1 = s + a * c;
    if constexpr (kSecond) d2 = s * c * (T(2) + z * (c - s));
  } else if constexpr (kKind == Activation::gelu) {
    constexpr T kDensity = 0.39894228040143267794;
    const Vec<T> e = exp2<T>(at_least<T>(kLowestExponent<T>, T(-0.5) * kLog2e<T> * z * z));
    const Vec<T> cdf = normal_cdf<T>(z, e), density = kDensity * e;
    a = z * cdf;
    d1 = cdf + z * density;
    if constexpr (kSecond) d2 = density * (T(2) - z * z);
  } else if constexpr (kKind == Activation::gelu_tanh) {
    constexpr T c = 0.79788456080286535588, k = 0.044715;
    const Vec<T> u1 = c * (T(1) + 3 * k * z * z);
    Vec<T> w;
    const Vec<T> t = tanh_of<T>(c * (z + k * z * z * z), w);
    a = T(0.5) * z * (T(1) + t);
    d1 = T(0.5) * (T(1) + t + z * w * u1);
    if constexpr (kSecond) d2 = w * (u1 + z * (3 * c * k * z - t * u1 * u1));
  } else if constexpr (kKind == Activation::tanh) {
    a = tanh_of<T>(z, d1);
    if constexpr (kSecond) d2 = -2 * a * d1;
  } else if constexpr (kKind == Activation::softplus) {
    constexpr T kLn2 = 0.69314718055994530942;
    const Vec<T> y = in.beta * z, e = decay<T>(y);
    const Vec<T> s = (y < 0 ? e : splat(T(1))) / (e + T(1));
    a = y > in.threshold ? z : at_least<T>(0, z) + kLn2 / in.beta * log2<T>(e + T(1));
    d1 = y > in.threshold ? splat(T(1)) : s;
    if constexpr (kSecond) d2 = y > in.threshold ? splat(T(0)) : in.beta * s * (T(1) - s);
  } else if constexpr (kKind == Activation::relu) {
    a = at_least<T>(0, z);
    d1 = z > 0 ? splat(T(1)) : splat(T(0));
    if constexpr (kSecond) d2 = splat(T(0));
  } else {
    static_assert(kKind == Activation::sigmoid, "an activation without a formula");
    a = sigmoid<T>(z);
    d1 = a * (T(1) - a);
    if constexpr (kSecond) d2 = d1 * (T(1) - 2 * a);
  }
}

// A run of elements whose shift, if any, and shared tangents are contiguous.
template <class T>
struct Run {
  const T *z, *tangent;
  int64_t tangent_stride;
  const T* shift;  // or null: the constant
  T constant;
};

template <Activation kKind, bool kWhole, class T>
FEWSTEP_INLINE void forward_step(const Elementwise<T>& in, const Run<T>& r, T* out, int64_t j, int64_t n) {
  const Vec<T> shift = r.shift != nullptr ? fetch<kWhole>(r.shift + j, n) : splat(r.constant);
  Vec<T> a, d1, d2;
  evaluate<kKind, false, T>(in, fetch<kWhole>(r.z + j, n) + shift, a, d1, d2);
  put<kWhole>(out + j, a, n);
  const T* t = r.tangent + j;
  for (int64_t k = 1; k <= in.tangents; ++k, t += r.tangent_stride) {
    put<kWhole>(out + k * in.count + j, d1 * fetch<kWhole>(t, n), n);
  }
}

template <Activation kKind, bool kWhole, class T>
FEWSTEP_INLINE void backward_step(const Elementwise<T>& in, const Run<T>& r, const T* g, T* gz, int64_t j, int64_t n) {
  const Vec<T> shift = r.shift != nullptr ? fetch<kWhole>(r.shift + j, n) : splat(r.constant);
  Vec<T> a, d1, d2, second = {};
  evaluate<kKind, true, T>(in, fetch<kWhole>(r.z + j, n) + shift, a, d1, d2);
  const T* t = r.tangent + j;
  for (int64_t k = 1; k <= in.tangents; ++k, t += r.tangent_stride) {
    const Vec<T> gk = fetch<kWhole>(g + k * in.count + j, n);
    second += gk * fetch<kWhole>(t, n);
    if (in.shared == nullptr) put<kWhole>(gz + k * in.count + j, gk * d1, n);
  }
  put<kWhole>(gz + j, fetch<kWhole>(g + j, n) * d1 + second * d2, n);
}

template <class T, class Body>
FEWSTEP_INLINE void for_each_run(const Elementwise<T>& in, int64_t begin, int64_t end, const Body& body) {
  const bool by_channel = in.shift != nullptr && in.inner > 1;
  int64_t length = in.count;
  if (in.shared != nullptr) length = in.period;
  if (in.shift != nullptr) {
    const int64_t own = by_channel ? in.inner : in.channels;
    length = own < length ? own : length;
  }
  for (int64_t e = begin; e < end;) {
    const int64_t whole = (e / length + 1) * length, last = whole < end ? whole : end;
    Run<T> r = {in.z + e, in.z + in.count + e, in.count, nullptr, T(0)};
    if (in.shared != nullptr) {
      r.tangent = in.shared + e % in.period;
      r.tangent_stride = in.period;
    }
    if (by_channel) {
      r.constant = in.shift[e / in.inner % in.channels];
    } else if (in.shift != nullptr) {
      r.shift = in.shift + e % in.channels;
    }
    body(r, e, last - e);
    e = last;
  }
}

template <Activation kKind, class T>
void activate_as(const Elementwise<T>& in, T* out, int64_t begin, int64_t end) {
  for_each_run(in, begin, end, [&](const Run<T>& r, int64_t e, int64_t n) {
    int64_t j = 0;
    for (; j + kLanes<T> <= n; j += kLanes<T>) forward_step<kKind, true>(in, r, out + e, j, n);
    if (j < n) forward_step<kKind, false>(in, r, out + e, j, n - j);
  });
}

template <Activation kKind, class T>
void activate_backward_as(const Elementwise<T>& in, const T* g, T* gz, int64_t begin, int64_t end) {
  for_each_run(in, begin, end, [&](const Run<T>& r, int64_t e, int64_t n) {
    int64_t j = 0;
    for (; j + kLanes<T> <= n; j += kLanes<T>) backward_step<kKind, true>(in, r, g + e, gz + e, j, n);
    if (j < n) backward_step<kKind, false>(in, r, g + e, gz + e, j, n - j);
  });
}

template <class T>
void activate(const Elementwise<T>& in, T* out, int64_t begin, int64_t end) {
  switch (in.kind) {
#define FEWSTEP_CASE(kind) \
  case Activation::kind:   \
    return activate_as<Activation::kind, T>(in, out, begin, end);
    FEWSTEP_ACTIVATIONS(FEWSTEP_CASE)
#undef FEWSTEP_CASE
  }
}

template <class T>
void activate_backward(const Elementwise<T>& in, const T* g, T* gz, int64_t begin, int64_t end) {
  switch (in.kind) {
#define FEWSTEP_CASE(kind) \
  case Activation::kind:   \
    return activate_backward_as<Activation::kind, T>(in, g, gz, begin, end);
    FEWSTEP_ACTIVATIONS(FEWSTEP_CASE)
#undef FEWSTEP_CASE
  }
}

// totals[s] = the sum over a row of what body(Whole or Part, j, lanes, acc) adds to acc[s].
template <int kSums, class T, class Body>
FEWSTEP_INLINE void add_up(int64_t n, T (&totals)[kSums], const Body& body) {
  constexpr int kChains = 4;  // additions that do not wait for one another
  Vec<T> acc[kChains][kSums] = {};
  int64_t j = 0;
  for (; j + kChains * kLanes<T> <= n; j += kChains * kLanes<T>) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) body(Whole{}, j + c * kLanes<T>, int64_t(kLanes<T>), acc[c]);
  }
  for_each_vector<T>(n - j, [&](auto w, int64_t i, int64_t m) { body(w, j + i, m, acc[0]); });
  for (int i = 0; i < kSums; ++i) totals[i] = sum<T>((acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]));
}

template <class T>
struct Means {
  T plain, normal;  // of v and of x^ v
};

// Elements [begin, begin + count) of a row with a weight and bias for each, which may be null, or one that all share.
template <bool kIsShared, class T>
struct Block {
  static constexpr bool kShared = kIsShared;
  int64_t begin, count;
  const T *weights, *biases;

  template <bool kWhole>
  FEWSTEP_INLINE Vec<T> weigh(Vec<T> v, int64_t j, int64_t m) const {
    if (weights == nullptr) return v;
    if constexpr (kShared) return v * *weights;
    return v * fetch<kWhole>(weights + j, m);
  }

  template <bool kWhole>
  FEWSTEP_INLINE Vec<T> move(Vec<T> v, int64_t j, int64_t m) const {
    if (biases == nullptr) return v;
    if constexpr (kShared) return v + *biases;
    return v + fetch<kWhole>(biases + j, m);
  }
};

// A row of the primal: x^ = (z + shift - mean) r, 0 beyond n.
template <class T>
struct NormRow {
  const Norm<T>& in;
  const T *z, *shift;
  int64_t first;  // weight
  T mean = 0, r = 0;

  NormRow(const Norm<T>& norm, int64_t row)
      : in(norm), z(norm.z + row * norm.n), first(row % norm.groups * (norm.n / norm.inner)) {
    shift = in.shift != nullptr ? in.shift + row % in.period * in.n : nullptr;
    T total[1];
    if (in.centred) {
      add_up(in.n, total, [&](auto w, int64_t j, int64_t m, auto& acc) { acc[0] += primal<w.kWhole>(j, m); });
      mean = total[0] / T(in.n);
    }
    add_up(in.n, total, [&](auto w, int64_t j, int64_t m, auto& acc) {
      const Vec<T> v = masked<w.kWhole>(primal<w.kWhole>(j, m) - mean, m);
      acc[0] += v * v;
    });
    r = T(1 / __builtin_sqrt(double(total[0]) / double(in.n) + in.eps));
  }

  template <bool kWhole>
  FEWSTEP_INLINE Vec<T> primal(int64_t j, int64_t m) const {
    const Vec<T> v = fetch<kWhole>(z + j, m);
    return shift != nullptr ? v + fetch<kWhole>(shift + j, m) : v;
  }

  template <bool kWhole>
  static FEWSTEP_INLINE Vec<T> masked(Vec<T> v, int64_t m) {
    if constexpr (!kWhole) {
      for (int64_t i = m; i < kLanes<T>; ++i) v[i] = 0;
    }
    return v;
  }

  template <bool kWhole>
  FEWSTEP_INLINE Vec<T> normal(int64_t j, int64_t m) const {
    return masked<kWhole>((primal<kWhole>(j, m) - mean) * r, m);
  }

  // body(block, index of its first weight)
  template <class Body>
  FEWSTEP_INLINE void for_each_block(const Body& body) const {
    const T *w = in.weight != nullptr ? in.weight + first : nullptr,
            *b = in.bias != nullptr ? in.bias + first : nullptr;
    if (in.inner == 1) return body(Block<false, T>{0, in.n, w, b}, first);
    for (int64_t i = 0, j = 0; j < in.n; ++i, j += in.inner) {
      body(Block<true, T>{j, in.inner, w != nullptr ? w + i : w, b != nullptr ? b + i : b}, first + i);
    }
  }

  Means<T> centred(T plain, T product) const { return {in.centred ? plain / T(in.n) : T(0), product / T(in.n)}; }

  Means<T> means(const T* v) const {
    T totals[2];
    add_up(in.n, totals, [&](auto w, int64_t j, int64_t m, auto& acc) {
      const Vec<T> own = fetch<w.kWhole>(v + j, m);
      acc[0] += own;
      acc[1] += own * normal<w.kWhole>(j, m);
    });
    return centred(totals[0], totals[1]);
  }
};

template <class T>
void normalize(const Norm<T>& in, T* out, T* tangents, int64_t begin, int64_t end) {
  const int64_t size = in.rows * in.n;
  for (int64_t row = begin; row < end; ++row) {
    const NormRow<T> x(in, row);
    if (out != nullptr) {
      x.for_each_block([&](auto block, int64_t) {
        T* y = out + row * in.n + block.begin;
        for_each_vector<T>(block.count, [&](auto w, int64_t j, int64_t m) {
          const Vec<T> v = block.template weigh<w.kWhole>(x.template normal<w.kWhole>(block.begin + j, m), j, m);
          put<w.kWhole>(y + j, block.template move<w.kWhole>(v, j, m), m);
        });
      });
    }
    for (int64_t k = 0; k < in.tangents; ++k) {
      const T* u = in.u + k * size + row * in.n;
      T* yk = tangents + k * size + row * in.n;
      const Means<T> mu = x.means(u);
      x.for_each_block([&](auto block, int64_t) {
        for_each_vector<T>(block.count, [&](auto w, int64_t j, int64_t m) {
          const int64_t at = block.begin + j;
          const Vec<T> v = fetch<w.kWhole>(u + at, m) - mu.plain - x.template normal<w.kWhole>(at, m) * mu.normal;
          put<w.kWhole>(yk + at, block.template weigh<w.kWhole>(x.r * v, j, m), m);
        });
      });
    }
  }
}

// P v = r (v - mean v - x^ mean(x^ v)) is the symmetric Jacobian of x^; with F = <w g_k, P u_k> the tangent's gradient
// is P(w g_k), and the primal's gains -(r / n) F x^ - r mean(x^ u) P(w g_k) - r mean(x^ w g) P(u_k).
template <class T>
void normalize_backward(const Norm<T>& in, const T* g, T* gz, T* gw, T* gb, int64_t begin, int64_t end) {
  const int64_t size = in.rows * in.n;
  for (int64_t row = begin; row < end; ++row) {
    const NormRow<T> x(in, row);
    const T* g0 = g + row * in.n;
    T* out = gz + row * in.n;
    T plain = 0, product = 0;
    x.for_each_block([&](auto block, int64_t i) {
      constexpr bool kShared = block.kShared;
      T totals[kShared ? 4 : 2];
      add_up(block.count, totals, [&](auto w, int64_t j, int64_t m, auto& acc) {
        constexpr bool kWhole = w.kWhole;
        const int64_t at = block.begin + j;
        const Vec<T> own = fetch<kWhole>(g0 + at, m), along = own * x.template normal<kWhole>(at, m);
        acc[0] += block.template weigh<kWhole>(own, j, m);
        acc[1] += block.template weigh<kWhole>(along, j, m);
        if constexpr (kShared) {
          acc[2] += along;
          acc[3] += own;
        } else {
          put<kWhole>(gw + i + j, fetch<kWhole>(gw + i + j, m) + along, m);
          put<kWhole>(gb + i + j, fetch<kWhole>(gb + i + j, m) + own, m);
        }
      });
      plain += totals[0];
      product += totals[1];
      if constexpr (kShared) {
        gw[i] += totals[2];
        gb[i] += totals[3];
      }
    });
    const Means<T> m0 = x.centred(plain, product);
    x.for_each_block([&](auto block, int64_t) {
      for_each_vector<T>(block.count, [&](auto w, int64_t j, int64_t m) {
        constexpr bool kWhole = w.kWhole;
        const int64_t at = block.begin + j;
        const Vec<T> own = block.template weigh<kWhole>(fetch<kWhole>(g0 + at, m), j, m);
        put<kWhole>(out + at, x.r * (own - m0.plain - x.template normal<kWhole>(at, m) * m0.normal), m);
      });
    });
    for (int64_t k = 0; k < in.tangents; ++k) {
      const T *u = in.u + k * size + row * in.n, *gk = g0 + (k + 1) * size;
      T *out_k = out + (k + 1) * size, dot = 0;
      plain = product = 0;
      const Means<T> mu = x.means(u);
      x.for_each_block([&](auto block, int64_t) {
        T totals[3];
        add_up(block.count, totals, [&](auto w, int64_t j, int64_t m, auto& acc) {
          constexpr bool kWhole = w.kWhole;
          const int64_t at = block.begin + j;
          const Vec<T> own = block.template weigh<kWhole>(fetch<kWhole>(gk + at, m), j, m);
          acc[0] += own;
          acc[1] += own * x.template normal<kWhole>(at, m);
          acc[2] += own * fetch<kWhole>(u + at, m);
        });
        plain += totals[0];
        product += totals[1];
        dot += totals[2];
      });
      const Means<T> mg = x.centred(plain, product);
      const T inner = dot / T(in.n) - mg.plain * mu.plain - mg.normal * mu.normal;
      x.for_each_block([&](auto block, int64_t i) {
        constexpr bool kShared = block.kShared;
        Vec<T> sum_w = {};
        for_each_vector<T>(block.count, [&](auto w, int64_t j, int64_t m) {
          constexpr bool kWhole = w.kWhole;
          const int64_t at = block.begin + j;
          const Vec<T> normal = x.template normal<kWhole>(at, m), own = fetch<kWhole>(gk + at, m);
          const Vec<T> pu = x.r * (fetch<kWhole>(u + at, m) - mu.plain - normal * mu.normal);
          const Vec<T> pg = x.r * (block.template weigh<kWhole>(own, j, m) - mg.plain - normal * mg.normal);
          put<kWhole>(out_k + at, pg, m);
          const Vec<T> gain = x.r * inner * normal + mu.normal * pg + mg.normal * pu;
          put<kWhole>(out + at, fetch<kWhole>(out + at, m) - x.r * gain, m);
          if constexpr (kShared) {
            sum_w += own * pu;
          } else {
            put<kWhole>(gw + i + j, fetch<kWhole>(gw + i + j, m) + own * pu, m);
          }
        });
        if constexpr (kShared) gw[i] += sum<T>(sum_w);
      });
    }
  }
}

template <class T>
void fill_signs(const philox::Stream& s, uint32_t k, bool hadamard, int64_t d, T* out) {
  using Int = typename Simd<T>::Int;
  constexpr int kSign = 8 * int(sizeof(T)) - 1;
  IntVec<T> lane = {};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  uint32_t row = 0, pattern = 0;
  if (hadamard) {
    int bits = 0;
    while ((int64_t(1) << bits) < d) ++bits;
    row = philox::hadamard_row(s, k, bits);
    for (uint32_t j = 0; j < 32; ++j) pattern |= philox::hadamard_sign(j, row) << j;
  }
  for (int64_t block = 0; block * 128 < d; ++block) {
    const philox::Words words = philox::draw(s, hadamard ? 0 : k, uint32_t(block));
    for (int64_t w = 0; w < 4; ++w) {
      const int64_t first = block * 128 + w * 32;
      if (first >= d) break;
      uint32_t word = words.w[w];
      if (hadamard) word ^= philox::hadamard_sign(uint32_t(first), row) != 0 ? ~pattern : pattern;
      for (int64_t j = 0; j < 32 && first + j < d; j += kLanes<T>) {
        const IntVec<T> bits = (IntVec<T>{} + Int(word >> j)) >> lane;
        const Vec<T> v = (Vec<T>)((IntVec<T>)splat(T(1)) ^ (bits << kSign));
        const int64_t left = d - first - j;
        if (left >= kLanes<T>) {
          store(out + first + j, v);
        } else {
          __builtin_memcpy(out + first + j, &v, left * sizeof(T));
        }
      }
    }
  }
}

template <class T>
void fill_normals(const philox::Stream& s, uint32_t k, bool sphere, int64_t d, T* out) {
  double squares = 0, four[4];
  for (int64_t c = 0; c < d; c += 4) {
    philox::normals(philox::draw(s, k, uint32_t(c / 4)), four);
    for (int64_t j = 0; j < 4 && c + j < d; ++j) {
      out[c + j] = T(four[j]);
      squares += four[j] * four[j];
    }
  }
  if (!sphere) return;
  const T factor = T(__builtin_sqrt(double(d) / squares));
  for (int64_t c = 0; c < d; ++c) out[c] *= factor;
}

template <class T>
void fill(const Probes& p, int64_t item, T* out) {
  const int64_t i = item % p.batch;
  const uint32_t k = uint32_t(item / p.batch);
  const philox::Stream s = {p.seed, uint64_t(p.ids != nullptr ? p.ids[i] : i), p.step, p.stage};
  const bool signs = p.kind == ProbeKind::rademacher || p.kind == ProbeKind::hadamard;
  if (signs) return fill_signs(s, k, p.kind == ProbeKind::hadamard, p.d, out);
  fill_normals(s, k, p.kind == ProbeKind::sphere, p.d, out);
}

template <class T>
void probe(const Probes& p, T* out, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) fill(p, item, out + (item - begin) * p.d);
}

template <class T>
void probe_dot(const Probes& p, const T* y, T* dots, T* scratch, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    fill(p, item, scratch);
    const T* row = y + item * p.d;
    Vec<T> total = {};
    int64_t c = 0;
    for (; c + kLanes<T> <= p.d; c += kLanes<T>) total += load(row + c) * load(scratch + c);
    T rest = 0;
    for (; c < p.d; ++c) rest += row[c] * scratch[c];
    dots[item] = sum<T>(total) + rest;
  }
}

template <class T>
void probe_scale(const Probes& p, const T* g, T* out, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    T* row = out + item * p.d;
    fill(p, item, row);
    for (int64_t c = 0; c < p.d; ++c) row[c] *= g[item];
  }
}

template <class T>
void dots(const T* a, const T* b, int64_t rows, int64_t n, T* out) {
  for (int64_t i = 0; i < rows; ++i, a += n, b += n) {
    Vec<T> total = {};
    for_each_vector<T>(
        n, [&](auto w, int64_t j, int64_t m) { total += fetch<w.kWhole>(a + j, m) * fetch<w.kWhole>(b + j, m); });
    out[i] = sum<T>(total);
  }
}

template <class T>
constexpr DualKernels<T> kKernels = {activate<T>,        activate_backward<T>, normalize<T>,   normalize_backward<T>,
                                     probe<T>,           probe_dot<T>,         probe_scale<T>, pack<T>,
                                     multiply<false, T>, multiply<true, T>,    dots<T>,        kPanel<T>};

}  // namespace

template <>
const DualKernels<float> Compiled<DualKernels<float>>::kernels = kKernels<float>;
template <>
const DualKernels<double> Compiled<DualKernels<double>>::kernels = kKernels<double>;

}  // namespace fewstep::cpu::FEWSTEP_ISA

FEWSTEP_END_ISA
