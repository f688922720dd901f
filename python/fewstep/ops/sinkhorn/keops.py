"""The backend for costs that a user writes: KeOps compiles the formula and streams it.

Shapes are those of `fewstep.reference.sinkhorn`; ragged problems, labels and excluded diagonals are
not served.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pykeops.torch import LazyTensor
from torch import Tensor

from fewstep.reference.sinkhorn import NOWHERE, Inputs, Outputs, Points, iterate


def _lazy(points: Points, T: int) -> tuple[Any, Any, Any]:
    """x_i, y_j and their cost as LazyTensors with batch axes [B, T]."""
    assert points.formula is not None
    count, n, d = points.x.shape
    m = points.y.shape[1]
    x_i = LazyTensor(points.x[:, None].expand(count, T, n, d).reshape(count, T, n, 1, d))
    y_j = LazyTensor(points.y[:, None].expand(count, T, m, d).reshape(count, T, 1, m, d))
    try:
        cost = points.formula(x_i, y_j)
    except Exception as error:
        raise TypeError(
            "sinkhorn: cost does not understand KeOps's LazyTensors, but backend='reference'"
            f" evaluates it on broadcast tensors ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(cost, LazyTensor) or cost.ndim != 1:
        got = f"{tuple(cost.shape)}" if isinstance(cost, LazyTensor) else type(cost).__name__
        raise ValueError(
            "sinkhorn: cost must return a number for each pair, as (x - y).abs().sum(-1) does,"
            f" got {got} from KeOps's LazyTensors"
        )
    return x_i, y_j, cost


def _split(t: Tensor, points: Points) -> Tensor:
    """`[B T, ..]` as `[B, T, ..]`."""
    return t.reshape(points.count, -1, *t.shape[1:]).contiguous()


def solve(inputs: Inputs) -> Outputs:
    """`f, g, value, residual, iterations, converged` of the reference's `solve`, detached."""
    with torch.no_grad():
        split = inputs.by_temperature()
        _, _, cost = _lazy(inputs.points.detached(), split.eps.shape[1])

        def transform(potential: Tensor, weights: Tensor, e: Tensor, axis: int) -> Tensor:
            bias = potential / e + weights.log()
            lazy = LazyTensor(bias[..., None, :, None] if axis == 3 else bias[..., :, None, None])
            inverse = LazyTensor((1 / e)[..., None, None].contiguous())
            soft: Tensor = (lazy - cost * inverse).logsumexp(axis)[..., 0].clamp(min=-NOWHERE)
            return -e * soft

        out = iterate(
            lambda g, e: transform(g, split.b, e, 3),
            lambda f, e: transform(f, split.a, e, 2),
            split,
        )
    f, g, value, residual, iterations, converged = (t.flatten(0, 1) for t in out)
    return f, g, value, residual, iterations, converged


def _conditional(
    points: Points, f: Tensor, g: Tensor, b: Tensor, eps: Tensor
) -> tuple[Any, Tensor]:
    """`p_ij = b_j exp((f_i + g_j - C_ij) / eps)` as a LazyTensor, and eps `[B, T]`."""
    e = _split(eps, points)
    _, _, cost = _lazy(points.detached(), e.shape[1])
    f_i = LazyTensor(_split(f, points)[..., :, None, None].contiguous())
    bias = _split(g, points) / e[..., None] + b[:, None].log()
    inverse = LazyTensor((1 / e)[..., None, None, None].contiguous())
    return ((f_i - cost) * inverse + LazyTensor(bias[..., None, :, None].contiguous())).exp(), e


def transport(
    points: Points, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """`sum_j p_ij v_j` and `sum_j p_ij` of the reference's `transport`."""
    p, _ = _conditional(points, f, g, b, eps)
    out = (p * LazyTensor(_split(v, points)[..., None, :, :].contiguous())).sum(3)
    return out.flatten(0, 1), p.sum(3)[..., 0].flatten(0, 1)


def gradient(points: Points, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """`sum_j P_ij dC_ij/dx_i` of the reference's `gradient`, by KeOps's derivative of the cost."""
    T = eps.shape[0] // max(points.count, 1)
    x = points.x.detach().repeat_interleave(T, 0).requires_grad_()
    with torch.enable_grad():
        repeated = replace(points, x=x, y=points.y.detach().repeat_interleave(T, 0))
        _, _, cost = _lazy(repeated, 1)
        shape = (points.count * T, 1)
        flat, _ = _conditional(
            replace(repeated, x=x.detach()), f, g, b.repeat_interleave(T, 0), eps
        )
        total = (flat * cost).sum(3)[..., 0].reshape(*shape, -1)
    weights = a.repeat_interleave(T, 0)[:, None]
    (out,) = torch.autograd.grad(total, x, weights.expand_as(total))
    return out
