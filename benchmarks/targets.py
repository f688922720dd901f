"""Compare a CSV file with what we hold ourselves to on a CPU: `python -m benchmarks.targets`.

Exits with 1 where a target is missed or was not measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.plot import curves
from benchmarks.registry import CASES, STREAMED
from benchmarks.table import ROOT, Row, duration, family_of, ours_of, read

# (case, contender, how many times faster ours is to be)
SPEEDUPS = (
    ("n512_d64", "ott-jax", 8),
    ("n512_d64", "eager", 30),
    ("n2048_d64", "ott-jax", 6),
    ("n2048_d64", "eager", 15),
    ("n2048_d64", "pykeops", 40),
    ("n4096_d3", "ott-jax", 6),
    ("n4096_d3", "eager", 15),
    ("n4096_d3", "pykeops", 40),
    ("divergence_n1024_d64", "geomloss-tensorized", 20),
    ("divergence_n4096_d64", "geomloss-tensorized", 20),
    ("drift_split_b256_n64_d256", "eager", 15),
    ("drift_joint_b256_n64_d256", "eager", 15),
    ("b10000_n64_d32", "pot", 10),
    ("b10000_n64_d32", "ott-jax", 10),
)
PEAK_MB = ("n20000_d3", 200)
LARGEST = "sweep_n100000_d3"
# The largest over the smallest time per pair and iteration in the sweep over N, with nothing kept
# between passes: what is kept is faster to read the nearer the cache that it fits.
FLAT = 1.5

# (case, contender of ours, another contender, at most this many times its median); "plain", the
# network alone, is called in turn in the same process.
TRACES = (
    ("trace_exact_d64", "cpp", "plain", 2.2),
    ("trace_exact_d784", "cpp", "plain", 1.5),
    ("trace_exact_d784", "cpp-solve", "plain", 1.5),
    ("trace_1_d64", "cpp", "plain", 2.0),
    ("trace_1_d784", "cpp", "plain", 2.0),
    ("trace_1_d64_w512", "cpp", "plain", 2.0),
    ("trace_1_d64_w1024", "cpp", "plain", 2.0),
    ("trace_8_d64_w512", "cpp", "reverse", 0.95),
    ("trace_8_d784", "cpp", "reverse", 0.95),
    ("trace_8_d784", "cpp-solve", "plain", 2.5),
    ("trace_training_d64", "cpp", "plain", 2.0),
    ("trace_training_d64_w512", "cpp", "plain", 2.0),
    ("trace_training_d784", "cpp", "plain", 2.0),
    ("logp_exact", "cpp", "plain", 1.8),
    ("logp_1", "cpp", "plain", 2.1),
)
# (case, at most this many times the network alone, in one process)
HEUNS = (
    ("edm_64x2", 1.10),
    ("edm_1024x2", 1.10),
    ("edm_256x64", 1.10),
    ("edm_64x3072", 1.10),
    ("edm_16x3x32x32", 1.03),
)
JVPS = (
    ("jvp_unet", 1.9),
    ("jvp_dit", 2.2),
    ("meanflow_unet", 1.4),
    ("meanflow_dit", 1.45),
    ("through_unet", 2.15),
)
# (case, contender, at most this many times its column), in the same run
BESIDE = (
    ("jvp_unet", "central", "median_s", 1.0),
    ("meanflow_unet", "plain", "saved_mb", 1.3),
    ("meanflow_dit", "plain", "saved_mb", 1.3),
)
# The same of attention with a tangent and torch's own without.
ATTENTIONS = (("attention_n1024_d64", 3.3), ("attention_n4096_d64", 3.3))
SAVED = 2.4  # times what plain training saves
RMSE = 0.2  # of a fresh probe's log-density, times that of a fixed one


def drift_flops(name: str) -> int:
    """Multiplications and additions in the distances, once, and the barycentres, per temperature.

    Both take D multiply-adds for each of the N x 2 M pairs.
    """
    case = CASES[name]
    products = 1 + len(case.eps_of_mean)
    return case.batch * case.n * 2 * case.m * 2 * case.d * products


def compare(rows: list[Row]) -> Iterator[tuple[str, str, bool | None]]:
    """Yields `(what, measured beside wanted, whether that is reached)`, None for information."""
    ours = ours_of(rows)
    medians = {(r["case"], r["contender"]): float(r["median_s"]) for r in rows if r["median_s"]}
    for case, contender, wanted in SPEEDUPS:
        own, other = medians.get((case, ours)), medians.get((case, contender))
        if own is None or other is None:
            yield f"{case}, {contender}", "not measured", False
        else:
            found = other / own
            yield f"{case}, {contender}", f"{found:.1f}x, target {wanted}x", found >= wanted
    case, most = PEAK_MB
    peaks = [float(r["peak_mb"]) for r in rows if (r["case"], r["contender"]) == (case, ours)]
    text = f"{peaks[0]:.0f} MB, target {most} MB" if peaks else "not measured"
    yield f"{case}, peak beyond the inputs", text, bool(peaks) and peaks[0] <= most
    largest = medians.get((LARGEST, ours))
    yield LARGEST, duration(largest) if largest else "did not run", largest is not None
    for d, by_contender in curves(rows).items():
        for contender in (ours, STREAMED):
            seconds = [s for _, s in by_contender.get(contender, [])]
            if seconds:
                found = max(seconds) / min(seconds)
                text = f"{found:.2f}x from fastest to slowest N"
                flat = contender == STREAMED
                text += f", target {FLAT}x" if flat else ""
                what = f"per pair and iteration, D {d}{', nothing kept' if flat else ''}"
                yield what, text, found <= FLAT if flat else None
    drift = "drift_split_b256_n64_d256"
    if own := medians.get((drift, ours)):
        flops = drift_flops(drift)
        text = f"{flops / 1e9:.2f} GFLOP in {duration(own)}: {flops / own / 1e9:.0f} GFLOP/s"
        yield f"{drift}, matrix products", text, None


def compare_ratios(rows: list[Row]) -> Iterator[tuple[str, str, bool | None]]:
    """The same for the families whose targets are at most so many times another contender."""

    def number(case: str, contender: str, column: str) -> float | None:
        own = (r.get(column) for r in rows if (r["case"], r["contender"]) == (case, contender))
        return next((float(v) for v in own if v), None)

    family = family_of(rows)
    alone = {
        "heun": [(case, "cpp", most) for case, most in HEUNS],
        "jvp": [(case, "cpp", most) for case, most in JVPS],
        "attention": [(case, "cpp", most) for case, most in ATTENTIONS],
        "trace": [(case, who, most) for case, who, other, most in TRACES if other == "plain"],
    }
    for case, contender, most in alone[family]:
        own = number(case, contender, "over_network")
        text = "not measured" if own is None else f"{own:.3f}x, target at most {most:.2f}x"
        yield f"{case}, {contender} over the network alone", text, own is not None and own <= most
    wanted = []
    if family == "jvp":
        wanted = [(case, "cpp", other, column, most) for case, other, column, most in BESIDE]
    elif family == "trace":
        wanted = [(*target[:3], "median_s", target[3]) for target in TRACES if target[2] != "plain"]
        wanted += [
            (case, "cpp", "plain", "saved_mb", SAVED)
            for case, *_ in TRACES
            if case.startswith("trace_training")
        ]
        wanted.append(("logp_1", "cpp", "cpp-solve", "rmse", RMSE))
    for case, contender, other, column, most in wanted:
        what = f"{case}, {contender} over {other}" + f", {column}" * (column != "median_s")
        own, base = number(case, contender, column), number(case, other, column)
        if own is None or base is None:
            yield what, "not measured", False
        else:
            yield what, f"{own / base:.2f}x, target at most {most}x", own / base <= most


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.targets", description=__doc__)
    default = ROOT / "benchmarks" / "results" / "sinkhorn_cpu.csv"
    parser.add_argument("csv", type=Path, nargs="?", default=default)
    args = parser.parse_args(argv)
    missed = False
    rows = read(args.csv)
    comparison = compare if family_of(rows) == "sinkhorn" else compare_ratios
    for what, text, reached in comparison(rows):
        mark = {True: "reached", False: "MISSED", None: ""}[reached]
        sys.stdout.write(f"{what:48s}{text:52s}{mark}".rstrip() + "\n")
        missed |= reached is False
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
