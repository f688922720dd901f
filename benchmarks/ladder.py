"""From eager torch to the C++ kernel with all that the CPU has, step by step, on one case.

`python -m benchmarks.ladder CASE` prints a table in Markdown. Each step has a process of its own.
They take turns, a call each. The fastest call is what a machine without other work would take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.peers import BUILDERS
from benchmarks.registry import CASES, draw
from benchmarks.worker import machine
from fewstep import _C


@dataclass(frozen=True)
class Step:
    """A contender, with the instruction set of fewstep's kernels and the number of threads."""

    label: str
    contender: str
    capability: str = "base"
    threads: int = 1


def steps(most: int) -> list[Step]:
    """The steps that this machine has, up to a number of threads."""
    sets = ("base", "avx2", "avx512")
    own = sets[: sets.index(_C.cpu_capability()) + 1]
    kernels = [Step(f"C++, {name}", "cpp", name) for name in own]
    last = Step(f"C++, {own[-1]}, {most} threads", "cpp", own[-1], most)
    eager = [
        Step("eager torch", "eager"),
        Step(f"eager torch, {most} threads", "eager", "base", most),
    ]
    return [*eager, *kernels, last]


def serve(case: str, contender: str) -> None:
    """Time a call for each line of stdin."""
    own = CASES[case]
    run = BUILDERS[own.workload, contender](draw(own))
    for _ in range(2):
        run()
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        sys.stdout.write(f"{time.perf_counter() - start}\n")
        sys.stdout.flush()


def measure(case: str, todo: list[Step], rounds: int) -> list[list[float]]:
    """Seconds of each call at each step."""

    def started(step: Step) -> subprocess.Popen[str]:
        own = {"FEWSTEP_CPU_CAPABILITY": step.capability, "OMP_NUM_THREADS": str(step.threads)}
        command = [sys.executable, "-m", "benchmarks.ladder", case, "--serve", step.contender]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | own)

    workers = [started(step) for step in todo]
    times: list[list[float]] = [[] for _ in todo]
    for _ in range(rounds):
        for worker, own in zip(workers, times, strict=True):
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            own.append(float(worker.stdout.readline()))
    for worker in workers:
        worker.communicate()
    return times


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ladder", description=__doc__)
    parser.add_argument("case", nargs="?", default="n2048_d64", choices=CASES)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the last step")
    parser.add_argument("--rounds", type=int, default=101, help="calls of each step")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.case, args.serve)
        return
    todo = steps(args.threads)
    times = measure(args.case, todo, args.rounds)
    first = min(times[0])
    lines = ["| step | fastest call | median call | speed |", "|---|---:|---:|---:|"]
    for step, own in zip(todo, times, strict=True):
        fastest, median = min(own), statistics.median(own)
        figures = f"{fastest * 1e3:.3g} ms | {median * 1e3:.3g} ms | {first / fastest:.1f}x"
        lines.append(f"| {step.label} | {figures} |")
    sys.stdout.write("\n".join([*lines, "", machine("cpu"), ""]))


if __name__ == "__main__":
    main()
