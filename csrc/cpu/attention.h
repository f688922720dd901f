// Attention of dual numbers: a primal and K tangents share one softmax, and no matrix N x M exists. Kernels
// (attention.inl) work on blocks of rows against blocks of columns, with running sums; the drivers (attention.cpp)
// hand heads and blocks of rows to threads.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fewstep::cpu {

// s = scale q k' + mask, p = softmax(s), out = p v, r = <p, ds> by rows, and with ds = scale (dq k' + q dk'):
// moved = (p ds) v - r out + p dv. All are contiguous, [batch, heads, n, d] and [batch, groups, m, d or dv], those of
// tangents [K, ...]; heads / groups heads in a row share keys and values. A null tangent is zero.
template <class T>
struct Attention {
  int64_t batch, heads, groups, n, m, d, dv, tangents;
  const T *q, *k, *v, *tq, *tk, *tv;
  const bool* keep;   // attends where true; or null
  const T* bias;      // added to s; or null
  int64_t stride[4];  // of either mask over [batch, heads, n, m]
  bool causal;        // row i attends to columns up to i
  T scale;
};

// What backward keeps of a row: log2 of its sum of e^s, infinite where it attends to nothing, [batch, heads, n]; and
// r, [K, batch, heads, n].
template <class T>
struct Attended {
  T *out, *moved, *lse, *mean;
};

template <class T>
struct AttentionGrads {
  const T *out, *moved, *lse, *mean, *go, *gt;
  T *q, *k, *v, *tq, *tk, *tv;
};

// Where panels of a head's matrices begin in memory; -1: it is not there.
struct AttentionPanels {
  int64_t keys, tangent_keys, values, tangent_values;  // of k' and v, or in backward of v'
  int64_t key_rows, tangent_key_rows;                  // of k, in backward
  int64_t per_key, per_key_row, per_value, per_total;  // their sizes, for each tangent one
};

template <class T>
struct AttentionKernels {
  // Elements that a group's panels, and a thread's blocks, take.
  AttentionPanels (*panels)(const Attention<T>&, bool backward);
  int64_t (*scratch)(const Attention<T>&, bool backward);
  void (*pack)(const Attention<T>&, const AttentionPanels&, bool backward, int64_t group, T* packed);
  // Rows [begin, end) of a head, at most `rows`.
  void (*forward)(const Attention<T>&, const AttentionPanels&, const T* packed, int64_t head, int64_t begin,
                  int64_t end, const Attended<T>&, T* scratch);
  // Writes gradients for the rows, and adds to those of keys and values [K + 1, m, d] and [K + 1, m, dv].
  void (*backward)(const Attention<T>&, const AttentionPanels&, const T* packed, int64_t head, int64_t begin,
                   int64_t end, const AttentionGrads<T>&, T* gk, T* gv, T* scratch);
  int64_t rows, panel;  // the most rows of a block; columns of a panel
};

FEWSTEP_KERNELS(AttentionKernels<float>)
FEWSTEP_KERNELS(AttentionKernels<double>)

template <class T>
void attention(const Attention<T>& in, const Attended<T>& out, int64_t threads);

template <class T>
void attention_backward(const Attention<T>& in, const AttentionGrads<T>& grads, int64_t threads);

}  // namespace fewstep::cpu
