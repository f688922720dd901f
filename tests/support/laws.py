"""What a random problem must keep: laws that need no other solver, and all checks of a seed.

Every check returns nothing or messages, or raises `AssertionError`. `problem_failures` runs them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tests.support.agreement import (
    DTYPES,
    Comparison,
    amplification,
    arguments,
    kind_of,
    second_opinions,
    solve,
)
from tests.support.divergence_drift import check_divergence, check_drift
from tests.support.problems import DISTANCES, FORMULAS, ROWS, Problem
from tests.tolerances import assert_contract
from torch import Tensor

import fewstep
from fewstep.reference import sinkhorn as reference


def check_dual(c: Comparison, dtype: torch.dtype) -> None:
    """Value, residual and exact columns are those of the plan that f and g stand for."""
    p = c.p
    result = solve(p, dtype, "cpp", wanted=c.finite).result
    finite = iter(c.finite.reshape(-1).tolist())
    if p.ragged:
        used = p.options["cu_seqlens"][0].diff() > 0
        finite = iter([True] * (int(used.sum()) * c.finite[0].numel()))
    rho = p.penalised
    for q, e, f, g, value, residual in c.each(result):
        a, b = q.weights()
        settled = residual <= 10  # NaN where infinite masses are compared
        if not next(finite) or not settled or not bool(f.isfinite().all() & g.isfinite().all()):
            continue
        P = a[:, None] * b * ((f[:, None] + g - q.costs()) / e).clamp(max=700).exp()
        P = torch.where((a[:, None] > 0) & (b > 0), P, 0.0)
        own = amplification(c.largest, e)
        wanted = [
            w * (1 if r is None else torch.exp(-t / r))
            for w, t, r in zip((a, b), (f, g), rho, strict=True)
        ]
        wanted = [torch.where(w > 0, t, 0.0) for w, t in zip((a, b), wanted, strict=True)]
        size = torch.stack([a.sum(), b.sum(), *(w.sum() for w in wanted)]).max() * own
        rows, columns = ((P.sum(1 - i) - w).abs() for i, w in enumerate(wanted))
        if p.plain:
            assert_contract("plan", columns.to(dtype), 0 * columns, scale=size)
        if p.plain or "update" not in p.options:
            right = rows.sum() / a.sum()
            # Of light points, the square of the step that their potentials are short of.
            relaxed = p.options.get("relax", 1.0) != 1.0
            for i, (w, t, r) in enumerate(zip((a, b), (f, g), rho, strict=True)):
                log_mass = torch.where(w > 0, P.sum(1 - i) / w, 0.0).log()
                step = ((1.0 if r is None else r / (r + e)) * (t - e * log_mass) - t).abs()
                light = (w > 0) & (w < reference.LIGHT * w.max()) & log_mass.isfinite()
                light &= step > 8 * torch.finfo(dtype).eps * t.abs()
                if i == 0 or relaxed:
                    step = torch.where(light, step, 0.0).max() / e
                    right = torch.maximum(right, step.square())
            assert_contract("plan", residual.to(dtype), right, scale=size / a.sum())
        # A point without weight may have any phi.
        terms = [
            torch.where(w > 0, w * reference.phi(t, r), 0.0)
            for w, t, r in zip((a, b), (f, g), rho, strict=True)
        ]
        parts = terms[0].sum() + terms[1].sum()
        exact = p.plain and p.balanced and "update" not in p.options
        mass = b.sum() if exact else P.sum()
        parts = parts - e * (mass - a.sum() * b.sum())
        sizes = terms[0].abs().sum() + terms[1].abs().sum()
        tiny = torch.maximum(c.scale * size / own, sizes) + e * size
        assert_contract("value", value.to(dtype), parts, scale=tiny)


def moved(p: Problem, k: int) -> tuple[Problem, float]:
    """Costs and temperatures times a power of 2, and that power."""
    s = 2.0**k
    o, t = dict(p.options), dict(p.tensors)
    squared = ROWS[p.cost].squared
    factor = {"cosine": 1.0, "dot": s * s}.get(p.cost, s * s if squared else s)
    for name in "xyC":
        if name in t:
            t[name] = t[name] * s
    if p.same:
        t["y"] = t["x"]

    def times(v: Any, by: float) -> Any:
        return (
            type(v)(None if u is None else u * by for u in v)
            if isinstance(v, list | tuple)
            else v * by
        )

    for name in ("eps", "init", "label_cost", "anneal"):
        if name in o and not (name == "anneal" and isinstance(o[name], float)):
            o[name] = times(o[name], factor)
    if o.get("reach") is not None:
        o["reach"] = times(o["reach"], s if squared else factor)
    return replace(p, tensors=t, options=o), factor


def picked(p: Problem, rows: Tensor, columns: Tensor, share: tuple[Tensor, Tensor]) -> Problem:
    """A problem of other points: those of these numbers, with these shares of their weights."""
    o, t = dict(p.options), dict(p.tensors)
    lead = () if p.batch is None else (p.batch,)
    sides = zip("ab", p.weights(), (rows, columns), share, strict=True)
    t |= {k: w.expand(*lead, w.shape[-1])[..., i] * s for k, w, i, s in sides}
    for name, i in (("x", rows), ("y", columns)):
        if name in t:
            t[name] = t[name][..., i, :]
    if "C" in t:
        t["C"] = t["C"][..., rows, :][..., columns]
    for name in ("labels", "init"):
        if name in o:
            o[name] = (o[name][0][..., rows], o[name][1][..., columns])
    return Problem(t, o, strided=p.strided)


def check_alone(c: Comparison, dtype: torch.dtype, seed: int) -> None:
    """A problem of a batch, or of ragged ones, has the bits that it has alone."""
    p = c.p
    parts = p.alone()
    whole = solve(p, dtype, "cpp", wanted=c.finite).result
    rows, columns, number, q = parts[seed % len(parts)]
    if q is not p:
        _, call = arguments(q, dtype, grad=False)
        r = fewstep.sinkhorn(**call, backend="cpp")
        pairs = {"f": rows, "g": columns, "value": number, "residual": number, "iterations": number}
        # A zero vector of another problem makes two potentials of one here too.
        if p.cost == "cosine" and p.single and (p.tensors["x"] == 0).all(-1).any():
            pairs = {}
        for name, index in pairs.items():
            mine, its = getattr(r, name), getattr(whole, name)[index].detach()
            assert torch.equal(mine.nan_to_num(7.0), its.nan_to_num(7.0)), f"{name} alone differs"
    eps = torch.as_tensor(q.options["eps"], dtype=torch.float64)
    if eps.ndim:
        t = seed % eps.numel()
        _, call = arguments(q, dtype, grad=False)
        call["eps"] = float(eps[t])
        if "init" in call:
            call["init"] = tuple(v[t] for v in call["init"])
        r = fewstep.sinkhorn(**call, backend="cpp")
        for name, index in {"f": rows, "g": columns, "value": number}.items():
            mine, its = getattr(r, name), getattr(whole, name)[index][t].detach()
            assert torch.equal(mine.nan_to_num(7.0), its.nan_to_num(7.0)), f"{name} at one eps"


def check_same(
    c: Comparison,
    dtype: torch.dtype,
    q: Problem,
    factor: float,
    rows: Any = ...,
    columns: Any = ...,
) -> list[str]:
    """Potentials and value of another problem are those of this one, times a factor."""
    p, out = c.p, []
    _, call = arguments(q, dtype, grad=False)
    r = fewstep.sinkhorn(**call, backend="cpp")
    if "tol" in p.options and not torch.equal(r.iterations, c.exact.result.iterations):
        return []

    @functools.cache
    def opinions() -> list[dict[str, Tensor]]:
        return second_opinions(p, dtype, c.finite)

    kept = (("f", rows), ("g", columns), ("value", ...))
    for name, index in kept if bool((c.selected_residual() < 1e6).all()) else kept[:2]:
        found = c.selected(getattr(r, name) / factor) if not p.ragged else getattr(r, name) / factor
        right = c.expected[name] if p.ragged else c.selected(c.expected[name])
        message = c.compare(name, kind_of(name, False), found, right, opinions, index)
        if message:
            out.append(f"{name}: {message}")
    return out


def check_law(c: Comparison, dtype: torch.dtype, seed: int) -> list[str]:
    """One of the laws that need no other solver, by the seed."""
    p, o = c.p, c.p.options
    rng = torch.Generator().manual_seed(seed)
    n, m = p.points
    ones = torch.ones(n, dtype=torch.float64), torch.ones(m, dtype=torch.float64)
    movable = not p.ragged and "exclude_diagonal" not in o and not p.same
    law = seed // 2 % 5
    if law == 0:
        return check_same(c, dtype, *moved(p, (-3, 4)[seed % 2]))
    if law == 1 and p.cost in DISTANCES and dtype == torch.float64 and "C" not in p.tensors:
        shift = 2.0 ** math.ceil(math.log2(float(p.tensors["x"].abs().max()) + 1e-30))
        t = p.tensors | {k: p.tensors[k] + shift for k in "xy"}
        if p.same:
            t["y"] = t["x"]
        return check_same(c, dtype, replace(p, tensors=t), 1.0)
    if law == 2 and movable:
        rows, columns = (torch.randperm(k, generator=rng) for k in (n, m))
        q = picked(p, rows, columns, ones)
        return check_same(c, dtype, q, 1.0, rows, columns)
    if law == 3 and movable:
        # A point of half the weight, twice, is that point.
        sides, shares = [], []
        for k in (n, m):
            i = int(torch.randint(k, (1,), generator=rng))
            sides.append(torch.cat([torch.arange(k), torch.tensor([i])]))
            share = torch.ones(k + 1, dtype=torch.float64)
            share[[i, k]] = 0.5
            shares.append(share)
        return check_same(c, dtype, picked(p, *sides, shares), 1.0, *sides)
    if law == 4 and movable and not isinstance(o.get("anneal"), float):
        # Points without weight might as well not be there.
        sides = []
        for k, w in zip((n, m), p.weights(), strict=True):
            kept = (w > 0).reshape(-1, k).any(0)
            sides.append(kept.nonzero()[:, 0])
        if min(len(s) for s in sides) and sum(len(s) for s in sides) < n + m:
            shares = [torch.ones(len(s), dtype=torch.float64) for s in sides]
            return check_same(c, dtype, picked(p, *sides, shares), 1.0, *sides)
    return []


def check_formula(c: Comparison) -> None:
    """A cost given as a function is the cost of that name."""
    p = c.p
    if p.cost not in FORMULAS or isinstance(p.options.get("anneal"), float):
        return
    _, call = arguments(p, torch.float64, grad=False)
    if not p.balanced and ROWS[p.cost].squared:  # a function's reach is its penalty
        call["reach"] = tuple(p.penalised)
    r = fewstep.sinkhorn(**{**call, "cost": FORMULAS[p.cost]}, backend="reference")
    for name in ("f", "g", "value"):
        found, right = (
            t if p.ragged else c.selected(t) for t in (getattr(r, name).detach(), c.expected[name])
        )
        message = c.compare(
            name,
            kind_of(name, False),
            found,
            right,
            lambda: second_opinions(p, torch.float64, c.finite),
        )
        assert message is None, message


def converged(p: Problem) -> Problem | None:
    """The same points at a temperature at which iterations converge soon, or None."""
    o = p.options
    eps = torch.as_tensor(o["eps"], dtype=torch.float64)
    low = float(p.scale()) * 0.2
    if (
        low == 0
        or "C" in p.tensors
        or any(t.isinf().any() for t in o.values() if isinstance(t, Tensor))
    ):
        return None
    kept = ("cost", "reach", "labels", "label_cost", "exclude_diagonal", "cu_seqlens")
    options = {k: v for k, v in o.items() if k in kept}
    raised = eps.clamp(min=low).tolist() if isinstance(o["eps"], list) else eps.clamp(min=low)
    raised = float(raised) if isinstance(o["eps"], float) else raised
    return replace(p, options=options | {"eps": raised}, same=False)


def check_second(p: Problem) -> None:
    """Second derivatives of the value are the limit of those of unrolled iterations."""
    q = converged(p)
    if q is None or q.cost == "euclidean" or not all(r.stuck() == 0 for *_, r in q.alone()):
        return

    def second(backend: str, **stop: Any) -> tuple[fewstep.SinkhornResult, list[Tensor]]:
        leaves, call = arguments(q, torch.float64)
        r = fewstep.sinkhorn(**{**call, **stop}, backend=backend)
        x, y = leaves["x"], leaves["y"]
        u = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
        w = torch.linspace(1, 2, r.value.numel(), dtype=x.dtype).reshape(r.value.shape)
        (g,) = torch.autograd.grad((r.value * w).sum(), x, create_graph=True)
        return r, list(torch.autograd.grad((g * u).sum(), [x, y]))

    r, found = second("cpp", tol=1e-13, max_iter=400)
    if bool((r.residual > 1e-12).any()):
        return
    steps, errors = int(r.iterations.max()) + 2, {"": 1.0}
    while steps < 2000:  # derivatives may take longer than the value
        _, unrolled = second("reference", max_iter=steps)
        unit = torch.cat([t.flatten() for t in unrolled]).norm().clamp(min=1e-300)
        errors = {
            name: 0.0 if (a - e).abs().max() < 1e-12 else float((a - e).norm() / unit)
            for name, a, e in zip(("xx", "xy"), found, unrolled, strict=True)
        }
        if max(errors.values()) < 1e-7:
            return
        steps *= 3
    raise AssertionError(f"second derivatives: {errors}")


def problem_failures(p: Problem, seed: int) -> list[str]:
    """What is wrong with a problem; the seed chooses among laws."""
    c = Comparison(p)
    if None in c.stuck:
        return []
    out = [m for dtype in DTYPES for m in c.run(dtype)]
    if seed % 5 == 1:
        out += c.run(torch.float32, "reference")  # the default on GPUs
    dtype = DTYPES[seed % 2]
    checks: list[Callable[[], list[str] | None]] = [
        lambda: check_dual(c, dtype),
        lambda: check_alone(c, dtype, seed),
        lambda: check_law(c, dtype, seed),
    ]
    if seed % 10 == 0:
        checks.append(lambda: check_formula(c))
    if seed % 10 == 3:
        checks.append(lambda: check_drift(seed))
    if seed % 10 in (5, 6):
        checks.append(lambda: check_divergence(p))
    if seed % 40 == 9:
        checks.append(lambda: check_second(p))
    for check in checks:
        try:
            out += [f"law {seed // 2 % 5} {str(dtype)[6:]} {m}" for m in check() or ()]
        except AssertionError as e:
            out.append(f"{check.__code__.co_names[0]} {str(dtype)[6:]}: {e}")
    return out
