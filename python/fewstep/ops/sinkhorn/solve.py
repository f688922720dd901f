"""`sinkhorn`: entropic optimal transport between point clouds, and the plan it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep._library import choose_backend
from fewstep._torch import is_transformed
from fewstep.ops.sinkhorn import autograd, dispatch
from fewstep.ops.sinkhorn.implicit import Constants, Problem, transposed
from fewstep.reference import sinkhorn as reference
from fewstep.reference.sinkhorn import Points, Schedule

# What a user may write for `cost`; cosine is half_sqeuclidean of normalised points.
COSTS = ("sqeuclidean", "half_sqeuclidean", "euclidean", "cosine", "dot", "l1")
UPDATES = ("alternating", "symmetric")
_SQUARED = ("sqeuclidean", "half_sqeuclidean")
_HALF = (torch.bfloat16, torch.float16)
# Largest deviation of a weight vector's sum from 1 that is taken for rounding.
_MASS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class _Problem:
    """The inputs in canonical form, as `fewstep.reference.sinkhorn` has them."""

    points: Points
    a: Tensor  # [B, N], or [1, N] where ragged
    b: Tensor  # [B, M]
    eps: Tensor  # [P]
    f0: Tensor | None  # [P, N], or [T, N] where ragged
    g0: Tensor | None
    schedule: Schedule
    backend: str
    batch: tuple[int, ...]  # leading shape of the caller's points
    temperatures: tuple[int, ...]  # (T,) where several were given

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading shape of the caller's potentials."""
        return (*self.batch, *self.temperatures)

    @property
    def values(self) -> tuple[int, ...]:
        """Shape of one number for each problem."""
        ragged = () if self.points.segments is None else (self.points.count,)
        return (*self.batch, *ragged, *self.temperatures)


@dataclass(frozen=True)
class SinkhornResult:
    """What `sinkhorn` returns.

    `[..]` is `[B]` for batched input and nothing otherwise, followed by `[T]` where T temperatures
    were given. For ragged input potentials are flat, `[N]` or `[T, N]`, and the other tensors
    `[B]` or `[B, T]`.

    Attributes:
        f: potential on x, `[.., N]`.
        g: potential on y, `[.., M]`.
        value: the entropic transport cost (the dual objective at f and g), `[..]`; differentiable.
        residual: L1 error of the row marginal as a fraction of the mass, `[..]`; the columns are
            exact, or with a single potential as far off.
        iterations: iterations done, those of annealing included, int64 `[..]`.
        converged: `residual <= tol` (1e-3 where `tol` is None), bool `[..]`.
    """

    f: Tensor
    g: Tensor
    value: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor
    _problem: _Problem = field(repr=False)

    def _potentials(self) -> tuple[Tensor, Tensor]:
        """f and g as the kernels have them, `[P, N]` and `[P, M]`."""
        f, g = self.f.detach(), self.g.detach()
        count = math.prod(f.shape[:-1])
        return f.reshape(count, f.shape[-1]), g.reshape(count, g.shape[-1])

    def _solved(self, implicit: bool) -> tuple[list[Problem], Constants]:
        """What `differentiable` needs; a constant plan, or one that depends on the inputs."""
        p = self._problem
        points, a, b = p.points, p.a, p.b
        if not implicit:
            points, a, b = points.detached(), a.detach(), b.detach()
        solved = autograd.problems(points, a, b, *self._potentials(), p.eps)
        return solved, autograd.constants(p.backend, points, p.schedule.rho)

    def _apply(self, v: Tensor, axis: int, implicit: bool) -> Tensor:
        """`sum_j p_ij v_j [P, N, K]` with p = P / a, or that with the roles of x and y swapped."""
        solved, constants = self._solved(implicit)
        parts = []
        for problem, w in zip(solved, v.chunk(len(solved)), strict=True):
            c = constants
            if implicit:
                f, g = autograd.potentials(problem, c)
                problem = problem._replace(f=f, g=g)
            if axis == 1:
                problem, c = transposed(problem, c)
            through = autograd.product_through_plan if implicit else autograd.product
            parts.append(through(w, problem, c))
        return torch.cat(parts)

    def _per_problem(self, t: Tensor) -> Tensor:
        """`[B, ..]` repeated to `[P, ..]`; flat `[1, ..]` to `[T, ..]`."""
        T = math.prod(self._problem.temperatures)
        return t if T == 1 else t[:, None].expand(-1, T, *t.shape[1:]).flatten(0, 1)

    def potentials(self) -> tuple[Tensor, Tensor]:
        """f and g as functions of x, y, a, b and C, differentiable once.

        By implicit differentiation at convergence, whatever the backend. Where both marginals are
        fixed a constant is free, and here such that `<a, f> = <b, g>`.

        Raises:
            ConvergenceError: in the backward pass or forward mode, far from convergence.

        >>> import torch, fewstep
        >>> x, y = torch.rand(5, 2, requires_grad=True), torch.rand(7, 2)
        >>> f, g = fewstep.sinkhorn(x, y, eps=0.1).potentials()
        >>> torch.autograd.grad(f.square().sum(), x)[0].shape
        torch.Size([5, 2])
        """
        solved, constants = self._solved(implicit=True)
        parts = zip(*(autograd.potentials(p, constants) for p in solved), strict=True)
        f, g = (torch.cat(t) for t in parts)
        return f.reshape(self.f.shape), g.reshape(self.g.shape)

    def transport(self, v: Tensor, axis: int = 0, implicit: bool = False) -> Tensor:
        """`P v` (axis 0: v lives on y) or `P' v` (axis 1: v lives on x), without forming P.

        Args:
            v (Tensor): `[.., M, K]` for axis 0, `[.., N, K]` for axis 1; the trailing K may be
                left out, and so may the T of several temperatures. Same dtype as the potentials.
            axis (int): the axis of P that the result keeps.
            implicit (bool): the plan is a function of x, y, a, b and C, with derivatives (first
                ones) by implicit differentiation at convergence; otherwise it is a constant, and
                gradients flow into `v` alone.

        Returns:
            Tensor: `[.., N, K]` for axis 0, `[.., M, K]` for axis 1.

        Raises:
            ValueError: a shape or axis that does not fit.
            TypeError: another dtype.

        >>> import torch, fewstep
        >>> x, y = torch.rand(5, 2), torch.rand(7, 2)
        >>> plan = fewstep.sinkhorn(x, y, eps=0.1)
        >>> torch.allclose(plan.transport(torch.ones(5), axis=1), torch.full((7,), 1 / 7))
        True
        """
        p = self._problem
        if axis not in (0, 1):
            raise ValueError(f"transport: axis must be 0 or 1, got {axis}")
        count = (p.points.y if axis == 0 else p.points.x).shape[1]
        shared, own = (*p.batch, count), (*p.lead, count)
        vector = tuple(v.shape) in (shared, own)
        v = v[..., None] if vector else v
        if tuple(v.shape[:-1]) not in (shared, own) or v.ndim == 0:
            got = tuple(v.shape[:-1] if vector else v.shape)
            raise ValueError(f"transport: v must be {(*own, 'K')} for axis {axis}, got {got}")
        if v.dtype != self.f.dtype:
            raise TypeError(f"transport: v must be {self.f.dtype}, got {v.dtype}")
        if v.shape[:-1] != own:
            v = v.unsqueeze(len(p.batch)).expand(*own, v.shape[-1])
        out = self._apply(v.reshape(math.prod(p.lead), *v.shape[-2:]), axis, implicit)
        weights = self._per_problem(p.a if axis == 0 else p.b)
        weights = weights if implicit else weights.detach()
        out = (weights[..., None] * out).reshape(*p.lead, *out.shape[1:])
        return out[..., 0] if vector else out

    def plan(self) -> Tensor:
        """The dense plan `P [.., N, M]`, detached; for looking at, not for large problems.

        Raises:
            ValueError: ragged problems, which have no plans of one shape.
        """
        p = self._problem
        if p.points.segments is not None:
            raise ValueError("plan: ragged problems have plans of several shapes, got cu_seqlens")
        f, g = self._potentials()
        C = self._per_problem(p.points.detached().costs())
        a, b = self._per_problem(p.a.detach()), self._per_problem(p.b.detach())
        k = ((f[..., :, None] + g[..., None, :] - C) / p.eps[:, None, None]).exp()
        plan = a[..., :, None] * b[..., None, :] * k
        return plan.reshape(*p.lead, *plan.shape[1:])

    def barycenter(self, normalize: bool = True, implicit: bool = False) -> Tensor:
        """The barycentric projection `T(x_i) = sum_j P_ij y_j / sum_j P_ij`, `[.., N, D]`.

        Args:
            normalize (bool): divide by the row mass that the plan has, so that every `T(x_i)` is
                a true average before convergence too; otherwise by its target a_i.
            implicit (bool): differentiable once in x, y, a and b, as in `transport`.

        Raises:
            ValueError: a cost matrix was given, so there are no points to average.
        """
        p = self._problem
        if p.points.cost == "matrix":
            raise ValueError("barycenter: needs points, got a problem with a cost matrix C")
        y = p.points.y if implicit else p.points.y.detach()
        y = torch.cat([y, torch.ones_like(y[..., :1])], -1) if normalize else y
        T = math.prod(p.temperatures)
        out = self._apply(y[:, None].expand(-1, T, -1, -1).flatten(0, 1), 0, implicit)
        if normalize:
            out, mass = out[..., :-1], out[..., -1:]
            # A point that keeps no mass at all has NaN, but not in the gradients of others.
            out = torch.where(mass > 0, out / torch.where(mass > 0, mass, 1.0), torch.nan)
        return out.reshape(*p.lead, *out.shape[1:])


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
        eps (float | Sequence | Tensor): temperature, in units of the cost; a tensor `[B]` for one
            per problem. One dimension more, `[T]` or `[B, T]`: T temperatures of the same points,
            solved from the same distances, and results with T before the points.
        a (Tensor | None): weights `[.., N]` that sum to 1 (any mass with `reach`), zeros allowed.
            Default: uniform.
        b (Tensor | None): weights `[.., M]`, likewise.
        cost (str | Callable): "sqeuclidean" = `|x-y|^2`, "half_sqeuclidean" = `|x-y|^2 / 2`,
            "euclidean" = `|x-y|`, "cosine" = `1 - x.y / (|x| |y|)`, "dot" = `-x.y`, "l1" =
            `sum_c |x_c - y_c|`; or a function of x and y, such as
            `lambda x, y: (x - y).abs().sqrt().sum(-1)`, that both KeOps's LazyTensors and, without
            KeOps, broadcast tensors understand.
        max_iter (int): iterations at eps, at least 1; exactly that many where `tol` is None.
        tol (float | None): stop a problem, on the device, once its `residual` is at most this.
        init (tuple | None): potentials (f, g) to start from, shaped like the result's. An
            alternating iteration overwrites f, so only g matters there. Default: zeros.
        anneal (float | Sequence | Tensor | None): temperatures before eps, one iteration at each:
            those given, or, for a factor below 1, the cost across the points' common bounding box,
            times the factor, and so on while above eps.
        update (str): "alternating" as above, or "symmetric": both potentials from the last two,
            averaged with them (geomloss's iteration), and at the end an alternating iteration, or
            up to ten until `tol` is reached, uncounted. Where y is the same tensor as x, with equal
            weights and no labels, it keeps a single potential.
        relax (float): over-relaxation of alternating updates, in (0, 2): `f <- f + relax (f' - f)`.
        reach (float | tuple | None): distance beyond which mass is rather destroyed than moved:
            `rho = reach^2` for squared costs and `reach` for the others. A pair (x, y) may have a
            None for a marginal that is a constraint.
        exclude_diagonal (bool | int): leave out the pairs `j == i`, or `j == i + offset`.
        cu_seqlens (tuple | None): int64 `(cu_x [B + 1], cu_y [B + 1])` for B problems of several
            sizes: the i-th has the points `cu[i]` to `cu[i + 1] - 1`.
        labels (tuple | None): classes `(lx [.., N], ly [.., M])`, int64, for `label_cost`.
        label_cost (Tensor | None): `W [L, L']`; a pair costs `W[lx_i, ly_j]` more.
        C (Tensor | None): costs `[N, M]` or `[B, N, M]` instead of points.
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
        check_finite (bool): look for NaN and inf first; on a GPU also check the signs and sums of
            weights and the sign of eps, which costs a synchronisation there.

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

    float64 stays float64; float32, bfloat16 and float16 are computed in float32 and return
    float32. Kernel against float64: potentials within 2e-5 of the cost's scale after one step and
    2e-4 at convergence, value 1e-5, gradients 1e-4 (relative norm).

    Raises:
        ValueError: shapes, devices, eps, weights, options or a backend that do not fit.
        TypeError: a dtype that is not floating, or x and y of different dtypes.
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
    # Reading values costs a synchronisation on a GPU and breaks a compiled graph.
    device = next((t.device for t in (x, C) if isinstance(t, Tensor)), torch.device("cpu"))
    read = check_finite or device.type == "cpu"
    read = read and not torch.compiler.is_compiling() and not is_transformed()
    points, batch, dtype = _points(x, y, cost, C, exclude_diagonal, cu_seqlens, read)
    points = _labelled(points, batch, labels, label_cost, dtype, read)
    points = replace(points, precision=dispatch.checked_precision("sinkhorn", precision))
    lead = (points.count,) if points.segments is not None else batch
    e, temperatures = _eps(eps, lead, points.x, dtype, read)
    rho = _penalties(reach, points.cost)
    free = rho != (None, None)
    weights = _weights("a", a, batch, points, dtype, read, free=free)
    columns = _weights("b", b, batch, points, dtype, read, free=free)
    if max_iter < 1:
        raise ValueError(f"sinkhorn: max_iter must be at least 1, got {max_iter}")
    if tol is not None and not tol >= 0:
        raise ValueError(f"sinkhorn: tol must be None or at least 0, got {tol}")
    if memory_limit < 0:
        raise ValueError(f"sinkhorn: memory_limit must not be negative, got {memory_limit}")
    if update not in UPDATES:
        raise ValueError(f"sinkhorn: update must be one of {UPDATES}, got {update!r}")
    if not 0 < relax < 2:
        raise ValueError(f"sinkhorn: relax must be above 0 and below 2, got {relax}")
    simultaneous = update == "symmetric"
    if simultaneous and relax != 1:
        raise ValueError(f"sinkhorn: relax must be 1 with symmetric updates, got {relax}")
    same_segments = cu_seqlens is None or cu_seqlens[0] is cu_seqlens[1]
    single = simultaneous and x is y and x is not None and a is b and init is None
    # Label costs need not be symmetric, and looking would cost a synchronisation on a GPU.
    single = single and labels is None and same_segments
    single = single and not points.diagonal and rho[0] == rho[1]
    schedule = Schedule(
        max_iter=max_iter,
        tol=tol,
        rho=rho,
        relax=0.5 if simultaneous else relax,
        simultaneous=simultaneous,
        single=single,
        memory_limit=memory_limit,
    )
    schedule = _annealed(schedule, anneal, points, e, read)
    f0, g0 = (None, None) if init is None else _initial(init, batch, temperatures, points, dtype)
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
    problem = _Problem(points, weights, columns, e, f0, g0, schedule, chosen, batch, temperatures)
    f, g, *numbers = autograd.solve(chosen, points, weights, columns, e, f0, g0, schedule)
    f, g = (t.reshape(*problem.lead, t.shape[-1]) for t in (f, g))
    value, residual, iterations, converged = (t.reshape(problem.values) for t in numbers)
    return SinkhornResult(f, g, value, residual, iterations, converged, problem)


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
    return result.transport(v, axis, implicit)


def _points(
    x: Tensor | None,
    y: Tensor | None,
    cost: str | Callable[[Any, Any], Any],
    C: Tensor | None,
    exclude_diagonal: bool | int,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    read: bool,
) -> tuple[Points, tuple[int, ...], torch.dtype]:
    """The points with a batch axis, the leading shape that they came with, and the dtype."""
    matrix = None
    formula = None if isinstance(cost, str) else cost
    if C is not None:
        if x is not None or y is not None:
            given = "x" if x is not None else "y"
            raise ValueError(f"sinkhorn: {given} must be None with a cost matrix C, got a Tensor")
        if cu_seqlens is not None:
            raise ValueError("sinkhorn: cu_seqlens needs points, got a cost matrix C")
        _check_tensor("C", C, "[N, M] or [B, N, M]")
        matrix = C if C.ndim == 3 else C[None]
        x, y = matrix.new_empty(*matrix.shape[:2], 0), matrix.new_empty(*matrix.mT.shape[:2], 0)
        batch, cost = C.shape[:-2], "matrix"
    else:
        for name, t in (("x", x), ("y", y)):
            _check_tensor(name, t, "[N, D] or [B, N, D]")
        assert x is not None
        assert y is not None
        if x.dtype != y.dtype:
            raise TypeError(f"sinkhorn: y must have the dtype of x, {x.dtype}, got {y.dtype}")
        if y.device != x.device:
            raise ValueError(f"sinkhorn: y must be on {x.device} with x, got {y.device}")
        if y.ndim != x.ndim or y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"sinkhorn: y must match x {tuple(x.shape)} except in its points,"
                f" got {tuple(y.shape)}"
            )
        if formula is not None:
            if not callable(formula):
                raise TypeError(f"sinkhorn: cost must be a name or a function, got {cost!r}")
            cost = "formula"
        elif cost not in COSTS:
            raise ValueError(f"sinkhorn: cost must be one of {COSTS}, got {cost!r}")
        batch = x.shape[:-2]
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    x, y, matrix = (None if t is None else t.to(dtype) for t in (x, y, matrix))
    assert x is not None
    assert y is not None
    if cost == "cosine":
        x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
        cost = "half_sqeuclidean"
    if x.ndim == 2:
        x, y = x[None], y[None]
    diagonal = None if exclude_diagonal is False else int(exclude_diagonal)
    if exclude_diagonal is True:
        diagonal = 0
    if diagonal is not None and min(x.shape[1], y.shape[1]) < 2:
        raise ValueError(
            "sinkhorn: exclude_diagonal needs two points on each side,"
            f" got {x.shape[1]} and {y.shape[1]}"
        )
    segments = None
    if cu_seqlens is not None:
        segments = _segments(cu_seqlens, batch, x, y, diagonal, read)
    assert isinstance(cost, str)
    points = Points(x, y, cost, matrix, segments, diagonal=diagonal, formula=formula)
    return points, tuple(batch), dtype


def _check_tensor(name: str, t: object, shape: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"sinkhorn: {name} must be a Tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"sinkhorn: {name} must have a floating dtype, got {t.dtype}")
    if t.ndim not in (2, 3):
        raise ValueError(f"sinkhorn: {name} must be {shape}, got {tuple(t.shape)}")
    if 0 in t.shape[-2:]:
        raise ValueError(f"sinkhorn: {name} must have points and D > 0, got {tuple(t.shape)}")


def _segments(
    cu_seqlens: tuple[Tensor, Tensor],
    batch: Sequence[int],
    x: Tensor,
    y: Tensor,
    diagonal: int | None,
    read: bool,
) -> tuple[Tensor, Tensor]:
    if batch:
        raise ValueError(f"sinkhorn: cu_seqlens needs flat x [N, D], got {tuple(x.shape)}")
    for name, cu, points in zip(("cu_x", "cu_y"), cu_seqlens, (x, y), strict=True):
        if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64):
            got = cu.dtype if isinstance(cu, Tensor) else type(cu).__name__
            raise TypeError(f"sinkhorn: {name} must be an int64 Tensor, got {got}")
        if cu.ndim != 1 or cu.shape[0] < 2 or cu.shape != cu_seqlens[0].shape:
            raise ValueError(
                f"sinkhorn: {name} must be [B + 1] for B > 0 problems, as many as in cu_x,"
                f" got {tuple(cu.shape)}"
            )
        if cu.device != x.device:
            raise ValueError(f"sinkhorn: {name} must be on {x.device} with x, got {cu.device}")
        if not read:
            continue
        ends = cu.tolist()
        if ends[0] != 0 or ends[-1] != points.shape[1] or ends != sorted(ends):
            raise ValueError(
                f"sinkhorn: {name} must rise from 0 to the number of points, {points.shape[1]},"
                f" got {ends if len(ends) < 10 else [*ends[:4], '...', *ends[-4:]]}"
            )
    cu_x, cu_y = (cu.to(torch.int64) for cu in cu_seqlens)
    if read:
        n, m = cu_x.diff(), cu_y.diff()
        least = 1 if diagonal is None else 2
        bad = ((n < least) | (m < least)) & (n + m > 0)
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"sinkhorn: cu_seqlens must give both sides of a problem {least} or more points,"
                f" or none, got {int(n[i])} and {int(m[i])} in problem {i}"
            )
    return cu_x, cu_y


def _labelled(
    points: Points,
    batch: tuple[int, ...],
    labels: tuple[Tensor, Tensor] | None,
    label_cost: Tensor | None,
    dtype: torch.dtype,
    read: bool,
) -> Points:
    if labels is None and label_cost is None:
        return points
    if labels is None or label_cost is None:
        missing = "labels" if labels is None else "label_cost"
        raise ValueError(f"sinkhorn: {missing} must be given with its counterpart, got None")
    if points.cost == "matrix":
        raise ValueError("sinkhorn: labels need points, got a cost matrix C")
    if label_cost.ndim != 2 or not label_cost.is_floating_point():
        raise ValueError(
            "sinkhorn: label_cost must be a floating [L, L'],"
            f" got {label_cost.dtype} {tuple(label_cost.shape)}"
        )
    if label_cost.requires_grad:
        raise ValueError("sinkhorn: label_cost must not require a gradient, got one that does")
    sides = zip(("lx", "ly"), labels, (points.x, points.y), label_cost.shape, strict=True)
    for name, classes, p, count in sides:
        if tuple(classes.shape) != (*batch, p.shape[1]) or classes.dtype != torch.int64:
            raise ValueError(
                f"sinkhorn: labels {name} must be int64 {(*batch, p.shape[1])},"
                f" got {classes.dtype} {tuple(classes.shape)}"
            )
        if read and classes.numel() > 0:
            low, high = int(classes.min()), int(classes.max())
            if low < 0 or high >= count:
                raise ValueError(
                    f"sinkhorn: labels {name} must be from 0 to {count - 1} for this label_cost,"
                    f" got {low if low < 0 else high}"
                )
    lx, ly = (t if batch else t[None] for t in labels)
    return replace(points, labels=(lx, ly), label_cost=label_cost.to(dtype))


def _penalties(
    reach: float | tuple[float | None, float | None] | None, cost: str
) -> tuple[float | None, float | None]:
    pair = reach if isinstance(reach, tuple) else (reach, reach)
    if len(pair) != 2:
        raise ValueError(f"sinkhorn: reach must be a number or a pair, got {reach}")
    for r in pair:
        if r is not None and not r > 0:
            raise ValueError(f"sinkhorn: reach must be positive, got {r}")
    power = 2 if cost in _SQUARED else 1
    rho = [None if r is None or math.isinf(r) else float(r) ** power for r in pair]
    return rho[0], rho[1]


def _annealed(
    schedule: Schedule,
    anneal: float | Sequence[float] | Tensor | None,
    points: Points,
    eps: Tensor,
    read: bool,
) -> Schedule:
    if anneal is None:
        return schedule
    if isinstance(anneal, int | float):
        if not 0 < anneal < 1:
            raise ValueError(f"sinkhorn: anneal must be a factor in (0, 1), got {anneal}")
        if points.cost == "formula":
            raise ValueError(
                f"sinkhorn: anneal must be temperatures for a cost function, got {anneal}"
            )
        T = eps.shape[0] // max(points.count, 1)
        start = _largest_cost(points).repeat_interleave(T)
        return replace(schedule, start=start, factor=float(anneal))
    if isinstance(anneal, Tensor):
        steps = anneal.to(device=eps.device, dtype=eps.dtype)
    else:
        steps = dispatch.from_numbers(anneal, eps.device, eps.dtype)
    if steps.ndim != 1:
        raise ValueError(
            f"sinkhorn: anneal must be a factor or temperatures [S], got {tuple(steps.shape)}"
        )
    values = (steps.tolist() if read else []) if isinstance(anneal, Tensor) else list(anneal)
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"sinkhorn: anneal must be positive and finite, got {values}")
    return replace(schedule, temperatures=steps.detach())


def _largest_cost(points: Points) -> Tensor:
    """An upper bound on what differences of costs can be, `[B]`: across the bounding box."""
    p = points
    if p.cost == "matrix":
        assert p.matrix is not None
        return (p.matrix.amax((1, 2)) - p.matrix.amin((1, 2))).detach()

    def bounds(t: Tensor, cu: Tensor | None) -> tuple[Tensor, Tensor]:
        t = t.detach()
        if cu is None:
            return t.amin(1), t.amax(1)
        low, high = (
            torch.segment_reduce(t[0], kind, lengths=cu.diff(), axis=0) for kind in ("min", "max")
        )
        return low, high

    cu_x, cu_y = (None, None) if p.segments is None else p.segments
    (low_x, high_x), (low_y, high_y) = bounds(p.x, cu_x), bounds(p.y, cu_y)
    if p.cost == "dot":
        largest = [
            torch.maximum(low.abs(), high.abs()) for low, high in ((low_x, high_x), (low_y, high_y))
        ]
        out = 2 * (largest[0] * largest[1]).sum(-1)
    else:
        side = torch.maximum(high_x, high_y) - torch.minimum(low_x, low_y)
        out = side.sum(-1) if p.cost == "l1" else side.square().sum(-1)
        if p.cost == "euclidean":
            out = out.sqrt()
        if p.cost == "half_sqeuclidean":
            out = out / 2
    out = torch.nan_to_num(out, posinf=0.0)  # problems without points
    return out if p.label_cost is None else out + p.label_cost.detach().abs().max()


def _weights(
    name: str,
    w: Tensor | None,
    batch: tuple[int, ...],
    points: Points,
    dtype: torch.dtype,
    read: bool,
    *,
    free: bool,
) -> Tensor:
    """Weights `[B, N]`, or flat `[1, N]`; of any mass where `free`."""
    own = points.x if name == "a" else points.y
    cu = None if points.segments is None else points.segments[0 if name == "a" else 1]
    shape = (*batch, own.shape[1])
    if w is None:
        if cu is None:
            return own.new_full((own.shape[0], shape[-1]), 1 / shape[-1], dtype=dtype)
        return cu.diff().to(dtype).reciprocal()[_problem_of(cu, shape[-1])][None]
    if not isinstance(w, Tensor) or not w.is_floating_point():
        got = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"sinkhorn: {name} must be a floating Tensor, got {got}")
    if w.device != own.device:
        raise ValueError(f"sinkhorn: {name} must be on {own.device} with x, got {w.device}")
    if tuple(w.shape) != shape:
        raise ValueError(f"sinkhorn: {name} must have shape {shape}, got {tuple(w.shape)}")
    if read and w.numel() > 0:
        low = w.detach().min().item()
        if low < 0:
            raise ValueError(f"sinkhorn: {name} must not be negative, got {low}")
        total = w.detach().double()
        if cu is None:
            total = total.sum(-1)
        else:
            total = total.new_zeros(cu.shape[0] - 1).index_add(0, _problem_of(cu, len(w)), total)
            total = total[cu.diff() > 0]
        if free:
            if not bool((total > 0).all()):
                raise ValueError(f"sinkhorn: {name} must have mass, got a sum of {total.min()}")
        else:
            worst = total.flatten()[(total - 1).abs().argmax()].item()
            if not abs(worst - 1) <= _MASS_TOLERANCE.get(w.dtype, 3e-2):
                raise ValueError(f"sinkhorn: {name} must sum to 1, got a sum of {worst}")
    w = w.to(dtype)
    return w if w.ndim == 2 else w[None]


def _problem_of(cu: Tensor, count: int) -> Tensor:
    """The problem that each of `count` flat points belongs to."""
    return torch.bucketize(torch.arange(count, device=cu.device), cu[1:], right=True)


def _eps(
    eps: float | Sequence[float] | Tensor,
    lead: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype,
    read: bool,
) -> tuple[Tensor, tuple[int, ...]]:
    """Temperatures `[P]`, and (T,) where there are several for each problem."""
    count = lead[0] if lead else 1
    if isinstance(eps, int | float):
        if not 0 < eps < float("inf"):
            raise ValueError(f"sinkhorn: eps must be positive and finite, got {eps}")
        return like.new_full((count,), eps, dtype=dtype), ()
    e = eps if isinstance(eps, Tensor) else dispatch.from_numbers(eps, like.device, dtype)
    if e.requires_grad:
        raise ValueError("sinkhorn: eps must not require a gradient, got one that does")
    if e.device != like.device and e.ndim > 0:
        raise ValueError(f"sinkhorn: eps must be on {like.device} with x, got {e.device}")
    if e.ndim > 0 and (tuple(e.shape[: len(lead)]) != lead or e.ndim > len(lead) + 1):
        if not isinstance(eps, Tensor) and e.ndim == 1:  # the same temperatures everywhere
            e = e.expand(*lead, -1)
        else:
            raise ValueError(
                f"sinkhorn: eps must have shape {lead}, or {(*lead, 'T')}, got {tuple(e.shape)}"
            )
    if e.ndim == len(lead) + 1 and e.shape[-1] == 0:
        raise ValueError(f"sinkhorn: eps must have a temperature, got {tuple(e.shape)}")
    if read and not bool(((e > 0) & e.isfinite()).all()):
        raise ValueError(f"sinkhorn: eps must be positive and finite, got {e.min().item()}")
    temperatures = tuple(e.shape[len(lead) :])
    e = e.to(device=like.device, dtype=dtype)
    return e.expand((*lead, *temperatures)).reshape(-1), temperatures


def _initial(
    init: tuple[Tensor, Tensor],
    batch: tuple[int, ...],
    temperatures: tuple[int, ...],
    points: Points,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out = []
    for name, t, p in (("f", init[0], points.x), ("g", init[1], points.y)):
        expected = (*batch, *temperatures, p.shape[1])
        if tuple(t.shape) != expected:
            raise ValueError(f"sinkhorn: init {name} must be {expected}, got {tuple(t.shape)}")
        if t.device != p.device:
            raise ValueError(f"sinkhorn: init {name} must be on {p.device}, got {t.device}")
        out.append(t.detach().to(dtype).reshape(math.prod(expected[:-1]), p.shape[1]))
    return out[0], out[1]


def _unsupported(backend: str, points: Points, eps: Tensor, schedule: Schedule) -> str | None:
    """What of a call a backend cannot do."""
    s = schedule
    if backend == "reference":
        return None
    if backend == "keops" and points.cost != "formula":
        return "it serves costs given as functions, and the others have kernels of their own"
    full = backend == "cpp"
    kept = backend == "triton" or (backend == "cuda" and dispatch.resident(points))
    asked = {
        "costs given as functions": backend != "keops" and points.cost == "formula",
        "cu_seqlens": not (full or (backend == "cuda" and kept)) and points.segments is not None,
        "labels": not full and points.labels is not None,
        "exclude_diagonal": not (full or kept) and points.diagonal is not None,
    }
    if backend in ("triton", "cuda"):
        asked |= {
            f"cost {points.cost!r}": points.cost not in reference.COSTS[:3],
            "several eps": not kept and eps.shape[0] != points.count,
            "anneal": not kept and (s.start is not None or s.temperatures is not None),
            "reach": not kept and s.rho != (None, None),
            "update='symmetric'": not kept and s.simultaneous,
            "relax": not kept and s.relax != 1 and not s.simultaneous,
        }
    names = [name for name, used in asked.items() if used]
    size = " for more than small float32 problems" if backend == "cuda" and not kept else ""
    return f"it has no {', '.join(names)}{size}" if names else None
