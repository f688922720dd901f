"""`fewstep.verification.worker` with the interpreter as the device.

PTX_CASES=3 takes so many cases of a group, and times of two milliseconds by kernels and three by
plain torch. PTX_PLANT=cuda:wrong or cuda:crash puts a mistake into the CUDA solver.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

from . import project, sim


def plant(what: str) -> None:
    """A mistake in what a backend's kernels find."""
    from fewstep.ops.sinkhorn import dispatch

    solve, (where, mistake) = dispatch.solve, what.split(":")

    def planted(backend: str, inputs: Any) -> Any:
        out = solve(backend, inputs)
        if backend != where:
            return out
        if mistake == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        return out[0] * (1 + 1e-3), *out[1:]

    dispatch.solve = planted


def shorten(count: int) -> None:
    """The first cases of every group, and times that say that kernels are faster."""
    from fewstep.verification import catalogue, worker

    whole, seconds = catalogue.table(), {"reference": 3.0}

    def make(backend: str, device: Any) -> Callable[[], object]:
        return lambda: backend

    table = {g: (cases[:count], replace(t, make=make)) for g, (cases, t) in whole.items()}
    catalogue.table = lambda: table
    worker.milliseconds = lambda call, *_: seconds.get(call(), 2.0)


def main() -> None:
    sim.options_of_environment()
    project.use_cuda()
    if importlib.util.find_spec("triton") is not None:
        project.use_triton()
    from fewstep.verification import worker

    if what := os.environ.get("PTX_PLANT"):
        plant(what)
    if count := os.environ.get("PTX_CASES"):
        shorten(int(count))
    worker.main()


if __name__ == "__main__":
    main()
