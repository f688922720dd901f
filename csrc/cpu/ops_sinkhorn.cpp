// The CPU ops: tensors in, pointers to the drivers. Users' mistakes are caught in Python; checks here are invariants.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "cpu/drift.h"
#include "cpu/parallel.h"
#include "cpu/sinkhorn.h"
#include "cpu/tensors.h"

namespace {

using namespace fewstep::tensors;
namespace cpu = fewstep::cpu;

// A tensor whose problems are contiguous inside; a problem may be repeated by a stride of 0.
Tensor rows_contiguous(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i > 0; --i) {
    if (t.size(i) != 1 && t.stride(i) != expected) return contiguous(t);
    expected *= t.size(i);
  }
  return t;
}

// The arguments that every op has, held while their pointers are in use.
struct Problems {
  Tensor x, y, a, b, eps;
  Maybe matrix, segment_x, segment_y, label_x, label_y, label_cost;
  int64_t cost;
  std::optional<int64_t> diagonal;

  int64_t count() const { return segment_x.has_value() ? segment_x->size(0) - 1 : x.size(0); }
  int64_t temperatures() const { return count() == 0 ? 1 : eps.size(0) / count(); }
  // Rows of the potentials: problems, or temperatures of flat points.
  int64_t lead() const { return segment_x.has_value() ? temperatures() : eps.size(0); }

  template <class T>
  cpu::Batch<T> batch() const {
    const int64_t d = x.size(2);
    return {count(),
            temperatures(),
            x.size(1),
            y.size(1),
            d,
            read<T>(x),
            x.stride(0),
            d,
            read<T>(y),
            y.stride(0),
            d,
            read<T>(a),
            read<T>(b),
            a.stride(0),
            b.stride(0),
            read<T>(eps),
            read_if<T>(matrix),
            read_if<int64_t>(segment_x),
            read_if<int64_t>(segment_y),
            read_if<int64_t>(label_x),
            read_if<int64_t>(label_y),
            read_if<T>(label_cost),
            label_cost.has_value() ? label_cost->size(0) : 0,
            label_cost.has_value() ? label_cost->size(1) : 0,
            diagonal.value_or(cpu::kNoDiagonal),
            fewstep::Cost(cost)};
  }
};

Problems problems(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& eps,
                  const Maybe& matrix, const Maybe& segment_x, const Maybe& segment_y, const Maybe& label_x,
                  const Maybe& label_y, const Maybe& label_cost, int64_t cost, std::optional<int64_t> diagonal) {
  return {rows_contiguous(x),
          rows_contiguous(y),
          rows_contiguous(a),
          rows_contiguous(b),
          contiguous(eps),
          dense_if(matrix),
          dense_if(segment_x),
          dense_if(segment_y),
          dense_if(label_x),
          dense_if(label_y),
          dense_if(label_cost),
          cost,
          diagonal};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using OutputsWithGrad = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of the values for x and y, which one look at each pair gives beside the solution; empty where unwanted.
OutputsWithGrad sinkhorn_with_grad(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                                   const Tensor& eps, const Maybe& f0, const Maybe& g0, const Maybe& matrix,
                                   const Maybe& segment_x, const Maybe& segment_y, const Maybe& label_x,
                                   const Maybe& label_y, const Maybe& label_cost, int64_t cost,
                                   std::optional<int64_t> diagonal, int64_t max_iter, std::optional<double> tol,
                                   const Maybe& start, double factor, const Maybe& schedule,
                                   std::optional<double> rho_x, std::optional<double> rho_y, double relax,
                                   bool simultaneous, bool self, int64_t memory_limit, int64_t, bool closing,
                                   bool want_x, bool want_y) {
  constexpr double kDefaultTol = 1e-3, kBalanced = std::numeric_limits<double>::infinity();
  const Problems p =
      problems(x, y, a, b, eps, matrix, segment_x, segment_y, label_x, label_y, label_cost, cost, diagonal);
  const Maybe fc = dense_if(f0), gc = dense_if(g0), from = dense_if(start), steps = dense_if(schedule);
  const int64_t count = eps.size(0), d = x.size(2);
  Tensor f = new_empty(p.x, {p.lead(), x.size(1)}), g = new_empty(p.x, {p.lead(), y.size(1)});
  Tensor value = new_empty(p.x, {count}), residual = new_empty(p.x, {count});
  Tensor iterations = new_empty(p.x, {count}, ScalarType::Long), converged = new_empty(p.x, {count}, ScalarType::Bool);
  Tensor grad_x = new_empty(p.x, {want_x ? p.lead() : 0, x.size(1), d});
  Tensor grad_y = new_empty(p.x, {want_y ? p.lead() : 0, y.size(1), d});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Solve<T> s{read_if<T>(fc),
                          read_if<T>(gc),
                          max_iter,
                          tol.value_or(-1.0),
                          read_if<T>(from),
                          factor,
                          read_if<T>(steps),
                          steps.has_value() ? steps->size(0) : 0,
                          rho_x.value_or(kBalanced),
                          rho_y.value_or(kBalanced),
                          relax,
                          simultaneous,
                          closing,
                          self,
                          memory_limit,
                          write<T>(f),
                          write<T>(g),
                          write<T>(value),
                          write<T>(residual),
                          write<int64_t>(iterations),
                          want_x ? write<T>(grad_x) : nullptr,
                          want_y ? write<T>(grad_y) : nullptr};
    cpu::solve(p.batch<T>(), s, torch::stable::get_num_threads());
    bool* flags = write<bool>(converged);
    for (int64_t i = 0; i < count; ++i) {
      flags[i] = s.residual[i] <= tol.value_or(kDefaultTol) && std::isfinite(s.value[i]);
    }
  });
  return {f, g, value, residual, iterations, converged, grad_x, grad_y};
}

Outputs sinkhorn(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& eps, const Maybe& f0,
                 const Maybe& g0, const Maybe& matrix, const Maybe& segment_x, const Maybe& segment_y,
                 const Maybe& label_x, const Maybe& label_y, const Maybe& label_cost, int64_t cost,
                 std::optional<int64_t> diagonal, int64_t max_iter, std::optional<double> tol, const Maybe& start,
                 double factor, const Maybe& schedule, std::optional<double> rho_x, std::optional<double> rho_y,
                 double relax, bool simultaneous, bool self, int64_t memory_limit, int64_t precision, bool closing) {
  auto [f, g, value, residual, iterations, converged, grad_x, grad_y] =
      sinkhorn_with_grad(x, y, a, b, eps, f0, g0, matrix, segment_x, segment_y, label_x, label_y, label_cost, cost,
                         diagonal, max_iter, tol, start, factor, schedule, rho_x, rho_y, relax, simultaneous, self,
                         memory_limit, precision, closing, false, false);
  return {f, g, value, residual, iterations, converged};
}

std::tuple<Tensor, Tensor> sinkhorn_transport(const Tensor& x, const Tensor& y, const Tensor& f, const Tensor& g,
                                              const Tensor& b, const Tensor& eps, const Tensor& v, const Maybe& matrix,
                                              const Maybe& segment_x, const Maybe& segment_y, const Maybe& label_x,
                                              const Maybe& label_y, const Maybe& label_cost, int64_t cost,
                                              std::optional<int64_t> diagonal) {
  const Problems p =
      problems(x, y, f, b, eps, matrix, segment_x, segment_y, label_x, label_y, label_cost, cost, diagonal);
  const Tensor fc = contiguous(f), gc = contiguous(g), vc = rows_contiguous(v);
  Tensor out = new_empty(p.x, {p.lead(), x.size(1), v.size(2)}), mass = new_empty(p.x, {p.lead(), x.size(1)});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::transport(p.batch<T>(), read<T>(fc), read<T>(gc), read<T>(vc), vc.stride(0), v.size(2), write<T>(out),
                   write<T>(mass), torch::stable::get_num_threads());
  });
  return {out, mass};
}

Tensor sinkhorn_grad(const Tensor& x, const Tensor& y, const Tensor& f, const Tensor& g, const Tensor& a,
                     const Tensor& b, const Tensor& eps, const Maybe& matrix, const Maybe& segment_x,
                     const Maybe& segment_y, const Maybe& label_x, const Maybe& label_y, const Maybe& label_cost,
                     int64_t cost, std::optional<int64_t> diagonal) {
  const Problems p =
      problems(x, y, a, b, eps, matrix, segment_x, segment_y, label_x, label_y, label_cost, cost, diagonal);
  const Tensor fc = contiguous(f), gc = contiguous(g);
  Tensor out = new_empty(p.x, {p.lead(), x.size(1), x.size(2)});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::gradient<T>(p.batch<T>(), read<T>(fc), read<T>(gc), write<T>(out), nullptr, torch::stable::get_num_threads());
  });
  return out;
}

// A pass over a part of the rows, x [1, N, D]; the sums are empty where unwanted, and the numbers are the part's L1
// error of the rows before the pass, their mass, and the sum of their weights.
std::tuple<Tensor, Tensor, Tensor> sinkhorn_part(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& h,
                                                 const Maybe& f, int64_t cost, double scale, double damping,
                                                 double target, bool want_columns) {
  const Tensor hc = contiguous(h), none = new_empty(x, {1});
  const Problems p = problems(x, y, contiguous(a), hc, none, {}, {}, {}, {}, {}, {}, cost, {});
  const Maybe fc = dense_if(f);
  const int64_t n = x.size(1), m = y.size(1);
  Tensor f_next = new_empty(p.x, {n}), columns = new_empty(p.x, {want_columns ? m : 0});
  Tensor numbers = new_empty(p.x, {3}, ScalarType::Double);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const cpu::PartPass<T> part{scale,          {damping, 1, target}, read<T>(hc),
                                read_if<T>(fc), write<T>(f_next),     want_columns ? write<T>(columns) : nullptr};
    const cpu::PassResult result = cpu::part_pass(p.batch<T>(), part, torch::stable::get_num_threads());
    double* out = write<double>(numbers);
    out[0] = result.residual;
    out[1] = result.mass;
    out[2] = result.weight;
  });
  return {f_next, columns, numbers};
}

// A tensor whose rows are contiguous; groups and rows may have any stride.
Tensor coordinates_contiguous(const Tensor& t) { return t.size(2) == 1 || t.stride(2) == 1 ? t : contiguous(t); }

template <class T>
cpu::Cloud<T> cloud_of(const Tensor& t) {
  return {read<T>(t), t.size(1), t.stride(0), t.stride(1)};
}

Outputs sinkhorn_drift(const Tensor& x, const Tensor& y, const Tensor& x_self, const Maybe& uncond,
                       const Tensor& weights, const Tensor& guidance, const Tensor& eps, int64_t cost, int64_t max_iter,
                       bool joint, bool scaled, bool unit, std::optional<int64_t> diagonal, int64_t memory_limit,
                       int64_t) {
  const Tensor xc = coordinates_contiguous(x), yc = coordinates_contiguous(y), sc = coordinates_contiguous(x_self);
  const Maybe uc = uncond.has_value() ? Maybe(coordinates_contiguous(*uncond)) : std::nullopt;
  const Tensor wc = contiguous(weights), gc = contiguous(guidance), ec = contiguous(eps);
  const int64_t groups = x.size(0), n = x.size(1), d = x.size(2), count = eps.size(0);
  const int64_t clouds = uc.has_value() ? 3 : 2, plans = joint ? 1 : clouds;
  Tensor velocity = new_empty(xc, {unit ? 1 : count, groups, n, d});
  Tensor scale = new_empty(xc, {}), rms = new_empty(xc, {count});
  Tensor residual = new_empty(xc, {count, groups, plans}), entropy = new_empty(xc, {count, groups, plans}),
         peak = new_empty(xc, {count, groups, plans});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Drift<T> in{groups,
                           d,
                           count,
                           cloud_of<T>(xc),
                           {cloud_of<T>(yc), cloud_of<T>(sc), uc.has_value() ? cloud_of<T>(*uc) : cpu::Cloud<T>{}},
                           clouds,
                           read<T>(wc),
                           read<T>(gc),
                           read<T>(ec),
                           fewstep::Cost(cost),
                           max_iter,
                           joint,
                           scaled,
                           unit,
                           diagonal.value_or(cpu::kNoDiagonal),
                           memory_limit,
                           write<T>(velocity),
                           write<T>(scale),
                           write<T>(rms),
                           write<T>(residual),
                           write<T>(entropy),
                           write<T>(peak)};
    cpu::drift(in, torch::stable::get_num_threads());
  });
  return {velocity, scale, rms, residual, entropy, peak};
}

}  // namespace

void fewstep::cpu::launch(int64_t threads, const std::function<void(int64_t)>& member) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) member(i);
  });
}

STABLE_TORCH_LIBRARY_IMPL(fewstep, CPU, m) {
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  m.impl("sinkhorn_with_grad", TORCH_BOX(&sinkhorn_with_grad));
  m.impl("sinkhorn_transport", TORCH_BOX(&sinkhorn_transport));
  m.impl("sinkhorn_grad", TORCH_BOX(&sinkhorn_grad));
  m.impl("sinkhorn_part", TORCH_BOX(&sinkhorn_part));
  m.impl("sinkhorn_drift", TORCH_BOX(&sinkhorn_drift));
}
