"""Symmetric updates: both potentials in one pass, averaged with the ones before."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..launch import architecture
from .alternating import alternate
from .problem import Solve, Solved
from .tiles import (
    LN2,
    LOG2E,
    RUN_TIME,
    accumulated,
    left_out,
    log2_total,
    marginals,
    one_pair,
    own_points,
    pair_cost,
    residual_of,
    squared_distances,
    store_row_error,
    sum_of_pieces,
    updated,
)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_symmetric_kernel(
    clouds,
    A,
    Light,
    Log_a,
    Log_b,
    Eps,
    F,
    G,
    F_next,
    Tops,
    Sums,
    Row_error,
    Column_error,
    Mass,
    Steps,
    Iterations,
    Annealing,
    Done,
    Settings,
    step,
    max_iter,
    temperatures,
    row_pieces,
    column_pieces,
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
    """Both soft c-transforms from each tile of costs once: `F_next` from g as in
    `sinkhorn_row_kernel`, and this block of rows' share of those from f, as a maximum and a sum per
    column: `Tops` and `Sums [P, blocks, M]`, for `sinkhorn_merge_kernel`.

    Row_error, Mass `[2, P, row_pieces]` and Column_error `[2, P, column_pieces]`, alternating by
    step, hold the residuals of the potentials that a step began with. A problem is done once those
    of the step before were at most the tolerance, or after max_iter iterations at eps.
    """
    REDUCE: tl.constexpr = 1 if DOT else 0
    N, M = clouds.n, clouds.m
    blocks = N // BLOCK_M
    problems = tl.num_programs(0) // blocks
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if tl.load(Done + problem) > 0:
        return
    annealing = tl.load(Annealing + problem)
    if step - 1 - annealing > 0:
        before = ((step + 1) % 2) * problems + problem
        rows_off = residual_of(
            Row_error + before * row_pieces, Steps + before * row_pieces, row_pieces
        )
        columns_off = sum_of_pieces(Column_error + before * column_pieces, column_pieces)
        # NaN is not at most anything.
        if (rows_off <= tl.load(Settings)) & (columns_off <= tl.load(Settings)):
            if block == 0:
                tl.store(Iterations + problem, step - 1)
                tl.store(Done + problem, 1)
            return
    if step - annealing >= max_iter:
        if block == 0:
            tl.store(Iterations + problem, step)
            tl.store(Done + problem, 1)
        return
    cloud = problem // temperatures
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    points = problem * N + rows
    eps = tl.load(Eps + problem)
    scale = 1 / eps * LOG2E
    f = tl.load(F + points)
    f_score = tl.expand_dims(f * scale + tl.load(Log_a + cloud * N + rows), REDUCE)
    pair = one_pair(clouds, cloud)
    Log_b += cloud * M
    G += problem * M
    Tops += (problem * blocks + block) * M
    Sums += (problem * blocks + block) * M
    x2 = tl.expand_dims(tl.load(pair.x2 + rows), REDUCE)
    top = tl.full([BLOCK_M], float("-inf"), F.dtype.element_ty)
    total = tl.full([BLOCK_M], 0.0, F.dtype.element_ty)
    own = own_points(pair, rows, DOT, PRECISION, WHOLE, BLOCK_D)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        norms = x2 + tl.expand_dims(tl.load(pair.y2 + cols), 1 - REDUCE)
        squared = squared_distances(
            pair, rows, cols, own, norms, EUCLIDEAN, DOT, PRECISION, WHOLE, BLOCK_D
        )
        cost = pair_cost(squared, cost_scale, EUCLIDEAN) * scale
        cost = left_out(cost, float("inf"), rows, cols, diagonal, DIAGONAL, REDUCE)
        g_score = tl.load(G + cols) * scale + tl.load(Log_b + cols)
        score = tl.expand_dims(g_score, 1 - REDUCE) - cost
        top, total = accumulated(top, total, score, REDUCE)
        score = f_score - cost
        own_top = tl.max(score, 1 - REDUCE)  # [BN]
        shift = tl.where(own_top == float("-inf"), 0.0, own_top)
        p = tl.exp2(score - tl.expand_dims(shift, 1 - REDUCE))
        tl.store(Tops + cols, own_top)
        tl.store(Sums + cols, tl.sum(p, 1 - REDUCE))
    soft = -log2_total(top, total) * (eps * LN2)  # [BM]
    inverse_rho = tl.load(Settings + 1)
    tl.store(F_next + points, updated(f, soft, eps, inverse_rho, tl.load(Settings + 3)))
    a = tl.load(A + cloud * N + rows)
    piece = ((step % 2) * problems + problem) * row_pieces + block
    light = tl.load(Light + cloud)
    store_row_error(a, light, f, soft, scale, inverse_rho, Row_error, Mass, Steps, piece)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_merge_kernel(
    B,
    Eps,
    G,
    G_next,
    Tops,
    Sums,
    Column_error,
    Done,
    Settings,
    step,
    M,
    temperatures,
    row_pieces,
    column_pieces,
    BLOCK: tl.constexpr,
):
    """`G_next` from what the blocks of rows left in `Tops` and `Sums`, merged in order."""
    problems = tl.num_programs(0) // column_pieces
    problem = (tl.program_id(0) // column_pieces).to(tl.int64)
    block = tl.program_id(0) % column_pieces
    if tl.load(Done + problem) > 0:
        return
    cols = block * BLOCK + tl.arange(0, BLOCK)
    inside = cols < M
    top = tl.full([BLOCK], float("-inf"), G.dtype.element_ty)
    total = tl.full([BLOCK], 0.0, G.dtype.element_ty)
    for rows in range(row_pieces):
        here = (problem * row_pieces + rows) * M + cols
        part = tl.load(Tops + here, mask=inside, other=float("-inf"))
        new_top = tl.maximum(top, part)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        sums = tl.load(Sums + here, mask=inside, other=0.0)
        total = total * tl.exp2(top - shift) + sums * tl.exp2(part - shift)
        top = new_top
    eps = tl.load(Eps + problem)
    soft = -log2_total(tl.where(inside, top, 0.0), total) * (eps * LN2)
    g = tl.load(G + problem * M + cols, mask=inside, other=0.0)
    inverse_rho = tl.load(Settings + 2)
    g_next = updated(g, soft, eps, inverse_rho, tl.load(Settings + 3))
    tl.store(G_next + problem * M + cols, g_next, mask=inside)
    b = tl.load(B + problem // temperatures * M + cols, mask=inside, other=0.0)
    ratio, wanted = marginals(b, g, soft, 1 / eps * LOG2E, inverse_rho)
    piece = ((step % 2) * problems + problem) * column_pieces + block
    # The absolute value of the product, lest it be fused with the sum: lanes would round apart.
    tl.store(Column_error + piece, tl.sum(tl.abs(b * (ratio - wanted)), 0))


def symmetric(s: Solve) -> Solved:
    """Both potentials from the last two, mixed with them, and alternating steps at the end."""
    problems, n, m = s.g.shape[0], s.clouds.n, s.clouds.m
    launch = config.sinkhorn_symmetric(s.rows, architecture(s.g.device))
    merge = config.sinkhorn_merge()
    row_pieces, column_pieces = s.blocks(0), -(-m // merge["BLOCK"])
    # Step k goes from [k % 2] to the other one.
    f, g = s.g.new_zeros((2, problems, n)), torch.stack([s.g, s.g])
    if s.f0 is not None:
        f[0] = s.f0
    tops, sums = s.g.new_empty((2, problems, row_pieces, m))
    row_error, mass, steps = s.g.new_zeros((3, 2, problems, row_pieces))
    column_error = s.g.new_zeros((2, problems, column_pieces))
    iterations = torch.zeros_like(s.annealing, dtype=torch.int64)
    done = torch.zeros_like(s.annealing)

    def step(k: int, source: int, eps: Tensor, setting: Tensor, done: Tensor) -> None:
        pieces = (s.temperatures, row_pieces, column_pieces)
        sinkhorn_symmetric_kernel[(problems * row_pieces,)](
            *(s.clouds, s.weights[0], s.light, *s.logs, eps),
            *(f[source], g[source], f[1 - source], tops, sums, row_error, column_error, mass),
            *(steps, iterations, s.annealing, done, setting, k, s.max_iter),
            *(*pieces, *s.constants),
            **launch,
        )
        sinkhorn_merge_kernel[(problems * column_pieces,)](
            *(s.weights[1], eps, g[source], g[1 - source], tops, sums, column_error, done, setting),
            *(k, m, *pieces),
            **merge,
        )

    for k in range(s.steps + 1):  # the last one tells those that are done
        step(k, k % 2, s.eps(k), s.setting(k), done)
    odd = (iterations % 2 == 1)[:, None]
    f[0], g[0] = torch.where(odd, f[1], f[0]), torch.where(odd, g[1], g[0])
    if not s.single:
        last = replace(
            s,
            f0=f[0],
            g=g[0],
            each=s.each[-1:],
            annealing=torch.zeros_like(s.annealing),
            settings=torch.stack([s.settings[0], s.settings[0]]),
            max_iter=s.last_steps,
        )
        last_f, last_g, residual, last_mass, _ = alternate(last)
        return last_f, last_g, residual, last_mass, iterations
    # A step in full, and one that measures what came out; step 0 looks at no residual.
    full, everyone = s.settings[0], torch.zeros_like(done)
    step(0, 0, s.each[-1], full, everyone)
    step(0, 1, s.each[-1], full, everyone)
    residual = torch.maximum(row_error[0].sum(1), column_error[0].sum(1))
    residual = torch.maximum(residual, steps[0].amax(1).square())
    massless = (s.weights[0] == 0).repeat_interleave(s.temperatures, 0)
    out = torch.where(massless, f[0], f[1])  # without weight, from the pass that measured
    return out, out, residual, mass[0].sum(1), iterations
