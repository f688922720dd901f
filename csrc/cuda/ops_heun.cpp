// The CUDA ops of a sampler's step: tensors in, one launch.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cuda/device.h"
#include "cuda/heun.cuh"
#include "shared/heun_inputs.h"
#include "shared/tensors.h"

namespace {

using namespace fewstep::tensors;
namespace heun = fewstep::heun;

template <class S, class F>
void launch(const heun::Inputs& in, cudaStream_t stream) {
  heun::Pass<S, F> pass = in.as<S, F>();
  if (!pass.per_sample && pass.seeds == nullptr) {
    pass.batch = 1;
    pass.d = in.x.numel();
  }
  fewstep::cuda::check(fewstep::cuda::heun_combine(pass, write_if<int32_t>(in.wrong), stream));
}

void combine_out(const Tensor& x, const Maybe& low, const std::vector<Tensor>& terms, const Tensor& table, int64_t row,
                 const Maybe& seeds, const Maybe& high, const Maybe& out_low, const Maybe& net, const Maybe& wrong) {
  const heun::Inputs in(x, low, terms, table, row, seeds, high, out_low, net, wrong);
  const fewstep::cuda::Device device(x);
  const bool single = in.state == ScalarType::Float;
  STD_TORCH_CHECK(single || in.state == ScalarType::Double, "heun_combine: the state must be float32 or float64");
  if (in.other == ScalarType::Float) {
    single ? launch<float, float>(in, device.stream) : launch<double, float>(in, device.stream);
  } else if (in.other == ScalarType::Half) {
    single ? launch<float, __half>(in, device.stream) : launch<double, __half>(in, device.stream);
  } else if (in.other == ScalarType::BFloat16) {
    single ? launch<float, __nv_bfloat16>(in, device.stream) : launch<double, __nv_bfloat16>(in, device.stream);
  } else {
    STD_TORCH_CHECK(in.other == ScalarType::Double && !single, "heun_combine: a float32 state has no float64 terms");
    launch<double, double>(in, device.stream);
  }
}

std::tuple<Tensor, Tensor, Tensor> combine(const Tensor& x, const Maybe& low, const std::vector<Tensor>& terms,
                                           const Tensor& table, int64_t row, bool want_low, bool want_net) {
  return heun::combine(combine_out, x, low, terms, table, row, want_low, want_net);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CUDA, m) {
  m.impl("heun_combine", TORCH_BOX(&combine));
  m.impl("heun_combine_out", TORCH_BOX(&combine_out));
}
