"""The functions of `fewstep.compat.pot` that return an `OTResult`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep._checks import floating, one_of
from fewstep.compat.pot_arrays import Array, OTResult, takes_arrays
from fewstep.compat.pot_problem import (
    Given,
    Solved,
    canonical,
    run,
    start_of,
    total_of,
    unserved,
)

METRICS = {
    "sqeuclidean": "sqeuclidean",
    "euclidean": "euclidean",
    "cityblock": "l1",
    "cosine": "cosine",
}


def _result(solved: Solved, reg_type: str, grad: str, batch: bool = False) -> OTResult:
    p, r = solved.given, solved.result
    through = grad == "autodiff"

    def plan(_: OTResult) -> Tensor:
        return solved.plan(differentiable=through)

    def linear(own: OTResult) -> Tensor:
        out = solved.linear(own._part("plan"))
        return out if through or (batch and grad == "envelope") else out.detach()

    def value(own: OTResult) -> Tensor:
        if not p.balanced or p.c is not None:
            out = total_of(p, own._part("plan"), own._part("value_linear"))
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


def _balanced_value(solved: Solved, reg_type: str) -> Tensor:
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
        unserved(who, "reg", reg, exact)
    if not isinstance(reg_type, str) or reg_type.lower() not in ("kl", "entropy"):
        unserved(who, "reg_type", reg_type, "reg_type='KL' or 'entropy'")
    if unbalanced is not None:
        if not isinstance(unbalanced_type, str) or unbalanced_type.lower() != "kl":
            unserved(who, "unbalanced_type", unbalanced_type, "unbalanced_type='KL'")
        if reg_type.lower() != "kl":
            unserved(who, "reg_type", reg_type, "reg_type='KL' with unbalanced")
        if grad == "envelope":
            unserved(who, "grad", grad, "grad='autodiff' with unbalanced, or fewstep.sinkhorn")
    one_of(who, "grad", grad, ("autodiff", "envelope", "last_step", "detach"))
    if grad == "last_step":
        unserved(who, "grad", grad, "grad='autodiff', the derivative at convergence")
    for name, value in rest.items():
        if value is not None and value is not False:
            unserved(who, name, value, f"its default, or {exact}")
    return reg_type.lower()


@takes_arrays
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
    p = canonical(who, M, a, b, reg, unbalanced, c)
    return _solve(p, reg_type, max_iter, tol, potentials_init, grad, unbalanced)


def _solve(
    p: Given, reg_type: str, max_iter: Any, tol: Any, init: Any, grad: str, unbalanced: Any
) -> OTResult:
    if p.c is not None and reg_type == "entropy":
        p = replace(p, c=None)  # it is 1 in POT
    columns = unbalanced is None
    # The balanced solver of POT starts at 0 whatever it is given.
    start = None if columns else start_of(p.who, init, 1)
    steps, limit = 1000 if max_iter is None else max_iter, 1e-9 if tol is None else tol
    solved = run(p, start, steps, limit, columns=columns, warn=True)
    return _result(solved, reg_type, grad)


@takes_arrays
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
        unserved(who, "debias", debias, "debias=True")
    if not isinstance(metric, str) or metric not in METRICS:
        other = "pot.solve with the costs, or fewstep.sinkhorn(cost=) with a function"
        unserved(who, "metric", metric, other)
    rest = (reg_type, max_iter, tol, potentials_init, grad, unbalanced)

    def between(x: Any, y: Any, a: Any, b: Any) -> OTResult:
        points = {"x": x, "y": y, "cost": METRICS[metric]}
        return _solve(canonical(who, None, a, b, reg, unbalanced, c, points), *rest)

    ab = between(X_a, X_b, a, b)
    if not debias:
        return ab
    if c is not None:
        unserved(who, "c", "an array", "c=None with debias")
    aa, bb = between(X_a, X_a, a, a), between(X_b, X_b, b, b)

    def debiased(name: str) -> Callable[[OTResult], Any]:
        return lambda _: ab._part(name) - (aa._part(name) + bb._part(name)) / 2

    own = dict(ab._parts)
    own |= {name: debiased(name) for name in ("value", "value_linear")}
    own["log"] = lambda _: {"res_aa": aa, "res_bb": bb, "res_ab": ab}
    return OTResult(own)


def _batch(
    who: str,
    p: Callable[[], Given],
    reg: Any,
    max_iter: int,
    tol: float,
    method: Any,
    reg_type: Any,
    grad: Any,
) -> OTResult:
    one_of(who, "method", method, ("auto", "proximal", "log_sinkhorn", "sinkhorn"))
    if method == "proximal":
        unserved(who, "method", method, "method='log_sinkhorn'")
    reg_type = _checked(who, reg, reg_type, None, None, "detach" if grad is None else grad)
    solved = run(p(), None, max_iter, tol, columns=False, warn=True)
    out = _result(solved, reg_type, "detach" if grad is None else grad, batch=True)
    if method == "sinkhorn":  # whose potentials are u and v themselves
        out._parts["potentials"] = lambda _: tuple(t.exp() for t in solved.scalings)
    return out


@takes_arrays
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
        who, lambda: canonical(who, _three(who, "M", M), a, b, reg), reg, max_iter, tol, method,
        reg_type, grad,
    )  # fmt: skip


@takes_arrays
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
        unserved(who, "metric", metric, "pot.solve_batch with the costs")
    points = {"x": _three(who, "X_a", X_a), "y": _three(who, "X_b", X_b), "cost": cost}
    return _batch(
        who, lambda: canonical(who, None, a, b, reg, points=points), reg, max_iter, tol, method,
        reg_type, grad,
    )  # fmt: skip


def _three(who: str, name: str, t: Any) -> Any:
    floating(who, name, t)
    if t.ndim != 3:
        raise ValueError(f"{who}: {name} must have 3 dimensions, got {tuple(t.shape)}")
    return t
