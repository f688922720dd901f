#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fewstep, m) {
  m.def(
      "sinkhorn(Tensor x, Tensor y, Tensor a, Tensor b, Tensor eps, Tensor? g0, int cost, int max_iter, float? tol)"
      " -> (Tensor f, Tensor g, Tensor value, Tensor residual, Tensor iterations, Tensor converged)");
  m.def(
      "sinkhorn_transport(Tensor x, Tensor y, Tensor f, Tensor g, Tensor b, Tensor eps, Tensor v, int cost)"
      " -> (Tensor out, Tensor mass)");
  m.def("sinkhorn_grad(Tensor x, Tensor y, Tensor f, Tensor g, Tensor a, Tensor b, Tensor eps, int cost) -> Tensor");
}
