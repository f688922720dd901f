// The Sinkhorn kernels as one team of threads sees them: a CUDA thread block, or its emulation on the host.
//
// A Team has kLanes (threads per warp), rank(), size(), lane(), warp(), warps(), sync() (a barrier that publishes
// memory), and lane_sum(), lane_max() (over a warp, the same bits in every lane). Every thread of the team makes the
// same calls. Potentials, costs and log-weights are in units of eps ln 2, so that 2^z replaces exp(z / eps).
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cost.h"
#include "host_device.h"

namespace fewstep::block {

constexpr int kRows = 4;      // rows of a cost tile that one warp works on at once
constexpr int kColumns = 64;  // columns of a cost tile
constexpr int kDepth = 32;    // coordinates staged at a time
constexpr int kNoDiagonal = INT_MIN;
constexpr int kValues = 128;  // columns of v that apply() accumulates at once
// An odd leading dimension: lanes on different points fall into different banks.
constexpr int kStageStride = kDepth + 1;
constexpr int kStageElements = kColumns * kStageStride;
// Where a maximum starts: finite, so that -inf (a zero weight) minus it is no NaN.
template <typename T>
constexpr T kLowest = sizeof(T) == sizeof(float) ? T(-FLT_MAX) : T(-DBL_MAX);
// The potential of a point all of whose pairs with points of weight are left out or cost inf, and one beyond which only
// such points are, since relaxed updates come to it by steps.
template <typename T>
constexpr T kNowhere = T(0x1p100);
template <typename T>
constexpr T kFar = T(0x1p80);
// Beyond it the rounding of a potential alone changes the plan by a factor: what residual it has is unknown.
template <typename T>
constexpr T kDigits = sizeof(T) == sizeof(float) ? T(2 / FLT_EPSILON) : T(2 / DBL_EPSILON);

template <typename T>
struct Problem {
  const T* x;   // [n, d]
  const T* y;   // [m, d]
  const T* a;   // [n]
  const T* b;   // [m]
  const T* g0;  // [m] or null
  T eps;
  int n, m, d;
  Cost cost;
};

template <typename T>
struct Solution {
  T* f;  // [n]
  T* g;  // [m]
  T* value;
  T* residual;
  int64_t* iterations;
  bool* converged;
};

template <typename T>
struct Stop {
  int max_iter;
  T tol;           // a negative one is never reached
  T converged_at;  // largest residual that counts as converged
};

FEWSTEP_HD double exp2(double z) { return ::exp2(z); }
FEWSTEP_HD double log2(double z) { return ::log2(z); }

// What a device's approximations make of a float that is no normal number; the host does the same.
FEWSTEP_HD float flushed(float value) { return std::abs(value) < FLT_MIN ? 0.0f : value; }

FEWSTEP_HD float exp2(float z) {
#ifdef __CUDA_ARCH__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z));
  return e;
#else
  return flushed(::exp2f(z));
#endif
}

FEWSTEP_HD float log2(float z) { return ::log2f(z); }

FEWSTEP_HD int least(int p, int q) { return p < q ? p : q; }

template <typename T>
FEWSTEP_HD T largest(T p, T q) {
  return p > q ? p : q;
}

// The larger of p and what was largest so far, which is no NaN; p may be, and is passed over.
FEWSTEP_HD float raised(float p, float top) {
#ifdef __CUDA_ARCH__
  return ::fmaxf(p, top);
#else
  return p > top ? p : top;
#endif
}
FEWSTEP_HD double raised(double p, double top) { return p > top ? p : top; }

// Rows of less than this share of the largest weight are light; in Python LIGHT.
constexpr double kLight = 1e-3;

// NaN stays.
template <typename T>
FEWSTEP_HD T at_most_nowhere(T potential) {
  return potential > kNowhere<T> ? kNowhere<T> : potential;
}

// Not where a penalty `rho`, over eps ln 2, leaves no mass, to which rounding brings none back.
template <typename T>
FEWSTEP_HD bool beyond_digits(T potential, T rho) {
  if (!(std::abs(potential) > kDigits<T>) || potential > kFar<T>) return false;
  return !(potential > 100 * rho && kDigits<T> * T(1.4426950408889634074) > 8 * rho);
}

// 1 / (eps ln 2), from cost units to exponents of 2.
template <typename T>
FEWSTEP_HD T inverse_temperature(T eps) {
  return T(1.4426950408889634074) / eps;
}

template <typename T, typename Index>
struct CachedCost {
  const T* c;  // [n, m]
  Index m;
  FEWSTEP_HD T operator()(int i, int j) const { return c[i * m + j]; }
};

template <typename T>
struct DirectCost {
  Problem<T> p;
  T inverse;
  FEWSTEP_HD T operator()(int i, int j) const {
    const T* x = p.x + static_cast<int64_t>(i) * p.d;
    const T* y = p.y + static_cast<int64_t>(j) * p.d;
    T squared = 0;
    for (int k = 0; k < p.d; ++k) squared += (x[k] - y[k]) * (x[k] - y[k]);
    return finish_cost(squared, p.cost) * inverse;
  }
};

// |x_i - y_j|^2 for the kRows rows from row0 (of this warp) and the kColumns columns from column0 (of the team), by
// differences. Lane l holds columns column0 + l + q kLanes. Rows past n repeat the last one. Begins with sync().
template <typename T, typename Team>
FEWSTEP_HD void squared_distances(const Team& team, const T* x, const T* y, int n, int m, int d, int row0, int column0,
                                  T* stage, T (&squared)[kRows][kColumns / Team::kLanes]) {
  const T* rows[kRows];
  FEWSTEP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    rows[r] = x + static_cast<int64_t>(least(row0 + r, n - 1)) * d;
    for (T& s : squared[r]) s = 0;
  }
  for (int k0 = 0; k0 < d; k0 += kDepth) {
    const int depth = least(kDepth, d - k0);
    team.sync();
    for (int e = team.rank(); e < kColumns * kDepth; e += team.size()) {
      const int c = e / kDepth, k = e % kDepth;
      const bool inside = c < m - column0 && k < depth;
      stage[c * kStageStride + k] = inside ? y[static_cast<int64_t>(column0 + c) * d + k0 + k] : T(0);
    }
    team.sync();
    for (int k = 0; k < depth; ++k) {
      T left[kRows];
      FEWSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) left[r] = rows[r][k0 + k];
      FEWSTEP_UNROLL
      for (int q = 0; q < kColumns / Team::kLanes; ++q) {
        const T right = stage[(team.lane() + q * Team::kLanes) * kStageStride + k];
        FEWSTEP_UNROLL
        for (int r = 0; r < kRows; ++r) squared[r][q] += (left[r] - right) * (left[r] - right);
      }
    }
  }
}

// Writes the scaled cost [n, m]. The caller syncs before it is read and before the stage is used again.
template <typename T, typename Team>
FEWSTEP_HD void fill_cost(const Team& team, const Problem<T>& p, T* stage, T* cost) {
  const T inverse = inverse_temperature(p.eps);
  const int tile = team.warps() * kRows;
  for (int i0 = 0; i0 < p.n; i0 += tile) {
    const int row0 = i0 + team.warp() * kRows;
    for (int j0 = 0; j0 < p.m; j0 += kColumns) {
      T squared[kRows][kColumns / Team::kLanes];
      squared_distances(team, p.x, p.y, p.n, p.m, p.d, row0, j0, stage, squared);
      FEWSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (row0 + r >= p.n) continue;
        T* row = cost + static_cast<int64_t>(row0 + r) * p.m;
        FEWSTEP_UNROLL
        for (int q = 0; q < kColumns / Team::kLanes; ++q) {
          const int j = j0 + team.lane() + q * Team::kLanes;
          if (j < p.m) row[j] = finish_cost(squared[r][q], p.cost) * inverse;
        }
      }
    }
  }
}

// Elements of working memory that solve() needs besides the cost, for a team of `size` threads.
FEWSTEP_HD int64_t vector_elements(int64_t n, int64_t m, int size) { return 4 * n + 3 * m + largest<int64_t>(m, size); }

// A sum of 2^(z + guess) in this range loses no digit to overflow, underflow or a far-off guess.
template <typename T>
FEWSTEP_HD bool is_safe(T sum) {
  return sum > T(0x1p-32) && sum < T(0x1p32);
}

template <typename T, typename Team>
FEWSTEP_HD T team_sum(const Team& team, T part, T* scratch) {
  const T sum = team.lane_sum(part);
  if (team.lane() == 0) scratch[team.warp()] = sum;
  team.sync();
  T total = 0;
  for (int w = 0; w < team.warps(); ++w) total += scratch[w];
  team.sync();
  return total;
}

template <typename T, typename Team>
FEWSTEP_HD T team_largest(const Team& team, T part, T* scratch) {
  const T top = team.lane_max(part);
  if (team.lane() == 0) scratch[team.warp()] = top;
  team.sync();
  T total = scratch[0];
  for (int w = 1; w < team.warps(); ++w) total = largest(scratch[w], total);
  team.sync();
  return total;
}

// Weights below this are light, or 0 where no row is.
template <typename T, typename Team>
FEWSTEP_HD T light_weight(const Team& team, const T* a, int n, T* scratch) {
  T top = 0, light = 0;
  for (int i = team.rank(); i < n; i += team.size()) top = largest(a[i], top);
  top = T(kLight) * team_largest(team, top, scratch);
  for (int i = team.rank(); i < n; i += team.size()) light = a[i] > 0 && a[i] < top ? T(1) : light;
  return team_largest(team, light, scratch) > 0 ? top : T(0);
}

// The step, in nats, that a light row with potential f would take to `next`, if it is more than rounding.
template <typename T>
FEWSTEP_HD T step_of(T f, T next, T relax) {
  constexpr T kRounding = 8 * (sizeof(T) == sizeof(float) ? T(FLT_EPSILON) : T(DBL_EPSILON));
  const T step = std::abs(next - f) / relax;
  return step > kRounding * std::abs(f) && !(next > kFar<T>) ? step * T(0.69314718055994530942) : T(0);
}

// What the L1 error hardly sees: the square of the largest step of a light row. Every thread calls.
template <typename T, typename Team>
FEWSTEP_HD T unsettled(const Team& team, const T* a, const T* f, const T* next, int n, T light, T relax, T* scratch) {
  T worst = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    if (a[i] > 0 && a[i] < light) worst = largest(step_of(f[i], next[i], relax), worst);
  }
  worst = team_largest(team, worst, scratch);
  return worst * worst;
}

// -log2 sum_j 2^(h_j - c_ij) around its true maximum, by one warp.
template <typename T, typename Costs, typename Team>
FEWSTEP_HD T shifted_row(const Team& team, const Costs& cost, const T* h, int i, int m) {
  T top = kLowest<T>;
  for (int j = team.lane(); j < m; j += Team::kLanes) top = largest(h[j] - cost(i, j), top);
  top = team.lane_max(top);
  T sum = 0;
  for (int j = team.lane(); j < m; j += Team::kLanes) sum += exp2(h[j] - cost(i, j) - top);
  return at_most_nowhere(-(top + log2(team.lane_sum(sum))));
}

// The same for a column, by one thread.
template <typename T, typename Costs>
FEWSTEP_HD T shifted_column(const Costs& cost, const T* h, int j, int n) {
  T top = kLowest<T>;
  for (int i = 0; i < n; ++i) top = largest(h[i] - cost(i, j), top);
  T sum = 0;
  for (int i = 0; i < n; ++i) sum += exp2(h[i] - cost(i, j) - top);
  return at_most_nowhere(-(top + log2(sum)));
}

// f-update: next_i = f_i - log2 s_i with s_i = sum_j 2^(f_i + h_j - c_ij), so that the old potential takes the place
// of the maximum and one exponential per pair is enough; hx = next + log2 a. Returns this thread's share of
// sum_i a_i |s_i - 1|, the L1 error of the row marginal at (f, g).
template <typename T, typename Costs, typename Team>
FEWSTEP_HD T update_rows(const Team& team, const Costs& cost, const T* a, const T* log_a, int n, int m, const T* f,
                         const T* h, T* next, T* hx) {
  T error = 0;
  for (int i0 = team.warp() * kRows; i0 < n; i0 += team.warps() * kRows) {
    int row[kRows];
    T guess[kRows], sum[kRows];
    FEWSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      row[r] = least(i0 + r, n - 1);
      guess[r] = f[row[r]];
      sum[r] = 0;
    }
    for (int j = team.lane(); j < m; j += Team::kLanes) {
      const T z = h[j];
      FEWSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r] += exp2(z - cost(row[r], j) + guess[r]);
    }
    T potential[kRows];
    bool safe = true;
    FEWSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r] = team.lane_sum(sum[r]);
      safe = safe && is_safe(sum[r]);
      potential[r] = guess[r] - log2(sum[r]);
    }
    for (int q = 0; q < kRows && !safe; ++q) {
      const T exact = shifted_row(team, cost, h, least(i0 + q, n - 1), m);
      FEWSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r != q) continue;
        potential[r] = exact;
        sum[r] = exact > kFar<T> ? T(0) : exp2(guess[r] - exact);
      }
    }
    if (team.lane() != 0) continue;
    FEWSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (i0 + r >= n) continue;
      next[i0 + r] = potential[r];
      hx[i0 + r] = potential[r] + log_a[i0 + r];
      // A row without mass may have any sum, also one that overflows.
      if (a[i0 + r] != 0) error += a[i0 + r] * std::abs(sum[r] - 1);
    }
  }
  return error;
}

// g-update in place: lanes on neighbouring columns, spare warps on further slices of the rows. Ends with sync().
template <typename T, typename Costs, typename Team>
FEWSTEP_HD void update_columns(const Team& team, const Costs& cost, const T* log_b, int n, int m, const T* hx, T* g,
                               T* hy, T* partial) {
  const int groups = (m + Team::kLanes - 1) / Team::kLanes;
  const int slices = largest(1, team.warps() / groups);
  for (int w = team.warp(); w < groups * slices; w += team.warps()) {
    const int j = w % groups * Team::kLanes + team.lane(), slice = w / groups;
    if (j >= m) continue;
    const T guess = g[j];
    T sum[kRows] = {};
    for (int64_t i0 = slice; i0 < n; i0 += kRows * slices) {
      FEWSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int64_t i = i0 + r * slices;
        if (i < n) sum[r] += exp2(hx[i] - cost(static_cast<int>(i), j) + guess);
      }
    }
    partial[slice * m + j] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  team.sync();
  for (int j = team.rank(); j < m; j += team.size()) {
    T sum = 0;
    for (int slice = 0; slice < slices; ++slice) sum += partial[slice * m + j];
    const T potential = is_safe(sum) ? g[j] - log2(sum) : shifted_column(cost, hx, j, n);
    g[j] = potential;
    hy[j] = potential + log_b[j];
  }
  team.sync();
}

// All iterations of one problem. vectors has vector_elements(), scratch one element per warp.
template <typename T, typename Costs, typename Team>
FEWSTEP_HD void solve(const Team& team, const Costs& cost, const Problem<T>& p, const Stop<T>& stop, T* vectors,
                      T* scratch, const Solution<T>& out) {
  const int n = p.n, m = p.m;
  T* f = vectors;
  T* next = f + n;
  T* hx = next + n;
  T* log_a = hx + n;
  T* g = log_a + n;
  T* hy = g + m;
  T* log_b = hy + m;
  T* partial = log_b + m;
  const T inverse = inverse_temperature(p.eps);
  T a_total = 0, b_total = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    next[i] = 0;
    log_a[i] = log2(p.a[i]);
    a_total += p.a[i];
  }
  for (int j = team.rank(); j < m; j += team.size()) {
    g[j] = p.g0 == nullptr ? T(0) : p.g0[j] * inverse;
    log_b[j] = log2(p.b[j]);
    hy[j] = g[j] + log_b[j];
    b_total += p.b[j];
  }
  a_total = team_sum(team, a_total, scratch);
  b_total = team_sum(team, b_total, scratch);
  update_rows(team, cost, p.a, log_a, n, m, next, hy, f, hx);
  team.sync();
  T residual;
  const T light = light_weight(team, p.a, n, scratch);
  int iteration = 0;
  while (true) {
    update_columns(team, cost, log_b, n, m, hx, g, hy, partial);
    residual = team_sum(team, update_rows(team, cost, p.a, log_a, n, m, f, hy, next, hx), scratch) / a_total;
    if (light > 0) {
      const T unseen = unsettled(team, p.a, f, next, n, light, T(1), scratch);
      if (unseen > residual) residual = unseen;  // NaN stays
    }
    if (++iteration == stop.max_iter || residual <= stop.tol) break;
    T* const last = f;
    f = next;
    next = last;
  }
  const T unit = 1 / inverse;
  T value = 0, beyond = 0;
  const auto settled = [&](T potential, T weight) {
    if (potential > kFar<T>) {
      if (weight == 0) return T(0);
      value = std::numeric_limits<T>::infinity();
      return potential * unit;
    }
    if (weight != 0 && beyond_digits(potential, std::numeric_limits<T>::infinity())) beyond = 1;
    value += weight * potential * unit;
    return potential * unit;
  };
  for (int i = team.rank(); i < n; i += team.size()) {
    out.f[i] = settled(p.a[i] == 0 ? next[i] : f[i], p.a[i]);  // of a row without mass, from the g that came out
  }
  for (int j = team.rank(); j < m; j += team.size()) out.g[j] = settled(g[j], p.b[j]);
  value = team_sum(team, value, scratch) + p.eps * b_total * (a_total - 1);
  beyond = team_sum(team, beyond, scratch);
  if (team.rank() == 0) {
    *out.value = value;
    *out.residual = beyond > 0 ? std::numeric_limits<T>::infinity() : residual;
    *out.iterations = iteration;
    *out.converged = beyond == 0 && residual <= stop.converged_at && std::isfinite(value);
  }
}

template <typename T>
struct Application {
  const T* x;  // [n, d]
  const T* y;  // [m, d]
  const T* f;  // [n]
  const T* g;  // [m]
  const T* a;  // [n], read where kGradient
  const T* b;  // [m]
  const T* v;  // [m, k], or y where kGradient
  T eps;
  int n, m, d, k;
  Cost cost;
  int diagonal;  // pairs j == i + diagonal are left out; kNoDiagonal
  T* out;        // [n, k]
  T* mass;       // [n], written unless kGradient
};

// With p_ij = b_j exp((f_i + g_j - c_ij) / eps): sum_j p_ij v_j and sum_j p_ij, or where kGradient
// a_i sum_j p_ij dc_ij/dx_i. One tile of warps() kRows rows and kValues values; weights has kColumns elements per row.
template <bool kGradient, typename T, typename Team>
FEWSTEP_HD void apply(const Team& team, const Application<T>& p, int row_tile, int value_tile, T* stage, T* weights) {
  constexpr int kQ = kColumns / Team::kLanes, kS = kValues / Team::kLanes;
  const int row0 = (row_tile * team.warps() + team.warp()) * kRows;
  const int value0 = value_tile * kValues + team.lane();
  const T inverse = inverse_temperature(p.eps);
  // Beyond it only without weight or partner: 0 times an entry, or times their sum, is to be 0.
  const T highest = T(sizeof(T) == sizeof(float) ? 126 : 1022) - log2(T(p.m));
  T* own = weights + team.warp() * kRows * kColumns;
  T potential[kRows], mass[kRows] = {}, sum[kRows][kS] = {}, x[kRows][kS];
  FEWSTEP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = least(row0 + r, p.n - 1);
    potential[r] = p.f[i] * inverse;
    // Without weight the plan over a may overflow, and 0 times it is to be 0.
    if (kGradient && p.a[i] == 0) potential[r] = -std::numeric_limits<T>::infinity();
    FEWSTEP_UNROLL
    for (int s = 0; s < kS; ++s) {
      const int k = value0 + s * Team::kLanes;
      x[r][s] = kGradient && k < p.k ? p.x[i * p.d + k] : T(0);
    }
  }
  for (int j0 = 0; j0 < p.m; j0 += kColumns) {
    T squared[kRows][kQ];
    squared_distances(team, p.x, p.y, p.n, p.m, p.d, row0, j0, stage, squared);
    FEWSTEP_UNROLL
    for (int q = 0; q < kQ; ++q) {
      const int column = team.lane() + q * Team::kLanes;
      const bool inside = column < p.m - j0;
      const T h = inside ? p.g[j0 + column] * inverse + log2(p.b[j0 + column]) : T(0);
      FEWSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const T c = finish_cost(squared[r][q], p.cost);
        const bool left_out = p.diagonal != kNoDiagonal && int64_t{j0} + column == int64_t{row0} + r + p.diagonal;
        const T z = potential[r] + h - c * inverse;
        T w = inside && !left_out ? exp2(z > highest ? highest : z) : T(0);
        mass[r] += w;
        if (kGradient && p.cost == Cost::sqeuclidean) w *= 2;
        if (kGradient && p.cost == Cost::euclidean) w = c == 0 ? T(0) : w / c;
        own[r * kColumns + column] = w;
      }
    }
    team.sync();
    const int columns = least(kColumns, p.m - j0);
    for (int column = 0; column < columns; ++column) {
      const T* v = p.v + static_cast<int64_t>(j0 + column) * p.k;
      FEWSTEP_UNROLL
      for (int s = 0; s < kS; ++s) {
        const int k = value0 + s * Team::kLanes;
        const T right = k < p.k ? v[k] : T(0);
        FEWSTEP_UNROLL
        for (int r = 0; r < kRows; ++r) {
          sum[r][s] += own[r * kColumns + column] * (kGradient ? x[r][s] - right : right);
        }
      }
    }
  }
  FEWSTEP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = row0 + r;
    const T total = team.lane_sum(mass[r]);
    if (i >= p.n) continue;
    FEWSTEP_UNROLL
    for (int s = 0; s < kS; ++s) {
      const int k = value0 + s * Team::kLanes;
      if (k < p.k) p.out[i * p.k + k] = kGradient ? p.a[i] * sum[r][s] : sum[r][s];
    }
    if (!kGradient && value_tile == 0 && team.lane() == 0) p.mass[i] = total;
  }
}

}  // namespace fewstep::block
