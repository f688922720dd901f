"""Derivatives of entropic transport: the envelope theorem, and implicit differentiation.

At the optimum `(f, g)` of the dual `D(f, g; p)`, p = (x, y, a, b), the value has the gradient
`D_p` and the Hessian `D_pp - D_pz D_zz^-1 D_zp` with z = (f, g). With
`e_ij = exp((f_i + g_j - C_ij) / eps)` the conditions of optimality, divided by the weights, are

    phi_x'(f_i) = sum_j b_j e_ij        phi_y'(g_j) = sum_i a_i e_ij

where `phi(f) = f` for a fixed marginal and `rho (1 - exp(-f / rho))` for a penalised one. They
also define f and g where a weight is zero. Linearised, with `R_i = phi_x' - eps phi_x''`,

    R_i df_i + sum_j b_j e_ij dg_j = r_i = sum_j b_j e_ij dC_ij - eps sum_j e_ij db_j
    S_j dg_j + sum_i a_i e_ij df_i = s_j = sum_i a_i e_ij dC_ij - eps sum_i e_ij da_i

df is eliminated, and the Schur complement solved for dg by conjugate gradient with products `e v`
of the streamed kernel. What the kernel cannot express runs over blocks of rows in plain torch, so
that nothing N x M is ever in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep._library import triton_unavailable
from fewstep.ops.sinkhorn import dispatch
from fewstep.reference.sinkhorn import COSTS, Points, weight_gradient

# Pairs of points in a block of rows, which takes about ten arrays of that size. GPUs take more.
BLOCK_PAIRS = 2**18
_GPU_BLOCKS = 16
# Pairs up to which `e` is kept for all products with it.
KEPT_PAIRS = 2**20
# Pairs beyond which a kernel, where there is one, takes the place of blocks in torch.
BLOCKS_PAIRS = 2**20
# L1 error of both marginals, as a fraction of the mass, from which Newton's method may start.
START_BOUND = 1e-2
# A step of Newton's method after which potentials are taken as converged: its decrement, which
# bounds `sum_ij P_ij |df_i + dg_j| / eps` for mass 1, and its largest `df_i / eps` (without a
# constant), which finds parts of the plan that hardly exchange mass.
_DECREMENT = 1e-5
_LARGEST_STEP = 1e-3
_NEWTON_STEPS = 20
_NEWTON_CG = 1e-3  # relative residual of the linear systems of its steps
_DERIVATIVE_CG = 1e-11  # that of a derivative's linear system
_CG_ITERATIONS = 5000
_CG_CHECK = 8  # iterations between two looks at the residuals, which synchronise a GPU

Tensors = tuple[Tensor, ...]
VARIABLES = 5  # x, y, a, b, matrix: the first fields of a Problem
Flags = tuple[bool, ...]  # which of the variables
Directions = tuple[Tensor | None, ...]  # one for each variable, None for zero


class ConvergenceError(RuntimeError):
    """An implicit derivative was asked for at potentials that are too far from convergence."""


_REMEDY = "solve with a smaller tol and a larger max_iter, or with a larger eps"


class Constants(NamedTuple):
    """What of a problem is not a tensor."""

    cost: str
    backend: str
    rho_x: float | None = None  # penalty of the marginal on x; None: it is fixed
    rho_y: float | None = None
    diagonal: int | None = None  # pairs j == i + diagonal are left out
    symmetric: bool = False  # x is y, a is b, f is g: derivatives are those of V(x, x, a, a)
    precision: str = "tf32x3"  # of `Points`
    formula: Callable[[Any, Any], Any] | None = None  # of `Points`

    @property
    def balanced(self) -> bool:
        return self.rho_x is None and self.rho_y is None


class Problem(NamedTuple):
    """A batch of problems at one temperature each, solved; `Points` has the shapes."""

    x: Tensor  # [B, N, D]
    y: Tensor  # [B, M, D]
    a: Tensor  # [B, N]
    b: Tensor  # [B, M]
    matrix: Tensor | None  # [B, N, M]
    f: Tensor  # [B, N]
    g: Tensor  # [B, M]
    eps: Tensor  # [B]
    segment_x: Tensor | None = None  # [B + 1]; everything above but eps then has a batch of 1
    segment_y: Tensor | None = None
    label_x: Tensor | None = None  # [B, N]
    label_y: Tensor | None = None  # [B, M]
    label_cost: Tensor | None = None  # [L, L']


def _double(p: Problem) -> Problem:
    return Problem._make(t.double() if t is not None and t.is_floating_point() else t for t in p)


def points_of(p: Problem, c: Constants) -> Points:
    segments = None if p.segment_x is None or p.segment_y is None else (p.segment_x, p.segment_y)
    labels = None if p.label_x is None or p.label_y is None else (p.label_x, p.label_y)
    fixed = (p.matrix, segments, labels, p.label_cost, c.diagonal, c.formula)
    return Points(p.x, p.y, c.cost, *fixed, c.precision)


def transposed(p: Problem, c: Constants) -> tuple[Problem, Constants]:
    """The same problems seen from y."""
    matrix = None if p.matrix is None else p.matrix.mT
    label_cost = None if p.label_cost is None else p.label_cost.mT
    tensors = (p.y, p.x, p.b, p.a, matrix, p.g, p.f, p.eps, p.segment_y, p.segment_x)
    diagonal = None if c.diagonal is None else -c.diagonal
    of = c.formula
    formula = None if of is None else lambda y, x: of(x, y)
    flipped = c._replace(rho_x=c.rho_y, rho_y=c.rho_x, diagonal=diagonal, formula=formula)
    return Problem(*tensors, p.label_y, p.label_x, label_cost), flipped


def product(p: Problem, c: Constants, v: Tensor, weights: Tensor) -> Tensor:
    """`sum_j e_ij weights_j v_j`, `[B, N, K]` from `v [B, M, K]`; no weight is negative."""
    return dispatch.transport(c.backend, points_of(p, c), p.f, p.g, weights, p.eps, v)[0]


def _product(p: Problem, c: Constants, v: Tensor | None, weights: Tensor) -> Tensor:
    """The same for `v [B, M]`, or for v = 1."""
    if v is not None:
        return product(p, c, v[..., None], weights)[..., 0]
    any_v = weights[..., None]
    return dispatch.transport(c.backend, points_of(p, c), p.f, p.g, weights, p.eps, any_v)[1]


def _slope(f: Tensor, rho: float | None) -> Tensor:
    """`phi'(f)`, the mass that the plan gives to a point of weight 1 at the optimum."""
    return torch.ones_like(f) if rho is None else torch.exp(-f / rho)


def problem_index(t: Tensor, segment: Tensor) -> Tensor:
    """Which problem each flat point belongs to, `[N]`, from `t [1, N, ..]`."""
    return torch.bucketize(torch.arange(t.shape[1], device=t.device), segment[1:], right=True)


def to_points(t: Tensor, like: Tensor, segment: Tensor | None) -> Tensor:
    """`t [B]` for every point of `like [B, N, ..]` (`[1, N, ..]` where ragged), as `[B, 1]`."""
    return t[:, None] if segment is None else t[problem_index(like, segment)][None]


def total(t: Tensor, segment: Tensor | None) -> Tensor:
    """Sums over the points of each problem, `[B]`, and over what is behind them."""
    t = t.flatten(2).sum(-1) if t.ndim > 2 else t
    if segment is None:
        return t.sum(-1)
    out = t.new_zeros(segment.shape[0] - 1)
    return out.index_add(0, problem_index(t, segment), t[0])


def gradient(p: Problem, c: Constants, need: Flags) -> Tensors:
    """The envelope gradient for those of the variables that are needed."""
    q, d = transposed(p, c)
    out = []
    for needed, r, k in ((need[0], p, c), (need[1], q, d)):
        if needed:
            out.append(dispatch.gradient(c.backend, points_of(r, k), r.f, r.g, r.a, r.b, r.eps))
    for needed, r, k in ((need[2], p, c), (need[3], q, d)):
        if needed:
            mass = to_points(total(r.b, r.segment_y), r.f, r.segment_x)
            eps = to_points(r.eps, r.f, r.segment_x)
            grad = weight_gradient(r.f, mass, eps, k.rho_x, (k.rho_x, k.rho_y))
            out.append(grad.clone() if grad is r.f else grad)
    if need[4]:
        assert p.matrix is not None
        out.append(torch.empty_like(p.matrix))
        for block in blocks(p, c):
            out[-1][block.index] = block.plan
    return tuple(2 * t if c.symmetric else t for t in out)


class System:
    """The linearised conditions of optimality at converged potentials, in float64.

    The potentials given are improved by Newton's method first: what a derivative is off by is
    their error, which where iterations converge slowly is much larger than the residual.
    """

    def __init__(self, p: Problem, c: Constants, strict: bool) -> None:
        """`strict` where f and g matter and not only the plan, as in derivatives for a and b."""
        self.c, self.tolerance = c, _NEWTON_CG
        error = self._linearise(_double(p))
        if not bool((error <= START_BOUND).all()):
            raise ConvergenceError(
                f"sinkhorn: an implicit derivative needs an L1 error of the marginals of at most"
                f" {START_BOUND:g} of the mass, got {error.max().item():.3g}; {_REMEDY}"
            )
        for _ in range(_NEWTON_STEPS):
            p, eps = self.p, self.p.eps[:, None]
            rows, columns = eps * self.excess_x, eps * self.excess_y
            df, dg = self.solve(rows, columns)
            decrement = (p.a * df * rows).sum(-1) + (p.b * dg * columns).sum(-1)
            decrement = decrement.clamp(min=0).sqrt() / p.eps
            self._linearise(p._replace(f=p.f + df, g=p.g + dg))
            done = decrement <= _DECREMENT
            if strict:  # a constant in f means nothing
                df = df - df.mean(-1, keepdim=True) if c.balanced else df
                done = done & (df.abs() <= _LARGEST_STEP * eps).all(-1)
            if bool(done.all()):
                break
        else:
            raise ConvergenceError(
                f"sinkhorn: an implicit derivative needs converged potentials, but step"
                f" {_NEWTON_STEPS} of Newton's method still changed them by"
                f" {(df.abs() / eps).max().item():.3g} eps and the plan by up to"
                f" {decrement.max().item():.3g} of its mass; {_REMEDY}"
            )
        self.tolerance = _DERIVATIVE_CG

    def _linearise(self, p: Problem) -> Tensor:
        """Takes the potentials of p, and returns the L1 error of its marginals over the mass."""
        self.p, c = p, self.c
        (count, n), m = p.a.shape, p.b.shape[1]
        dense = count * n * m <= KEPT_PAIRS or p.matrix is not None
        self.e = Block(p, c, slice(0, count), slice(0, n)).e if dense else None
        row_mass, column_mass = self.rows(None, p.b), self.columns(None, p.a)
        slope_x, slope_y = _slope(p.f, c.rho_x), _slope(p.g, c.rho_y)
        self.excess_x, self.excess_y = slope_x - row_mass, slope_y - column_mass
        eps = p.eps[:, None]
        self.R = row_mass if c.rho_x is None else row_mass + eps / c.rho_x * slope_x
        self.S = column_mass if c.rho_y is None else column_mass + eps / c.rho_y * slope_y
        # A point so far that its mass underflows has no influence.
        tiny = torch.finfo(p.f.dtype).tiny
        self.inverse_R = torch.where(self.R.gt(tiny), 1 / self.R, 0.0)
        self.inverse_S = torch.where(self.S.gt(tiny), 1 / self.S, 0.0)
        error = (p.a * self.excess_x.abs()).sum(-1) + (p.b * self.excess_y.abs()).sum(-1)
        return error / (p.a * row_mass).sum(-1)

    def rows(self, v: Tensor | None, weights: Tensor) -> Tensor:
        """`sum_j e_ij weights_j v_j`, with v = 1 where None."""
        if self.e is None:
            return _product(self.p, self.c, v, weights)
        v = weights if v is None else weights * v
        return (self.e @ v[..., None])[..., 0]

    def columns(self, v: Tensor | None, weights: Tensor) -> Tensor:
        """`sum_i e_ij weights_i v_i`."""
        if self.e is None:
            return _product(*transposed(self.p, self.c), v, weights)
        v = weights if v is None else weights * v
        return (v[..., None, :] @ self.e)[..., 0, :]

    def solve(self, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(df, dg) for the right-hand sides of the module's docstring, `[B, N]` and `[B, M]`."""
        p = self.p
        if self.c.symmetric:  # df = dg: R_i df_i + sum_j a_j e_ij df_j = r_i
            w = (p.a * self.inverse_R).sqrt()
            h = conjugate_gradient(lambda h: h + w * self.rows(h, w), w * r, self.tolerance)
            df = (r - self.rows(h, w)) * self.inverse_R
            return df, df
        w = (p.b * self.inverse_S).sqrt()
        h = self._schur(w, w * (s - self.columns(r * self.inverse_R, p.a)))
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

        # mg_j = ug_j / S_j is final where b_j = 0, and w_j = 0 there.
        mg = torch.where(p.b > 0, 0.0, ug * self.inverse_S)
        rhs = ug - columns((uf - rows(mg)) * self.inverse_R)
        rhs = torch.where(p.b > 0, rhs / p.b.sqrt(), 0.0) * self.inverse_S.sqrt()
        mg = mg + w * self._schur(w, rhs)
        mf = (uf - rows(mg)) * self.inverse_R
        return mf, (ug - columns(mf)) * self.inverse_S

    def _schur(self, w: Tensor, rhs: Tensor) -> Tensor:
        """`h = sqrt(b S) dg`; scaled so, the Schur complement is 1 minus a contraction."""
        p = self.p
        null = None
        if self.c.balanced:  # df = 1, dg = -1 changes nothing
            null = (p.b * self.S).sqrt()
            null = null / torch.linalg.vector_norm(null, dim=-1, keepdim=True)

        def apply(h: Tensor) -> Tensor:
            return h - w * self.columns(self.rows(h, w) * self.inverse_R, p.a)

        return conjugate_gradient(apply, rhs, self.tolerance, null)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    rhs: Tensor,
    tolerance: float,
    null: Tensor | None = None,
) -> Tensor:
    """Solves the positive semidefinite `apply(h) = rhs`, each `[B, M]`, orthogonal to `null`."""

    def project(r: Tensor) -> Tensor:
        return r if null is None else r - (r * null).sum(-1, keepdim=True) * null

    r = direction = project(rhs)
    h = torch.zeros_like(r)
    rr = r.square().sum(-1, keepdim=True)
    target = rr * tolerance**2
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


class Block:
    """Some rows of some problems: `e`, and the first and second derivatives of the costs.

    `t |x - y|^2 / 2` and `-x.y` are quadratic, a distance is the root of a quadratic cost, l1 is
    linear but for its kinks, and the derivatives of a formula are autograd's. Those at distance 0
    are taken as 0, which is right for a point and itself.
    """

    def __init__(self, p: Problem, c: Constants, problems: slice, rows: slice) -> None:
        self.index = (problems, rows)
        self.problems, self.cost = problems, c.cost
        self.a, self.b = p.a[problems, rows, None], p.b[problems, None, :]
        self.eps = p.eps[problems, None, None]
        x, y = p.x[problems, rows], p.y[problems]
        if c.formula is not None:
            x, y = (t.detach().requires_grad_() for t in (x, y))
        matrix = None if p.matrix is None else p.matrix[problems, rows]
        bare = Points(x, y, c.cost, matrix, formula=c.formula)
        with torch.set_grad_enabled(c.formula is not None):
            self.C = bare.costs()
        labels = None
        if p.label_x is not None and p.label_y is not None:
            labels = (p.label_x[problems, rows], p.label_y[problems])
        diagonal = None if c.diagonal is None else c.diagonal + rows.start
        fixed = (self.C.detach(), None, labels, p.label_cost, diagonal)
        C = Points(x, y, "matrix", *fixed).costs()
        exponent = (p.f[problems, rows, None] + p.g[problems, None, :] - C) / self.eps
        # Two points without weight may have any e; 0 times it has to be 0.
        self.e = exponent.clamp(max=math.log(torch.finfo(exponent.dtype).max) / 2).exp()
        self.x, self.y, self.t = x, y, 2.0 if c.cost == "sqeuclidean" else 1.0
        if c.cost not in ("dot", "formula"):  # a common offset would cancel in the products below
            centre = y.mean(1, keepdim=True)
            self.x, self.y = x - centre, y - centre
        if c.cost == "euclidean":
            self.inverse = torch.where(self.C > 0, 1 / self.C, 0.0)

    @property
    def plan(self) -> Tensor:
        return self.a * self.b * self.e

    def _quadratic(self, w: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`sum_j w_ij t (x_i - y_j)` and `sum_i w_ij t (y_j - x_i)`."""
        out_x, out_y = w @ y, w.mT @ x
        if self.cost == "dot":
            return -out_x, -out_y
        out_x = w.sum(-1)[..., None] * x - out_x
        out_y = w.sum(-2)[..., None] * y - out_y
        return self.t * out_x, self.t * out_y

    def _signs(self) -> Iterator[Tensor]:
        """Of `x_i - y_j`, `[b, n, M]`, one coordinate after the other."""
        for k in range(self.x.shape[-1]):
            yield (self.x[..., :, None, k] - self.y[..., None, :, k]).sign()

    def _differentiate(self, out: Tensor, w: Tensor | None, *of: Tensor, graph: bool) -> Tensors:
        return torch.autograd.grad(
            out, of, w, retain_graph=True, create_graph=graph, materialize_grads=True
        )

    def _change_of_formula(self, w: Tensor, ux: Tensor, uy: Tensor) -> Tensors:
        """The derivatives of `sum_ij w_ij dC_ij` for w, x and y."""
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            x, y = self._differentiate(self.C, w, self.x, self.y, graph=True)
            change = (x * ux).sum() + (y * uy).sum()
        return self._differentiate(change, None, w, self.x, self.y, graph=False)

    def pull(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """`sum_j w_ij dC_ij/dx_i` and `sum_i w_ij dC_ij/dy_j`."""
        if self.cost == "formula":
            out_x, out_y = self._differentiate(self.C, w, self.x, self.y, graph=False)
            return out_x, out_y
        if self.cost == "l1":
            parts = [(ws.sum(-1), -ws.sum(-2)) for ws in (w * s for s in self._signs())]
            out_x, out_y = (torch.stack(t, -1) for t in zip(*parts, strict=True))
            return out_x, out_y
        return self._quadratic(w * self.inverse if self.cost == "euclidean" else w, self.x, self.y)

    def push(self, ux: Tensor, uy: Tensor) -> Tensor:
        """`dC_ij` along `ux [b, n, D]` and `uy [b, M, D]`."""
        if self.cost == "formula":
            return self._change_of_formula(self.e, ux, uy)[0]
        if self.cost == "l1":
            changes = (ux[..., :, None, k] - uy[..., None, :, k] for k in range(ux.shape[-1]))
            out = torch.zeros_like(self.e)
            for sign, change in zip(self._signs(), changes, strict=True):
                out += sign * change
            return out
        out = -(ux @ self.y.mT) - self.x @ uy.mT
        if self.cost == "dot":
            return out
        out = out + (self.x * ux).sum(-1)[..., :, None] + (self.y * uy).sum(-1)[..., None, :]
        return self.inverse * out if self.cost == "euclidean" else self.t * out

    def bend(self, w: Tensor, ux: Tensor, uy: Tensor, dC: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative of `pull(w)` along (ux, uy), where `dC = push(ux, uy)`."""
        if self.cost == "formula":
            return self._change_of_formula(w, ux, uy)[1:]  # type: ignore[return-value]
        if self.cost == "l1":
            return torch.zeros_like(ux), torch.zeros_like(uy)
        if self.cost != "euclidean":
            return self._quadratic(w, ux, uy)
        w = w * self.inverse
        straight = self._quadratic(w, ux, uy)
        turned = self._quadratic(w * dC * self.inverse, self.x, self.y)
        return straight[0] - turned[0], straight[1] - turned[1]


def blocks(p: Problem, c: Constants) -> Iterator[Block]:
    """All rows of all problems, at most about `BLOCK_PAIRS` pairs at a time."""
    (count, n), m = p.a.shape, p.b.shape[1]
    pairs = BLOCK_PAIRS if p.x.device.type == "cpu" else BLOCK_PAIRS * _GPU_BLOCKS
    pairs = pairs if c.formula is None else pairs // p.x.shape[-1]
    rows = max(1, min(n, pairs // m))
    problems = max(1, pairs // (rows * m))
    for i in range(0, count, problems):
        for j in range(0, n, rows):
            yield Block(p, c, slice(i, i + problems), slice(j, j + rows))


class _Direction:
    """A direction in the space of the variables, seen by blocks."""

    def __init__(self, u: Directions, p: Problem) -> None:
        self.x, self.y, self.a, self.b, self.matrix = (
            None if t is None else t.to(p.f.dtype) for t in u
        )
        self.moves = self.x is not None or self.y is not None
        if self.moves:
            self.x = torch.zeros_like(p.x) if self.x is None else self.x
            self.y = torch.zeros_like(p.y) if self.y is None else self.y

    def cost_change(self, block: Block) -> Tensor | None:
        """`dC_ij`."""
        if self.matrix is not None:
            return self.matrix[block.index]
        if self.x is None or self.y is None:
            return None
        return block.push(self.x[block.index], self.y[block.problems])

    def plan_change(self, block: Block, z: Tensor) -> Tensor:
        """The derivative of the plan where that of `f + g - C` is z."""
        out = block.plan * z / block.eps
        if self.a is not None:
            out = out + self.a[block.index][..., None] * block.b * block.e
        if self.b is not None:
            out = out + block.a * self.b[block.problems, None] * block.e
        return out


def _streams(p: Problem, c: Constants) -> bool:
    """Whether a kernel has the derivatives of the plan of this many pairs."""
    large = p.a.shape[0] * p.a.shape[1] * p.b.shape[1] > BLOCKS_PAIRS
    plain = c.cost in COSTS[:3] and p.label_cost is None and p.segment_x is None
    there = c.backend in ("triton", "cuda") and triton_unavailable(p.x.device.type) is None
    return large and plain and there


def _streamed(
    p: Problem,
    c: Constants,
    u: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    change: tuple[Tensor | None, ...] = (None,) * 4,
    sums: bool = False,
) -> Tensor:
    """`raw.hessian` along u and `change` of f, g, a, b; None for zero."""
    full = zip((*u, *change), (p.x, p.y, p.f, p.g, p.a, p.b), strict=True)
    ux, uy, df, dg, da, db = (torch.zeros_like(like) if t is None else t for t, like in full)
    points, of = points_of(p, c), (p.f, p.g, p.a, p.b)
    return dispatch.hessian(points, (ux, uy), *of, (df, dg, da, db), p.eps, sums)


def _right_hand_sides(system: System, u: _Direction) -> tuple[Tensor, Tensor]:
    """(r, s) of the module's docstring."""
    p = system.p
    if _streams(p, system.c):
        r = _streamed(p, system.c, (u.x, u.y), change=(None, None, None, u.b), sums=True)
        of_a = (None, None, None, u.a)
        return r, _streamed(*transposed(p, system.c), (u.y, u.x), change=of_a, sums=True)
    r, s = torch.zeros_like(p.f), torch.zeros_like(p.g)
    for block in blocks(p, system.c):
        change = u.cost_change(block)
        if change is not None:
            change = block.e * change
            r[block.index] += (block.b * change).sum(-1)
            s[block.problems] += (block.a * change).sum(-2)
        if u.b is not None:
            r[block.index] -= (block.eps * block.e * u.b[block.problems, None]).sum(-1)
        if u.a is not None:
            s[block.problems] -= (block.eps * block.e * u.a[block.index][..., None]).sum(-2)
    return r, s


def _zeros(p: Problem, need: Flags) -> list[Tensor | None]:
    """Sums over blocks for those of the variables that are needed."""
    variables = zip(p[:VARIABLES], need, strict=True)
    return [torch.zeros_like(t) if needed and t is not None else None for t, needed in variables]


def _add(out: Tensor | None, index: Any, t: Tensor) -> None:
    if out is not None:
        out[index] += t


def hessian_product(u: Directions, p: Problem, c: Constants, need: Flags) -> Tensors:
    """The Hessian of the value applied to u, for those of the variables that are needed."""
    if p.segment_x is not None:
        return _each(lambda u, p: hessian_product(u, p, c, need), u, p)
    if c.symmetric:
        u = (u[0], u[0], u[2], u[2], None)
    strict = need[2] or need[3] or u[2] is not None or u[3] is not None
    dtype, system = p.f.dtype, System(p, c, strict)
    p = system.p
    direction = _Direction(u, p)
    df, dg = system.solve(*_right_hand_sides(system, direction))
    of_x, of_y, of_a, of_b, of_matrix = out = _zeros(p, need)
    streams = _streams(p, c)
    if streams:
        u_x, u_y, u_a, u_b = direction.x, direction.y, direction.a, direction.b
        if of_x is not None:
            of_x += _streamed(p, c, (u_x, u_y), change=(df, dg, u_a, u_b))
        if of_y is not None:
            of_y += _streamed(*transposed(p, c), (u_y, u_x), change=(dg, df, u_b, u_a))
    for block in blocks(p, c) if not streams and (need[0] or need[1] or need[4]) else ():
        dC = direction.cost_change(block)
        z = df[block.index][..., None] + dg[block.problems, None]
        change = direction.plan_change(block, z if dC is None else z - dC)
        _add(of_matrix, block.index, change)
        if of_x is None and of_y is None:
            continue
        x, y = block.pull(change)
        _add(of_x, block.index, x)
        _add(of_y, block.problems, y)
        if direction.x is not None and direction.y is not None and dC is not None:
            ux, uy = direction.x[block.index], direction.y[block.problems]
            x, y = block.bend(block.plan, ux, uy, dC)
            _add(of_x, block.index, x)
            _add(of_y, block.problems, y)
    _add(of_a, ..., system.R * df)
    _add(of_b, ..., system.S * dg)
    if direction.b is not None:
        _add(of_a, ..., p.eps[:, None] * direction.b.sum(-1, keepdim=True))
    if direction.a is not None:
        _add(of_b, ..., p.eps[:, None] * direction.a.sum(-1, keepdim=True))
    return tuple((2 * t if c.symmetric else t).to(dtype) for t in out if t is not None)


def potentials_tangent(u: Directions, p: Problem, c: Constants) -> tuple[Tensor, Tensor]:
    """(df, dg) along u, up to (t, -t) where both marginals are fixed."""
    if p.segment_x is not None:
        df, dg = _each(lambda u, p: potentials_tangent(u, p, c), u, p)
        return df, dg
    system = System(p, c, strict=True)
    df, dg = system.solve(*_right_hand_sides(system, _Direction(u, system.p)))
    return df.to(p.f.dtype), dg.to(p.f.dtype)


def potentials_adjoint(uf: Tensor, ug: Tensor, p: Problem, c: Constants, need: Flags) -> Tensors:
    """The gradient of `<uf, f> + <ug, g>` for those of the variables that are needed."""
    if p.segment_x is not None:
        return _each(lambda u, p: potentials_adjoint(u[0], u[1], p, c, need), (uf, ug), p)
    system = System(p, c, strict=True)
    mf, mg = system.solve_adjoint(uf.double(), ug.double())
    dtype, p = p.f.dtype, system.p
    of_x, of_y, of_a, of_b, of_matrix = out = _zeros(p, need)
    streams = _streams(p, c)
    if streams:
        seen = ((of_x, of_a, (p, c), mf, mg), (of_y, of_b, transposed(p, c), mg, mf))
        for points, weights, side, own, other in seen:
            if points is not None:
                points += _streamed(*side, change=(None, None, own, other))
            if weights is not None:
                weights += _streamed(*side, change=(None, None, None, other), sums=True)
    for block in () if streams else blocks(p, c):
        left, right = mf[block.index][..., None], mg[block.problems, None]
        w = block.e * (left * block.b + block.a * right)
        _add(of_matrix, block.index, w)
        _add(of_a, block.index, -(block.eps * block.e * right).sum(-1))
        _add(of_b, block.problems, -(block.eps * block.e * left).sum(-2))
        if of_x is not None or of_y is not None:
            x, y = block.pull(w)
            _add(of_x, block.index, x)
            _add(of_y, block.problems, y)
    return tuple(t.to(dtype) for t in out if t is not None)


def conditional_pullback(u: Tensor, v: Tensor, p: Problem, c: Constants, need: Flags) -> Tensors:
    """Gradients of `<u, out>`, `out_i = sum_j b_j e_ij v_j`, for f, g, and the variables needed.

    u is `[B, N, K]`, `v [B, M, K]`; f and g are held fixed in all but their own.
    """
    if p.segment_x is not None:
        return _each(lambda u, p: conditional_pullback(u[0], u[1], p, c, need), (u, v), p)
    of_f, of_g = torch.zeros_like(p.f), torch.zeros_like(p.g)
    of_x, of_y, _, of_b, of_matrix = out = _zeros(p, need)
    for block in blocks(p, c):
        w = block.e * (u[block.index] @ v[block.problems].mT)
        _add(of_b, block.problems, w.sum(-2))
        w = w * block.b / block.eps
        of_f[block.index] += w.sum(-1)
        of_g[block.problems] += w.sum(-2)
        _add(of_matrix, block.index, -w)
        if of_x is not None or of_y is not None:
            x, y = block.pull(w)
            _add(of_x, block.index, -x)
            _add(of_y, block.problems, -y)
    return of_f, of_g, *(t for t in out if t is not None)


def conditional_tangent(
    u: Directions, df: Tensor, dg: Tensor, v: Tensor, p: Problem, c: Constants
) -> Tensor:
    """The derivative of `sum_j b_j e_ij v_j` along x, y, b in u and (df, dg), `[B, N, K]`."""
    if p.segment_x is not None:
        tangents = (*u[:4], df, dg, None, v)
        each = _each(
            lambda t, p: (conditional_tangent((*t[:4], None), t[4], t[5], t[7], p, c),), tangents, p
        )
        return each[0]
    out = v.new_zeros(*p.f.shape, v.shape[-1])
    direction = _Direction(u, p)
    for block in blocks(p, c):
        z = df[block.index][..., None] + dg[block.problems, None]
        dC = direction.cost_change(block)
        w = block.b * (z if dC is None else z - dC) / block.eps
        if direction.b is not None:
            w = w + direction.b[block.problems, None]
        out[block.index] = (block.e * w) @ v[block.problems]
    return out


def _each(function: Callable[[Any, Problem], Tensors], u: Directions, p: Problem) -> Tensors:
    """`function(u, p)` for ragged problems one by one; u belongs to x, y, x, .. in turn."""
    assert p.segment_x is not None
    assert p.segment_y is not None
    parts = []
    ends = zip(p.segment_x.tolist(), p.segment_y.tolist(), strict=True)
    for i, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(ends)):
        if x0 == x1:
            continue
        sides = (slice(x0, x1), slice(y0, y1))

        def cut(*tensors: Tensor | None, sides: tuple[slice, slice] = sides) -> list[Any]:
            return [None if t is None else t[:, sides[k % 2]] for k, t in enumerate(tensors)]

        fixed = (p.eps[i : i + 1], None, None, *cut(p.label_x, p.label_y), p.label_cost)
        one = Problem._make([*cut(p.x, p.y, p.a, p.b), None, *cut(p.f, p.g), *fixed])
        parts.append(function(tuple(cut(*u)), one))
    return tuple(torch.cat(t, 1) for t in zip(*parts, strict=True))
