"""Kernels of csrc/shared compiled for the host: requests in, answers out."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
Emulator = Callable[[bytes], bytes]


def build_emulator(
    source: str, target: Path, sanitizer: str, empty: bytes, *, optimise: str
) -> Emulator:
    """Compile `tests/cuda_emulation/<source>` under a sanitizer; `empty` asks for nothing."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = ROOT / "tests/cuda_emulation" / source
    # A sanitizer may be missing, or refuse the machine's address layout: then without it.
    for extra in ([f"-fsanitize={sanitizer}"], []):
        flags = ["-std=c++20", optimise, "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/csrc"]
        command = [compiler, *flags, *extra, str(path), "-o", str(target), "-pthread"]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode != 0:
            continue
        if subprocess.run([target], input=empty, capture_output=True).returncode == 0:
            break
    else:
        pytest.fail(made.stderr)

    def run(request: bytes) -> bytes:
        done = subprocess.run([target], input=request, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return run


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
