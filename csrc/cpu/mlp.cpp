#include "cpu/mlp.h"

#include <algorithm>
#include <cstring>

#include "cpu/driver.h"

namespace fewstep::cpu {
namespace {

constexpr int64_t kKeptBytes = 64 << 20;  // of a thread between calls

// Memory of the thread that leads: kept between calls while it is small, since new pages cost as much as the work.
template <class T>
struct Workspace {
  Buffer<T> weights, core, stacks;
};

template <class T>
class Lent {
 public:
  ~Lent() { release_above(kKeptBytes, {&mine().weights, &mine().core, &mine().stacks}); }
  Workspace<T>& operator*() { return mine(); }

 private:
  static Workspace<T>& mine() {
    static thread_local Workspace<T> workspace;
    return workspace;
  }
};

template <class T>
struct Packed {
  Matrix<T> matrix;
  T* panels;

  static int64_t width() { return kernels<DualKernels, T>().panel; }
  int64_t count() const { return (matrix.cols + width() - 1) / width(); }
  int64_t stride() const { return matrix.depth * width(); }
  int64_t size() const { return count() * stride(); }

  // out [rows, cols] = a [rows, depth] times its rows from `from` on.
  void multiply(const T* a, int64_t lda, int64_t rows, T* out, int64_t from, int64_t depth) const {
    kernels<DualKernels, T>().multiply(a, lda, rows, panels + from * width(), stride(), depth, matrix.cols, out,
                                       matrix.cols);
  }
  void multiply(const T* a, int64_t rows, T* out) const { multiply(a, matrix.depth, rows, out, 0, matrix.depth); }
};

template <class T>
Packed<T> transposed(const Layer<T>& layer) {
  return {{layer.weight, 1, layer.in, layer.in, layer.out}, nullptr};
}

template <class T>
Packed<T> straight(const T* source, int64_t depth, int64_t cols) {
  return {{source, cols, 1, depth, cols}, nullptr};
}

// Packs all of them, in one loop over the threads.
template <class T>
void pack(std::vector<Packed<T>>& packed, Buffer<T>& memory, int64_t threads) {
  int64_t size = 0, panels = 0;
  for (const Packed<T>& p : packed) {
    size += p.size();
    panels += p.count();
  }
  T* at = memory.get(size);
  for (Packed<T>& p : packed) {
    p.panels = at;
    at += p.size();
  }
  parallel_for(panels, threads, [&](int64_t i) {
    auto p = packed.begin();
    for (; i >= p->count(); ++p) i -= p->count();
    kernels<DualKernels, T>().pack(p->matrix, p->panels, i, i + 1);
  });
}

// Samples [begin, end) and the memory of the thread that has them.
template <class T>
struct Tile {
  int64_t begin, end;
  T *a, *b, *c, *v;

  int64_t count() const { return end - begin; }
};

// Samples in tiles, `rows` of each sample, whose products are some 28 or 56 rows: twice or four times what registers
// hold. All threads get as many. Four stacks, `streams` of each sample, stay in cache.
template <class T, class Body>
void for_each_tile(const Mlp<T>& in, int64_t rows, int64_t streams, int64_t threads, const Body& body) {
  int64_t widest = 1;
  for (const Layer<T>& layer : in.layers) widest = std::max({widest, layer.in, layer.out});
  const int64_t share = std::max<int64_t>((in.batch + threads - 1) / threads, 1);
  const int64_t most = std::clamp<int64_t>(56 / rows, 8, 28), tiles = (share + most - 1) / most;
  const int64_t size = (share + tiles - 1) / tiles;
  const int64_t stack = round_up(streams * size * widest, 16);
  parallel_for((in.batch + size - 1) / size, threads, [&](int64_t i) {
    static thread_local Buffer<T> memory;
    T* own = memory.get(4 * stack);
    body(Tile<T>{i * size, std::min((i + 1) * size, in.batch), own, own + stack, own + 2 * stack, own + 3 * stack});
    release_above(kKeptBytes, {&memory});
  });
}

template <class T>
Elementwise<T> elementwise(const Layer<T>& layer, int64_t tangents, const Tile<T>& tile, const T* z) {
  const int64_t count = tile.count() * layer.out;
  const T* shift = layer.shift != nullptr && layer.each ? layer.shift + tile.begin * layer.out : layer.shift;
  return {
      layer.kind, layer.beta, layer.threshold, count, tangents, z, nullptr, 0, shift, layer.each ? count : layer.out,
      1};
}

template <class T>
void add_shift(const Layer<T>& layer, const Tile<T>& tile, T* out) {
  if (layer.shift == nullptr) return;
  for (int64_t i = 0; i < tile.count(); ++i) {
    const T* shift = layer.shift + (layer.each ? (tile.begin + i) * layer.out : 0);
    for (int64_t j = 0; j < layer.out; ++j) out[i * layer.out + j] += shift[j];
  }
}

// The rows of a tile in a stack [K + 1, B, n] that lies behind `stacks`.
template <class T, class Body>
void for_each_stream(const Mlp<T>& in, const Tile<T>& tile, int64_t tangents, int64_t n, const Body& body) {
  for (int64_t k = 0; k <= tangents; ++k) body((k * in.batch + tile.begin) * n, k * tile.count() * n, tile.count() * n);
}

template <class T>
double work_of(const Mlp<T>& in, int64_t streams) {
  double work = 0;
  for (const Layer<T>& layer : in.layers) work += double(layer.in) * layer.out;
  return work * in.batch * streams;
}

template <class T>
void probe_tile(const Mlp<T>& in, const ProbePass<T>& pass, const std::vector<Packed<T>>& weights, const Tile<T>& t) {
  const DualKernels<T>& run = kernels<DualKernels, T>();
  const int64_t count = t.count(), tangents = pass.probes.count, d = in.d(), depth = in.depth();
  if (pass.first == nullptr || pass.last == nullptr || pass.made != nullptr) {
    for (int64_t k = 0; k < tangents; ++k) {
      run.probe(pass.probes, t.v + k * count * d, k * in.batch + t.begin, k * in.batch + t.end);
    }
  }
  T *z = t.a, *h = t.b, *kept = pass.kept;
  for (int64_t l = 0; l + 1 < depth; ++l) {
    const Layer<T>& layer = in.layers[l];
    const Packed<T>& w = weights[l];
    const int64_t n = layer.out;
    if (l > 0) {
      w.multiply(h, (tangents + 1) * count, z);
    } else {
      w.multiply(in.x + t.begin * layer.in, count, z);
      if (pass.first == nullptr) {
        w.multiply(t.v, d, tangents * count, z + count * n, in.low, d);
      } else {
        for (int64_t k = 0; k < tangents; ++k) {
          std::memcpy(z + (k + 1) * count * n, pass.first + (k * in.batch + t.begin) * n, count * n * sizeof(T));
        }
      }
    }
    if (kept != nullptr) {
      for_each_stream(in, t, tangents, n, [&](int64_t whole, int64_t own, int64_t size) {
        std::memcpy(kept + whole, z + own, size * sizeof(T));
      });
      kept += (tangents + 1) * in.batch * n;
    }
    run.activate(elementwise(layer, tangents, t, z), z, 0, count * n);
    std::swap(z, h);
  }
  const Layer<T>& end = in.layers.back();
  T* velocity = pass.velocity + t.begin * d;
  weights[depth - 1].multiply(h, count, velocity);
  if (pass.last != nullptr || pass.made != nullptr) {
    for (int64_t k = 0; k < tangents; ++k) {
      const int64_t at = k * in.batch + t.begin;
      if (pass.made != nullptr) weights[depth].multiply(t.v + k * count * d, count, pass.made + at * end.in);
      const T* last = (pass.made != nullptr ? pass.made : pass.last) + at * end.in;
      run.dots(last, h + (k + 1) * count * end.in, count, end.in, pass.dots + at);
    }
  } else {
    weights[depth - 1].multiply(h + count * end.in, tangents * count, z);
    for (int64_t k = 0; k < tangents; ++k) {
      run.dots(t.v + k * count * d, z + k * count * d, count, d, pass.dots + k * in.batch + t.begin);
    }
  }
  add_shift(end, t, velocity);
}

template <class T>
void trace_tile(const Mlp<T>& in, const TracePass<T>& pass, const std::vector<Packed<T>>& weights, const T* ones,
                const Tile<T>& t) {
  const DualKernels<T>& run = kernels<DualKernels, T>();
  const int64_t count = t.count(), n1 = in.layers[0].out, n2 = in.layers[1].out;
  const auto slopes = [&](const Layer<T>& layer, const T* z, T* out) {  // [a(z); a'(z)]
    Elementwise<T> e = elementwise(layer, 1, t, z);
    e.shared = ones;
    e.period = layer.out;
    run.activate(e, out, 0, e.count);
  };
  weights[0].multiply(in.x + t.begin * in.layers[0].in, count, t.a);
  slopes(in.layers[0], t.a, t.b);
  weights[1].multiply(t.b, count, t.a);
  slopes(in.layers[1], t.a, t.c);
  T* velocity = pass.velocity + t.begin * in.d();
  weights[2].multiply(t.c, count, velocity);
  add_shift(in.layers[2], t, velocity);
  weights[3].multiply(t.b + count * n1, count, t.a);
  run.dots(t.a, t.c + count * n2, count, n2, pass.value + t.begin);
}

// Per layer: the gradients for its outputs, and its inputs, so that G' H is the gradient for its weight.
template <class T>
struct Stacks {
  T *g, *h;  // [K + 1, B, out] and [K + 1, B, in]
};

// Of the last layer, outputs are the velocity with the probes themselves for its tangents, and inputs' tangents are
// times the gradients for the products.
template <class T>
void backward_tile(const Mlp<T>& in, const BackwardPass<T>& pass, const std::vector<Packed<T>>& weights,
                   const std::vector<Stacks<T>>& stacks, const Tile<T>& t) {
  const DualKernels<T>& run = kernels<DualKernels, T>();
  const int64_t count = t.count(), tangents = pass.probes.count, depth = in.depth(), d = in.d();
  const int64_t width = in.layers[0].in, most = in.layers.back().in;
  std::memcpy(stacks.back().g + t.begin * d, pass.velocity + t.begin * d, count * d * sizeof(T));
  std::memcpy(stacks[0].h + t.begin * width, in.x + t.begin * width, count * width * sizeof(T));
  for (int64_t k = 0; k < tangents; ++k) {
    const int64_t at = (k + 1) * in.batch + t.begin;
    T *v = stacks.back().g + at * d, *padded = stacks[0].h + at * width;
    run.probe(pass.probes, v, at - in.batch, at - in.batch + count);
    std::memset(padded, 0, count * width * sizeof(T));
    for (int64_t i = 0; i < count; ++i) std::memcpy(padded + i * width + in.low, v + i * d, d * sizeof(T));
  }
  T *z = t.a, *h = t.b, *g = t.c;
  weights[depth - 1].multiply(pass.velocity + t.begin * d, count, g);
  const T* kept = pass.kept;
  for (int64_t l = 0; l + 1 < depth; ++l) kept += (tangents + 1) * in.batch * in.layers[l].out;
  for (int64_t l = depth - 2; l >= 0; --l) {
    const Layer<T>& layer = in.layers[l];
    const int64_t n = layer.out;
    kept -= (tangents + 1) * in.batch * n;
    for_each_stream(in, t, tangents, n, [&](int64_t whole, int64_t own, int64_t size) {
      std::memcpy(z + own, kept + whole, size * sizeof(T));
    });
    const Elementwise<T> e = elementwise(layer, tangents, t, z);
    run.activate(e, h, 0, e.count);
    if (l == depth - 2) {
      for (int64_t k = 0; k < tangents; ++k) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = k * in.batch + t.begin + i;
          const T up = pass.dots[row];
          const T* last = pass.last + row * most;
          T *to = g + ((k + 1) * count + i) * most, *scaled = h + ((k + 1) * count + i) * most;
          for (int64_t j = 0; j < most; ++j) {
            to[j] = up * last[j];
            scaled[j] *= up;
          }
        }
      }
    }
    for_each_stream(in, t, tangents, n, [&](int64_t whole, int64_t own, int64_t size) {
      std::memcpy(stacks[l + 1].h + whole, h + own, size * sizeof(T));
    });
    run.activate_backward(e, g, h, 0, e.count);
    for_each_stream(in, t, tangents, n, [&](int64_t whole, int64_t own, int64_t size) {
      std::memcpy(stacks[l].g + whole, h + own, size * sizeof(T));
    });
    if (l > 0) {
      weights[l].multiply(h, (tangents + 1) * count, g);
    } else if (pass.x != nullptr) {
      weights[0].multiply(h, count, pass.x + t.begin * width);
    }
  }
}

// Gradients for weights and shifts: sums over the batch in its order, of blocks that stay in cache. Rows of the stacks
// often lie a multiple of 1 KiB apart and would share few sets of it, so that blocks are copied.
template <class T>
void sums_over_batch(const Mlp<T>& in, const BackwardPass<T>& pass, const std::vector<Stacks<T>>& stacks,
                     int64_t threads) {
  constexpr int64_t kOuts = 112, kIns = 128, kDepth = 128;
  struct Task {
    int64_t layer, row, column;  // column -1: the shift
  };
  const int64_t rows = (pass.probes.count + 1) * in.batch;
  std::vector<Task> tasks;
  for (int64_t l = 0; l < in.depth(); ++l) {
    const Layer<T>& layer = in.layers[l];
    for (int64_t i = 0; pass.weights[l] != nullptr && i < layer.out; i += kOuts) {
      for (int64_t j = 0; j < layer.in; j += kIns) tasks.push_back({l, i, j});
    }
    if (pass.shifts[l] != nullptr) tasks.push_back({l, 0, -1});
  }
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t at) {
    const auto [l, i, j] = tasks[at];
    const Layer<T>& layer = in.layers[l];
    if (j < 0) {
      T* out = pass.shifts[l];
      const T* g = stacks[l].g;
      if (layer.each) {
        std::memcpy(out, g, in.batch * layer.out * sizeof(T));
        return;
      }
      std::fill_n(out, layer.out, T(0));
      for (int64_t b = 0; b < in.batch; ++b) {
        for (int64_t o = 0; o < layer.out; ++o) out[o] += g[b * layer.out + o];
      }
      return;
    }
    const int64_t outs = std::min(kOuts, layer.out - i), ins = std::min(kIns, layer.in - j);
    T* out = pass.weights[l] + i * layer.in + j;
    for (int64_t o = 0; o < outs; ++o) std::fill_n(out + o * layer.in, ins, T(0));
    static thread_local Buffer<T> memory;
    T *g = memory.get(kDepth * (kOuts + kIns)), *h = g + kDepth * kOuts;
    for (int64_t row = 0; row < rows; row += kDepth) {
      const int64_t depth = std::min(kDepth, rows - row);
      for (int64_t r = 0; r < depth; ++r) {
        std::memcpy(g + r * kOuts, stacks[l].g + (row + r) * layer.out + i, outs * sizeof(T));
      }
      Packed<T> own = straight<T>(stacks[l].h + row * layer.in + j, depth, ins);
      own.matrix.row = layer.in;
      kernels<DualKernels, T>().pack(own.matrix, h, 0, own.count());
      kernels<DualKernels, T>().multiply_turned(g, kOuts, outs, h, own.stride(), depth, ins, out, layer.in);
    }
  });
}

int64_t team(double work, int64_t threads) { return work < kWorthATeam ? 1 : threads; }

}  // namespace

template <class T>
void mlp_probes(const Mlp<T>& in, const ProbePass<T>& pass, int64_t threads) {
  const int64_t streams = pass.probes.count + 1, own = team(work_of(in, streams), threads);
  Lent<T> lent;
  with_team(own, [&] {
    std::vector<Packed<T>> weights;
    for (const Layer<T>& layer : in.layers) weights.push_back(transposed(layer));
    if (pass.made != nullptr) weights.push_back(straight(in.layers.back().weight, in.d(), in.layers.back().in));
    pack(weights, (*lent).weights, own);
    for_each_tile(in, streams, streams, own, [&](const Tile<T>& t) { probe_tile(in, pass, weights, t); });
  });
}

template <class T>
void mlp_trace(const Mlp<T>& in, const TracePass<T>& pass, int64_t threads) {
  const int64_t n1 = in.layers[0].out, n2 = in.layers[1].out, d = in.d();
  const int64_t own = team(work_of(in, 1), threads);
  Lent<T> lent;
  with_team(own, [&] {
    std::vector<Packed<T>> weights;
    for (const Layer<T>& layer : in.layers) weights.push_back(transposed(layer));
    weights.push_back(pass.core != nullptr ? straight(pass.core, n1, n2) : straight(in.layers[2].weight, d, n2));
    pack(weights, (*lent).weights, own);
    if (pass.core == nullptr) {
      Packed<T> core = straight<T>(nullptr, n1, n2);
      core.panels = (*lent).core.get(core.size());
      const int64_t width = core.width();
      parallel_for(core.count(), own, [&](int64_t p) {
        T* to = core.panels + p * core.stride();
        const T* factor = weights[1].panels + p * core.stride();  // W_2' lies in panels as its product with this does
        kernels<DualKernels, T>().multiply(in.layers[0].weight + in.low, in.layers[0].in, n1,
                                           weights[3].panels + p * weights[3].stride(), 0, d, width, to, width);
        for (int64_t i = 0; i < n1 * width; ++i) to[i] *= factor[i];
      });
      weights[3] = core;
    }
    const std::vector<T> ones(std::max(n1, n2), T(1));
    for_each_tile(in, 1, 2, own, [&](const Tile<T>& t) { trace_tile(in, pass, weights, ones.data(), t); });
  });
}

template <class T>
void mlp_backward(const Mlp<T>& in, const BackwardPass<T>& pass, int64_t threads) {
  const int64_t streams = pass.probes.count + 1, own = team(2 * work_of(in, streams), threads);
  Lent<T> lent;
  int64_t features = 0;
  for (const Layer<T>& layer : in.layers) features += layer.in + layer.out;
  T* at = (*lent).stacks.get(features * streams * in.batch);
  std::vector<Stacks<T>> stacks;
  for (const Layer<T>& layer : in.layers) {
    stacks.push_back({at, at + layer.out * streams * in.batch});
    at += (layer.in + layer.out) * streams * in.batch;
  }
  with_team(own, [&] {
    std::vector<Packed<T>> weights;
    for (const Layer<T>& layer : in.layers) weights.push_back(straight(layer.weight, layer.out, layer.in));
    pack(weights, (*lent).weights, own);
    for_each_tile(in, streams, streams, own, [&](const Tile<T>& t) { backward_tile(in, pass, weights, stacks, t); });
    sums_over_batch(in, pass, stacks, own);
  });
}

template void mlp_probes(const Mlp<float>&, const ProbePass<float>&, int64_t);
template void mlp_probes(const Mlp<double>&, const ProbePass<double>&, int64_t);
template void mlp_trace(const Mlp<float>&, const TracePass<float>&, int64_t);
template void mlp_trace(const Mlp<double>&, const TracePass<double>&, int64_t);
template void mlp_backward(const Mlp<float>&, const BackwardPass<float>&, int64_t);
template void mlp_backward(const Mlp<double>&, const BackwardPass<double>&, int64_t);

}  // namespace fewstep::cpu
