"""Sinkhorn in Triton: streamed tiles, batched, nothing of size N x M in memory.

The registered ops have the schemas of csrc/ops.cpp, in the namespace `fewstep_triton`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import architecture, dtype_name, on

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A pair is near where |x - y|^2 < NEAR (|x|^2 + |y|^2): cancellation in the expanded square has
# then cost more than 6 of the 24 bits.
NEAR = tl.constexpr(1 / 64)
# A sum of exponentials in this range has lost nothing to underflow or overflow. Larger exponents
# than MOST, a sum of which is still finite, put it out of range.
SAFE_LOW, SAFE_HIGH, MOST = tl.constexpr(2.0**-60), tl.constexpr(2.0**100), tl.constexpr(104.0)
# Alternating iterations at most after symmetric ones, as in `fewstep.reference.sinkhorn`.
LAST_STEPS = 10
# Numbers that change from launch to launch, and pointers to where they come to lie: a kernel is not
# compiled anew for those that are 1 or a multiple of 16.
RUN_TIME = (
    *("step", "max_iter", "temperatures", "partials", "row_pieces", "column_pieces", "diagonal"),
    *("Eps", "Error", "Mass", "Row_error", "Column_error", "Settings"),
)


@triton.jit
def _squared_differences(
    X, Y, rows, cols, zeros, N, M, D, POINT_MAJOR: tl.constexpr, REDUCE: tl.constexpr
):
    x_first = X + (rows * D if POINT_MAJOR else rows)
    y_first = Y + (cols * D if POINT_MAJOR else cols)
    squared = zeros
    for d in tl.range(0, D, loop_unroll_factor=1 if POINT_MAJOR else 2):
        x = tl.load(x_first + (d if POINT_MAJOR else d * N))  # [BM]
        y = tl.load(y_first + (d if POINT_MAJOR else d * M))  # [BN]
        difference = tl.expand_dims(x, REDUCE) - tl.expand_dims(y, 1 - REDUCE)
        squared += difference * difference
    return squared


@triton.jit
def _squared_distances(
    X,
    Y,
    X_centred,
    Y_centred,
    rows,
    cols,
    norms,
    N,
    M,
    D,
    REFINE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`|x_i - y_j|^2`: by differences, `[BN, BM]`, or, where DOT, by the expanded square of centred
    points on tensor cores, `[BM, BN]`. With REFINE a tile with near pairs is taken again by
    differences, of points as they came: centring rounds.
    """
    zeros = tl.full(norms.shape, 0.0, norms.dtype)
    if DOT:
        product = zeros
        for start in range(0, D, BLOCK_D):
            ds = start + tl.arange(0, BLOCK_D)
            x = tl.load(X_centred + rows[:, None] * D + ds[None, :])  # [BM, BD]
            y = tl.load(Y_centred + cols[:, None] * D + ds[None, :])  # [BN, BD]
            product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION)
        squared = norms - 2 * product
        if REFINE:
            if tl.max((squared < norms * NEAR).to(tl.int32)) > 0:
                squared = _squared_differences(X, Y, rows, cols, zeros, N, M, D, True, 1)
        else:
            squared = tl.where(squared < 0, 0.0, squared)
    else:
        squared = _squared_differences(X, Y, rows, cols, zeros, N, M, D, False, 0)
    return squared


@triton.jit
def _accumulated(top, total, score, AXIS: tl.constexpr):
    """Maxima and sums `sum 2^(score - top)` so far, with those of a tile along an axis."""
    new_top = tl.maximum(top, tl.max(score, AXIS))
    # While every weight seen is 0 the top is -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(score - tl.expand_dims(shift, AXIS))
    return new_top, total * tl.exp2(top - shift) + tl.sum(p, AXIS)


@triton.jit
def _soft_transform(
    X,
    Y,
    X_centred,
    Y_centred,
    X2,
    Y2,
    G,
    Log_w,
    scale,
    rows,
    N,
    M,
    D,
    cost_scale,
    diagonal,
    DIAGONAL: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`log2 sum_j w_j 2^((g_j - C_ij) scale)` for some rows, `[BM]`, online over column tiles.

    With DIAGONAL less the pairs `j == i + diagonal`.
    """
    # Columns go along axis REDUCE of a tile. Without a dot they go along axis 0, which the default
    # layout keeps inside one thread, so that no reduction crosses threads.
    REDUCE: tl.constexpr = 1 if DOT else 0
    x2 = tl.expand_dims(tl.load(X2 + rows), REDUCE)
    top = tl.full([rows.shape[0]], float("-inf"), X.dtype.element_ty)
    total = tl.full([rows.shape[0]], 0.0, X.dtype.element_ty)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = tl.expand_dims(tl.load(G + cols), 1 - REDUCE)
        log_w = tl.expand_dims(tl.load(Log_w + cols), 1 - REDUCE)
        norms = x2 + tl.expand_dims(tl.load(Y2 + cols), 1 - REDUCE)
        squared = _squared_distances(
            X,
            Y,
            X_centred,
            Y_centred,
            rows,
            cols,
            norms,
            N,
            M,
            D,
            EUCLIDEAN,
            DOT,
            PRECISION,
            BLOCK_D,
        )
        cost = tl.sqrt(squared) if EUCLIDEAN else squared * cost_scale
        score = (g - cost) * scale + log_w
        if DIAGONAL:
            own = tl.expand_dims(rows + diagonal, REDUCE)
            score = tl.where(tl.expand_dims(cols, 1 - REDUCE) == own, float("-inf"), score)
        top, total = _accumulated(top, total, score, REDUCE)
    return top + tl.log2(total)


@triton.jit
def _updated(old, soft, eps, inverse_rho, relax):
    """A potential from its soft c-transform: damped by `rho / (rho + eps)`, then over-relaxed."""
    damped = soft / (1 + eps * inverse_rho)
    base = tl.where(relax == 1, damped, old)  # the old one may be infinite
    return base + relax * (damped - base)


@triton.jit
def _store_row_error(a, old, soft, scale, inverse_rho, Error, Mass, piece):
    """How far the potential before an update was from its soft c-transform, over a block."""
    # A point without mass may have any ratio, also one that overflows.
    ratio = tl.exp2(tl.where(a == 0, 0.0, (old - soft) * scale))
    wanted = tl.exp2(-tl.where(inverse_rho == 0, 0.0, old) * inverse_rho * LOG2E)
    tl.store(Error + piece, tl.sum(a * tl.abs(ratio - wanted), 0))
    tl.store(Mass + piece, tl.sum(a * ratio, 0))


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_row_kernel(
    X,
    Y,
    X_centred,
    Y_centred,
    X2,
    Y2,
    A,
    Log_b,
    Eps,
    G,
    F_old,
    F,
    Error,
    Mass,
    Done,
    Settings,
    N,
    M,
    D,
    temperatures,
    diagonal,
    cost_scale,
    DIAGONAL: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)`, damped and relaxed, and how far `F_old`
    was from it.

    `Error` and `Mass [P, blocks]` get each block's share of `sum_i a_i |r_i - w_i|` and
    `sum_i a_i r_i`, where `r_i = exp((F_old_i - f_i) / eps)` and w_i = 1, or `exp(-F_old_i / rho)`.
    `temperatures` problems in a row share points and weights. Settings: tol, 1 / rho_x, 1 / rho_y,
    relax.
    """
    blocks = N // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if tl.load(Done + problem) > 0:
        return
    cloud = problem // temperatures
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    eps = tl.load(Eps + problem)
    scale = 1 / eps * LOG2E
    total = _soft_transform(
        X + cloud * N * D,
        Y + cloud * M * D,
        X_centred + cloud * N * D,
        Y_centred + cloud * M * D,
        X2 + cloud * N,
        Y2 + cloud * M,
        G + problem * M,
        Log_b + cloud * M,
        scale,
        rows,
        N,
        M,
        D,
        cost_scale,
        diagonal,
        DIAGONAL,
        EUCLIDEAN,
        DOT,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
    )
    soft = -total * (eps * LN2)  # [BM]
    points = problem * N + rows
    a = tl.load(A + cloud * N + rows)
    old = tl.load(F_old + points)
    inverse_rho = tl.load(Settings + 1)
    tl.store(F + points, _updated(old, soft, eps, inverse_rho, tl.load(Settings + 3)))
    _store_row_error(a, old, soft, scale, inverse_rho, Error, Mass, problem * blocks + block)


@triton.jit
def _sum_of_pieces(Pieces, count):
    total = tl.zeros([128], Pieces.dtype.element_ty)
    for start in range(0, count, 128):
        piece = start + tl.arange(0, 128)
        total += tl.load(Pieces + piece, mask=piece < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_column_kernel(
    X,
    Y,
    X_centred,
    Y_centred,
    X2,
    Y2,
    Log_a,
    B,
    Eps,
    F,
    G,
    Error,
    Mass,
    Residual,
    Iterations,
    Annealing,
    Done,
    Settings,
    step,
    max_iter,
    N,
    M,
    D,
    temperatures,
    partials,
    diagonal,
    cost_scale,
    DIAGONAL: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)`, damped and relaxed, unless the problem is
    done: after `max_iter` iterations at its last temperature, which `Annealing` others come before,
    or once the residual is at most the tolerance.

    `Error [P, partials]` holds the residual of the previous iteration in pieces, and every block
    of a problem adds them in the same order, so all decide alike. BLOCK_M counts points of y.
    """
    blocks = M // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if tl.load(Done + problem) > 0:
        return
    cloud = problem // temperatures
    at_eps = step - tl.load(Annealing + problem)  # iterations that have been made there
    if at_eps > 0:
        residual = _sum_of_pieces(Error + problem * partials, partials)
        if (residual <= tl.load(Settings)) | (at_eps >= max_iter):
            if block == 0:
                tl.store(Residual + problem, residual)
                mass = _sum_of_pieces(Mass + problem * partials, partials)
                tl.store(Residual + problem + tl.num_programs(0) // blocks, mass)
                tl.store(Done + problem, 1)
            return
    if block == 0:
        tl.store(Iterations + problem, step + 1)
    cols = block * BLOCK_M + tl.arange(0, BLOCK_M)
    eps = tl.load(Eps + problem)
    total = _soft_transform(
        Y + cloud * M * D,
        X + cloud * N * D,
        Y_centred + cloud * M * D,
        X_centred + cloud * N * D,
        Y2 + cloud * M,
        X2 + cloud * N,
        F + problem * N,
        Log_a + cloud * N,
        1 / eps * LOG2E,
        cols,
        M,
        N,
        D,
        cost_scale,
        -diagonal,
        DIAGONAL,
        EUCLIDEAN,
        DOT,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
    )
    points = problem * M + cols
    # A point without weight has the transform of the last f alone.
    relax = tl.where(tl.load(B + cloud * M + cols) == 0, 1.0, tl.load(Settings + 3))
    soft = -total * (eps * LN2)
    g = _updated(tl.load(G + points), soft, eps, tl.load(Settings + 2), relax)
    tl.store(G + points, g)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_cost_kernel(
    X,
    Y,
    X_centred,
    Y_centred,
    X2,
    Y2,
    C,
    N,
    M,
    D,
    diagonal,
    cost_scale,
    DIAGONAL: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Costs `C [B, N, M]`, infinite for pairs that are left out; a tile each."""
    REDUCE: tl.constexpr = 1 if DOT else 0
    blocks, tiles = N // BLOCK_M, M // BLOCK_N
    block = tl.program_id(0) // tiles  # the other axes of a grid end at 65535
    cloud = (block // blocks).to(tl.int64)
    rows = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    x2 = tl.expand_dims(tl.load(X2 + cloud * N + rows), REDUCE)
    squared = _squared_distances(
        X + cloud * N * D,
        Y + cloud * M * D,
        X_centred + cloud * N * D,
        Y_centred + cloud * M * D,
        rows,
        cols,
        x2 + tl.expand_dims(tl.load(Y2 + cloud * M + cols), 1 - REDUCE),
        N,
        M,
        D,
        EUCLIDEAN,
        DOT,
        PRECISION,
        BLOCK_D,
    )
    cost = tl.sqrt(squared) if EUCLIDEAN else squared * cost_scale
    if DIAGONAL:
        own = tl.expand_dims(rows + diagonal, REDUCE)
        cost = tl.where(tl.expand_dims(cols, 1 - REDUCE) == own, float("inf"), cost)
    first = tl.expand_dims((cloud * N + rows) * M, REDUCE)
    tl.store(C + first + tl.expand_dims(cols, 1 - REDUCE), cost)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_kept_kernel(
    C,
    A,
    Log_a,
    Log_b,
    Eps,
    G,
    F_old,
    F,
    Sums,
    Error,
    Mass,
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
            top, exact = _accumulated(top, exact, g[None, :] - c * scale, 1)
        soft = tl.where(safe, soft, top + tl.log2(exact))
    soft = -soft * (eps * LN2)
    a = tl.load(A + cloud * N + rows)
    inverse_rho = tl.load(Settings + 1)
    f = _updated(old, soft, eps, inverse_rho, tl.load(Settings + 3))
    tl.store(F + points, f)
    _store_row_error(a, old, soft, scale, inverse_rho, Error, Mass, problem * blocks + block)
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
    at_eps = step - tl.load(Annealing + problem)  # iterations that have been made there
    if at_eps > 0:
        residual = _sum_of_pieces(Error + problem * partials, partials)
        if (residual <= tl.load(Settings)) | (at_eps >= max_iter):
            if block == 0:
                tl.store(Residual + problem, residual)
                mass = _sum_of_pieces(Mass + problem * partials, partials)
                tl.store(Residual + problem + tl.num_programs(0) // blocks, mass)
                tl.store(Done + problem, 1)
            return
    if block == 0:
        tl.store(Iterations + problem, step + 1)
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
            top, exact = _accumulated(top, exact, f[:, None] - c * scale, 0)
        soft = tl.where(safe, soft, top + tl.log2(exact))
    soft = -soft * (eps * LN2)
    # A point without weight has the transform of the last f alone.
    massless = tl.load(B + cloud * M + cols, mask=inside, other=0.0) == 0
    relax = tl.where(massless, 1.0, tl.load(Settings + 3))
    g = _updated(g, soft, eps, tl.load(Settings + 2), relax)
    tl.store(G + problem * M + cols, g, mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_symmetric_kernel(
    X,
    Y,
    X_centred,
    Y_centred,
    X2,
    Y2,
    A,
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
    Iterations,
    Annealing,
    Done,
    Settings,
    step,
    max_iter,
    N,
    M,
    D,
    temperatures,
    row_pieces,
    column_pieces,
    diagonal,
    cost_scale,
    DIAGONAL: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
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
    blocks = N // BLOCK_M
    problems = tl.num_programs(0) // blocks
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if tl.load(Done + problem) > 0:
        return
    annealing = tl.load(Annealing + problem)
    if step - 1 - annealing > 0:
        before = ((step + 1) % 2) * problems + problem
        rows_off = _sum_of_pieces(Row_error + before * row_pieces, row_pieces)
        columns_off = _sum_of_pieces(Column_error + before * column_pieces, column_pieces)
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
    X += cloud * N * D
    Y += cloud * M * D
    X_centred += cloud * N * D
    Y_centred += cloud * M * D
    Y2 += cloud * M
    Log_b += cloud * M
    G += problem * M
    Tops += (problem * blocks + block) * M
    Sums += (problem * blocks + block) * M
    x2 = tl.expand_dims(tl.load(X2 + cloud * N + rows), REDUCE)
    top = tl.full([BLOCK_M], float("-inf"), X.dtype.element_ty)
    total = tl.full([BLOCK_M], 0.0, X.dtype.element_ty)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        norms = x2 + tl.expand_dims(tl.load(Y2 + cols), 1 - REDUCE)
        squared = _squared_distances(
            X,
            Y,
            X_centred,
            Y_centred,
            rows,
            cols,
            norms,
            N,
            M,
            D,
            EUCLIDEAN,
            DOT,
            PRECISION,
            BLOCK_D,
        )
        cost = (tl.sqrt(squared) if EUCLIDEAN else squared * cost_scale) * scale
        if DIAGONAL:
            own = tl.expand_dims(rows + diagonal, REDUCE)
            cost = tl.where(tl.expand_dims(cols, 1 - REDUCE) == own, float("inf"), cost)
        g_score = tl.load(G + cols) * scale + tl.load(Log_b + cols)
        score = tl.expand_dims(g_score, 1 - REDUCE) - cost
        top, total = _accumulated(top, total, score, REDUCE)
        score = f_score - cost
        own_top = tl.max(score, 1 - REDUCE)  # [BN]
        shift = tl.where(own_top == float("-inf"), 0.0, own_top)
        p = tl.exp2(score - tl.expand_dims(shift, 1 - REDUCE))
        tl.store(Tops + cols, own_top)
        tl.store(Sums + cols, tl.sum(p, 1 - REDUCE))
    soft = -(top + tl.log2(total)) * (eps * LN2)  # [BM]
    inverse_rho = tl.load(Settings + 1)
    tl.store(F_next + points, _updated(f, soft, eps, inverse_rho, tl.load(Settings + 3)))
    a = tl.load(A + cloud * N + rows)
    # A point without mass may have any ratio, also one that overflows.
    ratio = tl.exp2(tl.where(a == 0, 0.0, (f - soft) * scale))
    wanted = tl.exp2(-f * inverse_rho * LOG2E)
    piece = ((step % 2) * problems + problem) * row_pieces + block
    tl.store(Row_error + piece, tl.sum(a * tl.abs(ratio - wanted), 0))
    tl.store(Mass + piece, tl.sum(a * ratio, 0))


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
    total = tl.where(inside, total, 1.0)
    soft = -(tl.where(inside, top, 0.0) + tl.log2(total)) * (eps * LN2)
    g = tl.load(G + problem * M + cols, mask=inside, other=0.0)
    inverse_rho = tl.load(Settings + 2)
    g_next = _updated(g, soft, eps, inverse_rho, tl.load(Settings + 3))
    tl.store(G_next + problem * M + cols, g_next, mask=inside)
    b = tl.load(B + problem // temperatures * M + cols, mask=inside, other=0.0)
    ratio = tl.exp2(tl.where(b == 0, 0.0, (g - soft) / eps * LOG2E))
    wanted = tl.exp2(-g * inverse_rho * LOG2E)
    piece = ((step % 2) * problems + problem) * column_pieces + block
    # The absolute value of the product, lest it be fused with the sum: lanes would round apart.
    tl.store(Column_error + piece, tl.sum(tl.abs(b * (ratio - wanted)), 0))


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_apply_kernel(
    X,
    Y,
    X_centred,
    Y_centred,
    X2,
    Y2,
    F,
    G,
    A,
    Log_b,
    Eps,
    V,
    Out,
    Mass,
    N,
    M,
    D,
    K,
    temperatures,
    diagonal,
    cost_scale,
    DIAGONAL: tl.constexpr,
    GRADIENT: tl.constexpr,
    NEAR_ONLY: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    DOT_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`out_i = sum_j p_ij v_j` and `mass_i = sum_j p_ij`, `p_ij = b_j exp((f_i + g_j - C_ij)/eps)`.

    With GRADIENT, V is y (centred where DOT_V) and `out_i = a_i sum_j p_ij dC_ij/dx_i`, through
    `sum_j w_ij (x_i - y_j)`: pair by pair, or expanded and centred where DOT_V. EUCLIDEAN has
    large weights `p_ij / C_ij` at near pairs; DOT_V leaves these out and NEAR_ONLY adds them. With
    DIAGONAL the pairs `j == i + diagonal` are left out. `temperatures` problems share their points.
    """
    REDUCE: tl.constexpr = 1 if DOT else 0
    OUT_REDUCE: tl.constexpr = 1 if DOT or DOT_V else 0
    SPLIT: tl.constexpr = GRADIENT and EUCLIDEAN and DOT
    blocks = N // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    ks = first + tl.arange(0, BLOCK_K)
    cloud = problem // temperatures
    X += cloud * N * D
    Y += cloud * M * D
    X_centred += cloud * N * D
    Y_centred += cloud * M * D
    V += (cloud if GRADIENT else problem) * M * K
    Y2 += cloud * M
    G += problem * M
    Log_b += cloud * M
    points = problem * N + rows
    scale = 1 / tl.load(Eps + problem) * LOG2E
    x2 = tl.expand_dims(tl.load(X2 + cloud * N + rows), REDUCE)
    f = tl.expand_dims(tl.load(F + points), REDUCE)
    mass = tl.full([BLOCK_M], 0.0, X.dtype.element_ty)
    out = tl.zeros([BLOCK_M, BLOCK_K] if OUT_REDUCE else [BLOCK_K, BLOCK_M], X.dtype.element_ty)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = tl.expand_dims(tl.load(G + cols), 1 - REDUCE)
        log_b = tl.expand_dims(tl.load(Log_b + cols), 1 - REDUCE)
        norms = x2 + tl.expand_dims(tl.load(Y2 + cols), 1 - REDUCE)
        squared = _squared_distances(
            X,
            Y,
            X_centred,
            Y_centred,
            rows,
            cols,
            norms,
            N,
            M,
            D,
            EUCLIDEAN and (NEAR_ONLY or not SPLIT),
            DOT,
            PRECISION,
            BLOCK_D,
        )
        cost = tl.sqrt(squared) if EUCLIDEAN else squared * cost_scale
        p = tl.exp2((f + g - cost) * scale + log_b)
        if DIAGONAL:
            own = tl.expand_dims(rows + diagonal, REDUCE)
            p = tl.where(tl.expand_dims(cols, 1 - REDUCE) == own, 0.0, p)
        if GRADIENT and EUCLIDEAN:
            p = tl.where(cost == 0, 0.0, p / tl.where(cost == 0, 1.0, cost))
        if SPLIT:
            near = squared < norms * NEAR
            p = tl.where(near, p, 0.0) if NEAR_ONLY else tl.where(near, 0.0, p)
        mass += tl.sum(p, REDUCE)
        if DOT_V:
            offsets = cols[:, None] * K + ks[None, :]
            v = tl.load(V + offsets, mask=ks[None, :] < K, other=0.0)  # [BN, BK]
            out = tl.dot(p if DOT else tl.trans(p), v, out, input_precision=PRECISION)
        elif not NEAR_ONLY or tl.max(near.to(tl.int32)) > 0:
            for k in range(first, tl.minimum(first + BLOCK_K, K)):
                v = tl.load(V + (cols * K + k if DOT or not GRADIENT else k * M + cols))
                v = tl.expand_dims(v, 1 - REDUCE)
                if GRADIENT:
                    x = tl.load(X + (rows * D + k if DOT else k * N + rows))
                    v = tl.expand_dims(x, REDUCE) - v
                part = tl.sum(p * v, REDUCE)
                here = tl.expand_dims(ks == k, 1 - OUT_REDUCE)
                out += tl.where(here, tl.expand_dims(part, OUT_REDUCE), 0.0)
    if GRADIENT:
        if DOT_V:
            offsets = rows[:, None] * D + ks[None, :]
            x = tl.load(X_centred + offsets, mask=ks[None, :] < K, other=0.0)
            out = mass[:, None] * x - out
        a = tl.expand_dims(tl.load(A + cloud * N + rows), OUT_REDUCE)
        out *= a if EUCLIDEAN else (2 * cost_scale) * a
    elif tl.program_id(1) == 0:
        tl.store(Mass + points, mass)
    offsets = tl.expand_dims(points * K, OUT_REDUCE) + tl.expand_dims(ks, 1 - OUT_REDUCE)
    tl.store(Out + offsets, out, mask=tl.expand_dims(ks, 1 - OUT_REDUCE) < K)


EUCLIDEAN = 2
COST_SCALE = (1.0, 0.5, 1.0)


def padded(points: int, launch: dict[str, Any]) -> int:
    """Points of one side, so that whole tiles cover it as rows and as columns."""
    block = max(launch["BLOCK_M"], launch["BLOCK_N"])
    return -(-points // block) * block


def pad(t: Tensor, points: int, value: float = 0.0) -> Tensor:
    """`[B, n] -> [B, points]`; zeros are right for weights, so padding counts for nothing."""
    return torch.nn.functional.pad(t, (0, points - t.shape[1]), value=value).contiguous()


def _log2(weights: Tensor, points: int) -> Tensor:
    return pad(weights, points).log2()


@dataclass(frozen=True)
class _Clouds:
    """Points as the kernels read them; padding is 0.

    `[B, points, D]` with D padded too for dots, which want rows; `[B, D, points]` for differences.
    """

    x: Tensor
    y: Tensor
    x_centred: Tensor
    y_centred: Tensor
    x2: Tensor  # [B, points] squared norms of the centred points
    y2: Tensor
    shape: tuple[int, int, int]  # points of x, points of y, D

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return self.x, self.y, self.x_centred, self.y_centred, self.x2, self.y2


def _check_offsets(name: str, t: Tensor, points: int, launch: dict[str, Any]) -> None:
    """Inside a problem the kernels count in 32 bits."""
    if points * (t.shape[2] + launch["BLOCK_D"]) >= 2**31:
        raise ValueError(
            f"sinkhorn: {name} must have fewer than 2**31 entries in a problem, "
            f"got {tuple(t.shape[1:])}"
        )


def _clouds(x: Tensor, y: Tensor, n: int, m: int, launch: dict[str, Any]) -> _Clouds:
    """Lay out x and y, padded to n and m points."""
    _check_offsets("x", x, n, launch)
    _check_offsets("y", y, m, launch)
    if not launch["DOT"]:
        xs, ys = (
            torch.nn.functional.pad(p.mT, (0, points - p.shape[1])).contiguous()
            for p, points in ((x, n), (y, m))
        )
        # Differences use neither centred points nor norms.
        return _Clouds(xs, ys, xs, ys, xs, ys, (n, m, x.shape[2]))
    extra = -x.shape[2] % launch["BLOCK_D"]
    centre = y.mean(1, keepdim=True)
    xs, ys, xc, yc = (
        torch.nn.functional.pad(p, (0, extra, 0, points - p.shape[1])).contiguous()
        for p, points in ((x, n), (y, m), (x - centre, n), (y - centre, m))
    )
    shape = (n, m, xs.shape[2])
    return _Clouds(xs, ys, xc, yc, xc.square().sum(2), yc.square().sum(2), shape)


# Annealing by a factor begins at most so many times above eps: the number of launches must not
# depend on the data. Beyond it float32 has no digit of a cost left.
_MOST_ANNEALING = 2.0**40


def _temperatures(
    eps: Tensor, start: Tensor | None, factor: float, schedule: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The temperature of each step `[steps, P]` up to the first at eps in all problems, and how
    many of its steps a problem makes before eps `[P]`."""
    steps = [] if schedule is None else [t.expand_as(eps) for t in schedule.unbind()]
    count = torch.full_like(eps, len(steps), dtype=torch.int32)
    if start is not None:
        most = math.ceil(math.log(_MOST_ANNEALING) / -math.log(factor))
        now = torch.minimum(start, eps * _MOST_ANNEALING)
        for _ in range(most + 1):
            annealing = now > eps
            count += annealing
            steps.append(torch.where(annealing, now, eps))
            now = now * factor
    return torch.stack([*steps, eps]).contiguous(), count


@torch.library.custom_op(
    "fewstep_triton::sinkhorn",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor a, Tensor b, Tensor eps, Tensor? f0, Tensor? g0, int cost, "
    "int? diagonal, int max_iter, float? tol, Tensor? start, float factor, Tensor? schedule, "
    "float? rho_x, float? rho_y, float relax, bool simultaneous, bool single, int memory_limit, "
    "int precision) -> (Tensor f, Tensor g, Tensor value, Tensor residual, Tensor iterations, "
    "Tensor converged)",
)
def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    cost: int,
    diagonal: int | None,
    max_iter: int,
    tol: float | None,
    start: Tensor | None,
    factor: float,
    schedule: Tensor | None,
    rho_x: float | None,
    rho_y: float | None,
    relax: float,
    simultaneous: bool,
    single: bool,
    memory_limit: int,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two launches per iteration and one or two more; see `fewstep.sinkhorn` for the meaning.

    The host never waits: it launches as many iterations as a problem can make, and the blocks of a
    problem that is done return at once. Simultaneous updates compute each cost once for both
    potentials.
    """
    dtype, arch = dtype_name("sinkhorn", x), architecture(x.device)
    how = config.PRECISIONS[precision]
    batch, n, dim = x.shape
    m, problems = y.shape[1], eps.shape[0]
    temperatures = problems // batch if batch else 1
    rows = config.sinkhorn_update(problems, n, dim, dtype, arch, how)
    cols = config.sinkhorn_update(problems, m, dim, dtype, arch, how)
    n_padded, m_padded = padded(n, rows), padded(m, cols)
    if batch == 0:
        empty = x.new_empty(0)
        return (
            x.new_empty((0, n)),
            x.new_empty((0, m)),
            empty,
            empty.clone(),
            empty.long(),
            empty.bool(),
        )
    mass_a, mass_b = a.sum(1, keepdim=True), b.sum(1, keepdim=True)
    each, annealing = _temperatures(eps, start, factor, schedule)
    inverse = [0.0 if rho is None else 1 / rho for rho in (rho_x, rho_y)]
    # An iteration without a potential before it is taken in full. Filled on the device: a copy from
    # the host cannot be captured in a graph.
    numbers = (-1.0 if tol is None else tol, *inverse, relax)
    settings = torch.stack([x.new_full((2,), value) for value in numbers], 1)
    settings[0, 3].fill_(1.0)
    kept = not simultaneous and config.keeps_costs(
        batch, n_padded, m_padded, dim, max_iter, dtype, memory_limit, how
    )
    problem = _Solve(
        clouds=_clouds(x, y, n_padded, m_padded, rows),
        weights=(pad(a / mass_a, n_padded), pad(b / mass_a, m_padded)),
        logs=(_log2(a, n_padded), _log2(b, m_padded)),
        f0=None if f0 is None else pad(f0, n_padded),
        g=x.new_zeros((problems, m_padded)) if g0 is None else pad(g0, m_padded),
        each=each,
        annealing=annealing,
        settings=settings,
        last_steps=1 if tol is None else LAST_STEPS,
        single=single,
        kept=kept,
        max_iter=max_iter,
        temperatures=temperatures,
        constants=(0 if diagonal is None else diagonal, COST_SCALE[cost]),
        rows=rows | {"DIAGONAL": diagonal is not None, "EUCLIDEAN": cost == EUCLIDEAN},
        cols=cols | {"DIAGONAL": diagonal is not None, "EUCLIDEAN": cost == EUCLIDEAN},
    )
    iterate = _symmetric if simultaneous else _alternate_kept if kept else _alternate
    with on(x.device):
        f, g, residual, mass, iterations = iterate(problem)
    f, g = f[:, :n].contiguous(), g[:, :m].contiguous()
    converged = residual <= (1e-3 if tol is None else tol)
    a, b, mass_a, mass_b = (t.repeat_interleave(temperatures, 0) for t in (a, b, mass_a, mass_b))
    value = (a * _penalised(f, rho_x)).sum(1) + (b * _penalised(g, rho_y)).sum(1)
    if (rho_x, rho_y) != (None, None) or relax != 1 or simultaneous:
        value = value - eps * mass_a[:, 0] * (mass - mass_b[:, 0])
    return f, g, value, residual, iterations, converged


@dataclass(frozen=True)
class _Solve:
    """What both kinds of iteration are given; points are padded."""

    clouds: _Clouds
    weights: tuple[Tensor, Tensor]  # a and b over the mass of a, [B, points]
    logs: tuple[Tensor, Tensor]
    f0: Tensor | None
    g: Tensor  # [P, points of y]
    each: Tensor  # temperatures of the steps, the last one for all later ones, [steps, P]
    annealing: Tensor  # steps before eps, [P]
    settings: Tensor  # of the first step and of the others, [2, 4]
    last_steps: int  # alternating ones at most, after symmetric ones
    single: bool  # f and g are to stay the same
    kept: bool  # costs are in memory
    max_iter: int
    temperatures: int
    constants: tuple[int, float]
    rows: dict[str, Any]  # launch parameters
    cols: dict[str, Any]

    @property
    def steps(self) -> int:
        """As many as a problem can make."""
        return self.each.shape[0] - 1 + self.max_iter

    def eps(self, step: int) -> Tensor:
        return self.each[min(step, self.each.shape[0] - 1)]

    def setting(self, step: int) -> Tensor:
        return self.settings[int(step > 0 or self.f0 is not None)]

    def blocks(self, side: int) -> int:
        return self.clouds.shape[side] // (self.rows, self.cols)[side]["BLOCK_M"]


_Solved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # f, g, residual, mass, iterations


def _alternate(s: _Solve) -> _Solved:
    """f from g, then g from f."""
    problems, partials = s.g.shape[0], s.blocks(0)
    # Step k (from 0) writes f[k % 2]; the infinities before it make its residual infinite.
    f = s.g.new_full((2, problems, s.clouds.shape[0]), torch.inf)
    if s.f0 is not None:
        f[1] = s.f0
    g = s.g.clone()
    pieces = f.new_zeros((2, problems, partials))
    measured = f.new_full((2, problems), torch.inf)
    iterations = torch.zeros_like(s.annealing, dtype=torch.int64)
    done = torch.zeros_like(s.annealing)

    def update_rows(k: int) -> None:
        sinkhorn_row_kernel[(problems * partials,)](
            *(*s.clouds.pointers, s.weights[0], s.logs[1], s.eps(k), g, f[(k + 1) % 2], f[k % 2]),
            *(*pieces, done, s.setting(k), *s.clouds.shape, s.temperatures, *s.constants),
            **s.rows,
        )

    for k in range(s.steps):
        update_rows(k)
        sinkhorn_column_kernel[(problems * s.blocks(1),)](
            *(*s.clouds.pointers, s.logs[0], s.weights[1], s.eps(k), f[k % 2], g, *pieces),
            *(measured, iterations, s.annealing, done, s.setting(k), k, s.max_iter),
            *(*s.clouds.shape, s.temperatures, partials, *s.constants),
            **s.cols,
        )
    update_rows(s.steps)
    residual, mass = torch.where(done > 0, measured, pieces.sum(2))
    last = torch.where((iterations % 2 == 1)[:, None], f[0], f[1])
    return last, g, residual, mass, iterations


def _alternate_kept(s: _Solve) -> _Solved:
    """The same from costs in memory."""
    problems, (n, m, _) = s.g.shape[0], s.clouds.shape
    launch, merge = (
        config.sinkhorn_kept(dtype_name("sinkhorn", s.g), architecture(s.g.device)),
        config.sinkhorn_kept_merge(),
    )
    count, partials, columns = s.clouds.x.shape[0], n // launch["BLOCK_M"], -(-m // merge["BLOCK"])
    C = s.g.new_empty((count, n, m))
    tiles = count * (n // s.rows["BLOCK_M"]) * (m // s.rows["BLOCK_N"])
    sinkhorn_cost_kernel[(tiles,)](*s.clouds.pointers, C, *s.clouds.shape, *s.constants, **s.rows)
    f = s.g.new_full((2, problems, n), torch.inf)
    if s.f0 is not None:
        f[1] = s.f0
    g, sums = s.g.clone(), s.g.new_empty((problems, partials, m))
    pieces = f.new_zeros((2, problems, partials))
    measured = f.new_full((2, problems), torch.inf)
    iterations = torch.zeros_like(s.annealing, dtype=torch.int64)
    done = torch.zeros_like(s.annealing)
    for k in range(s.steps + 1):  # the last one tells those that are done
        sinkhorn_kept_kernel[(problems * partials,)](
            *(C, s.weights[0], *s.logs, s.eps(k), g, f[(k + 1) % 2], f[k % 2], sums, *pieces),
            *(done, s.setting(k), n, m, s.temperatures),
            **launch,
        )
        sinkhorn_kept_merge_kernel[(problems * columns,)](
            *(C, s.logs[0], s.weights[1], s.eps(k), f[k % 2], g, sums, *pieces, measured),
            *(iterations, s.annealing, done, s.setting(k), k, s.max_iter),
            *(n, m, s.temperatures, partials),
            **merge,
        )
    last = torch.where((iterations % 2 == 1)[:, None], f[0], f[1])
    return last, g, *measured, iterations


def _symmetric(s: _Solve) -> _Solved:
    """Both potentials from the last two, mixed with them, and alternating steps at the end."""
    problems, (n, m, _) = s.g.shape[0], s.clouds.shape
    launch = config.sinkhorn_symmetric(s.rows, architecture(s.g.device))
    merge = config.sinkhorn_merge()
    row_pieces, column_pieces = s.blocks(0), -(-m // merge["BLOCK"])
    # Step k goes from [k % 2] to the other one.
    f, g = s.g.new_zeros((2, problems, n)), torch.stack([s.g, s.g])
    if s.f0 is not None:
        f[0] = s.f0
    tops, sums = s.g.new_empty((2, problems, row_pieces, m))
    row_error, mass = s.g.new_zeros((2, 2, problems, row_pieces))
    column_error = s.g.new_zeros((2, problems, column_pieces))
    iterations = torch.zeros_like(s.annealing, dtype=torch.int64)
    done = torch.zeros_like(s.annealing)

    def step(k: int, source: int, eps: Tensor, setting: Tensor, done: Tensor) -> None:
        pieces = (s.temperatures, row_pieces, column_pieces)
        sinkhorn_symmetric_kernel[(problems * row_pieces,)](
            *(*s.clouds.pointers, s.weights[0], *s.logs, eps, f[source], g[source], f[1 - source]),
            *(tops, sums, row_error, column_error, mass, iterations, s.annealing, done, setting),
            *(k, s.max_iter, *s.clouds.shape, *pieces, *s.constants),
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
        last_f, last_g, residual, last_mass, _ = _alternate(last)
        return last_f, last_g, residual, last_mass, iterations
    # A step in full, and one that measures what came out; step 0 looks at no residual.
    full, everyone = s.settings[0], torch.zeros_like(done)
    step(0, 0, s.each[-1], full, everyone)
    step(0, 1, s.each[-1], full, everyone)
    residual = torch.maximum(row_error[0].sum(1), column_error[0].sum(1))
    return f[1], f[1], residual, mass[0].sum(1), iterations


def _penalised(potential: Tensor, rho: float | None) -> Tensor:
    """`rho (1 - exp(-f / rho))`, what a potential adds to the dual; f for a constraint."""
    return potential if rho is None else -rho * torch.expm1(-potential / rho)


def _apply(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor | None,
    b: Tensor,
    eps: Tensor,
    v: Tensor | None,
    cost: int,
    diagonal: int | None,
    precision: int,
    near_only: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the product: `v [P, M, K]` for transport, None for the gradient."""
    dtype, arch = dtype_name("sinkhorn", x), architecture(x.device)
    gradient = v is None
    batch, n, dim = x.shape
    m, problems = y.shape[1], eps.shape[0]
    width = dim if v is None else v.shape[2]
    options = {"gradient": gradient, "near_only": near_only, "diagonal": diagonal is not None}
    how = config.PRECISIONS[precision]
    launch = config.sinkhorn_apply(problems, n, dim, width, dtype, arch, how, **options)
    n_padded, m_padded = padded(n, launch), padded(m, launch)
    if batch == 0:
        return x.new_empty((0, n, width)), x.new_empty((0, n))
    clouds = _clouds(x, y, n_padded, m_padded, launch)
    if v is None:
        values = clouds.y_centred if launch["DOT_V"] else clouds.y
        width = clouds.shape[2]
    else:
        _check_offsets("v", v, m_padded, launch)
        values = torch.nn.functional.pad(v, (0, 0, 0, m_padded - m)).contiguous()
    out = x.new_empty((problems, n_padded, width))
    mass = x.new_empty((problems, n_padded))
    weights = f if a is None else pad(a, n_padded)
    # Without mass in padded rows nothing overflows there.
    f, g = pad(f, n_padded, -torch.inf), pad(g, m_padded)
    grid = (problems * (n_padded // launch["BLOCK_M"]), -(-width // launch["BLOCK_K"]))
    with on(x.device):
        sinkhorn_apply_kernel[grid](
            *(*clouds.pointers, f, g, weights, _log2(b, m_padded), eps.contiguous()),
            *(values, out, mass, *clouds.shape, width, problems // batch),
            *(0 if diagonal is None else diagonal, COST_SCALE[cost]),
            DIAGONAL=diagonal is not None,
            GRADIENT=gradient,
            EUCLIDEAN=cost == EUCLIDEAN,
            **launch,
        )
    return out[:, :n], mass[:, :n]


@torch.library.custom_op(
    "fewstep_triton::sinkhorn_transport",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor f, Tensor g, Tensor b, Tensor eps, Tensor v, int cost, "
    "int? diagonal, int precision) -> (Tensor out, Tensor mass)",
)
def sinkhorn_transport(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    b: Tensor,
    eps: Tensor,
    v: Tensor,
    cost: int,
    diagonal: int | None,
    precision: int,
) -> tuple[Tensor, Tensor]:
    """`sum_j p_ij v_j [P, N, K]` and `sum_j p_ij [P, N]`."""
    width = v.shape[2]
    # The mass is wanted of an empty v too.
    v = v if width > 0 else v.new_zeros((*v.shape[:2], 1))
    out, mass = _apply(x, y, f, g, None, b, eps, v, cost, diagonal, precision, False)
    return out[..., :width].contiguous(), mass.contiguous()


@torch.library.custom_op(
    "fewstep_triton::sinkhorn_grad",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor f, Tensor g, Tensor a, Tensor b, Tensor eps, int cost, "
    "int? diagonal, int precision) -> Tensor",
)
def sinkhorn_grad(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    cost: int,
    diagonal: int | None,
    precision: int,
) -> Tensor:
    """`sum_j a_i p_ij dC_ij/dx_i [P, N, D]`."""
    dim, how = x.shape[2], (cost, diagonal, precision)
    out, _ = _apply(x, y, f, g, a, b, eps, None, *how, False)
    dtype = dtype_name("sinkhorn", x)
    if cost == EUCLIDEAN and config.uses_dot(dim, dtype, config.PRECISIONS[precision]):
        out = out + _apply(x, y, f, g, a, b, eps, None, *how, True)[0]
    return out[..., :dim].contiguous()
