"""Velocities that use autograd themselves: Functions, checkpoints, hooks, energies, constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fewstep.toys import GaussianMixture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewstep
from fewstep.methods import MarginalReflow
from support.functions import Rounded, Swish
from support.rows import Velocity, assert_right, rows
from tolerances import assert_contract


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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # it does not depend on x
@pytest.mark.filterwarnings("ignore:None of the inputs")  # where nothing is differentiated
def test_a_reentrant_checkpoint_behind_what_is_constant_in_x() -> None:
    """Its weights train as they do in a plain call."""
    inner, outer = nn.Linear(4, 8), nn.Linear(8, 4)

    def velocity(x: Tensor, t: Any) -> Tensor:
        with torch.no_grad():
            h = x.sin()
        return outer(reentrant(inner(h)))  # type: ignore[no-any-return]

    out = fewstep.divergence(velocity, torch.randn(3, 4), 0.0)
    assert not out.value.any()
    out.velocity.sum().backward()
    assert inner.weight.grad is not None
    assert inner.weight.grad.any()


@pytest.mark.filterwarnings("ignore:divergence. duals and plain autograd disagree")
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_hooks_that_change_gradients(late: bool, gate: bool) -> None:
    """Whether they were there from the first call on or not."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)), torch.randn(5, 6)

    def velocity(x: Tensor, t: Any) -> Tensor:
        return net(x) * x if gate else net(x)  # type: ignore[no-any-return]

    if late:
        fewstep.divergence(velocity, x, 0.3, estimator="exact")
    net[2].register_full_backward_hook(lambda m, gi, go: (gi[0].clamp(-0.01, 0.01),))
    out = fewstep.divergence(velocity, x, 0.3, estimator="exact")
    (found,) = torch.autograd.grad(out.velocity.square().sum(), net[0].weight)
    (plain,) = torch.autograd.grad(velocity(x, 0.3).square().sum(), net[0].weight)
    torch.testing.assert_close(found, plain)
