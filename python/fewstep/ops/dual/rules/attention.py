"""Rules of attention, softmax and products of two duals."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual.engine import Dual, UnsupportedError, register
from fewstep.ops.dual.rules.shapes import inside


@register(F.softmax, torch.softmax, torch.Tensor.softmax)
def _softmax(input: Dual, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Dual:
    (own,) = inside(input, dim)
    primal, t = input.halves()
    p = primal.softmax(own + 1)
    change = input.source.lower(t - (p * t).sum(own + 1, keepdim=True))
    return input.of_halves(p, p * change)


def _times(h: Dual, t: Tensor, other: Tensor) -> Tensor:
    """`t[k] @ other` for t `[K, B, ..., N, D]` and other `[B, ..., D, M]`, which is not copied."""
    rows = t.movedim(0, -3).flatten(-3, -2)
    out = h.source.product(torch.matmul, rows, other)
    shape = (*out.shape[:-2], t.shape[0], t.shape[-2], out.shape[-1])
    return out.reshape(shape).movedim(-3, 0)


@register(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)
def _matmul(a: Any, b: Any) -> Dual:
    if isinstance(a, Dual) and isinstance(b, Dual):
        if a.ndim < 3 or a.ndim != b.ndim:
            raise UnsupportedError("no rule for a product that mixes samples")
        (x, dx), (y, dy) = a.halves(), b.halves()
        return a.of_halves(x @ y, _times(a, dx, y[0]) + _times(a, dy.mT, x[0].mT).mT)
    h = a if isinstance(a, Dual) else b
    if isinstance(a, Dual) and a.ndim >= 2 and b.ndim == 2:
        product = a.source.product
        return a.like(*(product(torch.matmul, z, b) for z in a.pieces()), owned=True)
    if h.ndim < 3 or (a.ndim != b.ndim and (b if h is a else a).ndim != 2):
        raise UnsupportedError("no rule for a product that mixes samples")
    outs = (_times(h, z, b) if h is a else _times(h, z.mT, a.mT).mT for z in h.copies())
    return h.like(*(z.flatten(0, 1) for z in outs), owned=True)


@register(F.scaled_dot_product_attention)
def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Dual:
    """`P = softmax(Q K' s)`, `dO = dP V + P dV`, `dP = P (dS - <P, dS>)`."""
    if dropout_p > 0 or enable_gqa:
        raise UnsupportedError("no rule for attention with dropout or grouped queries")
    h = next(m for m in (query, key, value) if isinstance(m, Dual))
    if h.ndim < 3:
        raise UnsupportedError("no rule for attention that mixes samples")
    (q, dq), (k, dk), (v, dv) = (
        m.halves() if isinstance(m, Dual) else (m[None], None) for m in (query, key, value)
    )
    s = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.mT * s
    if is_causal:
        n, m = scores.shape[-2:]
        attn_mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
    p, lower = scores.softmax(-1), h.source.lower
    moved: Any = 0
    if dq is not None or dk is not None:
        change: Any = 0
        if dq is not None:
            change = _times(h, dq, k[0].mT)
        if dk is not None:
            change = change + _times(h, dk, q[0].mT).mT
        change = lower(change - (p * change).sum(-1, keepdim=True))
        moved = _times(h, lower(s * p * change), v[0])
    if dv is not None:
        moved = moved + _times(h, dv.mT, p[0].mT).mT
    return h.of_halves(p @ v, moved)
