// The pybind11 module: importing it runs the static initialisers that register the ops.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

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

py::object attribute(py::handle owner, PyObject* name) {
  PyObject* found = PyObject_GetAttr(owner.ptr(), name);
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

bool truth(py::handle value) {
  const int found = PyObject_IsTrue(value.ptr());
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

bool is_hooked(py::handle module) {
  static PyObject* const names[] = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                    interned("_backward_hooks"), interned("_backward_pre_hooks")};
  for (PyObject* name : names)
    if (truth(attribute(module, name))) return true;
  return false;
}

// Every call of a trace walks all modules: in Python that takes 2 us for each.
void modes(py::handle root, py::list parts, py::list modules, py::set seen) {
  static PyObject* const training = interned("training");
  static PyObject* const children = interned("_modules");
  std::vector<py::object> waiting{py::reinterpret_borrow<py::object>(root)};
  while (!waiting.empty()) {
    const py::object own = std::move(waiting.back());
    waiting.pop_back();
    if (own.is_none()) continue;
    const auto id = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(own.ptr()));
    if (seen.contains(id)) continue;
    seen.add(id);
    modules.append(own);
    parts.append(2 * truth(attribute(own, training)) + is_hooked(own));
    const py::object held = attribute(own, children);
    if (!truth(held)) continue;
    const py::list values(held.attr("values")());
    for (size_t i = values.size(); i-- > 0;) waiting.push_back(values[i]);
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of fewstep (torch.ops.fewstep) and the CPU capability they run at.";
  m.def("build_info", &build_info, "Compiler, C++ standard, oldest torch served.");
  m.def("cpu_capability", [] { return name(current_isa()); }, "The instruction set in use.");
  m.def("detected_cpu_capability", [] { return name(detected_isa()); }, "The best this CPU has.");
  m.def("set_cpu_capability", &set_cpu_capability, py::arg("capability"),
        "Force base, avx2 or avx512. Raises ValueError where this CPU lacks it.");
  m.def("is_hooked", &is_hooked, "Whether a module has hooks of its forward or backward.");
  m.def("modes", &modes, "Append the mode and hooks of a module and of all within it, and those modules, once each.");
}
