// The CPU ops of attention: tensors in, pointers to the drivers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/attention.h"
#include "cpu/tensors.h"

namespace {

using namespace fewstep::tensors;
namespace cpu = fewstep::cpu;

// The tensors of a call, held while their pointers are in use.
struct Inputs {
  Tensor q, k, v;
  Maybe tq, tk, tv, mask;
  bool causal;
  double scale;
  int64_t tangents;

  Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& moved_query, const Maybe& moved_key,
         const Maybe& moved_value, const Maybe& masked, bool is_causal, double factor, int64_t count)
      : q(query), k(key), v(value), mask(masked), causal(is_causal), scale(factor), tangents(count) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && tangents >= 0,
                    "dual_attention: q, k and v must be [B, H, N, D], tangents at least 0");
    const int64_t groups = k.size(1);
    STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3) && v.size(0) == q.size(0) && v.size(1) == groups &&
                        v.size(2) == k.size(2),
                    "dual_attention: shapes of q, k and v do not match");
    STD_TORCH_CHECK(groups > 0 ? q.size(1) % groups == 0 : q.size(1) == 0, "dual_attention: ", q.size(1),
                    " heads cannot share ", groups, " of keys");
    const ScalarType dtype = q.scalar_type();
    q = expect(q, "q", dtype, q.numel());
    k = expect(k, "k", dtype, k.numel());
    v = expect(v, "v", dtype, v.numel());
    tq = expect_if(moved_query, "tq", dtype, tangents * q.numel());
    tk = expect_if(moved_key, "tk", dtype, tangents * k.numel());
    tv = expect_if(moved_value, "tv", dtype, tangents * v.numel());
    if (!mask.has_value()) return;
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == dtype,
                    "dual_attention: mask must be bool or ", toString(dtype), ", got ", toString(mask->scalar_type()));
    STD_TORCH_CHECK(mask->dim() == 4, "dual_attention: mask must be [B, H, N, M]");
    STD_TORCH_CHECK(is_held(*mask), "dual_attention: the memory of mask has been freed");
    const int64_t whole[] = {q.size(0), q.size(1), q.size(2), k.size(2)};
    for (int64_t i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(mask->size(i) == 1 || mask->size(i) == whole[i], "dual_attention: axis ", i, " of mask has ",
                      mask->size(i), " entries, expected 1 or ", whole[i]);
    }
  }

  std::vector<int64_t> out_shape() const { return {q.size(0), q.size(1), q.size(2), v.size(3)}; }

  template <class T>
  cpu::Attention<T> as() const {
    cpu::Attention<T> in{q.size(0),
                         q.size(1),
                         k.size(1),
                         q.size(2),
                         k.size(2),
                         q.size(3),
                         v.size(3),
                         tangents,
                         read<T>(q),
                         read<T>(k),
                         read<T>(v),
                         read_if<T>(tq),
                         read_if<T>(tk),
                         read_if<T>(tv),
                         nullptr,
                         nullptr,
                         {},
                         causal,
                         static_cast<T>(scale)};
    if (!mask.has_value()) return in;
    if (mask->scalar_type() == ScalarType::Bool) {
      in.keep = read<bool>(*mask);
    } else {
      in.bias = read<T>(*mask);
    }
    for (int64_t i = 0; i < 4; ++i) in.stride[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
    return in;
  }
};

std::vector<int64_t> with(int64_t tangents, std::vector<int64_t> shape) {
  shape.insert(shape.begin(), tangents);
  return shape;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                          const Maybe& tq, const Maybe& tk, const Maybe& tv,
                                                          const Maybe& mask, bool causal, double scale,
                                                          int64_t tangents, bool constant) {
  const Inputs in(q, k, v, tq, tk, tv, mask, causal, scale, tangents);
  const std::vector<int64_t> shape = in.out_shape(), rows(shape.begin(), shape.end() - 1);
  Tensor out = new_empty(in.q, shape), moved = new_empty(in.q, with(tangents, shape));
  Tensor lse = new_empty(in.q, rows), mean = new_empty(in.q, with(tangents, rows));
  dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Attended<T> to{write<T>(out), write<T>(moved), write<T>(lse), write<T>(mean)};
    cpu::attention(in.as<T>(), to, torch::stable::get_num_threads());
  });
  return {out, moved, lse, mean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_attention_backward(
    const Tensor& go, const Maybe& gt, const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& tq,
    const Maybe& tk, const Maybe& tv, const Maybe& mask, const Tensor& out, const Maybe& moved, const Tensor& lse,
    const Maybe& mean, bool causal, double scale, int64_t tangents) {
  const Inputs in(q, k, v, tq, tk, tv, mask, causal, scale, tangents);
  const ScalarType dtype = q.scalar_type();
  const int64_t rows = in.q.size(0) * in.q.size(1) * in.q.size(2), own = rows * in.v.size(3);
  STD_TORCH_CHECK(tangents == 0 || (gt.has_value() && moved.has_value() && mean.has_value()),
                  "dual_attention_backward: tangents need gt, moved and mean");
  const Tensor gc = expect(go, "go", dtype, own), oc = expect(out, "out", dtype, own);
  const Tensor lc = expect(lse, "lse", dtype, rows);
  const Maybe tc = expect_if(gt, "gt", dtype, tangents * own), mc = expect_if(moved, "moved", dtype, tangents * own);
  const Maybe rc = expect_if(mean, "mean", dtype, tangents * rows);
  auto like = [&](const Tensor& t) { return new_empty(in.q, sizes(t)); };
  auto moves = [&](const Maybe& t, const Tensor& of) {
    return new_empty(in.q, t.has_value() ? with(tangents, sizes(of)) : std::vector<int64_t>{0});
  };
  Tensor gq = like(in.q), gk = like(in.k), gv = like(in.v);
  Tensor gtq = moves(tq, in.q), gtk = moves(tk, in.k), gtv = moves(tv, in.v);
  dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    auto at = [](const Maybe& t, const Tensor& g) { return t.has_value() ? write<T>(g) : nullptr; };
    const cpu::AttentionGrads<T> grads{read<T>(oc),  read_if<T>(mc), read<T>(lc),  read_if<T>(rc),
                                       read<T>(gc),  read_if<T>(tc), write<T>(gq), write<T>(gk),
                                       write<T>(gv), at(tq, gtq),    at(tk, gtk),  at(tv, gtv)};
    cpu::attention_backward(in.as<T>(), grads, torch::stable::get_num_threads());
  });
  return {gq, gk, gv, gtq, gtk, gtv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CPU, m) {
  m.impl("dual_attention", TORCH_BOX(&dual_attention));
  m.impl("dual_attention_backward", TORCH_BOX(&dual_attention_backward));
}
