"""Rules of sums over axes, pooling, resampling, and choice by value."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual.engine import Dual, same
from fewstep.ops.dual.rules.plain import axes, inside, is_number, primal, refuse
from fewstep.ops.dual.source import plain
from fewstep.ops.dual.traced import Rule, UnsupportedError, register


def _reduced(name: str) -> Rule:
    def rule(
        input: Dual, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None
    ) -> Dual:
        if dtype not in (None, input.dtype) or out is not None:
            raise UnsupportedError(f"no rule for {name} as {dtype}")
        own = axes(input, dim)
        return same(input, lambda z: getattr(z, name)(own, keepdim))  # type: ignore[no-any-return]

    return rule


for _name in ("sum", "mean"):
    register(getattr(torch, _name), getattr(torch.Tensor, _name))(_reduced(_name))


def _summed_at(name: str) -> Rule:
    """`index_add` or `scatter_add`: sums at places that do not depend on x."""

    def rule(input: Any, dim: int, index: Tensor, source: Any, alpha: Any) -> Any:
        h: Dual = source if isinstance(source, Dual) else input
        if isinstance(index, Dual) or not isinstance(source, Dual) or input.ndim != source.ndim:
            raise UnsupportedError(f"no rule for {name} but of what depends on x")
        if input.shape[0] != source.shape[0] or input.dtype != source.dtype:
            raise UnsupportedError(f"no rule for {name} into {tuple(input.shape)}")
        (own,) = inside(h, dim)
        shape = tuple(input.shape)

        def summed(z: Tensor) -> Tensor:
            zeros = z.new_zeros((z.shape[0], *shape[1:]))
            if name == "index_add":
                return zeros.index_add(own, index, z)
            at = index.repeat(z.shape[0] // shape[0], *(1,) * (index.ndim - 1))
            return zeros.scatter_add(own, at, z)

        out = same(source if alpha == 1 else source * alpha, summed)
        return input + out

    return rule


@register(torch.index_add, torch.Tensor.index_add)
def _index_add(
    input: Any, dim: int, index: Tensor, source: Any, *, alpha: Any = 1, out: Any = None
) -> Any:
    refuse({"out": out})
    return _summed_at("index_add")(input, dim, index, source, alpha)


@register(torch.scatter_add, torch.Tensor.scatter_add)
def _scatter_add(input: Any, dim: int, index: Tensor, src: Any, **rest: Any) -> Any:
    refuse(rest)
    if not isinstance(src, Dual) or index.shape != src.shape:
        raise UnsupportedError("no rule for scatter_add of parts")
    return _summed_at("scatter_add")(input, dim, index, src, 1)


def _each(function: Callable[..., Tensor], least: int, most: int) -> Rule:
    """Of a function that is linear in each channel of each sample, for so many axes."""

    def rule(input: Dual, *args: Any, **kwargs: Any) -> Dual:
        if not least <= input.ndim <= most:
            raise UnsupportedError(f"no rule for {function.__name__} of {input.ndim} axes")
        return same(input, lambda z: function(z, *args, **kwargs))  # type: ignore[no-any-return]

    return rule


for _function, _least, _most in (
    (F.avg_pool1d, 3, 3),
    (F.avg_pool2d, 4, 4),
    (F.avg_pool3d, 5, 5),
    (F.adaptive_avg_pool1d, 3, 3),
    (F.adaptive_avg_pool2d, 4, 4),
    (F.adaptive_avg_pool3d, 5, 5),
    (F.pixel_shuffle, 4, 9),
    (F.pixel_unshuffle, 4, 9),
    (F.unfold, 4, 4),
    (F.fold, 3, 3),
):
    register(_function)(_each(_function, _least, _most))


class _Repeated(torch.autograd.Function):
    """Each pixel of `[N, C, H, W]` several times, as nearest neighbours: torch copies thrice."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rows: int, columns: int) -> Tensor:
        n, c, h, w = z.shape
        ctx.shape = (n, c, h, rows, w, columns)
        out = z.new_empty(ctx.shape)
        for i in range(columns):
            out[:, :, :, 0, :, i] = z
        for i in range(1, rows):
            out[:, :, :, i] = out[:, :, :, 0]
        return out.view(n, c, h * rows, w * columns)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        own = g.reshape(ctx.shape)
        lines = functools.reduce(torch.add, own.unbind(3))  # faster than a sum over both
        return functools.reduce(torch.add, lines.unbind(4)), None, None


@register(F.interpolate)
def _interpolate(
    input: Dual,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Dual:
    if not 3 <= input.ndim <= 5:
        raise UnsupportedError(f"no rule for interpolate of {input.ndim} axes")

    def resized(z: Tensor) -> Tensor:
        options = (mode, align_corners, recompute_scale_factor, antialias)
        return F.interpolate(z, size, scale_factor, *options)

    whole = mode == "nearest" and input.ndim == 4 and size is None and not plain()
    factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * 2
    if not whole or any(not is_number(f) or f < 1 or f != int(f) for f in factors):
        return same(input, resized)  # type: ignore[no-any-return]
    own = [int(f) for f in factors]

    def repeated(z: Tensor) -> Tensor:
        if z.device.type != "cpu" or not z.is_contiguous():
            return resized(z)
        return _Repeated.apply(z, *own)  # type: ignore[no-any-return,no-untyped-call]

    if not input.source.constant:
        return same(input, repeated)  # type: ignore[no-any-return]
    z, t = input.pieces()
    return input.like(resized(z), repeated(t))


def _gathered(h: Dual, values: Tensor, index: Tensor, dim: int, keepdim: bool = True) -> Dual:
    """Values `[1, B, ...]` that stand at `index` on axis `dim` of `[1, B, ...]`."""
    _, t = h.halves()
    t = t.gather(dim, index.expand(t.shape[0], *index.shape[1:]))
    return h.of_halves(*(z if keepdim else z.squeeze(dim) for z in (values, t)))


def _max_pool(function: Callable[..., Any], rank: int) -> Rule:
    def rule(
        input: Dual,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Dual:
        if return_indices or input.ndim != rank + 2:
            raise UnsupportedError(f"no rule for {function.__name__} of {input.ndim} axes")
        x, t = input.halves()
        values, index = function(x[0], kernel_size, stride, padding, dilation, ceil_mode, True)
        at = index.flatten(-rank).expand(t.shape[0], *index.shape[:2], -1)
        t = t.flatten(-rank).gather(-1, at)
        return input.of_halves(values[None], t.reshape(-1, *values.shape))

    return rule


for _pool, _rank in ((F.max_pool1d, 1), (F.max_pool2d, 2), (F.max_pool3d, 3)):
    register(_pool)(_max_pool(_pool, _rank))


def _largest(name: str) -> Rule:
    """`max` or `min` along an axis: values, and where they stand."""
    kind = getattr(torch.return_types, name)

    def rule(input: Dual, dim: Any = None, keepdim: bool = False, **rest: Any) -> Any:
        refuse(rest)
        if not isinstance(dim, int):
            raise UnsupportedError(f"no rule for {name} but along an axis")
        (own,) = inside(input, dim)
        values, index = getattr(input.halves()[0], name)(own + 1, True)
        out = _gathered(input, values, index, own + 1, keepdim)
        return kind((out, index[0] if keepdim else index[0].squeeze(own)))

    return rule


for _name in ("max", "min"):
    register(getattr(torch, _name), getattr(torch.Tensor, _name))(_largest(_name))


def _extreme(name: str) -> Rule:
    """`amax` or `amin`: equal ones share the derivative, as in torch."""

    def rule(input: Dual, dim: Any = (), keepdim: bool = False, *, out: Any = None) -> Dual:
        refuse({"out": out})
        dims = tuple(d + 1 for d in axes(input, dim))
        x, t = input.halves()
        y = getattr(x, name)(dims, keepdim=True)
        there = (x == y).to(x.dtype)
        change = (t * there).sum(dims, keepdim=True) / there.sum(dims, keepdim=True)
        return _kept(input, y, change, dims, keepdim)

    return rule


for _name in ("amax", "amin"):
    register(getattr(torch, _name), getattr(torch.Tensor, _name))(_extreme(_name))


@register(torch.topk, torch.Tensor.topk)
def _topk(
    input: Dual, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, **rest: Any
) -> Any:
    refuse(rest)
    (own,) = inside(input, dim)
    values, index = input.halves()[0].topk(k, own + 1, largest, sorted)
    kind: Any = torch.return_types.topk
    return kind((_gathered(input, values, index, own + 1), index[0]))


@register(torch.sort, torch.Tensor.sort)
def _sort(
    input: Dual, dim: int = -1, descending: bool = False, *, stable: bool = True, **rest: Any
) -> Any:
    refuse(rest)
    (own,) = inside(input, dim)
    values, index = input.halves()[0].sort(stable=stable, dim=own + 1, descending=descending)
    kind: Any = torch.return_types.sort
    return kind((_gathered(input, values, index, own + 1), index[0]))


@register(torch.gather, torch.Tensor.gather)
def _gather(
    input: Dual, dim: int, index: Tensor, *, sparse_grad: bool = False, **rest: Any
) -> Dual:
    refuse(rest)
    (own,) = inside(input, dim)
    if not isinstance(index, Tensor) or index.shape[:1] != input.shape[:1]:
        raise UnsupportedError("no rule for gathering by what is not of the batch")
    at = index[None]
    return _gathered(input, input.halves()[0].gather(own + 1, at), at, own + 1)


def _indices(name: str) -> Rule:
    def rule(input: Dual, dim: int | None = None, keepdim: bool = False) -> Tensor:
        if dim is None:
            raise UnsupportedError(f"no rule for {name} over the batch")
        return getattr(primal(input), name)(dim, keepdim)  # type: ignore[no-any-return]

    return rule


for _name in ("argmax", "argmin"):
    register(getattr(torch, _name), getattr(torch.Tensor, _name))(_indices(_name))


@register(torch.var, torch.Tensor.var)
def _var(
    input: Dual,
    dim: Any = None,
    unbiased: Any = None,
    keepdim: bool = False,
    *,
    correction: Any = 1,
    out: Any = None,
) -> Dual:
    """`2 sum (x - mean) dx / (n - correction)`."""
    x, dims, left = _centred(input, dim, unbiased, correction, out)
    y = x.var(dims, correction=correction if unbiased is None else int(unbiased), keepdim=True)
    t = input.halves()[1]
    change = 2 / left * ((x - x.mean(dims, keepdim=True)) * t).sum(dims, keepdim=True)
    return _kept(input, y, change, dims, keepdim)


def _with_mean(spread: Rule) -> Rule:
    def rule(
        input: Dual,
        dim: Any = None,
        unbiased: Any = None,
        keepdim: bool = False,
        *,
        correction: Any = 1,
        out: Any = None,
    ) -> Any:
        own = spread(input, dim, unbiased, keepdim, correction=correction, out=out)
        return own, input.mean(dim, keepdim)

    return rule


register(torch.var_mean)(_with_mean(_var))


def _centred(
    h: Dual, dim: Any, unbiased: Any, correction: Any, out: Any
) -> tuple[Tensor, tuple[int, ...], float]:
    """The primal, its axes, and what squares are divided by."""
    refuse({"out": out})
    if isinstance(dim, bool) or not (correction is None or is_number(correction)):
        raise UnsupportedError("no rule over the batch")
    dims = tuple(d + 1 for d in axes(h, dim))
    x = h.halves()[0]
    least = correction if unbiased is None else int(unbiased)
    return x, dims, max(math.prod(x.shape[d] for d in dims) - (1 if least is None else least), 0)


def _kept(h: Dual, y: Tensor, t: Tensor, dims: tuple[int, ...], keepdim: bool) -> Dual:
    return h.of_halves(*(z if keepdim else z.squeeze(dims) for z in (y, t)))


def _inverse(y: Tensor) -> Tensor:
    """`1 / y`, and 0 where y is: a subgradient of a root."""
    return 1 / y.masked_fill(y == 0, math.inf)


@register(torch.std, torch.Tensor.std)
def _std(
    input: Dual,
    dim: Any = None,
    unbiased: Any = None,
    keepdim: bool = False,
    *,
    correction: Any = 1,
    out: Any = None,
) -> Dual:
    x, dims, left = _centred(input, dim, unbiased, correction, out)
    y = x.std(dims, correction=correction if unbiased is None else int(unbiased), keepdim=True)
    t = input.halves()[1]
    change = ((x - x.mean(dims, keepdim=True)) * t).sum(dims, keepdim=True)
    return _kept(input, y, change * _inverse(y) / left, dims, keepdim)


register(torch.std_mean)(_with_mean(_std))


def norm(h: Dual, p: Any, dim: Any, keepdim: bool, dtype: Any, out: Any) -> Dual:
    refuse({"out": out})
    if dtype not in (None, h.dtype) or p not in (None, "fro", 1, 2):
        raise UnsupportedError(f"no rule for a norm of order {p} as {dtype}")
    dims = tuple(d + 1 for d in axes(h, dim))
    x, t = h.halves()
    y = torch.linalg.vector_norm(x, 1 if p == 1 else 2, dims, keepdim=True)
    slope = x.sign() if p == 1 else x * _inverse(y)
    return _kept(h, y, (slope * t).sum(dims, keepdim=True), dims, keepdim)


@register(torch.norm, torch.Tensor.norm)
def _norm(
    input: Dual,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    out: Any = None,
    dtype: Any = None,
) -> Dual:
    return norm(input, p, dim, keepdim, dtype, out)


@register(torch.linalg.vector_norm)
def _vector_norm(
    x: Dual,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    out: Any = None,
) -> Dual:
    return norm(x, ord, dim, keepdim, dtype, out)


@register(torch.linalg.norm)
def _linalg_norm(
    A: Dual,
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    out: Any = None,
) -> Dual:
    if not isinstance(dim, int) and ord not in (None, "fro"):
        raise UnsupportedError("no rule for norms of matrices")
    return norm(A, ord, dim, keepdim, dtype, out)
