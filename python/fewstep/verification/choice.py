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

    def reason(name: str) -> str | None:
        return unavailable(name, device.type) or unsupported(name)

    name = requested if requested is not None else os.environ.get("FEWSTEP_BACKEND") or None
    if name is None:
        cuda = is_cuda(device)
        order = PLAIN if cuda else DEFAULT_ORDER.get(device.type, ("reference",))
        if cuda and group is not None:
            served = tuple(b for b in KERNELS if reason(b) is None)
            order = default_order(device, group()) if served else order
        return next(b for b in order if reason(b) is None)
    if not isinstance(name, str) or name not in BACKENDS:
        offered = tuple(b for b in BACKENDS if unsupported(b) is None)
        raise ValueError(f"{op}: backend must be one of {offered}, got {name!r}")
    if why := reason(name):
        raise ValueError(f"{op}: backend {name!r} cannot serve this call: {why}")
    return name


@constant
def default_order(device: torch.device, group: tuple[str, ...]) -> tuple[str, ...]:
    """Backends by preference for calls of a group: the same for a whole process."""
    found = _CHOSEN.get((device.index, group))
    if found is not None:
        return found
    from fewstep.verification import decision  # imported where there is something to decide

    with _LOCK:
        if (device.index, group) in _CHOSEN:
            return _CHOSEN[device.index, group]
        kernels = decision.decide(device, group)
        if kernels is None:
            return PLAIN
        order = _CHOSEN[device.index, group] = (*kernels, *PLAIN)
        return order
