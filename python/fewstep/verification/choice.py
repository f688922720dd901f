"""Which backend serves a call: the one that was named, else one that is right and fast here.

A kernel runs on a GPU by default where it has matched float64 on that GPU, in all cases of the
call's group, and is faster there than plain torch: `fewstep.verification.decision`, once for a
process, a device and a group.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from fewstep._library import BACKENDS, DEFAULT_ORDER, KERNELS, is_cuda, unavailable
from fewstep._torch import constant

PLAIN = DEFAULT_ORDER["cuda"]

_CHOSEN: dict[tuple[int | None, tuple[str, ...]], tuple[str, ...]] = {}
_LOCK = threading.Lock()


def choose_backend(
    op: str,
    device: torch.device,
    requested: str | None,
    unsupported: Callable[[str], str | None] = lambda _: None,
    group: Callable[[], tuple[str, ...]] | None = None,
) -> str:
    """The backend that serves `op`: the requested one, `FEWSTEP_BACKEND`, or the default.

    Args:
        unsupported: why a backend cannot do what the call asks for, or None.
        group: the calls that run the same kernels as this one; None: no kernel would serve it.

    Raises:
        ValueError: an unknown backend, or one that cannot serve the call (with the reason).
    """
    kind = device.type

    def reason(name: str) -> str | None:
        return unavailable(name, kind) or unsupported(name)

    name = requested if requested is not None else os.environ.get("FEWSTEP_BACKEND") or None
    if name is None:
        if not is_cuda(device):
            order = DEFAULT_ORDER.get(kind, ("reference",))
        else:
            order = PLAIN if group is None else _order(device, group(), reason)
        for own in order:  # a generator would cost a microsecond
            if reason(own) is None:
                return own
        raise AssertionError(f"{op}: the reference serves everything")
    if not isinstance(name, str) or name not in BACKENDS:
        offered = tuple(b for b in BACKENDS if unsupported(b) is None)
        raise ValueError(f"{op}: backend must be one of {offered}, got {name!r}")
    if why := reason(name):
        raise ValueError(f"{op}: backend {name!r} cannot serve this call: {why}")
    return name


def _order(
    device: torch.device, group: tuple[str, ...], reason: Callable[[str], str | None]
) -> tuple[str, ...]:
    """Backends by preference; nothing is decided for a call that no kernel serves."""
    if not torch.compiler.is_compiling():
        found = _CHOSEN.get((device.index, group))
        if found is not None:
            return found
    if all(reason(name) is not None for name in KERNELS):
        return PLAIN
    return default_order(device, group)


@constant
def default_order(device: torch.device, group: tuple[str, ...]) -> tuple[str, ...]:
    """Backends by preference for calls of a group: the same for a whole process."""
    from fewstep.verification import decision  # imported where there is something to decide

    with _LOCK:
        if (device.index, group) in _CHOSEN:
            return _CHOSEN[device.index, group]
        kernels = decision.decide(device, group)
        if kernels is None:
            return PLAIN
        order = _CHOSEN[device.index, group] = (*kernels, *PLAIN)
        return order
