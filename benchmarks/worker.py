"""One contender on one case, alone in its process: agreement first, then time and memory.

`python -m benchmarks.worker CASE alternating --result F.npz` writes what float64 gives;
`python -m benchmarks.worker CASE CONTENDER --expected F.npz --result R.json` measures against it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attention_cases import AttentionCase, AttentionProblem, draw_attention
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.jvp_cases import JvpCase, JvpProblem, draw_jvp
from benchmarks.peers import BUILDERS, DEFINITIONS, Run, numpy_outputs
from benchmarks.registry import (
    ALL_CASES,
    AnyCase,
    Case,
    HeunCase,
    HeunProblem,
    Problem,
    TraceProblem,
    draw,
    draw_heun,
    draw_trace,
)

MIN_REPEATS, MAX_REPEATS = 3, 1000
# Fewer calls than MIN_REPEATS where they take over this many budgets.
SLOW_BUDGETS = 4
AnyProblem = Problem | TraceProblem | HeunProblem | JvpProblem | AttentionProblem


def drawn(case: AnyCase, device: str = "cpu") -> AnyProblem:
    if isinstance(case, HeunCase):
        return draw_heun(case, device)
    if isinstance(case, JvpCase):
        return draw_jvp(case, device)
    if isinstance(case, AttentionCase):
        return draw_attention(case, device)
    return draw(case, device) if isinstance(case, Case) else draw_trace(case, device)


def expect(problem: AnyProblem, definition: str) -> list[np.ndarray]:
    """Outputs for the same points in float64 by one of `DEFINITIONS`."""
    return numpy_outputs(DEFINITIONS[definition](problem.in_float64)())


def errors(outputs: list[np.ndarray], expected: list[np.ndarray]) -> tuple[float, float]:
    """Largest error of values relative to their mean, of the rest in relative norm (or 0)."""
    value, want = outputs[0], expected[0]
    if [o.shape for o in outputs] != [e.shape for e in expected]:
        return float("inf"), float("inf")
    gradients = zip(outputs[1:], expected[1:], strict=True)
    return (
        float(np.abs(value - want).max() / np.abs(want).mean()),
        max((float(np.linalg.norm(g - e) / np.linalg.norm(e)) for g, e in gradients), default=0.0),
    )


def timings(run: Run, budget: float) -> list[float]:
    """Seconds per call, for `budget` seconds and at least three calls, unless those are slow."""
    times: list[float] = []
    gc.collect()
    gc.disable()
    total = 0.0
    while total < budget or (len(times) < MIN_REPEATS and total < SLOW_BUDGETS * budget):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        total += times[-1]
        if len(times) == MAX_REPEATS:
            break
    gc.enable()
    return times


def busy_seconds() -> float:
    """Processor time that all processes of this machine have used, stolen time included."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def timings_and_company(run: Run, budget: float) -> tuple[list[float], float]:
    """`timings`, and how many cores other processes kept busy meanwhile, on average."""
    start, own, busy = time.perf_counter(), time.process_time(), busy_seconds()
    times = timings(run, budget)
    others = busy_seconds() - busy - (time.process_time() - own)
    return times, max(0.0, others / (time.perf_counter() - start))


def resident_mb() -> float:
    """Memory that this process has resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mb(device: str) -> float:
    """The peak since `forget_peak`, of the GPU's allocator or of resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def forget_peak(device: str) -> None:
    """The peak restarts from what is in use: what the first call has freed is given back."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak restarts from now


def measure(
    contender: Contender, problem: AnyProblem, expected: list[np.ndarray], budget: float
) -> dict[str, Any]:
    """Errors against `expected`, and, where they are within the tolerances, time and memory.

    The first call is timed apart, since it compiles. `peak_mb` is the peak over later calls above
    what was resident with everything imported and the inputs made.
    """
    start = time.perf_counter()
    run = BUILDERS[problem.case.workload, contender.name](problem)
    baseline = torch.cuda.memory_allocated() / 2**20 if problem.device == "cuda" else resident_mb()
    built = time.perf_counter()
    outputs = run()
    first_call = time.perf_counter() - built
    value_error, grad_error = errors(numpy_outputs(outputs), expected)
    row: dict[str, Any] = {
        "iterations": problem.iterations,
        "value_error": value_error,
        "first_call_s": first_call,
    }
    if len(outputs) > 1:
        row["grad_error"] = grad_error
    del outputs
    value_rtol, grad_rtol = contender.allowed(problem.case)
    if not (value_error <= value_rtol and grad_error <= grad_rtol):
        return row | {"note": "disagrees with the float64 reference: not timed"}
    row |= getattr(run, "more", dict)()
    forget_peak(problem.device)
    # One more warm-up call where it costs little: allocators and branch predictors settle.
    if time.perf_counter() - start < budget:
        run()
    times, others = timings_and_company(run, budget)
    return row | {
        "times_s": times,
        "other_cores": others,
        "peak_mb": max(0.0, peak_mb(problem.device) - baseline),
        "note": contender.note_for(problem.case),
    }


def machine(device: str) -> str:
    """GPU, or CPU model, its cores and the instruction set that our kernels run at."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    from fewstep import _C

    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if "model name" in line), "CPU")
    return f"{model}, {os.cpu_count()} cores, {_C.cpu_capability()}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.worker", description=__doc__)
    parser.add_argument("case", type=ALL_CASES.__getitem__)
    parser.add_argument("contender", choices=[*DEFINITIONS, *CONTENDERS])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=5.0)
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args(argv)
    case: AnyCase = args.case
    if args.contender in DEFINITIONS:
        np.savez(args.result, *expect(drawn(case.without_copies), args.contender))
        return
    from fewstep._library import BACKENDS, unavailable

    contender = CONTENDERS[args.contender]
    reason = unavailable(contender.name, args.device) if contender.name in BACKENDS else None
    row: dict[str, Any] = {
        "version": importlib.metadata.version(contender.package),
        "machine": machine(args.device),
        "torch": torch.__version__,
    }
    if reason is None:
        with np.load(args.expected) as file:
            expected = list(file.values())
        row |= measure(contender, drawn(case, args.device), expected, args.budget)
    else:
        row["note"] = f"unavailable: {reason}"
    args.result.write_text(json.dumps(row))


if __name__ == "__main__":
    main()
