"""Loads the compiled libraries and says which backend can serve which device, and why not."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

from fewstep._names import Backend

# Order of preference per device type; the first one available is the default. On a GPU the kernels
# that have proven themselves there go first: see `fewstep.verification.choice`.
DEFAULT_ORDER = {
    "cpu": ("cpp", "keops", "reference"),
    "cuda": ("keops", "reference"),
}
KERNELS: tuple[Backend, ...] = ("cuda", "triton")
BACKENDS = ("reference", "cpp", "cuda", "triton", "keops")

_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("triton", "pykeops")}
_BUILD_HINT = "build it with `pip install --no-build-isolation -e .` in the source tree"


def load_cpp() -> ModuleType:
    """Import `fewstep._C`, which registers the C++ CPU ops.

    Raises:
        ImportError: the extension is missing or was built for another Python.
    """
    try:
        return importlib.import_module("fewstep._C")
    except ImportError as error:
        raise ImportError(f"fewstep._C cannot be loaded ({error}); {_BUILD_HINT}") from error


def cuda_library() -> Path | None:
    """Path of the compiled CUDA library, or None where it was not built."""
    return next(Path(__file__).parent.glob("_C_cuda*.so"), None)


def load_cuda() -> str | None:
    """Register the CUDA C++ ops if a device is there; returns the reason where that fails."""
    path = cuda_library()
    if path is None:
        return "built without it (install with FEWSTEP_CUDA=1, which needs nvcc)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    return None


CUDA_UNAVAILABLE = load_cuda()


def triton_unavailable(device_type: str) -> str | None:
    """Why Triton kernels cannot run on this device type, or None if they can."""
    if not _INSTALLED["triton"]:
        return "triton is not installed (pip install 'triton>=3.6')"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton needs a GPU, not {device_type} (TRITON_INTERPRET=1 runs its interpreter)"
    return None


def unavailable(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on `device_type`, or None if it can."""
    if backend == "cpp":
        return None if device_type == "cpu" else f"C++ kernels run on the CPU, not {device_type}"
    if backend == "cuda":
        if device_type != "cuda":
            return f"CUDA kernels need a CUDA tensor, not {device_type}"
        return CUDA_UNAVAILABLE
    if backend == "triton":
        return triton_unavailable(device_type)
    if backend == "keops" and not _INSTALLED["pykeops"]:
        return "pykeops is not installed (pip install 'pykeops>=2.3')"
    return None


def is_cuda(device: torch.device) -> bool:
    """Whether CUDA kernels take tensors of this device."""
    return device.type == "cuda"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that the CUDA kernels count on for a block of a device.

    The compute capabilities 8.0, 9.x and 10.x have 163 KB and more, others at least 99 KB.
    """
    p = torch.cuda.get_device_properties(device)
    return (163 if (p.major, p.minor) == (8, 0) or p.major in (9, 10) else 99) * 1024
