"""`sinkhorn_divergence`: entropic transport between point clouds, without its bias."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewstep._checks import flags
from fewstep._names import Backend, CostName, Precision, Update
from fewstep._results import brief, takes_arrays
from fewstep._torch import readable, untraced
from fewstep.ops.sinkhorn import distributed
from fewstep.ops.sinkhorn.convergence import ConvergenceWarning, unconverged
from fewstep.ops.sinkhorn.inputs import check_dense
from fewstep.ops.sinkhorn.problem import total
from fewstep.ops.sinkhorn.result import SinkhornResult
from fewstep.ops.sinkhorn.solve import sinkhorn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_warned = False


@dataclass(frozen=True, eq=False)
class DivergenceResult:
    """What `sinkhorn_divergence` returns, `[..]` as in `SinkhornResult`.

    Attributes:
        value: Sinkhorn divergence, `[..]`. It is differentiable.
        residual: largest residual of the three problems, `[..]`.
        iterations: largest number of iterations of the three, int64 `[..]`.
        converged: whether all three have converged, bool `[..]`.
        xy: solved problem between x and y.
        xx: solved problem between x and itself.
        yy: solved problem between y and itself.
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor
    xy: SinkhornResult
    xx: SinkhornResult
    yy: SinkhornResult

    __repr__ = brief

    @property
    def eps(self) -> Tensor:
        """Temperatures used, `[..]`."""
        return self.xy.eps

    @property
    def f(self) -> Tensor:
        """Debiased potential on x, `[.., N]`: the divergence's derivative for a, where balanced."""
        return self.xy.f - self.xx.f

    @property
    def g(self) -> Tensor:
        """Debiased potential on y, `[.., M]`."""
        return self.xy.g - self.yy.g


@takes_arrays
def sinkhorn_divergence(
    x: Tensor | None = None,
    y: Tensor | None = None,
    *,
    eps: float | Sequence[float] | Tensor | Literal["auto"],
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: CostName = "sqeuclidean",
    max_iter: int = 100,
    tol: float | None = None,
    init: tuple[Tensor, ...] | None = None,
    anneal: float | Sequence[float] | Tensor | None = None,
    update: Update = "alternating",
    relax: float = 1.0,
    reach: float | tuple[float | None, float | None] | None = None,
    exclude_diagonal: bool = False,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    label_cost: Tensor | None = None,
    C: tuple[Tensor, Tensor, Tensor] | None = None,
    memory_limit: int = 2**27,
    precision: Precision | None = None,
    backend: Backend | None = None,
    check_finite: bool = False,
    process_group: ProcessGroup | None = None,
) -> DivergenceResult:
    """Debiased entropic optimal transport between weighted point clouds.

        S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + eps / 2 (sum a - sum b)^2

    OT is the `value` of `fewstep.sinkhorn` at the same eps. The last term is 0 without `reach`,
    where a and b have the same mass m; S is then m times that of `a / m` and `b / m`. At
    convergence S is at least 0, and 0 for equal clouds, for costs whose kernel `exp(-C / eps)` is
    positive definite. All named costs between points have such a kernel.

    Source: Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences
    (2019). With `reach`, Sejourne et al., Sinkhorn Divergences for Unbalanced Optimal Transport
    (2019), section 4.

    The problems of x and y with themselves keep a single potential and are updated symmetrically,
    which converges within few iterations.

    Args:
        x (Tensor | None): points `[.., N, D]`. None with `C`.
        y (Tensor | None): points `[.., M, D]`. Leading dimensions broadcast with those of x.
        eps (float | Sequence | Tensor | "auto"): temperature, in units of the cost, as for
            `sinkhorn`. "auto" is that of the problem between x and y, for all three.
        a (Tensor | None): weights `[.., N]`, as for `sinkhorn`. Default: uniform, with a sum of 1.
        b (Tensor | None): weights `[.., M]`, likewise.
        init (tuple | None): potentials to start from, shaped like those of the result's problems:
            `(xy.f, xy.g)`, or `(xy.f, xy.g, xx.f, yy.f)`. Default: zeros.
        update (str): updates of the problem between x and y, as for `sinkhorn`.
        relax (float): over-relaxation of the problem between x and y, as for `sinkhorn`.
        reach (float | tuple | None): distance of unbalanced transport, beyond which mass is dropped
            instead of moved. A pair holds those of x and y, which the problem of each with itself
            has twice. Where they differ S need not be 0 for equal clouds. Default: the marginals
            are fixed.
        exclude_diagonal (bool): leaves out the pairs of a point with itself, in the problems of x
            and of y with themselves. S may then be negative, and is not 0 for equal clouds.
        labels (tuple | None): classes `(lx [.., N], ly [.., M])`, int64.
        label_cost (Tensor | None): symmetric `W [L, L]`, where `W[lx_i, ly_j]` is added to the cost
            of a pair.
        C (tuple | None): costs `(C_xy [.., N, M], C_xx [.., N, N], C_yy [.., M, M])` instead of
            points, of which the last two are symmetric.
        process_group (ProcessGroup | None): ranks of torch.distributed over which x is spread, each
            with its own x and a, as for `sinkhorn`. The result's xy and xx are those of the rank's
            rows, and yy is whole. init has the rank's own f for x and all of g. Every rank also
            gathers all x and a, `N (D + 1)` numbers, and an iteration of xx or yy gathers `8 N` or
            `8 M` bytes.

    cost, max_iter, tol, anneal, cu_seqlens, memory_limit, precision, backend and check_finite are
    those of `sinkhorn`.

    Returns:
        DivergenceResult: value, residual, iterations, converged, and the three problems.

    `value` has gradients for x, y, a and b by the envelope theorem. It has second derivatives by
    implicit differentiation, in reverse, forward and mixed mode and under `torch.func.vmap`; see
    `sinkhorn`. On the CPU a `ConvergenceWarning` is given once per process if a problem has not
    converged.

    Raises:
        ValueError: an argument that does not fit; see `sinkhorn`.
        TypeError: a dtype that is not floating, or x and y of different dtypes.
        ConvergenceError: a second derivative was asked for, far from convergence.

    >>> import torch, fewstep
    >>> x = torch.tensor([[0.0], [1.0]], requires_grad=True)
    >>> y = torch.tensor([[0.0], [3.0]])
    >>> s = fewstep.sinkhorn_divergence(x, y, eps=1.0, tol=1e-5)
    >>> round(s.value.item(), 3)
    2.108
    >>> [round(g, 3) for g in torch.autograd.grad(s.value, x)[0].flatten().tolist()]
    [0.127, -2.127]
    """
    flags("sinkhorn_divergence", exclude_diagonal=exclude_diagonal)
    if isinstance(label_cost, Tensor) and len({*label_cost.shape}) > 1:
        got = tuple(label_cost.shape)
        raise ValueError(f"sinkhorn_divergence: label_cost must be square, got {got}")
    C_xy, C_xx, C_yy = _matrices(C)
    between, of_x, of_y = _starts(init)
    if process_group is not None:
        options = {
            "eps": eps,
            "init": between,
            "a": a,
            "b": b,
            "cost": cost,
            "max_iter": max_iter,
            "tol": tol,
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
        starts = tuple(None if start is None else start[0] for start in (of_x, of_y))
        return _of_ranks(process_group, x, y, options, starts)
    solve = functools.partial(
        inspect.unwrap(sinkhorn),  # without its warning
        cost=cost,
        max_iter=max_iter,
        tol=tol,
        anneal=anneal,
        label_cost=label_cost,
        memory_limit=memory_limit,
        precision=precision,
        backend=backend,
        check_finite=check_finite,
    )
    xy = solve(
        x,
        y,
        eps=eps,
        a=a,
        b=b,
        init=between,
        update=update,
        relax=relax,
        reach=reach,
        cu_seqlens=cu_seqlens,
        labels=labels,
        C=C_xy,
    )
    cu_x, cu_y = cu_seqlens or (None, None)
    lx, ly = labels or (None, None)
    if isinstance(reach, Tensor | np.ndarray) and reach.ndim == 1:
        reach = tuple(reach.tolist())
    reach_x, reach_y = reach if isinstance(reach, tuple | list) else (reach, reach)
    eps = xy.eps if isinstance(eps, str) else eps
    batch = xy._problem.batch
    xx, yy = (
        solve(
            (z := _of_each_problem(points, matrix, batch, eps, w, classes))[0],
            z[0],
            eps=eps,
            a=w,
            b=w,
            init=start,
            update="symmetric",
            reach=r,
            exclude_diagonal=exclude_diagonal,
            cu_seqlens=None if cu is None else (cu, cu),
            labels=None if classes is None else (classes, classes),
            C=z[1],
        )
        for points, matrix, w, cu, classes, r, start in (
            (x, C_xx, a, cu_x, lx, reach_x, of_x),
            (y, C_yy, b, cu_y, ly, reach_y, of_y),
        )
    )
    return _debiased(xy, xx, yy, None if reach is None else _mass_term(xy))


def _debiased(
    xy: SinkhornResult, xx: SinkhornResult, yy: SinkhornResult, of_masses: Tensor | None
) -> DivergenceResult:
    value = xy.value - (xx.value + yy.value) / 2
    value = value if of_masses is None else value + of_masses
    residual = torch.maximum(xy.residual, torch.maximum(xx.residual, yy.residual))
    iterations = torch.maximum(xy.iterations, torch.maximum(xx.iterations, yy.iterations))
    converged = xy.converged & xx.converged & yy.converged
    _warn(converged, residual)
    return DivergenceResult(value, residual, iterations, converged, xy, xx, yy)


@untraced
def _of_ranks(
    group: ProcessGroup, x: Tensor | None, y: Tensor | None, options: dict[str, Any], starts: Any
) -> DivergenceResult:
    s = distributed.shared("sinkhorn_divergence", group, x, y, options, starts)
    xy, (rho_x, rho_y) = distributed.between(s), s.problem.schedule.rho
    xx, yy = distributed.of_rows(s, rho_x), distributed.of_columns(s, rho_y)
    return _debiased(xy, xx, yy, None if options["reach"] is None else distributed.mass_term(s))


def _matrices(
    C: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if C is None:
        return None, None, None
    if not isinstance(C, tuple | list) or len(C) != 3:
        got = type(C).__name__ if not isinstance(C, tuple | list) else f"{len(C)} of them"
        raise TypeError(f"sinkhorn_divergence: C must be a tuple (C_xy, C_xx, C_yy), got {got}")
    for name, t in zip(("C_xy", "C_xx", "C_yy"), C, strict=True):
        check_dense("sinkhorn_divergence", name, t)
    C_xy, C_xx, C_yy = C
    for name, t, side in (("C_xx", C_xx, -2), ("C_yy", C_yy, -1)):
        if t.ndim < 2 or C_xy.ndim < 2 or {t.shape[-1], t.shape[-2]} != {C_xy.shape[side]}:
            count = C_xy.shape[side] if C_xy.ndim > 1 else "?"
            raise ValueError(
                f"sinkhorn_divergence: {name} must be [.., {count}, {count}] with C_xy"
                f" {tuple(C_xy.shape)}, got {tuple(t.shape)}"
            )
        if readable(t) and not torch.allclose(t, t.mT, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ValueError(f"sinkhorn_divergence: {name} must be symmetric, got one that is not")
    return C_xy, C_xx, C_yy


Start = tuple[Tensor, Tensor] | None


def _starts(init: tuple[Tensor, ...] | None) -> tuple[Start, Start, Start]:
    """Potentials that the three problems start from."""
    if init is None:
        return None, None, None
    if not isinstance(init, tuple | list) or len(init) not in (2, 4):
        got = f"{len(init)} of them" if isinstance(init, tuple | list) else type(init).__name__
        raise TypeError(
            "sinkhorn_divergence: init must be potentials (xy.f, xy.g) or (xy.f, xy.g, xx.f, yy.f),"
            f" got {got}"
        )
    f, g = init[:2]
    return (f, g), *(((t, t) for t in init[2:]) if len(init) == 4 else (None, None))


def _of_each_problem(
    points: Tensor | None,
    matrix: Tensor | None,
    batch: tuple[int, ...],
    eps: float | Sequence[float] | Tensor,
    *own: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """A cloud for each problem of the batch, unless all that it is solved with is shared."""
    t = matrix if points is None else points
    assert t is not None
    lead = t.shape[:-2]
    numbers = isinstance(eps, Tensor) and eps.ndim > 0
    if numbers or any(w is not None and w.shape[:-1] != lead for w in own):
        t = t.expand(*batch, *t.shape[-2:])
    return (None, t) if points is None else (t, None)


def _mass_term(xy: SinkhornResult) -> Tensor:
    """`eps / 2 (sum a - sum b)^2`."""
    p = xy._problem
    cu_x, cu_y = p.points.segments or (None, None)
    excess = total(p.a, cu_x) - total(p.b, cu_y)
    T = max(1, len(p.eps) // max(p.points.count, 1))
    return (p.eps / 2 * excess.repeat_interleave(T).square()).reshape(p.values)


def _warn(converged: Tensor, residual: Tensor) -> None:
    """Once, and only where looking costs nothing."""
    global _warned
    if _warned or not unconverged(converged):
        return
    _warned = True
    warnings.warn(
        f"sinkhorn_divergence: not converged, the residual is {residual.max().item():.3g};"
        " the divergence may even be negative; more iterations (max_iter with tol), anneal or"
        " a larger eps help; this is said once",
        ConvergenceWarning,
        stacklevel=5,
    )
