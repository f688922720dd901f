// Leaf kernels of Sinkhorn for one instruction set. The including file sets the target, FEWSTEP_ISA,
// FEWSTEP_VECTOR_BYTES and FEWSTEP_ROWS. Everything stays in this namespace: a std template instantiated here could be
// picked by the linker for a CPU without these instructions.
#include "cpu/simd/unit.h"
#include "cpu/sinkhorn.h"

FEWSTEP_BEGIN_ISA

#include "cpu/simd/math.h"

namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

constexpr int kRows = FEWSTEP_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kWidth = 2;  // vectors in a panel

template <class T>
constexpr int64_t kPanel = kWidth * kLanes<T>;

// Exponents are floored so that nothing is denormal and -inf needs no care; with row sums kept above kRowLow a floored
// entry is at most 2^(floor - low) of its row. Rows weigh it by up to 2^lift in a column, whose sum does not feel it
// above 2^(floor + guard + lift); lift is at most -log2 kRowLow in plain updates. With K kept, scalings up to 2^kSafe
// on both sides lift a floored entry to 2^(floor + 2 safe) of its row at most.
template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr float kFloor = -100, kRowLow = 0x1p-20f, kRowHigh = 0x1p60f, kColumnLow = -50, kColumnHigh = 100;
  static constexpr float kNowhere = 0x1p100f;
  static constexpr double kSafe = 24, kGuard = 30;
};
template <>
struct Range<double> {
  static constexpr double kFloor = -900, kRowLow = 0x1p-20, kRowHigh = 0x1p400, kColumnLow = -800, kColumnHigh = 900;
  static constexpr double kNowhere = 0x1p900;
  static constexpr double kSafe = 200, kGuard = 80;
};

template <class T>
constexpr T kInfinity = T(__builtin_inf());

template <class T>
constexpr T kTiny = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);

template <class T>
void pack(const T* __restrict__ y, int64_t stride, int64_t m, int64_t d, T* __restrict__ out) {
  constexpr int L = kLanes<T>;
  for (int64_t j0 = 0; j0 < m; j0 += kPanel<T>, out += d * kPanel<T>) {
    for (int64_t j = j0; j < j0 + kPanel<T>; j += L) {
      const T* rows[L];
      for (int r = 0; r < L; ++r) rows[r] = y + (j + r < m ? j + r : m - 1) * stride;
      T* to = out + (j - j0);
      int64_t c = 0;
      for (; c + L <= d; c += L) {
        Vec<T> v[L];
        for (int r = 0; r < L; ++r) v[r] = load(rows[r] + c);
        transpose<L / 2, T>(v);
        for (int r = 0; r < L; ++r) store(to + (c + r) * kPanel<T>, v[r]);
      }
      for (; c < d; ++c) {
        for (int r = 0; r < L; ++r) to[c * kPanel<T> + r] = rows[r][c];
      }
    }
  }
}

template <class T>
FEWSTEP_INLINE Vec<T> square_root(Vec<T> v) {
#if FEWSTEP_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return _mm512_sqrt_ps(v);
  } else {
    return _mm512_sqrt_pd(v);
  }
#else
  for (int i = 0; i < kLanes<T>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

template <class T>
FEWSTEP_INLINE Vec<T> absolute(Vec<T> v) {
  constexpr auto kSign = typename Simd<T>::Int(1) << (8 * sizeof(T) - 1);
  return (Vec<T>)((IntVec<T>)v & ~(IntVec<T>{} + kSign));
}

enum class Metric { squared, absolute, product };

// Distances of R rows to P panels: differences, not |x|^2 + |y|^2 - 2 x.y, so near points far from the origin are
// exact. The subtraction runs beside the multiply-add on CPUs with separate add ports.
template <int R, int P, Metric kMetric, class T>
FEWSTEP_INLINE void accumulate(const Geometry<T>& p, int64_t row, int64_t panel, Vec<T> (&c)[P][R][kWidth]) {
  const T* __restrict__ x = p.x + row * p.x_stride;
  const T* __restrict__ y = p.y + panel * p.d * kPanel<T>;
  for (int64_t i = 0; i < p.d; ++i, y += kPanel<T>) {
    Vec<T> yv[P][kWidth];
    for (int q = 0; q < P; ++q) {
      for (int w = 0; w < kWidth; ++w) yv[q][w] = load(y + q * p.d * kPanel<T> + w * kLanes<T>);
    }
    for (int r = 0; r < R; ++r) {
      const T xr = x[r * p.x_stride + i];
      for (int q = 0; q < P; ++q) {
        for (int w = 0; w < kWidth; ++w) {
          const Vec<T> difference = xr - yv[q][w];
          if constexpr (kMetric == Metric::squared) c[q][r][w] += difference * difference;
          if constexpr (kMetric == Metric::absolute) c[q][r][w] += absolute<T>(difference);
          if constexpr (kMetric == Metric::product) c[q][r][w] -= xr * yv[q][w];
        }
      }
    }
  }
}

template <int R, int P, class T>
FEWSTEP_INLINE void measure(const Geometry<T>& p, int64_t row, int64_t first_panel, Vec<T> (&all)[P][R][kWidth]) {
  for (int q = 0; q < P; ++q) {
    for (int r = 0; r < R; ++r) {
      for (int w = 0; w < kWidth; ++w) all[q][r][w] = Vec<T>{};
    }
  }
  if (p.cost == Cost::dot) {
    accumulate<R, P, Metric::product>(p, row, first_panel, all);
  } else if (p.cost == Cost::l1) {
    accumulate<R, P, Metric::absolute>(p, row, first_panel, all);
  } else {
    accumulate<R, P, Metric::squared>(p, row, first_panel, all);
  }
  for (int q = 0; q < P; ++q) {
    Vec<T>(&c)[R][kWidth] = all[q];
    if (p.cost == Cost::euclidean) {
      for (int r = 0; r < R; ++r) {
        for (int w = 0; w < kWidth; ++w) c[r][w] = square_root<T>(c[r][w]);
      }
    }
    if (p.labels != nullptr) {
      for (int r = 0; r < R; ++r) {
        const T* extra = p.label_rows + p.labels[row + r] * p.m_padded + (first_panel + q) * kPanel<T>;
        for (int w = 0; w < kWidth; ++w) c[r][w] += load(extra + w * kLanes<T>);
      }
    }
    if (p.diagonal == kNoDiagonal) continue;
    const int64_t first = row + p.diagonal - (first_panel + q) * kPanel<T>;
    for (int r = 0; r < R; ++r) {
      const int64_t j = first + r;
      if (0 <= j && j < kPanel<T>) c[r][j / kLanes<T>][j % kLanes<T>] = kInfinity<T>;
    }
  }
}

// Distances of R rows to one panel, kept or not.
template <int R, bool kCached, class T>
FEWSTEP_INLINE void tile(const Geometry<T>& p, int64_t row, int64_t panel, Vec<T> (&c)[R][kWidth]) {
  if constexpr (kCached) {
    const T* source = p.cached + row * p.stride + panel * kPanel<T>;
    for (int r = 0; r < R; ++r) {
      for (int w = 0; w < kWidth; ++w) c[r][w] = load(source + r * p.stride + w * kLanes<T>);
    }
  } else {
    Vec<T> one[1][R][kWidth];
    measure<R, 1>(p, row, panel, one);
    for (int r = 0; r < R; ++r) {
      for (int w = 0; w < kWidth; ++w) c[r][w] = one[0][r][w];
    }
  }
}

template <int R, int P, class T>
void distance_block(const Geometry<T>& p, int64_t row, int64_t panel, T* out) {
  Vec<T> c[P][R][kWidth];
  measure<R, P>(p, row, panel, c);
  out += row * p.stride + panel * kPanel<T>;
  for (int q = 0; q < P; ++q) {
    for (int r = 0; r < R; ++r) {
      for (int w = 0; w < kWidth; ++w) store(out + r * p.stride + q * kPanel<T> + w * kLanes<T>, c[q][r][w]);
    }
  }
}

template <int R, int P, class T>
void distance_panels(const Geometry<T>& p, int64_t panel, int64_t row, int64_t end, T* out) {
  for (; row + R <= end; row += R) distance_block<R, P>(p, row, panel, out);
  for (; row < end; ++row) distance_block<1, P>(p, row, panel, out);
}

// Panels first, so that they stay in the first-level cache while rows pass by. With registers for it, a tile is as wide
// as high: of the same size, it has fewer values to load (measured: 1.12 cycles a multiply-add against 1.34).
template <class T>
void distances(const Geometry<T>& p, int64_t first, int64_t begin, int64_t end, T* out) {
  constexpr int P = kRows > 4 ? 2 : 1;
  int64_t panel = first;
  for (; (panel + P) * kPanel<T> <= p.m_padded; panel += P) distance_panels<kRows / P, P>(p, panel, begin, end, out);
  for (; panel * kPanel<T> < p.m_padded; ++panel) distance_panels<kRows, 1>(p, panel, begin, end, out);
}

// Where the entries of some rows go: those of lanes at column j of row r at begin + r * row + j * column.
template <class T>
struct Entries {
  T* begin;
  int64_t row, column;

  FEWSTEP_INLINE T* at(int64_t r, int64_t j) const { return begin + r * row + j * column; }
};

template <class T>
FEWSTEP_INLINE Entries<T> entries(const Geometry<T>& p, const RowPass<T>& io, int64_t row) {
  constexpr int64_t L = kLanes<T>;
  if (io.store == Store::tiles) return {io.scratch + row / L * L * p.m_padded + row % L * L, L, L};
  return {io.scratch + (io.store == Store::rows ? row * p.stride : 0), p.stride, 1};
}

// e_rj = exp2(F_r + H_j - k C_rj) with the F of the previous iteration, which near convergence makes every sum about 1
// and needs no maximum; the sums go to s.
template <int R, bool kCached, class T>
FEWSTEP_INLINE void lagged_rows(const Geometry<T>& p, const T* h, const T* f, int64_t row, Entries<T> out, T (&s)[R]) {
  const T k = p.k;
  const int64_t stride = p.stride;
  Vec<T> total[R] = {};
  for (int64_t panel = 0; panel < p.m_padded; panel += kPanel<T>) {
    Vec<T> c[R][kWidth];
    if constexpr (!kCached) tile<R, false>(p, row, panel / kPanel<T>, c);
    for (int w = 0; w < kWidth; ++w) {
      const int64_t j = panel + w * kLanes<T>;
      const Vec<T> hj = load(h + j);
      for (int r = 0; r < R; ++r) {
        const Vec<T> distance = kCached ? load(p.cached + (row + r) * stride + j) : c[r][w];
        const Vec<T> e = exp2<T>(at_least(Range<T>::kFloor, (hj + f[r]) - k * distance));
        total[r] += e;
        store(out.at(r, j), e);
      }
    }
  }
  for (int r = 0; r < R; ++r) s[r] = sum<T>(total[r]);
}

// The same with each row shifted by its own maximum, which replaces f: where F is unknown or far off. A row that may go
// nowhere has sum and entries 0.
template <int R, bool kCached, class T>
void shifted_rows(const Geometry<T>& p, const T* h, T* f, int64_t row, Entries<T> out, T (&s)[R]) {
  Vec<T> best[R];
  for (int r = 0; r < R; ++r) best[r] = splat(-kInfinity<T>);
  for (int64_t panel = 0; panel < p.m_padded / kPanel<T>; ++panel) {
    Vec<T> c[R][kWidth];
    tile<R, kCached>(p, row, panel, c);
    for (int w = 0; w < kWidth; ++w) {
      const int64_t j = panel * kPanel<T> + w * kLanes<T>;
      const Vec<T> hj = load(h + j);
      for (int r = 0; r < R; ++r) {
        const Vec<T> z = hj - p.k * c[r][w];
        best[r] = z > best[r] ? z : best[r];
        store(out.at(r, j), z);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    f[r] = -maximum<T>(best[r]);
    const bool nowhere = f[r] >= Range<T>::kNowhere;
    if (nowhere) f[r] = Range<T>::kNowhere;
    Vec<T> total = {};
    for (int64_t j = 0; j < p.m_padded; j += kLanes<T>) {
      const Vec<T> v = exp2<T>(at_least(Range<T>::kFloor, load(out.at(r, j)) + f[r]));
      total += v;
      store(out.at(r, j), v);
    }
    if (nowhere) {  // or NaN
      total *= T(0);
      for (int64_t j = 0; j < p.m_padded; j += kLanes<T>) store(out.at(r, j), total);
    }
    s[r] = sum<T>(total);
  }
}

template <class T>
FEWSTEP_INLINE T power_of_two(double exponent) {
  return static_cast<T>(__builtin_exp2(exponent));
}

// One row's share of a PassResult: its mass over a_i was `row` with the potential F.
FEWSTEP_INLINE void account(double a, double row, double f, const Update& update, PassResult& result) {
  if (a == 0) return;  // row may be inf
  const double wanted = update.target == 0 ? 1.0 : __builtin_exp2(-update.target * f);
  result.residual += a * __builtin_fabs(row - wanted);
  result.mass += a * row;
}

template <int R, bool kCached, class T>
FEWSTEP_INLINE void row_block(const Geometry<T>& p, const RowPass<T>& io, int64_t row, PassResult& result) {
  T shift[R], s[R], log_sum[R], weight[R];
  const Entries<T> e = entries(p, io, row);
  if (io.f == nullptr) {
    shifted_rows<R, kCached>(p, io.h, shift, row, e, s);
  } else {
    for (int r = 0; r < R; ++r) shift[r] = io.f[row + r];
    lagged_rows<R, kCached>(p, io.h, shift, row, e, s);
    for (int r = 0; r < R; ++r) {
      double mass = s[r];  // sum_j P_ij / a_i of the potentials that came in
      if (!(s[r] > Range<T>::kRowLow && s[r] < Range<T>::kRowHigh)) {
        T alone[1];
        shifted_rows<1, kCached>(p, io.h, shift + r, row + r, {e.at(r, 0), e.row, e.column}, alone);
        s[r] = alone[0];
        mass = s[r] * __builtin_exp2(double(io.f[row + r]) - double(shift[r]));
      }
      account(io.a[row + r], mass, io.f[row + r], io.update, result);
    }
  }
  log2_all<R>(s, log_sum);
  for (int r = 0; r < R; ++r) {
    const T before = io.f == nullptr ? T(0) : io.f[row + r];
    T next = shift[r] - log_sum[r];
    weight[r] = io.a[row + r] / s[r];
    if (!io.update.plain()) {
      next = T(double(before) + io.update.relax * (io.update.damping * double(next) - double(before)));
      weight[r] = io.a[row + r] * power_of_two<T>(double(next) - double(shift[r]));
    }
    if (io.simultaneous) weight[r] = io.a[row + r] * power_of_two<T>(double(before) - double(shift[r]));
    if (s[r] == 0) next = shift[r];
    if (s[r] == 0 || io.a[row + r] == 0) weight[r] = 0;  // it may be inf
    result.weight += weight[r];
    const double moved = __builtin_fabs(double(next) - double(shift[r]));
    result.extreme = moved > result.extreme ? moved : result.extreme;
    io.f_next[row + r] = next;
    io.shift[row + r] = shift[r];
  }
  if (io.columns == nullptr) return;
  for (int64_t j = 0; j < p.m_padded; j += kLanes<T>) {
    Vec<T> column = load(io.columns + j);
    for (int r = 0; r < R; ++r) column += weight[r] * load(e.at(r, j));
    store(io.columns + j, column);
  }
}

template <int R, bool kCached, class T>
void pass(const Geometry<T>& p, const RowPass<T>& io, int64_t row, int64_t end, PassResult& result) {
  for (; row + R <= end; row += R) row_block<R, kCached>(p, io, row, result);
  if constexpr (R > 1) {
    if (row < end) pass<R / 2, kCached>(p, io, row, end, result);
  }
}

template <bool kCached, class T>
PassResult blocked_pass(const Geometry<T>& p, const RowPass<T>& io, int64_t block, int64_t begin, int64_t end) {
  PassResult result;
  if (block >= kRows) {
    pass<kRows, kCached>(p, io, begin, end, result);
  } else if (block >= 4) {
    pass<4, kCached>(p, io, begin, end, result);
  } else if (block >= 2) {
    pass<2, kCached>(p, io, begin, end, result);
  } else {
    pass<1, kCached>(p, io, begin, end, result);
  }
  return result;
}

template <class T>
PassResult row_pass(const Geometry<T>& p, const RowPass<T>& io, int64_t block, int64_t begin, int64_t end) {
  return p.cached != nullptr ? blocked_pass<true>(p, io, block, begin, end)
                             : blocked_pass<false>(p, io, block, begin, end);
}

template <int R, bool kCached, class T>
FEWSTEP_INLINE void self_block(const Geometry<T>& p, const SelfPass<T>& io, int64_t row) {
  Vec<T> total[R] = {};
  T f[R], b[R];
  for (int r = 0; r < R; ++r) {
    f[r] = io.f[row + r];
    b[r] = io.b[row + r];
  }
  const int64_t own = row / kPanel<T>;
  for (int64_t panel = own; panel < p.m_padded / kPanel<T>; ++panel) {
    Vec<T> c[R][kWidth];
    tile<R, kCached>(p, row, panel, c);
    for (int w = 0; w < kWidth; ++w) {
      const int64_t j = panel * kPanel<T> + w * kLanes<T>;
      const Vec<T> fj = load(io.f + j), bj = load(io.b + j);
      Vec<T> column = {};
      for (int r = 0; r < R; ++r) {
        const Vec<T> s = exp2<T>(at_least(Range<T>::kFloor, (fj + f[r]) - p.k * c[r][w]));
        total[r] += bj * s;
        column += b[r] * s;
      }
      if (panel > own) store(io.sums + j, load(io.sums + j) + column);
    }
  }
  for (int r = 0; r < R; ++r) io.sums[row + r] += sum<T>(total[r]);
}

template <int R, bool kCached, class T>
void self_blocks(const Geometry<T>& p, const SelfPass<T>& io, int64_t row, int64_t end) {
  for (; row + R <= end; row += R) self_block<R, kCached>(p, io, row);
  if constexpr (R > 1) {
    if (row < end) self_blocks<R / 2, kCached>(p, io, row, end);
  }
}

template <class T>
void self_pass(const Geometry<T>& p, const SelfPass<T>& io, int64_t begin, int64_t end) {
  p.cached != nullptr ? self_blocks<kRows, true>(p, io, begin, end) : self_blocks<kRows, false>(p, io, begin, end);
}

template <class T>
FEWSTEP_INLINE Vec<T> log2_positive(Vec<T> v) {
  return log2<T>(at_least(kTiny<T>, v));
}

template <class T>
FEWSTEP_INLINE Vec<T> exp2_floored(Vec<T> z) {
  return exp2<T>(at_least(-Simd<T>::kMaxExponent + 2, z));
}

template <class T>
bool self_update(int64_t n, const T* a, const T* f, const T* sums, const Update& update, T* f_next,
                 PassResult* result) {
  const T damping = update.damping, relax = update.relax, target = update.target;
  IntVec<T> bad = {};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> fi = load(f + i), ai = load(a + i);
    Vec<T> s = load(sums + i), wanted = splat(T(1));
    for (int64_t r = n - i; r < kLanes<T>; ++r) s[r] = 1;  // padding
    bad |= ~((s > Range<T>::kRowLow) & (s < Range<T>::kRowHigh));
    if (target != 0) wanted = exp2_floored<T>(-target * fi);
    const Vec<T> error = ai * absolute<T>(s - wanted), mass = ai * s;
    result->residual += double(sum<T>(error));
    result->mass += double(sum<T>(mass));
    store(f_next + i, fi + relax * (damping * (fi - log2_positive<T>(s)) - fi));
  }
  for (int i = 0; i < kLanes<T>; ++i) {
    if (bad[i] != 0) return false;
  }
  return true;
}

// kLanes rows of K at once, so that their sums come out as one vector.
template <bool kEmptyRows, class T>
FEWSTEP_INLINE void scale_block(int64_t n, int64_t m_padded, const ScalePass<T>& io, int64_t row, PassResult& result,
                                Vec<T>& extreme) {
  constexpr int L = kLanes<T>;
  const T* __restrict__ kernel = io.kernel + row * m_padded;
  Vec<T> acc[L] = {};
  for (int64_t j = 0; j < m_padded; j += L) {
    const Vec<T> vj = load(io.v + j);
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) acc[r] += load(kernel + (j + r) * L) * vj;
  }
  Vec<T> s = sum_each<T>(acc);
  for (int64_t r = n - row; r < L; ++r) s[r] = 1;  // padding
  const Vec<T> a = load(io.a + row), u = load(io.u + row);
  const Vec<T> mass = s * u;
  const IntVec<T> empty = s == 0;
  if constexpr (kEmptyRows) s = empty ? splat(T(1)) : s;
  Vec<T> wanted = splat(T(1)), inverse = s, next = T(1) / s;
  if (!io.update.plain()) {
    const Vec<T> shift = load(io.shift + row);
    const Vec<T> f = shift + log2_positive<T>(u);
    const T damping = io.update.damping, relax = io.update.relax, target = io.update.target;
    if (target != 0) wanted = exp2_floored<T>(-target * f);
    const Vec<T> moved = f + relax * (damping * (shift - log2_positive<T>(s)) - f) - shift;
    next = exp2_floored<T>(moved);
    if constexpr (kEmptyRows) next = empty ? splat(T(1)) : next;
    inverse = T(1) / next;
  }
  const Vec<T> error = a * absolute<T>(mass - wanted), total = a * mass;
  result.residual += double(sum<T>(error));
  result.mass += double(sum<T>(total));
  const Vec<T> larger = next > inverse ? next : inverse;
  extreme = larger > extreme ? larger : extreme;
  store(io.u_next + row, next);
  if (io.columns == nullptr) return;
  alignas(64) T w[L];
  store(w, a * (io.simultaneous ? u : next));
  for (int64_t j = 0; j < m_padded; j += L) {
    Vec<T> even = load(io.columns + j), odd = {};
#pragma GCC unroll 16
    for (int r = 0; r < L; r += 2) {
      even += w[r] * load(kernel + (j + r) * L);
      odd += w[r + 1] * load(kernel + (j + r + 1) * L);
    }
    store(io.columns + j, even + odd);
  }
}

template <class T>
PassResult scale_pass(int64_t n, int64_t m_padded, const ScalePass<T>& io, int64_t begin, int64_t end) {
  PassResult result;
  Vec<T> extreme = splat(T(1));
  for (int64_t row = begin; row < end; row += kLanes<T>) {
    io.empty_rows ? scale_block<true>(n, m_padded, io, row, result, extreme)
                  : scale_block<false>(n, m_padded, io, row, result, extreme);
  }
  result.extreme = __builtin_log2(double(maximum<T>(extreme)));
  return result;
}

template <class T>
void add_parts(int64_t m_padded, int64_t count, T* parts) {
  for (int64_t j = 0; j < m_padded; j += kLanes<T>) {
    Vec<T> total = load(parts + j);
    for (int64_t c = 1; c < count; ++c) total += load(parts + c * m_padded + j);
    store(parts + j, total);
  }
}

// H <- H + relax (damping G' - G), with G = H - log2 b and G' = H - log2 of the sum.
template <class T>
FEWSTEP_INLINE Vec<T> next_column(Vec<T> h, Vec<T> log2_b, Vec<T> log_sum, const Update& update) {
  if (update.plain()) return h + (log2_b - log_sum);
  const T damping = update.damping, relax = update.relax;
  return h + relax * (damping * (h - log_sum) - (h - log2_b));
}

// log2 of the least sum of a column that floored entries, of rows whose weights sum to `weight`, have no influence on.
template <class T>
FEWSTEP_INLINE T lowest_column(double weight) {
  constexpr double kLift = Range<T>::kColumnLow - Range<T>::kFloor - Range<T>::kGuard;
  if (!(weight > power_of_two<double>(kLift))) return Range<T>::kColumnLow;
  return Range<T>::kColumnLow - kLift + __builtin_log2(weight);
}

template <class T>
bool update_columns(int64_t m_padded, const T* sums, const T* log2_b, const Update& update, double weight, T* h,
                    uint8_t* bad) {
  bool any = false;
  constexpr T kEmpty = -kInfinity<T>;
  const T lowest = lowest_column<T>(weight);
  for (int64_t panel = 0; panel < m_padded / kPanel<T>; ++panel) {
    Vec<T> next[kWidth];
    bool found = false;
    for (int w = 0; w < kWidth; ++w) {
      const int64_t j = panel * kPanel<T> + w * kLanes<T>;
      const Vec<T> lb = load(log2_b + j), hj = load(h + j), total = load(sums + j);
      const Vec<T> log_sum = log2_positive<T>(total);
      const IntVec<T> off = ((log_sum < lowest) | (log_sum > Range<T>::kColumnHigh)) & (lb != kEmpty);
      next[w] = lb == kEmpty ? lb : next_column<T>(hj, lb, log_sum, update);
      for (int i = 0; i < kLanes<T>; ++i) found |= off[i] != 0;
    }
    for (int w = 0; w < kWidth && !found; ++w) store(h + panel * kPanel<T> + w * kLanes<T>, next[w]);
    bad[panel] = found;
    any |= found;
  }
  return any;
}

template <class T>
double scale_columns(int64_t m_padded, const T* sums, const T* b, const T* log2_b, const T* h, const Update& update,
                     double weight, const T* v, T* v_next) {
  Vec<T> worst = splat(T(1)), lowest = worst;
  for (int64_t j = 0; j < m_padded; j += kLanes<T>) {
    const Vec<T> total = load(sums + j), bj = load(b + j);
    lowest = (bj > 0) & (total < lowest) ? total : lowest;
  }
  if (-maximum<T>(-lowest) < power_of_two<T>(lowest_column<T>(weight))) return kInfinity<double>;
  for (int64_t j = 0; j < m_padded; j += kLanes<T>) {
    const Vec<T> total = at_least(kTiny<T>, load(sums + j)), bj = load(b + j);
    Vec<T> next;
    if (update.plain()) {
      next = bj / total;
    } else {
      const Vec<T> hj = load(h + j), now = hj + log2_positive<T>(load(v + j));
      const T damping = update.damping, relax = update.relax;
      next = exp2_floored<T>(now + relax * (damping * (hj - log2_positive<T>(total)) - (now - load(log2_b + j))) - hj);
    }
    next = bj > 0 ? next : Vec<T>{};
    const Vec<T> inverse = T(1) / next, larger = next > inverse ? next : inverse;
    worst = (bj > 0) & (larger > worst) ? larger : worst;
    store(v_next + j, next);
  }
  return __builtin_log2(double(maximum<T>(worst)));
}

template <class T>
void exp2_sum(int64_t count, const T* p, const T* q, const T* r, T* out) {
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const Vec<T> qj = load(q + j);
    const Vec<T> e = exp2_floored<T>(load(p + j) + qj - load(r + j));
    store(out + j, qj == -kInfinity<T> ? Vec<T>{} : e);
  }
}

template <class T>
void add_log2(int64_t count, const T* v, T* h) {
  for (int64_t j = 0; j < count; j += kLanes<T>) store(h + j, load(h + j) + log2_positive<T>(load(v + j)));
}

template <int R, bool kCached, class T>
FEWSTEP_INLINE void column_block(const Geometry<T>& p, const T* fa, int64_t row, int64_t panel, Vec<T> (&best)[kWidth],
                                 Vec<T> (&total)[kWidth]) {
  Vec<T> c[R][kWidth];
  tile<R, kCached>(p, row, panel, c);
  for (int w = 0; w < kWidth; ++w) {
    Vec<T> top = best[w];
    for (int r = 0; r < R; ++r) {
      c[r][w] = fa[row + r] - p.k * c[r][w];
      top = c[r][w] > top ? c[r][w] : top;
    }
    total[w] *= exp2<T>(at_least(Range<T>::kFloor, best[w] - top));
    best[w] = top;
    for (int r = 0; r < R; ++r) total[w] += exp2<T>(at_least(Range<T>::kFloor, c[r][w] - top));
  }
}

// Online log-sum-exp down the columns of one panel. `best` starts at a huge negative number, not -inf, so that rows of
// zero weight (fa = -inf) and infinite distances leave it finite.
template <bool kCached, class T>
void online_lse(const Geometry<T>& p, const T* fa, int64_t panel, T* g) {
  Vec<T> best[kWidth], total[kWidth] = {};
  for (int w = 0; w < kWidth; ++w) best[w] = splat(-Range<T>::kNowhere);
  int64_t row = 0;
  for (; row + kRows <= p.n; row += kRows) column_block<kRows, kCached>(p, fa, row, panel, best, total);
  for (; row < p.n; ++row) column_block<1, kCached>(p, fa, row, panel, best, total);
  for (int w = 0; w < kWidth; ++w) store(g + w * kLanes<T>, -(best[w] + log2<T>(total[w])));
}

template <class T>
void column_lse(const Geometry<T>& p, const T* fa, int64_t panel, T* g) {
  p.cached != nullptr ? online_lse<true>(p, fa, panel, g) : online_lse<false>(p, fa, panel, g);
}

}  // namespace
}  // namespace fewstep::cpu::FEWSTEP_ISA

#include "cpu/sinkhorn_plan.inl"

namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

template <class T>
constexpr SinkhornKernels<T> kKernels = {
    kPanel<T>,    kRows,          kLanes<T>,         Range<T>::kSafe,  Range<T>::kNowhere,
    pack<T>,      distances<T>,   row_pass<T>,       scale_pass<T>,    add_parts<T>,
    self_pass<T>, self_update<T>, update_columns<T>, scale_columns<T>, exp2_sum<T>,
    add_log2<T>,  column_lse<T>,  apply_rows<T>,     gradient_rows<T>, gradient_columns<T>,
    combine<T>};

}  // namespace

template <>
const SinkhornKernels<float> Compiled<SinkhornKernels<float>>::kernels = kKernels<float>;
template <>
const SinkhornKernels<double> Compiled<SinkhornKernels<double>>::kernels = kKernels<double>;

}  // namespace fewstep::cpu::FEWSTEP_ISA

FEWSTEP_END_ISA
