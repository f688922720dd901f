"""Attention of dual numbers in plain torch, differentiable twice. Its memory grows with N x M."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    tangents: int,
) -> tuple[Tensor, Tensor]:
    """`o = p v` with `p = softmax(s)`, `s = scale q k' + mask`, and its tangents

        do_i = sum_j p_ij ds_ij v_j - r_i o_i + sum_j p_ij dv_j,   r_i = sum_j p_ij ds_ij,

    with `ds = scale (dq k' + q dk')`. Of a row that attends to nothing all p are 0.

    Args:
        q (Tensor): `[B, H, N, D]`.
        k, v (Tensor): `[B, G, M, D]` and `[B, G, M, E]`; H / G heads in a row share them.
        tq, tk, tv (Tensor | None): their tangents, with a leading axis K; None for zero.
        mask (Tensor | None): broadcasts with `[B, H, N, M]`: bool, true where a row attends, or
            added to s.
        causal (bool): row i attends to columns up to i.
        scale (float): of s.
        tangents (int): K.

    Returns:
        tuple[Tensor, Tensor]: `[B, H, N, E]` and `[K, B, H, N, E]`.
    """
    shared = q.shape[1] // max(k.shape[1], 1)

    def spread(t: Tensor | None) -> Tensor | None:
        return t if t is None or shared == 1 else t.repeat_interleave(shared, -3)

    k, v, tk, tv = spread(k), spread(v), spread(tk), spread(tv)  # type: ignore[assignment]
    s = scale * (q @ k.mT)
    if causal:
        s = s.masked_fill(~s.new_ones(s.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    p = torch._safe_softmax(s, -1)
    out = p @ v
    moved = out.new_zeros((tangents, *out.shape))
    if tq is not None or tk is not None:
        ds = scale * sum(([tq @ k.mT] if tq is not None else []), q.new_zeros(()))
        ds = ds if tk is None else ds + scale * (q @ tk.mT)
        moved = moved + (p * (ds - (p * ds).sum(-1, keepdim=True))) @ v
    if tv is not None:
        moved = moved + p @ tv
    return out, moved
