"""The linear system of the potentials' derivatives, and how it is solved."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.ops.sinkhorn.blocks import Block
from fewstep.ops.sinkhorn.problem import Constants, Problem, double, marginal_product, transposed

# Pairs up to which `e` is kept for all products with it.
KEPT_PAIRS = 2**20
# L1 error of both marginals, as a fraction of the mass, from which Newton's method may start.
START_BOUND = 1e-2
# A fraction of the mass, below which a plan that is off has been destroyed rather than not found.
_LEAST_MASS = 1e-12
# A step of Newton's method after which potentials are taken as converged: its decrement, which
# bounds `sum_ij P_ij |df_i + dg_j| / eps` for mass 1, and its largest `df_i / eps` (without a
# constant), which finds parts of the plan that hardly exchange mass.
_DECREMENT = 1e-5
_LARGEST_STEP = 1e-3
_NEWTON_STEPS = 20
_NEWTON_CG = 1e-3  # relative residual of the linear systems of its steps
_DERIVATIVE_CG = 1e-11  # that of a derivative's linear system
_CG_ITERATIONS = 5000
_ROUNDING = 16 * torch.finfo(torch.float64).eps  # of a right-hand side, over its terms
_CG_CHECK = 8  # iterations between two looks at the residuals, which synchronise a GPU


class ConvergenceError(RuntimeError):
    """An implicit derivative was asked for at potentials that are too far from convergence."""


_REMEDY = "solve with a smaller tol and a larger max_iter, or with a larger eps"


def _remedy(worst: float) -> str:
    return _REMEDY if math.isfinite(worst) else "costs or potentials are NaN or infinite"


def _too_far(error: Tensor, kept: Tensor) -> ConvergenceError:
    """The error for problems of this L1 error whose plans keep this fraction of the mass."""
    bad = ~(error <= START_BOUND)
    worst, least = error[bad].max().item(), kept[bad].min().item()
    if least < _LEAST_MASS:
        return ConvergenceError(
            "sinkhorn: an implicit derivative needs a plan with mass, of which reach leaves"
            f" {least:.3g}; take a larger reach"
        )
    return ConvergenceError(
        f"sinkhorn: an implicit derivative needs an L1 error of the marginals of at most"
        f" {START_BOUND:g} of the mass, got {worst:.3g}; {_remedy(worst)}"
    )


def _slope(f: Tensor, rho: float | None) -> Tensor:
    """`phi'(f)`, the mass that the plan gives to a point of weight 1 at the optimum."""
    return torch.ones_like(f) if rho is None else torch.exp(-f / rho)


class System:
    """The linearised conditions of optimality at converged potentials, in float64.

    The potentials given are improved by Newton's method first: what a derivative is off by is
    their error, which where iterations converge slowly is much larger than the residual.

    A penalised point's condition is divided by its slope `phi'(f)`, which for a point far away is
    beyond the range of numbers. So `p` has weights `slope a`, the marginals of the plan, and the
    potentials `f (1 + eps / rho)`, which make every row of `b e` sum to 1. `slopes` are those of x
    and y: derivatives for a are `slopes[0]` times what p has.
    """

    def __init__(self, p: Problem, c: Constants, strict: bool) -> None:
        """`strict` where f and g matter and not only the plan, as in derivatives for a and b."""
        self.c, self.tolerance = c, _NEWTON_CG
        given = double(p)
        f, g = given.f, given.g
        error = self._linearise(given, f, g)
        if not bool((error <= START_BOUND).all()):
            raise _too_far(error, self.kept)
        for _ in range(_NEWTON_STEPS):
            p, eps = self.p, self.p.eps[:, None]
            rows, columns = eps * self.excess_x, eps * self.excess_y
            df, dg = self.solve(rows, columns, eps)
            decrement = (p.a * df * rows).sum(-1) + (p.b * dg * columns).sum(-1)
            decrement = (decrement.clamp(min=0) / given.a.sum(-1)).sqrt() / p.eps
            f, g = f + df, g + dg
            self._linearise(given, f, g)
            done = decrement <= _DECREMENT
            if strict:  # a constant in f means nothing
                df = df - df.mean(-1, keepdim=True) if c.balanced else df
                done = done & (df.abs() <= _LARGEST_STEP * eps).all(-1)
            if bool(done.all()):
                break
        else:
            worst = (df.abs() / eps).max().item()
            raise ConvergenceError(
                f"sinkhorn: an implicit derivative needs converged potentials, but step"
                f" {_NEWTON_STEPS} of Newton's method still changed them by"
                f" {worst:.3g} eps and the plan by up to"
                f" {decrement.max().item():.3g} of its mass; {_remedy(worst)}"
            )
        self.tolerance = _DERIVATIVE_CG

    def _linearise(self, given: Problem, f: Tensor, g: Tensor) -> Tensor:
        """Takes potentials of the problem given; the L1 error of its marginals over the mass."""
        c, eps = self.c, given.eps[:, None]
        self.slopes = _slope(f, c.rho_x), _slope(g, c.rho_y)
        # -eps phi'' / phi' = eps / rho, whatever f is: R over the slope is the row's mass and that.
        stiff_x, stiff_y = (0 if rho is None else eps / rho for rho in (c.rho_x, c.rho_y))
        a, b = (
            torch.where(w > 0, w * slope, 0.0)
            for w, slope in zip((given.a, given.b), self.slopes, strict=True)
        )
        p = given._replace(a=a, b=b, f=f * (1 + stiff_x), g=g * (1 + stiff_y))
        self.p = p
        (count, n), m = p.a.shape, p.b.shape[1]
        # A matrix is in memory anyway, and no kernel streams it.
        dense = count * n * m <= KEPT_PAIRS or p.matrix is not None
        self.e = Block(p, c, slice(0, count), slice(0, n)).e if dense else None
        row_mass, column_mass = self.rows(None, p.b), self.columns(None, p.a)
        self.excess_x, self.excess_y = 1 - row_mass, 1 - column_mass
        self.R, self.S = row_mass + stiff_x, column_mass + stiff_y
        # A point without a partner has no influence.
        tiny = torch.finfo(p.f.dtype).tiny
        self.inverse_R = torch.where(row_mass.gt(tiny), 1 / self.R, 0.0)
        self.inverse_S = torch.where(column_mass.gt(tiny), 1 / self.S, 0.0)
        error = (p.a * self.excess_x.abs()).sum(-1) + (p.b * self.excess_y.abs()).sum(-1)
        mass = (p.a * row_mass).sum(-1)
        self.kept = mass / given.a.sum(-1)
        return error / mass

    def rows(self, v: Tensor | None, weights: Tensor) -> Tensor:
        """`sum_j e_ij weights_j v_j`, with v = 1 where None."""
        if self.e is None:
            return marginal_product(self.p, self.c, v, weights)
        v = weights if v is None else weights * v
        return (self.e @ v[..., None])[..., 0]

    def columns(self, v: Tensor | None, weights: Tensor) -> Tensor:
        """`sum_i e_ij weights_i v_i`."""
        if self.e is None:
            return marginal_product(*transposed(self.p, self.c), v, weights)
        v = weights if v is None else weights * v
        return (v[..., None, :] @ self.e)[..., 0, :]

    def solve(self, r: Tensor, s: Tensor, size: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """(df, dg) for the right-hand sides of `implicit`, `[B, N]` and `[B, M]`.

        They are differences of terms of that size.
        """
        p = self.p
        # Scaled by sqrt(a / R) on both sides the system is symmetric: 1 and a contraction.
        if self.c.symmetric:  # df = dg: R_i df_i + sum_j a_j e_ij df_j = r_i
            w = (p.a * self.inverse_R).sqrt()
            h = conjugate_gradient(lambda h: h + w * self.rows(h, w), w * r, self.tolerance)
            df = (r - self.rows(h, w)) * self.inverse_R
            return df, df
        w = (p.b * self.inverse_S).sqrt()
        of_r = self.columns(r * self.inverse_R, p.a)
        h = self._schur(w, w * (s - of_r), w * (s.abs() + of_r.abs() + size))
        df = (r - self.rows(h, w)) * self.inverse_R
        return df, (s - self.columns(df, p.a)) * self.inverse_S

    def solve_adjoint(self, uf: Tensor, ug: Tensor) -> tuple[Tensor, Tensor]:
        """(mf, mg) with `<mf, r> + <mg, s> = <uf, df> + <ug, dg>` for all right-hand sides.

        Where both marginals are fixed, `sum_i uf_i = sum_j ug_j` is assumed.
        """
        p = self.p
        w = (p.b * self.inverse_S).sqrt()

        def rows(mg: Tensor) -> Tensor:  # a_i sum_j e_ij mg_j, where e overflows only for a_i = 0
            return torch.where(p.a > 0, p.a * self.rows(mg, torch.ones_like(p.b)), 0.0)

        def columns(mf: Tensor) -> Tensor:
            return torch.where(p.b > 0, p.b * self.columns(mf, torch.ones_like(p.a)), 0.0)

        # The transpose of `solve`: mf is eliminated, as df is there, and the same Schur complement
        # is left, with sqrt(b) on the other side. mg_j = ug_j / S_j is final where b_j = 0: w_j is
        # 0 there.
        mg = torch.where(p.b > 0, 0.0, ug * self.inverse_S)
        of_uf = columns((uf - rows(mg)) * self.inverse_R)
        unit = torch.where(p.b > 0, 1 / p.b.sqrt(), 0.0) * self.inverse_S.sqrt()
        mg = mg + w * self._schur(w, unit * (ug - of_uf), unit * (ug.abs() + of_uf.abs()))
        mf = (uf - rows(mg)) * self.inverse_R
        return mf, (ug - columns(mf)) * self.inverse_S

    def _schur(self, w: Tensor, rhs: Tensor, terms: Tensor) -> Tensor:
        """`h = sqrt(b S) dg`; scaled so, the Schur complement is 1 minus a contraction.

        `terms` are what rhs is a difference of.
        """
        p = self.p
        null = None
        if self.c.balanced:  # df = 1, dg = -1 changes nothing
            null = (p.b * self.S).sqrt()
            null = null / torch.linalg.vector_norm(null, dim=-1, keepdim=True)

        def apply(h: Tensor) -> Tensor:
            return h - w * self.columns(self.rows(h, w) * self.inverse_R, p.a)

        return conjugate_gradient(apply, rhs, self.tolerance, null, _ROUNDING * terms)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    rhs: Tensor,
    tolerance: float,
    null: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Solves the positive semidefinite `apply(h) = rhs`, each `[B, M]`, orthogonal to `null`.

    To the relative tolerance, or to the noise that rhs has.
    """

    def project(r: Tensor) -> Tensor:
        return r if null is None else r - (r * null).sum(-1, keepdim=True) * null

    r = direction = project(rhs)
    h = torch.zeros_like(r)
    rr = r.square().sum(-1, keepdim=True)
    target = rr * tolerance**2
    if noise is not None:
        target = torch.maximum(target, noise.square().sum(-1, keepdim=True))
    for i in range(_CG_ITERATIONS + 1):
        active = rr > target
        if i % _CG_CHECK == 0 and not bool(active.any()):
            return h
        image = project(apply(direction))
        step = torch.where(active, rr / (direction * image).sum(-1, keepdim=True), 0.0)
        h = h + step * direction
        r = r - step * image
        previous, rr = rr, r.square().sum(-1, keepdim=True)
        direction = r + torch.where(active, rr / previous, 0.0) * direction
    worst = (rr / target).max().sqrt().item() * tolerance
    raise ConvergenceError(
        f"sinkhorn: conjugate gradient for an implicit derivative reached a relative residual of"
        f" {worst:.3g} in {_CG_ITERATIONS} iterations; {_REMEDY}"
    )
