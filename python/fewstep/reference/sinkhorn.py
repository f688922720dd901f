"""Entropic optimal transport in the log domain, written for reading.

Every function takes `Points`, which are batched over independent problems or flat and ragged, and
`eps [P]` with P = B T problems: T temperatures of each of B pairs of point clouds, one after the
other. Potentials are `f [P, N]` and `g [P, M]`; where ragged `f [T, N]` and `g [T, M]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep._torch import readable

COSTS = ("sqeuclidean", "half_sqeuclidean", "euclidean", "dot", "l1", "matrix", "formula")
DEFAULT_TOL = 1e-3
# Alternating iterations at most after symmetric ones, whose error they may at first double.
LAST_STEPS = 10
# Points of less than this share of the largest weight are light: the L1 error hardly sees them.
LIGHT = 1e-3
# Over eps, the potential of a point all of whose pairs with points of weight cost inf.
NOWHERE = 1e30
# And of a point that may go somewhere, at most.
FARTHEST = 0.5e-6 * NOWHERE


@dataclass(frozen=True)
class Points:
    """Two batches of point clouds and what a pair of points costs.

    Attributes:
        x: `[B, N, D]`; all points `[1, N, D]` where ragged.
        y: `[B, M, D]`, likewise.
        cost: one of `COSTS`; "matrix" reads `matrix` and looks at no point, "formula" calls.
        matrix: costs `[B, N, M]`.
        segments: `(cu_x [B + 1], cu_y [B + 1])`: problem i has points `cu[i]` to `cu[i + 1] - 1`.
        labels: classes `(lx [B, N], ly [B, M])`, int64.
        label_cost: `W [L, L']`; a pair costs `W[lx_i, ly_j]` more.
        diagonal: pairs `j == i + diagonal` are left out.
        formula: with cost "formula", a function of `x [.., N, 1, D]` and `y [.., 1, M, D]`.
        precision: one of `PRECISIONS`, for the kernels of GPUs.
    """

    x: Tensor
    y: Tensor
    cost: str = "sqeuclidean"
    matrix: Tensor | None = None
    segments: tuple[Tensor, Tensor] | None = None
    labels: tuple[Tensor, Tensor] | None = None
    label_cost: Tensor | None = None
    diagonal: int | None = None
    formula: Callable[[Any, Any], Any] | None = None
    precision: str = "tf32x3"

    @property
    def count(self) -> int:
        """B, the number of pairs of point clouds."""
        return self.x.shape[0] if self.segments is None else self.segments[0].shape[0] - 1

    def detached(self) -> Points:
        matrix = None if self.matrix is None else self.matrix.detach()
        return replace(self, x=self.x.detach(), y=self.y.detach(), matrix=matrix)

    def swapped(self) -> Points:
        """The same problem seen from y."""
        formula = self.formula
        return Points(
            self.y,
            self.x,
            self.cost,
            None if self.matrix is None else self.matrix.mT,
            None if self.segments is None else self.segments[::-1],
            None if self.labels is None else self.labels[::-1],
            None if self.label_cost is None else self.label_cost.mT,
            None if self.diagonal is None else -self.diagonal,
            None if formula is None else lambda y, x: formula(x, y),
            self.precision,
        )

    def problem(self, i: int) -> tuple[Points, slice, slice]:
        """The i-th of ragged problems by itself, and where its points are."""
        assert self.segments is not None
        cu_x, cu_y = (s.tolist() for s in self.segments)
        rows, columns = slice(cu_x[i], cu_x[i + 1]), slice(cu_y[i], cu_y[i + 1])
        labels = self.labels and (self.labels[0][:, rows], self.labels[1][:, columns])
        alone = replace(self, x=self.x[:, rows], y=self.y[:, columns], segments=None, labels=labels)
        return alone, rows, columns

    def _formula_costs(self) -> Tensor:
        assert self.formula is not None
        x, y = self.x[..., :, None, :], self.y[..., None, :, :]
        C, shape = self.formula(x, y), (*self.x.shape[:-1], self.y.shape[-2])
        if not isinstance(C, Tensor):
            raise TypeError(f"sinkhorn: cost must return a Tensor, got {type(C).__name__}")
        of_pairs = C.ndim == len(shape)
        if not of_pairs or any(k not in (1, n) for k, n in zip(C.shape, shape, strict=True)):
            raise ValueError(
                f"sinkhorn: cost must return {shape}, a number for each pair, from x"
                f" {tuple(x.shape)} and y {tuple(y.shape)}, as (x - y).abs().sum(-1) does,"
                f" got {tuple(C.shape)}"
            )
        return C.to(x.dtype).expand(shape)

    def costs(self) -> Tensor:
        """`C [B, N, M]`; infinite for pairs that are left out."""
        if self.cost == "matrix":
            assert self.matrix is not None
            C = self.matrix
        elif self.cost == "formula":
            C = self._formula_costs()
        else:
            C = cost_matrix(self.x, self.y, self.cost)
        if self.labels is not None:
            assert self.label_cost is not None
            C = C + self.label_cost[self.labels[0][..., :, None], self.labels[1][..., None, :]]
        if self.diagonal is None:
            return C
        i = torch.arange(C.shape[-2], device=C.device)[:, None]
        j = torch.arange(C.shape[-1], device=C.device)
        return torch.where(j == i + self.diagonal, torch.inf, C)


@dataclass(frozen=True)
class Schedule:
    """How the potentials are iterated; see `fewstep.sinkhorn`.

    Attributes:
        max_iter: iterations at the final temperature.
        tol: residual at which a problem stops there, or None.
        start: temperatures `[P]` that annealing starts from, or None.
        factor: of annealing, in (0, 1).
        temperatures: `[S]`, one iteration at each before anything else, or None.
        rho: penalties of the marginals of x and y; None is a constraint.
        relax: of over-relaxation, or 1/2 for averaged updates.
        simultaneous: both potentials from the last two, and at the end an alternating iteration,
            or as many as `LAST_STEPS` where `tol` needs more than one.
        single: x is y with equal weights: the kernels then keep one potential.
        memory_limit: bytes for what the kernels keep between passes.
    """

    max_iter: int = 100
    tol: float | None = None
    start: Tensor | None = None
    factor: float = 1.0
    temperatures: Tensor | None = None
    rho: tuple[float | None, float | None] = (None, None)
    relax: float = 1.0
    simultaneous: bool = False
    single: bool = False
    memory_limit: int = 2**27


class _Distance(torch.autograd.Function):
    """Euclidean distance by differences, so that it is exact for near points far from the origin.

    `torch.cdist` has no second derivative; this backward is made of differentiable ops.
    The derivative at coinciding points is taken as 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        d = _distance(x, y)
        near = d == 0
        w = torch.where(near, 0.0, grad / torch.where(near, 1.0, d))
        return _pull(w, x, y), _pull(w.mT, y, x)


class _SquaredDistance(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return 2 * _pull(grad, x, y), 2 * _pull(grad.mT, y, x)


class _Product(torch.autograd.Function):
    """`x @ y` in their own dtype, whatever autocast says, and so are its derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return x @ y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return _product(grad, y.mT), _product(x.mT, grad)


_distance: Callable[[Tensor, Tensor], Tensor] = _Distance.apply
_squared_distance: Callable[[Tensor, Tensor], Tensor] = _SquaredDistance.apply
_product: Callable[[Tensor, Tensor], Tensor] = _Product.apply


def _pull(w: Tensor, x: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
    """`sum_j w_ij (x_i - y_j)`, centred so that a large common offset does not cancel.

    The centre is weighted, by b or what w sums to: points without weight may be far away.
    """
    mass = w.detach().abs().sum(-2, keepdim=True) if b is None else b[..., None, :]
    total = mass.sum(-1, keepdim=True)
    centre = _product(mass / torch.where(total > 0, total, 1.0), y.detach())
    return w.sum(-1, keepdim=True) * (x - centre) - _product(w, y - centre)


def cost_matrix(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """`C [B, N, M]` of one of `COSTS` that looks at the points."""
    if cost == "dot":
        return -_product(x, y.mT)
    if cost == "l1":
        return (x[..., :, None, :] - y[..., None, :, :]).abs().sum(-1)
    if cost == "euclidean":
        return _distance(x, y)
    c = _squared_distance(x, y)
    return c / 2 if cost == "half_sqeuclidean" else c


def _soft_transform(C: Tensor, g: Tensor, b: Tensor, log_b: Tensor, eps: Tensor) -> Tensor:
    """`-eps log sum_j b_j exp((g_j - C_ij) / eps)`, the soft c-transform of g; C is finite.

    At most `NOWHERE eps`.
    """
    z = (g[..., None, :] - C) / eps[..., None]
    if not (b.requires_grad and torch.is_grad_enabled()):
        return -eps * torch.logsumexp(z + log_b[..., None, :], -1).clamp(min=-NOWHERE)
    # The logarithm has no derivative at 0, the sum does.
    top = (z + log_b[..., None, :]).detach().amax(-1, keepdim=True)
    largest = math.log(torch.finfo(z.dtype).max) - 1  # beyond it only where b is 0
    total = (b[..., None, :] * (z - top).clamp(max=largest).exp()).sum(-1)
    return -eps * (top[..., 0] + total.log()).clamp(min=-NOWHERE)


def phi(potential: Tensor, rho: float | None) -> Tensor:
    """What a potential adds to the dual: `rho (1 - exp(-f / rho))`, or f for a constraint."""
    return potential if rho is None else -rho * torch.expm1(-potential / rho)


def beyond_digits(f: Tensor, a: Tensor, eps: Tensor, rho: float | None) -> Tensor:
    """Points with weight whose potentials, over eps, have no digit left behind the point.

    Their rounding alone changes the plan by a factor. Not those of which `rho` leaves no mass, nor
    those that may go nowhere. All broadcast.
    """
    digits = 2 / torch.finfo(f.dtype).eps
    size = f.abs() / eps
    beyond = (a > 0) & (size > math.log(2) * digits) & (size <= FARTHEST)
    return beyond if rho is None else beyond & ~((f > 100 * rho) & (eps * digits > 8 * rho))


def check_digits(f: Tensor, a: Tensor, eps: Tensor, rho: float | None) -> None:
    """An error instead of a plan that is rounding, as far as looking costs nothing."""
    if not readable(eps):
        return
    beyond = beyond_digits(f, a, eps, rho)
    if bool(beyond.any()):
        largest = f.abs()[beyond].max().item()
        least = largest * torch.finfo(f.dtype).eps / (2 * math.log(2))
        raise ValueError(
            f"sinkhorn: eps must be at least {least:.3g} for a plan in {str(f.dtype)[6:]} with"
            f" potentials up to {largest:.3g}, whose rounding is more than eps; take a larger eps"
            " or float64"
        )


class _EnvelopeValue(torch.autograd.Function):
    """Identity on `value`, whose gradient is the envelope theorem's at the given potentials.

    The backward is differentiable, also through f and g, so second derivatives are those of
    the unrolled iterations (exact at convergence).
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        C: Tensor,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        eps: Tensor,
        rho: tuple[float | None, float | None],
    ) -> Tensor:
        ctx.save_for_backward(C, a, b, f, g, eps)
        ctx.rho = rho
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        C, a, b, f, g, eps = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            for t, weight, rho in zip((f, g), (a, b), ctx.rho, strict=True):
                check_digits(t, weight, eps[..., None], rho)
        plan = weighted(exponent(C, f, g, eps), a[..., :, None], b[..., None, :])
        w = grad[..., None]
        e, rho = eps[..., None], ctx.rho
        grad_a = w * weight_gradient(f, b.sum(-1, keepdim=True), e, rho[0], rho)
        grad_b = w * weight_gradient(g, a.sum(-1, keepdim=True), e, rho[1], rho)
        return None, w[..., None] * plan, grad_a, grad_b, None, None, None, None


_envelope_value: Callable[..., Tensor] = _EnvelopeValue.apply


def weight_gradient(
    f: Tensor,
    mass_b: Tensor,
    eps: Tensor,
    rho: float | None,
    both: tuple[float | None, float | None],
) -> Tensor:
    """d value / da_i = `phi(f_i) - eps (exp(-f_i / rho) - sum b)`; mass and eps broadcast with f.

    The term in eps is 0 where `both` marginals are constraints and the masses 1. Of points without
    weight `exp(-f_i / rho)` may overflow: finite all the same, 0 times it is 0.
    """
    if both == (None, None):
        return f
    own = 1 if rho is None else torch.exp(-f / rho)
    return (phi(f, rho) - eps * (own - mass_b)).clamp(min=torch.finfo(f.dtype).min / 4)


def solve(
    points: Points,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    schedule: Schedule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sinkhorn iterations: returns `f, g, value, residual, iterations, converged`.

    With `P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)` an alternating iteration is the f-update
    (rows exact) and then the g-update (columns exact). `residual` is the L1 error of the marginals
    as a fraction of the mass, of rows and, where columns are not exact, of columns, whichever is
    larger; or the square of the largest step, over eps, of a light point to its transform, of rows
    and, where updates are relaxed, of columns. It is inf where potentials have no digits left for
    eps. A problem whose residual is at most `tol` is left as it is while the others go on.
    Points without weight have the transform of the potential that came out on the other side, or 0
    where no finite cost joins them to a weight and their marginal is a constraint. A problem with
    weight at such a point is infeasible: its value is inf.
    """
    if points.segments is not None:
        return _solve_ragged(points, a, b, eps, f0, g0, schedule)
    count = a.shape[0]
    T = eps.shape[0] // count if count else 1

    def split(t: Tensor) -> Tensor:  # [B T, ..] -> [B, T, ..]
        return t.reshape(count, T, *t.shape[1:])

    with torch.autocast(a.device.type, enabled=False):
        C, a, b, e = points.costs()[:, None], a[:, None], b[:, None], split(eps)
        # Where all of a row is inf, logsumexp has no derivative.
        largest = (1e5 * NOWHERE * e.amin(1)).clamp(max=torch.finfo(C.dtype).max / 4)
        finite = torch.minimum(C, largest[:, None, None, None])
        log_a, log_b = a.detach().log(), b.detach().log()
        f, g, value, *rest = iterate(
            lambda g, e: _soft_transform(finite, g, b, log_b, e),
            lambda f, e: _soft_transform(finite.mT, f, a, log_a, e),
            a,
            b,
            e,
            None if f0 is None else split(f0),
            None if g0 is None else split(g0),
            replace(schedule, start=None if schedule.start is None else split(schedule.start)),
        )
        value = _envelope_value(value.detach(), C, a, b, f, g, e, schedule.rho)
    residual, iterations, converged = (t.flatten() for t in rest)
    return f.flatten(0, 1), g.flatten(0, 1), value.flatten(), residual, iterations, converged


def _solve_ragged(
    points: Points,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    schedule: Schedule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    T = eps.shape[0] // points.count
    parts = []
    for i in range(points.count):
        alone, rows, columns = points.problem(i)
        here = slice(i * T, (i + 1) * T)
        start = None if schedule.start is None else schedule.start[here]
        if rows.start == rows.stop:
            zero = eps.new_zeros(T)
            nothing = (zero.new_zeros(T, 0), zero.new_zeros(T, 0))
            parts.append((*nothing, zero, zero, zero.long(), zero == 0))
            continue
        parts.append(
            solve(
                alone,
                a[:, rows],
                b[:, columns],
                eps[here],
                None if f0 is None else f0[:, rows],
                None if g0 is None else g0[:, columns],
                replace(schedule, start=start),
            )
        )
    f, g, *rest = zip(*parts, strict=True)
    value, residual, iterations, converged = (torch.cat(r) for r in rest)
    return torch.cat(f, 1), torch.cat(g, 1), value, residual, iterations, converged


def iterate(
    transform_of_g: Callable[[Tensor, Tensor], Tensor],
    transform_of_f: Callable[[Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    schedule: Schedule,
) -> tuple[Tensor, ...]:
    """The iterations of `solve`, given the soft c-transforms as functions of a potential and eps.

    `a [B, 1, N]`, `b [B, 1, M]`, `eps [B, T]`; the functions get eps `[B, T, 1]`.
    """
    s = schedule
    rho_x, rho_y = s.rho
    far = NOWHERE * eps[..., None] / 2
    shape = eps.shape
    f = a.new_zeros(*shape, a.shape[-1]) if f0 is None else f0
    g = b.new_zeros(*shape, b.shape[-1]) if g0 is None else g0
    fresh = f0 is None
    iterations = torch.zeros_like(eps, dtype=torch.int64)

    def relaxed(old: Tensor, soft: Tensor, e: Tensor, rho: float | None, relax: float) -> Tensor:
        new = soft if rho is None else rho / (rho + e) * soft
        return new if relax == 1 else old + relax * (new - old)

    def step(f: Tensor, g: Tensor, e: Tensor, relax: float) -> tuple[Tensor, Tensor]:
        f_next = relaxed(f, transform_of_g(g, e), e, rho_x, relax)
        g_soft = transform_of_f(f if s.simultaneous else f_next, e)
        return f_next, relaxed(g, g_soft, e, rho_y, relax)

    def unsettled(f: Tensor, soft: Tensor, a: Tensor, rho: float | None) -> Tensor:
        """Square of the largest step of a light point to its transform, more than rounding."""
        a, step = a.detach(), (relaxed(f, soft, eps[..., None], rho, 1.0) - f).abs()
        light = (a > 0) & (a < LIGHT * a.amax(-1, keepdim=True))
        left = light & (step > 8 * torch.finfo(f.dtype).eps * f.abs()) & ~(soft > far)
        return (torch.where(left, step, 0.0).amax(-1) / eps).square()

    def marginal_error(f: Tensor, soft: Tensor, a: Tensor, rho: float | None) -> Tensor:
        e = eps[..., None]
        if rho is None:
            off = torch.where(soft > far, 1.0, torch.expm1((f - soft) / e).abs())
        else:
            off = (torch.exp((f - soft) / e) - torch.exp(-f / rho)).abs()
        return torch.where(a > 0, a * off, 0 * a).sum(-1)  # off may be inf where a is 0

    def measure(f: Tensor, g: Tensor, f_soft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Residual, and the mass of the plan, from the transform of g."""
        e = eps[..., None]
        f_soft = (transform_of_g(g, e) if f_soft is None else f_soft).detach()
        error = marginal_error(f.detach(), f_soft, a, rho_x)
        left = unsettled(f.detach(), f_soft, a, rho_x)
        if s.relax != 1:  # else columns are exact
            g_soft = transform_of_f(f, e).detach()
            if s.simultaneous:
                error = torch.maximum(error, marginal_error(g.detach(), g_soft, b, rho_y))
            else:
                left = torch.maximum(left, unsettled(g.detach(), g_soft, b, rho_y))
        mass = a * torch.exp((f.detach() - f_soft) / e)
        error = torch.maximum(error / a.sum(-1), left)
        return error, torch.where((a > 0) & ~(f_soft > far), mass, 0 * a).sum(-1)

    def settled(f: Tensor, a: Tensor, rho: float | None) -> tuple[Tensor, Tensor]:
        """f, and its part of the value, with what `solve` says of points that may go nowhere."""
        part = a * phi(f, rho)
        if rho is None:
            nowhere = f > FARTHEST * eps[..., None]
            part = torch.where(nowhere, torch.inf, part)
            f = torch.where(nowhere & (a == 0), 0.0, f)
        return f, torch.where(a > 0, part, 0 * a).sum(-1)

    def update(active: Tensor, e: Tensor) -> None:
        nonlocal f, g, fresh, iterations
        f_next, g_next = step(f, g, e[..., None], 1.0 if fresh else s.relax)
        f = torch.where(active[..., None], f_next, f)
        g = torch.where(active[..., None], g_next, g)
        iterations = iterations + active
        fresh = False

    everywhere = torch.ones_like(eps, dtype=torch.bool)
    for temperature in () if s.temperatures is None else s.temperatures:
        update(everywhere, temperature.expand_as(eps))
    left = torch.full_like(iterations, s.max_iter)  # iterations at eps that each problem may take
    residual = torch.full_like(eps, torch.inf)
    annealed = eps if s.start is None else s.start
    varies = s.tol is not None or s.start is not None
    for _ in itertools.count() if varies else range(s.max_iter):
        if varies and not left.any():
            break
        annealing, active = annealed > eps, left > 0
        update(active, torch.where(annealing, annealed, eps))
        annealed = annealed * s.factor
        left = torch.where(annealing, left, (left - 1).clamp(min=0))
        if s.tol is not None:
            error, _ = measure(f, g)
            residual = torch.where(active & ~annealing, error, residual)
            left = torch.where(residual <= s.tol, 0, left)
    active = everywhere
    for _ in range(LAST_STEPS if s.simultaneous else 0):
        e = eps[..., None]
        f_next = relaxed(f, transform_of_g(g, e), e, rho_x, 1.0)
        g_next = relaxed(g, transform_of_f(f if s.single else f_next, e), e, rho_y, 1.0)
        f = torch.where(active[..., None], f_next, f)
        g = torch.where(active[..., None], g_next, g)
        if s.tol is None or s.single:
            break
        active = measure(f, g)[0] > s.tol
    e = eps[..., None]  # points without weight: the transforms of what came out
    f_soft = transform_of_g(g, e)
    f = torch.where(a > 0, f, relaxed(f, f_soft, e, rho_x, 1.0))
    g = torch.where(b > 0, g, relaxed(g, transform_of_f(f, e), e, rho_y, 1.0))
    residual, mass = measure(f, g, f_soft)
    for t, weight, rho in ((f, a, rho_x), (g, b, rho_y)):
        lost = beyond_digits(t.detach(), weight, e, rho).any(-1)
        residual = torch.where(lost, torch.inf, residual)
    f, of_x = settled(f, a, rho_x)
    g, of_y = settled(g, b, rho_y)
    value = of_x + of_y
    if s.rho != (None, None) or s.simultaneous or s.relax != 1:
        value = value - eps * (mass - a.sum(-1) * b.sum(-1))
    converged = (residual <= (DEFAULT_TOL if s.tol is None else s.tol)) & value.isfinite()
    return f, g, value, residual, iterations, converged


def exponent(C: Tensor, f: Tensor, g: Tensor, eps: Tensor) -> Tensor:
    """`(f_i + g_j - C_ij) / eps`; a point with an infinite potential has no partner."""
    f, g = (torch.where(t == torch.inf, 0.0, t) for t in (f, g))
    return (f[..., :, None] + g[..., None, :] - C) / eps[..., None, None]


def weighted(z: Tensor, *weights: Tensor) -> Tensor:
    """`w_1 w_2 .. exp(z)`, 0 where a weight is 0.

    Of tiny weights the logarithms join z, since the exponential alone may overflow.
    """
    factors = []
    for w in weights:
        constant = torch.where(w > 0, w.detach(), 1.0)  # w is 0 or 1 times it, with a derivative
        z = z + constant.log()
        factors.append(w / constant)
    # Beyond it only where a weight is 0: 0 times an entry, or times the sum of a row, is to be 0.
    largest = math.log(torch.finfo(z.dtype).max / max(z.shape[-1], 1)) - 1
    out = z.clamp(max=largest).exp()
    for factor in factors:
        out = factor * out
    return out


def _conditional(C: Tensor, f: Tensor, g: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """`b_j exp((f_i + g_j - C_ij) / eps)`, the plan over a; rows sum to about 1."""
    return weighted(exponent(C, f, g, eps), b[..., None, :])


def _each_problem(
    function: Callable[..., tuple[Tensor, ...]],
    points: Points,
    f: Tensor,
    g: Tensor,
    weights: Tensor,
    eps: Tensor,
    v: Tensor | None,
    of_x: bool,
) -> tuple[Tensor, ...]:
    """`function(points, C, f, g, weights, eps, v)` on problems `[P, ..]`, ragged ones apart."""
    if points.segments is not None:
        T = eps.shape[0] // points.count
        parts = []
        for i in range(points.count):
            alone, rows, columns = points.problem(i)
            w = weights[:, rows if of_x else columns]
            part = None if v is None else v[:, columns]
            here = eps[i * T : (i + 1) * T]
            one = _each_problem(function, alone, f[:, rows], g[:, columns], w, here, part, of_x)
            parts.append(one)
        return tuple(torch.cat(p, 1) for p in zip(*parts, strict=True))
    T = eps.shape[0] // points.count if points.count else 1
    x, y, C, w = (
        t.repeat_interleave(T, 0) if T > 1 else t
        for t in (points.x, points.y, points.costs(), weights)
    )
    return function(replace(points, x=x, y=y), C, f, g, w, eps, v)


def transport(
    points: Points, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """`out_i = sum_j p_ij v_j [P, N, K]` and `mass_i = sum_j p_ij [P, N]`, from `v [P, M, K]`.

    `p_ij = b_j exp((f_i + g_j - C_ij) / eps)` is the plan divided by its row weight a_i. Where f_i
    is inf, both are divided by the largest p_ij.
    """

    def apply(
        _: Points, C: Tensor, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = exponent(C, f, g, eps)
        top = (z + b.log()[..., None, :]).clamp(min=-NOWHERE)
        top = top.amax(-1) if top.numel() else f  # amax refuses an empty problem
        p = weighted(z - torch.where(f == torch.inf, top, 0.0)[..., None], b[..., None, :])
        return p @ v, p.sum(-1)

    with torch.autocast(f.device.type, enabled=False):
        out, mass = _each_problem(apply, points, f, g, b, eps, v, of_x=False)
        return out, mass


def gradient(points: Points, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """Envelope gradient of the value: `sum_j P_ij dC(x_i, y_j)/dx_i`, `[P, N, D]`."""

    def apply(
        points: Points, C: Tensor, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, _: None
    ) -> tuple[Tensor]:
        w, x, y = _conditional(C, f, g, b, eps), points.x, points.y
        if points.formula is not None:
            moved = x.detach().requires_grad_()
            with torch.enable_grad():
                C = replace(points, x=moved, y=y.detach(), labels=None, diagonal=None).costs()
            return (torch.autograd.grad(C, moved, w)[0],)
        if points.cost == "dot":
            return (-(w @ y),)
        if points.cost == "l1":
            return ((w[..., None] * (x[..., :, None, :] - y[..., None, :, :]).sign()).sum(-2),)
        if points.cost == "euclidean":
            distance = _distance(x, y)
            near = distance == 0
            w = torch.where(near, 0.0, w / torch.where(near, 1.0, distance))
        elif points.cost == "sqeuclidean":
            w = 2 * w
        return (_pull(w, x, y, b),)

    with torch.autocast(f.device.type, enabled=False):
        (out,) = _each_problem(apply, points, f, g, b, eps, None, of_x=False)
        T = 1 if points.segments is not None else eps.shape[0] // max(points.count, 1)
        return a.repeat_interleave(T, 0)[..., None] * out
