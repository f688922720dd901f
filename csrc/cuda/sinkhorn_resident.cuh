// Launchers of the resident solver and of the drift: contiguous device pointers in, cudaError_t out; float32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../shared/cost.h"

namespace fewstep::cuda {

constexpr int64_t kNoDiagonal64 = INT64_MIN;

struct ResidentPlan {
  int columns;       // groups of 32 columns that a lane has: 2, 4 or 8; 0 where the problem is too large
  int ranks;         // blocks of the cluster that shares a problem
  int threads;       // per block
  int shared_bytes;  // dynamic
};

// How to keep problems of at most n x m on the current device.
cudaError_t plan_resident(int64_t n, int64_t m, ResidentPlan* plan);

// The same for segments of n and m points in all, whose sizes are not known on the host.
cudaError_t plan_segments(int64_t n, int64_t m, ResidentPlan* plan);

// `count` pairs of point clouds with `temperatures` problems each. Uniform sizes n and m, or, with segments
// [count + 1], the flat points x [n, d] and y [m, d], cut at segment_x and segment_y.
struct ResidentProblems {
  const float* x;  // [count, n, d], or [n, d]
  const float* y;
  const float* a;  // [count, n], or [n]
  const float* b;
  const float* eps;    // [count * temperatures]
  const float* start;  // likewise, where annealing begins, or null
  const float* f0;     // [count * temperatures, n], or [temperatures, n]; or null
  const float* g0;
  const int64_t* segment_x;
  const int64_t* segment_y;
  int64_t count, temperatures, n, m, d, diagonal, precision;  // fewstep::halves::Precision
  Cost cost;
  // See fewstep::resident::Schedule; an infinite rho is a constraint.
  const float* schedule;
  int64_t scheduled, max_iter;
  float factor, tol, converged_at, rho_x, rho_y, relax;
  bool simultaneous, single;
  float* f;  // like f0
  float* g;
  float* value;  // [count * temperatures]
  float* residual;
  int64_t* iterations;
  bool* converged;
};

// Problems that do not fit, among segments, are solved by a kernel of any size. queue [2] and, with segments,
// workspace [n] are scratch.
cudaError_t solve_resident(const ResidentPlan& plan, const ResidentProblems& problems, int* queue, float* workspace,
                           cudaStream_t stream);

struct DriftProblems {
  const float* x;          // [groups, n, d]
  const float* clouds[3];  // y, x_self, uncond: [groups, counts, d]
  int64_t counts[3];
  int64_t cloud_count;
  const float* weights;   // [groups, sum of counts]
  const float* guidance;  // [groups]
  const float* eps;       // [temperatures]
  int64_t groups, temperatures, n, d, max_iter, diagonal, precision;
  Cost cost;
  bool joint, scaled, unit;
  float* velocity;                   // [temperatures, groups, n, d], or [groups, n, d] where `unit`
  float* scale;                      // []
  float* rms;                        // [temperatures]
  float *residual, *entropy, *peak;  // [temperatures, groups, plans]

  int64_t plans() const { return joint ? 1 : cloud_count; }
  int64_t columns(int64_t plan) const { return joint ? counts[0] + counts[1] + counts[2] : counts[plan]; }
  // Elements of scratch: velocities before they are summed, and per-group sums.
  int64_t parts_elements() const { return unit && temperatures > 1 ? temperatures * groups * n * d : 0; }
  int64_t sums_elements() const { return 2 * groups + temperatures * groups; }
};

constexpr int64_t kMaxDriftRows = 64, kMaxDriftColumns = 256;

// Whether the current device holds the groups of a drift on chip.
bool drift_fits(const DriftProblems& problems);

// parts [parts_elements()], sums [sums_elements()], queue [1] are scratch.
cudaError_t drift(const DriftProblems& problems, float* parts, float* sums, int* queue, cudaStream_t stream);

}  // namespace fewstep::cuda
