"""All cases, by groups of calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from fewstep._names import Backend
from fewstep.verification import networks, transport
from fewstep.verification.cases import Case, Timing, backends
from fewstep.verification.record import Group


@functools.cache
def table() -> dict[Group, tuple[list[Case], Timing]]:
    """All groups, by op."""
    made: list[tuple[Group, list[Case], Timing]] = [*transport.groups(), *networks.groups()]
    return {group: (cases, timing) for group, cases, timing in made}


def of(groups: Sequence[Group], *, full: bool, only: str) -> Iterator[tuple[Case, Backend]]:
    """Cases of groups and the backends that they are for."""
    for group in groups:
        for case in table()[group][0]:
            if (full or not case.elements) and only in f"{' '.join(group)}: {case.name}":
                yield from ((case, backend) for backend in backends(group))
