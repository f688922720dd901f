"""Dual numbers through norms in Triton, with the schemas and bits of the C++ ops.

The registered ops are in the namespace `fewstep_triton`. Nothing is summed by atomics: the same
bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import architecture, dtype_name, expect, on
from .stack import (
    Both,
    count_of,
    empty_pair,
    halves,
    pair_like,
    pair_of,
    row_of,
    shift_of,
    tangents_of,
)


@triton.jit
def _normal_row(
    Z,
    Shift,
    row,
    cols,
    n,
    period,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """`x^` `[BN]`, 0 beyond n, and r of a row of the primal."""
    mask = cols < n
    x = tl.load(Z + row * n + cols, mask=mask, other=0.0)
    if SHIFT:
        x += tl.load(Shift + row % period * n + cols, mask=mask, other=0.0)
    if CENTRED:
        x = tl.where(mask, x - tl.sum(x, 0) / n, 0.0)
    r = 1 / tl.sqrt(tl.sum(x * x, 0) / n + EPS)
    return x * r, r


@triton.jit
def _means(v, normal, n, CENTRED: tl.constexpr):
    """Of v, 0 where not CENTRED, and of `x^ v`."""
    plain = tl.sum(v, 0) / n if CENTRED else tl.sum(v * 0, 0)
    return plain, tl.sum(normal * v, 0) / n


@triton.jit
def dual_norm_kernel(
    Z,
    U,
    Shift,
    Weight,
    Bias,
    Out,
    Out_u,
    rows,
    n,
    groups,
    tangents,
    period,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    SHIFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`w x^ + b` and `w r (u_k - mean u_k - x^ mean(x^ u_k))` of a row of n, one a program.

    `Z` and `Out` are `[rows, n]`, `U` and `Out_u` `[K, rows, n]` of a dtype of their own, `Weight`
    and `Bias` `[groups, n]` for `row % groups`.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    normal, r = _normal_row(Z, Shift, row, cols, n, period, EPS, CENTRED, SHIFT)
    w = normal * 0 + 1
    if WEIGHT:
        w = tl.load(Weight + row % groups * n + cols, mask=mask, other=0.0)
    out = normal * w
    if BIAS:
        out += tl.load(Bias + row % groups * n + cols, mask=mask, other=0.0)
    tl.store(Out + row * n + cols, out, mask=mask)
    at = row
    for _ in range(tangents):
        u = tl.load(U + at * n + cols, mask=mask, other=0.0).to(normal.dtype)
        plain, along = _means(u, normal, n, CENTRED)
        tl.store(Out_u + at * n + cols, w * r * (u - plain - normal * along), mask=mask)
        at += rows


@triton.jit
def dual_norm_backward_kernel(
    Z,
    U,
    Shift,
    Weight,
    G,
    Grad_u,
    Out,
    Out_u,
    Sum_w,
    Sum_b,
    rows,
    n,
    groups,
    tangents,
    period,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    SHIFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of `dual_norm_kernel`: program (group, part) has that group of every
    `programs`-th sample and writes its sums `[part, group, n]` for weight and bias.

    `P v = r (v - mean v - x^ mean(x^ v))` is the symmetric Jacobian of x^: tangents get `P(w g_k)`;
    the primal gains `-r (x^ <w g_k, P u_k> / n + mean(x^ u) P(w g_k) + mean(x^ w g_k) P(u_k))`.
    """
    group = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    zero = tl.load(Z + cols, mask=cols < 0, other=0.0)
    w = zero + 1
    if WEIGHT:
        w = tl.load(Weight + group * n + cols, mask=mask, other=0.0)
    sum_w = zero
    sum_b = zero
    sample = part
    while sample < rows // groups:
        row = sample * groups + group
        normal, r = _normal_row(Z, Shift, row, cols, n, period, EPS, CENTRED, SHIFT)
        g = tl.load(G + row * n + cols, mask=mask, other=0.0)
        sum_w += g * normal
        sum_b += g
        plain, along = _means(w * g, normal, n, CENTRED)
        out = r * (w * g - plain - normal * along)
        at = row
        for _ in range(tangents):
            u = tl.load(U + at * n + cols, mask=mask, other=0.0).to(normal.dtype)
            gk = tl.load(Grad_u + at * n + cols, mask=mask, other=0.0).to(normal.dtype)
            u_plain, u_along = _means(u, normal, n, CENTRED)
            g_plain, g_along = _means(w * gk, normal, n, CENTRED)
            inner = tl.sum(w * gk * u, 0) / n - g_plain * u_plain - g_along * u_along
            pu = r * (u - u_plain - normal * u_along)
            pg = r * (w * gk - g_plain - normal * g_along)
            tl.store(Out_u + at * n + cols, pg, mask=mask)
            sum_w += gk * pu
            out -= r * (r * inner * normal + u_along * pg + g_along * pu)
            at += rows
        tl.store(Out + row * n + cols, out, mask=mask)
        sample += tl.num_programs(1)
    to = (part * groups + group) * n + cols
    tl.store(Sum_w + to, sum_w, mask=mask)
    tl.store(Sum_b + to, sum_b, mask=mask)


def _normed(
    z: Both,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Both,
    tangents: int,
    width: int,
    groups: int,
    centred: bool,
    eps: float,
) -> None:
    first = z[0]
    assert first is not None
    if first.numel() == 0:
        return
    n = width // groups
    rows = first.numel() // n
    shift = shift_of(shift, first, first.numel(), row=n)
    weight, bias = (expect("dual_norm", "weight", w, first, width) for w in (weight, bias))
    launch = config.dual_norm(n, dtype_name("dual_norm", first), architecture(first.device))
    with on(first.device):
        dual_norm_kernel[(rows,)](
            *(first if t is None else t for t in (*z, shift, weight, bias, *out)),
            *(rows, n, groups, tangents, 1 if shift is None else shift.numel() // n),
            EPS=eps,
            CENTRED=centred,
            SHIFT=shift is not None,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            **launch,
        )


@torch.library.custom_op(
    "fewstep_triton::dual_norm",
    mutates_args=(),
    schema="(Tensor z, Tensor? shift, Tensor? weight, Tensor? bias, int tangents, int groups, "
    "bool centred, float eps) -> Tensor",
)
def dual_norm(
    z: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tangents: int,
    groups: int,
    centred: bool,
    eps: float,
) -> Tensor:
    """See `fewstep.reference.dual.norm`; rows of up to `config.LONGEST_ROW`."""
    out = z.new_empty(z.shape)
    count, width = count_of(z, tangents), groups * row_of(z, groups)
    z = z.contiguous()
    own, made = halves(z, count), halves(out, count)
    _normed(own, shift, weight, bias, made, tangents, width, groups, centred, eps)
    return out


@torch.library.custom_op(
    "fewstep_triton::dual_norm_pair",
    mutates_args=(),
    schema="(Tensor z, Tensor u, Tensor? shift, Tensor? weight, Tensor? bias, int groups, "
    "bool centred, float eps) -> (Tensor a, Tensor t)",
)
def dual_norm_pair(
    z: Tensor,
    u: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `fewstep.reference.dual.norm_pair`."""
    out = empty_pair(z, u)
    z, u = pair_of(z, u)
    sizes = (tangents_of(z, u), groups * row_of(z, groups), groups)
    _normed((z, u), shift, weight, bias, out, *sizes, centred, eps)
    return out


def _normed_backward(
    g: Both,
    z: Both,
    shift: Tensor | None,
    weight: Tensor | None,
    out: Both,
    tangents: int,
    width: int,
    groups: int,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients for weight and bias; for z into `out`."""
    first = z[0]
    assert first is not None
    if first.numel() == 0:
        return first.new_zeros(width), first.new_zeros(width)
    n = width // groups
    rows = first.numel() // n
    shift = shift_of(shift, first, first.numel(), row=n)
    weight = expect("dual_norm", "weight", weight, first, width)
    parts = config.dual_norm_parts(rows // groups)
    sums = first.new_empty((2, parts, width))
    launch = config.dual_norm(n, dtype_name("dual_norm", first), architecture(first.device))
    with on(first.device):
        dual_norm_backward_kernel[(groups, parts)](
            *(first if t is None else t for t in (*z, shift, weight, *g, *out)),
            *(sums[0], sums[1], rows, n, groups, tangents),
            1 if shift is None else shift.numel() // n,
            EPS=eps,
            CENTRED=centred,
            SHIFT=shift is not None,
            WEIGHT=weight is not None,
            **launch,
        )
    gw, gb = sums.sum(1)
    return gw.clone(), gb.clone()


@torch.library.custom_op(
    "fewstep_triton::dual_norm_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor z, Tensor? shift, Tensor? weight, int tangents, int groups, "
    "bool centred, float eps) -> (Tensor gz, Tensor gw, Tensor gb)",
)
def dual_norm_backward(
    g: Tensor,
    z: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    tangents: int,
    groups: int,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for z, and for weight and bias `[groups n]`."""
    out = z.new_empty(z.shape)
    count, width = count_of(z, tangents), groups * row_of(z, groups)
    z, g = z.contiguous(), expect("dual_norm", "g", g, z, z.numel())
    both, own, made = (halves(t, count) for t in (g, z, out))
    options = (tangents, width, groups, centred, eps)
    return out, *_normed_backward(both, own, shift, weight, made, *options)


@torch.library.custom_op(
    "fewstep_triton::dual_norm_pair_backward",
    mutates_args=(),
    schema="(Tensor ga, Tensor gt, Tensor z, Tensor u, Tensor? shift, Tensor? weight, int groups, "
    "bool centred, float eps) -> (Tensor gz, Tensor gu, Tensor gw, Tensor gb)",
)
def dual_norm_pair_backward(
    ga: Tensor,
    gt: Tensor,
    z: Tensor,
    u: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    groups: int,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for z and u, and for weight and bias `[groups n]`."""
    out = empty_pair(z, u)
    z, u = pair_of(z, u)
    ga, gt = pair_like(ga, gt, z, u)
    options = (tangents_of(z, u), groups * row_of(z, groups), groups, centred, eps)
    return *out, *_normed_backward((ga, gt), (z, u), shift, weight, out, *options)
