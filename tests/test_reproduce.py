from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import fewstep.reproduce.run
from fewstep.cli import main
from fewstep.reproduce import EXPERIMENTS, find
from fewstep.reproduce.experiment import (
    AGREES,
    DIRECTION,
    NOT_HERE,
    Check,
    Estimate,
    Experiment,
    Outcome,
    Table,
    below,
    verdict,
)
from fewstep.reproduce.run import reproduce
from fewstep.reproduce.straight import exact_row


@dataclass(frozen=True)
class Settings:
    n: int = 4


def draw(figure: Figure, table: Table, arrays: Mapping[str, Tensor]) -> None:
    figure.subplots().plot(arrays["x"].numpy())


def small(name: str, run: Callable[[Settings, int], Outcome]) -> Experiment[Settings]:
    return Experiment(
        name=name,
        claim="a < b | c",
        source="a source",
        setting="A setting.",
        full=Settings(),
        fast=Settings(2),
        run=run,
        check=lambda table: [below(table, "a", "b", "x", "a is smaller")],
        draw=draw,
        columns={"x": "a number"},
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Two experiments that note their calls stand for all of them."""
    noted: list[tuple[str, int]] = []

    def named(name: str) -> Experiment[Settings]:
        def run(settings: Settings, seed: int) -> Outcome:
            noted.append((name, seed))
            x = torch.randn(settings.n)
            b = 10 + float(x[0])
            return Outcome({"a": {"x": float(x[0])}, "b": {"x": b, "y": 1.0}}, {"x": x})

        return small(name, run)

    own = {name: named(name) for name in ("first", "second")}
    monkeypatch.setattr(fewstep.reproduce.run, "EXPERIMENTS", own)
    monkeypatch.setattr(fewstep.reproduce.run, "find", own.__getitem__)
    return noted


def test_interval_is_that_of_student() -> None:
    table = Table([Outcome({"a": {"x": v}, "b": {"x": 2 * v}}) for v in (1.0, 2.0, 4.0)])
    value = table["a", "x"]
    std = math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2)
    assert value.mean == pytest.approx(7 / 3)
    assert value.half == pytest.approx(4.302653 * std / math.sqrt(3), rel=1e-6)
    assert table.difference("b", "a", "x").mean == pytest.approx(7 / 3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Estimate(1.23456, 0.0123), "1.235 ± 0.012"),
        (Estimate(0.0012345, 0.0001), "0.00123 ± 0.00010"),
        (Estimate(123.4, 20.0), "123 ± 20"),
        (Estimate(0.5, 0.0), "0.5"),
        (Estimate(2.0, math.inf), "2"),
        (Estimate(3.2e-6, 1e-6), "3.20e-06 ± 1.0e-06"),
    ],
)
def test_numbers_have_the_digits_of_their_interval(value: Estimate, text: str) -> None:
    assert str(value) == text


@pytest.mark.parametrize(
    ("holds", "expected"),
    [((True, True), AGREES), ((True, False), DIRECTION), ((False, True), NOT_HERE)],
)
def test_verdict(holds: tuple[bool, bool], expected: str) -> None:
    checks = [Check("weak", holds[0], ""), Check("strong", holds[1], "", strict=True)]
    assert verdict(checks) == expected


def test_comparisons_are_paired_and_need_their_interval() -> None:
    far = [(0.0, 0.1), (10.0, 10.11), (20.0, 20.1)]
    table = Table([Outcome({"a": {"x": a}, "b": {"x": b}}) for a, b in far])
    assert below(table, "a", "b", "x", "").holds  # although seeds differ by more
    assert not below(table, "b", "a", "x", "").holds
    near = [(0.0, 0.1), (1.0, 0.9), (0.0, 0.1)]
    table = Table([Outcome({"a": {"x": a}, "b": {"x": b}}) for a, b in near])
    assert not below(table, "a", "b", "x", "").holds


def test_files_of_an_experiment(tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    (result,) = reproduce("first", out=tmp_path)
    folder = tmp_path / "first"
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("figure.png", "seeds", "settings.json", "table.csv", "table.md", "verdict.json")
    }
    assert json.loads((folder / "settings.json").read_text())["settings"] == {"n": 4}
    assert json.loads((folder / "verdict.json").read_text())["verdict"] == result.verdict == AGREES
    lines = (folder / "table.csv").read_text().splitlines()
    assert lines[0].startswith("row,column,mean,")
    assert [line.split(",")[:2] for line in lines[1:]] == [["a", "x"], ["b", "x"], ["b", "y"]]
    torch.manual_seed(1)
    assert float(lines[1].split(",")[5]) == float(torch.randn(4)[0])  # of the seed alone
    assert "| a is smaller | x: difference" in (folder / "table.md").read_text()
    with Image.open(folder / "figure.png") as picture:
        assert picture.size == (900, 300)


def test_all_goes_on_where_it_was_stopped(tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    reproduce("first", out=tmp_path)
    (tmp_path / "first/seeds/2.safetensors").write_bytes(b"cut off")
    calls.clear()
    results = reproduce("all", out=tmp_path)
    assert calls == [("first", 2), ("second", 0), ("second", 1), ("second", 2)]
    page = (tmp_path / "reproduction.md").read_text()
    assert [one for one in ("first", "second") if f"\n## {one}\n" in page] == ["first", "second"]
    assert "| [first](#first) | a &lt; b \\| c | **agrees** |" in page
    assert (tmp_path / "reproduction/second.png").exists()
    calls.clear()
    again = reproduce("all", out=tmp_path)
    assert calls == []
    assert [r.table.outcomes[2].rows for r in again] == [r.table.outcomes[2].rows for r in results]
    reproduce("first", out=tmp_path, fast=True)  # other settings
    assert calls == [("first", 0), ("first", 1), ("first", 2)]


def test_unknown_names_and_few_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "two-vs-one-batch"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "got 'two-vs-one-batch'" in line
    assert all(name in line for name in EXPERIMENTS)
    assert main(["reproduce", "one-vs-two-batch", "--seeds", "2"]) == 2
    assert "seeds must be an integer of at least 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_say_what_they_claim(name: str) -> None:
    one = find(name)
    assert one.name == name
    assert one.source.startswith("arXiv")
    assert one.claim.endswith(".")
    assert one.setting.endswith(".")
    assert one.fast != one.full


def of_seed(name: str, seed: int = 0) -> Table:
    """The small settings, of one seed; with a picture, whose code is run too."""
    experiment = find(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        table = Table([experiment.run(experiment.fast, seed)])
    figure = Figure(experiment.size)
    experiment.draw(figure, table, table.outcomes[0].arrays)
    assert figure.axes
    assert len(experiment.check(table)) > 1
    return table


@pytest.mark.slow
def test_one_batch_shrinks_and_two_do_not() -> None:
    table = of_seed("one-vs-two-batch")
    for column in ("std 1", "std 2"):
        one, two = (
            table[f"N 16, eps 0.1, {arm}", column].mean for arm in ("one batch", "two batches")
        )
        assert one < 0.93
        assert abs(two - 1) < 0.07


@pytest.mark.slow
def test_guidance_extrapolates_means_and_narrows() -> None:
    table = of_seed("guidance")
    for guide in ("velocity", "distribution"):
        assert table[f"{guide}, w 0.2", "mean off"].mean < 0.2
        assert table[f"{guide}, w 1", "std 1"].mean < 0.12  # beyond the weight of collapse
    for column, most in (("std 1", 0.26), ("std 2", 0.28)):
        own = table["velocity, w 0.2", column].mean
        assert 0.15 < own < most  # 0.186 and 0.206, and 0.3 without guidance
        assert table["distribution, w 0.2", column].mean < own


@pytest.mark.slow
def test_students_of_one_loss_have_their_closed_forms() -> None:
    table = of_seed("underdetermination")
    assert table["rotation", "loss"].mean == pytest.approx(table["dilation", "loss"].mean)
    for name in ("dilation", "rotation"):
        for kind in ("ode", "step"):
            exact = table[name, f"exact {kind}"].mean
            assert table[name, f"KL {kind}"].mean == pytest.approx(exact, abs=0.015)
    assert table["dilation", "slope"].mean == pytest.approx(0.98, abs=0.05)
    assert abs(table["rotation", "slope"].mean) < 1e-6


@pytest.mark.slow
def test_trackers_learn_their_closed_forms() -> None:
    table = of_seed("tracker-bias")
    for row in table.rows:
        predicted = table[row, "predicted"].mean
        assert table[row, "factor"].mean == pytest.approx(predicted, rel=0.02)


@pytest.mark.slow
def test_flows_reach_modes() -> None:
    table = of_seed("mode-coverage")
    assert table["data", "far"].mean == pytest.approx(0.05, abs=0.015)
    for row in table.rows:
        if row.startswith("W-Flow"):  # from one cloud at 0, in a tenth of the steps
            assert table[row, "near a mode"].mean > 0.08
            assert table[row, "far"].mean > 0
            assert table[row, "W2^2"].mean < 2.0


@pytest.mark.slow
def test_the_divergence_falls() -> None:
    table = of_seed("eight-gaussians")
    for row in ("W-Flow", "W-Flow, one batch"):
        assert table[row, "rises"].mean <= 1
        assert table[row, "S"].mean < 0.5  # of 1.9 at the start
        assert table[row, "least mode"].mean > 0.003


@pytest.mark.slow
def test_sinkhorn_is_closer_than_other_energies() -> None:
    table = of_seed("energies")
    for law in ("ring", "six and two"):
        own = table[f"{law}: Sinkhorn", "sliced W2^2"].mean
        assert own < table[f"{law}: KL, h 0.1", "sliced W2^2"].mean
        assert own < 0.3


@pytest.mark.slow
def test_maps_reach_the_circle() -> None:
    table = of_seed("oval-to-circle")
    for row in table.rows[1:]:
        assert table[row, "W2^2"].mean < (0.15 if row.startswith("W-Flow") else 2.0)
        assert table[row, "ratio"].mean > 1 - 1e-4  # no map costs less
    assert table["W-Flow, residual", "ratio"].mean < 1.6
    assert table["W-Flow, plain", "ratio"].mean > 1.6  # from a random start


@pytest.mark.slow
def test_alignment_lowers_the_divergence_of_one_window() -> None:
    table = of_seed("perflow-ring")
    for row in table.rows:
        assert table[row, "TV"].mean <= table[row, "TV bound"].mean
    own, base = (table[row, "KL"].mean for row in ("1 window, aligned, lam 1", "1 window"))
    assert own < base
    assert table["PeRFlow", "KL 1"].mean < 0.5


def test_paths_of_independent_pairs_are_as_curved_as_they_must_be() -> None:
    torch.manual_seed(0)
    row = exact_row(paths=2000, nodes=61)
    assert row["S1"] == pytest.approx(6.64, abs=0.1)
    assert row["to mode"] == pytest.approx(0.1414, abs=0.01)
    assert row["1 step"] == pytest.approx(math.sqrt(2), abs=0.01)  # the mean of the data


def test_optimal_pairs_keep_their_bound() -> None:
    experiment = find("batch-ot-bound")
    torch.manual_seed(0)
    table = Table([experiment.run(experiment.fast, 0)])
    for row in table.rows:
        assert 0 < table[row, "product"].mean < table[row, "bound"].mean
    assert table["D 128, N 64", "product"].mean == pytest.approx(0.19, abs=0.01)


@pytest.mark.slow
def test_flows_of_one_frame_are_trained_and_measured() -> None:
    table = of_seed("straightness")
    assert table["exact flow", "S1"].mean == pytest.approx(6.64, abs=0.2)
    # A denoiser that starts at its skip has the curve of the 126 normal coordinates.
    assert table["EDM", "S1"].mean == pytest.approx(6.62, abs=0.2)
    for row in ("2-RF, exact pairs", "LMM"):
        assert table[row, "S1"].mean < 0.5
        assert table[row, "1 step"].mean < table["exact flow", "1 step"].mean - 0.2


@pytest.mark.slow
def test_shapes_are_learned() -> None:
    table = of_seed("swiss-roll-checkerboard")
    for law in ("swiss roll", "checkerboard"):
        assert table[f"{law}: data", "MMD^2"].mean < 1e-3
        for row in (f"{law}: W-Flow", f"{law}: Drifting, three tau"):
            assert table[row, "sliced W2^2"].mean < 0.02  # of 0.2 at the start, a cloud at 0
