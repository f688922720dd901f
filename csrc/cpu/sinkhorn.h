// Sinkhorn on the CPU. A leaf kernel is compiled once per instruction set (sinkhorn.inl); the drivers in
// sinkhorn.cpp hand rows to them. Potentials are kept in base 2: F_i = f_i k and H_j = g_j k + log2 b_j with
// k = log2(e) / eps, so that a conditional plan entry is p_ij = exp2(F_i + H_j - k C_ij) = P_ij / a_i.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "shared/cost.h"

namespace fewstep::cpu {

constexpr int64_t kNoDiagonal = INT64_MIN;

// What the leaf kernels know of one problem. A panel is the columns that a register tile covers.
template <class T>
struct Geometry {
  int64_t n, m, d;
  int64_t m_padded;  // m rounded up to whole panels; padding has H = -inf
  int64_t stride;    // of rows of distances and of scratch, at least m_padded
  const T* x;        // row i at x + i * x_stride
  int64_t x_stride;
  const T* y;             // [m_padded / panel, d, panel]
  const T* cached;        // [n, stride] distances, or null: recomputed from x and y
  const int64_t* labels;  // [n] rows of label_rows, or null
  const T* label_rows;    // [labels, m_padded], added to the distance
  int64_t diagonal;       // pairs j == i + diagonal have an infinite distance
  Cost cost;
  T k;  // turns a distance (squared, or not for euclidean) into units of log2
};

// How the soft c-transform F' = -log2 sum_j exp2(H_j - k C_ij) becomes the next potential:
// F <- F + relax (damping F' - F), with damping = rho / (rho + eps) for a marginal penalty rho, else 1.
struct Update {
  double damping = 1;
  double relax = 1;
  double target = 0;  // rows ought to have mass a_i exp2(-target F_i); target = eps / rho, else 0
  bool plain() const { return damping == 1 && relax == 1; }
};

struct PassResult {
  double residual = 0;  // L1 error of the row marginal before the pass
  double mass = 0;      // sum_ij P_ij before the pass
  double extreme = 0;   // largest |F_next - shift|
  double weight = 0;    // sum_i w_i
};

// Where a pass in the log domain puts exp2(shift_i + H_j - k C_ij): into scratch [rows, stride], which the next rows
// overwrite, or into a K that is kept, by rows [n, stride] or in tiles [n_padded, m_padded] of `lanes` x `lanes`
// entries, those of `lanes` rows one after the other. A pass over tiles reads one stream of memory, where one over rows
// of a power of two bytes would read from as many places that share their cache sets.
enum class Store { scratch, rows, tiles };

// One pass over rows in the log domain: F from H, and sums_j = sum_i w_i exp2(shift_i + H_j - k C_ij) for the new H,
// w_i = a_i exp2(F_next_i - shift_i), or with the F before for a simultaneous update.
template <class T>
struct RowPass {
  const T* h;  // [m_padded]
  const T* f;  // [n] F of the last iteration, or null where there is none
  const T* a;  // [n_padded]
  Update update;
  bool simultaneous;
  T* f_next;   // [n_padded]
  T* shift;    // [n_padded] what stood for F_i in the exponent
  T* columns;  // [m_padded], increased by sums_j; null for a pass over rows alone
  T* scratch;  // or K
  Store store;
};

// The same from a kept K, free of exponentials: s = K v, u = exp2(F_next - shift), sums = K' (a u).
template <class T>
struct ScalePass {
  const T* kernel;  // [n_padded, m_padded], K in tiles
  const T* shift;   // [n_padded]
  const T* v;       // [m_padded] exp2(H - H of K); 0 in the padding
  const T* u;       // [n_padded] exp2(F - shift)
  const T* a;       // [n_padded], 0 in the padding
  Update update;
  bool simultaneous;
  T* u_next;        // [n_padded]
  T* columns;       // [m_padded] or null, as above
  bool empty_rows;  // some rows of K may be 0, those of points that may go nowhere; their u is 1
};

// The pairs of a problem with itself, whose plan is symmetric, once: adds to sums_i = sum_j b_j S_ij, with
// S_ij = exp2(F_i + F_j - k C_ij), what rows [begin, end) find from their own panel on, for both points of a pair.
template <class T>
struct SelfPass {
  const T* f;  // [m_padded], finite in the padding
  const T* b;  // [m_padded]
  T* sums;     // [m_padded]
};

// sum_j p_ij v_j and sum_j p_ij; where F_i is inf, both divided by the largest p_ij.
template <class T>
struct Apply {
  const T* h;  // [m_padded]
  const T* f;  // [n]
  const T* v;  // [m, width]
  int64_t width;
  T* out;      // [n, width]
  T* mass;     // [n]
  T* scratch;  // [rows, stride]
};

// Both gradients of <P, C>: sum_j W_ij (x_i - y_j) for rows and sum_i W_ij (y_j - x_i) for columns, with
// W_ij = a_i p_ij c'(C_ij) (signs in place of differences for l1; y_j and x_i for dot).
template <class T>
struct Gradient {
  const T* h;  // [m_padded]
  const T* f;  // [n]
  const T* a;  // [n], times any constant
  const T* y;  // row j at y + j * y_stride
  int64_t y_stride;
  bool self;   // P is symmetric: each row from its own panel on, and the columns have what is before it
  T* weights;  // W of rows first and on, row r at weights + (r - first) * stride
  int64_t first;
  T* rows;     // [n, d], or null
  T* columns;  // [m_padded / panel, d, panel], increased
};

template <class T>
struct SinkhornKernels {
  int64_t panel;   // columns of a register tile
  int64_t rows;    // rows of a register tile, and of a RowPass's scratch at most
  int64_t lanes;   // rows of a ScalePass's tile: n_padded is a multiple of it
  double safe;     // a kept K serves while |log2 u| and |log2 v| are at most this
  double nowhere;  // F or G of a point all of whose distances to points with weight are infinite, or k times them this

  // Transposes y [m, d] (row j at y + j * stride) into panels; padded columns repeat the last point.
  void (*pack)(const T* y, int64_t stride, int64_t m, int64_t d, T* out);
  // Distances of rows [begin, end) to the panels from `first` on, into out [n, stride].
  void (*distances)(const Geometry<T>&, int64_t first, int64_t begin, int64_t end, T* out);
  // A pass in the log domain over rows [begin, end), `block` rows at a time (1, 2, 4 or 8, at most `rows`, and at most
  // `lanes` where it stores tiles).
  PassResult (*row_pass)(const Geometry<T>&, const RowPass<T>&, int64_t block, int64_t begin, int64_t end);
  // A pass over a kept K of n rows; begin and end are multiples of `lanes`.
  PassResult (*scale_pass)(int64_t n, int64_t m_padded, const ScalePass<T>&, int64_t begin, int64_t end);
  // parts[0] += parts[1 .. count), each [m_padded].
  void (*add_parts)(int64_t m_padded, int64_t count, T* parts);
  void (*self_pass)(const Geometry<T>&, const SelfPass<T>&, int64_t begin, int64_t end);
  // f_next from the sums of a SelfPass over n points. False where the sum of one left the range of T.
  bool (*self_update)(int64_t n, const T* a, const T* f, const T* sums, const Update&, T* f_next, PassResult*);
  // H from the sums, to which rows gave weights that sum to `weight`; marks in `bad` [panels], and leaves alone, panels
  // with columns that underflowed or overflowed.
  bool (*update_columns)(int64_t m_padded, const T* sums, const T* log2_b, const Update&, double weight, T* h,
                         uint8_t* bad);
  // v_next from the sums, with `weight` as above, for the H of K. Returns the largest |log2 v_next|; inf, early, where
  // a sum underflowed.
  double (*scale_columns)(int64_t m_padded, const T* sums, const T* b, const T* log2_b, const T* h, const Update&,
                          double weight, const T* v, T* v_next);
  // out = exp2(p + q - r), 0 where q is -inf.
  void (*exp2_sum)(int64_t count, const T* p, const T* q, const T* r, T* out);
  // h += log2 v.
  void (*add_log2)(int64_t count, const T* v, T* h);
  // G_j = -log2 sum_i a_i exp2(F_i - k C_ij) for one panel; fa = F + log2 a.
  void (*column_lse)(const Geometry<T>&, const T* fa, int64_t panel_index, T* g);
  void (*apply_rows)(const Geometry<T>&, const Apply<T>&, int64_t begin, int64_t end);
  // W and the rows' gradient; where `self`, [begin, end) is inside a panel.
  void (*gradient_rows)(const Geometry<T>&, const Gradient<T>&, int64_t begin, int64_t end);
  // The columns' share of `count` rows of W, for panels [begin, end).
  void (*gradient_columns)(const Geometry<T>&, const Gradient<T>&, int64_t count, int64_t begin, int64_t end);
  // out [n, width] (row i at out + i * width) = weights v, from weights [n, stride] and v [m, width], or increased by
  // it.
  void (*combine)(const T* weights, int64_t stride, int64_t n, int64_t m, const T* v, int64_t width, T* out, bool add);
};

FEWSTEP_KERNELS(SinkhornKernels<float>)
FEWSTEP_KERNELS(SinkhornKernels<double>)

// Problems that share a shape and are found by strides, or by segments of flat points. `temperatures` problems in a row
// share their points and weights. Potentials are contiguous: [problems, points], or [temperatures, points] where
// ragged.
template <class T>
struct Batch {
  int64_t count, temperatures;  // point clouds; problems = count * temperatures
  int64_t n, m, d;              // of one problem, or all flat points where ragged
  const T* x;
  int64_t x_batch, x_row;  // strides; 0 for an expanded batch
  const T* y;
  int64_t y_batch, y_row;
  const T* a;  // [count, n]
  const T* b;  // [count, m]
  int64_t a_batch, b_batch;
  const T* eps;              // [problems]
  const T* matrix;           // [count, n, m] costs for Cost::matrix
  const int64_t* segment_x;  // [count + 1], or null
  const int64_t* segment_y;
  const int64_t* label_x;  // [count, n], or null
  const int64_t* label_y;
  const T* label_cost;  // [labels_x, labels_y]
  int64_t labels_x, labels_y;
  int64_t diagonal;
  Cost cost;
};

template <class T>
struct Solve {
  const T* f0;  // like f, or null
  const T* g0;
  int64_t max_iter;
  double tol;         // negative: never stop early
  const T* start;     // [problems] temperatures that annealing starts from, or null
  double factor;      // of annealing
  const T* schedule;  // [scheduled] temperatures before eps
  int64_t scheduled;
  double rho_x, rho_y;  // penalties of the marginals; inf: they are constraints
  double relax;
  bool simultaneous;     // averaged updates, both from the last potentials
  bool closing;          // alternating iterations after them
  bool self;             // x is y with the same weights: one potential, in simultaneous updates
  int64_t memory_limit;  // bytes that kept distances and kernels of one problem may take
  T* f;
  T* g;
  T* value;             // [problems]
  T* residual;          // [problems]
  int64_t* iterations;  // [problems]
  T* grad_x;            // [problems, n, d] of the value, or null; of both roles of x where `self`
  T* grad_y;            // [problems, m, d], or null
};

template <class T>
void solve(const Batch<T>&, const Solve<T>&, int64_t threads);

// out [problems, n, width] and mass [problems, n] from v [problems, m, width]; flat where ragged, with one temperature.
// Where f is inf, both are divided by some number.
template <class T>
void transport(const Batch<T>&, const T* f, const T* g, const T* v, int64_t v_batch, int64_t width, T* out, T* mass,
               int64_t threads);

// out_x [problems, n, d] = sum_j P_ij dC_ij / dx_i and out_y [problems, m, d] = sum_i P_ij dC_ij / dy_j, or null.
template <class T>
void gradient(const Batch<T>&, const T* f, const T* g, T* out_x, T* out_y, int64_t threads);

// One pass over the rows of a problem whose other rows are elsewhere, in units of log2: F from H, and this part's sums
// for the columns (see RowPass).
template <class T>
struct PartPass {
  double scale;  // log2(e) / eps
  Update update;
  const T* h;  // [m], -inf without weight
  const T* f;  // [n], or null
  T* f_next;   // [n]
  T* columns;  // [m], or null
};

template <class T>
PassResult part_pass(const Batch<T>&, const PartPass<T>&, int64_t threads);

}  // namespace fewstep::cpu
