"""Columns of text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as plain text, the first column to the left and others to the right.

    >>> print(aligned([("metric", "value"), ("recall", "0.75")]))
    metric  value
    recall   0.75
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'>' if c else '<'}{widths[c]}}" for c, cell in enumerate(line)).rstrip()
        for line in lines
    )
