"""Results without iterations: from given potentials, and the temperature of a given entropy."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep._checks import count, number
from fewstep._names import Backend, CostName, Precision
from fewstep._results import takes_arrays
from fewstep._torch import readable
from fewstep.ops.sinkhorn import autograd
from fewstep.ops.sinkhorn.canonical import canonical_problem
from fewstep.ops.sinkhorn.convergence import ConvergenceWarning, unconverged
from fewstep.ops.sinkhorn.inputs import mean_costs
from fewstep.ops.sinkhorn.plans import times
from fewstep.ops.sinkhorn.problem import Constants, Problem, to_points, total, transposed
from fewstep.ops.sinkhorn.result import CanonicalProblem, SinkhornResult
from fewstep.ops.sinkhorn.schedule import largest_cost
from fewstep.ops.sinkhorn.solve import sinkhorn
from fewstep.reference.sinkhorn import DEFAULT_TOL, beyond_digits, phi


@takes_arrays
def from_potentials(
    f: Tensor,
    g: Tensor,
    x: Tensor | None = None,
    y: Tensor | None = None,
    *,
    eps: float | Sequence[float] | Tensor | Literal["auto"],
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: CostName | Callable[[Any, Any], Any] = "sqeuclidean",
    tol: float | None = None,
    reach: float | tuple[float | None, float | None] | None = None,
    exclude_diagonal: bool | int = False,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    label_cost: Tensor | None = None,
    C: Tensor | None = None,
    precision: Precision | None = None,
    backend: Backend | None = None,
    check_finite: bool = False,
) -> SinkhornResult:
    """The result of `sinkhorn` at potentials that are known, without an iteration.

    It has the plan `P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)` and all that follows from it:
    `plan`, `transport`, `barycenter`, `cost`, `sample`. Potentials of an earlier result, of
    another library or of a network will do. `value` is the dual objective at f and g, a lower bound
    on that of `sinkhorn`. Its derivatives are those of a result: f and g are held fixed, and those
    for a and b take the marginals for exact.

    Args:
        f (Tensor): potential on x, `[.., N]`, shaped like those of a result, and a constant.
        g (Tensor): potential on y, `[.., M]`, likewise.
        tol (float | None): residual up to which `converged` is True. Default: 1e-3.

    The others are those of `sinkhorn`. With `reach` the plan is that of the potentials which
    `sinkhorn` returns, damped ones.

    Returns:
        SinkhornResult: with 0 iterations. `residual` is the L1 error of the rows or of the columns,
        whichever is larger, as a fraction of the mass.

    Raises:
        ValueError, TypeError: as `sinkhorn`.

    >>> import torch, fewstep
    >>> x, y = torch.rand(5, 2), torch.rand(7, 2)
    >>> ot = fewstep.sinkhorn(x, y, eps=0.1, tol=1e-4)
    >>> again = fewstep.from_potentials(ot.f, ot.g, x, y, eps=0.1)
    >>> torch.allclose(again.plan(), ot.plan()), again.converged.item()
    (True, True)
    """
    problem = canonical_problem(
        x,
        y,
        eps=eps,
        a=a,
        b=b,
        cost=cost,
        tol=tol,
        init=(f, g),
        reach=reach,
        exclude_diagonal=exclude_diagonal,
        cu_seqlens=cu_seqlens,
        labels=labels,
        label_cost=label_cost,
        C=C,
        precision=precision,
        backend=backend,
        check_finite=check_finite,
        op="from_potentials",
    )
    return _at_potentials(problem)


_OCTAVES = 20  # how far temperatures are looked for from a quarter of the largest cost


def _at_potentials(problem: CanonicalProblem) -> SinkhornResult:
    f, g, rho, tol = problem.f0, problem.g0, problem.schedule.rho, problem.schedule.tol
    assert f is not None
    assert g is not None
    constants = autograd.constants(problem.backend, problem.points, rho)
    solved = autograd.problems(problem.points, problem.a, problem.b, f, g, problem.eps)
    numbers = zip(*(_numbers(p, constants) for p in solved), strict=True)
    value, residual = (torch.stack(parts, 1).flatten() for parts in numbers)
    converged = (residual <= (DEFAULT_TOL if tol is None else tol)) & value.detach().isfinite()
    iterations = torch.zeros_like(residual, dtype=torch.int64)
    return problem.result(f.clone(), g.clone(), value, residual, iterations, converged)


def _numbers(p: Problem, c: Constants) -> tuple[Tensor, Tensor]:
    """Value and residual of a problem at its potentials, each `[B]`."""
    fixed = Problem._make(t if t is None else t.detach() for t in p)
    masses, errors, duals = [], [], []
    for q, d in ((fixed, c), transposed(fixed, c)):
        of_row = times(q.a, autograd.product(torch.ones_like(q.g)[..., None], q, d)[..., 0])
        wanted = q.a if d.rho_x is None else times(q.a, torch.exp(-q.f / d.rho_x))
        error = total((of_row - wanted).abs(), q.segment_x)
        lost = beyond_digits(q.f, q.a, to_points(q.eps, q.f, q.segment_x), d.rho_x)
        lost = total(lost.to(error.dtype), q.segment_x) > 0
        errors.append(torch.where(lost, torch.inf, error))
        masses.append(total(of_row, q.segment_x))
        duals.append(total(times(q.a, phi(q.f, d.rho_x)), q.segment_x))
    of_a, of_b = total(fixed.a, fixed.segment_x), total(fixed.b, fixed.segment_y)
    value = duals[0] + duals[1] - fixed.eps * (masses[0] - of_a * of_b)
    residual = torch.maximum(*errors) / torch.where(of_a > 0, of_a, 1.0)
    return autograd.differentiable_value(value, p._replace(f=fixed.f, g=fixed.g), c), residual


@takes_arrays
def eps_for_entropy(
    x: Tensor | None = None,
    y: Tensor | None = None,
    *,
    entropy: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: CostName | Callable[[Any, Any], Any] = "sqeuclidean",
    C: Tensor | None = None,
    rtol: float = 1e-2,
    tol: float = 1e-3,
    max_iter: int = 1000,
    backend: Backend | None = None,
) -> Tensor:
    """The temperature at which the plan of `sinkhorn` has the entropy asked for, `[..]`.

    A temperature says how far a plan spreads only beside the costs and the number of points. This
    is found by bisection of log eps for each problem:

        entropy = 1 - KL(p | r c') / min(H(r), H(c))

    with `p = P / sum P`, its marginals r and c, and the entropy `H(r) = -sum r log r`. It is
    `SinkhornResult.entropy`, which grows with eps from nearly 0, a one-to-one assignment, to 1,
    where x and y are independent. With n points of equal weight on each side it is
    `H(p) / log n - 1`.

    Source: the renormalised entropy of arXiv 2506.05526, which compares couplings by it; the
    extension to any weights and the search are not from there.

    Args:
        x (Tensor | None): points `[.., N, D]`, as for `sinkhorn`.
        y (Tensor | None): points `[.., M, D]`, likewise.
        entropy (float): above 0 and below 1. 0.1 is a sharp plan.
        rtol (float): relative accuracy of eps. Default: 1e-2.
        tol (float): residual of each problem that is solved on the way. Default: 1e-3.
        max_iter (int): iterations of each at most. Default: 1000.

    a, b, cost, C and backend are those of `sinkhorn`.

    Returns:
        Tensor: eps, a constant, for `sinkhorn(.., eps=)`.

    Raises:
        ValueError: an entropy that no eps within 2^20 of the costs' size has, as with a single
            point; costs that are all equal; other arguments that do not fit.

    On the CPU a `ConvergenceWarning` is given where the last problem has not converged.

    >>> import torch, fewstep
    >>> x, y = torch.rand(64, 2), torch.rand(64, 2)
    >>> eps = fewstep.eps_for_entropy(x, y, entropy=0.3)
    >>> abs(fewstep.sinkhorn(x, y, eps=eps, tol=1e-3).entropy().item() - 0.3) < 0.01
    True
    """
    target = number("eps_for_entropy", "entropy", entropy)
    rtol = number("eps_for_entropy", "rtol", rtol)
    if not 0 < target < 1:
        raise ValueError(f"eps_for_entropy: entropy must be above 0 and below 1, got {entropy}")
    if not 0 < rtol < 1:
        raise ValueError(f"eps_for_entropy: rtol must be above 0 and below 1, got {rtol}")
    count("eps_for_entropy", "max_iter", max_iter)
    options: dict[str, Any] = {"a": a, "b": b, "cost": cost, "C": C, "backend": backend}
    options |= {"tol": tol, "max_iter": max_iter}
    x, y, options["C"] = (t if t is None else t.detach() for t in (x, y, C))
    options |= {k: w.detach() for k, w in (("a", a), ("b", b)) if isinstance(w, Tensor)}
    solve = inspect.unwrap(sinkhorn)  # without its warning
    result = solve(x, y, eps=1.0, **options | {"max_iter": 1}, check_finite=C is None)
    if not readable(result.value):
        raise ValueError("eps_for_entropy: reads entropies, which a graph or a transform has not")
    p = result._problem
    named = p.points.formula is None
    size = (largest_cost if named else mean_costs)(p.points, p.a, p.b).double().reshape(p.values)
    if not bool(((size > 0) & size.isfinite()).all()):
        worst = size[~((size > 0) & size.isfinite())][0].item()
        raise ValueError(f"eps_for_entropy: costs must differ, by a finite amount, got {worst:g}")
    middle = size.log() - math.log(4)
    low, high = torch.full_like(middle, -torch.inf), torch.full_like(middle, torch.inf)
    at, start, step = middle, None, math.log(4)
    while True:
        result = solve(x, y, eps=at.exp(), init=start, **options)
        start = (result.f, result.g)
        sharp = result.entropy().double() < target
        low, high = torch.where(sharp, at, low), torch.where(sharp, high, at)
        if bool((high - low <= math.log1p(rtol)).all()):
            break
        found = high - low <= math.log1p(rtol)
        closer = torch.where(found, at, (low + high) / 2)
        at = torch.where(low.isinf(), at - step, torch.where(high.isinf(), at + step, closer))
        if bool(((at - middle).abs() > _OCTAVES * math.log(2)).any()):
            raise ValueError(
                f"eps_for_entropy: entropy must be that of a plan, got {entropy}, which none has at"
                f" an eps from 2^-{_OCTAVES} to 2^{_OCTAVES} times the costs' size"
            )
    if unconverged(result.converged):
        warnings.warn(
            "eps_for_entropy: not converged, the residual is"
            f" {result.residual.max().item():.3g} and tol {tol:.3g}; a larger max_iter helps",
            ConvergenceWarning,
            stacklevel=3,
        )
    return ((low + high) / 2).exp().to(result.value.dtype)
