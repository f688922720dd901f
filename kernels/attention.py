"""Attention of dual numbers in Triton, with the schemas of the C++ ops.

A program has one tangent beside its primal, some rows of a head (or columns of a group), and some
columns of the results; more of either are more programs, which compute the scores again. Nothing is
summed by atomics: the same bits in every run. The registered ops are in `fewstep_triton`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import architecture, dtype_name, expect, on, refuse_unless

LOG2E = tl.constexpr(1.4426950408889634)
_OP = "dual_attention"
# Numbers of a call that a kernel is not compiled anew for.
_RUN_TIME = ("batch", "heads", "groups", "n", "m", "stride_b", "stride_h", "stride_n")


@triton.jit
def _tile(At, rows, rows_left, cols, width):
    """`[BR, BC]` of a matrix with rows of `width`; 0 beyond it."""
    inside = (rows[:, None] < rows_left) & (cols[None, :] < width)
    return tl.load(At + rows[:, None] * width + cols[None, :], mask=inside, other=0.0)


@triton.jit
def _times(a, b, total, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """`total + a b'`, or with TURNED `total + b a'`."""
    if TURNED:
        total = tl.dot(b, tl.trans(a), total, PRECISION, out_dtype=total.dtype)
    else:
        total = tl.dot(a, tl.trans(b), total, PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def _scores(
    Queries,
    Keys,
    Tq,
    Tk,
    rows,
    cols,
    n,
    m,
    d,
    zeros,
    SCALE: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`q k'` in units of ln 2 and `dq k' + q dk'`, scaled: `[BM, BN]`, or with TURNED `[BN, BM]`.

    n and m are the rows and columns that are left from the pointers on.
    """
    z, x = zeros, zeros
    for start in range(0, d, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D)
        q = _tile(Queries, rows, n, ds, d)
        k = _tile(Keys, cols, m, ds, d)
        z = _times(q, k, z, TURNED, PRECISION)
        if TQ:
            x = _times(_tile(Tq, rows, n, ds, d), k, x, TURNED, PRECISION)
        if TK:
            x = _times(q, _tile(Tk, cols, m, ds, d), x, TURNED, PRECISION)
    return z * (SCALE * LOG2E), x * SCALE


@triton.jit
def _masked(
    z,
    Mask,
    rows,
    cols,
    first,
    start,
    n,
    m,
    stride_n,
    stride_m,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """Scores with the mask added, -inf where a row does not attend; columns go along REDUCE.

    `Mask` points to row `first` and column `start` of a head, bool where MASK is 1, added where 2.
    """
    row, col = tl.expand_dims(rows, REDUCE), tl.expand_dims(cols, 1 - REDUCE)
    keep = (start + col < m) & (first + row < n)
    if MASK > 0:
        offsets = row.to(tl.int64) * stride_n + col.to(tl.int64) * stride_m
        if MASK == 1:
            keep = keep & (tl.load(Mask + offsets, mask=keep, other=0) != 0)
        else:
            z += tl.load(Mask + offsets, mask=keep, other=0.0) * LOG2E
    if CAUSAL:
        keep = keep & (start + col <= first + row)
    return tl.where(keep, z, float("-inf"))


@triton.jit
def _weighed(p, x):
    """`p x`, and 0 where p is: what is masked out counts for nothing, NaN too."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit(do_not_specialize=_RUN_TIME)
def dual_attention_kernel(
    Queries,
    Keys,
    Values,
    Tq,
    Tk,
    Tv,
    Mask,
    Out,
    Out_t,
    Lse,
    Mean,
    batch,
    heads,
    groups,
    n,
    m,
    d,
    dv,
    stride_b,
    stride_h,
    stride_n,
    stride_m,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    TANGENTS: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    TV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The output, the tangent `program_id(1)`, log2 of the sum of e^s, and r, as in
    `fewstep.reference.attention`; columns from `program_id(2) * BLOCK_W`."""
    blocks = (n + BLOCK_M - 1) // BLOCK_M
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_M
    tangent = tl.program_id(1).to(tl.int64)
    group = head // heads * groups + head % heads // (heads // groups)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    ws = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    at = head * n + first
    at_t = tangent * batch * heads * n + at
    at_k = group * m
    at_tk = tangent * batch * groups * m + at_k
    Mask += head // heads * stride_b + head % heads * stride_h + first.to(tl.int64) * stride_n
    dtype = Queries.dtype.element_ty
    top = tl.full([BLOCK_M], float("-inf"), dtype)
    total = tl.full([BLOCK_M], 0.0, dtype)
    mean = tl.full([BLOCK_M], 0.0, dtype)
    out = tl.zeros([BLOCK_M, BLOCK_W], dtype)
    moved = tl.zeros([BLOCK_M, BLOCK_W], dtype)
    last = tl.minimum(first + BLOCK_M, m) if CAUSAL else m
    for start in range(0, last, BLOCK_N):
        here, here_t = at_k + start, at_tk + start
        z, x = _scores(
            *(Queries + at * d, Keys + here * d, Tq + at_t * d, Tk + here_t * d),
            *(rows, cols, n - first, m - start, d, tl.zeros([BLOCK_M, BLOCK_N], dtype)),
            *(SCALE, TQ, TK, False, PRECISION, BLOCK_D),
        )
        z = _masked(
            *(z, Mask + (here - at_k) * stride_m, rows, cols, first, start),
            *(n, m, stride_n, stride_m, CAUSAL, MASK, 1),
        )
        new_top = tl.maximum(top, tl.max(z, 1))
        # While a row has attended to nothing its top is -inf, and -inf - -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        factor = tl.exp2(top - shift)
        top = new_top
        p = tl.exp2(z - shift[:, None])
        total = total * factor + tl.sum(p, 1)
        v = _tile(Values + here * dv, cols, m - start, ws, dv)  # [BN, BW]
        out = tl.dot(p, v, out * factor[:, None], PRECISION, out_dtype=dtype)
        if TANGENTS:
            moved *= factor[:, None]
            if TQ or TK:
                x = _weighed(p, x)
                mean = mean * factor + tl.sum(x, 1)
                moved = tl.dot(x, v, moved, PRECISION, out_dtype=dtype)
            if TV:
                t = _tile(Tv + here_t * dv, cols, m - start, ws, dv)
                moved = tl.dot(p, t, moved, PRECISION, out_dtype=dtype)
    inverse = tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))
    out *= inverse[:, None]
    mean *= inverse
    offsets = rows[:, None] * dv + ws[None, :]
    inside = (first + rows < n)[:, None] & (ws[None, :] < dv)
    if tl.program_id(1) == 0:
        tl.store(Out + at * dv + offsets, out, mask=inside)
    if TANGENTS:
        moved = moved * inverse[:, None] - mean[:, None] * out
        tl.store(Out_t + at_t * dv + offsets, moved, mask=inside)
    if tl.program_id(2) == 0:
        if tl.program_id(1) == 0:
            lse = tl.where(
                total == 0, float("inf"), top + tl.log2(tl.where(total == 0, 1.0, total))
            )
            tl.store(Lse + at + rows, lse, mask=first + rows < n)
        if TANGENTS:
            tl.store(Mean + at_t + rows, mean, mask=first + rows < n)


@triton.jit
def _pulled(
    Queries,
    Keys,
    Values,
    Tq,
    Tk,
    Tv,
    Mask,
    Grad,
    Grad_t,
    Lse,
    Mean,
    Delta,
    Along,
    rows,
    cols,
    first,
    start,
    own,
    n,
    m,
    d,
    dv,
    stride_n,
    stride_m,
    zeros,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    TANGENTS: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    TV: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of a tile p, `p (ds - r)`, and the gradients for s and for ds, of one tangent.

    Pointers are to row `first` and column `start`. A tangent's part in the gradient for s is
    `p (go v' + gt dv' + (ds - r) gt v' - ds <gt, o> - delta)`, and for ds `p (gt v' - <gt, o>)`;
    go counts for `own` rows.
    """
    REDUCE: tl.constexpr = 0 if TURNED else 1
    left, left_k = n - first, m - start
    z, x = _scores(
        *(Queries, Keys, Tq, Tk, rows, cols, left, left_k, d, zeros),
        *(SCALE, TQ, TK, TURNED, PRECISION, BLOCK_D),
    )
    z = _masked(z, Mask, rows, cols, first, start, n, m, stride_n, stride_m, CAUSAL, MASK, REDUCE)
    lse = tl.load(Lse + rows, mask=rows < left, other=float("inf"))
    p = tl.exp2(z - tl.expand_dims(lse, REDUCE))
    b, a = zeros, zeros
    for begin in range(0, dv, BLOCK_D):
        ds = begin + tl.arange(0, BLOCK_D)
        v = _tile(Values, cols, left_k, ds, dv)
        b = _times(_tile(Grad, rows, own, ds, dv), v, b, TURNED, PRECISION)
        if TANGENTS:
            g = _tile(Grad_t, rows, left, ds, dv)
            if TQ or TK:
                a = _times(g, v, a, TURNED, PRECISION)
            if TV:
                b = _times(g, _tile(Tv, cols, left_k, ds, dv), b, TURNED, PRECISION)
    if TQ or TK:
        mean = tl.expand_dims(tl.load(Mean + rows, mask=rows < left, other=0.0), REDUCE)
        along = tl.expand_dims(tl.load(Along + rows, mask=rows < left, other=0.0), REDUCE)
        b += (x - mean) * a - x * along
        x = _weighed(p, x - mean)
        a = _weighed(p, a - along)
    delta = tl.load(Delta + rows, mask=rows < left, other=0.0)
    return p, x, _weighed(p, b - tl.expand_dims(delta, REDUCE)), a


@triton.jit(do_not_specialize=_RUN_TIME)
def dual_attention_rows_kernel(
    Queries,
    Keys,
    Values,
    Tq,
    Tk,
    Tv,
    Mask,
    Grad,
    Grad_t,
    Lse,
    Mean,
    Delta,
    Along,
    Out,
    Out_t,
    batch,
    heads,
    groups,
    n,
    m,
    d,
    dv,
    stride_b,
    stride_h,
    stride_n,
    stride_m,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    TANGENTS: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    TV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A tangent's part of the gradient for q, and the gradient for it; see `dual_attention_kernel`.

    The part of the output's own gradient is with the first tangent.
    """
    blocks = (n + BLOCK_M - 1) // BLOCK_M
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_M
    tangent = tl.program_id(1).to(tl.int64)
    group = head // heads * groups + head % heads // (heads // groups)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    ws = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    at = head * n + first
    at_t = tangent * batch * heads * n + at
    at_k = group * m
    at_tk = tangent * batch * groups * m + at_k
    Mask += head // heads * stride_b + head % heads * stride_h + first.to(tl.int64) * stride_n
    dtype = Queries.dtype.element_ty
    gq = tl.zeros([BLOCK_M, BLOCK_W], dtype)
    gt = tl.zeros([BLOCK_M, BLOCK_W], dtype)
    own = tl.where(tl.program_id(1) == 0, n - first, 0)
    last = tl.minimum(first + BLOCK_M, m) if CAUSAL else m
    for start in range(0, last, BLOCK_N):
        here, here_t = at_k + start, at_tk + start
        _, _, b, a = _pulled(
            *(Queries + at * d, Keys + here * d, Values + here * dv),
            *(Tq + at_t * d, Tk + here_t * d, Tv + here_t * dv, Mask + (here - at_k) * stride_m),
            *(Grad + at * dv, Grad_t + at_t * dv, Lse + at, Mean + at_t),
            *(Delta + at_t, Along + at_t, rows, cols, first, start, own, n, m, d, dv),
            *(stride_n, stride_m, tl.zeros([BLOCK_M, BLOCK_N], dtype), SCALE, CAUSAL, MASK),
            *(TANGENTS, TQ, TK, TV, False, PRECISION, BLOCK_D),
        )
        k = _tile(Keys + here * d, cols, m - start, ws, d)  # [BN, BW]
        gq = tl.dot(b, k, gq, PRECISION, out_dtype=dtype)
        if TQ:
            gt = tl.dot(a, k, gt, PRECISION, out_dtype=dtype)
        if TK:
            t = _tile(Tk + here_t * d, cols, m - start, ws, d)
            gq = tl.dot(a, t, gq, PRECISION, out_dtype=dtype)
    offsets = at_t * d + (rows[:, None] * d + ws[None, :])
    inside = (first + rows < n)[:, None] & (ws[None, :] < d)
    tl.store(Out + offsets, gq * SCALE, mask=inside)
    if TQ:
        tl.store(Out_t + offsets, gt * SCALE, mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def dual_attention_columns_kernel(
    Queries,
    Keys,
    Values,
    Tq,
    Tk,
    Tv,
    Mask,
    Grad,
    Grad_t,
    Lse,
    Mean,
    Delta,
    Along,
    Out_k,
    Out_v,
    Out_tk,
    Out_tv,
    batch,
    heads,
    groups,
    n,
    m,
    d,
    dv,
    stride_b,
    stride_h,
    stride_n,
    stride_m,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    TANGENTS: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    TV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The same for k and v, over all heads of a group."""
    blocks = (m + BLOCK_N - 1) // BLOCK_N
    group = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK_N
    tangent = tl.program_id(1).to(tl.int64)
    shared = heads // groups
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    ws = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    at_k = group * m + start
    at_tk = tangent * batch * groups * m + at_k
    dtype = Queries.dtype.element_ty
    gk = tl.zeros([BLOCK_N, BLOCK_W], dtype)
    gv = tl.zeros([BLOCK_N, BLOCK_W], dtype)
    gtk = tl.zeros([BLOCK_N, BLOCK_W], dtype)
    gtv = tl.zeros([BLOCK_N, BLOCK_W], dtype)
    begin = start // BLOCK_M if CAUSAL else 0
    steps = tl.maximum((n + BLOCK_M - 1) // BLOCK_M - begin, 0)  # blocks of rows of a head
    for step in range(shared * steps):
        head = group // groups * heads + group % groups * shared + step // steps
        first = (begin + step % steps) * BLOCK_M
        at = head * n + first
        at_t = tangent * batch * heads * n + at
        own = tl.where(tl.program_id(1) == 0, n - first, 0)
        sample = Mask + head // heads * stride_b + head % heads * stride_h
        there = sample + first.to(tl.int64) * stride_n + start.to(tl.int64) * stride_m
        p, x, b, a = _pulled(
            *(Queries + at * d, Keys + at_k * d, Values + at_k * dv),
            *(Tq + at_t * d, Tk + at_tk * d, Tv + at_tk * dv, there),
            *(Grad + at * dv, Grad_t + at_t * dv, Lse + at, Mean + at_t),
            *(Delta + at_t, Along + at_t, rows, cols, first, start, own, n, m, d, dv),
            *(stride_n, stride_m, tl.zeros([BLOCK_N, BLOCK_M], dtype), SCALE, CAUSAL, MASK),
            *(TANGENTS, TQ, TK, TV, True, PRECISION, BLOCK_D),
        )
        left = n - first
        q = _tile(Queries + at * d, rows, left, ws, d)  # [BM, BW]
        gk = tl.dot(b, q, gk, PRECISION, out_dtype=dtype)
        g = _tile(Grad + at * dv, rows, own, ws, dv)
        gv = tl.dot(p, g, gv, PRECISION, out_dtype=dtype)
        if TK:
            gtk = tl.dot(a, q, gtk, PRECISION, out_dtype=dtype)
        if TQ:
            t = _tile(Tq + at_t * d, rows, left, ws, d)
            gk = tl.dot(a, t, gk, PRECISION, out_dtype=dtype)
        if TANGENTS:
            g = _tile(Grad_t + at_t * dv, rows, left, ws, dv)
            if TQ or TK:
                gv = tl.dot(x, g, gv, PRECISION, out_dtype=dtype)
            if TV:
                gtv = tl.dot(p, g, gtv, PRECISION, out_dtype=dtype)
    for_k = cols[:, None] * d + ws[None, :]
    for_v = cols[:, None] * dv + ws[None, :]
    inside_k = (start + cols < m)[:, None] & (ws[None, :] < d)
    inside_v = (start + cols < m)[:, None] & (ws[None, :] < dv)
    tl.store(Out_k + at_tk * d + for_k, gk * SCALE, mask=inside_k)
    tl.store(Out_v + at_tk * dv + for_v, gv, mask=inside_v)
    if TK:
        tl.store(Out_tk + at_tk * d + for_k, gtk * SCALE, mask=inside_k)
    if TV:
        tl.store(Out_tv + at_tk * dv + for_v, gtv, mask=inside_v)


class _Call(NamedTuple):
    """Tensors as the kernels read them, sizes and strides, and constants.

    Attributes:
        tensors: q, k, v, their tangents and the mask; q for what is not there.
        sizes: batch, heads, groups, n, m, d, dv and the strides of the mask.
    """

    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    flags: dict[str, Any]


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    moves: tuple[Tensor | None, ...],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    tangents: int,
) -> _Call:
    dtype_name(_OP, q)
    whole = q.ndim == k.ndim == v.ndim == 4 and tangents >= 0
    refuse_unless(whole, _OP, "q, k and v must be [B, H, N, D], tangents at least 0")
    batch, heads, n, d = q.shape
    groups, m, dv = k.shape[1], k.shape[2], v.shape[3]
    matched = k.shape == (batch, groups, m, d) and v.shape == (batch, groups, m, dv)
    refuse_unless(matched, _OP, "shapes of q, k and v do not match")
    whole = heads % groups == 0 if groups else heads == 0
    refuse_unless(whole, _OP, f"{heads} heads cannot share {groups} of keys")
    own = [expect(_OP, name, t, q, t.numel()) for name, t in (("q", q), ("k", k), ("v", v))]
    named = zip(("tq", "tk", "tv"), moves, own, strict=True)
    moved = [expect(_OP, name, t, q, tangents * of.numel()) for name, t, of in named]
    strides = [0, 0, 0, 0]
    if mask is not None:
        sizes = (batch, heads, n, m)
        fits = mask.ndim == 4 and mask.device == q.device and mask.dtype in (torch.bool, q.dtype)
        fits = fits and all(a in (1, b) for a, b in zip(mask.shape, sizes, strict=True))
        refuse_unless(fits, _OP, f"mask must be bool or {q.dtype}, and broadcast with {sizes}")
        strides = [0 if a == 1 else s for a, s in zip(mask.shape, mask.stride(), strict=True)]
    there = [t is not None and tangents > 0 for t in moved]
    flags = {
        "SCALE": scale,
        "CAUSAL": causal,
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        "TANGENTS": tangents > 0,
        **dict(zip(("TQ", "TK", "TV"), there, strict=True)),
    }
    tensors = (*own, *(own[0] if t is None else t for t in (*moved, mask)))
    return _Call(tensors, (batch, heads, groups, n, m, d, dv, *strides), flags)


def _launch(call: _Call, kernel: Any, tensors: tuple[Tensor, ...], tangents: int) -> None:
    """A kernel over blocks of rows of all heads, or of columns of all groups."""
    batch, heads, groups, n, m, d, dv, *_ = call.sizes
    q = call.tensors[0]
    columns, forward = kernel is dual_attention_columns_kernel, kernel is dual_attention_kernel
    width = dv if forward else max(d, dv) if columns else d
    launch = config.dual_attention(width, dtype_name(_OP, q), architecture(q.device))
    blocks = (groups, m, "BLOCK_N") if columns else (heads, n, "BLOCK_M")
    count = batch * blocks[0] * triton.cdiv(blocks[1], launch[blocks[2]])
    if count == 0:
        return
    grid = (count, max(tangents, 1), max(triton.cdiv(width, launch["BLOCK_W"]), 1))
    with on(q.device):
        kernel[grid](*call.tensors, *tensors, *call.sizes, **call.flags, **launch)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? mask"


@torch.library.custom_op(
    "fewstep_triton::dual_attention",
    mutates_args=(),
    schema=f"({_INPUTS}, bool causal, float scale, int tangents, bool constant) -> "
    "(Tensor out, Tensor moved, Tensor lse, Tensor mean)",
)
def dual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    tangents: int,
    constant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fewstep.reference.attention`; and what backward keeps of a row."""
    call = _call(q, k, v, (tq, tk, tv), mask, causal, scale, tangents)
    rows = q.shape[:3]
    out, moved = (q.new_empty((*lead, *rows, v.shape[3])) for lead in ((), (tangents,)))
    lse, mean = (q.new_empty((*lead, *rows)) for lead in ((), (tangents,)))
    _launch(call, dual_attention_kernel, (out, moved, lse, mean), tangents)
    return out, moved, lse, mean


@torch.library.custom_op(
    "fewstep_triton::dual_attention_backward",
    mutates_args=(),
    schema=f"(Tensor go, Tensor? gt, {_INPUTS}, Tensor out, Tensor? moved, Tensor lse, "
    "Tensor? mean, bool causal, float scale, int tangents) -> "
    "(Tensor gq, Tensor gk, Tensor gv, Tensor gtq, Tensor gtk, Tensor gtv)",
)
def dual_attention_backward(
    go: Tensor,
    gt: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    moved: Tensor | None,
    lse: Tensor,
    mean: Tensor | None,
    causal: bool,
    scale: float,
    tangents: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k, v and their tangents, empty for those that are not there."""
    call = _call(q, k, v, (tq, tk, tv), mask, causal, scale, tangents)
    rows = q.shape[:3].numel()
    own = rows * v.shape[3]
    go, out = expect(_OP, "go", go, q, own), expect(_OP, "out", out, q, own)
    lse = expect(_OP, "lse", lse, q, rows)
    delta, along = (go * out).sum(-1)[None], lse
    if tangents == 0:
        gt = mean = go
    else:
        given = gt is not None and moved is not None and mean is not None
        refuse_unless(given, _OP, "tangents need gt, moved and mean")
        gt = expect(_OP, "gt", gt, q, tangents * own)
        moved = expect(_OP, "moved", moved, q, tangents * own)
        mean = expect(_OP, "mean", mean, q, tangents * rows)
        along = (gt * out).sum(-1)
        # Of each tangent its part; that of the output is with the first.
        part = (gt * moved).sum(-1) - mean * along
        delta = torch.cat((part[:1] + delta, part[1:]))
    parts = max(tangents, 1)
    gq, gk, gv = (t.new_empty((parts, *t.shape)) for t in (q, k, v))
    gtq, gtk, gtv = (
        t.new_empty((tangents, *t.shape) if there is not None else (0,))
        for t, there in ((q, tq), (k, tk), (v, tv))
    )
    kept = (go, gt, lse, mean, delta, along)
    _launch(call, dual_attention_rows_kernel, (*kept, gq, gtq), tangents)
    _launch(call, dual_attention_columns_kernel, (*kept, gk, gv, gtk, gtv), tangents)
    gq, gk, gv = (g.sum(0) if parts > 1 else g[0] for g in (gq, gk, gv))
    return gq, gk, gv, gtq, gtk, gtv
