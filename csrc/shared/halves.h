// Products of float32 matrices on tensor cores that multiply halves: mma.m16n8k16, as a warp of 32 lanes sees it.
//
// A half has 11 significant bits, as TF32 has, at twice the rate. A float32 v is high + low + r: high is v rounded, low
// the rest rounded, |r| <= 2^-24 |v|. The products high high + high low + low high leave out less than 2^-22 |a| |b|,
// in sums of random sign far less. Halves end at 65504 and have no digit below 2^-24: what is split has been multiplied
// by a power of 2 that makes the largest of its neighbours 2^13 to 2^14, so that r is at most 2^-38 of that one
// besides. Where `size` is a norm of up to 16 of them it is 2^11 to 2^14, and r at most 2^-36 of it.
//
// On top of what resident/solver.h asks of a Team: kTensor (whether there are tensor cores), split(p, q, high, low)
// (two floats as pairs of halves, p in the low bits), place(pointer) (a Place, from where it loads),
// load<transposed>(to, place, offset) (four matrices of 8 x 8 halves, of which lane l hands over row l % 8 of matrix
// l / 8, in 4 words aligned to 16 bytes), multiply(c, a, b) (the
// instruction, c += a b), copy<count>(to, from, inside) (an asynchronous copy of floats into shared memory, zeros where
// not inside), commit() (closes a group of copies) and arrived<groups>() (waits for all but the latest groups of this
// thread). With g = lane / 4 and t = lane % 4 a lane has, in pairs, of
//
//     a [16, 16]  (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8), each with the next column
//     b [16, 8]   (2 t, g), (2 t + 8, g), each with the next row
//     c [16, 8]   (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
//     a matrix    (g, 2 t), (g, 2 t + 1), or transposed (2 t, g), (2 t + 1, g)
#pragma once

#include <cstdint>

#include "sinkhorn_block.h"

namespace fewstep::halves {

// How distances and barycentres are multiplied; the numbers of fewstep.ops.sinkhorn.inputs.PRECISIONS.
enum Precision : int { kThree, kOne, kFloat32 };

template <class To, class From>
FEWSTEP_HD To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Powers of 2: `down` brings a value of this size to 2^13 .. 2^14, `up` takes it back. Of 0, and of what is below
// 2^-113, as of 2^-113; of inf and NaN as of the largest number.
struct Power {
  float down, up;

  explicit FEWSTEP_HD Power(float size) : Power(block::least(block::largest(exponent_of(size), 14), 254)) {}

  // Of the root of a square: of what is below 2^-64 as of 2^-64.
  static FEWSTEP_HD Power of_square(float square) {
    const int exponent = exponent_of(square);
    return Power(exponent == 255 ? 254 : (exponent + 127) >> 1);
  }

  // `up` from `down`.
  static FEWSTEP_HD float inverse(float down) {
    return same_bits<float>((uint32_t{254} << 23) - same_bits<uint32_t>(down));
  }

 private:
  explicit FEWSTEP_HD Power(int exponent)
      : down(same_bits<float>(static_cast<uint32_t>(267 - exponent) << 23)),
        up(same_bits<float>(static_cast<uint32_t>(exponent - 13) << 23)) {}
  static FEWSTEP_HD int exponent_of(float value) { return static_cast<int>(same_bits<uint32_t>(value) >> 23 & 0xff); }
};

// A lane's share of a factor, in two parts.
template <int kWords>
struct Factor {
  uint32_t high[kWords], low[kWords];
};

// c += a b, the small products into `small`, which may be c.
template <bool kAll, typename Team>
FEWSTEP_HD void multiply(const Team& team, float (&c)[4], float (&small)[4], const Factor<4>& a, const Factor<2>& b) {
  if constexpr (kAll) {
    team.multiply(small, a.low, b.high);
    team.multiply(small, a.high, b.low);
  }
  team.multiply(c, a.high, b.high);
}

}  // namespace fewstep::halves
