// The CPU ops: tensors in, pointers to the drivers. Users' mistakes are caught in Python; checks here are invariants.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/sinkhorn.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cpu = fewstep::cpu;

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

template <class T>
T* write(Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class F>
auto dispatch(const Tensor& x, F&& body) {
  if (x.scalar_type() == ScalarType::Float) return body(float{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "fewstep: float32 or float64 expected");
  return body(double{});
}

template <class T>
cpu::Batch<T> batch_of(const Tensor& x, const Tensor& y, const Tensor& b, const Tensor& eps, int64_t cost) {
  return {x.size(0),  x.size(1),    y.size(1),
          x.size(2),  read<T>(x),   read<T>(y),
          read<T>(b), read<T>(eps), static_cast<cpu::Cost>(cost)};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs sinkhorn(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& eps,
                 const std::optional<Tensor>& g0, int64_t cost, int64_t max_iter, std::optional<double> tol) {
  constexpr double kDefaultTol = 1e-3;
  const Tensor xc = contiguous(x), yc = contiguous(y), ac = contiguous(a), bc = contiguous(b), ec = contiguous(eps);
  const std::optional<Tensor> gc = g0.has_value() ? std::optional<Tensor>(contiguous(*g0)) : std::nullopt;
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1);
  Tensor f = new_empty(xc, {batch, n}), g = new_empty(xc, {batch, m});
  Tensor value = new_empty(xc, {batch}), residual = new_empty(xc, {batch});
  Tensor iterations = new_empty(xc, {batch}, ScalarType::Long), converged = new_empty(xc, {batch}, ScalarType::Bool);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Solve<T> s{read<T>(ac),
                          gc.has_value() ? read<T>(*gc) : nullptr,
                          max_iter,
                          tol.value_or(-1.0),
                          write<T>(f),
                          write<T>(g),
                          write<T>(value),
                          write<T>(residual),
                          write<int64_t>(iterations)};
    cpu::solve(batch_of<T>(xc, yc, bc, ec, cost), s, torch::stable::get_num_threads());
    bool* flags = write<bool>(converged);
    for (int64_t i = 0; i < batch; ++i) flags[i] = s.residual[i] <= tol.value_or(kDefaultTol);
  });
  return {f, g, value, residual, iterations, converged};
}

std::tuple<Tensor, Tensor> sinkhorn_transport(const Tensor& x, const Tensor& y, const Tensor& f, const Tensor& g,
                                              const Tensor& b, const Tensor& eps, const Tensor& v, int64_t cost) {
  const Tensor xc = contiguous(x), yc = contiguous(y), fc = contiguous(f), gc = contiguous(g), bc = contiguous(b),
               ec = contiguous(eps), vc = contiguous(v);
  Tensor out = new_empty(xc, {x.size(0), x.size(1), v.size(2)}), mass = new_empty(xc, {x.size(0), x.size(1)});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::transport(batch_of<T>(xc, yc, bc, ec, cost), read<T>(fc), read<T>(gc), read<T>(vc), v.size(2), write<T>(out),
                   write<T>(mass), torch::stable::get_num_threads());
  });
  return {out, mass};
}

Tensor sinkhorn_grad(const Tensor& x, const Tensor& y, const Tensor& f, const Tensor& g, const Tensor& a,
                     const Tensor& b, const Tensor& eps, int64_t cost) {
  const Tensor xc = contiguous(x), yc = contiguous(y), fc = contiguous(f), gc = contiguous(g), ac = contiguous(a),
               bc = contiguous(b), ec = contiguous(eps);
  Tensor out = new_empty(xc, {x.size(0), x.size(1), x.size(2)});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::gradient(batch_of<T>(xc, yc, bc, ec, cost), read<T>(fc), read<T>(gc), read<T>(ac), write<T>(out),
                  torch::stable::get_num_threads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CPU, m) {
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  m.impl("sinkhorn_transport", TORCH_BOX(&sinkhorn_transport));
  m.impl("sinkhorn_grad", TORCH_BOX(&sinkhorn_grad));
}
