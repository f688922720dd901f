"""One pass over a part of the rows of a problem, written for reading.

Potentials are in units of log2, `F_i = f_i k` and `H_j = g_j k + log2 b_j` with
`k = log2(e) / eps`, so that `P_ij = a_i exp2(F_i + H_j - k C_ij)`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewstep._torch import exactly
from fewstep.reference.costs import OF_DISTANCE
from fewstep.reference.sinkhorn import NOWHERE, Points

PAIRS = 2**24  # whose costs are formed at a time

Part = tuple[Tensor, Tensor, Tensor]


def blocks(points: Points) -> list[slice]:
    """Rows of one problem whose costs are formed together."""
    n, m, d = points.x.shape[1], points.y.shape[1], points.x.shape[2]
    each = 1 if points.cost in OF_DISTANCE else d  # numbers that a pair's cost is made of
    step = max(1, PAIRS // (m * each))
    return [slice(i, i + step) for i in range(0, n, step)]


def part(
    points: Points,
    a: Tensor,
    h: Tensor,
    f: Tensor | None,
    scale: float,
    damping: float,
    target: float,
    want_columns: bool,
) -> Part:
    """F, sums for the columns, and three numbers, of the rows `x [1, N, D]`.

    `F_i = -damping log2 sum_j exp2(H_j - k C_ij)`, `sums_j = sum_i a_i exp2(F_i + H_j - k C_ij)`
    (none where unwanted). The numbers, float64: the L1 error of the rows with the F before, `f`,
    where row i ought to have the mass `a_i exp2(-target F_i)`; their mass; and what bounds the
    share of rounded entries in the sums.
    """
    sums = h.new_zeros(h.shape[0] if want_columns else 0)
    numbers, found = h.new_zeros(3, dtype=torch.float64), []
    with torch.no_grad(), exactly(h.device):
        for rows in blocks(points):
            C = replace(points, x=points.x[:, rows]).costs()[0]
            weight = a[rows]
            z = h - scale * C
            shift = (-z.amax(1)).clamp(max=NOWHERE)
            e = torch.where((shift >= NOWHERE)[:, None], 0.0, (z + shift[:, None]).exp2())
            soft = torch.where(shift >= NOWHERE, shift, shift - e.sum(1).log2())
            found.append(damping * soft)
            if f is not None:
                F, w = f[rows].double(), weight.double()
                mass = (F - soft.double()).exp2()
                error = (mass - (-target * F).exp2()).abs()
                both = torch.stack([error, mass]) * w
                numbers[:2] += torch.where(w > 0, both, 0 * w).sum(1)
            w = torch.where(weight > 0, weight * (found[-1] - shift).exp2(), 0 * weight)
            w = torch.where(shift >= NOWHERE, 0.0, w)
            numbers[2] += w.double().sum()
            if want_columns:
                sums += w @ e
    return torch.cat(found), sums, numbers
