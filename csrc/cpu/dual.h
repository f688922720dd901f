// Dual numbers [primal; K tangents] through the layers of a network, and the probes that start and end them.
// A stack is [K + 1, count], the primal first. Kernels, compiled once per instruction set (dual.inl), work on ranges of
// samples or elements that the caller hands to threads: PyTorch's own, which its matrix products between them keep
// warm.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fewstep::cpu {

// In the order of Python's fewstep.reference.dual.ACTIVATIONS: an op's argument `kind` is an index into it.
#define FEWSTEP_ACTIVATIONS(each) \
  each(silu) each(gelu) each(gelu_tanh) each(tanh) each(softplus) each(relu) each(sigmoid)

#define FEWSTEP_NAME(kind) kind,
#define FEWSTEP_ONE(kind) +1
enum class Activation : int64_t { FEWSTEP_ACTIVATIONS(FEWSTEP_NAME) };
constexpr int64_t kActivations = FEWSTEP_ACTIVATIONS(FEWSTEP_ONE);
#undef FEWSTEP_ONE
#undef FEWSTEP_NAME

template <class T>
struct Elementwise {
  Activation kind;
  T beta, threshold;  // of softplus
  int64_t count;      // elements of the primal
  int64_t tangents;
  const T* z;       // [K + 1, count], or [count] where tangents are shared
  const T* shared;  // [K, period], the tangents of every sample; or null
  int64_t period;
  const T* shift;  // added to element e of the primal before anything else: shift[e / inner % channels]; or null
  int64_t channels, inner;
};

// x^ = (x - mean) r (or x r where not centred), r = (mean square + eps)^(-1/2), over rows of n; out = w x^ + b.
template <class T>
struct Norm {
  int64_t rows, n, groups, tangents;
  bool centred;
  double eps;
  const T* z;      // [rows, n]
  const T* u;      // [K, rows, n]
  const T* shift;  // [period, n] added to row i % period of the primal; or null
  int64_t period;
  int64_t inner;    // elements of a row that share a weight
  const T* weight;  // [groups, n / inner] for row i % groups; or null
  const T* bias;    // likewise
};

enum class ProbeKind : int64_t { rademacher, hadamard, gaussian, sphere };
constexpr int64_t kProbeKinds = 4;

// Probe k of sample i has the coordinates [d] drawn from (seed, ids[i], step, stage, k).
struct Probes {
  ProbeKind kind;
  const int64_t* ids;  // [B]; null: the index
  uint64_t seed;
  uint32_t step, stage;
  int64_t batch, count, d;
};

// A matrix whose element (k, j) is at source[k row + j column]. Packed: panels [depth, panel] of columns side by side,
// zeros beyond cols, as `multiply` reads them.
template <class T>
struct Matrix {
  const T* source;
  int64_t row, column, depth, cols;
};

template <class T>
struct DualKernels {
  // out [K + 1, count] = (a(z), a'(z) t_k), elements [begin, end).
  void (*activate)(const Elementwise<T>&, T* out, int64_t begin, int64_t end);
  // gz = (g a' + a'' sum_k g_k t_k, g_k a'), of the shape of z.
  void (*activate_backward)(const Elementwise<T>&, const T* g, T* gz, int64_t begin, int64_t end);
  // Rows [begin, end) to out [rows, n], unless null, and to tangents [K, rows, n].
  void (*normalize)(const Norm<T>&, T* out, T* tangents, int64_t begin, int64_t end);
  // For g and gz [K + 1, rows, n]; adds to the range's own gw, gb [groups, n / inner].
  void (*normalize_backward)(const Norm<T>&, const T* g, T* gz, T* gw, T* gb, int64_t begin, int64_t end);
  // Items i + B k in [begin, end) of [K, B, d] to out [end - begin, d].
  void (*probe)(const Probes&, T* out, int64_t begin, int64_t end);
  // dots [K, B] of the probes with y [K, B, d]; scratch [d].
  void (*probe_dot)(const Probes&, const T* y, T* dots, T* scratch, int64_t begin, int64_t end);
  // out [K, B, d] = g [K, B] times the probes.
  void (*probe_scale)(const Probes&, const T* g, T* out, int64_t begin, int64_t end);
  // Panels [begin, end) of a matrix.
  void (*pack)(const Matrix<T>&, T* panels, int64_t begin, int64_t end);
  // out [rows, cols] = a [rows, depth] m, m [depth, cols] in panels `stride` apart.
  void (*multiply)(const T* a, int64_t lda, int64_t rows, const T* panels, int64_t stride, int64_t depth, int64_t cols,
                   T* out, int64_t ldo);
  // out += a' m for a [depth, rows].
  void (*multiply_turned)(const T* a, int64_t lda, int64_t rows, const T* panels, int64_t stride, int64_t depth,
                          int64_t cols, T* out, int64_t ldo);
  // out[i] = <a_i, b_i> of rows [n].
  void (*dots)(const T* a, const T* b, int64_t rows, int64_t n, T* out);
  int64_t panel;  // columns of one
};

FEWSTEP_KERNELS(DualKernels<float>)
FEWSTEP_KERNELS(DualKernels<double>)

}  // namespace fewstep::cpu
