"""`sinkhorn`: entropic optimal transport between point clouds, and the plan it leaves behind."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import numpy as np
import torch
from torch import Tensor

from fewstep._names import Backend, CostName, Precision, Update
from fewstep._results import Arrays, on_arrays
from fewstep.ops.sinkhorn import autograd, distributed
from fewstep.ops.sinkhorn.canonical import canonical_problem
from fewstep.ops.sinkhorn.convergence import ConvergenceWarning, unconverged
from fewstep.ops.sinkhorn.result import SinkhornResult

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_warned = False
P = ParamSpec("P")


def _warns(
    solve: Callable[P, SinkhornResult],
) -> functools._Wrapped[P, SinkhornResult, P, SinkhornResult]:
    """Once, where `tol` was not reached, and only where looking costs nothing."""

    @functools.wraps(solve)
    def warning(*args: P.args, **options: P.kwargs) -> SinkhornResult:
        global _warned
        first = args[0] if args else options.get("x")
        if isinstance(options.get("C") if first is None else first, np.ndarray):
            return on_arrays(warning, args, options)
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
    x: Tensor | None = None,
    y: Tensor | None = None,
    *,
    eps: float | Sequence[float] | Tensor | Literal["auto"],
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: CostName | Callable[[Any, Any], Any] = "sqeuclidean",
    max_iter: int = 100,
    tol: float | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    anneal: float | Sequence[float] | Tensor | None = None,
    update: Update = "alternating",
    relax: float = 1.0,
    reach: float | tuple[float | None, float | None] | None = None,
    exclude_diagonal: bool | int = False,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    label_cost: Tensor | None = None,
    C: Tensor | None = None,
    memory_limit: int = 2**27,
    precision: Precision | None = None,
    backend: Backend | None = None,
    check_finite: bool = False,
    process_group: ProcessGroup | None = None,
) -> SinkhornResult:
    """Entropic optimal transport between weighted point clouds, in the log domain.

    Solves `min_P <P, C> + eps KL(P | a b')` over plans with marginals a and b, which have the same
    mass. KL is `sum P log(P / a b') - sum P + sum a sum b`. The plan is
    `P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)`. One iteration is

        f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)        rows exact
        g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)        columns exact

    With a mass of m the plan is m times that of `a / m` and `b / m`, and so are gradients for the
    points. The value v becomes `m v - eps m (log m + 1 - m)`, as KL is not homogeneous. For `<P,
    C>` and the Sinkhorn divergence that term is 0: they are m times those of mass 1.

    With `reach` the marginals are not fixed but penalised, by `rho_x KL(P 1 | a)` and
    `rho_y KL(P' 1 | b)`. The masses are then free, and each update is multiplied by
    `rho / (rho + eps)`.

    Source: Peyre and Cuturi, Computational Optimal Transport (2019), equations 4.43 and 4.44. With
    `reach`, Sejourne, Feydy, Vialard, Trouve and Peyre, Sinkhorn Divergences for Unbalanced Optimal
    Transport (2019).

    Args:
        x (Tensor | None): points `[N, D]`, or `[.., N, D]` for independent problems. With
            `cu_seqlens` the points of all problems are one tensor `[N, D]`. None with `C`. For
            arrays of NumPy the result's tensors are arrays, without gradients.
        y (Tensor | None): points `[.., M, D]`. Leading dimensions broadcast with those of x: a
            single cloud `[M, D]` is shared by all problems, without a copy. So are a, b and labels.
        eps (float | Sequence | Tensor | "auto"): temperature, in units of the cost: how much
            dearer than the cheapest a pair may be and still get mass. "auto" is a twentieth of each
            problem's mean cost, weighted by a and b, a constant without a gradient; the
            result's `eps` is what was used. With "dot" the mean is that of "half_sqeuclidean",
            whose plan is the same and which does not depend on the origin. A sequence holds T
            temperatures for every problem; results then have an axis T before the points, also
            where T is 1. A tensor or numpy array has the shape `[]`, `[..]` (one temperature per
            problem), `[T]` for a single problem or `[.., T]`.
        a (Tensor | None): weights `[.., N]` of any mass, that of b in each problem unless `reach`
            frees it. Zeros are allowed. Default: uniform, with a sum of 1.
        b (Tensor | None): weights `[.., M]`, likewise.
        cost (str | Callable): "sqeuclidean" = `|x-y|^2`, "half_sqeuclidean" = `|x-y|^2 / 2`,
            "euclidean" = `|x-y|`, "cosine" = `1 - x.y / (|x| |y|)` (1, with gradient 0, for a zero
            vector), "dot" = `-x.y`, "l1" = `sum_c |x_c - y_c|`. A function of x and y, such as
            `lambda x, y: (x - y).abs().sqrt().sum(-1)`, is called with LazyTensors of KeOps. With
            backend="reference" it is called with tensors `[B, N, 1, D]` and `[B, 1, M, D]`.
        max_iter (int): number of iterations at eps, at least 1. With `tol` it is an upper limit.
        tol (float | None): residual at which a problem stops, on the device. On the CPU a
            `ConvergenceWarning` is given once per process if `tol` was not reached.
        init (tuple | None): potentials (f, g) to start from, shaped like the result's and detached.
            An alternating iteration overwrites f, so only g matters there. Default: zeros.
        anneal (float | Sequence | Tensor | None): temperatures before eps, with one iteration at
            each. A factor below 1 makes them: they start at the cost across the common bounding box
            of the points with weight (with `C`, its largest finite difference) times the factor,
            and fall by the factor while above eps.
        update (str): "alternating" as above, or "symmetric", the iteration of geomloss. That one
            computes both potentials from the last two and averages them with these. It ends with
            one alternating iteration, or with up to ten until `tol` is reached, which are not
            counted. If ten do not reach it, `converged` is False although `iterations` may be far
            below `max_iter`. Where y is the same tensor as x, with equal weights and no labels, a
            single potential is kept. "averaged" is "symmetric" without those at the end: neither
            rows nor columns of its plan are exact before convergence. Without `init` there is
            nothing to average the first update with, in either.
        relax (float): over-relaxation of alternating updates, in (0, 2): `f <- f + relax (f' - f)`.
        reach (float | tuple | None): distance of unbalanced transport. Mass that would have to
            travel farther is dropped instead of moved. `rho` is `reach^2` for squared costs and
            `reach` for the others, matrices `C` among them. A pair holds the values for x and y,
            where None fixes that marginal. Default: both are fixed.
        exclude_diagonal (bool | int): leaves out the pairs `j == i`, or `j == i + offset`.
        cu_seqlens (tuple | None): int64 `(cu_x [B + 1], cu_y [B + 1])` for B problems of different
            sizes. Problem i has the points `cu[i]` to `cu[i + 1] - 1`.
        labels (tuple | None): classes `(lx [.., N], ly [.., M])`, int64, for `label_cost`.
        label_cost (Tensor | None): `W [L, L']`, where `W[lx_i, ly_j]` is added to the cost of a
            pair.
        C (Tensor | None): costs `[.., N, M]` instead of points. inf leaves a pair out.
        memory_limit (int): bytes that the C++ kernels may use to keep distances and exponentials
            between iterations, for each problem that a thread works on. What does not fit is
            computed again in every iteration. "triton" keeps the costs of all problems of
            alternating updates within this limit, if the points have so many coordinates that
            reading costs is faster.
        precision (str | None): how "cuda" and "triton" multiply float32 points on tensor cores,
            from 17 coordinates on. "tf32x3" uses two TF32 parts of each number and has the accuracy
            of float32. "tf32" uses one part and is about twice as fast; products are off by up to
            2^-9 of themselves, and a cost by 0.2 % of `|x|^2 + |y|^2` about the middle of the
            points. "float32" does not use tensor cores. Other backends and float64 ignore it.
            Default: "tf32x3".
        backend (str | None): "reference", "cpp", "triton", "cuda" or "keops" (for a cost function).
            Default: the environment variable FEWSTEP_BACKEND, else the fastest backend that
            serves the options and, on a GPU, has matched float64 there (see docs/gpu.md);
            "reference", which forms C, where none has.
        check_finite (bool): raises on NaN and inf in the inputs (and in C, where inf may be meant).
            On a GPU it also checks the signs and sums of weights and the sign of eps, which costs a
            synchronisation.
        process_group (ProcessGroup | None): ranks of torch.distributed over which x is spread, as
            below. Default: this process has the whole problem.

    Returns:
        SinkhornResult: potentials, value, residual, iterations and converged, with the methods
        `transport`, `plan`, `barycenter` and `potentials`.

    Value and derivatives: `value` is the dual objective `<a, phi(f)> + <b, phi(g)> - eps (sum P -
    sum a sum b)`, where `phi(f) = f`, or `rho (1 - exp(-f / rho))` with `reach`. Its gradient for
    x, y, a, b and C is that of the envelope theorem: `sum_j P_ij dC_ij/dx_i` for x, and `f + eps
    (sum b - 1)` for a, of which a constant may go to b. With `reach` it is `phi(f) + eps (sum b -
    exp(-f / rho))`. Second derivatives are those of the converged value. They are computed in
    float64 by implicit differentiation (conjugate gradient with streamed products), in reverse and
    forward mode. Directions along a and b must change the same mass where both marginals are fixed.
    Third derivatives raise. f and g have no gradient; `result.potentials()` and products with
    `implicit=True` do. "reference" is differentiated through its iterations instead, twice, and f
    and g with it.

    Transforms: `torch.func.grad`, `jvp` and `vmap` work in any order. Under them and in a compiled
    graph the checks that read values are left out. A compiled graph has first derivatives of
    `value`, and of `transport` for v.

    Ranks: with `process_group` each rank has its own x `[N_r, D]` and a `[N_r]`, and all have the
    same y and b. The problem is that of all rows, whose weights are 1 / N by default. f, and
    gradients for x and a, are those of the rank's rows. All else is the same on every rank: value,
    g, residual, iterations, converged, and gradients for y and b, which are whole. All ranks must
    make the call, and the backward pass. Wrong arguments, and ranks that differ in y, b, eps or an
    option, raise on all of them. DDP takes means over ranks: under it multiply the loss by their
    number. `transport(v)`, `plan`, `barycenter` and `assignment()` of the result are those of the
    rank's rows against all columns; its other methods raise. An iteration is a pass over the rows
    and one all_reduce of `8 (M + 3)` bytes, or a few more where sums of columns underflow. The
    backward pass reduces the gradient for y, if y has one. "cpp" needs memory for the points, a
    copy of y and some 50 numbers for each point of y, and "reference", the default on a GPU, for
    2^24 costs at a time. On a GPU every iteration waits for the device. Served are single problems,
    alternating updates without `relax`, and costs that have names, "cosine" aside.

    Points of weight 0 (padding) do not change the result. They have potentials nevertheless, so
    that gradients for a and b are right there: f_i is the transform above of the final g, and g_j
    that of the final f.

    Infinite costs are allowed, for pairs that may carry no mass. A point whose pairs all cost inf
    is dropped where its marginal is penalised: its potential is huge (1e28 eps or more) and its row
    or column of the plan is 0. Where its marginal is fixed, its weight must be 0, and its potential
    is 0. With a weight the problem is infeasible: `value` is inf and `converged` False. Costs above
    1e30 eps (in float64 1e270 eps, in "reference" always 1e30 eps) may count as infinite.

    `residual` is the L1 error of the marginals as a fraction of the mass given. It hardly sees a
    light point, one of less than a thousandth of the largest weight, although f is the gradient for
    a there too. It is therefore at least the square of `step / eps`, with step the change that one
    more update would make to f of a light point (and to g where updates are relaxed). At a `tol` of
    1e-4 each such f is within 0.01 eps of its update. With a `reach` so short that nearly all mass
    is dropped, the value and the plan's mass may have converged to `tol` while potentials and
    barycentres have not. Use a smaller `tol` or more iterations there.

    Precision: float64 stays float64. float32, bfloat16 and float16 are computed in float32 and
    return float32, under autocast too. Against float64, potentials are within 2e-5 of the cost's
    scale after one step and 2e-4 at convergence, values within 1e-5 and gradients within 1e-4
    (relative norm). Where eps is below a hundredth of the largest cost, gradients are off by up to
    `largest cost / (100 eps)` times that. Where potentials of points with weight are too large for
    the digits of the dtype (in float32 above 1.2e7 eps), `value` is right, `residual` is inf and
    there is no plan. On the CPU gradients for x, y and C, `plan`, `transport` and `barycenter` then
    raise.

    Raises:
        ValueError: shapes, devices, eps, weights, masses, options or a backend that do not fit; in
            gradients and methods, an eps too small for the digits of the dtype.
        TypeError: a dtype that is not floating, x and y of different dtypes, a sparse tensor, an
            option of another type.
        ConvergenceError: a second derivative was asked for where the L1 error of the marginals is
            above 1e-2 of the mass, or where Newton's method did not converge from there.

    >>> import torch, fewstep
    >>> x = torch.tensor([[0.0], [1.0]])
    >>> y = torch.tensor([[0.0], [3.0]])
    >>> result = fewstep.sinkhorn(x, y, eps=1.0, tol=1e-4)
    >>> round(result.value.item(), 3), result.converged.item()
    (2.645, True)
    >>> [[round(p, 3) for p in row] for row in result.plan().tolist()]
    [[0.476, 0.024], [0.024, 0.476]]
    """
    options: dict[str, Any] = {
        "eps": eps,
        "a": a,
        "b": b,
        "cost": cost,
        "max_iter": max_iter,
        "tol": tol,
        "init": init,
        "anneal": anneal,
        "update": update,
        "relax": relax,
        "reach": reach,
        "exclude_diagonal": exclude_diagonal,
        "cu_seqlens": cu_seqlens,
        "labels": labels,
        "label_cost": label_cost,
        "C": C,
        "memory_limit": memory_limit,
        "precision": precision,
        "backend": backend,
        "check_finite": check_finite,
    }
    if process_group is not None:
        return distributed.sinkhorn(process_group, x, y, options)
    problem = canonical_problem(x, y, **options)
    return problem.result(*autograd.solve(problem.backend, problem))


def transport(result: SinkhornResult, v: Tensor, axis: int = 0, implicit: bool = False) -> Tensor:
    """`P v` (axis 0) or `P' v` (axis 1) with the plan of a result, without forming P.

    Args:
        result (SinkhornResult): what `sinkhorn` returned.
        v (Tensor): `[.., M, K]` for axis 0, `[.., N, K]` for axis 1; K may be left out.
        axis (int): the axis of P that the result keeps.
        implicit (bool): whether to differentiate through the plan too, as in
            `SinkhornResult.transport`.

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
    if isinstance(result, Arrays):
        return result.transport(v, axis, implicit)
    if not isinstance(result, SinkhornResult):
        got = type(result).__name__
        raise TypeError(f"transport: result must be what sinkhorn returned, got {got}")
    return result.transport(v, axis, implicit)
