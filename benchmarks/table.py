"""Write the README's benchmark table from the CSV files: `python -m benchmarks.table [--check]`.

The table replaces what stands between the two marker comments. `--check` writes nothing and exits
with 1 where README and CSV disagree.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.registry import CASES, CONTENDERS

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def duration(seconds: float) -> str:
    """Three digits with the unit that suits: `1.23 ms`, `45.6 s`."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:#.3g}".removesuffix(".") + f" {unit}"
    return f"{seconds:#.3g}".removesuffix(".") + " s"


def ratio(times: float) -> str:
    return f"{times:.1f}x" if times < 9.95 else f"{times:.0f}x"


def listed(rows: list[Row], column: Callable[[Row], str]) -> str:
    """The distinct values of a column, in order."""
    return ", ".join(dict.fromkeys(column(row) for row in rows))


def cell(row: Row | None, ours: float | None) -> str:
    if row is None:
        return ""
    if not row["median_s"]:
        return "disagrees" if row["value_error"] else "failed"
    seconds = float(row["median_s"])
    if ours is None or CONTENDERS[row["contender"]].kind == "fewstep":
        return duration(seconds)
    return f"{duration(seconds)} ({ratio(seconds / ours)})"


def render(rows: list[Row]) -> str:
    """One line per case, one column per contender; in parentheses, how much slower than ours."""
    ours = next(c for c in CONTENDERS if any(r["contender"] == c for r in rows))
    if CONTENDERS[ours].kind != "fewstep":
        raise ValueError(f"rows must hold a backend of fewstep, got {ours} first")
    present = {row["contender"] for row in rows}
    columns = [ours, *(c for c in CONTENDERS if c in present - {ours, "reference"})]
    by_key = {(row["case"], row["contender"]): row for row in rows}
    lines = [
        "| N x M, D; iterations | " + " | ".join(CONTENDERS[c].label for c in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, case in CASES.items():
        if not any(key[0] == name for key in by_key):
            continue
        own = by_key.get((name, ours))
        seconds = float(own["median_s"]) if own and own["median_s"] else None
        cells = [cell(by_key.get((name, c)), seconds) for c in columns]
        title = f"{case.shape}; {case.iterations}" + " + backward" * case.backward
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    timed = [row for row in rows if row["median_s"]]
    versions = listed(timed, lambda r: f"{CONTENDERS[r['contender']].package} {r['version']}")
    slow = [
        f"{CONTENDERS[c].label} {duration(max(calls))}"
        for c in columns
        if (calls := [float(r["first_call_s"]) for r in timed if r["contender"] == c])
        and max(calls) > 1
    ]
    notes = [
        listed([r for r in timed if r["note"] == note], _label) + f": {note}"
        for note in dict.fromkeys(r["note"] for r in timed if r["note"])
    ]
    first = rows[0]
    lines += [
        "",
        f"Medians on {listed(timed, lambda r: r['machine'])}, threads: {first['threads']}; "
        f"{versions}; commit {first['commit']}, {first['date']}. Same points, eps and number of "
        "iterations; each agreed with its float64 definition before it was timed"
        + (f". First calls, not counted, took up to: {', '.join(slow)}" if slow else "")
        + ". "
        + (f"What differs: {'; '.join(notes)}. " if notes else "")
        + "Command: `python -m benchmarks.run sinkhorn --peers"
        + (" --device cuda`." if first["device"] == "cuda" else "`."),
    ]
    return "\n".join(lines)


def _label(row: Row) -> str:
    return CONTENDERS[row["contender"]].label


def replaced(readme: str, table: str) -> str:
    """`readme` with `table` between the markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in tail or END in tail:
        raise ValueError(f"README must hold {BEGIN} and then {END}, once each")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where README is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--csv", type=Path, action="append", help="default: results/sinkhorn_*.csv")
    args = parser.parse_args(argv)
    results = ROOT / "benchmarks" / "results"
    complete = [results / f"sinkhorn_{device}.csv" for device in ("cpu", "cuda")]
    paths = args.csv or [path for path in complete if path.exists()]
    if not paths:
        parser.error(f"no results in {results}: run `python -m benchmarks.run sinkhorn --peers`")
    old = args.readme.read_text()
    new = replaced(old, "\n\n".join(render(read(path)) for path in paths))
    if args.check:
        if new != old:
            sys.stderr.write(f"{args.readme} differs from the CSV: python -m benchmarks.table\n")
        return int(new != old)
    partial = args.readme.with_name(args.readme.name + ".partial")
    partial.write_text(new)
    os.replace(partial, args.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
