// Leaf kernels of Sinkhorn for one instruction set. The including file sets the target, FEWSTEP_ISA,
// FEWSTEP_VECTOR_BYTES and FEWSTEP_ROWS. Everything stays in this namespace: a std template instantiated here could be
// picked by the linker for a CPU without these instructions.
namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

#include "cpu/simd_math.h"

constexpr int kRows = FEWSTEP_ROWS;
constexpr int kWidth = 2;  // vectors in a panel

template <class T>
constexpr int64_t kPanel = kWidth * kLanes<T>;

// Exponents are floored so that nothing is denormal and -inf needs no care; with row sums kept above kRowLow a floored
// entry is at most 2^(floor - low) of its row, and column sums above kColumnLow do not feel it.
template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr float kFloor = -100, kRowLow = 0x1p-20f, kRowHigh = 0x1p60f, kColumnLow = -50;
};
template <>
struct Range<double> {
  static constexpr double kFloor = -900, kRowLow = 0x1p-20, kRowHigh = 0x1p400, kColumnLow = -800;
};

template <class T>
void pack(const T* __restrict__ y, int64_t m, int64_t d, T* __restrict__ out) {
  for (int64_t j0 = 0; j0 < m; j0 += kPanel<T>, out += d * kPanel<T>) {
    for (int64_t j = 0; j < kPanel<T>; ++j) {
      const T* row = y + (j0 + j < m ? j0 + j : m - 1) * d;
      for (int64_t c = 0; c < d; ++c) out[c * kPanel<T> + j] = row[c];
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

// Distances of R rows to one panel: differences, not |x|^2 + |y|^2 - 2 x.y, so near points far from the origin are
// exact. The subtraction runs beside the multiply-add on CPUs with separate add ports.
template <int R, bool kCached, class T>
FEWSTEP_INLINE void tile(const Geometry<T>& p, int64_t row, int64_t panel, Vec<T> (&c)[R][kWidth]) {
  if constexpr (kCached) {
    const T* source = p.cached + row * p.m_padded + panel * kPanel<T>;
    for (int r = 0; r < R; ++r) {
      for (int w = 0; w < kWidth; ++w) c[r][w] = load(source + r * p.m_padded + w * kLanes<T>);
    }
    return;
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < kWidth; ++w) c[r][w] = Vec<T>{};
  }
  const T* __restrict__ x = p.x + row * p.d;
  const T* __restrict__ y = p.y + panel * p.d * kPanel<T>;
  for (int64_t i = 0; i < p.d; ++i, y += kPanel<T>) {
    Vec<T> yv[kWidth];
    for (int w = 0; w < kWidth; ++w) yv[w] = load(y + w * kLanes<T>);
    for (int r = 0; r < R; ++r) {
      const T xr = x[r * p.d + i];
      for (int w = 0; w < kWidth; ++w) {
        const Vec<T> difference = xr - yv[w];
        c[r][w] += difference * difference;
      }
    }
  }
  if (p.cost == Cost::euclidean) {
    for (int r = 0; r < R; ++r) {
      for (int w = 0; w < kWidth; ++w) c[r][w] = square_root<T>(c[r][w]);
    }
  }
}

template <int R, class T>
void distance_block(const Geometry<T>& p, int64_t row, int64_t panel, T* out) {
  Vec<T> c[R][kWidth];
  tile<R, false>(p, row, panel, c);
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < kWidth; ++w) store(out + (row + r) * p.m_padded + panel * kPanel<T> + w * kLanes<T>, c[r][w]);
  }
}

// Panel by panel, so that a panel of y stays in the first-level cache while rows pass by.
template <class T>
void distances(const Geometry<T>& p, int64_t begin, int64_t end, T* out) {
  for (int64_t panel = 0; panel < p.m_padded / kPanel<T>; ++panel) {
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) distance_block<kRows>(p, row, panel, out);
    for (; row < end; ++row) distance_block<1>(p, row, panel, out);
  }
}

// e_rj = exp2(F_r + H_j - k C_rj) with the F of the previous iteration, which near convergence makes every sum about 1
// and needs no maximum; the sums go to s.
template <int R, bool kCached, class T>
FEWSTEP_INLINE void lagged_rows(const Geometry<T>& p, const T* h, const T* f, int64_t row, T* scratch, T (&s)[R]) {
  const T k = p.k;
  const int64_t stride = p.m_padded;
  Vec<T> total[R] = {};
  for (int64_t panel = 0; panel < stride; panel += kPanel<T>) {
    Vec<T> c[R][kWidth];
    if constexpr (!kCached) tile<R, false>(p, row, panel / kPanel<T>, c);
    for (int w = 0; w < kWidth; ++w) {
      const int64_t j = panel + w * kLanes<T>;
      const Vec<T> hj = load(h + j);
      for (int r = 0; r < R; ++r) {
        const Vec<T> distance = kCached ? load(p.cached + (row + r) * stride + j) : c[r][w];
        const Vec<T> e = exp2<T>(at_least(Range<T>::kFloor, (hj + f[r]) - k * distance));
        total[r] += e;
        store(scratch + r * stride + j, e);
      }
    }
  }
  for (int r = 0; r < R; ++r) s[r] = sum<T>(total[r]);
}

// The same with each row shifted by its own maximum, which replaces f: where F is unknown or far off.
template <int R, bool kCached, class T>
void shifted_rows(const Geometry<T>& p, const T* h, T* f, int64_t row, T* scratch, T (&s)[R]) {
  Vec<T> best[R];
  for (int r = 0; r < R; ++r) best[r] = splat(-std::numeric_limits<T>::infinity());
  for (int64_t panel = 0; panel < p.m_padded / kPanel<T>; ++panel) {
    Vec<T> c[R][kWidth];
    tile<R, kCached>(p, row, panel, c);
    for (int w = 0; w < kWidth; ++w) {
      const int64_t j = panel * kPanel<T> + w * kLanes<T>;
      const Vec<T> hj = load(h + j);
      for (int r = 0; r < R; ++r) {
        const Vec<T> z = hj - p.k * c[r][w];
        best[r] = z > best[r] ? z : best[r];
        store(scratch + r * p.m_padded + j, z);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    f[r] = -maximum<T>(best[r]);
    T* e = scratch + r * p.m_padded;
    Vec<T> total = {};
    for (int64_t j = 0; j < p.m_padded; j += kLanes<T>) {
      const Vec<T> v = exp2<T>(at_least(Range<T>::kFloor, load(e + j) + f[r]));
      total += v;
      store(e + j, v);
    }
    s[r] = sum<T>(total);
  }
}

template <int R, bool kCached, class T>
FEWSTEP_INLINE double row_block(const Geometry<T>& p, const RowPass<T>& io, int64_t row) {
  T f[R], s[R];
  double residual = 0;
  if (io.f == nullptr) {
    shifted_rows<R, kCached>(p, io.h, f, row, io.scratch, s);
  } else {
    for (int r = 0; r < R; ++r) f[r] = io.f[row + r];
    lagged_rows<R, kCached>(p, io.h, f, row, io.scratch, s);
    for (int r = 0; r < R; ++r) {
      T before = s[r];  // sum_j P_ij / a_i of the potentials that came in
      if (!(s[r] > Range<T>::kRowLow && s[r] < Range<T>::kRowHigh)) {
        T alone[1];
        shifted_rows<1, kCached>(p, io.h, f + r, row + r, io.scratch + r * p.m_padded, alone);
        s[r] = alone[0];
        before = s[r] * __builtin_exp2(double(io.f[row + r]) - double(f[r]));
      }
      const double a = double(io.a[row + r]);
      residual += a == 0 ? 0.0 : a * __builtin_fabs(double(before) - 1.0);  // before may be inf
    }
  }
  if (io.columns == nullptr) return residual;
  T log_sum[R], weight[R];
  log2_all<R>(s, log_sum);
  for (int r = 0; r < R; ++r) {
    io.f_next[row + r] = f[r] - log_sum[r];
    weight[r] = io.a[row + r] / s[r];
  }
  const int64_t stride = p.m_padded;
  for (int64_t j = 0; j < stride; j += kLanes<T>) {
    Vec<T> column = load(io.columns + j);
    for (int r = 0; r < R; ++r) column += weight[r] * load(io.scratch + r * stride + j);
    store(io.columns + j, column);
  }
  return residual;
}

template <bool kCached, class T>
double pass(const Geometry<T>& p, const RowPass<T>& io, int64_t begin, int64_t end) {
  double residual = 0;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) residual += row_block<kRows, kCached>(p, io, row);
  for (; row < end; ++row) residual += row_block<1, kCached>(p, io, row);
  return residual;
}

template <class T>
double row_pass(const Geometry<T>& p, const RowPass<T>& io, int64_t begin, int64_t end) {
  return p.cached != nullptr ? pass<true>(p, io, begin, end) : pass<false>(p, io, begin, end);
}

template <class T>
bool update_columns(int64_t m_padded, int64_t count, const T* parts, const T* log2_b, T* h, uint8_t* bad) {
  bool any = false;
  constexpr T kEmpty = -std::numeric_limits<T>::infinity();
  for (int64_t j = 0; j < m_padded; j += kLanes<T>) {
    Vec<T> total = load(parts + j);
    for (int64_t c = 1; c < count; ++c) total += load(parts + c * m_padded + j);
    const Vec<T> lb = load(log2_b + j);
    const Vec<T> log_total = log2<T>(at_least(Simd<T>::kMaxExponent == 127 ? T(0x1p-126) : T(0x1p-1022), total));
    store(h + j, lb == kEmpty ? lb : load(h + j) + (lb - log_total));
    const IntVec<T> low = (log_total < Range<T>::kColumnLow) & (lb != kEmpty);
    bool found = false;
    for (int i = 0; i < kLanes<T>; ++i) found |= low[i] != 0;
    if (j % kPanel<T> == 0) bad[j / kPanel<T>] = 0;
    bad[j / kPanel<T>] |= found;
    any |= found;
  }
  return any;
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
// zero weight (fa = -inf) leave it finite.
template <bool kCached, class T>
void online_lse(const Geometry<T>& p, const T* fa, int64_t panel, T* g) {
  Vec<T> best[kWidth], total[kWidth] = {};
  for (int w = 0; w < kWidth; ++w) best[w] = splat(std::numeric_limits<T>::lowest() / 2);
  int64_t row = 0;
  for (; row + kRows <= p.n; row += kRows) column_block<kRows, kCached>(p, fa, row, panel, best, total);
  for (; row < p.n; ++row) column_block<1, kCached>(p, fa, row, panel, best, total);
  for (int w = 0; w < kWidth; ++w) store(g + w * kLanes<T>, -(best[w] + log2<T>(total[w])));
}

template <class T>
void column_lse(const Geometry<T>& p, const T* fa, int64_t panel, T* g) {
  p.cached != nullptr ? online_lse<true>(p, fa, panel, g) : online_lse<false>(p, fa, panel, g);
}

// p_rj (or p_rj c'(C_rj) / |x_r - y_j|, the factor of x_r - y_j in the gradient) into scratch; row sums into mass.
template <int R, class T>
FEWSTEP_INLINE void weights(const Geometry<T>& p, const Apply<T>& io, Weight weight, int64_t row) {
  Vec<T> total[R] = {};
  for (int64_t panel = 0; panel < p.m_padded / kPanel<T>; ++panel) {
    Vec<T> c[R][kWidth];
    tile<R, false>(p, row, panel, c);
    for (int w = 0; w < kWidth; ++w) {
      const int64_t j = panel * kPanel<T> + w * kLanes<T>;
      const Vec<T> hj = load(io.h + j);
      for (int r = 0; r < R; ++r) {
        Vec<T> e = exp2<T>(at_least(Range<T>::kFloor, (hj + io.f[row + r]) - p.k * c[r][w]));
        e = hj == -std::numeric_limits<T>::infinity() ? Vec<T>{} : e;
        total[r] += e;
        if (weight == Weight::gradient && p.cost == Cost::euclidean) e = c[r][w] == 0 ? Vec<T>{} : e / c[r][w];
        store(io.scratch + r * p.m_padded + j, e);
      }
    }
  }
  if (io.mass == nullptr) return;
  for (int r = 0; r < R; ++r) io.mass[row + r] = sum<T>(total[r]);
}

// out[r, c0 : c0 + W vectors] for R rows: v is read along its rows.
template <int R, int W, bool kGradient, class T>
FEWSTEP_INLINE void apply_wide(const Geometry<T>& p, const Apply<T>& io, int64_t row, int64_t c0) {
  Vec<T> acc[R][W] = {};
  const T* __restrict__ v = io.v + c0;
  const T* __restrict__ e = io.scratch;
  const T* __restrict__ x = p.x + row * p.d + c0;
  for (int64_t j = 0; j < p.m; ++j, v += io.width) {
    for (int w = 0; w < W; ++w) {
      const Vec<T> vj = load(v + w * kLanes<T>);
      for (int r = 0; r < R; ++r) {
        if constexpr (kGradient) {
          acc[r][w] += e[r * p.m_padded + j] * (load(x + r * p.d + w * kLanes<T>) - vj);
        } else {
          acc[r][w] += e[r * p.m_padded + j] * vj;
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) store(io.out + (row + r) * io.width + c0 + w * kLanes<T>, acc[r][w]);
  }
}

// The columns of v left over by whole vectors, one at a time with lanes along j.
template <int R, bool kGradient, class T>
FEWSTEP_INLINE void apply_narrow(const Geometry<T>& p, const Apply<T>& io, int64_t row, int64_t c) {
  Vec<T> acc[R] = {};
  T tail[R] = {};
  const int64_t whole = p.m / kLanes<T> * kLanes<T>;
  for (int64_t j = 0; j < p.m; j += kLanes<T>) {
    Vec<T> vj = {};
    const int64_t count = j < whole ? kLanes<T> : p.m - whole;
    for (int64_t i = 0; i < count; ++i) vj[i] = io.v[(j + i) * io.width + c];
    for (int r = 0; r < R; ++r) {
      const T* e = io.scratch + r * p.m_padded + j;
      const T xr = kGradient ? p.x[(row + r) * p.d + c] : T(0);
      if (j < whole) {
        acc[r] += load(e) * (kGradient ? xr - vj : vj);
      } else {
        for (int64_t i = 0; i < count; ++i) tail[r] += e[i] * (kGradient ? xr - vj[i] : vj[i]);
      }
    }
  }
  for (int r = 0; r < R; ++r) io.out[(row + r) * io.width + c] = sum<T>(acc[r]) + tail[r];
}

template <int R, bool kGradient, class T>
void apply_block(const Geometry<T>& p, const Apply<T>& io, Weight weight, int64_t row) {
  weights<R>(p, io, weight, row);
  int64_t c = 0;
  for (; c + 2 * kLanes<T> <= io.width; c += 2 * kLanes<T>) apply_wide<R, 2, kGradient>(p, io, row, c);
  for (; c + kLanes<T> <= io.width; c += kLanes<T>) apply_wide<R, 1, kGradient>(p, io, row, c);
  for (; c < io.width; ++c) apply_narrow<R, kGradient>(p, io, row, c);
}

template <bool kGradient, class T>
void apply_all(const Geometry<T>& p, const Apply<T>& io, Weight weight, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) apply_block<kRows, kGradient>(p, io, weight, row);
  for (; row < end; ++row) apply_block<1, kGradient>(p, io, weight, row);
}

template <class T>
void apply_rows(const Geometry<T>& p, const Apply<T>& io, Weight weight, int64_t begin, int64_t end) {
  weight == Weight::gradient ? apply_all<true>(p, io, weight, begin, end) : apply_all<false>(p, io, weight, begin, end);
}

template <class T>
constexpr SinkhornKernels<T> kKernels = {kPanel<T>,         kRows,         pack<T>,      distances<T>, row_pass<T>,
                                         update_columns<T>, column_lse<T>, apply_rows<T>};

}  // namespace

const SinkhornKernels<float> kFloat = kKernels<float>;
const SinkhornKernels<double> kDouble = kKernels<double>;

}  // namespace fewstep::cpu::FEWSTEP_ISA
