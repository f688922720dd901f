"""Triton kernels of probes: drawn by Philox where they are needed, never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import architecture, dtype_name, expect, on, refuse_unless, row_size

_ROW = tl.constexpr(0xFFFF)  # the k of the numbers that choose Hadamard rows
GAUSSIAN = tl.constexpr(2)  # kinds in the order of `fewstep.reference.probe.PROBES`
SPHERE = tl.constexpr(3)
KINDS = 4


@triton.jit
def _words(Key, sample, k, blocks):
    """Four 32-bit words of Philox for each block of a probe: csrc/shared/philox.h."""
    seed = tl.load(Key)
    zero = blocks * 0
    step = zero + tl.load(Key + 1)
    c0 = blocks | tl.load(Key + 2) << 28
    c2 = k | (sample >> 32) << 16
    return tl.philox(
        seed,
        c0.to(tl.uint32),
        step.to(tl.uint32),
        (zero + c2).to(tl.uint32),
        (zero + sample).to(tl.uint32),
    )


@triton.jit
def _four(w0, w1, w2, w3, BLOCK: tl.constexpr):
    """Words of a block side by side, `[BLOCK]`."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])


@triton.jit
def _circle(u):
    """sin and cos of `2 pi u`, u in [0, 1], by their series on an eighth of the circle: those of
    libraries keep memory for arguments that do not occur here."""
    quarter = tl.floor(4 * u + 0.5)
    x = (u - 0.25 * quarter) * 6.283185307179586
    y = x * x
    s = 1 - y * (1 / 110) * (1 - y * (1 / 156) * (1 - y * (1 / 210) * (1 - y * (1 / 272))))
    s = x * (1 - y * (1 / 6) * (1 - y * (1 / 20) * (1 - y * (1 / 42) * (1 - y * (1 / 72) * s))))
    c = 1 - y * (1 / 90) * (1 - y * (1 / 132) * (1 - y * (1 / 182) * (1 - y * (1 / 240))))
    c = 1 - y * (1 / 2) * (1 - y * (1 / 12) * (1 - y * (1 / 30) * (1 - y * (1 / 56) * c)))
    n = quarter.to(tl.int32) % 4
    odd = n % 2 == 1
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where(n >= 2, -sine, sine), tl.where((n == 1) | (n == 2), -cosine, cosine)


@triton.jit
def normals_of(w0, w1, w2, w3, BLOCK: tl.constexpr):
    """Standard normals by Box-Muller in float64, `[BLOCK]` from words `[BLOCK / 4]`."""
    UNIT: tl.constexpr = 2.3283064365386963e-10  # 2^-32
    first = tl.sqrt(-2 * tl.log((w0.to(tl.float64) + 0.5) * UNIT))
    second = tl.sqrt(-2 * tl.log((w2.to(tl.float64) + 0.5) * UNIT))
    sine, cosine = _circle((w1.to(tl.float64) + 0.5) * UNIT)
    other_sine, other_cosine = _circle((w3.to(tl.float64) + 0.5) * UNIT)
    return _four(first * cosine, first * sine, second * other_cosine, second * other_sine, BLOCK)


@triton.jit
def _normals(Key, sample, k, start, BLOCK: tl.constexpr):
    """Those of a probe from coordinate `start` on."""
    w0, w1, w2, w3 = _words(Key, sample, k, (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.int64))
    return normals_of(w0, w1, w2, w3, BLOCK)


@triton.jit
def _parity(v):
    v = v ^ (v >> 16)
    v = v ^ (v >> 8)
    v = v ^ (v >> 4)
    v = v ^ (v >> 2)
    v = v ^ (v >> 1)
    return v & 1


@triton.jit
def _signs(Key, sample, k, start, bits, HADAMARD: tl.constexpr, BLOCK: tl.constexpr):
    """1 where a probe is -1, `[BLOCK]` int64 from coordinate `start` on."""
    blocks = (start // 128 + tl.arange(0, BLOCK // 128)).to(tl.int64)
    w0, w1, w2, w3 = _words(Key, sample, k * 0 if HADAMARD else k, blocks)
    words = _four(w0, w1, w2, w3, BLOCK // 32).to(tl.int64)
    signs = tl.reshape((words[:, None] >> tl.arange(0, 32)[None, :]) & 1, [BLOCK])
    if HADAMARD:
        # Row k of a random order of all 2^bits, as philox.h chooses it.
        only = tl.arange(0, 1).to(tl.int64)
        r0, r1, r2, r3 = _words(Key, sample, _ROW, only)
        mask = (1 << bits) - 1
        shift = (bits + 1) // 2
        row = (k * (r0.to(tl.int64) | 1) + r2.to(tl.int64)) & mask
        row = row ^ (row >> shift)
        row = (row * (r1.to(tl.int64) | 1) + r3.to(tl.int64)) & mask
        row = row ^ (row >> shift)
        signs = signs ^ _parity((start + tl.arange(0, BLOCK)).to(tl.int64) & row)
    return signs


@triton.jit
def probe_kernel(
    Key,
    Ids,
    Y,
    Out,
    batch,
    D,
    bits,
    KIND: tl.constexpr,
    MODE: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Probe k of sample i, one a program, number `i + B k`: drawn (MODE 0), its product with
    `y [K, B, D]` (1), or times `y [K, B]` (2)."""
    item = tl.program_id(0).to(tl.int64)
    sample = item % batch
    k = item // batch
    if IDS:
        sample = tl.load(Ids + sample)
    # Arithmetic is that of the result; that of tangents in bfloat16 is float32.
    T: tl.constexpr = tl.float32 if Out.dtype.element_ty == tl.bfloat16 else Out.dtype.element_ty
    factor = tl.full([1], 1.0, T)
    if MODE == 2:
        factor *= tl.load(Y + item)
    if KIND == SPHERE:
        squares = tl.zeros([BLOCK], tl.float64)
        for start in range(0, D, BLOCK):
            v = _normals(Key, sample, k, start, BLOCK)
            squares += tl.where(start + tl.arange(0, BLOCK) < D, v * v, 0.0)
        scale = tl.sqrt(D / tl.sum(squares, 0)).to(T)
    total = tl.zeros([BLOCK], T)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < D
        if KIND >= GAUSSIAN:
            v = _normals(Key, sample, k, start, BLOCK).to(T)
            if KIND == SPHERE:
                v *= scale
        else:
            v = (1 - 2 * _signs(Key, sample, k, start, bits, KIND == 1, BLOCK)).to(T)
        if MODE == 1:
            total += v * tl.load(Y + item * D + cols, mask=mask, other=0.0).to(T)
        else:
            tl.store(Out + item * D + cols, v * factor, mask=mask)
    if MODE == 1:
        tl.store(Out + item, tl.sum(total, 0))


def _probes(
    mode: int,
    y: Tensor,
    out: Tensor,
    key: Tensor,
    ids: Tensor | None,
    shape: tuple[int, int, int],
    kind: int,
) -> Tensor:
    count, batch, d = shape
    whole = min(shape) >= 0 and 0 <= kind < KINDS and key.dtype == torch.int64
    refuse_unless(whole, "probe", f"no probes {shape} of kind {kind} by a key of {key.dtype}")
    key = key.to(y.device)
    key = expect("probe", "key", key, key, 3)
    ids = expect("probe", "ids", None if ids is None else ids.to(y.device), key, batch)
    if count * batch == 0:
        return out
    dtype = "float32" if y.dtype == torch.bfloat16 else dtype_name("probe", y)
    launch = config.probe(dtype, architecture(y.device))
    with on(y.device):
        probe_kernel[(count * batch,)](
            *(key, key if ids is None else ids, y, out, batch, d),
            max(d - 1, 0).bit_length(),
            KIND=kind,
            MODE=mode,
            IDS=ids is not None,
            **launch,
        )
    return out


@torch.library.custom_op(
    "fewstep_triton::probe",
    mutates_args=(),
    schema="(Tensor like, Tensor key, Tensor? ids, int probes, int kind) -> Tensor",
)
def probe(like: Tensor, key: Tensor, ids: Tensor | None, probes: int, kind: int) -> Tensor:
    """`[K, B, ...]`"""
    refuse_unless(like.ndim >= 1 and probes >= 0, "probe", "like must be [B, ...]")
    out = like.new_empty((probes, *like.shape))
    shape = (probes, like.shape[0], row_size(like))
    return _probes(0, out, out, key, ids, shape, kind)


@torch.library.custom_op(
    "fewstep_triton::probe_dot",
    mutates_args=(),
    schema="(Tensor y, Tensor key, Tensor? ids, int probes, int kind) -> Tensor",
)
def probe_dot(y: Tensor, key: Tensor, ids: Tensor | None, probes: int, kind: int) -> Tensor:
    """`<v_k, y_k>` `[K, B]` for y `[K B, ...]`."""
    whole = y.ndim >= 1 and probes >= 1 and y.shape[0] % probes == 0
    refuse_unless(whole, "probe_dot", f"y {tuple(y.shape)} must be [K B, ...] with K = {probes}")
    batch = y.shape[0] // probes
    wide = torch.float32 if y.dtype == torch.bfloat16 else y.dtype
    out = y.new_empty((probes, batch), dtype=wide)
    return _probes(1, y.contiguous(), out, key, ids, (probes, batch, row_size(y)), kind)


@torch.library.custom_op(
    "fewstep_triton::probe_scale",
    mutates_args=(),
    schema="(Tensor g, Tensor key, Tensor? ids, int d, int kind) -> Tensor",
)
def probe_scale(g: Tensor, key: Tensor, ids: Tensor | None, d: int, kind: int) -> Tensor:
    """`g_k v_k` `[K, B, D]` for g `[K, B]`."""
    refuse_unless(g.ndim == 2 and d >= 0, "probe_scale", "g must be [K, B]")
    out = g.new_empty((*g.shape, d))
    return _probes(2, g.contiguous(), out, key, ids, (*g.shape, d), kind)
