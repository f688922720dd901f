"""What an installation promises: lean import, stable symbols, forced CPU capability, sdist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep import _C, _library, info

ROOT = Path(__file__).parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_import_needs_torch_and_numpy_alone() -> None:
    heavy = ["triton", "tyro", "tqdm", "matplotlib", "sklearn", "safetensors", "tensorboard", "ot"]
    # torch imports what it finds of some of these itself.
    code = f"import sys, torch; had = set(sys.modules); import fewstep; print([m for m in {heavy} \
if m in set(sys.modules) - had])"
    assert python(code).stdout.strip() == "[]"


def test_version() -> None:
    assert f'version = "{fewstep.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("library", [Path(_C.__file__), _library.cuda_library()])
def test_symbols_are_of_the_stable_abi(library: Path | None) -> None:
    """No C++ symbol of torch is needed, so one build serves every torch from 2.11 on."""
    if library is None:
        pytest.skip("built without nvcc")
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split(maxsplit=1)[-1] for line in listing.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [n for n in names if n.startswith(("at::", "c10::", "torch::"))] == []


def test_functions_of_an_instruction_set_are_its_own() -> None:
    """The linker takes a weak function from any object, for every CPU: one that has AVX compiled
    none, of std or of the project."""
    units = sorted((ROOT / "build").glob("temp*/csrc/cpu/simd/*_avx*.o"))
    if not units or shutil.which("nm") is None or os.environ.get("FEWSTEP_SANITIZE") == "1":
        pytest.skip("no objects, no nm, or objects of the sanitizers, which inline less")
    for unit in units:
        listing = subprocess.run(["nm", "-C", unit], capture_output=True, text=True, check=True)
        defined = [line for line in listing.stdout.splitlines() if not line.startswith(" ")]
        symbols = [line.split(maxsplit=2)[1:] for line in defined]
        assert any(name.startswith("fewstep::cpu::avx") for _, name in symbols)
        assert [name for kind, name in symbols if kind in "WVu"] == [], unit.name


def test_cpu_capability_is_detected_and_overridden() -> None:
    detected = _C.detected_cpu_capability()
    code = "from fewstep import _C; print(_C.cpu_capability())"
    assert python(code, FEWSTEP_CPU_CAPABILITY="base").stdout.strip() == "base"
    assert python(code, FEWSTEP_CPU_CAPABILITY="").stdout.strip() == detected
    unknown = python(code, FEWSTEP_CPU_CAPABILITY="sse9")
    assert unknown.stdout.strip() == detected
    assert "FEWSTEP_CPU_CAPABILITY=sse9 is unknown" in unknown.stderr
    with pytest.raises(ValueError, match="must be base, avx2 or avx512, got sse9"):
        _C.set_cpu_capability("sse9")


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cuda")], ids=" ".join)
def test_info_names_the_default_and_the_reasons(
    devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in devices)
    page = info.report()
    assert ("torch finds no CUDA device" in page) == ("cuda" not in devices)
    rows = [line.split(maxsplit=3) for line in page.splitlines() if line.startswith("sinkhorn")]
    assert ["sinkhorn", "cpu", "cpp", "yes, default"] in rows
    assert all(row[3].startswith(("yes", "no: ")) for row in rows)
    assert {(row[1], row[2]) for row in rows} == {
        (device, backend) for device in devices for backend in _library.BACKENDS
    }


def test_missing_library_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fewstep._C", None)
    with pytest.raises(ImportError, match="pip install --no-build-isolation"):
        _library.load_cpp()


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_insisting_on_cuda_without_nvcc_is_one_line(tmp_path: Path) -> None:
    result = setup("--version", FEWSTEP_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "fewstep: FEWSTEP_CUDA=1 needs nvcc: set CUDA_HOME or put nvcc on PATH"
    )
    result = setup("--version", FEWSTEP_CUDA="yes")
    assert "FEWSTEP_CUDA must be 0, 1 or auto, got 'yes'" in result.stderr


def test_a_compiler_that_is_missing_or_old_is_one_line(tmp_path: Path) -> None:
    build = ("-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    result = setup(*build, CXX="no-such-compiler")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("fewstep: no C++ compiler: no-such-compiler cannot be run; GCC 11 or")
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho '#define __GNUC__ 9'\n")
    old.chmod(0o755)
    result = setup(*build, CXX=str(old))
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"fewstep: {old} is GCC 9: GCC 11 or clang 14 or later is needed"


def test_sdist_has_every_source(tmp_path: Path) -> None:
    build = ("-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path))
    result = setup(*build, FEWSTEP_CUDA="0")
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    folders = ("benchmarks", "csrc", "kernels", "python/fewstep", "tests")
    suffixes = (".cpp", ".h", ".inl", ".cu", ".cuh", ".py", ".typed", ".csv", ".png")
    expected = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
        and "_subset" not in path.name
        and not path.is_relative_to(ROOT / "tests" / "ptx" / "build")
        and not path.is_relative_to(ROOT / "tests" / "ptx" / "out")
    }
    assert expected - names == set()
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    single = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile", "constraints.txt"}
    assert single | pages <= names
