"""Checks of what the samplers are given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep._checks import as_float64, function, integer, number
from fewstep.samplers.plan import Churn, Network


def check_shape(who: str, shape: Sequence[int]) -> list[int]:
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes):
        raise TypeError(f"{who}: shape must be a sequence of integers, got {shape!r}")
    sizes = [integer(who, "shape", size) for size in shape]
    if any(size < 0 for size in sizes):
        raise ValueError(f"{who}: shape must have sizes of at least 0, got {shape!r}")
    return sizes


def check_schedule(
    who: str, sigma_min: float, sigma_max: float, rho: float
) -> tuple[float, float, float]:
    """sigma_min, sigma_max and rho of `karras_sigmas`, as numbers that give levels."""
    low, high = number(who, "sigma_min", sigma_min), number(who, "sigma_max", sigma_max)
    rho = number(who, "rho", rho)
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"{who}: sigma_min and sigma_max must be 0 < sigma_min < sigma_max,"
            f" got {low} and {high}"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"{who}: rho must be positive, got {rho}")
    try:
        found = all(math.isclose((s ** (1 / rho)) ** rho, s, rel_tol=1e-6) for s in (low, high))
    except OverflowError:
        found = False
    if not found:
        raise ValueError(
            f"{who}: rho must be one by which float64 has levels from {high} to {low}, got {rho}"
        )
    return low, high, rho


def check_churn(who: str, S_churn: float, S_min: float, S_max: float, S_noise: float) -> Churn:
    amount, noise = number(who, "S_churn", S_churn), number(who, "S_noise", S_noise)
    low, high = number(who, "S_min", S_min), number(who, "S_max", S_max)
    for name, value in (("S_churn", amount), ("S_noise", noise)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{who}: {name} must be at least 0 and finite, got {value}")
    if not low <= high:
        raise ValueError(f"{who}: S_min must be at most S_max, got {low} and {high}")
    return Churn(amount, low, high, noise)


def check_precondition(who: str, precondition: float | None) -> float | None:
    if precondition is None:
        return None
    data = number(who, "precondition", precondition)
    if not (data > 0 and 0 < data * data < math.inf):
        raise ValueError(f"{who}: precondition must be positive, got {data}, or its square is not")
    return data


def check_sigmas(who: str, sigmas: Tensor | Sequence[float], latents: Tensor) -> Tensor:
    """float64 `[1 or B, N + 1]`"""
    levels = as_float64(who, "sigmas", sigmas, torch.device("cpu"))
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
    if fine and bool((last == 0).any()) and not bool((last == 0).all()):
        row = int((last > 0).nonzero()[0])
        raise ValueError(
            f"{who}: sigmas must end in 0 in all rows or in none, got {float(last[row])} at the end"
            f" of row {row}"
        )
    if not fine:
        raise ValueError(
            f"{who}: sigmas must be finite, positive but for a last 0, and decreasing, got {sigmas}"
        )
    return levels


def check_guidance(
    who: str, guidance: float | Tensor | None, uncond: Network | None, latents: Tensor
) -> Tensor | None:
    """w, float64 `[1 or B]`"""
    if uncond is not None:
        function(who, "uncond", uncond)
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
