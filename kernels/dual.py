"""Dual numbers through activations and norms in Triton, with the schemas and bits of the C++ ops.

The registered ops are in the namespace `fewstep_triton`. Nothing is summed by atomics: the same
bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import architecture, dtype_name, expect, on, refuse_unless, row_size

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(z):
    e = tl.exp2(-tl.abs(z) * LOG2E)
    return tl.where(z < 0, e, 1.0) / (1 + e)


@triton.jit
def _tanh(z):
    """`tanh z` and `1 - tanh^2 z`."""
    e = tl.exp2(-2 * tl.abs(z) * LOG2E)
    t = (1 - e) / (1 + e)
    return tl.where(z < 0, -t, t), 4 * e / ((1 + e) * (1 + e))


@triton.jit
def _evaluate(z, BETA: tl.constexpr, THRESHOLD: tl.constexpr, KIND: tl.constexpr):
    """`a(z)`, `a'(z)` and `a''(z)`, kinds in the order of `fewstep.reference.dual.ACTIVATIONS`."""
    if KIND == 0:  # silu
        s = _sigmoid(z)
        c = 1 - s
        a = z * s
        d1 = s + a * c
        d2 = s * c * (2 + z * (c - s))
    elif KIND == 1:  # gelu
        density = 0.3989422804014327 * tl.exp2(z * z * -0.7213475204444817)
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        a = z * cdf
        d1 = cdf + z * density
        d2 = density * (2 - z * z)
    elif KIND == 2:  # gelu_tanh
        u1 = 0.7978845608028654 * (1 + 0.134145 * z * z)
        t, w = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        a = 0.5 * z * (1 + t)
        d1 = 0.5 * (1 + t + z * w * u1)
        d2 = w * (u1 + z * (0.10703222440890037 * z - t * u1 * u1))
    elif KIND == 3:  # tanh
        a, d1 = _tanh(z)
        d2 = -2 * a * d1
    elif KIND == 4:  # softplus
        y = BETA * z
        e = tl.exp2(-tl.abs(y) * LOG2E)
        s = tl.where(y < 0, e, 1.0) / (1 + e)
        far = y > THRESHOLD
        a = tl.where(far, z, tl.maximum(z, 0.0) + tl.log(1 + e) / BETA)
        d1 = tl.where(far, 1.0, s)
        d2 = tl.where(far, 0.0, BETA * s * (1 - s))
    elif KIND == 5:  # relu
        a = tl.where(z < 0, 0.0, z)
        d1 = tl.where(z > 0, 1.0, z * 0)
        d2 = z * 0
    else:  # sigmoid
        a = _sigmoid(z)
        d1 = a * (1 - a)
        d2 = d1 * (1 - 2 * a)
    return a, d1, d2


@triton.jit
def dual_activate_kernel(
    Z,
    U,
    Shared,
    Shift,
    G,
    Grad_u,
    Out,
    Out_u,
    count,
    tangents,
    period,
    channels,
    inner,
    BETA: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KIND: tl.constexpr,
    BACKWARD: tl.constexpr,
    SHARED: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`(a(z), a'(z) t_k)`, or with BACKWARD `(g a' + a'' sum_k g_k t_k, g_k a')`.

    `Z`, `G` and `Out` are `[count]`, `U`, `Grad_u` and `Out_u` `[K, count]` of their own dtype;
    with SHARED the tangents of element e are those of `e % period` in `Shared [K, period]`, and
    backward has none for them. Element e is shifted by `Shift[e / inner % channels]`.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < count
    z = tl.load(Z + e, mask=mask, other=0.0)
    if SHIFT:
        z += tl.load(Shift + e // inner % channels, mask=mask, other=0.0)
    a, d1, d2 = _evaluate(z, BETA, THRESHOLD, KIND)
    second = z * 0
    at = e
    own = Shared + e % period if SHARED else U + e
    for _ in range(tangents):
        t = tl.load(own, mask=mask, other=0.0).to(z.dtype)
        own += period if SHARED else count
        if BACKWARD:
            g = tl.load(Grad_u + at, mask=mask, other=0.0).to(z.dtype)
            second += g * t
            if not SHARED:
                tl.store(Out_u + at, g * d1, mask=mask)
        else:
            tl.store(Out_u + at, d1 * t, mask=mask)
        at += count
    if BACKWARD:
        a = tl.load(G + e, mask=mask, other=0.0) * d1 + second * d2
    tl.store(Out + e, a, mask=mask)


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


KINDS = 7


def _check(z: Tensor, tangents: int, kind: int, inner: int) -> int:
    """Elements of the primal of a stack z, or of a primal z with `tangents` 0."""
    op = "dual"
    dtype_name(op, z)
    refuse_unless(z.ndim >= 1 and tangents >= 0, op, "z must be [(K + 1) B, ...]")
    refuse_unless(z.shape[0] % (tangents + 1) == 0, op, f"z has no {tangents + 1} batches")
    refuse_unless(0 <= kind < KINDS and inner >= 1, op, f"no activation {kind}, inner {inner}")
    return z.numel() // (tangents + 1)


def _shift(shift: Tensor | None, z: Tensor, count: int, inner: int = 1, row: int = 1) -> Any:
    """A shift is repeated until it has shifted `count` elements; of a norm it has whole rows."""
    if shift is None:
        return None
    own = shift.numel()
    whole = count == 0 or (own > 0 and own % row == 0 and count % (own * inner) == 0)
    refuse_unless(whole, "dual", f"a shift of {own} elements for {count}, each {inner} times")
    return expect("dual", "shift", shift, z, own)


def _rows(z: Tensor, groups: int) -> int:
    """Elements of a row."""
    width = row_size(z)
    refuse_unless(groups >= 1 and width % groups == 0, "dual", f"{groups} groups of {width}")
    return width // groups


def _pair(z: Tensor, u: Tensor, kind: int = 0, inner: int = 1) -> tuple[Tensor, Tensor]:
    """z `[B, ...]` in float32 and u `[K B, ...]` in bfloat16."""
    _check(z, 0, kind, inner)
    low = u.dtype == torch.bfloat16 and z.dtype == torch.float32 and u.device == z.device
    refuse_unless(low, "dual", "float32 with tangents in bfloat16 expected, on one device")
    whole = u.ndim >= 1 and u.shape[0] % max(z.shape[0], 1) == 0
    whole = whole and u.numel() == _count(z, u) * z.numel()
    refuse_unless(whole, "dual", f"u {tuple(u.shape)} are no tangents of {tuple(z.shape)}")
    return z.contiguous(), u.contiguous()


def _grads(ga: Tensor, gt: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return expect("dual", "ga", ga, z, z.numel()), expect("dual", "gt", gt, u, u.numel())


def _halves(stack: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
    """The first `count` elements, and the rest."""
    if stack is None:
        return None, None
    flat = stack.view(-1)
    return flat[:count], flat[count:] if flat.numel() > count else flat


Both = tuple[Tensor | None, Tensor | None]


def _elementwise(
    z: Both,
    shared: Tensor | None,
    shift: Tensor | None,
    g: Both,
    out: Both,
    tangents: int,
    kind: int,
    beta: float,
    threshold: float,
    inner: int,
) -> None:
    """Primals and tangents of z, of the gradient if any, and of the result."""
    first = z[0]
    assert first is not None
    count = first.numel()
    if count == 0:
        return
    launch = config.dual_activate(dtype_name("dual_activate", first), architecture(first.device))
    tensors = (*z, shared, shift, *g, *out)
    with on(first.device):
        dual_activate_kernel[(triton.cdiv(count, launch["BLOCK"]),)](
            *(first if t is None else t for t in tensors),
            *(count, tangents),
            1 if shared is None else shared.numel() // max(tangents, 1),
            *(1 if shift is None else shift.numel(), inner),
            BETA=beta,
            THRESHOLD=threshold,
            KIND=kind,
            BACKWARD=g[0] is not None,
            SHARED=shared is not None,
            SHIFT=shift is not None,
            **launch,
        )


def _stacked(
    z: Tensor,
    shared: Tensor | None,
    shift: Tensor | None,
    g: Tensor | None,
    out: Tensor,
    tangents: int,
    *options: Any,
) -> Tensor:
    kind, _, _, inner = options
    count = _check(z, 0 if shared is not None else tangents, kind, inner)
    refuse_unless(tangents >= 0, "dual", "tangents must be at least 0")
    z, shift = z.contiguous(), _shift(shift, z, count, inner)
    shared = expect("dual", "shared", shared, z, tangents * row_size(z))
    g = expect("dual", "g", g, z, count * (tangents + 1))
    halves = (_halves(t, count) for t in (z, g, out))
    own, grads, results = halves
    _elementwise(own, shared, shift, grads, results, tangents, *options)
    return out


@torch.library.custom_op(
    "fewstep_triton::dual_activate",
    mutates_args=(),
    schema="(Tensor z, Tensor? shared, Tensor? shift, int tangents, int kind, float beta, "
    "float threshold, int inner) -> Tensor",
)
def dual_activate(
    z: Tensor,
    shared: Tensor | None,
    shift: Tensor | None,
    tangents: int,
    kind: int,
    beta: float,
    threshold: float,
    inner: int,
) -> Tensor:
    """See `fewstep.reference.dual.activate`."""
    refuse_unless(z.ndim >= 1, "dual_activate", "z must be [(K + 1) B, ...]")
    lead = z.shape[0] * (1 if shared is None else tangents + 1)
    out = z.new_empty((max(lead, 0), *z.shape[1:]))
    return _stacked(z, shared, shift, None, out, tangents, kind, beta, threshold, inner)


@torch.library.custom_op(
    "fewstep_triton::dual_activate_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor z, Tensor? shared, Tensor? shift, int tangents, int kind, "
    "float beta, float threshold, int inner) -> Tensor",
)
def dual_activate_backward(
    g: Tensor,
    z: Tensor,
    shared: Tensor | None,
    shift: Tensor | None,
    tangents: int,
    kind: int,
    beta: float,
    threshold: float,
    inner: int,
) -> Tensor:
    """The gradient for z."""
    out = z.new_empty(z.shape)
    return _stacked(z, shared, shift, g, out, tangents, kind, beta, threshold, inner)


def _empty_pair(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), u.new_empty(u.shape)


def _count(z: Tensor, u: Tensor) -> int:
    """K"""
    return u.shape[0] // max(z.shape[0], 1)


@torch.library.custom_op(
    "fewstep_triton::dual_activate_pair",
    mutates_args=(),
    schema="(Tensor z, Tensor u, Tensor? shift, int kind, float beta, float threshold, int inner)"
    " -> (Tensor a, Tensor t)",
)
def dual_activate_pair(
    z: Tensor,
    u: Tensor,
    shift: Tensor | None,
    kind: int,
    beta: float,
    threshold: float,
    inner: int,
) -> tuple[Tensor, Tensor]:
    """See `fewstep.reference.dual.activate_pair`."""
    out = _empty_pair(z, u)
    z, u = _pair(z, u, kind, inner)
    shift = _shift(shift, z, z.numel(), inner)
    options = (_count(z, u), kind, beta, threshold, inner)
    _elementwise((z, u), None, shift, (None, None), out, *options)
    return out


@torch.library.custom_op(
    "fewstep_triton::dual_activate_pair_backward",
    mutates_args=(),
    schema="(Tensor ga, Tensor gt, Tensor z, Tensor u, Tensor? shift, int kind, float beta, "
    "float threshold, int inner) -> (Tensor gz, Tensor gu)",
)
def dual_activate_pair_backward(
    ga: Tensor,
    gt: Tensor,
    z: Tensor,
    u: Tensor,
    shift: Tensor | None,
    kind: int,
    beta: float,
    threshold: float,
    inner: int,
) -> tuple[Tensor, Tensor]:
    """The gradients for z and u."""
    out = _empty_pair(z, u)
    z, u = _pair(z, u, kind, inner)
    ga, gt = _grads(ga, gt, z, u)
    shift = _shift(shift, z, z.numel(), inner)
    options = (_count(z, u), kind, beta, threshold, inner)
    _elementwise((z, u), None, shift, (ga, gt), out, *options)
    return out


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
    shift = _shift(shift, first, first.numel(), row=n)
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
    count, width = _check(z, tangents, 0, 1), groups * _rows(z, groups)
    z = z.contiguous()
    own, made = _halves(z, count), _halves(out, count)
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
    out = _empty_pair(z, u)
    z, u = _pair(z, u)
    sizes = (_count(z, u), groups * _rows(z, groups), groups)
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
    shift = _shift(shift, first, first.numel(), row=n)
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
    count, width = _check(z, tangents, 0, 1), groups * _rows(z, groups)
    z, g = z.contiguous(), expect("dual_norm", "g", g, z, z.numel())
    both, own, made = (_halves(t, count) for t in (g, z, out))
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
    out = _empty_pair(z, u)
    z, u = _pair(z, u)
    ga, gt = _grads(ga, gt, z, u)
    options = (_count(z, u), groups * _rows(z, groups), groups, centred, eps)
    return *out, *_normed_backward((ga, gt), (z, u), shift, weight, out, *options)
