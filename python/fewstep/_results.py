"""What results have in common: a short repr, and arrays for who gave arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_FEW = 4  # numbers that a repr shows


def brief(result: Any) -> str:
    """The repr of a result: its numbers, and the shapes of what is larger.

    >>> import fewstep
    >>> x = torch.zeros(5, 2)
    >>> fewstep.sinkhorn(x, x + 1, eps=0.1)
    SinkhornResult(value=2, residual=0, iterations=100, converged=True, f=[5], g=[5])
    """
    numbers: list[str] = []
    shapes: list[str] = []
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if not field.repr or value is None or (isinstance(value, str) and not value):
            continue
        if isinstance(value, Tensor):
            few = value.numel() <= _FEW and field.name not in ("f", "g") and not value.is_meta
            text = _numbers(value) if few else str([*value.shape])
            (numbers if few else shapes).append(f"{field.name}={text}")
        else:
            (shapes if dataclasses.is_dataclass(value) else numbers).append(
                f"{field.name}={value!r}"
            )
    return f"{type(result).__name__}({', '.join(numbers + shapes)})"


def _numbers(t: Tensor) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(shown, value))}]"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    try:
        return shown(t.detach().tolist())
    except (RuntimeError, NotImplementedError):  # in a graph or a transform there are no numbers
        return str([*t.shape])


class Arrays:
    """A result whose tensors are arrays of NumPy, and whose methods take and return such arrays."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _to_arrays(getattr(self._result, name))

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._result) if not name.startswith("_")]

    def __repr__(self) -> str:
        return repr(self._result)


def _to_arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().numpy()
    if dataclasses.is_dataclass(value):
        return Arrays(value)
    if callable(value):
        return lambda *args, **options: _to_arrays(value(*_to_tensors(args), **_of(options)))
    return tuple(map(_to_arrays, value)) if isinstance(value, tuple) else value


def _to_tensors(values: Any) -> Any:
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError("masked arrays are not supported: leave masked points out, or weigh them 0")
    if isinstance(values, np.ndarray):  # of any strides and byte order
        return torch.tensor(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))
    return tuple(map(_to_tensors, values)) if isinstance(values, tuple) else values


def _of(options: dict[str, Any]) -> dict[str, Any]:
    return {name: _to_tensors(value) for name, value in options.items()}


def takes_arrays(op: Callable[P, R]) -> Callable[P, R]:
    """Let a function of point clouds take arrays of NumPy, for which it returns `Arrays`."""

    @functools.wraps(op)
    def given(*args: P.args, **options: P.kwargs) -> R:
        first = args[0] if args else options.get("x")
        if first is None:
            costs = options.get("C")
            first = costs[0] if isinstance(costs, tuple) and costs else costs
        if isinstance(first, np.ndarray):
            return on_arrays(op, args, options)
        return op(*args, **options)

    return given


def on_arrays(op: Callable[..., R], args: tuple[Any, ...], options: dict[str, Any]) -> R:
    mixed = next((v for v in (*args, *options.values()) if isinstance(v, Tensor)), None)
    if mixed is not None:
        raise TypeError(
            f"{op.__name__}: all must be tensors or all arrays, got an array beside a Tensor:"
            " torch.from_numpy makes one of the other"
        )
    return cast(R, _to_arrays(op(*_to_tensors(args), **_of(options))))
