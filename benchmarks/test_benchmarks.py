"""The registry under pytest-benchmark (`pytest benchmarks`), and the harness itself."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import run, table
from benchmarks.peers import BUILDERS, numpy_outputs
from benchmarks.registry import CASES, CONTENDERS, GRAD_RTOL, VALUE_RTOL, Case, draw
from benchmarks.worker import errors, expect, measure
from fewstep._library import BACKENDS, unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = [case for case in CASES.values() if case.quick]
SMALL = replace(CASES["n512_d64"], name="small", n=48, m=40, d=5, iterations=6)


@functools.cache
def expected(case: Case, definition: str) -> list[np.ndarray]:
    return expect(draw(case), definition)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
@pytest.mark.parametrize("name", [*BACKENDS, "eager"])
def test_speed(
    name: str, case: Case, benchmark: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    contender = CONTENDERS[name]
    reason = unavailable(name, DEVICE) if name in BACKENDS else None
    if DEVICE not in contender.devices or reason is not None:
        pytest.skip(reason or f"{name} does not run on {DEVICE}")
    problem = draw(case, DEVICE)
    outputs = numpy_outputs(benchmark(BUILDERS[name](problem)))
    value_error, grad_error = errors(outputs, expected(case, contender.definition_for(case)))
    assert value_error <= VALUE_RTOL
    assert grad_error <= GRAD_RTOL


def test_draw_is_seeded_and_eps_is_a_fraction_of_the_mean_cost() -> None:
    problem, again = draw(SMALL), draw(SMALL)
    assert (problem.x == again.x).all()
    costs = torch.cdist(torch.as_tensor(problem.x), torch.as_tensor(problem.y)).square()
    assert problem.eps == pytest.approx(SMALL.eps_of_mean * costs.mean().item(), rel=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_measure_times_what_agrees(backward: bool) -> None:
    problem = draw(replace(SMALL, backward=backward))
    row = measure(CONTENDERS["eager"], problem, expect(problem, "unrolled"), budget=0.01)
    assert row["q25_s"] <= row["median_s"] <= row["q75_s"]
    assert row["repeats"] >= 3
    assert ("grad_error" in row) == backward


def test_measure_refuses_another_number_of_iterations() -> None:
    other = draw(replace(SMALL, iterations=SMALL.iterations - 1))
    row = measure(CONTENDERS["eager"], draw(SMALL), expect(other, "alternating"), budget=0.01)
    assert "median_s" not in row
    assert "disagrees" in row["note"]
    assert row["value_error"] > VALUE_RTOL


def _row(case: str, contender: str, seconds: float | None) -> dict[str, Any]:
    row = CASES[case].columns() | {"contender": contender, "version": "1.0", "threads": 2}
    row |= {"value_error": 1e-7, "note": ""}
    if seconds is None:
        return row
    timed = {"median_s": seconds, "q25_s": seconds, "q75_s": seconds}
    return row | timed | {"first_call_s": 2 * seconds, "peak_mb": 1.0}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [
        _row("n512_d64", "cpp", 0.001),
        _row("n512_d64", "eager", 0.0125),
        _row("n512_d64", "geomloss-tensorized", None),
    ]
    run.derive(rows, peers=True)
    run.write(rows, tmp_path / "sinkhorn.csv")
    return tmp_path / "sinkhorn.csv"


def test_csv_has_the_derived_columns(results: Path) -> None:
    with results.open(newline="") as file:
        cpp, eager, geomloss = csv.DictReader(file)
    assert float(cpp["speedup_vs_best_peer"]) == pytest.approx(12.5)
    assert float(cpp["pair_iterations_per_s"]) == pytest.approx(512 * 512 * 20 / 0.001, rel=1e-3)
    assert float(eager["speedup_vs_best_peer"]) == 1
    assert geomloss["median_s"] == geomloss["speedup_vs_best_peer"] == ""


def test_table_goes_into_the_readme_and_check_sees_a_difference(results: Path) -> None:
    readme = results.with_name("README.md")
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    arguments = [f"--readme={readme}", f"--csv={results}"]
    assert table.main([*arguments, "--check"]) == 1
    assert table.main(arguments) == 0
    assert table.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| 512 x 512, D 64; 20 | 1.00 ms | 12.5 ms (12x) | disagrees |" in text
    assert "old" not in text


def test_table_refuses_a_readme_without_markers(results: Path) -> None:
    readme = results.with_name("README.md")
    readme.write_text(table.BEGIN)
    with pytest.raises(ValueError, match="README must hold"):
        table.main([f"--readme={readme}", f"--csv={results}"])


def test_run_names_too_many_threads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["sinkhorn", "--threads", "100000"])
    assert "got 100000" in capsys.readouterr().err
