"""Rules of the dual engine: each torch function against its own derivatives in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep
from fewstep.ops.dual import heads
from fewstep.ops.dual.source import Source
from fewstep.ops.dual.traced import RULES, UnsupportedError
from support.rules import F64, V, W, check, jacobians
from tolerances import assert_contract

Function = Callable[[Tensor], Any]
MASK = torch.tensor([True, False, True, True])
INDEX = torch.tensor([2, 0, 1, 3])
OWN = torch.tensor([[2, 0, 1, 1], [3, 3, 1, 0], [0, 1, 2, 2]])
S = torch.tensor([[0.3], [1.2], [-0.4]], dtype=F64)  # of each sample


def through(change: Function) -> Function:
    """What was changed in place, by the name that it had before."""

    def run(h: Tensor) -> Tensor:
        h = h * 1
        change(h)
        return h

    return run


UNARY = (
    "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square abs sin cos tan sinh cosh"
    " asin acos atan asinh atanh erf erfc neg tanh sigmoid relu"
)
ACTIVATIONS: dict[str, Function] = {
    "elu": lambda h: F.elu(h, 1.3),
    "elu in place": through(lambda h: F.elu(h, 1.3, True)),
    "celu": lambda h: F.celu(h, alpha=0.7),
    "selu": F.selu,
    "leaky_relu": lambda h: F.leaky_relu(h, 0.2),
    "leaky_relu in place": through(lambda h: F.leaky_relu(h, inplace=True)),
    "relu6": lambda h: F.relu6(4 * h),
    "hardtanh": lambda h: F.hardtanh(h, -0.5, 0.6),
    "hardsigmoid": lambda h: F.hardsigmoid(3 * h),
    "hardswish": lambda h: F.hardswish(3 * h),
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "prelu": lambda h: F.prelu(h, V),
    "prelu of one": lambda h: F.prelu(h, V[:1]),
    "silu in place": through(lambda h: F.silu(h, inplace=True)),
    "relu in place": through(lambda h: F.relu(h, True)),
    "relu_": through(torch.relu_),
    "dropout in place": through(lambda h: F.dropout(h, 0.5, False, True)),
    "softplus": lambda h: F.softplus(h, beta=2),
    "gelu": lambda h: F.gelu(h, approximate="tanh"),
}
ARITHMETIC: dict[str, Function] = {
    "scalar": lambda h: 1 - h + 2 * h - h / 3,
    "x**2": lambda h: h**2 + h.pow(3) + torch.pow(h, 1),
    "roots": lambda h: (h * h + 0.1) ** 0.5,
    "2**x": lambda h: 2**h + torch.pow(2.5, h),
    "1/x": lambda h: 1 / (1 + h * h) + V / (2 + h.cos()),
    "x/x": lambda h: h / (1 + h * h) + h.div(h.exp()),
    "rows": lambda h: h.sum(1, keepdim=True) * W[:3] + S * h + S,
    "x%": lambda h: h % 1.0 + torch.fmod(h, 0.7),
    "keywords": lambda h: torch.add(input=V, other=h, alpha=2) - torch.mul(input=h, other=V),
    "alpha": lambda h: torch.sub(V, h, alpha=3) + torch.rsub(h, V, alpha=2) + h.sub(h, alpha=0.5),
    "lerp": lambda h: torch.lerp(h, h * h, 0.3) + torch.addcmul(V, h, h, value=2),
    "+=": through(lambda h: h.add_(V).mul_(V).sub_(2).div_(V)),
    "clamp": lambda h: h.clamp(-0.3, 0.6) + torch.clip(h, max=0.2) + h.clamp_min(0.1),
    "clamp_": through(lambda h: h.clamp_(min=-0.4)),
    "where": lambda h: torch.where(MASK, h, h * h) + torch.where(h > 0, h, 0.2),
    "where plain": lambda h: torch.where(MASK, V, h) + h.where(h < 0.1, torch.tensor(2.0)),
    "masked_fill": lambda h: h.masked_fill(MASK, 3.0) + h * (h >= 0.1) + h * (h != h),
    "maximum": lambda h: torch.maximum(h, V) + torch.minimum(h * h, h),
    "abs": lambda h: abs(h) - torch.absolute(h * V),
    "detach": lambda h: h * h.detach() + torch.ones_like(h) * h.new_zeros(4) + h.sign() * h,
    "clamp by tensors": lambda h: h.clamp(torch.tensor(-0.2), V) + torch.clamp(h, max=S),
    "clip_": through(lambda h: h.clip_(-0.3, 0.5)),
    "powers by tensors": lambda h: (1 + h * h) ** S + (1 + h * h).pow(V) + V**h,
    "atan2": lambda h: torch.atan2(h, 1 + h * h) + torch.atan2(V, 2 + h) + h.atan2(V),
    "nan_to_num": lambda h: torch.nan_to_num(h) * h,
    "glu": lambda h: F.glu(torch.cat([h, h * h], 1), 1),
    "clone in place": lambda h: _twice(h * 1),
}
SHAPES: dict[str, Function] = {
    "stack": lambda h: torch.stack([h, V.expand(3, 4), h * h], 1).sum(1),
    "stack last": lambda h: torch.stack((h, h * h), dim=-1).mean(dim=-1),
    "expand": lambda h: h[:, :1].expand(3, 4) + h[:, 1:2].expand(-1, 4) + h[:, 2:3].expand_as(h),
    "broadcast_to": lambda h: torch.broadcast_to(h[:, :1], (3, 4)) * h,
    "repeat": lambda h: h[:, :2].repeat(1, 2),
    "unbind": lambda h: torch.stack([a * b for a, b in zip(*[h.unbind(1)] * 2, strict=True)], 1),
    "pad": lambda h: F.pad(h, (1, 2))[:, 1:5] * F.pad(h[:, :3], (0, 1), value=2.0),
    "pad around": lambda h: F.pad(h[:, None], (1, 1), "circular")[:, 0, :4] * h,
    "T": lambda h: h.view(3, 2, 2).mT.reshape(3, 4),
    "permute": lambda h: torch.permute(h.view(size=(3, 2, 2)), dims=(0, -1, 1)).flatten(1),
    "permute method": lambda h: h.view(3, 2, 2).permute(dims=(0, 2, 1)).reshape(shape=(3, 4)),
    "swapaxes": lambda h: h.unflatten(-1, (2, -1)).swapaxes(axis0=1, axis1=-1).flatten(1),
    "movedim": lambda h: h.view(3, 2, 2, 1).movedim((1, 2), (2, 1)).flatten(1),
    "squeeze": lambda h: h[:, None].squeeze() + h[:, None, :, None].squeeze((1, 3)),
    "split": lambda h: torch.cat(h.split(split_size=2, dim=1)[::-1], axis=1),
    "split_with_sizes": lambda h: torch.cat(h.split_with_sizes((1, 3), 1)[::-1], -1),
    "tile": lambda h: h[:, :2].tile((1, 2)) * torch.tile(h, (1,)),
    "repeat_interleave": lambda h: h[:, :2].repeat_interleave(2, 1) * h,
    "torch.split": lambda h: torch.cat(torch.split(h, [1, 3], 1)[::-1], -1),
    "narrow": lambda h: torch.cat([h.narrow(1, 1, 3), h.select(1, 0)[:, None]], 1),
    "indices": lambda h: h[:, INDEX] * h[..., INDEX[:2]].repeat(1, 2) + h[:, [0, 1, 1, 2]],
    "mask": lambda h: torch.cat([h[:, MASK], h[:, ~MASK]], 1) * h.index_select(1, INDEX),
    "flatten the batch": lambda h: h.view(3, 2, 2).flatten(0, 1).square().view(3, 4),
    "view_as": lambda h: h.view(3, 2, 2).view_as(V.expand(3, 4)),
    "roll": lambda h: h.roll(1, 1) * h.flip(1) + torch.flip(h, dims=[-1]),
    "to": lambda h: h.to(F64).to(V).double().type_as(V).contiguous() + h.to(h, copy=True),
    "channels_last": lambda h: h.view(3, 1, 2, 2).to(memory_format=torch.channels_last).flatten(1),
    "numpy names": lambda h: h - h.mean(axis=1, keepdims=True) + h.sum(1, True, dtype=F64),
}
REDUCED: dict[str, Function] = {
    "var": lambda h: h * torch.var(h, 1, keepdim=True) + h.var(1, False, True),
    "var_mean": lambda h: (
        h * torch.var_mean(h, 1, keepdim=True)[0] + torch.std_mean(h, 1)[0][:, None]
    ),
    "amax": lambda h: h * h.amax(1, keepdim=True) + torch.amin(h, dim=-1)[:, None],
    "amax of equal ones": lambda h: h * torch.stack([h, h, h * 0 - 9], 1).amax((1, 2))[:, None],
    "index_add": lambda h: torch.zeros_like(h).index_add(1, INDEX[:2], h[:, 1:3], alpha=2) + h,
    "scatter_add": lambda h: h.scatter_add(1, OWN, h * h),
    "bilinear": lambda h: F.bilinear(h, h.sin(), torch.stack([W, W.T]), V[:2]).repeat(1, 2),
    "mm": lambda h: torch.mm(h, W).tanh() + torch.addmm(V, h, W, beta=0.5, alpha=2),
    "baddbmm": lambda h: torch.baddbmm(h[:, None], h[:, None], h[:, :, None] * W)[:, 0],
    "cross": lambda h: F.pad(torch.linalg.cross(h[:, 1:], h[:, :3]), (0, 1)) * h,
    "einsum of dots": lambda h: torch.einsum("...i,ij", h, W) + torch.einsum("...,...->...", h, h),
    "local_response_norm": lambda h: F.local_response_norm(h.view(3, 4, 1), 2).flatten(1),
    "var correction": lambda h: h * torch.var(h, dim=(1,), correction=0, keepdim=True),
    "std": lambda h: h * h.std(1, keepdim=True) + h.std(-1)[:, None],
    "norm": lambda h: h * h.norm(dim=1, keepdim=True) + torch.norm(h, p=1, dim=1)[:, None],
    "vector_norm": lambda h: h * torch.linalg.vector_norm(h, dim=1, keepdim=True),
    "linalg.norm": lambda h: h * torch.linalg.norm(h, dim=1, keepdim=True),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "softmax": lambda h: h.softmax(1) + torch.softmax(h, dim=-1) * F.softmax(h, -1),
    "log_softmax": lambda h: F.log_softmax(h, 1) + torch.log_softmax(h * h, -1, dtype=F64),
    "logsumexp": lambda h: h * torch.logsumexp(h, 1, keepdim=True) + h.logsumexp(-1)[:, None],
    "max": lambda h: h * h.max(1, keepdim=True)[0] + torch.min(h, dim=1).values[:, None],
    "sort": lambda h: h * torch.sort(h, 1)[0] + h.topk(2, 1).values.repeat(1, 2),
    "gather": lambda h: h * h.gather(1, OWN) + h.argmax(1, True),
    "einsum": lambda h: torch.einsum("bi,ij,bj,b->bj", h, W, h, S[:, 0]),
    "einsum of one": lambda h: torch.einsum("bij->bji", h.view(3, 2, 2)).flatten(1),
    "matmul": lambda h: (h.view(3, 2, 2) @ h.view(3, 2, 2)).flatten(1) + (W @ h[..., None])[..., 0],
    "cdist": lambda h: torch.cdist(h.view(3, 2, 2), h.view(3, 2, 2) ** 2).flatten(1),
    "cdist to itself": lambda h: torch.cdist(h.view(3, 4, 1), h.view(3, 4, 1)).tanh().sum(2),
    "cdist to plain": lambda h: torch.cdist(W, h.view(3, 2, 2).repeat(1, 1, 2)).sum(2),
    "layer_norm": lambda h: F.layer_norm(1 - h, (4,)) + F.rms_norm(2 * h - 1, (4,)),
    "group_norm": lambda h: F.group_norm(1 + h.view(3, 4), 2) + F.group_norm(h + V, 2, V, V),
    "instance_norm": lambda h: F.instance_norm(1 - h.view(3, 2, 2)).flatten(1),
    "rotary": lambda h: torch.view_as_real(
        torch.view_as_complex(h.view(3, 2, 2)) * torch.polar(V[:2], V[2:]) * 1j
    ).flatten(1),
    "complex of each": lambda h: (
        (torch.view_as_complex(h.view(3, 1, 2, 2)).flatten(1) * torch.polar(S + 2, S) / (1 + 2j))
        .conj()
        .reshape(3, 2, 1)
        .transpose(1, 2)
        .imag.repeat(1, 1, 2)[:, 0]
        * (2 if torch.view_as_complex(h.view(3, 2, 2)).is_complex() else 1)
    ),
    "fft": lambda h: torch.fft.irfft(torch.fft.rfft(h * h, dim=1) * (1 + 2j), n=4, dim=1),
    "fft of complex": lambda h: torch.fft.ifft(
        torch.fft.fft(torch.view_as_complex(h.view(3, 2, 2)), norm="ortho") * (V[:2] + 1j)
    ).real.repeat(1, 2),
    "positions": lambda h: F.group_norm(h.view(3, 2, 2) + V[:2], 1).flatten(1),
}
PICTURES: dict[str, Function] = {
    "max_pool2d": lambda h: F.interpolate(F.max_pool2d(h, 2, 1), size=(4, 4), mode="bilinear"),
    "adaptive": lambda h: F.interpolate(F.adaptive_avg_pool2d(h, 2), scale_factor=2),
    "repeated": lambda h: F.avg_pool2d(
        F.interpolate(h * h, scale_factor=(3, 2)) * torch.linspace(0, 1, 8, dtype=F64), (3, 2)
    ),
    "nearest of a size": lambda h: F.interpolate(h, size=(8, 6))[:, :, 2:6, 1:5] * h,
    "antialias": lambda h: F.interpolate(h, size=(4, 4), mode="bicubic", antialias=True) * h,
    "pad reflect": lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect")[:, :, :4, 1:5] * h,
    "unfold": lambda h: F.fold(F.unfold(h * h, 2), (4, 4), 2),
    "conv_transpose3d": lambda h: F.conv_transpose3d(h[:, None], W[None, None, None, :3, :3])[
        :, 0, :, 1:5, 1:5
    ],
    "instance_norm": lambda h: F.instance_norm(1 - h, weight=V[:1], bias=V[1:2]),
    "fft2": lambda h: torch.fft.irfft2(torch.fft.rfft2(h) * W[:, :3], s=(4, 4)) * h,
    "fftn": lambda h: (
        torch.fft.ifftn(
            torch.fft.fftn(torch.view_as_complex(torch.stack([h, h * h], -1)), dim=(2, 3)) * W,
            dim=(2, 3),
        ).imag
    ),
    "stats": lambda h: h - h.mean((2, 3), keepdim=True) / h.std(dim=(1, 2, 3))[:, None, None, None],
}


def _twice(h: Tensor) -> Tensor:
    copy = h.clone()
    copy += 1
    copy *= V
    return copy + h


CASES: dict[str, Function] = {
    **{name: lambda h, f=name: getattr(torch, f)(0.4 * h.tanh() + 0.5) for name in UNARY.split()},
    **ACTIVATIONS,
    **ARITHMETIC,
    **SHAPES,
    **REDUCED,
}


def distances(x: Tensor, y: Tensor) -> Tensor:
    """`torch.cdist`, which has one derivative alone."""
    squares = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), 0)


# Of what torch has one derivative of alone, or in float32.
RIGHT: dict[str, Function] = {"hardsigmoid": lambda h: (3 * h + 3).clamp(0, 6) / 6}
ROUNDED = {"celu": 1e-7, "hardsigmoid": 1e-7}


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f = CASES[name]

    def right(h: Tensor) -> Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(torch, "cdist", distances)
            return f(h)  # type: ignore[no-any-return]

    check(f, (3, 4), ROUNDED.get(name, 1e-10), RIGHT.get(name, right if "cdist" in name else None))


@pytest.mark.parametrize("name", PICTURES)
def test_rule_of_pictures(name: str) -> None:
    check(PICTURES[name], (2, 1, 4, 4), 1e-10)


# Terms that torch casts to the dtype of x, and terms that change the result's dtype.
TERMS: dict[str, Tensor | float] = {
    "number": -1,
    "truth": True,
    "scalar": torch.tensor(0.5),
    "scalar in float64": torch.tensor(0.3, dtype=F64),
    "int64 of each sample": torch.tensor([[1], [2], [3]]),
    "uint8": torch.tensor([1, 2, 3, 4], dtype=torch.uint8),
    "mask": torch.arange(4) > 1,
    "one": torch.tensor([0.7]),
    "row of one": torch.tensor([[0.7]]),
    "row": torch.linspace(0, 1, 4),
    "float16": torch.linspace(0, 1, 4).half(),
    "each": torch.linspace(0, 1, 12).reshape(3, 4),
    "columns": torch.linspace(0, 1, 3)[:, None],
}
WIDER: dict[str, Tensor] = {
    "float64": torch.linspace(0, 1, 4, dtype=F64),
    "float64 of each": torch.linspace(0, 1, 3, dtype=F64)[:, None],
}
READERS: dict[str, Function] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "layer_norm": lambda h: F.layer_norm(h, (4,)),
    "rms_norm": lambda h: F.rms_norm(h, (4,)),
    "group_norm": lambda h: F.group_norm(h, 2),
    "nothing": lambda h: h * h,
}
USES: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda h, c: h + c,
    "c - h": lambda h, c: c * 1 - h,
    "*": lambda h, c: h * c,
    "/": lambda h, c: h / (c + 3),
    "+=": lambda h, c: through(lambda own: own.add_(c))(h),
    "where": lambda h, c: torch.where(MASK, h, c),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.pairwise
@pytest.mark.parametrize("term", TERMS)
def test_terms_are_cast_as_torch_does(
    reader: str, term: str, backend: str, dtype: torch.dtype
) -> None:
    x, c = torch.randn(3, 4, dtype=dtype), TERMS[term]
    for name, use in USES.items():
        if reader != "nothing" and name != "+":
            continue

        def v(x: Tensor, t: Tensor, use: Any = use) -> Tensor:
            h = use(x * 1, c)
            return READERS[reader](h) + use(h, c)  # type: ignore[no-any-return]

        if torch.result_type(x, c) != dtype:
            continue
        out = fewstep.divergence(v, x, 0.0, estimator="exact", backend=backend)
        exact = jacobians(v, x.double(), x).diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(out.velocity, v(x, x))
        assert_contract("value", out.value, exact)


@pytest.mark.parametrize("term", WIDER)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_terms_of_wider_dtypes_widen_the_result(reader: str, term: str, backend: str) -> None:
    x, c = torch.randn(3, 4), WIDER[term]
    for name, use in USES.items():
        if name == "where":
            continue

        def v(x: Tensor, t: Tensor, use: Any = use) -> Tensor:
            h = x * 2 + 1
            return READERS[reader](use(h, c) + h).to(x.dtype)  # type: ignore[no-any-return]

        out = fewstep.divergence(v, x, 0.0, estimator="exact", backend=backend)
        exact = jacobians(v, x.double(), x).diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(out.velocity, v(x, x))
        assert_contract("value", out.value, exact)


def test_terms_without_a_rule_are_left_to_torch() -> None:
    x, c = torch.randn(3, 4), torch.linspace(0, 1, 4, dtype=F64)
    v = lambda x, t: torch.where(MASK, x, c).to(x.dtype)  # noqa: E731
    out = fewstep.divergence(v, x, 0.0, estimator="exact")
    assert out.info.startswith("torch.func: no rule")
    torch.testing.assert_close(out.velocity, v(x, x))


# Names that `get_testing_overrides` has and torch does not take.
INVENTED = {
    *(("swapdims", "axis0"), ("swapdims", "axis1"), ("swapaxes", "dim0"), ("swapaxes", "dim1")),
    *(("permute", "dim"), ("unsqueeze", "out"), ("squeeze", "out"), ("split", "tensor")),
    *(("split", "split_size_or_sections"), ("where", "x"), ("where", "y"), ("__getitem__", "idx")),
    *(("__rsub__", "out"), ("__rpow__", "out"), ("__rpow__", "exponent"), ("__rmatmul__", "out")),
    *(("split_with_sizes", "tensor"), ("split_with_sizes", "split_size_or_sections")),
    *(("linalg_vector_norm", "input"), ("linalg_norm", "input"), ("logsumexp", "names")),
}


@pytest.mark.filterwarnings("ignore")  # of names that torch is about to drop
def test_rules_know_all_options_of_their_functions() -> None:
    known = torch.overrides.get_testing_overrides()
    open_kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    missing = set()
    for function, rule in RULES.items():
        own = inspect.signature(rule).parameters
        if any(p.kind == open_kinds[0] for p in own.values()) or function not in known:
            continue
        for name, p in inspect.signature(known[function]).parameters.items():
            if p.kind not in open_kinds and name not in ("self", *own):
                missing.add((function.__name__, name))
    assert missing <= INVENTED


OPTIONS: dict[str, Function] = {
    "dtype": lambda h: h.sum(1, keepdim=True, dtype=torch.float32).double() + h,
    "view as bits": lambda h: h.view(torch.int64) * 0.0,
    "view as dtype": lambda h: h.view(dtype=torch.int64) * 0.0,
    "softmax dtype": lambda h: h.softmax(1, dtype=torch.float32).double(),
    "rounding": lambda h: torch.div(h, 0.3, rounding_mode="floor") + h,
    "complex": lambda h: (h + torch.tensor(1j)).real,
    "complex number": lambda h: (h * 1j).imag,
    "whole": lambda h: h.long().double(),
    "max over all": lambda h: h * 0 + h.max(),
    "running statistics": lambda h: F.instance_norm(h[:, None], V[:1] * 0, V[:1]).flatten(1),
    "view in place": through(lambda h: h[:, :2].mul_(2.0)),
    "its view in place": lambda h: _viewed_and_changed(h * 1),
    "item": lambda h: h * float(h.detach()[0, 0]) + h * h[0, 0].item(),
    "assignment": lambda h: _assigned(h * 1),
    "rows": lambda h: h[torch.tensor([0, 1, 2])],
    "apart": lambda h: h.view(3, 2, 1, 2)[:, [0, 1], :, [0, 1]].flatten(0, 1)[:3] * h[:, :1],
}


def _viewed_and_changed(h: Tensor) -> Tensor:
    view = h[:, :2]
    h.mul_(2.0)
    return h + torch.cat([view, view], 1)


def _assigned(h: Tensor) -> Tensor:
    h[:, 0] = 0.5
    return h


@pytest.mark.parametrize("name", OPTIONS)
def test_options_without_a_rule_are_refused(name: str) -> None:
    """Never ignored: the error is that of a rule, or that there is none."""
    x = torch.randn(3, 4, dtype=F64)
    v = lambda x, t: OPTIONS[name](x * 1)  # noqa: E731
    source = Source("reference", 4, tangents=torch.eye(4, dtype=F64)[:, None])
    with pytest.raises(UnsupportedError):
        heads.products(v, x, None, source)


@pytest.mark.parametrize("change", [lambda x: x.mul_(2.0), lambda x: F.relu(x, inplace=True)])
def test_x_itself_is_not_changed_in_place(change: Function) -> None:
    x, source = torch.randn(3, 4), Source("cpp", 4, tangents=torch.eye(4)[:, None])
    before = x.clone()
    with pytest.raises(UnsupportedError, match="change in place"):
        heads.products(lambda x, t: change(x), x, None, source)
    assert torch.equal(x, before)


MIXED: dict[str, Function] = {
    "groups of samples": lambda h: (h.view(2, 2, 4) - h.view(2, 2, 4).mean(1, True)).view(4, 4),
    "batch as channels": lambda h: F.conv1d(h, torch.ones(4, 4, 1, dtype=F64)),
    "batch as pixels": lambda h: F.pixel_shuffle(h.view(4, 2, 2), 2).reshape(4, 4),
    "a mask of each": lambda h: torch.einsum("bi,ci->bc", h, h),
    "transposed": lambda h: h.view(4, 4).T @ h,
    "expanded batch": lambda h: h.view(4, 1, 4).expand(4, 4, 4).transpose(0, 1)[:, 0],
    "mean of the batch": lambda h: h - h.T.mean(1),
    "softmax over the batch": lambda h: h.T.softmax(-1).T,
    "norm over the batch": lambda h: F.layer_norm(h.T, (4,)).T,
    "linear over the batch": lambda h: F.linear(h.T, torch.ones(4, 4, dtype=F64)).T,
    "batch beside itself": lambda h: h + h.T,
    "batch by rows": lambda h: h.T * V,
    "parts of samples": lambda h: torch.stack(torch.cat([h, h]).chunk(4)).sum(0).repeat(2, 1),
    "einsum of rows": lambda h: torch.einsum("bi,jb->ij", h, h),
    "Fourier transform of the batch": lambda h: torch.view_as_real(torch.fft.fft(h, dim=0))[..., 0],
    "index of the batch": lambda h: h.T[:, [0, 1, 2, 3]].T,
    "sorted batch": lambda h: h.T.sort(1)[0].T,
    "vector": lambda h: F.linear(h.flatten(), torch.ones(16, 16, dtype=F64)).view(4, 4),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_samples_has_no_rule(name: str) -> None:
    x = torch.randn(4, 4, dtype=F64)
    source = Source("reference", 4, tangents=torch.eye(4, dtype=F64)[:, None])
    with pytest.raises(UnsupportedError):
        heads.products(lambda x, t: MIXED[name](x), x, None, source)


def test_rows_that_attend_to_nothing() -> None:
    mask = torch.tensor([[True, False], [False, False]])

    def attend(h: Tensor) -> Tensor:
        h = h.view(3, 2, 2)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=mask).flatten(1) + h.flatten(1)

    with sdpa_kernel(SDPBackend.MATH):
        check(attend, (3, 4), 1e-10)


def test_batch_norm_in_training_is_named() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"BatchNorm in training.*eval"):
        fewstep.divergence(net, torch.randn(3, 4), 0.0)


CHAINS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "in place": lambda x, a, b: F.linear(_relu(F.linear(x, a)), b),
    "in place at the end": lambda x, a, b: _relu(F.linear(F.silu(F.linear(x, a)), b)),
    "in place and twice": lambda x, a, b: _twice_used(F.linear(x, a), b),
    "int64": lambda x, a, b: F.linear(F.silu(F.linear(x, a) + torch.arange(3)[:, None]), b) + 1,
    "float64": lambda x, a, b: F.linear(torch.tanh(F.linear(x, a) + torch.tensor(0.3).double()), b),
    "mask": lambda x, a, b: F.linear(F.silu(F.linear(x, a)) * (torch.arange(4) > 1), b),
    "int64 before": lambda x, a, b: F.linear(
        F.silu(F.linear(torch.cat([x, torch.arange(6).view(3, 2)], 1)[:, :4], a)), b
    ),
}


def _relu(h: Tensor) -> Tensor:
    F.relu(h, inplace=True)
    return h


def _twice_used(h: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.silu(h, inplace=True), b) + h


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_terms_and_changes_in_place_of_linear_layers(name: str, estimator: str) -> None:
    """By whichever way a network of linear layers is served."""
    x, a, b = torch.randn(3, 4), torch.randn(4, 4), torch.randn(4, 4)
    v = lambda x, t: CHAINS[name](x, a.to(x.dtype), b.to(x.dtype))  # noqa: E731
    options: Any = {"estimator": estimator, "probes": 4, "probe": "hadamard"}
    out = fewstep.divergence(v, x, 0.0, **options)
    torch.testing.assert_close(out.velocity, v(x, None))
    exact = jacobians(v, x.double(), x).diagonal(dim1=1, dim2=2).sum(1)
    assert_contract("value", out.value, exact)
