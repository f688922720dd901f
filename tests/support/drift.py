"""Clouds for `fewstep.sinkhorn_drift`, its backends on a CPU, and its forms."""

from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = ("reference", "cpp")
FORMS = ("split", "joint")
STATISTICS = ("scale", "rms", "residual", "entropy", "peak")


def clouds(
    groups: int, *sizes: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Clouds apart by about their width: x, y, x_self, uncond."""
    generator = torch.Generator().manual_seed(seed)
    shifts = (0.0, 0.7, 0.0, -0.3)
    return [
        (torch.randn(groups, n, d, generator=generator, dtype=torch.float64) + shift).to(dtype)
        for n, shift in zip(sizes, shifts, strict=False)
    ]
