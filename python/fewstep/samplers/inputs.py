"""Checks of what the samplers are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep._checks import as_float64, function, integer, number, one_of
from fewstep._names import SamplerTracker
from fewstep.ops.heun.inputs import check_log_density
from fewstep.ops.trace.inputs import Options, check_ids, check_options, check_problem
from fewstep.samplers.plan import Callback, Churn, Density, Edits, Guidance, Network

TRACKERS = ("trace", "logdet")


def check_density(
    who: str,
    latents: Tensor,
    log_density: Tensor | None,
    tracker: SamplerTracker,
    options: Options,
    sample_ids: Tensor | None,
    churn: Churn,
    solver: str,
    edits: Edits,
) -> Density | None:
    one_of(who, "tracker", tracker, TRACKERS)
    check_options(options, who)
    ids = check_ids(sample_ids, latents, who)
    if log_density is None:
        return None
    check_log_density(who, log_density, latents)
    check_problem(options, latents, who)
    if churn.amount > 0:
        raise ValueError(f"{who}: S_churn must be 0 with log_density, got {churn.amount}")
    if solver != "heun" or not edits.none:
        given = f"solver={solver!r}" if solver != "heun" else "init, mask or callback"
        raise ValueError(f"{who}: log_density is that of plain Heun steps, got {given}")
    return Density(log_density, tracker, options, ids)


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


def check_multistep(who: str, solver: str, churn: Churn, lower_order_final: bool) -> None:
    if solver == "dpm++2m" and churn.amount > 0:
        raise ValueError(f"{who}: S_churn must be 0 with {solver!r}, got {churn.amount}")
    if solver != "dpm++2m" and lower_order_final:
        raise ValueError(f"{who}: lower_order_final is an option of 'dpm++2m', got {solver!r}")


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
    who: str,
    guidance: float | Tensor | Callable[[float], float] | None,
    uncond: Network | None,
    latents: Tensor,
    interval: tuple[float, float] | None = None,
) -> Guidance | None:
    if uncond is not None:
        function(who, "uncond", uncond)
    if guidance is None and uncond is None:
        if interval is not None:
            raise ValueError(f"{who}: guidance_interval needs guidance, got {interval}")
        return None
    if uncond is None or guidance is None:
        missing, given = ("uncond", "guidance") if uncond is None else ("guidance", "uncond")
        value = uncond if guidance is None else guidance
        raise ValueError(f"{who}: {given} needs {missing}, got {given}={value!r}")
    low, high = -math.inf, math.inf
    if interval is not None:
        if not isinstance(interval, Sequence) or len(interval) != 2 or isinstance(interval, str):
            raise ValueError(f"{who}: guidance_interval must be a pair, got {interval!r}")
        low, high = (number(who, "guidance_interval", t) for t in interval)
        if not low <= high:
            raise ValueError(f"{who}: guidance_interval must be (low, high), got {low} and {high}")
    if callable(guidance) and not isinstance(guidance, Tensor):
        return Guidance(_of_level(who, guidance), low, high)
    weight = as_float64(who, "guidance", guidance, torch.device("cpu"))
    if tuple(weight.shape) not in ((), (latents.shape[0],)) or not bool(weight.isfinite().all()):
        raise ValueError(
            f"{who}: guidance must be finite, a scalar or ({latents.shape[0]},), got {guidance}"
        )
    return Guidance(weight.reshape(-1), low, high)


def _of_level(who: str, guidance: Callable[[float], float]) -> Callable[[float], float]:
    def weight(level: float) -> float:
        found = guidance(level)
        found = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
        value = number(who, "guidance", found)
        if not math.isfinite(value):
            raise ValueError(f"{who}: guidance must be finite, got {value} at {level:g}")
        return value

    return weight


def check_edits(
    who: str,
    latents: Tensor,
    init: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    callback: Callback | None,
) -> Edits:
    if callback is not None:
        function(who, "callback", callback)
    for name, t in (("init", init), ("known", known)):
        if t is None:
            continue
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{who}: {name} must be a floating Tensor, got {got}")
        if t.shape != latents.shape or t.device != latents.device:
            raise ValueError(
                f"{who}: {name} must be {tuple(latents.shape)} on {latents.device} as latents,"
                f" got {tuple(t.shape)} on {t.device}"
            )
    if (known is None) != (mask is None):
        missing, given = ("mask", "known") if mask is None else ("known", "mask")
        raise ValueError(f"{who}: {given} needs {missing}, got {missing}=None")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{who}: mask must be a bool Tensor, true where known, got {got}")
        own = mask.shape[::-1]
        fits = len(own) <= latents.ndim and all(
            size in (1, whole) for size, whole in zip(own, latents.shape[::-1], strict=False)
        )
        if not fits or mask.device != latents.device:
            raise ValueError(
                f"{who}: mask must broadcast to {tuple(latents.shape)} on {latents.device},"
                f" got {tuple(mask.shape)} on {mask.device}"
            )
    init = None if init is None else init.to(latents.dtype)
    return Edits(init, known, mask, callback)
