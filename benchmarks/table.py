"""Write the benchmark tables from the CSV files: `python -m benchmarks.table`.

The README has a claim and a short table of Sinkhorn's, benchmarks/README.md a section for each
family. Each text replaces what stands between its two marker comments. `--check` writes nothing and
exits with 1 where a page and the CSV files disagree; without a CSV file there must be nothing
between the markers.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.contenders import BUSY_CORES, CONTENDERS
from benchmarks.registry import ALL_CASES, CASES, FAMILIES, Case

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, str]
SINKHORN = "sinkhorn"
# What the README's claim is about, two clouds of one size.
CLAIMED = "n2048_d64"
# The README's table; "wflow" is where the lead is smallest.
SHORT_CASES = ("n512_d64_grad", CLAIMED, "n4096_d3", "wflow", "divergence_n1024_d64")
SHORT_CONTENDERS = ("compile", "geomloss-tensorized", "pykeops", "pot", "ott-jax")


def command(family: str) -> str:
    return f"python -m benchmarks.run {family} --peers"


def family_of(rows: list[Row]) -> str:
    """The family that has the first row's case."""
    return next(name for name, cases in FAMILIES.items() if rows[0]["case"] in cases)


def read(path: Path) -> list[Row]:
    """The rows of cases and contenders that the registry still has."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["case"] in ALL_CASES and row["contender"] in CONTENDERS]


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


def ours_of(rows: list[Row]) -> str:
    """The backend of ours that the rows compare with the rest: the first in the registry."""
    ours = next(c for c in CONTENDERS if any(r["contender"] == c for r in rows))
    if CONTENDERS[ours].kind != "fewstep":
        raise ValueError(f"rows must hold a backend of fewstep, got {ours} first")
    return ours


def cell(row: Row | None, ours: float | None) -> str:
    if row is None:
        return ""
    if not row["median_s"]:
        if row["note"].startswith("not run"):
            return "not run"
        return "disagrees" if row["value_error"] else "failed"
    seconds = float(row["median_s"])
    if ours is None:
        return duration(seconds)
    if CONTENDERS[row["contender"]].kind == "fewstep":
        over = over_network(row, "")
        return duration(seconds) + f" ({over} the network)" * bool(over)
    return f"{duration(seconds)} ({ratio(seconds / ours)})"


def over_network(row: Row | None, otherwise: str) -> str:
    """How many times the network alone a sampler takes; in a process of its own, its time."""
    known = row.get("over_network") if row else None
    return f"{float(known):.2f}x" if known else otherwise


def title(case: Case, row: Row) -> str:
    kinds = {"solve": "", "divergence": "Sinkhorn divergence, ", "drift": f"{case.form} drift, "}
    temperatures = f"{len(case.eps_of_mean)} x " if len(case.eps_of_mean) > 1 else ""
    iterations = row["iterations"] or case.iterations or ""
    return (
        f"{kinds[case.workload]}{case.shape}; {temperatures}{iterations}"
        + " + backward" * case.backward
    )


def claim(rows: list[Row]) -> str:
    """Two sentences on `CLAIMED`, or nothing where it was not measured beside other libraries."""
    ours = ours_of(rows)
    timed = {r["contender"]: r for r in rows if r["case"] == CLAIMED and r["median_s"]}
    rivals = sorted(
        (float(row["median_s"]), name)
        for name, row in timed.items()
        if CONTENDERS[name].kind != "fewstep"
    )
    if ours not in timed or not any(CONTENDERS[name].kind == "peer" for _, name in rivals):
        return ""
    case, own = CASES[CLAIMED], float(timed[ours]["median_s"])
    listing = [f"{CONTENDERS[name].label} {ratio(s / own)}" for s, name in rivals]
    kind = "CPU" if timed[ours]["device"] == "cpu" else "GPU"
    return (
        f"A {kind} ({_machine(timed[ours])}) runs {case.iterations} Sinkhorn iterations between "
        f"two clouds of {case.n} points in {case.d} dimensions in {duration(own)}. Others "
        f"take a multiple of that time: {_enumerated(listing)} ([benchmarks](#benchmarks))."
    )


def _enumerated(parts: list[str]) -> str:
    """`a, b and c`"""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def short(rows: list[Row]) -> str:
    """The table of `SHORT_CASES`, or nothing where none of them was measured."""
    wanted = {ours_of(rows), *SHORT_CONTENDERS}
    kept = [r for r in rows if r["case"] in SHORT_CASES and r["contender"] in wanted]
    timed = [row for row in kept if row["median_s"]]
    if not timed:
        return ""
    return "\n".join(
        [
            *sinkhorn_table(kept),
            "",
            f"Times are medians on {listed(timed, _machine)}. A figure in parentheses is the time "
            "divided by that of fewstep. [benchmarks/README.md](benchmarks/README.md) has all "
            "cases and says what differs.",
        ]
    )


def memory(rows: list[Row], columns: list[str]) -> list[str]:
    """The peak above the inputs in the largest case of the table."""
    timed = [r for r in rows if r["median_s"] and not CASES[r["case"]].sweep]
    if not timed:
        return []
    largest = max(timed, key=lambda r: int(r["N"]) * int(r["M"]) if r["B"] == "1" else 0)
    case = CASES[largest["case"]]
    peaks = {r["contender"]: float(r["peak_mb"]) for r in timed if r["case"] == case.name}
    listing = ", ".join(f"{CONTENDERS[c].label} {peaks[c]:.0f} MB" for c in columns if c in peaks)
    return [f"Peak memory beyond the inputs at {case.shape}: {listing}."]


def footer(rows: list[Row], columns: list[str], more: list[str]) -> list[str]:
    """What all rows share, as a list: command, machine, versions, and what differs."""
    timed = [row for row in rows if row["median_s"]]
    versions = listed(timed, lambda r: f"{CONTENDERS[r['contender']].package} {r['version']}")
    slow = [
        f"{CONTENDERS[c].label} {duration(max(calls))}"
        for c in columns
        if (calls := [float(r["first_call_s"]) for r in timed if r["contender"] == c])
        and max(calls) > 1
    ]
    notes: dict[str, list[str]] = {}
    for part in dict.fromkeys(part for r in timed for part in r["note"].split("; ") if part):
        whose = listed([r for r in timed if part in r["note"].split("; ")], _label)
        notes.setdefault(whose, []).append(part)
    first = rows[0]
    busy = listed(
        [row for row in timed if float(row["other_cores"]) > BUSY_CORES],
        lambda r: f"{_label(r)} ({_title(r)})",
    )
    items = [
        f"Command: `{command(family_of(rows))}`{_device(first)}, at commit {first['commit']}, "
        f"{first['date']}.",
        f"Machine: {listed(timed, _machine)}.",
        f"Versions: {versions}.",
        "Correctness: each contender agreed with its float64 definition before it was timed.",
        *more,
        *([f"Longest first call, which is not counted: {'; '.join(slow)}."] if slow else []),
        *([f"Timed on a machine busy with other work: {busy}."] if busy else []),
    ]
    differ = [f"  - {whose}: {'; '.join(parts)}." for whose, parts in notes.items()]
    return [f"- {item}" for item in items] + (["- What differs:", *differ] if differ else [])


def render_family(rows: list[Row]) -> str:
    """As `render`, for the families whose cases run the same network in every column."""
    ours = ours_of(rows)
    family = family_of(rows)
    cases = FAMILIES[family]
    present = {row["contender"] for row in rows}
    columns = [ours, *(c for c in CONTENDERS if c in present - {ours, "reference"})]
    by_key = {(row["case"], row["contender"]): row for row in rows}
    lines = heading("case", columns)
    for name in cases:
        own = by_key.get((name, ours))
        if own is None:
            continue
        seconds = float(own["median_s"]) if own["median_s"] else None
        beside = family in ("heun", "attention") and bool(own.get("over_network"))
        cells = [cell(by_key.get((name, c)), None if beside else seconds) for c in columns]
        if beside:
            cells = [
                over_network(by_key.get((name, c)), text)
                for c, text in zip(columns, cells, strict=True)
            ]
        lines.append(f"| {_title(own)} | " + " | ".join(cells) + " |")
    probes = any(row.get("probes") for row in rows)
    same = "networks, inputs and probes, except as said below" if probes else "networks and inputs"
    more = [f"Every column has the same {same}."]
    if any(row.get("over_network") for row in rows):
        more.append(
            "Ratios to the network alone: both were called in turn in one process. Its own column"
            " is from another process."
        )
    lines += ["", *footer(rows, columns, more)]
    for column, what in (
        ("saved_mb", "Saved for backward, MB"),
        ("rmse", "RMSE of the log-density, nats"),
    ):
        shown = [r for r in rows if r.get(column) and r["median_s"]]
        if not shown:
            continue
        by = {(r["case"], r["contender"]): f"{float(r[column]):.3g}" for r in shown}
        own_columns = [c for c in columns if any(c == contender for _, contender in by)]
        lines += ["", f"{what}:", "", *heading("case", own_columns)]
        for name in dict.fromkeys(r["case"] for r in shown):
            row = next(r for r in shown if r["case"] == name)
            cells = [by.get((name, c), "") for c in own_columns]
            lines.append(f"| {_title(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def heading(first: str, columns: list[str]) -> list[str]:
    """The first two lines of a table of contenders."""
    labels = " | ".join(CONTENDERS[c].label for c in columns)
    return [f"| {first} | {labels} |", "|---|" + "---:|" * len(columns)]


def _title(row: Row) -> str:
    """The first cell of a row's line."""
    if row["case"] in CASES:
        return title(CASES[row["case"]], row)
    return f"{_what(row)}; {ALL_CASES[row['case']].shape}"


def _what(row: Row) -> str:
    """Workload, estimator and steps of a row."""
    parts = [row["workload"].replace("-", " ")]
    if row.get("estimator") == "exact":
        parts.append("exact")
    elif row.get("probes"):
        parts.append(f"{row['probes']} probe" + "s" * (row["probes"] != "1"))
    if row.get("steps"):
        parts.append(f"{row['steps']} steps")
    return ", ".join(parts)


def sinkhorn_table(rows: list[Row]) -> list[str]:
    """One line per case, one column per contender; in parentheses, how much slower than ours."""
    ours, columns = ours_of(rows), columns_of(rows)
    by_key = {(row["case"], row["contender"]): row for row in rows}
    lines = heading("N x M, D; iterations", columns)
    for name, case in CASES.items():
        done = [by_key[name, c] for c in columns if (name, c) in by_key]
        if not done or case.sweep:
            continue
        own = by_key.get((name, ours))
        seconds = float(own["median_s"]) if own and own["median_s"] else None
        cells = [cell(by_key.get((name, c)), seconds) for c in columns]
        lines.append(f"| {title(case, done[0])} | " + " | ".join(cells) + " |")
    return lines


def columns_of(rows: list[Row]) -> list[str]:
    """Contenders of a table of Sinkhorn's: ours first, then as in the registry."""
    ours = ours_of(rows)
    present = {row["contender"] for row in rows if not CASES[row["case"]].sweep}
    return [ours, *(c for c in CONTENDERS if c in present - {ours, "reference"})]


def render(rows: list[Row]) -> str:
    """The section of Sinkhorn's: table, footer and picture."""
    columns = columns_of(rows)
    more = [
        "Every column has the same points, eps and number of iterations.",
        *memory(rows, columns),
    ]
    lines = [*sinkhorn_table(rows), "", *footer(rows, columns, more)]
    if any(row["median_s"] and CASES[row["case"]].sweep for row in rows):
        picture = f"results/sinkhorn_{rows[0]['device']}.png"
        lines += ["", f"![Time per pair of points and iteration against N]({picture})"]
    return "\n".join(lines)


def _machine(row: Row) -> str:
    return f"{row['machine']}, {row['threads']} thread" + "s" * (row["threads"] != "1")


def _device(row: Row) -> str:
    return " with `--device cuda`" if row["device"] == "cuda" else ""


def _label(row: Row) -> str:
    return CONTENDERS[row["contender"]].label


def replaced(page: str, name: str, text: str) -> str:
    """`page` with `text` between the markers of that name.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    begin, end = (f"<!-- {name}:{side} -->\n" for side in ("begin", "end"))
    head, first, rest = page.partition(begin)
    _, last, tail = rest.partition(end)
    if not first or not last or begin in tail or end in tail:
        raise ValueError(f"README must hold {begin.strip()} and then {end.strip()}, once each")
    return head + begin + (f"{text}\n" if text else "") + end + tail


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where a page is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--page", type=Path, default=ROOT / "benchmarks" / "README.md")
    parser.add_argument("--csv", type=Path, action="append", help="default: all of results/")
    args = parser.parse_args(argv)
    results = ROOT / "benchmarks" / "results"
    tables: dict[str, list[list[Row]]] = {}
    if args.csv:
        for path in args.csv:
            rows = read(path)
            tables.setdefault(family_of(rows), []).append(rows)
    else:
        for family in FAMILIES:
            paths = [results / f"{family}_{device}.csv" for device in ("cpu", "cuda")]
            tables[family] = [read(path) for path in paths if path.exists()]
    if not any(tables.values()) and not args.check:
        parser.error(f"no results in {results}: run `{command(SINKHORN)}`")
    old = {path: path.read_text() for path in (args.readme, args.page)}
    new = dict(old)
    for family, own in tables.items():
        if family == SINKHORN:
            for name, make in (("claim", claim), ("benchmarks", short)):
                text = next(filter(None, map(make, own)), "")
                new[args.readme] = replaced(new[args.readme], name, text)
        section = "\n\n".join(map(render if family == SINKHORN else render_family, own))
        new[args.page] = replaced(new[args.page], family, section)
    changed = [path for path in new if new[path] != old[path]]
    if args.check:
        for path in changed:
            sys.stderr.write(f"{path} differs from the CSV: python -m benchmarks.table\n")
        return int(bool(changed))
    for path in changed:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(new[path])
        os.replace(partial, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
