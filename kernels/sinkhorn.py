"""Sinkhorn in Triton: streamed tiles, batched, nothing of size N x M in memory.

The registered ops have the schemas of csrc/ops.cpp, in the namespace `fewstep_triton`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A pair is near where |x - y|^2 < NEAR (|x|^2 + |y|^2): cancellation in the expanded square has
# then cost more than 6 of the 24 bits.
NEAR = tl.constexpr(1 / 64)


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
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`log2 sum_j w_j 2^((g_j - C_ij) scale)` for some rows, `[BM]`, online over column tiles."""
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
        new_top = tl.maximum(top, tl.max(score, REDUCE))
        # While every weight seen is 0 the top is -inf, and -inf - -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(score - tl.expand_dims(shift, REDUCE))
        total = total * tl.exp2(top - shift) + tl.sum(p, REDUCE)
        top = new_top
    return top + tl.log2(total)


@triton.jit
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
    Partial,
    Residual,
    Tol,
    N,
    M,
    D,
    cost_scale,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)`, and how far `F_old` was from it.

    `Partial [B, blocks]` gets each block's share of `sum_i a_i |exp((F_old_i - f_i) / eps) - 1|`.
    """
    blocks = N // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if tl.load(Residual + problem) <= tl.load(Tol):
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    eps = tl.load(Eps + problem)
    scale = 1 / eps * LOG2E
    total = _soft_transform(
        X + problem * N * D,
        Y + problem * M * D,
        X_centred + problem * N * D,
        Y_centred + problem * M * D,
        X2 + problem * N,
        Y2 + problem * M,
        G + problem * M,
        Log_b + problem * M,
        scale,
        rows,
        N,
        M,
        D,
        cost_scale,
        EUCLIDEAN,
        DOT,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
    )
    f = -total * (eps * LN2)  # [BM]
    points = problem * N + rows
    a = tl.load(A + points)
    old = tl.load(F_old + points)
    tl.store(F + points, f)
    # A point without mass may have any ratio, also one that overflows.
    ratio = tl.exp2(tl.where(a == 0, 0.0, (old - f) * scale))
    tl.store(Partial + problem * blocks + block, tl.sum(a * tl.abs(ratio - 1), 0))


@triton.jit
def sinkhorn_column_kernel(
    X,
    Y,
    X_centred,
    Y_centred,
    X2,
    Y2,
    Log_a,
    Eps,
    F,
    G,
    Partial,
    Residual,
    Iterations,
    Tol,
    N,
    M,
    D,
    partials,
    cost_scale,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)`, unless the problem has converged.

    `Partial [B, partials]` holds the residual of the previous iteration in pieces, and every block
    of a problem adds them in the same order, so all decide alike. BLOCK_M counts points of y.
    """
    blocks = M // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    tol = tl.load(Tol)
    if tl.load(Residual + problem) <= tol:
        return
    pieces = tl.zeros([128], X.dtype.element_ty)
    for start in range(0, partials, 128):
        piece = start + tl.arange(0, 128)
        pieces += tl.load(Partial + problem * partials + piece, mask=piece < partials, other=0.0)
    residual = tl.sum(pieces, 0)
    if block == 0:
        tl.store(Residual + problem, residual)
    if residual <= tol:
        return
    if block == 0:
        tl.store(Iterations + problem, tl.load(Iterations + problem) + 1)
    cols = block * BLOCK_M + tl.arange(0, BLOCK_M)
    eps = tl.load(Eps + problem)
    total = _soft_transform(
        Y + problem * M * D,
        X + problem * N * D,
        Y_centred + problem * M * D,
        X_centred + problem * N * D,
        Y2 + problem * M,
        X2 + problem * N,
        F + problem * N,
        Log_a + problem * N,
        1 / eps * LOG2E,
        cols,
        M,
        N,
        D,
        cost_scale,
        EUCLIDEAN,
        DOT,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
    )
    tl.store(G + problem * M + cols, -total * (eps * LN2))


@triton.jit
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
    cost_scale,
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
    large weights `p_ij / C_ij` at near pairs; DOT_V leaves these out and NEAR_ONLY adds them.
    """
    REDUCE: tl.constexpr = 1 if DOT else 0
    OUT_REDUCE: tl.constexpr = 1 if DOT or DOT_V else 0
    SPLIT: tl.constexpr = GRADIENT and EUCLIDEAN and DOT
    blocks = N // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    ks = first + tl.arange(0, BLOCK_K)
    X += problem * N * D
    Y += problem * M * D
    X_centred += problem * N * D
    Y_centred += problem * M * D
    V += problem * M * K
    Y2 += problem * M
    G += problem * M
    Log_b += problem * M
    points = problem * N + rows
    scale = 1 / tl.load(Eps + problem) * LOG2E
    x2 = tl.expand_dims(tl.load(X2 + points), REDUCE)
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
        a = tl.expand_dims(tl.load(A + points), OUT_REDUCE)
        out *= a if EUCLIDEAN else (2 * cost_scale) * a
    elif tl.program_id(1) == 0:
        tl.store(Mass + points, mass)
    offsets = tl.expand_dims(points * K, OUT_REDUCE) + tl.expand_dims(ks, 1 - OUT_REDUCE)
    tl.store(Out + offsets, out, mask=tl.expand_dims(ks, 1 - OUT_REDUCE) < K)


_EUCLIDEAN = 2
_COST_SCALE = (1.0, 0.5, 1.0)


def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _padded(points: int, launch: dict[str, Any]) -> int:
    """Points of one side, so that whole tiles cover it as rows and as columns."""
    block = max(launch["BLOCK_M"], launch["BLOCK_N"])
    return -(-points // block) * block


def _pad(t: Tensor, points: int, value: float = 0.0) -> Tensor:
    """`[B, n] -> [B, points]`; zeros are right for weights, so padding counts for nothing."""
    return torch.nn.functional.pad(t, (0, points - t.shape[1]), value=value).contiguous()


def _log2(weights: Tensor, points: int) -> Tensor:
    return _pad(weights, points).log2()


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


def _dtype(x: Tensor) -> str:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"sinkhorn: x must be float32 or float64, got {x.dtype}")
    return str(x.dtype).removeprefix("torch.")


@torch.library.custom_op(
    "fewstep_triton::sinkhorn",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor a, Tensor b, Tensor eps, Tensor? g0, int cost, "
    "int max_iter, float? tol) -> (Tensor f, Tensor g, Tensor value, Tensor residual, "
    "Tensor iterations, Tensor converged)",
)
def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    g0: Tensor | None,
    cost: int,
    max_iter: int,
    tol: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two launches per iteration and one more; see `fewstep.ops.sinkhorn` for the meaning.

    The host never waits: it launches `max_iter` iterations, and the blocks of a problem that has
    converged return at once.
    """
    dtype, arch = _dtype(x), _architecture(x.device)
    batch, n, dim = x.shape
    m = y.shape[1]
    rows = config.sinkhorn_update(batch, n, dim, dtype, arch)
    cols = config.sinkhorn_update(batch, m, dim, dtype, arch)
    n_padded, m_padded = _padded(n, rows), _padded(m, cols)
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
    clouds = _clouds(x, y, n_padded, m_padded, rows)
    weights, log_a, log_b, eps = (
        _pad(a, n_padded),
        _log2(a, n_padded),
        _log2(b, m_padded),
        eps.contiguous(),
    )
    # Iteration k (from 0) writes f[k % 2]; the infinities before it make its residual infinite.
    f = x.new_full((2, batch, n_padded), torch.inf)
    g = x.new_zeros((batch, m_padded)) if g0 is None else _pad(g0, m_padded)
    partials = n_padded // rows["BLOCK_M"]
    partial = x.new_zeros((batch, partials))
    residual = x.new_full((batch,), torch.inf)
    iterations = torch.zeros_like(residual, dtype=torch.int64)
    limit = x.new_full((1,), -1.0 if tol is None else tol)
    scale, euclidean = _COST_SCALE[cost], cost == _EUCLIDEAN

    def update_rows(k: int) -> None:
        sinkhorn_row_kernel[(batch * partials,)](
            *(*clouds.pointers, weights, log_b, eps, g, f[(k + 1) % 2], f[k % 2]),
            *(partial, residual, limit, *clouds.shape, scale),
            EUCLIDEAN=euclidean,
            **rows,
        )

    with _on(x.device):
        for k in range(max_iter):
            update_rows(k)
            sinkhorn_column_kernel[(batch * (m_padded // cols["BLOCK_M"]),)](
                *(*clouds.pointers, log_a, eps, f[k % 2], g),
                *(partial, residual, iterations, limit, *clouds.shape, partials, scale),
                EUCLIDEAN=euclidean,
                **cols,
            )
        update_rows(max_iter)
    residual = torch.where(residual <= limit, residual, partial.sum(1))
    converged = residual <= (limit if tol is not None else 1e-3)
    last = torch.where((iterations % 2 == 1)[:, None], f[0], f[1])[:, :n].contiguous()
    g = g[:, :m].clone()
    value = (a * last).sum(1) + (b * g).sum(1)
    return last, g, value, residual, iterations, converged


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
    near_only: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the product: `v [B, M, K]` for transport, None for the gradient."""
    dtype, arch = _dtype(x), _architecture(x.device)
    gradient = v is None
    batch, n, dim = x.shape
    m = y.shape[1]
    width = dim if v is None else v.shape[2]
    options = {"gradient": gradient, "near_only": near_only}
    launch = config.sinkhorn_apply(batch, n, dim, width, dtype, arch, **options)
    n_padded, m_padded = _padded(n, launch), _padded(m, launch)
    if batch == 0:
        return x.new_empty((0, n, width)), x.new_empty((0, n))
    clouds = _clouds(x, y, n_padded, m_padded, launch)
    if v is None:
        values = clouds.y_centred if launch["DOT_V"] else clouds.y
        width = clouds.shape[2]
    else:
        _check_offsets("v", v, m_padded, launch)
        values = torch.nn.functional.pad(v, (0, 0, 0, m_padded - m)).contiguous()
    out = x.new_empty((batch, n_padded, width))
    mass = x.new_empty((batch, n_padded))
    weights = f if a is None else _pad(a, n_padded)
    # Without mass in padded rows nothing overflows there.
    f, g = _pad(f, n_padded, -torch.inf), _pad(g, m_padded)
    grid = (batch * (n_padded // launch["BLOCK_M"]), -(-width // launch["BLOCK_K"]))
    with _on(x.device):
        sinkhorn_apply_kernel[grid](
            *(*clouds.pointers, f, g, weights, _log2(b, m_padded), eps.contiguous()),
            *(values, out, mass, *clouds.shape, width, _COST_SCALE[cost]),
            GRADIENT=gradient,
            EUCLIDEAN=cost == _EUCLIDEAN,
            **launch,
        )
    return out[:, :n], mass[:, :n]


@torch.library.custom_op(
    "fewstep_triton::sinkhorn_transport",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor f, Tensor g, Tensor b, Tensor eps, Tensor v, int cost)"
    " -> (Tensor out, Tensor mass)",
)
def sinkhorn_transport(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, v: Tensor, cost: int
) -> tuple[Tensor, Tensor]:
    """`sum_j p_ij v_j [B, N, K]` and `sum_j p_ij [B, N]`."""
    width = v.shape[2]
    # The mass is wanted of an empty v too.
    v = v if width > 0 else v.new_zeros((*v.shape[:2], 1))
    out, mass = _apply(x, y, f, g, None, b, eps, v, cost, False)
    return out[..., :width].contiguous(), mass.contiguous()


@torch.library.custom_op(
    "fewstep_triton::sinkhorn_grad",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor f, Tensor g, Tensor a, Tensor b, Tensor eps, int cost)"
    " -> Tensor",
)
def sinkhorn_grad(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor, cost: int
) -> Tensor:
    """`sum_j a_i p_ij dC_ij/dx_i [B, N, D]`."""
    dim = x.shape[2]
    out, _ = _apply(x, y, f, g, a, b, eps, None, cost, False)
    if cost == _EUCLIDEAN and config.uses_dot(dim, _dtype(x)):
        out = out + _apply(x, y, f, g, a, b, eps, None, cost, True)[0]
    return out[..., :dim].contiguous()
