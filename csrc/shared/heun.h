// What all kernels of a sampler's step share: the table of coefficients and the noise.
#pragma once

#include "shared/philox.h"

namespace fewstep::heun {

// One row of the table, in float64: y = c[0] x + sum_j c[j] F_j + c[kNoise] n, and the network's input c[kScale] y.
constexpr int kTerms = 5, kNoise = 6, kScale = 7, kColumns = 8;

// The noise of a sample with seed s at row k: apart from the probes of fewstep.divergence by the stage.
constexpr uint32_t kStage = 15;

FEWSTEP_HD philox::Stream noise(int64_t seed, int64_t row) { return {uint64_t(seed), 0, uint32_t(row), kStage}; }

}  // namespace fewstep::heun
