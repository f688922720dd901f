// Launchers of the Sinkhorn kernels: contiguous device pointers in, cudaError_t out; float and double.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../shared/cost.h"

namespace fewstep::cuda {

struct SinkhornPlan {
  enum Place { kShared, kWorkspace, kDirect };
  Place place;       // where the costs of a problem live; kDirect recomputes them
  int threads;       // per block, one block per problem
  int shared_bytes;  // dynamic
  int64_t blocks;    // problems in flight
  int64_t slot;      // workspace elements per block
  int64_t workspace_elements() const { return blocks * slot; }
};

// How to solve [batch, n, m] on the current device.
cudaError_t plan_sinkhorn(int64_t batch, int64_t n, int64_t m, int64_t element_bytes, SinkhornPlan* plan);

template <typename T>
struct SinkhornProblems {
  const T* x;    // [batch, n, d]
  const T* y;    // [batch, m, d]
  const T* a;    // [batch, n]
  const T* b;    // [batch, m]
  const T* eps;  // [batch]
  const T* g0;   // [batch, m] or null
  int64_t batch, n, m, d;
  Cost cost;
  int64_t max_iter;
  double tol;           // a negative one is never reached
  double converged_at;  // largest residual that counts as converged
  T* f;                 // [batch, n]
  T* g;                 // [batch, m]
  T* value;             // [batch]
  T* residual;
  int64_t* iterations;
  bool* converged;
};

// workspace [plan.workspace_elements()] is scratch.
template <typename T>
cudaError_t sinkhorn(const SinkhornPlan& plan, const SinkhornProblems<T>& problems, T* workspace, cudaStream_t stream);

// Which points a product is about: `temperatures` problems in a row share theirs, or, with segments [batch + 1], flat
// points are cut at segment_x and segment_y (n and m are their numbers, and temperatures 1).
struct Clouds {
  int64_t batch, temperatures, n, m, d;  // batch counts problems
  const int64_t* segment_x;
  const int64_t* segment_y;
  int64_t diagonal;  // INT64_MIN: none
  Cost cost;
};

// v [batch, m, k] -> out [batch, n, k], mass [batch, n]; x [batch / temperatures, n, d], b likewise.
template <typename T>
cudaError_t sinkhorn_transport(const Clouds& clouds, const T* x, const T* y, const T* f, const T* g, const T* b,
                               const T* eps, const T* v, int64_t k, T* out, T* mass, cudaStream_t stream);

// -> grad_x [batch, n, d].
template <typename T>
cudaError_t sinkhorn_grad(const Clouds& clouds, const T* x, const T* y, const T* f, const T* g, const T* a, const T* b,
                          const T* eps, T* grad_x, cudaStream_t stream);

}  // namespace fewstep::cuda
