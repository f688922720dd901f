"""A step of a sampler outside its network: one linear combination of the state and predictions.

A sampler is a table of coefficients, float64 `[K, 1 or B, 8]`, and the order in which its network
is called. Row c of the table makes, with state x, the network's outputs F_j and normal noise n,

    y = c_0 x + sum_j c_j F_j + c_6 n,    next input of the network: c_7 y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.reference.probe import normals, philox

TERMS, NOISE, SCALE, COLUMNS = 5, 6, 7, 8
_STAGE = 15  # of the noise: apart from the probes of `fewstep.divergence`
_MASK = 0xFFFFFFFF


def combine(
    x: Tensor, low: Tensor | None, terms: list[Tensor], row: Tensor, noise: Tensor | None = None
) -> Tensor:
    """`c_0 (x + low) + sum_j c_j F_j + c_6 n` in the dtype of row.

    Args:
        x (Tensor): `[B, ...]`, the state, or of a state `x + low` that part.
        low (Tensor | None): what rounding to the dtype of x left of the state.
        terms (list[Tensor]): F, up to 5 of the shape of x.
        row (Tensor): coefficients c, `[1 or B, 8]`.
        noise (Tensor | None): n.

    Returns:
        Tensor: of the shape of x.
    """
    c = row.T.reshape(COLUMNS, -1, *(1,) * (x.ndim - 1))
    y = x.to(row.dtype) if low is None else x.to(row.dtype) + low
    y = c[0] * y
    for j, term in enumerate(terms):
        y = y + c[j + 1] * term
    return y if noise is None else y + c[NOISE] * noise


def split(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y rounded to a dtype, and what rounding left of it."""
    high = y.to(dtype)
    return high, (y - high).to(dtype)


def noise(seeds: Tensor, row: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normals at a row of the table: float64 `[B, *shape]`, a sample's from its seed."""
    d = torch.Size(shape).numel()
    blocks = torch.arange(-(-d // 4), device=seeds.device)
    zero = torch.zeros_like(blocks)
    counter = (blocks | _STAGE << 28, zero + row, zero, zero)
    key = (seeds[:, None] & _MASK, seeds[:, None] >> 32 & _MASK)
    words = torch.stack(torch.broadcast_tensors(*philox(counter, key)), -1)  # type: ignore[no-untyped-call]
    return normals(words).flatten(1)[:, :d].reshape(-1, *shape)
