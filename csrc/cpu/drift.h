// The drift: where couplings with real and with generated points move a group of points. A group is a task that stays
// in one core's caches, from distances over all temperatures and iterations to the velocity (drift.cpp), composed of
// the leaf kernels of sinkhorn.h and of those here, compiled once per instruction set (drift.inl).
#pragma once

#include <cstdint>

#include "cpu/sinkhorn.h"

namespace fewstep::cpu {

// Rows of a plan: A_ij = u_i K_ij v_j, with log2 K_ij = shift_i + h_j - k C_ij as the passes of sinkhorn.h keep it.
template <class T>
struct PlanRows {
  const T* kernel;  // [n_padded, m_padded] K, in tiles or by rows
  bool tiles;
  T* weights;          // [n, m_padded] of the points in the velocity; may be a K by rows
  const T* distances;  // [n, m_padded]
  const T* u;          // [n]
  const T* shift;      // [n]
  const T* v;          // [m_padded], 0 in the padding
  const T* h;          // [m_padded] h_j + log2 v_j, anything finite where v is 0
  T k;
  int64_t m_padded;
  int64_t positive;  // columns of A+, whole panels; the rest are A-
  bool joint;        // weights A+ sum(A-) and -A- sum(A+), or else A / sum(A)
  T factor;          // of the weights
};

// Sums over rows, of |sum_j A_ij - 1|, of the entropy (in bits) and the maximum of A_ij / sum_j A_ij.
struct PlanSums {
  double residual = 0, entropy = 0, peak = 0;
};

template <class T>
struct DriftKernels {
  // Means over n points of x (row i at x + i * stride), into [d].
  void (*mean)(const T* x, int64_t stride, int64_t n, int64_t d, T* out);
  // Adds sum_i w_i (x_i - c) to first [d] and returns sum_i w_i |x_i - c|^2; w null: ones.
  double (*moments)(const T* x, int64_t stride, int64_t n, int64_t d, const T* c, const T* w, T* first);
  // out [n, d] = x_i - c.
  void (*centred)(const T* x, int64_t stride, int64_t n, int64_t d, const T* c, T* out);
  // sum_ij a_ij w_j of a [n, m].
  double (*weighted_sum)(int64_t n, int64_t m, const T* a, const T* w);
  PlanSums (*plan_rows)(const PlanRows<T>&, int64_t n);
  // Copies, past the caches where `stream`, and returns the sum of squares.
  double (*copy)(int64_t count, const T* from, T* to, bool stream);
  // out = sum_t factors_t parts_t; out may be one of the parts.
  void (*mix)(int64_t count, int64_t terms, const T* const* parts, const T* factors, T* out);
};

FEWSTEP_KERNELS(DriftKernels<float>)
FEWSTEP_KERNELS(DriftKernels<double>)

// A cloud of each group: point i of group g at data + g * batch + i * row.
template <class T>
struct Cloud {
  const T* data;
  int64_t count, batch, row;
};

template <class T>
struct Drift {
  int64_t groups, d, temperatures;
  Cloud<T> x;
  Cloud<T> clouds[3];  // y, x_self, uncond
  int64_t cloud_count;
  const T* weights;   // [groups, points of all clouds], relative
  const T* guidance;  // [groups]
  const T* eps;       // [temperatures]
  Cost cost;
  int64_t max_iter;
  bool joint, scaled, unit;
  int64_t diagonal;              // of the pairs of x and x_self
  int64_t memory_limit;          // bytes that kept distances and kernels may take in each thread
  T* velocity;                   // [temperatures, groups, n, d], or [groups, n, d] where `unit`
  T* scale;                      // []
  T* rms;                        // [temperatures]
  T *residual, *entropy, *peak;  // [temperatures, groups, plans]
};

template <class T>
void drift(const Drift<T>&, int64_t threads);

}  // namespace fewstep::cpu
