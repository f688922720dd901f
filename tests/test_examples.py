"""Examples and links of the pages; scripts; examples of kernels/ and benchmarks/ by their names.

pytest --doctest-modules would import the kernels, and register their ops, a second time.
"""

from __future__ import annotations

import doctest
import importlib
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
    for folder, package in (("kernels", "fewstep.kernels"), ("benchmarks", "benchmarks"))
    for path in (ROOT / folder).rglob("*.py")
    if ">>>" in path.read_text()
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [
    *PAGES,
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    ROOT / "tests" / "ptx" / "README.md",
]
EXAMPLES = [
    pytest.param(page, code, id=f"{page.stem}-{k}")
    for page in PAGES
    for k, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_pages(page: Path, code: str) -> None:
    exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        assert anchor in ("", *map(_slug, headings)), target


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem
)
def test_scripts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
