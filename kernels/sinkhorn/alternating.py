"""Alternating updates that stream the costs: the rows of a step, then its columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Solve, Solved
from .tiles import (
    LN2,
    LOG2E,
    RUN_TIME,
    from_y,
    one_pair,
    soft_transform,
    stopped,
    store_row_error,
    updated,
)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_row_kernel(
    clouds,
    A,
    Light,
    Log_b,
    Eps,
    G,
    F_old,
    F,
    Error,
    Mass,
    Steps,
    Done,
    Settings,
    temperatures,
    diagonal,
    cost_scale,
    DIAGONAL: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)`, damped and relaxed, and how far `F_old`
    was from it.

    `Error` and `Mass [P, blocks]` get each block's share of `sum_i a_i |r_i - w_i|` and
    `sum_i a_i r_i`, where `r_i = exp((F_old_i - f_i) / eps)` and w_i = 1, or `exp(-F_old_i / rho)`;
    `Steps` the largest step over eps that is left to a point of less weight than `Light [clouds]`.
    `temperatures` problems in a row share points and weights. Settings: tol, 1 / rho_x, 1 / rho_y,
    relax.
    """
    blocks = clouds.n // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if tl.load(Done + problem) > 0:
        return
    cloud = problem // temperatures
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    eps = tl.load(Eps + problem)
    scale = 1 / eps * LOG2E
    total = soft_transform(
        one_pair(clouds, cloud),
        G + problem * clouds.m,
        Log_b + cloud * clouds.m,
        scale,
        rows,
        cost_scale,
        diagonal,
        DIAGONAL,
        EUCLIDEAN,
        DOT,
        PRECISION,
        WHOLE,
        BLOCK_N,
        BLOCK_D,
    )
    soft = -total * (eps * LN2)  # [BM]
    points = problem * clouds.n + rows
    a = tl.load(A + cloud * clouds.n + rows)
    old = tl.load(F_old + points)
    inverse_rho = tl.load(Settings + 1)
    # A point without weight has the transform of the last g alone.
    relax = tl.where(a == 0, 1.0, tl.load(Settings + 3))
    tl.store(F + points, updated(old, soft, eps, inverse_rho, relax))
    piece = problem * blocks + block
    light = tl.load(Light + cloud)
    store_row_error(a, light, old, soft, scale, inverse_rho, Error, Mass, Steps, piece)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_column_kernel(
    clouds,
    Log_a,
    B,
    Eps,
    F,
    G,
    Error,
    Mass,
    Steps,
    Residual,
    Iterations,
    Annealing,
    Done,
    Settings,
    step,
    max_iter,
    temperatures,
    partials,
    diagonal,
    cost_scale,
    DIAGONAL: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)`, damped and relaxed, unless the problem is
    `stopped`. BLOCK_M counts points of y.
    """
    blocks = clouds.m // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if tl.load(Done + problem) > 0:
        return
    cloud = problem // temperatures
    if stopped(
        Error,
        Mass,
        Steps,
        Residual,
        Iterations,
        Annealing,
        Done,
        Settings,
        step,
        max_iter,
        problem,
        block,
        tl.num_programs(0) // blocks,
        partials,
    ):
        return
    cols = block * BLOCK_M + tl.arange(0, BLOCK_M)
    eps = tl.load(Eps + problem)
    total = soft_transform(
        from_y(one_pair(clouds, cloud)),
        F + problem * clouds.n,
        Log_a + cloud * clouds.n,
        1 / eps * LOG2E,
        cols,
        cost_scale,
        -diagonal,
        DIAGONAL,
        EUCLIDEAN,
        DOT,
        PRECISION,
        WHOLE,
        BLOCK_N,
        BLOCK_D,
    )
    points = problem * clouds.m + cols
    # A point without weight has the transform of the last f alone.
    relax = tl.where(tl.load(B + cloud * clouds.m + cols) == 0, 1.0, tl.load(Settings + 3))
    soft = -total * (eps * LN2)
    g = updated(tl.load(G + points), soft, eps, tl.load(Settings + 2), relax)
    tl.store(G + points, g)


def alternate(s: Solve) -> Solved:
    """f from g, then g from f."""
    problems, partials = s.g.shape[0], s.blocks(0)
    # Step k (from 0) writes f[k % 2]; the infinities before it make its residual infinite.
    f = s.g.new_full((2, problems, s.clouds.n), torch.inf)
    if s.f0 is not None:
        f[1] = s.f0
    g = s.g.clone()
    pieces = f.new_zeros((3, problems, partials))
    measured = f.new_full((2, problems), torch.inf)
    iterations = torch.zeros_like(s.annealing, dtype=torch.int64)
    done = torch.zeros_like(s.annealing)

    def update_rows(k: int) -> None:
        sinkhorn_row_kernel[(problems * partials,)](
            *(s.clouds, s.weights[0], s.light, s.logs[1], s.eps(k)),
            *(g, f[(k + 1) % 2], f[k % 2], *pieces, done, s.setting(k)),
            *(s.temperatures, *s.constants),
            **s.rows,
        )

    for k in range(s.steps):
        update_rows(k)
        sinkhorn_column_kernel[(problems * s.blocks(1),)](
            *(s.clouds, s.logs[0], s.weights[1], s.eps(k), f[k % 2], g, *pieces),
            *(measured, iterations, s.annealing, done, s.setting(k), k, s.max_iter),
            *(s.temperatures, partials, *s.constants),
            **s.cols,
        )
    update_rows(s.steps)
    error, mass, _ = pieces.sum(2)
    last = torch.stack([torch.maximum(error, pieces[2].amax(1).square()), mass])
    residual, mass = torch.where(done > 0, measured, last)
    return last_rows(s, f, iterations), g, residual, mass, iterations


def last_rows(s: Solve, f: Tensor, iterations: Tensor) -> Tensor:
    """f as of the last iteration; of points without weight, from the pass after it."""
    odd = (iterations % 2 == 1)[:, None]
    massless = (s.weights[0] == 0).repeat_interleave(s.temperatures, 0)
    return torch.where(odd ^ massless, f[0], f[1])
