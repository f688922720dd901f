// Sinkhorn on problems that stay on chip, as one team sees them: a thread block, the blocks of a cluster that share the
// rows of a problem, or their emulation on the host.
//
// Distances C lie in shared memory and K = 2^(shift_i + h_j - k C_ij) in registers: a warp owns R rows, a lane every
// kLanes-th of up to Q kLanes columns. An iteration is one pass over K,
//
//     s_i = sum_j K_ij v_j,  u_i = 1 / s_i,  q_j = sum_i a_i u_i K_ij,  v_j = b_j / q_j,
//
// with F_i = shift_i + log2 u_i and H_j = h_j + log2 v_j the potentials in units of eps ln 2, log2 b_j included in H.
// Symmetric updates take q_j with the u before, and one potential (x is y) has H_j = F_j + log2 b_j instead. Where a
// scaling leaves its safe range the potentials are taken into K anew ("absorbed"), from row sums around their maxima; a
// column whose sum has underflowed gets a log-sum-exp of its own.
//
// On top of what sinkhorn_block.h asks of a Team: ranks(), block() (which of the ranks), sync_all() (a barrier of all
// ranks), peer(pointer, rank) (the same place in the memory of a rank), any(flag) (of a block, also a barrier),
// lane_any(flag), sync_lanes() and opaque(value) (the same, hidden from the compiler: what follows from it is computed
// where it is used, and not kept in registers from the start). A warp's R values, one per row, are combined over its
// lanes by combine_rows(values, own, combine), which leaves a lane those of its own rows, and spread(own, values) tells
// them to all lanes; a lane has the R / kLanes rows from lane R / kLanes on, or kLanes / R lanes share one. A team with
// tensor cores has those of halves.h besides.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "halves.h"
#include "sinkhorn_block.h"

namespace fewstep::resident {

using block::exp2;
using block::finish_cost;
using block::kLowest;
using block::kNoDiagonal;
using block::largest;
using block::least;

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
constexpr int kScalars = 4;               // that a pass hands from each warp to all others, or a plan its metrics
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
  int n, m, d, cost;
  // The pair of row i and column diagonal_begin + i + diagonal is left out if that column is below diagonal_end.
  int diagonal, diagonal_begin, diagonal_end;
  int precision;  // halves::Precision

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
};

template <typename T>
struct Marginals {
  const T* a;  // [n], or null where one rank has all rows: 1 / n
  const T* b;  // [m], relative weights where b_total is not 1
  T b_total;
  const T* f0;  // [n] or null
  const T* g0;  // [m] or null
};

// Where things are in the memory of a block of up to kWarps warps, in elements: all offsets are known at compile time,
// and costs [rows, m] come last.
template <int R, int Q, int kLanes, int kWarps>
struct Layout {
  static constexpr int kRows = kWarps * R, kColumns = Q * kLanes;
  static constexpr int kA = 0, kShift = kRows, kF = 2 * kRows, kU = 4 * kRows;  // f and u twice: now and next
  static constexpr int kLogs = 6 * kRows;                                       // f + log2 a, for log-sum-exps
  static constexpr int kB = 7 * kRows, kH = kB + kColumns, kV = kH + kColumns, kLse = kV + kColumns;
  static constexpr int kScalar = kLse + kColumns;                               // [2, kScalars, kWarps]
  static constexpr int kScale = kScalar + (2 * kScalars * kWarps + 3) / 4 * 4;  // of the points of the columns
  static constexpr int kBack = kScale + kColumns;                               // [kMostStacked, kRows]
  static constexpr int kPartial = kBack + kMostStacked * kRows;                 // [2, kWarps, kColumns]
  // In the same place, points that are being measured: [kColumns + kRows, kStageStride].
  static constexpr int kPoints = (kColumns + kRows) * kStageStride;
  static constexpr int kTwo = 2 * (kWarps < 2 ? 2 : kWarps) * kColumns;
  static constexpr int kSpace = kTwo > kPoints ? kTwo : kPoints;
  static constexpr int kCost = (kPartial + kSpace + 3) / 4 * 4;

  // Columns in whole tiles of tensor cores, and two stages of points, and the origin, on their way to them.
  static FEWSTEP_HD int64_t tiled(int64_t m) { return (m + 15) & ~int64_t{15}; }
  static FEWSTEP_HD int64_t stages(int64_t points) { return 2 * (points + 1) * kMmaStride; }
  // Where they are: before there are costs, and after the weights of a drift have been read.
  static FEWSTEP_HD int64_t behind_costs(int64_t rows, int64_t m) { return kCost + (rows * m + 3) / 4 * 4; }

  // `matrices` of weights, one per temperature of a drift, follow the costs. Four neighbours of a row fall into banks
  // of their own.
  static FEWSTEP_HD int64_t weight_stride(int64_t m) { return tiled(m) + 8; }
  static FEWSTEP_HD int64_t elements(int64_t rows, int64_t m, int matrices) {
    const int64_t measured = kPartial + stages(tiled(m) + rows);
    const int64_t kept = behind_costs(rows, m) + matrices * rows * weight_stride(m);
    const int64_t combined = matrices == 0 ? 0 : behind_costs(rows, m) + stages(tiled(m));
    return block::largest(block::largest(measured, kept), combined);
  }
};

// Tiles of 16 columns on tensor cores, of up to Q kLanes columns: of 160 only 144, in 64 x 144 problems of which a
// thread keeps the weights of three temperatures.
constexpr int tiles_of(int q) { return q == 5 ? 9 : 2 * q; }

// How a plan's share of a drift is weighted: A / sum(A), or in the joint form A+ sum(A-) for columns below `positive`
// and -A- sum(A+) for the others, with A_ij = p_ij; times a factor.
template <typename T>
struct Share {
  int positive;
  bool joint;
  T factor;
};

// Where it goes: [n, d] of the first temperature.
template <typename T>
struct Velocities {
  T* first;
  int64_t step;  // from one temperature to the next
  bool add;      // to what is there
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
    return largest(p, q);
  }
};

// rho (1 - exp(-f / rho)): what a potential adds to the dual, f itself for a constraint (rho = inf).
template <typename T>
FEWSTEP_HD T penalised(T f, T rho) {
  return std::isinf(rho) ? f : -rho * std::expm1(-f / rho);
}

template <int R, int Q, int kWarps, typename T, typename Team>
class Solver {
 public:
  static constexpr int kLanes = Team::kLanes;
  static constexpr bool kTensor = Team::kTensor && sizeof(T) == sizeof(float);
  using At = Layout<R, Q, kLanes, kWarps>;
  static constexpr int kTiles = tiles_of(Q);
  static constexpr int kWide = kWarps <= 8 ? 4 : 1;             // warps that measure their rows together
  static constexpr int kOwn = R > kLanes ? R / kLanes : 1;      // rows of a lane
  static constexpr int kSharers = kLanes > R ? kLanes / R : 1;  // lanes of a row

  // Rows of this block: ranks share them evenly, in order.
  FEWSTEP_HD Solver(const Team& team, const Points<T>& points, T* memory) : team_(team), p_(points), memory_(memory) {
    const int each = (p_.n + team.ranks() - 1) / team.ranks();
    first_ = least(each * team.block(), p_.n);
    rows_ = least(each, p_.n - first_);
  }

  FEWSTEP_HD int first() const { return first_; }
  FEWSTEP_HD int rows() const { return rows_; }
  FEWSTEP_HD int tiled() const { return static_cast<int>(At::tiled(p_.m)); }
  FEWSTEP_HD int row_of(int r) const { return team_.warp() * R + r; }
  FEWSTEP_HD int column_of(int q) const { return team_.lane() + q * kLanes; }
  FEWSTEP_HD int own_row(int e) const { return row_of(team_.lane() / kSharers * kOwn + e); }
  FEWSTEP_HD bool first_of_row() const { return team_.lane() % kSharers == 0; }

  // Distances into shared memory; c is scratch. Begins and ends with sync().
  FEWSTEP_HD void measure(T (&c)[R][Q]) {
    if constexpr (kTensor) {
      if (p_.by_products()) {
        if (team_.warps() % kWide == 0) return measure_by_products<kWide>();
        return measure_by_products<1>();
      }
    }
    measure_by_differences(c);
  }

  // All iterations at `eps`, and at the temperatures before it. `start` is where annealing begins, at most eps for
  // none. The state stays for what follows: potentials(), row_mass(), weights of the plan.
  FEWSTEP_HD void solve(T (&k)[R][Q], const Schedule<T>& s, const Marginals<T>& w, T eps, T start) {
    s_ = s;
    plain_ = std::isinf(s.rho_x) && std::isinf(s.rho_y) && s.relax == 1;
    averaged_ = s.simultaneous;
    relax_ = w.f0 == nullptr ? T(1) : s.relax;  // an iteration without a potential before it is taken in full
    step_ = iterations_ = 0;
    annealed_ = start;
    final_ = false;
    temperature_ = next_temperature(eps);
    set_temperature();
    begin(w);
    bool absorb = true, measured = false, closing = false;
    int at_eps = 0;
    while (true) {
      // The pass after an iteration at eps tells its error.
      const bool last = measured && ++at_eps == (closing ? s.last_steps() : s.max_iter);
      const bool asked = last || (measured && s.tol >= 0);
      bool usable = !absorb && pass<false>(k, asked);
      if (!usable) usable = pass<true>(k, asked);
      if (asked) {
        residual_ = error() / a_total_;
        if (last || residual_ <= s.tol) {
          if (closing || !s.simultaneous) return;
          if (!absorbed_) fold();
          averaged_ = measured = false;
          closing = absorb = true;
          relax_ = 1;
          at_eps = 0;
          continue;
        }
      }
      if (!averaged_) accept();
      const bool far = s_.single ? follow_rows() : finish_columns();
      absorb = far || !usable;
      if (averaged_) accept();
      if (absorb) fold();
      measured = final_;
      if (closing) continue;
      ++iterations_;
      relax_ = s.relax;
      if (final_) continue;
      const T next = next_temperature(eps);
      if (next == temperature_) continue;
      change_temperature(next, absorb);
      absorb = true;
    }
  }

  // f, g, value and the rest of a problem that has been solved. Ends with sync_all().
  FEWSTEP_HD void write(T eps, const block::Solution<T>& out) {
    const T unit = 1 / k_, mass = total(1);
    T value = 0;
    FEWSTEP_ROLLED
    for (int i = team_.rank(); i < rows_; i += team_.size()) {
      const T f = potential(i) * unit;
      out.f[first_ + i] = f;
      if (s_.single) out.g[first_ + i] = f;
      if (at(At::kA)[i] != 0) value += (s_.single ? 2 : 1) * at(At::kA)[i] * penalised(f, s_.rho_x);
    }
    if (!s_.single) soft_of_massless_columns();
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m && !s_.single; j += team_.size()) {
      const T b = at(At::kB)[j];
      const T g = unit * (b > 0 ? at(At::kH)[j] + log2(at(At::kV)[j]) - log2(b) : -damping_y_ * at(At::kLse)[j]);
      if (team_.block() != 0) continue;
      out.g[j] = g;
      if (b != 0) value += b * penalised(g, s_.rho_y);
    }
    parity_ = 1 - parity_;
    hand_over(0, value);
    team_.sync_all();
    value = total(0);
    if (!plain_) value -= eps * (mass - a_total_ * b_total_);
    if (team_.block() == 0 && team_.rank() == 0) {
      *out.value = value;
      *out.residual = residual_;
      *out.iterations = iterations_;
      *out.converged = residual_ <= s_.converged_at;
    }
    team_.sync_all();
  }

  // The weights of a plan's share of a drift, from the K of a solve of one rank, into matrix t, and three sums over the
  // rows, of |sum_j p_ij - 1|, of the entropy (in nats) and of the largest entry of the normalised plan, into `sums`.
  FEWSTEP_HD void weigh(T (&k)[R][Q], const Share<T>& io, int t, T (&sums)[kMetrics]) {
    T positive[R], negative[R], bits[R], peak[R];
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) positive[r] = negative[r] = bits[r] = peak[r] = 0;
    FEWSTEP_UNROLL
    for (int q = 0; q < Q; ++q) {
      const int j = column_of(q);
      if (j >= p_.m) continue;
      const T v = at(At::kV)[j], h = at(At::kH)[j] + log2(v);
      const bool right = j >= io.positive;
      FEWSTEP_UNROLL
      for (int r = 0; r < R; ++r) {
        const int i = least(row_of(r), rows_ - 1);
        const T e = k[r][q] * v;
        // Where a pair is left out its exponent is -inf and e is 0.
        bits[r] += e * largest(at(At::kShift)[i] + h - k_ * at(At::kCost)[i * p_.m + j], T(-1000));
        peak[r] = largest(e, peak[r]);
        (right ? negative[r] : positive[r]) += e;
        k[r][q] = e;
      }
    }
    T plus[kOwn], minus[kOwn], entropy[kOwn], top[kOwn], part[kMetrics] = {};
    team_.combine_rows(positive, plus, Sum());
    team_.combine_rows(negative, minus, Sum());
    team_.combine_rows(bits, entropy, Sum());
    team_.combine_rows(peak, top, Largest());
    FEWSTEP_UNROLL
    for (int e = 0; e < kOwn; ++e) {
      const int i = own_row(e);
      const T total = plus[e] + minus[e], u = at(At::kU + u_)[least(i, rows_ - 1)];
      if (i < rows_ && first_of_row()) {
        part[0] += std::abs(u * total - 1);
        part[1] += (log2(total) - entropy[e] / total) * T(0.69314718055994530942);
        part[2] += top[e] / total;
      }
      const T to_positive = io.factor * (io.joint ? u * u * minus[e] : 1 / total);
      minus[e] = io.factor * (io.joint ? -(u * u) * plus[e] : 1 / total);
      plus[e] = to_positive;
    }
    team_.spread(plus, positive);
    team_.spread(minus, negative);
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) peak[r] = 0;
    FEWSTEP_UNROLL
    for (int q = 0; q < Q; ++q) {
      const int j = column_of(q);
      if (j >= p_.m) continue;
      const T up = by_products() ? halves::Power(at(At::kScale)[j]).up : T(1);
      FEWSTEP_UNROLL
      for (int r = 0; r < R; ++r) {
        k[r][q] *= (j >= io.positive ? negative[r] : positive[r]) * up;
        peak[r] = largest(std::abs(k[r][q]), peak[r]);
      }
    }
    if constexpr (kTensor) {
      if (p_.by_products()) {
        team_.combine_rows(peak, top, Largest());
        FEWSTEP_UNROLL
        for (int e = 0; e < kOwn; ++e) {
          const halves::Power power(top[e]);
          top[e] = power.down;
          if (own_row(e) < rows_ && first_of_row()) at(At::kBack + t * At::kRows)[own_row(e)] = power.up;
        }
        team_.spread(top, peak);
        FEWSTEP_UNROLL
        for (int r = 0; r < R; ++r) {
          FEWSTEP_UNROLL
          for (int q = 0; q < Q; ++q) k[r][q] *= peak[r];
        }
      }
    }
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) {
      FEWSTEP_UNROLL
      for (int q = 0; q < Q; ++q) {
        if (row_of(r) < rows_ && column_of(q) < tiled()) weights(t, row_of(r))[column_of(q)] = k[r][q];
      }
    }
    parity_ = 1 - parity_;
    FEWSTEP_UNROLL
    for (int which = 0; which < kMetrics; ++which) hand_over(which, part[which]);
    team_.sync();
    FEWSTEP_UNROLL
    for (int which = 0; which < kMetrics; ++which) sums[which] = total(which);
  }

  // out = the points of the columns, weighted, for the first `count` matrices of weights; this thread's shares of the
  // squares of what is in `out` then. Begins and ends with sync().
  template <int kStacked>
  FEWSTEP_HD void combine(const Velocities<T>& out, int count, T (&squares)[kStacked]) {
    if constexpr (kTensor) {
      if (p_.by_products()) return combine_by_products(out, count, squares);
    }
    team_.sync();
    FEWSTEP_UNROLL
    for (int t = 0; t < kStacked; ++t) squares[t] = t < count ? combine_by_differences(out, t) : T(0);
    team_.sync();
  }

 private:
  FEWSTEP_HD T* at(int offset) const { return memory_ + offset; }
  FEWSTEP_HD const T* row(int i) const { return p_.x + static_cast<int64_t>(first_ + i) * p_.d; }

  FEWSTEP_HD T next_temperature(T eps) {
    if (step_ < s_.scheduled) return s_.temperatures[step_++];
    if (annealed_ > eps) {
      const T now = annealed_;
      annealed_ *= s_.factor;
      return now;
    }
    final_ = true;
    return eps;
  }

  FEWSTEP_HD void set_temperature() {
    k_ = block::inverse_temperature(temperature_);
    damping_x_ = std::isinf(s_.rho_x) ? T(1) : s_.rho_x / (s_.rho_x + temperature_);
    damping_y_ = std::isinf(s_.rho_y) ? T(1) : s_.rho_y / (s_.rho_y + temperature_);
    target_x_ = std::isinf(s_.rho_x) ? T(0) : temperature_ / s_.rho_x;
    target_y_ = std::isinf(s_.rho_y) ? T(0) : temperature_ / s_.rho_y;
  }

  // Potentials to start from. Begins with sync_all(): a problem before this one may still be read.
  FEWSTEP_HD void begin(const Marginals<T>& w) {
    team_.sync_all();
    parity_ = f_ = u_ = 0;
    bool massless = false;
    T part = 0;
    FEWSTEP_ROLLED
    for (int i = team_.rank(); i < rows_; i += team_.size()) {
      const T a = w.a == nullptr ? T(1) / T(rows_) : w.a[first_ + i];
      at(At::kA)[i] = a;
      at(At::kF + f_)[i] = w.f0 == nullptr ? T(0) : w.f0[first_ + i] * k_;
      part += a;
    }
    hand_over(1, part);
    part = 0;
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      T b = w.b[j] / w.b_total;
      if (b < kSmallest<T>) b = 0;
      const T g = w.g0 == nullptr ? T(0) : w.g0[j] * k_;
      at(At::kB)[j] = b;
      at(At::kH)[j] = s_.unit_start ? (b > 0 ? T(0) : log2(b)) : g + log2(b);
      at(At::kV)[j] = b > 0 ? T(1) : T(0);
      part += b;
      massless = massless || b == 0;
    }
    hand_over(0, part);
    massless_ = team_.any(massless);
    team_.sync_all();
    a_total_ = total(1);
    b_total_ = total_of_columns(0);
  }

  FEWSTEP_HD T* scalars(int parity, int which) const { return at(At::kScalar) + (parity * kScalars + which) * kWarps; }
  FEWSTEP_HD T* partial(int parity, int warp) const {
    return at(At::kPartial) + (parity * (kWarps < 2 ? 2 : kWarps) + warp) * At::kColumns;
  }

  // Leaves a warp's sum of `part` for all ranks to read after sync_all().
  FEWSTEP_HD void hand_over(int which, T part) {
    part = team_.lane_sum(part);
    if (team_.lane() == 0) scalars(parity_, which)[team_.warp()] = part;
  }

  // Sum over warps and ranks, in the same order everywhere.
  FEWSTEP_HD T total(int which) const {
    if (team_.ranks() == 1) return total_of_columns(which);
    T sum = 0;
    FEWSTEP_ROLLED
    for (int e = team_.lane(); e < team_.ranks() * team_.warps(); e += kLanes) {
      sum += team_.peer(scalars(parity_, which), e / team_.warps())[e % team_.warps()];
    }
    return team_.lane_sum(sum);
  }

  // The same of this block's warps alone: all ranks have all columns.
  FEWSTEP_HD T total_of_columns(int which) const {
    T sum = 0;
    FEWSTEP_ROLLED
    for (int w = team_.lane(); w < team_.warps(); w += kLanes) sum += scalars(parity_, which)[w];
    return team_.lane_sum(sum);
  }

  FEWSTEP_HD T* weights(int t, int i) const {
    const int first = static_cast<int>(At::behind_costs(rows_, p_.m));
    return at(first + (t * rows_ + i) * static_cast<int>(At::weight_stride(p_.m)));
  }
  FEWSTEP_HD bool by_products() const { return kTensor && p_.by_products(); }

  // These lose nothing to cancellation.
  FEWSTEP_HD void measure_by_differences(T (&c)[R][Q]) {
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) {
      FEWSTEP_UNROLL
      for (int q = 0; q < Q; ++q) c[r][q] = 0;
    }
    T* const right = at(At::kPartial);
    T* const left = right + p_.m * kStageStride;
    FEWSTEP_ROLLED
    for (int k0 = 0; k0 < p_.d; k0 += kDepth) {
      team_.sync();
      FEWSTEP_ROLLED
      for (int e = team_.rank(); e < (p_.m + rows_) * kDepth; e += team_.size()) {
        const int point = e / kDepth, k = e % kDepth;
        const T* from = point < p_.m ? p_.y.point(point, p_.d) : row(point - p_.m);
        right[point * kStageStride + k] = k0 + k < p_.d ? from[k0 + k] : T(0);
      }
      team_.sync();
      if (rows_ == 0) continue;
      FEWSTEP_ROLLED
      for (int k = 0; k < kDepth; ++k) {
        T x[R];
        FEWSTEP_UNROLL
        for (int r = 0; r < R; ++r) x[r] = left[least(row_of(r), rows_ - 1) * kStageStride + k];
        FEWSTEP_UNROLL
        for (int q = 0; q < Q; ++q) {
          if (q * kLanes >= p_.m) continue;
          const T y = right[least(column_of(q), p_.m - 1) * kStageStride + k];
          FEWSTEP_UNROLL
          for (int r = 0; r < R; ++r) c[r][q] += (x[r] - y) * (x[r] - y);
        }
      }
    }
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) {
      const int i = row_of(r);
      FEWSTEP_UNROLL
      for (int q = 0; q < Q; ++q) {
        const int j = column_of(q);
        if (i >= rows_ || j >= p_.m) continue;
        at(At::kCost)[i * p_.m + j] = p_.excluded(first_ + i, j) ? kInfinity<T> : finish_cost(c[r][q], p_.cost);
      }
    }
    team_.sync();
  }

  FEWSTEP_HD T squared_distance(int i, int j) const {
    const T* const x = row(i);
    const T* const y = p_.y.point(j, p_.d);
    T squared = 0;
    FEWSTEP_ROLLED
    for (int k = 0; k < p_.d; ++k) squared += (x[k] - y[k]) * (x[k] - y[k]);
    return squared;
  }

  FEWSTEP_HD bool aligned() const {
    uintptr_t bits = reinterpret_cast<uintptr_t>(p_.x);
    FEWSTEP_UNROLL
    for (int part = 0; part < kParts; ++part) bits |= reinterpret_cast<uintptr_t>(p_.y.data[part]);
    return p_.d % 4 == 0 && bits % 16 == 0;
  }

  // Begins to copy kDepth coordinates from k0 of the columns up to a whole tile, of this block's rows where they are
  // wanted, and of the origin, into a stage [points + 1, kMmaStride]; zeros where there are none. A thread has `wide`
  // (4 or 1) coordinates of some points.
  FEWSTEP_HD void fetch(T* stage, int points, int k0, int wide) const {
    static_assert(kDepth == 16);
    const int threads = wide == 4 ? 2 : 4;  // log2 of those that a point takes
    const int own = (team_.rank() & ((1 << threads) - 1)) * wide;
    const bool inside = k0 + own < p_.d;
    const int k = inside ? k0 + own : 0;
    FEWSTEP_ROLLED
    for (int point = team_.rank() >> threads; point <= points; point += team_.size() >> threads) {
      const T* const from = point < tiled()  ? p_.y.point(least(point, p_.m - 1), p_.d)
                            : point < points ? row(point - tiled())
                                             : p_.x;
      const bool exists = inside && (point < p_.m || point >= tiled());
      T* const to = stage + point * kMmaStride + own;
      wide == 4 ? team_.template copy<4>(to, from + k, exists) : team_.template copy<1>(to, from + k, exists);
    }
    team_.commit();
  }

  // 2 or 4 neighbours, aligned to their size.
  template <int kCount, typename From, typename To>
  static FEWSTEP_HD void move(const From* from, To* to) {
#ifdef __CUDA_ARCH__
    using Words = std::conditional_t<kCount == 4, uint4, uint2>;
    *reinterpret_cast<Words*>(to) = *reinterpret_cast<const Words*>(from);
#else
    std::memcpy(to, from, 4 * kCount);
#endif
  }

  // Points about the origin, in halves: in the place of 8 coordinates their high parts and their low parts. A thread
  // has whole points; down(point, its place, largest coordinate, squared norm) is the power of 2 to multiply one by.
  // With kNormed the last two are known; a point is read once where there are registers for it.
  template <bool kNormed, typename Down>
  FEWSTEP_HD void halve(T* stage, int points, Down down) const {
    constexpr int kHeld = kNormed && kWarps <= 8 ? kDepth : 8;
    const T* const origin = stage + points * kMmaStride;
    FEWSTEP_ROLLED
    for (int point = team_.rank(); point < points; point += team_.size()) {
      T* const own = stage + point * kMmaStride;
      alignas(16) T v[kHeld];
      const auto take = [&](int k) {
        FEWSTEP_UNROLL
        for (int l = 0; l < kHeld; l += 4) {
          alignas(16) T o[4];
          move<4>(own + k + l, v + l);
          move<4>(origin + k + l, o);
          FEWSTEP_UNROLL
          for (int e = 0; e < 4; ++e) v[l + e] -= o[e];
        }
      };
      T top = 0, norm = 0;
      FEWSTEP_ROLLED
      for (int k = 0; kNormed && k < kDepth; k += kHeld) {
        take(k);
        FEWSTEP_UNROLL
        for (const T coordinate : v) {
          top = largest(std::abs(coordinate), top);
          norm += coordinate * coordinate;
        }
      }
      const T by = down(point, own, top, norm);
      FEWSTEP_ROLLED
      for (int k = 0; k < kDepth; k += kHeld) {
        if constexpr (kHeld < kDepth) take(k);
        FEWSTEP_UNROLL
        for (int l = 0; l < kHeld; l += 8) {
          alignas(16) uint32_t high[4], low[4];
          FEWSTEP_UNROLL
          for (int e = 0; e < 4; ++e) team_.split(v[l + 2 * e] * by, v[l + 2 * e + 1] * by, high[e], low[e]);
          move<4>(high, own + k + l);
          move<4>(low, own + k + l + 4);
        }
      }
    }
  }

  // use(stage, k0) for all coordinates in turn, about the first point of x: what is expanded there is as large as the
  // distances. Copies of the next stage are under way meanwhile. `first` is where the two are. Ends with sync().
  template <bool kNormed, typename Down, typename Use>
  FEWSTEP_HD void stream(int first, int points, Down down, Use use) {
    first = team_.opaque(first);
    points = team_.opaque(points);
    const int wide = aligned() ? 4 : 1, other = 2 * first + (points + 1) * kMmaStride;
    int now = first;
    fetch(at(now), points, 0, wide);
    FEWSTEP_ROLLED
    for (int k0 = 0; k0 < p_.d; k0 += kDepth) {
      team_.template arrived<0>();
      team_.sync();  // all copies are here, and nobody reads the other stage any more
      if (k0 + kDepth < p_.d) fetch(at(other - now), points, k0 + kDepth, wide);
      halve<kNormed>(at(now), points, down);
      team_.sync();
      use(at(now), k0);
      now = other - now;
    }
    team_.sync();
  }

  // |x - y|^2 = |x|^2 + |y|^2 - 2 x.y on tensor cores, columns along the long side of a tile; kSet neighbouring warps
  // have the rows of all of them, and every kSet-th tile. What tensor cores add up is summed outside of them: they
  // round towards zero. Roots of near pairs would be all cancellation: by differences.
  template <int kSet>
  FEWSTEP_HD void measure_by_products() {
    static_assert(R == 8 && kLanes == 32 && At::kPartial % 4 == 0);
    constexpr T kNear = T(1) / 64;
    constexpr int kUp = kDepth;  // where a point keeps what takes it back to its size
    constexpr int kEach = (kTiles + kSet - 1) / kSet;
    const int points = tiled() + rows_;
    T* const norm_y = at(At::kH);
    T* const norm_x = at(At::kShift);
    T product[kEach][kSet][4];
    FEWSTEP_UNROLL
    for (int s = 0; s < kEach; ++s) {
      FEWSTEP_UNROLL
      for (int w = 0; w < kSet; ++w) {
        FEWSTEP_UNROLL
        for (int e = 0; e < 4; ++e) product[s][w][e] = 0;
      }
    }
    team_.sync();
    FEWSTEP_ROLLED
    for (int e = team_.rank(); e < points; e += team_.size()) (e < tiled() ? norm_y[e] : norm_x[e - tiled()]) = 0;
    const auto down = [&](int e, T* own, T top, T norm) {
      const halves::Power power(top);
      own[kUp] = power.up;
      (e < tiled() ? norm_y[e] : norm_x[e - tiled()]) += norm;
      return power.down;
    };
    stream<true>(At::kPartial, points, down, [&](const T* stage, int) {
      if (rows_ == 0) return;
      const bool three = p_.precision == halves::kThree;
      const int lane = team_.lane(), group = lane / 4, quad = lane % 4;
      const int own = team_.warp() / kSet * kSet * R, first = team_.warp() % kSet;
      const T* const x = stage + tiled() * kMmaStride;
      halves::Factor<2> right[kSet];
      T up[kSet][2];
      FEWSTEP_UNROLL
      for (int w = 0; w < kSet; ++w) {
        uint32_t both[4];
        team_.template load<false>(both, x + least(own + w * R + lane % 8, rows_ - 1) * kMmaStride + lane / 8 * 4);
        right[w] = {{both[0], both[2]}, {both[1], both[3]}};
        FEWSTEP_UNROLL
        for (int e = 0; e < 2; ++e) up[w][e] = x[least(own + w * R + 2 * quad + e, rows_ - 1) * kMmaStride + kUp];
      }
      FEWSTEP_UNROLL
      for (int s = 0; s < kEach; ++s) {
        const int tile = s * kSet + first;
        if (tile * 16 >= p_.m) continue;
        const T* const y = stage + tile * 16 * kMmaStride;
        halves::Factor<4> left;
        team_.template load<false>(left.high, y + lane % 16 * kMmaStride + lane / 16 * 8);
        if (three) team_.template load<false>(left.low, y + lane % 16 * kMmaStride + lane / 16 * 8 + 4);
        FEWSTEP_UNROLL
        for (int w = 0; w < kSet; ++w) {
          T sum[4] = {};
          halves::multiply(team_, sum, sum, left, right[w], three);
          FEWSTEP_UNROLL
          for (int e = 0; e < 4; ++e)
            product[s][w][e] += sum[e] * up[w][e % 2] * y[(group + e / 2 * 8) * kMmaStride + kUp];
        }
      }
    });
    const int lane = team_.lane(), own = team_.warp() / kSet * kSet * R, first = team_.warp() % kSet;
    FEWSTEP_UNROLL
    for (int s = 0; s < kEach; ++s) {
      FEWSTEP_UNROLL
      for (int w = 0; w < kSet; ++w) {
        FEWSTEP_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int i = own + w * R + 2 * (lane % 4) + e % 2, j = (s * kSet + first) * 16 + lane / 4 + e / 2 * 8;
          if (i < rows_ && j < p_.m) at(At::kCost)[i * p_.m + j] = product[s][w][e];
        }
      }
    }
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < tiled(); j += team_.size()) at(At::kScale)[j] = std::sqrt(norm_y[j]);
    team_.sync();
    FEWSTEP_ROLLED
    for (int e = team_.rank(); e < rows_ * p_.m; e += team_.size()) {
      const int i = e / p_.m, j = e % p_.m;
      const T norms = norm_x[i] + norm_y[j];
      T squared = norms - 2 * at(At::kCost)[e];
      if (p_.cost == 2 && squared < kNear * norms) squared = squared_distance(i, j);
      if (squared < 0) squared = 0;  // NaN stays
      at(At::kCost)[e] = p_.excluded(first_ + i, j) ? kInfinity<T> : finish_cost(squared, p_.cost);
    }
    team_.sync();
  }

  // combine() on tensor cores, coordinates along the long side of a tile: a warp keeps the weights of its rows, in
  // whose place the points then pass, once for all temperatures.
  template <int kStacked>
  FEWSTEP_HD void combine_by_products(const Velocities<T>& out, int count, T (&squares)[kStacked]) {
    static_assert(R == 8 && kLanes == 32 && At::kCost % 4 == 0 && kStacked <= kMostStacked);
    const int quad = team_.lane() % 4, i = team_.warp() * R + team_.lane() / 4;
    halves::Factor<2> w[kStacked][kTiles];
    team_.sync();
    FEWSTEP_UNROLL
    for (int t = 0; t < kStacked; ++t) {
      squares[t] = 0;
      FEWSTEP_UNROLL
      for (int s = 0; s < kTiles; ++s) {
        FEWSTEP_UNROLL
        for (int e = 0; e < 2; ++e) {
          alignas(8) T pair[2] = {};
          if (t < count && i < rows_ && s * 16 < p_.m) move<2>(weights(t, i) + 2 * quad + s * 16 + e * 8, pair);
          team_.split(pair[0], pair[1], w[t][s].high[e], w[t][s].low[e]);
        }
      }
    }
    team_.sync();
    const auto down = [&](int e, T*, T, T) { return halves::Power(at(At::kScale)[e]).down; };
    stream<false>(static_cast<int>(At::behind_costs(rows_, p_.m)), tiled(), down, [&](const T* stage, int k0) {
      const bool three = p_.precision == halves::kThree;
      const int lane = team_.lane();
      T sum[kStacked][4] = {}, small[kStacked][4] = {};
      FEWSTEP_UNROLL
      for (int s = 0; s < kTiles; ++s) {
        if (s * 16 >= p_.m) continue;
        const T* const z = stage + (s * 16 + lane % 8 + lane / 16 * 8) * kMmaStride + lane / 8 % 2 * 8;
        halves::Factor<4> left;
        team_.template load<true>(left.high, z);
        if (three) team_.template load<true>(left.low, z + 4);
        FEWSTEP_UNROLL
        for (int t = 0; t < kStacked; ++t) {
          if (t < count) halves::multiply(team_, sum[t], small[t], left, w[t][s], three);
        }
      }
      const int own = team_.warp() * R;
      FEWSTEP_UNROLL
      for (int t = 0; t < kStacked; ++t) {
        FEWSTEP_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int to_row = own + 2 * (lane % 4) + e % 2, k = k0 + lane / 4 + e / 2 * 8;
          if (t >= count || to_row >= rows_ || k >= p_.d) continue;
          T value = (sum[t][e] + small[t][e]) * at(At::kBack + t * At::kRows)[to_row];
          // The same thread wrote what is added to.
          T* const to = out.first + t * out.step + static_cast<int64_t>(to_row) * p_.d + k;
          if (out.add) value += *to;
          *to = value;
          squares[t] += value * value;
        }
      }
    });
  }

  // out_i = sum_j w_ij z_j for the points of the columns, relative to the first point of x, which is of no consequence
  // but to rounding: the weights of a row add up to a number that belongs to all plans together. A warp makes its rows.
  FEWSTEP_HD T combine_by_differences(const Velocities<T>& out, int t) {
    constexpr int kS = 4;  // coordinates of a lane
    T squares = 0;
    FEWSTEP_ROLLED
    for (int d0 = 0; d0 < p_.d; d0 += kS * kLanes) {
      T sum[R][kS], origin[kS];
      FEWSTEP_UNROLL
      for (int s = 0; s < kS; ++s) {
        const int d = d0 + s * kLanes + team_.lane();
        origin[s] = d < p_.d ? p_.x[d] : T(0);
        FEWSTEP_UNROLL
        for (int r = 0; r < R; ++r) sum[r][s] = 0;
      }
      FEWSTEP_ROLLED
      for (int j = 0; j < p_.m; ++j) {
        const T* const point = p_.y.point(j, p_.d);
        T z[kS];
        FEWSTEP_UNROLL
        for (int s = 0; s < kS; ++s) {
          const int d = d0 + s * kLanes + team_.lane();
          z[s] = d < p_.d ? point[d] - origin[s] : T(0);
        }
        FEWSTEP_UNROLL
        for (int r = 0; r < R; ++r) {
          const T w = weights(t, least(row_of(r), rows_ - 1))[j];
          FEWSTEP_UNROLL
          for (int s = 0; s < kS; ++s) sum[r][s] += w * z[s];
        }
      }
      FEWSTEP_ROLLED
      for (int s = 0; s < kS; ++s) {
        const int d = d0 + s * kLanes + team_.lane();
        FEWSTEP_UNROLL
        for (int r = 0; r < R; ++r) {
          // An index known at compile time, for a loop that is not unrolled.
          T value = 0;
          FEWSTEP_UNROLL
          for (int o = 0; o < kS; ++o) value = o == s ? sum[r][o] : value;
          if (row_of(r) >= rows_ || d >= p_.d) continue;
          // The same thread wrote what is added to.
          T* const to = out.first + t * out.step + static_cast<int64_t>(row_of(r)) * p_.d + d;
          if (out.add) value += *to;
          *to = value;
          squares += value * value;
        }
      }
    }
    return squares;
  }

  FEWSTEP_HD void accept() {
    u_ = At::kRows - u_;
    if (absorbed_) f_ = At::kRows - f_;
  }

  // F_i as of the last row update that was accepted. After a pass that absorbs, f has it: its scaling may be inf.
  FEWSTEP_HD T potential(int i) const {
    return absorbed_ ? at(At::kF + f_)[i] : at(At::kShift)[i] + log2(at(At::kU + u_)[i]);
  }

  // H and F from scalings, where these are in use.
  FEWSTEP_HD void fold() {
    FEWSTEP_ROLLED
    for (int i = team_.rank(); i < rows_; i += team_.size()) at(At::kF + f_)[i] = potential(i);
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      if (!(at(At::kB)[j] > 0)) continue;
      at(At::kH)[j] += log2(at(At::kV)[j]);
      at(At::kV)[j] = 1;
    }
    team_.sync();
  }

  FEWSTEP_HD void change_temperature(T next, bool folded) {
    if (!folded) fold();
    const T ratio = temperature_ / next;
    temperature_ = next;
    set_temperature();
    FEWSTEP_ROLLED
    for (int i = team_.rank(); i < rows_; i += team_.size()) at(At::kF + f_)[i] *= ratio;
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      const T b = at(At::kB)[j];
      if (b > 0) at(At::kH)[j] = (at(At::kH)[j] - log2(b)) * ratio + log2(b);
    }
    team_.sync();
  }

  // Row update and column sums, from K or, with kAbsorb, from the potentials f and h, which are then in K; where it is
  // asked for, the error of the rows and their mass, of the potentials before. Ends with sync_all(). Returns whether
  // all scalings are in their range: if not, a pass from K is void, and after one that absorbs the next is to absorb
  // too.
  template <bool kAbsorb>
  FEWSTEP_HD bool pass(T (&k)[R][Q], bool asked) {
    T s[R], own[kOwn];
    if constexpr (kAbsorb) {
      absorb(k);
      FEWSTEP_UNROLL
      for (int e = 0; e < kOwn; ++e) own[e] = 1;
    } else {
      FEWSTEP_UNROLL
      for (int r = 0; r < R; ++r) s[r] = 0;
      FEWSTEP_UNROLL
      for (int q = 0; q < Q; ++q) {
        const T v = column_of(q) < p_.m ? at(At::kV)[column_of(q)] : T(0);
        FEWSTEP_UNROLL
        for (int r = 0; r < R; ++r) s[r] += k[r][q] * v;
      }
      team_.combine_rows(s, own, Sum());
    }
    parity_ = 1 - parity_;
    T error = 0, mass = 0;
    bool safe = true;
    FEWSTEP_UNROLL
    for (int e = 0; e < kOwn; ++e) {
      const int i = own_row(e);
      if (i >= rows_) {
        own[e] = 0;
        continue;
      }
      const T a = at(At::kA)[i], before = at(At::kU + u_)[i], shift = kAbsorb || !plain_ ? at(At::kShift)[i] : T(0);
      T next = reciprocal(own[e]), full = shift, wanted = 1;
      if (!plain_) {
        // All but `full` about the shift, which may be large.
        const T now = kAbsorb ? at(At::kF + f_)[i] - shift : log2(before);
        T change = -log2(own[e]);
        if (damping_x_ != 1) change = damping_x_ * (shift + change) - shift;
        if (relax_ != 1) change = now + relax_ * (change - now);
        next = exp2(change);
        full = shift + change;
        if (target_x_ != 0) wanted = exp2(-target_x_ * (shift + now));
      }
      safe = safe && within(next, 1 / Range<T>::kSafe, Range<T>::kSafe);
      // A row without mass may have any sum, also one that overflows.
      if (asked && a != 0 && first_of_row()) {
        error += a * std::abs(before * own[e] - wanted);
        mass += a * before * own[e];
      }
      T scaling = averaged_ ? before : next;
      // More than that in an entry of K that is 0 would be felt: all columns are to see it.
      if (kAbsorb && scaling > Range<T>::kTop) scaling = kInfinity<T>;
      own[e] = a == 0 ? T(0) : a * scaling;
      if (!first_of_row()) continue;
      at(At::kU + At::kRows - u_)[i] = next;
      if constexpr (kAbsorb) at(At::kF + At::kRows - f_)[i] = full;
      if (s_.single) partial(parity_, 0)[i] = full;
    }
    if (!s_.single) {
      team_.spread(own, s);
      FEWSTEP_UNROLL
      for (int q = 0; q < Q; ++q) {
        if (column_of(q) >= p_.m) continue;
        T sum = 0;
        FEWSTEP_UNROLL
        for (int r = 0; r < R; ++r) sum += s[r] * k[r][q];
        partial(parity_, team_.warp())[column_of(q)] = sum;
      }
    }
    if (asked) {
      hand_over(0, error);
      hand_over(1, mass);
    }
    safe = !sync_any(!safe);
    if (kAbsorb || safe) {
      absorbed_ = kAbsorb;
    } else {
      fold();
    }
    return safe;
  }

  // sync_all(), and whether a flag is set in any thread of all ranks.
  FEWSTEP_HD bool sync_any(bool flag) const {
    if (team_.ranks() == 1) return team_.any(flag);
    flag = team_.lane_any(flag);
    if (team_.lane() == 0) scalars(parity_, 2)[team_.warp()] = flag ? T(1) : T(0);
    team_.sync_all();
    bool all = false;
    FEWSTEP_ROLLED
    for (int e = team_.lane(); e < team_.ranks() * team_.warps(); e += kLanes) {
      all = all || team_.peer(scalars(parity_, 2), e / team_.warps())[e % team_.warps()] != 0;
    }
    return team_.lane_any(all);
  }

  // K with rows that sum to 1, and u of the potentials f.
  FEWSTEP_HD void absorb(T (&k)[R][Q]) {
    if (team_.ranks() > 1 && rows_ == 0) {  // a rank without rows has no costs to read
      FEWSTEP_UNROLL
      for (int r = 0; r < R; ++r) {
        FEWSTEP_UNROLL
        for (int q = 0; q < Q; ++q) k[r][q] = 0;
      }
      return;
    }
    T row[R], top[kOwn], own[kOwn];
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) row[r] = kLowest<T>;
    FEWSTEP_UNROLL
    for (int q = 0; q < Q; ++q) {
      const int j = least(column_of(q), p_.m - 1);
      const T h = column_of(q) < p_.m ? at(At::kH)[j] : -kInfinity<T>;
      FEWSTEP_UNROLL
      for (int r = 0; r < R; ++r) {
        k[r][q] = h - k_ * at(At::kCost)[least(row_of(r), rows_ - 1) * p_.m + j];
        row[r] = largest(k[r][q], row[r]);
      }
    }
    team_.combine_rows(row, top, Largest());
    team_.spread(top, row);
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) {
      T sum = 0;
      FEWSTEP_UNROLL
      for (int q = 0; q < Q; ++q) {
        k[r][q] = exp2(k[r][q] - row[r]);
        sum += k[r][q];
      }
      row[r] = sum;
    }
    team_.combine_rows(row, own, Sum());
    FEWSTEP_UNROLL
    for (int e = 0; e < kOwn; ++e) {
      const int i = own_row(e);
      const T sum = own[e], shift = -(top[e] + log2(sum));
      own[e] = reciprocal(sum);
      if (i >= rows_ || !first_of_row()) continue;
      at(At::kShift)[i] = shift;
      at(At::kU + u_)[i] = exp2(at(At::kF + f_)[i] - shift);
    }
    team_.spread(own, row);
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) {
      FEWSTEP_UNROLL
      for (int q = 0; q < Q; ++q) k[r][q] = row_of(r) < rows_ ? k[r][q] * row[r] : T(0);
    }
    team_.sync_lanes();
  }

  // The error of the potentials before the last pass: of the rows and, where columns are not exact, of the columns,
  // whichever is larger. Every rank comes to the same bits.
  FEWSTEP_HD T error() {
    const T rows = total(0);
    if (!averaged_ || s_.single) return rows;
    bool bad = false;
    T part = 0;
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      const T b = at(At::kB)[j];
      if (b == 0) continue;
      const T sum = column_sum(j), v = at(At::kV)[j];
      if (!within(sum, Range<T>::kLow, Range<T>::kHigh)) {
        bad = true;
        at(At::kV)[j] = -v;  // marks the column
        continue;
      }
      part += std::abs(v * sum - b * wanted(j, v));
    }
    if (team_.any(bad)) {
      column_lse();
      FEWSTEP_ROLLED
      for (int j = team_.rank(); j < p_.m; j += team_.size()) {
        const T v = -at(At::kV)[j];
        if (!(v > 0)) continue;
        part += std::abs(exp2(at(At::kH)[j] + log2(v) + at(At::kLse)[j]) - at(At::kB)[j] * wanted(j, v));
        at(At::kV)[j] = v;
      }
    }
    hand_over(3, part);
    team_.sync();
    return largest(total_of_columns(3), rows);
  }

  // What the marginal of column j is to be, over b_j, where v_j is `v`.
  FEWSTEP_HD T wanted(int j, T v) const {
    return target_y_ == 0 ? T(1) : exp2(-target_y_ * (at(At::kH)[j] + log2(v) - log2(at(At::kB)[j])));
  }

  FEWSTEP_HD T column_sum(int j) const {
    T sum = 0;
    FEWSTEP_ROLLED
    for (int rank = 0; rank < team_.ranks(); ++rank) {
      FEWSTEP_UNROLL
      for (int w = 0; w < kWarps; ++w) {
        if (w < team_.warps()) sum += team_.peer(partial(parity_, w), rank)[j];
      }
    }
    return sum;
  }

  // v from the column sums of all ranks. Every rank does the same and comes to the same bits. Ends with sync(). Returns
  // whether the potentials are to be folded, for the next pass to absorb.
  FEWSTEP_HD bool finish_columns() {
    const T high = absorbed_ ? Range<T>::kHalf : Range<T>::kSafe;
    bool far = false, bad = false;
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      const T b = at(At::kB)[j];
      if (b == 0) continue;
      const T sum = column_sum(j);
      if (!within(sum, Range<T>::kLow, Range<T>::kHigh)) {
        bad = true;
        at(At::kV)[j] = -at(At::kV)[j];  // marks the column
        continue;
      }
      const T before = at(At::kV)[j];
      const T next = plain_ ? b * reciprocal(sum) : exp2(column_step(j, -log2(sum), before));
      const bool own = !within(next, 1 / high, high);
      at(At::kV)[j] = own ? T(1) : next;
      // It may be 0 or inf: its logarithm is not taken.
      if (own) at(At::kH)[j] += column_step(j, -log2(sum), before);
      far = far || own;
    }
    if (!team_.any(far || bad)) return false;
    if (team_.any(bad)) {
      column_lse();
      FEWSTEP_ROLLED
      for (int j = team_.rank(); j < p_.m; j += team_.size()) {
        if (!(at(At::kV)[j] < 0)) continue;
        at(At::kH)[j] += column_step(j, -at(At::kLse)[j] - at(At::kH)[j], -at(At::kV)[j]);
        at(At::kV)[j] = 1;
      }
      team_.sync();
    }
    return true;
  }

  // log2 of the next v_j, which was `before`, for the soft c-transform of column j less h_j: damped and relaxed.
  FEWSTEP_HD T column_step(int j, T soft, T before) const {
    const T log_b = log2(at(At::kB)[j]);
    T change = log_b + soft;
    if (damping_y_ != 1) change = damping_y_ * (at(At::kH)[j] + soft) + log_b - at(At::kH)[j];
    if (relax_ == 1) return change;
    const T now = log2(before);
    return now + relax_ * (change - now);
  }

  // v from the next F of all ranks: x is y. As finish_columns().
  FEWSTEP_HD bool follow_rows() {
    const T high = absorbed_ ? Range<T>::kHalf : Range<T>::kSafe;
    const int each = (p_.n + team_.ranks() - 1) / team_.ranks();
    bool far = false;
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      const T b = at(At::kB)[j];
      if (b == 0) continue;
      const int rank = j / each;
      const T h = team_.peer(partial(parity_, 0), rank)[j - rank * each] + log2(b), v = exp2(h - at(At::kH)[j]);
      const bool own = !within(v, 1 / high, high);
      at(At::kV)[j] = own ? T(1) : v;
      if (own) at(At::kH)[j] = h;
      far = far || own;
    }
    return team_.any(far);
  }

  // lse_j = log2 sum_i a_i 2^(F_i - k C_ij) of the columns whose v is negative, by all ranks. Contains sync_all().
  FEWSTEP_HD void column_lse() {
    T* const fa = at(At::kLogs);
    FEWSTEP_ROLLED
    for (int i = team_.rank(); i < rows_; i += team_.size()) fa[i] = potential(i) + log2(at(At::kA)[i]);
    team_.sync();
    // What was read last was of the other parity: all ranks have passed a barrier since.
    T* const tops = partial(1 - parity_, 0);
    T* const sums = partial(1 - parity_, 1);
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      if (!(at(At::kV)[j] < 0)) continue;
      T top = kLowest<T>;
      FEWSTEP_ROLLED
      for (int i = 0; i < rows_; ++i) top = largest(fa[i] - k_ * at(At::kCost)[i * p_.m + j], top);
      T sum = 0;
      FEWSTEP_ROLLED
      for (int i = 0; i < rows_; ++i) sum += exp2(fa[i] - k_ * at(At::kCost)[i * p_.m + j] - top);
      tops[j] = top;
      sums[j] = sum;
    }
    team_.sync_all();
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      if (!(at(At::kV)[j] < 0)) continue;
      T top = kLowest<T>;
      FEWSTEP_ROLLED
      for (int rank = 0; rank < team_.ranks(); ++rank) top = largest(team_.peer(tops, rank)[j], top);
      T sum = 0;
      FEWSTEP_ROLLED
      for (int rank = 0; rank < team_.ranks(); ++rank) {
        sum += team_.peer(sums, rank)[j] * exp2(team_.peer(tops, rank)[j] - top);
      }
      at(At::kLse)[j] = top + log2(sum);
    }
    team_.sync_all();
  }

  // lse of the columns without mass, from the f that came out: their g has a meaning too.
  FEWSTEP_HD void soft_of_massless_columns() {
    if (!massless_) return;
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      if (!(at(At::kB)[j] > 0)) at(At::kV)[j] = -1;
    }
    team_.sync();
    column_lse();
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      if (!(at(At::kB)[j] > 0)) at(At::kV)[j] = 0;
    }
    team_.sync();
  }

  const Team& team_;
  Points<T> p_;
  T* const memory_;
  Schedule<T> s_;
  int first_, rows_;
  int f_ = 0, u_ = 0;  // which of two
  int parity_ = 0, step_ = 0, iterations_ = 0;
  bool plain_ = true, averaged_ = false;  // column sums are those with the u before
  bool final_ = false, absorbed_ = false, massless_ = false;
  T k_ = 0, temperature_ = 0, annealed_ = 0, relax_ = 1;
  T damping_x_ = 1, damping_y_ = 1, target_x_ = 0, target_y_ = 0;
  T a_total_ = 1, b_total_ = 1, residual_ = 0;
};

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
// hold potentials in units of eps ln 2 meanwhile; scratch has one element per warp.
template <typename T, typename Team>
FEWSTEP_HD void solve_directly(const Team& team, const Points<T>& p, const Schedule<T>& s, const Marginals<T>& w, T eps,
                               T start, T* next, T* scratch, const block::Solution<T>& out) {
  const bool plain = std::isinf(s.rho_x) && std::isinf(s.rho_y) && s.relax == 1;
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
  int step = 0, at_eps = 0, iterations = 0;
  T annealed = start, residual = 0, mass = 0;
  bool final = false, measured = false, closing = false, averaged = s.simultaneous;
  const auto accept = [&] {
    FEWSTEP_ROLLED
    for (int i = team.rank(); i < p.n; i += team.size()) f[i] = next[i];
    team.sync();
  };
  while (true) {
    T temperature = eps;
    if (!final) {
      if (step < s.scheduled) {
        temperature = s.temperatures[step++];
      } else if (annealed > eps) {
        temperature = annealed;
        annealed *= s.factor;
      } else {
        final = true;
      }
    }
    const T k_next = block::inverse_temperature(temperature), ratio = k_next / k;
    k = k_next;
    FEWSTEP_ROLLED
    for (int i = team.rank(); i < p.n; i += team.size()) f[i] *= ratio;
    FEWSTEP_ROLLED
    for (int j = team.rank(); j < p.m; j += team.size()) g[j] *= ratio;
    team.sync();
    const T damping_x = std::isinf(s.rho_x) ? T(1) : s.rho_x / (s.rho_x + temperature);
    const T damping_y = std::isinf(s.rho_y) ? T(1) : s.rho_y / (s.rho_y + temperature);
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
      const T soft = -(top + log2(team.lane_sum(sum))), full = damping_x * soft, a = w.a[i];
      if (a != 0 && team.lane() == 0) {
        const T row = exp2(f[i] - soft), wanted = std::isinf(s.rho_x) ? T(1) : exp2(-f[i] * temperature / s.rho_x);
        error += a * std::abs(row - wanted);
        moved += a * row;
      }
      if (team.lane() == 0) next[i] = relax == 1 ? full : f[i] + relax * (full - f[i]);
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
      return -(top + log2(sum));
    };
    // The row update that follows an iteration at eps measures it.
    if (measured) {
      const bool last = ++at_eps == (closing ? s.last_steps() : s.max_iter), exact = !averaged || s.single;
      T off = 0;
      FEWSTEP_ROLLED
      for (int j = team.rank(); j < p.m && !exact && (last || s.tol >= 0); j += team.size()) {
        const T wanted = std::isinf(s.rho_y) ? T(1) : exp2(-g[j] * temperature / s.rho_y);
        if (w.b[j] != 0) off += w.b[j] * std::abs(exp2(g[j] - soft_of_column(j)) - wanted);
      }
      residual = largest(block::team_sum(team, off, scratch), error) / a_total;
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
    measured = final;
    if (closing) continue;
    ++iterations;
    relax = s.relax;
  }
  FEWSTEP_ROLLED
  for (int i = team.rank(); s.single && i < p.n; i += team.size()) g[i] = f[i];
  team.sync();
  const T unit = 1 / k;
  T value = 0;
  FEWSTEP_ROLLED
  for (int i = team.rank(); i < p.n; i += team.size()) {
    f[i] *= unit;
    if (w.a[i] != 0) value += w.a[i] * penalised(f[i], s.rho_x);
  }
  FEWSTEP_ROLLED
  for (int j = team.rank(); j < p.m; j += team.size()) {
    g[j] *= unit;
    if (w.b[j] != 0) value += w.b[j] * penalised(g[j], s.rho_y);
  }
  value = block::team_sum(team, value, scratch);
  if (!plain) value -= eps * (mass - a_total * b_total);
  if (team.rank() == 0) {
    *out.value = value;
    *out.residual = residual;
    *out.iterations = iterations;
    *out.converged = residual <= s.converged_at;
  }
  team.sync();
}

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
  int n, d, cost, diagonal, precision;
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

// A group's share of the mean distance from x, sum_iu w_u |x_i - u|^2 (euclidean: |x_i - u|), and the weights of its
// pairs. x counts as a cloud of weights 1 where x_self does not stand for it. Squares come from moments about a point c
// of x, sum_u w_u sum_i |x_i - c|^2 + n sum_u w_u |u - c|^2 - 2 sum_i (x_i - c) . sum_u w_u (u - c), coordinate by
// coordinate. scratch has one element per warp.
template <typename T, typename Team>
FEWSTEP_HD double distances_from(const Team& team, const Drift<T>& in, int64_t group, double* scratch, double* weight) {
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
    if (in.cost == 2) {
      for (int64_t pair = team.warp(); pair < static_cast<int64_t>(in.n) * count; pair += team.warps()) {
        const T* const from = x + pair / count * in.d;
        const T* const to = points + pair % count * in.d;
        T squared = 0;
        for (int k = team.lane(); k < in.d; k += Team::kLanes) squared += (from[k] - to[k]) * (from[k] - to[k]);
        squared = team.lane_sum(squared);
        if (team.lane() == 0) distance += (c < 0 ? 1.0 : double(w[pair % count])) * std::sqrt(double(squared));
      }
    } else {
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
    }
    if (c >= 0) w += count;
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
    const T* const x = in.x + group() * in.n * in.d;
    Points<T> p{x, {}, in.n, 0, in.d, in.cost, kNoDiagonal, 0, 0, in.precision};
    const T* weights = in.weights + group() * (static_cast<int64_t>(in.counts[0]) + in.counts[1] + in.counts[2]);
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
      const T* const cloud = in.clouds[c] + group() * in.counts[c] * in.d;
      if (!in.joint) {
        p.y.data[0] = cloud;
        continue;
      }
      p.y.data[c] = cloud;
      if (c + 1 < in.cloud_count) p.y.end[c] = p.m;
    }
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
