// Kernels of attention.h for one instruction set; see sinkhorn.inl for what may stand here.
#include "cpu/attention.h"
#include "cpu/dual.h"
#include "cpu/simd/unit.h"

FEWSTEP_BEGIN_ISA

#include "cpu/simd/math.h"
#include "cpu/simd/product.h"

namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

// A block of scores, its tangent and what backward needs stay in the second-level cache, a panel in the first.
constexpr int64_t kRows = 8 * kMostRows > 96 ? 8 * kMostRows : 96;
constexpr int64_t kBlock = 128;
// Apart from powers of 2: rows would share sets of the first-level cache.
template <class T>
constexpr int64_t kRowStep = kBlock + kLanes<T>;
template <class T>
constexpr T kLog2e = 1.4426950408889634074;
template <class T>
constexpr T kLowest = sizeof(T) == 4 ? -120 : -1000;

template <class T>
int64_t whole_panels(int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

// 2^z, and 0 below the smallest that counts beside 1, -inf among them.
template <class T>
FEWSTEP_INLINE Vec<T> power(Vec<T> z) {
  const Vec<T> e = exp2<T>(at_least<T>(kLowest<T>, z));
  return z < kLowest<T> ? Vec<T>{} : e;
}

// p v, and 0 where p is: what is masked out counts for nothing, NaN too.
template <class T>
FEWSTEP_INLINE Vec<T> weighed(Vec<T> p, Vec<T> v) {
  return p == T(0) ? Vec<T>{} : p * v;
}

template <class T>
FEWSTEP_INLINE T power_of(T z) {
  return power<T>(splat(z))[0];
}

template <class T>
FEWSTEP_INLINE T largest(Vec<T> v) {
#if FEWSTEP_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return _mm512_reduce_max_ps(v);
  } else {
    return _mm512_reduce_max_pd(v);
  }
#else
  return maximum<T>(v);
#endif
}

// One product of a sum: rows `a` of lda times panels that are `stride` apart.
template <class T>
struct Term {
  const T* a;
  int64_t lda;
  const T* panels;
  int64_t stride, depth;
};

template <int R, int kTerms, bool kTurned, bool kAdd, class T>
void sum_tile(const Term<T>* terms, int64_t row, int64_t panel, T* out, int64_t ldo) {
  Vec<T> acc[R][kColumns];
  clear<R, T>(acc);
#pragma GCC unroll 2
  for (int t = 0; t < kTerms; ++t) {
    const Term<T>& m = terms[t];
    accumulate<R, kTurned, T>(m.a + (kTurned ? row : row * m.lda), m.lda, m.panels + panel * m.stride, m.depth, acc);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) {
      T* at = out + r * ldo + c * kLanes<T>;
      store(at, kAdd ? load(at) + acc[r][c] : acc[r][c]);
    }
  }
}

template <int R, int kTerms, bool kTurned, bool kAdd, class T>
FEWSTEP_INLINE void sum_rows(int64_t rows, const Term<T>* terms, int64_t row, int64_t panel, T* out, int64_t ldo) {
  if (rows == R) return sum_tile<R, kTerms, kTurned, kAdd>(terms, row, panel, out, ldo);
  if constexpr (R > 1) sum_rows<R - 1, kTerms, kTurned, kAdd>(rows, terms, row, panel, out, ldo);
}

// out (+)= the sum of the terms over whole panels: `cols` is rounded up, and memory is there.
template <int kTerms, bool kTurned, bool kAdd, class T>
void add_up(const Term<T> (&terms)[kTerms], int64_t rows, int64_t cols, T* out, int64_t ldo) {
  const int64_t blocks = (rows + kMostRows - 1) / kMostRows;
  for (int64_t panel = 0; panel * kPanel<T> < cols; ++panel) {
    for (int64_t block = 0, i = 0; block < blocks; ++block) {
      const int64_t own = (rows - i) / (blocks - block);
      sum_rows<kMostRows, kTerms, kTurned, kAdd>(own, terms, i, panel, out + i * ldo + panel * kPanel<T>, ldo);
      i += own;
    }
  }
}

template <class T>
AttentionPanels panels(const Attention<T>& in, bool backward) {
  AttentionPanels p = {-1, -1, -1, -1, -1, -1, 0, 0, 0, 0};
  int64_t at = 0;
  auto place = [&](bool there, int64_t copies, int64_t size) {
    const int64_t from = at;
    if (there) at += copies * size;
    return there ? from : -1;
  };
  // Keys as columns, or as rows of a product; values likewise.
  p.per_key = whole_panels<T>(in.m) * in.d;
  p.per_key_row = in.m * whole_panels<T>(in.d);
  p.per_value = backward ? whole_panels<T>(in.m) * in.dv : in.m * whole_panels<T>(in.dv);
  p.keys = place(true, 1, p.per_key);
  p.tangent_keys = place(in.tk != nullptr, in.tangents, p.per_key);
  p.values = place(true, 1, p.per_value);
  p.tangent_values = place(in.tv != nullptr, in.tangents, p.per_value);
  p.key_rows = place(backward, 1, p.per_key_row);
  p.tangent_key_rows = place(backward && in.tk != nullptr, in.tangents, p.per_key_row);
  p.per_total = at;
  return p;
}

// Panels of a matrix [depth, cols], or of the transpose of [cols, depth].
template <class T>
void pack_rows(const T* from, int64_t depth, int64_t cols, T* out) {
  pack<T>({from, cols, 1, depth, cols}, out, 0, whole_panels<T>(cols) / kPanel<T>);
}
template <class T>
void pack_columns(const T* from, int64_t depth, int64_t cols, T* out) {
  pack<T>({from, 1, depth, depth, cols}, out, 0, whole_panels<T>(cols) / kPanel<T>);
}

template <class T>
void pack_group(const Attention<T>& in, const AttentionPanels& p, bool backward, int64_t group, T* packed) {
  const int64_t all = in.batch * in.groups;
  for (int64_t k = -1; k < in.tangents; ++k) {
    const T* key = k < 0 ? in.k : in.tk;
    if (key != nullptr) {
      key += ((k < 0 ? 0 : k * all) + group) * in.m * in.d;
      T* columns = packed + (k < 0 ? p.keys : p.tangent_keys + k * p.per_key);
      pack_columns(key, in.d, in.m, columns);
      if (backward) pack_rows(key, in.m, in.d, packed + (k < 0 ? p.key_rows : p.tangent_key_rows + k * p.per_key_row));
    }
    const T* value = k < 0 ? in.v : in.tv;
    if (value != nullptr) {
      value += ((k < 0 ? 0 : k * all) + group) * in.m * in.dv;
      T* to = packed + (k < 0 ? p.values : p.tangent_values + k * p.per_value);
      backward ? pack_columns(value, in.dv, in.m, to) : pack_rows(value, in.m, in.dv, to);
    }
  }
}

// A thread's own memory, piece by piece.
template <class T>
struct Pieces {
  T* at;
  int64_t taken = 0;
  T* take(int64_t count) {
    T* from = at != nullptr ? at + taken : nullptr;
    taken += (count + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
    return from;
  }
};

// A block of rows: scaled queries, scores and running sums.
template <class T>
struct Rows {
  T *q, *tq, *s, *w, *o, *ot, *top, *total, *mean;

  Rows(const Attention<T>& in, Pieces<T>& from) {
    const int64_t tangents = in.tangents, wide = whole_panels<T>(in.dv);
    q = from.take(kRows * in.d);
    tq = from.take(tangents * kRows * in.d);
    s = from.take(kRows * kRowStep<T>);
    w = from.take(tangents * kRows * kRowStep<T>);
    o = from.take(kRows * wide);
    ot = from.take(tangents * kRows * wide);
    top = from.take(kRows);
    total = from.take(kRows);
    mean = from.take(tangents * kRows);
  }
};

template <class T>
struct BackRows {
  T *q, *tq, *q_panels, *tq_panels, *go_panels, *gt_panels, *p, *b, *x, *a, *gq, *gtq, *delta, *along;

  BackRows(const Attention<T>& in, Pieces<T>& from) {
    const int64_t tangents = in.tangents, wide = whole_panels<T>(in.d), block = kRows * kRowStep<T>;
    q = from.take(kRows * in.d);
    tq = from.take(tangents * kRows * in.d);
    q_panels = from.take(kRows * wide);
    tq_panels = from.take(tangents * kRows * wide);
    go_panels = from.take(kRows * whole_panels<T>(in.dv));
    gt_panels = from.take(tangents * kRows * whole_panels<T>(in.dv));
    p = from.take(block);
    b = from.take(block);
    x = from.take(block);
    a = from.take(block);
    gq = from.take(kRows * wide);
    gtq = from.take(tangents * kRows * wide);
    delta = from.take(kRows);
    along = from.take(tangents * kRows);
  }
};

template <class T>
int64_t scratch(const Attention<T>& in, bool backward) {
  Pieces<T> pieces{nullptr};
  if (backward) {
    BackRows<T>(in, pieces);
  } else {
    Rows<T>(in, pieces);
  }
  return pieces.taken;
}

template <class T>
void fill(T* p, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

template <class T>
void scaled(const T* from, int64_t n, T factor, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = factor * from[i];
}

// Scores of rows from i0 of a head and columns from j0, and its tangents' where `tangent` counts from 0.
template <class T>
void scores(const Attention<T>& in, const AttentionPanels& p, const T* packed, const T* q, int64_t rows, int64_t j0,
            int64_t cols, T* s) {
  const Term<T> terms[] = {{q, in.d, packed + p.keys + j0 * in.d, kPanel<T> * in.d, in.d}};
  add_up<1, false, false>(terms, rows, cols, s, kRowStep<T>);
}

template <class T>
void tangent_scores(const Attention<T>& in, const AttentionPanels& p, const T* packed, const T* q, const T* tq,
                    int64_t tangent, int64_t rows, int64_t j0, int64_t cols, T* s) {
  const int64_t step = kPanel<T> * in.d;
  const Term<T> by_query = {tq + tangent * kRows * in.d, in.d, packed + p.keys + j0 * in.d, step, in.d};
  const Term<T> by_key = {q, in.d, packed + p.tangent_keys + tangent * p.per_key + j0 * in.d, step, in.d};
  if (in.tq != nullptr && in.tk != nullptr) {
    const Term<T> terms[] = {by_query, by_key};
    add_up<2, false, false>(terms, rows, cols, s, kRowStep<T>);
  } else {
    const Term<T> terms[] = {in.tq != nullptr ? by_query : by_key};
    add_up<1, false, false>(terms, rows, cols, s, kRowStep<T>);
  }
}

template <class T>
void mask(const Attention<T>& in, int64_t head, int64_t i0, int64_t rows, int64_t j0, int64_t cols, T* s) {
  constexpr T kNever = -__builtin_inff();
  const int64_t step = in.stride[3], wide = whole_panels<T>(cols);
  for (int64_t i = i0; i < i0 + rows; ++i, s += kRowStep<T>) {
    const int64_t at = head / in.heads * in.stride[0] + head % in.heads * in.stride[1] + i * in.stride[2] + j0 * step;
    if (in.bias != nullptr) {
      const T* own = in.bias + at;
      if (step == 1) {
        for (int64_t j = 0; j < cols; ++j) s[j] += own[j];
      } else {
        for (int64_t j = 0; j < cols; ++j) s[j] += own[j * step];
      }
    }
    if (in.keep != nullptr) {
      const bool* own = in.keep + at;
      if (step == 1) {
        for (int64_t j = 0; j < cols; ++j) s[j] = own[j] ? s[j] : kNever;
      } else {
        for (int64_t j = 0; j < cols; ++j) s[j] = own[j * step] ? s[j] : kNever;
      }
    }
    int64_t from = cols;
    if (in.causal && i + 1 - j0 < from) from = i + 1 > j0 ? i + 1 - j0 : 0;
    for (int64_t j = from; j < wide; ++j) s[j] = kNever;
  }
}

// Rows of o times a factor.
template <class T>
FEWSTEP_INLINE void rescale(T* o, int64_t n, T factor) {
  for (int64_t c = 0; c < n; c += kLanes<T>) store(o + c, factor * load(o + c));
}

// Scores to e^(s - top), their tangents times it; running sums follow the new largest score.
template <class T>
void soften(const Attention<T>& in, const Rows<T>& own, bool moves, int64_t rows, int64_t cols) {
  constexpr T kNever = -__builtin_inff();
  const int64_t wide = whole_panels<T>(cols), out = whole_panels<T>(in.dv), tangents = in.tangents;
  for (int64_t i = 0; i < rows; ++i) {
    T* s = own.s + i * kRowStep<T>;
    Vec<T> best = load(s);
    for (int64_t j = kLanes<T>; j < wide; j += kLanes<T>) {
      const Vec<T> v = load(s + j);
      best = v > best ? v : best;
    }
    const T found = largest<T>(best) * kLog2e<T>, before = own.top[i];
    const T top = found > before ? found : before, shift = top == kNever ? T(0) : top;
    if (top != before) {
      const T factor = power_of<T>(before - shift);
      own.top[i] = top;
      own.total[i] *= factor;
      rescale(own.o + i * out, out, factor);
      for (int64_t k = 0; k < tangents; ++k) {
        own.mean[k * kRows + i] *= factor;
        rescale(own.ot + (k * kRows + i) * out, out, factor);
      }
    }
    Vec<T> total = {};
    for (int64_t j = 0; j < wide; j += kLanes<T>) {
      const Vec<T> e = power<T>(load(s + j) * kLog2e<T> - shift);
      total += e;
      store(s + j, e);
    }
    own.total[i] += sum<T>(total);
    if (!moves) continue;
    for (int64_t k = 0; k < tangents; ++k) {
      T* w = own.w + (k * kRows + i) * kRowStep<T>;
      Vec<T> mean = {};
      for (int64_t j = 0; j < wide; j += kLanes<T>) {
        const Vec<T> v = weighed<T>(load(s + j), load(w + j));
        mean += v;
        store(w + j, v);
      }
      own.mean[k * kRows + i] += sum<T>(mean);
    }
  }
}

template <class T>
void forward(const Attention<T>& in, const AttentionPanels& p, const T* packed, int64_t head, int64_t begin,
             int64_t end, const Attended<T>& to, T* memory) {
  constexpr T kNever = -__builtin_inff();
  Pieces<T> pieces{memory};
  const Rows<T> own(in, pieces);
  const int64_t rows = end - begin, wide = whole_panels<T>(in.dv), first = head * in.n + begin;
  const int64_t all = in.batch * in.heads * in.n, step = in.m * kPanel<T>;
  const bool moves = in.tq != nullptr || in.tk != nullptr;
  scaled(in.q + first * in.d, rows * in.d, in.scale, own.q);
  fill(own.top, rows, kNever);
  fill(own.total, rows, T(0));
  fill(own.o, rows * wide, T(0));
  for (int64_t k = 0; k < in.tangents; ++k) {
    if (in.tq != nullptr) {
      scaled(in.tq + (k * all + first) * in.d, rows * in.d, in.scale, own.tq + k * kRows * in.d);
    }
    fill(own.mean + k * kRows, rows, T(0));
    fill(own.ot + k * kRows * wide, rows * wide, T(0));
  }
  const int64_t last = in.causal && end < in.m ? end : in.m;
  for (int64_t j0 = 0; j0 < last; j0 += kBlock) {
    const int64_t cols = last - j0 < kBlock ? last - j0 : kBlock;
    scores(in, p, packed, own.q, rows, j0, cols, own.s);
    mask(in, head, begin, rows, j0, cols, own.s);
    if (moves) {
      for (int64_t k = 0; k < in.tangents; ++k) {
        tangent_scores(in, p, packed, own.q, own.tq, k, rows, j0, cols, own.w + k * kRows * kRowStep<T>);
      }
    }
    soften(in, own, moves, rows, cols);
    const T* values = packed + p.values + j0 * kPanel<T>;
    const Term<T> plain[] = {{own.s, kRowStep<T>, values, step, cols}};
    add_up<1, false, true>(plain, rows, in.dv, own.o, wide);
    for (int64_t k = 0; k < in.tangents; ++k) {
      T* out = own.ot + k * kRows * wide;
      if (moves) {
        const Term<T> moved[] = {{own.w + k * kRows * kRowStep<T>, kRowStep<T>, values, step, cols}};
        add_up<1, false, true>(moved, rows, in.dv, out, wide);
      }
      if (in.tv != nullptr) {
        const T* tangent = packed + p.tangent_values + k * p.per_value + j0 * kPanel<T>;
        const Term<T> moved[] = {{own.s, kRowStep<T>, tangent, step, cols}};
        add_up<1, false, true>(moved, rows, in.dv, out, wide);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const bool nothing = own.total[i] == 0;
    const T inverse = nothing ? T(0) : 1 / own.total[i];
    to.lse[first + i] = nothing ? -kNever : own.top[i] + T(__builtin_log2(double(own.total[i])));
    T* out = to.out + (first + i) * in.dv;
    for (int64_t c = 0; c < in.dv; ++c) out[c] = own.o[i * wide + c] * inverse;
    for (int64_t k = 0; k < in.tangents; ++k) {
      const T mean = own.mean[k * kRows + i] * inverse;
      const T* from = own.ot + (k * kRows + i) * wide;
      T* moved = to.moved + (k * all + first + i) * in.dv;
      to.mean[k * all + first + i] = mean;
      for (int64_t c = 0; c < in.dv; ++c) moved[c] = from[c] * inverse - mean * out[c];
    }
  }
}

template <class T>
FEWSTEP_INLINE T inner(const T* a, const T* b, int64_t n) {
  Vec<T> total = {};
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) total += load(a + j) * load(b + j);
  T rest = sum<T>(total);
  for (; j < n; ++j) rest += a[j] * b[j];
  return rest;
}

template <class T>
void backward(const Attention<T>& in, const AttentionPanels& p, const T* packed, int64_t head, int64_t begin,
              int64_t end, const AttentionGrads<T>& g, T* gk, T* gv, T* memory) {
  Pieces<T> pieces{memory};
  const BackRows<T> own(in, pieces);
  const int64_t rows = end - begin, d = in.d, dv = in.dv, first = head * in.n + begin;
  const int64_t all = in.batch * in.heads * in.n, wide = whole_panels<T>(d), wide_v = whole_panels<T>(dv);
  const int64_t step_q = rows * kPanel<T>, step_k = in.m * kPanel<T>, step_v = kPanel<T> * dv;
  const bool moves = in.tq != nullptr || in.tk != nullptr;
  const T* go = g.go + first * dv;
  scaled(in.q + first * d, rows * d, in.scale, own.q);
  pack_rows(own.q, rows, d, own.q_panels);
  pack_rows(go, rows, dv, own.go_panels);
  fill(own.gq, rows * wide, T(0));
  for (int64_t i = 0; i < rows; ++i) own.delta[i] = inner(go + i * dv, g.out + (first + i) * dv, dv);
  for (int64_t k = 0; k < in.tangents; ++k) {
    const int64_t from = k * all + first;
    if (in.tq != nullptr) {
      scaled(in.tq + from * d, rows * d, in.scale, own.tq + k * kRows * d);
      pack_rows(own.tq + k * kRows * d, rows, d, own.tq_panels + k * kRows * wide);
      fill(own.gtq + k * kRows * wide, rows * wide, T(0));
    }
    const T* gt = g.gt + from * dv;
    pack_rows(gt, rows, dv, own.gt_panels + k * kRows * wide_v);
    for (int64_t i = 0; i < rows; ++i) {
      const T along = inner(gt + i * dv, g.out + (first + i) * dv, dv);
      own.along[k * kRows + i] = along;
      own.delta[i] += inner(gt + i * dv, g.moved + (from + i) * dv, dv) - g.mean[from + i] * along;
    }
  }
  const int64_t last = in.causal && end < in.m ? end : in.m;
  for (int64_t j0 = 0; j0 < last; j0 += kBlock) {
    const int64_t cols = last - j0 < kBlock ? last - j0 : kBlock, width = whole_panels<T>(cols);
    // rows x cols by panels of keys or values, rows x d by rows of keys, cols x d or dv by panels of rows.
    auto by_values = [&](const T* a, int64_t panels, T* out, auto add) {
      const Term<T> terms[] = {{a, dv, packed + panels + j0 * dv, step_v, dv}};
      add_up<1, false, add.kWhole>(terms, rows, cols, out, kRowStep<T>);
    };
    auto by_keys = [&](const T* a, int64_t panels, T* out) {
      const Term<T> terms[] = {{a, kRowStep<T>, packed + panels + j0 * kPanel<T>, step_k, cols}};
      add_up<1, false, true>(terms, rows, d, out, wide);
    };
    auto turned = [&](const T* a, const T* panels, int64_t n, T* out) {
      const Term<T> terms[] = {{a, kRowStep<T>, panels, step_q, rows}};
      add_up<1, true, true>(terms, cols, n, out + j0 * whole_panels<T>(n), whole_panels<T>(n));
    };
    scores(in, p, packed, own.q, rows, j0, cols, own.p);
    mask(in, head, begin, rows, j0, cols, own.p);
    by_values(go, p.values, own.b, Part{});
    for (int64_t i = 0; i < rows; ++i) {
      T* s = own.p + i * kRowStep<T>;
      for (int64_t j = 0; j < width; j += kLanes<T>) {
        store(s + j, power<T>(load(s + j) * kLog2e<T> - g.lse[first + i]));
      }
    }
    for (int64_t k = 0; k < in.tangents; ++k) {
      const T* gt = g.gt + (k * all + first) * dv;
      const T* gt_panels = own.gt_panels + k * kRows * wide_v;
      if (in.tv != nullptr) {
        by_values(gt, p.tangent_values + k * p.per_value, own.b, Whole{});
        turned(own.p, gt_panels, dv, gv + (k + 1) * in.m * wide_v);
      }
      if (!moves) continue;
      by_values(gt, p.values, own.a, Part{});
      tangent_scores(in, p, packed, own.q, own.tq, k, rows, j0, cols, own.x);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = i * kRowStep<T>;
        const T mean = g.mean[k * all + first + i], along = own.along[k * kRows + i];
        for (int64_t j = at; j < at + width; j += kLanes<T>) {
          const Vec<T> e = load(own.p + j), x = load(own.x + j), a = load(own.a + j);
          store(own.b + j, load(own.b + j) + (x - mean) * a - x * along);
          store(own.x + j, weighed<T>(e, x - mean));
          store(own.a + j, weighed<T>(e, a - along));
        }
      }
      turned(own.x, gt_panels, dv, gv);
      if (in.tk != nullptr) {
        by_keys(own.a, p.tangent_key_rows + k * p.per_key_row, own.gq);
        turned(own.a, own.q_panels, d, gk + (k + 1) * in.m * wide);
      }
      if (in.tq != nullptr) {
        by_keys(own.a, p.key_rows, own.gtq + k * kRows * wide);
        turned(own.a, own.tq_panels + k * kRows * wide, d, gk);
      }
    }
    turned(own.p, own.go_panels, dv, gv);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = i * kRowStep<T>;
      for (int64_t j = at; j < at + width; j += kLanes<T>) {
        store(own.b + j, weighed<T>(load(own.p + j), load(own.b + j) - own.delta[i]));
      }
    }
    by_keys(own.b, p.key_rows, own.gq);
    turned(own.b, own.q_panels, d, gk);
  }
  for (int64_t i = 0; i < rows; ++i) {
    scaled(own.gq + i * wide, d, in.scale, g.q + (first + i) * d);
    for (int64_t k = 0; k < in.tangents && in.tq != nullptr; ++k) {
      scaled(own.gtq + (k * kRows + i) * wide, d, in.scale, g.tq + (k * all + first + i) * d);
    }
  }
}

template <class T>
constexpr AttentionKernels<T> kKernels = {panels<T>,   scratch<T>, pack_group<T>, forward<T>,
                                          backward<T>, kRows,      kPanel<T>};

}  // namespace

template <>
const AttentionKernels<float> Compiled<AttentionKernels<float>>::kernels = kKernels<float>;
template <>
const AttentionKernels<double> Compiled<AttentionKernels<double>>::kernels = kKernels<double>;

}  // namespace fewstep::cpu::FEWSTEP_ISA

FEWSTEP_END_ISA
