"""A driver for Triton: kernels are compiled to PTX for a GPU and launched on CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from . import sim

_TYPES = {
    "i1": ctypes.c_int8,
    **{f"i{bits}": getattr(ctypes, f"c_int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": getattr(ctypes, f"c_uint{bits}") for bits in (8, 16, 32, 64)},
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


def _scalars(types: tuple[Any, ...], values: Sequence[Any]) -> Iterator[Any]:
    """Pointers and numbers as the kernel takes them, those of tuples one by one."""
    for type_, value in zip(types, values, strict=True):
        if isinstance(type_, tuple):
            yield from _scalars(type_, value)
        elif type_ == "constexpr":
            continue
        elif type_.startswith("*"):
            yield ctypes.c_void_p(0 if value is None else value.data_ptr())
        else:
            yield _TYPES[type_](value)


class _Launcher:
    """Stands for a compiled kernel: grid and Python values in."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.types = list(src.signature.values())
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        values = list(_scalars(tuple(self.types), rest[4:]))
        # Scratch memory, which kernels here do not use.
        assert self.metadata.global_scratch_size == 0
        while len(values) < sim.lib.ptx_parameters(function):
            values.append(ctypes.c_void_p(0))
        if x * y * z > 0:
            block = (32 * self.metadata.num_warps,)
            sim.launch(function, (x, y, z), block, values, shared=self.metadata.shared)


class _Utilities:
    def __init__(self, arch: int) -> None:
        self.shared = 232448 if arch == 90 else 166912

    def load_binary(self, name: str, ptx: str, shared: int, device: int) -> tuple[Any, ...]:
        sim.load(ptx)
        return ptx, sim.entry(name), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.shared,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": 65536,
        }


class Driver(DriverBase):
    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.utils = _Utilities(arch)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.arch, 10)


def activate(arch: int) -> None:
    """Make the interpreter Triton's device; kernels end as PTX, ptxas is not called."""
    stages, init = CUDABackend.add_stages, CUDABackend.__init__

    def add_stages(self: Any, table: dict[str, Any], *args: Any) -> None:
        stages(self, table, *args)
        table.pop("cubin", None)

    def start(self: Any, target: Any) -> None:
        init(self, target)
        self.binary_ext = "ptx"

    CUDABackend.add_stages, CUDABackend.__init__ = add_stages, start
    triton.runtime.driver.set_active(Driver(arch))
