"""Draw time per pair and iteration against N from a CSV file: `python -m benchmarks.plot`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.registry import CASES, STREAMED
from benchmarks.table import ROOT, Row, ours_of, read

# Figure 10 x 4 inches at this resolution.
DPI = 120


def curves(rows: list[Row]) -> dict[int, dict[str, list[tuple[int, float]]]]:
    """For each D and contender, `(N, seconds per pair and iteration)` of the sweep, by N."""
    found: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row["median_s"] and CASES[row["case"]].sweep:
            seconds = 1 / float(row["pair_iterations_per_s"])
            points = found.setdefault(int(row["D"]), {}).setdefault(row["contender"], [])
            points.append((int(row["N"]), seconds))
    return {d: {c: sorted(p) for c, p in by.items()} for d, by in sorted(found.items())}


def draw(rows: list[Row], path: Path) -> None:
    """One panel per dimension; the band is within 1.5x of our fastest point with nothing kept."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = curves(rows)
    ours = ours_of(rows)
    drawn = [c for c in CONTENDERS if any(c in by_contender for by_contender in panels.values())]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4), dpi=DPI, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (d, by_contender) in zip(axes, panels.items(), strict=True):
            for index, contender in enumerate(drawn):
                if contender not in by_contender:
                    continue
                n, seconds = zip(*by_contender[contender], strict=True)
                own = contender in (ours, STREAMED)
                banded = contender == STREAMED or (contender == ours and STREAMED not in drawn)
                ax.plot(
                    n,
                    seconds,
                    marker="o",
                    markersize=4,
                    linewidth=2 if own else 1,
                    color=f"C{index}",
                    label=CONTENDERS[contender].label,
                )
                if banded:
                    low = min(seconds)
                    ax.axhspan(
                        low,
                        1.5 * low,
                        color=f"C{index}",
                        alpha=0.15,
                        linewidth=0,
                        label="up to 1.5x its fastest",
                    )
            ax.set(xscale="log", yscale="log", xlabel="N = M", title=f"D = {d}")
            ax.grid(which="major", alpha=0.3)
        axes[0].set_ylabel("seconds per pair of points and iteration")
        axes[-1].legend(
            *axes[0].get_legend_handles_labels(),
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(1, 1),
        )
        first = rows[0]
        figure.suptitle(
            f"Sinkhorn, float32, {first['machine']}, threads: {first['threads']}, "
            f"commit {first['commit']}",
            fontsize=9,
        )
        figure.savefig(path, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.plot", description=__doc__)
    default = ROOT / "benchmarks" / "results" / "sinkhorn_cpu.csv"
    parser.add_argument("csv", type=Path, nargs="?", default=default)
    parser.add_argument("--out", type=Path, help="PNG file (default: beside the CSV file)")
    args = parser.parse_args(argv)
    rows = read(args.csv)
    if not curves(rows):
        parser.error(f"{args.csv} has no timed row of the sweep over N")
    draw(rows, args.out or args.csv.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
