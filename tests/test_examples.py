"""Scripts of examples/, each by itself; pages; doctests of kernels/ and benchmarks/.

pytest --doctest-modules would import kernels/ and benchmarks/, and register ops, a second time.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
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
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
EXAMPLES = [
    pytest.param(page, code, id=f"{page.stem}-{k}")
    for page in PAGES
    for k, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_pages(page: Path, code: str) -> None:
    exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts(path: Path, tmp_path: Path) -> None:
    """They have assertions where two ways are compared; their imports are all that they need."""
    names = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    for name in names:
        pytest.importorskip(str(name).split(".")[0])
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, path], cwd=tmp_path, env=one, check=True, timeout=300)


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


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
