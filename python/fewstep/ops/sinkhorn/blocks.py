"""Derivatives of the cost between points, by blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.ops.sinkhorn.problem import Constants, Problem, Tensors
from fewstep.reference.sinkhorn import Points, exponent, weighted

# Pairs of points in a block of rows, which takes about ten arrays of that size. GPUs take more.
BLOCK_PAIRS = 2**18
_GPU_BLOCKS = 16


class Block:
    """Some rows of some problems: `e`, and the first and second derivatives of the costs.

    `t |x - y|^2 / 2` and `-x.y` are quadratic, a distance is the root of a quadratic cost, l1 is
    linear but for its kinks, and the derivatives of a formula are autograd's. Those at distance 0
    are taken as 0, which is right for a point and itself.
    """

    def __init__(self, p: Problem, c: Constants, problems: slice, rows: slice) -> None:
        self.index = (problems, rows)
        self.problems, self.cost = problems, c.cost
        self.a, self.b = p.a[problems, rows, None], p.b[problems, None, :]
        self.eps = p.eps[problems, None, None]
        x, y = p.x[problems, rows], p.y[problems]
        if c.formula is not None:
            x, y = (t.detach().requires_grad_() for t in (x, y))
        matrix = None if p.matrix is None else p.matrix[problems, rows]
        bare = Points(x, y, c.cost, matrix, formula=c.formula)
        with torch.set_grad_enabled(c.formula is not None):
            self.C = bare.costs()
        labels = None
        if p.label_x is not None and p.label_y is not None:
            labels = (p.label_x[problems, rows], p.label_y[problems])
        diagonal = None if c.diagonal is None else c.diagonal + rows.start
        fixed = (self.C.detach(), None, labels, p.label_cost, diagonal)
        C = Points(x, y, "matrix", *fixed).costs()
        self.z = exponent(C, p.f[problems, rows], p.g[problems], p.eps[problems])
        # Two points without weight may have any e; 0 times it has to be 0.
        self.e = self.z.clamp(max=math.log(torch.finfo(self.z.dtype).max) / 2).exp()
        self.x, self.y, self.t = x, y, 2.0 if c.cost == "sqeuclidean" else 1.0
        if c.cost not in ("dot", "formula"):  # a common offset would cancel in the products below
            centre = (self.b / self.b.sum(-1, keepdim=True)) @ y
            self.x, self.y = x - centre, y - centre
        if c.cost == "euclidean":
            self.inverse = torch.where(self.C > 0, 1 / self.C, 0.0)

    @property
    def plan(self) -> Tensor:
        return weighted(self.z, self.a, self.b)

    def _quadratic(self, w: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`sum_j w_ij t (x_i - y_j)` and `sum_i w_ij t (y_j - x_i)`."""
        out_x, out_y = w @ y, w.mT @ x
        if self.cost == "dot":
            return -out_x, -out_y
        out_x = w.sum(-1)[..., None] * x - out_x
        out_y = w.sum(-2)[..., None] * y - out_y
        return self.t * out_x, self.t * out_y

    def _signs(self) -> Iterator[Tensor]:
        """Of `x_i - y_j`, `[b, n, M]`, one coordinate after the other."""
        for k in range(self.x.shape[-1]):
            yield (self.x[..., :, None, k] - self.y[..., None, :, k]).sign()

    def _differentiate(self, out: Tensor, w: Tensor | None, *of: Tensor, graph: bool) -> Tensors:
        return torch.autograd.grad(
            out, of, w, retain_graph=True, create_graph=graph, materialize_grads=True
        )

    def _change_of_formula(self, w: Tensor, ux: Tensor, uy: Tensor) -> Tensors:
        """The derivatives of `sum_ij w_ij dC_ij` for w, x and y."""
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            x, y = self._differentiate(self.C, w, self.x, self.y, graph=True)
            change = (x * ux).sum() + (y * uy).sum()
        return self._differentiate(change, None, w, self.x, self.y, graph=False)

    def pull(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """`sum_j w_ij dC_ij/dx_i` and `sum_i w_ij dC_ij/dy_j`."""
        if self.cost == "formula":
            out_x, out_y = self._differentiate(self.C, w, self.x, self.y, graph=False)
            return out_x, out_y
        if self.cost == "l1":
            parts = [(ws.sum(-1), -ws.sum(-2)) for ws in (w * s for s in self._signs())]
            out_x, out_y = (torch.stack(t, -1) for t in zip(*parts, strict=True))
            return out_x, out_y
        return self._quadratic(w * self.inverse if self.cost == "euclidean" else w, self.x, self.y)

    def push(self, ux: Tensor, uy: Tensor) -> Tensor:
        """`dC_ij` along `ux [b, n, D]` and `uy [b, M, D]`."""
        if self.cost == "formula":
            return self._change_of_formula(self.e, ux, uy)[0]
        if self.cost == "l1":
            changes = (ux[..., :, None, k] - uy[..., None, :, k] for k in range(ux.shape[-1]))
            out = torch.zeros_like(self.e)
            for sign, change in zip(self._signs(), changes, strict=True):
                out += sign * change
            return out
        out = -(ux @ self.y.mT) - self.x @ uy.mT
        if self.cost == "dot":
            return out
        out = out + (self.x * ux).sum(-1)[..., :, None] + (self.y * uy).sum(-1)[..., None, :]
        return self.inverse * out if self.cost == "euclidean" else self.t * out

    def bend(self, w: Tensor, ux: Tensor, uy: Tensor, dC: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative of `pull(w)` along (ux, uy), where `dC = push(ux, uy)`."""
        if self.cost == "formula":
            return self._change_of_formula(w, ux, uy)[1:]  # type: ignore[return-value]
        if self.cost == "l1":
            return torch.zeros_like(ux), torch.zeros_like(uy)
        if self.cost != "euclidean":
            return self._quadratic(w, ux, uy)
        w = w * self.inverse
        straight = self._quadratic(w, ux, uy)
        turned = self._quadratic(w * dC * self.inverse, self.x, self.y)
        return straight[0] - turned[0], straight[1] - turned[1]


def blocks(p: Problem, c: Constants) -> Iterator[Block]:
    """All rows of all problems, at most about `BLOCK_PAIRS` pairs at a time."""
    (count, n), m = p.a.shape, p.b.shape[1]
    pairs = BLOCK_PAIRS if p.x.device.type == "cpu" else BLOCK_PAIRS * _GPU_BLOCKS
    pairs = pairs if c.formula is None else pairs // p.x.shape[-1]
    rows = max(1, min(n, pairs // m))
    problems = max(1, pairs // (rows * m))
    for i in range(0, count, problems):
        for j in range(0, n, rows):
            yield Block(p, c, slice(i, i + problems), slice(j, j + rows))
