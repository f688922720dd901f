"""Shapes, dtypes and the exact combination of a Heun step, and a velocity to solve with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.ops.heun import dispatch
from fewstep.reference import heun as reference

SHAPES = [(1, 1), (5, 7), (3, 130), (2, 3, 5), (0, 3), (4,), (2, 1100)]
# Of the state, the network, and whether what rounding leaves of the state is kept.
KINDS = [
    (torch.float32, torch.float32, False),
    (torch.float32, torch.float32, True),
    (torch.float64, torch.float32, False),
    (torch.float64, torch.float64, False),
]


def combine_into(
    backend: str,
    x: Tensor,
    low: Tensor | None,
    terms: list[Tensor],
    table: Tensor,
    row: int,
    *,
    seeds: Tensor | None = None,
    high: Tensor | None = None,
    out_low: Tensor | None = None,
    net: Tensor | None = None,
    wrong: Tensor | None = None,
) -> None:
    run = dispatch.into(backend, terms[0].dtype if terms else x.dtype)
    run(x, low, terms, table, row, seeds, high, out_low, net, wrong)


def exact(
    x: Tensor, low: Tensor | None, terms: list[Tensor], table: Tensor, seeds: Tensor | None
) -> tuple[Tensor, Tensor]:
    noise = None if seeds is None else reference.noise(seeds, 2, tuple(x.shape[1:]))
    return reference.combine(x, low, [t.double() for t in terms], table[2], noise)


class Field(nn.Module):
    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(d + 1, 8), nn.Linear(8, d)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(torch.cat((x, t[:, None]), 1))))
        return out
