"""Jacobian-vector products of networks as people have them: by duals, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from support import rows
from support.diffusers_networks import DIFFUSERS
from support.jvp import F32, F64, Problem, filled, flat
from support.networks import IMAGE
from support.vit import ViT
from support.zoo import ZOO
from tolerances import assert_contract

# Of torch.func.jvp, when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
WHOLE = "Tensor.long to torch.int64 has no derivative"  # of a time that is a number of steps


def assert_served(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, info: str = ""
) -> None:
    """Value, tangent and gradients of both kinds; and the divergence by duals as well."""
    torch.manual_seed(0)
    net = make().to(F64).eval()
    x, v, w = (torch.randn(shape, dtype=F64).to(F32).to(F64) for _ in range(3))
    t = torch.rand(shape[0]).to(F64)
    own = Problem(net, (x, t), (v, 0.5), w)
    for through in (False, True):
        value, tangent, expected = own.exact(through)
        net, inputs, tangents = own.to(dtype)
        with rows.quiet():
            out = fewstep.jvp(net, inputs, tangents, through=through)
        assert (out.engine, out.info) == ("duals", info)
        assert_contract("gradient", out.value, value)
        assert_contract("gradient", out.tangent, tangent)
        assert out.tangent.requires_grad is through
        loss = (out.value * own.w).sum() + ((out.tangent * own.w).sum() if through else 0)
        leaves = [*inputs, *net.parameters()]
        found = filled(torch.autograd.grad(loss, leaves, allow_unused=True), leaves)
        assert_contract("gradient", flat(found), flat(expected))
    with rows.quiet():
        assert fewstep.divergence(net, inputs[0], inputs[1]).info == ""


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", [*ZOO, "ViT"])
def test_networks(name: str, dtype: torch.dtype) -> None:
    assert_served(*(ZOO | {"ViT": (ViT, IMAGE)})[name], dtype)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name: str) -> None:
    """In float32, in which all of them compute embeddings of times."""
    diffusers = pytest.importorskip("diffusers")
    make, shape = DIFFUSERS[name]
    whole = name.startswith(("UNet2DCondition", "DiT"))
    assert_served(partial(make, diffusers), shape, F32, WHOLE if whole else "")


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("p", [0.0, 1.0, 1.5, 2.0, 3.0, math.inf])
def test_distances_between_samples(p: float, through: bool) -> None:
    """torch has no second derivative of cdist, and the duals no rule where samples are mixed."""

    def network(x: Tensor) -> Tensor:
        return torch.cdist(x, x, p=p).tanh() + x.square().sum(1)

    x, v, w = torch.randn(3, 5, 3, dtype=F64)
    x = x.requires_grad_()
    steps = [network(x.detach() + h * v) for h in (1e-6, -1e-6)]
    for engine in (None, "func", "reverse"):
        out = fewstep.jvp(network, (x,), (v,), through=through, engine=engine)
        torch.testing.assert_close(out.tangent, (steps[0] - steps[1]) / 2e-6, rtol=1e-6, atol=1e-8)
        if through:
            (g,) = torch.autograd.grad((out.tangent[:, :3] * w).sum(), x)
            moved = [fewstep.jvp(network, (x.detach() + h * v,), (v,)) for h in (1e-6, -1e-6)]
            slope = ((moved[0].tangent - moved[1].tangent)[:, :3] * w).sum() / 2e-6
            torch.testing.assert_close((g * v).sum(), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("through", [False, True])
def test_a_function_without_a_second_derivative(through: bool) -> None:
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match=r"no engine serves this network: .*_pdist_backward"):
        fewstep.jvp(lambda x: torch.pdist(x, p=3), (x,), (x,), through=through)


def test_one_sample() -> None:
    for name in ("attention, sequence first", "DiT, guided", "encoder, batch first, norm last"):
        make, shape = ZOO[name]
        assert_served(make, (1, *shape[1:]), F64)


def test_several_tangents_where_the_batch_moves() -> None:
    make, shape = ZOO["attention, sequence first"]
    net, x = make().double(), torch.randn(shape, dtype=F64)
    several = torch.randn(3, *shape, dtype=F64)
    t = torch.rand(shape[0], dtype=F64)
    out: Any = fewstep.jvp(net, (x, t), (several, None))
    alone: list[Tensor] = [fewstep.jvp(net, (x, t), (v, None)).tangent for v in several]
    assert out.engine == "duals"
    assert_contract("gradient", out.tangent, torch.stack(alone))
