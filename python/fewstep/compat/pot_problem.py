"""A problem as POT has it, and its solution by `fewstep.sinkhorn`."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from fewstep._checks import count, floating, number
from fewstep.ops.sinkhorn import solve as _op
from fewstep.ops.sinkhorn.convergence import ConvergenceWarning
from fewstep.ops.sinkhorn.inputs import canonical_points
from fewstep.ops.sinkhorn.result import SinkhornResult

_transport = inspect.unwrap(_op.sinkhorn)  # without its warning: POT has its own

_TINY = math.log(1e-300)  # the logarithm that POT gives of a scaling that is 0
_MASSES = {torch.float64: 1e-6}  # how far equal masses may be apart, relatively; else 1e-3


def unserved(who: str, name: str, value: Any, instead: str) -> NoReturn:
    raise NotImplementedError(f"{who}: {name}={value!r} of POT is not served here; use {instead}")


def positive(who: str, name: str, value: Any) -> float:
    out = number(who, name, value)
    if not 0 < out < math.inf:
        raise ValueError(f"{who}: {name} must be positive and finite, got {value!r}")
    return out


@dataclass(frozen=True)
class Given:
    """A problem as POT has it; `[..]` is `[B]` for a batch, else nothing."""

    who: str
    costs: dict[str, Any]  # M, or x, y and cost
    a: Tensor  # [.., N]
    b: Tensor  # [.., M]
    reg: float
    rho: tuple[float | None, float | None]
    c: Tensor | None  # of the entropy, [.., N, M]; None is a b'

    @property
    def balanced(self) -> bool:
        return self.rho == (None, None)

    @functools.cached_property
    def mass(self) -> Tensor:
        """Of balanced problems, `[.., 1]`, differentiable."""
        return self.a.sum(-1, keepdim=True)

    @property
    def matrix(self) -> Tensor:
        if "M" in self.costs:
            out: Tensor = self.costs["M"]
            return out
        x, y, cost = (self.costs[name] for name in ("x", "y", "cost"))
        out = canonical_points(x, y, cost, None, False, None, False)[0].costs()
        return out.reshape(*self.a.shape, self.b.shape[-1])

    @property
    def differentiable(self) -> bool:
        tensors = (*self.costs.values(), self.a, self.b)
        needed = any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
        return needed and torch.is_grad_enabled()


@dataclass(frozen=True)
class Solved:
    """A problem and its solution; `columns` where those were updated first, so x and y swapped."""

    given: Given
    result: SinkhornResult
    columns: bool

    @functools.cached_property
    def scalings(self) -> tuple[Tensor, Tensor]:
        """log u and log v, detached: the plan is `u_i exp(-M_ij / reg) v_j`, times c_ij if any."""
        p, r = self.given, self.result
        f, g = (r.g, r.f) if self.columns else (r.f, r.g)
        u, v = f / p.reg, g / p.reg
        if p.c is None and p.balanced:
            u, v = u + (p.a / p.mass).log().detach(), v + (p.b / p.mass).log().detach()
            grow = p.mass.detach().log()
            return (u, v + grow) if self.columns else (u + grow, v)
        if p.balanced:
            u = u - p.mass.detach().log()
        return torch.where(p.a > 0, u, _TINY), torch.where(p.b > 0, v, _TINY)

    def plan(self, differentiable: bool) -> Tensor:
        """`[.., N, M]`, with derivatives at convergence or without."""
        p, r = self.given, self.result
        if differentiable and p.differentiable:
            k = (p.a if self.columns else p.b).shape[-1]
            eye = torch.eye(k, dtype=r.f.dtype, device=r.f.device).expand(*r.f.shape[:-1], k, k)
            plan = r.transport(eye, implicit=True)
        else:
            plan, differentiable = r.plan(), False
        plan = plan.mT if self.columns else plan
        mass = p.mass[..., None] if differentiable else p.mass[..., None].detach()
        return mass * plan if p.balanced else plan

    def linear(self, plan: Tensor) -> Tensor:
        M = self.given.matrix
        return torch.where(plan != 0, plan * M, 0.0).sum((-2, -1))

    def error(self) -> Tensor:
        mass = self.given.mass[..., 0].detach() if self.given.balanced else 1.0
        return self.result.residual.detach() * mass


def canonical(
    who: str,
    M: Any,
    a: Any,
    b: Any,
    reg: Any,
    reg_m: Any = None,
    c: Tensor | None = None,
    points: dict[str, Any] | None = None,
) -> Given:
    reg = positive(who, "reg", reg)
    sides = (M, M) if points is None else (points["x"], points["y"])
    for name, t in zip(("M", "M") if points is None else ("X_a", "X_b"), sides, strict=True):
        floating(who, name, t)
        if t.ndim not in (2, 3):
            raise ValueError(f"{who}: {name} must have 2 dimensions, got {tuple(t.shape)}")
    dtype = torch.promote_types(sides[0].dtype, torch.float32)
    lead = sides[0].shape[:-2]
    sizes = M.shape[-2:] if points is None else (sides[0].shape[-2], sides[1].shape[-2])
    weights = []
    for name, w, n in (("a", a, sizes[0]), ("b", b, sizes[1])):
        if w is None or (isinstance(w, Tensor) and not w.numel()):
            w = sides[0].new_full((*lead, n), 1 / max(n, 1), dtype=dtype)
        floating(who, name, w)
        if w.shape != (*lead, n):
            raise ValueError(f"{who}: {name} must be {(*lead, n)}, got {tuple(w.shape)}")
        if w.numel() and (low := w.detach().min().item()) < 0:
            raise ValueError(f"{who}: {name} must not be negative, got {low}")
        weights.append(w.to(dtype))
    pair = _row(reg_m)
    if len(pair) not in (1, 2):
        raise ValueError(f"{who}: reg_m must be a number or a pair, got {reg_m!r}")
    rho = (_penalty(who, pair[0]), _penalty(who, pair[-1]))
    costs = {"M": M.to(dtype)} if points is None else points
    if c is not None:
        floating(who, "c", c)
        if c.shape != (*lead, *sizes):
            raise ValueError(f"{who}: c must be {(*lead, *sizes)}, got {tuple(c.shape)}")
        c = c.to(dtype)
    return Given(who, costs, weights[0], weights[1], reg, rho, c)


def _row(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return list(value.flatten().tolist())
    return list(value) if isinstance(value, tuple | list) else [value]


def _penalty(who: str, value: Any) -> float | None:
    if value is None:
        return None
    out = number(who, "reg_m", value)
    if not out > 0:
        raise ValueError(f"{who}: reg_m must be positive, got {value!r}")
    return out if out < math.inf else None


def run(
    p: Given,
    start: Tensor | float | None,
    max_iter: int,
    tol: float,
    *,
    columns: bool,
    warn: bool = False,
    stacklevel: int = 5,
) -> Solved:
    """`start`: the logarithm of the scaling that is not updated first; None is what POT has."""
    max_iter, tol = count(p.who, "max_iter", max_iter), number(p.who, "tol", tol)
    if not tol >= 0:
        raise ValueError(f"{p.who}: tol must be at least 0, got {tol}")
    a, b, costs = p.a, p.b, dict(p.costs)
    C = costs.pop("M", None)
    if p.c is not None:
        C = p.matrix if C is None else C
        ratio = p.c.log() - a.log()[..., :, None] - b.log()[..., None, :]
        weighty = (a > 0)[..., :, None] & (b > 0)[..., None, :]
        C, costs = torch.where(weighty, C - p.reg * ratio, C), {}
    if p.balanced:
        of_a, of_b = p.mass, b.sum(-1, keepdim=True)
        apart = (of_a / of_b - 1).abs().max().item() if of_a.numel() else 0.0
        if not apart <= _MASSES.get(a.dtype, 1e-3):
            worst = (of_a / of_b - 1).abs().flatten().argmax()
            masses = " and ".join(f"{t.flatten()[worst].item():.6g}" for t in (of_a, of_b))
            cure = "sinkhorn_unbalanced takes any"
            if p.who in ("solve", "solve_sample"):
                cure = "a finite penalty, unbalanced=, takes any"
            elif p.who.startswith("sinkhorn_unbalanced"):
                cure = "a finite reg_m takes any"
            raise ValueError(f"{p.who}: a and b must have equal masses, got {masses}; {cure}")
        a, b = a / of_a, b / of_b
    own = a if columns else b
    logs = torch.zeros_like(own) if start is None else torch.as_tensor(start).to(own)
    if p.balanced and p.c is None:
        logs = logs.detach() - own.detach().log()
    first = torch.where(own > 0, p.reg * logs, 0.0).detach()
    other = torch.zeros_like(b if columns else a).detach()
    if columns:
        a, b = b, a
        C = None if C is None else C.mT
        costs = {**costs, "x": costs["y"], "y": costs["x"]} if costs else costs
    if C is not None:
        costs = {"C": C}
    rho = p.rho[::-1] if columns else p.rho
    result = _transport(
        **costs,
        a=a,
        b=b,
        eps=p.reg,
        max_iter=max_iter,
        tol=max(tol, _floor(a.dtype)),
        init=(other, first),
        reach=_reach(rho, costs),
    )
    if warn and not bool(result.converged.all()):
        warnings.warn(
            f"{p.who}: not converged, the residual is {result.residual.max().item():.3g}; a larger"
            " number of iterations or reg helps",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )
    return Solved(p, result, columns)


def _floor(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-14


def _reach(
    rho: tuple[float | None, float | None], costs: dict[str, Any]
) -> tuple[float | None, float | None] | None:
    if rho == (None, None):
        return None
    squared = costs.get("cost") == "sqeuclidean"
    first, second = (r if r is None else math.sqrt(r) if squared else r for r in rho)
    return first, second


def histograms(p: Given, b: Tensor) -> Given:
    """The problems of a with every column of b `[M, K]`, as a batch."""
    k = b.shape[1]
    M = p.costs["M"].expand(k, -1, -1)
    c = None if p.c is None else p.c.expand(k, -1, -1)
    return replace(p, costs={"M": M}, a=p.a.expand(k, -1), b=b.mT.to(p.a.dtype), c=c)


def start_of(who: str, warmstart: Any, side: int) -> Any:
    if warmstart is None:
        return None
    if not isinstance(warmstart, tuple | list) or len(warmstart) != 2:
        raise TypeError(f"{who}: warmstart must be a pair of logarithms, got {warmstart!r}")
    return warmstart[side]


def total_of(p: Given, plan: Tensor, linear: Tensor) -> Tensor:
    """POT's objective, whose divergences have no terms of mass."""

    def divergence(q: Tensor, r: Tensor) -> Tensor:
        out: Tensor = torch.special.xlogy(q, torch.where(q > 0, q / r, 1.0))
        return out

    c = p.a[..., :, None] * p.b[..., None, :] if p.c is None else p.c
    total = linear + p.reg * divergence(plan, c).sum((-2, -1))
    for axis, w, rho in ((-1, p.a, p.rho[0]), (-2, p.b, p.rho[1])):
        if rho is not None:
            total = total + rho * divergence(plan.sum(axis), w).sum(-1)
    return total
