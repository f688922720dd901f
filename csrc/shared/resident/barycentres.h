// How Solver takes barycentres: the weights of a plan in a drift, and the sums of points that they weigh.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../halves.h"
#include "distances.h"
#include "problem.h"
#include "solver.h"

namespace fewstep::resident {

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

template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::weigh(T (&k)[R][Q], const Share<T>& io, int t, T (&sums)[kMetrics]) {
  T positive[R], negative[R], bits[R], peak[R];
  FEWSTEP_UNROLL
  for (int r = 0; r < R; ++r) positive[r] = negative[r] = bits[r] = peak[r] = 0;
  const int lane = team_.lane(), warp = team_.warp(), first_own = warp * R + lane / kSharers * kOwn;
  const bool first_sharer = lane % kSharers == 0;
  const T* costs[R];
  T shift[R];
  FEWSTEP_UNROLL
  for (int r = 0; r < R; ++r) {
    const int i = least(warp * R + r, rows_ - 1);
    costs[r] = at(At::kCost) + (i * p_.m + lane);
    shift[r] = at(At::kShift)[i];
  }
  const T* const column = at(0) + lane;
  FEWSTEP_UNROLL
  for (int q = 0; q < Q; ++q) {
    const int j = lane + q * kLanes;
    if (j >= p_.m) continue;
    const T v = column[At::kV + q * kLanes], h = column[At::kH + q * kLanes] + log2(v);
    const bool right = j >= io.positive;
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) {
      const T e = k[r][q] * v;
      // Where a pair is left out its exponent is -inf and e is 0.
      bits[r] += e * raised(shift[r] + h - k_ * costs[r][q * kLanes], T(-1000));
      peak[r] = raised(e, peak[r]);
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
    const int i = first_own + e;
    const T total = plus[e] + minus[e], u = at(At::kU + u_)[least(i, rows_ - 1)];
    if (i < rows_ && first_sharer) {
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
    const int j = lane + q * kLanes;
    if (j >= p_.m) continue;
    const T up = by_products() ? halves::Power::inverse(column[At::kScale + q * kLanes]) : T(1);
    const bool right = j >= io.positive;
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) {
      k[r][q] *= (right ? negative[r] : positive[r]) * up;
      peak[r] = raised(std::abs(k[r][q]), peak[r]);
    }
  }
  if constexpr (kTensor) {
    if (p_.by_products()) {
      team_.combine_rows(peak, top, Largest());
      FEWSTEP_UNROLL
      for (int e = 0; e < kOwn; ++e) {
        const halves::Power power(top[e]);
        top[e] = power.down;
        if (first_sharer) at(At::kBack + t * At::kRows)[first_own + e] = power.up;
      }
      team_.spread(top, peak);
      FEWSTEP_UNROLL
      for (int r = 0; r < R; ++r) {
        FEWSTEP_UNROLL
        for (int q = 0; q < Q; ++q) k[r][q] *= peak[r];
      }
    }
  }
  T* to = weights(t, warp * R) + lane;
  const int stride = static_cast<int>(At::weight_stride(p_.m));
  FEWSTEP_UNROLL
  for (int r = 0; r < R; ++r) {
    if (warp * R + r >= rows_) break;
    FEWSTEP_UNROLL
    for (int q = 0; q < Q; ++q) {
      if (lane + q * kLanes < tiled()) to[q * kLanes] = k[r][q];
    }
    to += stride;
  }
  parity_ = 1 - parity_;
  FEWSTEP_UNROLL
  for (int which = 0; which < kMetrics; ++which) hand_over(which, part[which]);
  team_.sync();
  FEWSTEP_UNROLL
  for (int which = 0; which < kMetrics; ++which) sums[which] = total(which);
}

template <int R, int Q, int kWarps, typename T, typename Team>
template <int kStacked>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::combine(const Velocities<T>& out, int count, T (&squares)[kStacked]) {
  if constexpr (kTensor) {
    if (p_.by_products()) {
      const auto of = [&](auto some) {
        if constexpr (some.value <= kStacked) {
          p_.precision == halves::kThree ? combine_by_products<some.value, true>(out, squares)
                                         : combine_by_products<some.value, false>(out, squares);
        }
      };
      static_assert(kMostStacked == 3);
      FEWSTEP_UNROLL
      for (int t = 0; t < kStacked; ++t) squares[t] = 0;
      if (count == 1) return of(std::integral_constant<int, 1>{});
      if (count == 2) return of(std::integral_constant<int, 2>{});
      return of(std::integral_constant<int, 3>{});
    }
  }
  team_.sync();
  FEWSTEP_UNROLL
  for (int t = 0; t < kStacked; ++t) squares[t] = t < count ? combine_by_differences(out, t) : T(0);
  team_.sync();
}

// combine() of kCount matrices on tensor cores, coordinates along the long side of a tile: a warp keeps the weights of
// its rows, in whose place the points then pass, once for all temperatures.
template <int R, int Q, int kWarps, typename T, typename Team>
template <int kCount, bool kAll>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::combine_by_products(const Velocities<T>& out, T* squares) {
  static_assert(R == 8 && kLanes == 32 && At::kCost % 4 == 0 && At::kBack % 2 == 0);
  const int quad = team_.lane() % 4, i = team_.warp() * R + team_.lane() / 4;
  halves::Factor<2> w[kCount][kTiles];
  team_.sync();
  FEWSTEP_UNROLL
  for (int t = 0; t < kCount; ++t) {
    FEWSTEP_UNROLL
    for (int s = 0; s < kTiles; ++s) {
      FEWSTEP_UNROLL
      for (int e = 0; e < 2; ++e) {
        alignas(8) T pair[2] = {};
        if (i < rows_ && s * 16 < p_.m) move<2>(weights(t, i) + 2 * quad + s * 16 + e * 8, pair);
        team_.split(pair[0], pair[1], w[t][s].high[e], w[t][s].low[e]);
      }
    }
  }
  team_.sync();
  const auto down = [&](int e, T*, T) { return at(At::kScale)[e]; };
  stream<false>(static_cast<int>(At::behind_costs(rows_, p_.m)), tiled(), down, [&](const T* stage, int k0) {
    const int lane = team_.lane();
    const auto place = team_.place(stage + (lane % 8 + lane / 16 * 8) * kMmaStride + lane / 8 % 2 * 8);
    T sum[kCount][4] = {}, small[kCount][4] = {};
    FEWSTEP_UNROLL
    for (int s = 0; s < kTiles; ++s) {
      if (s * 16 >= p_.m) break;
      halves::Factor<4> left;
      team_.template load<true>(left.high, place, s * 16 * kMmaStride);
      if constexpr (kAll) team_.template load<true>(left.low, place, s * 16 * kMmaStride + 4);
      FEWSTEP_UNROLL
      for (int t = 0; t < kCount; ++t) halves::multiply<kAll>(team_, sum[t], small[t], left, w[t][s]);
    }
    const int i = team_.warp() * R + 2 * (lane % 4), k = k0 + lane / 4;  // of the first of two rows and of two columns
    if (i >= rows_) return;
    const bool second = i + 1 < rows_, near = k < p_.d, far = k + 8 < p_.d;
    const T* const back = at(At::kBack) + team_.opaque(i);
    T* to[2] = {out.first + (static_cast<int64_t>(i) * p_.d + k)};
    to[1] = to[0] + p_.d;
    FEWSTEP_UNROLL
    for (int t = 0; t < kCount; ++t) {
      alignas(8) T up[2];
      move<2>(back + t * At::kRows, up);
      FEWSTEP_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (!(e % 2 == 0 || second) || !(e / 2 == 0 ? near : far)) continue;
        T value = (sum[t][e] + small[t][e]) * up[e % 2];
        // The same thread wrote what is added to.
        T* const own = to[e % 2] + e / 2 * 8;
        if (out.add) value += *own;
        *own = value;
        squares[t] += value * value;
      }
      to[0] += out.step;
      to[1] += out.step;
    }
  });
}

// out_i = sum_j w_ij z_j for the points of the columns, relative to the first point of x, which is of no consequence
// but to rounding: the weights of a row add up to a number that belongs to all plans together. A warp makes its rows.
template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD T Solver<R, Q, kWarps, T, Team>::combine_by_differences(const Velocities<T>& out, int t) {
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

}  // namespace fewstep::resident
