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

void check_options(int64_t tangents, int64_t kind, int64_t inner) {
  STD_TORCH_CHECK(tangents >= 0 && inner >= 1, "fewstep: tangents must be at least 0 and inner at least 1, got ",
                  tangents, " and ", inner);
  STD_TORCH_CHECK(kind >= 0 && kind < cpu::kActivations, "fewstep: no activation has the number ", kind);
}

// Samples of a stack [(K + 1) B, ...], or of a primal alone.
int64_t batch_of(const Tensor& z, int64_t copies) {
  STD_TORCH_CHECK(z.dim() >= 1 && copies >= 1 && z.size(0) % copies == 0, "fewstep: z must be [(K + 1) B, ...] with ",
                  copies, " copies of the batch");
  return z.size(0) / copies;
}

// A shift is repeated until it has shifted `count` elements, each of its own `inner` times at once.
Maybe shift_of(const Maybe& shift, const Tensor& z, int64_t count, int64_t inner) {
  if (!shift.has_value()) return shift;
  const int64_t own = shift->numel();
  STD_TORCH_CHECK(count == 0 || (own > 0 && count % inner == 0 && count / inner % own == 0), "fewstep: a shift of ",
                  own, " elements, for ", inner, " each, does not divide the ", count, " of the primal");
  return expect(*shift, "shift", z.scalar_type(), own);
}

struct ActivationInputs {
  Tensor z;
  Maybe shared, shift;
  int64_t tangents, kind, inner, count, period;
  double beta, threshold;

  ActivationInputs(const Tensor& from, const Maybe& all, const Maybe& more, int64_t k, int64_t activation, double b,
                   double limit, int64_t repeats)
      : z(expect(from, "z", from.scalar_type(), from.numel())),
        tangents(k),
        kind(activation),
        inner(repeats),
        beta(b),
        threshold(limit) {
    check_options(tangents, kind, inner);
    const int64_t batch = batch_of(z, all.has_value() ? 1 : tangents + 1);
    period = per_sample(z);
    count = batch * period;
    shared = expect_if(all, "shared", z.scalar_type(), tangents * period);
    shift = shift_of(more, z, count, inner);
  }

  template <class T>
  cpu::Elementwise<T> as() const {
    return {static_cast<cpu::Activation>(kind),
            static_cast<T>(beta),
            static_cast<T>(threshold),
            count,
            tangents,
            read<T>(z),
            read_if<T>(shared),
            shared.has_value() ? period : 0,
            read_if<T>(shift),
            shift.has_value() ? shift->numel() : 1,
            inner};
  }
};

Tensor dual_activate(const Tensor& z, const Maybe& shared, const Maybe& shift, int64_t tangents, int64_t kind,
                     double beta, double threshold, int64_t inner) {
  const ActivationInputs in(z, shared, shift, tangents, kind, beta, threshold, inner);
  std::vector<int64_t> shape = sizes(z);
  if (shared.has_value()) shape[0] *= tangents + 1;
  Tensor out = new_empty(in.z, shape);
  dispatch(z, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Elementwise<T> e = in.as<T>();
    T* to = write<T>(out);
    torch::stable::parallel_for(
        0, e.count, std::max<int64_t>(kGrain / (tangents + 1), 1),
        [&](int64_t begin, int64_t end) { cpu::kernels<cpu::DualKernels, T>().activate(e, to, begin, end); });
  });
  return out;
}

Tensor dual_activate_backward(const Tensor& g, const Tensor& z, const Maybe& shared, const Maybe& shift,
                              int64_t tangents, int64_t kind, double beta, double threshold, int64_t inner) {
  const ActivationInputs in(z, shared, shift, tangents, kind, beta, threshold, inner);
  const Tensor gc = expect(g, "g", z.scalar_type(), in.count * (tangents + 1));
  Tensor out = new_empty(in.z, sizes(z));
  dispatch(z, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Elementwise<T> e = in.as<T>();
    const T* from = read<T>(gc);
    T* to = write<T>(out);
    torch::stable::parallel_for(0, e.count, std::max<int64_t>(kGrain / (tangents + 1), 1),
                                [&](int64_t begin, int64_t end) {
                                  cpu::kernels<cpu::DualKernels, T>().activate_backward(e, from, to, begin, end);
                                });
  });
  return out;
}

// Elements of a row, where each sample of z has `groups` rows.
int64_t row_of(const Tensor& z, int64_t groups) {
  const int64_t own = per_sample(z);
  STD_TORCH_CHECK(groups >= 1 && own % groups == 0, "fewstep: ", groups, " groups do not divide the ", own,
                  " elements of a sample");
  return own / groups;
}

// A norm's shift is of whole rows.
Maybe shift_of_rows(const Maybe& shift, const Tensor& z, int64_t count, int64_t n) {
  STD_TORCH_CHECK(!shift.has_value() || n == 0 || shift->numel() % n == 0, "fewstep: a norm over rows of ", n,
                  " has a shift of whole rows, got ", shift.has_value() ? shift->numel() : 0, " elements");
  return shift_of(shift, z, count, 1);
}

// How many elements of a row share a weight, where a sample has `width` elements in rows of n.
int64_t inner_of(const Maybe& weight, const Maybe& bias, int64_t width, int64_t n) {
  if (!weight.has_value() && !bias.has_value()) return 1;
  const int64_t count = weight.has_value() ? weight->numel() : bias->numel();
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == count, "fewstep: weight and bias must have as many elements, ",
                  count, " and ", bias.has_value() ? bias->numel() : 0);
  if (count == width) return 1;
  STD_TORCH_CHECK(n > 0 && count > 0 && width % count == 0 && n % (width / count) == 0, "fewstep: weight and bias of ",
                  count, " elements are neither for ", width, " elements nor for equal blocks of rows of ", n);
  return width / count;
}

struct NormInputs {
  Tensor z;
  Maybe shift, weight, bias;
  int64_t tangents, groups, n, rows, inner;
  bool centred;
  double eps;

  // z is a stack, or the primal where its tangents stand apart.
  NormInputs(const Tensor& from, const Maybe& more, const Maybe& w, const Maybe& b, int64_t k, int64_t parts,
             bool subtracts, double least, bool apart = false)
      : z(expect(from, "z", from.scalar_type(), from.numel())),
        tangents(k),
        groups(parts),
        n(row_of(from, parts)),
        rows(batch_of(from, apart ? 1 : k + 1) * parts),
        inner(inner_of(w, b, groups * n, n)),
        centred(subtracts),
        eps(least) {
    shift = shift_of_rows(more, z, rows * n, n);
    weight = expect_if(w, "weight", z.scalar_type(), weights());
    bias = expect_if(b, "bias", z.scalar_type(), weights());
  }

  bool empty() const { return rows * n == 0; }
  int64_t weights() const { return groups * n / inner; }

  template <class T>
  cpu::Norm<T> as() const {
    return {rows,
            n,
            groups,
            tangents,
            centred,
            eps,
            read<T>(z),
            read<T>(z) + rows * n,
            read_if<T>(shift),
            shift.has_value() ? shift->numel() / n : 1,
            inner,
            read_if<T>(weight),
            read_if<T>(bias)};
  }

  template <class T>
  void run(const cpu::Norm<T>& norm, T* out, T* t) const {
    torch::stable::parallel_for(
        0, rows, std::max<int64_t>(kGrain / (n * (tangents + 1)), 1),
        [&](int64_t begin, int64_t end) { cpu::kernels<cpu::DualKernels, T>().normalize(norm, out, t, begin, end); });
  }
};

Tensor dual_norm(const Tensor& z, const Maybe& shift, const Maybe& weight, const Maybe& bias, int64_t tangents,
                 int64_t groups, bool centred, double eps) {
  const NormInputs in(z, shift, weight, bias, tangents, groups, centred, eps);
  Tensor out = new_empty(in.z, sizes(z));
  if (in.empty()) return out;
  dispatch(z, [&](auto zero) {
    using T = decltype(zero);
    T* to = write<T>(out);
    in.run<T>(in.as<T>(), to, to + in.rows * in.n);
  });
  return out;
}

Tensor dual_norm_tangents(const Tensor& z, const Tensor& u, const Maybe& weight, int64_t groups, bool centred,
                          double eps) {
  const int64_t batch = batch_of(z, 1), lead = batch_of(u, std::max<int64_t>(batch, 1));
  const NormInputs in(z, std::nullopt, weight, std::nullopt, lead, groups, centred, eps, true);
  const Tensor own = expect(u, "u", z.scalar_type(), batch == 0 ? 0 : lead * z.numel());
  Tensor out = new_empty(own, sizes(u));
  if (in.empty()) return out;
  dispatch(z, [&](auto zero) {
    using T = decltype(zero);
    cpu::Norm<T> norm = in.as<T>();
    norm.u = read<T>(own);
    in.run<T>(norm, nullptr, write<T>(out));
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
  const NormInputs in(z, shift, weight, std::nullopt, tangents, groups, centred, eps);
  const Tensor gc = expect(g, "g", z.scalar_type(), z.numel());
  const int64_t width = in.weights();
  Tensor gz = new_empty(in.z, sizes(z)), gw = new_zeros(in.z, {width}), gb = new_zeros(in.z, {width});
  if (in.empty()) return {gz, gw, gb};
  dispatch(z, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Norm<T> norm = in.as<T>();
    // Chunks, and with them the sums over them, do not depend on the number of threads.
    const cpu::Chunks chunks = cpu::Chunks::of(norm.rows, 1);
    std::vector<T> sums(2 * width * chunks.count);
    const T* from = read<T>(gc);
    T* to = write<T>(gz);
    torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        T* own = sums.data() + 2 * width * c;
        cpu::kernels<cpu::DualKernels, T>().normalize_backward(norm, from, to, own, own + width, c * chunks.rows,
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

// z [B, ...] and u [K B, ...].
Pair pair(const Tensor& z, const Tensor& u, const char* name, const char* other) {
  const int64_t batch = batch_of(z, 1), lead = batch_of(u, std::max<int64_t>(batch, 1));
  return {expect(z, name, ScalarType::Float, z.numel()),
          expect(u, other, ScalarType::BFloat16, batch == 0 ? 0 : lead * z.numel())};
}

// Gradients for a pair.
Pair pair_like(const Tensor& gz, const Tensor& gu, const Pair& p) {
  return {expect(gz, "ga", ScalarType::Float, p.primal.numel()),
          expect(gu, "gt", ScalarType::BFloat16, p.tangents.numel())};
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

  PairActivation(const Tensor& z, const Tensor& u, const Maybe& more, int64_t activation, double b, double limit,
                 int64_t repeats)
      : in(pair(z, u, "z", "u")), kind(activation), inner(repeats), beta(b), threshold(limit) {
    check_options(0, kind, inner);
    shift = shift_of(more, z, z.numel(), inner);
  }

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
  const PairActivation a(z, u, shift, kind, beta, threshold, inner);
  Pair out = like(a.in);
  a.run([&](const cpu::Elementwise<float>& e, int64_t begin, int64_t n, float* made) {
    cpu::kernels<cpu::DualKernels, float>().activate(e, made, 0, n);
    out.scatter(begin, n, made);
  });
  return {out.primal, out.tangents};
}

std::tuple<Tensor, Tensor> dual_activate_pair_backward(const Tensor& ga, const Tensor& gt, const Tensor& z,
                                                       const Tensor& u, const Maybe& shift, int64_t kind, double beta,
                                                       double threshold, int64_t inner) {
  const PairActivation a(z, u, shift, kind, beta, threshold, inner);
  const Pair g = pair_like(ga, gt, a.in);
  Pair out = like(a.in);
  a.run([&](const cpu::Elementwise<float>& e, int64_t begin, int64_t n, float* made) {
    std::vector<float> grads((a.in.k() + 1) * n);
    g.gather(begin, n, grads.data());
    cpu::kernels<cpu::DualKernels, float>().activate_backward(e, grads.data(), made, 0, n);
    out.scatter(begin, n, made);
  });
  return {out.primal, out.tangents};
}

struct PairNorm {
  Pair in;
  Maybe shift, weight, bias;
  int64_t groups, width, inner;
  bool centred;
  double eps;

  PairNorm(const Tensor& z, const Tensor& u, const Maybe& more, const Maybe& w, const Maybe& b, int64_t parts,
           bool subtracts, double least)
      : in(pair(z, u, "z", "u")),
        groups(parts),
        width(parts * row_of(z, parts)),
        inner(inner_of(w, b, width, width / parts)),
        centred(subtracts),
        eps(least) {
    shift = shift_of_rows(more, z, z.numel(), width / groups);
    weight = expect_if(w, "weight", ScalarType::Float, weights());
    bias = expect_if(b, "bias", ScalarType::Float, weights());
  }

  int64_t weights() const { return width / inner; }

  bool empty() const { return in.primal.numel() == 0; }
  int64_t samples() const { return in.primal.size(0); }

  // `body` on samples' stacks [K + 1, groups, n], the shift in them.
  template <class F>
  void run(int64_t first, int64_t last, const F& body) const {
    const int64_t w = width;
    over_tiles(first * w, last * w, in.k(), w, [&](int64_t begin, int64_t n, float* z, float* out) {
      in.gather(begin, n, z);
      add_shift(shift, 1, begin, n, z);
      const cpu::Norm<float> norm{
          n / w * groups,         w / groups,          groups, in.k(), centred, eps, z, z + n, nullptr, 1, inner,
          read_if<float>(weight), read_if<float>(bias)};
      body(norm, begin, n, out);
    });
  }
};

std::tuple<Tensor, Tensor> dual_norm_pair(const Tensor& z, const Tensor& u, const Maybe& shift, const Maybe& weight,
                                          const Maybe& bias, int64_t groups, bool centred, double eps) {
  const PairNorm p(z, u, shift, weight, bias, groups, centred, eps);
  Pair out = like(p.in);
  if (p.empty()) return {out.primal, out.tangents};
  torch::stable::parallel_for(
      0, p.samples(), std::max<int64_t>(kGrain / std::max<int64_t>(p.width * (p.in.k() + 1), 1), 1),
      [&](int64_t first, int64_t last) {
        p.run(first, last, [&](const cpu::Norm<float>& norm, int64_t begin, int64_t n, float* made) {
          cpu::kernels<cpu::DualKernels, float>().normalize(norm, made, made + n, 0, norm.rows);
          out.scatter(begin, n, made);
        });
      });
  return {out.primal, out.tangents};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_norm_pair_backward(const Tensor& ga, const Tensor& gt, const Tensor& z,
                                                                   const Tensor& u, const Maybe& shift,
                                                                   const Maybe& weight, int64_t groups, bool centred,
                                                                   double eps) {
  const PairNorm p(z, u, shift, weight, std::nullopt, groups, centred, eps);
  const Pair g = pair_like(ga, gt, p.in);
  Pair out = like(p.in);
  const int64_t width = p.weights();
  Tensor gw = new_zeros(p.in.primal, {width}), gb = new_zeros(p.in.primal, {width});
  if (p.empty()) return {out.primal, out.tangents, gw, gb};
  const cpu::Chunks chunks = cpu::Chunks::of(p.samples(), 1);
  std::vector<float> sums(2 * width * chunks.count);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      float* own = sums.data() + 2 * width * c;
      p.run(c * chunks.rows, std::min((c + 1) * chunks.rows, p.samples()),
            [&](const cpu::Norm<float>& norm, int64_t begin, int64_t n, float* made) {
              std::vector<float> grads((p.in.k() + 1) * n);
              g.gather(begin, n, grads.data());
              cpu::kernels<cpu::DualKernels, float>().normalize_backward(norm, grads.data(), made, own, own + width, 0,
                                                                         norm.rows);
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
  m.impl("dual_norm_tangents", TORCH_BOX(&dual_norm_tangents));
  m.impl("dual_norm_backward", TORCH_BOX(&dual_norm_backward));
  m.impl("dual_activate_pair", TORCH_BOX(&dual_activate_pair));
  m.impl("dual_activate_pair_backward", TORCH_BOX(&dual_activate_pair_backward));
  m.impl("dual_norm_pair", TORCH_BOX(&dual_norm_pair));
  m.impl("dual_norm_pair_backward", TORCH_BOX(&dual_norm_pair_backward));
}
