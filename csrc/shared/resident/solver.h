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

#include <cmath>
#include <cstdint>

#include "../sinkhorn_block.h"
#include "layout.h"
#include "problem.h"

namespace fewstep::resident {

template <typename T>
struct Share;
template <typename T>
struct Velocities;

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

  // Distances into shared memory; c is scratch. Begins and ends with sync(). In distances.h.
  FEWSTEP_HD void measure(T (&c)[R][Q]);

  // All iterations at `eps`, and at the temperatures before it. `start` is where annealing begins, at most eps for
  // none. The state stays for write() and weigh().
  FEWSTEP_HD void solve(T (&k)[R][Q], const Schedule<T>& s, const Marginals<T>& w, T eps, T start) {
    s_ = s;
    plain_ = s.plain();
    averaged_ = s.simultaneous;
    relax_ = w.f0 == nullptr ? T(1) : s.relax;  // an iteration without a potential before it is taken in full
    iterations_ = 0;
    temperatures_ = {start};
    temperature_ = temperatures_.next(s_, eps);
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
        if (light_ > 0) see_light_rows();
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
      measured = temperatures_.final;
      if (closing) continue;
      ++iterations_;
      relax_ = s.relax;
      if (temperatures_.final) continue;
      const T next = temperatures_.next(s_, eps);
      if (next == temperature_) continue;
      change_temperature(next, absorb);
      absorb = true;
    }
  }

  // f, g, value and the rest of a problem that has been solved. Ends with sync_all().
  FEWSTEP_HD void write(T eps, const block::Solution<T>& out) {
    const T mass = plain_ ? b_total_ : total(1);  // then columns are exact
    Value<T> dual{k_};
    FEWSTEP_ROLLED
    for (int i = team_.rank(); i < rows_; i += team_.size()) {
      const T a = at(At::kA)[i], f = dual.add(a != 0 ? potential(i) : soft_of_row(i), a, s_.rho_x);
      out.f[first_ + i] = f;
      if (s_.single) out.g[first_ + i] = f;
    }
    if (s_.single) dual.sum *= 2;
    team_.sync();  // v changes now
    if (!s_.single) soft_of_massless_columns();
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m && !s_.single; j += team_.size()) {
      if (team_.block() != 0) continue;
      const T b = at(At::kB)[j];
      const T g = b > 0 ? at(At::kH)[j] + log2(at(At::kV)[j]) - log2(b) : -damping_y_ * at(At::kLse)[j];
      out.g[j] = dual.add(g, b, s_.rho_y);
    }
    parity_ = 1 - parity_;
    hand_over(0, dual.sum);
    hand_over(1, dual.beyond);
    team_.sync_all();
    T value = total(0);
    if (total(1) > 0) residual_ = kInfinity<T>;
    if (value != kInfinity<T>) value -= eps * (mass - a_total_ * b_total_);
    if (team_.block() == 0 && team_.rank() == 0) write_numbers(out, value, residual_, iterations_, s_.converged_at);
    team_.sync_all();
  }

  // This thread's share of sum_ij w_j C_ij of what was measured, pairs that are left out counting as 0; null: all
  // weights are 1.
  FEWSTEP_HD double weighted_costs(const T* weights) const {
    const int warp = team_.warp(), warps = team_.warps();
    double sum = 0;
    FEWSTEP_ROLLED
    for (int j = team_.lane(); j < p_.m; j += kLanes) {
      double column = 0;
      FEWSTEP_ROLLED
      for (int i = warp; i < rows_; i += warps) {
        if (!p_.excluded(first_ + i, j)) column += double(at(At::kCost)[i * p_.m + j]);
      }
      sum += weights == nullptr ? column : double(weights[j]) * column;
    }
    return sum;
  }

  // The weights of a plan's share of a drift, from the K of a solve of one rank, into matrix t, and three sums over the
  // rows, of |sum_j p_ij - 1|, of the entropy (in nats) and of the largest entry of the normalised plan, into `sums`.
  // In barycentres.h.
  FEWSTEP_HD void weigh(T (&k)[R][Q], const Share<T>& io, int t, T (&sums)[kMetrics]);

  // out = the points of the columns, weighted, for the first `count` matrices of weights; this thread's shares of the
  // squares of what is in `out` then. Begins and ends with sync(). In barycentres.h.
  template <int kStacked>
  FEWSTEP_HD void combine(const Velocities<T>& out, int count, T (&squares)[kStacked]);

 private:
  FEWSTEP_HD T* at(int offset) const { return memory_ + offset; }
  FEWSTEP_HD const T* row(int i) const { return p_.x + static_cast<int64_t>(first_ + i) * p_.d; }

  FEWSTEP_HD void set_temperature() {
    k_ = block::inverse_temperature(temperature_);
    damping_x_ = damping(s_.rho_x, temperature_);
    damping_y_ = damping(s_.rho_y, temperature_);
    target_x_ = std::isinf(s_.rho_x) ? T(0) : temperature_ / s_.rho_x;
    target_y_ = std::isinf(s_.rho_y) ? T(0) : temperature_ / s_.rho_y;
  }

  // Potentials to start from. Begins with sync_all(): a problem before this one may still be read.
  FEWSTEP_HD void begin(const Marginals<T>& w) {
    team_.sync_all();
    parity_ = f_ = u_ = 0;
    bool massless = false;
    T part = 0, heaviest = 0, lightest = 0;
    FEWSTEP_ROLLED
    for (int i = team_.rank(); i < rows_; i += team_.size()) {
      const T a = w.a == nullptr ? T(1) / T(rows_) : w.a[first_ + i];
      at(At::kA)[i] = a;
      at(At::kF + f_)[i] = w.f0 == nullptr ? T(0) : w.f0[first_ + i] * k_;
      part += a;
      heaviest = largest(a, heaviest);
      if (a > 0) lightest = largest(1 / a, lightest);
    }
    hand_over(1, part);
    hand_over_largest(2, heaviest);
    hand_over_largest(4, lightest);
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
    FEWSTEP_ROLLED
    for (int j = p_.m + team_.rank(); j < At::kColumns; j += team_.size()) at(At::kV)[j] = 0;
    hand_over(0, part);
    massless_ = team_.any(massless);
    team_.sync_all();
    a_total_ = total(1);
    b_total_ = total_of_columns(0);
    light_ = 0;
    if (w.a == nullptr) return;  // all rows weigh the same
    const T light = T(block::kLight) * largest_of(2);
    if (light * largest_of(4) > 1) light_ = light;
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

  FEWSTEP_HD void hand_over_largest(int which, T part) {
    part = team_.lane_max(part);
    if (team_.lane() == 0) scalars(parity_, which)[team_.warp()] = part;
  }

  FEWSTEP_HD T largest_of(int which) const {
    T top = 0;
    FEWSTEP_ROLLED
    for (int e = team_.lane(); e < team_.ranks() * team_.warps(); e += kLanes) {
      top = largest(team_.peer(scalars(parity_, which), e / team_.warps())[e % team_.warps()], top);
    }
    return team_.lane_max(top);
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

  // In distances.h:
  FEWSTEP_HD void measure_by_differences(T (&c)[R][Q]);
  FEWSTEP_HD T near_distance(int i, int first, bool asked) const;
  FEWSTEP_HD bool aligned() const;
  FEWSTEP_HD void find(int points) const;
  FEWSTEP_HD void fetch(T* stage, int points, int k0, bool wide) const;
  template <int kCount, typename From, typename To>
  static FEWSTEP_HD void move(const From* from, To* to);
  template <bool kNormed, typename Down>
  FEWSTEP_HD void halve(T* stage, int points, Down down) const;
  template <bool kNormed, typename Down, typename Use>
  FEWSTEP_HD void stream(int first, int points, Down down, Use use);
  template <int kSet, bool kAll>
  FEWSTEP_HD void measure_by_products();

  // In barycentres.h:
  template <int kCount, bool kAll>
  FEWSTEP_HD void combine_by_products(const Velocities<T>& out, T* squares);
  FEWSTEP_HD T combine_by_differences(const Velocities<T>& out, int t);

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
    for (int i = team_.rank(); i < rows_; i += team_.size()) {
      at(At::kF + f_)[i] = at_most_nowhere(at(At::kF + f_)[i] * ratio);
    }
    FEWSTEP_ROLLED
    for (int j = team_.rank(); j < p_.m; j += team_.size()) {
      const T b = at(At::kB)[j];
      if (b > 0) at(At::kH)[j] = at_most_nowhere((at(At::kH)[j] - log2(b)) * ratio) + log2(b);
    }
    team_.sync();
  }

  // Row update and column sums, from K or, with kAbsorb, from the potentials f and h, which are then in K; where it is
  // asked for, the error of the rows and their mass, of the potentials before. Ends with sync_all(). Returns whether
  // all scalings are in their range: if not, a pass from K is void, and after one that absorbs the next is to absorb
  // too.
  template <bool kAbsorb>
  FEWSTEP_HD bool pass(T (&k)[R][Q], bool asked) {
    // Once for the whole pass: the compiler does not keep what is opaque by itself.
    const int lane = team_.lane(), warp = team_.warp(), first_own = warp * R + lane / kSharers * kOwn;
    const bool first_sharer = lane % kSharers == 0;
    T s[R], own[kOwn];
    if constexpr (kAbsorb) {
      absorb(k);
      FEWSTEP_UNROLL
      for (int e = 0; e < kOwn; ++e) own[e] = 1;
    } else {
      FEWSTEP_UNROLL
      for (int r = 0; r < R; ++r) s[r] = 0;
      const T* const v = at(At::kV) + lane;  // 0 behind the last column
      FEWSTEP_UNROLL
      for (int q = 0; q < Q; ++q) {
        const T own_v = v[q * kLanes];
        FEWSTEP_UNROLL
        for (int r = 0; r < R; ++r) s[r] += k[r][q] * own_v;
      }
      team_.combine_rows(s, own, Sum());
    }
    parity_ = 1 - parity_;
    T error = 0, mass = 0;
    bool safe = true;
    FEWSTEP_UNROLL
    for (int e = 0; e < kOwn; ++e) {
      const int i = first_own + e;
      if (i >= rows_) {
        own[e] = 0;
        continue;
      }
      const T a = at(At::kA)[i], before = at(At::kU + u_)[i], shift = kAbsorb || !plain_ ? at(At::kShift)[i] : T(0);
      if (kAbsorb && shift == kNowhere<T>) own[e] = 0;
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
      if (own[e] == 0) {  // a row without a partner
        next = 1;
        full = shift;
      }
      safe = safe && within(next, 1 / Range<T>::kSafe, Range<T>::kSafe);
      // A row without mass may have any sum, also one that overflows.
      if (asked && a != 0 && first_sharer) {
        error += a * std::abs(before * own[e] - wanted);
        mass += a * before * own[e];
      }
      T scaling = averaged_ ? before : next;
      // More than that in an entry of K that is 0 would be felt: all columns are to see it.
      if (kAbsorb && scaling > Range<T>::kTop) scaling = kInfinity<T>;
      own[e] = a == 0 ? T(0) : a * scaling;
      if (!first_sharer) continue;
      at(At::kU + At::kRows - u_)[i] = next;
      if constexpr (kAbsorb) at(At::kF + At::kRows - f_)[i] = full;
      if (s_.single) partial(parity_, 0)[i] = full;
    }
    if (!s_.single) {
      team_.spread(own, s);
      T* const sums = partial(parity_, warp) + lane;
      FEWSTEP_UNROLL
      for (int q = 0; q < Q; ++q) {
        T sum = 0;
        FEWSTEP_UNROLL
        for (int r = 0; r < R; ++r) sum += s[r] * k[r][q];
        sums[q * kLanes] = sum;
      }
    }
    if (asked) {
      hand_over(0, error);
      hand_over(1, mass);
    }
    safe = !share(!safe);
    if (kAbsorb || safe) {
      absorbed_ = kAbsorb;
    } else {
      fold();
    }
    return safe;
  }

  // sync_all(), and whether a flag is set in any thread of all ranks. Several ranks share the column sums of their
  // blocks, which take the place of those of warp 0.
  FEWSTEP_HD bool share(bool flag) const {
    flag = team_.any(flag);
    const int ranks = team_.ranks();
    if (ranks == 1) return flag;
    const int rank = team_.rank(), lane = team_.lane();
    if (!s_.single) {
      T* const sums = partial(parity_, 0);
      FEWSTEP_ROLLED
      for (int j = rank; j < p_.m; j += team_.size()) sums[j] = sum_of_warps(j);
    }
    if (rank == 0) *scalars(parity_, 2) = flag ? T(1) : T(0);
    team_.sync_all();
    return team_.lane_any(lane < ranks && *team_.peer(scalars(parity_, 2), lane) != 0);
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
    const int lane = team_.lane(), warp = team_.warp(), first_own = warp * R + lane / kSharers * kOwn;
    T row[R], top[kOwn], own[kOwn];
    const T* costs[R];
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) {
      row[r] = kLowest<T>;
      costs[r] = at(At::kCost) + (least(warp * R + r, rows_ - 1) * p_.m + lane);
    }
    const T* const hs = at(At::kH) + lane;
    FEWSTEP_UNROLL
    for (int q = 0; q < Q; ++q) {
      if (lane + q * kLanes >= p_.m) {
        FEWSTEP_UNROLL
        for (int r = 0; r < R; ++r) k[r][q] = -kInfinity<T>;
        continue;
      }
      const T h = hs[q * kLanes];
      FEWSTEP_UNROLL
      for (int r = 0; r < R; ++r) {
        k[r][q] = h - k_ * costs[r][q * kLanes];
        row[r] = raised(k[r][q], row[r]);
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
      const int i = first_own + e;
      const T sum = own[e], shift = at_most_nowhere(-(top[e] + log2(sum)));
      const bool nowhere = shift == kNowhere<T>;
      own[e] = nowhere ? T(0) : reciprocal(sum);
      if (i >= rows_ || lane % kSharers != 0) continue;
      at(At::kShift)[i] = shift;
      at(At::kU + u_)[i] = nowhere ? T(1) : exp2(at(At::kF + f_)[i] - shift);
    }
    team_.spread(own, row);
    FEWSTEP_UNROLL
    for (int r = 0; r < R; ++r) {
      FEWSTEP_UNROLL
      for (int q = 0; q < Q; ++q) k[r][q] = warp * R + r < rows_ ? k[r][q] * row[r] : T(0);
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
        const T lse = at(At::kLse)[j], mass = -lse > kFar<T> ? T(0) : exp2(at(At::kH)[j] + log2(v) + lse);
        part += std::abs(mass - at(At::kB)[j] * wanted(j, v));
        at(At::kV)[j] = v;
      }
    }
    hand_over(3, part);
    team_.sync();
    return largest(total_of_columns(3), rows);
  }

  // What the error hardly sees: the square of the largest step left to a light row. Contains sync_all().
  FEWSTEP_HD void see_light_rows() {
    T worst = 0;
    FEWSTEP_ROLLED
    for (int i = team_.rank(); i < rows_; i += team_.size()) {
      const T a = at(At::kA)[i];
      if (!(a > 0 && a < light_)) continue;
      const T *const f = at(At::kF), *const u = at(At::kU);
      const T now = absorbed_ ? f[f_ + i] : at(At::kShift)[i] + log2(u[u_ + i]);
      const T next = absorbed_ ? f[At::kRows - f_ + i] : at(At::kShift)[i] + log2(u[At::kRows - u_ + i]);
      worst = largest(block::step_of(now, next, relax_), worst);
    }
    hand_over_largest(4, worst);
    team_.sync_all();
    worst = largest_of(4);
    if (worst * worst > residual_) residual_ = worst * worst;  // NaN stays
  }

  // What the marginal of column j is to be, over b_j, where v_j is `v`.
  FEWSTEP_HD T wanted(int j, T v) const {
    return target_y_ == 0 ? T(1) : exp2(-target_y_ * (at(At::kH)[j] + log2(v) - log2(at(At::kB)[j])));
  }

  FEWSTEP_HD T sum_of_warps(int j) const {
    const T* const sums = partial(parity_, 0) + j;
    const int warps = team_.warps();
    T sum = sums[0];
    FEWSTEP_UNROLL
    for (int w = 1; w < kWarps; ++w) {
      if (w >= warps) break;
      sum += sums[w * At::kColumns];
    }
    return sum;
  }

  // In the same order everywhere.
  FEWSTEP_HD T column_sum(int j) const {
    const int ranks = team_.ranks();
    if (ranks == 1) return sum_of_warps(j);
    T sum = 0;
    FEWSTEP_ROLLED
    for (int rank = 0; rank < ranks; ++rank) sum += team_.peer(partial(parity_, 0), rank)[j];
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
      at(At::kLse)[j] = -at_most_nowhere(-(top + log2(sum)));
    }
    team_.sync_all();
  }

  // F of a row without mass, which has a meaning too, from the H that came out.
  FEWSTEP_HD T soft_of_row(int i) const {
    const T* const costs = at(At::kCost) + i * p_.m;
    T top = kLowest<T>, sum = 0;
    FEWSTEP_ROLLED
    for (int j = 0; j < p_.m; ++j) top = largest(at(At::kH)[j] + log2(at(At::kV)[j]) - k_ * costs[j], top);
    FEWSTEP_ROLLED
    for (int j = 0; j < p_.m; ++j) sum += exp2(at(At::kH)[j] + log2(at(At::kV)[j]) - k_ * costs[j] - top);
    return damping_x_ * at_most_nowhere(-(top + log2(sum)));
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
  int parity_ = 0, iterations_ = 0;
  Temperatures<T> temperatures_{T(0)};
  bool plain_ = true, averaged_ = false;  // column sums are those with the u before
  bool absorbed_ = false, massless_ = false;
  T k_ = 0, temperature_ = 0, relax_ = 1;
  T damping_x_ = 1, damping_y_ = 1, target_x_ = 0, target_y_ = 0;
  T a_total_ = 1, b_total_ = 1, residual_ = 0, light_ = 0;
};

}  // namespace fewstep::resident
