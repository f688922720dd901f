"""What `jvp` takes and refuses, its other signature, and targets made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep
import fewstep.func
from support.jvp import (
    F64,
    flat,
    net_of,
    problem,
    rows,
)
from tolerances import assert_contract

ENGINES = ("duals", "func", "reverse")
# Of torch.func.jvp, when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


def test_tangents_of_a_context_by_position_and_plain_ones_by_name() -> None:
    net, x, c, w = net_of(4, 8), rows(5, 4), rows(5, 3, 4), rows(5, 4)

    def network(x: Tensor, c: Tensor, label: int, *, weight: Tensor) -> Tensor:
        h = F.scaled_dot_product_attention(net(x)[:, None], c, c)[:, 0]
        return h * weight * label

    out = fewstep.jvp(network, (x, c, 2), (w, c.sin(), None), kwargs={"weight": w})
    assert (out.engine, out.info) == ("duals", "")
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(lambda x, c: network(x, c, 2, weight=w), (x, c), (w, c.sin()))[1]
    assert_contract("gradient", out.tangent, exact.detach())
    only = fewstep.jvp(network, (x, c, 2), (None, c.sin(), None), kwargs={"weight": w})
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(lambda c: network(x, c, 2, weight=w), (c,), (c.sin(),))[1]
    assert_contract("gradient", only.tangent, exact.detach())


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_are_not_changed(engine: str) -> None:
    x, t, v = rows(5, 4), torch.rand(5, dtype=F64), rows(5, 4)
    before = x.clone(), t.clone()

    def network(x: Tensor, t: Tensor) -> Tensor:
        t *= 1000
        x.mul_(2)
        return (x * t[:, None]).sin()

    out = fewstep.jvp(network, (x, t), (v, None), engine=engine)
    assert torch.equal(x, before[0])
    assert torch.equal(t, before[1])
    angle = 2000 * x * t[:, None]
    assert_contract("gradient", out.tangent, angle.cos() * 2000 * t[:, None] * v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_few_bits(dtype: torch.dtype) -> None:
    net, x, v = net_of(4, 8, norm=nn.LayerNorm), rows(5, 4), rows(5, 4)
    exact = torch.func.jvp(net, (x,), (v,))[1].detach()
    net = net.to(dtype)
    for through in (False, True):
        out = fewstep.jvp(lambda x: net(x.to(dtype)), (x.float(),), (v.float(),), through=through)
        assert (out.engine, out.tangent.dtype) == ("duals", dtype)
        assert (out.tangent.double() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("through", [False, True])
def test_autocast(through: bool) -> None:
    """The value and the gradients are those of a plain call."""
    net, x, v = net_of(4, 8, norm=nn.LayerNorm), rows(5, 4), rows(5, 4)
    exact = torch.func.jvp(net, (x,), (v,))[1].detach()
    net, x, v = net.float(), x.float(), v.float()
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = fewstep.jvp(net, (x,), (v,), through=through), net(x)
    assert (out.engine, out.info) == ("duals", "")
    assert (out.tangent.double() - exact).norm() < 0.05 * exact.norm()
    pair = [
        flat(list(torch.autograd.grad(value.float().square().sum(), list(net.parameters()))))
        for value in (out.value, plain)
    ]
    assert (pair[0] - pair[1]).norm() < 0.05 * pair[1].norm()


def test_empty_batches_and_tangents_of_a_network() -> None:
    net, inputs, tangents = problem("mlp").to(F64)
    none = tuple(z[:0].detach() for z in inputs)
    assert fewstep.jvp(net, none, (none[0], 1.0, None)).tangent.shape == (0, 4)
    v = tangents[0].clone().requires_grad_()
    assert not fewstep.jvp(net, inputs, (v, 1.0, None)).tangent.requires_grad
    out = fewstep.jvp(net, inputs, (v, 1.0, None), through=True)
    (found,) = torch.autograd.grad(out.tangent.sum(), v)
    (row,) = torch.autograd.grad(net(*inputs).sum(), inputs[0])
    assert_contract("gradient", found, row)


X, T = torch.zeros(6, 4), torch.zeros(6)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "count": (((X, T), (X,)), {}, "tangents must be 2, one for each input, got 1"),
    "shape": (((X, T), (X[:3], None)), {}, r"tangents\[0\] must be \(6, 4\).*got \(3, 4\)"),
    "dtype": (((X,), (X.double(),)), {}, r"tangents\[0\] must be torch.float32"),
    "integers": (((X, T.long()), (X, 1)), {}, r"inputs\[1\] is no floating tensor, got torch.int"),
    "number": (((X, 0.5), (X, 1.0)), {}, r"inputs\[1\] is no floating tensor, got float"),
    "no tangents": (((X, T), (None, None)), {}, "got None for each"),
    "K = 0": (((X,), (X.expand(0, 6, 4),)), {}, r"one at least, got \(0, 6, 4\)"),
    "axes": (((X, T), (X.expand(2, 6, 4), T)), {}, "the same axis K"),
    "counts": (((X, T), (X.expand(2, 6, 4), T.expand(3, 6))), {}, "the same axis K"),
    "engine": (((X,), (X,)), {"engine": "fast"}, "engine must be one of"),
    "check": (((X,), (X,)), {"check": "once"}, "check must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    given, options, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        fewstep.jvp(lambda *own: own[0], *given, **options)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="inputs must be a tuple, got Tensor"):
        fewstep.jvp(torch.sin, X, (X,))
    with pytest.raises(TypeError, match=r"tangents\[0\] must be a tensor, a number or None"):
        fewstep.jvp(torch.sin, (X,), ("x",))


@pytest.mark.parametrize(
    "network",
    [
        lambda x: x.long(),
        lambda x: None,
        lambda x: x.detach() * 2,
        lambda x: torch.no_grad()(torch.sin)(x + 1),
        lambda x: torch.from_numpy(x.detach().numpy() + 1),
        lambda x: object(),
    ],
)
@pytest.mark.filterwarnings("ignore:jvp")
def test_networks_without_a_derivative(network: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match="network must"):
        fewstep.jvp(network, (rows(6, 4),), (rows(6, 4),))


def test_a_network_that_does_not_see_an_input() -> None:
    x, t = rows(6, 4), torch.rand(6, dtype=F64)
    for engine in ENGINES:
        out = fewstep.jvp(lambda x, t: x.sin(), (x, t), (None, 1.0), engine=engine)
        assert torch.equal(out.tangent, torch.zeros_like(x))


def test_with_the_signature_of_torch_func() -> None:
    net, inputs, _ = problem("mlp").to(F64)
    ones = tuple(map(torch.ones_like, inputs))
    value, tangent = fewstep.func.jvp(net, inputs, ones)
    expected = torch.func.jvp(net, inputs, ones)
    assert_contract("gradient", value, expected[0].detach())
    assert_contract("gradient", tangent, expected[1].detach())
    assert tangent.requires_grad

    def pair(*own: Tensor) -> tuple[Tensor, dict[str, Any]]:
        out = net(*own)
        return out, {"twice": 2 * out, "name": "aux"}

    value, tangent, aux = fewstep.func.jvp(pair, inputs, ones, has_aux=True)
    assert_contract("gradient", tangent, expected[1].detach())
    assert_contract("gradient", aux["twice"], 2 * value.detach())
    assert aux["name"] == "aux"
    with pytest.raises(RuntimeError):
        fewstep.func.jvp(lambda x: torch.ones(2), (inputs[0],), (ones[0],), strict=True)
    with pytest.raises(ValueError, match="must return a pair"):
        fewstep.func.jvp(net, inputs, ones, has_aux=True)


def test_the_average_velocity_is_its_own_target() -> None:
    """For Gaussian data the flow map is known, and with it the average velocity."""
    mean, deviation = 0.7, 0.6

    def sigma(t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * deviation**2 + t**2).sqrt()

    def average(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t, r = t[:, None], r[:, None]
        moved = (1 - r) * mean + sigma(r) / sigma(t) * (x - (1 - t) * mean)
        return (x - moved) / (t - r)

    t = torch.rand(8, dtype=F64) * 0.5 + 0.5
    r, x = t * 0.4, rows(8, 3)
    up = t[:, None]
    v = -mean + (up - (1 - up) * deviation**2) / sigma(up) ** 2 * (x - (1 - up) * mean)
    out = fewstep.meanflow_target(average, x, t, r, v)
    assert (out.engine, out.info) == ("duals", "")
    assert_contract("gradient", out.target, out.value)
    same = fewstep.meanflow_target(lambda x, t, r: x.sin(), x, t, t, v)
    assert torch.equal(same.target, v)
    for given, text in (
        ((x, t[:3], r, v), r"t must be a scalar or \(8,\), got \(3,\)"),
        ((x, t, r, v[:3]), r"v must be \(8, 3\)"),
    ):
        with pytest.raises(ValueError, match=text):
            fewstep.meanflow_target(average, *given)
    with pytest.raises(ValueError, match="network must return"):
        fewstep.meanflow_target(lambda x, t, r: x[:, 0], x, t, r, v)


def test_a_consistency_function_is_its_own_target() -> None:
    """For Gaussian data the consistency function is known; for others g is `cos(t) df/dt`."""
    s, own = 0.5, 0.8

    def sigma(t: Tensor) -> Tensor:
        return ((t.cos() * own) ** 2 + (t.sin() * s) ** 2).sqrt()

    def network(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        return (t.cos() - own / sigma(t)) * x / t.sin()

    t, x = torch.rand(8, dtype=F64) + 0.2, rows(8, 3)
    up = t[:, None]
    v = (s**2 - own**2) * up.sin() * up.cos() / sigma(up) ** 2 * x
    out = fewstep.scm_target(network, x, t, v)
    assert out.engine == "duals"
    assert_contract("gradient", out.target, out.value)

    net = net_of(3, 8)

    def other(x: Tensor, t: Tensor) -> Tensor:
        return net(x * t[:, None])  # type: ignore[no-any-return]

    def consistency(x: Tensor, t: Tensor) -> Tensor:
        return t.cos()[:, None] * x - t.sin()[:, None] * s * other(x / s, t)

    found = fewstep.scm_target(other, x, t, v, c=0.3)
    g = up.cos() * torch.func.jvp(consistency, (x, t), (v, torch.ones_like(t)))[1]
    exact = other(x / s, t) + g / (g.norm(dim=1, keepdim=True) + 0.3)
    assert_contract("gradient", found.target, exact.detach())
    none = fewstep.scm_target(other, x, t, v, c=0.3, warmup=0.0)
    g = -(up.cos() ** 2) * (s * none.value - v)
    exact = none.value + g / (g.norm(dim=1, keepdim=True) + 0.3)
    assert_contract("gradient", none.target, exact.detach())
    for options, text in (
        ({"data_std": 0.0}, "data_std"),
        ({"warmup": 2.0}, "warmup"),
        ({"c": 0.0}, "c "),
    ):
        with pytest.raises(ValueError, match=text):
            fewstep.scm_target(other, x, t, v, **options)
