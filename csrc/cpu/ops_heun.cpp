// The CPU ops of a sampler's step: tensors in, ranges of elements to the kernels, on PyTorch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "cpu/heun.h"
#include "cpu/tensors.h"
#include "shared/heun_inputs.h"

namespace {

using namespace fewstep::tensors;
namespace cpu = fewstep::cpu;
namespace heun = fewstep::heun;

template <class S, class F>
void run(const heun::Inputs& in) {
  const heun::Pass<S, F> pass = in.as<S, F>();
  const int64_t count = in.x.numel();
  std::atomic<bool> finite{true};
  const auto work = [&](int64_t begin, int64_t end) {
    if (!cpu::kernels<cpu::HeunKernels, S, F>().combine(pass, begin, end)) finite = false;
  };
  // Noise costs as much as ten elements without.
  const int64_t grain = pass.seeds != nullptr ? kGrain / 8 : kGrain;
  if (count <= grain) {
    work(0, count);
  } else {
    torch::stable::parallel_for(0, count, grain, work);
  }
  if (in.wrong.has_value() && !finite) *write<int32_t>(*in.wrong) = 1;
}

void combine_out(const Tensor& x, const Maybe& low, const std::vector<Tensor>& terms, const Tensor& table, int64_t row,
                 const Maybe& seeds, const Maybe& high, const Maybe& out_low, const Maybe& net, const Maybe& wrong) {
  const heun::Inputs in(x, low, terms, table, row, seeds, high, out_low, net, wrong);
  if (in.state == ScalarType::Float && in.other == ScalarType::Float) {
    run<float, float>(in);
  } else if (in.state == ScalarType::Double && in.other == ScalarType::Float) {
    run<double, float>(in);
  } else {
    STD_TORCH_CHECK(in.state == ScalarType::Double && in.other == ScalarType::Double,
                    "heun_combine: a float32 state has float32 terms, a float64 state float32 or float64 ones");
    run<double, double>(in);
  }
}

std::tuple<Tensor, Tensor, Tensor> combine(const Tensor& x, const Maybe& low, const std::vector<Tensor>& terms,
                                           const Tensor& table, int64_t row, bool want_low, bool want_net) {
  return heun::combine(combine_out, x, low, terms, table, row, want_low, want_net);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CPU, m) {
  m.impl("heun_combine", TORCH_BOX(&combine));
  m.impl("heun_combine_out", TORCH_BOX(&combine_out));
}
