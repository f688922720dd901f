"""What rules ask of the plain tensors, numbers and options that a dual meets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.ops.dual.engine import Dual, Seed
from fewstep.ops.dual.traced import Opaque, Traced, UnsupportedError

NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def refuse(options: dict[str, Any]) -> None:
    """Options of a torch function that its rule does not know must have no effect."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise UnsupportedError(f"no rule with {name}={value}")


def is_number(value: Any) -> bool:
    return isinstance(value, NUMBERS)


def of_dtype(h: Traced, other: Tensor) -> Tensor:
    """A plain tensor as torch casts it before it meets h.

    Raises:
        UnsupportedError: the result would be of another dtype than h, or on another device.
    """
    if other.dtype == h.dtype and other.device == h.device:
        return other
    if other.device != h.device and (other.ndim > 0 or other.device.type != "cpu"):
        raise UnsupportedError(f"no rule for tensors on {h.device} and {other.device}")
    own, floating = h.dtype, other.dtype.is_floating_point
    whole = other.ndim > 0 and floating and torch.promote_types(own, other.dtype) != own
    if other.dtype.is_complex or whole:
        raise UnsupportedError(f"no rule for {own} with {other.dtype}")
    return other.to(own) if other.device == h.device else other.to(h.device, own)


def promoted(h: Dual, other: Any) -> Dual:
    """h in the dtype of its sum with a tensor, or with another dual."""
    if not isinstance(other, (Tensor, Dual)) or other.dtype == h.dtype or other.ndim == 0:
        return h
    return h.cast(torch.promote_types(h.dtype, other.dtype))


def aligned(h: Traced, other: Tensor) -> None:
    """What broadcasts with h must not make the batch larger."""
    if other.ndim > h.ndim or (other.ndim == h.ndim and other.shape[0] not in (1, h.shape[0])):
        raise UnsupportedError(f"no rule for {tuple(h.shape)} with {tuple(other.shape)}")


def operand(h: Traced, other: Any) -> Any:
    """A plain factor or term, in the dtype of h; it may be larger than h, but for the batch."""
    if isinstance(other, Tensor):
        aligned(h, other)
        return of_dtype(h, other)
    if not is_number(other):
        raise UnsupportedError(f"no rule for a {type(other).__name__}")
    return other


def matched(h: Traced, *others: Tensor | None, low: bool = False) -> None:
    """Torch takes no other dtype or device here, and rules have none of autocast's.

    Args:
        low: autocast computes the function in lower precision.
    """
    dtype, device = h.own_dtype, h.own_device
    for other in others:
        if other is None:
            continue
        if isinstance(other, Traced):
            raise UnsupportedError("no rule for parameters that depend on x")
        if other.dtype != dtype or other.device != device:
            raise UnsupportedError(
                f"no rule for {dtype} on {device} with {other.dtype} on {other.device}"
            )
    if low and not isinstance(h, Opaque) and torch.is_autocast_enabled(device.type):
        raise UnsupportedError("no rule for products under autocast")


def inside(h: Traced, *dims: int) -> tuple[int, ...]:
    """Axes of h counted from the first; the batch is none of them."""
    if any(not isinstance(d, (int, torch.SymInt)) or isinstance(d, bool) for d in dims):
        raise UnsupportedError("no rule for axes that are not integers")
    if any(not -h.ndim <= d < h.ndim for d in dims):
        raise UnsupportedError(f"axes {dims} of {h.ndim}")
    own = tuple(d % h.ndim for d in dims)
    if 0 in own:
        raise UnsupportedError("no rule along the batch")
    return own


def axes(h: Traced, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    """As `inside`, of a reduction."""
    own = (dim,) if isinstance(dim, int) else tuple(dim or ())
    if not own:
        raise UnsupportedError("no rule over the batch")
    return inside(h, *own)


def primal(h: Any) -> Any:
    """The values of a dual `[B, ...]`; of anything else, itself."""
    if isinstance(h, Seed):
        return h.primal
    return h.halves()[0][0] if isinstance(h, Dual) else h
