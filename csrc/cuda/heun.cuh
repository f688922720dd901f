// A step of a sampler outside its network, in one launch; see shared/heun.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "../shared/heun.h"

namespace fewstep::cuda {

// `wrong` is set to 1 where a result is not finite; or null. Instantiated for states float with networks float, __half
// and __nv_bfloat16, and double with those and double.
template <class S, class F>
cudaError_t heun_combine(const heun::Pass<S, F>& pass, int32_t* wrong, cudaStream_t stream);

}  // namespace fewstep::cuda
