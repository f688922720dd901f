// What all kernels of a sampler's step share: the table of coefficients and the noise.
#pragma once

#include "shared/philox.h"

namespace fewstep::heun {

// One row c of the table, in float64, with state x, the network's outputs F and U, and noise n:
//   y = c[0] x + c[1] F + c[2] U + c[3] n,    the network's next input = c[7] y + c[4] x + c[5] F + c[6] U.
constexpr int kTerms = 2, kNoise = 3, kNet = 4, kScale = 7, kColumns = 8;

// The noise of a sample with seed s at row k: apart from the probes of fewstep.divergence by the stage.
constexpr uint32_t kStage = 15;

FEWSTEP_HD philox::Stream noise(int64_t seed, int64_t row) { return {uint64_t(seed), 0, uint32_t(row), kStage}; }

}  // namespace fewstep::heun
