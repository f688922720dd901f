"""A problem and its plan as tensors, for derivatives in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.ops.sinkhorn import dispatch
from fewstep.reference import sinkhorn as reference
from fewstep.reference.sinkhorn import Points

Tensors = tuple[Tensor, ...]
VARIABLES = 5  # x, y, a, b, matrix: the first fields of a Problem
Flags = tuple[bool, ...]  # which of the variables
Directions = tuple[Tensor | None, ...]  # one for each variable, None for zero


class Constants(NamedTuple):
    """What of a problem is not a tensor."""

    cost: str
    backend: str
    rho_x: float | None = None  # penalty of the marginal on x; None: it is fixed
    rho_y: float | None = None
    diagonal: int | None = None  # pairs j == i + diagonal are left out
    symmetric: bool = False  # x is y, a is b, f is g: derivatives are those of V(x, x, a, a)
    precision: str = "tf32x3"  # of `Points`
    formula: Callable[[Any, Any], Any] | None = None  # of `Points`

    @property
    def balanced(self) -> bool:
        return self.rho_x is None and self.rho_y is None


class Problem(NamedTuple):
    """A batch of problems at one temperature each, solved; `Points` has the shapes."""

    x: Tensor  # [B, N, D]
    y: Tensor  # [B, M, D]
    a: Tensor  # [B, N]
    b: Tensor  # [B, M]
    matrix: Tensor | None  # [B, N, M]
    f: Tensor  # [B, N]
    g: Tensor  # [B, M]
    eps: Tensor  # [B]
    segment_x: Tensor | None = None  # [B + 1]; everything above but eps then has a batch of 1
    segment_y: Tensor | None = None
    label_x: Tensor | None = None  # [B, N]
    label_y: Tensor | None = None  # [B, M]
    label_cost: Tensor | None = None  # [L, L']


def double(p: Problem) -> Problem:
    return Problem._make(t.double() if t is not None and t.is_floating_point() else t for t in p)


def points_of(p: Problem, c: Constants) -> Points:
    segments = None if p.segment_x is None or p.segment_y is None else (p.segment_x, p.segment_y)
    labels = None if p.label_x is None or p.label_y is None else (p.label_x, p.label_y)
    fixed = (p.matrix, segments, labels, p.label_cost, c.diagonal, c.formula)
    return Points(p.x, p.y, c.cost, *fixed, c.precision)


def transposed(p: Problem, c: Constants) -> tuple[Problem, Constants]:
    """The same problems seen from y."""
    matrix = None if p.matrix is None else p.matrix.mT
    label_cost = None if p.label_cost is None else p.label_cost.mT
    tensors = (p.y, p.x, p.b, p.a, matrix, p.g, p.f, p.eps, p.segment_y, p.segment_x)
    diagonal = None if c.diagonal is None else -c.diagonal
    of = c.formula
    formula = None if of is None else lambda y, x: of(x, y)
    flipped = c._replace(rho_x=c.rho_y, rho_y=c.rho_x, diagonal=diagonal, formula=formula)
    return Problem(*tensors, p.label_y, p.label_x, label_cost), flipped


def check_digits(p: Problem, c: Constants) -> None:
    """That the plan is more than rounding, as far as looking costs nothing."""
    for f, a, rho, segment in (
        (p.f, p.a, c.rho_x, p.segment_x),
        (p.g, p.b, c.rho_y, p.segment_y),
    ):
        reference.check_digits(f, a, to_points(p.eps, f, segment), rho)


def product(p: Problem, c: Constants, v: Tensor, weights: Tensor) -> Tensor:
    """`sum_j e_ij weights_j v_j`, `[B, N, K]` from `v [B, M, K]`; no weight is negative."""
    return dispatch.transport(c.backend, points_of(p, c), p.f, p.g, weights, p.eps, v)[0]


def marginal_product(p: Problem, c: Constants, v: Tensor | None, weights: Tensor) -> Tensor:
    """The same for `v [B, M]`, or for v = 1."""
    if v is not None:
        return product(p, c, v[..., None], weights)[..., 0]
    any_v = weights[..., None]
    return dispatch.transport(c.backend, points_of(p, c), p.f, p.g, weights, p.eps, any_v)[1]


def problem_index(t: Tensor, segment: Tensor) -> Tensor:
    """Which problem each flat point belongs to, `[N]`, from `t [1, N, ..]`."""
    return torch.bucketize(torch.arange(t.shape[1], device=t.device), segment[1:], right=True)


def to_points(t: Tensor, like: Tensor, segment: Tensor | None) -> Tensor:
    """`t [B]` for every point of `like [B, N, ..]` (`[1, N, ..]` where ragged), as `[B, 1]`."""
    return t[:, None] if segment is None else t[problem_index(like, segment)][None]


def total(t: Tensor, segment: Tensor | None) -> Tensor:
    """Sums over the points of each problem, `[B]`, and over what is behind them."""
    t = t.flatten(2).sum(-1) if t.ndim > 2 else t
    if segment is None:
        return t.sum(-1)
    out = t.new_zeros(segment.shape[0] - 1)
    return out.index_add(0, problem_index(t, segment), t[0])
