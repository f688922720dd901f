// A problem of the resident solvers: its points, marginals and schedule, and arithmetic on their elements.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../halves.h"
#include "../sinkhorn_block.h"

namespace fewstep::resident {

using block::at_most_nowhere;
using block::beyond_digits;
using block::exp2;
using block::kFar;
using block::kLowest;
using block::kNoDiagonal;
using block::kNowhere;
using block::largest;
using block::least;
using block::raised;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
// Smaller weights are none: the logarithm on a device is -inf.
template <typename T>
constexpr T kSmallest = std::numeric_limits<T>::min();
constexpr int kParts = 3;                 // clouds that make up the columns
constexpr int kDepth = 16;                // coordinates staged at a time
constexpr int kStageStride = kDepth + 1;  // lanes on different points fall into different banks
constexpr int kMmaStride = kDepth + 4;    // so do the rows of a matrix of halves, and points are aligned to 16 bytes
constexpr int kMetrics = 3;               // of a plan of a drift
constexpr int kScalars = 5;               // that a pass hands from each warp to all others, or a plan its metrics
constexpr int kMostStacked = 3;           // temperatures whose barycentres are taken in one pass over the points
constexpr int kLastSteps = 10;            // at most, alternating ones after symmetric ones; in Python LAST_STEPS

// Entries of K below 2^-126 (2^-1022) are 0. With scalings of rows up to kTop = kSafe^2 what is missing from a column
// sum above kLow is below its rounding.
template <typename T>
struct Range {
  static constexpr T kSafe = 0x1p24, kHalf = 0x1p12, kTop = 0x1p48, kLow = 0x1p-50, kHigh = 0x1p100;
};
template <>
struct Range<double> {
  static constexpr double kSafe = 0x1p200, kHalf = 0x1p100, kTop = 0x1p400, kLow = 0x1p-560, kHigh = 0x1p900;
};

FEWSTEP_HD double reciprocal(double value) { return 1 / value; }

FEWSTEP_HD float reciprocal(float value) {
#ifdef __CUDA_ARCH__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(value));
  return r;
#else
  return block::flushed(1 / block::flushed(value));
#endif
}

// Within 2^-22, absolutely for arguments near 1 and relatively elsewhere.
FEWSTEP_HD float log2(float value) {
#ifdef __CUDA_ARCH__
  float l;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(l) : "f"(value));
  return l;
#else
  return ::log2f(block::flushed(value));
#endif
}

FEWSTEP_HD double log2(double value) { return ::log2(value); }

template <typename T>
FEWSTEP_HD bool within(T value, T low, T high) {
  return value >= low && value <= high;
}

// Columns of a problem: the points of up to kParts clouds [.., d], one after the other. end[p] is the first column
// after part p, INT_MAX for the last one.
template <typename T>
struct Columns {
  const T* data[kParts];
  int end[kParts];

  FEWSTEP_HD const T* point(int j, int d) const {
    const T* from = data[0];
    int first = 0;
    FEWSTEP_UNROLL
    for (int p = 1; p < kParts; ++p) {
      if (j < end[p - 1]) continue;
      from = data[p];
      first = end[p - 1];
    }
    return from + static_cast<int64_t>(j - first) * d;
  }
};

template <typename T>
struct Points {
  const T* x;  // [n, d]
  Columns<T> y;
  int n, m, d;
  Cost cost;
  // The pair of row i and column diagonal_begin + i + diagonal is left out if that column is below diagonal_end.
  int diagonal, diagonal_begin, diagonal_end;
  int precision;  // halves::Precision
  int origin;     // a row with weight: others may be far away

  // Few coordinates are quicker, and lose nothing to cancellation, without tensor cores.
  FEWSTEP_HD bool by_products() const { return precision != halves::kFloat32 && d > kDepth; }

  FEWSTEP_HD bool excluded(int i, int j) const {
    return diagonal != kNoDiagonal && j >= diagonal_begin && j < diagonal_end &&
           static_cast<int64_t>(j) - diagonal_begin == static_cast<int64_t>(i) + diagonal;
  }
};

// What is iterated, alike for all problems of a call.
template <typename T>
struct Schedule {
  const T* temperatures;  // [scheduled], one iteration at each before anything else
  int scheduled;
  T factor;      // of annealing from `start` down to eps
  int max_iter;  // at eps
  T tol;         // a negative one is never reached
  T converged_at;
  T rho_x, rho_y;  // penalties of the marginals; inf: they are constraints
  T relax;
  bool unit_start;    // from v_j = 1 rather than from g = 0
  bool simultaneous;  // both potentials from the last two, and alternating iterations at the end
  bool single;        // x is y, with the same weights: of simultaneous updates, with one potential
  FEWSTEP_HD int last_steps() const { return tol < 0 || single ? 1 : kLastSteps; }
  // Whether a soft c-transform is the next potential, without a penalty or an average.
  FEWSTEP_HD bool plain() const { return std::isinf(rho_x) && std::isinf(rho_y) && relax == 1; }
};

// The temperatures of a schedule, one a call, and from then on eps, which is `final`.
template <typename T>
struct Temperatures {
  T annealed;  // where annealing begins
  int step = 0;
  bool final = false;

  FEWSTEP_HD T next(const Schedule<T>& s, T eps) {
    if (final) return eps;
    if (step < s.scheduled) return s.temperatures[step++];
    if (annealed > eps) {
      const T now = annealed;
      annealed *= s.factor;
      return now;
    }
    final = true;
    return eps;
  }
};

// What a soft c-transform is multiplied by under a penalty rho.
template <typename T>
FEWSTEP_HD T damping(T rho, T temperature) {
  return std::isinf(rho) ? T(1) : rho / (rho + temperature);
}

template <typename T>
struct Marginals {
  const T* a;  // [n], or null where one rank has all rows: 1 / n
  const T* b;  // [m], relative weights where b_total is not 1
  T b_total;
  const T* f0;  // [n] or null
  const T* g0;  // [m] or null
};

struct Sum {
  template <typename T>
  FEWSTEP_HD T operator()(T p, T q) const {
    return p + q;
  }
};

struct Largest {
  template <typename T>
  FEWSTEP_HD T operator()(T p, T q) const {
    return raised(p, q);
  }
};

// rho (1 - exp(-f / rho)): what a potential adds to the dual, f itself for a constraint (rho = inf).
template <typename T>
FEWSTEP_HD T penalised(T f, T rho) {
  return std::isinf(rho) ? f : -rho * std::expm1(-f / rho);
}

// A thread's share of the dual value of a solution.
template <typename T>
struct Value {
  T k;  // 1 / (eps ln 2)
  T unit = 1 / k;
  T sum = 0;
  T beyond = 0;  // 1 where a potential has no digit left

  // Adds a potential in units of eps ln 2 and returns it as it is written. A constraint cannot be met at a point
  // without a partner, unless it has no weight: its potential is then 0.
  FEWSTEP_HD T add(T potential, T weight, T rho) {
    const bool nowhere = std::isinf(rho) && potential > kFar<T>;
    if (weight == 0) return nowhere ? T(0) : potential * unit;
    if (beyond_digits(potential, rho * k)) beyond = 1;
    sum += nowhere ? kInfinity<T> : weight * penalised(potential * unit, rho);
    return potential * unit;
  }
};

// The numbers of a solution, by one thread.
template <typename T>
FEWSTEP_HD void write_numbers(const block::Solution<T>& out, T value, T residual, int iterations, T converged_at) {
  *out.value = value;
  *out.residual = residual;
  *out.iterations = iterations;
  *out.converged = residual <= converged_at && std::isfinite(value);
}

}  // namespace fewstep::resident
