"""What the launchers of all Triton kernels ask of a tensor."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def architecture(device: torch.device) -> str:
    """As `config` names it, or "cpu" for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which kernels are launched on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def row_size(like: Tensor) -> int:
    """Elements of one sample of `[B, ...]`."""
    return like.shape[1:].numel()


def dtype_name(op: str, x: Tensor) -> str:
    """ "float32" or "float64".

    Raises:
        TypeError: another dtype.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: x must be float32 or float64, got {x.dtype}")
    return str(x.dtype).removeprefix("torch.")


def expect(op: str, name: str, t: Tensor | None, like: Tensor, elements: int) -> Any:
    """A tensor as a kernel reads it: contiguous, of the dtype and device of `like`.

    Raises:
        ValueError: it is another, or does not have so many elements.
    """
    if t is None:
        return None
    if t.dtype != like.dtype or t.device != like.device or t.numel() != elements:
        raise ValueError(
            f"{op}: {name} must have {elements} elements of {like.dtype} on {like.device}, "
            f"got {tuple(t.shape)} of {t.dtype} on {t.device}"
        )
    return t.contiguous()


def refuse_unless(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{op}: {message}")
