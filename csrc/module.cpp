// The pybind11 module: importing it runs the static initialisers that register the ops.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace py = pybind11;
using namespace fewstep::cpu;

namespace {

void set_cpu_capability(const std::string& wanted) {
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512}) {
    if (wanted != name(isa)) continue;
    if (force_isa(isa)) return;
    throw py::value_error("capability: this CPU has " + std::string(name(detected_isa())) + " at most, got " + wanted);
  }
  throw py::value_error("capability must be base, avx2 or avx512, got " + wanted);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["torch_target"] = "2.11";
  info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of fewstep (torch.ops.fewstep) and the CPU capability they run at.";
  m.def("build_info", &build_info, "Compiler, C++ standard, oldest torch served.");
  m.def("cpu_capability", [] { return name(current_isa()); }, "The instruction set in use.");
  m.def("detected_cpu_capability", [] { return name(detected_isa()); }, "The best this CPU has.");
  m.def("set_cpu_capability", &set_cpu_capability, py::arg("capability"),
        "Force base, avx2 or avx512. Raises ValueError where this CPU lacks it.");
}
