"""What is read off a dual at the end of a forward: traces, products with probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep._torch import exactly, to_random_state, wide
from fewstep.ops.dual import dispatch
from fewstep.ops.dual.engine import Dual, seed
from fewstep.ops.dual.source import Source, kept_or_computed, plain
from fewstep.ops.dual.traced import UnsupportedError, run_on


class _Head(torch.autograd.Function):
    """Velocity and products of its tangents with the probes, from the stack of both."""

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, shift: Tensor | None, source: Source
    ) -> tuple[Tensor, Tensor]:
        batch = flat.shape[0] // (source.count + 1)
        ctx.source, ctx.batch, ctx.inner = source, batch, flat.shape[1:]
        ctx.shape = None if shift is None else shift.shape
        return _head(flat, shift, source)

    @staticmethod
    def backward(ctx: Any, gv: Tensor, gd: Tensor) -> tuple[Any, ...]:
        source = ctx.source
        v = dispatch.probe_scale(
            source.backend, gd, source.key, source.ids, ctx.inner.numel(), source.kind
        )
        g = torch.cat([gv, v.reshape(-1, *ctx.inner).to(gv.dtype)])
        gs = gv.sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None
        return g, gs, None


def _head(flat: Tensor, shift: Tensor | None, source: Source) -> tuple[Tensor, Tensor]:
    batch = flat.shape[0] // (source.count + 1)
    velocity = flat[:batch].clone() if shift is None else flat[:batch] + shift
    assert source.key is not None
    backend = source.kernels(flat.dtype)
    dots = dispatch.probe_dot(
        backend, flat[batch:], source.key, source.ids, source.count, source.kind
    )
    return velocity, dots


def _checked(out: Any, x: Tensor) -> Dual:
    if not isinstance(out, Dual):
        if isinstance(out, Tensor):
            raise UnsupportedError(
                "what velocity returns does not depend on x by differentiable steps"
            )
        raise ValueError(f"velocity must return one tensor, got {type(out).__name__}")
    if out.shape != x.shape:
        raise ValueError(f"velocity must return {tuple(x.shape)} like x, got {tuple(out.shape)}")
    dispatch.present(out.pending, out.shift)
    return out


def products(
    velocity: Callable[..., Any], x: Tensor, t: Any, source: Source
) -> tuple[Tensor, Tensor]:
    """Velocity `[B, ...]` and `J v_k`, `[K, B, ...]`, for the tangents of `source`."""
    out = _checked(run_on(seed(source, x), velocity, t), x)
    primal, tangents = out.halves()
    return primal[0], tangents.to(x.dtype)


def probe_products(
    velocity: Callable[..., Any], x: Tensor, t: Any, source: Source
) -> tuple[Tensor, Tensor]:
    """Velocity `[B, ...]` and `<v_k, J v_k>`, `[K, B]`, for the probes of `source`."""
    out = _checked(run_on(seed(source, x), velocity, t), x)
    with exactly(x.device):
        return _read(out, x)


def _read(out: Dual, x: Tensor) -> tuple[Tensor, Tensor]:
    source = out.source
    if out.pending is not None and source.cache is not None:
        return _fixed_head(out, x)
    if source.dtype is not None:
        assert source.key is not None
        primal, tangents = out.pieces()
        return primal, dispatch.probe_dot(
            *(source.backend, tangents, source.key, source.ids, source.count, source.kind)
        )
    flat = out.joined()
    if torch.is_grad_enabled() and flat.requires_grad and not plain():
        return _Head.apply(flat, out.shift, source)  # type: ignore[no-any-return,no-untyped-call]
    return _head(flat, out.shift, source)


def _fixed_head(out: Dual, x: Tensor) -> tuple[Tensor, Tensor]:
    """`<v, W h> = <W' v, h>` with `W' v` kept over a solve."""
    source, weight, cache = out.source, out.pending, out.source.cache
    assert weight is not None
    assert cache is not None
    kept = kept_or_computed(
        *(cache, "last", (weight,)),
        lambda: source.draw(x).flatten(0, 1).to(weight.dtype) @ weight,
    )
    batch = x.shape[0]
    velocity = F.linear(out.flat[:batch], weight, out.shift)
    dots = torch.linalg.vecdot(kept, out.flat[batch:])
    return velocity, dots.reshape(source.count, batch)


def exact_by_tangents(
    velocity: Callable[..., Any], x: Tensor, t: Any, source: Source, chunk: int
) -> tuple[Tensor, Tensor]:
    """Velocity and `sum_i e_i' J e_i`, `[B]`, by D tangents, `chunk` at a time, as `source` has
    them otherwise."""
    summed = wide(x.dtype)
    d = x[0].numel() if x.ndim > 1 else 1
    basis = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])
    total: Any = 0
    back = to_random_state(x)
    for first in range(0, d, chunk):
        if first:
            back()
        own = basis[first : first + chunk]
        part = replace(source, count=own.shape[0], tangents=own, stacks={})
        out = _checked(run_on(seed(part, x), velocity, t), x)
        with exactly(x.device):
            primal, diagonal = _diagonal(out, slice(first, first + chunk))
            total = total + diagonal.sum(0, dtype=summed)
    return primal, total


def _diagonal(out: Dual, own: slice) -> tuple[Tensor, Tensor]:
    """The velocity, and the derivatives of its elements `own` by those of x, `[.., B]`."""
    if out.pending is None:
        (primal,), columns = out.halves()
        return primal, columns.flatten(2)[:, :, own].diagonal(dim1=0, dim2=2).T
    batch = out.primal_shape[0]
    tangents = out.flat[batch:].reshape(out.source.count, batch, -1)
    diagonal = (tangents @ out.pending[own, :, None])[..., 0]
    return F.linear(out.flat[:batch], out.pending, out.shift), diagonal
