// Runs the per-block kernels of csrc/shared/sinkhorn_block.h on the host: a request on stdin, the answer on stdout.
// Request: int64 {op, double?, threaded?, place, batch, n, m, d, k, cost, max_iter}, double {tol, converged_at}, then
// the arrays of the op in its order. Of a product a negative max_iter is a diagonal that is left out, less 3. Arrays
// are heap blocks of the exact size, for the sanitizers to watch.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "requests.h"
#include "shared/sinkhorn_block.h"
#include "teams.h"

namespace {

using namespace fewstep::block;

struct Request {
  int64_t op, is_double, threaded, place, batch, n, m, d, k, cost, max_iter;
  double tol, converged_at;
};

enum Op { kSolve, kTransport, kGradient };
enum Place { kShared, kWorkspace, kDirect };

template <typename Run>
void run_team(bool threaded, Run run) {
  if (!threaded) return run(Single{});
  run_cluster<char>(1, 0, [&](const Threads& team, char*) { run(team); });
}

template <typename T>
void solve_all(const Request& q) {
  const int64_t n = q.n, m = q.m, d = q.d;
  const auto x = input<T>(q.batch * n * d), y = input<T>(q.batch * m * d), a = input<T>(q.batch * n);
  const auto b = input<T>(q.batch * m), eps = input<T>(q.batch), g0 = input<T>(q.k * q.batch * m);
  auto f = poisoned<T>(q.batch * n), g = poisoned<T>(q.batch * m), value = poisoned<T>(q.batch);
  auto residual = poisoned<T>(q.batch);
  std::vector<int64_t> iterations(q.batch);
  std::vector<char> converged(q.batch);
  for (int64_t i = 0; i < q.batch; ++i) {
    const Problem<T> p{
        &x[i * n * d], &y[i * m * d],       &a[i * n],           &b[i * m],           q.k ? &g0[i * m] : nullptr,
        eps[i],        static_cast<int>(n), static_cast<int>(m), static_cast<int>(d), fewstep::Cost(q.cost)};
    const Solution<T> out{&f[i * n],    &g[i * m],      &value[i],
                          &residual[i], &iterations[i], reinterpret_cast<bool*>(&converged[i])};
    const Stop<T> stop{static_cast<int>(q.max_iter), static_cast<T>(q.tol), static_cast<T>(q.converged_at)};
    const int size = q.threaded ? kTeamThreads : 1;
    const int64_t vectors = vector_elements(n, m, size);
    // In shared memory the stage lies over the vectors.
    auto cost = poisoned<T>(q.place == kDirect ? 0 : n * m);
    auto working = poisoned<T>(q.place == kShared ? largest<int64_t>(vectors, kStageElements) : vectors);
    auto stage = poisoned<T>(q.place == kWorkspace ? kStageElements : 0);
    auto scratch = poisoned<T>(kTeamWarps);
    run_team(q.threaded, [&](const auto& team) {
      if (q.place == kDirect) {
        solve(team, DirectCost<T>{p, inverse_temperature(p.eps)}, p, stop, working.data(), scratch.data(), out);
        return;
      }
      fill_cost(team, p, q.place == kShared ? working.data() : stage.data(), cost.data());
      team.sync();
      if (q.place == kShared) {
        solve(team, CachedCost<T, int>{cost.data(), p.m}, p, stop, working.data(), scratch.data(), out);
      } else {
        solve(team, CachedCost<T, int64_t>{cost.data(), m}, p, stop, working.data(), scratch.data(), out);
      }
    });
  }
  output(f), output(g), output(value), output(residual), output(iterations), output(converged);
}

template <bool kGradient, typename T>
void apply_all(const Request& q) {
  const int64_t n = q.n, m = q.m, d = q.d, k = q.k;
  const auto x = input<T>(q.batch * n * d), y = input<T>(q.batch * m * d), f = input<T>(q.batch * n);
  const auto g = input<T>(q.batch * m), a = input<T>(kGradient ? q.batch * n : 0), b = input<T>(q.batch * m);
  const auto eps = input<T>(q.batch), v = input<T>(kGradient ? 0 : q.batch * m * k);
  auto out = poisoned<T>(q.batch * n * k), mass = poisoned<T>(kGradient ? 0 : q.batch * n);
  const int warps = q.threaded ? kTeamWarps : 1;
  for (int64_t i = 0; i < q.batch; ++i) {
    const Application<T> p{&x[i * n * d],
                           &y[i * m * d],
                           &f[i * n],
                           &g[i * m],
                           a.data() + (kGradient ? i * n : 0),
                           &b[i * m],
                           kGradient ? &y[i * m * d] : v.data() + i * m * k,
                           eps[i],
                           static_cast<int>(n),
                           static_cast<int>(m),
                           static_cast<int>(d),
                           static_cast<int>(k),
                           fewstep::Cost(q.cost),
                           q.max_iter < 0 ? static_cast<int>(q.max_iter) + 3 : kNoDiagonal,
                           out.data() + i * n * k,
                           mass.data() + (kGradient ? 0 : i * n)};
    auto stage = poisoned<T>(kStageElements), weights = poisoned<T>(warps * kRows * kColumns);
    run_team(q.threaded, [&](const auto& team) {
      // One block after the other, as a block that serves several tiles does.
      for (int row = 0; row * warps * kRows < p.n; ++row) {
        for (int value = 0; value == 0 || value * kValues < p.k; ++value) {
          apply<kGradient>(team, p, row, value, stage.data(), weights.data());
        }
      }
    });
  }
  output(out), output(mass);
}

template <typename T>
void serve(const Request& q) {
  q.op == kSolve ? solve_all<T>(q) : q.op == kTransport ? apply_all<false, T>(q) : apply_all<true, T>(q);
}

}  // namespace

int main() {
  return serve_all<Request>([](const Request& q) { q.is_double ? serve<double>(q) : serve<float>(q); });
}
