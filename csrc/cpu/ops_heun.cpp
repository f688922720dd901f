// The CPU ops of a sampler's step: tensors in, ranges of elements to the kernels, on PyTorch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/heun.h"
#include "cpu/isa.h"
#include "cpu/tensors.h"
#include "shared/heun.h"

namespace {

using namespace fewstep::tensors;
namespace cpu = fewstep::cpu;
namespace heun = fewstep::heun;

template <class T, class F>
const cpu::HeunKernels<T, F>& kernels() {
  const int isa = static_cast<int>(cpu::current_isa());
#if defined(__x86_64__)
#define FEWSTEP_BY_ISA(which) (isa == 2 ? cpu::avx512::which : isa == 1 ? cpu::avx2::which : cpu::base::which)
#else
#define FEWSTEP_BY_ISA(which) cpu::base::which
#endif
  if constexpr (sizeof(T) == 4) {
    return FEWSTEP_BY_ISA(kHeunFloat);
  } else if constexpr (sizeof(F) == 4) {
    return FEWSTEP_BY_ISA(kHeunMixed);
  } else {
    return FEWSTEP_BY_ISA(kHeunDouble);
  }
#undef FEWSTEP_BY_ISA
}

template <class T>
T* write_if(const Maybe& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

void check_like(const Tensor& t, const char* name, const Tensor& x, ScalarType dtype) {
  STD_TORCH_CHECK(t.numel() == x.numel() && t.scalar_type() == dtype, "heun_combine: ", name,
                  " must have the size of x and the dtype that goes with it");
}

void check_output(const Maybe& t, const char* name, const Tensor& x, ScalarType dtype) {
  if (!t.has_value()) return;
  check_like(*t, name, x, dtype);
  STD_TORCH_CHECK(t->is_contiguous(), "heun_combine: ", name, " must be contiguous");
}

template <class T, class F>
void run(const Tensor& x, const Maybe& low, const std::vector<Tensor>& terms, const Tensor& table, int64_t row,
         const Maybe& seeds, const Maybe& high, const Maybe& out_low, const Maybe& net, const Maybe& wrong) {
  const int64_t batch = x.size(0), rows = table.size(1);
  cpu::Combine<T, F> in{};
  in.x = read<T>(x);
  in.low = low.has_value() ? read<T>(*low) : nullptr;
  in.count = static_cast<int64_t>(terms.size());
  for (size_t j = 0; j < terms.size(); ++j) in.terms[j] = read<F>(terms[j]);
  in.coefficients = read<double>(table) + row * rows * heun::kColumns;
  in.per_sample = rows != 1;
  in.seeds = seeds.has_value() ? read<int64_t>(*seeds) : nullptr;
  in.row = row;
  in.d = batch > 0 ? x.numel() / batch : 1;
  in.high = write_if<T>(high);
  in.out_low = write_if<T>(out_low);
  in.net = write_if<F>(net);
  std::atomic<bool> finite{true};
  const auto work = [&](int64_t begin, int64_t end) {
    if (!kernels<T, F>().combine(in, begin, end)) finite = false;
  };
  // Noise costs as much as ten elements without.
  const int64_t grain = in.seeds != nullptr ? kGrain / 8 : kGrain;
  if (x.numel() <= grain) {
    work(0, x.numel());
  } else {
    torch::stable::parallel_for(0, x.numel(), grain, work);
  }
  if (wrong.has_value() && !finite) *static_cast<int32_t*>(wrong->data_ptr()) = 1;
}

void combine_out(const Tensor& x, const Maybe& low, const std::vector<Tensor>& terms, const Tensor& table, int64_t row,
                 const Maybe& seeds, const Maybe& high, const Maybe& out_low, const Maybe& net, const Maybe& wrong) {
  STD_TORCH_CHECK(terms.size() <= heun::kTerms, "heun_combine: at most 2 terms, got ", terms.size());
  STD_TORCH_CHECK(table.dim() == 3 && table.size(2) == heun::kColumns && table.is_contiguous() &&
                      table.scalar_type() == ScalarType::Double && row >= 0 && row < table.size(0) &&
                      (table.size(1) == 1 || table.size(1) == x.size(0)),
                  "heun_combine: table must be float64 [K, 1 or B, 8] with row ", row);
  const ScalarType state = x.scalar_type();
  const ScalarType other = net.has_value() ? net->scalar_type() : terms.empty() ? state : terms[0].scalar_type();
  check_output(high, "high", x, state);
  check_output(out_low, "out_low", x, state);
  check_output(net, "net", x, other);
  const Tensor xc = dense(x);
  Maybe lc;
  if (low.has_value()) {
    check_like(*low, "low", x, state);
    lc = dense(*low);
  }
  if (seeds.has_value()) {
    STD_TORCH_CHECK(seeds->numel() == x.size(0) && seeds->scalar_type() == ScalarType::Long && seeds->is_contiguous(),
                    "heun_combine: seeds must be int64 [B]");
  }
  std::vector<Tensor> own;
  own.reserve(terms.size());
  for (const Tensor& t : terms) {
    check_like(t, "terms", x, other);
    own.push_back(dense(t));
  }
  if (state == ScalarType::Float && other == ScalarType::Float) {
    run<float, float>(xc, lc, own, table, row, seeds, high, out_low, net, wrong);
  } else if (state == ScalarType::Double && other == ScalarType::Float) {
    run<double, float>(xc, lc, own, table, row, seeds, high, out_low, net, wrong);
  } else {
    STD_TORCH_CHECK(state == ScalarType::Double && other == ScalarType::Double,
                    "heun_combine: a float32 state has float32 terms, a float64 state float32 or float64 ones");
    run<double, double>(xc, lc, own, table, row, seeds, high, out_low, net, wrong);
  }
}

std::tuple<Tensor, Tensor, Tensor> combine(const Tensor& x, const Maybe& low, const std::vector<Tensor>& terms,
                                           const Tensor& table, int64_t row, bool want_low, bool want_net) {
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), none{0};
  const Tensor& like = terms.empty() ? x : terms[0];
  Tensor high = new_empty(x, shape), rest = new_empty(x, want_low ? shape : none);
  Tensor net = new_empty(like, want_net ? shape : none);
  combine_out(x, low, terms, table, row, std::nullopt, high, want_low ? Maybe(rest) : std::nullopt,
              want_net ? Maybe(net) : std::nullopt, std::nullopt);
  return {high, rest, net};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CPU, m) {
  m.impl("heun_combine", TORCH_BOX(&combine));
  m.impl("heun_combine_out", TORCH_BOX(&combine_out));
}
