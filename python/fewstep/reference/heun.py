"""A step of a sampler outside its network: combinations of the state and of predictions.

A sampler is a table of coefficients, float64 `[K, 1 or B, 8]`, and the order in which its network
is called. Row c of the table makes, with state x, up to two outputs F and U of the network and
normal noise n, the next state y and the network's next input z:

    y = c_0 x + c_1 F + c_2 U + c_3 n,    z = c_7 y + c_4 x + c_5 F + c_6 U.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.reference.probe import normals, philox

TERMS, NOISE, NET, SCALE, COLUMNS = 2, 3, 4, 7, 8
_STAGE = 15  # of the noise: apart from the probes of `fewstep.divergence`
_MASK = 0xFFFFFFFF


def combine(
    x: Tensor, low: Tensor | None, terms: list[Tensor], row: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The next state and the network's next input, in the dtype of row.

    Args:
        x (Tensor): `[B, ...]`, the state, or of a state `x + low` that part.
        low (Tensor | None): what rounding to the dtype of x left of the state.
        terms (list[Tensor]): F and U, as far as there are any.
        row (Tensor): coefficients c, `[1 or B, 8]`.
        noise (Tensor | None): n.

    Returns:
        tuple[Tensor, Tensor]: y and z, of the shape of x.
    """
    c = row.T.reshape(COLUMNS, -1, *(1,) * (x.ndim - 1))
    x = x.to(row.dtype) if low is None else x.to(row.dtype) + low
    y = c[0] * x
    for j, term in enumerate(terms):
        y = y + c[1 + j] * term
    if noise is not None:
        y = y + c[NOISE] * noise
    z = c[SCALE] * y + c[NET] * x
    for j, term in enumerate(terms):
        z = z + c[NET + 1 + j] * term
    return y, z


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
