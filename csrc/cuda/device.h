// What the CUDA ops ask of PyTorch: the device and the stream to launch on.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

// Weak, so that the library loads where torch was built without CUDA.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fewstep::cuda {

inline void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "fewstep: ", cudaGetErrorString(error)); }

// Makes the tensor's device current for torch's CUDA runtime and for ours, which is linked statically.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fewstep: this torch was built without CUDA");
    check(cudaSetDevice(t.get_device_index()));
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fewstep::cuda
