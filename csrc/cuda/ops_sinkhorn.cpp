#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>

#include "cuda/device.h"
#include "cuda/sinkhorn.cuh"
#include "cuda/sinkhorn_resident.cuh"
#include "shared/tensors.h"

namespace {

using fewstep::Cost;
using fewstep::cuda::check;
using fewstep::cuda::Device;
using namespace fewstep::tensors;

// Sizes are ints inside a block, with room for the end of a tile.
constexpr int64_t kMaxSize = int64_t{1} << 30;
constexpr double kDefaultTol = 1e-3;

void check_input(const Tensor& t, const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), "sinkhorn: ", name,
                  " must be on the device of x");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "sinkhorn: ", name, " must have the dtype of x");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), "sinkhorn: ", name, " must have ", shape.size(),
                  " dimensions, got ", t.dim());
  int64_t axis = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(t.size(axis) == size, "sinkhorn: ", name, " must have size ", size, " along axis ", axis, ", got ",
                    t.size(axis));
    STD_TORCH_CHECK(axis == 0 || size <= kMaxSize, "sinkhorn: ", name, " must have at most 2^30 points, got ", size);
    ++axis;
  }
}

void check_points(const Tensor& x, const Tensor& y, int64_t cost) {
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3, "sinkhorn: x and y must have 3 dimensions");
  check_input(x, "x", x, {x.size(0), x.size(1), x.size(2)});
  check_input(y, "y", x, {x.size(0), y.size(1), x.size(2)});
  STD_TORCH_CHECK(x.size(1) > 0 && y.size(1) > 0 && x.size(2) > 0, "sinkhorn: x and y must have points and D > 0");
  STD_TORCH_CHECK(fewstep::on_gpu(Cost(cost)), "sinkhorn: CUDA kernels have no cost ", cost);
}

// What a problem that stays on chip may have besides; a float32 one.
struct Options {
  const Maybe &f0, &g0, &segment_x, &segment_y, &start, &schedule;
  int64_t temperatures;
  std::optional<int64_t> diagonal;
  double factor;
  std::optional<double> rho_x, rho_y;
  double relax;
  bool simultaneous, single;
  int64_t precision;
  bool any() const {
    return segment_x || start || schedule || temperatures != 1 || diagonal || rho_x || rho_y || relax != 1 ||
           simultaneous;
  }
};

using Solution = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Solution solve_resident(const fewstep::cuda::ResidentPlan& plan, const Tensor& x, const Tensor& y, const Tensor& a,
                        const Tensor& b, const Tensor& eps, int64_t cost, int64_t max_iter, std::optional<double> tol,
                        const Options& o, cudaStream_t stream) {
  const int64_t n = x.size(1), m = y.size(1), problems = eps.size(0), lead = o.segment_x ? o.temperatures : problems;
  const Tensor xc = dense(x), yc = dense(y), ac = dense(a), bc = dense(b), ec = dense(eps);
  const Maybe f0 = dense_if(o.f0), g0 = dense_if(o.g0), start = dense_if(o.start), schedule = dense_if(o.schedule);
  const Maybe segment_x = dense_if(o.segment_x), segment_y = dense_if(o.segment_y);
  Tensor f = new_empty(x, {lead, n}), g = new_empty(x, {lead, m});
  Tensor value = new_empty(x, {problems}), residual = new_empty(x, {problems});
  Tensor iterations = new_empty(x, {problems}, ScalarType::Long);
  Tensor converged = new_empty(x, {problems}, ScalarType::Bool);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  fewstep::cuda::ResidentProblems in{};
  in.x = read<float>(xc);
  in.y = read<float>(yc);
  in.a = read<float>(ac);
  in.b = read<float>(bc);
  in.eps = read<float>(ec);
  in.start = read_if<float>(start);
  in.f0 = read_if<float>(f0);
  in.g0 = read_if<float>(g0);
  in.segment_x = read_if<int64_t>(segment_x);
  in.segment_y = read_if<int64_t>(segment_y);
  in.count = problems / o.temperatures;
  in.temperatures = o.temperatures;
  in.n = n;
  in.m = m;
  in.d = x.size(2);
  in.cost = Cost(cost);
  in.precision = o.precision;
  in.diagonal = o.diagonal.value_or(fewstep::cuda::kNoDiagonal64);
  in.schedule = read_if<float>(schedule);
  in.scheduled = schedule ? schedule->size(0) : 0;
  in.max_iter = max_iter;
  in.factor = static_cast<float>(o.factor);
  in.tol = static_cast<float>(tol.value_or(-1));
  in.converged_at = static_cast<float>(tol.value_or(kDefaultTol));
  in.rho_x = o.rho_x ? static_cast<float>(*o.rho_x) : kInfinity;
  in.rho_y = o.rho_y ? static_cast<float>(*o.rho_y) : kInfinity;
  in.relax = static_cast<float>(o.relax);
  in.simultaneous = o.simultaneous;
  in.single = o.single;
  in.f = write<float>(f);
  in.g = write<float>(g);
  in.value = write<float>(value);
  in.residual = write<float>(residual);
  in.iterations = write<int64_t>(iterations);
  in.converged = write<bool>(converged);
  const Tensor queue = new_empty(x, {2}, ScalarType::Int), workspace = new_empty(x, {o.segment_x ? n : 0});
  check(fewstep::cuda::solve_resident(plan, in, write<int>(queue), write<float>(workspace), stream));
  return {f, g, value, residual, iterations, converged};
}

Solution sinkhorn(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& eps,
                  const Maybe& f0, const Maybe& g0, const Maybe& matrix, const Maybe& segment_x, const Maybe& segment_y,
                  const Maybe& label_x, const Maybe& label_y, const Maybe& label_cost, int64_t cost,
                  std::optional<int64_t> diagonal, int64_t max_iter, std::optional<double> tol, const Maybe& start,
                  double factor, const Maybe& schedule, std::optional<double> rho_x, std::optional<double> rho_y,
                  double relax, bool simultaneous, bool single, int64_t, int64_t precision, bool closing) {
  STD_TORCH_CHECK(!matrix && !label_x && !label_y && !label_cost, "sinkhorn: CUDA kernels have no matrix or labels");
  check_points(x, y, cost);
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  STD_TORCH_CHECK(!single || (simultaneous && n == m), "sinkhorn: one potential is for symmetric updates of x with x");
  STD_TORCH_CHECK(closing == simultaneous, "sinkhorn: CUDA kernels close symmetric updates by alternating ones");
  check_input(a, "a", x, {batch, n});
  check_input(b, "b", x, {batch, m});
  STD_TORCH_CHECK(segment_x.has_value() == segment_y.has_value() && (!segment_x || batch == 1),
                  "sinkhorn: segments of x and y go together, over flat points");
  const int64_t count = segment_x ? segment_x->size(0) - 1 : batch;
  const int64_t temperatures = count > 0 ? eps.size(0) / count : 1;
  check_input(eps, "eps", x, {count * temperatures});
  const int64_t lead = segment_x ? temperatures : count * temperatures;
  if (f0) check_input(*f0, "f0", x, {lead, n});
  if (g0) check_input(*g0, "g0", x, {lead, m});
  if (start) check_input(*start, "start", x, {count * temperatures});
  if (schedule) check_input(*schedule, "schedule", x, {schedule->size(0)});
  STD_TORCH_CHECK(1 <= max_iter && max_iter <= INT32_MAX, "sinkhorn: max_iter must be in 1..2^31-1, got ", max_iter);
  STD_TORCH_CHECK(!diagonal || (-kMaxSize <= *diagonal && *diagonal <= kMaxSize), "sinkhorn: diagonal is too far off");
  // An alternating iteration overwrites f0, unless it is relaxed.
  const Options options{f0,     g0,    segment_x, segment_y, start,        schedule, temperatures, diagonal,
                        factor, rho_x, rho_y,     relax,     simultaneous, single,   precision};
  if (x.scalar_type() == ScalarType::Float && count > 0) {
    const Device device(x);
    fewstep::cuda::ResidentPlan plan;
    // Of segments only the total is known here; larger ones than planned for have a kernel of their own.
    check(segment_x ? fewstep::cuda::plan_segments(n, m, &plan) : fewstep::cuda::plan_resident(n, m, &plan));
    if (plan.columns > 0) {
      return solve_resident(plan, x, y, a, b, eps, cost, max_iter, tol, options, device.stream);
    }
  }
  STD_TORCH_CHECK(count == 0 || !options.any(),
                  "sinkhorn: CUDA kernels serve this for small float32 problems only, got [", n, ", ", m, "]");

  Tensor f = new_empty(x, {lead, n}), g = new_empty(x, {lead, m});
  Tensor value = new_empty(x, {batch}), residual = new_empty(x, {batch});
  Tensor iterations = new_empty(x, {batch}, ScalarType::Long), converged = new_empty(x, {batch}, ScalarType::Bool);
  if (batch > 0) {
    const Device device(x);
    const Tensor xc = dense(x), yc = dense(y), ac = dense(a), bc = dense(b), ec = dense(eps);
    const Tensor gc = g0 ? dense(*g0) : g;
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      fewstep::cuda::SinkhornPlan plan;
      check(fewstep::cuda::plan_sinkhorn(batch, n, m, sizeof(T), &plan));
      // Freed on return; torch hands it out again in stream order, after the kernel.
      const Tensor workspace = new_empty(x, {plan.workspace_elements()});
      const fewstep::cuda::SinkhornProblems<T> in{read<T>(xc),
                                                  read<T>(yc),
                                                  read<T>(ac),
                                                  read<T>(bc),
                                                  read<T>(ec),
                                                  g0 ? read<T>(gc) : nullptr,
                                                  batch,
                                                  n,
                                                  m,
                                                  d,
                                                  Cost(cost),
                                                  max_iter,
                                                  tol.value_or(-1),
                                                  tol.value_or(kDefaultTol),
                                                  write<T>(f),
                                                  write<T>(g),
                                                  write<T>(value),
                                                  write<T>(residual),
                                                  write<int64_t>(iterations),
                                                  write<bool>(converged)};
      check(fewstep::cuda::sinkhorn(plan, in, write<T>(workspace), device.stream));
    });
  }
  return {f, g, value, residual, iterations, converged};
}

// The points of a product, for eps of all problems.
fewstep::cuda::Clouds clouds_of(const Tensor& x, const Tensor& y, const Tensor& f, const Tensor& g, const Tensor& eps,
                                const Maybe& matrix, const Maybe& segment_x, const Maybe& segment_y,
                                const Maybe& label_x, const Maybe& label_y, const Maybe& label_cost, int64_t cost,
                                std::optional<int64_t> diagonal) {
  STD_TORCH_CHECK(!matrix && !label_x && !label_y && !label_cost, "sinkhorn: CUDA kernels have no matrix or labels");
  STD_TORCH_CHECK(segment_x.has_value() == segment_y.has_value(), "sinkhorn: segments of x and y go together");
  STD_TORCH_CHECK(!diagonal || (-kMaxSize <= *diagonal && *diagonal <= kMaxSize), "sinkhorn: diagonal is too far off");
  check_points(x, y, cost);
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1), problems = eps.size(0);
  const int64_t count = segment_x ? segment_x->size(0) - 1 : batch;
  check_input(eps, "eps", x, {problems});
  STD_TORCH_CHECK(segment_x    ? problems == count
                  : count == 0 ? problems == 0
                               : problems % count == 0,
                  "sinkhorn: eps must have a multiple of ", count, " elements, got ", problems);
  check_input(f, "f", x, {segment_x ? 1 : problems, n});
  check_input(g, "g", x, {segment_x ? 1 : problems, m});
  const int64_t temperatures = segment_x || count == 0 ? 1 : problems / count;
  return {problems,
          temperatures,
          n,
          m,
          x.size(2),
          read_if<int64_t>(segment_x),
          read_if<int64_t>(segment_y),
          diagonal.value_or(INT64_MIN),
          Cost(cost)};
}

std::tuple<Tensor, Tensor> sinkhorn_transport(const Tensor& x, const Tensor& y, const Tensor& f, const Tensor& g,
                                              const Tensor& b, const Tensor& eps, const Tensor& v, const Maybe& matrix,
                                              const Maybe& segment_x, const Maybe& segment_y, const Maybe& label_x,
                                              const Maybe& label_y, const Maybe& label_cost, int64_t cost,
                                              std::optional<int64_t> diagonal) {
  const Maybe cut_x = dense_if(segment_x);
  const Maybe cut_y = dense_if(segment_y);
  const auto clouds = clouds_of(x, y, f, g, eps, matrix, cut_x, cut_y, label_x, label_y, label_cost, cost, diagonal);
  STD_TORCH_CHECK(v.dim() == 3, "sinkhorn: v must have 3 dimensions, got ", v.dim());
  const int64_t k = v.size(2), lead = f.size(0);
  check_input(b, "b", x, {x.size(0), clouds.m});
  check_input(v, "v", x, {lead, clouds.m, k});

  Tensor out = new_empty(x, {lead, clouds.n, k}), mass = new_empty(x, {lead, clouds.n});
  if (clouds.batch > 0) {
    const Device device(x);
    const Tensor xc = dense(x), yc = dense(y), fc = dense(f), gc = dense(g);
    const Tensor bc = dense(b), ec = dense(eps), vc = dense(v);
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      check(fewstep::cuda::sinkhorn_transport(clouds, read<T>(xc), read<T>(yc), read<T>(fc), read<T>(gc), read<T>(bc),
                                              read<T>(ec), read<T>(vc), k, write<T>(out), write<T>(mass),
                                              device.stream));
    });
  }
  return {out, mass};
}

Tensor sinkhorn_grad(const Tensor& x, const Tensor& y, const Tensor& f, const Tensor& g, const Tensor& a,
                     const Tensor& b, const Tensor& eps, const Maybe& matrix, const Maybe& segment_x,
                     const Maybe& segment_y, const Maybe& label_x, const Maybe& label_y, const Maybe& label_cost,
                     int64_t cost, std::optional<int64_t> diagonal) {
  const Maybe cut_x = dense_if(segment_x);
  const Maybe cut_y = dense_if(segment_y);
  const auto clouds = clouds_of(x, y, f, g, eps, matrix, cut_x, cut_y, label_x, label_y, label_cost, cost, diagonal);
  check_input(a, "a", x, {x.size(0), clouds.n});
  check_input(b, "b", x, {x.size(0), clouds.m});

  Tensor grad_x = new_empty(x, {f.size(0), clouds.n, clouds.d});
  if (clouds.batch > 0) {
    const Device device(x);
    const Tensor xc = dense(x), yc = dense(y), fc = dense(f), gc = dense(g);
    const Tensor ac = dense(a), bc = dense(b), ec = dense(eps);
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      check(fewstep::cuda::sinkhorn_grad(clouds, read<T>(xc), read<T>(yc), read<T>(fc), read<T>(gc), read<T>(ac),
                                         read<T>(bc), read<T>(ec), write<T>(grad_x), device.stream));
    });
  }
  return grad_x;
}

Solution sinkhorn_drift(const Tensor& x, const Tensor& y, const Tensor& x_self, const Maybe& uncond,
                        const Tensor& weights, const Tensor& guidance, const Tensor& eps, int64_t cost,
                        int64_t max_iter, bool joint, bool scaled, bool unit, std::optional<int64_t> diagonal, int64_t,
                        int64_t precision) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "sinkhorn_drift: CUDA kernels have float32 only");
  check_points(x, y, cost);
  check_points(x, x_self, cost);
  if (uncond) check_points(x, *uncond, cost);
  const int64_t groups = x.size(0), n = x.size(1), d = x.size(2), count = eps.size(0), clouds = uncond ? 3 : 2;
  const int64_t columns = y.size(1) + x_self.size(1) + (uncond ? uncond->size(1) : 0);
  check_input(weights, "weights", x, {groups, columns});
  check_input(guidance, "guidance", x, {groups});
  check_input(eps, "eps", x, {count});
  STD_TORCH_CHECK(1 <= max_iter && max_iter <= INT32_MAX, "sinkhorn_drift: max_iter must be in 1..2^31-1");
  STD_TORCH_CHECK(!diagonal || (-kMaxSize <= *diagonal && *diagonal <= kMaxSize), "sinkhorn_drift: diagonal");

  fewstep::cuda::DriftProblems in{};
  in.groups = groups;
  in.temperatures = count;
  in.n = n;
  in.d = d;
  in.cost = Cost(cost);
  in.precision = precision;
  in.max_iter = max_iter;
  in.diagonal = diagonal.value_or(fewstep::cuda::kNoDiagonal64);
  in.joint = joint;
  in.scaled = scaled;
  in.unit = unit;
  in.cloud_count = clouds;
  in.counts[0] = y.size(1);
  in.counts[1] = x_self.size(1);
  in.counts[2] = uncond ? uncond->size(1) : 0;
  Tensor velocity = new_empty(x, {unit ? 1 : count, groups, n, d});
  Tensor scale = new_empty(x, {}), rms = new_empty(x, {count}), residual = new_empty(x, {count, groups, in.plans()});
  Tensor entropy = new_empty(x, {count, groups, in.plans()}), peak = new_empty(x, {count, groups, in.plans()});
  const Device device(x);
  STD_TORCH_CHECK(fewstep::cuda::drift_fits(in), "sinkhorn_drift: CUDA kernels have groups of up to ",
                  fewstep::cuda::kMaxDriftRows, " points and plans of up to ", fewstep::cuda::kMaxDriftColumns,
                  ", got ", n, " and ", columns);
  const Tensor xc = dense(x), yc = dense(y), sc = dense(x_self), wc = dense(weights);
  const Tensor uc = uncond ? dense(*uncond) : sc, gc = dense(guidance), ec = dense(eps);
  in.x = read<float>(xc);
  in.clouds[0] = read<float>(yc);
  in.clouds[1] = read<float>(sc);
  in.clouds[2] = read<float>(uc);
  in.weights = read<float>(wc);
  in.guidance = read<float>(gc);
  in.eps = read<float>(ec);
  in.velocity = write<float>(velocity);
  in.scale = write<float>(scale);
  in.rms = write<float>(rms);
  in.residual = write<float>(residual);
  in.entropy = write<float>(entropy);
  in.peak = write<float>(peak);
  // Freed on return; torch hands them out again in stream order, after the kernels.
  const Tensor parts = new_empty(x, {in.parts_elements()}), sums = new_empty(x, {in.sums_elements()});
  const Tensor queue = new_empty(x, {1}, ScalarType::Int);
  check(fewstep::cuda::drift(in, write<float>(parts), write<float>(sums), write<int>(queue), device.stream));
  return {velocity, scale, rms, residual, entropy, peak};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CUDA, m) {
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  m.impl("sinkhorn_transport", TORCH_BOX(&sinkhorn_transport));
  m.impl("sinkhorn_grad", TORCH_BOX(&sinkhorn_grad));
  m.impl("sinkhorn_drift", TORCH_BOX(&sinkhorn_drift));
}
