"""The registry under pytest-benchmark (`pytest benchmarks`), and the harness itself."""

from __future__ import annotations

import csv
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ladder, plot, run, table, targets
from benchmarks.attention_cases import ATTENTION_CASES, draw_attention
from benchmarks.contenders import CONTENDERS
from benchmarks.dense import divergence_averaged, sinkhorn_averaged
from benchmarks.jvp_cases import JVP_CASES, JvpCase, draw_jvp
from benchmarks.peers import BACKENDS, BUILDERS, DEFINITIONS, numpy_outputs
from benchmarks.registry import (
    ALL_CASES,
    CASES,
    FAMILIES,
    GRAD_RTOL,
    HEUN_CASES,
    TRACE_CASES,
    VALUE_RTOL,
    Case,
    TraceCase,
    draw,
    draw_heun,
    draw_trace,
    schedule,
)
from benchmarks.worker import errors, expect, measure, timings
from fewstep import _C
from fewstep._library import unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = [case for case in CASES.values() if case.quick]
SMALL = replace(CASES["n512_d64"], name="small", n=48, m=40, d=5, iterations=6)
DIVERGENCE = replace(CASES["divergence_n256_d64"], name="small", n=48, m=40, d=5)
DRIFT = replace(CASES["drift_split_b16_n64_d256"], name="small", batch=3, n=12, m=9, d=5)
COPIED = replace(SMALL, n=120, m=120, distinct=40)


@functools.cache
def expected(case: Case, definition: str) -> list[np.ndarray]:
    return expect(draw(case.without_copies), definition)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
@pytest.mark.parametrize("name", [*BACKENDS, "eager"])
def test_speed(
    name: str, case: Case, benchmark: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    contender = CONTENDERS[name]
    reason = unavailable(name, DEVICE) if name in BACKENDS else None
    if DEVICE not in contender.devices or not contender.enters(case) or reason is not None:
        pytest.skip(reason or f"{name} does not run {case.workload} on {DEVICE}")
    outputs = numpy_outputs(benchmark(BUILDERS[case.workload, name](draw(case, DEVICE))))
    value_error, grad_error = errors(outputs, expected(case, contender.definition_for(case)))
    assert value_error <= VALUE_RTOL
    assert grad_error <= GRAD_RTOL


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        replace(SMALL, backward=True),
        COPIED,
        DIVERGENCE,
        DRIFT,
        replace(DRIFT, form="joint"),
    ],
    ids=["solve", "gradient", "copied", "divergence", "split", "joint"],
)
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_ours_agrees_on_small_problems(name: str, case: Case) -> None:
    outputs = numpy_outputs(BUILDERS[case.workload, name](draw(case))())
    definition = CONTENDERS[name].definition_for(case)
    value_error, grad_error = errors(outputs, expected(case, definition))
    assert value_error <= VALUE_RTOL
    assert grad_error <= GRAD_RTOL


@pytest.mark.parametrize("name", ["geomloss-tensorized", "ott-jax"])
@pytest.mark.parametrize("case", [replace(SMALL, backward=True), DIVERGENCE])
def test_peers_agree_with_their_definitions(name: str, case: Case) -> None:
    contender = CONTENDERS[name]
    pytest.importorskip({"geomloss": "geomloss", "ott-jax": "ott"}[contender.package])
    outputs = numpy_outputs(BUILDERS[case.workload, name](draw(case))())
    value_error, grad_error = errors(outputs, expected(case, contender.definition_for(case)))
    assert value_error <= VALUE_RTOL
    assert grad_error <= GRAD_RTOL


def test_every_contender_has_builders_and_definitions() -> None:
    for contender in CONTENDERS.values():
        for workload, definition in contender.definitions.items():
            assert (workload, contender.name) in BUILDERS
            assert definition in DEFINITIONS
    named = {name for case in CASES.values() for name in case.contenders}
    assert named <= set(CONTENDERS)
    for case in CASES.values():
        assert case.distinct is None or case.n % case.distinct == case.m % case.distinct == 0


def test_draw_is_seeded_and_eps_is_a_fraction_of_the_mean_cost() -> None:
    problem, again = draw(SMALL), draw(SMALL)
    assert (problem.x == again.x).all()
    costs = torch.cdist(torch.as_tensor(problem.x), torch.as_tensor(problem.y)).square()
    assert problem.eps == pytest.approx(SMALL.eps_of_mean[0] * costs.mean().item(), rel=1e-5)


def test_copies_change_neither_eps_nor_value() -> None:
    copied, once = draw(COPIED), draw(COPIED.without_copies)
    assert copied.eps == pytest.approx(once.eps, rel=1e-12)
    assert (np.unique(copied.x[0], axis=0) == np.unique(once.x[0], axis=0)).all()
    assert (copied.x[0, :40] != once.x[0]).any()
    assert expect(copied, "alternating")[0] == pytest.approx(expect(once, "alternating")[0])


def test_a_peer_that_lacks_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "installed", lambda package: package != "pykeops")
    lacks = {
        name: run.missing(CONTENDERS[name]) for name in ("geomloss-online", "geomloss-tensorized")
    }
    assert lacks == {"geomloss-online": ["pykeops"], "geomloss-tensorized": []}


def test_the_steps_of_the_ladder() -> None:
    todo = ladder.steps(2)
    own = [step for step in todo if step.contender == "cpp"]
    assert [step.threads for step in own] == [1] * (len(own) - 1) + [2]
    assert own[0].capability == "base"
    assert own[-1].capability == own[-2].capability == _C.cpu_capability()
    times = ladder.measure("n512_d64", own[:1], rounds=2)
    assert [len(calls) for calls in times] == [2]
    assert min(times[0]) > 0


def test_schedule_is_that_of_geomloss() -> None:
    divergence = pytest.importorskip("geomloss._legacy.sinkhorn_divergence")
    problem = draw(DIVERGENCE)
    x, y = (torch.as_tensor(points[0]) for points in (problem.x, problem.y))
    theirs = divergence.epsilon_schedule(
        2, divergence.max_diameter(x, y), problem.eps**0.5, scaling=0.5
    )
    # It goes through the first and the last temperature once more, outside the loop.
    ours = schedule(problem.x, problem.y, problem.eps)
    assert ours == pytest.approx([theirs[0], *theirs, theirs[-1]], rel=1e-6)
    assert problem.iterations == len(ours)


def test_divergence_of_a_cloud_with_itself_is_zero() -> None:
    x = torch.randn(1, 20, 3, dtype=torch.float64)
    temperatures = (4.0, 4.0, 1.0, 0.5, 0.5)
    assert divergence_averaged(x, x.clone(), temperatures, 0.5).abs().item() < 1e-12
    assert sinkhorn_averaged(x, x, temperatures, 0.5).item() > 0


@pytest.mark.parametrize("backward", [False, True])
def test_measure_times_what_agrees(backward: bool) -> None:
    problem = draw(replace(SMALL, backward=backward))
    row = measure(CONTENDERS["eager"], problem, expect(problem, "unrolled"), budget=0.2)
    assert len(row["times_s"]) >= 3
    assert row["iterations"] == 6
    assert ("grad_error" in row) == backward


def test_measure_refuses_another_number_of_iterations() -> None:
    other = draw(replace(SMALL, iterations=5))
    row = measure(CONTENDERS["eager"], draw(SMALL), expect(other, "alternating"), budget=0.01)
    assert "times_s" not in row
    assert "disagrees" in row["note"]
    assert row["value_error"] > VALUE_RTOL


def test_slow_calls_are_timed_once() -> None:
    def slow() -> tuple[Any, ...]:
        time.sleep(0.02)
        return ()

    assert len(timings(slow, budget=0.001)) == 1


def test_rounds_are_pooled() -> None:
    first, second = (
        {"times_s": times, "peak_mb": peak, "other_cores": others, "first_call_s": call}
        for times, peak, others, call in (([1.0, 3.0], 1.0, 0.5, 9.0), ([2.0], 4.0, 0.0, 1.0))
    )
    first = run.pool(first, None)
    both = run.pool(second, first)
    assert both["other_cores"] == 0.5
    assert (both["q25_s"], both["median_s"], both["q75_s"]) == (1.5, 2.0, 2.5)
    assert (both["repeats"], both["peak_mb"], both["first_call_s"]) == (3, 4.0, 9.0)
    assert "median_s" not in run.pool({"note": "failed"}, first)


def test_peers_are_left_out_where_a_call_would_take_too_long() -> None:
    small, large = CASES["sweep_n512_d3"], CASES["sweep_n32768_d3"]
    rows = [_row(small.name, name, 0.1) for name in ("cpp", "eager")]
    run.derive(rows, peers=True)
    assert run.too_slow(large, CONTENDERS["eager"], rows, 1000) is None
    assert run.too_slow(large, CONTENDERS["cpp"], rows, 100) is None
    assert run.too_slow(CASES["n2048_d64"], CONTENDERS["eager"], rows, 1e-9) is None
    note = run.too_slow(large, CONTENDERS["eager"], rows, 100)
    assert note == "not run: about 410 s per call"


def _row(case: str, contender: str, seconds: float | None) -> dict[str, Any]:
    row = CASES[case].columns() | {"contender": contender, "version": "1.0", "threads": 2}
    row |= {"value_error": 1e-7, "note": ""}
    if seconds is None:
        return row
    timed = {"median_s": seconds, "q25_s": seconds, "q75_s": seconds}
    row |= {"first_call_s": 2 * seconds, "peak_mb": 1.0, "machine": "abacus"}
    return row | timed | {"other_cores": 1.5 if contender == "pykeops" else 0.0}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A CSV file as a run writes it: two solves, a divergence, and the sweep over N."""
    rows: list[dict[str, Any]] = []
    for seconds in (
        {"n512_d64": {"cpp": 0.001, "eager": 0.0125, "geomloss-tensorized": None}},
        {"n2048_d64": {"cpp": 0.01, "eager": 0.3, "ott-jax": 0.07, "pykeops": 5.0}},
        {"divergence_n1024_d64": {"cpp": 0.05, "geomloss-tensorized": 1.0}},
        {"n20000_d3": {"cpp": 1.0, "pykeops": 20.0}},
        {"sweep_n512_d3": {"cpp": 0.001, "eager": 0.1}},
        {"sweep_n1024_d3": {"cpp": 0.008, "eager": None}},
    ):
        for case, by_contender in seconds.items():
            new = [_row(case, name, median) for name, median in by_contender.items()]
            for row in new:
                row["iterations"] = row["iterations"] or 9
            run.derive(new, peers=True)
            rows += new
    common = {"device": "cpu", "commit": "abc", "date": "2026-01-01"}
    run.write([row | common for row in rows], tmp_path / "sinkhorn_cpu.csv")
    return tmp_path / "sinkhorn_cpu.csv"


def test_csv_has_the_derived_columns(results: Path) -> None:
    with results.open(newline="") as file:
        cpp, eager, geomloss = list(csv.DictReader(file))[:3]
    assert float(cpp["speedup_vs_best_peer"]) == pytest.approx(12.5)
    assert float(cpp["pair_iterations_per_s"]) == pytest.approx(512 * 512 * 20 / 0.001, rel=1e-3)
    assert float(eager["speedup_vs_best_peer"]) == 1
    assert geomloss["median_s"] == geomloss["speedup_vs_best_peer"] == ""


def marked(*names: str) -> str:
    """A page with an old text between the markers of each name."""
    blocks = [f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->" for name in names]
    return "\n".join(["before", *blocks, "after", ""])


@pytest.fixture
def pages(tmp_path: Path) -> tuple[Path, Path]:
    """The README and the page of benchmarks, with old text between their markers."""
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    readme.write_text(marked("claim", "benchmarks"))
    page.write_text(marked(*FAMILIES))
    return readme, page


def test_tables_go_into_both_pages_and_check_sees_a_difference(
    results: Path, pages: tuple[Path, Path]
) -> None:
    readme, page = pages
    arguments = [f"--readme={readme}", f"--page={page}", f"--csv={results}"]
    assert table.main([*arguments, "--check"]) == 1
    assert table.main(arguments) == 0
    assert table.main([*arguments, "--check"]) == 0
    text, short = page.read_text(), readme.read_text()
    for whole in (text, short):
        assert whole.startswith("before\n")
        assert whole.endswith("\nafter\n")
    assert "old" not in short
    assert "| 512 x 512, D 64; 20 | 1.00 ms | 12.5 ms (12x) | disagrees |" in text
    assert "| Sinkhorn divergence, 1024 x 1024, D 64; 9 + backward | 50.0 ms | " in text
    assert "at 20000 x 20000, D 3: fewstep (cpp) 1 MB, KeOps 1 MB." in text
    assert "](results/sinkhorn_cpu.png)" in text
    assert (
        "busy with other work: KeOps (2048 x 2048, D 64; 20), KeOps (20000 x 20000, D 3; 4).\n"
        in text
    )
    assert "| 512 x 512, D 3; 10 |" not in text
    assert "iterations | fewstep (cpp) | geomloss tensorized | KeOps | OTT-JAX (jit) |" in short
    assert "| 2048 x 2048, D 64; 20 | 10.0 ms |  | 5.00 s (500x) | 70.0 ms (7.0x) |" in short
    assert "512 x 512" not in short
    page.write_text(text.replace("1.00 ms", "0.50 ms"))
    assert table.main([*arguments, "--check"]) == 1


def test_the_readme_shows_cases_and_contenders_that_there_are() -> None:
    assert set(table.SHORT_CASES) <= set(CASES)
    assert set(table.SHORT_CONTENDERS) <= set(CONTENDERS)


def test_claim_is_a_sentence_of_the_csv(results: Path) -> None:
    claim = table.claim(table.read(results))
    assert claim.startswith("A CPU (abacus, ")
    assert "two clouds of 2048 points in 64 dimensions in 10.0 ms. " in claim
    assert "that time: OTT-JAX (jit) 7.0x, eager torch 30x and KeOps 500x ([" in claim
    alone = [row for row in table.read(results) if row["contender"] == "cpp"]
    assert table.claim(alone) == ""


def test_table_refuses_a_page_without_markers(results: Path, pages: tuple[Path, Path]) -> None:
    readme, page = pages
    for path, name in ((page, "sinkhorn"), (readme, "claim")):
        path.write_text(path.read_text().replace(f"<!-- {name}:end -->", ""))
        with pytest.raises(ValueError, match=f"README must hold <!-- {name}:begin -->"):
            table.main([f"--readme={readme}", f"--page={page}", f"--csv={results}"])


def test_plot_draws_the_sweep(results: Path) -> None:
    by_contender = plot.curves(table.read(results))[3]
    ((n, seconds),) = by_contender["eager"]
    assert n == 512
    assert seconds == pytest.approx(0.1 / (512 * 512 * 10), rel=1e-3)
    assert [n for n, _ in by_contender["cpp"]] == [512, 1024]
    assert plot.main([str(results)]) == 0
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_plot_names_a_file_without_a_sweep(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for line in results.read_text().splitlines() if not line.startswith("sweep")]
    results.write_text("\n".join(lines))
    with pytest.raises(SystemExit):
        plot.main([str(results)])
    assert f"{results} has no timed row" in capsys.readouterr().err


def test_targets_say_what_is_missed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main([str(results)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("n2048_d64, ott-jax ")
        and "7.0x, target 6x" in line
        and line.endswith("reached")
        for line in lines
    )
    assert any("12.5x, target 30x" in line and line.endswith("MISSED") for line in lines)
    assert any("1 MB, target 200 MB" in line for line in lines)
    assert any("not measured" in line and line.endswith("MISSED") for line in lines)
    assert targets.drift_flops("drift_split_b256_n64_d256") == pytest.approx(4.3e9, rel=0.01)


def test_run_names_too_many_threads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["sinkhorn", "--threads", "100000"])
    assert "got 100000" in capsys.readouterr().err


def test_a_table_for_every_other_family(tmp_path: Path, pages: tuple[Path, Path]) -> None:
    rows = [
        {"contender": "cpp", "median_s": "0.001", "version": "0.1.0", "over_network": "1.82"},
        {"contender": "plain", "median_s": "0.0005", "version": "2.13.0", "note": "differs"},
    ]
    shared = dict.fromkeys(run.COLUMNS["trace"], "") | TRACE_CASES["trace_training_d64"].columns()
    shared |= {"device": "cpu", "threads": 2, "other_cores": 0, "first_call_s": 0.1, "saved_mb": 3}
    path = tmp_path / "trace_cpu.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, run.COLUMNS["trace"])
        writer.writeheader()
        writer.writerows(shared | row for row in rows)
    readme, page = pages
    before = readme.read_text()
    arguments = [f"--readme={readme}", f"--page={page}", f"--csv={path}"]
    assert table.main([*arguments, "--check"]) == 1
    assert table.main(arguments) == 0
    text = page.read_text()
    assert readme.read_text() == before
    assert (
        "| trace training, 1 probe; D 64, width 256, 3 linear, B 256 | 1.00 ms (1.82x the " in text
    )
    assert "Saved for backward, MB:\n\n| case | fewstep (cpp) | network alone |\n" in text
    assert "| trace training, 1 probe; D 64, width 256, 3 linear, B 256 | 3 | 3 |\n" in text
    assert "- What differs:\n  - network alone: differs.\n" in text
    assert "- Command: `python -m benchmarks.run trace --peers`" in text


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch.func.jvp
@pytest.mark.parametrize(
    "case", [c for c in TRACE_CASES.values() if c.quick], ids=lambda case: case.name
)
@pytest.mark.parametrize(
    "name",
    ["cpp", "cpp-bf16", "cpp-solve", "reference", "reverse", "ffjord", "autocast", "torch-func"],
)
def test_traces_agree(name: str, case: TraceCase) -> None:
    contender = CONTENDERS[name]
    if case.workload not in contender.definitions:
        pytest.skip(f"{name} does not run {case.workload}")
    problem = draw_trace(case)
    row = measure(contender, problem, expect(problem, contender.definition_for(case)), budget=0.01)
    assert "times_s" in row, row
    assert ("saved_mb" in row) == (case.workload == "trace-training")
    assert ("over_network" in row) == name.startswith("cpp")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # inside torch.func
@pytest.mark.parametrize(
    "case", [c for c in JVP_CASES.values() if c.quick], ids=lambda case: case.name
)
def test_jvps_agree(case: JvpCase) -> None:
    problem = draw_jvp(case)
    for contender in CONTENDERS.values():
        if case.workload not in contender.definitions or contender.name == "compile":
            continue
        exact = expect(problem, contender.definition_for(case))
        row = measure(contender, problem, exact, budget=0.01)
        if case.workload == "jvp-training" and case.network == "dit" and contender.kind == "torch":
            assert contender.name == "plain" or row["grad_error"] > 0.01  # of LayerNorm
            continue
        assert "times_s" in row, (contender.name, row)
        assert ("saved_mb" in row) == (case.workload != "jvp")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch.func.jvp
@pytest.mark.parametrize("name", ["cpp", "reference", "eager", "torch-func", "plain"])
def test_attentions_agree(name: str) -> None:
    contender, case = CONTENDERS[name], ATTENTION_CASES["attention_small"]
    problem = draw_attention(case)
    run: Any = BUILDERS["attention", name](problem)
    exact = expect(problem, contender.definition_for(case))
    assert max(errors(numpy_outputs(run()), exact)) <= case.value_rtol
    assert name == "plain" or run.more()["over_network"] > 0


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # inside diffusers
@pytest.mark.parametrize(
    "name", ["cpp", "reference", "eager", "k-diffusion", "diffusers", "torchdiffeq"]
)
def test_samplers_agree(name: str) -> None:
    contender, case = CONTENDERS[name], HEUN_CASES["edm_small"]
    if not run.installed(contender.package):
        pytest.skip(f"{contender.package} is not installed")
    for state in (case.state, (2, 3, 8, 8)):
        problem = draw_heun(replace(case, state=state))
        sampler: Any = BUILDERS["edm", name](problem)
        outputs = numpy_outputs(sampler())
        exact = expect(problem, contender.definition_for(case))
        assert errors(outputs, exact)[0] <= case.value_rtol
    assert sampler.more()["over_network"] > 0


def test_a_case_of_ones_own_size(capsys: pytest.CaptureFixture[str]) -> None:
    args = run.parse(["sinkhorn", "--n", "30", "--d", "5", "--eps", "0.1"])
    (name,) = args.case
    case = ALL_CASES[name]
    assert isinstance(case, Case)
    assert (case.n, case.m, case.d, case.eps_of_mean) == (30, 30, 5, (0.1,))
    assert args.out.name.endswith("_subset.csv")
    for options in (["--m", "3"], ["--n", "0"], ["--n", "3", "--eps", "-1"]):
        with pytest.raises(SystemExit):
            run.parse(["sinkhorn", *options])
    with pytest.raises(KeyError):
        ALL_CASES["own_n3"]
    capsys.readouterr()
    run.main(["jvp", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != "-"] == list(FAMILIES["jvp"])
