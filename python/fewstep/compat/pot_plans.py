"""The functions of `fewstep.compat.pot` that return plans and costs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep._checks import one_of
from fewstep.compat.pot_arrays import Array, takes_arrays
from fewstep.compat.pot_problem import (
    Solved,
    canonical,
    histograms,
    run,
    start_of,
    total_of,
    unserved,
)

SCALINGS = ("sinkhorn", "sinkhorn_log")
DUALS = ("sinkhorn_stabilized", "sinkhorn_epsilon_scaling")
_RANGE = ("tau", "print_period")  # steer how POT's methods stay in range, and change no limit
UNBALANCED = ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant")


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
) -> tuple[Solved, bool, dict[str, Any]]:
    method = method.lower() if isinstance(method, str) else method
    if method == "greenkhorn":
        unserved(who, "method", method, "method='sinkhorn', whose limit is the same")
    one_of(who, "method", method, methods)
    for name, value in options.items():
        if name not in _RANGE:
            unserved(who, name, value, "numItermax and stopThr alone")
    several = isinstance(b, Tensor) and b.ndim == 2
    p = canonical(who, M, a, b[:, 0] if several else b, reg)
    p = histograms(p, b) if several else p
    start = start_of(who, warmstart, 0)
    if start is not None and method in DUALS:
        start = torch.as_tensor(start) / p.reg
    if start is None:
        start = -math.log(p.a.shape[-1]) if method == "sinkhorn" else 0.0
    elif several and isinstance(start, Tensor):
        start = start.mT
    start = torch.as_tensor(start, dtype=p.a.dtype).expand_as(p.a)
    solved = run(p, start, numItermax, stopThr, columns=True, warn=warn)
    logs: dict[str, Any] = {}
    if log:
        u, v = (t.mT if several else t for t in solved.scalings)
        logs = {"err": [solved.error().max()], "niter": int(solved.result.iterations.max()) - 1}
        if method in DUALS:
            alpha, beta = p.reg * u, p.reg * v
            logs |= {"n_iter": logs["niter"], "logu": u, "logv": v}
            logs |= {"alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}
        else:
            logs |= {"u": u.exp(), "v": v.exp(), "log_u": u, "log_v": v}
    return solved, several, logs


@takes_arrays
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
    methods = SCALINGS + DUALS
    rest = (method, numItermax, stopThr, log, warn, warmstart, kwargs, methods)
    solved, several, logs = _balanced("sinkhorn", a, b, M, reg, *rest)
    plan = solved.plan(differentiable=True)
    out = solved.linear(plan) if several else plan
    return (out, logs) if log else out


@takes_arrays
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
    methods = (*SCALINGS, "sinkhorn_stabilized")
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
) -> tuple[Solved, bool, Tensor, dict[str, Any]]:
    method = method.lower() if isinstance(method, str) else method
    one_of(who, "method", method, (*UNBALANCED, "sinkhorn_reg_scaling"))
    reg_type = reg_type.lower() if isinstance(reg_type, str) else reg_type
    one_of(who, "reg_type", reg_type, ("kl", "entropy"))
    for name, value in options.items():
        if name not in _RANGE:
            unserved(who, name, value, "numItermax and stopThr alone")
    if reg_m is None:
        raise ValueError(f"{who}: reg_m must be a number or a pair, got None")
    several = isinstance(b, Tensor) and b.ndim == 2
    p = canonical(who, M, a, b[:, 0] if several else b, reg, reg_m, c)
    if reg_type == "entropy" or several:
        p = replace(p, c=torch.ones_like(p.costs["M"]))
    elif p.balanced and c is None:  # whose u and v are those of a penalty
        p = replace(p, c=p.a[:, None] * p.b)
    p = histograms(p, b) if several else p
    start = start_of(who, warmstart, 1)
    if several and isinstance(start, Tensor) and start.ndim == 2:
        start = start.mT
    solved = run(p, start, numItermax, stopThr, columns=False, warn=True)
    plan = solved.plan(differentiable=True)
    u, v = (t.mT if several else t for t in solved.scalings)
    logs = {"err": [solved.error().max()], "logu": u, "logv": v}
    logs |= {"cost": solved.linear(plan), "total_cost": total_of(p, plan, solved.linear(plan))}
    return solved, several, plan, logs


@takes_arrays
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


@takes_arrays
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
