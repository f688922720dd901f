// Linear layers with activations between them, as one op: tiles of samples with their tangents go through all layers
// while they are in cache. Weights are packed once a call; no sum depends on how samples are cut into tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dual.h"

namespace fewstep::cpu {

template <class T>
struct Layer {
  int64_t in, out;
  const T* weight;  // [out, in]
  const T* shift;   // [out], or [B, out] where `each`; or null
  bool each;
  Activation kind;  // after it, but for the last layer
  T beta, threshold;
};

// x [B, in of the first layer] has the D coordinates that are differentiated from column `low` on.
template <class T>
struct Mlp {
  std::vector<Layer<T>> layers;  // at least 2; the last one's `out` is D
  int64_t batch, low;
  const T* x;

  int64_t d() const { return layers.back().out; }
  int64_t depth() const { return static_cast<int64_t>(layers.size()); }
};

// Velocity and products with K probes v. What may be null: first, last, kept, made.
template <class T>
struct ProbePass {
  Probes probes;
  const T* first;  // W_1 v, [K, B, H_1]
  const T* last;   // W_n' v, [K, B, H_n-1]
  T* velocity;     // [B, D]
  T* dots;         // [K, B]
  T* kept;         // z [K + 1, B, H_l] of every hidden layer without its shift, one after the other
  T* made;         // W_n' v, likewise
};

// Velocity and exact trace of three layers.
template <class T>
struct TracePass {
  const T* core;  // W_2' o (W_1 W_3), [H_1, H_2]; null: made here
  T* velocity;    // [B, D]
  T* value;       // [B]
};

// Gradients for what ProbePass made, where not null; `kept` and `last` are what it kept and made.
template <class T>
struct BackwardPass {
  Probes probes;
  const T *velocity, *dots;  // gradients for them
  const T *last, *kept;
  T* x;                             // [B, in]
  std::vector<T*> weights, shifts;  // of every layer
};

template <class T>
void mlp_probes(const Mlp<T>& in, const ProbePass<T>& pass, int64_t threads);
template <class T>
void mlp_trace(const Mlp<T>& in, const TracePass<T>& pass, int64_t threads);
template <class T>
void mlp_backward(const Mlp<T>& in, const BackwardPass<T>& pass, int64_t threads);

}  // namespace fewstep::cpu
