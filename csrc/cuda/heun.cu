#include <initializer_list>

#include "heun.cuh"

namespace fewstep::cuda {
namespace {

constexpr int kThreads = 256;

// A thread takes groups of four elements; those of a sample go on to the next one without gaps.
template <bool kWhole, bool kNoisy, class S, class F>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const heun::Pass<S, F> pass, int64_t groups, int32_t* __restrict__ wrong) {
  const int64_t total = pass.batch * groups, stride = int64_t(gridDim.x) * kThreads;
  bool finite = true;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    const int64_t sample = pass.batch == 1 ? 0 : i / groups;
    finite &= heun::combine_at<kWhole, kNoisy>(pass, sample, i - sample * groups);
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
