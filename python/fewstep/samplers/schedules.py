"""Noise levels: Karras's, and few-step ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fewstep.samplers.inputs import check_count

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
        steps (int): N, at least 1; a single step starts from sigma_max.
        sigma_min, sigma_max (float): lowest and highest level, standard deviations of the noise.
        rho (float): how much denser low levels are.
        device, dtype: of the result.

    Returns:
        Tensor: `[N + 1]`.

    Raises:
        ValueError: steps below 1, levels that are not `0 < sigma_min < sigma_max`, or rho
            not positive.

    Source: Karras et al., EDM, arXiv 2206.00364, equation 5.

    >>> [round(s, 3) for s in karras_sigmas(3).tolist()]
    [80.0, 2.515, 0.002, 0.0]
    """
    steps = check_count("karras_sigmas", "steps", steps)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            "karras_sigmas: sigma_min and sigma_max must be 0 < sigma_min < sigma_max,"
            f" got {sigma_min} and {sigma_max}"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"karras_sigmas: rho must be positive, got {rho}")
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (high + ramp * (low - high)) ** rho
    levels[0] = sigma_max  # exactly
    return torch.cat((levels, levels.new_zeros(1))).to(device=device, dtype=dtype)


def few_step_sigmas(
    steps: int | Sequence[int],
    *,
    grid: str = "edm_subset",
    teacher_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Levels at which `multistep_sample` calls its network.

        edm_subset     the teacher's levels with these indices; a number K takes the first K
        uniform_sigma  equal decrements of sigma, from sigma_max to sigma_max / K
        uniform_s      equal decrements of s = sigma / (1 + sigma)

    On a straight line `x1 + sigma x0` both uniform grids make equal progress a step, each in its
    own frame: x, or `z = x / (1 + sigma)`.

    Args:
        steps (int | Sequence[int]): K, or for "edm_subset" increasing indices of levels.
        grid (str): see above.
        teacher_steps, sigma_min, sigma_max, rho: of the teacher's schedule, see `karras_sigmas`.

    Returns:
        Tensor: float64 `[K]`, decreasing, without a 0 at the end.

    Raises:
        ValueError: an unknown grid, indices with a uniform grid, out of range or not increasing.

    Source: Matityahu and Fattal, LMM, arXiv 2412.06403, table 7.

    >>> few_step_sigmas([0, 1]).tolist() == karras_sigmas(18)[:2].tolist()
    True
    >>> few_step_sigmas(4, grid="uniform_sigma").tolist()
    [80.0, 60.0, 40.0, 20.0]
    """
    if grid not in GRIDS:
        raise ValueError(f"few_step_sigmas: grid must be one of {GRIDS}, got {grid!r}")
    if not isinstance(steps, Iterable):
        steps = check_count("few_step_sigmas", "steps", steps)
    elif grid != "edm_subset":
        raise ValueError(f"few_step_sigmas: steps must be a number for {grid!r}, got {steps}")
    if grid == "edm_subset":
        levels = karras_sigmas(teacher_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
        indices = list(range(steps)) if isinstance(steps, int) else list(steps)
        increasing = all(a < b for a, b in itertools.pairwise(indices))
        if not indices or not increasing or indices[0] < 0 or indices[-1] >= teacher_steps:
            raise ValueError(
                "few_step_sigmas: steps must be increasing indices below"
                f" teacher_steps = {teacher_steps}, got {steps}"
            )
        return levels[indices]
    assert isinstance(steps, int)
    left = 1 - torch.arange(steps, dtype=torch.float64) / steps
    if grid == "uniform_sigma":
        return sigma_max * left
    s = sigma_max / (1 + sigma_max) * left
    return s / (1 - s)
