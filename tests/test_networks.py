"""Networks as they are met: each kind small, right by whatever way serves it.

Velocity, exact trace, all Hadamard probes, and the gradient of `value.sum() + |velocity|^2`, held
against float64 by plain autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import fewstep
from support import rows

Body = Callable[..., Tensor]
Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
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


def between(f: Callable[[Tensor], Tensor], width: int = 6) -> Callable[[], nn.Module]:
    """A function of the hidden values of a small network."""

    def body(x: Tensor, t: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        return b(f(a(x))) * (1 + t[:, None])  # type: ignore[no-any-return]

    def make() -> nn.Module:
        return Of(body, nn.Linear(4, width), nn.Linear(width, 4))

    return make


def stack(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(make() for make in layers))


def inner(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Layers of width 6 between two linear ones."""
    return stack(partial(nn.Linear, 4, 6), *layers, partial(nn.Linear, 6, 4))


def of(body: Body, *layers: Any) -> Callable[[], nn.Module]:
    return lambda: Of(body, *(make() if callable(make) else make.clone() for make in layers))


def linear(a: int, b: int, **options: Any) -> Callable[[], nn.Module]:
    return partial(nn.Linear, a, b, **options)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **{f.__name__: f for f in (nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.Softplus)},
    **{f.__name__: f for f in (nn.ELU, nn.LeakyReLU, nn.SELU, nn.Mish, nn.PReLU, nn.CELU)},
    **{f.__name__: f for f in (nn.Hardswish, nn.Softsign, nn.LogSigmoid, nn.Hardtanh, nn.ReLU6)},
    **{f.__name__: f for f in (nn.Tanhshrink, nn.Identity)},
    "ReLU in place": partial(nn.ReLU, inplace=True),
    "SiLU in place": partial(nn.SiLU, inplace=True),
    "GELU tanh": partial(nn.GELU, approximate="tanh"),
    "Softplus of 2": partial(nn.Softplus, 2, 5),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f: getattr(torch, f) for f in ("erf", "exp", "sin", "cos", "atan", "square", "sinh", "abs")},
    "log": lambda h: (1 + h * h).log(),
    "sqrt": lambda h: (1 + h * h).sqrt(),
    "clamp": lambda h: h.clamp(-0.5, 0.5),
    "atan2": lambda h: torch.atan2(h, 1 + h * h),
    "lerp": lambda h: torch.lerp(h, h.sin(), 0.3),
    "log_softmax": lambda h: F.log_softmax(h, -1),
    "logsumexp": lambda h: h - torch.logsumexp(h, -1, keepdim=True),
    "cumsum": lambda h: h.cumsum(-1),
    "cumprod": lambda h: (1 + h).cumprod(-1),
    "sort": lambda h: h.sort(-1).values,
    "topk": lambda h: h.topk(6, -1)[0],
    "max": lambda h: h - h.max(-1, keepdim=True)[0],
    "amax": lambda h: h - h.amax(-1, keepdim=True),
    "argmax": lambda h: h * h.argmax(-1, keepdim=True),
    "prod": lambda h: h * (1 + h).prod(-1, keepdim=True),
    "det": lambda h: h * torch.linalg.det(h.view(-1, 1, 2, 3) @ h.view(-1, 1, 3, 2)),
    "fft": lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=-1) * 1j, n=6, dim=-1),
    "view_as_complex": lambda h: torch.view_as_real(
        torch.view_as_complex(h.view(-1, 3, 2).contiguous()) * (0.6 + 0.8j)
    ).flatten(1),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "norm": lambda h: h / (1 + h.norm(dim=-1, keepdim=True)),
    "vector_norm": lambda h: h * torch.linalg.vector_norm(h, dim=-1, keepdim=True),
    "std": lambda h: h / (1 + h.std(-1, keepdim=True)),
    "var_mean": lambda h: (h - torch.var_mean(h, -1, keepdim=True)[1]) * 2,
    "stack": lambda h: torch.stack([h, h.sin()], 1).sum(1),
    "unbind": lambda h: torch.stack([c * i for i, c in enumerate(h.unbind(-1))], -1),
    "expand": lambda h: h[:, None].expand(-1, 3, -1).mean(1),
    "expand_as": lambda h: h[:, :1].expand_as(h) * h,
    "repeat": lambda h: h.repeat(1, 2)[:, 3:9],
    "tile": lambda h: h.tile((1, 2))[:, 3:9],
    "repeat_interleave": lambda h: h[:, :3].repeat_interleave(2, 1) * h,
    "roll": lambda h: h.roll(1, -1) * h,
    "flip": lambda h: h.flip(-1) * h,
    "pad": lambda h: F.pad(h, (1, 1))[:, :6] * h,
    "index by a tensor": lambda h: h[:, torch.tensor([1, 0, 3, 2, 5, 4])] * h,
    "gather": lambda h: h.gather(-1, torch.tensor([[1, 0, 3, 2, 5, 4]]).expand(len(h), -1)) * h,
    "index_select": lambda h: h.index_select(1, torch.tensor([1, 0, 3, 2, 5, 4])) * h,
    "index_add": lambda h: h.index_add(1, torch.tensor([0, 2]), h[:, :2]) * h,
    "scatter_add": lambda h: h.scatter_add(1, torch.zeros(len(h), 6, dtype=torch.long), h.sin()),
    "T": lambda h: h.T.sin().T,
    "mT": lambda h: (h.view(-1, 2, 3).mT @ h.view(-1, 2, 3)).flatten(1)[:, :6],
    "einsum": lambda h: torch.einsum("bi,bj->bij", h, h).sum(2),
    "baddbmm": lambda h: torch.baddbmm(h[:, None], h[:, None], h[:, :, None] * h[:, None])[:, 0],
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "masked_fill": lambda h: h.masked_fill(torch.arange(6) > 3, 0.5) * h,
    "one_hot": lambda h: h * F.one_hot(h.argmax(-1), 6),
    "zeros_like": lambda h: torch.zeros_like(h) + h.sin(),
    "filled": lambda h: torch.zeros(h.shape, dtype=h.dtype).copy_(h) * h,
    "pow": lambda h: h.pow(3) + (1 + h * h).pow(0.5),
    "double": lambda h: h.double().sin().to(h.dtype),
    "detach": lambda h: h * h.detach(),
    "data": lambda h: h * h.data,
    "straight-through by detach": lambda h: h + (h.round() - h).detach(),
    "no_grad": lambda h: h / scale_of(h),
    "control flow": lambda h: h.sin() if float(h.detach().abs().max()) < 1e3 else h,
    "loop over samples": lambda h: torch.stack([row * row.sum() for row in h]),
    "in place on a skip": lambda h: skipped(h * 1, partial(F.relu, inplace=True)),
    "SiLU in place on a skip": lambda h: skipped(h * 1, nn.SiLU(inplace=True)),
    "ELU in place on a skip": lambda h: skipped(h * 1, partial(F.elu, inplace=True)),
    "in place on a view": lambda h: viewed(h * 1),
    "item assignment": lambda h: assigned(h * 1),
    "masked": lambda h: h * (h > 0),
    "operators": lambda h: abs(h) ** 2 / (1 + h**2) - h % 1.0,
    "keywords": lambda h: torch.add(input=h, other=h.mean(dim=-1, keepdim=True), alpha=0.5),
    "vmap": lambda h: torch.vmap(lambda a: a * a.sum())(h),
    "checkpoint": lambda h: checkpoint(F.silu, h, use_reentrant=False),
    "whole number term": lambda h: F.silu(h + torch.arange(6)),
    "bool term": lambda h: F.silu(h + (torch.arange(6) > 2)),
    "scalar before a norm": lambda h: F.layer_norm(1 - h, (6,)),
    "numpy": lambda h: h * torch.from_numpy(h.detach().numpy().copy()),
    "cdist": lambda h: (
        h * torch.cdist(h.view(-1, 2, 3), h.view(-1, 3, 2).mT).flatten(1).sum(1, True)
    ),
    "nan_to_num": lambda h: torch.nan_to_num(h) * h,
    "chained views": lambda h: (
        h.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6).unflatten(1, (3, 2)).flatten(1) * h
    ),
}


def scale_of(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.square().mean(-1, keepdim=True).sqrt() + 1


def skipped(h: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    return f(h) + h


def viewed(h: Tensor) -> Tensor:
    h[:, :3].mul_(2)
    h.view(-1, 2, 3)[:, 1].add_(1)
    return h


def assigned(h: Tensor) -> Tensor:
    h[:, 0] = 0
    h[:, 1:3] *= 2
    return h


class Rounded(torch.autograd.Function):
    """Straight-through."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return (a * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return g * a.cos()


class LoRA(nn.Module):
    """Low-rank adapters as PEFT's: the input goes to the adapter's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 6)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        low = x.to(self.a.weight.dtype)
        return self.base(x) + self.b(self.a(low)) * 0.5  # type: ignore[no-any-return]


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


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """As timm's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.ls1, self.ls2, self.drop = LayerScale(width), LayerScale(width), DropPath(0.1)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def attend(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.ls1(self.attend(self.norm1(x))))
        return x + self.drop(self.ls2(self.fc2(F.gelu(self.fc1(self.norm2(x))))))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Patches by a convolution, a class token, positions, blocks, and patches put together."""

    def __init__(self, channels: int = 2, size: int = 4, patch: int = 2, width: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 2))
        self.norm, self.time = nn.LayerNorm(width), nn.Linear(1, width)
        self.head = nn.Linear(width, channels * patch * patch)
        self.grid, self.patch = size // patch, patch

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.patch_embed(x).flatten(2).transpose(1, 2)
        h = torch.cat((self.cls_token.expand(B, -1, -1), h), dim=1) + self.pos_embed
        h = self.norm(self.blocks(h + self.time(t[:, None])[:, None]))[:, 1:]
        h = self.head(h).reshape(B, self.grid, self.grid, C, self.patch, self.patch)
        return torch.einsum("bhwcpq->bchpwq", h).reshape(B, C, H, W)


class Residual(nn.Module):
    """Convolutions with group norms and a scale and shift from t."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, channels), nn.GroupNorm(2, width)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1)
        self.time = nn.Linear(4, 2 * width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * torch.tensor([1.0, 3.0], dtype=x.dtype)
        scale, shift = self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, :, None, None].chunk(
            2, 1
        )
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))  # type: ignore[no-any-return]


def attention(x: Tensor, t: Tensor, qkv: nn.Module, out: nn.Module, **options: Any) -> Tensor:
    B, T, C = x.shape
    q, k, v = (m.view(B, T, 2, C // 2).transpose(1, 2) for m in qkv(x).chunk(3, -1))
    return out(F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def by_hand(x: Tensor, t: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
    q, k, v = qkv(x).chunk(3, dim=-1)
    return out(torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1) @ v)  # type: ignore[no-any-return]


def seq_first(x: Tensor, t: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
    h = x.transpose(0, 1)
    q, k, v = (m.transpose(0, 1) for m in qkv(h).chunk(3, -1))
    h = (q @ k.mT).softmax(-1) @ v
    return out(h.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


def biased(x: Tensor, t: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
    q, k, v = qkv(x).chunk(3, dim=-1)
    far = torch.cdist(x, x + 1)
    return out(torch.softmax(q @ k.mT - far, -1) @ v)  # type: ignore[no-any-return]


def egnn(x: Tensor, t: Tensor, phi: nn.Module) -> Tensor:
    """Points that move along their differences, less their mean."""
    d = x[:, :, None] - x[:, None]
    w = phi(d.square().sum(-1, keepdim=True)).tanh()
    v = (d * w).sum(2)
    return v - v.mean(1, keepdim=True)


def messages(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
    graph = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=x.dtype)
    return F.silu(a(graph @ x)) + x


def sparse_messages(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
    source, target = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 2, 1])
    sent = a(x.index_select(1, source))
    return torch.zeros_like(x).index_add(1, target, sent).tanh() + x


def recurrent(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for i in range(x.shape[1]):
        h = torch.tanh(a(torch.cat([h, x[:, i]], -1)))
        out.append(h[:, None])
    return torch.cat(out, 1)


def energy(x: Tensor, t: Tensor, net: nn.Module) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        return -torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]


def experts(x: Tensor, t: Tensor, gate: nn.Module, a: nn.Module, b: nn.Module) -> Tensor:
    w = gate(x).softmax(-1)
    return w[:, :1] * a(x).tanh() + w[:, 1:] * F.silu(b(x))  # type: ignore[no-any-return]


def hyper(x: Tensor, t: Tensor, net: nn.Module) -> Tensor:
    """Weights that depend on t and x."""
    w = net(torch.cat([x, t[:, None]], 1)).view(-1, 4, 4)
    return torch.bmm(x[:, None], w)[:, 0].tanh()


def squeeze_excite(x: Tensor, t: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return x * torch.sigmoid(b(F.relu(a(x.mean((2, 3))))))[:, :, None, None]


def windows(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
    B, C, H, W = x.shape
    h = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, C)
    h = (h @ h.transpose(1, 2)).softmax(-1) @ a(h)
    return h.view(B, H // 2, W // 2, 2, 2, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)


def last_hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4))
    net[1].register_forward_hook(lambda m, i, o: o * 2)
    net[0].register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    return net


def sequential(*wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(*(f(nn.Linear(*n)) for f, n in zip(wrap, ((4, 6), (6, 4)), strict=True)))


def normed(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = nn.Sequential(wrap(nn.Linear(4, 6)), nn.SiLU(), wrap(nn.Linear(6, 4)))
        net(torch.randn(8, 4))  # so that power iterations have begun
        return net

    return make


def conv(x: Tensor, t: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = F.silu(layer(x))
    return x * (1 + t.view(-1, *[1] * (x.ndim - 1)))


QKV = linear(4, 12), linear(4, 4)
BLOCKS: dict[str, Case] = {
    "MLP with t": (
        of(
            lambda x, t, a, b: b(F.silu(a(torch.cat([x, t[:, None]], -1)))),
            *(linear(5, 8), linear(8, 4)),
        ),
        ROW,
    ),
    "three hidden layers": (inner(nn.SiLU, linear(6, 5), nn.Tanh, linear(5, 6), nn.GELU), ROW),
    "sinusoids of t": (
        of(
            lambda x, t, a, b: a(x) * b(torch.cat([(t[:, None] * 3).sin(), t[:, None].cos()], 1)),
            *(linear(4, 4), linear(2, 4)),
        ),
        ROW,
    ),
    "LayerNorm": (inner(partial(nn.LayerNorm, 6), nn.SiLU), ROW),
    "RMSNorm": (inner(partial(nn.RMSNorm, 6), nn.SiLU), ROW),
    "GroupNorm": (inner(partial(nn.GroupNorm, 2, 6), nn.SiLU), ROW),
    "BatchNorm in evaluation": (inner(partial(nn.BatchNorm1d, 6), nn.SiLU), ROW),
    "Dropout in evaluation": (inner(nn.SiLU, partial(nn.Dropout, 0.3)), ROW),
    "FiLM": (
        of(
            lambda x, t, a, b, c: b(torch.addcmul(*c(t[:, None]).chunk(2, 1), F.silu(a(x)))),
            *(linear(4, 6), linear(6, 4), linear(1, 12)),
        ),
        ROW,
    ),
    "adaLN": (
        of(
            lambda x, t, a, n, c: x + F.gelu(n(a(x)) * (1 + c(t[:, None])[:, :4])),
            *(linear(4, 4), partial(nn.LayerNorm, 4, elementwise_affine=False), linear(1, 8)),
        ),
        ROW,
    ),
    "GLU": (stack(linear(4, 12), nn.GLU, linear(6, 4)), ROW),
    "SwiGLU": (
        of(lambda x, t, a, b, c: c(F.silu(a(x)) * b(x)), linear(4, 6), linear(4, 6), linear(6, 4)),
        ROW,
    ),
    "experts": (of(experts, linear(4, 2), linear(4, 4), linear(4, 4)), ROW),
    "class embedding": (
        of(
            lambda x, t, a, e: a(x) + e(torch.arange(len(x)) % 3),
            *(linear(4, 4), partial(nn.Embedding, 3, 4)),
        ),
        ROW,
    ),
    "hypernetwork": (of(hyper, linear(5, 16)), ROW),
    "LoRA": (inner(nn.SiLU, LoRA), ROW),
    "forward hooks": (last_hooked, ROW),
    "weight_norm": (normed(parametrizations.weight_norm), ROW),
    "orthogonal": (normed(parametrizations.orthogonal), ROW),
    "spectral_norm": (normed(parametrizations.spectral_norm), ROW),
    "old spectral_norm": (normed(spectral_norm), ROW),
    "Bilinear": (of(lambda x, t, a: a(x, x.sin()), partial(nn.Bilinear, 4, 4, 4)), ROW),
    "GRUCell": (of(lambda x, t, a: a(x, x.sin()), partial(nn.GRUCell, 4, 4)), ROW),
    "Function": (of(lambda x, t, a, b: b(Sine.apply(a(x))), linear(4, 6), linear(6, 4)), ROW),
    "straight-through Function": (
        of(lambda x, t, a, b: b(Rounded.apply(a(x))), linear(4, 6), linear(6, 4)),
        ROW,
    ),
    "energy": (of(energy, stack(linear(4, 6), nn.Tanh, linear(6, 1))), ROW),
    "DataParallel": (lambda: nn.DataParallel(Of(conv, nn.Linear(4, 6), nn.Linear(6, 4))), ROW),
    "two-dimensional product": (of(lambda x, t, w: torch.mm(x, w).tanh(), torch.eye(4) * 0.5), ROW),
    "matvec": (
        of(lambda x, t, w: torch.stack([torch.mv(w, r).tanh() for r in x]), torch.eye(4) * 0.5),
        ROW,
    ),
    "Fourier features of x": (
        of(lambda x, t, a: a(torch.cat([(2 * x).sin(), (2 * x).cos()], -1)), linear(8, 4)),
        ROW,
    ),
    "SDPA": (of(attention, *QKV), TOKENS),
    "causal SDPA": (of(partial(attention, is_causal=True), *QKV), TOKENS),
    "masked SDPA": (of(partial(attention, attn_mask=torch.ones(3, 3).tril() > 0), *QKV), TOKENS),
    "attention by hand": (of(by_hand, *QKV), TOKENS),
    "attention, sequence first": (of(seq_first, *QKV), TOKENS),
    "attention with distances": (of(biased, *QKV), TOKENS),
    "latent queries": (
        of(
            lambda x, t, k, o, q: o(((q @ k(x).mT).softmax(-1) @ x).mean(1, keepdim=True) + x),
            *(linear(4, 4), linear(4, 4), torch.ones(2, 4) * 0.3),
        ),
        TOKENS,
    ),
    "DeepSet": (
        of(lambda x, t, a, b: b(F.silu(a(x)).sum(1, keepdim=True) + x), linear(4, 4), linear(4, 4)),
        TOKENS,
    ),
    "EGNN": (of(egnn, linear(1, 1)), TOKENS),
    "message passing": (of(messages, linear(4, 4)), TOKENS),
    "sparse message passing": (of(sparse_messages, linear(4, 4)), TOKENS),
    "recurrence": (of(recurrent, linear(8, 4)), TOKENS),
    "MultiheadAttention": (
        of(lambda x, t, a: a(x, x, x)[0], partial(nn.MultiheadAttention, 4, 2, batch_first=True)),
        TOKENS,
    ),
    "MultiheadAttention, sequence first": (
        of(
            lambda x, t, a: a(*(x.transpose(0, 1),) * 3, need_weights=False)[0].transpose(0, 1),
            partial(nn.MultiheadAttention, 4, 2),
        ),
        TOKENS,
    ),
    "TransformerEncoderLayer": (
        of(
            lambda x, t, a: a(x),
            partial(nn.TransformerEncoderLayer, 4, 2, 6, dropout=0.1, batch_first=True),
        ),
        TOKENS,
    ),
    "TransformerEncoder": (
        of(
            lambda x, t, a: a(x),
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(
                    4, 2, 6, activation="gelu", batch_first=True, norm_first=True
                ),
                *(2, nn.LayerNorm(4)),
                enable_nested_tensor=False,
            ),
        ),
        TOKENS,
    ),
    "TransformerDecoderLayer": (
        of(
            lambda x, t, a: a(x, x.flip(1)),
            partial(nn.TransformerDecoderLayer, 4, 2, 6, batch_first=True),
        ),
        TOKENS,
    ),
    "LSTM": (of(lambda x, t, a: a(x)[0], partial(nn.LSTM, 4, 4, batch_first=True)), TOKENS),
    "GRU": (of(lambda x, t, a: a(x)[0], partial(nn.GRU, 4, 4, batch_first=True)), TOKENS),
    "Conv1d": (
        of(conv, partial(nn.Conv1d, 3, 4, 3, padding=1), partial(nn.Conv1d, 4, 3, 1)),
        (2, 3, 5),
    ),
    "ConvTranspose1d": (
        of(conv, partial(nn.Conv1d, 2, 3, 2, 2), partial(nn.ConvTranspose1d, 3, 2, 2, 2)),
        (2, 2, 4),
    ),
    "Conv2d": (
        of(conv, partial(nn.Conv2d, 2, 4, 3, padding="same"), partial(nn.Conv2d, 4, 2, 1)),
        IMAGE,
    ),
    "grouped, dilated Conv2d": (
        of(
            conv,
            partial(nn.Conv2d, 2, 4, 3, padding=2, dilation=2, groups=2),
            partial(nn.Conv2d, 4, 2, 1),
        ),
        IMAGE,
    ),
    "ConvTranspose2d": (
        of(conv, partial(nn.Conv2d, 2, 3, 2, 2), partial(nn.ConvTranspose2d, 3, 2, 2, 2)),
        IMAGE,
    ),
    "Conv3d": (
        of(conv, partial(nn.Conv3d, 1, 2, 3, padding=1), partial(nn.Conv3d, 2, 1, 1)),
        (2, 1, 2, 2, 2),
    ),
    "ConvTranspose3d": (
        of(conv, partial(nn.Conv3d, 1, 2, 2, 2), partial(nn.ConvTranspose3d, 2, 1, 2, 2)),
        (2, 1, 2, 2, 2),
    ),
    "circular padding": (
        of(conv, partial(nn.Conv2d, 2, 2, 3, padding=1, padding_mode="circular")),
        IMAGE,
    ),
    "reflect padding": (
        of(conv, partial(nn.Conv2d, 2, 2, 3, padding=1, padding_mode="reflect")),
        IMAGE,
    ),
    "channels last": (
        of(
            lambda x, t, a: F.silu(a(x.to(memory_format=torch.channels_last))),
            partial(nn.Conv2d, 2, 2, 3, padding=1),
        ),
        IMAGE,
    ),
    "Upsample nearest": (
        of(conv, partial(nn.AvgPool2d, 2), partial(nn.Upsample, scale_factor=2)),
        IMAGE,
    ),
    "Upsample bilinear": (
        of(conv, partial(nn.AvgPool2d, 2), partial(nn.Upsample, scale_factor=2, mode="bilinear")),
        IMAGE,
    ),
    "Upsample bicubic": (
        of(conv, partial(nn.AvgPool2d, 2), partial(nn.Upsample, scale_factor=2, mode="bicubic")),
        IMAGE,
    ),
    "PixelShuffle": (of(conv, partial(nn.PixelUnshuffle, 2), partial(nn.PixelShuffle, 2)), IMAGE),
    "MaxPool2d": (of(conv, partial(nn.MaxPool2d, 2), partial(nn.Upsample, scale_factor=2)), IMAGE),
    "AdaptiveAvgPool2d": (
        of(lambda x, t, a: a(x) * x.sin(), partial(nn.AdaptiveAvgPool2d, 1)),
        IMAGE,
    ),
    "InstanceNorm2d": (of(conv, partial(nn.InstanceNorm2d, 2, affine=True)), IMAGE),
    "BatchNorm2d in evaluation": (of(conv, partial(nn.BatchNorm2d, 2)), IMAGE),
    "Dropout2d in evaluation": (of(conv, partial(nn.Dropout2d, 0.5)), IMAGE),
    "squeeze and excite": (of(squeeze_excite, linear(2, 3), linear(3, 2)), IMAGE),
    "windows": (of(windows, linear(2, 2)), IMAGE),
    "residual convolutions": (partial(Residual, 2, 4), IMAGE),
    "ViT": (ViT, IMAGE),
}
BLOCKS |= {name: (inner(make), ROW) for name, make in ACTIVATIONS.items()}
BLOCKS |= {f"{name} inside": (between(f), ROW) for name, f in FUNCTIONS.items()}


# torch has no second derivative of them.
UNTRAINED = ("attention with distances", "cdist inside")


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BLOCKS)
def test_networks(name: str, way: str) -> None:
    assert_right(*BLOCKS[name], way, name not in UNTRAINED)


class Switched(nn.Module):
    """A function at late times alone."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Linear(4, 6), nn.Linear(6, 4), f

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(self.f(h) if float(t[0]) > 0.5 else h.tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*FUNCTIONS, "Function", "straight-through Function"])
def test_what_changes_after_it_was_seen(name: str) -> None:
    """Known as a plain network by then, and right all the same."""
    functions = {"Function": Sine.apply, "straight-through Function": Rounded.apply}
    f, options = (FUNCTIONS | functions)[name], options_of("exact", ROW)

    def make() -> nn.Module:
        net = Switched(f).double().eval()
        with rows.quiet():
            fewstep.divergence(net, torch.randn(3, 4, dtype=torch.float64), 0.0, **options)
        return net

    trained = f"{name} inside" not in UNTRAINED
    own = call(make, ROW, partial(Switched, f), options=options, grad=trained)
    own.t[:] = torch.tensor([0.6, 0.8, 0.9])
    with rows.quiet():
        assert rows.wrong(own) == []


class Sampled(nn.Module):
    """A model of diffusers: t goes from 0 to 1000, the result has a field."""

    def __init__(self, model: Any, *args: str, **inputs: Any) -> None:
        super().__init__()
        self.model, self.names, self.inputs = model, args, inputs

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        times = (t * 1000).long() if "whole" in self.names else t * 1000
        own = {
            k: v.to(x.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in self.inputs.items()
        }
        out: Tensor = self.model(x, timestep=times, **own).sample
        return out[:, : x.shape[1]]


def words(width: int) -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * width).view(2, 3, width).sin()


def unet2d(diffusers: Any) -> nn.Module:
    model = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return Sampled(model)


def conditioned(diffusers: Any, checkpointed: bool = False) -> nn.Module:
    model = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=4,
    )
    if checkpointed:
        model.enable_gradient_checkpointing()
    return Sampled(model, "whole", encoder_hidden_states=words(4))


def dit(diffusers: Any) -> nn.Module:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        norm_num_groups=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return Sampled(model, "whole", class_labels=torch.tensor([1, 2]))


def sd3(diffusers: Any) -> nn.Module:
    model = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=4,
        pos_embed_max_size=4,
    )
    inputs = {"encoder_hidden_states": words(8), "pooled_projections": words(4)[:, 0]}
    return Sampled(model, **inputs)


def pixart(diffusers: Any) -> nn.Module:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=2,
        num_layers=1,
        norm_num_groups=2,
        sample_size=4,
        patch_size=2,
        cross_attention_dim=8,
        caption_channels=4,
        use_additional_conditions=False,
    )
    added = {"resolution": None, "aspect_ratio": None}
    return Sampled(model, encoder_hidden_states=words(4), added_cond_kwargs=added)


class Flux(nn.Module):
    """Tokens of 4 channels, with positions."""

    def __init__(self, diffusers: Any) -> None:
        super().__init__()
        self.model = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=4,
            pooled_projection_dim=4,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=False,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        text = words(4).to(x.dtype)
        out: Tensor = self.model(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=text,
            pooled_projections=text[:, 0],
            txt_ids=torch.zeros(3, 3),
            img_ids=torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 1, 0]]),
            return_dict=False,
        )[0]
        return out


DIFFUSERS: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = {
    "UNet2DModel": (unet2d, (2, 1, 4, 4)),
    "UNet2DConditionModel": (conditioned, (2, 1, 4, 4)),
    "UNet2DConditionModel, checkpointed": (partial(conditioned, checkpointed=True), (2, 1, 4, 4)),
    "DiTTransformer2DModel": (dit, (2, 1, 4, 4)),
    "SD3Transformer2DModel": (sd3, (2, 1, 4, 4)),
    "PixArtTransformer2DModel": (pixart, (2, 1, 4, 4)),
    "FluxTransformer2DModel": (Flux, (2, 3, 4)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name: str, way: str) -> None:
    with rows.quiet():
        diffusers = pytest.importorskip("diffusers")
        make, shape = DIFFUSERS[name]
        own = call(partial(make, diffusers), shape, options=options_of(way, shape))
        assert rows.wrong(own) == []


@pytest.mark.parametrize("way", WAYS)
def test_einops(way: str) -> None:
    einops = pytest.importorskip("einops")
    layers = pytest.importorskip("einops.layers.torch")

    def body(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
        h = einops.rearrange(a(x), "b (h w) -> b h w", h=2)
        h = h * einops.reduce(h, "b h w -> b h 1", "mean") + einops.repeat(
            t, "b -> b h w", h=2, w=2
        )
        h = einops.einsum(h, h, "b h w, b h v -> b w v")
        return layers.Rearrange("b w v -> b (v w)")(h)  # type: ignore[no-any-return]

    assert_right(of(body, linear(4, 4)), ROW, way)


def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def gated(own: Callable[[Tensor], Tensor] = gate) -> nn.Module:
    return Of(lambda x, t, a, b: b(own(a(x))), nn.Linear(4, 6), nn.Linear(6, 4))


class Timed(nn.Module):
    """For tools that want two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.b(F.silu(self.a(x))) * (1 + t[:, None])
        return out


def inputs(net: nn.Module) -> tuple[Tensor, Tensor]:
    dtype = next(net.parameters()).dtype
    return torch.zeros(ROW, dtype=dtype), torch.zeros(ROW[:1], dtype=dtype)


class Late(nn.Module):
    """Made when it is first called, and so in the dtype that it has by then."""

    def __init__(self, net: nn.Module, wrap: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.net, self.wrap = net, wrap
        self.made: dict[str, Any] = {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if not self.made:
            self.made["net"] = self.wrap(self.net)
        out: Tensor = self.made["net"](x, t)
        return out


TOOLS: dict[str, Callable[[], nn.Module]] = {
    "scripted function": lambda: gated(torch.jit.script(gate)),
    "scripted module": lambda: torch.jit.script(Timed()),
    "traced module": lambda: Late(Timed(), lambda m: torch.jit.trace(m, inputs(m))),
    "exported module": lambda: Late(Timed(), lambda m: torch.export.export(m, inputs(m)).module()),
    "symbolic trace": lambda: torch.fx.symbolic_trace(Timed()),
    "compiled module": lambda: torch.compile(Timed(), backend="eager"),  # type: ignore[dict-item]
    "compiled in place": lambda: compiled_in_place(Timed()),
    "compiled submodule": lambda: compiled_submodule(Timed()),
    "deep copy": lambda: copy.deepcopy(Timed()),
    "old weight_norm": normed(weight_norm),
    "frozen": lambda: Timed().requires_grad_(False),
}
PLAIN = {
    "scripted function": gated,
    "old weight_norm": TOOLS["old weight_norm"],
    "frozen": TOOLS["frozen"],
}


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def compiled_submodule(net: Timed) -> nn.Module:
    net.a = torch.compile(net.a, backend="eager")  # type: ignore[assignment]
    return net


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TOOLS)
def test_tools(name: str, way: str) -> None:
    torch.compiler.reset()
    with rows.quiet():
        plain = PLAIN.get(name, Timed)
        own = call(TOOLS[name], ROW, plain, options=options_of(way, ROW))
        assert rows.wrong(own) == []


def test_quantised() -> None:
    """Linear layers of 8 bits: piecewise constant, so that the trace is 0, or it is refused."""
    net = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)).eval()
    with rows.quiet():
        low = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
        x = torch.randn(3, 4)
        try:
            out = fewstep.divergence(low, x, 0.0, estimator="exact")
        except (ValueError, RuntimeError):
            return
        torch.testing.assert_close(out.velocity, low(x))
        assert torch.equal(out.value, torch.zeros(3))


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
@pytest.mark.parametrize("make", [partial(nn.Dropout, 0.5), partial(DropPath, 0.5)])
def test_one_mask_a_call(make: Callable[[], nn.Module], estimator: str) -> None:
    """Dropout in training: the trace is that of the velocity that is returned."""
    net = Of(lambda x, t, drop: drop(x), make()).train()
    x = torch.randn(16, 4) + 3
    for _ in range(2):
        with rows.quiet():
            out = fewstep.divergence(net, x, 0.0, estimator=estimator)
        torch.testing.assert_close(out.value, (out.velocity / x).sum(1))
        assert 0 < float((out.velocity == 0).float().mean()) < 1


def test_batch_norm_in_training_says_what_to_do() -> None:
    for net in (nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))):
        velocity = SimpleNamespace(net=net)
        with pytest.raises(ValueError, match=r"eval\(\)"):
            fewstep.divergence(lambda x, t, v=velocity: v.net(x), torch.randn(6, 4), 0.0)
