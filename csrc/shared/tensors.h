// What the ops of all devices share of reading and writing tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fewstep::tensors {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// body(0 of the tensor's dtype).
template <class F>
auto dispatch(const Tensor& x, F&& body) {
  if (x.scalar_type() == ScalarType::Float) return body(float{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "fewstep: float32 or float64 expected");
  return body(double{});
}

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* read_if(const Maybe& t) {
  return t.has_value() ? read<T>(*t) : nullptr;
}

template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
T* write_if(const Maybe& t) {
  return t.has_value() ? write<T>(*t) : nullptr;
}

// A call of contiguous goes through the dispatcher: as long as a whole pass over a small tensor.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : contiguous(t); }

inline Maybe dense_if(const Maybe& t) { return t.has_value() ? Maybe(dense(*t)) : std::nullopt; }

inline std::vector<int64_t> sizes(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

}  // namespace fewstep::tensors
