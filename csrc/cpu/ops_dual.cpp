// The CPU ops of dual numbers: tensors in, ranges of work to the kernels, on PyTorch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/driver.h"
#include "cpu/dual.h"
#include "cpu/tensors.h"

namespace {

using namespace fewstep::tensors;
namespace cpu = fewstep::cpu;
using cpu::dual_kernels;

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
                                [&](int64_t begin, int64_t end) { dual_kernels<T>().activate(e, to, begin, end); });
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
        [&](int64_t begin, int64_t end) { dual_kernels<T>().activate_backward(e, from, to, begin, end); });
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
                                [&](int64_t begin, int64_t end) { dual_kernels<T>().normalize(norm, to, begin, end); });
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
        dual_kernels<T>().normalize_backward(norm, from, to, own, own + width, c * chunks.rows,
                                             std::min((c + 1) * chunks.rows, norm.rows));
      }
    });
    add_sums<T>(sums, width, chunks.count, gw, gb);
  });
  return {gz, gw, gb};
}

// A float primal [count] and its K tangents [K, count] in bfloat16: tiles of both become a float stack in cache, for
// the same kernels.
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
    dual_kernels<float>().activate(e, made, 0, n);
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
    dual_kernels<float>().activate_backward(e, grads.data(), made, 0, n);
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
          dual_kernels<float>().normalize(norm, made, 0, norm.rows);
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
              dual_kernels<float>().normalize_backward(norm, grads.data(), made, own, own + width, 0, norm.rows);
              out.scatter(begin, n, made);
            });
    }
  });
  add_sums<float>(sums, width, chunks.count, gw, gb);
  return {out.primal, out.tangents, gw, gb};
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
}
