"""The interpreter from Python: load PTX, launch kernels, read findings and counters.

Under `LD_PRELOAD=build/libptx.so` the interpreter also knows where torch's CPU tensors end.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = HERE / "build"
OUT = HERE / "out"
DEVICE = os.environ.get("PTX_DEVICE", "h100")
ARCH = {"a100": 80, "h100": 90, "b200": 100}[DEVICE]

lib = ctypes.CDLL(str(BUILD / "libptx.so"))
for _name in ("ptx_error", "ptx_findings", "ptx_counters"):
    getattr(lib, _name).restype = ctypes.c_char_p
lib.ptx_entry.restype = ctypes.c_void_p
lib.ptx_entry.argtypes = [ctypes.c_char_p]
lib.ptx_option.argtypes = [ctypes.c_char_p, ctypes.c_double]
lib.ptx_register.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p]
lib.ptx_unregister.argtypes = [ctypes.c_void_p]
lib.ptx_parameters.argtypes = [ctypes.c_void_p]
lib.ptx_launch.argtypes = [
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_int,
]


class InterpreterError(RuntimeError):
    """What the interpreter refuses or finds wrong."""


def preloaded() -> bool:
    return "libptx" in os.environ.get("LD_PRELOAD", "")


def load(text: str | bytes) -> None:
    """Make the entries of a PTX text known by their names."""
    text = text.encode() if isinstance(text, str) else text
    if lib.ptx_load(text):
        raise InterpreterError(lib.ptx_error().decode())


def option(name: str, value: float) -> None:
    lib.ptx_option(name.encode(), value)


def options_of_environment() -> None:
    """Set those that PTX_SEED and its like give: see README.md."""
    for name in ("seed", "approximate", "resident", "races", "global_races", "truncate"):
        if (value := os.environ.get("PTX_" + name.upper())) is not None:
            option(name, float(value))


def entry(name: str) -> int:
    found = lib.ptx_entry(name.encode())
    if not found:
        raise InterpreterError(f"no kernel {name}")
    return int(found)


def launch(
    kernel: str | int,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Any],
    *,
    shared: int = 0,
    cluster: Sequence[int] = (1,),
) -> None:
    """Run a kernel on ctypes values; pointers are `c_void_p`."""
    handle = entry(kernel) if isinstance(kernel, str) else kernel
    dims = [n for d in (grid, block, cluster) for n in (*d, 1, 1)[:3]]
    values = [ctypes.c_void_p(a.ctypes.data) if hasattr(a, "ctypes") else a for a in arguments]
    pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(v) for v in values))
    if lib.ptx_launch(handle, (ctypes.c_uint32 * 9)(*dims), shared, pointers, len(values)):
        raise InterpreterError(lib.ptx_error().decode())


def register(array: Any, name: str = "array") -> Any:
    """Make a numpy array device memory."""
    lib.ptx_register(array.ctypes.data, array.nbytes, name.encode())
    return array


@dataclass
class Finding:
    """What does not stop a kernel, such as a race, by its first occurrence.

    Attributes:
        where: the line of PTX, the statement and the line of source it was compiled from.
    """

    kind: str
    count: int
    kernel: str
    where: str
    detail: str

    @property
    def place(self) -> str:
        """`where` without lines of PTX, which differ between specialisations."""
        return re.sub(r"( after)? ?PTX line \d+ ?", "", self.where)

    def source(self, before: int = 0) -> str:
        """The line of source, after others before it; "" where it is not known."""
        at = re.search(r" at (\S+):(\d+)", self.where)
        if at is None or not (path := ROOT / at[1]).is_file():
            return ""
        end = int(at[2])
        return "\n".join(path.read_text().splitlines()[max(end - 1 - before, 0) : end]).strip()


def _shortened(where: str) -> str:
    """With paths from the root of the repository."""
    return where.replace(f"{ROOT}/", "").replace("csrc/cuda/../", "csrc/")


def findings(clear: bool = True) -> list[Finding]:
    out = []
    for line in lib.ptx_findings(int(clear)).decode().splitlines():
        kind, count, kernel, where, detail = line.split("\t")
        out.append(Finding(kind, int(count), kernel, _shortened(where), detail))
    return out


@dataclass
class Count:
    entry: int
    kernel: str
    launches: int
    where: str
    kind: str
    warps: int
    threads: int
    wavefronts: int
    ideal: int
    sectors: int
    needed: int


def counters(clear: bool = True) -> list[Count]:
    rows = []
    for line in lib.ptx_counters(int(clear)).decode().splitlines():
        number, kernel, launches, where, kind, *numbers = line.split("\t")
        counts = map(int, numbers)
        rows.append(Count(int(number), kernel, int(launches), _shortened(where), kind, *counts))
    return rows


CLASSES = (
    *("integer", "float32", "float64", "special", "convert"),
    *("move", "predicate", "branch", "shuffle", "tensor"),
)


def _cells(kernel: str, rows: list[Count]) -> list[str]:
    total = sum(r.warps for r in rows)

    def of(name: str, *kinds: str) -> int:
        return sum(getattr(r, name) for r in rows if not kinds or r.kind in kinds)

    def ratio(actual: int, least: int) -> list[str]:
        return [f"{actual:,}", f"{least:,}", f"{actual / least:.2f}" if least else "-"]

    launches = sum({r.entry: r.launches for r in rows}.values())
    return [
        *(kernel, f"{launches:,}", f"{total:,}", f"{of('threads') / total:.1f}"),
        *(f"{100 * of('warps', kind) / total:.1f}%" for kind in CLASSES),
        f"{of('warps', 'barrier'):,}",
        f"{of('warps', 'ld.shared', 'st.shared', 'matrix'):,}",
        *ratio(of("wavefronts"), of("ideal")),
        f"{of('warps', 'ld.global', 'st.global', 'cp.async'):,}",
        *ratio(of("sectors"), of("needed")),
    ]


def table(rows: list[Count]) -> str:
    """One line per kernel, in Markdown."""
    by_kernel: dict[str, list[Count]] = defaultdict(list)
    for row in rows:
        by_kernel[row.kernel].append(row)
    shared, memory = ("wavefronts", "ideal", "ratio"), ("sectors", "needed", "ratio")
    head = ("kernel", "launches", "warp instr.", "lanes", *CLASSES, "barriers", "shared", *shared)
    lines = [(*head, "global", *memory), ["---"] * (len(head) + 4)]
    lines += [_cells(kernel, own) for kernel, own in sorted(by_kernel.items())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def worst(rows: list[Count], count: int = 12) -> str:
    """The source lines that lose most to bank conflicts and to sectors that carry nothing."""
    merged: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for r in rows:
        opcode = r.where[r.where.index("(") :]
        for k, value in enumerate((r.wavefronts, r.ideal, r.sectors, r.needed)):
            merged[r.kernel, opcode][k] += value
    lines = []
    for title, k in (
        ("wavefronts of shared memory, ideal", 0),
        ("sectors of global memory, needed", 2),
    ):
        lines += [
            "",
            f"| kernel | access | {title} | ratio |".replace(", ", " | "),
            "| --- " * 5 + "|",
        ]
        for (kernel, where), n in sorted(
            merged.items(), key=lambda item: item[1][k + 1] - item[1][k]
        )[:count]:
            if n[k] > n[k + 1]:
                lines.append(
                    f"| {kernel} | {where} | {n[k]:,} | {n[k + 1]:,} | {n[k] / n[k + 1]:.1f} |"
                )
    return "\n".join(lines)
