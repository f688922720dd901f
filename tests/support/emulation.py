"""Kernels of csrc/shared compiled for the host: requests in, answers out."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build/emulation"
# The thread sanitizer would otherwise report only when the process ends.
HALT = {"TSAN_OPTIONS": "halt_on_error=1"}


class Emulator:
    """A process that answers request after request until it is closed."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, request: bytes) -> bytes:
        if self._process is None:
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            self._process = subprocess.Popen([self._program], env={**os.environ, **HALT}, **pipes)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(struct.pack("q", len(request)) + request)
            self._process.stdin.flush()
            (length,) = struct.unpack("q", self._process.stdout.read(8))
        except (BrokenPipeError, struct.error):
            self.close()
            raise AssertionError("the emulator ended without an answer") from None
        return self._process.stdout.read(length)

    def close(self) -> None:
        """End the process. What its sanitizer found, leaks among it, is an error."""
        process, self._process = self._process, None
        if process is not None:
            _, errors = process.communicate()
            assert process.returncode == 0, f"exit {process.returncode}: {errors.decode()}"


@contextmanager
def emulator(source: str, sanitizer: str, *, optimise: str) -> Iterator[Emulator]:
    """`tests/cuda_emulation/<source>`, built under a sanitizer unless it was already."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = ROOT / "tests/cuda_emulation" / source
    flags = ["-std=c++20", optimise, "-g1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/csrc"]
    command = [compiler, *flags, str(path), "-pthread"]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True)
    preprocessed = subprocess.run([*command, "-E"], capture_output=True)
    if preprocessed.returncode != 0:
        pytest.fail(preprocessed.stderr.decode())
    variants = _variants(sanitizer)
    content = b"\0".join([repr((command, variants)).encode(), version.stdout, preprocessed.stdout])
    name = f"{path.stem}-{sanitizer}-"
    target = BUILT / f"{name}{hashlib.sha256(content).hexdigest()[:16]}"
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / f".{name}lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait for this build
        if not target.exists():
            for old in BUILT.glob(f"{name}*"):
                old.unlink()
            _build(command, variants, target)
    running = Emulator(target)
    try:
        yield running
    finally:
        running.close()


def _variants(sanitizer: str) -> list[list[str]]:
    """Flags. A sanitizer may be missing, or refuse the address layout: then without it."""
    few = [[f"-fsanitize={sanitizer}"], []]
    if os.environ.get("FEWSTEP_SANITIZE") != "1":
        return few  # undefined behaviour takes minutes more to compile
    both = f"-fsanitize={sanitizer},undefined,float-cast-overflow"
    return [[both, "-fno-sanitize-recover=all"], *few]


def _build(command: list[str], variants: list[list[str]], target: Path) -> None:
    part = target.with_suffix(".part")
    for extra in variants:
        made = subprocess.run([*command, *extra, "-o", str(part)], capture_output=True, text=True)
        if made.returncode != 0:
            continue
        if subprocess.run([part], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0:
            part.replace(target)
            return
    pytest.fail(made.stderr)


def arrays(*tensors: Tensor) -> bytes:
    return b"".join(t.contiguous().numpy().tobytes() for t in tensors)


def split(answer: bytes, *parts: tuple[torch.dtype, tuple[int, ...]]) -> list[Tensor]:
    out, start = [], 0
    for dtype, shape in parts:
        kind = {torch.bool: np.bool_, torch.int64: np.int64, torch.float32: np.float32}
        size = int(np.prod(shape)) * dtype.itemsize
        piece = np.frombuffer(answer[start : start + size], dtype=kind.get(dtype, np.float64))
        out.append(torch.from_numpy(piece.reshape(shape).copy()))
        start += size
    assert start == len(answer)
    return out


def wide(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)
