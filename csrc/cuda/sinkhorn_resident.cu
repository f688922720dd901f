#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "../shared/resident/direct.h"
#include "../shared/resident/distances.h"
#include "../shared/resident/drift.h"
#include "../shared/resident/layout.h"
#include "../shared/resident/problem.h"
#include "../shared/resident/solver.h"
#include "reduce.cuh"
#include "sinkhorn_resident.cuh"

namespace fewstep::cuda {
namespace {

constexpr int kR = 8;  // rows of a warp
// Warps per block: 128 registers per thread for 16, 168 for 12, 255 for 8. K takes 8 Q of them.
template <int Q>
constexpr int kWarps = Q == 8 ? 12 : 16;
constexpr int kClusterWarps = 8;
constexpr int kDriftWarps = kMaxDriftRows / kR;
constexpr int kMaxRanks = 8;
constexpr int kDirectThreads = 256;
constexpr int kSumThreads = 256;
constexpr int64_t kMaxItems = INT_MAX / 2;  // what a queue counts to, with those who find it empty

template <int Q, int kW>
using SolveLayout = resident::Layout<kR, Q, Block::kLanes, kW>;
template <int Q>
using DriftLayout = resident::Layout<kR, Q, Block::kLanes, kDriftWarps>;
// Temperatures of a drift whose weights fit the registers of a thread: 8 Q each.
template <int Q>
constexpr int kStacked = Q == 8 ? 1 : resident::kMostStacked;

struct Arguments {
  ResidentProblems in;
  int64_t items;     // of the queue: clouds, or problems where there are few clouds
  int64_t per_item;  // temperatures
  int64_t capacity;  // elements of a block's memory
  int* queue;
  float* workspace;
};

// One pair of clouds: where its points and potentials begin.
struct Item {
  int64_t cloud, row, column;
  int n, m;
};

__device__ Item item_of(const ResidentProblems& in, int64_t cloud) {
  if (in.segment_x == nullptr) {
    return {cloud, cloud * in.n, cloud * in.m, static_cast<int>(in.n), static_cast<int>(in.m)};
  }
  const int64_t row = in.segment_x[cloud], column = in.segment_y[cloud];
  return {cloud, row, column, static_cast<int>(in.segment_x[cloud + 1] - row),
          static_cast<int>(in.segment_y[cloud + 1] - column)};
}

__device__ resident::Points<float> points_of(const ResidentProblems& in, const Item& item) {
  const float* const y = in.y + item.column * in.d;
  const int diagonal = in.diagonal == kNoDiagonal64 ? resident::kNoDiagonal : static_cast<int>(in.diagonal);
  const float* const a = in.a + item.row;
  int origin = 0;
  while (origin < item.n - 1 && a[origin] == 0) ++origin;
  return {in.x + item.row * in.d,
          {{y, y, y}, {INT_MAX, INT_MAX, INT_MAX}},
          item.n,
          item.m,
          static_cast<int>(in.d),
          in.cost,
          diagonal,
          0,
          item.m,
          static_cast<int>(in.precision),
          origin};
}

__device__ resident::Schedule<float> schedule_of(const ResidentProblems& in) {
  return {in.schedule,     static_cast<int>(in.scheduled),
          in.factor,       static_cast<int>(in.max_iter),
          in.tol,          in.converged_at,
          in.rho_x,        in.rho_y,
          in.relax,        false,
          in.simultaneous, in.single};
}

// Where the potentials of temperature t of an item are, and its numbers.
struct Place {
  int64_t f, g, number;
};

__device__ Place place_of(const ResidentProblems& in, const Item& item, int64_t t) {
  const int64_t number = item.cloud * in.temperatures + t;
  if (in.segment_x == nullptr) return {number * in.n, number * in.m, number};
  return {t * in.n + item.row, t * in.m + item.column, number};
}

__device__ resident::Marginals<float> marginals_of(const ResidentProblems& in, const Item& item, const Place& at) {
  return {in.a + item.row, in.b + item.column, 1.0f, in.f0 == nullptr ? nullptr : in.f0 + at.f,
          in.g0 == nullptr ? nullptr : in.g0 + at.g};
}

__device__ block::Solution<float> solution_of(const ResidentProblems& in, const Place& at) {
  return {in.f + at.f,
          in.g + at.g,
          in.value + at.number,
          in.residual + at.number,
          in.iterations + at.number,
          in.converged + at.number};
}

// The next item of a queue, alike in all threads of all ranks; every thread calls.
template <typename Team>
__device__ int take(const Team& team, int* queue, int* next) {
  if (team.block() == 0 && team.rank() == 0) *next = atomicAdd(queue, 1);
  team.sync_all();
  const int item = *team.peer(next, 0);
  team.sync_all();
  return item;
}

template <int Q, int kW>
__device__ bool fits(const Item& item, int ranks, int warps, int64_t capacity) {
  const int64_t rows = (item.n + ranks - 1) / ranks;
  return rows <= warps * kR && item.m <= Q * Block::kLanes && SolveLayout<Q, kW>::elements(rows, item.m, 0) <= capacity;
}

template <int Q, int kW, typename Team>
__device__ void solve_items(const Arguments& arguments) {
  float* const memory = dynamic_shared<float>();
  __shared__ int next;
  const Team team{};
  const ResidentProblems& in = arguments.in;
  while (true) {
    const int index = take(team, arguments.queue, &next),
              parts = static_cast<int>(in.temperatures / arguments.per_item);
    if (index >= arguments.items) return;
    const Item item = item_of(in, index / parts);
    const int each = static_cast<int>(arguments.per_item), first = index % parts * each;
    if (item.n == 0 || item.m == 0) {
      for (int t = first + team.rank(); t < first + each; t += team.size()) {
        const block::Solution<float> out = solution_of(in, place_of(in, item, t));
        *out.value = *out.residual = 0;
        *out.iterations = 0;
        *out.converged = true;
      }
      continue;
    }
    if (!fits<Q, kW>(item, team.ranks(), team.warps(), arguments.capacity)) continue;  // direct_kernel
    resident::Solver<kR, Q, kW, float, Team> solver(team, points_of(in, item), memory);
    float k[kR][Q];
    solver.measure(k);
    for (int t = first; t < first + each; ++t) {
      const Item again = item_of(in, team.opaque(index) / parts);
      const Place at = place_of(in, again, t);
      const float eps = in.eps[at.number], start = in.start == nullptr ? 0.0f : in.start[at.number];
      solver.solve(k, schedule_of(in), marginals_of(in, again, at), eps, start);
      solver.write(eps, solution_of(in, at));
    }
  }
}

template <int Q>
__global__ void __launch_bounds__(kWarps<Q>* Block::kLanes, 1)
    resident_kernel(const __grid_constant__ Arguments arguments) {
  solve_items<Q, kWarps<Q>, Block>(arguments);
}

// Only launched where there are clusters.
__global__ void __launch_bounds__(kClusterWarps* Block::kLanes, 1)
    resident_cluster_kernel(const __grid_constant__ Arguments arguments) {
#if __CUDA_ARCH__ >= 900
  solve_items<8, kClusterWarps, Cluster>(arguments);
#endif
}

// The segments that are too large for the kernel before it.
template <int Q, int kW>
__global__ void __launch_bounds__(kDirectThreads, 1)
    direct_kernel(const __grid_constant__ Arguments arguments, int ranks, int warps) {
  __shared__ float scratch[kDirectThreads / Block::kLanes];
  __shared__ int next;
  const Block team{};
  const ResidentProblems& in = arguments.in;
  while (true) {
    const int64_t cloud = take(team, arguments.queue + 1, &next);
    if (cloud >= in.count) return;
    const Item item = item_of(in, cloud);
    if (item.n == 0 || item.m == 0 || fits<Q, kW>(item, ranks, warps, arguments.capacity)) continue;
    for (int64_t t = 0; t < in.temperatures; ++t) {
      const Place at = place_of(in, item, t);
      const float eps = in.eps[at.number], start = in.start == nullptr ? 0.0f : in.start[at.number];
      resident::solve_directly(team, points_of(in, item), schedule_of(in), marginals_of(in, item, at), eps, start,
                               arguments.workspace + item.row, scratch, solution_of(in, at));
    }
  }
}

struct Device {
  int shared_limit, processors;

  cudaError_t read() {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    return cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
};

// What a kernel has besides in static shared memory, rounded up.
constexpr int kStaticShared = 128;

template <int Q, int kW>
bool plan_for(int64_t n, int64_t m, int ranks, const Device& device, ResidentPlan* plan) {
  const int64_t rows = (n + ranks - 1) / ranks, warps = (rows + kR - 1) / kR;
  const int64_t bytes = SolveLayout<Q, kW>::elements(rows, m, 0) * static_cast<int64_t>(sizeof(float));
  if (warps > kW || m > Q * Block::kLanes || bytes + kStaticShared > device.shared_limit) return false;
  *plan = {Q, ranks, static_cast<int>(warps) * Block::kLanes, static_cast<int>(bytes)};
  return true;
}

template <typename Kernel, typename... Rest>
cudaError_t launch(Kernel kernel, int64_t items, int threads, int shared_bytes, int ranks, cudaStream_t stream,
                   Rest... rest) {
  Device device;
  cudaError_t error = device.read();
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  int resident = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared_bytes);
  if (error != cudaSuccess) return error;
  // As many blocks as run at once, in whole clusters: they take items from the queue until it is empty.
  const int64_t clusters = std::max<int64_t>(int64_t{device.processors} * resident / ranks, 1);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min(items, clusters) * ranks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attribute;
  if (ranks > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(ranks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, rest...);
}

}  // namespace

cudaError_t plan_resident(int64_t n, int64_t m, ResidentPlan* plan) {
  *plan = {};
  Device device;
  cudaError_t error = device.read();
  if (error != cudaSuccess) return error;
  if (plan_for<2, kWarps<2>>(n, m, 1, device, plan) || plan_for<4, kWarps<4>>(n, m, 1, device, plan) ||
      plan_for<8, kWarps<8>>(n, m, 1, device, plan)) {
    return cudaSuccess;
  }
  // Of a library built for older devices alone it is empty.
  cudaFuncAttributes compiled;
  error = cudaFuncGetAttributes(&compiled, resident_cluster_kernel);
  if (error != cudaSuccess) return error;
  for (int ranks = 2; ranks <= kMaxRanks && compiled.ptxVersion >= 90; ranks *= 2) {
    if (plan_for<8, kClusterWarps>(n, m, ranks, device, plan)) return cudaSuccess;
  }
  return cudaSuccess;
}

cudaError_t plan_segments(int64_t n, int64_t m, ResidentPlan* plan) {
  cudaError_t error = cudaSuccess;
  for (int64_t size = 256; size >= 64 && error == cudaSuccess; size /= 2) {
    error = plan_resident(std::min(n, size), std::min(m, size), plan);
    if (plan->columns > 0) break;
  }
  return error;
}

cudaError_t solve_resident(const ResidentPlan& plan, const ResidentProblems& problems, int* queue, float* workspace,
                           cudaStream_t stream) {
  if (problems.count == 0) return cudaSuccess;
  cudaError_t error = cudaMemsetAsync(queue, 0, 2 * sizeof(int), stream);
  if (error != cudaSuccess) return error;
  Device device;
  error = device.read();
  if (error != cudaSuccess) return error;
  // Distances serve all temperatures of a pair of clouds, unless there are too few pairs to go round.
  const bool few = problems.count * plan.ranks < 2 * int64_t{device.processors};
  const int64_t per_item = few ? 1 : problems.temperatures;
  const int64_t items = problems.count * (problems.temperatures / per_item);
  if (items > kMaxItems) return cudaErrorInvalidValue;
  const int64_t capacity = plan.shared_bytes / static_cast<int64_t>(sizeof(float));
  const Arguments arguments{problems, items, per_item, capacity, queue, workspace};
  if (plan.columns == 2) {
    error = launch(resident_kernel<2>, items, plan.threads, plan.shared_bytes, 1, stream, arguments);
  } else if (plan.columns == 4) {
    error = launch(resident_kernel<4>, items, plan.threads, plan.shared_bytes, 1, stream, arguments);
  } else if (plan.ranks == 1) {
    error = launch(resident_kernel<8>, items, plan.threads, plan.shared_bytes, 1, stream, arguments);
  } else {
    error = launch(resident_cluster_kernel, items, plan.threads, plan.shared_bytes, plan.ranks, stream, arguments);
  }
  if (error != cudaSuccess || problems.segment_x == nullptr) return error;
  const int warps = plan.threads / Block::kLanes;
  auto direct = plan.columns == 2   ? direct_kernel<2, kWarps<2>>
                : plan.columns == 4 ? direct_kernel<4, kWarps<4>>
                : plan.ranks == 1   ? direct_kernel<8, kWarps<8>>
                                    : direct_kernel<8, kClusterWarps>;
  return launch(direct, problems.count, kDirectThreads, 0, 1, stream, arguments, plan.ranks, warps);
}

namespace {

struct DriftArguments {
  DriftProblems in;
  resident::Drift<float> drift;
  int stacked;  // temperatures whose barycentres are taken together
  int* queue;
  float* velocities;  // [temperatures, groups, n, d]
  float* sums;        // [groups] weighted distances and [groups] weights, then squares [temperatures, groups]
};

// A group's weighted squared distances and the weights of its pairs.
__global__ void __launch_bounds__(kSumThreads) drift_scale_kernel(const __grid_constant__ DriftArguments arguments) {
  __shared__ double scratch[kSumThreads / Block::kLanes];
  const Block team{};
  const DriftProblems& in = arguments.in;
  for (int64_t group = blockIdx.x; group < in.groups; group += gridDim.x) {
    double weight;
    const double distance = resident::squares_from(team, arguments.drift, group, scratch, &weight);
    if (team.rank() != 0) continue;
    arguments.sums[group] = static_cast<float>(distance);
    arguments.sums[in.groups + group] = static_cast<float>(weight);
  }
}

// A group's weighted distances and the weights of its pairs.
template <int Q>
__global__ void __launch_bounds__(kDriftWarps* Block::kLanes, 1)
    drift_length_kernel(const __grid_constant__ DriftArguments arguments) {
  __shared__ double scratch[kDriftWarps];
  float* const memory = dynamic_shared<float>();
  const Block team{};
  const DriftProblems& in = arguments.in;
  for (int64_t group = blockIdx.x; group < in.groups; group += gridDim.x) {
    double weight;
    const double distance =
        resident::lengths_from<kR, Q, kDriftWarps>(team, arguments.drift, group, memory, scratch, &weight);
    if (team.rank() != 0) continue;
    arguments.sums[group] = static_cast<float>(distance);
    arguments.sums[in.groups + group] = static_cast<float>(weight);
  }
}

// scale [] from the shares of all groups, by one block, in the same order every time.
__global__ void __launch_bounds__(kSumThreads)
    drift_finish_scale_kernel(const __grid_constant__ DriftArguments arguments) {
  __shared__ double scratch[kSumThreads / Block::kLanes];
  const Block team{};
  const DriftProblems& in = arguments.in;
  double distance = 0, weight = 0;
  for (int64_t g = team.rank(); in.scaled && g < in.groups; g += team.size()) {
    distance += double(arguments.sums[g]);
    weight += double(arguments.sums[in.groups + g]);
  }
  distance = block::team_sum(team, distance, scratch);
  weight = block::team_sum(team, weight, scratch);
  if (team.rank() != 0) return;
  constexpr double kMinScale = 1e-3;
  const double mean = distance / weight, scale = root(in.cost, mean) / sqrt(double(in.d));
  *in.scale = !in.scaled ? 1.0f : static_cast<float>(scale < kMinScale ? kMinScale : scale);  // NaN stays
}

template <int Q>
__global__ void __launch_bounds__(kDriftWarps* Block::kLanes, 1)
    drift_kernel(const __grid_constant__ DriftArguments arguments) {
  float* const memory = dynamic_shared<float>();
  __shared__ int next;
  const Block team{};
  const DriftProblems& in = arguments.in;
  const auto units = [&]() -> resident::DriftUnits<float> {
    const double d = in.d, dimension = !in.scaled ? 1.0 : is_squared(in.cost) ? d : sqrt(d);
    return {power(in.cost, *in.scale) * dimension, *in.scale};
  };
  const auto group = [&] { return int64_t{next}; };
  while (take(team, arguments.queue, &next) < in.groups) {
    resident::drift_group<kR, Q, kDriftWarps, kStacked<Q>>(team, arguments.drift, group, units, arguments.stacked,
                                                           memory);
  }
}

// rms [temperatures], one block each.
__global__ void __launch_bounds__(kSumThreads) drift_rms_kernel(const __grid_constant__ DriftArguments arguments) {
  __shared__ double scratch[kSumThreads / Block::kLanes];
  const Block team{};
  const DriftProblems& in = arguments.in;
  const float* const squares = arguments.sums + (2 + int64_t{blockIdx.x}) * in.groups;
  double sum = 0;
  for (int64_t g = team.rank(); g < in.groups; g += team.size()) sum += double(squares[g]);
  sum = block::team_sum(team, sum, scratch);
  const double size = double(in.groups) * double(in.n) * double(in.d);
  if (team.rank() == 0) in.rms[blockIdx.x] = static_cast<float>(sqrt(sum / size));
}

// velocity = sum_t V_t / max(rms_t, 1e-4).
__global__ void __launch_bounds__(kSumThreads) drift_mix_kernel(const __grid_constant__ DriftArguments arguments) {
  const DriftProblems& in = arguments.in;
  const int64_t size = in.groups * in.n * in.d;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < size; e += step) {
    float sum = 0;
    for (int64_t t = 0; t < in.temperatures; ++t) {
      const float rms = in.rms[t];
      sum += arguments.velocities[t * size + e] / (rms < 1e-4f ? 1e-4f : rms);
    }
    in.velocity[e] = sum;
  }
}

int64_t widest_plan(const DriftProblems& in) {
  int64_t widest = 0;
  for (int64_t plan = 0; plan < in.plans(); ++plan) widest = std::max(widest, in.columns(plan));
  return widest;
}

template <int Q>
int64_t drift_bytes(int64_t n, int64_t widest, int stacked) {
  return DriftLayout<Q>::elements(n, widest, stacked) * static_cast<int64_t>(sizeof(float));
}

// The most temperatures at a time that shared memory has room for; 0 where there is none for one.
template <int Q>
int stacked_for(const DriftProblems& in, int64_t widest, const Device& device) {
  int stacked = static_cast<int>(std::min<int64_t>(in.temperatures, kStacked<Q>));
  while (stacked > 0 && drift_bytes<Q>(in.n, widest, stacked) + kStaticShared > device.shared_limit) --stacked;
  return stacked;
}

// run(integral_constant of Q) for as many columns.
template <typename Run>
auto for_columns(int64_t widest, Run run) {
  if (widest <= 16 * resident::tiles_of(2)) return run(std::integral_constant<int, 2>{});
  if (widest <= 16 * resident::tiles_of(5)) return run(std::integral_constant<int, 5>{});
  return run(std::integral_constant<int, 8>{});
}

int drift_threads(int64_t n) { return static_cast<int>((n + kR - 1) / kR) * Block::kLanes; }

template <int Q>
cudaError_t launch_lengths(const DriftArguments& arguments, int64_t widest, cudaStream_t stream) {
  const int64_t n = arguments.in.n, bytes = drift_bytes<Q>(n, widest, 0);
  return launch(drift_length_kernel<Q>, arguments.in.groups, drift_threads(n), static_cast<int>(bytes), 1, stream,
                arguments);
}

template <int Q>
cudaError_t launch_drift(DriftArguments arguments, int64_t widest, cudaStream_t stream) {
  Device device;
  const cudaError_t error = device.read();
  if (error != cudaSuccess) return error;
  const int64_t n = arguments.in.n;
  arguments.stacked = stacked_for<Q>(arguments.in, widest, device);
  const int64_t bytes = drift_bytes<Q>(n, widest, arguments.stacked);
  return launch(drift_kernel<Q>, arguments.in.groups, drift_threads(n), static_cast<int>(bytes), 1, stream, arguments);
}

}  // namespace

bool drift_fits(const DriftProblems& in) {
  Device device;
  const int64_t widest = widest_plan(in);
  if (in.n > kMaxDriftRows || widest > kMaxDriftColumns || in.groups > kMaxItems) return false;
  if (device.read() != cudaSuccess) return false;
  return for_columns(widest, [&](auto q) { return stacked_for<q.value>(in, widest, device); }) > 0;
}

cudaError_t drift(const DriftProblems& in, float* parts, float* sums, int* queue, cudaStream_t stream) {
  float* const velocities = in.unit && in.temperatures > 1 ? parts : in.velocity;
  const resident::Drift<float> first{
      in.x,
      {in.clouds[0], in.clouds[1], in.clouds[2]},
      {static_cast<int>(in.counts[0]), static_cast<int>(in.counts[1]), static_cast<int>(in.counts[2])},
      static_cast<int>(in.cloud_count),
      in.weights,
      in.guidance,
      in.groups,
      static_cast<int>(in.n),
      static_cast<int>(in.d),
      in.diagonal == kNoDiagonal64 ? resident::kNoDiagonal : static_cast<int>(in.diagonal),
      static_cast<int>(in.precision),
      in.cost,
      in.joint,
      in.eps,
      static_cast<int>(in.temperatures),
      static_cast<int>(in.max_iter),
      velocities,
      sums + 2 * in.groups,
      in.residual,
      in.entropy,
      in.peak};
  const DriftArguments arguments{in, first, 0, queue, velocities, sums};
  constexpr int64_t kMaxGrid = 1 << 16;
  const int64_t widest = widest_plan(in);
  cudaError_t error = cudaMemsetAsync(queue, 0, sizeof(int), stream);
  if (error != cudaSuccess) return error;
  if (in.scaled && in.groups > 0 && !is_squared(in.cost)) {
    const int64_t most = std::max(widest, in.n);  // x itself may count
    error = for_columns(most, [&](auto q) { return launch_lengths<q.value>(arguments, most, stream); });
    if (error != cudaSuccess) return error;
  } else if (in.scaled && in.groups > 0) {
    drift_scale_kernel<<<static_cast<unsigned>(std::min(in.groups, kMaxGrid)), kSumThreads, 0, stream>>>(arguments);
    if ((error = cudaGetLastError()) != cudaSuccess) return error;
  }
  drift_finish_scale_kernel<<<1, kSumThreads, 0, stream>>>(arguments);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  if (in.groups > 0) {
    error = for_columns(widest, [&](auto q) { return launch_drift<q.value>(arguments, widest, stream); });
    if (error != cudaSuccess) return error;
  }
  drift_rms_kernel<<<static_cast<unsigned>(in.temperatures), kSumThreads, 0, stream>>>(arguments);
  if ((error = cudaGetLastError()) != cudaSuccess || !in.unit || in.groups == 0) return error;
  const int64_t size = in.groups * in.n * in.d;
  const int64_t blocks = std::min((size + kSumThreads - 1) / kSumThreads, kMaxGrid);
  drift_mix_kernel<<<static_cast<unsigned>(blocks), kSumThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace fewstep::cuda
