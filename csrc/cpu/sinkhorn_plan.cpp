// Drivers of what is asked of a plan once its potentials are known: products and gradients.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/sinkhorn.h"
#include "cpu/sinkhorn_problem.h"

namespace fewstep::cpu {

// Weights of some rows at a time lie in the third-level cache between two loops, one over rows and one over panels of
// columns, so that no thread needs columns of its own.
template <class T>
void gradients(const Batch<T>& in, const Geometry<T>& p, const Place<T>& at, const T* h, const T* f, bool self,
               T* out_x, T* out_y, Workspace<T>& w, int64_t threads) {
  constexpr int64_t kWeights = 5 << 20;  // bytes
  const auto& kernel = kernels<SinkhornKernels, T>();
  const int64_t d = p.d, panel = kernel.panel, panels = p.m_padded / panel;
  const int64_t step = std::max(kWeights / (p.stride * static_cast<int64_t>(sizeof(T))) / panel, int64_t(1)) * panel;
  int64_t block = panel;
  while (block > 2 && block * 16 > std::min(step, at.n)) block /= 2;
  const T factor = static_cast<T>(slope(in.cost)) * (self ? T(2) : T(1));
  T *a = w.fa.get(at.n), *of_weight = w.f_next.get(at.n);
  for (int64_t i = 0; i < at.n; ++i) {
    a[i] = factor * at.a[i];
    of_weight[i] = a[i] == 0 ? -kInfinity<T> : f[i];  // without, p_ij may be inf
    if (a[i] != 0 && at.a[i] < T(0x1p-60)) {          // or with next to none, where a_i p_ij is not
      a[i] = factor;
      of_weight[i] = f[i] + std::log2(at.a[i]);
    }
  }
  Gradient<T> io{h, of_weight, a, at.y, in.y_row, self, nullptr, 0, out_x, nullptr};
  io.weights = w.weights.get(std::min(step, at.n) * p.stride);
  if (self || out_y != nullptr) {
    io.columns = w.columns.get(p.m_padded * d);
    std::fill_n(io.columns, p.m_padded * d, T(0));
  }
  const int64_t group = std::max(panels / 64, int64_t(1));
  auto over_panels = [&](int64_t first, const auto& body) {
    parallel_for((panels - first + group - 1) / group, threads, [&](int64_t i) {
      const int64_t q = first + i * group;
      body(q, std::min(q + group, panels));
    });
  };
  for (int64_t first = 0; first < at.n; first += step) {
    const int64_t count = std::min(step, at.n - first);
    io.first = first;
    parallel_for((count + block - 1) / block, threads, [&](int64_t i) {
      kernel.gradient_rows(p, io, first + i * block, first + std::min((i + 1) * block, count));
    });
    if (io.columns == nullptr) continue;
    over_panels(self ? first / panel : 0,
                [&](int64_t begin, int64_t end) { kernel.gradient_columns(p, io, count, begin, end); });
  }
  if (io.columns == nullptr) return;
  over_panels(0, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * panel; j < std::min(end * panel, at.m); ++j) {
      const T* from = io.columns + j / panel * panel * d + j % panel;
      T* to = (self ? out_x : out_y) + j * d;
      for (int64_t c = 0; c < d; ++c) to[c] = from[c * panel] + (self ? to[c] : T(0));
    }
  });
}

namespace {

// Potentials of a problem at `place` in units of log2, with its geometry at that temperature.
template <class T>
struct Solved {
  Place<T> at;
  Geometry<T> p;
  T *h, *f;

  Solved(const Batch<T>& in, int64_t q, const T* f_in, const T* g_in, Workspace<T>& w)
      : at(in, q), p(geometry(in, at, w)), h(w.h.get(p.m_padded)), f(w.f.get(at.n)) {
    const double scale = kLog2E / in.eps[q];
    p.k = static_cast<T>(unit(in.cost) * scale);
    for (int64_t j = 0; j < p.m_padded; ++j) {
      const bool empty = j >= at.m || at.b[j] == 0;
      h[j] = empty ? -kInfinity<T> : static_cast<T>(g_in[at.first_g + j] * scale + std::log2(double(at.b[j])));
    }
    for (int64_t i = 0; i < at.n; ++i) f[i] = static_cast<T>(f_in[at.first_f + i] * scale);
  }
};

}  // namespace

template <class T>
void transport(const Batch<T>& in, const T* f, const T* g, const T* v, int64_t v_batch, int64_t width, T* out, T* mass,
               int64_t threads) {
  for_each_problem<Workspace<T>>(
      in.count * in.temperatures, work_of(in, in.d + width + 16.0), threads,
      [&](int64_t q, Workspace<T>& w, int64_t inner) {
        if (Place<T>(in, q).n == 0) return;
        const auto& kernel = kernels<SinkhornKernels, T>();
        const Solved<T> r(in, q, f, g, w);
        const Chunks chunks = chunks_of(kernel, r.at.n);
        T* scratch = w.scratch.get(chunks.count * kernel.rows * r.p.stride);
        const T* source = in.segment_x != nullptr ? v + r.at.point_y * width : v + q * v_batch;
        parallel_for(chunks.count, inner, [&](int64_t c) {
          const Apply<T> io{r.h,
                            r.f,
                            source,
                            width,
                            out + r.at.first_f * width,
                            mass + r.at.first_f,
                            scratch + c * kernel.rows * r.p.stride};
          kernel.apply_rows(r.p, io, c * chunks.rows, std::min((c + 1) * chunks.rows, r.at.n));
        });
      });
}

template <class T>
void gradient(const Batch<T>& in, const T* f, const T* g, T* out_x, T* out_y, int64_t threads) {
  const int64_t products = (out_x != nullptr) + (out_y != nullptr);
  for_each_problem<Workspace<T>>(in.count * in.temperatures, work_of(in, in.d * (1.0 + products) + 16), threads,
                                 [&](int64_t q, Workspace<T>& w, int64_t inner) {
                                   if (Place<T>(in, q).n == 0) return;
                                   const Solved<T> r(in, q, f, g, w);
                                   gradients(in, r.p, r.at, r.h, r.f, false,
                                             out_x == nullptr ? nullptr : out_x + r.at.first_f * in.d,
                                             out_y == nullptr ? nullptr : out_y + r.at.first_g * in.d, w, inner);
                                 });
}

template <class T>
PassResult part_pass(const Batch<T>& in, const PartPass<T>& part, int64_t threads) {
  PassResult total;
  for_each_problem<Workspace<T>>(1, work_of(in, in.d + 16.0), threads, [&](int64_t q, Workspace<T>& w, int64_t inner) {
    const auto& kernel = kernels<SinkhornKernels, T>();
    const Place<T> at(in, q);
    Geometry<T> p = geometry(in, at, w);
    p.k = static_cast<T>(unit(in.cost) * part.scale);
    const int64_t mp = p.m_padded, block = rows_at_once(p.stride, kernel.rows, sizeof(T));
    const Chunks chunks = chunks_of(kernel, at.n);
    T *h = w.h.get(mp), *shift = w.shift.get(at.n), *scratch = w.scratch.get(chunks.count * block * p.stride);
    T* sums = part.columns == nullptr ? nullptr : w.parts.get(chunks.count * mp);
    std::fill(std::copy_n(part.h, at.m, h), h + mp, -kInfinity<T>);
    std::vector<PassResult> results(chunks.count);
    parallel_for(chunks.count, inner, [&](int64_t c) {
      T* columns = sums == nullptr ? nullptr : sums + c * mp;
      if (columns != nullptr) std::fill_n(columns, mp, T(0));
      const RowPass<T> io{h,
                          part.f,
                          at.a,
                          part.update,
                          false,
                          part.f_next,
                          shift,
                          columns,
                          scratch + c * block * p.stride,
                          Store::scratch};
      results[c] = kernel.row_pass(p, io, block, c * chunks.rows, std::min((c + 1) * chunks.rows, at.n));
    });
    for (const PassResult& r : results) {
      total.residual += r.residual;
      total.mass += r.mass;
      total.weight += r.weight;
    }
    if (sums == nullptr) return;
    kernel.add_parts(mp, chunks.count, sums);
    std::copy_n(sums, at.m, part.columns);
  });
  return total;
}

#define FEWSTEP_INSTANTIATE(T)                                                                                    \
  template void gradients(const Batch<T>&, const Geometry<T>&, const Place<T>&, const T*, const T*, bool, T*, T*, \
                          Workspace<T>&, int64_t);                                                                \
  template void transport(const Batch<T>&, const T*, const T*, const T*, int64_t, int64_t, T*, T*, int64_t);      \
  template void gradient(const Batch<T>&, const T*, const T*, T*, T*, int64_t);                                   \
  template PassResult part_pass(const Batch<T>&, const PartPass<T>&, int64_t);
FEWSTEP_INSTANTIATE(float)
FEWSTEP_INSTANTIATE(double)

}  // namespace fewstep::cpu
