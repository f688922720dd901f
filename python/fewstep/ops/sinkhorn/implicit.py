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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep._library import triton_unavailable
from fewstep.ops.sinkhorn import dispatch
from fewstep.ops.sinkhorn.blocks import Block, blocks
from fewstep.ops.sinkhorn.newton import System
from fewstep.ops.sinkhorn.plans import times
from fewstep.ops.sinkhorn.problem import (
    VARIABLES,
    Constants,
    Directions,
    Flags,
    Problem,
    Tensors,
    points_of,
    to_points,
    total,
    transposed,
)
from fewstep.reference.costs import COSTS
from fewstep.reference.sinkhorn import weight_gradient

# Pairs beyond which a kernel, where there is one, takes the place of blocks in torch.
BLOCKS_PAIRS = 2**20


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
            out.append(weight_gradient(r.f, mass, eps, k.rho_x))
    if need[4]:
        assert p.matrix is not None
        out.append(torch.empty_like(p.matrix))
        for block in blocks(p, c):
            out[-1][block.index] = block.plan
    return tuple(2 * t if c.symmetric else t for t in out)


class _Direction:
    """A direction in the space of the variables, seen by blocks.

    Those along a and b are in the unit of p's weights, given the slopes of a `System`.
    """

    def __init__(
        self, u: Directions, p: Problem, slopes: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.x, self.y, self.a, self.b, self.matrix = (
            None if t is None else t.to(p.f.dtype) for t in u
        )
        if slopes is not None:  # they may be inf at a point without weight
            self.a, self.b = (
                None if t is None else torch.where(t == 0, 0.0, t * slope)
                for t, slope in zip((self.a, self.b), slopes, strict=True)
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
        return block.derivatives.push(self.x[block.index], self.y[block.problems])

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
    served = "triton" in COSTS[c.cost].backends
    plain = served and p.label_cost is None and p.segment_x is None
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
    """`dispatch.hessian` along u and `change` of f, g, a, b; None for zero."""
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
    direction = _Direction(u, p, system.slopes)
    df, dg = system.solve(*_right_hand_sides(system, direction))
    # Along u and with the potentials' answer, the derivative of the envelope gradient: P changes,
    # and so do the dC_ij/dx_i that it weights.
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
        x, y = block.derivatives.pull(change)
        _add(of_x, block.index, x)
        _add(of_y, block.problems, y)
        if direction.x is not None and direction.y is not None and dC is not None:
            ux, uy = direction.x[block.index], direction.y[block.problems]
            x, y = block.derivatives.bend(block.plan, ux, uy, dC)
            _add(of_x, block.index, x)
            _add(of_y, block.problems, y)
    _add(of_a, ..., system.slopes[0] * system.R * df)
    _add(of_b, ..., system.slopes[1] * system.S * dg)
    # The term in eps (sum a)(sum b), which is 0 for directions that keep the mass.
    if u[3] is not None:
        _add(of_a, ..., p.eps[:, None] * u[3].double().sum(-1, keepdim=True))
    if u[2] is not None:
        _add(of_b, ..., p.eps[:, None] * u[2].double().sum(-1, keepdim=True))
    return tuple((2 * t if c.symmetric else t).to(dtype) for t in out if t is not None)


def potentials_tangent(u: Directions, p: Problem, c: Constants) -> tuple[Tensor, Tensor]:
    """(df, dg) along u, up to (t, -t) where both marginals are fixed."""
    if p.segment_x is not None:
        df, dg = _each(lambda u, p: potentials_tangent(u, p, c), u, p)
        return df, dg
    system = System(p, c, strict=True)
    df, dg = system.solve(*_right_hand_sides(system, _Direction(u, system.p, system.slopes)))
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
            x, y = block.derivatives.pull(w)
            _add(of_x, block.index, x)
            _add(of_y, block.problems, y)
    for t, slope in zip((of_a, of_b), system.slopes, strict=True):
        if t is not None:
            t *= slope
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
            x, y = block.derivatives.pull(w)
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


def cost_gradient(p: Problem, c: Constants, need: Flags) -> Tensors:
    """Gradients of `<P, C>` for f, g, and the variables needed, f and g held fixed in these."""
    if p.segment_x is not None:
        return _each(lambda u, p: cost_gradient(p, c, need), (), p)
    of_f, of_g = torch.zeros_like(p.f), torch.zeros_like(p.g)
    of_x, of_y, of_a, of_b, of_matrix = out = _zeros(p, need)
    for block in blocks(p, c):
        share = times(block.plan, block.costs) / block.eps  # what d log P is multiplied by
        of_f[block.index] += share.sum(-1)
        of_g[block.problems] += share.sum(-2)
        if of_a is not None or of_b is not None:
            costs = times(block.e, block.costs)
            _add(of_a, block.index, (block.b * costs).sum(-1))
            _add(of_b, block.problems, (block.a * costs).sum(-2))
        w = block.plan - share
        _add(of_matrix, block.index, w)
        if of_x is not None or of_y is not None:
            x, y = block.derivatives.pull(w)
            _add(of_x, block.index, x)
            _add(of_y, block.problems, y)
    return of_f, of_g, *(t for t in out if t is not None)


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
