// Drivers of a solve: who computes which rows, in what memory. No arithmetic on pairs happens here.
#include "cpu/sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/driver.h"
#include "cpu/parallel.h"
#include "cpu/sinkhorn_problem.h"

namespace fewstep::cpu {
namespace {

// What of a problem is kept between passes.
//
// A pass that recomputes takes d multiply-adds and an exponential (some 12 instructions) a pair; one that reads
// distances takes a load of 4 or 8 bytes and the exponential; one that reads K takes two multiply-adds and a load. In
// bytes: from the second-level cache a load is free beside either, from the third about 4 multiply-adds, from memory
// about 16. So K pays wherever it fits the limit and there are passes to use it in; distances, which are read where a K
// is made, pay where they are dearer than a load from where they would lie.
struct Keep {
  bool distances, kernel;
};

Keep choose(int64_t n_padded, int64_t m_padded, int64_t d, int64_t size, int64_t passes, int64_t passes_at_eps,
            int64_t limit) {
  constexpr int64_t kMiB = 1 << 20;
  const int64_t bytes = n_padded * m_padded * size;
  const bool kernel = bytes <= limit && passes_at_eps > 2;
  const int64_t both = kernel ? 2 * bytes : bytes;
  const int64_t dear = both <= kMiB ? 2 : both <= 16 * kMiB ? 4 : 16;
  return {both <= limit && d > dear && passes > 1, kernel};
}

// eps / rho up to which a K is kept: log2 u is rounded to the precision of T, and marginals feel it that many times
// over.
constexpr double kLargestTarget = 4;

// Alternating iterations at most after symmetric ones; in Python LAST_STEPS.
constexpr int64_t kLastSteps = 10;

// Potentials below it, over eps ln 2: roundings of 1, in sums of exponentials, are most of their error.
constexpr double kFlat = 0x1p-6;

// Points of less than this share of the largest weight are light; in Python LIGHT.
constexpr double kLight = 1e-3;

template <class T>
class Solver {
 public:
  Solver(const Batch<T>& in, const Solve<T>& s, int64_t q, Workspace<T>& w, int64_t threads, int64_t limit)
      : in_(in), s_(s), q_(q), at_(in, q), w_(w), threads_(threads), chunks_(chunks_of(kernel_, at_.n)) {
    const bool fresh = w.cloud != at_.cloud;
    p_ = geometry(in, at_, w);
    n_padded_ = round_up(at_.n, kernel_.lanes);
    const int64_t mp = p_.m_padded, longest = std::max(n_padded_, mp);
    const int64_t passes = in.temperatures * (s.max_iter + s.scheduled + (s.start == nullptr ? 0 : 8) + 1);
    const Keep keep = choose(n_padded_, mp, p_.d, sizeof(T), passes, s.max_iter, limit);
    triangle_ = s.self && !keep.kernel;
    block_ = rows_at_once(p_.stride, kernel_.rows, sizeof(T));
    scratch_ = w.scratch.get(chunks_.count * block_ * p_.stride);
    if (keep.kernel) {
      matrix_ = w.kernel.get(n_padded_ * mp);
      std::fill(matrix_ + at_.n / kernel_.lanes * kernel_.lanes * mp, matrix_ + n_padded_ * mp, T(0));
    }
    if (keep.distances && in.cost != Cost::matrix) {
      T* cost = w.cost.get(at_.n * p_.stride);
      if (fresh) measure(cost);
      p_.cached = cost;
    }
    h_ = w.h.get(mp);
    log2_b_ = w.log2_b.get(longest);
    b_ = w.b.get(mp);
    v_ = w.v.get(mp);
    v_next_ = w.v_next.get(mp);
    parts_ = w.parts.get(chunks_.count * mp);
    bad_ = w.bad.get(mp / kernel_.panel);
    auto zeros = [&](Buffer<T>& buffer) {
      T* array = buffer.get(longest);
      std::fill_n(array, longest, T(0));
      return array;
    };
    a_ = zeros(w.a);
    f_ = zeros(w.f);
    f_next_ = zeros(w.f_next);
    shift_ = zeros(w.shift);
    u_ = zeros(w.u);
    u_next_ = zeros(w.u_next);
    zero_ = zeros(w.zero);
    std::copy_n(at_.a, at_.n, a_);
    for (int64_t i = 0; i < at_.n; ++i) mass_a_ += a_[i];
    light_a_ = light(a_, at_.n);
    if (s.relax != 1 && !s.closing && !s.self) light_b_ = light(at_.b, at_.m);
    std::fill_n(log2_b_, longest, -kInfinity<T>);
    std::fill_n(b_, mp, T(0));
    std::copy_n(at_.b, at_.m, b_);
    for (int64_t j = 0; j < at_.m; ++j) log2_b_[j] = std::log2(b_[j]);
  }

  void solve() {
    const double eps = in_.eps[q_];
    int64_t iterations = 0;
    initialise(first_temperature(eps));
    auto step = [&](double temperature) {
      set_temperature(temperature);
      pass(true);
      commit();
      ++iterations;
    };
    for (int64_t t = 0; t < s_.scheduled; ++t) step(s_.schedule[t]);
    if (s_.start != nullptr) {
      for (double e = s_.start[q_]; e > eps; e *= s_.factor) step(e);
    }
    set_temperature(eps);
    PassResult last;
    bool stopped = false;
    for (int64_t i = 0; i < s_.max_iter && !stopped; ++i) {
      last = pass(true);
      if (i > 0 && s_.tol >= 0 && reached(last)) {
        stopped = true;
      } else {
        commit();
        ++iterations;
      }
    }
    if (s_.closing) {
      averaged_ = false;
      // The error of the rows may be up to twice what that of the average was.
      const int64_t most = s_.tol < 0 || s_.self ? 1 : kLastSteps;
      for (int64_t i = 0; i < most && (i == 0 || !reached(last)); ++i) {
        relax_ = 1;
        set_temperature(eps);
        pass(true);
        commit();
        last = pass(false);
      }
    } else if (!stopped) {
      last = pass(averaged_);
    }
    const bool known = stopped && !s_.closing;
    const T residual = static_cast<T>(std::max(error(last), known ? unsettled_ : unsettled(kInfinity<double>)));
    leave();
    rows_without_weight();
    finish(last.mass);
    if (s_.grad_x != nullptr || s_.grad_y != nullptr) {
      gradients(in_, p_, at_, h_, f_, s_.self, at(s_.grad_x, at_.first_f), at(s_.grad_y, at_.first_g), w_, threads_);
    }
    s_.residual[q_] = beyond_ ? kInfinity<T> : residual;
    s_.iterations[q_] = iterations;
  }

  bool flat() const { return flat_; }

 private:
  int64_t begin(int64_t c) const { return c * chunks_.rows; }
  int64_t end(int64_t c) const { return std::min(begin(c) + chunks_.rows, at_.n); }

  T* at(T* gradient, int64_t point) const { return gradient == nullptr ? nullptr : gradient + point * p_.d; }

  void measure(T* cost) {
    parallel_for(chunks_.count, threads_, [&](int64_t c) {
      kernel_.distances(p_, triangle_ ? begin(c) / kernel_.panel : 0, begin(c), end(c), cost);
    });
  }

  double first_temperature(double eps) const {
    if (s_.scheduled > 0) return s_.schedule[0];
    return s_.start != nullptr ? std::max<double>(eps, s_.start[q_]) : eps;
  }

  void initialise(double eps) {
    eps_ = eps;
    scale_ = kLog2E / eps;
    relax_ = s_.f0 == nullptr ? 1 : s_.relax;  // no F to average with yet
    update_temperature();
    for (int64_t i = 0; i < at_.n && s_.f0 != nullptr; ++i) f_[i] = static_cast<T>(s_.f0[at_.first_f + i] * scale_);
    has_f_ = s_.f0 != nullptr;
    for (int64_t j = 0; j < p_.m_padded; ++j) {
      const double g = s_.g0 == nullptr || j >= at_.m ? 0.0 : s_.g0[at_.first_g + j] * scale_;
      h_[j] = log2_b_[j] == -kInfinity<T> ? log2_b_[j] : static_cast<T>(g + log2_b_[j]);
    }
  }

  void set_temperature(double eps) {
    if (eps != eps_) {
      leave();
      const double ratio = eps_ / eps;
      auto scaled = [&](double potential) { return std::min(potential * ratio, kernel_.nowhere); };
      for (int64_t i = 0; i < at_.n; ++i) f_[i] = static_cast<T>(scaled(f_[i]));
      for (int64_t j = 0; j < at_.m; ++j) {
        if (b_[j] != 0) h_[j] = static_cast<T>(scaled(double(h_[j]) - log2_b_[j]) + log2_b_[j]);
      }
      eps_ = eps;
    }
    update_temperature();
  }

  void update_temperature() {
    scale_ = kLog2E / eps_;
    p_.k = static_cast<T>(unit(in_.cost) * scale_);
    auto update = [&](double rho) {
      if (rho == kInfinity<double>) return Update{1, relax_, 0};
      return Update{rho / (rho + eps_), relax_, eps_ / rho};
    };
    rows_ = update(s_.rho_x);
    columns_ = update(s_.rho_y);
    keep_ = matrix_ != nullptr && std::max(rows_.target, columns_.target) <= kLargestTarget;
  }

  // New potentials in f_next or u_next, and the sums for the columns, from the current ones.
  PassResult pass(bool with_columns) {
    if (triangle_) return self_pass();
    with_columns = with_columns && !s_.self;
    if (scaled_) {
      const PassResult result = scaled_pass(with_columns);
      if (!(result.extreme > kernel_.safe)) return result;
      leave();
    }
    return log_pass(with_columns);
  }

  template <class Body>
  PassResult over_chunks(bool with_columns, const Body& body) {
    std::vector<PassResult> results(chunks_.count);
    parallel_for(chunks_.count, threads_, [&](int64_t c) {
      T* columns = with_columns ? parts_ + c * p_.m_padded : nullptr;
      if (with_columns) std::fill_n(columns, p_.m_padded, T(0));
      results[c] = body(c, columns);
    });
    PassResult total;
    for (const PassResult& r : results) {
      total.residual += r.residual;
      total.mass += r.mass;
      total.weight += r.weight;
      total.extreme = std::max(total.extreme, r.extreme);
    }
    if (with_columns) kernel_.add_parts(p_.m_padded, chunks_.count, parts_);
    return total;
  }

  PassResult self_pass() {
    PassResult result = over_chunks(true, [&](int64_t c, T* sums) {
      kernel_.self_pass(p_, SelfPass<T>{f_, b_, sums}, begin(c), end(c));
      return PassResult{};
    });
    if (kernel_.self_update(at_.n, a_, f_, parts_, rows_, f_next_, &result)) return result;
    const T* triangle = std::exchange(p_.cached, nullptr);
    result = log_pass(false);
    p_.cached = triangle;
    return result;
  }

  // K is written while the potentials move little enough to use it.
  PassResult log_pass(bool with_columns) {
    const bool keep = keep_ && extreme_ <= kernel_.safe;
    const PassResult result = over_chunks(with_columns, [&](int64_t c, T* columns) {
      T* scratch = keep ? matrix_ : scratch_ + c * block_ * p_.stride;
      const RowPass<T> io{h_,        has_f_ ? f_ : nullptr,
                          a_,        rows_,
                          averaged_, f_next_,
                          shift_,    columns,
                          scratch,   keep ? Store::tiles : Store::scratch};
      return kernel_.row_pass(p_, io, keep ? std::min(block_, kernel_.lanes) : block_, begin(c), end(c));
    });
    usable_ = keep;
    extreme_ = result.extreme;
    weight_ = result.weight;
    return result;
  }

  PassResult scaled_pass(bool with_columns) {
    return over_chunks(with_columns, [&](int64_t c, T* columns) {
      const ScalePass<T> io{matrix_, shift_, v_, u_, a_, rows_, averaged_, u_next_, columns, empty_rows_};
      const int64_t last = c + 1 == chunks_.count ? n_padded_ : begin(c) + chunks_.rows;
      return kernel_.scale_pass(at_.n, p_.m_padded, io, begin(c), last);
    });
  }

  // L1 error of the marginals of the potentials before the pass, as a fraction of the mass: of rows, or where columns
  // are not exact either, the larger of the two.
  double error(const PassResult& result) const {
    double rows = result.residual, columns = 0;
    if (averaged_ && !s_.self) {
      for (int64_t j = 0; j < at_.m; ++j) {
        if (b_[j] == 0) continue;
        const double h = scaled_ ? h_[j] + std::log2(double(v_[j])) : h_[j];
        const double sum = scaled_ ? double(parts_[j]) * v_[j] : parts_[j];
        columns += std::abs(sum - b_[j] * std::exp2(-columns_.target * (h - log2_b_[j])));
      }
    }
    return std::max(rows, columns) / mass_a_;
  }

  // What weights must be below to be light; 0 where none is.
  static T light(const T* weight, int64_t count) {
    T limit = 0;
    for (int64_t i = 0; i < count; ++i) limit = std::max(limit, weight[i]);
    limit *= static_cast<T>(kLight);
    bool any = false;
    for (int64_t i = 0; i < count; ++i) any |= (weight[i] > 0) & (weight[i] < limit);
    return any ? limit : T(0);
  }

  // The way of a potential to a transform, where it is more than rounding.
  double step(double from, double to) const {
    const double way = std::abs(to - from);
    return way > 8 * std::numeric_limits<T>::epsilon() * std::abs(from) && !(to > far()) ? way : 0;
  }

  double f_now(int64_t i) const { return scaled_ ? shift_[i] + std::log2(double(u_[i])) : f_[i]; }

  double row_steps() const {
    double worst = 0;
    for (int64_t i = 0; i < at_.n && light_a_ > 0; ++i) {
      if (!(a_[i] > 0 && a_[i] < light_a_)) continue;
      const double f = f_now(i), next = scaled_ ? shift_[i] + std::log2(double(u_next_[i])) : f_next_[i];
      worst = std::max(worst, step(f, f + (next - f) / rows_.relax));
    }
    return worst;
  }

  // The largest step of the light columns of a panel; fa = F + log2 a.
  double column_steps(const T* fa, int64_t panel) const {
    const int64_t first = panel * kernel_.panel, last = std::min(first + kernel_.panel, at_.m);
    auto is_light = [&](int64_t j) { return b_[j] > 0 && b_[j] < light_b_; };
    bool any = false;
    for (int64_t j = first; j < last; ++j) any |= is_light(j);
    if (!any) return 0;
    alignas(64) T own[64];
    kernel_.column_lse(p_, fa, panel, own);
    double worst = 0;
    for (int64_t j = first; j < last; ++j) {
      const double h = scaled_ ? h_[j] + std::log2(double(v_[j])) : h_[j];
      if (is_light(j)) worst = std::max(worst, step(h - log2_b_[j], columns_.damping * own[j - first]));
    }
    return worst;
  }

  // What the L1 error hardly sees: the square of the largest step, over eps, that potentials of light points would take
  // to their transforms. Columns count where updates are relaxed; else they are exact. Looks no further once it is
  // above `enough`, and first at the columns that were the last to settle before: a look at all costs as much as an
  // iteration.
  double unsettled(double enough) {
    auto square = [](double steps) { return std::pow(steps / kLog2E, 2); };
    double worst = row_steps();
    auto above = [&] { return static_cast<T>(square(worst)) > enough; };
    if (light_b_ == 0 || above()) return square(worst);
    T* fa = w_.fa.get(at_.n);
    for (int64_t i = 0; i < at_.n; ++i) fa[i] = static_cast<T>(f_now(i)) + std::log2(a_[i]);
    worst = std::max(worst, column_steps(fa, last_to_settle_));
    if (above()) return square(worst);
    std::vector<double> steps(p_.m_padded / kernel_.panel);
    parallel_for(static_cast<int64_t>(steps.size()), threads_, [&](int64_t q) { steps[q] = column_steps(fa, q); });
    const auto largest = std::max_element(steps.begin(), steps.end());
    last_to_settle_ = largest - steps.begin();
    return square(std::max(worst, *largest));
  }

  bool reached(const PassResult& result) {
    if (!(static_cast<T>(error(result)) <= s_.tol)) return false;
    unsettled_ = unsettled(s_.tol);
    return static_cast<T>(unsettled_) <= s_.tol;
  }

  void commit() {
    if (scaled_) return commit_scaled();
    std::swap(f_, f_next_);
    has_f_ = true;
    if (usable_ && extreme_ <= enter() && enter_scaled()) return;
    if (s_.self) {
      for (int64_t j = 0; j < at_.m; ++j) h_[j] = f_[j] + log2_b_[j];
    } else {
      columns_from_sums();
    }
    average_from_now_on();
  }

  // The movement of the last pass says that K will serve for more than one.
  double enter() const { return kernel_.safe / 2; }

  bool enter_scaled() {
    if (!s_.self) {
      for (int64_t j = 0; j < p_.m_padded; ++j) v_[j] = b_[j] > 0 ? T(1) : T(0);
    }
    if (!(next_v() <= enter())) return false;
    kernel_.exp2_sum(n_padded_, f_, zero_, shift_, u_);
    std::swap(v_, v_next_);
    scaled_ = true;
    const T nowhere = static_cast<T>(kernel_.nowhere);
    empty_rows_ = false;
    for (int64_t i = 0; i < at_.n; ++i) empty_rows_ |= f_[i] >= nowhere;
    average_from_now_on();
    return true;
  }

  void commit_scaled() {
    std::swap(u_, u_next_);
    if (s_.self) potentials_from_u();
    if (next_v() <= kernel_.safe) {
      std::swap(v_, v_next_);
      return;
    }
    for (int64_t j = 0; j < p_.m_padded && !s_.self; ++j) parts_[j] *= v_[j];  // relative to the H below
    weight_ = scaled_weight() * std::exp2(kernel_.safe);
    std::copy_n(shift_, n_padded_, f_next_);  // the F before
    kernel_.add_log2(n_padded_, u_next_, f_next_);
    leave();
    if (s_.self) {
      for (int64_t j = 0; j < at_.m; ++j) h_[j] = f_[j] + log2_b_[j];
    } else {
      columns_from_sums();
    }
  }

  // A bound on what the rows of a pass over K weigh together. Plain updates need none: their columns leave the range of
  // the scalings before they feel the floor.
  double scaled_weight() const { return rows_.plain() && columns_.plain() ? 0 : mass_a_ * std::exp2(kernel_.safe); }

  // v_next from the sums of the pass, or from F where there is one potential; the largest |log2 v_next|.
  double next_v() {
    if (!s_.self) {
      const double weight = scaled_ ? scaled_weight() : weight_;
      return kernel_.scale_columns(p_.m_padded, parts_, b_, log2_b_, h_, columns_, weight, v_, v_next_);
    }
    kernel_.exp2_sum(p_.m_padded, f_, log2_b_, h_, v_next_);
    T low = 1, high = 1;
    for (int64_t j = 0; j < at_.m; ++j) {
      if (b_[j] == 0) continue;
      low = std::min(low, v_next_[j]);
      high = std::max(high, v_next_[j]);
    }
    return std::max(std::log2(double(high)), -std::log2(double(low)));
  }

  void potentials_from_u() {
    std::copy_n(shift_, n_padded_, f_);
    kernel_.add_log2(n_padded_, u_, f_);
  }

  // Back to the log domain.
  void leave() {
    if (!scaled_) return;
    scaled_ = false;
    potentials_from_u();
    kernel_.add_log2(p_.m_padded, v_, h_);
  }

  void average_from_now_on() {
    if (relax_ == s_.relax) return;
    relax_ = s_.relax;
    update_temperature();
  }

  void columns_from_sums() {
    if (kernel_.update_columns(p_.m_padded, parts_, log2_b_, columns_, weight_, h_, bad_)) column_lse(nullptr);
  }

  // Own log-sum-exp for the marked panels: into H where g is null, else the potential of columns without weight.
  void column_lse(T* g) {
    T* fa = w_.fa.get(at_.n);
    const T* f = averaged_ && g == nullptr ? f_next_ : f_;  // commit has swapped them
    for (int64_t i = 0; i < at_.n; ++i) fa[i] = f[i] + std::log2(a_[i]);
    std::vector<int64_t> marked;
    for (int64_t i = 0; i < p_.m_padded / kernel_.panel; ++i) {
      if (bad_[i]) marked.push_back(i);
    }
    parallel_for(static_cast<int64_t>(marked.size()), threads_, [&](int64_t i) {
      alignas(64) T own[64];
      kernel_.column_lse(p_, fa, marked[i], own);
      for (int64_t j = marked[i] * kernel_.panel, c = 0; c < kernel_.panel && j < at_.m; ++j, ++c) {
        const double wanted = columns_.damping * own[c];
        if (g != nullptr) {
          if (b_[j] == 0) g[j] = static_cast<T>(wanted / scale_);
        } else if (b_[j] != 0) {
          const double before = double(h_[j]) - log2_b_[j];
          h_[j] = static_cast<T>(before + columns_.relax * (wanted - before) + log2_b_[j]);
        }
      }
    });
  }

  // F of rows without weight, which no iteration corrects: the transform of the H that came out.
  void rows_without_weight() {
    if (std::find(a_, a_ + at_.n, T(0)) == a_ + at_.n) return;
    relax_ = 1;
    update_temperature();
    const T* cached = triangle_ ? std::exchange(p_.cached, nullptr) : p_.cached;
    parallel_for(chunks_.count, threads_, [&](int64_t c) {
      const RowPass<T> io{
          h_, nullptr, a_, rows_, false, f_next_, shift_, nullptr, scratch_ + c * block_ * p_.stride, Store::scratch};
      for (int64_t i = begin(c), last = i; i < end(c); i = last + 1) {
        for (last = i; last < end(c) && a_[last] == 0; ++last) {
        }
        if (last == i) continue;
        kernel_.row_pass(p_, io, block_, i, last);
        std::copy(f_next_ + i, f_next_ + last, f_ + i);
      }
    });
    p_.cached = cached;
  }

  // F or G beyond this are those of points that may go nowhere, which relaxed updates may come to by steps.
  double far() const { return kernel_.nowhere * 0x1p-20; }

  // Whether a constraint asks for no weight at points that may go nowhere; without weight they get the potential 0.
  bool feasible(T* potential, const T* weight, int64_t count, double rho) const {
    bool all = true;
    for (int64_t i = 0; i < count && rho == kInfinity<double>; ++i) {
      if (!(potential[i] * scale_ > far())) continue;
      if (weight[i] == 0) {
        potential[i] = 0;
      } else {
        all = false;
      }
    }
    return all;
  }

  void finish(double mass) {
    T* f = s_.f + at_.first_f;
    T* g = s_.g + at_.first_g;
    const T limit = static_cast<T>(far());
    bool any_empty = false, any_far = false;
    std::fill_n(bad_, p_.m_padded / kernel_.panel, uint8_t(0));
    for (int64_t i = 0; i < at_.n; ++i) {
      f[i] = static_cast<T>(f_[i] / scale_);
      any_far |= f_[i] > limit;
    }
    for (int64_t j = 0; j < at_.m; ++j) {
      any_far |= h_[j] > limit;
      g[j] = static_cast<T>((double(h_[j]) - log2_b_[j]) / scale_);
      if (b_[j] != 0) continue;
      any_empty = true;
      bad_[j / kernel_.panel] = 1;
    }
    if (s_.self) {
      std::copy_n(f, at_.n, g);
    } else if (any_empty) {
      column_lse(g);
    }
    double mass_b = 0, value = 0;
    const bool fixed = s_.rho_x == kInfinity<double> && s_.rho_y == kInfinity<double>;
    // What the mass adds to the potentials is no cost.
    const double of_mass = fixed ? std::log2(mass_a_) : 0;
    auto add = [&](double weight, double potential, double rho, double offset) {
      if (weight == 0) return;
      const double exponent = std::abs(potential * scale_);
      flat_ = flat_ && std::abs(potential * scale_ + offset) < kFlat;
      // Rounding brings no mass back to a point that has next to none.
      const bool destroyed = potential > 100 * rho && in_.eps[q_] * kDigits > 8 * rho;
      if (exponent > kDigits && exponent <= far() && !destroyed) beyond_ = true;
      if (rho != kInfinity<double>) potential = -rho * std::expm1(-potential / rho);
      value += weight * potential;
    };
    bool possible = true;
    if (any_far || any_empty) {
      const bool rows = feasible(f, a_, at_.n, s_.rho_x), columns = feasible(g, b_, at_.m, s_.rho_y);
      possible = rows && columns;
    }
    for (int64_t i = 0; i < at_.n; ++i) add(a_[i], f[i], s_.rho_x, s_.self ? of_mass / 2 : of_mass);
    for (int64_t j = 0; j < at_.m; ++j) {
      add(b_[j], g[j], s_.rho_y, s_.self ? of_mass / 2 : 0);
      mass_b += b_[j];
    }
    if (fixed && !s_.simultaneous && s_.relax == 1) mass = mass_b;  // columns are exact
    value -= in_.eps[q_] * (mass - mass_a_ * mass_b);
    s_.value[q_] = possible ? static_cast<T>(value) : kInfinity<T>;  // whatever mass its plan has
  }

  const SinkhornKernels<T>& kernel_ = kernels<SinkhornKernels, T>();
  const Batch<T>& in_;
  const Solve<T>& s_;
  const int64_t q_;
  const Place<T> at_;
  Workspace<T>& w_;
  const int64_t threads_;
  const Chunks chunks_;
  Geometry<T> p_;
  int64_t n_padded_, block_;
  // Potentials so large that their rounding alone changes the plan by a factor: what residual it has is unknown.
  static constexpr double kDigits = 2 / std::numeric_limits<T>::epsilon();
  bool beyond_ = false;
  bool flat_ = true;
  double eps_, scale_, relax_, mass_a_ = 0, extreme_ = 0, weight_ = 0;
  T light_a_, light_b_ = 0;
  int64_t last_to_settle_ = 0;  // a panel
  double unsettled_ = 0;        // of the last potentials that were asked whether they are good enough
  Update rows_, columns_;
  bool triangle_;                                                // of the pairs of x with itself each is looked at once
  bool averaged_ = s_.simultaneous;                              // the columns are those for the F before
  bool keep_, usable_ = false, scaled_ = false, has_f_ = false;  // usable_: K is that of the last pass
  bool empty_rows_ = false;
  T *a_, *b_, *log2_b_, *zero_;
  T *f_, *f_next_, *shift_, *h_;   // the log domain
  T *u_, *u_next_, *v_, *v_next_;  // scalings of a kept K
  T *matrix_ = nullptr, *scratch_, *parts_;
  uint8_t* bad_;
};

// Whether all costs are so far below eps that the potentials will be flat: known before a solve where they are between
// the costs' bounds, and cheaply, since most problems have a pair early on that says no. Distances from x_0 bound those
// of all pairs.
bool surely_flat(const Batch<float>& in, const Solve<float>& s, const Place<float>& at, int64_t q) {
  const bool bounded = s.rho_x == kInfinity<double> && s.rho_y == kInfinity<double> && s.relax == 1 &&
                       (!s.simultaneous || s.self) && s.f0 == nullptr && s.g0 == nullptr && s.scheduled == 0;
  if (!bounded || in.cost == Cost::dot || in.diagonal != kNoDiagonal || in.label_x != nullptr) return false;
  const double limit = 0.99 * kFlat * in.eps[q] / kLog2E;
  if (in.cost == Cost::matrix) {
    const float* costs = in.matrix + at.cloud * in.n * in.m;
    return std::all_of(costs, costs + at.n * at.m, [&](float c) { return c >= 0 && c < limit; });
  }
  auto farthest = [&](const float* points, int64_t row, int64_t count) {
    double most = 0;
    for (int64_t i = 0; i < count && unit(in.cost) * power(in.cost, most) < limit; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < in.d; ++c) {
        const double way = std::abs(double(points[i * row + c]) - at.x[c]);
        sum += in.cost == Cost::l1 ? way : way * way;
      }
      const double length = in.cost == Cost::l1 ? sum : std::sqrt(sum);
      if (!(length <= most)) most = length;  // NaN stays
    }
    return most;
  };
  const double y = farthest(at.y, in.y_row, at.m);
  if (!(unit(in.cost) * power(in.cost, y) < limit)) return false;
  return unit(in.cost) * power(in.cost, farthest(at.x, in.x_row, at.n) + y) < limit;
}

// A problem in double, where float cannot tell its costs from 0 beside eps.
void solve_in_double(const Batch<float>& in, const Solve<float>& s, int64_t q, int64_t threads) {
  using Doubles = std::vector<double>;
  const Place<float> at(in, q);
  auto widened = [](const float* from, int64_t rows, int64_t row, int64_t columns) {
    Doubles out;
    for (int64_t i = 0; i < rows && from != nullptr; ++i)
      out.insert(out.end(), from + i * row, from + i * row + columns);
    return out;
  };
  auto from = [](const float* start, int64_t offset) { return start == nullptr ? nullptr : start + offset; };
  auto data = [](Doubles& array) { return array.empty() ? nullptr : array.data(); };
  Doubles x = widened(at.x, at.n, in.x_row, in.d), y = widened(at.y, at.m, in.y_row, in.d);
  Doubles a = widened(at.a, 1, 0, at.n), b = widened(at.b, 1, 0, at.m), eps = {in.eps[q]};
  Doubles matrix = widened(from(in.matrix, at.cloud * in.n * in.m), 1, 0, in.n * in.m);
  Doubles label_cost = widened(in.label_cost, 1, 0, in.labels_x * in.labels_y);
  Doubles f0 = widened(from(s.f0, at.first_f), 1, 0, at.n), g0 = widened(from(s.g0, at.first_g), 1, 0, at.m);
  Doubles start = widened(from(s.start, q), 1, 0, 1), schedule = widened(s.schedule, 1, 0, s.scheduled);
  Doubles f(at.n), g(at.m), grad_x(s.grad_x == nullptr ? 0 : at.n * in.d),
      grad_y(s.grad_y == nullptr ? 0 : at.m * in.d);
  // Weights sum to 1, or to the same mass, but for their roundings, of which eps feels the logarithm.
  double mass = 1;
  for (Doubles* w : {&a, &b}) {
    const double total = std::accumulate(w->begin(), w->end(), 0.0);
    if (std::abs(total - mass) <= 0x1p-20 * mass) {
      for (double& t : *w) t *= mass / total;
    } else {
      mass = total;
    }
  }
  double value, residual;
  const Batch<double> one{1,
                          1,
                          at.n,
                          at.m,
                          in.d,
                          data(x),
                          0,
                          in.d,
                          data(y),
                          0,
                          in.d,
                          data(a),
                          data(b),
                          0,
                          0,
                          data(eps),
                          data(matrix),
                          nullptr,
                          nullptr,
                          in.label_x == nullptr ? nullptr : in.label_x + at.point_x,
                          in.label_y == nullptr ? nullptr : in.label_y + at.point_y,
                          data(label_cost),
                          in.labels_x,
                          in.labels_y,
                          in.diagonal,
                          in.cost};
  const Solve<double> how{data(f0),       data(g0),         s.max_iter,     s.tol,       data(start), s.factor,
                          data(schedule), s.scheduled,      s.rho_x,        s.rho_y,     s.relax,     s.simultaneous,
                          s.closing,      s.self,           s.memory_limit, data(f),     data(g),     &value,
                          &residual,      s.iterations + q, data(grad_x),   data(grad_y)};
  Borrowed<Workspace<double>> workspace;
  Solver<double>(one, how, 0, *workspace, threads, s.memory_limit).solve();
  auto narrow = [](const Doubles& array, float* to) {
    for (size_t i = 0; i < array.size(); ++i) to[i] = static_cast<float>(array[i]);
  };
  narrow(f, s.f + at.first_f);
  narrow(g, s.g + at.first_g);
  if (s.grad_x != nullptr) narrow(grad_x, s.grad_x + at.first_f * in.d);
  if (s.grad_y != nullptr) narrow(grad_y, s.grad_y + at.first_g * in.d);
  s.value[q] = static_cast<float>(value);
  s.residual[q] = static_cast<float>(residual);
}

}  // namespace

template <class T>
void solve(const Batch<T>& in, const Solve<T>& s, int64_t threads) {
  const int64_t products = (s.grad_x != nullptr) + (s.grad_y != nullptr);
  const double work = work_of(in, in.d * (1.0 + products) + 4.0 * s.max_iter);
  for_each_problem<Workspace<T>>(in.count * in.temperatures, work, threads,
                                 [&](int64_t q, Workspace<T>& w, int64_t inner) {
                                   const Place<T> at(in, q);
                                   if (at.n == 0 || at.m == 0) {
                                     s.value[q] = s.residual[q] = 0;
                                     s.iterations[q] = 0;
                                     return;
                                   }
                                   if constexpr (sizeof(T) == 4) {
                                     if (surely_flat(in, s, at, q)) return solve_in_double(in, s, q, inner);
                                   }
                                   Solver<T> solver(in, s, q, w, inner, s.memory_limit);
                                   solver.solve();
                                   if constexpr (sizeof(T) == 4) {
                                     if (solver.flat()) solve_in_double(in, s, q, inner);
                                   }
                                 });
}

template void solve(const Batch<float>&, const Solve<float>&, int64_t);
template void solve(const Batch<double>&, const Solve<double>&, int64_t);

}  // namespace fewstep::cpu
