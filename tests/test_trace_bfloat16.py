"""`divergence` with tangents in bfloat16: error, bias, memory, compilation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fewstep
from fewstep.reference.probe import probes
from support.traces import F64, FIRST, NETS, case, jacobians, saved
from tolerances import TANGENTS, error

LOW = {"tangent_dtype": torch.bfloat16}


@pytest.fixture(params=["widened", "narrow"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a CPU multiplies tangents of bfloat16, and how a GPU does."""
    if request.param == "narrow":
        monkeypatch.setattr("fewstep.ops.dual.source.WIDENED", ())


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", [n for n in NETS if n != "unknown"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("estimator", ["exact", "hutchinson", "hutch++"])
def test_tangents_in_bfloat16(name: str, backend: str | None, estimator: str) -> None:
    net, x, t = case(name, torch.float32)
    options: dict[str, Any] = {"estimator": estimator, "probes": 3}
    found = []
    for low in (True, False):
        own = net if low else copy.deepcopy(net).double()
        y = x.to(torch.float32 if low else F64).requires_grad_()
        more: dict[str, Any] = {"backend": backend, **LOW} if low else {"backend": "reference"}
        out = fewstep.divergence(own, y, t.to(y.dtype), **options, **more)
        loss = out.value.sum() + out.velocity.square().sum()
        inputs = [y, *own.parameters()]
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(grads[0].square().sum(), y)[0]
        found.append((out, [*grads, second]))
    (out, grads), (exact, grads64) = found
    assert out.value.dtype == out.velocity.dtype == torch.float32
    assert out.estimator == exact.estimator
    plain = fewstep.divergence(net, x, t, **options, backend=backend).velocity
    torch.testing.assert_close(out.velocity, plain)
    with sdpa_kernel(SDPBackend.MATH):
        J = jacobians(copy.deepcopy(net).double(), x.detach().double(), t.double())
    scale = math.sqrt(x[0].numel()) * J.flatten(1).norm(dim=1)
    assert error("value", out.value, exact.value, scale) <= TANGENTS["value"]
    assert all(a is None or a.dtype == torch.float32 for a in grads)
    assert [a is None for a in grads] == [b is None for b in grads64]
    if estimator == "hutch++":  # which is continuous in J, but of rounded products of its own
        grads, grads64 = grads[:-1], grads64[:-1]
    first, right = (
        torch.cat([g.detach().flatten() for g in own if g is not None]) for own in (grads, grads64)
    )
    assert error("gradient", first, right) <= TANGENTS["gradient"]


def test_tangents_in_bfloat16_are_unbiased() -> None:
    net, x, t = case("residual", torch.float32)
    n = 20_000
    y, s = x[:1].expand(n, -1), t[:1].expand(n)
    exact = fewstep.divergence(net, x[:1], t[:1], estimator="exact").value.detach()
    for probe in ("rademacher", "gaussian"):
        with torch.no_grad():
            out = fewstep.divergence(net, y, s, estimator="hutchinson", probe=probe, **LOW)
        off = (out.value.double().mean() - exact).abs()
        assert off < 4 * out.value.std() / math.sqrt(n) + 2**-9 * exact.abs()


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", FIRST)
def test_tangents_in_bfloat16_take_half_for_backward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernels of attention keep less in float32, and so cannot halve it.
    monkeypatch.setattr("fewstep.ops.dual.attention.serves", lambda *_: False)
    make, shape = FIRST[name]
    net, x, t = make(), torch.randn(shape), torch.rand(4)
    weights = {p.shape for p in net.parameters()}

    def run(**options: Any) -> tuple[int, list[Tensor]]:
        seen = saved(
            lambda: (
                fewstep.divergence(net, x, t, estimator="hutchinson", probes=16, **options).value
            )
        )[1]
        seen = [z for z in seen if z.shape not in weights and z.shape[::-1] not in weights]
        return sum(z.untyped_storage().nbytes() for z in seen), seen

    whole, (half, seen) = run()[0], run(**LOW)
    assert half < 0.56 * whole + 512  # 16 tangents at half and the primal
    v = probes(torch.zeros(3, dtype=torch.int64), None, (16, 4, 48), "rademacher", torch.bfloat16)
    assert not any(z.shape[:1] == (64,) and torch.equal(z.flatten(), v.flatten()) for z in seen)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", ["three hidden layers", "residual", "convolutions"])
def test_tangents_in_bfloat16_compile_and_checkpoint(name: str) -> None:
    net, x, t = case(name, torch.float32)
    parameters = [p for p in net.parameters() if p.requires_grad]

    def loss(x: Tensor) -> Tensor:
        out = fewstep.divergence(net, x, t, estimator="hutchinson", probes=2, **LOW)
        return (out.value * out.velocity.flatten(1).sum(1)).sum()

    def grads(value: Tensor) -> tuple[Tensor | None, ...]:
        return value.detach(), *torch.autograd.grad(value, parameters, allow_unused=True)

    expected = grads(loss(x))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    ways = (compiled(x), checkpoint(loss, x, use_reentrant=False))
    for way in ways:
        assert isinstance(way, Tensor)
        for a, b in zip(grads(way), expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None and b.norm() > 1e-6:
                assert error("gradient", a, b) <= TANGENTS["gradient"]

    def value(xi: Tensor) -> Tensor:
        return fewstep.divergence(net, xi[None], t[:1], estimator="exact", **LOW).value[0]

    gradient = torch.func.vmap(torch.func.grad(value))(x.detach()[:2])
    out = fewstep.divergence(net, x[:2], t[:1].expand(2), estimator="exact").value.sum()
    right = torch.autograd.grad(out, x)[0][:2]
    assert error("gradient", gradient, right) <= TANGENTS["gradient"]
