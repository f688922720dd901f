"""What is read off a plan block by block of rows: sums, entropies, random pairs, assignments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep._torch import readable, untraced
from fewstep.ops.sinkhorn.blocks import Block, blocks
from fewstep.ops.sinkhorn.problem import (
    Constants,
    Problem,
    double,
    problem_index,
    product,
    to_points,
    total,
    transposed,
)
from fewstep.reference.costs import COSTS

# Numbers of a plan that are drawn from at a time.
_DRAWN_PAIRS = 2**22


def alone(p: Problem) -> Iterator[tuple[int, Problem, slice, slice]]:
    """Ragged problems that have points one by one, with their number and where their points are."""
    assert p.segment_x is not None
    assert p.segment_y is not None
    cu_x, cu_y = p.segment_x.tolist(), p.segment_y.tolist()
    for i in range(len(cu_x) - 1):
        rows, columns = slice(cu_x[i], cu_x[i + 1]), slice(cu_y[i], cu_y[i + 1])
        if rows.start == rows.stop:
            continue
        own: dict[str, Any] = {"eps": p.eps[i : i + 1], "segment_x": None, "segment_y": None}
        for part, names in (
            (rows, ("x", "a", "f", "label_x")),
            (columns, ("y", "b", "g", "label_y")),
        ):
            own |= {name: t[:, part] for name in names if (t := getattr(p, name)) is not None}
        yield i, p._replace(**own), rows, columns


def times(plan: Tensor, t: Tensor) -> Tensor:
    """`plan t`, and 0 where the plan is 0, whatever t is."""
    return torch.where(plan == 0, 0.0, plan * t)


def _streamed(p: Problem, c: Constants) -> float | None:
    """The cost over the square of a distance, if products with the plan give its mean."""
    row = COSTS[c.cost]
    return row.scale if row.squared and p.label_cost is None else None


def mean_cost(p: Problem, c: Constants) -> Tensor:
    """`<P, C>`, float64 `[B]`; of squared distances by products with the plan, in float64."""
    scale = _streamed(p, c)
    if scale is not None:
        p = double(p)
        none = torch.zeros_like
        return _mean_square(p, c, none(p.f), none(p.g), torch.full_like(p.eps, scale))
    if p.segment_x is not None:
        out = torch.zeros_like(p.eps, dtype=torch.float64)
        for i, own, _, _ in alone(p):
            out[i] = mean_cost(own, c)[0]
        return out
    out = torch.zeros_like(p.eps, dtype=torch.float64)
    for block in blocks(p, c):
        out[block.problems] += times(block.plan, block.costs).sum(-1).double().sum(-1)
    return out


def _mean_square(p: Problem, c: Constants, of_x: Tensor, of_y: Tensor, scale: Tensor) -> Tensor:
    """`sum_ij P_ij (of_x_i + of_y_j + scale |x_i - y_j|^2)`, with `scale [B]`.

    The terms may cancel: all are of one product, whose P is the same to the last bit.
    """
    mass = total(p.b, p.segment_y)
    middle = torch.stack(  # from which a common offset would cancel
        [total(p.b * p.y[..., k], p.segment_y) / mass for k in range(p.y.shape[-1])], -1
    )
    x, y = (
        t - (middle[:, None] if segment is None else middle[problem_index(t, segment)])
        for t, segment in ((p.x, p.segment_x), (p.y, p.segment_y))
    )
    scale_x, scale_y = to_points(scale, p.f, p.segment_x), to_points(scale, p.g, p.segment_y)
    of_y = of_y + scale_y * y.square().sum(-1)
    v = torch.cat([y, of_y[..., None], torch.ones_like(y[..., :1])], -1)
    moved = times(p.a[..., None], product(p, c, v, p.b))
    along = moved[..., -1] * (of_x + scale_x * x.square().sum(-1)) + moved[..., -2]
    return total(along - 2 * scale_x * (moved[..., :-2] * x).sum(-1), p.segment_x)


def _sums(p: Problem, c: Constants) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of a plan's rows and columns and of `P log P`, all of the same P: a float64 problem's.

    Each logarithm is that of the plan, `(f + g - C) / eps + log a b'`. Sums of its parts, over
    marginals that round apart, would be off by the square of `C / eps` units in the last place.
    """
    scale = _streamed(p, c)
    if scale is not None:
        rows, columns = (
            times(q.a[..., None], product(q, d, torch.ones_like(q.b)[..., None], q.b))[..., 0]
            for q, d in ((p, c), transposed(p, c))
        )
        of_x, of_y = (
            torch.where((w > 0) & ~f.isinf(), f / to_points(p.eps, f, segment) + w.log(), 0.0)
            for f, w, segment in ((p.f, p.a, p.segment_x), (p.g, p.b, p.segment_y))
        )
        return rows, columns, _mean_square(p, c, of_x, of_y, -scale / p.eps)
    rows, columns = torch.zeros_like(p.a), torch.zeros_like(p.b)
    logarithm = torch.zeros_like(p.eps)
    if p.segment_x is not None:
        for i, own, at_x, at_y in alone(p):
            rows[:, at_x], columns[:, at_y], logarithm[i : i + 1] = _sums(own, c)
        return rows, columns, logarithm
    for block in blocks(p, c):
        plan = block.plan
        rows[block.index] = plan.sum(-1)
        columns[block.problems] += plan.sum(-2)
        z = block.z + block.a.log() + block.b.log()
        logarithm[block.problems] += times(plan, z).sum((-2, -1))
    return rows, columns, logarithm


def entropy(p: Problem, c: Constants) -> Tensor:
    """`1 - I / min(H(rows), H(columns))` of the plan over its mass, float64 `[B]`.

    I is the mutual information of rows and columns, and H the entropy of a marginal.
    """
    p = double(p)
    rows, columns, logarithm = _sums(p, c)
    mass = total(rows, p.segment_x)

    def entropy_of(w: Tensor, segment: Tensor | None) -> Tensor:
        return mass.log() - total(torch.special.xlogy(w, w), segment) / mass

    joint = mass.log() - logarithm / mass
    of_x, of_y = entropy_of(rows, p.segment_x), entropy_of(columns, p.segment_y)
    least = torch.minimum(of_x, of_y)
    # A marginal of a single point, of which rounding leaves this, tells nothing of the other.
    several = least > 1e-9
    information = (of_x + of_y - joint) / torch.where(several, least, 1.0)
    return torch.where(several, 1 - information, torch.where(least.isnan(), least, 1.0))


def _inverse(cdf: Tensor, u: Tensor) -> Tensor:
    """Where sums `cdf [.., K]` first exceed u times the last, for uniform numbers `u [.., n]`."""
    top = cdf[..., -1:]
    below = torch.nextafter(top, torch.zeros_like(top))  # never behind all that have a share
    return torch.searchsorted(cdf.contiguous(), torch.minimum(u * top, below), right=True)


def draw(
    p: Problem, c: Constants, mass: Tensor, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """n independent pairs (i, j) of each plan, `[B, n]`, from the masses of its rows."""
    cdf = mass.double().cumsum(-1)
    if readable(cdf) and not bool(((cdf[..., -1] > 0) & cdf[..., -1].isfinite()).all()):
        worst = cdf[..., -1].min().item()
        raise ValueError(f"sample: the plan must have a finite mass above 0, got {worst:g}")
    count, m = p.b.shape
    u = torch.rand(2, count, n, dtype=torch.float64, device=p.x.device, generator=generator)
    rows = _inverse(cdf, u[0])
    columns = torch.empty_like(rows)
    step = max(1, _DRAWN_PAIRS // max(count * m, 1))
    for start in range(0, n, step):
        part = slice(start, start + step)
        own = {"x": p.x.take_along_dim(rows[:, part, None], 1)}
        for name in ("a", "f", "label_x"):
            if (t := getattr(p, name)) is not None:
                own[name] = t.gather(1, rows[:, part])
        if p.matrix is not None:
            own["matrix"] = p.matrix.take_along_dim(rows[:, part, None], 1)
        for block in blocks(p._replace(**own), c._replace(diagonal=None)):
            problems, at = block.index
            picked = rows[:, part][problems, at]
            z = _log_shares(block, picked, c)
            cdf = (z - z.amax(-1, keepdim=True)).exp().double().cumsum(-1)
            columns[:, part][problems, at] = _inverse(cdf, u[1, :, part][problems, at, None])[
                ..., 0
            ]
    return rows, columns


def _log_shares(block: Block, rows: Tensor, c: Constants) -> Tensor:
    """`log(P_ij / a_i)` of rows, whose numbers say which pairs are left out."""
    z = block.z + block.b.log()
    if c.diagonal is None:
        return z
    j = torch.arange(z.shape[-1], device=z.device)
    return torch.where(j == rows[..., None] + c.diagonal, -torch.inf, z)


def assigned(p: Problem, c: Constants, kind: str) -> Tensor:
    """For each row a column of its own problem, or -1: `[B, N]`, flat where ragged."""
    if p.segment_x is None:
        return heaviest(p, c) if kind == "argmax" else permutation(p, c)
    out = torch.empty_like(p.f, dtype=torch.int64)
    for _, own, rows, _ in alone(p):
        out[:, rows] = assigned(own, c, kind)
    return out


def heaviest(p: Problem, c: Constants) -> Tensor:
    """For each row the column of its largest entry, the first of equal ones, or -1: `[B, N]`."""
    out = torch.empty_like(p.f, dtype=torch.int64)
    for block in blocks(p, c):
        z = block.z + block.b.log()
        out[block.index] = torch.where(z.amax(-1) > -torch.inf, z.argmax(-1), -1)
    return out


def permutation(p: Problem, c: Constants) -> Tensor:
    """The permutation of least total cost, `[B, N]`; all costs of a problem are in memory."""
    if p.x.shape[1] != p.y.shape[1]:
        sizes = f"{p.x.shape[1]} and {p.y.shape[1]}"
        raise ValueError(
            f"assignment: a permutation needs as many points in x as in y, got {sizes}"
        )
    out = []
    for k in range(p.x.shape[0]):
        costs = torch.cat(
            [block.costs[0] for block in blocks(Problem._make(_one(t, k, p) for t in p), c)]
        )
        out.append(least_cost(costs.double(), p.g[k].double()))
    return torch.stack(out) if out else torch.empty_like(p.f, dtype=torch.int64)


def _one(t: Tensor | None, k: int, p: Problem) -> Tensor | None:
    return t if t is None or t is p.label_cost else t[k : k + 1]


@untraced
def least_cost(C: Tensor, g: Tensor) -> Tensor:
    """The permutation j of `C [N, N]` of least `sum_i C[i, j_i]`, int64 `[N]`.

    By shortest augmenting paths: exact, in `N^3` operations at most. Potentials g of columns, of
    which any will do, are where it starts. Good ones leave few rows to be assigned.

    Source: Jonker and Volgenant, A shortest augmenting path algorithm for dense and sparse linear
    assignment problems (1987); the form of Crouse, On implementing 2D rectangular assignment
    algorithms (2016).
    """
    costs, v = C.detach().cpu().numpy(), g.detach().cpu().numpy().copy()
    if np.isnan(costs).any() or not np.isfinite(costs).any(1).all():
        raise ValueError(
            "assignment: each row must have a finite cost, got one of NaN or inf alone"
        )
    v[~np.isfinite(v)] = 0.0
    reduced = costs - v
    u, first = reduced.min(1), reduced.argmin(1)
    n = len(costs)
    column_of, row_of = np.full(n, -1), np.full(n, -1)
    taken, at = np.unique(first, return_index=True)  # the first row that wants a column has it
    column_of[at], row_of[taken] = taken, at
    for start in np.flatnonzero(column_of < 0):
        distance, before = np.full(n, np.inf), np.full(n, -1)
        rows, done = [], np.zeros(n, dtype=bool)
        length, i, sink = 0.0, start, -1
        while sink < 0:
            rows.append(i)
            through = length + costs[i] - u[i] - v
            nearer = ~done & (through < distance)
            distance[nearer], before[nearer] = through[nearer], i
            j = int(np.where(done, np.inf, distance).argmin())
            length = distance[j]
            if done[j] or not np.isfinite(length):
                raise ValueError("assignment: no permutation has a finite cost; raise some of inf")
            done[j] = True
            sink, i = (j, i) if row_of[j] < 0 else (-1, row_of[j])
        u[start] += length
        others = np.array(rows[1:], dtype=np.int64)
        u[others] += length - distance[column_of[others]]
        v[done] -= length - distance[done]
        while True:  # back along the path
            i = before[sink]
            row_of[sink] = i
            column_of[i], sink = sink, column_of[i]
            if i == start:
                break
    return torch.from_numpy(column_of).to(C.device)
