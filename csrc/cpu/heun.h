// A step of a sampler outside its network: one linear combination of the state and what the network returned, with
// noise, element by element, in one pass. Compiled once per instruction set (heun.inl).
#pragma once

#include <cstdint>

namespace fewstep::cpu {

// y = c[0] (x + low) + sum_j c[j] F_j + c[6] n in float64, or in float32 for a float32 state without low; outputs may
// be the inputs themselves, element for element.
template <class T, class F>
struct Combine {
  const T* x;
  const T* low;  // the rest of the state, x + low; or null
  const F* terms[5];
  int64_t count;               // of terms
  const double* coefficients;  // [rows, 8]
  bool per_sample;             // rows is B, else 1
  const int64_t* seeds;        // [B]; null: no noise
  int64_t row;                 // of the table, which the noise depends on
  int64_t d;                   // elements of a sample
  T* high;                     // y, rounded; or null
  T* out_low;                  // what rounding left of y; or null
  F* net;                      // c[7] y; or null
};

template <class T, class F>
struct HeunKernels {
  // Elements [begin, end) of [B d]. False where one of the results is not finite.
  bool (*combine)(const Combine<T, F>&, int64_t begin, int64_t end);
};

namespace base {
extern const HeunKernels<float, float> kHeunFloat;
extern const HeunKernels<double, float> kHeunMixed;
extern const HeunKernels<double, double> kHeunDouble;
}  // namespace base
namespace avx2 {
extern const HeunKernels<float, float> kHeunFloat;
extern const HeunKernels<double, float> kHeunMixed;
extern const HeunKernels<double, double> kHeunDouble;
}  // namespace avx2
namespace avx512 {
extern const HeunKernels<float, float> kHeunFloat;
extern const HeunKernels<double, float> kHeunMixed;
extern const HeunKernels<double, double> kHeunDouble;
}  // namespace avx512

}  // namespace fewstep::cpu
