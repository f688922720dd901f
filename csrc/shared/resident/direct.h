// Problems of any size: the iterations of solver.h with nothing kept on chip.
#pragma once

#include <cmath>
#include <cstdint>

#include "../sinkhorn_block.h"
#include "problem.h"

namespace fewstep::resident {

// 2^(h_j - cost) needs costs in units of eps ln 2.
template <typename T>
struct PairCost {
  Points<T> p;
  T k;
  FEWSTEP_HD T operator()(int i, int j) const {
    if (p.excluded(i, j)) return kInfinity<T>;
    const T* x = p.x + static_cast<int64_t>(i) * p.d;
    const T* y = p.y.point(j, p.d);
    T squared = 0;
    FEWSTEP_ROLLED
    for (int c = 0; c < p.d; ++c) squared += (x[c] - y[c]) * (x[c] - y[c]);
    return finish_cost(squared, p.cost) * k;
  }
};

// The same iterations for a problem of any size by one block that keeps nothing but potentials: each update is a
// log-sum-exp around its maximum, and a pair's distance is computed wherever it is needed. out.f, out.g and next [n]
// hold potentials in units of eps ln 2 meanwhile; scratch has one element per warp. One loop, though it is long: all
// its parts read and write the same dozen numbers, which stay in registers.
template <typename T, typename Team>
FEWSTEP_HD void solve_directly(const Team& team, const Points<T>& p, const Schedule<T>& s, const Marginals<T>& w, T eps,
                               T start, T* next, T* scratch, const block::Solution<T>& out) {
  T* f = out.f;
  T* const g = out.g;
  T relax = w.f0 == nullptr ? T(1) : s.relax, k = 1;
  FEWSTEP_ROLLED
  for (int i = team.rank(); i < p.n; i += team.size()) f[i] = w.f0 == nullptr ? T(0) : w.f0[i];
  FEWSTEP_ROLLED
  for (int j = team.rank(); j < p.m; j += team.size()) g[j] = w.g0 == nullptr ? T(0) : w.g0[j];
  T a_part = 0, b_part = 0;
  FEWSTEP_ROLLED
  for (int i = team.rank(); i < p.n; i += team.size()) a_part += w.a[i];
  FEWSTEP_ROLLED
  for (int j = team.rank(); j < p.m; j += team.size()) b_part += w.b[j];
  const T a_total = block::team_sum(team, a_part, scratch), b_total = block::team_sum(team, b_part, scratch);
  const T light = block::light_weight(team, w.a, p.n, scratch);
  int at_eps = 0, iterations = 0;
  T residual = 0, mass = 0;
  Temperatures<T> temperatures{start};
  bool measured = false, closing = false, averaged = s.simultaneous;
  const auto accept = [&] {
    FEWSTEP_ROLLED
    for (int i = team.rank(); i < p.n; i += team.size()) f[i] = next[i];
    team.sync();
  };
  while (true) {
    const T temperature = temperatures.next(s, eps);
    const T k_next = block::inverse_temperature(temperature), ratio = k_next / k;
    k = k_next;
    FEWSTEP_ROLLED
    for (int i = team.rank(); i < p.n; i += team.size()) f[i] = at_most_nowhere(f[i] * ratio);
    FEWSTEP_ROLLED
    for (int j = team.rank(); j < p.m; j += team.size()) g[j] = at_most_nowhere(g[j] * ratio);
    team.sync();
    const T damping_x = damping(s.rho_x, temperature), damping_y = damping(s.rho_y, temperature);
    const PairCost<T> cost{p, k};
    T error = 0, moved = 0;
    FEWSTEP_ROLLED
    for (int i = team.warp(); i < p.n; i += team.warps()) {
      T top = kLowest<T>;
      FEWSTEP_ROLLED
      for (int j = team.lane(); j < p.m; j += Team::kLanes) top = largest(g[j] + log2(w.b[j]) - cost(i, j), top);
      top = team.lane_max(top);
      T sum = 0;
      FEWSTEP_ROLLED
      for (int j = team.lane(); j < p.m; j += Team::kLanes) sum += exp2(g[j] + log2(w.b[j]) - cost(i, j) - top);
      const T soft = at_most_nowhere(-(top + log2(team.lane_sum(sum)))), full = damping_x * soft, a = w.a[i];
      if (a != 0 && team.lane() == 0) {
        const T row = soft > kFar<T> ? T(0) : exp2(f[i] - soft),
                wanted = std::isinf(s.rho_x) ? T(1) : exp2(-f[i] * temperature / s.rho_x);
        error += a * std::abs(row - wanted);
        moved += a * row;
      }
      if (team.lane() == 0) next[i] = relax == 1 || a == 0 ? full : f[i] + relax * (full - f[i]);
    }
    error = block::team_sum(team, error, scratch);
    moved = block::team_sum(team, moved, scratch);
    const auto soft_of_column = [&](int j) {
      T top = kLowest<T>;
      FEWSTEP_ROLLED
      for (int i = 0; i < p.n; ++i) top = largest(f[i] + log2(w.a[i]) - cost(i, j), top);
      T sum = 0;
      FEWSTEP_ROLLED
      for (int i = 0; i < p.n; ++i) sum += exp2(f[i] + log2(w.a[i]) - cost(i, j) - top);
      return at_most_nowhere(-(top + log2(sum)));
    };
    // The row update that follows an iteration at eps measures it.
    if (measured) {
      const bool last = ++at_eps == (closing ? s.last_steps() : s.max_iter), exact = !averaged || s.single;
      T off = 0;
      FEWSTEP_ROLLED
      for (int j = team.rank(); j < p.m && !exact && (last || s.tol >= 0); j += team.size()) {
        const T wanted = std::isinf(s.rho_y) ? T(1) : exp2(-g[j] * temperature / s.rho_y), soft = soft_of_column(j);
        const T column = soft > kFar<T> ? T(0) : exp2(g[j] - soft);
        if (w.b[j] != 0) off += w.b[j] * std::abs(column - wanted);
      }
      residual = largest(block::team_sum(team, off, scratch), error) / a_total;
      if (light > 0) {
        const T unseen = block::unsettled(team, w.a, f, next, p.n, light, relax, scratch);
        if (unseen > residual) residual = unseen;  // NaN stays
      }
      mass = moved;
      if (last || (s.tol >= 0 && residual <= s.tol)) {
        if (closing || !s.simultaneous) break;
        averaged = s.single;
        closing = true;
        measured = false;
        relax = 1;
        at_eps = 0;
        continue;
      }
    }
    if (!averaged) accept();
    FEWSTEP_ROLLED
    for (int j = team.rank(); j < p.m; j += team.size()) {
      const T full = damping_y * soft_of_column(j);
      g[j] = relax == 1 || w.b[j] == 0 ? full : g[j] + relax * (full - g[j]);
    }
    team.sync();
    if (averaged) accept();
    measured = temperatures.final;
    if (closing) continue;
    ++iterations;
    relax = s.relax;
  }
  FEWSTEP_ROLLED
  for (int i = team.rank(); i < p.n; i += team.size()) {
    if (w.a[i] == 0) f[i] = next[i];  // from the g that came out
    if (s.single) g[i] = f[i];
  }
  team.sync();
  Value<T> dual{k};
  FEWSTEP_ROLLED
  for (int i = team.rank(); i < p.n; i += team.size()) f[i] = dual.add(f[i], w.a[i], s.rho_x);
  FEWSTEP_ROLLED
  for (int j = team.rank(); j < p.m; j += team.size()) g[j] = dual.add(g[j], w.b[j], s.rho_y);
  T value = block::team_sum(team, dual.sum, scratch);
  if (block::team_sum(team, dual.beyond, scratch) > 0) residual = kInfinity<T>;
  if (s.plain()) mass = b_total;  // then columns are exact
  if (value != kInfinity<T>) value -= eps * (mass - a_total * b_total);
  if (team.rank() == 0) write_numbers(out, value, residual, iterations, s.converged_at);
  team.sync();
}

}  // namespace fewstep::resident
