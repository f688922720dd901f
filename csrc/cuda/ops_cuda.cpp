#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "cuda/sinkhorn.cuh"

// Weak, so that the library loads where torch was built without CUDA.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Sizes are ints inside a block, with room for the end of a tile.
constexpr int64_t kMaxSize = int64_t{1} << 30;
constexpr double kDefaultTol = 1e-3;

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "sinkhorn: ", cudaGetErrorString(error)); }

// Makes the tensor's device current for torch's CUDA runtime and for ours, which is linked statically.
class Device {
 public:
  explicit Device(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "sinkhorn: this torch was built without CUDA");
    check(cudaSetDevice(t.get_device_index()));
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
  cudaStream_t stream;

 private:
  DeviceGuard guard_;
};

void check_input(const Tensor& t, const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), "sinkhorn: ", name,
                  " must be on the device of x");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "sinkhorn: ", name, " must have the dtype of x");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), "sinkhorn: ", name, " must have ", shape.size(),
                  " dimensions, got ", t.dim());
  int64_t axis = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(t.size(axis) == size, "sinkhorn: ", name, " must have size ", size, " along axis ", axis, ", got ",
                    t.size(axis));
    STD_TORCH_CHECK(axis == 0 || size <= kMaxSize, "sinkhorn: ", name, " must have at most 2^30 points, got ", size);
    ++axis;
  }
}

void check_points(const Tensor& x, const Tensor& y, int64_t cost) {
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3, "sinkhorn: x and y must have 3 dimensions");
  check_input(x, "x", x, {x.size(0), x.size(1), x.size(2)});
  check_input(y, "y", x, {x.size(0), y.size(1), x.size(2)});
  STD_TORCH_CHECK(x.size(1) > 0 && y.size(1) > 0 && x.size(2) > 0, "sinkhorn: x and y must have points and D > 0");
  STD_TORCH_CHECK(0 <= cost && cost <= 2, "sinkhorn: cost must be 0, 1 or 2, got ", cost);
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls fn with a value of the tensor's dtype. Users get their errors from fewstep.ops; these checks are invariants.
template <typename Fn>
void dispatch(const Tensor& t, Fn fn) {
  if (t.scalar_type() == ScalarType::Float) return fn(float{});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, "sinkhorn: x must be float32 or float64");
  fn(double{});
}

using Maybe = std::optional<Tensor>;

// What the CPU kernels have and these do not; fewstep.ops sends such calls elsewhere.
void check_plain(const Maybe& matrix, const Maybe& segment_x, const Maybe& segment_y, const Maybe& label_x,
                 const Maybe& label_y, const Maybe& label_cost, std::optional<int64_t> diagonal) {
  const bool plain = !matrix && !segment_x && !segment_y && !label_x && !label_y && !label_cost && !diagonal;
  STD_TORCH_CHECK(plain, "sinkhorn: CUDA kernels have no matrix, segments, labels or diagonal");
}

// f0 is not looked at: an alternating iteration overwrites it.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn(
    const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& eps, const Maybe&,
    const Maybe& g0, const Maybe& matrix, const Maybe& segment_x, const Maybe& segment_y, const Maybe& label_x,
    const Maybe& label_y, const Maybe& label_cost, int64_t cost, std::optional<int64_t> diagonal, int64_t max_iter,
    std::optional<double> tol, const Maybe& start, double, const Maybe& schedule, std::optional<double> rho_x,
    std::optional<double> rho_y, double relax, bool simultaneous, bool, int64_t) {
  check_plain(matrix, segment_x, segment_y, label_x, label_y, label_cost, diagonal);
  STD_TORCH_CHECK(!start && !schedule && !rho_x && !rho_y && relax == 1 && !simultaneous,
                  "sinkhorn: CUDA kernels have alternating, balanced iterations at one temperature");
  check_points(x, y, cost);
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  check_input(a, "a", x, {batch, n});
  check_input(b, "b", x, {batch, m});
  check_input(eps, "eps", x, {batch});
  if (g0) check_input(*g0, "g0", x, {batch, m});
  STD_TORCH_CHECK(1 <= max_iter && max_iter <= INT32_MAX, "sinkhorn: max_iter must be in 1..2^31-1, got ", max_iter);

  Tensor f = new_empty(x, {batch, n}), g = new_empty(x, {batch, m});
  Tensor value = new_empty(x, {batch}), residual = new_empty(x, {batch});
  Tensor iterations = new_empty(x, {batch}, ScalarType::Long), converged = new_empty(x, {batch}, ScalarType::Bool);
  if (batch > 0) {
    const Device device(x);
    const Tensor xc = contiguous(x), yc = contiguous(y), ac = contiguous(a), bc = contiguous(b), ec = contiguous(eps);
    const Tensor gc = g0 ? contiguous(*g0) : g;
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      fewstep::cuda::SinkhornPlan plan;
      check(fewstep::cuda::plan_sinkhorn(batch, n, m, sizeof(T), &plan));
      // Freed on return; torch hands it out again in stream order, after the kernel.
      const Tensor workspace = new_empty(x, {plan.workspace_elements()});
      check(fewstep::cuda::sinkhorn(plan, data<T>(xc), data<T>(yc), data<T>(ac), data<T>(bc), data<T>(ec),
                                    g0 ? data<T>(gc) : nullptr, batch, n, m, d, cost, max_iter, tol.value_or(-1),
                                    tol.value_or(kDefaultTol), mutable_data<T>(workspace), mutable_data<T>(f),
                                    mutable_data<T>(g), mutable_data<T>(value), mutable_data<T>(residual),
                                    mutable_data<int64_t>(iterations), mutable_data<bool>(converged), device.stream));
    });
  }
  return {f, g, value, residual, iterations, converged};
}

std::tuple<Tensor, Tensor> sinkhorn_transport(const Tensor& x, const Tensor& y, const Tensor& f, const Tensor& g,
                                              const Tensor& b, const Tensor& eps, const Tensor& v, const Maybe& matrix,
                                              const Maybe& segment_x, const Maybe& segment_y, const Maybe& label_x,
                                              const Maybe& label_y, const Maybe& label_cost, int64_t cost,
                                              std::optional<int64_t> diagonal) {
  check_plain(matrix, segment_x, segment_y, label_x, label_y, label_cost, diagonal);
  check_points(x, y, cost);
  STD_TORCH_CHECK(v.dim() == 3, "sinkhorn: v must have 3 dimensions, got ", v.dim());
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2), k = v.size(2);
  check_input(f, "f", x, {batch, n});
  check_input(g, "g", x, {batch, m});
  check_input(b, "b", x, {batch, m});
  check_input(eps, "eps", x, {batch});
  check_input(v, "v", x, {batch, m, k});

  Tensor out = new_empty(x, {batch, n, k}), mass = new_empty(x, {batch, n});
  if (batch > 0) {
    const Device device(x);
    const Tensor xc = contiguous(x), yc = contiguous(y), fc = contiguous(f), gc = contiguous(g);
    const Tensor bc = contiguous(b), ec = contiguous(eps), vc = contiguous(v);
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      check(fewstep::cuda::sinkhorn_transport(data<T>(xc), data<T>(yc), data<T>(fc), data<T>(gc), data<T>(bc),
                                              data<T>(ec), data<T>(vc), batch, n, m, d, k, cost, mutable_data<T>(out),
                                              mutable_data<T>(mass), device.stream));
    });
  }
  return {out, mass};
}

Tensor sinkhorn_grad(const Tensor& x, const Tensor& y, const Tensor& f, const Tensor& g, const Tensor& a,
                     const Tensor& b, const Tensor& eps, const Maybe& matrix, const Maybe& segment_x,
                     const Maybe& segment_y, const Maybe& label_x, const Maybe& label_y, const Maybe& label_cost,
                     int64_t cost, std::optional<int64_t> diagonal) {
  check_plain(matrix, segment_x, segment_y, label_x, label_y, label_cost, diagonal);
  check_points(x, y, cost);
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  check_input(f, "f", x, {batch, n});
  check_input(g, "g", x, {batch, m});
  check_input(a, "a", x, {batch, n});
  check_input(b, "b", x, {batch, m});
  check_input(eps, "eps", x, {batch});

  Tensor grad_x = new_empty(x, {batch, n, d});
  if (batch > 0) {
    const Device device(x);
    const Tensor xc = contiguous(x), yc = contiguous(y), fc = contiguous(f), gc = contiguous(g);
    const Tensor ac = contiguous(a), bc = contiguous(b), ec = contiguous(eps);
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      check(fewstep::cuda::sinkhorn_grad(data<T>(xc), data<T>(yc), data<T>(fc), data<T>(gc), data<T>(ac), data<T>(bc),
                                         data<T>(ec), batch, n, m, d, cost, mutable_data<T>(grad_x), device.stream));
    });
  }
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fewstep, CUDA, m) {
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  m.impl("sinkhorn_transport", TORCH_BOX(&sinkhorn_transport));
  m.impl("sinkhorn_grad", TORCH_BOX(&sinkhorn_grad));
}
