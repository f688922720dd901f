#include <initializer_list>

#include "heun.cuh"

namespace fewstep::cuda {
namespace {

constexpr int kThreads = 256;

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Four numbers a lane that are not aligned: a warp reads and writes 32 neighbours at a time, and its lanes exchange
// them in shared memory. All lanes call.
struct Exchange {
  unsigned char* stage;      // [kLanes * kGroup * 8]
  int64_t at[heun::kGroup];  // of the numbers from `lane` on, every kLanes-th; -1: there is none

  // `own` is where this lane's group begins, n how many numbers it has.
  __device__ Exchange(unsigned char* memory, int64_t own, int n) : stage(memory) {
    const int from = lane() / heun::kGroup, element = lane() % heun::kGroup;
#pragma unroll
    for (int k = 0; k < heun::kGroup; ++k) {
      const int holder = from + k * (kLanes / heun::kGroup);
      const int64_t first = __shfl_sync(kAllLanes, own, holder);
      at[k] = element < __shfl_sync(kAllLanes, n, holder) ? first + element : -1;
    }
  }
  __device__ static int lane() { return static_cast<int>(threadIdx.x % kLanes); }

  template <class A, class T>
  __device__ void load(const T* p, A out[heun::kGroup]) const {
    T* const numbers = reinterpret_cast<T*>(stage) + lane();
#pragma unroll
    for (int k = 0; k < heun::kGroup; ++k) numbers[k * kLanes] = at[k] < 0 ? T(0.0f) : p[at[k]];
    __syncwarp();
    const auto four = reinterpret_cast<const heun::Four<T>*>(stage)[lane()];
    __syncwarp();
    for (int i = 0; i < heun::kGroup; ++i) out[i] = static_cast<A>(four.v[i]);
  }

  template <class T, class A>
  __device__ void store(T* p, const A values[heun::kGroup]) const {
    heun::Four<T> four;
    for (int i = 0; i < heun::kGroup; ++i) four.v[i] = static_cast<T>(values[i]);
    reinterpret_cast<heun::Four<T>*>(stage)[lane()] = four;
    __syncwarp();
    const T* const numbers = reinterpret_cast<const T*>(stage) + lane();
#pragma unroll
    for (int k = 0; k < heun::kGroup; ++k) {
      if (at[k] >= 0) p[at[k]] = numbers[k * kLanes];
    }
    __syncwarp();
  }
};

// A thread takes groups of four elements; those of a sample go on to the next one without gaps.
template <bool kWhole, bool kNoisy, class S, class F>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const heun::Pass<S, F> pass, int64_t groups, int32_t* __restrict__ wrong) {
  const int64_t total = pass.batch * groups, stride = int64_t(gridDim.x) * kThreads;
  bool finite = true;
  if constexpr (kWhole) {
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
      const int64_t sample = pass.batch == 1 ? 0 : i / groups, g = i - sample * groups;
      const heun::Whole access{sample * pass.d + g * heun::kGroup};
      finite &= heun::combine_at<kNoisy>(pass, sample, g, heun::kGroup, access);
    }
  } else {
    __shared__ __align__(32) unsigned char stages[kThreads / kLanes][kLanes * heun::kGroup * sizeof(double)];
    // Whole warps at a time.
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x - Exchange::lane();
    for (int64_t i0 = first; i0 < total; i0 += stride) {
      const bool inside = i0 + Exchange::lane() < total;
      const int64_t i = inside ? i0 + Exchange::lane() : 0;
      const int64_t sample = pass.batch == 1 ? 0 : i / groups, g = i - sample * groups;
      const int64_t left = pass.d - g * heun::kGroup;
      const int n = !inside ? 0 : static_cast<int>(left < heun::kGroup ? left : heun::kGroup);
      const Exchange access(stages[threadIdx.x / kLanes], sample * pass.d + g * heun::kGroup, n);
      finite &= heun::combine_at<kNoisy>(pass, sample, g, n, access);
    }
  }
  if (!finite && wrong != nullptr) *wrong = 1;  // all that write it write the same
}

// Whether four numbers at any multiple of four from here can be read at once; null pointers are not read.
template <class T>
bool whole_from(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(heun::Four<T>) == 0;
}

}  // namespace

template <class S, class F>
cudaError_t heun_combine(const heun::Pass<S, F>& pass, int32_t* wrong, cudaStream_t stream) {
  const int64_t groups = (pass.d + heun::kGroup - 1) / heun::kGroup, total = pass.batch * groups;
  if (total == 0) return cudaSuccess;
  const bool whole = pass.d % heun::kGroup == 0 && whole_from(pass.x) && whole_from(pass.low) &&
                     whole_from(pass.terms[0]) && whole_from(pass.terms[1]) && whole_from(pass.high) &&
                     whole_from(pass.out_low) && whole_from(pass.net);
  int device = 0, processors = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess) {
    return error;
  }
  const int64_t wanted = (total + kThreads - 1) / kThreads, most = int64_t(processors) * (2048 / kThreads);
  const unsigned blocks = static_cast<unsigned>(wanted < most ? wanted : most);
  const auto launch = [&](auto kernel) { kernel<<<blocks, kThreads, 0, stream>>>(pass, groups, wrong); };
  const bool noisy = pass.seeds != nullptr;
  if (whole) {
    noisy ? launch(combine_kernel<true, true, S, F>) : launch(combine_kernel<true, false, S, F>);
  } else {
    noisy ? launch(combine_kernel<false, true, S, F>) : launch(combine_kernel<false, false, S, F>);
  }
  return cudaGetLastError();
}

#define FEWSTEP_INSTANTIATE(S, F) \
  template cudaError_t heun_combine<S, F>(const heun::Pass<S, F>&, int32_t*, cudaStream_t)
FEWSTEP_INSTANTIATE(float, float);
FEWSTEP_INSTANTIATE(float, __half);
FEWSTEP_INSTANTIATE(float, __nv_bfloat16);
FEWSTEP_INSTANTIATE(double, float);
FEWSTEP_INSTANTIATE(double, __half);
FEWSTEP_INSTANTIATE(double, __nv_bfloat16);
FEWSTEP_INSTANTIATE(double, double);
#undef FEWSTEP_INSTANTIATE

}  // namespace fewstep::cuda
