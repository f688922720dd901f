"""`fewstep train lines`: runs end to end, repeats itself, resumes, refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import cli
from fewstep.data import pairs
from fewstep.methods import LinesMatching
from fewstep.training import checkpoint, loop, plots
from fewstep.training import lines as training_lines
from fewstep.training.lines import (
    TRAINER,
    LinesConfig,
    LinesReport,
    preset,
    read_run,
    sample_of,
    sampling_sigmas,
)
from fewstep.training.runs import TrainResult

CONFIG = replace(
    preset("digits"),
    teacher_steps=3,
    student_steps=4,
    pairs=24,
    batch=8,
    width=8,
    depth=1,
    checkpoint_every=2,
    log_every=1,
    lines=LinesMatching(law="sot", levels=4, indices=(0, 1), start=2),
    adversarial=True,
    device="cpu",
)


@pytest.fixture
def measured() -> bool:
    return False


def measure_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(training_lines, "report", lambda *_, **__: [])
    patch.setattr(plots, "save_comparison", lambda path, *_, **__: path.touch())


@pytest.fixture(autouse=True)
def _quick(measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of metrics and plotting are spent only by tests that are `measured`."""
    monkeypatch.setattr(training_lines, "_NODES", 4)
    if not measured:
        measure_nothing(monkeypatch)


def configured(folder: Path) -> LinesConfig:
    """Two classes of 4x4 images, light on the left or on the right."""
    images = np.random.default_rng(0).uniform(-1, -0.6, (60, 4, 4))
    images[:40, :, :2] += 1.2
    images[40:, :, 2:] += 1.2
    np.save(folder / "a.npy", images)
    np.save(folder / "a_labels.npy", np.repeat([3, 5], (40, 20)))
    return replace(CONFIG, data=str(folder / "a.npy"), conditional=True)


@pytest.fixture
def config(tmp_path: Path) -> LinesConfig:
    return configured(tmp_path)


@pytest.fixture
def data(config: LinesConfig) -> str:
    return config.data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[LinesConfig, Path]:
    """A run that was never stopped. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("whole")
    config = configured(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_lines, "_NODES", 4)
        measure_nothing(patch)
        run(config, folder / "run")
    return config, folder / "run"


def run(config: LinesConfig, out: Path, **options: bool) -> TrainResult[LinesReport]:
    return training_lines.train(config, out, progress=False, **options)


def weights(out: Path) -> dict[str, Tensor]:
    return checkpoint.load(out / "checkpoint.safetensors")[0]


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for path in (a / "pairs").iterdir():
        assert path.read_bytes() == (b / "pairs" / path.name).read_bytes()


@pytest.mark.parametrize("measured", [True])
def test_a_run_leaves_everything(config: LinesConfig, tmp_path: Path) -> None:
    result = run(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"checkpoint.safetensors", "grids", "logs", "pairs", "samples.png"}
    assert result.report.picture.stat().st_size > 1000
    assert list(result.report.samplers) == ["teacher, 7", "1", "2 fresh", "2 line", "2 reuse"]
    assert result.report.samplers["teacher, 7"].error == 0 < result.report.samplers["1"].error
    for name in ("FD-local", "3-NN agreement", "rms from teacher", "S1/sqrt(D)"):
        assert name in result.report.table
    data = pairs.PairDataset(tmp_path / "run" / "pairs")
    assert (len(data), data.classes, data.shape) == (24, 2, (1, 4, 4))
    teacher = training_lines._as_teacher(*TRAINER.load(tmp_path / "run", "teacher"))
    assert teacher.digest == data.manifest["teacher"]["digest"]
    student, its_run = TRAINER.load(tmp_path / "run")
    assert its_run.config == config
    seeds = torch.arange(6)
    expected = sample_of(result.network, its_run, seeds)
    assert torch.equal(sample_of(student, its_run, seeds), expected)
    few = sample_of(student, its_run, seeds[2:4])
    torch.testing.assert_close(few, expected[2:4])
    assert not torch.equal(sample_of(student, its_run, seeds, steps=2), expected)


# The teacher has steps 0 to 2, the student 3 to 6; its discriminator joins at 5.
@pytest.mark.parametrize("step", [1, 3, 6])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_bit_for_bit(
    whole: tuple[LinesConfig, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    step: int,
) -> None:
    config, own, calls = whole[0], loop.TrainedNetwork.step, 0

    def interrupted(self: loop.TrainedNetwork, *arguments: object, **options: object) -> Any:
        nonlocal calls
        found = own(self, *arguments, **options)  # type: ignore[arg-type]
        if self.average is not None:
            if calls == step:
                os.kill(os.getpid(), number)
            calls += 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainedNetwork, "step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"step {step + 1} of 7"):
            run(config, tmp_path / "stopped")
    run(config, tmp_path / "stopped", resume=True)
    assert_same(tmp_path / "stopped", whole[1])


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(config: LinesConfig, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    config = replace(config, teacher_steps=4, student_steps=400)
    options = f"--data {config.data} --out {out} --teacher-steps 4 --student-steps 400 --pairs 24"
    options += " --batch 8 --width 8 --depth 1 --checkpoint-every 2 --log-every 1 --law sot"
    options += " --levels 4 --indices 0 1 --start 2 --adversarial --device cpu --lr 0.002"
    code = "from fewstep.cli import main; raise SystemExit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "lines", *options.split()],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (out / "pairs" / "manifest.json").exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 4 <= checkpoint.load(out / "checkpoint.safetensors")[1] < 404
    run(config, out, resume=True)
    run(config, tmp_path / "whole")
    assert_same(out, tmp_path / "whole")


def test_pairs_that_were_cut_short(
    whole: tuple[LinesConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = whole[0]

    def failing(*_: object, **__: object) -> object:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("fewstep.data.generate.edm_sample", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, tmp_path / "cut")
    assert checkpoint.load(tmp_path / "cut" / "checkpoint.safetensors")[1] == 3
    run(config, tmp_path / "cut", resume=True)
    assert_same(tmp_path / "cut", whole[1])


def test_teacher_of_another_run(whole: tuple[LinesConfig, Path], tmp_path: Path) -> None:
    config, out = whole
    other = replace(config, teacher=str(out), student_steps=2)
    run(other, tmp_path / "b")
    a, b = weights(out), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("teacher.ema"))
    manifests = ((folder / "pairs/manifest.json").read_text() for folder in (out, tmp_path / "b"))
    assert len(set(manifests)) == 1
    with pytest.raises(ValueError, match="has width 8, not 9"):
        run(replace(other, width=9), tmp_path / "c")
    with pytest.raises(ValueError, match=r"has classes \('3', '5'\), not \(\)"):
        run(replace(other, conditional=False), tmp_path / "d")


@pytest.mark.parametrize("parameterisation", ["edm", "unified"])
def test_where_students_start(config: LinesConfig, tmp_path: Path, parameterisation: str) -> None:
    config = replace(config, parameterisation=parameterisation, student_steps=1, lr=1e-6)
    run(config, tmp_path / "run")
    state = weights(tmp_path / "run")
    teacher, student = (
        state[f"{name}.ema.module.network.level.0.weight"] for name in ("teacher", "student")
    )
    same = torch.allclose(student, teacher, rtol=0, atol=1e-6)
    assert same == (parameterisation == "edm")


@pytest.mark.slow
def test_students_learn_their_classes(config: LinesConfig, tmp_path: Path) -> None:
    config = replace(
        config,
        teacher_steps=300,
        student_steps=300,
        pairs=2048,
        batch=64,
        width=32,
        lr=5e-3,
        ema=0.9,
        adversarial=False,
        lines=LinesMatching(law="levels", levels=8),
        log_every=100,
        checkpoint_every=1000,
    )
    result = run(config, tmp_path / "run")
    its_run = read_run(tmp_path / "run")
    images = sample_of(result.network, its_run, torch.arange(100))
    left, right = images[..., :2].mean((1, 2, 3)), images[..., 2:].mean((1, 2, 3))
    assert ((left > right) == (torch.arange(100) % 2 == 0)).all()
    assert result.report.samplers["1"].error < 0.05
    assert result.report.samplers["2 reuse"].error < 0.05
    assert result.report.straightness["student"].s1 < 0.8 * result.report.straightness["teacher"].s1


def test_a_loss_that_is_not_finite(
    config: LinesConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = training_lines._student_step

    def poisoned(*arguments: object) -> dict[str, Tensor]:
        scalars = own(*arguments)  # type: ignore[arg-type]
        return {**scalars, "lines": scalars["lines"] * torch.nan}

    monkeypatch.setattr(training_lines, "_student_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 3: .*nan"):
        run(config, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")[1] == 3


def test_folder_in_use(whole: tuple[LinesConfig, Path], tmp_path: Path) -> None:
    config, out = whole[0], shutil.copytree(whole[1], tmp_path / "run")
    before = (out / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--resume or --overwrite"):
        run(config, out)
    with pytest.raises(ValueError, match=r"another configuration: pairs is 24, not 25"):
        run(replace(config, pairs=25), out, resume=True)
    assert (out / "checkpoint.safetensors").read_bytes() == before
    run(replace(config, pairs=25), out, overwrite=True)
    assert len(pairs.PairDataset(out / "pairs")) == 25
    path = out / "pairs" / "pairs-00000-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    checkpoint.save(out / "checkpoint.safetensors", weights(out), step=4)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        run(replace(config, pairs=25), out, resume=True)


def test_command(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = f"--data {data} --teacher-steps 2 --student-steps 1 --pairs 16 --batch 4"
    options += " --width 8 --depth 1 --levels 4 --law sot --indices 0 1 --device cpu"
    command = ["train", "lines", *options.split(), "--out", str(out)]
    assert cli.main(command) == 0
    assert "rms from teacher" in capsys.readouterr().out
    content = json.loads((out / "config.json").read_text())
    assert (content["method"], content["config"]["lines"]["indices"]) == ("lines", [0, 1])
    assert cli.main(["train", "lines", "--resume", "--out", str(out)]) == 0
    for steps in ("1", "2"):
        grid = tmp_path / f"{steps}.png"
        sample = ["sample", str(out), "--n", "4", "--out", str(grid), "--steps", steps]
        assert cli.main([*sample, "--sampler", "line"]) == 0
        assert grid.exists()
    capsys.readouterr()
    assert cli.main(["sample", str(out), "--out", str(grid), "--steps", "3"]) == 2
    assert "steps must be from 1 to 2, got 3" in capsys.readouterr().err
    assert cli.main(command) == 2
    assert "holds a run already" in capsys.readouterr().err
    for teacher in (out, out / "checkpoint.safetensors"):
        made = ["pairs", "--teacher", str(teacher), "--n", "5", "--out", str(tmp_path / "pairs")]
        assert cli.main([*made, "--device", "cpu"]) == 0
    assert len(pairs.PairDataset(tmp_path / "pairs")) == 5


def test_samplers_levels() -> None:
    lines = LinesMatching()
    schedule = lines.schedule(torch.zeros(()))
    assert sampling_sigmas(lines, 3).float().equal(schedule[[0, 3, 5]])
    sot = replace(lines, law="sot", indices=(0, 4))
    assert sampling_sigmas(sot, 2).float().equal(schedule[[0, 4]])
    for steps in (0, 3):
        with pytest.raises(ValueError, match=f"steps must be from 1 to 2, got {steps}"):
            sampling_sigmas(sot, steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_steps": 0}, "student_steps must be an integer of at least 1, got 0"),
        ({"pairs": 2.5}, "pairs must be an integer"),
        ({"pairs": 2**31}, "pairs must be below"),
        ({"seed": 2**31}, "seed must be below"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"ema": 1.0}, "ema must be in"),
        ({"parameterisation": "free"}, "parameterisation must be one of .* got 'free'"),
    ],
)
def test_bad_numbers(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)  # type: ignore[arg-type]


def test_other_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run of fewstep"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text('{"method": "wflow"}')
    for name in ("student", "teacher"):
        with pytest.raises(ValueError, match="not the configuration of a run of lines"):
            TRAINER.load(tmp_path, name)
