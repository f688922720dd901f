"""What autocast does to a function, which torch itself is asked for.

Autocast casts arguments to one dtype, by lists of functions that differ from device to device. What
it chose is seen in the result. So the first call of each kind runs the plain function once, on
zeros; a rule then has arguments of that dtype, and runs without autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from fewstep._torch import to_random_state
from fewstep.ops.dual.traced import Traced, UnsupportedError, name_of

_PLAIN = (bool, str, type(None), torch.dtype, torch.device)
_seen: dict[Hashable, torch.dtype | None] = {}


def result_dtype(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.dtype | None:
    """That of a function's first floating result under the autocast of now, or None.

    Raises:
        UnsupportedError: the plain function fails.
    """
    devices: dict[str, torch.dtype] = {}
    kinds = _kind((args, kwargs), devices)
    key = (func, kinds, *devices.items())
    if key not in _seen:
        _seen[key] = _asked(func, args, kwargs)
    return _seen[key]


def converted(value: Any, cast: Callable[[Any], Any]) -> Any:
    """`cast` of each floating tensor or stand-in within arguments."""
    if isinstance(value, (Tensor, Traced)):
        return cast(value) if value.dtype.is_floating_point else value
    if isinstance(value, dict):
        return {name: converted(own, cast) for name, own in value.items()}
    if type(value) in (list, tuple):
        return type(value)([converted(own, cast) for own in value])
    return value


def _kind(value: Any, devices: dict[str, torch.dtype]) -> Hashable:
    """Of an argument; numbers may count anything. `devices`: those where autocast is on."""
    if isinstance(value, (Tensor, Traced)):
        device = value.device.type
        if torch.is_autocast_enabled(device):
            devices[device] = torch.get_autocast_dtype(device)
        return value.dtype, value.ndim, device
    if isinstance(value, dict):
        return tuple((name, _kind(own, devices)) for name, own in value.items())
    if type(value) in (list, tuple):
        return tuple([_kind(own, devices) for own in value])
    own: Any = value if isinstance(value, _PLAIN) else type(value)
    return own  # type: ignore[no-any-return]


@torch.no_grad()
def _asked(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.dtype | None:
    def zeros(z: Any) -> Tensor:
        return torch.zeros(z.shape, dtype=z.dtype, device=z.device)

    found: list[torch.dtype] = []

    def note(z: Any) -> Any:
        found.append(z.dtype)
        return z

    stand_ins = _stand_ins((args, kwargs))
    if not all(z.dtype.is_floating_point for z in stand_ins):
        return None
    back = to_random_state(torch.empty(0, device=stand_ins[0].device))
    try:
        with torch._C.DisableTorchFunction():
            out = func(*converted(args, zeros), **converted(kwargs, zeros))
    except Exception as error:
        raise UnsupportedError(f"no rule for {name_of(func)} under autocast: {error}") from error
    finally:
        back()
    converted(out, note)
    return found[0] if found else None


def _stand_ins(value: Any) -> list[Traced]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [z for own in value for z in _stand_ins(own)]
    return [value] if isinstance(value, Traced) else []
