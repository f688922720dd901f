// How Solver measures distances: by differences, or by products on tensor cores.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../halves.h"
#include "problem.h"
#include "solver.h"

namespace fewstep::resident {

template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::measure(T (&c)[R][Q]) {
  if constexpr (kTensor) {
    if (p_.by_products()) {
      if (team_.warps() % kWide == 0) return measure_by_products<kWide>();
      return measure_by_products<1>();
    }
  }
  measure_by_differences(c);
}

// These lose nothing to cancellation.
template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::measure_by_differences(T (&c)[R][Q]) {
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

template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD T Solver<R, Q, kWarps, T, Team>::squared_distance(int i, int j) const {
  const T* const x = row(i);
  const T* const y = p_.y.point(j, p_.d);
  T squared = 0;
  FEWSTEP_ROLLED
  for (int k = 0; k < p_.d; ++k) squared += (x[k] - y[k]) * (x[k] - y[k]);
  return squared;
}

template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD bool Solver<R, Q, kWarps, T, Team>::aligned() const {
  uintptr_t bits = reinterpret_cast<uintptr_t>(p_.x);
  FEWSTEP_UNROLL
  for (int part = 0; part < kParts; ++part) bits |= reinterpret_cast<uintptr_t>(p_.y.data[part]);
  return p_.d % 4 == 0 && bits % 16 == 0;
}

// Begins to copy kDepth coordinates from k0 of the columns up to a whole tile, of this block's rows where they are
// wanted, and of the origin, into a stage [points + 1, kMmaStride]; zeros where there are none. A thread has `wide`
// (4 or 1) coordinates of some points.
template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::fetch(T* stage, int points, int k0, int wide) const {
  static_assert(kDepth == 16);
  const int threads = wide == 4 ? 2 : 4;  // log2 of those that a point takes
  const int own = (team_.rank() & ((1 << threads) - 1)) * wide;
  const bool inside = k0 + own < p_.d;
  const int k = inside ? k0 + own : 0;
  FEWSTEP_ROLLED
  for (int point = team_.rank() >> threads; point <= points; point += team_.size() >> threads) {
    const T* const from = point < tiled()  ? p_.y.point(least(point, p_.m - 1), p_.d)
                          : point < points ? row(point - tiled())
                                           : p_.x + static_cast<int64_t>(p_.origin) * p_.d;
    const bool exists = inside && (point < p_.m || point >= tiled());
    T* const to = stage + point * kMmaStride + own;
    wide == 4 ? team_.template copy<4>(to, from + k, exists) : team_.template copy<1>(to, from + k, exists);
  }
  team_.commit();
}

// 2 or 4 neighbours, aligned to their size.
template <int R, int Q, int kWarps, typename T, typename Team>
template <int kCount, typename From, typename To>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::move(const From* from, To* to) {
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
template <int R, int Q, int kWarps, typename T, typename Team>
template <bool kNormed, typename Down>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::halve(T* stage, int points, Down down) const {
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

// use(stage, k0) for all coordinates in turn, about a point of x: what is expanded there is as large as the distances.
// Copies of the next stage are under way meanwhile. `first` is where the two are. Ends with sync().
template <int R, int Q, int kWarps, typename T, typename Team>
template <bool kNormed, typename Down, typename Use>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::stream(int first, int points, Down down, Use use) {
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
template <int R, int Q, int kWarps, typename T, typename Team>
template <int kSet>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::measure_by_products() {
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
    if (p_.cost == Cost::euclidean && squared < kNear * norms) squared = squared_distance(i, j);
    if (squared < 0) squared = 0;  // NaN stays
    at(At::kCost)[e] = p_.excluded(first_ + i, j) ? kInfinity<T> : finish_cost(squared, p_.cost);
  }
  team_.sync();
}

}  // namespace fewstep::resident
