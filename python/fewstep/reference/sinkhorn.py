"""Entropic optimal transport in the log domain, written for reading.

Every function takes `Points`, which are batched over independent problems or flat and ragged, and
`eps [P]` with P = B T problems: T temperatures of each of B pairs of point clouds, one after the
other. Potentials are `f [P, N]` and `g [P, M]`; where ragged `f [T, N]` and `g [T, M]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep._torch import exactly, readable
from fewstep.reference.costs import COSTS, cost_matrix

# How GPU kernels multiply float32; the numbers of fewstep::halves::Precision in csrc/shared.
PRECISIONS = ("tf32x3", "tf32", "float32")
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
        cost: a row of `COSTS`; "matrix" reads `matrix` and looks at no point, "formula" calls.
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
        if self.matrix is not None:
            C = self.matrix
        elif self.formula is not None:
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
        simultaneous: both potentials from the last two.
        closing: simultaneous updates end with an alternating iteration, or with as many as
            `LAST_STEPS` where `tol` needs more than one.
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
    closing: bool = True
    single: bool = False
    memory_limit: int = 2**27


@dataclass(frozen=True)
class Inputs:
    """What is solved.

    Attributes:
        points: what pairs cost.
        a: weights `[B, N]`; `[1, N]` where ragged.
        b: weights `[B, M]`, likewise.
        eps: temperatures `[P]`.
        f0: potential to start from, `[P, N]`, or `[T, N]` where ragged; None is 0.
        g0: likewise on y.
        schedule: how to iterate.
    """

    points: Points
    a: Tensor
    b: Tensor
    eps: Tensor
    f0: Tensor | None = None
    g0: Tensor | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def by_temperature(self) -> Inputs:
        """The same with an axis for temperatures: `a [B, 1, N]`, `eps [B, T]`, `f0 [B, T, N]`."""
        count, s = self.points.count, self.schedule
        T = self.eps.shape[0] // count if count else 1

        def split(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.reshape(count, T, *t.shape[1:])

        schedule = replace(s, start=split(s.start))
        weights, eps = (self.a[:, None], self.b[:, None]), self.eps.reshape(count, T)
        return Inputs(self.points, *weights, eps, split(self.f0), split(self.g0), schedule)


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
    if not readable(f, a, eps) or f.numel() == 0:
        return
    low, high = f.aminmax()
    if (
        max(-low.item(), high.item()) * torch.finfo(f.dtype).eps
        < 2 * math.log(2) * eps.min().item()
    ):
        return  # almost always
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
        grad_a = w * weight_gradient(f, b.sum(-1, keepdim=True), e, rho[0])
        grad_b = w * weight_gradient(g, a.sum(-1, keepdim=True), e, rho[1])
        return None, w[..., None] * plan, grad_a, grad_b, None, None, None, None


_envelope_value: Callable[..., Tensor] = _EnvelopeValue.apply


def weight_gradient(f: Tensor, mass_b: Tensor, eps: Tensor, rho: float | None) -> Tensor:
    """d value / da_i = `phi(f_i) - eps (exp(-f_i / rho) - sum b)`; mass and eps broadcast with f.

    The exponential is 1 for a constraint. Of points without weight it may overflow: finite all the
    same, 0 times it is 0.
    """
    own = 1 if rho is None else torch.exp(-f / rho)
    return (phi(f, rho) - eps * (own - mass_b)).clamp(min=torch.finfo(f.dtype).min / 4)


def solve(inputs: Inputs) -> Outputs:
    """Sinkhorn iterations: returns `f, g, value, residual, iterations, converged`.

    With `P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)` an alternating iteration is the f-update
    (rows exact) and then the g-update (columns exact). `residual` is the L1 error of the marginals
    as a fraction of the mass, of rows and, where columns are not exact, of columns, whichever is
    larger; or the square of the largest step, over eps, of a light point to its transform, of rows
    and, where the last updates are relaxed, of columns. It is inf where potentials have no digits
    left for eps. A problem whose residual is at most `tol` is left as it is while the others go on.
    Points without weight have the transform of the potential that came out on the other side, or 0
    where no finite cost joins them to a weight and their marginal is a constraint. A problem with
    weight at such a point is infeasible: its value is inf.
    """
    points, schedule = inputs.points, inputs.schedule
    if points.segments is not None:
        return _solve_ragged(inputs)
    split = inputs.by_temperature()
    a, b, e = split.a, split.b, split.eps
    with exactly(a.device):
        C = points.costs()[:, None]
        # Where all of a row is inf, logsumexp has no derivative.
        largest = (1e5 * NOWHERE * e.amin(1)).clamp(max=torch.finfo(C.dtype).max / 4)
        finite = torch.minimum(C, largest[:, None, None, None])
        log_a, log_b = a.detach().log(), b.detach().log()
        f, g, value, *rest = iterate(
            lambda g, e: _soft_transform(finite, g, b, log_b, e),
            lambda f, e: _soft_transform(finite.mT, f, a, log_a, e),
            split,
        )
        value = _envelope_value(value.detach(), C, a, b, f, g, e, schedule.rho)
    residual, iterations, converged = (t.flatten() for t in rest)
    return f.flatten(0, 1), g.flatten(0, 1), value.flatten(), residual, iterations, converged


def _solve_ragged(inputs: Inputs) -> Outputs:
    points, s = inputs.points, inputs.schedule
    T = inputs.eps.shape[0] // points.count
    parts: list[Outputs] = []
    for i in range(points.count):
        alone, rows, columns = points.problem(i)
        here = slice(i * T, (i + 1) * T)
        if rows.start == rows.stop:
            zero = inputs.eps.new_zeros(T)
            nothing = (zero.new_zeros(T, 0), zero.new_zeros(T, 0))
            parts.append((*nothing, zero, zero, zero.long(), zero == 0))
            continue
        one = Inputs(
            alone,
            inputs.a[:, rows],
            inputs.b[:, columns],
            inputs.eps[here],
            None if inputs.f0 is None else inputs.f0[:, rows],
            None if inputs.g0 is None else inputs.g0[:, columns],
            replace(s, start=None if s.start is None else s.start[here]),
        )
        parts.append(solve(one))
    f, g, *rest = zip(*parts, strict=True)
    value, residual, iterations, converged = (torch.cat(r) for r in rest)
    return torch.cat(f, 1), torch.cat(g, 1), value, residual, iterations, converged


Transform = Callable[[Tensor, Tensor], Tensor]
Rho = float | None


def _relaxed(old: Tensor, soft: Tensor, e: Tensor, rho: Rho, relax: float) -> Tensor:
    """A potential from its soft c-transform: damped, then over-relaxed, unless it is infinite."""
    new = soft if rho is None else rho / (rho + e) * soft
    if relax == 1:
        return new
    return torch.where(new > FARTHEST * e, new, old + relax * (new - old))


def _unsettled(f: Tensor, soft: Tensor, a: Tensor, e: Tensor, rho: Rho) -> Tensor:
    """Square of the largest step of a light point to its transform, more than rounding, over e."""
    a, step = a.detach(), (_relaxed(f, soft, e, rho, 1.0) - f).abs()
    light = (a > 0) & (a < LIGHT * a.amax(-1, keepdim=True))
    left = light & (step > 8 * torch.finfo(f.dtype).eps * f.abs()) & ~(soft > _far(e))
    return (torch.where(left, step, 0.0).amax(-1) / e[..., 0]).square()


def _marginal_error(f: Tensor, soft: Tensor, a: Tensor, e: Tensor, rho: Rho) -> Tensor:
    if rho is None:
        off = torch.where(soft > _far(e), 1.0, torch.expm1((f - soft) / e).abs())
    else:
        off = (torch.exp((f - soft) / e) - torch.exp(-f / rho)).abs()
    return torch.where(a > 0, a * off, 0 * a).sum(-1)  # off may be inf where a is 0


def _far(e: Tensor) -> Tensor:
    """Transforms beyond it are of points that may go nowhere."""
    return NOWHERE * e / 2


def _measured(
    of_g: Transform, of_f: Transform, inputs: Inputs, f: Tensor, g: Tensor, f_soft: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Residual, and the mass of the plan, from the transform of g."""
    a, b, e, s = inputs.a, inputs.b, inputs.eps[..., None], inputs.schedule
    rho_x, rho_y = s.rho
    f_soft = (of_g(g, e) if f_soft is None else f_soft).detach()
    error = _marginal_error(f.detach(), f_soft, a, e, rho_x)
    left = _unsettled(f.detach(), f_soft, a, e, rho_x)
    if s.relax != 1:  # else columns are exact
        g_soft = of_f(f, e).detach()
        if s.simultaneous:
            error = torch.maximum(error, _marginal_error(g.detach(), g_soft, b, e, rho_y))
        if not (s.simultaneous and s.closing):
            left = torch.maximum(left, _unsettled(g.detach(), g_soft, b, e, rho_y))
    mass = a * torch.exp((f.detach() - f_soft) / e)
    error = torch.maximum(error / a.sum(-1), left)
    return error, torch.where((a > 0) & ~(f_soft > _far(e)), mass, 0 * a).sum(-1)


def settled(f: Tensor, a: Tensor, e: Tensor, rho: Rho) -> tuple[Tensor, Tensor]:
    """f, and its part of the value, with what `solve` says of points that may go nowhere."""
    part = a * phi(f, rho)
    if rho is None:
        nowhere = f > FARTHEST * e
        part = torch.where(nowhere, torch.inf, part)
        f = torch.where(nowhere & (a == 0), 0.0, f)
    return f, torch.where(a > 0, part, 0 * a).sum(-1)


def iterate(of_g: Transform, of_f: Transform, inputs: Inputs) -> tuple[Tensor, ...]:
    """The iterations of `solve` on `Inputs.by_temperature`, whose points nothing here looks at.

    `of_g` and `of_f` are the soft c-transforms as functions of a potential and of eps `[B, T, 1]`.
    """
    a, b, eps, s = inputs.a, inputs.b, inputs.eps, inputs.schedule
    rho_x, rho_y = s.rho
    f = a.new_zeros(*eps.shape, a.shape[-1]) if inputs.f0 is None else inputs.f0
    g = b.new_zeros(*eps.shape, b.shape[-1]) if inputs.g0 is None else inputs.g0
    fresh = inputs.f0 is None
    iterations = torch.zeros_like(eps, dtype=torch.int64)

    def measure(f: Tensor, g: Tensor, f_soft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _measured(of_g, of_f, inputs, f, g, f_soft)

    def update(active: Tensor, e: Tensor) -> None:
        nonlocal f, g, fresh, iterations
        e, relax = e[..., None], 1.0 if fresh else s.relax
        f_next = _relaxed(f, of_g(g, e), e, rho_x, relax)
        g_soft = of_f(f if s.simultaneous else f_next, e)
        g_next = _relaxed(g, g_soft, e, rho_y, relax)
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
    active, e = everywhere, eps[..., None]
    for _ in range(LAST_STEPS if s.simultaneous and s.closing else 0):
        f_next = _relaxed(f, of_g(g, e), e, rho_x, 1.0)
        g_next = _relaxed(g, of_f(f if s.single else f_next, e), e, rho_y, 1.0)
        f = torch.where(active[..., None], f_next, f)
        g = torch.where(active[..., None], g_next, g)
        if s.tol is None or s.single:
            break
        active = measure(f, g)[0] > s.tol
    f_soft = of_g(g, e)  # points without weight: the transforms of what came out
    f = torch.where(a > 0, f, _relaxed(f, f_soft, e, rho_x, 1.0))
    g = torch.where(b > 0, g, _relaxed(g, of_f(f, e), e, rho_y, 1.0))
    residual, mass = measure(f, g, f_soft)
    for t, weight, rho in ((f, a, rho_x), (g, b, rho_y)):
        lost = beyond_digits(t.detach(), weight, e, rho).any(-1)
        residual = torch.where(lost, torch.inf, residual)
    f, of_x = settled(f, a, e, rho_x)
    g, of_y = settled(g, b, e, rho_y)
    if s.rho == (None, None) and not s.simultaneous and s.relax == 1:
        mass = b.sum(-1)  # columns are exact
    value = of_x + of_y - eps * (mass - a.sum(-1) * b.sum(-1))
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

    with exactly(f.device):
        out, mass = _each_problem(apply, points, f, g, b, eps, v, of_x=False)
        return out, mass


def gradient(points: Points, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """Envelope gradient of the value: `sum_j P_ij dC(x_i, y_j)/dx_i`, `[P, N, D]`."""

    def apply(
        points: Points, C: Tensor, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, _: None
    ) -> tuple[Tensor]:
        w, x, y = _conditional(C, f, g, b, eps), points.x, points.y
        if (of_cost := COSTS[points.cost].gradient) is not None:
            return (of_cost(w, x, y, b),)
        moved = x.detach().requires_grad_()
        with torch.enable_grad():
            C = replace(points, x=moved, y=y.detach(), labels=None, diagonal=None).costs()
        return (torch.autograd.grad(C, moved, w)[0],)

    with exactly(f.device):
        (out,) = _each_problem(apply, points, f, g, b, eps, None, of_x=False)
        T = 1 if points.segments is not None else eps.shape[0] // max(points.count, 1)
        return a.repeat_interleave(T, 0)[..., None] * out
