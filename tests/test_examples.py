"""Examples of the README, and in docstrings of kernels/ and benchmarks/ by their imported names.

pytest --doctest-modules would import the kernels, and register their ops, a second time.
"""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
    for folder, package in (("kernels", "fewstep.kernels"), ("benchmarks", "benchmarks"))
    for path in (ROOT / folder).rglob("*.py")
    if ">>>" in path.read_text()
}
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", README, ids=range(len(README)))
def test_readme(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
