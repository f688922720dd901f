// What the CPU ops share of reading and writing tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace fewstep::tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kGrain = 16384;  // elements worth a thread's waking up

template <class F>
auto dispatch(const Tensor& x, F&& body) {
  if (x.scalar_type() == ScalarType::Float) return body(float{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "fewstep: float32 or float64 expected");
  return body(double{});
}

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

template <class T>
const T* read_if(const Maybe& t) {
  return t.has_value() ? read<T>(*t) : nullptr;
}

template <class T>
T* write(Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline Maybe contiguous_if(const Maybe& t) { return t.has_value() ? Maybe(contiguous(*t)) : std::nullopt; }

inline std::vector<int64_t> sizes(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

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
