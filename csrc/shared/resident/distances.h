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
      const bool all = p_.precision == halves::kThree;
      if (team_.warps() % kWide == 0)
        return all ? measure_by_products<kWide, true>() : measure_by_products<kWide, false>();
      return all ? measure_by_products<1, true>() : measure_by_products<1, false>();
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

// |x_i - y_j|^2 by differences for the column j = first + lane of the lanes that ask, one after the other by the whole
// warp; all its lanes call.
template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD T Solver<R, Q, kWarps, T, Team>::near_distance(int i, int first, bool asked) const {
  const int lane = team_.lane();
  const T* const x = row(i);
  T own = 0;
  while (team_.lane_any(asked)) {
    const int chosen = kLanes - team_.lane_max(asked ? kLanes - lane : 0);
    const T* const y = p_.y.point(first + chosen, p_.d);
    T squared = 0;
    FEWSTEP_ROLLED
    for (int k = lane; k < p_.d; k += kLanes) squared += (x[k] - y[k]) * (x[k] - y[k]);
    squared = team_.lane_sum(squared);
    if (lane != chosen) continue;
    own = squared;
    asked = false;
  }
  return own;
}

template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD bool Solver<R, Q, kWarps, T, Team>::aligned() const {
  uintptr_t bits = reinterpret_cast<uintptr_t>(p_.x);
  FEWSTEP_UNROLL
  for (int part = 0; part < kParts; ++part) bits |= reinterpret_cast<uintptr_t>(p_.y.data[part]);
  return p_.d % 4 == 0 && bits % 16 == 0;
}

// Leaves for fetch() where points begin: the columns up to a whole tile (the last one again and again), this block's
// rows where they are wanted, and the origin. In the place of potentials, which are of no use meanwhile.
template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::find(int points) const {
  static_assert(At::kF % 2 == 0 && At::kV - At::kF >= 2 * (At::kColumns + At::kRows + 1));
  FEWSTEP_ROLLED
  for (int point = team_.rank(); point <= points; point += team_.size()) {
    const T* const from = point < tiled()  ? p_.y.point(least(point, p_.m - 1), p_.d)
                          : point < points ? row(point - tiled())
                                           : p_.x + static_cast<int64_t>(p_.origin) * p_.d;
    move<2>(&from, at(At::kF) + 2 * point);
  }
}

// Begins to copy kDepth coordinates from k0 of these points into a stage [points + 1, kMmaStride]; zeros where there
// are none. A thread has four coordinates of some points, or one where not `wide`.
template <int R, int Q, int kWarps, typename T, typename Team>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::fetch(T* stage, int points, int k0, bool wide) const {
  const auto copy = [&](auto count) {
    constexpr int kThreads = kDepth / count.value;          // for each point
    const auto rank = static_cast<unsigned>(team_.rank());  // divided without a thought to signs
    const int point = static_cast<int>(rank / kThreads), own = static_cast<int>(rank % kThreads) * count.value;
    const bool inside = k0 + own < p_.d;
    const int64_t bytes = inside ? static_cast<int64_t>(sizeof(T)) * (k0 + own) : 0;
    T* to = stage + point * kMmaStride + own;
    const T* const end = at(At::kF) + 2 * (points + 1);
    const int step = static_cast<int>(static_cast<unsigned>(team_.size()) / kThreads);
    FEWSTEP_ROLLED
    for (const T* place = at(At::kF) + 2 * point; place < end; place += 2 * step) {
      const char* from;
      move<2>(place, &from);
      team_.template copy<count.value>(to, reinterpret_cast<const T*>(from + bytes), inside);
      to += step * kMmaStride;
    }
  };
  wide ? copy(std::integral_constant<int, 4>{}) : copy(std::integral_constant<int, 1>{});
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
// has whole points; down(point, its place, squared norm) is the power of 2 to multiply one by. With kNormed the last is
// known; a point is read once where there are registers for it.
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
    T norm = 0;
    FEWSTEP_UNROLL
    for (int k = 0; kNormed && k < kDepth; k += kHeld) {
      take(k);
      FEWSTEP_UNROLL
      for (const T coordinate : v) norm += coordinate * coordinate;
    }
    const T by = down(point, own, norm);
    FEWSTEP_UNROLL
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
  const bool wide = aligned();
  const int other = 2 * first + (points + 1) * kMmaStride;
  int now = first;
  find(points);
  team_.sync();
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
template <int kSet, bool kAll>
FEWSTEP_HD void Solver<R, Q, kWarps, T, Team>::measure_by_products() {
  static_assert(R == 8 && kLanes == 32 && At::kPartial % 4 == 0);
  constexpr T kNear = T(1) / 64;
  constexpr int kUp = kDepth;  // where a point keeps what takes it back to its size
  constexpr int kEach = (kTiles + kSet - 1) / kSet;
  const int points = tiled() + rows_;
  T* const norm_y = at(At::kLse);
  T* const norm_x = at(At::kShift);
  T* const up_x = at(At::kA);  // for points of x, whose neighbours are wanted
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
  for (int e = team_.rank(); e < tiled(); e += team_.size()) norm_y[e] = 0;
  FEWSTEP_ROLLED
  for (int e = team_.rank(); e < At::kRows; e += team_.size()) norm_x[e] = up_x[e] = 0;
  const auto down = [&](int e, T* own, T norm) {
    const halves::Power power = halves::Power::of_square(norm);
    if (e < tiled()) {
      own[kUp] = power.up;
      norm_y[e] += norm;
    } else {
      up_x[e - tiled()] = power.up;
      norm_x[e - tiled()] += norm;
    }
    return power.down;
  };
  // Where a lane finds its share of a stage: once for all stages where there are registers for it.
  struct Places {
    int tile, left, up, pair, right[kSet];
  };
  const auto find_places = [&] {
    const int lane = team_.lane(), warp = team_.warp(), first_row = warp / kSet * kSet * R, tile = warp % kSet;
    Places at;
    at.tile = tile;
    at.left = team_.opaque((tile * 16 + lane % 16) * kMmaStride + lane / 16 * 8);
    at.up = team_.opaque((tile * 16 + lane / 4) * kMmaStride + kUp);
    at.pair = team_.opaque(first_row + 2 * (lane % 4));
    FEWSTEP_UNROLL
    for (int w = 0; w < kSet; ++w) {
      const int i = tiled() + least(first_row + w * R + lane % 8, rows_ - 1);
      at.right[w] = team_.opaque(i * kMmaStride + lane / 8 * 4);
    }
    return at;
  };
  const Places known = find_places();
  stream<true>(At::kPartial, points, down, [&](const T* stage, int) {
    if (rows_ == 0) return;
    const Places places = kSet > 1 ? known : find_places();
    const auto place = team_.place(stage + places.left);
    const T* const up_y = stage + places.up;
    halves::Factor<2> right[kSet];
    T up[kSet][2];
    FEWSTEP_UNROLL
    for (int w = 0; w < kSet; ++w) {
      uint32_t both[4];
      team_.template load<false>(both, team_.place(stage + places.right[w]), 0);
      right[w] = {{both[0], both[2]}, {both[1], both[3]}};
      alignas(8) T pair[2];
      move<2>(up_x + places.pair + w * R, pair);
      up[w][0] = pair[0];
      up[w][1] = pair[1];
    }
    FEWSTEP_UNROLL
    for (int s = 0; s < kEach; ++s) {
      if ((s * kSet + places.tile) * 16 >= p_.m) break;
      const int offset = s * kSet * 16 * kMmaStride;
      halves::Factor<4> left;
      team_.template load<false>(left.high, place, offset);
      if constexpr (kAll) team_.template load<false>(left.low, place, offset + 4);
      const T back[2] = {up_y[offset], up_y[offset + 8 * kMmaStride]};
      FEWSTEP_UNROLL
      for (int w = 0; w < kSet; ++w) {
        T sum[4] = {};
        halves::multiply<kAll>(team_, sum, sum, left, right[w]);
        FEWSTEP_UNROLL
        for (int e = 0; e < 4; ++e) product[s][w][e] += sum[e] * up[w][e % 2] * back[e / 2];
      }
    }
  });
  const int lane = team_.lane(), warp = team_.warp();
  const int i = warp / kSet * kSet * R + 2 * (lane % 4), j = warp % kSet * 16 + lane / 4;
  T* const cost = at(At::kCost) + (i * p_.m + j);
  FEWSTEP_UNROLL
  for (int w = 0; w < kSet; ++w) {
    FEWSTEP_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (i + w * R + e % 2 >= rows_) continue;
      T* const to = cost + (w * R + e % 2) * p_.m;
      FEWSTEP_UNROLL
      for (int s = 0; s < kEach; ++s) {
        const int offset = s * kSet * 16 + e / 2 * 8;
        if (j + offset < p_.m) to[offset] = product[s][w][e];
      }
    }
  }
  FEWSTEP_ROLLED
  for (int column = team_.rank(); column < tiled(); column += team_.size()) {
    at(At::kScale)[column] = halves::Power::of_square(norm_y[column]).down;
  }
  team_.sync();
  FEWSTEP_ROLLED
  for (int to_row = warp; to_row < rows_; to_row += team_.warps()) {
    const T norm = norm_x[to_row];
    T* const costs = at(At::kCost) + to_row * p_.m;
    FEWSTEP_ROLLED
    for (int first_column = 0; first_column < p_.m; first_column += kLanes) {
      const int column = first_column + lane;
      const bool inside = column < p_.m;
      const T norms = inside ? norm + norm_y[column] : T(0);
      T squared = inside ? norms - 2 * costs[column] : T(0);
      const bool excluded = p_.excluded(first_ + to_row, column);
      if (p_.cost == Cost::euclidean) {
        const bool near = inside && !excluded && squared < kNear * norms;
        const T exact = near_distance(to_row, first_column, near);
        if (near) squared = exact;
      }
      if (squared < 0) squared = 0;  // NaN stays
      if (inside) costs[column] = excluded ? kInfinity<T> : finish_cost(squared, p_.cost);
    }
  }
  team_.sync();
}

}  // namespace fewstep::resident
