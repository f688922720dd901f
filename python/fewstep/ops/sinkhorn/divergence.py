"""`sinkhorn_divergence`: entropic transport between point clouds, without its bias."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep._names import Backend, CostName, Precision, Update
from fewstep._results import brief, takes_arrays
from fewstep.ops.sinkhorn.convergence import ConvergenceWarning, unconverged
from fewstep.ops.sinkhorn.problem import total
from fewstep.ops.sinkhorn.result import SinkhornResult
from fewstep.ops.sinkhorn.solve import sinkhorn

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
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Sequence[float] | Tensor | Literal["auto"],
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: CostName = "sqeuclidean",
    max_iter: int = 100,
    tol: float | None = None,
    anneal: float | Sequence[float] | Tensor | None = None,
    update: Update = "alternating",
    reach: float | None = None,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    label_cost: Tensor | None = None,
    memory_limit: int = 2**27,
    precision: Precision | None = None,
    backend: Backend | None = None,
    check_finite: bool = False,
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
        x (Tensor): points `[N, D]` or `[B, N, D]`.
        y (Tensor): points `[M, D]` or `[B, M, D]`.
        eps (float | Sequence | Tensor | "auto"): temperature, in units of the cost, as for
            `sinkhorn`. "auto" is that of the problem between x and y, for all three.
        a (Tensor | None): weights `[.., N]`, as for `sinkhorn`. Default: uniform, with a sum of 1.
        b (Tensor | None): weights `[.., M]`, likewise.
        update (str): updates of the problem between x and y, as for `sinkhorn`.
        reach (float | None): distance of unbalanced transport, beyond which mass is dropped instead
            of moved. Default: the marginals are fixed.
        labels (tuple | None): classes `(lx [.., N], ly [.., M])`, int64.
        label_cost (Tensor | None): symmetric `W [L, L]`, where `W[lx_i, ly_j]` is added to the cost
            of a pair.

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
    if isinstance(reach, tuple | list):
        raise ValueError(f"sinkhorn_divergence: reach must be one number, got {reach}")
    if isinstance(label_cost, Tensor) and len({*label_cost.shape}) > 1:
        got = tuple(label_cost.shape)
        raise ValueError(f"sinkhorn_divergence: label_cost must be square, got {got}")
    solve = functools.partial(
        inspect.unwrap(sinkhorn),  # without its warning
        cost=cost,
        max_iter=max_iter,
        tol=tol,
        anneal=anneal,
        reach=reach,
        memory_limit=memory_limit,
        precision=precision,
        backend=backend,
        check_finite=check_finite,
    )
    between = functools.partial(
        solve,
        x,
        y,
        eps=eps,
        a=a,
        b=b,
        cu_seqlens=cu_seqlens,
        labels=labels,
        label_cost=label_cost,
    )
    xy = between(update=update)
    solve = functools.partial(solve, update="symmetric")
    cu_x, cu_y = cu_seqlens or (None, None)
    lx, ly = labels or (None, None)
    xx, yy = (
        solve(
            z,
            z,
            eps=xy.eps if isinstance(eps, str) else eps,
            a=w,
            b=w,
            cu_seqlens=None if cu is None else (cu, cu),
            labels=None if classes is None else (classes, classes),
            label_cost=label_cost,
        )
        for z, w, cu, classes in ((x, a, cu_x, lx), (y, b, cu_y, ly))
    )
    value = xy.value - (xx.value + yy.value) / 2
    if reach is not None:
        value = value + _mass_term(xy)
    residual = torch.maximum(xy.residual, torch.maximum(xx.residual, yy.residual))
    iterations = torch.maximum(xy.iterations, torch.maximum(xx.iterations, yy.iterations))
    converged = xy.converged & xx.converged & yy.converged
    _warn(converged, residual)
    return DivergenceResult(value, residual, iterations, converged, xy, xx, yy)


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
        stacklevel=4,
    )
