// Runs shared/heun.h, the arithmetic of the CUDA kernel, on the host: a request on stdin, the answer on stdout.
// Request: int64 {state is double, network is double, whole groups, batch, d, terms, rows, low, seeds, row}, then x,
// low, terms, the row's coefficients, seeds, as far as there are any. Answer: int64 finite, y, what rounding left of it
// where there is a low, the network's input.
#include "requests.h"
#include "shared/heun.h"

namespace {

using namespace fewstep;

struct Request {
  int64_t wide, wide_network, whole, batch, d, terms, rows, low, seeds, row;
};

template <bool kWhole, bool kNoisy, class S, class F>
bool all(const heun::Pass<S, F>& pass) {
  bool finite = true;
  const int64_t groups = (pass.d + heun::kGroup - 1) / heun::kGroup;
  for (int64_t i = 0; i < pass.batch * groups; ++i) {
    finite &= heun::combine_at<kWhole, kNoisy>(pass, i / groups, i % groups);
  }
  return finite;
}

template <class S, class F>
void combine(const Request& q) {
  const int64_t size = q.batch * q.d;
  const auto x = input<S>(size), low = input<S>(q.low ? size : 0);
  std::vector<std::vector<F>> terms;
  for (int64_t j = 0; j < q.terms; ++j) terms.push_back(input<F>(size));
  const auto coefficients = input<double>(q.rows * heun::kColumns);
  const auto seeds = input<int64_t>(q.seeds ? q.batch : 0);
  auto high = poisoned<S>(size), rest = poisoned<S>(q.low ? size : 0);
  auto net = poisoned<F>(size);
  heun::Pass<S, F> pass{};
  pass.x = x.data();
  pass.low = q.low ? low.data() : nullptr;
  pass.count = static_cast<int>(q.terms);
  for (int64_t j = 0; j < q.terms; ++j) pass.terms[j] = terms[j].data();
  pass.coefficients = coefficients.data();
  pass.per_sample = q.rows != 1;
  pass.seeds = q.seeds ? seeds.data() : nullptr;
  pass.row = q.row;
  pass.batch = q.batch;
  pass.d = q.d;
  pass.high = high.data();
  pass.out_low = q.low ? rest.data() : nullptr;
  pass.net = net.data();
  bool finite;
  if (q.whole) {
    finite = q.seeds ? all<true, true>(pass) : all<true, false>(pass);
  } else {
    finite = q.seeds ? all<false, true>(pass) : all<false, false>(pass);
  }
  output(std::vector<int64_t>{finite});
  output(high);
  output(rest);
  output(net);
}

}  // namespace

int main() {
  return serve_all<Request>([](const Request& q) {
    if (!q.wide) {
      combine<float, float>(q);
    } else if (!q.wide_network) {
      combine<double, float>(q);
    } else {
      combine<double, double>(q);
    }
  });
}
