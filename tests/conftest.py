"""Interpreted Triton without a GPU, deterministic algorithms, NaN in new memory, seeds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from support.pairwise import all_pairs

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported

collect_ignore = ["ptx"]  # has targets of its own: tests/ptx/README.md
settings.register_profile("fewstep", derandomize=True, database=None, deadline=None)
settings.load_profile("fewstep")


def _settle() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a busy machine OpenMP threads wait for each other in small ops
    torch.use_deterministic_algorithms(True)  # also fills `torch.empty` with NaN


@pytest.fixture(autouse=True, scope="module")
def _deterministic_fixtures() -> Iterator[None]:
    """What a module's tests share is made before the first of them."""
    _settle()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    _settle()


CAPABILITIES = ("base", "avx2", "avx512")


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels at each instruction set that this CPU has."""
    from fewstep import _C

    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := _skipped(item):
            item.add_marker(pytest.mark.skip(reason=reason))
    for _, group in itertools.groupby(items, key=_pairwise):
        cases = [case for case in group if not case.get_closest_marker("skip")]
        if cases and _pairwise(cases[0]) is not None:
            few = all_pairs([tuple(map(id, case.callspec.params.values())) for case in cases])
            for i in set(range(len(cases))) - set(few):
                cases[i].add_marker("slow")


def _skipped(item: pytest.Item) -> str | None:
    """Why a case cannot run here."""
    from fewstep import _C

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "no CUDA device"
    wanted = getattr(item, "callspec", None) and item.callspec.params.get("capability", "base")
    most = _C.detected_cpu_capability()
    if wanted and CAPABILITIES.index(wanted) > CAPABILITIES.index(most):
        return f"this CPU has {most} at most"
    return None


def _pairwise(item: pytest.Item) -> object:
    """The function of a case that is one of a product that is run by pairs."""
    return getattr(item, "function", None) if item.get_closest_marker("pairwise") else None
