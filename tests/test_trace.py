"""`divergence`: against whole Jacobians in float64, which networks it serves, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep
from fewstep.reference import trace as reference
from fewstep.reference.probe import probes
from support.traces import F64, NETS, case, jacobians
from support.velocity_nets import TimeMLP
from tolerances import assert_contract


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("way", ["exact", "hutchinson", "hadamard", "auto"])
def test_value_and_gradients(name: str, backend: str | None, way: str) -> None:
    net, x, t = case(name)
    if name == "unknown" and backend is not None:
        pytest.skip("a named backend refuses it")
    x.requires_grad_()
    d = x[0].numel()
    options: dict[str, Any] = {
        "exact": {"estimator": "exact"},
        "hutchinson": {"estimator": "hutchinson", "probes": 3},
        "hadamard": {"estimator": "hutchinson", "probes": d, "probe": "hadamard"},
        "auto": {"probes": d},
    }[way]
    w, wv = torch.randn(x.shape[0], dtype=F64), torch.randn_like(x)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        J = jacobians(net, x, t)
        exact = J.diagonal(dim1=1, dim2=2).sum(1)
        if way == "hutchinson":
            v = probes(torch.zeros(3, dtype=torch.int64), None, (3, *x.shape), "rademacher", F64)
            exact = torch.einsum("kbi,bij,kbj->kb", v.flatten(2), J, v.flatten(2)).mean(0)
        velocity = net(x, t)
        inputs = [x, *net.parameters()]
        expected = torch.autograd.grad(
            (w * exact).sum() + (wv * velocity).sum(), inputs, allow_unused=True
        )
        out = fewstep.divergence(net, x, t, backend=backend, **options)
        found = torch.autograd.grad(
            (w * out.value).sum() + (wv * out.velocity).sum(), inputs, allow_unused=True
        )
        with torch.no_grad():
            plain = fewstep.divergence(net, x, t, backend=backend, **options)
    assert bool(out.info) == (name == "unknown" and "structural" not in out.estimator)
    torch.testing.assert_close(out.velocity, velocity, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.value, exact, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(plain.value, exact, rtol=1e-11, atol=1e-11)
    for actual, want in zip(found, expected, strict=True):
        assert (actual is None) == (want is None)
        if actual is not None:
            torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-10)
    if way != "hutchinson":
        assert out.estimator.startswith("exact")
        assert torch.equal(out.stderr, torch.zeros(x.shape[0], dtype=F64))


@pytest.mark.parametrize("name", NETS)
def test_float32_keeps_the_contract(name: str, capability: str) -> None:
    net, x, t = case(name, torch.float32)
    out = fewstep.divergence(net, x, t, estimator="exact")
    net64 = net.to(F64)
    with sdpa_kernel(SDPBackend.MATH):
        exact = jacobians(net64, x.double(), t.double()).diagonal(dim1=1, dim2=2).sum(1)
    assert_contract("value", out.value, exact.detach())


def test_which_networks_are_structural() -> None:
    for name, structural in (
        ("two hidden layers", True),
        ("one hidden layer", True),
        ("film", True),
        ("three hidden layers", False),
        ("residual", False),
        ("convolutions", False),
    ):
        net, x, t = case(name)
        used = fewstep.divergence(net, x, t, estimator="exact").estimator
        assert (used == "exact (structural)") == structural, name


def test_sequential_and_linear_are_structural() -> None:
    x = torch.randn(3, 2, 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Unflatten(1, (2, 2)))
    out = fewstep.divergence(net, x, 0.0, estimator="exact")
    torch.testing.assert_close(out.value, net[1].weight.trace().expand(3))


def test_second_derivatives() -> None:
    net, x, t = case("two hidden layers")
    x.requires_grad_()

    def value(x: Tensor, estimator: str) -> Tensor:
        return fewstep.divergence(net, x, t, estimator=estimator, probes=2).value

    for estimator in ("exact", "hutchinson"):
        assert torch.autograd.gradcheck(lambda x, e=estimator: value(x, e), x)
        assert torch.autograd.gradgradcheck(lambda x, e=estimator: value(x, e), x)


def test_unknown_functions_fall_back_and_say_so() -> None:
    net, x, t = case("unknown")
    for estimator, probes_ in (("exact", 1), ("hutchinson", 2), ("hutch++", 6), ("xtrace", 4)):
        out = fewstep.divergence(net, x, t, estimator=estimator, probes=probes_)
        assert out.info == "torch.func: no rule for cumsum"
    for backend in ("cpp", "reference"):
        with pytest.raises(ValueError, match="cannot serve this velocity: no rule for cumsum"):
            fewstep.divergence(net, x, t, estimator="exact", backend=backend)


def test_a_function_that_mixes_samples_is_refused() -> None:
    x, t = torch.randn(4, 3), torch.rand(4)
    for velocity in (
        lambda x, t: x - x.mean(0, keepdim=True),
        lambda x, t: x[torch.tensor([1, 0, 2, 3])],
        lambda x, t: torch.cat([x[:, :1], x[:, 1:]], 0),
        lambda x, t: x if x.sum(1) else -x,
    ):
        refusals = r"no rule|mixes samples|Sizes of tensors|is ambiguous"  # the last two: eager's
        with pytest.raises((ValueError, RuntimeError), match=refusals):
            fewstep.divergence(velocity, x, t, estimator="hutchinson", backend="cpp")


def test_values_shared_by_two_branches() -> None:
    """A pending bias is added once for each that reads it, whatever the order."""
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        h = a(x)
        u = h + t[:, None]
        return h * h + F.silu(u) + b(F.silu(h)) + u - torch.tanh(h) + h

    x, t = torch.randn(4, 3, dtype=F64), torch.rand(4, dtype=F64)
    exact = jacobians(velocity, x, t).diagonal(dim1=1, dim2=2).sum(1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = fewstep.divergence(velocity, x, t, estimator="exact", backend="cpp")
        torch.testing.assert_close(out.value, exact)
        torch.testing.assert_close(out.velocity, velocity(x, t))


def test_strided_expanded_empty() -> None:
    net = TimeMLP(4, 8, 2).double()
    x = torch.randn(4, 6, dtype=F64).T[:, :4]
    t = torch.rand(1, dtype=F64).expand(6)
    for estimator in ("exact", "hutchinson"):
        out = fewstep.divergence(net, x, t, estimator=estimator)
        same = fewstep.divergence(net, x.contiguous(), t.contiguous(), estimator=estimator)
        torch.testing.assert_close(out.value, same.value)
        empty = fewstep.divergence(net, x[:0], t[:0], estimator=estimator)
        assert empty.value.shape == (0,)
        assert empty.velocity.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"estimator": "magic"}, ValueError, "estimator must be one of"),
        ({"probe": "uniform"}, ValueError, "probe must be one of"),
        ({"probes": 0}, ValueError, "probes must be an integer from 1"),
        ({"probes": 6, "probe": "hadamard"}, ValueError, "probes must be at most D = 5"),
        (
            {"estimator": "xtrace", "probes": 4, "probe": "hadamard"},
            ValueError,
            "another than 'hadamard' for 'xtrace'",
        ),
        ({"estimator": "hutch++", "probes": 2}, ValueError, "at least 3 for 'hutch"),
        ({"estimator": "xtrace", "probes": 5}, ValueError, "must be even"),
        ({"t": math.nan}, ValueError, "t must be finite"),
        ({"t": torch.full((4,), math.inf, dtype=F64)}, ValueError, "t must be finite"),
        ({"t": torch.zeros(3)}, ValueError, "t must be a scalar or"),
        ({"x": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "x must have a floating dtype"),
        ({"x": torch.zeros(4)}, ValueError, "x must be"),
        ({"sample_ids": torch.zeros(4)}, TypeError, "sample_ids must be int64"),
        ({"sample_ids": torch.arange(3)}, ValueError, "sample_ids must be"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"seed": torch.zeros(())}, TypeError, "seed must be an int64 scalar"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot serve"),
        ({"tangent_dtype": torch.bfloat16}, ValueError, "tangent_dtype must be .* torch.float64"),
        ({"tangent_dtype": torch.float16}, ValueError, "tangent_dtype must be .* torch.float16"),
        ({"velocity": lambda x, t: x[:, :2]}, ValueError, "velocity must return"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    net, x, t = case("two hidden layers")
    arguments: dict[str, Any] = {"velocity": net, "x": x, "t": t} | change
    with pytest.raises(error, match=message):
        fewstep.divergence(
            arguments.pop("velocity"), arguments.pop("x"), arguments.pop("t"), **arguments
        )


def test_reference_is_differentiable_twice() -> None:
    net, x, t = case("one hidden layer")
    x.requires_grad_()

    def value(x: Tensor) -> Tensor:
        basis = torch.eye(x[0].numel(), dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
        rows = reference.transposed_products(net, x, t, basis.expand(-1, *x.shape))[1]
        return rows.flatten(2).diagonal(dim1=0, dim2=2).sum(1)

    assert torch.autograd.gradcheck(value, x)
    assert torch.autograd.gradgradcheck(value, x)


@pytest.mark.parametrize(
    "divisor", [torch.tensor([3]), torch.tensor(3), torch.tensor([0.1])], ids=str
)
def test_division_is_not_rounded_to_the_dtype_of_the_divisor(divisor: Tensor) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    out = fewstep.divergence(lambda x, t: x * x / divisor, x, 0.0, estimator="exact")
    assert torch.allclose(out.velocity, x * x / divisor, rtol=1e-15, atol=0)
    assert torch.allclose(out.value, (2 * x / divisor.double()).sum(1), rtol=1e-14, atol=0)
