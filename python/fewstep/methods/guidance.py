"""Scales of guidance, drawn for a generator that takes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep._checks import count, number


def sample_scales(
    n: int,
    *,
    low: float = 1.0,
    high: float = 4.0,
    power: float = 3.0,
    none: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw n scales `a = 1 + w` with the density `a^-power` on `[low, high]`.

    With `u ~ U(0, 1)` and `q = 1 - power`,

        a = (low^q + u (high^q - low^q))^(1 / q),   or  low (high / low)^u  for power 1,

    and then a is 1 with probability `none`.

    Source: arXiv 2602.04770 and 2605.11755, whose code has a power of 3 to 5 on [1, 4].

    Args:
        n (int): number of scales, one for each group.
        low (float): smallest scale, at least 1.
        high (float): largest scale, at least `low`.
        power (float): exponent of the density. 0 is uniform.
        none (float): share of scales that are 1, from 0 to 1.
        generator (torch.Generator | None): generator to draw from. None takes torch's own.
        device (torch.device | str | None): device of the scales. None takes that of the generator.

    Returns:
        Tensor: scales, float32 `[n]`.

    Raises:
        ValueError: a number is outside its range.
        TypeError: a value is not a number.

    >>> import torch
    >>> from fewstep.methods import sample_scales
    >>> a = sample_scales(1000, high=4, generator=torch.Generator().manual_seed(0))
    >>> bool((a >= 1).all() and (a <= 4).all()), bool(a.median() < 1.5)
    (True, True)
    """
    n = count("sample_scales", "n", n, 0)
    low, high, power, none = (
        number("sample_scales", name, value)
        for name, value in (("low", low), ("high", high), ("power", power), ("none", none))
    )
    if not 1 <= low < math.inf:
        raise ValueError(f"sample_scales: low must be at least 1 and finite, got {low}")
    if not low <= high < math.inf:
        raise ValueError(f"sample_scales: high must be at least low = {low} and finite, got {high}")
    if not math.isfinite(power):
        raise ValueError(f"sample_scales: power must be finite, got {power}")
    if not 0 <= none <= 1:
        raise ValueError(f"sample_scales: none must be from 0 to 1, got {none}")
    own = torch.device("cpu") if generator is None else generator.device
    u, rest = torch.rand(2, n, generator=generator, dtype=torch.float64, device=own)
    # log(a / low), whose digits stay near power 1, where 1 / q grows without bound.
    q, span = 1 - power, math.log(high / low)
    if q > 0:
        log = span + torch.log1p((1 - u) * math.expm1(-q * span)) / q
    else:
        log = torch.log1p(u * math.expm1(q * span)) / q if q < 0 else u * span
    a = (low * log.exp()).clamp(low, high)
    return torch.where(rest < none, 1.0, a).to(own if device is None else device, torch.float32)
