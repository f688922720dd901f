"""Small networks from functions and layers, and a check of their traces by every way.

Velocity, exact trace, all Hadamard probes, and the gradient of `value.sum() + |velocity|^2`, held
against float64 by plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from support import rows

Body = Callable[..., Tensor]
WAYS: dict[str, dict[str, Any]] = {"exact": {"estimator": "exact"}, "probes": {"probe": "hadamard"}}
ROW, TOKENS, IMAGE = (3, 4), (2, 3, 4), (2, 2, 4, 4)


class Of(nn.Module):
    """A forward written as a function of x, t and the modules that it uses."""

    def __init__(self, body: Body, *modules: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = body
        own = [nn.Parameter(m) if isinstance(m, Tensor) else m for m in modules]
        self.own = nn.ModuleList(m for m in own if isinstance(m, nn.Module))
        self.tensors = nn.ParameterList(m for m in own if isinstance(m, Tensor))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t, *self.own, *self.tensors)


def stack(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(make() for make in layers))


def inner(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Layers of width 6 between two linear ones."""
    return stack(partial(nn.Linear, 4, 6), *layers, partial(nn.Linear, 6, 4))


def of(body: Body, *layers: Any) -> Callable[[], nn.Module]:
    return lambda: Of(body, *(make() if callable(make) else make.clone() for make in layers))


def linear(a: int, b: int, **options: Any) -> Callable[[], nn.Module]:
    return partial(nn.Linear, a, b, **options)


class DropPath(nn.Module):
    """As timm's: nothing in evaluation."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * kept.div_(1 - self.p)


def normed(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = nn.Sequential(wrap(nn.Linear(4, 6)), nn.SiLU(), wrap(nn.Linear(6, 4)))
        net(torch.randn(8, 4))  # so that power iterations have begun
        return net

    return make


def call(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    plain: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> rows.Call:
    """A call with the same network in any dtype, in evaluation mode; `plain` is written without
    what is tested."""

    def build(dtype: torch.dtype, bare: bool = False) -> rows.Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = plain() if bare and plain is not None else make()
        net = net.to(dtype).eval()
        alone = bare and isinstance(net, nn.Sequential)
        return (lambda x, t: net(x)) if alone else net, list(net.parameters())

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(options.pop("dtype", torch.float64))
    t = torch.rand(shape[0], generator=generator).to(x.dtype)
    return rows.Call(build, x, t, partial(build, bare=True), **options)


def options_of(way: str, shape: tuple[int, ...]) -> dict[str, Any]:
    d = torch.Size(shape[1:]).numel()
    return WAYS[way] | ({"probes": d, "estimator": "hutchinson"} if way == "probes" else {})


def assert_right(
    make: Callable[[], nn.Module], shape: tuple[int, ...], way: str, trained: bool = True
) -> None:
    modes = [(torch.float64, trained)] + [(torch.float32, False)] * (way == "exact")
    with rows.quiet():
        for dtype, grad in modes:
            own = call(make, shape, options=options_of(way, shape), grad=grad, dtype=dtype)
            assert rows.wrong(own) == [], (dtype, grad)
