// The CPU ops of dual numbers and probes: tensors in, ranges of work to the kernels, on PyTorch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/driver.h"
#include "cpu/dual.h"
#include "cpu/mlp.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
namespace cpu = fewstep::cpu;

constexpr int64_t kGrain = 16384;  // elements worth a thread's waking up

template <class T>
const cpu::DualKernels<T>& kernels() {
  static constexpr cpu::Compiled<cpu::DualKernels> kByIsa[] = {
      {cpu::base::kDualFloat, cpu::base::kDualDouble},
#if defined(__x86_64__)
      {cpu::avx2::kDualFloat, cpu::avx2::kDualDouble},
      {cpu::avx512::kDualFloat, cpu::avx512::kDualDouble},
#endif
  };
  return cpu::in_use<T>(kByIsa);
}

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

Maybe contiguous_if(const Maybe& t) { return t.has_value() ? Maybe(contiguous(*t)) : std::nullopt; }

std::vector<int64_t> sizes(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

struct ActivationInputs {
  Tensor z;
  Maybe shared, shift;
  int64_t tangents, kind, inner;
  double beta, threshold;

  template <class T>
  cpu::Elementwise<T> as() const {
    return {static_cast<cpu::Activation>(kind),
            static_cast<T>(beta),
            static_cast<T>(threshold),
            z.numel() / (shared.has_value() ? 1 : tangents + 1),
            tangents,
            read<T>(z),
            read_if<T>(shared),
            shared.has_value() ? shared->numel() / std::max<int64_t>(tangents, 1) : 0,
            read_if<T>(shift),
            shift.has_value() ? shift->numel() : 1,
            inner};
  }
};

Tensor dual_activate(const Tensor& z, const Maybe& shared, const Maybe& shift, int64_t tangents, int64_t kind,
                     double beta, double threshold, int64_t inner) {
  const ActivationInputs in{contiguous(z), contiguous_if(shared), contiguous_if(shift), tangents, kind, inner, beta,
                            threshold};
  std::vector<int64_t> shape = sizes(z);
  if (shared.has_value()) shape[0] *= tangents + 1;
  Tensor out = new_empty(in.z, shape);
  dispatch(z, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Elementwise<T> e = in.as<T>();
    T* to = write<T>(out);
    torch::stable::parallel_for(0, e.count, std::max<int64_t>(kGrain / (tangents + 1), 1),
                                [&](int64_t begin, int64_t end) { kernels<T>().activate(e, to, begin, end); });
  });
  return out;
}

Tensor dual_activate_backward(const Tensor& g, const Tensor& z, const Maybe& shared, const Maybe& shift,
                              int64_t tangents, int64_t kind, double beta, double threshold, int64_t inner) {
  const ActivationInputs in{contiguous(z), contiguous_if(shared), contiguous_if(shift), tangents, kind, inner, beta,
                            threshold};
  const Tensor gc = contiguous(g);
  Tensor out = new_empty(in.z, sizes(z));
  dispatch(z, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Elementwise<T> e = in.as<T>();
    const T* from = read<T>(gc);
    T* to = write<T>(out);
    torch::stable::parallel_for(
        0, e.count, std::max<int64_t>(kGrain / (tangents + 1), 1),
        [&](int64_t begin, int64_t end) { kernels<T>().activate_backward(e, from, to, begin, end); });
  });
  return out;
}

struct NormInputs {
  Tensor z;
  Maybe shift, weight, bias;
  int64_t tangents, groups;
  bool centred;
  double eps;

  int64_t n() const {
    int64_t own = 1;
    for (int64_t i = 1; i < z.dim(); ++i) own *= z.size(i);
    return own / groups;
  }
  int64_t rows() const { return z.size(0) / (tangents + 1) * groups; }

  template <class T>
  cpu::Norm<T> as() const {
    return {rows(),
            n(),
            groups,
            tangents,
            centred,
            eps,
            read<T>(z),
            read_if<T>(shift),
            shift.has_value() ? std::max<int64_t>(shift->numel() / n(), 1) : 1,
            read_if<T>(weight),
            read_if<T>(bias)};
  }
};

Tensor dual_norm(const Tensor& z, const Maybe& shift, const Maybe& weight, const Maybe& bias, int64_t tangents,
                 int64_t groups, bool centred, double eps) {
  const NormInputs in{
      contiguous(z), contiguous_if(shift), contiguous_if(weight), contiguous_if(bias), tangents, groups, centred, eps};
  Tensor out = new_empty(in.z, sizes(z));
  dispatch(z, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Norm<T> norm = in.as<T>();
    T* to = write<T>(out);
    torch::stable::parallel_for(0, norm.rows, std::max<int64_t>(kGrain / (norm.n * (tangents + 1)), 1),
                                [&](int64_t begin, int64_t end) { kernels<T>().normalize(norm, to, begin, end); });
  });
  return out;
}

// Gradients of weight and bias from those of each chunk, [count, 2, width].
template <class T>
void add_sums(const std::vector<T>& sums, int64_t width, int64_t count, Tensor& gw, Tensor& gb) {
  T *w = write<T>(gw), *b = write<T>(gb);
  for (int64_t c = 0; c < count; ++c) {
    const T* own = sums.data() + 2 * width * c;
    for (int64_t j = 0; j < width; ++j) {
      w[j] += own[j];
      b[j] += own[width + j];
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> dual_norm_backward(const Tensor& g, const Tensor& z, const Maybe& shift,
                                                      const Maybe& weight, int64_t tangents, int64_t groups,
                                                      bool centred, double eps) {
  const NormInputs in{
      contiguous(z), contiguous_if(shift), contiguous_if(weight), std::nullopt, tangents, groups, centred, eps};
  const Tensor gc = contiguous(g);
  const int64_t width = groups * in.n();
  Tensor gz = new_empty(in.z, sizes(z)), gw = new_zeros(in.z, {width}), gb = new_zeros(in.z, {width});
  dispatch(z, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Norm<T> norm = in.as<T>();
    // Chunks, and with them the sums over them, do not depend on the number of threads.
    if (norm.rows == 0) return;
    const cpu::Chunks chunks = cpu::Chunks::of(norm.rows, 1);
    std::vector<T> sums(2 * width * chunks.count);
    const T* from = read<T>(gc);
    T* to = write<T>(gz);
    torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        T* own = sums.data() + 2 * width * c;
        kernels<T>().normalize_backward(norm, from, to, own, own + width, c * chunks.rows,
                                        std::min((c + 1) * chunks.rows, norm.rows));
      }
    });
    add_sums<T>(sums, width, chunks.count, gw, gb);
  });
  return {gz, gw, gb};
}

// Tangents in bfloat16 beside a float primal: tiles of both become a float stack in cache, for the same kernels.
float widen(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// To the nearest, ties to even.
uint16_t narrow(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A primal [count] and its tangents [K, count].
struct Pair {
  Tensor primal, tangents;

  int64_t k() const { return primal.numel() == 0 ? 0 : tangents.numel() / primal.numel(); }

  // Elements [begin, begin + n) as [K + 1, n].
  void gather(int64_t begin, int64_t n, float* to) const {
    std::copy_n(read<float>(primal) + begin, n, to);
    const uint16_t* from = read<uint16_t>(tangents) + begin;
    for (int64_t left = k(); left > 0; --left, from += primal.numel()) {
      to += n;
      for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
    }
  }

  void scatter(int64_t begin, int64_t n, const float* from) {
    std::copy_n(from, n, write<float>(primal) + begin);
    uint16_t* to = write<uint16_t>(tangents) + begin;
    for (int64_t left = k(); left > 0; --left, to += primal.numel()) {
      from += n;
      for (int64_t i = 0; i < n; ++i) to[i] = narrow(from[i]);
    }
  }
};

Pair pair(const Tensor& primal, const Tensor& tangents) {
  STD_TORCH_CHECK(primal.scalar_type() == ScalarType::Float && tangents.scalar_type() == ScalarType::BFloat16,
                  "fewstep: float32 with tangents in bfloat16 expected");
  return {contiguous(primal), contiguous(tangents)};
}

Pair like(const Pair& p) { return {new_empty(p.primal, sizes(p.primal)), new_empty(p.tangents, sizes(p.tangents))}; }

void add_shift(const Maybe& shift, int64_t inner, int64_t begin, int64_t n, float* z) {
  if (!shift.has_value()) return;
  const float* from = read<float>(*shift);
  const int64_t channels = shift->numel();
  for (int64_t i = 0; i < n; ++i) z[i] += from[(begin + i) / inner % channels];
}

// Tiles of [first, last), multiples of `step`, each with room for two stacks.
template <class F>
void over_tiles(int64_t first, int64_t last, int64_t k, int64_t step, const F& body) {
  const int64_t most = std::max<int64_t>(kGrain / (k + 1) / step, 1) * step;
  std::vector<float> room(2 * (k + 1) * most);
  for (int64_t begin = first; begin < last; begin += most) {
    const int64_t n = std::min(most, last - begin);
    body(begin, n, room.data(), room.data() + (k + 1) * n);
  }
}

struct PairActivation {
  Pair in;
  Maybe shift;
  int64_t kind, inner;
  double beta, threshold;

  // The shift is in the stack already.
  cpu::Elementwise<float> as(const float* stack, int64_t n) const {
    const auto own = static_cast<cpu::Activation>(kind);
    return {own, float(beta), float(threshold), n, in.k(), stack, nullptr, 0, nullptr, 1, 1};
  }

  template <class F>
  void run(const F& body) const {
    torch::stable::parallel_for(
        0, in.primal.numel(), std::max<int64_t>(kGrain / (in.k() + 1), 1), [&](int64_t first, int64_t last) {
          over_tiles(first, last, in.k(), 1, [&](int64_t begin, int64_t n, float* z, float* out) {
            in.gather(begin, n, z);
            add_shift(shift, inner, begin, n, z);
            body(as(z, n), begin, n, out);
          });
        });
  }
};

std::tuple<Tensor, Tensor> dual_activate_pair(const Tensor& z, const Tensor& u, const Maybe& shift, int64_t kind,
                                              double beta, double threshold, int64_t inner) {
  const PairActivation a{pair(z, u), contiguous_if(shift), kind, inner, beta, threshold};
  Pair out = like(a.in);
  a.run([&](const cpu::Elementwise<float>& e, int64_t begin, int64_t n, float* made) {
    kernels<float>().activate(e, made, 0, n);
    out.scatter(begin, n, made);
  });
  return {out.primal, out.tangents};
}

std::tuple<Tensor, Tensor> dual_activate_pair_backward(const Tensor& ga, const Tensor& gt, const Tensor& z,
                                                       const Tensor& u, const Maybe& shift, int64_t kind, double beta,
                                                       double threshold, int64_t inner) {
  const PairActivation a{pair(z, u), contiguous_if(shift), kind, inner, beta, threshold};
  const Pair g = pair(ga, gt);
  Pair out = like(a.in);
  a.run([&](const cpu::Elementwise<float>& e, int64_t begin, int64_t n, float* made) {
    std::vector<float> grads((a.in.k() + 1) * n);
    g.gather(begin, n, grads.data());
    kernels<float>().activate_backward(e, grads.data(), made, 0, n);
    out.scatter(begin, n, made);
  });
  return {out.primal, out.tangents};
}

struct PairNorm {
  Pair in;
  Maybe shift, weight, bias;
  int64_t groups;
  bool centred;
  double eps;

  int64_t width() const { return in.primal.size(0) == 0 ? 0 : in.primal.numel() / in.primal.size(0); }
  int64_t samples() const { return in.primal.size(0); }

  // `body` on samples' stacks [K + 1, groups, n], the shift in them.
  template <class F>
  void run(int64_t first, int64_t last, const F& body) const {
    const int64_t w = width();
    over_tiles(first * w, last * w, in.k(), w, [&](int64_t begin, int64_t n, float* z, float* out) {
      in.gather(begin, n, z);
      add_shift(shift, 1, begin, n, z);
      const cpu::Norm<float> norm{
          n / w * groups,         w / groups,          groups, in.k(), centred, eps, z, nullptr, 1,
          read_if<float>(weight), read_if<float>(bias)};
      body(norm, begin, n, out);
    });
  }
};

std::tuple<Tensor, Tensor> dual_norm_pair(const Tensor& z, const Tensor& u, const Maybe& shift, const Maybe& weight,
                                          const Maybe& bias, int64_t groups, bool centred, double eps) {
  const PairNorm p{pair(z, u), contiguous_if(shift), contiguous_if(weight), contiguous_if(bias), groups, centred, eps};
  Pair out = like(p.in);
  torch::stable::parallel_for(
      0, p.samples(), std::max<int64_t>(kGrain / std::max<int64_t>(p.width() * (p.in.k() + 1), 1), 1),
      [&](int64_t first, int64_t last) {
        p.run(first, last, [&](const cpu::Norm<float>& norm, int64_t begin, int64_t n, float* made) {
          kernels<float>().normalize(norm, made, 0, norm.rows);
          out.scatter(begin, n, made);
        });
      });
  return {out.primal, out.tangents};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_norm_pair_backward(const Tensor& ga, const Tensor& gt, const Tensor& z,
                                                                   const Tensor& u, const Maybe& shift,
                                                                   const Maybe& weight, int64_t groups, bool centred,
                                                                   double eps) {
  const PairNorm p{
      {contiguous(z), contiguous(u)}, contiguous_if(shift), contiguous_if(weight), std::nullopt, groups, centred, eps};
  const Pair g = pair(ga, gt);
  Pair out = like(p.in);
  int64_t width = 1;
  for (int64_t i = 1; i < z.dim(); ++i) width *= z.size(i);
  Tensor gw = new_zeros(p.in.primal, {width}), gb = new_zeros(p.in.primal, {width});
  if (p.samples() == 0) return {out.primal, out.tangents, gw, gb};
  const cpu::Chunks chunks = cpu::Chunks::of(p.samples(), 1);
  std::vector<float> sums(2 * width * chunks.count);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      float* own = sums.data() + 2 * width * c;
      p.run(c * chunks.rows, std::min((c + 1) * chunks.rows, p.samples()),
            [&](const cpu::Norm<float>& norm, int64_t begin, int64_t n, float* made) {
              std::vector<float> grads((p.in.k() + 1) * n);
              g.gather(begin, n, grads.data());
              kernels<float>().normalize_backward(norm, grads.data(), made, own, own + width, 0, norm.rows);
              out.scatter(begin, n, made);
            });
    }
  });
  add_sums<float>(sums, width, chunks.count, gw, gb);
  return {out.primal, out.tangents, gw, gb};
}

cpu::Probes probes(const Tensor& key, const Maybe& ids, int64_t batch, int64_t count, int64_t d, int64_t kind) {
  const int64_t* k = read<int64_t>(key);
  return {static_cast<cpu::ProbeKind>(kind),
          read_if<int64_t>(ids),
          static_cast<uint64_t>(k[0]),
          static_cast<uint32_t>(k[1]),
          static_cast<uint32_t>(k[2]),
          batch,
          count,
          d};
}

template <class F>
void over_probes(const cpu::Probes& p, const F& body) {
  torch::stable::parallel_for(0, p.batch * p.count, std::max<int64_t>(kGrain / std::max<int64_t>(p.d, 1), 1), body);
}

int64_t per_sample(const Tensor& t, int64_t batch) { return batch == 0 ? 0 : t.numel() / batch; }

Tensor probe(const Tensor& like, const Tensor& key, const Maybe& ids, int64_t count, int64_t kind) {
  const Tensor kc = contiguous(key);
  const Maybe ic = contiguous_if(ids);
  std::vector<int64_t> shape = sizes(like);
  shape.insert(shape.begin(), count);
  Tensor out = new_empty(like, shape);
  const cpu::Probes p = probes(kc, ic, like.size(0), count, per_sample(like, like.size(0)), kind);
  if (like.scalar_type() == ScalarType::BFloat16) {
    uint16_t* to = write<uint16_t>(out);
    over_probes(p, [&](int64_t begin, int64_t end) {
      std::vector<float> own(p.d);
      for (int64_t item = begin; item < end; ++item) {
        kernels<float>().probe(p, own.data(), item, item + 1);
        std::transform(own.begin(), own.end(), to + item * p.d, narrow);
      }
    });
    return out;
  }
  dispatch(like, [&](auto zero) {
    using T = decltype(zero);
    T* to = write<T>(out);
    over_probes(p, [&](int64_t begin, int64_t end) { kernels<T>().probe(p, to + begin * p.d, begin, end); });
  });
  return out;
}

Tensor probe_dot(const Tensor& y, const Tensor& key, const Maybe& ids, int64_t count, int64_t kind) {
  const Tensor kc = contiguous(key), yc = contiguous(y);
  const Maybe ic = contiguous_if(ids);
  const int64_t batch = y.size(0) / count;
  const cpu::Probes p = probes(kc, ic, batch, count, per_sample(y, batch * count), kind);
  if (y.scalar_type() == ScalarType::BFloat16) {
    Tensor out = new_empty(y, {count, batch}, ScalarType::Float);
    float* to = write<float>(out);
    over_probes(p, [&](int64_t begin, int64_t end) {
      std::vector<float> own(p.d), row(p.d);
      for (int64_t item = begin; item < end; ++item) {
        const uint16_t* from = read<uint16_t>(yc) + item * p.d;
        std::transform(from, from + p.d, row.begin(), widen);
        kernels<float>().probe(p, own.data(), item, item + 1);
        kernels<float>().dots(own.data(), row.data(), 1, p.d, to + item);
      }
    });
    return out;
  }
  Tensor out = new_empty(y, {count, batch});
  dispatch(y, [&](auto zero) {
    using T = decltype(zero);
    T* to = write<T>(out);
    const T* from = read<T>(yc);
    over_probes(p, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(p.d);
      kernels<T>().probe_dot(p, from, to, scratch.data(), begin, end);
    });
  });
  return out;
}

Tensor probe_scale(const Tensor& g, const Tensor& key, const Maybe& ids, int64_t d, int64_t kind) {
  const Tensor kc = contiguous(key), gc = contiguous(g);
  const Maybe ic = contiguous_if(ids);
  const int64_t count = g.size(0), batch = g.size(1);
  Tensor out = new_empty(g, {count, batch, d});
  const cpu::Probes p = probes(kc, ic, batch, count, d, kind);
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    T* to = write<T>(out);
    const T* from = read<T>(gc);
    over_probes(p, [&](int64_t begin, int64_t end) { kernels<T>().probe_scale(p, from, to, begin, end); });
  });
  return out;
}

// A network's tensors, held while their pointers are in use.
struct MlpInputs {
  Tensor x;
  int64_t low;
  std::vector<Tensor> weights;
  std::vector<Maybe> shifts;
  const std::vector<int64_t>& kinds;
  const std::vector<double>& options;

  MlpInputs(const Tensor& from, int64_t first, const std::vector<Tensor>& w, const std::vector<Maybe>& s,
            const std::vector<int64_t>& k, const std::vector<double>& o)
      : x(contiguous(from)), low(first), kinds(k), options(o) {
    const size_t n = w.size();
    STD_TORCH_CHECK(n >= 2 && s.size() == n && k.size() == n - 1 && o.size() == 2 * (n - 1), "mlp: got ", n,
                    " weights, ", s.size(), " shifts, ", k.size(), " activations and ", o.size(), " options");
    int64_t width = x.size(1);
    for (size_t l = 0; l < n; ++l) {
      STD_TORCH_CHECK(w[l].size(1) == width, "mlp: weight ", l, " must take ", width, " features, got ", w[l].size(1));
      width = w[l].size(0);
      weights.push_back(contiguous(w[l]));
      shifts.push_back(contiguous_if(s[l]));
    }
    STD_TORCH_CHECK(low >= 0 && low + width <= x.size(1), "mlp: columns ", low, " to ", low + width,
                    " are not among the ", x.size(1), " of x");
  }

  int64_t batch() const { return x.size(0); }
  int64_t d() const { return weights.back().size(0); }

  // Elements of the stacks [K + 1, B, H_l] of all hidden layers.
  int64_t hidden(int64_t tangents) const {
    int64_t total = 0;
    for (size_t l = 0; l + 1 < weights.size(); ++l) total += weights[l].size(0);
    return total * batch() * (tangents + 1);
  }

  template <class T>
  cpu::Mlp<T> as() const {
    cpu::Mlp<T> out{{}, batch(), low, read<T>(x)};
    for (size_t l = 0; l < weights.size(); ++l) {
      const bool last = l + 1 == weights.size();
      out.layers.push_back({weights[l].size(1), weights[l].size(0), read<T>(weights[l]), read_if<T>(shifts[l]),
                            shifts[l].has_value() && shifts[l]->dim() == 2,
                            static_cast<cpu::Activation>(last ? 0 : kinds[l]),
                            static_cast<T>(last ? 0 : options[2 * l]), static_cast<T>(last ? 0 : options[2 * l + 1])});
    }
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_probes(const Tensor& x, int64_t low, std::vector<Tensor> weights,
                                                      std::vector<Maybe> shifts, std::vector<int64_t> kinds,
                                                      std::vector<double> options, const Tensor& key, const Maybe& ids,
                                                      int64_t count, int64_t kind, const Maybe& first,
                                                      const Maybe& last, bool keep) {
  const MlpInputs in(x, low, weights, shifts, kinds, options);
  const Tensor kc = contiguous(key);
  const Maybe ic = contiguous_if(ids), fc = contiguous_if(first), lc = contiguous_if(last);
  Tensor velocity = new_empty(in.x, {in.batch(), in.d()}), dots = new_empty(in.x, {count, in.batch()});
  Tensor kept = new_empty(in.x, {keep ? in.hidden(count) : 0});
  Tensor made = new_empty(in.x, {keep ? count : 0, in.batch(), in.weights.back().size(1)});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const cpu::ProbePass<T> pass{probes(kc, ic, in.batch(), count, in.d(), kind),
                                 read_if<T>(fc),
                                 read_if<T>(lc),
                                 write<T>(velocity),
                                 write<T>(dots),
                                 keep ? write<T>(kept) : nullptr,
                                 keep ? write<T>(made) : nullptr};
    cpu::mlp_probes(in.as<T>(), pass, torch::stable::get_num_threads());
  });
  return {velocity, dots, kept, made};
}

// Gradients for x, the weights and the shifts, in this order; of those not wanted, nothing in a tensor.
std::vector<Tensor> mlp_backward(const Tensor& grad_velocity, const Tensor& grad_dots, const Tensor& x, int64_t low,
                                 std::vector<Tensor> weights, std::vector<Maybe> shifts, std::vector<int64_t> kinds,
                                 std::vector<double> options, const Tensor& key, const Maybe& ids, int64_t kind,
                                 const Tensor& last, const Tensor& kept, std::vector<bool> wanted) {
  const MlpInputs in(x, low, weights, shifts, kinds, options);
  const Tensor gv = contiguous(grad_velocity), gd = contiguous(grad_dots), kc = contiguous(key);
  const Maybe ic = contiguous_if(ids);
  const size_t n = weights.size();
  std::vector<Tensor> out;
  const auto add = [&](const Tensor& like) {
    out.push_back(new_empty(in.x, wanted[out.size()] ? sizes(like) : std::vector<int64_t>{0}));
  };
  add(x);
  for (const Tensor& w : weights) add(w);
  for (const Maybe& s : shifts) add(s.has_value() ? *s : out[0]);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const auto at = [&](size_t i) { return wanted[i] ? write<T>(out[i]) : nullptr; };
    cpu::BackwardPass<T> pass{probes(kc, ic, in.batch(), gd.size(0), in.d(), kind),
                              read<T>(gv),
                              read<T>(gd),
                              read<T>(last),
                              read<T>(kept),
                              at(0),
                              {},
                              {}};
    for (size_t l = 0; l < n; ++l) {
      pass.weights.push_back(at(1 + l));
      pass.shifts.push_back(at(1 + n + l));
    }
    cpu::mlp_backward(in.as<T>(), pass, torch::stable::get_num_threads());
  });
  return out;
}

std::tuple<Tensor, Tensor> mlp_trace(const Tensor& x, int64_t low, std::vector<Tensor> weights,
                                     std::vector<Maybe> shifts, std::vector<int64_t> kinds, std::vector<double> options,
                                     const Maybe& core) {
  const MlpInputs in(x, low, weights, shifts, kinds, options);
  STD_TORCH_CHECK(weights.size() == 3, "mlp_trace: three layers have such a trace, got ", weights.size());
  const Maybe cc = contiguous_if(core);
  Tensor velocity = new_empty(in.x, {in.batch(), in.d()}), value = new_empty(in.x, {in.batch()});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::mlp_trace(in.as<T>(), {read_if<T>(cc), write<T>(velocity), write<T>(value)}, torch::stable::get_num_threads());
  });
  return {velocity, value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CPU, m) {
  m.impl("dual_activate", TORCH_BOX(&dual_activate));
  m.impl("dual_activate_backward", TORCH_BOX(&dual_activate_backward));
  m.impl("dual_norm", TORCH_BOX(&dual_norm));
  m.impl("dual_norm_backward", TORCH_BOX(&dual_norm_backward));
  m.impl("dual_activate_pair", TORCH_BOX(&dual_activate_pair));
  m.impl("dual_activate_pair_backward", TORCH_BOX(&dual_activate_pair_backward));
  m.impl("dual_norm_pair", TORCH_BOX(&dual_norm_pair));
  m.impl("dual_norm_pair_backward", TORCH_BOX(&dual_norm_pair_backward));
  m.impl("probe", TORCH_BOX(&probe));
  m.impl("probe_dot", TORCH_BOX(&probe_dot));
  m.impl("mlp_probes", TORCH_BOX(&mlp_probes));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
  m.impl("mlp_trace", TORCH_BOX(&mlp_trace));
  m.impl("probe_scale", TORCH_BOX(&probe_scale));
}
