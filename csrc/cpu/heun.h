// A step of a sampler outside its network: combinations of the state and of what the network returned, with noise,
// element by element, in one pass. Compiled once per instruction set (heun.inl).
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "shared/heun.h"

namespace fewstep::cpu {

template <class S, class F>
struct HeunKernels {
  // Elements [begin, end) of [B d], in float64, or in float32 for a float32 state without low. False where one of the
  // results is not finite.
  bool (*combine)(const heun::Pass<S, F>&, int64_t begin, int64_t end);
};

FEWSTEP_KERNELS(HeunKernels<float, float>)
FEWSTEP_KERNELS(HeunKernels<double, float>)
FEWSTEP_KERNELS(HeunKernels<double, double>)

}  // namespace fewstep::cpu
