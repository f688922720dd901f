"""Interpreted Triton without a GPU, deterministic algorithms, NaN in new memory, seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported

collect_ignore = ["ptx"]  # has targets of its own: tests/ptx/README.md
settings.register_profile("fewstep", derandomize=True, database=None, deadline=None)
settings.load_profile("fewstep")


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Deterministic mode also fills `torch.empty`, and the kernels' outputs, with NaN."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a busy machine OpenMP threads wait for each other in small ops
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


CAPABILITIES = ("base", "avx2", "avx512")


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels at each instruction set that this CPU has."""
    from fewstep import _C

    order = CAPABILITIES.index
    if order(request.param) > order(_C.detected_cpu_capability()):
        pytest.skip(f"this CPU has {_C.detected_cpu_capability()} at most")
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
