"""Rules of norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual import dispatch
from fewstep.ops.dual.dispatch import kernel_shift
from fewstep.ops.dual.engine import Dual, UnsupportedError, register
from fewstep.ops.dual.rules.elementwise import add, mul


def _normed(
    h: Dual,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    centred: bool,
    eps: float,
) -> Dual:
    shift = h.shift
    if shift is not None:
        shift, inner = kernel_shift(shift, h.primal_shape)
        if inner > 1:
            h.pieces()
            shift = None
    if h.source.dtype is not None:
        z, u = h.pieces(shifted=False)
        options = (shift, weight, bias, groups, centred, eps)
        return h.like(*dispatch.norm_pair(h.source.backend, z, u, *options))
    flat = h.joined()
    out = dispatch.norm(
        h.source.backend, flat, shift, weight, bias, h.source.count, groups, centred, eps
    )
    return h.like(out, owned=True)


def _last(shape: torch.Size, normalized_shape: Sequence[int]) -> int:
    """Rows of a sample where the last axes are normalised."""
    own = tuple(normalized_shape)
    if len(own) >= len(shape) or tuple(shape[len(shape) - len(own) :]) != own:
        raise UnsupportedError(f"no rule for a norm over {own} of {tuple(shape)}")
    return math.prod(shape[1 : len(shape) - len(own)])


def _per_row(w: Tensor | None, rows: int) -> Tensor | None:
    return w if w is None or rows == 1 else w.flatten().expand(rows, -1)


@register(F.layer_norm)
def _layer_norm(
    input: Dual,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Dual:
    rows = _last(input.shape, normalized_shape)
    return _normed(input, _per_row(weight, rows), _per_row(bias, rows), rows, True, eps)


@register(F.rms_norm)
def _rms_norm(
    input: Dual,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Dual:
    rows = _last(input.shape, normalized_shape)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _normed(input, _per_row(weight, rows), None, rows, False, eps)


@register(F.group_norm)
def _group_norm(
    input: Dual,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Dual:
    inner = math.prod(input.shape[2:])

    def spread(w: Tensor | None) -> Tensor | None:
        return w if w is None or inner == 1 else w[:, None].expand(-1, inner)

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
        raise UnsupportedError("no rule for batch_norm in training: it mixes samples")
    scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
    shift = -running_mean * scale + (0 if bias is None else bias)
    per = (-1, *(1,) * (input.ndim - 2))
    return add(mul(input, scale.reshape(per)), shift.reshape(per))
