"""What was found on a device, kept in the user's cache folder.

    {"format": 1, "identity": {...}, "groups": {GROUP: {
        "verdicts": {CASE: {BACKEND: {"status": "match", "error": 0.1, ...}}},
        "ms": {BACKEND: 0.2}, "done": SECONDS, "note": ""}}}

A file is of one identity: device, driver, torch, Triton and build of fewstep. What does not read as
above, or is of another identity, counts for nothing. `done` is the time at which all cases of a
group had been judged, 0 before.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from fewstep._files import read_json, replacing
from fewstep._library import KERNELS, cuda_library

FORMAT = 1
Group = tuple[str, ...]
Entry = dict[str, Any]
# A status that speaks for a kernel; "unserved" cases speak neither for nor against it.
MATCH, UNSERVED = "match", "unserved"
_MOST_BYTES = 16 << 20
_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
# Sources whose change may change a result, beside the compiled library.
_SOURCES = ("kernels", "ops", "reference", "verification")


def new_entry() -> Entry:
    return {"verdicts": {}, "ms": {}, "done": 0.0, "note": ""}


def title(group: Group) -> str:
    return " ".join(group)


def folder() -> Path:
    """`FEWSTEP_CACHE`, else `fewstep` in `XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("FEWSTEP_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fewstep"
    try:
        return Path.home() / ".cache" / "fewstep"
    except RuntimeError:  # nobody's: where nothing can be written
        return Path(os.devnull) / "fewstep"


def identity(device: torch.device) -> dict[str, str]:
    """What a record is of."""
    p = torch.cuda.get_device_properties(device)
    return {
        "gpu": p.name,
        "capability": f"{p.major}.{p.minor}",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _triton(),
        "fewstep": build(),
    }


def path(of: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return folder() / f"verify-{digest[:16]}.json"


@functools.cache
def build() -> str:
    """A hash of the compiled CUDA library and of the sources of kernels, ops and their cases."""
    found = hashlib.sha256()
    roots = [Path(__file__).parents[1] / name for name in _SOURCES]
    if (kernels := importlib.util.find_spec("fewstep.kernels")) is not None:
        roots[:1] = map(Path, kernels.submodule_search_locations or ())
    files = [p for root in roots for p in sorted(root.rglob("*.py"))]
    for file in (*filter(None, [cuda_library()]), *files):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


@functools.cache
def _driver() -> str:
    for name in _DRIVERS:
        try:
            return Path(name).read_text().splitlines()[0].strip()
        except (OSError, IndexError):
            continue
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache
def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def read(of: dict[str, str]) -> dict[str, Entry]:
    """The groups that a record has; none where there is no record that counts."""
    try:
        content = read_json(path(of), most=_MOST_BYTES)
        if content["format"] != FORMAT or content["identity"] != of:
            return {}
        return {str(group): _checked(entry) for group, entry in content["groups"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _checked(entry: Any) -> Entry:
    verdicts = {
        str(case): {str(b): dict(v, status=str(v["status"])) for b, v in own.items()}
        for case, own in entry["verdicts"].items()
    }
    ms = {str(b): float(t) for b, t in entry["ms"].items()}
    return {
        "verdicts": verdicts,
        "ms": ms,
        "done": float(entry["done"]),
        "note": str(entry["note"]),
    }


def write(of: dict[str, str], groups: dict[str, Entry]) -> None:
    """Add groups to a record, or put them in the place of what it has of them.

    Raises:
        OSError: it cannot be written.
    """
    file = path(of)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "identity": of, "groups": read(of) | groups}
    with replacing(file, shared=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def failures(entry: Entry, backend: str) -> dict[str, Entry]:
    """The cases in which a backend did not match."""
    own = {case: v[backend] for case, v in entry["verdicts"].items() if backend in v}
    return {c: v for c, v in own.items() if v["status"] not in (MATCH, UNSERVED)}


def matched(entry: Entry, backend: str) -> bool:
    """Whether a backend matched in all cases of a group that it serves, and serves one."""
    states = [v[backend]["status"] for v in entry["verdicts"].values() if backend in v]
    return bool(entry["done"]) and MATCH in states and not failures(entry, backend)


def order(entry: Entry) -> tuple[str, ...]:
    """Kernels that matched and are faster than plain torch, the fastest first."""
    ms = entry["ms"]
    plain = ms.get("reference", float("inf"))
    served = [b for b in KERNELS if matched(entry, b) and ms.get(b, float("inf")) < plain]
    return tuple(sorted(served, key=lambda b: ms[b]))
