"""What a case is: a call whose inputs a name and a seed give, and results with their bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep._library import KERNELS
from fewstep._names import Backend
from fewstep.verification.record import Group

# Elements from which indices need 64 bits.
BEYOND = 2**31


@dataclass(frozen=True)
class Output:
    """A result, and how it is compared with float64.

    Attributes:
        kind: of `contract.CONTRACT`, or "same" for equal values, or "rounded" for tensors that are
            rounded to `tensor.dtype` besides.
        scale: of the quantity, where it is not that of the exact result.
        unit: error of the roundings that the contract does not have, over the scale.
    """

    name: str
    kind: str
    tensor: Tensor
    scale: Tensor | None = None
    unit: float = 0.0


# A backend, a device, and whether float64 is wanted: then the backend is the reference.
Run = Callable[[Backend, torch.device, bool], list[Output]]


@dataclass(frozen=True)
class Case:
    """A call that is judged.

    Attributes:
        name: what it is called with, and the seed of its inputs.
        bits: whether a second run has to have the same bits.
        elements: how many it has, where it is one of large indices, for memory that has them.
    """

    group: Group
    name: str
    run: Run
    bits: bool = True
    elements: int = 0


@dataclass(frozen=True)
class Timing:
    """Makes the call, forward and backward, whose time stands for a group."""

    group: Group
    make: Callable[[Backend, torch.device], Callable[[], object]]
    repeats: int = 20


def backends(group: Group) -> tuple[Backend, ...]:
    """Those with kernels for a group."""
    if group[0] == "divergence":
        return ("triton",)
    return ("cuda",) if "segments" in group else KERNELS


def dtype_of(group: Group) -> torch.dtype:
    found = getattr(torch, group[1])
    assert isinstance(found, torch.dtype)
    return found


def described(options: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in options.items())


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers of float32 in float64, on the CPU: the same for every device and dtype."""
    return torch.randn(shape, generator=generator).double()
