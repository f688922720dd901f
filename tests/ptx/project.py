"""The project on the interpreter: its CUDA ops and Triton launchers serve CPU tensors.

Modules of the project are found by what they define, so that they may move.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch

from . import sim

LIBRARY = str(sim.BUILD / f"libfewstep_sm_{sim.ARCH}.so")
PROCESSORS = {80: 108, 90: 132, 100: 148}
PROPERTIES = SimpleNamespace(
    major=sim.ARCH // 10,
    minor=sim.ARCH % 10,
    multi_processor_count=PROCESSORS[sim.ARCH],
    name="PTX interpreter",
    shared_memory_per_block_optin=166912 if sim.ARCH == 80 else 232448,
    total_memory=2**36,
    warp_size=32,
)


def _modules() -> list[ModuleType]:
    found = [m for name, m in sys.modules.items() if name.split(".")[0] == "fewstep"]
    return [m for m in found if isinstance(m, ModuleType)]


def _import_all(package: str) -> None:
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, package + "."):
        with contextlib.suppress(ImportError):  # of what is not installed
            importlib.import_module(module.name)


def function(name: str) -> Any:
    """A function of the project's CUDA sources by its name in C++, such as `drift`."""
    listing = ["nm", "--dynamic", "--defined-only", "--format=posix", LIBRARY]
    mangled, plain = (
        subprocess.run([*listing, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["--demangle"])
    )
    for symbol, line in zip(mangled.splitlines(), plain.splitlines(), strict=True):
        if f" fewstep::cuda::{name}(" in f" {line}":
            return ctypes.CDLL(LIBRARY)[symbol.split()[0]]
    raise LookupError(f"no function fewstep::cuda::{name} in {LIBRARY}")


def defining(*names: str) -> ModuleType:
    """The project's module that defines functions of all these names."""
    for module in _modules():
        own = [getattr(vars(module).get(name), "__module__", None) for name in names]
        if set(own) == {module.__name__}:
            return module
    raise LookupError(f"no module of the project defines {names}")


def replace(name: str, by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `by(function)` in the place of the project's function, in every module that holds it."""
    held = {vars(m)[name] for m in _modules() if isinstance(vars(m).get(name), FunctionType)}
    assert held, f"the project has no function {name}"
    for function in held:
        new = by(function)
        for module in _modules():
            for key, value in list(vars(module).items()):
                if value is function:
                    setattr(module, key, new)


def use_cuda() -> None:
    """Let the project's CUDA ops serve CPU tensors where backend="cuda" asks for them."""
    assert sim.preloaded(), "run under LD_PRELOAD=build/libptx.so"
    os.environ["FEWSTEP_VERIFY"] = "off"  # kernels run where they are named
    for source in sorted((sim.ROOT / "csrc/cuda").glob("*.cu")):
        sim.load((sim.BUILD / f"sm_{sim.ARCH}/{source.stem}.ptx").read_bytes())
    _import_all("fewstep.ops")  # first: the ops that are registered last serve CPU tensors
    torch.ops.load_library(LIBRARY)
    torch.cuda.get_device_properties = lambda *_: PROPERTIES
    replace("is_cuda", lambda _: lambda device: True)
    replace("unavailable", lambda old: lambda b, device: None if b == "cuda" else old(b, device))
    for module in _modules():
        if hasattr(module, "_warned"):  # a warning that only results on the CPU give
            module._warned = True


def use_triton() -> None:
    """Let the project's Triton launchers run on CPU tensors as they would on a device."""
    from . import triton_driver

    triton_driver.activate(sim.ARCH)
    _import_all("fewstep.ops")
    _import_all("fewstep.kernels")
    replace("architecture", lambda _: lambda device: f"sm_{sim.ARCH}")
    replace("triton_unavailable", lambda _: lambda device_type: None)
