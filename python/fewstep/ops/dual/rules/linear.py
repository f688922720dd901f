"""Rules of linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual.engine import Dual, Seed
from fewstep.ops.dual.rules.plain import matched
from fewstep.ops.dual.source import Source, kept_or_computed, plain, widens
from fewstep.ops.dual.traced import Rule, UnsupportedError, register


class _ProbeLinear(torch.autograd.Function):
    """`[x W'; v W_x']` for probes v that backward draws again."""

    @staticmethod
    def forward(
        ctx: Any, primal: Tensor, weight: Tensor, source: Source, low: int, width: int
    ) -> Tensor:
        ctx.save_for_backward(primal, weight)
        ctx.source, ctx.low, ctx.width = source, low, width
        return _probe_linear(primal, weight, source, low, width)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        primal, weight = ctx.saved_tensors
        low, width = ctx.low, ctx.width
        batch = primal.shape[0]
        gx = g[:batch] @ weight if ctx.needs_input_grad[0] else None
        gw = None
        if ctx.needs_input_grad[1]:
            v = ctx.source.draw(primal[:, low : low + width].detach()).flatten(0, 1)
            if width == primal.shape[1]:
                gw = g.T @ torch.cat([primal, v])
            else:
                gw = g[:batch].T @ primal
                gw = gw + F.pad(g[batch:].T @ v, (low, primal.shape[1] - low - width))
        return gx, gw, None, None, None


def _probe_linear(primal: Tensor, weight: Tensor, source: Source, low: int, width: int) -> Tensor:
    own = primal[:, low : low + width]
    v = source.draw(own).flatten(0, 1)
    part = weight if width == weight.shape[1] else weight[:, low : low + width]
    if plain():
        return torch.cat([primal @ weight.T, v @ part.T])
    batch = primal.shape[0]
    out = primal.new_empty((batch * (source.count + 1), weight.shape[0]))
    torch.mm(primal, weight.T, out=out[:batch])
    torch.mm(v, part.T, out=out[batch:])
    return out


class _LowLinear(torch.autograd.Function):
    """`t W'` by a copy of W in the dtype of t; the gradient of W is that of a float32 product."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(t, copy)
        return F.linear(t, copy)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        t, copy = ctx.saved_tensors
        gt = g @ copy if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return gt, None, None
        rows, columns = g.reshape(-1, g.shape[-1]), t.reshape(-1, t.shape[-1])
        if g.is_cuda and not torch.is_grad_enabled():
            return gt, torch.mm(rows.T, columns, out_dtype=torch.float32), None
        return gt, (rows.T @ columns).float(), None


def _linear_pieces(source: Source, pieces: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Each piece times W'."""
    out = [F.linear(pieces[0], weight)]
    for t in pieces[1:]:
        if widens(t.device) or plain() or not torch.is_grad_enabled():
            out.append(source.product(F.linear, t, weight))
        else:
            copy = source.copy(weight)
            out.append(_LowLinear.apply(t, weight, copy))  # type: ignore[no-untyped-call]
    return out


@register(F.linear)
def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Dual:
    h = input
    if isinstance(weight, Dual) or isinstance(bias, Dual) or not isinstance(h, Dual):
        raise UnsupportedError("no rule for linear with a weight that depends on x")
    matched(h, weight, bias, low=True)
    if h.ndim < 2 or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise UnsupportedError(f"no rule for linear of {tuple(h.shape)}")
    source = h.source
    if isinstance(h, Seed) and h.ndim == 2:
        return _first(h, weight, bias)
    if source.constant:
        z, u = h.pieces()
        with torch.no_grad():
            t = F.linear(u, weight)
        return h.like(F.linear(z, weight, bias), t)
    if source.dtype is not None:
        return h.like(*_linear_pieces(source, h.pieces(), weight), shift=bias)
    lazy = (source.basis or source.cache is not None) and not source.prompt
    if lazy and not torch.is_grad_enabled() and h.ndim == 2:
        return h.of_flat(h.stack(), shift=bias, pending=weight)
    return h.of_flat(F.linear(h.stack(), weight), shift=bias, owned=True)


def _first(h: Seed, weight: Tensor, bias: Tensor | None) -> Dual:
    """The first layer: tangents go through the weight's own columns."""
    source, primal = h.source, h.primal
    if source.dtype is not None:
        if not source.basis:
            return h.like(*_linear_pieces(source, h.pieces(), weight), shift=bias)
        assert source.tangents is not None
        t = source.lower(source.tangents[:, 0])
        part = weight[:, h.low : h.low + h.width]
        rows = source.product(F.linear, t, part)[:, None].expand(-1, primal.shape[0], -1)
        return h.like(F.linear(primal, weight), rows.flatten(0, 1), shift=bias)
    if source.basis:
        assert source.tangents is not None
        part = weight[:, h.low : h.low + h.width]
        shared = source.tangents[:, 0] @ part.T
        return h.of_flat(F.linear(primal, weight), shared=shared, shift=bias, owned=True)
    if source.tangents is not None:
        return h.of_flat(F.linear(h.stack(), weight), shift=bias, owned=True)
    if source.cache is not None and not torch.is_grad_enabled() and not plain():
        part = weight[:, h.low : h.low + h.width]
        fixed = kept_or_computed(
            source.cache, "first", (weight,), lambda: source.draw(h.own).flatten(0, 1) @ part.T
        )
        batch = primal.shape[0]
        flat = primal.new_empty((batch + fixed.shape[0], weight.shape[0]))
        torch.mm(primal, weight.T, out=flat[:batch])
        flat[batch:] = fixed
        return h.of_flat(flat, shift=bias, owned=True)
    wanted = torch.is_grad_enabled() and (weight.requires_grad or primal.requires_grad)
    if wanted and not plain():
        flat = _ProbeLinear.apply(primal, weight, source, h.low, h.width)  # type: ignore[no-untyped-call]
    else:
        flat = _probe_linear(primal, weight, source, h.low, h.width)
    return h.of_flat(flat, shift=bias, owned=True)


def _convolution(function: Callable[..., Tensor], rank: int) -> Rule:
    def rule(
        input: Any, weight: Any, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Dual:
        h = input
        if not isinstance(h, Dual) or isinstance(weight, Dual):
            raise UnsupportedError(
                f"no rule for {function.__name__} with a weight that depends on x"
            )
        matched(h, weight, bias, low=True)
        if h.ndim != rank + 2:
            raise UnsupportedError(f"no rule for {function.__name__} of {h.ndim} axes")

        def convolve(z: Tensor, w: Tensor) -> Tensor:
            return function(z, w, None, *args, **kwargs)

        if h.source.constant:
            z, u = h.pieces()
            with torch.no_grad():
                t = convolve(u, weight)
            return h.like(function(z, weight, bias, *args, **kwargs), t)
        outs = [h.source.product(convolve, z, weight) for z in h.pieces()]
        if bias is not None:
            if bias.shape != outs[0].shape[1:2]:
                raise UnsupportedError(f"no rule for a bias of {tuple(bias.shape)}")
            bias = bias.reshape(-1, *(1,) * rank)
        return h.like(*outs, shift=bias, owned=True)

    return rule


for _f, _rank in (
    *((F.conv1d, 1), (F.conv2d, 2), (F.conv3d, 3)),
    *((F.conv_transpose1d, 1), (F.conv_transpose2d, 2), (F.conv_transpose3d, 3)),
):
    register(_f)(_convolution(_f, _rank))
