"""`python -m fewstep.info`: versions, CPU capability, and which backend serves each op where."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable

import torch

from fewstep import __version__
from fewstep._library import BACKENDS, DEFAULT_ORDER, KERNELS, cuda_library, load_cpp, unavailable
from fewstep.ops.heun import inputs
from fewstep.ops.sinkhorn import drift_inputs
from fewstep.ops.trace import inputs as trace_inputs
from fewstep.verification import decision, record

# Why a backend cannot serve an op at all, or None; "sinkhorn" has transport and barycenters too,
# "heun_solve" all samplers.
OPS: dict[str, Callable[[str], str | None]] = {
    "sinkhorn": lambda _: None,
    "sinkhorn_drift": lambda backend: drift_inputs.unsupported(backend, None),
    "divergence": trace_inputs.unsupported,
    "heun_solve": inputs.unsupported,
}


def report() -> str:
    """The whole page as text.

    >>> "sinkhorn" in report()
    True
    """
    cpp = load_cpp()
    build = cpp.build_info()
    lines = [
        f"fewstep {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__} (libraries built for >= {build['torch_target']}), "
        f"triton {_version('triton')}, numpy {_version('numpy')}",
        f"C++ library: compiler {build['compiler']}, pybind11 {build['pybind11']}",
        f"CPU capability: {cpp.cpu_capability()} (this CPU has {cpp.detected_cpu_capability()}; "
        "FEWSTEP_CPU_CAPABILITY=base|avx2|avx512 overrides)",
        f"CUDA library: {'built' if cuda_library() else 'not built'}; devices: {_devices()}",
        "",
        f"{'op':<16}{'device':<8}{'backend':<11}status",
    ]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for op, unsupported in OPS.items():
        for device in devices:
            # KeOps is the default for cost functions alone.
            order = [b for b in DEFAULT_ORDER[device] if b != "keops" and unsupported(b) is None]
            default = next(b for b in order if unavailable(b, device) is None)
            for backend in BACKENDS:
                reason = unavailable(backend, device) or unsupported(backend)
                status = f"no: {reason}" if reason else "yes"
                if backend == default and not reason:
                    status = "yes, default"
                elif device == "cuda" and backend in KERNELS and not reason:
                    status = "yes, default where it has been verified and is faster"
                lines.append(f"{op:<16}{device:<8}{backend:<11}{status}")
    if "cuda" in devices:
        known = {}
        for i in range(torch.cuda.device_count()):
            known[str(record.identity(torch.device("cuda", i)))] = torch.device("cuda", i)
        for one in known.values():
            lines += ["", *decision.summary(one)]
    else:
        lines += ["", "No backend serves the device cuda here: torch finds no CUDA device."]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
