"""The table of costs in Python and the enum that C++ and CUDA share are one list."""

from __future__ import annotations

import re
from pathlib import Path

from fewstep.reference.sinkhorn import COSTS

HEADER = Path(__file__).parents[1] / "csrc/shared/cost.h"


def test_the_enum_is_the_table() -> None:
    """An op's argument is an index into both. A formula has no kernel, and stands last."""
    (body,) = re.findall(r"enum class Cost : int \{(.*?)\};", HEADER.read_text(), re.S)
    assert tuple(re.split(r",\s*", body.strip())) == COSTS[:-1]
    assert COSTS[-1] == "formula"


def test_no_source_knows_a_cost_by_its_number() -> None:
    sources = [p for p in HEADER.parents[1].rglob("*") if p.suffix in {".h", ".inl", ".cpp", ".cu"}]
    assert len(sources) > 30
    numbers = re.compile(r"\bcost\)? *(==|!=|<=?|>=?) *\d")
    assert [p.name for p in sources if numbers.search(p.read_text())] == []
