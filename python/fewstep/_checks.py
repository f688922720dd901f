"""Argument errors in one voice."""

from __future__ import annotations

import math
from typing import Any


def check_integers(config: Any, *sizes: str) -> None:
    """Raise ValueError unless `sizes` are integers of at least 1, and `seed` of at least 0."""
    for name, low in (*((size, 1) for size in sizes), ("seed", 0)):
        value = getattr(config, name)
        if not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def check_config(config: Any, *sizes: str) -> None:
    """Raise ValueError unless `sizes`, `seed`, `lr` and `ema` are within their ranges."""
    check_integers(config, *sizes)
    if not 0 < config.lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {config.lr!r}")
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema must be in [0, 1), got {config.ema!r}")
