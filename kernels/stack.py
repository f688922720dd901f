"""Stacks and pairs of dual numbers, as the launchers of their kernels take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .launch import dtype_name, expect, refuse_unless, row_size

Both = tuple[Tensor | None, Tensor | None]


def count_of(z: Tensor, tangents: int) -> int:
    """Elements of the primal of a stack z, or of a primal z with `tangents` 0."""
    op = "dual"
    dtype_name(op, z)
    refuse_unless(z.ndim >= 1 and tangents >= 0, op, "z must be [(K + 1) B, ...]")
    refuse_unless(z.shape[0] % (tangents + 1) == 0, op, f"z has no {tangents + 1} batches")
    return z.numel() // (tangents + 1)


def shift_of(shift: Tensor | None, z: Tensor, count: int, inner: int = 1, row: int = 1) -> Any:
    """A shift is repeated until it has shifted `count` elements; of a norm it has whole rows."""
    if shift is None:
        return None
    own = shift.numel()
    whole = own > 0 and inner > 0 and own % row == 0 and count % (own * inner) == 0
    whole = whole or (count == 0 and inner > 0)
    refuse_unless(whole, "dual", f"a shift of {own} elements for {count}, each {inner} times")
    return expect("dual", "shift", shift, z, own)


def row_of(z: Tensor, groups: int) -> int:
    """Elements of a row."""
    width = row_size(z)
    refuse_unless(groups >= 1 and width % groups == 0, "dual", f"{groups} groups of {width}")
    return width // groups


def pair_of(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """z `[B, ...]` in float32 and u `[K B, ...]` in bfloat16."""
    count_of(z, 0)
    low = u.dtype == torch.bfloat16 and z.dtype == torch.float32 and u.device == z.device
    refuse_unless(low, "dual", "float32 with tangents in bfloat16 expected, on one device")
    whole = u.ndim >= 1 and u.shape[0] % max(z.shape[0], 1) == 0
    whole = whole and u.numel() == tangents_of(z, u) * z.numel()
    refuse_unless(whole, "dual", f"u {tuple(u.shape)} are no tangents of {tuple(z.shape)}")
    return z.contiguous(), u.contiguous()


def pair_like(ga: Tensor, gt: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return expect("dual", "ga", ga, z, z.numel()), expect("dual", "gt", gt, u, u.numel())


def halves(stack: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
    """The first `count` elements, and the rest."""
    if stack is None:
        return None, None
    flat = stack.view(-1)
    return flat[:count], flat[count:] if flat.numel() > count else flat


def empty_pair(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), u.new_empty(u.shape)


def tangents_of(z: Tensor, u: Tensor) -> int:
    """K of a pair."""
    return u.shape[0] // max(z.shape[0], 1)
