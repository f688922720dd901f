"""Rules of norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep._torch import wide
from fewstep.ops.dual import dispatch
from fewstep.ops.dual.dispatch import kernel_shift
from fewstep.ops.dual.engine import Dual
from fewstep.ops.dual.rules.elementwise import add, clamp, div, mul
from fewstep.ops.dual.rules.plain import matched
from fewstep.ops.dual.rules.resampling import norm
from fewstep.ops.dual.rules.shapes import spread
from fewstep.ops.dual.source import plain
from fewstep.ops.dual.traced import MixingError, UnsupportedError, register

Scalar = Callable[[Tensor], Tensor]
# Elements of a channel from which on, or of which a multiple, one weight for them all is faster.
_MANY, _VECTOR = 256, 16


def _beside(
    h: Dual, weight: Tensor | None, normalized: Callable[[Tensor], tuple[Tensor, Scalar]]
) -> Dual:
    """The primal as in a plain call, with constant tangents beside it.

    Args:
        weight: broadcasts with the primal.
        normalized: the norm of z, and what has tangents of it without weights: its Jacobian, which
            is symmetric, so that backward functions compute it.
    """
    z, u = h.pieces()
    out, tangent = normalized(z)
    with torch.no_grad():
        parts = [tangent(v) for v in u.reshape(-1, *z.shape)]
        t = parts[0] if len(parts) == 1 else torch.cat(parts)
        if weight is not None:
            t = t * weight if plain() else t.mul_(weight)  # nobody else has it yet
    return h.like(out, t)


def _has_kernel(h: Dual) -> bool:
    """Whether a kernel has the tangents beside the primal of a plain call."""
    return h.source.kernels(h.dtype) == "cpp" and not plain()


def _by_kernel(
    h: Dual,
    primal: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    groups: int,
    centred: bool,
    eps: float,
    *,
    rows: int = 1,
) -> Dual:
    """As `_beside`, in one pass; `rows` as of `_normed`."""
    z, u = h.pieces()
    out = primal(z)
    with torch.no_grad():
        own, t = _in_rows(z, rows), _in_rows(u, rows)
        t = dispatch.norm_tangents(own, t, weight, groups, centred, eps)
    return h.like(out, t.reshape(u.shape))


def _in_rows(z: Tensor, rows: int) -> Tensor:
    return z if rows == 1 else z.reshape(z.shape[0] * rows, z.shape[1:].numel() // rows)


def _normed(
    h: Dual,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    centred: bool,
    eps: float,
    *,
    rows: int = 1,
) -> Dual:
    """By kernels.

    Args:
        weight, bias: as of `fewstep.reference.dual.norm`.
        rows: of a sample, each of which the norm takes for one.
    """
    matched(h, weight, bias)
    row = h.primal_shape[1:].numel() // (groups * rows)
    shift, _ = kernel_shift(h.shift, h.primal_shape, row=row)
    backend, options = h.source.kernels(h.dtype), (groups, centred, eps)
    if h.source.dtype is not None:
        z, u = h.pieces(shifted=False)
        own, low = _in_rows(z, rows), _in_rows(u, rows)
        a, t = dispatch.norm_pair(backend, own, low, shift, weight, bias, *options)
        return h.like(a.reshape(z.shape), t.reshape(u.shape))
    flat = h.joined()
    own = _in_rows(flat, rows)
    out = dispatch.norm(backend, own, shift, weight, bias, h.source.count, *options)
    return h.like(out.reshape(flat.shape), owned=True)


def _last(shape: torch.Size, normalized_shape: Sequence[int]) -> int:
    """Rows of a sample where the last axes are normalised."""
    own = tuple(normalized_shape)
    if len(own) >= len(shape) or tuple(shape[len(shape) - len(own) :]) != own:
        raise UnsupportedError(f"no rule for a norm over {own} of {tuple(shape)}")
    return math.prod(shape[1 : len(shape) - len(own)])


def _check_weights(shape: Sequence[int], *weights: Tensor | None) -> None:
    for w in weights:
        if w is not None and tuple(w.shape) != tuple(shape):
            raise UnsupportedError(f"no rule for a norm over {tuple(shape)} by {tuple(w.shape)}")


@register(F.layer_norm)
def _layer_norm(
    input: Dual,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Dual:
    rows = _last(input.shape, normalized_shape)
    shape = list(normalized_shape)
    if input.source.constant:
        matched(input, weight, bias)
        if _has_kernel(input):
            own = lambda z: F.layer_norm(z, shape, weight, bias, eps)  # noqa: E731
            return _by_kernel(input, own, weight, 1, True, eps, rows=rows)

        def normalized(z: Tensor) -> tuple[Tensor, Scalar]:
            out, mean, rstd = torch.native_layer_norm(z, shape, weight, bias, eps)
            own = z, shape, mean, rstd, None, None, [True, False, False]
            return out, lambda v: torch.ops.aten.native_layer_norm_backward(v, *own)[0]

        return _beside(input, weight, normalized)
    _check_weights(shape, weight, bias)
    return _normed(input, weight, bias, 1, True, eps, rows=rows)


@register(F.rms_norm)
def _rms_norm(
    input: Dual,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Dual:
    rows = _last(input.shape, normalized_shape)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    shape = list(normalized_shape)
    if input.source.constant:
        matched(input, weight)
        if _has_kernel(input):
            own = lambda z: F.rms_norm(z, shape, weight, eps)  # noqa: E731
            return _by_kernel(input, own, weight, 1, False, eps, rows=rows)
        dims = tuple(range(-len(shape), 0))

        def normalized(z: Tensor) -> tuple[Tensor, Scalar]:
            dtype = wide(z.dtype)

            def tangent(v: Tensor) -> Tensor:
                y, own = z.to(dtype), v.to(dtype)
                rstd = (y.square().mean(dims, keepdim=True) + eps).rsqrt()
                y = y * rstd
                return (rstd * (own - y * (y * own).mean(dims, keepdim=True))).to(z.dtype)

            return F.rms_norm(z, shape, weight, eps), tangent

        return _beside(input, weight, normalized)
    _check_weights(shape, weight)
    return _normed(input, weight, None, 1, False, eps, rows=rows)


@register(F.group_norm)
def _group_norm(
    input: Dual,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Dual:
    if input.ndim < 2 or num_groups < 1 or input.shape[1] % num_groups:
        raise UnsupportedError(f"no rule for {num_groups} groups of {tuple(input.shape)}")
    inner = math.prod(input.shape[2:])

    def spread(w: Tensor | None) -> Tensor | None:
        if w is not None and w.shape != input.shape[1:2]:
            raise UnsupportedError(f"no rule for a group norm by {tuple(w.shape)}")
        if w is None or inner == 1 or inner >= _MANY or inner % _VECTOR == 0:
            return w
        return w[:, None].expand(-1, inner)

    if input.source.constant:
        matched(input, weight, bias)
        last = input.ndim == 4 and input.flat.is_contiguous(memory_format=torch.channels_last)
        if _has_kernel(input) and (not last or input.flat.is_contiguous()):
            own = lambda z: F.group_norm(z, num_groups, weight, bias, eps)  # noqa: E731
            return _by_kernel(input, own, spread(weight), num_groups, True, eps)
        per = (-1, *(1,) * (input.ndim - 2))

        def normalized(z: Tensor) -> tuple[Tensor, Scalar]:
            last = z.ndim == 4 and z.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format
            z = z.contiguous(memory_format=layout)
            n, c = z.shape[:2]
            out, mean, rstd = torch.native_group_norm(z, weight, bias, n, c, inner, num_groups, eps)

            def tangent(v: Tensor) -> Tensor:
                v = v.contiguous(memory_format=layout)
                own = z, mean, rstd, None, n, c, inner, num_groups, [True, False, False]
                return torch.ops.aten.native_group_norm_backward(v, *own)[0]  # type: ignore[no-any-return]

            return out, tangent

        return _beside(input, None if weight is None else weight.reshape(per), normalized)

    return _normed(input, spread(weight), spread(bias), num_groups, True, eps)


@register(F.batch_norm)
def _batch_norm(
    input: Dual,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Dual:
    if training or running_mean is None or running_var is None:
        raise MixingError(
            "velocity: BatchNorm in training, or without running statistics, mixes samples; "
            "call eval(), and keep track_running_stats"
        )
    matched(input, running_mean, running_var, weight, bias)
    scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
    shift = -running_mean * scale + (0 if bias is None else bias)
    per = (-1, *(1,) * (input.ndim - 2))
    return add(mul(input, scale.reshape(per)), shift.reshape(per))


@register(F.instance_norm)
def _instance_norm(
    input: Dual,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Dual:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None or running_var is not None or input.ndim < 3:
        raise UnsupportedError("no rule for instance_norm that updates its statistics")
    return _group_norm(input, input.shape[1], weight, bias, eps)


@register(F.normalize)
def _normalize(
    input: Dual, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Dual:
    length = norm(input, p, dim, True, None, out)
    return div(input, spread(clamp(length, eps), input.shape))
