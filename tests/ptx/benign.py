"""Findings of the interpreter that are known to do no harm, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .sim import Finding


@dataclass(frozen=True)
class Benign:
    """Findings of a kind in a kernel at a line of source, by regular expressions."""

    kind: str
    kernel: str
    source: str
    reason: str


KNOWN = (
    Benign(
        r"race|race within a warp",
        r"sinkhorn_column_kernel",
        r"tl\.(load|store)\(G \+ points",
        "lanes that hold the same columns read G after the one that stores may have stored the new"
        " value: what they make of it is stored by nobody",
    ),
    Benign(
        r"race( within a warp| between blocks)?",
        r"sinkhorn_(column|kept_merge|symmetric)_kernel",
        r"tl\.(load|store)\(Done \+ problem",
        "a thread that sees Done early returns, as it would by its own decision: all threads of a"
        " problem decide by the same numbers, and each has read Done before it takes part in a sum"
        " that the store waits for",
    ),
)


def reason(finding: Finding) -> str | None:
    """Why a finding does no harm, or None."""
    for known in KNOWN:
        if (
            re.fullmatch(known.kind, finding.kind)
            and re.fullmatch(known.kernel, finding.kernel)
            # A load in a condition may be given the line of the branch that follows.
            and re.search(known.source, finding.source(before=1))
        ):
            return known.reason
    return None
