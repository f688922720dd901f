#include <algorithm>

#include "../shared/sinkhorn_block.h"
#include "reduce.cuh"
#include "sinkhorn.cuh"

namespace fewstep::cuda {
namespace {

using Place = SinkhornPlan::Place;

// Leaves 128 registers to a thread on floats and 256 on doubles.
constexpr int max_threads(int64_t element_bytes) { return static_cast<int>(2048 / element_bytes); }
constexpr int kApplyThreads = 256;
constexpr int kApplyRows = kApplyThreads / Block::kLanes * block::kRows;
constexpr int kMaxWarps = max_threads(sizeof(float)) / Block::kLanes;
// Dynamic shared memory beyond this must be asked for.
constexpr int kDefaultShared = 48 * 1024;
// Costs that fit no shared memory are kept in global memory up to this many bytes.
constexpr int64_t kWorkspaceBytes = int64_t{1} << 30;
constexpr int64_t kMaxBlocks = 2147483647;

template <typename T>
struct SolveArguments {
  block::Problem<T> first;  // problem 0; eps comes from `eps`
  block::Solution<T> out;   // problem 0
  block::Stop<T> stop;
  const T* eps;  // [batch]
  int64_t batch;
  T* workspace;  // [blocks, slot]
  int64_t slot;
};

template <typename T>
struct ApplyArguments {
  block::Application<T> first;  // problem 0; eps comes from `eps`
  const T* eps;                 // [batch]
  Clouds clouds;
  int64_t row_tiles;  // of a problem, or of all segments
  int value_tiles;
};

// Small problems share a multiprocessor.
template <typename T, Place kPlace>
constexpr int kMinBlocks = kPlace == SinkhornPlan::kShared && sizeof(T) == sizeof(float) ? 2 : 1;

template <typename T, Place kPlace>
__global__ void __launch_bounds__(max_threads(sizeof(T)), kMinBlocks<T, kPlace>)
    sinkhorn_kernel(const SolveArguments<T> arguments) {
  __shared__ T scratch[kMaxWarps];
  T* const shared = dynamic_shared<T>();
  T* const slot = arguments.workspace + blockIdx.x * arguments.slot;
  const Block team;
  for (int64_t index = blockIdx.x; index < arguments.batch; index += gridDim.x) {
    block::Problem<T> p = arguments.first;
    const int64_t n = p.n, m = p.m;
    p.x += index * n * p.d;
    p.y += index * m * p.d;
    p.a += index * n;
    p.b += index * m;
    if (p.g0 != nullptr) p.g0 += index * m;
    p.eps = arguments.eps[index];
    block::Solution<T> out = arguments.out;
    out.f += index * n;
    out.g += index * m;
    out.value += index;
    out.residual += index;
    out.iterations += index;
    out.converged += index;
    if constexpr (kPlace == SinkhornPlan::kShared) {
      T* const vectors = shared + p.n * p.m;
      block::fill_cost(team, p, vectors, shared);
      team.sync();
      block::solve(team, block::CachedCost<T, int>{shared, p.m}, p, arguments.stop, vectors, scratch, out);
    } else if constexpr (kPlace == SinkhornPlan::kWorkspace) {
      block::fill_cost(team, p, shared, slot);
      team.sync();
      block::solve(team, block::CachedCost<T, int64_t>{slot, m}, p, arguments.stop, slot + n * m, scratch, out);
    } else {
      const block::DirectCost<T> cost{p, block::inverse_temperature(p.eps)};
      block::solve(team, cost, p, arguments.stop, slot, scratch, out);
    }
  }
}

// Tiles of rows of a segment begin where those of the segments before it cannot reach.
__device__ int64_t first_tile(const int64_t* segments, int64_t index) { return segments[index] / kApplyRows + index; }

// The segment that a tile of rows belongs to; the last tiles of a segment may be without rows.
__device__ int64_t segment_of(const int64_t* segments, int64_t count, int64_t tile) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first_tile(segments, middle) <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <bool kGradient, typename T>
__global__ void __launch_bounds__(kApplyThreads, 1) sinkhorn_apply_kernel(const ApplyArguments<T> arguments) {
  __shared__ T stage[block::kStageElements];
  __shared__ T weights[kApplyRows * block::kColumns];
  const Clouds& clouds = arguments.clouds;
  const int64_t row_tiles = arguments.row_tiles * (clouds.segment_x == nullptr ? clouds.batch : 1);
  for (int64_t tile = blockIdx.x; tile < row_tiles * arguments.value_tiles; tile += gridDim.x) {
    block::Application<T> p = arguments.first;
    int64_t index, row_tile = tile / arguments.value_tiles, row, column, point, other;
    if (clouds.segment_x == nullptr) {
      index = row_tile / arguments.row_tiles;
      row_tile %= arguments.row_tiles;
      row = index * clouds.n;
      column = index * clouds.m;
      point = index / clouds.temperatures * clouds.n;
      other = index / clouds.temperatures * clouds.m;
    } else {
      index = segment_of(clouds.segment_x, clouds.batch, row_tile);
      row_tile -= first_tile(clouds.segment_x, index);
      point = row = clouds.segment_x[index];
      other = column = clouds.segment_y[index];
      p.n = static_cast<int>(clouds.segment_x[index + 1] - row);
      p.m = static_cast<int>(clouds.segment_y[index + 1] - column);
      if (row_tile * kApplyRows >= p.n) continue;
    }
    p.x += point * p.d;
    p.y += other * p.d;
    p.f += row;
    p.g += column;
    p.b += other;
    p.v += (kGradient ? other : column) * p.k;
    p.out += row * p.k;
    if constexpr (kGradient) {
      p.a += point;
    } else {
      p.mass += row;
    }
    p.eps = arguments.eps[index];
    const int value_tile = static_cast<int>(tile % arguments.value_tiles);
    block::apply<kGradient>(Block{}, p, static_cast<int>(row_tile), value_tile, stage, weights);
  }
}

int threads_for(int64_t pairs, int64_t element_bytes) {
  return std::min(pairs <= 1024 ? 64 : pairs <= 8192 ? 256 : 512, max_threads(element_bytes));
}

template <typename T, Place kPlace>
cudaError_t launch(const SinkhornPlan& plan, const SolveArguments<T>& arguments, cudaStream_t stream) {
  if (plan.shared_bytes > kDefaultShared) {
    const cudaError_t error = cudaFuncSetAttribute(sinkhorn_kernel<T, kPlace>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  sinkhorn_kernel<T, kPlace>
      <<<static_cast<unsigned>(plan.blocks), plan.threads, plan.shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <bool kGradient, typename T>
cudaError_t launch_apply(const block::Application<T>& first, const Clouds& clouds, const T* eps, cudaStream_t stream) {
  if (clouds.batch == 0 || first.n == 0) return cudaSuccess;
  const int64_t rows = (clouds.n + kApplyRows - 1) / kApplyRows;
  const int64_t segments = clouds.n / kApplyRows + clouds.batch;
  const ApplyArguments<T> arguments{first, eps, clouds, clouds.segment_x == nullptr ? rows : segments,
                                    std::max(1, (first.k + block::kValues - 1) / block::kValues)};
  const int64_t tiles = (clouds.segment_x == nullptr ? clouds.batch * rows : segments) * int64_t{arguments.value_tiles};
  sinkhorn_apply_kernel<kGradient>
      <<<static_cast<unsigned>(std::min(tiles, kMaxBlocks)), kApplyThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

template <typename T>
block::Application<T> application(const Clouds& clouds, const T* x, const T* y, const T* f, const T* g, const T* a,
                                  const T* b, const T* v, int64_t k, T* out, T* mass) {
  return {x,
          y,
          f,
          g,
          a,
          b,
          v,
          T(1),
          static_cast<int>(clouds.n),
          static_cast<int>(clouds.m),
          static_cast<int>(clouds.d),
          static_cast<int>(k),
          clouds.cost,
          clouds.diagonal == INT64_MIN ? block::kNoDiagonal : static_cast<int>(clouds.diagonal),
          out,
          mass};
}

}  // namespace

cudaError_t plan_sinkhorn(int64_t batch, int64_t n, int64_t m, int64_t element_bytes, SinkhornPlan* plan) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  plan->threads = threads_for(n * m, element_bytes);
  const int64_t vectors = block::vector_elements(n, m, plan->threads);
  const int64_t stage_bytes = block::kStageElements * element_bytes;
  const int64_t shared = n * m * element_bytes + std::max(vectors * element_bytes, stage_bytes);
  // The limit is shared with the kernel's static scratch.
  if (shared + kMaxWarps * element_bytes <= limit) {
    plan->place = SinkhornPlan::kShared;
    plan->shared_bytes = static_cast<int>(shared);
    plan->slot = 0;
    plan->blocks = std::min(batch, kMaxBlocks);
    return cudaSuccess;
  }
  const bool cached = n * m <= kWorkspaceBytes / element_bytes;
  plan->place = cached ? SinkhornPlan::kWorkspace : SinkhornPlan::kDirect;
  plan->shared_bytes = cached ? static_cast<int>(stage_bytes) : 0;
  plan->slot = (cached ? n * m : 0) + vectors;
  plan->blocks = std::min(batch, std::max(kWorkspaceBytes / element_bytes / plan->slot, int64_t{1}));
  return cudaSuccess;
}

template <typename T>
cudaError_t sinkhorn(const SinkhornPlan& plan, const SinkhornProblems<T>& in, T* workspace, cudaStream_t stream) {
  if (in.batch == 0) return cudaSuccess;
  const SolveArguments<T> arguments{{in.x, in.y, in.a, in.b, in.g0, T(1), static_cast<int>(in.n),
                                     static_cast<int>(in.m), static_cast<int>(in.d), in.cost},
                                    {in.f, in.g, in.value, in.residual, in.iterations, in.converged},
                                    {static_cast<int>(in.max_iter), T(in.tol), T(in.converged_at)},
                                    in.eps,
                                    in.batch,
                                    workspace,
                                    plan.slot};
  switch (plan.place) {
    case SinkhornPlan::kShared:
      return launch<T, SinkhornPlan::kShared>(plan, arguments, stream);
    case SinkhornPlan::kWorkspace:
      return launch<T, SinkhornPlan::kWorkspace>(plan, arguments, stream);
    default:
      return launch<T, SinkhornPlan::kDirect>(plan, arguments, stream);
  }
}

template <typename T>
cudaError_t sinkhorn_transport(const Clouds& clouds, const T* x, const T* y, const T* f, const T* g, const T* b,
                               const T* eps, const T* v, int64_t k, T* out, T* mass, cudaStream_t stream) {
  const auto first = application<T>(clouds, x, y, f, g, nullptr, b, v, k, out, mass);
  return launch_apply<false>(first, clouds, eps, stream);
}

template <typename T>
cudaError_t sinkhorn_grad(const Clouds& clouds, const T* x, const T* y, const T* f, const T* g, const T* a, const T* b,
                          const T* eps, T* grad_x, cudaStream_t stream) {
  const auto first = application<T>(clouds, x, y, f, g, a, b, y, clouds.d, grad_x, nullptr);
  return launch_apply<true>(first, clouds, eps, stream);
}

#define FEWSTEP_INSTANTIATE(T)                                                                                       \
  template cudaError_t sinkhorn(const SinkhornPlan&, const SinkhornProblems<T>&, T*, cudaStream_t);                  \
  template cudaError_t sinkhorn_transport(const Clouds&, const T*, const T*, const T*, const T*, const T*, const T*, \
                                          const T*, int64_t, T*, T*, cudaStream_t);                                  \
  template cudaError_t sinkhorn_grad(const Clouds&, const T*, const T*, const T*, const T*, const T*, const T*,      \
                                     const T*, T*, cudaStream_t);

FEWSTEP_INSTANTIATE(float)
FEWSTEP_INSTANTIATE(double)

}  // namespace fewstep::cuda
