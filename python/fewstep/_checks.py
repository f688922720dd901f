"""Argument errors in one voice."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

_MOST = {"depth": 1000}


def check_integers(config: Any, *sizes: str) -> None:
    """Raise ValueError unless `sizes` are integers of at least 1, and `seed` of at least 0.

    All are below 2^63, and a depth is at most 1000. Those of NumPy become Python's, as JSON has
    them.
    """
    for name, low in (*((size, 1) for size in sizes), ("seed", 0)):
        value = getattr(config, name)
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        number, high = int(value) if whole else low - 1, _MOST.get(name, 2**63 - 1)
        if number < low:
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        if number > high:
            raise ValueError(f"{name} must be an integer of at most {high}, got {value!r}")
        object.__setattr__(config, name, number)  # of a frozen dataclass


def check_config(config: Any, *sizes: str) -> None:
    """Raise ValueError unless `sizes`, `seed`, `lr` and `ema` are within their ranges."""
    check_integers(config, *sizes)
    if not 0 < config.lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {config.lr!r}")
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema must be in [0, 1), got {config.ema!r}")
