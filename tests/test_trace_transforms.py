"""`divergence` inside `torch.compile`, transforms, checkpoints and DistributedDataParallel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewstep
from support.traces import case


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", ["two hidden layers", "three hidden layers", "residual"])
def test_compiles_into_one_graph(name: str, estimator: str) -> None:
    net, x, t = case(name)
    seed = torch.tensor(3)

    def loss(x: Tensor, t: Tensor, seed: Tensor) -> Tensor:
        out = fewstep.divergence(net, x, t, estimator=estimator, probes=2, seed=seed)
        return (out.value * out.velocity.sum(1)).sum()

    torch._dynamo.reset()
    parameters = list(net.parameters())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for s in (seed, seed + 1):
        expected = torch.autograd.grad(loss(x, t, s), parameters)
        actual = torch.autograd.grad(compiled(x, t, s), parameters)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def _operators(x: Tensor, t: Tensor) -> Tensor:
    w = torch.ones(3, dtype=x.dtype) * 2
    a = (1 - x) + (w - x) + (x - 1) + (1 + x) * 2
    b = (w / x) + 1 / x + x / 2 + x**3 + 2**x - x % 2
    return a * b + abs(-x)


def _methods(x: Tensor, t: Tensor) -> Tensor:
    y = (x * 1).relu_() + x.clamp(-1, 1) + x.abs() + x.clone() * x.norm(dim=1, keepdim=True)
    y = y + torch.where(x > 0, x, 2 * x) + torch.stack([x, x * x], 1).sum(1)
    y = y + torch.stack(x.unbind(1), 1).exp() + torch.cat(x.chunk(3, 1), 1)
    y = y + torch.cat(x.split(1, 1), 1) ** 2 + x.view(-1, 1, 3).squeeze(1).reshape(x.shape)
    y = y + x.unflatten(1, (3, 1)).flatten(1)
    y *= 2
    y -= x
    return y


@pytest.mark.parametrize("velocity", [_operators, _methods])
def test_operators_compile(velocity: Callable[..., Tensor]) -> None:
    x = torch.tensor([[0.5, -0.3, 2.0], [1.5, 0.2, -0.7]], dtype=torch.float64)

    def run(x: Tensor) -> tuple[Tensor, Tensor, str]:
        out = fewstep.divergence(velocity, x, 0.5, estimator="exact")
        return out.velocity, out.value, out.info

    torch._dynamo.reset()
    *actual, note = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    *expected, info = run(x)
    assert (info, note) == ("", "not compared with plain autograd")
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_operators_without_a_rule_compile() -> None:
    x, t = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, dtype=torch.float64)

    def run(x: Tensor, t: Tensor) -> tuple[Tensor, str]:
        out = fewstep.divergence(lambda x, t: +x, x, t, estimator="exact")
        return out.value, out.info

    torch._dynamo.reset()
    actual, note = torch.compile(run, fullgraph=True, backend="aot_eager")(x, t)
    assert note.startswith("torch.func: no rule for")
    torch.testing.assert_close(actual, run(x, t)[0], rtol=1e-11, atol=1e-11)


class Twice(torch.autograd.Function):
    """2 x, without a derivative in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside forward mode
@pytest.mark.parametrize("estimator", ["exact", "hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_unknown_functions_under_checkpointing(estimator: str, reentrant: bool) -> None:
    net, x, t = case("unknown")
    x.requires_grad_()
    inputs = [x, *net.parameters()]
    infos = []

    def value(x: Tensor) -> Tensor:
        out = fewstep.divergence(net, x, t, estimator=estimator, probes=4)
        infos.append(out.info)
        return torch.cat([out.value[:, None], out.velocity], 1)

    sketch = estimator in ("hutch++", "xtrace") and not reentrant  # of J there, of J' outside
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda z: z, lambda z: z)
    with hooks if sketch else contextlib.nullcontext():
        plain = value(x)
        w = torch.randn_like(plain)
        expected = torch.autograd.grad((w * plain).sum(), inputs)
    again = checkpoint(value, x, use_reentrant=reentrant)
    assert isinstance(again, Tensor)
    torch.testing.assert_close(again, plain)
    (w * again).sum().backward()
    for p, want in zip(inputs, expected, strict=True):
        torch.testing.assert_close(p.grad, want)
    ways = ["torch.func: no rule for cumsum", "torch.autograd.forward_ad: no rule for cumsum"]
    assert infos[0] == ways[sketch]
    assert set(infos[1:]) == {ways[not reentrant]}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside forward mode
def test_no_forward_derivative_under_checkpointing() -> None:
    linear, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)

    def value(x: Tensor) -> Tensor:
        net = lambda x, t: Twice.apply(torch.cumsum(linear(x), -1))  # noqa: E731
        return fewstep.divergence(net, x, 0.3, estimator="exact").value.sum()

    expected = 4 * torch.cumsum(linear.weight, 0).trace()  # two samples
    torch.testing.assert_close(value(x), expected)
    (want,) = torch.autograd.grad(expected, linear.weight)
    for reentrant in (True, False):
        linear.weight.grad = None
        again = checkpoint(value, x, use_reentrant=reentrant)
        assert isinstance(again, Tensor)
        torch.testing.assert_close(again, expected)
        again.backward()
        torch.testing.assert_close(linear.weight.grad, want)


def test_activation_checkpointing() -> None:
    net, x, t = case("residual")

    def value(x: Tensor) -> Tensor:
        return fewstep.divergence(net, x, t, estimator="hutchinson", probes=2).value

    parameters = list(net.parameters())
    expected = torch.autograd.grad(value(x).sum(), parameters)
    again = checkpoint(value, x, use_reentrant=False)
    assert isinstance(again, Tensor)
    for a, b in zip(torch.autograd.grad(again.sum(), parameters), expected, strict=True):
        assert torch.equal(a, b)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        net, x, t = case("two hidden layers")
        wrapped = nn.parallel.DistributedDataParallel(net)
        for estimator in ("exact", "hutchinson"):
            net.zero_grad()
            out = fewstep.divergence(wrapped, x, t, estimator=estimator)
            (out.value.sum() + out.velocity.sum()).backward()
            found = [p.grad.clone() for p in net.parameters()]
            net.zero_grad()
            out = fewstep.divergence(net, x, t, estimator=estimator)
            (out.value.sum() + out.velocity.sum()).backward()
            for a, p in zip(found, net.parameters(), strict=True):
                torch.testing.assert_close(a, p.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_inside_transforms() -> None:
    net, x, t = case("three hidden layers")

    def value(xi: Tensor) -> Tensor:
        return fewstep.divergence(net, xi[None], t[:1], estimator="exact").value[0]

    x.requires_grad_()
    expected = torch.autograd.grad(
        fewstep.divergence(net, x, t[:1].expand(4), estimator="exact").value.sum(), x
    )[0]
    found = torch.func.vmap(torch.func.grad(value))(x.detach())
    torch.testing.assert_close(found, expected)
