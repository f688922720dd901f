"""Random probes in plain torch: Philox4x32-10 in int64 arithmetic, the same bits as the kernels.

Probe k of sample i is a function of (seed, step, stage), the sample's id, k and the coordinate, so
a sample has the same probes in any batch and on any device. Source of the generator: Salmon,
Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PROBES = ("rademacher", "hadamard", "gaussian", "sphere")
_MASK = 0xFFFFFFFF
_ROW = 0xFFFF  # the k of the numbers that choose Hadamard rows


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter, all as int64 in [0, 2^32).

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(int(w)) for w in philox((zero, zero, zero, zero), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits: int64 wraps around
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def probes(
    key: Tensor, ids: Tensor | None, shape: tuple[int, ...], kind: str, dtype: torch.dtype
) -> Tensor:
    """Probes `[K, B, ...]` with the identity as second moment.

    Args:
        key (Tensor): int64 `(seed, step, stage)`, `seed < 2^63`, `step < 2^32`, `stage < 16`.
        ids (Tensor | None): the samples' ids, int64 `[B]` in `[0, 2^48)`; None: their index.
        shape (tuple): `(K, B, ...)`, K below 65535.
        kind (str): "rademacher" (signs), "hadamard" (distinct random rows of the Hadamard matrix of
            the next power of two, times one random vector of signs), "gaussian", or "sphere"
            (Gaussian, scaled to the norm `sqrt(D)`).
        dtype (torch.dtype): of the probes.

    Returns:
        Tensor: `[K, B, ...]`.
    """
    count, batch = shape[:2]
    d = math.prod(shape[2:])
    device = key.device
    ids = torch.arange(batch, device=device) if ids is None else ids.to(device)
    seed, step, stage = key.unbind()
    ks = torch.arange(count, device=device)[:, None, None]

    def draw(k: Tensor, blocks: Tensor) -> Tensor:
        """`[K, B, blocks, 4]`"""
        sample = ids[None, :, None]
        counter = torch.broadcast_tensors(  # type: ignore[no-untyped-call]
            blocks | stage << 28, step, k | (sample >> 32) << 16, sample & _MASK
        )
        return torch.stack(philox(counter, (seed & _MASK, seed >> 32 & _MASK)), -1)

    if kind in ("gaussian", "sphere"):
        v = normals(draw(ks, torch.arange(-(-d // 4), device=device))).flatten(2)[..., :d]
        if kind == "sphere":
            v = v.to(dtype) * (d / v.square().sum(-1, keepdim=True)).sqrt().to(dtype)
        return v.to(dtype).reshape(shape)

    coordinates = torch.arange(d, device=device)
    blocks = torch.arange(-(-d // 128), device=device)
    words = draw(torch.zeros_like(ks) if kind == "hadamard" else ks, blocks)
    bits = words[..., None] >> torch.arange(32, device=device) & 1
    sign = bits.flatten(2)[..., :d]
    if kind == "hadamard":
        sign = sign ^ _parity(coordinates & _rows(draw, ks, d))
    return (1 - 2 * sign).to(dtype).expand(count, batch, d).reshape(shape)


def normals(words: Tensor) -> Tensor:
    """Box-Muller: standard normals in float64 from 32-bit words `[..., 4]`, of the same shape."""
    unit = (words.double() + 0.5) / 2**32
    radius = (-2 * unit[..., 0::2].log()).sqrt()
    angle = 2 * math.pi * unit[..., 1::2]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)


def _rows(draw, k: Tensor, d: int) -> Tensor:  # type: ignore[no-untyped-def]
    """The row of the Hadamard matrix for each k, `[K, B, 1]`: a random order of all of them."""
    width = max(d - 1, 0).bit_length()
    mask, shift = (1 << width) - 1, (width + 1) // 2
    w = draw(torch.full_like(k[:1], _ROW), torch.zeros_like(k[:1, :1, 0]))[:, :, 0]
    row = (k[..., 0] * (w[..., 0] | 1) + w[..., 2]) & mask
    row = row ^ row >> shift
    row = (row * (w[..., 1] | 1) + w[..., 3]) & mask
    out: Tensor = (row ^ row >> shift)[..., None]
    return out


def _parity(v: Tensor) -> Tensor:
    for shift in (16, 8, 4, 2, 1):
        v = v ^ v >> shift
    return v & 1
