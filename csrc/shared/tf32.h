// Products of float32 matrices on tensor cores that multiply TF32: mma.m16n8k8, as a warp of 32 lanes sees it.
//
// TF32 has 11 significant bits. A float32 v is high + low + r: high its first 11 bits, |low| < 2^-10 |v|, and r the
// last 2 of 24, |r| < 2^-21 |v|. The products high high + high low + low high leave out less than 2^-19 |a| |b|, and in
// sums of random sign far less: a cost is then off by less than 2^-19 (|x|^2 + |y|^2), and a value, an average of
// costs, by a fifth of the 1e-5 that float32 kernels may be. A mask and a subtraction take fewer slots than rounding.
//
// On top of what sinkhorn_resident.h asks of a Team: kTensor (whether there are tensor cores), multiply(c, a, b) (the
// instruction, c += a b), copy<count>(to, from, inside) (an asynchronous copy of floats into shared memory, zeros where
// not inside), commit() (closes a group of copies) and arrived<groups>() (waits for all but the latest groups of this
// thread). With g = lane / 4 and t = lane % 4 a lane has, of
//
//     a [16, 8]   (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//     b [8, 8]    (t, g), (t + 4, g)
//     c [16, 8]   (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
#pragma once

#include <cstdint>
#include <cstring>

#include "sinkhorn_block.h"

namespace fewstep::tf32 {

// How distances and barycentres are multiplied; the numbers of fewstep.ops.raw.PRECISIONS.
enum Precision : int { kThree, kOne, kFloat32 };
constexpr uint32_t kBits = 0xffffe000u;

// The bits that TF32 has; NaN and inf stay what they are. Tensor cores do not look at the others.
FEWSTEP_HD float truncated(float value) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(__float_as_uint(value) & kBits);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= kBits;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
#endif
}

// A lane's share of a factor, in two parts.
template <int kCount>
struct Factor {
  float high[kCount], low[kCount];

  FEWSTEP_HD void split(const float (&values)[kCount]) {
    FEWSTEP_UNROLL
    for (int i = 0; i < kCount; ++i) {
      high[i] = truncated(values[i]);
      low[i] = values[i] - high[i];
    }
  }
};

// c += a b, the small products into `small`, which may be c.
template <typename Team>
FEWSTEP_HD void multiply(const Team& team, float (&c)[4], float (&small)[4], const Factor<4>& a, const Factor<2>& b,
                         bool three) {
  if (three) {
    team.multiply(small, a.low, b.high);
    team.multiply(small, a.high, b.low);
  }
  team.multiply(c, a.high, b.high);
}

}  // namespace fewstep::tf32
