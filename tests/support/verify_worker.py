"""A worker of `fewstep.verification` whose kernels do what PLANTED says, by backend.

PLANTED is JSON: {"cuda": ["wrong", 2.0], ...} with milliseconds; each start is a line of STARTS.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fewstep.verification import catalogue, worker
from fewstep.verification.cases import Case, Output, Timing

GROUP = ("sinkhorn", "float32", "small", "differences")
NAMES = ("first, seed 1", "second, seed 2")
calls = 0


def run(backend: str, device: torch.device, exact: bool) -> list[Output]:
    global calls
    calls += 1
    if exact:
        return [Output("value", "value", torch.ones(3, dtype=torch.float64))]
    does = json.loads(os.environ["PLANTED"])[backend][0]
    if does == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if does == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "hang":
        time.sleep(60)
    if does == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if does == "memory":
        raise torch.OutOfMemoryError("out of memory")
    if does == "unserved":
        raise ValueError(f"sinkhorn: backend {backend!r} cannot serve this call: planted")
    off = {"match": 0.0, "wrong": 1e-3, "nan": float("nan"), "unequal": 1e-7 * (calls % 2)}[does]
    return [Output("value", "value", torch.ones(3) + off)]


def make(backend: str, device: torch.device) -> Callable[[], object]:
    milliseconds = json.loads(os.environ["PLANTED"])[backend][1]
    return lambda: time.sleep(1e-3 * milliseconds)


TABLE = {GROUP: ([Case(GROUP, name, run) for name in NAMES], Timing(GROUP, make, repeats=1))}

if __name__ == "__main__":
    with Path(os.environ["STARTS"]).open("a") as file:
        file.write("start\n")
    catalogue.table = lambda: TABLE  # type: ignore[assignment]
    worker.main()
