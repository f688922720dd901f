"""Euler's and Heun's steps, of states `[B, ...]` and lengths `[B]`: those that densities track.

`fewstep.heun_solve` makes the same steps by fused passes, from a table of their coefficients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def euler(x: Tensor, v: Tensor, h: Tensor) -> Tensor:
    """`x + h v`: the end of Euler's step, and where Heun's looks ahead."""
    return torch.addcmul(x, _wide(h, x), v)


def heun(x: Tensor, v1: Tensor, v2: Tensor, h: Tensor) -> Tensor:
    """`x + h/2 (v1 + v2)`, with v2 the velocity at Euler's end."""
    return torch.addcmul(x, _wide(h / 2, x), v1 + v2)


def _wide(h: Tensor, x: Tensor) -> Tensor:
    return h.reshape(-1, *(1,) * (x.ndim - 1))


def nodes(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Steps of equal length from a to b `[B]`: `[B, S + 1]`."""
    return torch.stack([a + (b - a) * (j / steps) for j in range(steps + 1)], 1)


def walked(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor, *, method: str
) -> Tensor:
    """The end of the steps through times `[B, S + 1]`."""
    for t, following in itertools.pairwise(times.T):
        h = following - t
        v1 = velocity(x, t).to(x.dtype)
        end = euler(x, v1, h)
        x = end if method == "euler" else heun(x, v1, velocity(end, following).to(x.dtype), h)
    return x
