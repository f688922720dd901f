"""Runs of all methods over the ranks of a process group, without their reports.

`support.processes.of_processes` runs it.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fewstep.methods import LinesMatching, MarginalReflow
from fewstep.training import registry, runs
from fewstep.training.runs import Report, Trainer

Found = dict[str, Any]
_ANY: dict[str, Any] = {"device": "cpu", "log_every": 1, "checkpoint_every": 2, "lr": 1e-3}
_FLOW = MarginalReflow(windows=2, steps=2, lam=0.5, warmup=1)
_OF_REFLOW = {"teacher_steps": 2, "student_steps": 3}
_LINES = LinesMatching(levels=4, indices=(0, 1), start=2)
_OF_LINES: dict[str, Any] = {"teacher_steps": 2, "student_steps": 3, "pairs": 24, "lines": _LINES}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wflow": ("wflow", {"steps": 4, "groups": 6, "batch": 8}),
    "wflow, points": ("wflow", {"steps": 4, "groups": 5, "batch": 12, "clip": 0.1}),
    "wflow, guided": (
        "wflow",
        {"steps": 3, "groups": 6, "batch": 8, "scale_high": 3.0, "queue": 20, "accumulate": 2},
    ),
    "sharded": ("wflow", {"steps": 4, "groups": 6, "batch": 8, "clip": 0.1, "shard": True}),
    "sharded, parts": (
        "drifting",
        {"steps": 3, "groups": 5, "batch": 12, "accumulate": 2, "shard": True},
    ),
    "sharded, tangents": ("meanflow", {"steps": 3, "batch": 12, "accumulate": 2, "shard": True}),
    "drifting": ("drifting", {"steps": 3, "groups": 5, "batch": 12}),
    "meanflow": ("meanflow", {"steps": 4, "batch": 12, "accumulate": 2}),
    "reflow": (
        "reflow",
        {"teacher_steps": 2, "student_steps": 3, "teacher_batch": 24, "batch": 12},
    ),
    "lines": ("lines", {**_OF_LINES, "batch": 12, "accumulate": 2}),
    "encoder": ("encoder", {"steps": 3, "batch": 12, "stages": 2, "patch": 2, "accumulate": 2}),
    # Spectral norms take a step of their power iteration at each call of the discriminator.
    "adversarial": ("lines", {**_OF_LINES, "batch": 12, "adversarial": True}),
}


def data(folder: Path) -> str:
    """120 images of 10 classes."""
    path = folder / "images.npy"
    if not path.exists():
        rng = np.random.default_rng(0)
        np.save(path, rng.integers(0, 255, (120, 1, 6, 6), dtype=np.uint8))
        np.save(folder / "images_labels.npy", np.arange(120) % 10)
    return str(path)


def trainer(name: str) -> Trainer[Any, Any]:
    """Of a method, without measurements."""
    return replace(
        registry.TRAINERS[SETTINGS[name][0]], report=lambda session, networks: Report("", Path())
    )


def config(name: str, folder: Path, **options: Any) -> Any:
    own = trainer(name)
    preset, settings = own.preset("mnist5k"), {**_ANY, **SETTINGS[name][1], **options}
    if SETTINGS[name][0] == "reflow":
        settings["flow"] = _FLOW
    return replace(preset, data=data(folder), width=8, depth=1, **settings)


def train(name: str, out: Path, group: Any = None, **options: Any) -> Found:
    """What is logged, and the weights."""
    resume = options.pop("resume", False)
    settings = config(name, out.parent, **options)
    own = trainer(name)
    result = own.train(settings, out, resume=resume, progress=False, process_group=group)
    networks = result.networks.values()
    weights = torch.cat([p.detach().flatten() for net in networks for p in net.parameters()])
    return {"log": (out / runs.NUMBERS).read_text(), "weights": weights}


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(folder: Path, rank: int, group: Any) -> dict[str, str]:
    last = rank == 1
    out = folder / "refused"

    def wflow(**options: Any) -> str:
        return said(lambda: train("wflow", out, group, **options))

    found = {
        "shard": said(lambda: train("lines", out, group, shard=True)),
        "batch": said(lambda: train("meanflow", out, group, batch=7)),
        "points": wflow(groups=5, batch=7),
        "settings": wflow(lr=1e-3 if last else 2e-3),
        "used": said(lambda: train("wflow", folder / "wflow", group)),
        "other": said(lambda: train("lines", folder / "wflow", group, resume=True)),
        "group": said(lambda: train("wflow", out, "gloo")),
    }
    out = folder / f"apart {rank}"  # a folder that other ranks do not see
    shutil.copytree(folder / "wflow", out)
    if rank > 0:
        (out / "checkpoint.safetensors").unlink()
    found["folder"] = said(lambda: train("wflow", out, group, resume=True, steps=8))
    diverged = replace(trainer("wflow").preset("mnist5k").flow, step_size=1e30)
    found["diverged"] = said(lambda: train("wflow", folder / "far", group, flow=diverged))
    return found


def find(rank: int, world: int, group: Any) -> Found:
    import sys

    warnings.filterwarnings("ignore", message=".*real beside")
    folder = Path(sys.argv[3])
    if rank == 0:
        data(folder)
    dist.barrier()
    found: Found = {name: train(name, folder / name, group) for name in SETTINGS}
    longer = train("wflow", folder / "wflow", group, resume=True, steps=6)
    found["sharded, longer"] = train("sharded", folder / "sharded", group, resume=True, steps=6)
    return found | {"longer": longer, "refusals": refusals(folder, rank, group)}


if __name__ == "__main__":
    from processes import serve

    serve(find)
