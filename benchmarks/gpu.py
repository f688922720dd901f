"""What only a machine with a GPU can tell: whether it builds, is right, is clean, and how fast.

    python -m benchmarks.gpu --out DIR [--wheels DIR]

Builds the CUDA library, runs `pytest -m gpu`, compute-sanitizer and `fewstep verify`, and times the
kernels beside the peers that are installed. DIR gets `gpu.md`, `gpu.csv` and a log of each stage. A
stage that fails is reported and does not stop the others; all of it takes at most `--minutes`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import GPU_CASES, OURS, ceilings, definition_of, measure_case, packages_of
from benchmarks.registry import Case
from benchmarks.run import ROOT, commit, installed, say

SMALL_TESTS = ("tests/test_cuda_build.py", "tests/test_cuda_resident_device.py")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
VERIFIED = ("sinkhorn", "heun", "divergence")  # what rows of its table begin with
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
    importlib.import_module("fewstep.kernels.sinkhorn")
times.append(time.perf_counter())
for _ in range(2):
    ot = fewstep.sinkhorn(x, y, eps=50.0, max_iter=20, backend=backend)
    ot.value.sum().backward()
    wait()
    times.append(time.perf_counter())
print(*(after - before for before, after in zip(times, times[1:])))
"""
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


def stage_verify(runner: Runner) -> Stage:
    """`fewstep verify` in the time that is left; its record goes to the folder of the logs."""
    minutes = max(runner.left() / 60 - 0.25, 0.1)
    run = f"cli.main(['verify', '--minutes', '{minutes:.2f}'])"
    command = f"import sys; from fewstep import cli; sys.exit({run})"
    runner.env["FEWSTEP_CACHE"] = str(runner.out.resolve())
    code, text = runner.run("verify.log", [sys.executable, "-c", command], runner.left())
    rows = [line.split() for line in text.splitlines() if line.startswith(VERIFIED)]
    states = [next((word for word in row if word in ("yes", "NO", "not")), "") for row in rows]
    count = {state: states.count(state) for state in ("yes", "NO", "not")}
    summary = f"{count['yes']} matched, {count['NO']} did not, {count['not']} not run"
    ok = True if code == 0 else None if rows and not count["NO"] else False
    return Stage("fewstep verify", ok, summary if rows else last_line(text))


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
    todo = [c for c in served if all(here(runner, name) for name in packages_of(c))]
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
        against = f"; the best peer takes {ratio:.1f}x as long" if ratio else ""
        summary = f"{best['contender']} {best['median_ms']:.3g} ms{against}"
    seconds = time.monotonic() - start
    return Stage(case.name, best is not None and not todo, summary, seconds, rows)


def here(runner: Runner, package: str) -> bool:
    """Whether a package is installed, or came with a wheel of `--wheels`."""
    return installed(package) or runner_has(runner, package)


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
            stages.append((name, partial(stage_case, runner, case, args.budget)))
        for tool in SANITIZERS:
            stages.append((tool, partial(stage_sanitizer, runner, tool)))
        stages.append(("occupancy", lambda: stage_occupancy(runner)))
        stages.append(("fewstep verify", lambda: stage_verify(runner)))
        done = run_stages(stages, report)
    say(f"wrote {args.out / 'gpu.md'} and gpu.csv")
    return int(any(stage.ok is False for stage in done))


if __name__ == "__main__":
    sys.exit(main())
