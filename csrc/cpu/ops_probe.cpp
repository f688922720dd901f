// The CPU ops of probes: tensors in, ranges of probes to the kernels, on PyTorch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/dual.h"
#include "cpu/probes.h"
#include "cpu/tensors.h"

namespace {

using namespace fewstep::tensors;
namespace cpu = fewstep::cpu;

template <class F>
void over_probes(const cpu::Probes& p, const F& body) {
  torch::stable::parallel_for(0, p.batch * p.count, std::max<int64_t>(kGrain / std::max<int64_t>(p.d, 1), 1), body);
}

Tensor probe(const Tensor& like, const Tensor& key, const Maybe& ids, int64_t count, int64_t kind) {
  STD_TORCH_CHECK(like.dim() >= 1, "fewstep: like must be [B, ...]");
  const cpu::ProbeInputs in(key, ids, like.size(0), count, per_sample(like), kind);
  const cpu::Probes p = in.probes();
  std::vector<int64_t> shape = sizes(like);
  shape.insert(shape.begin(), count);
  Tensor out = new_empty(like, shape);
  if (like.scalar_type() == ScalarType::BFloat16) {
    uint16_t* to = write<uint16_t>(out);
    over_probes(p, [&](int64_t begin, int64_t end) {
      std::vector<float> own(p.d);
      for (int64_t item = begin; item < end; ++item) {
        cpu::kernels<cpu::DualKernels, float>().probe(p, own.data(), item, item + 1);
        std::transform(own.begin(), own.end(), to + item * p.d, narrow);
      }
    });
    return out;
  }
  dispatch(like, [&](auto zero) {
    using T = decltype(zero);
    T* to = write<T>(out);
    over_probes(p, [&](int64_t begin, int64_t end) {
      cpu::kernels<cpu::DualKernels, T>().probe(p, to + begin * p.d, begin, end);
    });
  });
  return out;
}

Tensor probe_dot(const Tensor& y, const Tensor& key, const Maybe& ids, int64_t count, int64_t kind) {
  STD_TORCH_CHECK(y.dim() >= 1 && count >= 1 && y.size(0) % count == 0,
                  "fewstep: y must be [K B, ...] with K = ", count);
  const int64_t batch = y.size(0) / count;
  const cpu::ProbeInputs in(key, ids, batch, count, per_sample(y), kind);
  const cpu::Probes p = in.probes();
  const Tensor yc = expect(y, "y", y.scalar_type(), y.numel());
  if (y.scalar_type() == ScalarType::BFloat16) {
    Tensor out = new_empty(y, {count, batch}, ScalarType::Float);
    float* to = write<float>(out);
    over_probes(p, [&](int64_t begin, int64_t end) {
      std::vector<float> own(p.d), row(p.d);
      for (int64_t item = begin; item < end; ++item) {
        const uint16_t* from = read<uint16_t>(yc) + item * p.d;
        std::transform(from, from + p.d, row.begin(), widen);
        cpu::kernels<cpu::DualKernels, float>().probe(p, own.data(), item, item + 1);
        cpu::kernels<cpu::DualKernels, float>().dots(own.data(), row.data(), 1, p.d, to + item);
      }
    });
    return out;
  }
  Tensor out = new_empty(y, {count, batch});
  dispatch(y, [&](auto zero) {
    using T = decltype(zero);
    T* to = write<T>(out);
    const T* from = read<T>(yc);
    over_probes(p, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(p.d);
      cpu::kernels<cpu::DualKernels, T>().probe_dot(p, from, to, scratch.data(), begin, end);
    });
  });
  return out;
}

Tensor probe_scale(const Tensor& g, const Tensor& key, const Maybe& ids, int64_t d, int64_t kind) {
  STD_TORCH_CHECK(g.dim() == 2, "fewstep: g must be [K, B]");
  const int64_t count = g.size(0), batch = g.size(1);
  const cpu::ProbeInputs in(key, ids, batch, count, d, kind);
  const cpu::Probes p = in.probes();
  const Tensor gc = expect(g, "g", g.scalar_type(), g.numel());
  Tensor out = new_empty(g, {count, batch, d});
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    T* to = write<T>(out);
    const T* from = read<T>(gc);
    over_probes(p, [&](int64_t begin, int64_t end) {
      cpu::kernels<cpu::DualKernels, T>().probe_scale(p, from, to, begin, end);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CPU, m) {
  m.impl("probe", TORCH_BOX(&probe));
  m.impl("probe_dot", TORCH_BOX(&probe_dot));
  m.impl("probe_scale", TORCH_BOX(&probe_scale));
}
