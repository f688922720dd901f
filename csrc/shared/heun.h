// What all kernels of a sampler's step share: the table of coefficients, the noise, and the arithmetic of CUDA's.
#pragma once

#include "philox.h"

namespace fewstep::heun {

// One row c of the table, in float64, with state x, the network's outputs F and U, and noise n:
//   y = c[0] x + c[1] F + c[2] U + c[3] n,    the network's next input = c[7] y + c[4] x + c[5] F + c[6] U.
constexpr int kTerms = 2, kNoise = 3, kNet = 4, kScale = 7, kColumns = 8;

// The noise of a sample with seed s at row k: apart from the probes of fewstep.divergence by the stage.
constexpr uint32_t kStage = 15;

FEWSTEP_HD_INLINED philox::Stream noise(int64_t seed, int64_t row) {
  return {uint64_t(seed), 0, uint32_t(row), kStage};
}

// A pass over states S and a network's numbers F. The state is x + low; outputs may be the inputs themselves.
template <class S, class F>
struct Pass {
  const S* x;
  const S* low;  // or null
  const F* terms[kTerms];
  int count;                   // of terms
  const double* coefficients;  // [rows, 8]
  bool per_sample;             // rows is B, else 1
  const int64_t* seeds;        // [B]; null: no noise
  int64_t row;                 // of the table, which the noise depends on
  int64_t batch, d;            // one sample of all elements where nothing differs between samples
  S* high;                     // y, rounded; or null
  S* out_low;                  // what rounding left of y; or null
  F* net;                      // or null
};

// Elements that a thread takes at once: those of a Philox block of normals.
constexpr int kGroup = 4;

template <class T>
struct alignas(kGroup * sizeof(T)) Four {
  T v[kGroup];
};

// Four numbers from `at` on in one access: all of them are there, and aligned.
struct Whole {
  int64_t at;

  template <class A, class T>
  FEWSTEP_HD_INLINED void load(const T* p, A out[kGroup]) const {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(p + at);
    for (int i = 0; i < kGroup; ++i) out[i] = static_cast<A>(four.v[i]);
  }

  template <class T, class A>
  FEWSTEP_HD_INLINED void store(T* p, const A values[kGroup]) const {
    Four<T> four;
    for (int i = 0; i < kGroup; ++i) four.v[i] = static_cast<T>(values[i]);
    *reinterpret_cast<Four<T>*>(p + at) = four;
  }
};

// The first n numbers of group g of a sample, in arithmetic A, by what reads and writes them. False where a result is
// not finite.
template <class A, bool kNoisy, class S, class F, class Access>
FEWSTEP_HD_INLINED bool combine_group(const Pass<S, F>& in, int64_t sample, int64_t g, int n, const Access& access) {
  const double* c = in.coefficients + (in.per_sample ? sample * kColumns : 0);
  A x[kGroup], low[kGroup], term[kTerms][kGroup], y[kGroup], z[kGroup];
  access.load(in.x, x);
  if (in.low != nullptr) {
    access.load(in.low, low);
    for (int i = 0; i < kGroup; ++i) x[i] += low[i];
  }
  const A own = A(c[0]), scale = A(c[kScale]), before = A(c[kNet]);
  for (int i = 0; i < kGroup; ++i) y[i] = own * x[i];
  for (int j = 0; j < kTerms; ++j) {
    if (j >= in.count) break;
    access.load(in.terms[j], term[j]);
    const A factor = A(c[1 + j]);
    for (int i = 0; i < kGroup; ++i) y[i] += factor * term[j][i];
  }
  if (kNoisy && c[kNoise] != 0) {
    double normal[kGroup];
    philox::normals(philox::draw(noise(in.seeds[sample], in.row), 0, uint32_t(g)), normal);
    const A factor = A(c[kNoise]);
    for (int i = 0; i < kGroup; ++i) y[i] += factor * A(normal[i]);
  }
  for (int i = 0; i < kGroup; ++i) z[i] = scale * y[i] + before * x[i];
  for (int j = 0; j < kTerms; ++j) {
    if (j >= in.count) break;
    const A factor = A(c[kNet + 1 + j]);
    for (int i = 0; i < kGroup; ++i) z[i] += factor * term[j][i];
  }
  A wrong = 0;  // stays 0 while all results are finite
  for (int i = 0; i < kGroup; ++i) wrong += i < n ? y[i] * A(0) : A(0);
  if (in.high != nullptr) access.store(in.high, y);
  if (in.out_low != nullptr) {
    for (int i = 0; i < kGroup; ++i) low[i] = y[i] - static_cast<A>(static_cast<S>(y[i]));
    access.store(in.out_low, low);
  }
  if (in.net != nullptr) access.store(in.net, z);
  return wrong == 0;
}

// In float32 for a float32 state with nothing kept of its rest, else in float64, which memory hides.
template <bool kNoisy, class S, class F, class Access>
FEWSTEP_HD_INLINED bool combine_at(const Pass<S, F>& in, int64_t sample, int64_t g, int n, const Access& access) {
  if (sizeof(S) == 4 && in.low == nullptr && in.out_low == nullptr) {
    return combine_group<float, kNoisy>(in, sample, g, n, access);
  }
  return combine_group<double, kNoisy>(in, sample, g, n, access);
}

}  // namespace fewstep::heun
