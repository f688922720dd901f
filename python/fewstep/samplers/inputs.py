"""Checks of what the samplers are given."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from fewstep.ops.trace.inputs import as_float64
from fewstep.samplers.plan import Network


def check_count(who: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{who}: {name} must be an integer of at least 1, got {value!r}")
    return int(value)


def check_number(who: str, name: str, value: object) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number and not (isinstance(value, Tensor) and value.ndim == 0):
        raise TypeError(f"{who}: {name} must be a number, got {value!r}")


def check_sigmas(who: str, sigmas: Tensor | Sequence[float], latents: Tensor) -> Tensor:
    """float64 `[1 or B, N + 1]`"""
    levels = as_float64(who, "sigmas", sigmas)
    if levels.ndim not in (1, 2) or levels.shape[-1] < 2:
        raise ValueError(
            f"{who}: sigmas must be [N + 1] or [B, N + 1] with N at least 1,"
            f" got {tuple(levels.shape)}"
        )
    if levels.ndim == 2 and levels.shape[0] != latents.shape[0]:
        raise ValueError(f"{who}: sigmas must have {latents.shape[0]} rows, got {levels.shape[0]}")
    levels = levels if levels.ndim == 2 else levels[None]
    last = levels[:, -1]
    fine = bool((levels.diff(dim=1) < 0).all() & levels.isfinite().all() & (last >= 0).all())
    if not fine or (bool((last == 0).any()) and not bool((last == 0).all())):
        raise ValueError(
            f"{who}: sigmas must be finite, positive but for a last 0, and decreasing, got {sigmas}"
        )
    return levels


def check_guidance(
    who: str, guidance: float | Tensor | None, uncond: Network | None, latents: Tensor
) -> Tensor | None:
    """w, float64 `[1 or B]`"""
    if guidance is None and uncond is None:
        return None
    if uncond is None or guidance is None:
        missing, given = ("uncond", "guidance") if uncond is None else ("guidance", "uncond")
        value = uncond if guidance is None else guidance
        raise ValueError(f"{who}: {given} needs {missing}, got {given}={value!r}")
    weight = as_float64(who, "guidance", guidance, torch.device("cpu"))
    if tuple(weight.shape) not in ((), (latents.shape[0],)) or not bool(weight.isfinite().all()):
        raise ValueError(
            f"{who}: guidance must be finite, a scalar or ({latents.shape[0]},), got {guidance}"
        )
    return weight.reshape(-1)
