"""`sinkhorn`: entropic optimal transport between point clouds, and the plan it leaves behind."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ParamSpec

import torch
from torch import Tensor

from fewstep._checks import flags
from fewstep._library import choose_backend
from fewstep._torch import is_transformed
from fewstep.ops.sinkhorn import autograd, dispatch
from fewstep.ops.sinkhorn.convergence import ConvergenceWarning, unconverged
from fewstep.ops.sinkhorn.inputs import (
    annealed,
    canonical_eps,
    canonical_points,
    canonical_weights,
    checked_precision,
    checked_schedule,
    initial_potential,
    labelled,
    penalties,
)
from fewstep.ops.sinkhorn.result import CanonicalProblem, SinkhornResult, Versions
from fewstep.reference.costs import COSTS
from fewstep.reference.sinkhorn import Points, Schedule

_warned = False
P = ParamSpec("P")


def _warns(
    solve: Callable[P, SinkhornResult],
) -> functools._Wrapped[P, SinkhornResult, P, SinkhornResult]:
    """Once, where `tol` was not reached, and only where looking costs nothing."""

    @functools.wraps(solve)
    def warning(*args: P.args, **options: P.kwargs) -> SinkhornResult:
        global _warned
        result = solve(*args, **options)
        tol = result._problem.schedule.tol
        if tol is None or torch.compiler.is_compiling():
            return result
        if not _warned and unconverged(result.converged):
            _warned = True
            worst = result.residual.detach().max().item()
            warnings.warn(
                f"sinkhorn: not converged, the residual is {worst:.3g} and tol {tol:.3g};"
                " a larger max_iter or eps, or anneal, helps; this is said once",
                ConvergenceWarning,
                stacklevel=2,
            )
        return result

    return warning


@_warns
def sinkhorn(
    x: Tensor | None,
    y: Tensor | None,
    *,
    eps: float | Sequence[float] | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: str | Callable[[Any, Any], Any] = "sqeuclidean",
    max_iter: int = 100,
    tol: float | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    anneal: float | Sequence[float] | Tensor | None = None,
    update: str = "alternating",
    relax: float = 1.0,
    reach: float | tuple[float | None, float | None] | None = None,
    exclude_diagonal: bool | int = False,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    label_cost: Tensor | None = None,
    C: Tensor | None = None,
    memory_limit: int = 2**27,
    precision: str | None = None,
    backend: str | None = None,
    check_finite: bool = False,
) -> SinkhornResult:
    """Entropic optimal transport between weighted point clouds, in the log domain.

    Solves `min_P <P, C> + eps KL(P | a b')` over plans with marginals a and b. The plan is
    `P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)` and one iteration is

        f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)        rows exact
        g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)        columns exact

    Source: Peyre and Cuturi, Computational Optimal Transport (2019), equations 4.43 and 4.44.
    With `reach` the marginals are penalised instead, `+ rho_x KL(P 1 | a) + rho_y KL(P' 1 | b)`,
    masses are free, and each update is multiplied by `rho / (rho + eps)`: Sejourne, Feydy,
    Vialard, Trouve and Peyre, Sinkhorn Divergences for Unbalanced Optimal Transport (2019).

    Args:
        x (Tensor | None): points `[N, D]` or `[B, N, D]` (B independent problems); all points
            `[N, D]` one problem after the other with `cu_seqlens`; None with `C`.
        y (Tensor | None): points `[M, D]` or `[B, M, D]`, likewise.
        eps (float | Sequence | Tensor): temperature, in units of the cost. A sequence is T
            temperatures of every problem, solved from the same distances, and results have T before
            the points, also where T is 1. A tensor (or an array of numpy) is `[]`, or has the shape
            of the batch, `[B]` for one temperature per problem, or that and T, `[T]` or `[B, T]`.
        a (Tensor | None): weights `[.., N]` that sum to 1 (any mass with `reach`), zeros allowed.
            Default: uniform.
        b (Tensor | None): weights `[.., M]`, likewise.
        cost (str | Callable): "sqeuclidean" = `|x-y|^2`, "half_sqeuclidean" = `|x-y|^2 / 2`,
            "euclidean" = `|x-y|`, "cosine" = `1 - x.y / (|x| |y|)` (1, with a gradient of 0, for a
            zero vector), "dot" = `-x.y`, "l1" = `sum_c |x_c - y_c|`; or a function of x and y, such
            as `lambda x, y: (x - y).abs().sqrt().sum(-1)`, that KeOps's LazyTensors understand, or,
            without KeOps and with backend="reference", tensors `[B, N, 1, D]` and `[B, 1, M, D]`.
        max_iter (int): iterations at eps, at least 1; exactly that many where `tol` is None.
        tol (float | None): stop a problem, on the device, once its `residual` is at most this. On
            the CPU a `ConvergenceWarning` is given, once per process, where it was not reached.
        init (tuple | None): potentials (f, g) to start from, shaped like the result's, detached. An
            alternating iteration overwrites f, so only g matters there. Default: zeros.
        anneal (float | Sequence | Tensor | None): temperatures before eps, one iteration at each:
            those given, or, for a factor below 1, the cost across the common bounding box of the
            points with weight (with C, its largest difference; infinite costs do not count), times
            the factor, and so on while above eps.
        update (str): "alternating" as above, or "symmetric": both potentials from the last two,
            averaged with them (geomloss's iteration), and at the end an alternating iteration, or
            up to ten until `tol` is reached, uncounted. If ten do not reach it, `converged` is
            False, though `iterations` may be far below `max_iter`. Where y is the same tensor as x,
            with equal weights and no labels, it keeps a single potential.
        relax (float): over-relaxation of alternating updates, in (0, 2): `f <- f + relax (f' - f)`.
        reach (float | tuple | None): distance beyond which mass is rather destroyed than moved:
            `rho = reach^2` for squared costs and `reach` for the others. A pair (x, y) may have a
            None for a marginal that is a constraint.
        exclude_diagonal (bool | int): leave out the pairs `j == i`, or `j == i + offset`.
        cu_seqlens (tuple | None): int64 `(cu_x [B + 1], cu_y [B + 1])` for B problems of several
            sizes: the i-th has the points `cu[i]` to `cu[i + 1] - 1`.
        labels (tuple | None): classes `(lx [.., N], ly [.., M])`, int64, for `label_cost`.
        label_cost (Tensor | None): `W [L, L']`; a pair costs `W[lx_i, ly_j]` more.
        C (Tensor | None): costs `[N, M]` or `[B, N, M]` instead of points; inf leaves a pair out.
        memory_limit (int): bytes that the C++ kernels may use, for each problem that a thread works
            on, to keep distances and exponentials between iterations; beyond, they are computed
            anew. "triton" keeps the costs of all problems of alternating updates if they take no
            more than this, where points have so many coordinates that reading them is quicker.
        precision (str | None): how kernels of "cuda" and "triton" multiply float32 points on tensor
            cores, from 17 coordinates on: "tf32x3", in two parts of TF32 each and so with the
            accuracy of float32; "tf32", in one part, about twice as fast, where products are off by
            up to 2^-9 of themselves, a cost by 0.2 % of `|x|^2 + |y|^2` about the middle of the
            points; "float32", without tensor cores. Other backends, and float64, compute in their
            dtype whatever it says. Default: "tf32x3".
        backend (str | None): "reference", "cpp", "triton", "cuda" or "keops" (a cost function).
            Default: the environment variable FEWSTEP_BACKEND, else the fastest one for the device
            and the options that has been tested there: on GPUs "reference", which forms C, since
            "triton" and "cuda" have only been emulated so far.
        check_finite (bool): look for NaN and inf first, in C too, where inf may be meant; on a GPU
            also check the signs and sums of weights and the sign of eps, which costs a
            synchronisation there.

    Returns:
        SinkhornResult: potentials, value, residual, iterations, converged; methods
        `transport`, `plan`, `barycenter`, `potentials`.

    `value` is the dual objective, `<a, phi(f)> + <b, phi(g)> - eps (sum P - sum a sum b)` with
    `phi(f) = f`, or `rho (1 - exp(-f / rho))` with `reach`; its gradient for x, y, a, b and C is
    the envelope theorem's: `sum_j P_ij dC_ij/dx_i` for x, and `f` for a (up to a constant, since a
    sums to 1). Second derivatives are those of the converged value, by implicit differentiation (in
    float64; conjugate gradient with streamed products), in reverse and forward mode; directions
    along a and b must keep the mass where both marginals are fixed. Third ones raise. f and g have
    no gradient, `result.potentials()` and products with `implicit=True` do. "reference" is
    differentiated through its iterations instead, f and g as well, twice.

    `torch.func.grad`, `jvp` and `vmap` work, in any order; under them and in a compiled graph the
    checks that read values are left out, and a compiled graph has first derivatives of `value` and
    of `transport` for v.

    Points of weight 0 (padding) change nothing but have potentials all the same, so that gradients
    for a and b are right there: f_i is the transform above of the g that came out, g_j that of f.
    Costs may be inf, for pairs that may carry no mass. With `reach`, a point whose pairs all cost
    inf is destroyed: its potential is huge (1e28 eps or more) and its rows and columns of the plan
    are 0. Where its marginal is fixed its weight must be 0, and its potential is 0; with a weight
    the problem is infeasible: `value` is inf and `converged` False. Costs above 1e30 eps (in
    float64 1e270 eps, "reference" 1e30) may count as inf.

    The L1 error of the marginals hardly sees light points, of less than a thousandth of the largest
    weight, but f is the gradient for a at all of them. So `residual` is at least the square of the
    largest step, over eps, that f of a light point would take to the transform of g (and g, where
    updates are relaxed, to that of f): at a `tol` of 1e-4 each f is within 0.01 eps of it.

    `residual`, and with it `converged`, is a fraction of the mass given, not of the mass moved.
    Where `reach` destroys nearly all mass, the value and the plan's mass may have converged to
    `tol` while potentials and barycentres are still far from their limits; a smaller `tol` or more
    iterations bring them there.

    float64 stays float64; float32, bfloat16 and float16 are computed in float32 and return
    float32, under autocast too. Kernel against float64: potentials within 2e-5 of the cost's scale
    after one step and 2e-4 at convergence, value 1e-5, gradients 1e-4 (relative norm). The error of
    gradients is up to `largest cost / (100 eps)` times that where eps is below a hundredth of the
    largest cost. Where potentials of points with weight are so large that their rounding is more
    than eps (in float32 above 1.2e7 eps) the value is right, `residual` is inf and there is no
    plan: on the CPU gradients for x, y and C, `plan`, `transport` and `barycenter` raise.

    Raises:
        ValueError: shapes, devices, eps, weights, options or a backend that do not fit; in
            gradients and methods, an eps too small for the digits of the dtype.
        TypeError: a dtype that is not floating, x and y of different dtypes, a sparse tensor, an
            option of another type.
        ConvergenceError: a second derivative was asked for at an L1 error of the marginals above
            1e-2 of the mass, or Newton's method did not converge from there.

    >>> import torch, fewstep
    >>> x = torch.tensor([[0.0], [1.0]])
    >>> y = torch.tensor([[0.0], [3.0]])
    >>> result = fewstep.sinkhorn(x, y, eps=1.0, tol=1e-4)
    >>> round(result.value.item(), 3), result.converged.item()
    (2.645, True)
    >>> [[round(p, 3) for p in row] for row in result.plan().tolist()]
    [[0.476, 0.024], [0.024, 0.476]]
    """
    flags("sinkhorn", check_finite=check_finite)
    # Reading values costs a synchronisation on a GPU and breaks a compiled graph.
    device = next((t.device for t in (x, C) if isinstance(t, Tensor)), torch.device("cpu"))
    read = check_finite or device.type == "cpu"
    read = read and not torch.compiler.is_compiling() and not is_transformed()
    points, batch, dtype = canonical_points(x, y, cost, C, exclude_diagonal, cu_seqlens, read)
    row = COSTS[cost] if y is not None and isinstance(cost, str) else COSTS[points.cost]
    targets = None if y is None else points.y
    if row.directions is not None and y is not None:
        targets = y.to(dtype).reshape(*points.y.shape[:2], y.shape[-1])
    points = labelled(points, batch, labels, label_cost, dtype, read)
    points = replace(points, precision=checked_precision("sinkhorn", precision))
    lead = (points.count,) if points.segments is not None else batch
    e, temperatures = canonical_eps(eps, lead, points.x, dtype, read)
    rho = penalties(reach, row, dtype)
    free = rho != (None, None)
    weights = canonical_weights("a", a, batch, points, dtype, read, free=free)
    columns = canonical_weights("b", b, batch, points, dtype, read, free=free)
    # Label costs need not be symmetric, and looking would cost a synchronisation on a GPU.
    single = x is y and x is not None and a is b and init is None and labels is None
    single = single and (cu_seqlens is None or cu_seqlens[0] is cu_seqlens[1])
    single = single and not points.diagonal and rho[0] == rho[1]
    # Coordinates that tell zero vectors of x from those of y make clouds that are not the same.
    single = single and (x is None or points.x.shape[-1] == x.shape[-1])
    schedule = checked_schedule(max_iter, tol, rho, relax, update, single, memory_limit)
    schedule = annealed(schedule, anneal, points, (weights, columns), e, read)
    f0, g0 = (
        (None, None)
        if init is None
        else initial_potential(init, batch, temperatures, points, dtype)
    )
    chosen = choose_backend(
        "sinkhorn",
        device.type,
        backend,
        lambda name: _unsupported(name, points, e, schedule),
        # A launch for all problems, rather than two per iteration.
        first="cuda" if dispatch.resident(points) else None,
    )
    if check_finite:
        checked = {"x": x, "y": y, "C": C, "init f": f0, "init g": g0}
        for name, t in checked.items():
            bad = 0 if t is None else int((~torch.isfinite(t)).sum())
            if bad:
                raise ValueError(f"sinkhorn: {name} must be finite, got {bad} NaN or inf values")
    problem = CanonicalProblem(
        *(points, weights, columns, e, f0, g0, schedule),
        targets=targets,
        backend=chosen,
        batch=batch,
        temperatures=temperatures,
    )
    f, g, *numbers = autograd.solve(chosen, problem)
    f, g = (t.reshape(*problem.lead, t.shape[-1]) for t in (f, g))
    value, residual, iterations, converged = (t.reshape(problem.values) for t in numbers)
    plain = not torch.compiler.is_compiling() and not is_transformed()
    versions = problem.versions(f, g) if plain else Versions()
    return SinkhornResult(f, g, value, residual, iterations, converged, problem, versions)


def transport(result: SinkhornResult, v: Tensor, axis: int = 0, implicit: bool = False) -> Tensor:
    """`P v` (axis 0) or `P' v` (axis 1) with the plan of a result, without forming P.

    Args:
        result (SinkhornResult): what `sinkhorn` returned.
        v (Tensor): `[.., M, K]` for axis 0, `[.., N, K]` for axis 1; K may be left out.
        axis (int): the axis of P that the result keeps.
        implicit (bool): differentiate through the plan too; see `SinkhornResult.transport`.

    Returns:
        Tensor: `[.., N, K]` for axis 0, `[.., M, K]` for axis 1; differentiable in v.

    Raises:
        ValueError: a shape or axis that does not fit.
        TypeError: another dtype.

    >>> import torch, fewstep
    >>> x, y = torch.rand(5, 2), torch.rand(7, 2)
    >>> fewstep.transport(fewstep.sinkhorn(x, y, eps=0.1), y).shape
    torch.Size([5, 2])
    """
    if not isinstance(result, SinkhornResult):
        got = type(result).__name__
        raise TypeError(f"transport: result must be what sinkhorn returned, got {got}")
    return result.transport(v, axis, implicit)


def _unsupported(backend: str, points: Points, eps: Tensor, schedule: Schedule) -> str | None:
    """What of a call a backend cannot do."""
    s = schedule
    if backend == "reference":
        return None
    served = backend in COSTS[points.cost].backends
    if backend == "keops" and not served:
        return "it serves costs given as functions, and the others have kernels of their own"
    cost = "costs given as functions" if points.formula is not None else f"cost {points.cost!r}"
    full = backend == "cpp"
    kept = backend == "triton" or (backend == "cuda" and dispatch.resident(points))
    asked = {
        cost: not served,
        "cu_seqlens": not (full or (backend == "cuda" and kept)) and points.segments is not None,
        "labels": not full and points.labels is not None,
        "exclude_diagonal": not (full or kept) and points.diagonal is not None,
    }
    if backend in ("triton", "cuda"):
        asked |= {
            "several eps": not kept and eps.shape[0] != points.count,
            "anneal": not kept and (s.start is not None or s.temperatures is not None),
            "reach": not kept and s.rho != (None, None),
            "update='symmetric'": not kept and s.simultaneous,
            "relax": not kept and s.relax != 1 and not s.simultaneous,
        }
    names = [name for name, used in asked.items() if used]
    size = " for more than small float32 problems" if backend == "cuda" and not kept else ""
    return f"it has no {', '.join(names)}{size}" if names else None
