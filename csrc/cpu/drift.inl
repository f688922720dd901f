// Leaf kernels of the drift for one instruction set; see sinkhorn.inl for what may stand here.
#include "cpu/drift.h"
#include "cpu/simd/unit.h"

FEWSTEP_BEGIN_ISA

#include "cpu/simd/math.h"

namespace fewstep::cpu::FEWSTEP_ISA {
namespace {

constexpr int kRowsPerSum = 16;  // rows that are summed in the points' precision

template <class T>
void mean(const T* x, int64_t stride, int64_t n, int64_t d, T* out) {
  // Relative to the first point, so that a far offset loses nothing.
  for (int64_t c = 0; c < d; ++c) out[c] = 0;
  const int64_t whole = d / kLanes<T> * kLanes<T>;
  for (int64_t i = 1; i < n; ++i) {
    const T* row = x + i * stride;
    for (int64_t c = 0; c < whole; c += kLanes<T>) store(out + c, load(out + c) + (load(row + c) - load(x + c)));
    for (int64_t c = whole; c < d; ++c) out[c] += row[c] - x[c];
  }
  for (int64_t c = 0; c < d; ++c) out[c] = x[c] + out[c] / T(n);
}

template <class T>
double moments(const T* x, int64_t stride, int64_t n, int64_t d, const T* centre, const T* w, T* first) {
  double total = 0;
  const int64_t whole = d / kLanes<T> * kLanes<T>;
  for (int64_t i = 0; i < n;) {
    Vec<T> squares = {};
    T tail = 0;
    for (int64_t last = i + kRowsPerSum < n ? i + kRowsPerSum : n; i < last; ++i) {
      const T* row = x + i * stride;
      const T wi = w == nullptr ? T(1) : w[i];
      for (int64_t c = 0; c < whole; c += kLanes<T>) {
        const Vec<T> difference = load(row + c) - load(centre + c), weighted = wi * difference;
        squares += weighted * difference;
        store(first + c, load(first + c) + weighted);
      }
      for (int64_t c = whole; c < d; ++c) {
        const T difference = row[c] - centre[c];
        tail += wi * difference * difference;
        first[c] += wi * difference;
      }
    }
    total += double(sum<T>(squares)) + double(tail);
  }
  return total;
}

template <class T>
void centred(const T* x, int64_t stride, int64_t n, int64_t d, const T* centre, T* out) {
  const int64_t whole = d / kLanes<T> * kLanes<T>;
  for (int64_t i = 0; i < n; ++i, x += stride, out += d) {
    for (int64_t c = 0; c < whole; c += kLanes<T>) store(out + c, load(x + c) - load(centre + c));
    for (int64_t c = whole; c < d; ++c) out[c] = x[c] - centre[c];
  }
}

template <class T>
double weighted_sum(int64_t n, int64_t m, const T* a, const T* w) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i, a += m) {
    Vec<T> row = {};
    for (int64_t j = 0; j < m; j += kLanes<T>) row += load(a + j) * load(w + j);
    total += double(sum<T>(row));
  }
  return total;
}

// Rows whose sums are worked on as one vector.
template <class T>
struct Block {
  alignas(64) T positive[kLanes<T>], negative[kLanes<T>], peak[kLanes<T>], bits[kLanes<T>];
};

template <bool kTiles, class T>
PlanSums weigh(const PlanRows<T>& io, int64_t n) {
  constexpr T kFloor = -Simd<T>::kMaxExponent;  // where a pair is left out and its distance infinite
  constexpr int L = kLanes<T>;
  const int64_t stride = io.m_padded;
  PlanSums result;
  for (int64_t begin = 0; begin < n; begin += L) {
    const int64_t rows = n - begin < L ? n - begin : L;
    Block<T> block;
    for (int r = 0; r < L; ++r) block.positive[r] = block.peak[r] = T(1), block.negative[r] = block.bits[r] = T(0);
    alignas(64) T ui[L] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const T* kernel = kTiles ? io.kernel + begin * stride + r * L : io.kernel + (begin + r) * stride;
      T* e = io.weights + (begin + r) * stride;
      const T* c = io.distances + (begin + r) * stride;
      const T shift = io.shift[begin + r];
      ui[r] = io.u[begin + r];
      Vec<T> sums[2] = {}, best = {}, bits = {};
      for (int half = 0; half < 2; ++half) {
        const int64_t end = half == 0 ? io.positive : stride;
        for (int64_t j = half == 0 ? 0 : io.positive; j < end; j += L) {
          const Vec<T> ej = load(kernel + (kTiles ? j * L : j)) * load(io.v + j);
          const Vec<T> z = at_least(kFloor, (load(io.h + j) + shift) - io.k * load(c + j));
          sums[half] += ej;
          bits += ej * z;
          best = ej > best ? ej : best;
          store(e + j, ej);
        }
      }
      block.positive[r] = sum<T>(sums[0]);
      block.negative[r] = sum<T>(sums[1]);
      block.peak[r] = maximum<T>(best);
      block.bits[r] = sum<T>(bits);
    }
    const Vec<T> positive = load(block.positive), negative = load(block.negative), u = load(ui);
    const Vec<T> total = positive + negative, inverse = T(1) / total;
    Vec<T> entropy = log2<T>(total) - load(block.bits) * inverse, peak = load(block.peak) * inverse;
    Vec<T> error = u * total - T(1);
    for (int64_t r = rows; r < L; ++r) entropy[r] = peak[r] = error[r] = T(0);
    error = error < 0 ? -error : error;
    result.residual += double(sum<T>(error));
    result.entropy += double(sum<T>(entropy));
    result.peak += double(sum<T>(peak));
    alignas(64) T factor[2][L];
    store(factor[0], io.factor * (io.joint ? u * u * negative : inverse));
    store(factor[1], io.factor * (io.joint ? -(u * u) * positive : inverse));
    for (int64_t r = 0; r < rows; ++r) {
      T* e = io.weights + (begin + r) * stride;
      for (int64_t j = 0; j < stride; j += L) store(e + j, load(e + j) * factor[j < io.positive ? 0 : 1][r]);
    }
  }
  return result;
}

template <class T>
PlanSums plan_rows(const PlanRows<T>& io, int64_t n) {
  return io.tiles ? weigh<true>(io, n) : weigh<false>(io, n);
}

// A store that neither reads the line first nor leaves it in a cache. `to` is aligned to a vector.
template <class T>
FEWSTEP_INLINE void stream_out(T* to, Vec<T> v) {
#if FEWSTEP_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif FEWSTEP_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#else
  store(to, v);
#endif
}

template <bool kStream, class T>
double copy_all(int64_t count, const T* from, T* to) {
  constexpr int64_t kPart = 4096;  // summed in the precision of T
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kPart) {
    const int64_t end = begin + kPart < count ? begin + kPart : count;
    Vec<T> sums[4] = {};
    T tail = 0;
    int64_t i = begin;
    for (; i + 4 * kLanes<T> <= end; i += 4 * kLanes<T>) {
      for (int w = 0; w < 4; ++w) {
        const Vec<T> v = load(from + i + w * kLanes<T>);
        sums[w] += v * v;
        kStream ? stream_out(to + i + w * kLanes<T>, v) : store(to + i + w * kLanes<T>, v);
      }
    }
    for (; i < end; ++i) {
      tail += from[i] * from[i];
      to[i] = from[i];
    }
    total += double(sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]))) + double(tail);
  }
  return total;
}

template <class T>
double copy(int64_t count, const T* from, T* to, bool stream) {
  if (!stream || reinterpret_cast<uintptr_t>(to) % FEWSTEP_VECTOR_BYTES != 0) return copy_all<false>(count, from, to);
  const double total = copy_all<true>(count, from, to);
#if FEWSTEP_VECTOR_BYTES >= 32
  _mm_sfence();  // before another thread is told of it
#endif
  return total;
}

template <class T>
void mix(int64_t count, int64_t terms, const T* const* parts, const T* factors, T* out) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    Vec<T> total = factors[0] * load(parts[0] + i);
    for (int64_t t = 1; t < terms; ++t) total += factors[t] * load(parts[t] + i);
    store(out + i, total);
  }
  for (; i < count; ++i) {
    T total = factors[0] * parts[0][i];
    for (int64_t t = 1; t < terms; ++t) total += factors[t] * parts[t][i];
    out[i] = total;
  }
}

template <class T>
constexpr DriftKernels<T> kKernels = {mean<T>, moments<T>, centred<T>, weighted_sum<T>, plan_rows<T>, copy<T>, mix<T>};

}  // namespace

template <>
const DriftKernels<float> Compiled<DriftKernels<float>>::kernels = kKernels<float>;
template <>
const DriftKernels<double> Compiled<DriftKernels<double>>::kernels = kKernels<double>;

}  // namespace fewstep::cpu::FEWSTEP_ISA

FEWSTEP_END_ISA
