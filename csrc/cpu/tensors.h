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
using torch::headeronly::toString;
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

// A call of contiguous goes through the dispatcher: as long as a whole pass over a small tensor.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : contiguous(t); }

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
