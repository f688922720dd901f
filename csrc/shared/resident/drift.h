// The drift of a group: all its plans at all temperatures, and their barycentres.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

#include "../sinkhorn_block.h"
#include "barycentres.h"
#include "distances.h"
#include "layout.h"
#include "problem.h"
#include "solver.h"

namespace fewstep::resident {

// A drift: the clouds of all groups, and where the results of group 0 go.
template <typename T>
struct Drift {
  const T* x;               // [groups, n, d]
  const T* clouds[kParts];  // y, x_self, uncond: [groups, counts, d]
  int counts[kParts];
  int cloud_count;
  const T* weights;   // [groups, sum of counts], relative
  const T* guidance;  // [groups]
  int64_t groups;
  int n, d, diagonal, precision;
  Cost cost;
  bool joint;
  const T* eps;  // [temperatures], in units of `unit`
  int temperatures, max_iter;
  T* velocity;                   // [temperatures, groups, n, d]
  T* squares;                    // [temperatures, groups]
  T *residual, *entropy, *peak;  // [temperatures, groups, plans]
};

// What drift_group() asks for.
template <typename T>
struct DriftUnits {
  double temperature;
  T length;
};

// A group's share of the mean squared distance from x, sum_iu w_u |x_i - u|^2, and the weights of its pairs. x counts
// as a cloud of weights 1 where x_self does not stand for it. It comes from moments about a point c of x, sum_u w_u
// sum_i |x_i - c|^2 + n sum_u w_u |u - c|^2 - 2 sum_i (x_i - c) . sum_u w_u (u - c), coordinate by coordinate. scratch
// has one element per warp.
template <typename T, typename Team>
FEWSTEP_HD double squares_from(const Team& team, const Drift<T>& in, int64_t group, double* scratch, double* weight) {
  const T* const x = in.x + group * in.n * in.d;
  const T* w = in.weights + group * (static_cast<int64_t>(in.counts[0]) + in.counts[1] + in.counts[2]);
  double distance = 0;
  *weight = 0;
  for (int c = in.diagonal == kNoDiagonal ? -1 : 0; c < (in.joint ? in.cloud_count : 2); ++c) {
    const int count = c < 0 ? in.n : c == 0 ? in.counts[0] : c == 1 ? in.counts[1] : in.counts[2];
    const T* const cloud = c == 0 ? in.clouds[0] : c == 1 ? in.clouds[1] : in.clouds[2];
    const T* const points = c < 0 ? x : cloud + group * count * in.d;
    double total = 0;
    for (int j = 0; j < count; ++j) total += c < 0 ? 1.0 : double(w[j]);
    *weight += total * in.n;
    for (int k = team.rank(); k < in.d; k += team.size()) {
      const T centre = x[k];
      double first_x = 0, square_x = 0, first = 0, square = 0;
      for (int i = 0; i < in.n; ++i) {
        const double v = double(x[static_cast<int64_t>(i) * in.d + k] - centre);
        first_x += v;
        square_x += v * v;
      }
      for (int j = 0; j < count; ++j) {
        const double v = double(points[static_cast<int64_t>(j) * in.d + k] - centre);
        const double wj = c < 0 ? 1.0 : double(w[j]);
        first += wj * v;
        square += wj * v * v;
      }
      distance += total * square_x + in.n * square - 2 * first_x * first;
    }
    if (c >= 0) w += count;
  }
  return block::team_sum(team, distance, scratch);
}

// The pairs of a plan, and the weights of its columns.
template <typename T>
struct Plan {
  Points<T> points;
  const T* weights;
};

template <typename T>
FEWSTEP_HD Plan<T> plan_of(const Drift<T>& in, int64_t group, int plan) {
  const T* const x = in.x + group * in.n * in.d;
  Points<T> p{x, {}, in.n, 0, in.d, in.cost, kNoDiagonal, 0, 0, in.precision, 0};
  const T* weights = in.weights + group * (static_cast<int64_t>(in.counts[0]) + in.counts[1] + in.counts[2]);
  FEWSTEP_UNROLL
  for (int c = 0; c < kParts; ++c) {
    p.y.data[c] = x;
    p.y.end[c] = INT_MAX;
  }
  // Indices known at compile time keep all of this in registers.
  FEWSTEP_UNROLL
  for (int c = 0; c < kParts; ++c) {
    if (c >= in.cloud_count) continue;
    if (!in.joint && c < plan) weights += in.counts[c];
    if (!in.joint && c != plan) continue;
    if (c == 1 && in.diagonal != kNoDiagonal) {
      p.diagonal = in.diagonal;
      p.diagonal_begin = p.m;
      p.diagonal_end = p.m + in.counts[c];
    }
    p.m += in.counts[c];
    const T* const cloud = in.clouds[c] + group * in.counts[c] * in.d;
    if (!in.joint) {
      p.y.data[0] = cloud;
      continue;
    }
    p.y.data[c] = cloud;
    if (c + 1 < in.cloud_count) p.y.end[c] = p.m;
  }
  return {p, weights};
}

// squares_from() of the distances themselves: measured as for the plans, but without rounding to halves alone, which
// all plans would feel.
template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD double lengths_from(const Team& team, const Drift<T>& in, int64_t group, T* memory, double* scratch,
                               double* weight) {
  T c[R][Q];
  double distance = 0;
  *weight = 0;
  FEWSTEP_ROLLED
  for (int plan = in.diagonal == kNoDiagonal ? -1 : 0; plan < (in.joint ? 1 : 2); ++plan) {
    auto [p, weights] = plan_of(in, group, plan);
    p.diagonal = kNoDiagonal;
    if (plan < 0) {  // x itself, whose points are at no distance from themselves
      p.diagonal_end = p.m = in.n;
      p.y = {{p.x, p.x, p.x}, {INT_MAX, INT_MAX, INT_MAX}};
      p.diagonal = p.diagonal_begin = 0;
    }
    if (p.precision == halves::kOne) p.precision = halves::kThree;
    Solver<R, Q, kWarps, T, Team> solver(team, p, memory);
    solver.measure(c);
    double total = 0;
    FEWSTEP_ROLLED
    for (int j = team.lane(); j < p.m; j += Team::kLanes) total += plan < 0 ? 1.0 : double(weights[j]);
    *weight += team.lane_sum(total) * in.n;
    distance += solver.weighted_costs(plan < 0 ? nullptr : weights);
    team.sync();
  }
  return block::team_sum(team, distance, scratch);
}

// All plans of a group at all temperatures, by one block; distances of a plan are measured once, and its barycentres
// are taken for `stacked` temperatures at a time, at most kStacked. group() is its number, and units() tells what a
// temperature of 1 is in the cost of the points as they are, and what a length of 1 is: registers are too short to keep
// them.
template <int R, int Q, int kWarps, int kStacked, typename T, typename Team, typename Group, typename Units>
FEWSTEP_HD void drift_group(const Team& team, const Drift<T>& in, Group group, Units units, int stacked, T* memory) {
  const int plans = in.joint ? 1 : in.cloud_count;
  T k[R][Q];
  FEWSTEP_ROLLED
  for (int plan = 0; plan < plans; ++plan) {
    const auto [p, weights] = plan_of(in, group(), plan);
    Solver<R, Q, kWarps, T, Team> solver(team, p, memory);
    solver.measure(k);
    T total = 0;
    FEWSTEP_ROLLED
    for (int j = team.lane(); j < p.m; j += Team::kLanes) total += weights[j];
    total = team.lane_sum(total);
    const Schedule<T> schedule{nullptr,      0,    T(1), in.max_iter, T(-1), T(0), kInfinity<T>,
                               kInfinity<T>, T(1), true, false,       false};
    const Marginals<T> marginals{nullptr, weights, total, nullptr, nullptr};
    FEWSTEP_ROLLED
    for (int first = 0; first < in.temperatures; first += stacked) {
      const int count = least(stacked, in.temperatures - first);
      FEWSTEP_ROLLED
      for (int t = 0; t < count; ++t) {
        solver.solve(k, schedule, marginals, static_cast<T>(in.eps[first + t] * units().temperature), T(0));
        const T guidance = in.guidance[group()];
        const T factor = plan == 0 ? (in.joint ? T(1) : 1 + guidance) : plan == 1 ? T(-1) : -guidance;
        T sums[kMetrics];
        solver.weigh(k, {in.joint ? in.counts[0] : p.m, in.joint, factor / units().length}, t, sums);
        const int64_t at = ((first + t) * in.groups + group()) * plans + plan;
        if (team.rank() != 0) continue;
        in.residual[at] = sums[0] / in.n;
        in.entropy[at] = sums[1] / in.n;
        in.peak[at] = sums[2] / in.n;
      }
      T squares[kStacked];
      const int64_t step = in.groups * in.n * in.d;
      solver.combine({in.velocity + first * step + group() * in.n * in.d, step, plan > 0}, count, squares);
      if (plan + 1 < plans) continue;
      FEWSTEP_UNROLL
      for (int t = 0; t < kStacked; ++t) {
        if (t >= count) continue;
        const T sum = block::team_sum(team, squares[t], memory + Layout<R, Q, Team::kLanes, kWarps>::kScalar);
        if (team.rank() == 0) in.squares[(first + t) * in.groups + group()] = sum;
      }
    }
  }
}

}  // namespace fewstep::resident
