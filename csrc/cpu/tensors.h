// What the CPU ops share besides: checks of inputs, and bfloat16.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>

#include "shared/tensors.h"

namespace fewstep::tensors {

constexpr int64_t kGrain = 16384;  // elements worth a thread's waking up

// Whether all elements are in memory: a storage may have been freed, or made smaller, under its tensors.
inline bool is_held(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t bytes = 0, last = t.storage_offset();
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return (last + 1) * static_cast<int64_t>(t.element_size()) <= bytes;
}

// A tensor as a kernel reads it: contiguous, of that dtype and with so many elements.
inline Tensor expect(const Tensor& t, const char* name, ScalarType dtype, int64_t elements) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "fewstep: ", name, " must be ", toString(dtype), ", got ",
                  toString(t.scalar_type()));
  STD_TORCH_CHECK(t.numel() == elements, "fewstep: ", name, " must have ", elements, " elements, got ", t.numel());
  STD_TORCH_CHECK(is_held(t), "fewstep: the memory of ", name, " has been freed");
  return dense(t);
}

inline Maybe expect_if(const Maybe& t, const char* name, ScalarType dtype, int64_t elements) {
  return t.has_value() ? Maybe(expect(*t, name, dtype, elements)) : std::nullopt;
}

// Elements of a sample of [B, ...].
inline int64_t per_sample(const Tensor& t) {
  int64_t own = 1;
  for (int64_t i = 1; i < t.dim(); ++i) own *= t.size(i);
  return own;
}

// bfloat16, by its bits.
inline float widen(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// To the nearest, ties to even.
inline uint16_t narrow(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace fewstep::tensors
