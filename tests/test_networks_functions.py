"""Activations and functions of torch between the layers of a small network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewstep
from support import rows
from support.functions import Rounded, Sine
from support.networks import ROW, WAYS, Of, assert_right, call, inner, options_of


def between(f: Callable[[Tensor], Tensor], width: int = 6) -> Callable[[], nn.Module]:
    """A function of the hidden values of a small network."""

    def body(x: Tensor, t: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        return b(f(a(x))) * (1 + t[:, None])  # type: ignore[no-any-return]

    def make() -> nn.Module:
        return Of(body, nn.Linear(4, width), nn.Linear(width, 4))

    return make


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


BLOCKS = {name: inner(make) for name, make in ACTIVATIONS.items()}
BLOCKS |= {f"{name} inside": between(f) for name, f in FUNCTIONS.items()}
UNTRAINED = ("cdist inside",)  # torch has no second derivative of it


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BLOCKS)
def test_networks(name: str, way: str) -> None:
    assert_right(BLOCKS[name], ROW, way, name not in UNTRAINED)


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
