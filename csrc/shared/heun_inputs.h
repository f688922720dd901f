// The tensors of a step of a sampler, checked, for the kernels of all devices.
#pragma once

#include <tuple>
#include <vector>

#include "heun.h"
#include "tensors.h"

namespace fewstep::heun {

using tensors::Maybe;
using tensors::ScalarType;
using tensors::Tensor;

// Held while their pointers are in use.
struct Inputs {
  Tensor x;
  Maybe low;
  std::vector<Tensor> terms;
  Tensor table;
  int64_t row;
  Maybe seeds, high, out_low, net, wrong;
  ScalarType state, other;  // of x and low, and of terms and net

  Inputs(const Tensor& from, const Maybe& rest, const std::vector<Tensor>& outputs, const Tensor& coefficients,
         int64_t k, const Maybe& noise, const Maybe& y, const Maybe& y_low, const Maybe& next, const Maybe& flag)
      : x(tensors::dense(from)),
        table(coefficients),
        row(k),
        seeds(noise),
        high(y),
        out_low(y_low),
        net(next),
        wrong(flag),
        state(from.scalar_type()),
        other(net.has_value()   ? net->scalar_type()
              : outputs.empty() ? state
                                : outputs[0].scalar_type()) {
    STD_TORCH_CHECK(outputs.size() <= kTerms, "heun_combine: at most 2 terms, got ", outputs.size());
    STD_TORCH_CHECK(beside(table) && table.dim() == 3 && table.size(2) == kColumns && table.is_contiguous() &&
                        table.scalar_type() == ScalarType::Double && row >= 0 && row < table.size(0) &&
                        (table.size(1) == 1 || table.size(1) == x.size(0)),
                    "heun_combine: table must be float64 [K, 1 or B, 8] on the device of x, with row ", row);
    check_output(high, "high", state);
    check_output(out_low, "out_low", state);
    check_output(net, "net", other);
    if (rest.has_value()) {
      check_like(*rest, "low", state);
      low = tensors::dense(*rest);
    }
    STD_TORCH_CHECK(!seeds.has_value() || (beside(*seeds) && seeds->numel() == x.size(0) &&
                                           seeds->scalar_type() == ScalarType::Long && seeds->is_contiguous()),
                    "heun_combine: seeds must be int64 [B] on the device of x");
    terms.reserve(outputs.size());
    for (const Tensor& t : outputs) {
      check_like(t, "terms", other);
      terms.push_back(tensors::dense(t));
    }
  }

  template <class S, class F>
  Pass<S, F> as() const {
    const int64_t rows = table.size(1);
    Pass<S, F> pass{};
    pass.x = tensors::read<S>(x);
    pass.low = tensors::read_if<S>(low);
    pass.count = static_cast<int>(terms.size());
    for (int j = 0; j < pass.count; ++j) pass.terms[j] = tensors::read<F>(terms[j]);
    pass.coefficients = tensors::read<double>(table) + row * rows * kColumns;
    pass.per_sample = rows != 1;
    pass.seeds = tensors::read_if<int64_t>(seeds);
    pass.row = row;
    pass.batch = x.size(0);
    pass.d = pass.batch > 0 ? x.numel() / pass.batch : x.numel();
    pass.high = tensors::write_if<S>(high);
    pass.out_low = tensors::write_if<S>(out_low);
    pass.net = tensors::write_if<F>(net);
    return pass;
  }

 private:
  bool beside(const Tensor& t) const {
    return t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index();
  }

  void check_like(const Tensor& t, const char* name, ScalarType dtype) const {
    STD_TORCH_CHECK(beside(t) && t.numel() == x.numel() && t.scalar_type() == dtype, "heun_combine: ", name,
                    " must have the size and the device of x, and the dtype that goes with it");
  }

  void check_output(const Maybe& t, const char* name, ScalarType dtype) const {
    if (!t.has_value()) return;
    check_like(*t, name, dtype);
    STD_TORCH_CHECK(t->is_contiguous(), "heun_combine: ", name, " must be contiguous");
  }
};

// heun_combine, by the heun_combine_out of a device: y, what rounding left of it and the network's next input.
template <class CombineOut>
std::tuple<Tensor, Tensor, Tensor> combine(const CombineOut& combine_out, const Tensor& x, const Maybe& low,
                                           const std::vector<Tensor>& terms, const Tensor& table, int64_t row,
                                           bool want_low, bool want_net) {
  const std::vector<int64_t> shape = tensors::sizes(x), none{0};
  const Tensor& like = terms.empty() ? x : terms[0];
  const Tensor high = new_empty(x, shape), rest = new_empty(x, want_low ? shape : none);
  const Tensor net = new_empty(like, want_net ? shape : none);
  combine_out(x, low, terms, table, row, std::nullopt, high, want_low ? Maybe(rest) : std::nullopt,
              want_net ? Maybe(net) : std::nullopt, std::nullopt);
  return {high, rest, net};
}

}  // namespace fewstep::heun
