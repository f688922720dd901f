// A problem of a batch: where its points and potentials are, its distances, and the memory that a thread has for it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/driver.h"
#include "cpu/sinkhorn.h"

namespace fewstep::cpu {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
Chunks chunks_of(const SinkhornKernels<T>& kernel, int64_t n) {
  return Chunks::of(n, std::max(kernel.rows, kernel.panel));
}

// Rows that are a multiple of 4 KiB apart share their sets of the first-level cache (measured: a pass over kept
// distances of 4096 points takes twice as long).
inline int64_t row_stride(int64_t m_padded, int64_t panel, int64_t size) {
  return m_padded * size % 4096 == 0 ? m_padded + panel : m_padded;
}

// Rows of scratch that stay in the second-level cache beside everything else; a tile of fewer than two reads y too
// often.
inline int64_t rows_at_once(int64_t stride, int64_t rows, int64_t size) {
  constexpr int64_t kScratch = 512 << 10;
  while (rows > 2 && rows * stride * size > kScratch) rows /= 2;
  return rows;
}

template <class T>
struct Workspace {
  Buffer<T> y, cost, label_rows, kernel, h, log2_b, b, a, v, v_next, f, f_next, shift, u, u_next, zero, fa, parts,
      scratch, weights, columns;
  Buffer<uint8_t> bad;
  int64_t cloud = -1;  // whose y, distances and label rows are here

  void release_above(int64_t bytes) {
    cpu::release_above<T>(bytes, {&y, &cost, &label_rows, &kernel, &parts, &scratch, &weights, &columns});
  }
};

// One problem of a batch: its points, weights and where its potentials are.
template <class T>
struct Place {
  int64_t cloud, n, m;
  const T *x, *y, *a, *b;
  int64_t first_f, first_g;  // offsets of its potentials
  int64_t point_x, point_y;  // offsets among the points of all clouds

  Place(const Batch<T>& in, int64_t q) : cloud(q / in.temperatures), n(in.n), m(in.m) {
    const int64_t t = q % in.temperatures;
    int64_t i = 0, j = 0;
    if (in.segment_x != nullptr) {
      i = in.segment_x[cloud];
      j = in.segment_y[cloud];
      n = in.segment_x[cloud + 1] - i;
      m = in.segment_y[cloud + 1] - j;
      first_f = t * in.n + i;
      first_g = t * in.m + j;
    } else {
      first_f = q * in.n;
      first_g = q * in.m;
    }
    const int64_t row = in.segment_x != nullptr ? 0 : cloud;
    x = in.x == nullptr ? nullptr : in.x + row * in.x_batch + i * in.x_row;
    y = in.y == nullptr ? nullptr : in.y + row * in.y_batch + j * in.y_row;
    a = in.a + row * in.a_batch + i;
    b = in.b + row * in.b_batch + j;
    point_x = row * in.n + i;
    point_y = row * in.m + j;
  }
};

// Geometry for temperature 1 / (k unit ln 2), with y packed and labels spread over the columns.
template <class T>
Geometry<T> geometry(const Batch<T>& in, const Place<T>& at, Workspace<T>& w) {
  const auto& kernel = kernels<SinkhornKernels, T>();
  const int64_t m_padded = round_up(at.m, kernel.panel), stride = row_stride(m_padded, kernel.panel, sizeof(T));
  const bool fresh = w.cloud != at.cloud;
  w.cloud = at.cloud;
  Geometry<T> p{at.n,    at.m,    in.d,    m_padded, stride,      at.x,    in.x_row,
                nullptr, nullptr, nullptr, nullptr,  in.diagonal, in.cost, T(0)};
  if (in.cost == Cost::matrix) {
    const T* source = in.matrix + at.cloud * in.n * in.m;
    p.cached = source;
    if (at.m == m_padded && in.diagonal == kNoDiagonal) {
      p.stride = m_padded;
    } else {
      T* copy = w.cost.get(at.n * stride);
      p.cached = copy;
      if (!fresh) return p;
      for (int64_t i = 0; i < at.n; ++i, copy += stride) {
        std::copy_n(source + i * at.m, at.m, copy);
        std::fill(copy + at.m, copy + m_padded, T(0));
        if (in.diagonal == kNoDiagonal) continue;
        const int64_t j = i + in.diagonal;
        if (0 <= j && j < at.m) copy[j] = kInfinity<T>;
      }
    }
    return p;
  }
  T* y = w.y.get(m_padded * in.d);
  p.y = y;
  if (fresh) kernel.pack(at.y, in.y_row, at.m, in.d, y);
  if (in.label_x == nullptr) return p;
  T* rows = w.label_rows.get(in.labels_x * m_padded);
  p.labels = in.label_x + at.point_x;
  p.label_rows = rows;
  if (!fresh) return p;
  const T scale = static_cast<T>(1 / unit(in.cost));
  const int64_t* label_y = in.label_y + at.point_y;
  for (int64_t l = 0; l < in.labels_x; ++l, rows += m_padded) {
    for (int64_t j = 0; j < at.m; ++j) rows[j] = scale * in.label_cost[l * in.labels_y + label_y[j]];
    std::fill(rows + at.m, rows + m_padded, T(0));
  }
  return p;
}

// Multiply-adds of a problem, with `each` for a pair.
template <class T>
double work_of(const Batch<T>& in, double each) {
  const double share = in.segment_x != nullptr ? 1.0 / std::max<int64_t>(in.count, 1) : 1.0;
  return share * in.n * (share * in.m) * each;
}

// Gradients of a problem's value from F and H: into out_x [n, d] and out_y [m, d], each or null; where `self`, that for
// both roles of x into out_x.
template <class T>
void gradients(const Batch<T>& in, const Geometry<T>& p, const Place<T>& at, const T* h, const T* f, bool self,
               T* out_x, T* out_y, Workspace<T>& w, int64_t threads);

}  // namespace fewstep::cpu
