"""Velocities that are easily got wrong, each as small as it can be, with its right numbers."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fewstep.toys import GaussianMixture
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fewstep
from fewstep.methods import MarginalReflow
from support.rows import rows
from tolerances import CONTRACT, CONTRACT64, TANGENTS, assert_contract

Velocity = Callable[[Tensor, Any], Tensor]
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


def traced(velocity: Velocity, x: Tensor, t: Any = 0.0, **options: Any) -> Any:
    return fewstep.divergence(velocity, x, t, estimator="exact", **options)


def trace(velocity: Velocity, x: Tensor, t: Any = 0.0) -> Tensor:
    """By plain autograd in float64."""
    x = x.detach().double().requires_grad_()
    _, jacobian = rows(lambda a: velocity(a, t), x)
    return jacobian.detach().diagonal(dim1=1, dim2=2).sum(1)


def assert_right(
    velocity: Velocity, x: Tensor, t: Any = 0.0, expected: Tensor | None = None
) -> Any:
    """Velocity as eager's, the exact trace, and all Hadamard probes."""
    expected = trace(velocity, x, t) if expected is None else expected
    v = velocity(x.clone(), t)
    scale = expected.abs().max().clamp_min(float(v.detach().abs().max()))
    d = x.shape[1:].numel()
    for options in ({"estimator": "exact"}, {"probes": d, "probe": "hadamard"}):
        out = fewstep.divergence(velocity, x, t, **options)
        assert out.velocity.dtype == v.dtype
        low = x.dtype == torch.float32 or v.dtype == torch.float32
        bound = CONTRACT["value"] if low else CONTRACT64["value"]
        assert float((out.velocity - v).detach().abs().max()) <= bound * float(
            v.detach().abs().max()
        )
        assert float((out.value - expected).detach().abs().max()) <= bound * float(scale)
    return out


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
        out = traced(velocity, x, t)
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


def test_branches_on_t_and_the_batch() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        h = 2 * x
        if float(t.flatten()[0]) > 0.5 or len(x) > 4:
            return F.relu(h, inplace=True) + h
        return h.tanh()

    for x, t in ((torch.randn(3, 4), 0.0), (torch.randn(3, 4), 1.0), (torch.randn(6, 4), 0.0)):
        own = torch.full((len(x),), t)
        out = traced(velocity, x, t)
        torch.testing.assert_close(out.velocity, velocity(x, own))
        torch.testing.assert_close(out.value.double(), trace(out_of_place, x, own))


def out_of_place(x: Tensor, t: Tensor) -> Tensor:
    return 2 * F.relu(2 * x) if float(t[0]) > 0.5 or len(x) > 4 else (2 * x).tanh()


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


class Swish(torch.autograd.Function):
    """Saves its input."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a * torch.sigmoid(a)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        s = torch.sigmoid(a)
        return g * (s * (1 + a * (1 - s)))


class SetupSwish(torch.autograd.Function):
    """With `setup_context`."""

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a * torch.sigmoid(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    backward = Swish.backward


class Double(torch.autograd.Function):
    """Saves nothing, and is differentiated otherwise than it is computed."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return 2 * a

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g


class Rounded(torch.autograd.Function):
    """Straight-through, with a function that has no rule."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return (a * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def reentrant(h: Tensor) -> Tensor:
    return checkpoint(F.silu, h, use_reentrant=True)  # type: ignore[no-any-return]


def anew(h: Tensor) -> Tensor:
    return checkpoint(F.silu, h, use_reentrant=False)  # type: ignore[no-any-return]


# Of an activation and the one that plain autograd can differentiate twice.
HIDDEN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "Function": (Swish.apply, F.silu),
    "Function with setup_context": (SetupSwish.apply, F.silu),
    "Function without saved tensors": (Double.apply, Double.apply),
    "straight-through Function": (Rounded.apply, Rounded.apply),
    "checkpoint": (anew, F.silu),
    "reentrant checkpoint": (reentrant, F.silu),
}


class Hidden(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.activation = nn.Linear(4, 8), nn.Linear(8, 4), activation

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(self.activation(self.a(x)))  # type: ignore[no-any-return]


def hidden(name: str, which: int) -> Hidden:
    torch.manual_seed(0)
    return Hidden(HIDDEN[name][which]).double()


@contextmanager
def served(name: str) -> Iterator[None]:
    """Right, or refused as plain autograd refuses it: a reentrant checkpoint, by its name."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if name != "reentrant checkpoint" or "use_reentrant" not in str(error):
            raise


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_parameters_before_a_function_or_checkpoint(name: str, estimator: str) -> None:
    """Their gradient is not lost: of a divergence, a log-density and a loss."""
    net, x = hidden(name, 0), torch.randn(6, 4, dtype=torch.float64)
    options: dict[str, Any] = {"estimator": estimator}
    if estimator == "hutchinson":
        options |= {"probes": 4, "probe": "hadamard"}
    plain = hidden(name, 1)
    v, jacobian = rows(lambda a: plain(a, 0), x.clone().requires_grad_())
    (jacobian.diagonal(dim1=1, dim2=2).sum() + v.square().sum()).backward()
    with served(name):
        out = fewstep.divergence(net, x, 0.0, **options)
        (out.value.sum() + out.velocity.square().sum()).backward()
        assert_contract("value", out.velocity, v.detach())
        assert_same(net, plain)


@pytest.mark.parametrize("name", HIDDEN)
def test_density_behind_a_function_or_checkpoint(name: str) -> None:
    net, plain, x = hidden(name, 0), hidden(name, 1), torch.randn(6, 4, dtype=torch.float64)
    y, change = x.clone().requires_grad_(), torch.zeros(6, dtype=x.dtype)
    for _ in range(2):
        v, jacobian = rows(lambda a: plain(a, 0), y)
        y, change = y + 0.5 * v, change + 0.5 * jacobian.diagonal(dim1=1, dim2=2).sum(1)
    want = change - 0.5 * y.square().sum(1) - 2 * math.log(2 * math.pi)
    want.sum().backward()
    with served(name):
        out = fewstep.log_density(net, x, times=[0, 0.5, 1.0], method="euler", estimator="exact")
        out.log_prob.sum().backward()
        assert_contract("value", out.log_prob, want.detach())
        assert_same(net, plain)


@pytest.mark.parametrize("name", HIDDEN)
def test_loss_behind_a_function_or_checkpoint(name: str) -> None:
    """Against the same network written with plain functions, or with its derivative by autograd."""
    teacher = GaussianMixture(torch.zeros(1, 4), torch.ones(1, 4))
    nets = [hidden(name, which).float() for which in (0, 1)]
    with served(name):
        for net in nets:
            torch.manual_seed(1)
            MarginalReflow()(net, teacher, torch.randn(64, 4))[0].backward()
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
            assert float(p.grad.norm()) > 0


def assert_same(net: nn.Module, plain: nn.Module) -> None:
    """Gradients of parameters."""
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert_contract("gradient", p.grad, q.grad)


def zeroed(h: Tensor) -> Tensor:
    h[:, 0] = 0
    return h


def grown(h: Tensor) -> Tensor:
    h[:, 1:] += 0.5
    return h


OPERATORS: dict[str, Velocity] = {
    "x**2": lambda x, t: x**2,
    "x**2.5": lambda x, t: (x * x) ** 2.5,
    "2**x": lambda x, t: 2**x,
    "x**x": lambda x, t: (1 + x * x) ** x,
    "pow": lambda x, t: torch.pow(2.0, x) + torch.pow(x, 3),
    "1/(1+x*x)": lambda x, t: 1 / (1 + x * x),
    "x/x": lambda x, t: x.sin() / (2 + x.cos()),
    "x*(x>0)": lambda x, t: x * (x > 0),
    "x*(x<=0)": lambda x, t: (x <= 0) * x,
    "abs(x)": lambda x, t: abs(x),
    "x%1": lambda x, t: x % 1.0,
    "x//1": lambda x, t: x - x.detach() // 1.0,
    "+x": lambda x, t: +x * 2,
    "~mask": lambda x, t: x * ~(x > 0),
    "x==0": lambda x, t: torch.where(x == 0, x, 2 * x),
    "x!=0": lambda x, t: torch.where(x != 0, x, 2 * x),
    "(x!=x).any()": lambda x, t: x if not (x != x).any() else -x,
    "x in a branch": lambda x, t: x.sin() if x.abs().max() < 100 else x,
    "h[:,0]=0": lambda x, t: zeroed(x * 1),
    "h[:,1:]+=": lambda x, t: grown(x * 1),
    "sum(axis=)": lambda x, t: x * x.sum(axis=1, keepdim=True),  # type: ignore[call-overload]
    "sum(dtype=)": lambda x, t: x * x.sum(1, True, dtype=x.dtype),
    "mean(keepdims=)": lambda x, t: x - x.mean(1, keepdims=True),  # type: ignore[call-overload]
    "squeeze()": lambda x, t: x[:, None].squeeze() * 2,
    "reshape(shape=)": lambda x, t: x.reshape(shape=(3, 2, 2)).flatten(1) * 2,  # type: ignore[call-overload]
    "reshape(input, shape=)": lambda x, t: torch.reshape(input=x, shape=(3, 2, 2)).flatten(1) * 2,
    "view(size=)": lambda x, t: x.view(size=(3, 4)) * 1,  # type: ignore[call-overload]
    "permute(dims=)": lambda x, t: torch.permute(x.view(3, 2, 2), dims=(0, 2, 1)).flatten(1),
    "split(split_size=)": lambda x, t: torch.cat(x.split(split_size=2, dim=1)[::-1], 1),
    "to(memory_format=)": lambda x, t: (
        x.view(3, 1, 2, 2).to(memory_format=torch.channels_last).flatten(1) * 3
    ),
    "input=": lambda x, t: F.silu(input=torch.tanh(input=x)),
    "add(other=)": lambda x, t: torch.add(input=x, other=x, alpha=2),
    "vmap": lambda x, t: torch.vmap(lambda a: a * a.sum())(x),
    "vjp": lambda x, t: torch.func.vjp(torch.sin, x)[1](x)[0],
    "list comprehension": lambda x, t: torch.stack([row * row.sum() for row in x]),
    "numpy number": lambda x, t: x * np.float64(0.5),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_and_keywords(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4).to(dtype)
    out = assert_right(OPERATORS[name], x)
    assert out.velocity.shape == x.shape


@pytest.mark.parametrize("name", ["x**2", "1/(1+x*x)", "x*(x>0)", "abs(x)", "h[:,0]=0", "x==0"])
def test_operators_in_solvers(name: str) -> None:
    velocity = OPERATORS[name]
    x, times = 0.3 * torch.randn(3, 4, dtype=torch.float64), [0.0, 0.5, 1.0]
    out = fewstep.log_density(velocity, x, times=times, method="euler", estimator="exact")
    y, change = x, torch.zeros(3, dtype=x.dtype)
    for _ in range(2):
        y, change = y + 0.5 * velocity(y, 0), change + 0.5 * trace(velocity, y)
    want = change - 0.5 * y.square().sum(1) - 2 * math.log(2 * math.pi)
    torch.testing.assert_close(out.log_prob, want)
    start = torch.zeros(3, dtype=x.dtype)
    solved = fewstep.heun_solve(velocity, x, times, log_density=start)
    torch.testing.assert_close(solved.x, fewstep.heun_solve(velocity, x, times).x)
    denoised = fewstep.edm_sample(lambda x, s: velocity(x, s) * 0.1, x, steps=2, log_density=start)
    assert denoised.log_density.isfinite().all()
    net = nn.Linear(4, 4)
    teacher = GaussianMixture(torch.zeros(1, 4), torch.ones(1, 4))
    MarginalReflow()(lambda x, t: velocity(net(x), t)[: len(x)], teacher, x.float())[0].backward()
    assert net.weight.grad is not None
    assert net.weight.grad.isfinite().all()


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


def on_a_skip(change: Callable[[Tensor], Tensor]) -> Velocity:
    def velocity(x: Tensor, t: Any) -> Tensor:
        h = 2 * x
        return change(h) + h

    return velocity


def by_a_view(x: Tensor, t: Any) -> Tensor:
    h = 2 * x
    part = h[:, :2]
    part.mul_(3)
    return h * 1


def by_an_operator(x: Tensor, t: Any) -> Tensor:
    h = 2 * x
    own = h
    own += x.sin()
    return h * 1


def of_the_input(x: Tensor, t: Any) -> Tensor:
    h = x
    h *= 2
    return x + h


def of_what_was_detached(x: Tensor, t: Any) -> Tensor:
    h = 2 * x
    own = h.detach()
    h += 1
    return own * x


def by_what_was_detached(x: Tensor, t: Any) -> Tensor:
    h = 2 * x
    h.detach().add_(1)
    return h * x


CHANGES: dict[str, tuple[Velocity, Velocity]] = {
    "relu": (on_a_skip(lambda h: F.relu(h, inplace=True)), lambda x, t: 2 * F.relu(2 * x)),
    "ReLU": (on_a_skip(nn.ReLU(inplace=True)), lambda x, t: 2 * F.relu(2 * x)),
    "relu_": (on_a_skip(lambda h: h.relu_()), lambda x, t: 2 * F.relu(2 * x)),
    "silu": (on_a_skip(lambda h: F.silu(h, inplace=True)), lambda x, t: 2 * F.silu(2 * x)),
    "elu": (on_a_skip(lambda h: F.elu(h, inplace=True)), lambda x, t: 2 * F.elu(2 * x)),
    "tanh_": (on_a_skip(torch.Tensor.tanh_), lambda x, t: 2 * torch.tanh(2 * x)),
    "add_": (on_a_skip(lambda h: h.add_(1)), lambda x, t: 4 * x + 2),
    "a view": (by_a_view, lambda x, t: torch.cat([6 * x[:, :2], 2 * x[:, 2:]], 1)),
    "an operator": (by_an_operator, lambda x, t: 2 * x + x.sin()),
    "the input": (of_the_input, lambda x, t: 4 * x),
    "what was detached": (of_what_was_detached, lambda x, t: (2 * x.detach() + 1) * x),
    "by what was detached": (by_what_was_detached, lambda x, t: (2 * x + 1) * x),
}


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place(name: str, grad: bool, check: str) -> None:
    """The network that is measured is the one that samples; the caller's x stays."""
    velocity, plain = CHANGES[name]
    x = torch.randn(3, 4)
    own = x.clone()
    with torch.set_grad_enabled(grad):
        for options in ({"estimator": "exact"}, {"probes": 4, "probe": "hadamard"}):
            out = fewstep.divergence(velocity, x, 0.0, check=check, **options)
            assert torch.equal(x, own)
            torch.testing.assert_close(out.velocity, plain(x, 0))
            torch.testing.assert_close(out.value.double(), trace(plain, x), rtol=1e-5, atol=1e-5)


def checked(x: Tensor, t: Any) -> Tensor:
    assert isinstance(x, Tensor)
    assert isinstance(3 * x, Tensor)
    return 3 * x


BRANCHES: dict[str, Velocity] = {
    "is_tensor": lambda x, t: 3 * x if torch.is_tensor(x) else 5 * x,
    "isinstance": lambda x, t: 3 * x if isinstance(x, Tensor) else 5 * x,
    "type": lambda x, t: 3 * x if type(x) is Tensor else 5 * x,
    "hasattr": lambda x, t: 3 * x if hasattr(x, "data_ptr") else 5 * x,
    "is_floating_point": lambda x, t: 3 * x if torch.is_floating_point(x) else 5 * x,
    "requires": checked,
    "later": lambda x, t: 3 * x if isinstance(x.sin(), Tensor) else 5 * x,
}


@pytest.mark.filterwarnings("ignore:divergence.*disagree")
@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_branches_on_the_type(name: str, estimator: str) -> None:
    out = fewstep.divergence(BRANCHES[name], torch.ones(1, 2), 0.0, estimator=estimator)
    assert out.velocity.tolist() == [[3, 3]]
    assert out.value.item() == 6


@pytest.mark.filterwarnings("ignore:divergence.*disagree")
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_cdist(p: float) -> None:
    """torch's own batching rule of its derivative is wrong."""
    x = torch.randn(2, 4, 3, dtype=torch.float64)

    def velocity(x: Tensor, t: Any) -> Tensor:
        d = x[:, :, None] - x[:, None]
        return (d * torch.tanh(torch.cdist(x, x, p=p))[..., None]).sum(2)

    e = torch.eye(12, dtype=x.dtype).view(12, 4, 3) * 1e-6
    steps = [(velocity(x + d, 0) - velocity(x - d, 0)).flatten(1)[:, i] for i, d in enumerate(e)]
    want = torch.stack(steps).sum(0) / 2e-6
    for options in ({"estimator": "exact"}, {"probes": 12, "probe": "hadamard"}):
        out = fewstep.divergence(velocity, x, 0.0, **options)
        torch.testing.assert_close(out.value, want, rtol=1e-6, atol=1e-6)


def energy(clone: bool, net: nn.Module) -> Velocity:
    def velocity(x: Tensor, t: Any) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_(True) if clone else x.requires_grad_(True)
            return -torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]

    return velocity


@pytest.mark.parametrize("clone", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_energies(clone: bool, grad: bool) -> None:
    """Minus the Laplacian, and its gradient."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, w = torch.randn(3, 4, dtype=torch.float64), net[0].weight
    h = torch.tanh(net[0](x))
    second = -2 * h * (1 - h * h)
    want = -(second * net[2].weight[0] * w.square().sum(1)).sum(1)
    (expected,) = torch.autograd.grad(want.sum(), w)
    with torch.set_grad_enabled(grad):
        for options in ({"estimator": "exact"}, {"probes": 4, "probe": "hadamard"}):
            out = fewstep.divergence(energy(clone, net), x.clone(), 0.0, **options)
            assert_contract("value", out.value.detach(), want.detach())
            if grad:
                (found,) = torch.autograd.grad(out.value.sum(), w)
                assert_contract("gradient", found, expected)


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Timed(nn.Module):
    """A network that t is handed to."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ELU])
@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_data_parallel_reduces(
    group: None, activation: type[nn.Module], options: dict[str, bool]
) -> None:
    """Every parameter's gradient goes through the reducer, or a clear error says what to do."""
    net = Timed(nn.Linear(4, 8), activation(), nn.Linear(8, 4))
    wrapped = nn.parallel.DistributedDataParallel(net, **options)
    reduced: list[int] = []

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations
        reduced.append(len(bucket.gradients()))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    x = torch.randn(6, 4)
    for _ in range(3):
        reduced.clear()
        net.zero_grad()
        try:
            out = fewstep.divergence(wrapped, x, 0.0, estimator="hutchinson", probes=2)
            (out.value.mean() + out.velocity.square().mean()).backward()
        except ValueError as error:
            assert "DistributedDataParallel" in str(error)  # noqa: PT017
            return
        found = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
        assert sum(reduced) == 4
        net.zero_grad()
        out = fewstep.divergence(net, x, 0.0, estimator="hutchinson", probes=2)
        (out.value.mean() + out.velocity.square().mean()).backward()
        for a, p in zip(found, net.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)


SHARDED = """
import sys, torch, fewstep
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
x = torch.randn(256, 4)
ways = "exact", "hutchinson"
want = [fewstep.divergence(net, x, 0.5, estimator=e) for e in ways]
kept = {}
def gather(m, args):
    for p in m.parameters(recurse=False):
        p.untyped_storage().resize_(kept[p].numel() * 4)
        p.data.copy_(kept[p])
def free(m, args, out):
    for p in m.parameters(recurse=False):
        p.untyped_storage().resize_(0)
for m in net:
    for p in m.parameters():
        kept[p] = p.detach().clone()
        p.requires_grad_(False)
        p.untyped_storage().resize_(0)
    m.register_forward_pre_hook(gather)
    m.register_forward_hook(free)
for e, w in zip(ways, want):
    try:
        out = fewstep.divergence(net, x, 0.5, estimator=e)
    except (ValueError, RuntimeError) as error:
        assert "weight" in str(error) or "storage" in str(error), error
    else:
        torch.testing.assert_close(out.velocity, w.velocity)
        torch.testing.assert_close(out.value, w.value)
"""


def test_weights_that_exist_in_their_layer_alone() -> None:
    """As sharded layers free them: used inside the layer, or refused; never read when freed."""
    ran = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_a_refusal_is_not_remembered_after_eval() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Dropout(0.1), nn.Linear(64, 8))
    x = torch.randn(16, 8)
    fewstep.divergence(net.train(), x, 0.0)
    assert fewstep.divergence(net.eval(), x, 0.0).info == ""


def test_forwards_are_few() -> None:
    """A function that falls back does not try again at every call."""
    calls = 0

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.cumsum(self.layer(x).tanh(), -1)

    net, x = Counted(), torch.randn(3, 4)
    for _ in range(3):
        fewstep.divergence(net, x, 0.0)
    calls = 0
    fewstep.divergence(net, x, 0.0)
    assert calls <= 2


class Averaged(nn.Module):
    """Normalises by a running mean that forward updates."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return torch.tanh(self.layer(x - self.mean))


def normed(**options: bool) -> nn.Sequential:
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8, **options), nn.SiLU(), nn.Linear(8, 4)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("estimator", ["exact", "hutchinson", "auto"])
def test_batch_norm_in_training(estimator: str) -> None:
    """Refused with what to do, its counters as they were; right after it."""
    net = normed().double().train()
    before = {k: b.clone() for k, b in net.named_buffers()}
    x = torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        fewstep.divergence(net, x, 0.0, estimator=estimator)
    for k, b in net.named_buffers():
        assert torch.equal(b, before[k])
    assert assert_right(by_sample(net.eval()), x).info == ""


def by_sample(net: nn.Module) -> Velocity:
    return lambda x, t: net(x)


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_batch_norm_without_statistics(estimator: str) -> None:
    """It mixes samples in evaluation too."""
    net = normed(track_running_stats=False)
    for own in (net.train(), net.eval()):
        with pytest.raises(ValueError, match="samples"):
            fewstep.divergence(own, torch.randn(6, 4), 0.0, estimator=estimator)


@pytest.mark.filterwarnings("ignore:divergence.*disagree")
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_buffers_that_forward_updates(estimator: str) -> None:
    """Updated once, as by one call, or not at all and refused with what to do."""
    net, x = Averaged(), torch.randn(6, 4)
    once = 0.1 * x.mean(0)
    try:
        out = fewstep.divergence(net, x, 0.0, estimator=estimator)
    except ValueError as error:
        assert "eval()" in str(error)  # noqa: PT017
        assert torch.equal(net.mean, torch.zeros(4))
    else:
        torch.testing.assert_close(net.mean, once)
        torch.testing.assert_close(out.velocity, torch.tanh(net.layer(x - once)))


def test_einops() -> None:
    einops = pytest.importorskip("einops")

    def velocity(x: Tensor, t: Any) -> Tensor:
        h = einops.rearrange(x, "b (h w) -> b h w", h=2)
        h = h * einops.reduce(h, "b h w -> b h 1", "mean") + einops.repeat(x[:, 0], "b -> b 2 2")
        return einops.rearrange(h, "b h w -> b (w h)")

    assert_right(velocity, torch.randn(3, 4))


def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def test_scripted_functions() -> None:
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(gate)
    assert_right(lambda x, t: scripted(2 * x), torch.randn(3, 4))


class Attended(nn.Module):
    """Attention beside a function without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        q, k, v = F.elu(self.qkv(x)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_training_through_attention(estimator: str, whole: bool) -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, 2, batch_first=True) if whole else Attended()
    net, x = net.double(), torch.randn(2, 3, 4, dtype=torch.float64)

    def velocity(x: Tensor, t: Any) -> Tensor:
        return net(x, x, x)[0] if whole else net(x, t)  # type: ignore[no-any-return]

    options = {"probes": 12, "probe": "hadamard"} if estimator == "hutchinson" else {}
    out = fewstep.divergence(velocity, x, 0.0, estimator=estimator, **options)
    (out.value.sum() + out.velocity.square().sum()).backward()
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):
        v, jacobian = rows(lambda a: velocity(a, 0), x.clone().requires_grad_())
    (jacobian.diagonal(dim1=1, dim2=2).sum() + v.square().sum()).backward()
    want = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(found) == len(want) > 0
    for a, b in zip(found, want, strict=True):
        assert_contract("gradient", a, b)


@pytest.mark.parametrize("activation", [F.silu, F.elu])
def test_saved_tensors_on_the_cpu(activation: Callable[[Tensor], Tensor]) -> None:
    """Hooks of saved tensors are no checkpoint."""
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    found = []
    for where in (torch.autograd.graph.save_on_cpu(), nullcontext()):
        layer.zero_grad()
        with where:
            out = fewstep.divergence(lambda x, t: activation(layer(x)), x, 0.5)
            (out.value.sum() + out.velocity.square().sum()).backward()
        found.append([out.value.detach(), *(p.grad.clone() for p in layer.parameters())])
        assert "checkpoint" not in out.info
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


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


def test_a_tuple_is_named() -> None:
    for velocity in (lambda x, t: (x, x), lambda x, t: (x.cumsum(1), x)):
        with pytest.raises(ValueError, match="one tensor"):
            fewstep.divergence(velocity, torch.randn(3, 4), 0.0)


@pytest.mark.filterwarnings("ignore:divergence.*disagree")
@pytest.mark.parametrize("activation", [torch.sin, F.elu, Swish.apply])
@pytest.mark.parametrize("grad", [False, True])
def test_no_grad_inside(activation: Callable[[Tensor], Tensor], grad: bool) -> None:
    """What is computed without gradients is constant, by every way."""

    def velocity(x: Tensor, t: Any) -> Tensor:
        with torch.no_grad():
            s = activation(x)
        return s * x

    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        assert_right(velocity, x, expected=activation(x).detach().sum(1))


@pytest.mark.parametrize("activation", [torch.sin, F.elu])
def test_hooks_of_backward_fire(activation: Callable[[Tensor], Tensor]) -> None:
    layer, seen = nn.Linear(4, 4), []
    layer.register_full_backward_hook(lambda m, i, o: seen.append(m))
    out = fewstep.divergence(lambda x, t: activation(layer(x)), torch.randn(3, 4), 0.0)
    (out.value.sum() + out.velocity.square().sum()).backward()
    assert seen


def test_sparse_products() -> None:
    dense = torch.randn(4, 4, dtype=torch.float64) * (torch.rand(4, 4) < 0.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_right(lambda x, t: torch.sparse.mm(dense.to_sparse(), x.tanh().T).T, x)


def test_numpy_inside() -> None:
    x = torch.randn(3, 4)

    def velocity(x: Tensor, t: Any) -> Tensor:
        return x * torch.from_numpy(np.sign(x.detach().numpy()))

    assert_right(velocity, x, expected=x.sign().sum(1).double())


@pytest.mark.parametrize("ids", [None, torch.tensor([5, 7, 9])])
def test_a_loss_has_probes_of_its_own_on_each_rank(ids: Tensor | None) -> None:
    """By ids, which differ between ranks where they are given."""
    net, x = nn.Linear(8, 8), torch.randn(3, 8)
    teacher = GaussianMixture(torch.zeros(1, 8), torch.ones(1, 8))
    losses = []
    for offset in (0, 100):
        own = None if ids is None else ids + offset
        generator = torch.Generator().manual_seed(0)
        loss = MarginalReflow()(
            lambda x, t: net(x), teacher, x, generator=generator, sample_ids=own
        )
        losses.append(float(loss[0].detach()))
    assert (losses[0] == losses[1]) == (ids is None)


@pytest.mark.filterwarnings("ignore:divergence.*(disagree|without a derivative)")
@pytest.mark.parametrize("activation", [torch.sin, F.elu, anew])
@pytest.mark.parametrize("again", [False, True])
def test_velocities_that_do_not_depend_on_x(
    activation: Callable[[Tensor], Tensor], again: bool
) -> None:
    """All of x is seen without gradients: the trace is 0, by every way; parameters learn."""
    first, last = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def velocity(x: Tensor, t: Any) -> Tensor:
        h = first(x)
        h = h * anew(h) if again else h
        with torch.no_grad():
            h = activation(h)
        return last(h)  # type: ignore[no-any-return]

    x = torch.randn(3, 4, dtype=torch.float64)
    for options in ({"estimator": "exact"}, {"probes": 4, "probe": "hadamard"}):
        last.zero_grad()
        out = fewstep.divergence(velocity, x, 0.0, **options)
        assert_contract("value", out.velocity, velocity(x, 0).detach())
        assert torch.equal(out.value.detach(), torch.zeros(3, dtype=x.dtype))
        (out.value.sum() + out.velocity.sum()).backward()
        torch.testing.assert_close(last.bias.grad, torch.full((4,), 3.0, dtype=x.dtype))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("after", [F.silu, F.elu, torch.Tensor.positive, lambda h: h * (h > 0)])
def test_a_checkpoint_of_the_input(after: Callable[[Tensor], Tensor], grad: bool) -> None:
    """Nothing before it has parameters; x may require grad."""
    x = torch.randn(3, 4, dtype=torch.float64).requires_grad_(grad)

    def velocity(f: Callable[[Tensor], Tensor]) -> Velocity:
        return lambda x, t: after(x + f(x))

    y = x.detach().requires_grad_()
    v, jacobian = rows(lambda a: velocity(F.silu)(a, 0), y)
    want = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    (want.sum() + v.square().sum()).backward()
    for options in ({"estimator": "exact"}, {"probes": 4, "probe": "hadamard"}):
        x.grad = None
        out = fewstep.divergence(velocity(anew), x, 0.0, **options)
        assert_contract("value", out.value.detach(), want.detach())
        if grad:
            (out.value.sum() + out.velocity.square().sum()).backward()
            assert x.grad is not None
            assert_contract("gradient", x.grad, y.grad)


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_data_is_constant(estimator: str) -> None:
    """As autograd sees it: no gradient of the trace goes through `h.data`."""
    layer, found = nn.Linear(4, 4).double(), []
    x = torch.randn(3, 4, dtype=torch.float64)
    options = {"probes": 4, "probe": "hadamard"} if estimator == "hutchinson" else {}
    for constant in (lambda h: h.data, torch.Tensor.detach):
        layer.zero_grad()

        def velocity(x: Tensor, t: Any, f: Any = constant) -> Tensor:
            h = layer(x)
            return f(h) * h  # type: ignore[no-any-return]

        out = fewstep.divergence(velocity, x, 0.0, estimator=estimator, **options)
        out.value.sum().backward()
        found.append(layer.weight.grad.clone())
    h = layer(x).detach()
    want = torch.diag_embed(h.sum(0))  # d(sum_b h_bi W_ii) / dW_ii
    for g in found:
        assert_contract("gradient", g, want)


@pytest.mark.filterwarnings("ignore:divergence.*disagree")
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_scripted_modules_train(estimator: str) -> None:
    """In the first calls, when they are profiled, and after."""
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)))
    net, x = scripted.double(), torch.randn(3, 4, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)).double()
    plain.load_state_dict(net.state_dict())
    _, jacobian = rows(plain, x.clone().requires_grad_())
    want = torch.autograd.grad(jacobian.diagonal(dim1=1, dim2=2).sum(), plain[0].weight)[0]
    options = {"probes": 4, "probe": "hadamard"} if estimator == "hutchinson" else {}
    for _ in range(3):
        net.zero_grad()
        out = fewstep.divergence(lambda x, t: net(x), x, 0.0, estimator=estimator, **options)
        out.value.sum().backward()
        assert_contract("gradient", dict(net.named_parameters())["0.weight"].grad, want)


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_a_checkpointed_block_whose_input_is_used_again(estimator: str) -> None:
    """A bias that is still to be added is so for the recomputation, too."""
    a, n, b = nn.Conv1d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 3, padding=1)
    net = nn.ModuleList([a, n, b]).double()
    x = torch.randn(3, 2, 5, dtype=torch.float64)

    def velocity(x: Tensor, t: Any, *, kept: bool) -> Tensor:
        h = a(x)
        block = lambda h: F.silu(n(h))  # noqa: E731
        inner = block(h) if kept else checkpoint(block, h, use_reentrant=False)
        return b(inner + h.sin() + h)  # type: ignore[no-any-return]

    found = []
    for kept in (True, False):
        net.zero_grad()
        out = fewstep.divergence(partial(velocity, kept=kept), x, 0.0, estimator=estimator)
        assert out.info == ""
        (out.value.sum() + out.velocity.square().sum()).backward()
        found.append([out.value.detach(), *(p.grad.clone() for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
