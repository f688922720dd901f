"""Time `fewstep` beside eager torch, torch.compile and other libraries: one process per row.

    python -m benchmarks.run sinkhorn --peers
    python -m benchmarks.run trace --peers
    python -m benchmarks.run heun --peers
    python -m benchmarks.run jvp --peers
    python -m benchmarks.run attention --peers
    python -m benchmarks.run sinkhorn --list
    python -m benchmarks.run sinkhorn --n 3000 --m 5000 --d 16 --eps 0.05 --peers

Every contender solves the same drawn points at the same eps with the same number of iterations,
must agree with the float64 reference before it is timed, and runs alone on a fixed set of cores.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plot, table
from benchmarks.contenders import BUSY_CORES, CONTENDERS, Contender
from benchmarks.registry import ALL_CASES, FAMILIES, AnyCase, Case, own_case

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_TIMED = (
    *("contender", "version", "median_s", "q25_s", "q75_s", "repeats", "first_call_s"),
    *("peak_mb", "other_cores", "value_error", "grad_error", "speedup_vs_best_peer"),
)
_RUN = ("device", "threads", "machine", "torch", "commit", "date", "note")
COLUMNS = {
    "sinkhorn": (
        *("case", "workload", "B", "N", "M", "D", "iterations", "cost", "eps_of_mean", "backward"),
        *("dtype", *_TIMED, "pair_iterations_per_s", *_RUN),
    ),
    "trace": (
        *("case", "workload", "B", "D", "width", "layers", "norm", "estimator", "probes", "steps"),
        *(*_TIMED, "over_plain", "over_network", "saved_mb", "rmse", *_RUN),
    ),
    "attention": ("case", "workload", "state", *_TIMED, "over_plain", "over_network", *_RUN),
    "heun": ("case", "workload", "state", "steps", *_TIMED, "over_plain", "over_network", *_RUN),
    "jvp": (
        *("case", "workload", "network", "state", *_TIMED),
        *("over_plain", "over_network", "saved_mb", *_RUN),
    ),
}


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def missing(contender: Contender) -> list[str]:
    """The packages of a contender that are not installed."""
    return [name for name in (contender.package, *contender.also) if not installed(name)]


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    name: str = done.stdout.strip()
    return name or "uncommitted"


def environment(threads: int, scratch: Path) -> dict[str, str]:
    """Threads fixed before any import; compilers start from empty caches, so first calls count."""
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return (
        os.environ
        | dict.fromkeys(counts, str(threads))
        | {
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "KEOPS_CACHE_FOLDER": str(scratch / "keops"),
        }
    )


def work(*arguments: str, env: dict[str, str], timeout: float) -> str | None:
    """Run one worker; returns None, or in one line why it failed."""
    command = [sys.executable, "-m", "benchmarks.worker", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"no result within {timeout:.0f} s"
            raise
        log.seek(0)
        lines = log.read().strip().splitlines() or ["no message"]
    # The message of the exception may go on for lines after its name.
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return f"exit code {code}: {(named or lines)[-1][:200]}" if code else None


def pool(row: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any]:
    """`row` with the statistics of its calls and those of an earlier round of the same contender.

    A row without calls, which says in its note why it has none, stands for all rounds.
    """
    if "times_s" not in row or (other is not None and "times_s" not in other):
        return row
    if other is not None:
        row = other | {
            "times_s": other["times_s"] + row["times_s"],
            "peak_mb": max(other["peak_mb"], row["peak_mb"]),
            "other_cores": max(other["other_cores"], row["other_cores"]),
        }
    q25, median, q75 = np.quantile(row["times_s"], (0.25, 0.5, 0.75)).tolist()
    repeats = len(row["times_s"])
    return row | {"median_s": median, "q25_s": q25, "q75_s": q75, "repeats": repeats}


def derive(rows: list[dict[str, Any]], peers: bool) -> None:
    """Fill in, for the rows of one case, what follows from the medians."""
    others = [
        row["median_s"]
        for row in rows
        if "median_s" in row
        and row["contender"] != "plain"
        and CONTENDERS[row["contender"]].kind != "fewstep"
    ]
    plain = next((r.get("median_s") for r in rows if r["contender"] == "plain"), None)
    for row in rows:
        if "median_s" not in row:
            continue
        pairs = ALL_CASES[row["case"]].pairs * row["iterations"]
        row["pair_iterations_per_s"] = pairs / row["median_s"]
        if plain is not None:
            row["over_plain"] = row["median_s"] / plain
        if peers and others:
            row["speedup_vs_best_peer"] = min(others) / row["median_s"]


def describe(row: dict[str, Any]) -> str:
    if "median_s" not in row:
        error = f" (value off by {row['value_error']:.1e})" if "value_error" in row else ""
        return f"{row['note']}{error}"
    line = (
        f"{1e3 * row['median_s']:10.2f} ms  [{1e3 * row['q25_s']:.2f}, {1e3 * row['q75_s']:.2f}]"
        f"  first {row['first_call_s']:.2f} s  peak {row['peak_mb']:.0f} MB"
        f"  value error {row['value_error']:.0e}"
    )
    line += f"  gradient error {row['grad_error']:.0e}" if "grad_error" in row else ""
    busy = row["other_cores"] > BUSY_CORES
    return line + (f"  BUSY MACHINE ({row['other_cores']:.1f} cores)" if busy else "")


def too_slow(
    case: AnyCase, contender: Contender, rows: list[dict[str, Any]], limit: float
) -> str | None:
    """Why a peer is left out: its calls would pass `limit` seconds at the rate of an earlier case.

    The rate is that of the largest case of the same kind, batch and dimension.
    """
    if not isinstance(case, Case):
        return None
    kind = (contender.name, case.workload, case.batch, case.d)
    rates = {
        row["N"] * row["M"]: row["pair_iterations_per_s"]
        for row in rows
        if (row["contender"], row["workload"], row["B"], row["D"]) == kind and "median_s" in row
    }
    if contender.kind == "fewstep" or case.iterations is None or not rates:
        return None
    seconds = case.pairs * case.iterations / rates[max(rates)]
    return f"not run: about {seconds:.0f} s per call" if seconds > limit else None


def attempt(
    case: AnyCase, contender: Contender, args: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """What one process reports of one contender, or why there is nothing."""
    env = environment(args.threads, scratch)
    definition = contender.definition_for(case)
    expected, result = scratch / f"{case.name}-{definition}.npz", scratch / "result.json"
    failure = None
    if not expected.exists():
        arguments = [case.name, definition, f"--result={expected}"]
        failure = work(*arguments, env=env, timeout=args.timeout)
    if failure is None:
        budget = args.budget / 2 if case.sweep else args.budget
        options = [f"--device={args.device}", f"--budget={budget}"]
        files = [f"--expected={expected}", f"--result={result}"]
        arguments = [case.name, contender.name, *options, *files]
        failure = work(*arguments, env=env, timeout=args.timeout)
    row = json.loads(result.read_text()) if failure is None else {"note": failure}
    return case.columns() | {"contender": contender.name} | row


def run_case(
    case: AnyCase,
    contenders: list[Contender],
    args: argparse.Namespace,
    scratch: Path,
    earlier: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    iterations = f", {case.iterations} iterations" if case.iterations else ""
    gradient = " + backward" * case.backward
    say(f"\n{case.name}: {case.workload}, {case.shape}{iterations}{gradient}")
    by_name: dict[str, dict[str, Any]] = {}
    for _ in range(args.rounds):
        for contender in contenders:
            old = by_name.get(contender.name)
            longest = args.longest / 2 if case.sweep else args.longest
            note = too_slow(case, contender, earlier, longest)
            if old is not None and "median_s" not in old:
                continue
            if note is None:
                row = pool(attempt(case, contender, args, scratch), old)
            else:
                row = case.columns() | {"contender": contender.name, "note": note}
            by_name[contender.name] = row
            say(f"  {contender.label:22s}{describe(row)}")
    rows = list(by_name.values())
    derive(rows, args.peers)
    for row in rows:
        if "over_plain" in row:
            label = CONTENDERS[row["contender"]].label
            over = row.get("over_network", row["over_plain"])
            say(f"  {label} takes {over:.2f}x as long as the network alone")
        elif "median_s" in row and CONTENDERS[row["contender"]].kind == "fewstep":
            speedup = row.get("speedup_vs_best_peer")
            say(
                f"  {row['contender']}: {row['pair_iterations_per_s']:.2e} pair-iterations/s"
                + (f"; the best peer takes {speedup:.2f}x as long" if speedup else "")
            )
    return rows


def write(rows: list[dict[str, Any]], path: Path, op: str = "sinkhorn") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS[op], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("op", choices=FAMILIES)
    parser.add_argument("--peers", action="store_true", help="other libraries too (extra bench)")
    parser.add_argument("--quick", action="store_true", help="small cases, half a second each")
    parser.add_argument(
        "--case", action="append", metavar="NAME", help="only this one, of --list; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="the cases, and who can be timed here")
    own = parser.add_argument_group("a case of your own", "20 iterations of sinkhorn, float32")
    own.add_argument("--n", type=int, help="points of x")
    own.add_argument("--m", type=int, help="points of y (default: as many)")
    own.add_argument("--d", type=int, help="coordinates (default 64)")
    own.add_argument("--eps", type=float, help="as a fraction of the mean cost (default 0.05)")
    parser.add_argument(
        "--only", action="append", choices=CONTENDERS, metavar="NAME", help="only this contender"
    )
    parser.add_argument("--threads", type=int, default=2, help="cores of every process")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--budget", type=float, help="seconds of timed calls per row (default 3)")
    parser.add_argument("--rounds", type=int, default=1, help="processes per row, interleaved")
    parser.add_argument("--longest", type=float, default=30, help="seconds per call of a peer")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per process")
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/...)")
    args = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0))
    if not 1 <= args.threads <= cores:
        parser.error(f"--threads must be from 1 to the {cores} cores here, got {args.threads}")
    if args.n is None and (args.m, args.d, args.eps) != (None, None, None):
        parser.error("--n must be given with --m, --d or --eps")
    if args.n is not None:
        sizes = (args.n, args.m or args.n, args.d or 64)
        eps = 0.05 if args.eps is None else args.eps
        if args.op != "sinkhorn" or args.case:
            parser.error("--n is for sinkhorn without --case")
        if min(sizes) < 1 or not 0 < eps < math.inf:
            parser.error("--n, --m and --d must be at least 1, and --eps positive")
        args.case = [own_case(*sizes, eps)]
    elif unknown := [name for name in args.case or () if name not in FAMILIES[args.op]]:
        parser.error(f"--case: {unknown[0]} is none of {args.op}")
    if args.budget is None:
        args.budget = 0.5 if args.quick else 3.0
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.out is None:
        part = "_subset" if args.quick or args.case or args.only or not args.peers else ""
        args.out = RESULTS / f"{args.op}_{args.device}{part}.csv"
    return args


def show_cases(op: str) -> None:
    family = FAMILIES[op]
    for case in family.values():
        iterations = f", {case.iterations} iterations" if case.iterations else ""
        gradient = " + backward" * case.backward
        sys.stdout.write(f"{case.name:31s} {case.workload}, {case.shape}{iterations}{gradient}\n")
    for contender in CONTENDERS.values():
        if any(map(contender.enters, family.values())) and contender.kind == "peer":
            here = f"needs {' and '.join(lacks)}" if (lacks := missing(contender)) else "installed"
            sys.stdout.write(f"--only {contender.name:24s} {contender.label}: {here}\n")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.list:
        show_cases(args.op)
        return
    family = FAMILIES[args.op]
    cases = [ALL_CASES[name] for name in args.case or family]
    if not args.case:
        cases = [case for case in cases if (case.quick if args.quick else case.default)]
    wanted = [
        contender
        for contender in CONTENDERS.values()
        if args.device in contender.devices
        and (args.peers or contender.kind != "peer" or contender.name in (args.only or ()))
        and contender.name in (args.only or CONTENDERS)
        and any(contender.enters(case) for case in cases)
    ]
    contenders = [contender for contender in wanted if not missing(contender)]
    for contender in wanted:
        if lacks := missing(contender):
            say(f"{contender.label}: needs {' and '.join(lacks)} (pip install '.[bench]')")
    start = time.monotonic()
    # A terminated run ends its worker too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Children inherit the cores, which holds for thread pools that heed no variable.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    common = {
        "device": args.device,
        "threads": args.threads,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    # The final name holds a whole run or the one before it.
    partial = args.out.with_name(args.out.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as scratch:
        for case in cases:
            entered = [contender for contender in contenders if contender.enters(case)]
            new = run_case(case, entered, args, Path(scratch), rows) if entered else []
            rows += [row | common for row in new]
            write(rows, partial, args.op)
    if not any("median_s" in row for row in rows):
        sys.exit(f"benchmarks.run: nothing could be timed; the reasons are above and in {partial}")
    os.replace(partial, args.out)
    say(f"\nwrote {args.out} after {(time.monotonic() - start) / 60:.0f} minutes")
    if any("median_s" in row and ALL_CASES[row["case"]].sweep for row in rows):
        if installed("matplotlib"):
            picture = args.out.with_suffix(".png")
            plot.draw(table.read(args.out), picture)
            say(f"wrote {picture}")
        else:
            say("no picture: matplotlib is not installed (pip install '.[bench]')")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("benchmarks.run: stopped; the .partial file has the cases that were done")
