// The CUDA ops of a sampler's step: tensors in, one launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/device.h"
#include "cuda/heun.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
namespace heun = fewstep::heun;

struct Inputs {
  Tensor x;
  Maybe low;
  std::vector<Tensor> terms;
  Tensor table;
  int64_t row;
  Maybe seeds, high, out_low, net, wrong;
};

template <class T>
T* data_if(const Maybe& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

template <class S, class F>
void launch(const Inputs& in, cudaStream_t stream) {
  heun::Pass<S, F> pass{};
  const int64_t batch = in.x.size(0), rows = in.table.size(1);
  pass.x = static_cast<const S*>(in.x.data_ptr());
  pass.low = data_if<S>(in.low);
  pass.count = static_cast<int>(in.terms.size());
  for (int j = 0; j < pass.count; ++j) pass.terms[j] = static_cast<const F*>(in.terms[j].data_ptr());
  pass.coefficients = static_cast<const double*>(in.table.data_ptr()) + in.row * rows * heun::kColumns;
  pass.per_sample = rows != 1;
  pass.seeds = data_if<int64_t>(in.seeds);
  pass.row = in.row;
  const bool alike = !pass.per_sample && pass.seeds == nullptr;
  pass.batch = alike ? 1 : batch;
  pass.d = alike || batch == 0 ? in.x.numel() : in.x.numel() / batch;
  pass.high = data_if<S>(in.high);
  pass.out_low = data_if<S>(in.out_low);
  pass.net = data_if<F>(in.net);
  fewstep::cuda::check(fewstep::cuda::heun_combine(pass, data_if<int32_t>(in.wrong), stream));
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : contiguous(t); }

void check_like(const Tensor& t, const char* name, const Tensor& x, ScalarType dtype, bool output) {
  STD_TORCH_CHECK(t.numel() == x.numel() && t.get_device_index() == x.get_device_index() && t.is_cuda(),
                  "heun_combine: ", name, " must have the size of x and be on its device");
  STD_TORCH_CHECK(t.scalar_type() == dtype, "heun_combine: ", name, " must have the dtype that goes with x");
  STD_TORCH_CHECK(!output || t.is_contiguous(), "heun_combine: ", name, " must be contiguous");
}

void combine_out(const Tensor& x, const Maybe& low, const std::vector<Tensor>& terms, const Tensor& table, int64_t row,
                 const Maybe& seeds, const Maybe& high, const Maybe& out_low, const Maybe& net, const Maybe& wrong) {
  STD_TORCH_CHECK(terms.size() <= heun::kTerms, "heun_combine: at most 2 terms, got ", terms.size());
  STD_TORCH_CHECK(table.is_cuda() && table.dim() == 3 && table.size(2) == heun::kColumns && table.is_contiguous() &&
                      table.scalar_type() == ScalarType::Double && row >= 0 && row < table.size(0) &&
                      (table.size(1) == 1 || table.size(1) == x.size(0)),
                  "heun_combine: table must be float64 [K, 1 or B, 8] on the device of x, with row ", row);
  const ScalarType state = x.scalar_type();
  const ScalarType other = net.has_value() ? net->scalar_type() : terms.empty() ? state : terms[0].scalar_type();
  Inputs in{dense(x), low, {}, table, row, seeds, high, out_low, net, wrong};
  if (low.has_value()) {
    check_like(*low, "low", x, state, false);
    in.low = dense(*low);
  }
  for (const Tensor& t : terms) {
    check_like(t, "terms", x, other, false);
    in.terms.push_back(dense(t));
  }
  if (seeds.has_value()) {
    STD_TORCH_CHECK(seeds->is_cuda() && seeds->is_contiguous() && seeds->numel() == x.size(0) &&
                        seeds->scalar_type() == ScalarType::Long,
                    "heun_combine: seeds must be int64 [B] on the device of x");
  }
  if (high.has_value()) check_like(*high, "high", x, state, true);
  if (out_low.has_value()) check_like(*out_low, "out_low", x, state, true);
  if (net.has_value()) check_like(*net, "net", x, other, true);
  const fewstep::cuda::Device device(x);
  const bool single = state == ScalarType::Float;
  STD_TORCH_CHECK(single || state == ScalarType::Double, "heun_combine: the state must be float32 or float64");
  if (other == ScalarType::Float) {
    single ? launch<float, float>(in, device.stream) : launch<double, float>(in, device.stream);
  } else if (other == ScalarType::Half) {
    single ? launch<float, __half>(in, device.stream) : launch<double, __half>(in, device.stream);
  } else if (other == ScalarType::BFloat16) {
    single ? launch<float, __nv_bfloat16>(in, device.stream) : launch<double, __nv_bfloat16>(in, device.stream);
  } else {
    STD_TORCH_CHECK(other == ScalarType::Double && !single, "heun_combine: a float32 state has no float64 terms");
    launch<double, double>(in, device.stream);
  }
}

std::tuple<Tensor, Tensor, Tensor> combine(const Tensor& x, const Maybe& low, const std::vector<Tensor>& terms,
                                           const Tensor& table, int64_t row, bool want_low, bool want_net) {
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), none{0};
  const Tensor& like = terms.empty() ? x : terms[0];
  Tensor high = new_empty(x, shape), rest = new_empty(x, want_low ? shape : none);
  Tensor net = new_empty(like, want_net ? shape : none);
  combine_out(x, low, terms, table, row, std::nullopt, high, want_low ? Maybe(rest) : std::nullopt,
              want_net ? Maybe(net) : std::nullopt, std::nullopt);
  return {high, rest, net};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CUDA, m) {
  m.impl("heun_combine", TORCH_BOX(&combine));
  m.impl("heun_combine_out", TORCH_BOX(&combine_out));
}
