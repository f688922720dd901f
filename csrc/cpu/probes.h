// Probes as the ops name them: by a key {seed, step, stage} and the ids of samples, which must outlive them.
#pragma once

#include "cpu/dual.h"
#include "cpu/tensors.h"

namespace fewstep::cpu {

struct ProbeInputs {
  tensors::Tensor key;
  tensors::Maybe ids;
  int64_t batch, count, d, kind;

  ProbeInputs(const tensors::Tensor& k, const tensors::Maybe& i, int64_t samples, int64_t probes, int64_t width,
              int64_t which)
      : key(tensors::expect(k, "key", tensors::ScalarType::Long, 3)),
        ids(tensors::expect_if(i, "ids", tensors::ScalarType::Long, samples)),
        batch(samples),
        count(probes),
        d(width),
        kind(which) {
    STD_TORCH_CHECK(count >= 0 && d >= 0, "fewstep: got ", count, " probes of ", d, " coordinates");
    STD_TORCH_CHECK(kind >= 0 && kind < kProbeKinds, "fewstep: no kind of probes has the number ", kind);
  }

  Probes probes() const {
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
};

}  // namespace fewstep::cpu
