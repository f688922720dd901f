"""Networks of (x, t, r) with inputs and tangents, and what torch has for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep
import fewstep.func
from support import velocity_nets
from tolerances import assert_contract

F32, F64 = torch.float32, torch.float64


class Sinusoids(nn.Module):
    """Of a time `[B]`, up to 1000 radians."""

    def __init__(self, width: int, outer: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.outer = outer

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(1e4) * torch.arange(8, dtype=t.dtype) / 8)
        angle = torch.outer(1000 * t, rates) if self.outer else 1000 * t[:, None] * rates[None]
        return self.net(torch.cat([angle.sin(), angle.cos()], -1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, d: int = 4, width: int = 16) -> None:
        super().__init__()
        self.time, self.span = Sinusoids(width, True), Sinusoids(width, False)
        self.first, self.last = nn.Linear(d + 1, width), nn.Linear(width, d)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        c = self.time(t) + self.span(t - r)
        h = F.silu(self.first(torch.cat([x, t[:, None]], 1)) + c)
        return self.last(self.norm(h) * (1 + c)) * t.view(-1, 1)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, i: int, o: int, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.GroupNorm(2, i), nn.GroupNorm(2, o)
        self.c, self.d = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.time, self.skip = nn.Linear(width, 2 * o), nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.time(c)[:, :, None, None].chunk(2, 1)
        h = self.b(self.c(F.silu(self.a(x)))) * (1 + scale) + shift
        return self.skip(x) + self.d(F.silu(h))  # type: ignore[no-any-return]


class UNet(nn.Module):
    def __init__(self, channels: int = 2, width: int = 4) -> None:
        super().__init__()
        self.time, self.span = Sinusoids(8, True), Sinusoids(8, False)
        self.first, self.last = (
            nn.Conv2d(channels, width, 3, padding=1),
            nn.Conv2d(width, channels, 3, padding=1),
        )
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.a, self.b = Block(width, width, 8), Block(2 * width, 2 * width, 8)
        self.c, self.norm = Block(3 * width, width, 8), nn.GroupNorm(2, width)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        c = self.time(t) + self.span(t - r)
        high = self.a(self.first(x), c)
        low = F.interpolate(self.b(self.down(high), c), scale_factor=2)
        h = self.c(torch.cat([low, high], 1), c)
        return self.last(F.silu(self.norm(h)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A block with adaLN, QK norm, rotary embeddings and a context."""

    def __init__(self, d: int = 3, width: int = 8) -> None:
        super().__init__()
        self.time, self.span = Sinusoids(width, False), Sinusoids(width, True)
        self.first, self.last = nn.Linear(d, width), nn.Linear(width, d)
        self.modulation, self.qkv = nn.Linear(width, 6 * width), nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.second, self.heads = nn.RMSNorm(width), nn.RMSNorm(width // 2)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )

    def rotated(self, z: Tensor) -> Tensor:
        pairs = z.shape[-1] // 2
        places = torch.arange(z.shape[-2], dtype=z.dtype)[:, None]
        angle = places * torch.exp(-torch.arange(pairs, dtype=z.dtype))
        a, b = self.heads(z).chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        h = self.first(x)
        batch, tokens, width = h.shape
        c = self.modulation(F.silu(self.time(t) + self.span(t - r)))[:, None].chunk(6, -1)
        z = self.norm(h) * (1 + c[0]) + c[1]
        q, k, v = self.qkv(z).view(batch, tokens, 3, 2, width // 2).permute(0, 2, 3, 1, 4).unbind(1)
        a = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)
        h = h + c[2] * self.out(a.transpose(1, 2).reshape(batch, tokens, width))
        h = h + c[5] * self.mlp(self.second(h) * (1 + c[3]) + c[4])
        return self.last(h)  # type: ignore[no-any-return]


def no_span(net: Callable[[], nn.Module]) -> nn.Module:
    """A network of (x, t), as one of (x, t, r)."""

    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return self.net(x, t)  # type: ignore[no-any-return]

    return Ignoring()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (4,)),
    "unet": (UNet, (2, 4, 4)),
    "transformer": (Transformer, (5, 3)),
    "time mlp": (partial(no_span, partial(velocity_nets.TimeMLP, 4, 8, 3, nn.Softplus)), (4,)),
    "film": (partial(no_span, partial(velocity_nets.Film, 4, 8)), (4,)),
    "convolutions": (partial(no_span, partial(velocity_nets.Convolutions, 2, 4)), (2, 4, 4)),
    "attention": (partial(no_span, partial(velocity_nets.Attention, 4, 8, True)), (5, 4)),
}


@dataclass
class Problem:
    """A network, its inputs, tangents in all of them, and weights of a loss, in float64."""

    net: nn.Module
    inputs: tuple[Tensor, ...]
    tangents: tuple[Any, ...]
    w: Tensor

    def to(self, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Any, ...]]:
        own = [z.to(dtype).requires_grad_() for z in self.inputs]
        tangents = [u.to(dtype) if isinstance(u, Tensor) else u for u in self.tangents]
        return self.net.to(dtype), tuple(own), tuple(tangents)

    def exact(self, through: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Value and tangent by forward mode, gradients by reverse mode twice."""
        net, inputs, tangents = self.to(F64)
        full = tuple(
            u if isinstance(u, Tensor) else torch.full_like(x, u)
            for x, u in zip(inputs, tangents, strict=True)
        )
        with sdpa_kernel(SDPBackend.MATH):
            try:
                value, tangent = torch.func.jvp(net, inputs, full)
            except RuntimeError:  # of views that its tensors have no strides for
                value, tangent = reverse_twice(net, inputs, full)
            loss = (net(*inputs) * self.w).sum()
            if through:
                rows = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
                pairs = zip(rows, full, strict=True)
                loss = loss + sum((row * u).sum() for row, u in pairs if row is not None)
            leaves = [*inputs, *net.parameters()]
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return value.detach(), tangent.detach(), filled(grads, leaves)


def reverse_twice(
    net: nn.Module, inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """J v as the derivative of `<w, J v>` in w."""
    value = net(*inputs)
    w = torch.zeros_like(value).requires_grad_()
    rows = torch.autograd.grad(value, inputs, w, create_graph=True)
    dot = torch.stack([(row * u).sum() for row, u in zip(rows, tangents, strict=True)]).sum()
    return value, torch.autograd.grad(dot, w)[0]


def filled(grads: Any, leaves: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(z) if g is None else g for g, z in zip(grads, leaves, strict=True)]


def problem(name: str, batch: int = 6) -> Problem:
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().to(F64)
    x, v, w = (torch.randn(batch, *shape, dtype=F64).to(F32).to(F64) for _ in range(3))
    t = torch.rand(batch).to(F64)
    r = t * torch.rand(batch).to(F64)
    return Problem(net, (x, t, r), (v, 1.0, -0.5), w)


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads])


def net_of(*widths: int, norm: type[nn.Module] | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), *([norm(o)] if norm else []), nn.SiLU()]
    return nn.Sequential(*layers[:-1], nn.Linear(widths[-1], widths[0])).double()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def right(
    network: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    **options: Any,
) -> fewstep.Jvp:
    """What `jvp` returns, if it agrees with torch's forward mode."""
    out = fewstep.jvp(network, inputs, tangents, **options)
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(network, inputs, tangents)
    assert_contract("gradient", out.value, value.detach())
    assert_contract("gradient", out.tangent, tangent.detach())
    return out
