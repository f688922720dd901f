// Runs csrc/shared/resident on the host: a request on stdin, the answer on stdout.
// Request: int64 {op, double?, ranks (0: one thread alone), wide (warps of 32 in a block: 2, 4, or 0 for others),
// batch, n, m, d, cost, diagonal, max_iter, has_start, scheduled, has_f0, has_g0, unit_start, precision, simultaneous,
// single}, double {tol, converged_at, factor, rho_x, rho_y, relax}, then the arrays of the op. An infinite rho is a
// constraint.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "requests.h"
#include "shared/resident/direct.h"
#include "shared/resident/distances.h"
#include "shared/resident/drift.h"
#include "shared/resident/layout.h"
#include "shared/resident/problem.h"
#include "shared/resident/solver.h"
#include "teams.h"

namespace {

using namespace fewstep;
using namespace fewstep::resident;

struct Request {
  int64_t op, is_double, ranks, wide, batch, n, m, d, cost, diagonal, max_iter, has_start, scheduled, has_f0, has_g0,
      unit, precision, simultaneous, single;
  double tol, converged_at, factor, rho_x, rho_y, relax;
};

enum Op { kSolve, kSolveDirectly, kDrift };

// Rows per warp and column groups per lane, so that small teams hold the problems of the tests.
constexpr int kAloneR = 16, kAloneQ = 24, kThreadsR = 4, kThreadsQ = 8, kWideR = 8, kWideQ = 2;

// run.operator()<R, Q, warps>(team, memory) by a team of which each block has `rows` rows of `m` columns at most.
template <typename T, int R, int Q, typename Team, typename Run>
void run_threads(int64_t ranks, int64_t n, int64_t m, int matrices, Run run) {
  using Block = Layout<R, Q, Team::kLanes, Team::kWarps>;
  const int64_t rows = (n + ranks - 1) / ranks;
  if (rows > Block::kRows || m > Block::kColumns) std::exit(4);
  run_cluster<T, Team>(static_cast<int>(ranks), Block::elements(rows, m, matrices),
                       [&](const Team& team, T* memory) { run.template operator()<R, Q, Team::kWarps>(team, memory); });
}

template <typename T, typename Run>
void run_team(int64_t ranks, int64_t wide, int64_t n, int64_t m, int matrices, Run run) {
  using Alone = Layout<kAloneR, kAloneQ, 1, 1>;
  if (wide == 2) return run_threads<T, kWideR, kWideQ, WideTeam<2>>(ranks, n, m, matrices, run);
  if (wide == 4) return run_threads<T, kWideR, kWideQ, WideTeam<4>>(ranks, n, m, matrices, run);
  if (ranks > 0) return run_threads<T, kThreadsR, kThreadsQ, Threads>(ranks, n, m, matrices, run);
  if (n > Alone::kRows || m > Alone::kColumns) std::exit(4);
  auto memory = poisoned<T>(Alone::elements(n, m, matrices));
  run.template operator()<kAloneR, kAloneQ, 1>(Single{}, memory.data());
}

template <typename T>
void solve_all(const Request& q) {
  const int64_t n = q.n, m = q.m, d = q.d;
  const auto x = input<T>(q.batch * n * d), y = input<T>(q.batch * m * d), a = input<T>(q.batch * n);
  const auto b = input<T>(q.batch * m), eps = input<T>(q.batch), start = input<T>(q.has_start * q.batch);
  const auto temperatures = input<T>(q.scheduled), f0 = input<T>(q.has_f0 * q.batch * n);
  const auto g0 = input<T>(q.has_g0 * q.batch * m);
  auto f = poisoned<T>(q.batch * n), g = poisoned<T>(q.batch * m), value = poisoned<T>(q.batch);
  auto residual = poisoned<T>(q.batch);
  std::vector<int64_t> iterations(q.batch);
  std::vector<char> converged(q.batch);
  const Schedule<T> schedule{temperatures.data(),      static_cast<int>(q.scheduled),
                             static_cast<T>(q.factor), static_cast<int>(q.max_iter),
                             static_cast<T>(q.tol),    static_cast<T>(q.converged_at),
                             static_cast<T>(q.rho_x),  static_cast<T>(q.rho_y),
                             static_cast<T>(q.relax),  q.unit != 0,
                             q.simultaneous != 0,      q.single != 0};
  // One team solves all, as a block that takes problem after problem from the queue does.
  auto each = [&](auto solve) {
    for (int64_t i = 0; i < q.batch; ++i) {
      int origin = 0;
      while (origin < n - 1 && a[i * n + origin] == 0) ++origin;
      const Columns<T> columns{{&y[i * m * d], &y[i * m * d], &y[i * m * d]}, {INT_MAX, INT_MAX, INT_MAX}};
      const Points<T> p{&x[i * n * d],
                        columns,
                        static_cast<int>(n),
                        static_cast<int>(m),
                        static_cast<int>(d),
                        fewstep::Cost(q.cost),
                        q.diagonal == INT64_MIN ? kNoDiagonal : static_cast<int>(q.diagonal),
                        0,
                        static_cast<int>(m),
                        static_cast<int>(q.precision),
                        origin};
      const Marginals<T> w{&a[i * n], &b[i * m], T(1), q.has_f0 ? &f0[i * n] : nullptr,
                           q.has_g0 ? &g0[i * m] : nullptr};
      const block::Solution<T> out{&f[i * n],    &g[i * m],      &value[i],
                                   &residual[i], &iterations[i], reinterpret_cast<bool*>(&converged[i])};
      solve(p, w, eps[i], q.has_start ? start[i] : T(0), out);
    }
  };
  if (q.op == kSolveDirectly) {
    auto next = poisoned<T>(n), scratch = poisoned<T>(kTeamWarps);
    auto run = [&](const auto& team) {
      each([&](const Points<T>& p, const Marginals<T>& w, T e, T s, const block::Solution<T>& out) {
        solve_directly(team, p, schedule, w, e, s, next.data(), scratch.data(), out);
      });
    };
    if (q.ranks == 0) {
      run(Single{});
    } else {
      run_cluster<T>(1, 0, [&](const Threads& team, T*) { run(team); });
    }
  } else {
    run_team<T>(q.ranks, q.wide, n, m, 0, [&]<int R, int Q, int kWarps>(const auto& team, T* memory) {
      each([&](const Points<T>& p, const Marginals<T>& w, T e, T s, const block::Solution<T>& out) {
        T k[R][Q];
        Solver<R, Q, kWarps, T, std::decay_t<decltype(team)>> solver(team, p, memory);
        solver.measure(k);
        solver.solve(k, schedule, w, e, s);
        solver.write(e, out);
      });
    });
  }
  output(f), output(g), output(value), output(residual), output(iterations), output(converged);
}

// Request's `n` points of x, `m` and `has_start` and `scheduled` those of y, x_self and uncond (0: none), `has_f0`
// temperatures, `has_g0` for the joint form; `tol` is the scale and `factor` the unit.
template <typename T>
void drift_all(const Request& q) {
  const int64_t counts[] = {q.m, q.has_start, q.scheduled}, n = q.n, d = q.d, temperatures = q.has_f0;
  const int cloud_count = counts[2] > 0 ? 3 : 2;
  const int64_t columns = counts[0] + counts[1] + counts[2];
  const int64_t plans = q.has_g0 ? 1 : cloud_count;
  const auto x = input<T>(q.batch * n * d);
  std::vector<T> clouds[3];
  for (int c = 0; c < 3; ++c) clouds[c] = input<T>(q.batch * counts[c] * d);
  const auto weights = input<T>(q.batch * columns), guidance = input<T>(q.batch), eps = input<T>(temperatures);
  auto velocity = poisoned<T>(temperatures * q.batch * n * d), squares = poisoned<T>(temperatures * q.batch);
  std::vector<T> metrics[3];
  for (auto& metric : metrics) metric = poisoned<T>(temperatures * q.batch * plans);
  const int64_t widest = q.has_g0 ? columns : largest(largest(counts[0], counts[1]), counts[2]);
  Drift<T> in{};
  in.x = x.data();
  for (int c = 0; c < 3; ++c) {
    in.clouds[c] = clouds[c].data();
    in.counts[c] = static_cast<int>(counts[c]);
  }
  in.cloud_count = cloud_count;
  in.weights = weights.data();
  in.guidance = guidance.data();
  in.groups = q.batch;
  in.n = static_cast<int>(n);
  in.d = static_cast<int>(d);
  in.cost = fewstep::Cost(q.cost);
  in.diagonal = q.diagonal == INT64_MIN ? kNoDiagonal : static_cast<int>(q.diagonal);
  in.precision = static_cast<int>(q.precision);
  in.joint = q.has_g0 != 0;
  in.eps = eps.data();
  in.temperatures = static_cast<int>(temperatures);
  in.max_iter = static_cast<int>(q.max_iter);
  in.velocity = velocity.data();
  in.squares = squares.data();
  in.residual = metrics[0].data();
  in.entropy = metrics[1].data();
  in.peak = metrics[2].data();
  // The temperatures of the tests in one pass, or in two.
  const int stacked = q.has_g0 ? 1 : 2;
  const auto units = [&] { return DriftUnits<T>{q.factor, static_cast<T>(q.tol)}; };
  std::vector<double> distances(q.batch), pairs(q.batch), scratch(32);
  const auto keep = [&](const auto& team, int64_t group, double distance, double weight) {
    if (team.rank() == 0) distances[group] = distance, pairs[group] = weight;
  };
  run_team<T>(q.ranks, q.wide, n, std::max(widest, n), stacked,
              [&]<int R, int Q, int kWarps>(const auto& team, T* memory) {
                for (int64_t i = 0; i < q.batch; ++i) {
                  drift_group<R, Q, kWarps, kMostStacked>(team, in, [&] { return i; }, units, stacked, memory);
                  if (is_squared(in.cost)) continue;
                  double weight;
                  const double distance = lengths_from<R, Q, kWarps>(team, in, i, memory, scratch.data(), &weight);
                  keep(team, i, distance, weight);
                }
              });
  auto measure = [&](const auto& team) {
    for (int64_t i = 0; i < q.batch; ++i) {
      double weight;
      const double distance = squares_from(team, in, i, scratch.data(), &weight);
      keep(team, i, distance, weight);
    }
  };
  if (!is_squared(in.cost)) {
  } else if (q.ranks == 0 || q.wide > 0) {
    measure(Single{});
  } else {
    run_cluster<T>(1, 0, [&](const Threads& team, T*) { measure(team); });
  }
  output(velocity), output(squares), output(distances), output(pairs);
  for (const auto& metric : metrics) output(metric);
}

template <typename T>
void serve(const Request& q) {
  q.op == kDrift ? drift_all<T>(q) : solve_all<T>(q);
}

}  // namespace

int main() {
  return serve_all<Request>([](const Request& q) { q.is_double ? serve<double>(q) : serve<float>(q); });
}
