"""What a CUDA graph is to capture reads no value of a tensor: nothing waits for a device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from fewstep._torch import readable
from fewstep.methods import WFlow
from fewstep.samplers import edm

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class NoReads(TorchDispatchMode):
    """Refuses what waits for values: reading them, and shapes that depend on them."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        index = args[1] if name == "index" else ()
        masks = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index)
        if name in READS or masks:
            raise AssertionError(f"{func.name()} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of CPU tensors are not looked at either."""
    for module in [m for name, m in sys.modules.items() if name.startswith("fewstep")]:
        for name, value in list(vars(module).items()):
            if value is readable:
                monkeypatch.setattr(module, name, lambda *_: False)


def twice(work: Callable[[], Any]) -> Any:
    """The second time without reading: what is made once may be."""
    work()
    with NoReads(), pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "numpy"):  # which the mode does not see
            patch.setattr(Tensor, name, None)
        return work()


def test_reads_are_seen() -> None:
    x = torch.ones(2)
    for read in (lambda: bool(x[0] > 0), lambda: x[x > 0], x.nonzero, x.max().item):
        with pytest.raises(AssertionError, match="waits for the device"), NoReads():
            read()


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "joint"},
        {"eps": (0.02, 0.2)},
        {"eps": (0.02, 0.2), "memory_limit": 1},
        {"guide": "distribution", "per_group": True},
        {"guide": "distribution", "memory_limit": 1},
    ],
)
@pytest.mark.parametrize("backend", ["reference", CUDA])
def test_wflow_step(backend: str, options: dict[str, Any]) -> None:
    generator = torch.nn.Linear(4, 20).to(DEVICE)
    noise, real = torch.randn(2, 3, 8, 4, device=DEVICE), torch.randn(3, 8, 20, device=DEVICE)
    uncond, guidance = torch.randn(3, 5, 20, device=DEVICE), torch.ones(3, device=DEVICE)
    optimizer = torch.optim.SGD(generator.parameters(), lr=1e-3)
    flow = WFlow(backend=backend, **options)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss, _ = flow(generator, noise, real, uncond=uncond, guidance=guidance)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    assert twice(step).isfinite()


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("backend", ["reference", CUDA])
def test_edm_sample(backend: str) -> None:
    network, latents = torch.nn.Linear(6, 6).to(DEVICE), torch.randn(4, 6, device=DEVICE)

    def sample() -> Tensor:
        with torch.no_grad():
            return fewstep.edm_sample(
                lambda x, _: network(x), latents, steps=3, check_finite=False, backend=backend
            )

    assert twice(sample).isfinite().all()


def test_tables_of_known_schedules_are_copied_to_a_device_once() -> None:
    plans = [
        edm._known_plan(
            *((3, 0.002, 80.0, 7.0), edm.Churn(), 0.5, "heun", torch.device("meta")), False, False
        )
        for _ in range(2)
    ]
    assert plans[0].table.is_meta
    assert plans[0].levels.is_meta
    assert plans[0] is plans[1]
