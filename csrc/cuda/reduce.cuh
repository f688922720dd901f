// The thread block, or a cluster of them, as a team: see shared/sinkhorn_block.h, resident/solver.h and halves.h.
#pragma once

#include <cooperative_groups.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fewstep::cuda {

template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

struct Block {
  static constexpr int kLanes = 32;
  static constexpr bool kTensor = true;

  __device__ int opaque(int value) const {
    asm volatile("" : "+r"(value));
    return value;
  }
  __device__ int rank() const { return opaque(static_cast<int>(threadIdx.x)); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  // Not a remainder and a quotient: the compiler does not know that a rank is not negative.
  __device__ int lane() const { return rank() & (kLanes - 1); }
  __device__ int warp() const { return static_cast<int>(static_cast<unsigned>(rank()) / kLanes); }
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

  __device__ int ranks() const { return 1; }
  __device__ int block() const { return 0; }
  __device__ void sync_all() const { __syncthreads(); }
  __device__ void sync_lanes() const { __syncwarp(); }
  __device__ bool any(bool flag) const { return __syncthreads_or(flag); }
  __device__ bool lane_any(bool flag) const { return __any_sync(0xffffffffu, flag); }
  template <typename T>
  __device__ T* peer(T* own, int) const {
    return own;
  }

  __device__ void split(float p, float q, uint32_t& high, uint32_t& low) const {
    const __half2 rounded = __floats2half2_rn(p, q);
    const float2 back = __half22float2(rounded);
    const __half2 rest = __floats2half2_rn(p - back.x, q - back.y);
    __builtin_memcpy(&high, &rounded, sizeof high);
    __builtin_memcpy(&low, &rest, sizeof low);
  }

  // An address that is computed once, and not anew for each instruction that begins there.
  using Place = int;
  __device__ Place place(const float* pointer) const {
    return opaque(static_cast<int>(__cvta_generic_to_shared(pointer)));
  }

  template <bool kTransposed>
  __device__ void load(uint32_t (&to)[4], Place base, int elements) const {
    const int from = base + elements * static_cast<int>(sizeof(float));
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "r"(from)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "r"(from)
                   : "memory");
    }
  }

  __device__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }

  template <int kCount>
  __device__ void copy(float* to, const float* from, bool inside) const {
    const auto target = static_cast<unsigned>(__cvta_generic_to_shared(to));
    constexpr int kBytes = kCount * static_cast<int>(sizeof(float));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(from), "n"(kBytes),
                 "r"(inside ? kBytes : 0)
                 : "memory");
  }
  __device__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kGroups>
  __device__ void arrived() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
  }

  // Row by row over the lanes: at each step a lane hands half of its rows to its partner and keeps the other half,
  // which takes R + 1 shuffles instead of 5 R. Row r ends in the 4 lanes from 4 r on.
  template <typename T, int R, typename Combine>
  __device__ void combine_rows(T (&values)[R], T (&own)[1], Combine combine) const {
    static_assert(R == 8);
    const int own_lane = lane();
    int offset = kLanes / 2;
#pragma unroll
    for (int half = R / 2; half > 0; half /= 2, offset /= 2) {
      const bool upper = own_lane & offset;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const T sent = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
        values[i] = combine(kept, __shfl_xor_sync(0xffffffffu, sent, offset));
      }
    }
    own[0] = values[0];
    for (; offset > 0; offset /= 2) own[0] = combine(own[0], __shfl_xor_sync(0xffffffffu, own[0], offset));
  }

  template <typename T, int R>
  __device__ void spread(const T (&own)[1], T (&values)[R]) const {
#pragma unroll
    for (int r = 0; r < R; ++r) values[r] = __shfl_sync(0xffffffffu, own[0], r * (kLanes / R));
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Blocks of one cluster that share a problem.
struct Cluster : Block {
  __device__ int ranks() const { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
  __device__ int block() const { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
  __device__ void sync_all() const { cooperative_groups::this_cluster().sync(); }
  template <typename T>
  __device__ T* peer(T* own, int rank) const {
    return cooperative_groups::this_cluster().map_shared_rank(own, rank);
  }
};
#endif

}  // namespace fewstep::cuda
