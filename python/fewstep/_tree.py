"""Structures of tensors that networks return: tuples, lists, dicts, dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def mapped(value: Any, function: Callable[[Any], Any], leaves: Any = Tensor) -> Any:
    """The structure with each tensor in it, in order, replaced by what `function` has for it.

    Raises:
        ValueError: there is something else in it than tensors, numbers, strings and None.
    """
    if isinstance(value, leaves):
        return function(value)
    if value is None or isinstance(value, (int, float, complex, str, bytes)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        own = {
            f.name: mapped(getattr(value, f.name), function, leaves)
            for f in fields(value)
            if f.init
        }
        return replace(value, **own)
    if isinstance(value, dict):
        pairs = {k: mapped(v, function, leaves) for k, v in value.items()}
        return pairs if type(value) is dict else type(value)(pairs)
    if isinstance(value, (tuple, list)):
        items = [mapped(v, function, leaves) for v in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if type(value) is list else type(value)(items)
    raise ValueError(
        "jvp: network must return tensors, or tuples, lists, dicts or dataclasses of them, got"
        f" {type(value).__name__}"
    )
