"""Velocities written with operators, keywords, changes in place, branches and other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fewstep.toys import GaussianMixture
from torch import Tensor, nn

import fewstep
from fewstep.methods import MarginalReflow
from support.rows import Velocity, assert_right, trace

DTYPES = [torch.float32, torch.float64]


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


def test_branches_on_t_and_the_batch() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        h = 2 * x
        if float(t.flatten()[0]) > 0.5 or len(x) > 4:
            return F.relu(h, inplace=True) + h
        return h.tanh()

    for x, t in ((torch.randn(3, 4), 0.0), (torch.randn(3, 4), 1.0), (torch.randn(6, 4), 0.0)):
        own = torch.full((len(x),), t)
        out = fewstep.divergence(velocity, x, t, estimator="exact")
        torch.testing.assert_close(out.velocity, velocity(x, own))
        torch.testing.assert_close(out.value.double(), trace(out_of_place, x, own))


def out_of_place(x: Tensor, t: Tensor) -> Tensor:
    return 2 * F.relu(2 * x) if float(t[0]) > 0.5 or len(x) > 4 else (2 * x).tanh()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_cdist(p: float) -> None:
    """torch's own batching rule of its derivative is wrong, and a second derivative is missing."""
    x = torch.randn(2, 4, 3, dtype=torch.float64)

    def velocity(x: Tensor, t: Any) -> Tensor:
        d = x[:, :, None] - x[:, None]
        return (d * torch.tanh(torch.cdist(x, x, p=p))[..., None]).sum(2)

    e = torch.eye(12, dtype=x.dtype).view(12, 4, 3) * 1e-6
    steps = [(velocity(x + d, 0) - velocity(x - d, 0)).flatten(1)[:, i] for i, d in enumerate(e)]
    want = torch.stack(steps).sum(0) / 2e-6
    for options in ({"estimator": "exact"}, {"probes": 12, "probe": "hadamard"}):
        own = x.clone().requires_grad_()
        out = fewstep.divergence(velocity, own, 0.0, **options)
        torch.testing.assert_close(out.value, want, rtol=1e-6, atol=1e-6)
        out.value.sum().backward()
        assert own.grad is not None
        d = torch.randn_like(x) * 1e-6
        up, down = (fewstep.divergence(velocity, x + s * d, 0.0, **options) for s in (1, -1))
        want_slope = (up.value - down.value).sum() / 2
        torch.testing.assert_close((own.grad * d).sum(), want_slope, rtol=1e-5, atol=1e-13)


def test_cdist_compiled() -> None:
    """Nothing is compared while compiling, so torch's wrong derivative would go unseen."""

    def value(x: Tensor) -> Tensor:
        def velocity(x: Tensor, t: Any) -> Tensor:
            return x * torch.cdist(x, x, p=3.0).sum(2, keepdim=True)

        return fewstep.divergence(velocity, x, 0.0, estimator="exact").value

    torch.compiler.reset()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    actual = torch.compile(value, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, value(x))


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


def test_a_tuple_is_named() -> None:
    for velocity in (lambda x, t: (x, x), lambda x, t: (x.cumsum(1), x)):
        with pytest.raises(ValueError, match="one tensor"):
            fewstep.divergence(velocity, torch.randn(3, 4), 0.0)


def test_sparse_products() -> None:
    dense = torch.randn(4, 4, dtype=torch.float64) * (torch.rand(4, 4) < 0.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_right(lambda x, t: torch.sparse.mm(dense.to_sparse(), x.tanh().T).T, x)


def test_numpy_inside() -> None:
    x = torch.randn(3, 4)

    def velocity(x: Tensor, t: Any) -> Tensor:
        return x * torch.from_numpy(np.sign(x.detach().numpy()))

    assert_right(velocity, x, expected=x.sign().sum(1).double())
