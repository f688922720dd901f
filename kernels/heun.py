"""A step of a sampler outside its network in Triton: csrc/shared/heun.h has the table's columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import architecture, on
from .probe import normals_of

MOST_TERMS = 2
_STAGE = tl.constexpr(15 << 28)  # of the noise: apart from the probes


@triton.jit
def heun_combine_kernel(
    X,
    Low,
    F,
    U,
    Coefficients,
    Seeds,
    High,
    Out_low,
    Net,
    Wrong,
    d,
    row,
    per_sample,
    WIDE: tl.constexpr,
    TERMS: tl.constexpr,
    LOW: tl.constexpr,
    NOISE: tl.constexpr,
    HIGH: tl.constexpr,
    OUT_LOW: tl.constexpr,
    NET: tl.constexpr,
    WRONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`y = c0 x + c1 F + c2 U + c3 n` and the network's input `c7 y + c4 x + c5 F + c6 U`.

    A program takes BLOCK elements of a sample, all arrays `[B, d]`; `Coefficients` is the row of
    the table, `[B, 8]` where `per_sample` is 1. With WIDE arithmetic is in float64. The state is
    `X + Low`; what rounding leaves of y goes to `Out_low`, 1 to `Wrong` where y is not finite.
    """
    T: tl.constexpr = tl.float64 if WIDE else tl.float32
    blocks_of_one = tl.cdiv(d, BLOCK)
    sample = (tl.program_id(0) // blocks_of_one).to(tl.int64)
    start = (tl.program_id(0) % blocks_of_one).to(tl.int64) * BLOCK
    cols = start + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < d
    at = sample * d + cols
    c = Coefficients + sample * per_sample * 8
    x = tl.load(X + at, mask=mask, other=0.0).to(T)
    if LOW:
        x += tl.load(Low + at, mask=mask, other=0.0).to(T)
    y = tl.load(c).to(T) * x
    z = tl.load(c + 4).to(T) * x
    if TERMS > 0:
        f = tl.load(F + at, mask=mask, other=0.0).to(T)
        y += tl.load(c + 1).to(T) * f
        z += tl.load(c + 5).to(T) * f
    if TERMS > 1:
        u = tl.load(U + at, mask=mask, other=0.0).to(T)
        y += tl.load(c + 2).to(T) * u
        z += tl.load(c + 6).to(T) * u
    if NOISE:
        blocks = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.int64)
        zero = (blocks * 0).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(
            tl.load(Seeds + sample),
            (blocks | _STAGE).to(tl.uint32),
            (zero + row).to(tl.uint32),
            zero,
            zero,
        )
        y += tl.load(c + 3).to(T) * normals_of(w0, w1, w2, w3, BLOCK).to(T)
    z += tl.load(c + 7).to(T) * y
    if HIGH:
        tl.store(High + at, y, mask=mask)
    if OUT_LOW:
        tl.store(Out_low + at, y - y.to(X.dtype.element_ty).to(T), mask=mask)
    if NET:
        tl.store(Net + at, z, mask=mask)
    if WRONG:
        finite = tl.sum(tl.where(mask, y * 0.0, 0.0), 0) == 0.0
        tl.store(Wrong, 1, mask=finite == 0)


@torch.library.custom_op(
    "fewstep_triton::heun_combine_out", mutates_args=("high", "out_low", "net", "wrong")
)
def heun_combine_out(
    x: Tensor,
    low: Tensor | None,
    terms: list[Tensor],
    table: Tensor,
    row: int,
    seeds: Tensor | None,
    high: Tensor | None,
    out_low: Tensor | None,
    net: Tensor | None,
    wrong: Tensor | None,
) -> None:
    """`fewstep::heun_combine_out`; the network's dtype may be any floating one."""
    own = [t.contiguous() for t in terms]
    batch = x.shape[0]
    shared = table.shape[1] == 1
    alike = shared and seeds is None  # then one sample has all elements
    programs, d = (1, x.numel()) if alike else (batch, x[:1].numel())
    if x.numel() == 0:
        return
    x = x.contiguous()
    wide = x.dtype == torch.float64 or low is not None or out_low is not None
    launch = config.heun_combine("float64" if wide else "float32", architecture(x.device))
    f, u = ([*own, x, x])[:2]

    def given(t: Tensor | None) -> Tensor:
        return x if t is None else t

    with on(x.device):
        heun_combine_kernel[(programs * triton.cdiv(d, launch["BLOCK"]),)](
            *(x, given(None if low is None else low.contiguous()), f, u, table[row], given(seeds)),
            *(given(high), given(out_low), given(net), given(wrong)),
            *(d, row, int(not shared)),
            WIDE=wide,
            TERMS=len(own),
            LOW=low is not None,
            NOISE=seeds is not None,
            HIGH=high is not None,
            OUT_LOW=out_low is not None,
            NET=net is not None,
            WRONG=wrong is not None,
            **launch,
        )


@heun_combine_out.register_fake
def _(*_: object) -> None:
    return None


@torch.library.custom_op("fewstep_triton::heun_combine", mutates_args=())
def heun_combine(
    x: Tensor,
    low: Tensor | None,
    terms: list[Tensor],
    table: Tensor,
    row: int,
    want_low: bool,
    want_net: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fewstep::heun_combine`."""
    like = terms[0] if terms else x
    high, rest = x.new_empty(x.shape), x.new_empty(x.shape if want_low else (0,))
    net = like.new_empty(x.shape if want_net else (0,))
    heun_combine_out(
        *(x, low, terms, table, row, None, high),
        rest if want_low else None,
        net if want_net else None,
        None,
    )
    return high, rest, net
