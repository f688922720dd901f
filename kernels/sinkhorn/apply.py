"""Products with a plan, and gradients of the cost under it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..launch import architecture, dtype_name, on
from .layout import check_offsets, cost_flags, cost_numbers, laid_out, log2, pad, padded
from .tiles import LOG2E, NEAR, RUN_TIME, left_out, one_pair, pair_cost, squared_distances


@triton.jit(do_not_specialize=RUN_TIME)
def sinkhorn_apply_kernel(
    clouds,
    F,
    G,
    A,
    Log_b,
    Eps,
    V,
    Out,
    Mass,
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
    N, M, D = clouds.n, clouds.m, clouds.d
    blocks = N // BLOCK_M
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    ks = first + tl.arange(0, BLOCK_K)
    cloud = problem // temperatures
    pair = one_pair(clouds, cloud)
    V += (cloud if GRADIENT else problem) * M * K
    G += problem * M
    Log_b += cloud * M
    points = problem * N + rows
    scale = 1 / tl.load(Eps + problem) * LOG2E
    x2 = tl.expand_dims(tl.load(pair.x2 + rows), REDUCE)
    f = tl.expand_dims(tl.load(F + points), REDUCE)
    # Beyond it only without weight or partner: 0 times an entry, or times their sum, is to be 0.
    highest = (126 if F.dtype.element_ty == tl.float32 else 1022) - tl.log2(M.to(tl.float32))
    mass = tl.full([BLOCK_M], 0.0, F.dtype.element_ty)
    out = tl.zeros([BLOCK_M, BLOCK_K] if OUT_REDUCE else [BLOCK_K, BLOCK_M], F.dtype.element_ty)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = tl.expand_dims(tl.load(G + cols), 1 - REDUCE)
        log_b = tl.expand_dims(tl.load(Log_b + cols), 1 - REDUCE)
        norms = x2 + tl.expand_dims(tl.load(pair.y2 + cols), 1 - REDUCE)
        squared = squared_distances(
            pair,
            rows,
            cols,
            (0.0, 0.0),
            norms,
            EUCLIDEAN and (NEAR_ONLY or not SPLIT),
            DOT,
            PRECISION,
            False,
            BLOCK_D,
        )
        cost = pair_cost(squared, cost_scale, EUCLIDEAN)
        score = (f + g - cost) * scale + log_b
        p = tl.exp2(tl.where(score > highest, highest, score))  # NaN stays
        p = left_out(p, 0.0, rows, cols, diagonal, DIAGONAL, REDUCE)
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
                    x = tl.load(pair.x + (rows * D + k if DOT else k * N + rows))
                    v = tl.expand_dims(x, REDUCE) - v
                part = tl.sum(p * v, REDUCE)
                here = tl.expand_dims(ks == k, 1 - OUT_REDUCE)
                out += tl.where(here, tl.expand_dims(part, OUT_REDUCE), 0.0)
    if GRADIENT:
        if DOT_V:
            offsets = rows[:, None] * D + ks[None, :]
            x = tl.load(pair.x_centred + offsets, mask=ks[None, :] < K, other=0.0)
            out = mass[:, None] * x - out
        a = tl.expand_dims(tl.load(A + cloud * N + rows), OUT_REDUCE)
        out *= a if EUCLIDEAN else (2 * cost_scale) * a
    elif tl.program_id(1) == 0:
        tl.store(Mass + points, mass)
    offsets = tl.expand_dims(points * K, OUT_REDUCE) + tl.expand_dims(ks, 1 - OUT_REDUCE)
    tl.store(Out + offsets, out, mask=tl.expand_dims(ks, 1 - OUT_REDUCE) < K)


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
    clouds = laid_out(x, y, b, n_padded, m_padded, launch)
    if v is None:
        values = clouds.y_centred if launch["DOT_V"] else clouds.y
        width = clouds.d
    else:
        check_offsets("v", v, m_padded, launch)
        values = torch.nn.functional.pad(v, (0, 0, 0, m_padded - m)).contiguous()
    out = x.new_empty((problems, n_padded, width))
    mass = x.new_empty((problems, n_padded))
    if a is not None:  # without weight the plan over a may overflow
        f = torch.where(a.repeat_interleave(problems // batch, 0) == 0, -torch.inf, f)
    weights = f if a is None else pad(a, n_padded)
    # Without mass in padded rows nothing overflows there.
    f, g = pad(f, n_padded, -torch.inf), pad(g, m_padded)
    grid = (problems * (n_padded // launch["BLOCK_M"]), -(-width // launch["BLOCK_K"]))
    with on(x.device):
        sinkhorn_apply_kernel[grid](
            *(clouds, f, g, weights, log2(b, m_padded), eps.contiguous()),
            *(values, out, mass, width, problems // batch, *cost_numbers(cost, diagonal)),
            GRADIENT=gradient,
            **launch,
            **cost_flags(cost, diagonal),
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
    by_dots = config.uses_dot(dim, dtype, config.PRECISIONS[precision])
    if by_dots and cost_flags(cost, diagonal)["EUCLIDEAN"]:
        out = out + _apply(x, y, f, g, a, b, eps, None, *how, True)[0]
    return out[..., :dim].contiguous()
