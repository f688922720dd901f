"""Processes of a group of gloo, which run the cases of a script."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Found = dict[str, Any]


def of_processes(script: str, world: int, folder: Path) -> list[Found]:
    """What each rank of a script finds, which ends with `serve(..)`."""
    runs = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        told = [run.communicate(timeout=600)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0] * world, told
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def serve(find: Callable[[int, int, Any], Found]) -> None:
    """Run `find(rank, world, group)` as the rank that the arguments name, and save it."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.save(find(rank, world, dist.group.WORLD), folder / f"{rank}.pt")
    dist.destroy_process_group()
