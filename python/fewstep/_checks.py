"""Argument errors in one voice."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST = {"depth": 1000}


# Numbers and integers are those of Python and NumPy, and arrays and tensors without a dimension.
def is_number(value: object) -> bool:
    """A bool is none."""
    if isinstance(value, float):
        return True
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim == 0
    return isinstance(value, int | Real) and not isinstance(value, bool)


def number(who: str, name: str, value: Any) -> float:
    """A number as one of Python."""
    if isinstance(value, float):
        return value
    if isinstance(value, np.ndarray | Tensor):
        check_real(who, name, value)
        if value.ndim or (isinstance(value, Tensor) and value.is_meta):
            got = f"{tuple(value.shape)} of {value.dtype} on {getattr(value, 'device', 'cpu')}"
            raise TypeError(f"{who}: {name} must be a number, got {got}")
        value = value.item()
    if not is_number(value):
        raise TypeError(f"{who}: {name} must be a number, got {value!r}")
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{who}: {name} must be a number of float64, got {value!r}") from None


def check_real(who: str, name: str, value: np.ndarray[Any, Any] | Tensor) -> None:
    """Raise TypeError unless it is dense and holds real numbers."""
    if isinstance(value, Tensor):
        strided(who, name, value)
        real = not value.is_complex() and value.dtype != torch.bool
    else:
        real = value.dtype.kind in "iuf"
    if not real:
        raise TypeError(f"{who}: {name} must be numbers, got {value.dtype}")


def integer(who: str, name: str, value: Any) -> int:
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        if isinstance(value, np.ndarray | Tensor) and (value.ndim or value.dtype == torch.bool):
            raise TypeError
        whole = value if isinstance(value, int) else operator.index(value)
    except (TypeError, RuntimeError):  # torch raises both
        raise TypeError(f"{who}: {name} must be an integer, got {value!r}") from None
    if not -(2**63) <= whole < 2**63:
        raise ValueError(f"{who}: {name} must fit in 64 bits, got {whole}")
    return whole


def count(who: str, name: str, value: Any, low: int = 1) -> int:
    """An integer of at least `low`."""
    try:
        whole = integer(who, name, value)
    except TypeError:
        whole = low - 1
    if whole < low:
        raise ValueError(f"{who}: {name} must be an integer of at least {low}, got {value!r}")
    return whole


def one_of(who: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{who}: {name} must be one of {choices}, got {value!r}")


def flags(who: str, **values: Any) -> None:
    """Raise TypeError unless all are bool."""
    for name, value in values.items():
        if value is not True and value is not False and not isinstance(value, np.bool_):
            raise TypeError(f"{who}: {name} must be True or False, got {value!r}")


def function(who: str, name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{who}: {name} must be callable, got {value!r}")


def strided(who: str, name: str, t: Tensor) -> None:
    """Raise TypeError unless a tensor is dense."""
    if t.layout != torch.strided or t.is_nested:
        got = "a nested tensor" if t.is_nested else t.layout
        raise TypeError(f"{who}: {name} must be dense (torch.strided), got {got}")


def as_float64(who: str, name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """Numbers as a float64 tensor."""
    if isinstance(value, np.ndarray | Tensor):
        check_real(who, name, value)
        if isinstance(value, Tensor) and value.is_meta and device == torch.device("cpu"):
            raise TypeError(f"{who}: {name} must have values, got a meta tensor")
    elif any(
        isinstance(one, bool | str | bytes | np.bool_)
        for one in (value, *(value if isinstance(value, list | tuple) else ()))
    ):
        raise TypeError(f"{who}: {name} must be numbers, got {value!r}")
    try:
        return torch.as_tensor(value, dtype=torch.float64, device=device)
    except OverflowError:
        raise ValueError(f"{who}: {name} must be numbers of float64, got {value!r}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(value, Tensor):
            raise
        raise TypeError(f"{who}: {name} must be numbers, got {value!r}") from error


def as_times(who: str, t: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`t`, a scalar or `[B]`, in a dtype beside x `[B, ...]`."""
    own = as_float64(who, "t", t)
    if tuple(own.shape) not in ((), (x.shape[0],)):
        raise ValueError(f"{who}: t must be a scalar or ({x.shape[0]},), got {tuple(own.shape)}")
    return own.to(x.device, dtype)


def stands_for_tensor(value: Any) -> bool:
    """Whether torch functions take it as a tensor, as they do those of `fewstep.ops.dual`."""
    return hasattr(type(value), "__torch_function__") and not isinstance(value, Tensor)


def floating(who: str, name: str, t: Any) -> None:
    """Raise TypeError unless t is a dense tensor of a floating dtype."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{who}: {name} must be a tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"{who}: {name} must have a floating dtype, got {t.dtype}")
    strided(who, name, t)


def check_types(config: Any) -> None:
    """Raise TypeError unless what a frozen dataclass calls a float, str or bool is one.

    Numbers of NumPy become Python's, as JSON has them.
    """
    who = type(config).__name__
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "float":
            object.__setattr__(config, field.name, number(who, field.name, value))
        elif field.type == "bool":
            flags(who, **{field.name: value})
            object.__setattr__(config, field.name, bool(value))
        elif field.type == "str" and not isinstance(value, str):
            raise TypeError(f"{who}: {field.name} must be a string, got {value!r}")


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
    """Raise ValueError unless `sizes`, `seed`, `lr` and `ema` are within their ranges.

    Raises:
        TypeError: as `check_types`.
    """
    check_types(config)
    check_integers(config, *sizes)
    if not 0 < config.lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {config.lr!r}")
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema must be in [0, 1), got {config.ema!r}")
