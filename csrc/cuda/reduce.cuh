// The thread block as a team, see shared/sinkhorn_block.h.
#pragma once

namespace fewstep::cuda {

struct Block {
  static constexpr int kLanes = 32;

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ int lane() const { return rank() % kLanes; }
  __device__ int warp() const { return rank() / kLanes; }
  __device__ int warps() const { return size() / kLanes; }
  __device__ void sync() const { __syncthreads(); }

  // Butterflies: addition commutes, so every lane ends with the same bits.
  template <typename T>
  __device__ T lane_sum(T value) const {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
  }

  template <typename T>
  __device__ T lane_max(T value) const {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      const T other = __shfl_xor_sync(0xffffffffu, value, offset);
      value = other > value ? other : value;
    }
    return value;
  }
};

}  // namespace fewstep::cuda
