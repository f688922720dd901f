"""Duals under autocast: values as autocast makes them, derivatives to its precision."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support import programs
from tests.tolerances import TANGENTS
from torch import Tensor, nn

import fewstep
from fewstep.ops.dual import autocasting
from fewstep.ops.dual.autocasting import result_dtype

LOW = TANGENTS["value"]


def lowered(dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype)


class Block(nn.Module):
    """Convolutions, a norm with float32 weights, attention, a skip, and float32 in the middle."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 2, 3, padding=1)
        self.norm, self.attention = (
            nn.GroupNorm(2, width),
            nn.MultiheadAttention(width, 2, batch_first=True),
        )
        self.embed = nn.Linear(1, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) + self.embed(t[:, None].cos())[:, :, None, None]
        tokens = F.silu(self.norm(h)).flatten(2).mT
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        with torch.autocast("cpu", enabled=False):
            tokens = torch.tanh(tokens.to(x.dtype))
        out: Tensor = self.last(torch.cat([tokens, tokens], 1)[:, :16].mT.unflatten(2, (4, 4)))
        return out


@torch.no_grad()
def by_differences(net: nn.Module, x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """Of x along u and t along 1, in float64."""
    own, x, t, u = copy.deepcopy(net).double(), x.double(), t.double(), 1e-5 * u.double()
    moved: Tensor = (own(x + u, t + 1e-5) - own(x - u, t - 1e-5)) / 2e-5
    return moved


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True])
def test_jvp_of_a_network(through: bool, dtype: torch.dtype, inside: bool) -> None:
    net, x, t = Block(), torch.randn(3, 2, 4, 4), torch.rand(3)
    u = torch.randn_like(x)
    exact = by_differences(net, x, t, u)

    def casting(x: Tensor, t: Tensor) -> Tensor:
        with lowered(dtype):
            return net(x, t)

    with torch.autocast("cpu", dtype, enabled=not inside):
        plain = net(x, t) if not inside else casting(x, t)
        out = fewstep.jvp(casting if inside else net, (x, t), (u, 1.0), through=through)
    assert (out.engine, out.info) == ("duals", "")
    assert out.value.dtype == out.tangent.dtype == plain.dtype == dtype
    assert (out.value - plain).float().norm() < LOW * plain.float().norm()
    assert (out.tangent.float() - exact).norm() < LOW * exact.norm()
    weights = list(net.parameters())
    own, want = (torch.autograd.grad(v.float().square().sum(), weights) for v in (out.value, plain))
    least = 0.05 * max(float(w.norm()) for w in want)
    for g, e in zip(own, want, strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() < LOW * max(float(e.norm()), least)


@pytest.mark.parametrize("estimator", ["exact", "hutchinson", "xtrace"])
def test_traces_of_a_network(estimator: str) -> None:
    net, x, t = Block(), torch.randn(3, 2, 4, 4), torch.rand(3)
    options: dict[str, Any] = {} if estimator == "exact" else {"probes": 32, "probe": "hadamard"}
    if estimator == "xtrace":
        options["probe"] = "rademacher"
    exact = fewstep.divergence(net, x, t, estimator="exact").value.detach()
    with lowered():
        out = fewstep.divergence(net, x, t, estimator=estimator, **options)
        plain = net(x, t)
    assert (out.info, out.velocity.dtype) == ("", torch.bfloat16)
    assert out.value.dtype == torch.float32
    assert (out.velocity - plain).float().norm() < LOW * plain.float().norm()
    size = float(net.first.weight.detach().norm() * net.last.weight.detach().norm())
    assert float((out.value.detach() - exact).abs().max()) < LOW * size * 4
    out.value.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_log_density() -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(5, 4)
    exact = fewstep.log_density(net, x, times=[0, 0.5, 1.0], estimator="exact").log_prob.detach()
    with lowered(), torch.no_grad():
        for estimator in ("exact", "hutchinson"):
            out = fewstep.log_density(
                *(net, x), times=[0, 0.5, 1.0], estimator=estimator, probes=4, probe="hadamard"
            )
            assert float((out.log_prob - exact).abs().max()) < 8 * LOW


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (F.linear, [(3, 4), (5, 4)]),
        (torch.matmul, [(3, 2, 4), (4, 5)]),
        (F.conv2d, [(2, 3, 4, 4), (3, 3, 1, 1)]),
        (F.softmax, [(3, 4)]),
        (torch.exp, [(3, 4)]),
        (torch.add, [(3, 4), (4,)]),
        (F.scaled_dot_product_attention, [(2, 3, 4), (2, 3, 4), (2, 3, 4)]),
        (F.silu, [(3, 4)]),
    ],
)
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_plain_function(
    function: Any, kinds: Any, first: torch.dtype
) -> None:
    args: Any = tuple(torch.randn(shape, dtype=first) for shape in kinds[:1])
    args += tuple(torch.randn(shape) for shape in kinds[1:])
    args = (*args, 1) if function is F.softmax else args
    if function is F.scaled_dot_product_attention:
        args = tuple(a.to(first) for a in args)
    with lowered():
        want = function(*args).dtype
        seen = []

        def velocity(x: Tensor, t: Any) -> Tensor:
            out = function(x, *args[1:])
            seen.append(out.dtype)
            return x * 1

        fewstep.divergence(velocity, args[0], 0.0, check="never")
    assert set(seen) == {want}


def test_torch_is_asked_once_and_random_states_stay() -> None:
    autocasting._seen.clear()
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.randn(3, 4)
    with lowered():
        torch.manual_seed(3)
        plain = net(x)
        for _ in range(2):
            torch.manual_seed(3)
            out = fewstep.divergence(net, x, 0.0, check="never", probes=2)
            assert torch.equal(out.velocity == 0, plain == 0)
            assert (out.velocity - plain).float().norm() < LOW * plain.float().norm()
    assert len(autocasting._seen) == 2


def test_a_function_that_fails_says_so() -> None:
    def velocity(x: Tensor, t: Any) -> Tensor:
        return F.linear(x, torch.zeros(2, 7))

    with lowered(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fewstep.divergence(velocity, torch.zeros(3, 4), 0.0)


def test_other_devices_autocast_changes_nothing() -> None:
    x, net = torch.randn(3, 4), nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    want = fewstep.divergence(net, x, 0.0, estimator="hutchinson", engine="duals")
    torch.set_autocast_enabled("cuda", True)
    try:
        out = fewstep.divergence(net, x, 0.0, estimator="hutchinson", engine="duals")
        assert result_dtype(torch.exp, (fewstep_stand_in(x),), {}) == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert out.velocity.dtype == torch.float32
    torch.testing.assert_close(out.value, want.value)


def fewstep_stand_in(x: Tensor) -> Any:
    from fewstep.ops.dual.engine import seed
    from fewstep.ops.dual.source import Source

    return seed(Source("reference", 1), x)


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_random_programs(first: int) -> None:
    """Whatever has rules has the values of a plain call, in its dtype."""
    served = 0
    for seed in range(first, first + 40):
        program = programs.draw(seed)
        if program.dtype != torch.float32 or "type(h)" in program.source:
            continue
        call = program.call()
        with programs.rows.quiet(), lowered():
            try:
                want = call.build(torch.float32)[0](call.x * 1, call.time(torch.float32)).detach()
                velocity = call.build(torch.float32)[0]
                out = fewstep.divergence(
                    velocity, call.x.clone(), call.t, check="never", estimator="exact"
                )
            except (RuntimeError, ValueError, NotImplementedError):
                continue
        if out.info or not want.isfinite().all():
            continue
        served += 1
        assert out.velocity.dtype == want.dtype, program.describe()
        off = (out.velocity.detach() - want).float().norm()
        assert off <= 4 * LOW * want.float().norm() + 1e-6, program.describe()
    assert served >= 4
