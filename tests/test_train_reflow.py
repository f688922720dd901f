"""`fewstep train reflow`: runs end to end, repeats itself, resumes, refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep import cli
from fewstep.methods import MarginalReflow
from fewstep.training import checkpoint, reflow, runs
from fewstep.training.runs import Run, TrainResult

Result = TrainResult[reflow.StudentsReport]
CONFIG = replace(
    reflow.preset("digits"),
    teacher_steps=3,
    student_steps=2,
    teacher_batch=16,
    batch=8,
    width=8,
    depth=2,
    checkpoint_every=2,
    flow=MarginalReflow(lam=0.1, windows=2, solver_steps=1, t_min=0.1),
)


def make_small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reflow, "_EVALUATED", 16)
    patch.setattr(reflow, "report", lambda *_, **__: [])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Result, Path]:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return reflow.train(CONFIG, out, progress=False), out


def weights(out: Path) -> dict[str, Tensor]:
    return checkpoint.load(out / "checkpoint.safetensors")[0]


def test_a_run_repeats_and_resumes_bit_for_bit(
    whole: tuple[Result, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result, out = whole
    assert result.report.picture.stat().st_size > 1000
    assert re.search(
        r"KL to teacher, window 2 +\S+ \(se \S+\) +\S+ \(se \S+\)", result.report.table
    )
    own = reflow._losses
    calls = 0

    def failing(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:  # a step into the second student
            raise RuntimeError("power cut")
        return own(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reflow, "_losses", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        reflow.train(CONFIG, tmp_path / "b", progress=False)
    monkeypatch.setattr(reflow, "_losses", own)
    reflow.train(CONFIG, tmp_path / "b", resume=True, progress=False)
    a, b = weights(out), weights(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(
        not torch.equal(a[f"student.{k[6:]}"], a[k]) for k in a if k.startswith("plain.model")
    )


def test_teacher_from_a_run_and_from_a_function(whole: tuple[Result, Path], tmp_path: Path) -> None:
    config = replace(CONFIG, teacher=str(whole[1]))
    reflow.train(config, tmp_path / "b", progress=False)
    a, b = weights(whole[1]), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith(("teacher.ema", "student.ema")))
    result = reflow.train(
        CONFIG, tmp_path / "c", teacher=lambda x, t: x * t[:, None, None, None], progress=False
    )
    assert set(result.report.students) == {"student", "plain"}
    with pytest.raises(ValueError, match="has width 8, not 9"):
        reflow.train(replace(config, width=9), tmp_path / "d", progress=False)


def test_a_run_of_an_earlier_version(whole: tuple[Result, Path], tmp_path: Path) -> None:
    out = shutil.copytree(whole[1], tmp_path / "run")
    content = json.loads((out / "config.json").read_text())
    assert content.pop("classes") == []
    assert content.pop("sigma_data") > 0
    (out / "config.json").write_text(json.dumps(content))
    reflow.train(CONFIG, out, resume=True, progress=False)
    assert weights(out).keys() == weights(whole[1]).keys()


def test_dtypes_in_a_configuration(tmp_path: Path) -> None:
    config = replace(CONFIG, flow=replace(CONFIG.flow, tangent_dtype=torch.bfloat16))
    runs._begin(tmp_path, "reflow", Run(config, (1, 8, 8)), overwrite=False)
    assert reflow.read_run(tmp_path).config == config


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = "--data digits --teacher-steps 2 --student-steps 1 --batch 4 --teacher-batch 4"
    options += " --width 8 --windows 2 --solver-steps 1 --t-min 0.1"
    assert cli.main(["train", "reflow", *options.split(), "--out", str(out)]) == 0
    assert "with alignment" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["method"] == "reflow"
    grid = tmp_path / "grid.png"
    assert cli.main(["sample", str(out), "--n", "4", "--out", str(grid)]) == 0
    assert grid.exists()
    assert cli.main(["train", "reflow", *options.split(), "--out", str(out)]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_steps": 0}, "student_steps must be an integer"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"ema": 1.0}, "ema must be in"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_bad_numbers(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)  # type: ignore[arg-type]


def test_other_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run of fewstep"):
        reflow.read_run(tmp_path)
    (tmp_path / "config.json").write_text('{"method": "wflow"}')
    with pytest.raises(ValueError, match="not the configuration of a run of reflow"):
        reflow.TRAINER.load(tmp_path)
