"""Noise levels: Karras's, and few-step ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fewstep._checks import count, integer, one_of
from fewstep._names import Grid
from fewstep.samplers.inputs import check_schedule

GRIDS = ("edm_subset", "uniform_sigma", "uniform_s")


def karras_sigmas(
    steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Noise levels of EDM, from sigma_max down to sigma_min and then 0.

        sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    Args:
        steps (int): number N of levels above 0, at least 1. A single one is sigma_max.
        sigma_min, sigma_max (float): lowest and highest level, standard deviations of the noise.
        rho (float): exponent; the larger it is, the denser are the low levels.
        device, dtype: device and floating dtype of the result.

    Returns:
        Tensor: `[N + 1]`.

    Raises:
        ValueError: steps below 1, levels that are not `0 < sigma_min < sigma_max`, rho not
            positive or too far from 1 for float64, a device that cannot be used.
        TypeError: an argument that is not a number, a dtype that is not floating.

    Source: Karras et al., EDM, arXiv 2206.00364, equation 5.

    >>> [round(s, 3) for s in karras_sigmas(3).tolist()]
    [80.0, 2.515, 0.002, 0.0]
    """
    steps = count("karras_sigmas", "steps", steps)
    schedule = check_schedule("karras_sigmas", sigma_min, sigma_max, rho)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"karras_sigmas: dtype must be floating, got {dtype!r}")
    try:
        return levels_of(steps, *schedule).to(device=device, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"karras_sigmas: device {device!r} cannot be used: {error}") from error


def levels_of(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """The levels of `karras_sigmas`, for numbers that have been checked."""
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (high + ramp * (low - high)) ** rho
    levels[0] = sigma_max  # exactly
    return torch.cat((levels, levels.new_zeros(1)))


def few_step_sigmas(
    steps: int | Sequence[int],
    *,
    grid: Grid = "edm_subset",
    teacher_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Levels at which `multistep_sample` calls its network.

        edm_subset     the teacher's levels with the given indices, or the first K of them
        uniform_sigma  equal decrements of sigma, from sigma_max to sigma_max / K
        uniform_s      equal decrements of s = sigma / (1 + sigma)

    On a straight line `x1 + sigma x0` both uniform grids make equal progress in every step, in the
    frame of x and of `z = x / (1 + sigma)`.

    Args:
        steps (int | Sequence[int]): number K of levels, or for "edm_subset" increasing indices.
        grid (str): "edm_subset", "uniform_sigma" or "uniform_s", as above.
        teacher_steps, sigma_min, sigma_max, rho: schedule of the teacher, see `karras_sigmas`.

    Returns:
        Tensor: float64 `[K]`, decreasing, without a 0 at the end.

    Raises:
        ValueError: an unknown grid, indices with a uniform grid, out of range or not increasing,
            a schedule that `karras_sigmas` refuses.
        TypeError: an index or argument that is not a number.

    Source: Matityahu and Fattal, LMM, arXiv 2412.06403, table 7.

    >>> few_step_sigmas([0, 1]).tolist() == karras_sigmas(18)[:2].tolist()
    True
    >>> few_step_sigmas(4, grid="uniform_sigma").tolist()
    [80.0, 60.0, 40.0, 20.0]
    """
    one_of("few_step_sigmas", "grid", grid, GRIDS)
    teacher_steps = count("few_step_sigmas", "teacher_steps", teacher_steps)
    schedule = check_schedule("few_step_sigmas", sigma_min, sigma_max, rho)
    array = isinstance(steps, np.ndarray | Tensor) and steps.ndim == 1
    if not array and (not isinstance(steps, Sequence) or isinstance(steps, str)):
        steps = count("few_step_sigmas", "steps", steps)
    elif grid != "edm_subset":
        raise ValueError(f"few_step_sigmas: steps must be a number for {grid!r}, got {steps}")
    if grid == "edm_subset":
        levels = levels_of(teacher_steps, *schedule)
        given = range(steps) if isinstance(steps, int) else steps
        indices = [integer("few_step_sigmas", "steps", index) for index in given]
        increasing = all(a < b for a, b in itertools.pairwise(indices))
        if not indices or not increasing or indices[0] < 0 or indices[-1] >= teacher_steps:
            raise ValueError(
                "few_step_sigmas: steps must be increasing indices below"
                f" teacher_steps = {teacher_steps}, got {steps}"
            )
        return levels[indices]
    assert isinstance(steps, int)
    left = 1 - torch.arange(steps, dtype=torch.float64) / steps
    sigma_max = schedule[1]
    if grid == "uniform_sigma":
        return sigma_max * left
    s = sigma_max / (1 + sigma_max) * left
    return s / (1 - s)
