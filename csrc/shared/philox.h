// Philox4x32-10, a counter-based generator: 128 random bits that are a function of a 64-bit key and a 128-bit counter
// (Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011), and the probes drawn from it.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace fewstep::philox {

struct Words {
  uint32_t w[4];
};

FEWSTEP_HD_INLINED Words philox(Words counter, uint32_t key0, uint32_t key1) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = kMultiplier0 * counter.w[0], p1 = kMultiplier1 * counter.w[2];
    counter = {{uint32_t(p1 >> 32) ^ counter.w[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ counter.w[3] ^ key1,
                uint32_t(p0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// What all coordinates of a probe share. Limits: seed < 2^63, sample < 2^48, step < 2^32, stage < 16, k < kRow.
struct Stream {
  uint64_t seed, sample;
  uint32_t step, stage;
};

constexpr uint32_t kRow = 0xFFFF;  // the k of the numbers that choose Hadamard rows

// 128 bits for block < 2^28 of probe k.
FEWSTEP_HD_INLINED Words draw(const Stream& s, uint32_t k, uint32_t block) {
  return philox({{block | s.stage << 28, s.step, k | uint32_t(s.sample >> 32) << 16, uint32_t(s.sample)}},
                uint32_t(s.seed), uint32_t(s.seed >> 32));
}

// Standard normals by Box-Muller from words of a block, computed in float64 so that float32 is rounded but once.
FEWSTEP_HD_INLINED void normals(const Words& words, double out[4]) {
  constexpr double kUnit = 1.0 / 4294967296.0;
#ifndef __CUDA_ARCH__
  constexpr double kTwoPi = 6.283185307179586476925;
#endif
  for (int i = 0; i < 4; i += 2) {
    const double radius = sqrt(-2 * log((words.w[i] + 0.5) * kUnit)), turn = (words.w[i + 1] + 0.5) * kUnit;
#ifdef __CUDA_ARCH__
    double sine, cosine;  // of whole turns, which need no local memory for their reduction
    sincospi(2 * turn, &sine, &cosine);
    out[i] = radius * cosine;
    out[i + 1] = radius * sine;
#else
    out[i] = radius * cos(kTwoPi * turn);
    out[i + 1] = radius * sin(kTwoPi * turn);
#endif
  }
}

// Row k of a random order of the 2^bits rows of the Hadamard matrix: two rounds of invertible affine maps and shifts.
FEWSTEP_HD_INLINED uint32_t hadamard_row(const Stream& s, uint32_t k, int bits) {
  const Words w = draw(s, kRow, 0);
  const uint32_t mask = (uint32_t(1) << bits) - 1;
  const int shift = (bits + 1) / 2;
  uint32_t row = (k * (w.w[0] | 1) + w.w[2]) & mask;
  row ^= row >> shift;
  row = (row * (w.w[1] | 1) + w.w[3]) & mask;
  return row ^ row >> shift;
}

// Whether H_ij of the Hadamard matrix is -1.
FEWSTEP_HD_INLINED uint32_t hadamard_sign(uint32_t i, uint32_t j) {
  uint32_t v = i & j;
  v ^= v >> 16;
  v ^= v >> 8;
  v ^= v >> 4;
  return 0x6996u >> (v & 15) & 1;
}

}  // namespace fewstep::philox
