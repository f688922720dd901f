"""Timing of runs that take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], tuple[Any, ...]]
_COMPARED_S = 1.5


class Beside:
    """A contender's run, and how it compares with the network alone in the same process."""

    def __init__(
        self, problem: Any, build: Callable[[Any], Run], alone: Callable[[Any], Run]
    ) -> None:
        self.run, self.network = build(problem), alone(problem)

    def __call__(self) -> tuple[Any, ...]:
        return self.run()

    def more(self) -> dict[str, float]:
        found: dict[str, float] = getattr(self.run, "more", dict)()
        return found | {"over_network": compared(self.run, self.network)}


def compared(run: Run, network: Run) -> float:
    """The ratio of medians of calls in turn, for `_COMPARED_S` seconds and at least nine of each.

    A machine's speed may change between processes, and then does so for both here.
    """
    times: tuple[list[float], list[float]] = ([], [])
    run(), network()
    while sum(map(sum, times)) < _COMPARED_S or len(times[0]) < 9:
        for call, own in zip((run, network), times, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def saved_mb(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> float:
    """What a forward pass keeps for its backward pass, parameters not counted."""
    seen: dict[int, int] = {}

    def pack(z: Tensor) -> Tensor:
        own = z
        while torch._C._functorch.is_functorch_wrapped_tensor(own):
            own = torch._C._functorch.get_unwrapped(own)
        if not own._is_zerotensor():
            seen[own.untyped_storage().data_ptr()] = own.untyped_storage().nbytes()
        return z

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
        out = forward()
    for parameter in parameters:
        seen.pop(parameter.untyped_storage().data_ptr(), None)
    kept = sum(seen.values()) / 2**20
    del out
    return kept
