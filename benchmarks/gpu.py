"""What only a machine with a GPU can tell: whether it builds, is right, is clean, and how fast.

    python -m benchmarks.gpu --out DIR [--wheels DIR]

Builds the CUDA library, runs `pytest -m gpu` and compute-sanitizer, and times the kernels beside
the peers that are installed. DIR gets `gpu.md`, `gpu.csv` and a log of each stage. A stage that
fails is reported and does not stop the others; all of it takes at most `--minutes`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.registry import CASES, CONTENDERS, GRAD_RTOL, VALUE_RTOL, Case, Problem, schedule
from benchmarks.run import ROOT, commit, installed, say

SMALL_TESTS = ("tests/test_cuda_build.py", "tests/test_cuda_resident.py")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
# Errors at which a peer is still timed: TF32 is the default of some. Ours keep the contract.
PEER_RTOL = 1e-2
# Points of several input sets together, so that no set is still in L2 when its turn comes.
ROTATED_BYTES = 256 << 20
MAX_SETS = 8
# A call that takes more than so many budgets is timed once.
SLOW_BUDGETS = 4
wait = torch.cuda.synchronize
# Apart from imports and compilation, a first call takes less.
FIRST_CALL_SECONDS = 0.3
# Prints the seconds of the imports, of the first call and of the second, forward and backward.
FIRST_CALL = """
import importlib, sys, time
import torch

device, backend = sys.argv[1:]
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
x, y = torch.randn(2, 16, 200, 64, device=device)
x.requires_grad_()
wait()
times = [time.perf_counter()]
fewstep = importlib.import_module("fewstep")
if backend == "triton":
    importlib.import_module("fewstep.kernels.sinkhorn.solve")
times.append(time.perf_counter())
for _ in range(2):
    ot = fewstep.sinkhorn(x, y, eps=50.0, max_iter=20, backend=backend)
    ot.value.sum().backward()
    wait()
    times.append(time.perf_counter())
print(*(after - before for before, after in zip(times, times[1:])))
"""

OURS = ("cuda", "triton")
_drift = replace(CASES["drift_joint_b256_n64_d256"], contenders=())
_divergence = CASES["divergence_n1024_d64"]
LARGE = ("triton", "flash-sinkhorn", "flash-sinkhorn-fp32", "geomloss-online", "pykeops", "eager")
SMALL = ("cuda", *LARGE)
# torch.compile takes minutes for a hundred unrolled iterations.
COMPILED = (*SMALL, "compile")
GPU_CASES = {
    case.name: case
    for case in (
        Case("n10000_d64", 1, 10_000, 10_000, 64, 100, contenders=LARGE),
        replace(_divergence, name="divergence_n10000_d64", n=10_000, m=10_000, contenders=LARGE),
        Case("b256_n256_d64", 256, 256, 256, 64, 100, contenders=SMALL),
        replace(CASES["b10000_n64_d32"], contenders=COMPILED),
        # One feature map of 16 x 16 of the drifting codes: 64 x 144 pairs in each problem.
        replace(
            _drift,
            name="drift_joint_b26752_n64_m72_d512",
            batch=26_752,
            m=72,
            d=512,
            contenders=SMALL,
        ),
        replace(
            _drift,
            name="drift_split_b4096_n64_d256",
            batch=4096,
            form="split",
            contenders=COMPILED,
        ),
        # Through all iterations of dense torch a gradient does not fit in memory in float64.
        Case(
            "n10000_d64_grad",
            *(1, 10_000, 10_000, 64, 20),
            backward=True,
            contenders=("triton", "geomloss-online"),
        ),
    )
}
COLUMNS = (
    *("case", "workload", "B", "N", "M", "D", "iterations", "cost", "eps_of_mean", "backward"),
    *("dtype", "contender", "version", "median_ms", "q20_ms", "q80_ms", "repeats", "sets"),
    *("first_call_s", "peak_mb", "value_error", "grad_error", "speedup_vs_best_peer"),
    *("least_gb", "gb_per_s", "least_tflop", "tflop_per_s", "device", "driver", "torch", "triton"),
    *("commit", "date", "note"),
)


@dataclass
class Stage:
    """What one stage came to: `ok` is None where it did not run."""

    name: str
    ok: bool | None
    summary: str
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def least_bytes(case: Case) -> int:
    """Device memory that must be moved: points and weights in, what is asked for out, once."""
    points = case.batch * (case.n + case.m)
    floats = {
        "solve": points * (case.d + 2) + case.batch,
        "divergence": points * (case.d + 1),
        "drift": (points + case.batch * (case.m + case.n)) * case.d,
    }[case.workload]
    gradients = points * case.d if case.backward else 0
    return np.dtype(case.dtype).itemsize * (floats + gradients)


def least_flops(case: Case, iterations: int) -> int:
    """Operations of the cheapest known way: distances once, two multiply-adds per pair and
    iteration, and D multiply-adds per pair for a gradient or a barycentre."""
    temperatures = len(case.eps_of_mean)
    pairs = case.pairs // temperatures
    products = temperatures if case.workload == "drift" else 2 * case.backward
    return 2 * pairs * (case.d * (1 + products) + 2 * temperatures * iterations)


def draw(case: Case, device: str, copies: int = 1) -> list[Problem]:
    """`registry.draw` on the device, for sizes that take minutes on a host; and the same points in
    another order at other addresses, as further input sets with the same value."""
    rng = torch.Generator(device).manual_seed(0)
    dtype = {"float32": torch.float32, "float64": torch.float64}[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device, dtype=dtype)

    def sample(centres: Tensor, count: int) -> Tensor:
        mode = torch.randint(8, (case.batch, count, 1), generator=rng, device=device)
        return normal(case.batch, count, case.d).add_(
            centres.gather(1, mode.expand(-1, -1, case.d))
        )

    centres = 2 * normal(case.batch, 8, case.d)
    x = sample(centres, case.n)
    x_self = sample(centres, case.m) if case.workload == "drift" else x[:, :0]
    if case.workload != "solve":
        centres = 2 * normal(case.batch, 8, case.d)
    y = sample(centres, case.m)
    means = [p.mean(1, dtype=torch.float64) for p in (x, y)]
    squares = [p.square().sum(2).mean(1, dtype=torch.float64) for p in (x, y)]
    mean_cost = case.scale * float((sum(squares) - 2 * (means[0] * means[1]).sum(1)).mean())
    eps = mean_cost * case.eps_of_mean[-1]
    temperatures: tuple[float, ...] = (eps,)
    if case.workload == "divergence":
        both = torch.cat([x, y], 1)
        corners = torch.stack([both.amin((0, 1)), both.amax((0, 1))])[None].double().cpu().numpy()
        temperatures = schedule(corners, corners, eps)
    elif case.workload == "drift":
        temperatures = case.eps_of_mean
    problems = [Problem(case, x, y, x_self, temperatures, device)]
    for k in range(1, copies):
        moved = [p.roll(k, 1).contiguous() for p in (x, y, x_self)]
        problems.append(Problem(case, *moved, temperatures, device))
    return problems


def expected(problem: Problem, definition: str) -> list[np.ndarray]:
    """Outputs in float64 by one of `peers.DEFINITIONS`; a drift in slices of its groups."""
    from benchmarks.peers import DEFINITIONS, numpy_outputs

    if definition == "drift":
        return numpy_outputs(exact_drift(problem))
    x, y, x_self = (p.double() for p in (problem.x, problem.y, problem.x_self))
    return numpy_outputs(DEFINITIONS[definition](replace(problem, x=x, y=y, x_self=x_self))())


def exact_drift(problem: Problem, slice_groups: int = 512) -> tuple[Tensor, Tensor]:
    """Rms and velocity of the normalised drift: one scale, and one rms per temperature, for all."""
    from fewstep.reference import drift as reference

    case = problem.case
    clouds = (problem.x, problem.y, problem.x_self)
    slices = [slice(i, i + slice_groups) for i in range(0, case.batch, slice_groups)]
    total, pairs = 0.0, case.batch * case.n * (case.n + 2 * case.m)
    for part in slices:
        x, *others = (p[part].double() for p in clouds)
        total += sum(float(torch.cdist(x, z).square().sum()) for z in (x, *others))
    scale = max(math.sqrt(total / pairs / case.d), reference.MIN_SCALE)
    eps = torch.tensor(problem.temperatures, device=problem.device, dtype=torch.float64) * case.d
    velocities = []
    for part in slices:
        x, y, x_self = (p[part].double() / scale for p in clouds)
        ones = x.new_ones((x.shape[0], 2 * case.m))
        options = {"joint": case.form == "joint", "scaled": False, "unit": False, "diagonal": None}
        out = reference.drift(
            *(x, y, x_self, None, ones, ones[:, 0], eps),
            cost=case.cost,
            max_iter=problem.iterations,
            **options,
        )
        velocities.append(out[0].float())
    v = torch.cat(velocities, 1)
    rms = torch.stack([t.square().mean(dtype=torch.float64).sqrt() for t in v])
    velocity = sum(t / r for t, r in zip(v, rms.clamp(min=reference.MIN_RMS), strict=True))
    return rms, velocity


def flash_sinkhorn(problem: Problem, tf32: bool) -> Callable[[], tuple[Tensor, ...]]:
    """flash-sinkhorn 0.4.1 as its README calls it: batches one problem after the other."""
    case, device = problem.case, problem.device
    x, y = (p.detach().requires_grad_(case.backward) for p in (problem.x, problem.y))

    if case.workload == "divergence":
        from flash_sinkhorn import SamplesLoss

        loss = SamplesLoss(
            "sinkhorn",
            p=2,
            blur=math.sqrt(problem.eps),
            half_cost=True,
            debias=True,
            eps_list=list(problem.temperatures[1:-1]),
            allow_tf32=tf32,
        )

        def run() -> tuple[Tensor, ...]:
            value = loss(x[0], y[0])
            return value.detach()[None], *torch.autograd.grad(value, (x, y))

        return run
    from flash_sinkhorn.sinkhorn_solvers import sinkhorn_flashstyle_alternating

    a = torch.full((case.n,), 1 / case.n, device=device)
    b = torch.full((case.m,), 1 / case.m, device=device)

    def solve() -> tuple[Tensor, ...]:
        values = []
        for p, q in zip(problem.x, problem.y, strict=True):
            f, g = sinkhorn_flashstyle_alternating(
                *(p, q, a, b),
                eps=problem.eps,
                n_iters=problem.iterations,
                cost_scale=case.scale,
                allow_tf32=tf32,
            )
            values.append(f.mean() + g.mean())
        return (torch.stack(values),)

    if case.backward:
        raise NotImplementedError("its alternating solver has no gradient")
    return solve


def build(name: str, problem: Problem) -> Callable[[], tuple[Any, ...]]:
    """The function that contender `name` is timed by."""
    if name.startswith("flash-sinkhorn"):
        return flash_sinkhorn(problem, tf32=name == "flash-sinkhorn")
    from benchmarks.peers import BUILDERS

    return BUILDERS[problem.case.workload, name](problem)


def package_of(name: str) -> str:
    return "flash-sinkhorn" if name.startswith("flash-sinkhorn") else CONTENDERS[name].package


def definition_of(name: str, case: Case) -> str | None:
    """What a contender must agree with on a case, None where it does not take part."""
    if name.startswith("flash-sinkhorn"):
        served = {"solve": "alternating", "divergence": "geomloss"}
        return None if case.backward and case.workload == "solve" else served.get(case.workload)
    contender = CONTENDERS[name]
    # All of ours serve a drift, by the kernels of the op or by those of the solve.
    served = dict(contender.definitions)
    if contender.kind == "fewstep":
        served |= {"divergence": "symmetric", "drift": "drift"}
    definition = served.get(case.workload)
    return "alternating" if definition == "unrolled" and not case.backward else definition


def event_times(calls: Sequence[Callable[[], Any]], budget: float, least: int = 5) -> list[float]:
    """Milliseconds per call between events on the stream, the calls of `calls` in turn.

    Calls are queued without waiting, as in a training loop: at least `least`, for `budget` seconds.
    """
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    gc.collect()
    wait()
    start = time.perf_counter()
    while len(pairs) < least or time.perf_counter() - start < budget:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        calls[len(pairs) % len(calls)]()
        end.record()
        pairs.append((begin, end))
        if len(pairs) % 10 == 0:
            end.synchronize()  # the queue stays short
        if len(pairs) == 1000:
            break
    wait()
    return [begin.elapsed_time(end) for begin, end in pairs]


def measure(name: str, problems: Sequence[Problem], want: list[np.ndarray], budget: float) -> Any:
    """A CSV row of one contender: errors first, then the time where these are small."""
    from benchmarks.peers import numpy_outputs
    from benchmarks.worker import errors

    case = problems[0].case
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    runs = [build(name, problem) for problem in problems]
    outputs = runs[0]()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    value_error, grad_error = errors(numpy_outputs(outputs), want)
    row: dict[str, Any] = {"value_error": value_error, "first_call_s": first, "sets": len(runs)}
    if len(outputs) > 1:
        row["grad_error"] = grad_error
    del outputs
    ours = not name.startswith("flash") and CONTENDERS[name].kind == "fewstep"
    limits = (VALUE_RTOL, GRAD_RTOL) if ours else (PEER_RTOL, PEER_RTOL)
    if not (value_error <= limits[0] and grad_error <= limits[1]):
        return row | {"note": "disagrees with the float64 reference: not timed"}
    # Contenders of `peers` wait for the device at the end of a call; a training loop does not.
    with mock.patch.object(torch.cuda, "synchronize"):
        times = event_times(runs[:1], 0.0, least=1)
        if times[0] < 1e3 * SLOW_BUDGETS * budget:
            for run in runs[1:]:
                run()
            times = event_times(runs, budget)
    peak = torch.cuda.max_memory_allocated() - before
    return row | timing(times, case, problems[0].iterations, peak)


def timing(times: Sequence[float], case: Case, iterations: int, peak: int) -> dict[str, Any]:
    q20, median, q80 = np.quantile(times, (0.2, 0.5, 0.8)).tolist()
    gigabytes, teraflops = least_bytes(case) / 1e9, least_flops(case, iterations) / 1e12
    return {
        "median_ms": median,
        "q20_ms": q20,
        "q80_ms": q80,
        "repeats": len(times),
        "peak_mb": peak / 2**20,
        "least_gb": gigabytes,
        "gb_per_s": gigabytes / (median * 1e-3),
        "least_tflop": teraflops,
        "tflop_per_s": teraflops / (median * 1e-3),
    }


def sets_for(case: Case) -> int:
    """Input sets that are rotated: three where they are large, more where L2 would hold three."""
    points = np.dtype(case.dtype).itemsize * case.batch * (case.n + 2 * case.m) * case.d
    return 1 if points > 4 << 30 else min(MAX_SETS, max(3, math.ceil(ROTATED_BYTES / points)))


def measure_case(name: str, contenders: Sequence[str], result: Path, budget: float) -> None:
    """Append a JSON row per contender to `result`: one process, so that a crash costs one case."""
    case = GPU_CASES[name]
    problems = draw(case, "cuda", sets_for(case))
    wanted: dict[str, list[np.ndarray]] = {}
    for contender in contenders:
        with result.open("a") as file:
            file.write(json.dumps({"begun": contender}) + "\n")
        definition = definition_of(contender, case)
        assert definition is not None
        try:
            if definition not in wanted:
                wanted[definition] = expected(problems[0], definition)
                gc.collect()
                torch.cuda.empty_cache()
            row = measure(contender, problems, wanted[definition], budget)
        except Exception as error:
            first = str(error).strip().split("\n", 1)[0]
            row = {"note": f"{type(error).__name__}: {first[:160]}"}
        row |= {
            "contender": contender,
            "version": importlib.metadata.version(package_of(contender)),
        }
        with result.open("a") as file:
            file.write(json.dumps(case.columns() | {"iterations": problems[0].iterations} | row))
            file.write("\n")


def ceilings() -> dict[str, float]:
    """What this device reaches: GB/s of a copy, read and written; TFLOP/s of large products."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    other = torch.empty_like(big)
    copy = float(np.median(event_times([partial(other.copy_, big)], 0.3)))
    found = {"copy_gb_per_s": 2 * big.numel() / 1e6 / copy}
    del big, other
    for label, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        product = float(np.median(event_times([partial(torch.mm, a, b)], 0.3)))
        found[f"{label}_tflop_per_s"] = 2 * 8192**3 / 1e9 / product
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def device_columns() -> dict[str, str]:
    """Name, driver and versions, as in every row."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver.strip().split("\n")[0],
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if installed("triton") else "none",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


class Runner:
    """Runs the commands of the stages: logged, within the time that is left."""

    def __init__(self, out: Path, scratch: Path, minutes: float) -> None:
        self.out, self.scratch = out, scratch
        self.deadline = time.monotonic() + 60 * minutes
        self.env = dict(os.environ)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, log: str, command: Sequence[str], limit: float) -> tuple[int | None, str]:
        """Exit code, None past the limit in seconds, and output; both go to `out/log` as well."""
        limit = min(limit, self.left())
        if limit < 5:
            return None, "no time left"
        with (self.out / log).open("a+") as file:
            file.write("$ " + " ".join(command) + "\n")
            file.flush()
            start = file.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=file, stderr=subprocess.STDOUT
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
            file.seek(start)
            text = file.read()
        return code, text + ("" if code is not None else f"\nstopped after {limit:.0f} s")

    def add_path(self, folder: Path) -> None:
        self.env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(folder), self.env.get("PYTHONPATH")])
        )


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def stage_build(runner: Runner, wheels: Path | None) -> Stage:
    """Wheels and the package into folders of the scratch: the environment stays as it is."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    files = sorted(str(f) for f in wheels.glob("*.whl")) if wheels else []
    notes = []
    if files:
        target = runner.scratch / "wheels"
        code, text = runner.run("build.log", [*pip, "--target", str(target), *files], 120)
        notes.append(f"{len(files)} wheels" if code == 0 else f"wheels failed: {last_line(text)}")
        runner.add_path(target)
    major, minor = torch.cuda.get_device_capability()
    runner.env |= {"FEWSTEP_CUDA": "1", "FEWSTEP_CUDA_ARCHITECTURES": f"{major}{minor}"}
    target = runner.scratch / "package"
    command = [*pip, "--no-build-isolation", "--target", str(target), str(ROOT)]
    code, text = runner.run("build.log", command, 240)
    ok = code == 0
    notes.insert(0, "CUDA library built" if ok else f"build failed: {last_line(text)}")
    if ok:
        runner.add_path(target)
        probe = "import fewstep._library as l; print(l.CUDA_UNAVAILABLE or 'loads')"
        code, text = runner.run("build.log", [sys.executable, "-c", probe], 60)
        ok = last_line(text) == "loads"
        notes.insert(1, last_line(text))
    return Stage("build", ok, "; ".join(notes))


def stage_tests(runner: Runner) -> Stage:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"]
    code, text = runner.run("tests.log", command, 180)
    return Stage("pytest -m gpu", code == 0, last_line(text))


def stage_first_call(runner: Runner, device: str = "cuda", served: Sequence[str] = OURS) -> Stage:
    """Each backend in two new processes: the second finds all kernels compiled."""
    notes, ok = [], True
    for backend in served:
        command = [sys.executable, "-c", FIRST_CALL, device, backend]
        for _ in range(2):
            code, text = runner.run("first_call.log", command, 60)
        if code != 0:
            notes.append(f"{backend} failed: {last_line(text)}")
            ok = False
            continue
        imports, first, second = map(float, last_line(text).split())
        ok &= first < FIRST_CALL_SECONDS
        notes.append(f"{backend} {first:.2f} s, then {second:.2g} s (imports {imports:.2f} s)")
    return Stage("first call", ok, "; ".join(notes))


def stage_sanitizer(runner: Runner, tool: str) -> Stage:
    name = f"compute-sanitizer {tool}"
    found = shutil.which("compute-sanitizer")
    if found is None:
        return Stage(name, None, "not installed")
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", "small", "-q", *SMALL_TESTS]
    command = [found, "--tool", tool, "--error-exitcode", "9", *pytest]
    code, text = runner.run(f"{tool}.log", command, 75)
    summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "passed" in line]
    return Stage(name, code == 0, "; ".join(s.strip("= ") for s in summary) or last_line(text))


def stage_occupancy(runner: Runner) -> Stage:
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "benchmarks.occupancy", "--arch", f"sm_{major}{minor}"]
    code, text = runner.run("occupancy.log", [*command, "--only", "cuda"], 60)
    return Stage("occupancy", code == 0, last_line(text))


def read_rows(result: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Finished rows, and the contender that was begun and not finished."""
    lines = (
        [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
    )
    rows = [line for line in lines if "begun" not in line]
    begun = [line["begun"] for line in lines if "begun" in line]
    return rows, begun[-1] if len(begun) > len(rows) else None


def stage_case(runner: Runner, case: Case, budget: float) -> Stage:
    """One case; after a crash the contenders that were still to come have another process."""
    served = [c for c in case.contenders if definition_of(c, case) is not None]
    todo = [c for c in served if installed(package_of(c)) or runner_has(runner, package_of(c))]
    rows = [
        case.columns() | {"contender": c, "note": "not installed"} for c in served if c not in todo
    ]
    start = time.monotonic()
    while todo and runner.left() > 20:
        result = runner.scratch / f"{case.name}-{len(todo)}.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu", "--measure", case.name, *todo]
        command += ["--result", str(result), "--budget", str(budget)]
        code, text = runner.run("benchmarks.log", command, 120)
        new, begun = read_rows(result)
        why = f"exit code {code}" if code is not None else "out of time"
        if begun is not None:
            new.append(case.columns() | {"contender": begun, "note": f"{why}: {last_line(text)}"})
        rows += new
        done = {row["contender"] for row in new}
        if not done:
            break
        todo = [c for c in todo if c not in done]
    rows += [case.columns() | {"contender": c, "note": "not run"} for c in todo]
    compare(rows)
    timed = [row for row in rows if "median_ms" in row]
    ours = [row for row in timed if row["contender"] in OURS]
    best = min(ours, key=lambda row: float(row["median_ms"]), default=None)
    summary = "nothing of ours was timed"
    if best is not None:
        ratio = best.get("speedup_vs_best_peer")
        against = f", {ratio:.1f}x the best peer" if ratio else ""
        summary = f"{best['contender']} {best['median_ms']:.3g} ms{against}"
    seconds = time.monotonic() - start
    return Stage(case.name, best is not None and not todo, summary, seconds, rows)


def runner_has(runner: Runner, package: str) -> bool:
    """Whether a wheel of `--wheels` brought the package."""
    folder = runner.scratch / "wheels"
    names = {p.name.split("-")[0].replace("_", "-").lower() for p in folder.glob("*.dist-info")}
    return package.lower() in names or (
        package == "fewstep" and (runner.scratch / "package").exists()
    )


def compare(rows: list[dict[str, Any]]) -> None:
    """How many times faster ours are than the best of the others in the same case."""
    others = [
        row["median_ms"] for row in rows if "median_ms" in row and row["contender"] not in OURS
    ]
    for row in rows:
        if others and "median_ms" in row and row["contender"] in OURS:
            row["speedup_vs_best_peer"] = min(others) / row["median_ms"]


def page(stages: Sequence[Stage], limits: dict[str, float], device: dict[str, str]) -> str:
    """One Markdown page: the stages, then a table per case."""
    mark = {True: "ok", False: "FAILED", None: "not run"}
    lines = [
        f"# fewstep on {device['device']}",
        "",
        f"Driver {device['driver']}, torch {device['torch']}, Triton {device['triton']}, commit"
        f" {device['commit']}, {device['date']}. `python -m benchmarks.gpu`.",
        "",
        "| stage | | seconds | |",
        "|---|---|---:|---|",
    ]
    lines += [f"| {s.name} | {mark[s.ok]} | {s.seconds:.0f} | {s.summary} |" for s in stages]
    if limits:
        ceiling = ", ".join(f"{name.replace('_', ' ')} {v:.4g}" for name, v in limits.items())
        lines += ["", f"Measured ceilings: {ceiling}.", ""]
        lines += [
            "GB/s and TFLOP/s are of the least bytes and operations that a case needs, in brackets"
            " as a share of the copy and of the tf32 product."
        ]
    for stage in stages:
        if not stage.rows:
            continue
        first = stage.rows[0]
        backward = " + backward" * int(first["backward"])
        shape = f"{first['B']} of {first['N']} x {first['M']}, D {first['D']}"
        lines += ["", f"## {stage.name}: {first['workload']}{backward}, {shape}", ""]
        lines += ["| contender | ms (20 %, 80 %) | errors: value, rest | GB/s | TFLOP/s | |"]
        lines += ["|---|---:|---:|---:|---:|---|"]
        for row in stage.rows:
            lines.append(table_row(row, limits))
    return "\n".join(lines) + "\n"


def table_row(row: dict[str, Any], limits: dict[str, float]) -> str:
    label = f"{row['contender']} {row.get('version', '')}".strip()
    errors = " ".join(f"{row[k]:.0e}" for k in ("value_error", "grad_error") if k in row)
    if "median_ms" not in row:
        return f"| {label} | | {errors} | | | {row.get('note', '')} |"

    def share(value: float, ceiling: str) -> str:
        return f"{value:.3g}" + (f" ({value / limits[ceiling]:.0%})" if ceiling in limits else "")

    ratio = f"{row['speedup_vs_best_peer']:.1f}x" if "speedup_vs_best_peer" in row else ""
    time_ms = f"{row['median_ms']:.4g} ({row['q20_ms']:.4g}, {row['q80_ms']:.4g})"
    return (
        f"| {label} | {time_ms} | {errors} |"
        f" {share(row['gb_per_s'], 'copy_gb_per_s')} |"
        f" {share(row['tflop_per_s'], 'tf32_tflop_per_s')} | {ratio} |"
    )


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fewstep-gpu-") as name:
        yield Path(name)


def run_stages(
    stages: Sequence[tuple[str, Callable[[], Stage]]], report: Callable[[list[Stage]], None]
) -> list[Stage]:
    """Each stage in turn, also after one that failed or raised; reports after each."""
    done: list[Stage] = []
    for name, stage in stages:
        start = time.monotonic()
        try:
            result = stage()
        except Exception as error:
            result = Stage(name, False, f"{type(error).__name__}: {last_line(str(error))}")
        result.seconds = time.monotonic() - start
        done.append(result)
        say(f"{result.name}: {result.summary} ({result.seconds:.0f} s)")
        report(done)
    return done


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for gpu.md, gpu.csv and logs")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of peers to install")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default 9.5)")
    parser.add_argument("--case", action="append", choices=GPU_CASES, help="only this; repeatable")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timed calls per row")
    parser.add_argument("--no-build", action="store_true", help="fewstep is installed as it is")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is None and args.out is None:
        parser.error("--out is needed")
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"--wheels must be a folder, got {args.wheels}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch.cuda.is_available() is False: a CUDA device is needed")
    if args.measure is not None:
        measure_case(args.measure[0], args.measure[1:], args.result, args.budget)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    device, limits = device_columns(), {}

    def measure_ceilings() -> Stage:
        limits.update(ceilings())
        torch.cuda.empty_cache()
        text = ", ".join(f"{name} {value:.4g}" for name, value in limits.items())
        return Stage("ceilings", True, text)

    def report(done: list[Stage]) -> None:
        rows = [row | device for stage in done for row in stage.rows]
        write_csv(rows, args.out / "gpu.csv")
        (args.out / "gpu.md").write_text(page(done, limits, device))

    with scratch_folder() as scratch:
        runner = Runner(args.out, scratch, args.minutes)
        stages: list[tuple[str, Callable[[], Stage]]] = []
        if not args.no_build:
            stages.append(("build", lambda: stage_build(runner, args.wheels)))
        stages.append(("pytest -m gpu", lambda: stage_tests(runner)))
        stages.append(("first call", lambda: stage_first_call(runner)))
        stages.append(("ceilings", measure_ceilings))
        for name in args.case or GPU_CASES:
            case = GPU_CASES[name]
            stages.append((name, lambda case=case: stage_case(runner, case, args.budget)))
        for tool in SANITIZERS:
            stages.append((tool, lambda tool=tool: stage_sanitizer(runner, tool)))
        stages.append(("occupancy", lambda: stage_occupancy(runner)))
        done = run_stages(stages, report)
    say(f"wrote {args.out / 'gpu.md'} and gpu.csv")
    return int(any(stage.ok is False for stage in done))


if __name__ == "__main__":
    sys.exit(main())
