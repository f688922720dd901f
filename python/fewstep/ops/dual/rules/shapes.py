"""Rules of shapes, slices, sums and resampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual.engine import Dual, Rule, Seed, Traced, UnsupportedError, register, same


@register(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> Dual:
    first: Dual = next(h for h in tensors if isinstance(h, Dual))
    dim = dim if axis is None else axis
    dim = dim % first.ndim
    if dim == 0:
        raise UnsupportedError("no rule for cat along the batch")
    alone = sum(isinstance(h, Dual) for h in tensors) == 1
    if alone and isinstance(first, Seed) and dim == first.ndim - 1:
        at = next(i for i, h in enumerate(tensors) if h is first)
        low = first.low + sum(h.shape[dim] for h in tensors[:at])
        whole = torch.cat([first.primal if h is first else h for h in tensors], dim)
        return first.moved(whole, low, first.width)

    def piece(h: Any, i: int, m: int) -> Tensor:
        """Of a dual, or of what has no tangents, `[m, B, ...]`."""
        if isinstance(h, Dual):
            return list(h.copies())[i]
        zeros: Tensor = h.new_zeros((m - (i == 0), *h.shape))
        return zeros if i else torch.cat([h[None], zeros])

    return first.like(
        *(
            torch.cat([piece(h, i, m) for h in tensors], dim + 1).flatten(0, 1)
            for i, m in enumerate(first.source.counts)
        ),
        owned=True,
    )


def _sizes(h: Dual, shape: Sequence[Any]) -> tuple[int, ...]:
    """The shape that a view asks for: the batch comes first in both."""
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    sizes = [int(s) for s in shape]
    rest = math.prod(s for s in sizes if s != -1)
    sizes = [h.numel() // max(rest, 1) if s == -1 else s for s in sizes]
    batch = h.shape[0]
    if sizes[0] % max(batch, 1) and batch % max(sizes[0], 1):
        raise UnsupportedError(f"no rule for a view of {tuple(h.shape)} as {tuple(sizes)}")
    return tuple(sizes)


@register(torch.reshape, torch.Tensor.reshape, torch.Tensor.view)
def _reshape(h: Dual, *shape: Any) -> Dual:
    first, *rest = sizes = _sizes(h, shape)
    own = isinstance(h, Seed) and h.width == h.shape[-1] and h.source.tangents is None
    if isinstance(h, Seed) and own and first == h.shape[0]:
        return h.moved(h.primal.reshape(sizes), 0, sizes[-1])
    pieces = zip(h.pieces(), h.source.counts, strict=True)
    return h.like(*(z.reshape(m * first, *rest) for z, m in pieces))


@register(torch.flatten, torch.Tensor.flatten)
def _flatten(h: Dual, start_dim: int = 0, end_dim: int = -1) -> Dual:
    start, end = start_dim % h.ndim, end_dim % h.ndim
    shape = h.shape
    return _reshape(h, *shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


@register(torch.unflatten, torch.Tensor.unflatten)
def _unflatten(h: Dual, dim: int, sizes: Sequence[int]) -> Dual:
    dim = dim % h.ndim
    rest = math.prod(s for s in sizes if s != -1)
    own = [h.shape[dim] // rest if s == -1 else s for s in sizes]
    return _reshape(h, *h.shape[:dim], *own, *h.shape[dim + 1 :])


def inside(h: Dual, *dims: int) -> tuple[int, ...]:
    own = tuple(d % h.ndim for d in dims)
    if 0 in own:
        raise UnsupportedError("no rule along the batch")
    return own


@register(torch.transpose, torch.Tensor.transpose)
def _transpose(h: Dual, dim0: int, dim1: int) -> Dual:
    dims = inside(h, dim0, dim1)
    return same(h, lambda z: z.transpose(*dims))  # type: ignore[no-any-return]


@register(torch.permute, torch.Tensor.permute)
def _permute(h: Dual, *dims: Any) -> Dual:
    order = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    if order[0] % h.ndim != 0:
        raise UnsupportedError("no rule along the batch")
    return same(h, lambda z: z.permute(order))  # type: ignore[no-any-return]


@register(torch.movedim, torch.Tensor.movedim)
def _movedim(h: Dual, source: int, destination: int) -> Dual:
    dims = inside(h, source, destination)
    return same(h, lambda z: z.movedim(*dims))  # type: ignore[no-any-return]


@register(torch.unsqueeze, torch.Tensor.unsqueeze)
def _unsqueeze(h: Dual, dim: int) -> Dual:
    own = dim % (h.ndim + 1)
    if own == 0:
        raise UnsupportedError("no rule along the batch")
    return same(h, lambda z: z.unsqueeze(own))  # type: ignore[no-any-return]


@register(torch.squeeze, torch.Tensor.squeeze)
def _squeeze(h: Dual, dim: int) -> Dual:
    (own,) = inside(h, dim)
    return same(h, lambda z: z.squeeze(own))  # type: ignore[no-any-return]


@register(torch.chunk, torch.Tensor.chunk)
def chunk(h: Dual, chunks: int, dim: int = 0) -> Any:
    (own,) = inside(h, dim)
    return same(h, lambda z: z.chunk(chunks, own))


@register(torch.split, torch.Tensor.split)
def _split(h: Dual, split_size_or_sections: Any, dim: int = 0) -> Any:
    (own,) = inside(h, dim)
    return same(h, lambda z: torch.split(z, split_size_or_sections, own))


@register(torch.Tensor.__getitem__)
def _getitem(h: Dual, index: Any) -> Dual:
    own = index if isinstance(index, tuple) else (index,)
    whole = isinstance(own[0], slice) and own[0] == slice(None)
    if not (whole or own[0] is Ellipsis) or any(isinstance(i, (Tensor, Traced)) for i in own):
        raise UnsupportedError("no rule for indexing the batch, or by tensors")
    if own[0] is Ellipsis and len([i for i in own if i is not None]) > h.ndim:
        raise UnsupportedError("no rule along the batch")
    return same(h, lambda z: z[index])  # type: ignore[no-any-return]


def _reduced(name: str) -> Rule:
    def rule(h: Dual, dim: Any = None, keepdim: bool = False) -> Dual:
        if dim is None:
            raise UnsupportedError(f"no rule for {name} over the batch")
        dims = inside(h, *((dim,) if isinstance(dim, int) else dim))
        return same(h, lambda z: getattr(z, name)(dims, keepdim))  # type: ignore[no-any-return]

    return rule


register(torch.sum, torch.Tensor.sum)(_reduced("sum"))


register(torch.mean, torch.Tensor.mean)(_reduced("mean"))


def _each(function: Callable[..., Tensor]) -> Rule:
    def rule(h: Dual, *args: Any, **kwargs: Any) -> Dual:
        return same(h, lambda z: function(z, *args, **kwargs))  # type: ignore[no-any-return]

    return rule


for _pool in (F.avg_pool1d, F.avg_pool2d, F.interpolate, F.pixel_shuffle, F.pixel_unshuffle):
    register(_pool)(_each(_pool))
