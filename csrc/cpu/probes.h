// Probes as the ops name them: by a key {seed, step, stage} and the ids of samples.
#pragma once

#include "cpu/dual.h"
#include "cpu/tensors.h"

namespace fewstep::cpu {

inline Probes probes(const tensors::Tensor& key, const tensors::Maybe& ids, int64_t batch, int64_t count, int64_t d,
                     int64_t kind) {
  const int64_t* k = tensors::read<int64_t>(key);
  return {static_cast<ProbeKind>(kind),
          tensors::read_if<int64_t>(ids),
          static_cast<uint64_t>(k[0]),
          static_cast<uint32_t>(k[1]),
          static_cast<uint32_t>(k[2]),
          batch,
          count,
          d};
}

}  // namespace fewstep::cpu
