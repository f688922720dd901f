// Drivers: who computes which rows, in what memory. No arithmetic on pairs happens here.
#include "cpu/sinkhorn.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace fewstep::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

template <class T>
const SinkhornKernels<T>& kernels() {
  auto pick = [](const SinkhornKernels<float>& f, const SinkhornKernels<double>& d) -> const SinkhornKernels<T>& {
    if constexpr (std::is_same_v<T, float>) {
      return f;
    } else {
      return d;
    }
  };
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::avx512:
      return pick(avx512::kFloat, avx512::kDouble);
    case Isa::avx2:
      return pick(avx2::kFloat, avx2::kDouble);
    default:
      break;
  }
#endif
  return pick(base::kFloat, base::kDouble);
}

// Memory aligned to a cache line, grown when asked for more and never initialised.
template <class T>
class Buffer {
 public:
  T* get(int64_t count) {
    if (count > capacity_) {
      const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (!data_) throw std::bad_alloc();
      capacity_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Rows are cut into chunks by their number alone, so that sums, and with them every bit, do not depend on threads.
struct Chunks {
  int64_t count, rows;
};

template <class T>
Chunks chunk_rows(int64_t n) {
  const int64_t wanted = std::clamp<int64_t>(n / 64, 1, 16);
  const int64_t rows = round_up((n + wanted - 1) / wanted, kernels<T>().rows);
  return {(n + rows - 1) / rows, rows};
}

// A distance costs d multiply-adds to recompute and 4 or 8 bytes to read in every pass: measured on a Zen 4 core, about
// 2 multiply-adds per entry from the second-level cache, 4 from the third, 16 from memory.
bool caching_pays(int64_t n, int64_t m_padded, int64_t d, int64_t size) {
  constexpr int64_t kMiB = 1 << 20;
  const int64_t bytes = n * m_padded * size;
  if (bytes <= kMiB) return d > 2;
  if (bytes <= 16 * kMiB) return d > 4;
  return bytes <= 512 * kMiB && d > 16;
}

// Runs problem(b, workspace, threads) for every b. Many problems: a task per thread takes them one by one, serial
// inside. Few: one after the other, with all threads inside.
template <class Workspace, class Problem>
void for_each_problem(int64_t batch, double work, int64_t threads, const Problem& problem) {
  constexpr double kWorthSharing = 5e5;  // multiply-adds, some 10 us
  if (threads == 1 || batch >= 2 * threads || work < kWorthSharing) {
    std::atomic<int64_t> next{0};
    const int64_t tasks = batch * work < kWorthSharing ? 1 : std::min(threads, batch);
    parallel_for(tasks, threads, [&](int64_t) {
      Workspace workspace;
      for (int64_t b = next++; b < batch; b = next++) problem(b, workspace, 1);
    });
  } else {
    Workspace workspace;
    for (int64_t b = 0; b < batch; ++b) problem(b, workspace, threads);
  }
}

template <class T>
struct Workspace {
  Buffer<T> y, cost, h, log2_b, f, f_next, fa, parts, scratch;
  Buffer<uint8_t> bad;
};

template <class T>
Geometry<T> geometry(const Batch<T>& in, int64_t b, Workspace<T>& w) {
  const auto& kernel = kernels<T>();
  const int64_t m_padded = round_up(in.m, kernel.panel);
  T* y = w.y.get(m_padded * in.d);
  kernel.pack(in.y + b * in.m * in.d, in.m, in.d, y);
  const double half = in.cost == Cost::half_sqeuclidean ? 0.5 : 1.0;
  const T k = static_cast<T>(half * kLog2E / static_cast<double>(in.eps[b]));
  return {in.n, in.m, in.d, m_padded, in.x + b * in.n * in.d, y, nullptr, in.cost, k};
}

// k for the user's cost, of which half_sqeuclidean is half the distance that `Geometry::k` multiplies.
template <class T>
double potential_scale(const Geometry<T>& p) {
  return p.cost == Cost::half_sqeuclidean ? 2.0 * p.k : static_cast<double>(p.k);
}

// H = g k + log2 b, padded with -inf; g may be null for zeros.
template <class T>
void scaled_columns(const Geometry<T>& p, const T* b, const T* g, double k, T* log2_b, T* h) {
  constexpr T kEmpty = -std::numeric_limits<T>::infinity();
  for (int64_t j = 0; j < p.m; ++j) {
    const T lb = std::log2(b[j]);
    if (log2_b != nullptr) log2_b[j] = lb;
    h[j] = lb == kEmpty ? kEmpty : static_cast<T>(g == nullptr ? lb : static_cast<double>(g[j]) * k + lb);
  }
  for (int64_t j = p.m; j < p.m_padded; ++j) {
    if (log2_b != nullptr) log2_b[j] = kEmpty;
    h[j] = kEmpty;
  }
}

template <class T>
void solve_one(const Batch<T>& in, const Solve<T>& s, int64_t b, Workspace<T>& w, int64_t threads) {
  const auto& kernel = kernels<T>();
  Geometry<T> p = geometry(in, b, w);
  const double k = potential_scale(p);
  const Chunks chunks = chunk_rows<T>(p.n);
  const int64_t panels = p.m_padded / kernel.panel;
  const T* a = s.a + b * p.n;
  T* log2_b = w.log2_b.get(p.m_padded);
  T* h = w.h.get(p.m_padded);
  T* f = w.f.get(p.n);
  T* f_next = w.f_next.get(p.n);
  T* fa = w.fa.get(p.n);
  T* parts = w.parts.get(chunks.count * p.m_padded);
  T* scratch = w.scratch.get(chunks.count * kernel.rows * p.m_padded);
  uint8_t* bad = w.bad.get(panels);
  scaled_columns(p, in.b + b * p.m, s.g0 == nullptr ? nullptr : s.g0 + b * p.m, k, log2_b, h);

  auto rows_of = [&](int64_t c) { return std::pair{c * chunks.rows, std::min((c + 1) * chunks.rows, p.n)}; };
  if (caching_pays(p.n, p.m_padded, p.d, sizeof(T))) {
    T* cost = w.cost.get(p.n * p.m_padded);
    parallel_for(chunks.count, threads, [&](int64_t c) {
      const auto [begin, end] = rows_of(c);
      kernel.distances(p, begin, end, cost);
    });
    p.cached = cost;
  }

  std::vector<double> errors(chunks.count);
  auto pass = [&](const T* from, bool update) {
    parallel_for(chunks.count, threads, [&](int64_t c) {
      const auto [begin, end] = rows_of(c);
      T* columns = update ? parts + c * p.m_padded : nullptr;
      if (update) std::fill_n(columns, p.m_padded, T(0));
      const RowPass<T> io{h, from, a, f_next, columns, scratch + c * kernel.rows * p.m_padded};
      errors[c] = kernel.row_pass(p, io, begin, end);
    });
    double error = 0;
    for (double e : errors) error += e;
    return error;
  };
  // Own log-sum-exp of the columns of marked panels; where `only_empty`, of those whose weight is zero.
  auto column_lse = [&](T* g, bool only_empty) {
    for (int64_t i = 0; i < p.n; ++i) fa[i] = f[i] + std::log2(a[i]);
    std::vector<int64_t> marked;
    for (int64_t q = 0; q < panels; ++q) {
      if (bad[q]) marked.push_back(q);
    }
    parallel_for(static_cast<int64_t>(marked.size()), threads, [&](int64_t i) {
      alignas(64) T own[64];
      kernel.column_lse(p, fa, marked[i], own);
      for (int64_t j = marked[i] * kernel.panel, c = 0; c < kernel.panel && j < p.m; ++j, ++c) {
        const bool empty = log2_b[j] == -std::numeric_limits<T>::infinity();
        if (empty == only_empty) g[j] = only_empty ? own[c] : own[c] + log2_b[j];
      }
    });
  };

  pass(nullptr, true);
  std::swap(f, f_next);
  T residual;
  int64_t iteration = 1;
  for (;; ++iteration) {
    if (kernel.update_columns(p.m_padded, chunks.count, parts, log2_b, h, bad)) column_lse(h, false);
    const bool last = iteration == s.max_iter;
    residual = static_cast<T>(pass(f, !last));
    if (last || (s.tol >= 0 && residual <= s.tol)) break;
    std::swap(f, f_next);
  }

  double value = 0;
  T* f_out = s.f + b * p.n;
  T* g_out = s.g + b * p.m;
  for (int64_t j = 0; j < p.m; ++j) g_out[j] = h[j] - log2_b[j];
  bool any_empty = false;
  std::fill_n(bad, panels, uint8_t(0));
  for (int64_t j = 0; j < p.m; ++j) {
    if (in.b[b * p.m + j] != 0) continue;
    any_empty = true;
    bad[j / kernel.panel] = 1;
  }
  if (any_empty) column_lse(g_out, true);
  for (int64_t i = 0; i < p.n; ++i) {
    f_out[i] = static_cast<T>(f[i] / k);
    value += static_cast<double>(a[i]) * f_out[i];
  }
  for (int64_t j = 0; j < p.m; ++j) {
    g_out[j] = static_cast<T>(g_out[j] / k);
    value += static_cast<double>(in.b[b * p.m + j]) * g_out[j];
  }
  s.value[b] = static_cast<T>(value);
  s.residual[b] = residual;
  s.iterations[b] = iteration;
}

template <class T>
void apply(const Batch<T>& in, const T* f, const T* g, const T* v, int64_t width, Weight weight, T* out, T* mass,
           int64_t threads) {
  const double work = static_cast<double>(in.n) * in.m * (in.d + width + 16);
  for_each_problem<Workspace<T>>(in.batch, work, threads, [&](int64_t b, Workspace<T>& w, int64_t inner) {
    const auto& kernel = kernels<T>();
    const Geometry<T> p = geometry(in, b, w);
    const double k = potential_scale(p);
    const Chunks chunks = chunk_rows<T>(p.n);
    T* h = w.h.get(p.m_padded);
    T* scaled_f = w.f.get(p.n);
    T* scratch = w.scratch.get(chunks.count * kernel.rows * p.m_padded);
    scaled_columns<T>(p, in.b + b * p.m, g + b * p.m, k, nullptr, h);
    for (int64_t i = 0; i < p.n; ++i) scaled_f[i] = static_cast<T>(static_cast<double>(f[b * p.n + i]) * k);
    parallel_for(chunks.count, inner, [&](int64_t c) {
      const Apply<T> io{h,
                        scaled_f,
                        v + b * p.m * width,
                        width,
                        out + b * p.n * width,
                        mass == nullptr ? nullptr : mass + b * p.n,
                        scratch + c * kernel.rows * p.m_padded};
      kernel.apply_rows(p, io, weight, c * chunks.rows, std::min((c + 1) * chunks.rows, p.n));
    });
  });
}

}  // namespace

template <class T>
void solve(const Batch<T>& in, const Solve<T>& s, int64_t threads) {
  const double work = static_cast<double>(in.n) * in.m * (in.d + 16.0 * s.max_iter);
  for_each_problem<Workspace<T>>(in.batch, work, threads,
                                 [&](int64_t b, Workspace<T>& w, int64_t inner) { solve_one(in, s, b, w, inner); });
}

template <class T>
void transport(const Batch<T>& in, const T* f, const T* g, const T* v, int64_t width, T* out, T* mass,
               int64_t threads) {
  apply(in, f, g, v, width, Weight::plan, out, mass, threads);
}

template <class T>
void gradient(const Batch<T>& in, const T* f, const T* g, const T* a, T* out, int64_t threads) {
  apply<T>(in, f, g, in.y, in.d, Weight::gradient, out, nullptr, threads);
  const T factor = in.cost == Cost::sqeuclidean ? T(2) : T(1);
  for (int64_t i = 0; i < in.batch * in.n; ++i) {
    for (int64_t c = 0; c < in.d; ++c) out[i * in.d + c] *= factor * a[i];
  }
}

template void solve(const Batch<float>&, const Solve<float>&, int64_t);
template void solve(const Batch<double>&, const Solve<double>&, int64_t);
template void transport(const Batch<float>&, const float*, const float*, const float*, int64_t, float*, float*,
                        int64_t);
template void transport(const Batch<double>&, const double*, const double*, const double*, int64_t, double*, double*,
                        int64_t);
template void gradient(const Batch<float>&, const float*, const float*, const float*, float*, int64_t);
template void gradient(const Batch<double>&, const double*, const double*, const double*, double*, int64_t);

}  // namespace fewstep::cpu
