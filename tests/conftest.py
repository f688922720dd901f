"""Interpreted Triton without a GPU, deterministic algorithms, NaN in new memory, seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
