// What is asked of a plan once its potentials are known: products and gradients. A part of sinkhorn.inl.
namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

// Distances of R rows to one panel without labels: what is left of c - label is rounded, or NaN where both are inf.
template <int R, class T>
void bare_tile(Geometry<T> p, int64_t row, int64_t panel, Vec<T> (&c)[R][kWidth]) {
  p.labels = nullptr;
  tile<R, false>(p, row, panel, c);
}

// p_rj from panel `first` on (or a_r p_rj c'(C_rj) / |x_r - y_j| where a is given, the factor of x_r - y_j in the
// gradient) into out; returns what was summed over j by lanes. Of points without weight p_rj may overflow: it
// saturates, with sums that are finite, so that 0 times it is 0.
template <int R, bool kCached, class T>
FEWSTEP_INLINE void weights(const Geometry<T>& p, const T* h, const T* f, const T* a, int64_t row, int64_t first,
                            T* out, Vec<T> (&total)[R]) {
  const bool euclidean = a != nullptr && p.cost == Cost::euclidean;
  const bool labelled = euclidean && p.labels != nullptr;
  const T highest = Simd<T>::kMaxExponent - 1 - T(__builtin_log2(double(p.m)));
  for (int64_t panel = first; panel < p.m_padded / kPanel<T>; ++panel) {
    Vec<T> c[R][kWidth], distance[R][kWidth];
    tile<R, kCached>(p, row, panel, c);
    if (labelled) bare_tile<R>(p, row, panel, distance);
    for (int w = 0; w < kWidth; ++w) {
      const int64_t j = panel * kPanel<T> + w * kLanes<T>;
      const Vec<T> hj = load(h + j);
      for (int r = 0; r < R; ++r) {
        const Vec<T> z = (hj + f[row + r]) - p.k * c[r][w];
        Vec<T> e = exp2<T>(at_least(Range<T>::kFloor, z > highest ? splat(highest) : z));
        e = z < Range<T>::kFloor ? Vec<T>{} : e;
        total[r] += e;
        if (a != nullptr) e *= a[row + r];
        if (euclidean) {
          const Vec<T> length = labelled ? distance[r][w] : c[r][w];
          e = (length == 0) | (e == 0) ? Vec<T>{} : e / length;
        }
        store(out + r * p.stride + j, e);
      }
    }
  }
}

template <int R, class T>
FEWSTEP_INLINE void weights(const Geometry<T>& p, const T* h, const T* f, const T* a, int64_t row, int64_t first,
                            T* out, Vec<T> (&total)[R]) {
  p.cached != nullptr ? weights<R, true>(p, h, f, a, row, first, out, total)
                      : weights<R, false>(p, h, f, a, row, first, out, total);
}

// What row i gets from v_j: v_j, x_i - v_j or the sign of x_i - v_j.
enum class Term { value, difference, sign };

template <Term kTerm, class V>
FEWSTEP_INLINE V term(V x, V v) {
  if constexpr (kTerm == Term::value) return v;
  if constexpr (kTerm == Term::difference) return x - v;
  return x > v ? V{} + 1 : (x < v ? V{} - 1 : V{});
}

// Rows of weights e [R, stride] on v [m, width]; the x of `term` is null for Term::value.
template <class T>
struct Product {
  const T* e;
  int64_t stride, m;
  const T* v;  // row j at v + j * v_stride
  int64_t v_stride, width;
  const T* x;
  int64_t x_stride;
  T* out;  // [R, width]
  bool add;
};

// out[r, c0 : c0 + W vectors] for R rows: v is read along its rows.
template <int R, int W, Term kTerm, class T>
FEWSTEP_INLINE void multiply_wide(const Product<T>& io, int64_t c0) {
  Vec<T> acc[R][W] = {}, xr[R][W] = {};
  if constexpr (kTerm != Term::value) {
    for (int r = 0; r < R; ++r) {
      for (int w = 0; w < W; ++w) xr[r][w] = load(io.x + r * io.x_stride + c0 + w * kLanes<T>);
    }
  }
  const T* __restrict__ v = io.v + c0;
  const T* __restrict__ e = io.e;
  for (int64_t j = 0; j < io.m; ++j, v += io.v_stride) {
    for (int w = 0; w < W; ++w) {
      const Vec<T> vj = load(v + w * kLanes<T>);
      for (int r = 0; r < R; ++r) acc[r][w] += e[r * io.stride + j] * term<kTerm>(xr[r][w], vj);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) {
      T* out = io.out + r * io.width + c0 + w * kLanes<T>;
      store(out, io.add ? load(out) + acc[r][w] : acc[r][w]);
    }
  }
}

// The columns of v left over by whole vectors, one at a time with lanes along j.
template <int R, Term kTerm, class T>
FEWSTEP_INLINE void multiply_narrow(const Product<T>& io, int64_t c) {
  Vec<T> acc[R] = {};
  T tail[R] = {};
  const int64_t whole = io.m / kLanes<T> * kLanes<T>;
  for (int64_t j = 0; j < io.m; j += kLanes<T>) {
    Vec<T> vj = {};
    const int64_t count = j < whole ? kLanes<T> : io.m - whole;
    for (int64_t i = 0; i < count; ++i) vj[i] = io.v[(j + i) * io.v_stride + c];
    for (int r = 0; r < R; ++r) {
      const T* e = io.e + r * io.stride + j;
      const T x = kTerm == Term::value ? T(0) : io.x[r * io.x_stride + c];
      const Vec<T> t = term<kTerm>(splat(x), vj);
      if (j < whole) {
        acc[r] += load(e) * t;
      } else {
        for (int64_t i = 0; i < count; ++i) tail[r] += e[i] * t[i];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    T& out = io.out[r * io.width + c];
    out = (io.add ? out : T(0)) + (sum<T>(acc[r]) + tail[r]);
  }
}

template <int R, Term kTerm, class T>
FEWSTEP_INLINE void multiply(const Product<T>& io) {
  int64_t c = 0;
  for (; c + 2 * kLanes<T> <= io.width; c += 2 * kLanes<T>) multiply_wide<R, 2, kTerm>(io, c);
  for (; c + kLanes<T> <= io.width; c += kLanes<T>) multiply_wide<R, 1, kTerm>(io, c);
  for (; c < io.width; ++c) multiply_narrow<R, kTerm>(io, c);
}

template <int R, class T>
void apply_block(const Geometry<T>& p, const Apply<T>& io, int64_t row) {
  const T kLost = power_of_two<T>(0.9 * Range<T>::kFloor);  // a row whose entries may have been floored to 0
  Vec<T> total[R] = {};
  weights<R>(p, io.h, io.f, static_cast<const T*>(nullptr), row, 0, io.scratch, total);
  for (int r = 0; r < R; ++r) {
    T mass[1] = {sum<T>(total[r])}, shift[1];
    const T f = io.f[row + r];
    const bool any_scale = f == kInfinity<T>;
    if (any_scale || mass[0] < kLost) {
      const Entries<T> e{io.scratch + r * p.stride, p.stride, 1};
      p.cached != nullptr ? shifted_rows<1, true>(p, io.h, shift, row + r, e, mass)
                          : shifted_rows<1, false>(p, io.h, shift, row + r, e, mass);
      const T scale = any_scale ? T(1) : power_of_two<T>(double(f) - double(shift[0]));
      mass[0] *= scale;
      for (int64_t j = 0; j < p.m_padded; j += kLanes<T>) store(e.at(0, j), scale * load(e.at(0, j)));
    }
    io.mass[row + r] = mass[0];
  }
  multiply<R, Term::value>(
      Product<T>{io.scratch, p.stride, p.m, io.v, io.width, io.width, nullptr, 0, io.out + row * io.width, false});
}

template <class T>
void apply_rows(const Geometry<T>& p, const Apply<T>& io, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) apply_block<kRows>(p, io, row);
  for (; row < end; ++row) apply_block<1>(p, io, row);
}

template <class T>
Term term_of(const Geometry<T>& p) {
  return p.cost == Cost::dot ? Term::value : p.cost == Cost::l1 ? Term::sign : Term::difference;
}

template <int R, Term kTerm, class T>
void gradient_block(const Geometry<T>& p, const Gradient<T>& io, int64_t row, int64_t j0, int64_t j1, bool add) {
  multiply<R, kTerm>(Product<T>{io.weights + (row - io.first) * p.stride + j0, p.stride, j1 - j0,
                                io.y + j0 * io.y_stride, io.y_stride, p.d, p.x + row * p.x_stride, p.x_stride,
                                io.rows + row * p.d, add});
}

// Blocks of y stay in the first-level cache while the rows pass by.
template <Term kTerm, class T>
void gradient_products(const Geometry<T>& p, const Gradient<T>& io, int64_t begin, int64_t end, int64_t first) {
  constexpr int64_t kColumns = 128;
  constexpr int R = kRows > 4 ? 4 : 2;
  for (int64_t j = first; j < p.m; j += kColumns) {
    const int64_t stop = j + kColumns < p.m ? j + kColumns : p.m;
    int64_t row = begin;
    for (; row + R <= end; row += R) gradient_block<R, kTerm>(p, io, row, j, stop, j > first);
    for (; row < end; ++row) gradient_block<1, kTerm>(p, io, row, j, stop, j > first);
  }
}

template <class T>
void gradient_rows(const Geometry<T>& p, const Gradient<T>& io, int64_t begin, int64_t end) {
  const int64_t first = io.self ? begin / kPanel<T> : 0;
  int64_t row = begin;
  Vec<T> total[kRows] = {}, one[1] = {};
  for (; row + kRows <= end; row += kRows) {
    weights<kRows>(p, io.h, io.f, io.a, row, first, io.weights + (row - io.first) * p.stride, total);
  }
  for (; row < end; ++row) {
    weights<1>(p, io.h, io.f, io.a, row, first, io.weights + (row - io.first) * p.stride, one);
  }
  if (io.rows == nullptr) return;
  switch (term_of(p)) {
    case Term::value:
      return gradient_products<Term::value>(p, io, begin, end, first * kPanel<T>);
    case Term::difference:
      return gradient_products<Term::difference>(p, io, begin, end, first * kPanel<T>);
    case Term::sign:
      return gradient_products<Term::sign>(p, io, begin, end, first * kPanel<T>);
  }
}

// C coordinates from c on of one panel, lanes along its columns, from rows [begin, end) of the weights.
template <int C, Term kTerm, class T>
FEWSTEP_INLINE void gradient_panel(const Geometry<T>& p, const Gradient<T>& io, int64_t panel, int64_t c, int64_t begin,
                                   int64_t end) {
  const int64_t offset = (panel * p.d + c) * kPanel<T>;
  T* out = io.columns + offset;
  Vec<T> acc[C][kWidth], y[C][kWidth];
  for (int i = 0; i < C; ++i) {
    for (int w = 0; w < kWidth; ++w) {
      acc[i][w] = load(out + i * kPanel<T> + w * kLanes<T>);
      y[i][w] = load(p.y + offset + i * kPanel<T> + w * kLanes<T>);
    }
  }
  for (int64_t r = begin; r < end; ++r) {
    const T* x = p.x + (io.first + r) * p.x_stride + c;
    const T* e = io.weights + r * p.stride + panel * kPanel<T>;
    for (int w = 0; w < kWidth; ++w) {
      const Vec<T> weight = load(e + w * kLanes<T>);
      for (int i = 0; i < C; ++i) acc[i][w] += weight * term<kTerm>(y[i][w], splat(x[i]));
    }
  }
  for (int i = 0; i < C; ++i) {
    for (int w = 0; w < kWidth; ++w) store(out + i * kPanel<T> + w * kLanes<T>, acc[i][w]);
  }
}

template <Term kTerm, class T>
void gradient_panels(const Geometry<T>& p, const Gradient<T>& io, int64_t count, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;  // rows whose weights and points stay in the first-level cache
  constexpr int C = kRows > 4 ? 4 : 2;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t before = panel * kPanel<T> - io.first;  // rows of earlier panels
    const int64_t rows = io.self && before < count ? before : count;
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t stop = r + kBlock < rows ? r + kBlock : rows;
      int64_t c = 0;
      for (; c + C <= p.d; c += C) gradient_panel<C, kTerm>(p, io, panel, c, r, stop);
      for (; c < p.d; ++c) gradient_panel<1, kTerm>(p, io, panel, c, r, stop);
    }
  }
}

template <class T>
void gradient_columns(const Geometry<T>& p, const Gradient<T>& io, int64_t count, int64_t begin, int64_t end) {
  switch (term_of(p)) {
    case Term::value:
      return gradient_panels<Term::value>(p, io, count, begin, end);
    case Term::difference:
      return gradient_panels<Term::difference>(p, io, count, begin, end);
    case Term::sign:
      return gradient_panels<Term::sign>(p, io, count, begin, end);
  }
}

template <class T>
void combine(const T* weights, int64_t stride, int64_t n, int64_t m, const T* v, int64_t width, T* out, bool add) {
  int64_t row = 0;
  auto product = [&] {
    return Product<T>{weights + row * stride, stride, m, v, width, width, nullptr, 0, out + row * width, add};
  };
  for (; row + kRows <= n; row += kRows) multiply<kRows, Term::value>(product());
  for (; row < n; ++row) multiply<1, Term::value>(product());
}

}  // namespace
}  // namespace fewstep::cpu::FEWSTEP_ISA
