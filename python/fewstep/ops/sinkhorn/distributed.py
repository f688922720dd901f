"""`sinkhorn` and `sinkhorn_divergence` with a process group: what ranks give, checked on all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep._ranks import agreed, check_group, checksum, gathered, summed
from fewstep._torch import untraced
from fewstep.ops.sinkhorn import split
from fewstep.ops.sinkhorn.canonical import canonical_problem
from fewstep.ops.sinkhorn.inputs import (
    check_masses,
    check_same_mass,
    eps_of_mean,
    initial_potential,
    mean_costs,
)
from fewstep.ops.sinkhorn.result import CanonicalProblem, SinkhornResult
from fewstep.ops.sinkhorn.split import Solved, Split
from fewstep.reference.costs import OF_POINTS

# Options that are served with one value alone.
_ONLY = {
    "update": "alternating",
    "relax": 1.0,
    "exclude_diagonal": False,
    "C": None,
    "cu_seqlens": None,
    "labels": None,
    "label_cost": None,
}


@dataclass(frozen=True)
class Shared:
    """A problem whose rows are spread over ranks, of which this one has `problem`."""

    problem: CanonicalProblem
    part: Split
    anneal: Any
    starts: tuple[Tensor | None, ...]  # of x with itself, all ranks', and of y with itself

    @property
    def own(self) -> slice:
        """This rank's rows among all."""
        first = sum(self.part.rows[: self.part.rank])
        return slice(first, first + self.part.rows[self.part.rank])

    def result(self, problem: CanonicalProblem, solved: Solved, value: Tensor) -> SinkhornResult:
        f, g, _, *rest = solved.outputs
        dtype = self.problem.a.dtype
        numbers = [t.to(dtype) if t.is_floating_point() else t for t in (value, *rest)]
        return problem.result(f.to(dtype), g.to(dtype), *numbers)


def _refuse(op: str, x: Any, y: Any, options: dict[str, Any]) -> None:
    for name, only in _ONLY.items():
        value = options[name]
        plain = value is only if only is None or only is False else value == only
        if not plain:
            tensors = isinstance(value, Tensor | tuple | list)
            got = type(value).__name__ if tensors else repr(value)
            raise ValueError(f"{op}: {name} must be {only!r} with process_group, got {got}")
    cost = options["cost"]
    if cost not in OF_POINTS:
        hint = ""
        if cost == "cosine":
            hint = "; 'half_sqeuclidean' of points of length 1 is the cosine cost"
        raise ValueError(
            f"{op}: cost must be one of {OF_POINTS} with process_group, got {cost!r}" + hint
        )
    for name, t in (("x", x), ("y", y)):
        if isinstance(t, Tensor) and t.ndim != 2:
            shape = tuple(t.shape)
            raise ValueError(f"{op}: {name} must be [N, D] with process_group, got {shape}")


def _text(value: Any) -> str:
    return checksum(value) if isinstance(value, Tensor) else repr(value)


def _needs(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled()


def shared(
    op: str, group: Any, x: Any, y: Any, options: dict[str, Any], starts: Any = (None, None)
) -> Shared:
    """The problem as all ranks have it, or an error on all of them."""
    check_group(op, group, {"x": x, "y": y, "a": options["a"], "b": options["b"]})
    automatic = isinstance(options["eps"], str) and options["eps"] == "auto"

    def local() -> tuple[CanonicalProblem, dict[str, str], dict[str, int]]:
        _refuse(op, x, y, options)
        eps = 1.0 if automatic else options["eps"]
        problem = canonical_problem(x, y, **{**options, "eps": eps}, part=True)
        if problem.temperatures:
            count = problem.temperatures[0]
            raise ValueError(f"{op}: eps must be one number with process_group, got {count}")
        p, s = problem, problem.schedule
        of_itself = replace(p.points, y=p.points.x), replace(p.points, x=p.points.y)
        for start, points in zip(starts, of_itself, strict=True):
            if start is not None:
                initial_potential((start, start), (), (), points, p.a.dtype)
        facts = {
            "the dtype of x": str(x.dtype),
            "the device of x": x.device.type,
            "cost": str(p.points.cost),
            "eps": "'auto'" if automatic else repr(p.eps.item()),
            "max_iter": str(s.max_iter),
            "tol": repr(s.tol),
            "reach": repr(s.rho),
            "anneal": _text(options["anneal"]),
            "y": checksum(p.points.y[0]),
            "b": checksum(p.b[0]),
            "the dtype of a": "None" if options["a"] is None else str(options["a"].dtype),
            "init": "None" if p.g0 is None else "g of " + checksum(p.g0[0]),
            "whether init has one for x with itself": str(starts[0] is not None),
            "init for y with itself": _text(starts[1]),
            "whether y requires a gradient": str(_needs(y)),
        }
        return problem, facts, {"rows": x.shape[0]}

    problem, told = agreed(op, group, x, local)
    rows, rank = [own["rows"] for own in told], dist.get_rank(group)
    if options["a"] is None:
        problem = replace(problem, a=torch.full_like(problem.a, 1 / sum(rows)))
    problem = replace(problem, ranks=len(rows))
    if automatic:
        problem = replace(problem, eps=_automatic_eps(problem, group))
    part = Split(problem, group, rows, rank, problem.backend)
    part = split.prepared(part, options["anneal"])
    masses = problem.a.new_tensor([part.mass]).double(), problem.b.detach().double().sum(1)
    check_masses("a", masses[0], problem.a.dtype)
    if problem.schedule.rho == (None, None):
        check_same_mass((options["a"], options["b"]), *masses)
    of_x = None
    if starts[0] is not None:
        own = starts[0].detach().to(problem.a.dtype)
        of_x = torch.cat(gathered(own, rows, group))
    of_y = None if starts[1] is None else starts[1].detach().to(problem.a.dtype)
    return Shared(problem, part, options["anneal"], (of_x, of_y))


def _automatic_eps(p: CanonicalProblem, group: Any) -> Tensor:
    a, b = p.a.detach(), p.b.detach()
    mass = a.double().sum(1)
    mean = mean_costs(p.points.detached(), a, b) if bool(mass > 0) else torch.zeros_like(mass)
    total = summed(torch.cat([mass * mean, mass]), group)
    return eps_of_mean(total[:1] / total[1:], a.dtype)


@untraced
def sinkhorn(group: Any, x: Any, y: Any, options: dict[str, Any]) -> SinkhornResult:
    """`fewstep.sinkhorn` of the rows of all ranks."""
    return between(shared("sinkhorn", group, x, y, options))


def between(s: Shared) -> SinkhornResult:
    """The problem between x, spread over ranks, and y."""
    solved = split.solve(s.part)
    return s.result(s.problem, solved, split.differentiable(s.part, solved))


def of_rows(s: Shared, rho: float | None) -> SinkhornResult:
    """The problem of x with itself: this rank's rows, and those of all as columns."""
    p, part = s.problem, s.part
    x, a = p.points.x, p.a
    every = [torch.cat(gathered(t.detach()[0], part.rows, part.group))[None] for t in (x, a)]
    points = replace(p.points, y=every[0])
    own = replace(p, points=points, b=every[1], targets=every[0])
    return _with_itself(s, own, part.rows, rho, s.own, s.starts[0], rows=True)


def of_columns(s: Shared, rho: float | None) -> SinkhornResult:
    """The problem of y with itself, which all ranks have; each takes some of the rows."""
    p, count, ranks = s.problem, s.problem.b.shape[1], len(s.part.rows)
    rows = [count // ranks + (rank < count % ranks) for rank in range(ranks)]
    first = sum(rows[: s.part.rank])
    own = slice(first, first + rows[s.part.rank])
    points = replace(p.points, x=p.points.y[:, own])
    some = replace(p, points=points, a=p.b[:, own])
    return _with_itself(s, some, rows, rho, own, s.starts[1], rows=False)


def _with_itself(
    s: Shared,
    p: CanonicalProblem,
    counts: list[int],
    rho: float | None,
    own: slice,
    start: Tensor | None,
    *,
    rows: bool,
) -> SinkhornResult:
    g0 = None if start is None else start[None]
    f0 = None if g0 is None else g0[:, own]
    schedule = replace(p.schedule, rho=(rho, rho), simultaneous=True, single=True, relax=0.5)
    p = replace(p, schedule=schedule, f0=f0, g0=g0)
    part = Split(p, s.part.group, counts, s.part.rank, s.part.backend)
    part = split.prepared(part, s.anneal, both=True)
    solved = split.solve_self(part, own)
    value = split.differentiable(part, solved, own, rows)
    if not rows:  # all ranks have all of it
        g = solved.outputs[1]
        solved = replace(solved, outputs=(g, *solved.outputs[1:]))
        points = replace(p.points, x=p.points.y)
        p = replace(p, points=points, a=p.b, ranks=1)
    return s.result(p, solved, value)


def mass_term(s: Shared) -> Tensor:
    """`eps / 2 (sum a - sum b)^2`, with derivatives for this rank's a and for b."""
    p = s.problem
    here = p.a.sum()
    mass = s.part.mass + (here - here.detach())
    return (p.eps[0] / 2 * (mass - p.b.sum()).square()).to(p.a.dtype)
