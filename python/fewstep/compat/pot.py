"""Entropic solvers of POT with fewstep's kernels: `sinkhorn`, `solve` and their relatives.

    import ot; plan = ot.sinkhorn(a, b, M, reg)                          # before
    from fewstep.compat import pot; plan = pot.sinkhorn(a, b, M, reg)    # after

The arguments, defaults, keys of `log` and attributes of results are those of POT 0.9.7. NumPy
arrays give arrays and tensors give tensors. After a number of iterations too small to converge, all
numbers are POT's; converged ones agree within its tolerance. All methods named here iterate in the
log domain, on POT's schedule of `method="sinkhorn"`.

Stopping: `stopThr` and `tol` bound the L1 error of the marginals as a fraction of the mass, which
is never smaller than POT's L2 error, and every iteration is looked at. For unbalanced problems POT
bounds how far u and v still move. In float32 the bound is at least 1e-5, which rounding needs.

Differences by intention, in which POT is off by its own definitions in float64:

- `solve(grad="envelope", reg_type="KL")` of POT has `reg log u` for the gradient for a, which is
  that of "entropy". Here it is the derivative of the value.
- `solve(c=)` of POT ignores c in balanced problems. Here c is the reference measure.
- `solve_batch(grad="envelope")` of POT has no gradients for a and b. Here the value has them.
- `method="sinkhorn_translation_invariant"` of POT has another limit than its other methods where
  the two penalties differ. Here the limit is that of the objective.
- Where K, u or v leave the range of numbers, `method="sinkhorn"` of POT warns and returns an early
  iterate, balanced or not. Here it converges.
- Unbalanced problems and batches that have not converged are silent in POT. Here they warn.
- Masses of a and b that differ raise ValueError in balanced problems, where POT does not converge.

Gradients of plans are implicit ones, at convergence, and hold once. POT's go through the
iterations.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep._checks import count, floating, number, one_of
from fewstep.ops.sinkhorn import solve as _op
from fewstep.ops.sinkhorn.convergence import ConvergenceWarning
from fewstep.ops.sinkhorn.inputs import canonical_points
from fewstep.ops.sinkhorn.result import SinkhornResult

__all__ = [
    "OTResult",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "solve",
    "solve_batch",
    "solve_sample",
    "solve_sample_batch",
    "unif",
]

_transport = inspect.unwrap(_op.sinkhorn)  # without its warning: POT has its own

Array = Any  # a Tensor, an array of NumPy or a list of numbers
F = TypeVar("F", bound=Callable[..., Any])
_SCALINGS = ("sinkhorn", "sinkhorn_log")
_DUALS = ("sinkhorn_stabilized", "sinkhorn_epsilon_scaling")
_RANGE = ("tau", "print_period")  # steer how POT's methods stay in range, and change no limit
_UNBALANCED = ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant")
_METRICS = {
    "sqeuclidean": "sqeuclidean",
    "euclidean": "euclidean",
    "cityblock": "l1",
    "cosine": "cosine",
}
_TINY = math.log(1e-300)  # the logarithm that POT gives of a scaling that is 0
_MASSES = {torch.float64: 1e-6}  # how far equal masses may be apart, relatively; else 1e-3


def unif(n: int) -> np.ndarray[Any, Any]:
    """`n` equal weights that sum to 1."""
    return np.full(count("unif", "n", n), 1 / n)


def _takes_arrays(function: F) -> F:
    """Tensors inside; what was given as arrays or lists comes back as arrays."""

    @functools.wraps(function)
    def given(*args: Any, **options: Any) -> Any:
        values = [*args, *options.values()]
        values += [v for pair in values if isinstance(pair, tuple) for v in pair]
        arrays = any(isinstance(v, np.ndarray) and v.ndim for v in values)
        if any(isinstance(v, Tensor) for v in values):
            if arrays:
                raise TypeError(
                    f"{function.__name__}: all must be tensors or all arrays, got an array beside"
                    " a Tensor: torch.from_numpy makes one of the other"
                )
            return function(*map(_listed, args), **{k: _listed(v) for k, v in options.items()})
        out = function(*map(_tensor, args), **{k: _tensor(v) for k, v in options.items()})
        return _arrays(out)

    return given  # type: ignore[return-value]


def _listed(value: Any) -> Any:
    """POT's empty list, for weights that are uniform, is None."""
    return None if isinstance(value, list) and not value else value


def _tensor(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_tensor, value))
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("masked arrays are not supported: leave masked points out, or weigh them 0")
    if isinstance(value, list):
        value = _listed(value)
        value = value if value is None else np.asarray(value, dtype=np.float64)
    if not isinstance(value, np.ndarray) or not value.ndim:
        return value
    kind = np.float64 if value.dtype.kind in "iu" else value.dtype.newbyteorder("=")
    return torch.tensor(np.ascontiguousarray(value, kind))


def _arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()[()]
    if isinstance(value, dict):
        return {name: _arrays(v) for name, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_arrays, value))
    if isinstance(value, OTResult):
        return OTResult(value._solved, value._parts, _arrays)
    return value


def _unserved(who: str, name: str, value: Any, instead: str) -> NoReturn:
    raise NotImplementedError(f"{who}: {name}={value!r} of POT is not served here; use {instead}")


def _positive(who: str, name: str, value: Any) -> float:
    out = number(who, name, value)
    if not 0 < out < math.inf:
        raise ValueError(f"{who}: {name} must be positive and finite, got {value!r}")
    return out


@dataclass(frozen=True)
class _Given:
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
class _Solved:
    """A problem and its solution; `columns` where those were updated first, so x and y swapped."""

    given: _Given
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


def _given(
    who: str,
    M: Any,
    a: Any,
    b: Any,
    reg: Any,
    reg_m: Any = None,
    c: Tensor | None = None,
    points: dict[str, Any] | None = None,
) -> _Given:
    reg = _positive(who, "reg", reg)
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
    return _Given(who, costs, weights[0], weights[1], reg, rho, c)


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


def _run(
    p: _Given,
    start: Tensor | float | None,
    max_iter: int,
    tol: float,
    *,
    columns: bool,
    warn: bool = False,
    stacklevel: int = 5,
) -> _Solved:
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
    return _Solved(p, result, columns)


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


def _histograms(p: _Given, b: Tensor) -> _Given:
    """The problems of a with every column of b `[M, K]`, as a batch."""
    k = b.shape[1]
    M = p.costs["M"].expand(k, -1, -1)
    c = None if p.c is None else p.c.expand(k, -1, -1)
    return replace(p, costs={"M": M}, a=p.a.expand(k, -1), b=b.mT.to(p.a.dtype), c=c)


def _start(who: str, warmstart: Any, side: int) -> Any:
    if warmstart is None:
        return None
    if not isinstance(warmstart, tuple | list) or len(warmstart) != 2:
        raise TypeError(f"{who}: warmstart must be a pair of logarithms, got {warmstart!r}")
    return warmstart[side]


def _balanced(
    who: str,
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    method: Any,
    numItermax: int,
    stopThr: float,
    log: bool,
    warn: bool,
    warmstart: Any,
    options: dict[str, Any],
    methods: tuple[str, ...],
) -> tuple[_Solved, bool, dict[str, Any]]:
    method = method.lower() if isinstance(method, str) else method
    if method == "greenkhorn":
        _unserved(who, "method", method, "method='sinkhorn', whose limit is the same")
    one_of(who, "method", method, methods)
    for name, value in options.items():
        if name not in _RANGE:
            _unserved(who, name, value, "numItermax and stopThr alone")
    several = isinstance(b, Tensor) and b.ndim == 2
    p = _given(who, M, a, b[:, 0] if several else b, reg)
    p = _histograms(p, b) if several else p
    start = _start(who, warmstart, 0)
    if start is not None and method in _DUALS:
        start = torch.as_tensor(start) / p.reg
    if start is None:
        start = -math.log(p.a.shape[-1]) if method == "sinkhorn" else 0.0
    elif several and isinstance(start, Tensor):
        start = start.mT
    start = torch.as_tensor(start, dtype=p.a.dtype).expand_as(p.a)
    solved = _run(p, start, numItermax, stopThr, columns=True, warn=warn)
    logs: dict[str, Any] = {}
    if log:
        u, v = (t.mT if several else t for t in solved.scalings)
        logs = {"err": [solved.error().max()], "niter": int(solved.result.iterations.max()) - 1}
        if method in _DUALS:
            alpha, beta = p.reg * u, p.reg * v
            logs |= {"n_iter": logs["niter"], "logu": u, "logv": v}
            logs |= {"alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}
        else:
            logs |= {"u": u.exp(), "v": v.exp(), "log_u": u, "log_v": v}
    return solved, several, logs


@_takes_arrays
def sinkhorn(
    a: Array,
    b: Array,
    M: Array,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: tuple[Array, Array] | None = None,
    **kwargs: Any,
) -> Any:
    """Plan `[N, M]` of balanced entropic transport; with b `[M, K]`, the K costs `<P, M>`.

    Args:
        a (Array): weights `[N]`. Empty: uniform.
        b (Array): weights `[M]` of the same mass, or K columns of them.
        M (Array): costs `[N, M]`. inf leaves a pair out.
        reg (float): temperature, `eps` of `fewstep.sinkhorn`.
        method (str): "sinkhorn", "sinkhorn_log", "sinkhorn_stabilized" or
            "sinkhorn_epsilon_scaling". All are computed alike; they differ in their `log`.
        log (bool): return also a dictionary: err, niter, u, v, log_u, log_v; alpha and beta for the
            last two methods.
        warmstart (tuple | None): log u and log v; alpha and beta for the last two methods.

    Raises:
        NotImplementedError: method="greenkhorn", and options of single methods.
        ValueError: a value or a shape that does not fit, or masses that differ.

    >>> import numpy as np
    >>> sinkhorn([0.5, 0.5], [0.5, 0.5], np.array([[0.0, 1.0], [1.0, 0.0]]), 1).round(3)
    array([[0.366, 0.134],
           [0.134, 0.366]])
    """
    methods = _SCALINGS + _DUALS
    rest = (method, numItermax, stopThr, log, warn, warmstart, kwargs, methods)
    solved, several, logs = _balanced("sinkhorn", a, b, M, reg, *rest)
    plan = solved.plan(differentiable=True)
    out = solved.linear(plan) if several else plan
    return (out, logs) if log else out


@_takes_arrays
def sinkhorn2(
    a: Array,
    b: Array,
    M: Array,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: tuple[Array, Array] | None = None,
    **kwargs: Any,
) -> Any:
    """`<P, M>` of the plan of `sinkhorn`, with its arguments."""
    methods = (*_SCALINGS, "sinkhorn_stabilized")
    rest = (method, numItermax, stopThr, log, warn, warmstart, kwargs, methods)
    solved, _, logs = _balanced("sinkhorn2", a, b, M, reg, *rest)
    out = solved.linear(solved.plan(differentiable=True))
    return (out, logs) if log else out


def _unbalanced(
    who: str,
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    reg_m: Any,
    method: Any,
    reg_type: Any,
    c: Any,
    warmstart: Any,
    numItermax: int,
    stopThr: float,
    options: dict[str, Any],
) -> tuple[_Solved, bool, Tensor, dict[str, Any]]:
    method = method.lower() if isinstance(method, str) else method
    one_of(who, "method", method, (*_UNBALANCED, "sinkhorn_reg_scaling"))
    reg_type = reg_type.lower() if isinstance(reg_type, str) else reg_type
    one_of(who, "reg_type", reg_type, ("kl", "entropy"))
    for name, value in options.items():
        if name not in _RANGE:
            _unserved(who, name, value, "numItermax and stopThr alone")
    if reg_m is None:
        raise ValueError(f"{who}: reg_m must be a number or a pair, got None")
    several = isinstance(b, Tensor) and b.ndim == 2
    p = _given(who, M, a, b[:, 0] if several else b, reg, reg_m, c)
    if reg_type == "entropy" or several:
        p = replace(p, c=torch.ones_like(p.costs["M"]))
    elif p.balanced and c is None:  # whose u and v are those of a penalty
        p = replace(p, c=p.a[:, None] * p.b)
    p = _histograms(p, b) if several else p
    start = _start(who, warmstart, 1)
    if several and isinstance(start, Tensor) and start.ndim == 2:
        start = start.mT
    solved = _run(p, start, numItermax, stopThr, columns=False, warn=True)
    plan = solved.plan(differentiable=True)
    u, v = (t.mT if several else t for t in solved.scalings)
    logs = {"err": [solved.error().max()], "logu": u, "logv": v}
    logs |= {"cost": solved.linear(plan), "total_cost": _total(p, plan, solved.linear(plan))}
    return solved, several, plan, logs


def _total(p: _Given, plan: Tensor, linear: Tensor) -> Tensor:
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


@_takes_arrays
def sinkhorn_unbalanced(
    a: Array,
    b: Array,
    M: Array,
    reg: float,
    reg_m: float | tuple[float, float],
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Array | None = None,
    warmstart: tuple[Array, Array] | None = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """Plan `[N, M]` of unbalanced entropic transport; with b `[M, K]`, the K costs `<P, M>`.

    Args:
        a (Array): weights `[N]` of any mass. Empty: uniform.
        b (Array): weights `[M]`, or K columns of them.
        M (Array): costs `[N, M]`.
        reg (float): temperature.
        reg_m (float | tuple): penalties of the marginals; inf fixes one.
        method (str): "sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant" or
            "sinkhorn_reg_scaling", which are computed alike.
        reg_type (str): "kl", of the plan from c, or "entropy", where c is 1.
        c (Array | None): reference measure `[N, M]`. Default: `a b'`.
        log (bool): return also a dictionary: err, logu, logv, cost, total_cost.
        warmstart (tuple | None): log u and log v.

    Raises:
        NotImplementedError: options of single methods.
        ValueError: a value or a shape that does not fit.
    """
    rest = (method, reg_type, c, warmstart, numItermax, stopThr, kwargs)
    solved, several, plan, logs = _unbalanced("sinkhorn_unbalanced", a, b, M, reg, reg_m, *rest)
    out = solved.linear(plan) if several else plan
    return (out, logs) if log else out


@_takes_arrays
def sinkhorn_unbalanced2(
    a: Array,
    b: Array,
    M: Array,
    reg: float,
    reg_m: float | tuple[float, float],
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Array | None = None,
    warmstart: tuple[Array, Array] | None = None,
    returnCost: str = "linear",
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """`<P, M>` of the plan of `sinkhorn_unbalanced`, or with returnCost="total" POT's objective."""
    one_of("sinkhorn_unbalanced2", "returnCost", returnCost, ("linear", "total"))
    rest = (method, reg_type, c, warmstart, numItermax, stopThr, kwargs)
    _, several, _, logs = _unbalanced("sinkhorn_unbalanced2", a, b, M, reg, reg_m, *rest)
    out = logs["cost" if returnCost == "linear" or several else "total_cost"]
    return (out, logs) if log else out


class OTResult:
    """What `solve` and its relatives return. The dense plan is formed when it is asked for.

    Attributes:
        potentials: log u and log v, as POT's solver of the same call has them.
        potential_a: the first of these.
        potential_b: the second.
        value: the objective.
        value_linear: `<P, M>`.
        plan: plan `[.., N, M]`.
        marginals: sums of the plan's rows and columns.
        marginal_a: the first of these.
        marginal_b: the second.
        status: "Converged", or what the residual is.
        log: dictionary of what else there is.
    """

    def __init__(
        self,
        solved: _Solved | None,
        parts: dict[str, Callable[[OTResult], Any]],
        convert: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self._solved, self._parts, self._convert = solved, parts, convert
        self._known: dict[str, Any] = {}

    def _part(self, name: str) -> Any:
        if name not in self._known:
            make = self._parts.get(name)
            self._known[name] = None if make is None else make(self)
        return self._known[name]

    def __repr__(self) -> str:
        return f"OTResult(value={self.value}, status={self.status!r})"

    def __getattr__(self, name: str) -> Any:
        if name == "value_quad":  # of Gromov-Wasserstein
            return None
        if name in ("potentials", "value", "value_linear", "plan", "marginals", "status", "log"):
            return self._convert(self._part(name))
        if name in ("potential_a", "potential_b", "marginal_a", "marginal_b"):
            pair = self._part(f"{name[:-2]}s")
            return None if pair is None else self._convert(pair["ab".index(name[-1])])
        if name in ("sparse_plan", "lazy_plan", "a_to_b", "b_to_a"):
            raise NotImplementedError(
                f"OTResult: {name} of POT is not served here; use plan, or fewstep.sinkhorn with"
                " its transport and barycenter, which form no plan"
            )
        raise AttributeError(name)


def _result(solved: _Solved, reg_type: str, grad: str, batch: bool = False) -> OTResult:
    p, r = solved.given, solved.result
    through = grad == "autodiff"

    def plan(_: OTResult) -> Tensor:
        return solved.plan(differentiable=through)

    def linear(own: OTResult) -> Tensor:
        out = solved.linear(own._part("plan"))
        return out if through or (batch and grad == "envelope") else out.detach()

    def value(own: OTResult) -> Tensor:
        if not p.balanced or p.c is not None:
            out = _total(p, own._part("plan"), own._part("value_linear"))
        else:
            out = _balanced_value(solved, reg_type)
        return out.detach() if grad == "detach" else out

    def marginals(own: OTResult) -> tuple[Tensor, Tensor]:
        out: Tensor = own._part("plan")
        return out.sum(-1), out.sum(-2)

    def status(_: OTResult) -> str:
        worst = r.residual.detach().max().item() if r.residual.numel() else 0.0
        return "Converged" if bool(r.converged.all()) else f"Not converged, residual {worst:.3g}"

    def log(_: OTResult) -> dict[str, Any]:
        steps = int(r.iterations.max()) - 1 if r.iterations.numel() else 0
        return {"n_iter" if batch else "niter": steps, "err": [solved.error().max()]}

    return OTResult(
        solved,
        {
            "potentials": lambda _: solved.scalings,
            "plan": plan,
            "value_linear": linear,
            "value": value,
            "marginals": marginals,
            "status": status,
            "log": log,
        },
    )


def _balanced_value(solved: _Solved, reg_type: str) -> Tensor:
    """`<P, M> + reg sum P log P`, or of P / (a b'), by the envelope theorem: P has mass m."""
    p, mass = solved.given, solved.given.mass[..., 0]
    less: Tensor = mass.log()
    if reg_type == "entropy":
        sums = (torch.special.entr(w / w.sum(-1, keepdim=True)).sum(-1) for w in (p.a, p.b))
        less = sum(sums, start=-less)
    return mass * (solved.result.value - p.reg * less)


def _checked(
    who: str, reg: Any, reg_type: Any, unbalanced: Any, unbalanced_type: Any, grad: Any, **rest: Any
) -> str:
    """reg_type in lower case, of what is served."""
    exact = "POT itself, or fewstep.metrics.report for distances of samples"
    if reg is None or (isinstance(reg, int | float) and reg == 0):
        _unserved(who, "reg", reg, exact)
    if not isinstance(reg_type, str) or reg_type.lower() not in ("kl", "entropy"):
        _unserved(who, "reg_type", reg_type, "reg_type='KL' or 'entropy'")
    if unbalanced is not None:
        if not isinstance(unbalanced_type, str) or unbalanced_type.lower() != "kl":
            _unserved(who, "unbalanced_type", unbalanced_type, "unbalanced_type='KL'")
        if reg_type.lower() != "kl":
            _unserved(who, "reg_type", reg_type, "reg_type='KL' with unbalanced")
        if grad == "envelope":
            _unserved(who, "grad", grad, "grad='autodiff' with unbalanced, or fewstep.sinkhorn")
    one_of(who, "grad", grad, ("autodiff", "envelope", "last_step", "detach"))
    if grad == "last_step":
        _unserved(who, "grad", grad, "grad='autodiff', the derivative at convergence")
    for name, value in rest.items():
        if value is not None and value is not False:
            _unserved(who, name, value, f"its default, or {exact}")
    return reg_type.lower()


@_takes_arrays
def solve(
    M: Array,
    a: Array | None = None,
    b: Array | None = None,
    reg: float | None = None,
    c: Array | None = None,
    reg_type: str = "KL",
    unbalanced: float | tuple[float, float] | None = None,
    unbalanced_type: str = "KL",
    method: str | None = None,
    n_threads: int = 1,
    max_iter: int | None = None,
    plan_init: Array | None = None,
    potentials_init: tuple[Array, Array] | None = None,
    tol: float | None = None,
    verbose: bool = False,
    grad: str = "autodiff",
) -> OTResult:
    """Entropic transport with costs M `[N, M]`, balanced or not.

    Args:
        reg (float): temperature. None and 0, which mean exact transport, are not served.
        c (Array | None): reference measure of "KL". Default: `a b'`.
        reg_type (str): "KL" or "entropy".
        unbalanced (float | tuple | None): penalties of the marginals, by KL.
        grad (str): "autodiff": plan and values have derivatives, at convergence. "envelope": the
            value alone. "detach": none.

    Raises:
        NotImplementedError: an option that POT accepts and this does not serve.
        ValueError: a value or a shape that does not fit.
    """
    who = "solve"
    served = method if method not in ("sinkhorn", "sinkhorn_log") else None
    reg_type = _checked(
        who, reg, reg_type, unbalanced, unbalanced_type, grad, method=served, plan_init=plan_init
    )
    p = _given(who, M, a, b, reg, unbalanced, c)
    return _solve(p, reg_type, max_iter, tol, potentials_init, grad, unbalanced)


def _solve(
    p: _Given, reg_type: str, max_iter: Any, tol: Any, init: Any, grad: str, unbalanced: Any
) -> OTResult:
    if p.c is not None and reg_type == "entropy":
        p = replace(p, c=None)  # it is 1 in POT
    columns = unbalanced is None
    # The balanced solver of POT starts at 0 whatever it is given.
    start = None if columns else _start(p.who, init, 1)
    steps, limit = 1000 if max_iter is None else max_iter, 1e-9 if tol is None else tol
    solved = _run(p, start, steps, limit, columns=columns, warn=True)
    return _result(solved, reg_type, grad)


@_takes_arrays
def solve_sample(
    X_a: Array,
    X_b: Array,
    a: Array | None = None,
    b: Array | None = None,
    metric: str = "sqeuclidean",
    reg: float | None = None,
    c: Array | None = None,
    reg_type: str = "KL",
    unbalanced: float | tuple[float, float] | None = None,
    unbalanced_type: str = "KL",
    lazy: bool = False,
    batch_size: int | None = None,
    method: str | None = None,
    n_threads: int = 1,
    max_iter: int | None = None,
    plan_init: Array | None = None,
    rank: int = 100,
    scaling: float = 0.95,
    potentials_init: tuple[Array, Array] | None = None,
    X_init: Array | None = None,
    tol: float | None = None,
    verbose: bool = False,
    grad: str = "autodiff",
    random_state: Any = None,
    debias: bool | str = False,
    n_projections: int = 50,
    projections: Array | None = None,
    scaler: Any = None,
) -> OTResult:
    """Entropic transport between points `[N, D]` and `[M, D]`, without their N x M costs.

    Args:
        metric (str): "sqeuclidean", "euclidean", "cityblock" or "cosine".
        lazy (bool): has no effect, since nothing is dense but what is asked for.
        debias (bool): values of the Sinkhorn divergence; `log` has the three results.

    The other arguments, and errors, are those of `solve`.
    """
    who = "solve_sample"
    served = method if method not in ("sinkhorn", "sinkhorn_log") else None
    reg_type = _checked(
        who,
        reg,
        reg_type,
        unbalanced,
        unbalanced_type,
        grad,
        method=served,
        plan_init=plan_init,
        X_init=X_init,
        projections=projections,
        scaler=scaler,
    )
    if isinstance(debias, str):
        _unserved(who, "debias", debias, "debias=True")
    if not isinstance(metric, str) or metric not in _METRICS:
        other = "pot.solve with the costs, or fewstep.sinkhorn(cost=) with a function"
        _unserved(who, "metric", metric, other)
    rest = (reg_type, max_iter, tol, potentials_init, grad, unbalanced)

    def between(x: Any, y: Any, a: Any, b: Any) -> OTResult:
        points = {"x": x, "y": y, "cost": _METRICS[metric]}
        return _solve(_given(who, None, a, b, reg, unbalanced, c, points), *rest)

    ab = between(X_a, X_b, a, b)
    if not debias:
        return ab
    if c is not None:
        _unserved(who, "c", "an array", "c=None with debias")
    aa, bb = between(X_a, X_a, a, a), between(X_b, X_b, b, b)

    def debiased(name: str) -> Callable[[OTResult], Any]:
        return lambda _: ab._part(name) - (aa._part(name) + bb._part(name)) / 2

    own = dict(ab._parts)
    own |= {name: debiased(name) for name in ("value", "value_linear")}
    own["log"] = lambda _: {"res_aa": aa, "res_bb": bb, "res_ab": ab}
    return OTResult(ab._solved, own)


def _batch(
    who: str,
    p: Callable[[], _Given],
    reg: Any,
    max_iter: int,
    tol: float,
    method: Any,
    reg_type: Any,
    grad: Any,
) -> OTResult:
    one_of(who, "method", method, ("auto", "proximal", "log_sinkhorn", "sinkhorn"))
    if method == "proximal":
        _unserved(who, "method", method, "method='log_sinkhorn'")
    reg_type = _checked(who, reg, reg_type, None, None, "detach" if grad is None else grad)
    solved = _run(p(), None, max_iter, tol, columns=False, warn=True)
    out = _result(solved, reg_type, "detach" if grad is None else grad, batch=True)
    if method == "sinkhorn":  # whose potentials are u and v themselves
        out._parts["potentials"] = lambda _: tuple(t.exp() for t in solved.scalings)
    return out


@_takes_arrays
def solve_batch(
    M: Array,
    reg: float | None = None,
    a: Array | None = None,
    b: Array | None = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> OTResult:
    """Entropic transport of B problems with costs `[B, N, M]`; each stops on its own.

    With grad="envelope" the value has derivatives, and `value_linear` those that hold the plan. The
    other arguments, and errors, are those of `solve`.
    """
    who = "solve_batch"
    return _batch(
        who, lambda: _given(who, _three(who, "M", M), a, b, reg), reg, max_iter, tol, method,
        reg_type, grad,
    )  # fmt: skip


@_takes_arrays
def solve_sample_batch(
    X_a: Array,
    X_b: Array,
    reg: float | None = None,
    a: Array | None = None,
    b: Array | None = None,
    metric: str = "sqeuclidean",
    p: float = 2,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> OTResult:
    """`solve_batch` with points `[B, N, D]` and `[B, M, D]`, without their costs.

    Args:
        metric (str): "sqeuclidean", "euclidean", or "minkowski" with p=1 or p=2.
    """
    who = "solve_sample_batch"
    minkowski = {1: "l1", 2: "euclidean"} if metric == "minkowski" else {}
    cost = minkowski.get(int(p) if p in (1, 2) else 0, metric)
    if cost not in ("sqeuclidean", "euclidean", "l1"):
        _unserved(who, "metric", metric, "pot.solve_batch with the costs")
    points = {"x": _three(who, "X_a", X_a), "y": _three(who, "X_b", X_b), "cost": cost}
    return _batch(
        who, lambda: _given(who, None, a, b, reg, points=points), reg, max_iter, tol, method,
        reg_type, grad,
    )  # fmt: skip


def _three(who: str, name: str, t: Any) -> Any:
    floating(who, name, t)
    if t.ndim != 3:
        raise ValueError(f"{who}: {name} must have 3 dimensions, got {tuple(t.shape)}")
    return t
