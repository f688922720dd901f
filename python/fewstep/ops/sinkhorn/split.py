"""Problems whose rows are spread over the ranks of a process group.

A rank has some of the rows and all columns. Its pass over its rows gives their potentials and its
share of the sums for the columns, relative to the potentials of these, which all ranks have: a sum
over the ranks is all that an iteration needs. Potentials are in units of log2, as in
`fewstep.reference.part`; those of the columns are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep._ranks import gathered, largest, summed
from fewstep.ops.sinkhorn import dispatch
from fewstep.ops.sinkhorn.function import call
from fewstep.ops.sinkhorn.schedule import annealed, largest_cost
from fewstep.reference.part import blocks
from fewstep.reference.sinkhorn import (
    DEFAULT_TOL,
    FARTHEST,
    LIGHT,
    NOWHERE,
    Inputs,
    Outputs,
    Points,
    beyond_digits,
    settled,
    weight_gradient,
)

LOG2E = math.log2(math.e)
# log2 of the sums of columns that are free of roundings, where rows weigh up to 2^LIFT together.
_RANGE = {torch.float32: (-50.0, 100.0), torch.float64: (-800.0, 900.0)}
_LIFT = 20.0
# Over the largest cost, temperatures at which float32 potentials have no digits.
_FLAT = 30.0


@dataclass(frozen=True)
class Split:
    """This rank's rows of one problem.

    Attributes:
        inputs: `x [1, N_r, D]` and `a [1, N_r]` of this rank, all of y and b.
        group: the process group.
        rows: N_r of each rank.
        rank: this one.
        backend: "cpp" or "reference".
        mass: the sum of all a.
        light: weights of rows below it are light; 0 where none is.
    """

    inputs: Inputs
    group: Any
    rows: list[int]
    rank: int
    backend: str
    mass: float = 0.0
    light: float = 0.0


@dataclass(frozen=True)
class Solved:
    """`Outputs` of a `Split`, and what its gradient depends on."""

    outputs: Outputs
    beyond: bool  # potentials without digits for eps, on any rank


def prepared(split: Split, anneal: Any, both: bool = False) -> Split:
    """With what depends on all rows: masses, the start of annealing, float64 where costs are flat.

    `both` where y are the rows of all ranks.
    """
    i = split.inputs
    a, x, eps = i.a.detach()[0], i.points.x.detach()[0], i.eps
    kept = (a > 0)[:, None]
    low, high = (torch.where(kept, sign * x, -torch.inf) for sign in (-1, 1))
    no_row = x.new_full((1, x.shape[1]), -torch.inf)
    corners = torch.cat([torch.cat([t, no_row]).amax(0) for t in (low, high)])
    heaviest = torch.cat([a, a.new_zeros(1)]).amax()
    most = largest(torch.cat([corners, heaviest[None]]), split.group)
    box = most[:-1].reshape(2, -1) * most.new_tensor([[-1.0], [1.0]])
    limit = LIGHT * most[-1]
    light = ((a > 0) & (a < limit)).any().double()
    lost = corners.isnan().any().double()
    sums = summed(torch.stack([a.double().sum(), light, lost]), split.group)
    mass, any_light, any_lost = sums.tolist()
    box = box * torch.nan if any_lost else box
    points = replace(i.points.detached(), x=box[None])
    columns = i.b.detach()
    weights = torch.ones_like(box[:, 0])[None]
    if both:
        points, columns = replace(points, y=box[None]), weights
    schedule = i.schedule
    if anneal is not None:
        bare = replace(schedule, start=None, factor=1.0, temperatures=None)
        schedule = annealed(bare, anneal, points, (weights, columns), eps, True)
    i = replace(i, schedule=schedule)
    if x.dtype == torch.float32 and bool(
        eps[0] > _FLAT * largest_cost(points, weights, columns)[0]
    ):
        i, mass = _doubled(i, mass)
    return replace(split, inputs=i, mass=mass, light=limit.item() if any_light else 0.0)


def _doubled(i: Inputs, mass_a: float) -> tuple[Inputs, float]:
    """In float64, and the mass. Those of 1, or the same, are so but for their roundings."""
    mass, weights = 1.0, list[Tensor]()
    for w in (i.a.double(), i.b.double()):
        total = float(w.detach().sum()) if weights else mass_a
        scale = mass / total if abs(total - mass) <= 2.0**-20 * mass else 1.0
        mass = total * scale
        weights.append(w * scale)
        mass_a = mass_a if len(weights) > 1 else mass
    points, s = i.points, i.schedule
    start, steps = (t if t is None else t.double() for t in (s.start, s.temperatures))
    points = replace(points, x=points.x.double(), y=points.y.double())
    schedule = replace(s, start=start, temperatures=steps)
    a, b = weights
    f0, g0 = (t if t is None else t.double() for t in (i.f0, i.g0))
    wide = replace(i, points=points, a=a, b=b, eps=i.eps.double(), f0=f0, g0=g0, schedule=schedule)
    return wide, mass_a


def _temperatures(i: Inputs) -> Iterator[float]:
    """Those before eps, with one iteration at each."""
    s, eps = i.schedule, float(i.eps[0])
    if s.temperatures is not None:
        yield from s.temperatures.tolist()
    if s.start is not None:
        e = float(s.start[0])
        while e > eps:
            yield e
            e *= s.factor


class _Pass:
    """Passes over this rank's rows at a temperature, and what they add up to over all ranks."""

    def __init__(self, split: Split) -> None:
        i = split.inputs
        self.split, self.points = split, i.points.detached()
        self.a, self.b = i.a.detach()[0], i.b.detach()[0]
        self.log_b = self.b.double().log2()
        self.F = None if i.f0 is None else i.f0[0].detach()
        shape = (len(self.b),)
        self.G = self.log_b.new_zeros(shape) if i.g0 is None else i.g0[0].detach().double()
        self.eps = LOG2E  # so that F and G are in units of log2
        self.error, self.mass, self.weight = math.inf, 0.0, 0.0

    def cool(self, eps: float) -> None:
        ratio = self.eps / eps
        F = None if self.F is None else (self.F.double() * ratio).clamp(max=NOWHERE)
        self.F = None if F is None else F.to(self.a)
        self.G, self.eps = (self.G * ratio).clamp(max=NOWHERE), eps

    def damping(self, side: int) -> tuple[float, float]:
        """Of a potential, and what `target` its marginal has."""
        rho = self.split.inputs.schedule.rho[side]
        return (1.0, 0.0) if rho is None else (rho / (rho + self.eps), self.eps / rho)

    @property
    def h(self) -> Tensor:
        return torch.where(self.b > 0, self.G + self.log_b, -torch.inf).to(self.a)

    def rows(self, h: Tensor, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
        of_rows, scale = self.damping(0), LOG2E / self.eps
        s = self.split
        return dispatch.part(s.backend, self.points, self.a, h, self.F, scale, *of_rows, columns)

    def note(self, numbers: Tensor) -> None:
        error, self.mass, self.weight = numbers.tolist()
        self.error = error / self.split.mass

    def next(self, columns: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """F, H before it and the sums of all ranks."""
        h = self.h
        F, sums, numbers = self.rows(h, columns)
        together = summed(torch.cat([sums.double(), numbers]), self.split.group)
        self.note(together[-3:])
        return F, h.double(), together[:-3]

    def column_transform(self, which: Tensor) -> Tensor:
        """`-log2 sum_i a_i exp2(F_i - k C_ij)` of some columns, by their own log-sum-exp."""
        s, p = self.split, self.points
        assert self.F is not None
        own = Points(p.y[:, which].contiguous(), p.x, p.cost, precision=p.precision)
        fa = (self.F.double() + self.a.double().log2()).to(self.a)
        if p.x.shape[1] == 0:
            t = fa.new_full((own.x.shape[1],), torch.inf).double()
        else:
            ones, scale = torch.ones_like(self.b[which]), LOG2E / self.eps
            t = dispatch.part(s.backend, own, ones, fa, None, scale, 1.0, 0.0, False)[0].double()
        least = -largest(-t, s.group)
        return least - summed((least - t).exp2(), s.group).log2()

    def commit(self, F: Tensor, h: Tensor, sums: Tensor) -> None:
        low, high = _RANGE[self.a.dtype]
        low += max(0.0, math.log2(self.weight) - _LIFT) if self.weight > 0 else 0.0
        self.F, log_sum = F, sums.log2()
        soft, counted = h - log_sum, self.b > 0
        bad = counted & ~((log_sum >= low) & (log_sum <= high))
        if bool(bad.any()):
            soft[bad] = self.column_transform(bad)
        self.G = torch.where(counted, self.damping(1)[0] * soft, 0.0)

    def unsettled(self, F: Tensor) -> float:
        """Square of the largest step to F, over eps, of a light row of any rank."""
        if self.split.light == 0:
            return 0.0
        assert self.F is not None
        before, after = self.F.double(), F.double()
        step = (after - before).abs()
        light = (self.a > 0) & (self.a < self.split.light) & ~(after > FARTHEST)
        light &= step > 8 * torch.finfo(F.dtype).eps * before.abs()
        step = torch.cat([torch.where(light, step, 0.0), step.new_zeros(1)])
        return float((largest(step.amax()[None], self.split.group)[0] / LOG2E).square())

    def reached(self, F: Tensor, tol: float | None) -> bool:
        return tol is not None and self.error <= tol and self.unsettled(F) <= tol


def solve(split: Split) -> Solved:
    """Alternating updates: `Outputs` of the whole problem, f of this rank's rows."""
    p, s = _Pass(split), split.inputs.schedule
    iterations, stopped = 0, False
    for e in _temperatures(split.inputs):
        p.cool(e)
        p.commit(*p.next())
        iterations += 1
    p.cool(float(split.inputs.eps[0]))
    for k in range(s.max_iter):
        found = p.next()
        if k > 0 and p.reached(found[0], s.tol):
            stopped = True
            break
        p.commit(*found)
        iterations += 1
    F = found[0] if stopped else p.next(columns=False)[0]
    residual = max(p.error, p.unsettled(F))
    assert p.F is not None
    p.F = torch.where(p.a > 0, p.F, F)  # without weight: the transform of what came out
    empty = p.b == 0
    if bool(empty.any()):
        p.G[empty] = p.damping(1)[0] * p.column_transform(empty)
    f, g = ((t.double() * (p.eps / LOG2E)).to(p.a)[None] for t in (p.F, p.G))
    mass = float(p.b.double().sum()) if s.rho == (None, None) else p.mass  # columns are exact
    return _finished(p, f, g, mass, residual, iterations)


def solve_self(split: Split, part: slice) -> Solved:
    """Symmetric updates of one potential, where `y[part]` are the rows x and y those of all ranks.

    All ranks have all of it, as g.
    """
    p, s = _Pass(split), split.inputs.schedule
    counts, group = [n + 3 for n in split.rows], split.group
    iterations = 0

    def ahead() -> Tensor:
        """F by alternating updates, of all ranks."""
        p.F = None if fresh else p.G[part].to(p.a)
        F, _, numbers = p.rows(p.h, columns=False)
        every = gathered(torch.cat([F.double(), numbers]), counts, group)
        p.note(torch.stack([t[-3:] for t in every]).sum(0))
        return torch.cat([t[:-3] for t in every])

    fresh = split.inputs.g0 is None
    for e in _temperatures(split.inputs):
        p.cool(e)
        F = ahead()
        p.G, fresh = F if fresh else (p.G + F) / 2, False
        iterations += 1
    p.cool(float(split.inputs.eps[0]))
    for k in range(s.max_iter):
        F = ahead()
        if k > 0 and p.reached(F[part].to(p.a), s.tol):
            break
        p.G, fresh = F if fresh else (p.G + F) / 2, False
        iterations += 1
    p.G = ahead()
    F = ahead()
    residual = max(p.error, p.unsettled(F[part].to(p.a)))
    p.G = torch.where(p.b > 0, p.G, F)
    g = (p.G * (p.eps / LOG2E)).to(p.a)[None]
    return _finished(p, g[:, part], g, p.mass, residual, iterations)


def _finished(
    p: _Pass, f: Tensor, g: Tensor, mass: float, residual: float, iterations: int
) -> Solved:
    (rho_x, rho_y), tol = p.split.inputs.schedule.rho, p.split.inputs.schedule.tol
    eps = p.a.new_tensor([[p.eps]])
    of_x = settled(f.double(), p.a.double(), eps.double(), rho_x)
    of_y = settled(g.double(), p.b.double(), eps.double(), rho_y)
    far = beyond_digits(f, p.a, eps, rho_x).any(), beyond_digits(g, p.b, eps, rho_y).any()
    part, lost = summed(torch.stack([of_x[1][0], far[0].double()]), p.split.group).tolist()
    mass_b = float(p.b.double().sum())
    value = part + float(of_y[1]) - p.eps * (mass - p.split.mass * mass_b)
    beyond = bool(lost) or bool(far[1])
    numbers = p.a.new_tensor([value, math.inf if beyond else residual])
    converged = (numbers[1:] <= (DEFAULT_TOL if tol is None else tol)) & numbers[:1].isfinite()
    steps = torch.full_like(converged, iterations, dtype=torch.int64)
    potentials = of_x[0].to(p.a), of_y[0].to(p.a)
    return Solved((*potentials, numbers[:1], numbers[1:], steps, converged), beyond)


def differentiable(
    split: Split, solved: Solved, own: slice | None = None, rows: bool = True
) -> Tensor:
    """The value `[1]` with the gradients of one process, for x and a of this rank, y and b.

    `own` are this rank's rows among the columns of a problem of a cloud with itself. With `rows`
    the cloud is x and a, of which this rank has its part, else y and b, which all ranks have.
    """
    i = split.inputs
    tensors = [i.points.x, i.points.y, i.a, i.b]
    for k in () if own is None else (1, 3) if rows else (0, 2):
        tensors[k] = tensors[k].detach()
    out: Tensor = call(_Value, solved.outputs[2], *tensors, split, solved, own)
    return out


class _Value(torch.autograd.Function):
    """Identity on the value that knows its gradient, by the envelope theorem."""

    @staticmethod
    def forward(value: Tensor, *args: Any) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, y, a, b, ctx.split, ctx.solved, ctx.columns = inputs
        ctx.save_for_backward(x, y, a, b)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "sinkhorn: process_group has first derivatives alone, got create_graph=True"
            )
        x, y, a, b = ctx.saved_tensors
        _, need_x, need_y, need_a, need_b, *_ = ctx.needs_input_grad
        split: Split = ctx.split
        i, (f, g, *_) = split.inputs, ctx.solved.outputs
        columns, points = ctx.columns, replace(i.points, x=x, y=y)
        if ctx.solved.beyond and (need_x or need_y):
            raise ValueError(
                f"sinkhorn: eps must be larger for a gradient in {x.dtype}, got {i.eps[0].item()}"
                " with potentials whose rounding is more than eps; or take float64"
            )
        factor = 1 if columns is None else 2
        of_x = of_y = of_a = of_b = None

        def rows() -> Tensor:
            return w * factor * _gradient(split, points, f, g, a, b)

        if need_x:
            of_x = rows()
        if need_y and columns is None:
            own = _gradient(split, points.swapped(), g, f, b, a)
            of_y = w * summed(own, split.group)
        elif need_y:
            of_y = torch.zeros_like(y)
            of_y[:, columns] = rows()
            of_y = summed(of_y, split.group)
        eps, (rho_x, rho_y) = i.eps[:, None], i.schedule.rho
        if need_a:
            of_a = w * factor * weight_gradient(f, b.sum(1, keepdim=True), eps, rho_x)
        if need_b:
            mass = torch.full_like(eps, split.mass)
            of_b = w * factor * weight_gradient(g, mass, eps, rho_y)
        return None, of_x, of_y, of_a, of_b, None, None, None


def _gradient(split: Split, points: Points, f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`sum_j P_ij dC_ij/dx_i`, without the costs of all pairs at once."""
    n, eps = points.x.shape[1], split.inputs.eps
    if n == 0 or points.y.shape[1] == 0:
        return torch.zeros_like(points.x)
    pieces = blocks(points) if split.backend == "reference" else [slice(0, n)]
    parts = [
        dispatch.gradient(
            *(split.backend, replace(points, x=points.x[:, rows]), f[:, rows], g),
            *(a[:, rows], b, eps),
        )
        for rows in pieces
    ]
    return torch.cat(parts, 1)
