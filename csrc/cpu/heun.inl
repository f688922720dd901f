// Kernels of heun.h for one instruction set; see sinkhorn.inl for what may stand here.
#include "cpu/heun.h"
#include "cpu/simd/unit.h"

FEWSTEP_BEGIN_ISA

#include "cpu/simd/math.h"
#include "cpu/simd/normals.h"

namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

// As many numbers of storage type S as a vector of the arithmetic's type A has: the first n of them, or all.
template <class A, class S>
struct Numbers {
  typedef S Stored __attribute__((vector_size(sizeof(S) * kLanes<A>)));

  template <bool kWhole>
  static FEWSTEP_INLINE Vec<A> get(const S* p, int64_t n) {
    Stored v = {};
    __builtin_memcpy(&v, p, kWhole ? sizeof(v) : n * sizeof(S));
    return __builtin_convertvector(v, Vec<A>);
  }

  template <bool kWhole>
  static FEWSTEP_INLINE void put(S* p, Vec<A> value, int64_t n) {
    const Stored v = __builtin_convertvector(value, Stored);
    __builtin_memcpy(p, &v, kWhole ? sizeof(v) : n * sizeof(S));
  }

  static FEWSTEP_INLINE Vec<A> rounded(Vec<A> value) {
    return __builtin_convertvector(__builtin_convertvector(value, Stored), Vec<A>);
  }
};

constexpr int kPart = 256;  // elements whose noise is made at once

// Elements [begin, end) with the coefficients c and kCount terms; noise[0] belongs to element begin.
template <class A, int kCount, class S, class F>
FEWSTEP_INLINE Vec<A> part(const heun::Pass<S, F>& in, const double* c, const double* noise, int64_t begin,
                           int64_t end) {
  A factor[heun::kColumns];
  for (int j = 0; j < heun::kColumns; ++j) factor[j] = A(c[j]);
  Vec<A> wrong = {};  // stays 0 while all results are finite
  for_each_vector<A>(end - begin, [&](auto whole, int64_t k, int64_t n) {
    constexpr bool kWhole = decltype(whole)::kWhole;
    const int64_t e = begin + k;
    Vec<A> x = Numbers<A, S>::template get<kWhole>(in.x + e, n), term[kCount + 1];
    if (in.low != nullptr) x += Numbers<A, S>::template get<kWhole>(in.low + e, n);
    Vec<A> y = factor[0] * x;
    for (int j = 0; j < kCount; ++j) {
      term[j] = Numbers<A, F>::template get<kWhole>(in.terms[j] + e, n);
      y += factor[j + 1] * term[j];
    }
    if (noise != nullptr) y += factor[heun::kNoise] * Numbers<A, double>::template get<kWhole>(noise + k, n);
    wrong += y * A(0);
    if (in.high != nullptr) Numbers<A, S>::template put<kWhole>(in.high + e, y, n);
    if (in.out_low != nullptr) {
      const Vec<A> rounded = Numbers<A, S>::rounded(y);
      Numbers<A, S>::template put<kWhole>(in.out_low + e, y - rounded, n);
    }
    if (in.net != nullptr) {
      Vec<A> net = factor[heun::kScale] * y + factor[heun::kNet] * x;
      for (int j = 0; j < kCount; ++j) net += factor[heun::kNet + 1 + j] * term[j];
      Numbers<A, F>::template put<kWhole>(in.net + e, net, n);
    }
  });
  return wrong;
}

template <class A, int kCount, class S, class F>
bool combine_as(const heun::Pass<S, F>& in, int64_t begin, int64_t end) {
  Vec<A> wrong = {};
  if (!in.per_sample && in.seeds == nullptr) {
    wrong = part<A, kCount>(in, in.coefficients, nullptr, begin, end);
    return sum<A>(wrong) == 0;
  }
  alignas(64) double normal[kPart + 4 * kLanes<double>];
  for (int64_t e = begin; e < end;) {
    const int64_t sample = e / in.d, first = e - sample * in.d;  // of the sample's elements
    const double* c = in.coefficients + (in.per_sample ? sample * heun::kColumns : 0);
    int64_t stop = (sample + 1) * in.d < end ? (sample + 1) * in.d : end;
    if (in.seeds == nullptr || c[heun::kNoise] == 0) {
      wrong += part<A, kCount>(in, c, nullptr, e, stop);
    } else {
      const int64_t skipped = first % 4;
      stop = stop < e - skipped + kPart ? stop : e - skipped + kPart;
      const philox::Stream s = heun::noise(in.seeds[sample], in.row);
      for (int64_t j = 0; j < skipped + stop - e; j += 4 * kLanes<double>) {
        normals(s, 0, uint32_t((first - skipped + j) / 4), normal + j);
      }
      wrong += part<A, kCount>(in, c, normal + skipped, e, stop);
    }
    e = stop;
  }
  return sum<A>(wrong) == 0;
}

template <class A, class S, class F>
bool combine_in(const heun::Pass<S, F>& in, int64_t begin, int64_t end) {
  switch (in.count) {
    case 0:
      return combine_as<A, 0>(in, begin, end);
    case 1:
      return combine_as<A, 1>(in, begin, end);
    default:
      return combine_as<A, 2>(in, begin, end);
  }
}

template <class S, class F>
bool combine(const heun::Pass<S, F>& in, int64_t begin, int64_t end) {
  if constexpr (sizeof(S) == 4) {
    if (in.low == nullptr && in.out_low == nullptr) return combine_in<float>(in, begin, end);
  }
  return combine_in<double>(in, begin, end);
}

}  // namespace

template <>
const HeunKernels<float, float> Compiled<HeunKernels<float, float>>::kernels = {combine<float, float>};
template <>
const HeunKernels<double, float> Compiled<HeunKernels<double, float>>::kernels = {combine<double, float>};
template <>
const HeunKernels<double, double> Compiled<HeunKernels<double, double>>::kernels = {combine<double, double>};

}  // namespace fewstep::cpu::FEWSTEP_ISA

FEWSTEP_END_ISA
