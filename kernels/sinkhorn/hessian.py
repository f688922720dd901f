"""Second derivatives of Sinkhorn in Triton: streamed tiles, float64, nothing of size N x M."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..launch import architecture, on
from .layout import cost_flags, cost_numbers, pad, padded
from .tiles import LOG2E, RUN_TIME

# Two points without weight may have any e; it must not be infinite, 0 times it has to be 0.
MOST = tl.constexpr(500.0)


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_hessian_kernel(
    X,
    Y,
    Ux,
    Uy,
    F,
    G,
    A,
    B,
    Left,
    Right,
    Da,
    Db,
    Eps,
    Out,
    N,
    M,
    D,
    diagonal,
    cost_scale,
    DIAGONAL: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The derivative of `sum_j P_ij dC_ij/dx_i [P, N, D]` along (Ux, Uy), where f + g changes by
    Left + Right, and a, b by Da, Db; or, with SUMS, `sum_j e_ij (b_j dC_ij - eps Db_j) [P, N]`.

    `e_ij = exp((f_i + g_j - C_ij) / eps)`, `P_ij = a_i b_j e_ij`, and dC_ij is the derivative of
    C_ij along (Ux, Uy). Points are `[P, D, points]`; everything is by differences.
    """
    blocks = N // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    ks = first + tl.arange(0, BLOCK_K)
    X += problem * N * D
    Ux += problem * N * D
    Y += problem * M * D
    Uy += problem * M * D
    points = problem * N + rows
    eps = tl.load(Eps + problem)
    scale = 1 / eps * LOG2E
    f = tl.load(F + points)[None, :]
    a = tl.load(A + points)[None, :]
    da = tl.load(Da + points)[None, :]
    left = tl.load(Left + points)[None, :]
    total = tl.zeros([BLOCK_M], X.dtype.element_ty)
    out = tl.zeros([BLOCK_K, BLOCK_M], X.dtype.element_ty)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        columns = problem * M + cols
        squared = tl.zeros([BLOCK_N, BLOCK_M], X.dtype.element_ty)
        slope = tl.zeros([BLOCK_N, BLOCK_M], X.dtype.element_ty)
        for d in range(D):
            dx = tl.load(X + d * N + rows)[None, :] - tl.load(Y + d * M + cols)[:, None]
            du = tl.load(Ux + d * N + rows)[None, :] - tl.load(Uy + d * M + cols)[:, None]
            squared += dx * dx
            slope += dx * du
        if EUCLIDEAN:
            cost = tl.sqrt(squared)
            inverse = tl.where(cost > 0, 1 / tl.where(cost > 0, cost, 1.0), 0.0)
            change = slope * inverse  # dC_ij
        else:
            cost = squared * cost_scale
            change = slope * (2 * cost_scale)
        g = tl.load(G + columns)[:, None]
        b = tl.load(B + columns)[:, None]
        db = tl.load(Db + columns)[:, None]
        e = tl.exp2(tl.minimum((f + g - cost) * scale, MOST))
        if DIAGONAL:
            e = tl.where(cols[:, None] == rows[None, :] + diagonal, 0.0, e)
        if SUMS:
            total += tl.sum(e * (b * change - eps * db), 0)
        else:
            plan = a * b * e
            right = tl.load(Right + columns)[:, None]
            moved = plan * ((left + right - change) / eps) + e * (da * b + a * db)  # dP_ij
            if EUCLIDEAN:
                along = (moved - plan * change * inverse) * inverse
                across = plan * inverse
            else:
                along = moved * (2 * cost_scale)
                across = plan * (2 * cost_scale)
            for k in range(first, tl.minimum(first + BLOCK_K, D)):
                dx = tl.load(X + k * N + rows)[None, :] - tl.load(Y + k * M + cols)[:, None]
                du = tl.load(Ux + k * N + rows)[None, :] - tl.load(Uy + k * M + cols)[:, None]
                part = tl.sum(along * dx + across * du, 0)
                out += tl.where((ks == k)[:, None], part[None, :], 0.0)
    if SUMS:
        tl.store(Out + points, total)
    else:
        tl.store(Out + (points * D)[None, :] + ks[:, None], out, mask=(ks < D)[:, None])


@torch.library.custom_op(
    "fewstep_triton::sinkhorn_hessian",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor ux, Tensor uy, Tensor f, Tensor g, Tensor a, Tensor b, "
    "Tensor left, Tensor right, Tensor da, Tensor db, Tensor eps, int cost, int? diagonal, "
    "bool sums) -> Tensor",
)
def sinkhorn_hessian(
    x: Tensor,
    y: Tensor,
    ux: Tensor,
    uy: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    left: Tensor,
    right: Tensor,
    da: Tensor,
    db: Tensor,
    eps: Tensor,
    cost: int,
    diagonal: int | None,
    sums: bool,
) -> Tensor:
    """The products of the plan's derivative, for `fewstep.ops.sinkhorn.implicit`.

    `[P, N, D]`, or `[P, N]` where `sums`.
    """
    if x.dtype != torch.float64:
        raise TypeError(f"sinkhorn_hessian: x must be float64, got {x.dtype}")
    problems, n, dim = x.shape
    m = y.shape[1]
    if problems == 0:
        return x.new_empty((0, n) if sums else (0, n, dim))
    launch = config.sinkhorn_hessian(problems, n, architecture(x.device))
    rows, cols = padded(n, launch), padded(m, launch)

    def points(t: Tensor, count: int) -> Tensor:
        """`[P, D, count]`."""
        return torch.nn.functional.pad(t.mT, (0, count - t.shape[1])).contiguous()

    out = x.new_empty((problems, rows) if sums else (problems, rows, dim))
    chunks = 1 if sums else -(-dim // launch["BLOCK_K"])
    with on(x.device):
        sinkhorn_hessian_kernel[(problems * (rows // launch["BLOCK_M"]), chunks)](
            *(points(x, rows), points(y, cols), points(ux, rows), points(uy, cols)),
            # Padded rows have no plan, and padded columns no weight and no change of it.
            *(pad(f, rows, -torch.inf), pad(g, cols), pad(a, rows), pad(b, cols)),
            *(pad(left, rows), pad(right, cols), pad(da, rows), pad(db, cols)),
            *(eps.contiguous(), out, rows, cols, dim, *cost_numbers(cost, diagonal)),
            SUMS=sums,
            **launch,
            **cost_flags(cost, diagonal),
        )
    return out[:, :n].contiguous()


@sinkhorn_hessian.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[:2] if rest[-1] else x.shape)
