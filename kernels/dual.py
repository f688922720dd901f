"""Dual numbers through activations in Triton, with the schemas and bits of the C++ ops.

The registered ops are in the namespace `fewstep_triton`. Nothing is summed by atomics: the same
bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.reference.dual import ACTIVATIONS

from . import config
from .launch import architecture, dtype_name, expect, on, refuse_unless, row_size
from .stack import Both, count_of, empty_pair, halves, pair_like, pair_of, shift_of, tangents_of

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
    """`a(z)`, `a'(z)` and `a''(z)` of one of `ACTIVATIONS`."""
    if KIND == "silu":
        s = _sigmoid(z)
        c = 1 - s
        a = z * s
        d1 = s + a * c
        d2 = s * c * (2 + z * (c - s))
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp2(z * z * -0.7213475204444817)
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        a = z * cdf
        d1 = cdf + z * density
        d2 = density * (2 - z * z)
    elif KIND == "gelu_tanh":
        u1 = 0.7978845608028654 * (1 + 0.134145 * z * z)
        t, w = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        a = 0.5 * z * (1 + t)
        d1 = 0.5 * (1 + t + z * w * u1)
        d2 = w * (u1 + z * (0.10703222440890037 * z - t * u1 * u1))
    elif KIND == "tanh":
        a, d1 = _tanh(z)
        d2 = -2 * a * d1
    elif KIND == "softplus":
        y = BETA * z
        e = tl.exp2(-tl.abs(y) * LOG2E)
        s = tl.where(y < 0, e, 1.0) / (1 + e)
        far = y > THRESHOLD
        a = tl.where(far, z, tl.maximum(z, 0.0) + tl.log(1 + e) / BETA)
        d1 = tl.where(far, 1.0, s)
        d2 = tl.where(far, 0.0, BETA * s * (1 - s))
    elif KIND == "relu":
        a = tl.where(z < 0, 0.0, z)
        d1 = tl.where(z > 0, 1.0, z * 0)
        d2 = z * 0
    else:
        tl.static_assert(KIND == "sigmoid", "an activation without a formula")
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
    refuse_unless(0 <= kind < len(ACTIVATIONS), "dual", f"no activation {kind}")
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
            KIND=ACTIVATIONS[kind],
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
    count = count_of(z, 0 if shared is not None else tangents)
    refuse_unless(tangents >= 0, "dual", "tangents must be at least 0")
    z, shift = z.contiguous(), shift_of(shift, z, count, options[-1])
    shared = expect("dual", "shared", shared, z, tangents * row_size(z))
    g = expect("dual", "g", g, z, count * (tangents + 1))
    own, grads, results = (halves(t, count) for t in (z, g, out))
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
    out = empty_pair(z, u)
    z, u = pair_of(z, u)
    shift = shift_of(shift, z, z.numel(), inner)
    options = (tangents_of(z, u), kind, beta, threshold, inner)
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
    out = empty_pair(z, u)
    z, u = pair_of(z, u)
    ga, gt = pair_like(ga, gt, z, u)
    shift = shift_of(shift, z, z.numel(), inner)
    options = (tangents_of(z, u), kind, beta, threshold, inner)
    _elementwise((z, u), None, shift, (ga, gt), out, *options)
    return out
