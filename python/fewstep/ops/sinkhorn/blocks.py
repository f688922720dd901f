"""Derivatives of the cost between points, by blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fewstep.ops.sinkhorn.problem import Constants, Problem
from fewstep.reference.costs import COSTS, Derivatives
from fewstep.reference.sinkhorn import Points, exponent, weighted

# Pairs of points in a block of rows, which takes about ten arrays of that size. GPUs take more.
BLOCK_PAIRS = 2**18
_GPU_BLOCKS = 16


class Block:
    """Some rows of some problems: `e`, the plan, and the derivatives of the costs."""

    def __init__(self, p: Problem, c: Constants, problems: slice, rows: slice) -> None:
        self.index = (problems, rows)
        self.problems, row = problems, COSTS[c.cost]
        self.a, self.b = p.a[problems, rows, None], p.b[problems, None, :]
        self.eps = p.eps[problems, None, None]
        x, y = p.x[problems, rows], p.y[problems]
        if row.traced:
            x, y = (t.detach().requires_grad_() for t in (x, y))
        matrix = None if p.matrix is None else p.matrix[problems, rows]
        bare = Points(x, y, c.cost, matrix, formula=c.formula)
        with torch.set_grad_enabled(row.traced):
            bare_costs = bare.costs()
        labels = None
        if p.label_x is not None and p.label_y is not None:
            labels = (p.label_x[problems, rows], p.label_y[problems])
        diagonal = None if c.diagonal is None else c.diagonal + rows.start
        fixed = (bare_costs.detach(), None, labels, p.label_cost, diagonal)
        self.costs = Points(x, y, "matrix", *fixed).costs()
        self.z = exponent(self.costs, p.f[problems, rows], p.g[problems], p.eps[problems])
        self._bare = (x, y, bare_costs)
        self._row = row

    @cached_property
    def e(self) -> Tensor:
        # Two points without weight may have any e; 0 times it has to be 0.
        return self.z.clamp(max=math.log(torch.finfo(self.z.dtype).max) / 2).exp()

    @cached_property
    def plan(self) -> Tensor:
        return weighted(self.z, self.a, self.b)

    @cached_property
    def derivatives(self) -> Derivatives:
        x, y, bare_costs = self._bare
        if self._row.centred:  # a common offset would cancel in products of coordinates
            centre = (self.b / self.b.sum(-1, keepdim=True)) @ y
            x, y = x - centre, y - centre
        return self._row.derivatives(x, y, bare_costs)


def blocks(p: Problem, c: Constants) -> Iterator[Block]:
    """All rows of all problems, at most about `BLOCK_PAIRS` pairs at a time."""
    (count, n), m = p.a.shape, p.b.shape[1]
    pairs = BLOCK_PAIRS if p.x.device.type == "cpu" else BLOCK_PAIRS * _GPU_BLOCKS
    if COSTS[c.cost].traced:  # whose graph may hold all coordinates of a pair
        pairs //= p.x.shape[-1]
    rows = max(1, min(n, pairs // m))
    problems = max(1, pairs // (rows * m))
    for i in range(0, count, problems):
        for j in range(0, n, rows):
            yield Block(p, c, slice(i, i + problems), slice(j, j + rows))
