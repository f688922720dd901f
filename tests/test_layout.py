"""Which folder may import which: one table, no circles, nothing upward."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = {
    "python/fewstep": "fewstep",
    "kernels": "fewstep.kernels",
    "benchmarks": "benchmarks",
    "tests": "tests",
}
# A room, and the rooms below it that it may import; itself always. A module that stands in no
# folder of its own is a room by its name.
CORE = {
    "fewstep._checks",
    "fewstep._files",
    "fewstep._library",
    "fewstep._names",
    "fewstep._ranks",
    "fewstep._results",
    "fewstep._torch",
    "fewstep._tree",
}
OPS = {"fewstep.ops.dual", "fewstep.ops.heun", "fewstep.ops.sinkhorn", "fewstep.ops.trace"}
BELOW_OPS = CORE | {"fewstep.reference", "fewstep.kernels", "fewstep.verification.choice"}
MAY_IMPORT: dict[str, set[str]] = {
    **{module: set() for module in CORE},
    "fewstep._library": {"fewstep._names"},
    "fewstep._ranks": {"fewstep._torch"},
    "fewstep._aliases": set(),
    "fewstep.reference": CORE,
    "fewstep.kernels": CORE | {"fewstep.reference"},
    "fewstep.conversions": CORE,
    "fewstep.networks": CORE,
    # Of the verification only the choice of a backend is below the ops.
    "fewstep.verification.choice": CORE | {"fewstep.verification.decision"},
    "fewstep.verification.decision": CORE
    | {f"fewstep.verification.{name}" for name in ("record", "supervisor")},
    "fewstep.verification.supervisor": {"fewstep.verification.record"},
    "fewstep.verification.record": CORE,
    "fewstep.ops": set(),
    "fewstep.ops.sinkhorn": BELOW_OPS,
    "fewstep.ops.dual": BELOW_OPS,
    "fewstep.ops.trace": BELOW_OPS | {"fewstep.ops.dual"},
    "fewstep.ops.heun": BELOW_OPS | {"fewstep.ops.dual", "fewstep.ops.trace"},
    "fewstep.samplers": CORE | OPS | {"fewstep.reference"},
    "fewstep": CORE | OPS | {"fewstep._aliases", "fewstep.samplers"},
    "fewstep.func": CORE | OPS,
    "fewstep.metrics": CORE,
    "fewstep.data": CORE | {"fewstep", "fewstep.samplers", "fewstep.conversions"},
    "fewstep.methods": CORE
    | OPS
    | {"fewstep.reference", "fewstep.samplers", "fewstep.conversions"},
    "fewstep.baselines": CORE | {"fewstep.methods", "fewstep.reference"},
    # Calls of other libraries.
    "fewstep.compat": CORE
    | OPS
    | {"fewstep", "fewstep.reference", "fewstep.conversions", "fewstep.data", "fewstep.samplers"},
    "fewstep.verification": CORE
    | OPS
    | {"fewstep", "fewstep.reference"}
    | {f"fewstep.verification.{name}" for name in ("decision", "record", "supervisor")},
    "fewstep.info": CORE
    | OPS
    | {"fewstep", "fewstep.verification.decision", "fewstep.verification.record"},
    "fewstep.training": CORE
    | OPS
    | {"fewstep", "fewstep.data", "fewstep.metrics", "fewstep.methods", "fewstep.networks"}
    | {"fewstep.baselines", "fewstep.samplers", "fewstep.verification"},
    "fewstep.__main__": {"fewstep.cli"},
    "fewstep.cli": {"fewstep", "fewstep.training", "fewstep.verification"},
}
# Headers and sources of C++ and CUDA, by folder. The units of csrc/cpu/simd compile bodies of
# csrc/cpu, which compute by its math.h and normals.h.
MAY_INCLUDE = {
    "csrc": {"csrc/cpu"},
    "csrc/shared": set(),
    "csrc/shared/resident": {"csrc/shared"},
    "csrc/cpu": {"csrc/shared", "csrc/cpu/simd"},
    "csrc/cpu/simd": {"csrc/cpu", "csrc/shared"},
    "csrc/cuda": {"csrc/shared", "csrc/shared/resident"},
}


@cache
def modules() -> dict[str, Path]:
    """Every module by its name; those of tests/ptx, which has an environment of its own, aside."""
    found = {}
    for folder, package in PYTHON.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[0] != "ptx" or folder != "tests":
                own = [part for part in parts if part != "__init__"]
                found[".".join([package, *own])] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """Modules of the project that a file names in an import, wherever it stands."""
    package = name.split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text())):
        wanted: list[str] = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if name.startswith("tests.") and f"tests.{source}" in modules():
                source = f"tests.{source}"  # tests import each other from their folder
            both = [f"{source}.{alias.name}" for alias in node.names]
            wanted = [full if full in modules() else source for full in both]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            wanted = [a.value for a in node.args if isinstance(a, ast.Constant)]
        yield from (w for w in wanted if w in modules() and w != name)


@cache
def graph() -> dict[str, set[str]]:
    """Every module, and those that it imports."""
    return {name: set(imported(name, path)) for name, path in modules().items()}


def wrong(allowed: Callable[[str, str], bool]) -> list[str]:
    """The imports that are not allowed."""
    return [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in sorted(others)
        if not allowed(name, other)
    ]


def room(name: str) -> str:
    """The longest name of the table that a module's name begins with; the root is its own room."""
    parts = name.split(".")
    names = [".".join(parts[:k]) for k in range(len(parts), min(len(parts) - 1, 1), -1)]
    found = [n for n in names if n in MAY_IMPORT]
    assert found, f"{name} stands in no room of the table"
    return found[0]


def test_no_room_imports_upward() -> None:
    def allowed(name: str, other: str) -> bool:
        if name.split(".")[0] != "fewstep":
            return True
        return room(other) in MAY_IMPORT[room(name)] | {room(name)}

    assert wrong(allowed) == []


def test_the_table_has_no_circle() -> None:
    for table in (MAY_IMPORT, MAY_INCLUDE):
        for rooms in table.values():
            assert rooms <= table.keys()
    tuple(TopologicalSorter(MAY_IMPORT).static_order())


def test_no_module_imports_in_a_circle() -> None:
    tuple(TopologicalSorter(graph()).static_order())


def test_no_test_imports_another() -> None:
    assert wrong(lambda name, other: ".test_" not in other) == []


def test_the_package_imports_neither_tests_nor_benchmarks() -> None:
    def allowed(name: str, other: str) -> bool:
        above = {"fewstep": 0, "benchmarks": 1, "tests": 2}
        return above[name.split(".")[0]] >= above[other.split(".")[0]]

    assert wrong(allowed) == []


def included(path: Path) -> Iterator[Path]:
    for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.M):
        places = (path.parent / name, ROOT / "csrc" / name)
        yield next(p.resolve() for p in places if p.exists())


@pytest.fixture(scope="module")
def sources() -> list[Path]:
    suffixes = {".h", ".inl", ".cpp", ".cu", ".cuh"}
    return [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in suffixes]


def test_no_source_includes_upward(sources: list[Path]) -> None:
    def folder(path: Path) -> str:
        return str(path.parent.relative_to(ROOT))

    wrong = [
        f"{path.relative_to(ROOT)} includes {other.relative_to(ROOT)}"
        for path in sources
        for other in included(path)
        if folder(other) not in MAY_INCLUDE[folder(path)] | {folder(path)}
    ]
    assert wrong == []


def test_no_source_includes_in_a_circle(sources: list[Path]) -> None:
    tuple(TopologicalSorter({path: set(included(path)) for path in sources}).static_order())
