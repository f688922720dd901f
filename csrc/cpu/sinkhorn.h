// Sinkhorn on the CPU. A leaf kernel is compiled once per instruction set (sinkhorn.inl); the drivers in
// sinkhorn.cpp hand rows to them. Potentials are kept in base 2: F_i = f_i k and H_j = g_j k + log2 b_j with
// k = log2(e) / eps, so that a conditional plan entry is p_ij = exp2(F_i + H_j - k C_ij) = P_ij / a_i.
#pragma once

#include <cstdint>

namespace fewstep::cpu {

enum class Cost : int64_t { sqeuclidean = 0, half_sqeuclidean = 1, euclidean = 2 };

// What the leaf kernels know of one problem. A panel is the columns that a register tile covers.
template <class T>
struct Geometry {
  int64_t n, m, d;
  int64_t m_padded;  // m rounded up to whole panels; padding has H = -inf
  const T* x;        // [n, d]
  const T* y;        // [m_padded / panel, d, panel]
  const T* cached;   // [n, m_padded] distances, or null: recomputed from x and y
  Cost cost;
  T k;  // turns a distance (squared, or not for euclidean) into units of log2
};

template <class T>
struct RowPass {
  const T* h;  // [m_padded]
  const T* f;  // [n], or null on the first pass
  const T* a;  // [n]
  T* f_next;   // [n]
  T* columns;  // [m_padded], increased by the column sums of the plan; null for the residual alone
  T* scratch;  // [rows, m_padded]
};

enum class Weight { plan, gradient };

template <class T>
struct Apply {
  const T* h;  // [m_padded]
  const T* f;  // [n]
  const T* v;  // [m, width]; the points y themselves for Weight::gradient
  int64_t width;
  T* out;      // [n, width]
  T* mass;     // [n], or null
  T* scratch;  // [rows, m_padded]
};

template <class T>
struct SinkhornKernels {
  int64_t panel;  // columns of a register tile
  int64_t rows;   // rows of a register tile

  // Transposes y [m, d] into panels; padded columns repeat the last point.
  void (*pack)(const T* y, int64_t m, int64_t d, T* out);
  // Distances of rows [begin, end) into out [n, m_padded].
  void (*distances)(const Geometry<T>&, int64_t begin, int64_t end, T* out);
  // One pass over rows [begin, end): F from H, column sums for the new H, and the part of the L1 row error before it.
  double (*row_pass)(const Geometry<T>&, const RowPass<T>&, int64_t begin, int64_t end);
  // H from the sums of `parts` [count, m_padded]; marks in `bad` [panels] where a sum underflowed.
  bool (*update_columns)(int64_t m_padded, int64_t count, const T* parts, const T* log2_b, T* h, uint8_t* bad);
  // G_j = -log2 sum_i a_i exp2(F_i - k C_ij) for one panel; fa = F + log2 a.
  void (*column_lse)(const Geometry<T>&, const T* fa, int64_t panel_index, T* g);
  // out_i = sum_j p_ij v_j, or sum_j p_ij c'(C_ij) (x_i - y_j) for the gradient.
  void (*apply_rows)(const Geometry<T>&, const Apply<T>&, Weight, int64_t begin, int64_t end);
};

namespace base {
extern const SinkhornKernels<float> kFloat;
extern const SinkhornKernels<double> kDouble;
}  // namespace base
namespace avx2 {
extern const SinkhornKernels<float> kFloat;
extern const SinkhornKernels<double> kDouble;
}  // namespace avx2
namespace avx512 {
extern const SinkhornKernels<float> kFloat;
extern const SinkhornKernels<double> kDouble;
}  // namespace avx512

// A batch of problems, contiguous: x [batch, n, d], y [batch, m, d], a and f [batch, n], b and g [batch, m].
template <class T>
struct Batch {
  int64_t batch, n, m, d;
  const T* x;
  const T* y;
  const T* b;
  const T* eps;  // [batch]
  Cost cost;
};

template <class T>
struct Solve {
  const T* a;
  const T* g0;  // [batch, m] or null
  int64_t max_iter;
  double tol;  // negative: never stop early
  T* f;
  T* g;
  T* value;             // [batch]
  T* residual;          // [batch]
  int64_t* iterations;  // [batch]
};

template <class T>
void solve(const Batch<T>&, const Solve<T>&, int64_t threads);

// out [batch, n, width] and mass [batch, n] from v [batch, m, width].
template <class T>
void transport(const Batch<T>&, const T* f, const T* g, const T* v, int64_t width, T* out, T* mass, int64_t threads);

// out [batch, n, d] = sum_j P_ij dC_ij / dx_i.
template <class T>
void gradient(const Batch<T>&, const T* f, const T* g, const T* a, T* out, int64_t threads);

}  // namespace fewstep::cpu
