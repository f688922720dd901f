"""Terms, times and weights of any shape, dtype and precision in a velocity."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fewstep.toys import GaussianMixture
from torch import Tensor, nn

import fewstep
from fewstep.methods import MarginalReflow
from support.rows import Velocity, assert_right, trace
from tolerances import TANGENTS

DTYPES = [torch.float32, torch.float64]


TERMS: dict[str, Any] = {
    "number": 1e-6,
    "whole number": 3,
    "scalar": torch.tensor(0.5),
    "float64 scalar": torch.tensor(0.5, dtype=torch.float64),
    "one": torch.tensor([0.5]),
    "int64": torch.tensor([[1], [2], [3]]),
    "int64 row": torch.arange(4),
    "int32": torch.arange(4, dtype=torch.int32),
    "bool": torch.arange(4) > 1,
    "float64": torch.linspace(0, 1, 4, dtype=torch.float64).sin(),
    "float32": torch.tensor([0.5, -1.0, 0.25, 2.0]),
    "float16": torch.tensor([0.5, -1.0, 0.25, 2.0], dtype=torch.float16),
    "rows": torch.tensor([[0.5], [-1.0], [0.25]]),
}


NEXT: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda h: F.layer_norm(h, (4,)),
    "rms_norm": lambda h: F.rms_norm(h, (4,), eps=1e-5),
    "group_norm": lambda h: F.group_norm(h, 1, eps=1e-5),
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "softplus": F.softplus,
    "exp": torch.exp,
    "softmax": lambda h: h.softmax(-1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("after", NEXT)
@pytest.mark.parametrize("term", TERMS)
def test_terms_of_any_shape_and_dtype(term: str, after: str, dtype: torch.dtype) -> None:
    """As torch promotes: numbers, `[1]`, `[B, 1]`, other dtypes, before an activation or a norm."""
    c, f = TERMS[term], NEXT[after]
    x = torch.randn(3, 4).to(dtype)
    with torch.no_grad():
        assert_right(lambda x, t: f(x + c), x)
        assert_right(lambda x, t: f(c - 2 * x), x) if c is not TERMS["bool"] else None


@pytest.mark.parametrize(
    "shape", [(5,), (1, 5), (1, 1, 5), (4, 1), (1, 4, 1), (4, 5), (3, 1, 1), ()]
)
def test_terms_before_a_group_norm(shape: tuple[int, ...]) -> None:
    c = torch.randn(shape)
    assert_right(lambda x, t: F.group_norm(x + c, 2), torch.randn(3, 4, 5))


@pytest.mark.parametrize("t", [torch.tensor([1, 2, 3]), torch.rand(3), torch.rand(3).double(), 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_times_of_any_dtype(t: Any, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4).to(dtype)
    own = t if isinstance(t, Tensor) else torch.full((3,), t, dtype=dtype)
    for f in (F.silu, lambda h: F.layer_norm(h, (4,))):

        def velocity(x: Tensor, t: Tensor, f: Any = f) -> Tensor:
            return f(x + t[:, None])  # type: ignore[no-any-return]

        expected = trace(velocity, x, own.double() if dtype == torch.float32 else own)
        out = fewstep.divergence(velocity, x, t, estimator="exact")
        torch.testing.assert_close(out.velocity, velocity(x, own))
        torch.testing.assert_close(out.value.double(), expected, rtol=1e-5, atol=1e-6)


def shifted(c: Tensor) -> Velocity:
    return lambda x, t: F.layer_norm(x + c, (4,))


def test_terms_of_another_shape_by_the_same_code() -> None:
    """A function that is written in a loop is known again; what it closes over is another."""
    x = torch.randn(3, 4)
    for c in (
        torch.randn(3, 4),
        torch.randn(4),
        torch.randn(1),
        torch.randn(3, 1),
        torch.randn(()),
    ):
        assert_right(shifted(c), x)


def test_a_mask_is_not_read_beyond_its_end() -> None:
    mask = torch.zeros(1000, dtype=torch.bool)
    out = fewstep.divergence(lambda x, t: torch.tanh(x + mask), torch.zeros(2, 1000), 0.0)
    assert torch.equal(out.velocity, torch.zeros(2, 1000))


def test_density_behind_a_scalar_and_a_norm() -> None:
    layer = nn.Linear(4, 4).double()
    x, times = torch.randn(3, 4, dtype=torch.float64), [0.0, 0.5, 1.0]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return layer(F.layer_norm(2 * x - 1, (4,)))  # type: ignore[no-any-return]

    found = fewstep.log_density(velocity, x, times=times, method="euler", tracker="logdet")
    by_trace = fewstep.log_density(velocity, x, times=times, method="euler", estimator="exact")
    torch.testing.assert_close(found.x, by_trace.x)
    change = sum(trace(velocity, y) * 0.5 for y in (x, x + 0.5 * velocity(x, x)))
    assert isinstance(change, Tensor)
    base = -0.5 * found.x.square().sum(1) - 2 * math.log(2 * math.pi)
    torch.testing.assert_close(by_trace.log_prob, base + change)


LOWERED = [
    nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)),
    nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 4)),
    nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 4)),
]


@pytest.mark.parametrize("net", LOWERED, ids=["mlp", "norm", "elu"])
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
@pytest.mark.parametrize("place", ["outside", "inside"])
def test_autocast(net: nn.Sequential, estimator: str, place: str) -> None:
    """The trace is as good as bfloat16's products, or better."""
    inside = place == "inside"

    def lowered(on: bool) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with lowered(inside):
            return net(x)  # type: ignore[no-any-return]

    x = torch.randn(6, 4)
    options = {"probes": 4, "probe": "hadamard"} if estimator == "hutchinson" else {}
    with lowered(not inside):
        out = fewstep.divergence(velocity, x, 0.0, estimator=estimator, **options)
        (out.value.sum() + out.velocity.float().square().sum()).backward()
    want = trace(lambda x, t: net.double()(x), x)
    net.float()
    scale = float(net[0].weight.detach().norm() * net[-1].weight.detach().norm())
    assert float((out.value.detach() - want).abs().max()) <= TANGENTS["value"] * scale
    assert out.velocity.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_losses_and_densities_under_autocast() -> None:
    net, times = LOWERED[0], [0, 0.5, 1.0]
    net.zero_grad()
    teacher = GaussianMixture(torch.zeros(1, 4), torch.ones(1, 4))
    x = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        MarginalReflow()(lambda x, t: net(x), teacher, x)[0].backward()
        low = fewstep.log_density(net, x, times=times, estimator="exact").log_prob
    want = fewstep.log_density(net, x, times=times, estimator="exact").log_prob
    assert float((low - want).detach().abs().max()) <= 8 * TANGENTS["value"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_density_in_half_precision(dtype: torch.dtype) -> None:
    """As float32's for the same states: of data N(0, 1/4), D = 784."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        own = (t - 0.25 * (1 - t)) / (t**2 + 0.25 * (1 - t) ** 2)
        return own[:, None] * x

    x = (0.5 * torch.randn(3, 784)).to(dtype)
    times = torch.linspace(0, 1, 65)
    options: list[dict[str, Any]] = [{}, {"tracker": "logdet"}]
    for o in options:
        own, few = (x, times) if not o else (x[:, :4], times)
        low = fewstep.log_density(velocity, own, times=few, **o).log_prob
        full = fewstep.log_density(velocity, own.float(), times=few, **o).log_prob
        torch.testing.assert_close(low.float(), full, rtol=1e-4, atol=1e-2)
    want = torch.distributions.Normal(0.0, 0.5).log_prob(x.double()).sum(1)
    low = fewstep.log_density(velocity, x, times=times).log_prob
    assert float((low.double() - want).abs().max()) < 0.1
