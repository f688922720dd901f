"""Alternating updates with the costs kept in memory, where features are many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import config
from ..launch import architecture, dtype_name
from .alternating import last_rows
from .problem import Solve, Solved
from .tiles import (
    LN2,
    LOG2E,
    MOST,
    RUN_TIME,
    SAFE_HIGH,
    SAFE_LOW,
    accumulated,
    left_out,
    log2_total,
    one_pair,
    own_points,
    pair_cost,
    squared_distances,
    stopped,
    store_row_error,
    updated,
)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_cost_kernel(
    clouds,
    C,
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
    """Costs `C [B, N, M]`, infinite for pairs that are left out; a tile each."""
    REDUCE: tl.constexpr = 1 if DOT else 0
    N, M = clouds.n, clouds.m
    blocks, tiles = N // BLOCK_M, M // BLOCK_N
    block = tl.program_id(0) // tiles  # the other axes of a grid end at 65535
    cloud = (block // blocks).to(tl.int64)
    rows = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = one_pair(clouds, cloud)
    norms = tl.expand_dims(tl.load(pair.x2 + rows), REDUCE)
    norms += tl.expand_dims(tl.load(pair.y2 + cols), 1 - REDUCE)
    own = own_points(pair, rows, DOT, PRECISION, WHOLE, BLOCK_D)
    squared = squared_distances(
        pair, rows, cols, own, norms, EUCLIDEAN, DOT, PRECISION, WHOLE, BLOCK_D
    )
    cost = pair_cost(squared, cost_scale, EUCLIDEAN)
    cost = left_out(cost, float("inf"), rows, cols, diagonal, DIAGONAL, REDUCE)
    first = tl.expand_dims((cloud * N + rows) * M, REDUCE)
    tl.store(C + first + tl.expand_dims(cols, 1 - REDUCE), cost)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_kept_kernel(
    C,
    A,
    Light,
    Log_a,
    Log_b,
    Eps,
    G,
    F_old,
    F,
    Sums,
    Error,
    Mass,
    Steps,
    Done,
    Settings,
    N,
    M,
    temperatures,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`sinkhorn_row_kernel` from costs in memory, and from the same costs, of which a cache may
    still have some, this block's share `Sums [P, blocks, M]` of the mass that the new f and the old
    g bring to the columns, `sum_i a_i exp((f_i + g_j - C_ij) / eps)`: near 1, so that no maximum
    has to be taken out.

    Rows are summed around the old f, and around their maxima where that is far off.
    """
    blocks = N // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if tl.load(Done + problem) > 0:
        return
    cloud = problem // temperatures
    own = tl.arange(0, BLOCK_M)
    rows = block * BLOCK_M + own
    points = problem * N + rows
    eps = tl.load(Eps + problem)
    scale = 1 / eps * LOG2E
    C += (cloud * N + block * BLOCK_M) * M
    G += problem * M
    Log_b += cloud * M
    Sums += (problem * blocks + block) * M
    old = tl.load(F_old + points)
    guess = tl.where(tl.abs(old) < float("inf"), old, 0.0) * scale  # [BM]
    # A slot per column of a tile: threads meet once, after the last tile.
    total = tl.zeros([BLOCK_M, BLOCK_N], C.dtype.element_ty)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = cols < M
        g = tl.load(G + cols, mask=inside, other=0.0) * scale
        g += tl.load(Log_b + cols, mask=inside, other=float("-inf"))
        c = tl.load(C + own[:, None] * M + cols[None, :], mask=inside[None, :], other=0.0)
        total += tl.exp2(tl.minimum(guess[:, None] + g[None, :] - c * scale, MOST))
    sums = tl.sum(total, 1)
    safe = (sums >= SAFE_LOW) & (sums <= SAFE_HIGH)
    soft = tl.log2(tl.where(safe, sums, 1.0)) - guess
    if tl.min(safe.to(tl.int32), 0) == 0:
        top = tl.full([BLOCK_M], float("-inf"), C.dtype.element_ty)
        exact = tl.full([BLOCK_M], 0.0, C.dtype.element_ty)
        for start in range(0, M, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            inside = cols < M
            g = tl.load(G + cols, mask=inside, other=0.0) * scale
            g += tl.load(Log_b + cols, mask=inside, other=float("-inf"))
            c = tl.load(C + own[:, None] * M + cols[None, :], mask=inside[None, :], other=0.0)
            top, exact = accumulated(top, exact, g[None, :] - c * scale, 1)
        soft = tl.where(safe, soft, log2_total(top, exact))
    soft = -soft * (eps * LN2)
    a = tl.load(A + cloud * N + rows)
    inverse_rho = tl.load(Settings + 1)
    # A point without weight has the transform of the last g alone.
    relax = tl.where(a == 0, 1.0, tl.load(Settings + 3))
    f = updated(old, soft, eps, inverse_rho, relax)
    tl.store(F + points, f)
    piece = problem * blocks + block
    light = tl.load(Light + cloud)
    store_row_error(a, light, old, soft, scale, inverse_rho, Error, Mass, Steps, piece)
    f_score = f * scale + tl.load(Log_a + cloud * N + rows)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = cols < M
        g = tl.load(G + cols, mask=inside, other=0.0) * scale
        c = tl.load(C + own[:, None] * M + cols[None, :], mask=inside[None, :], other=0.0)
        p = tl.exp2(tl.minimum(f_score[:, None] + g[None, :] - c * scale, MOST))
        tl.store(Sums + cols, tl.sum(p, 0), mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_kept_merge_kernel(
    C,
    Log_a,
    B,
    Eps,
    F,
    G,
    Sums,
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
    N,
    M,
    temperatures,
    partials,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`sinkhorn_column_kernel` from what the blocks of rows left in `Sums`, in order; where a sum
    has underflowed or overflowed, from a log-sum-exp of the column's own. BLOCK_N counts rows.
    """
    blocks = tl.cdiv(M, BLOCK)
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
    cols = block * BLOCK + tl.arange(0, BLOCK)
    inside = cols < M
    eps = tl.load(Eps + problem)
    scale = 1 / eps * LOG2E
    g = tl.load(G + problem * M + cols, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], C.dtype.element_ty)
    for first in range(0, partials, BLOCK_N):
        piece = first + tl.arange(0, BLOCK_N)
        here = (problem * partials + piece[:, None]) * M + cols[None, :]
        exists = (piece < partials)[:, None] & inside[None, :]
        total += tl.sum(tl.load(Sums + here, mask=exists, other=0.0), 0)
    safe = ((total >= SAFE_LOW) & (total <= SAFE_HIGH)) | (cols >= M)
    soft = tl.log2(tl.where(safe & inside, total, 1.0)) - g * scale
    if tl.min(safe.to(tl.int32), 0) == 0:
        top = tl.full([BLOCK], float("-inf"), C.dtype.element_ty)
        exact = tl.full([BLOCK], 0.0, C.dtype.element_ty)
        for first in range(0, N, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            exists = rows < N
            f = tl.load(F + problem * N + rows, mask=exists, other=0.0) * scale
            f += tl.load(Log_a + cloud * N + rows, mask=exists, other=float("-inf"))
            here = (cloud * N + rows)[:, None] * M + cols[None, :]
            c = tl.load(C + here, mask=exists[:, None] & inside[None, :], other=0.0)
            top, exact = accumulated(top, exact, f[:, None] - c * scale, 0)
        soft = tl.where(safe, soft, log2_total(top, exact))
    soft = -soft * (eps * LN2)
    # A point without weight has the transform of the last f alone.
    massless = tl.load(B + cloud * M + cols, mask=inside, other=0.0) == 0
    relax = tl.where(massless, 1.0, tl.load(Settings + 3))
    g = updated(g, soft, eps, tl.load(Settings + 2), relax)
    tl.store(G + problem * M + cols, g, mask=inside)


def alternate_kept(s: Solve) -> Solved:
    """The same from costs in memory."""
    problems, n, m = s.g.shape[0], s.clouds.n, s.clouds.m
    launch, merge = (
        config.sinkhorn_kept(dtype_name("sinkhorn", s.g), architecture(s.g.device)),
        config.sinkhorn_kept_merge(),
    )
    count, partials, columns = s.clouds.x.shape[0], n // launch["BLOCK_M"], -(-m // merge["BLOCK"])
    C = s.g.new_empty((count, n, m))
    tiles = count * (n // s.rows["BLOCK_M"]) * (m // s.rows["BLOCK_N"])
    sinkhorn_cost_kernel[(tiles,)](s.clouds, C, *s.constants, **s.rows)
    f = s.g.new_full((2, problems, n), torch.inf)
    if s.f0 is not None:
        f[1] = s.f0
    g, sums = s.g.clone(), s.g.new_empty((problems, partials, m))
    pieces = f.new_zeros((3, problems, partials))
    measured = f.new_full((2, problems), torch.inf)
    iterations = torch.zeros_like(s.annealing, dtype=torch.int64)
    done = torch.zeros_like(s.annealing)
    for k in range(s.steps + 1):  # the last one tells those that are done
        sinkhorn_kept_kernel[(problems * partials,)](
            *(C, s.weights[0], s.light, *s.logs, s.eps(k), g, f[(k + 1) % 2], f[k % 2], sums),
            *(*pieces, done, s.setting(k), n, m, s.temperatures),
            **launch,
        )
        sinkhorn_kept_merge_kernel[(problems * columns,)](
            *(C, s.logs[0], s.weights[1], s.eps(k), f[k % 2], g, sums, *pieces, measured),
            *(iterations, s.annealing, done, s.setting(k), k, s.max_iter),
            *(n, m, s.temperatures, partials),
            **merge,
        )
    return last_rows(s, f, iterations), g, *measured, iterations
