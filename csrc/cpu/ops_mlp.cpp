// The CPU ops of whole networks: tensors in, pointers to the drivers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/mlp.h"
#include "cpu/probes.h"
#include "cpu/tensors.h"

namespace {

using namespace fewstep::tensors;
namespace cpu = fewstep::cpu;

// A network's tensors, held while their pointers are in use.
struct MlpInputs {
  Tensor x;
  int64_t low;
  std::vector<Tensor> weights;
  std::vector<Maybe> shifts;
  const std::vector<int64_t>& kinds;
  const std::vector<double>& options;

  MlpInputs(const Tensor& from, int64_t first, const std::vector<Tensor>& w, const std::vector<Maybe>& s,
            const std::vector<int64_t>& k, const std::vector<double>& o)
      : x(expect(from, "x", from.scalar_type(), from.numel())), low(first), kinds(k), options(o) {
    const size_t n = w.size();
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(n >= 2 && s.size() == n && k.size() == n - 1 && o.size() == 2 * (n - 1), "mlp: got ", n,
                    " weights, ", s.size(), " shifts, ", k.size(), " activations and ", o.size(), " options");
    STD_TORCH_CHECK(x.dim() == 2, "mlp: x must be [B, in]");
    for (const int64_t kind : k)
      STD_TORCH_CHECK(kind >= 0 && kind < cpu::kActivations, "mlp: no activation has the number ", kind);
    int64_t width = x.size(1);
    for (size_t l = 0; l < n; ++l) {
      STD_TORCH_CHECK(w[l].dim() == 2 && w[l].size(1) == width, "mlp: weight ", l, " must take ", width, " features");
      width = w[l].size(0);
      weights.push_back(expect(w[l], "weight", dtype, w[l].numel()));
    }
    for (size_t l = 0; l < n; ++l) {
      const int64_t own = weights[l].size(0), axes = s[l].has_value() ? s[l]->dim() : 1;
      STD_TORCH_CHECK(axes == 1 || axes == 2, "mlp: shift ", l, " must be [out] or [B, out]");
      shifts.push_back(expect_if(s[l], "shift", dtype, axes == 2 ? batch() * own : own));
    }
    STD_TORCH_CHECK(low >= 0 && low <= x.size(1) - width, "mlp: columns ", low, " to ", low + width,
                    " are not among the ", x.size(1), " of x");
  }

  int64_t batch() const { return x.size(0); }
  int64_t d() const { return weights.back().size(0); }

  // Elements of the stacks [K + 1, B, H_l] of all hidden layers.
  int64_t hidden(int64_t tangents) const {
    int64_t total = 0;
    for (size_t l = 0; l + 1 < weights.size(); ++l) total += weights[l].size(0);
    return total * batch() * (tangents + 1);
  }

  template <class T>
  cpu::Mlp<T> as() const {
    cpu::Mlp<T> out{{}, batch(), low, read<T>(x)};
    for (size_t l = 0; l < weights.size(); ++l) {
      const bool last = l + 1 == weights.size();
      out.layers.push_back({weights[l].size(1), weights[l].size(0), read<T>(weights[l]), read_if<T>(shifts[l]),
                            shifts[l].has_value() && shifts[l]->dim() == 2,
                            static_cast<cpu::Activation>(last ? 0 : kinds[l]),
                            static_cast<T>(last ? 0 : options[2 * l]), static_cast<T>(last ? 0 : options[2 * l + 1])});
    }
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_probes(const Tensor& x, int64_t low, std::vector<Tensor> weights,
                                                      std::vector<Maybe> shifts, std::vector<int64_t> kinds,
                                                      std::vector<double> options, const Tensor& key, const Maybe& ids,
                                                      int64_t count, int64_t kind, const Maybe& first,
                                                      const Maybe& last, bool keep) {
  const MlpInputs in(x, low, weights, shifts, kinds, options);
  const cpu::ProbeInputs probes(key, ids, in.batch(), count, in.d(), kind);
  const Maybe fc = expect_if(first, "first", x.scalar_type(), count * in.batch() * in.weights[0].size(0));
  const Maybe lc = expect_if(last, "last", x.scalar_type(), count * in.batch() * in.weights.back().size(1));
  Tensor velocity = new_empty(in.x, {in.batch(), in.d()}), dots = new_empty(in.x, {count, in.batch()});
  Tensor kept = new_empty(in.x, {keep ? in.hidden(count) : 0});
  Tensor made = new_empty(in.x, {keep ? count : 0, in.batch(), in.weights.back().size(1)});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const cpu::ProbePass<T> pass{probes.probes(),
                                 read_if<T>(fc),
                                 read_if<T>(lc),
                                 write<T>(velocity),
                                 write<T>(dots),
                                 keep ? write<T>(kept) : nullptr,
                                 keep ? write<T>(made) : nullptr};
    cpu::mlp_probes(in.as<T>(), pass, torch::stable::get_num_threads());
  });
  return {velocity, dots, kept, made};
}

// Gradients for x, the weights and the shifts, in this order; of those not wanted, nothing in a tensor.
std::vector<Tensor> mlp_backward(const Tensor& grad_velocity, const Tensor& grad_dots, const Tensor& x, int64_t low,
                                 std::vector<Tensor> weights, std::vector<Maybe> shifts, std::vector<int64_t> kinds,
                                 std::vector<double> options, const Tensor& key, const Maybe& ids, int64_t kind,
                                 const Tensor& last, const Tensor& kept, std::vector<bool> wanted) {
  const MlpInputs in(x, low, weights, shifts, kinds, options);
  const size_t n = weights.size();
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(grad_dots.dim() == 2 && grad_dots.size(1) == in.batch(), "mlp: grad_dots must be [K, B]");
  const int64_t count = grad_dots.size(0);
  const cpu::ProbeInputs probes(key, ids, in.batch(), count, in.d(), kind);
  const Tensor gv = expect(grad_velocity, "grad_velocity", dtype, in.batch() * in.d());
  const Tensor gd = expect(grad_dots, "grad_dots", dtype, grad_dots.numel());
  const Tensor made = expect(last, "last", dtype, count * in.batch() * in.weights.back().size(1));
  const Tensor stacks = expect(kept, "kept", dtype, in.hidden(count));
  STD_TORCH_CHECK(wanted.size() == 1 + 2 * n, "mlp: wanted must say ", 1 + 2 * n, " times whether, got ",
                  wanted.size());
  for (size_t l = 0; l < n; ++l)
    STD_TORCH_CHECK(shifts[l].has_value() || !wanted[1 + n + l], "mlp: shift ", l, " is none and has no gradient");
  std::vector<Tensor> out;
  const auto add = [&](const Tensor& like) {
    out.push_back(new_empty(in.x, wanted[out.size()] ? sizes(like) : std::vector<int64_t>{0}));
  };
  add(x);
  for (const Tensor& w : weights) add(w);
  for (const Maybe& s : shifts) add(s.has_value() ? *s : out[0]);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const auto at = [&](size_t i) { return wanted[i] ? write<T>(out[i]) : nullptr; };
    cpu::BackwardPass<T> pass{probes.probes(), read<T>(gv), read<T>(gd), read<T>(made), read<T>(stacks), at(0), {}, {}};
    for (size_t l = 0; l < n; ++l) {
      pass.weights.push_back(at(1 + l));
      pass.shifts.push_back(at(1 + n + l));
    }
    cpu::mlp_backward(in.as<T>(), pass, torch::stable::get_num_threads());
  });
  return out;
}

std::tuple<Tensor, Tensor> mlp_trace(const Tensor& x, int64_t low, std::vector<Tensor> weights,
                                     std::vector<Maybe> shifts, std::vector<int64_t> kinds, std::vector<double> options,
                                     const Maybe& core) {
  const MlpInputs in(x, low, weights, shifts, kinds, options);
  STD_TORCH_CHECK(weights.size() == 3, "mlp_trace: three layers have such a trace, got ", weights.size());
  const Maybe cc = expect_if(core, "core", x.scalar_type(), weights[0].size(0) * weights[1].size(0));
  Tensor velocity = new_empty(in.x, {in.batch(), in.d()}), value = new_empty(in.x, {in.batch()});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::mlp_trace(in.as<T>(), {read_if<T>(cc), write<T>(velocity), write<T>(value)}, torch::stable::get_num_threads());
  });
  return {velocity, value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CPU, m) {
  m.impl("mlp_probes", TORCH_BOX(&mlp_probes));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
  m.impl("mlp_trace", TORCH_BOX(&mlp_trace));
}
