"""`--network`: every method trains networks by name, samples them, and resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.cli import main
from fewstep.methods.reflow import log_prob_of
from fewstep.networks import ImageBody, ImageConvNet, ImageTransformer
from fewstep.training import commands, lines, meanflow, plots, reflow, wflow
from fewstep.training.registry import TRAINERS
from fewstep.training.runs import Run

FEW = {
    "wflow": "--steps 2 --batch 4 --scale-high 2 --uncond 4",
    "drifting": "--steps 2 --batch 4",
    "reflow": "--teacher-steps 2 --student-steps 2 --batch 4 --teacher-batch 4 --windows 1",
    "lines": "--teacher-steps 2 --student-steps 2 --batch 4 --pairs 16",
    "meanflow": "--steps 2 --batch 4",
}
BODIES: dict[str, type[ImageBody]] = {"conv/4": ImageConvNet, "T/4": ImageTransformer}
METHODS = [method for method, trainer in TRAINERS.items() if hasattr(trainer.config, "network")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (wflow, reflow, lines, meanflow):
        monkeypatch.setattr(module, "report", lambda *_, **__: [])
    monkeypatch.setattr(reflow, "_FEW", 2)
    monkeypatch.setattr(reflow, "log_prob_of", lambda net, steps: log_prob_of(net, steps=1))
    monkeypatch.setattr(plots, "save_comparison", lambda path, *_, **__: path.touch())


@pytest.fixture
def data(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.uniform(-1, 1, (24, 4, 4)))
    np.save(tmp_path / "a_labels.npy", np.arange(24) % 2)
    return str(tmp_path / "a.npy")


def train(method: str, data: str, out: Path, *options: str) -> int:
    where = ["--data", data, "--out", str(out), "--device", "cpu"]
    return main(["train", method, *where, *FEW[method].split(), *options])


TRAINED = [(method, "conv/4") for method in FEW] + [("wflow", "T/4"), ("meanflow", "T/4")]


@pytest.mark.parametrize(("method", "name"), TRAINED)
def test_a_run(method: str, name: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(method, data, out, "--network", name) == 0
    trained = fewstep.load(out)
    assert trained.run.config.network == name
    assert any(isinstance(module, BODIES[name]) for module in trained.network.modules())
    images = trained.sample(5)
    assert images.shape == (5, 1, 4, 4)
    torch.testing.assert_close(trained.sample(2), images[:2])
    assert main(["train", method, "--out", str(out), "--resume"]) == 0
    if method == "wflow":
        assert not torch.equal(trained.sample(5, scale=2.0), images)


def test_methods_that_have_it() -> None:
    assert set(FEW) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_runs_of_earlier_versions_are_of_perceptrons(method: str) -> None:
    config: Any = TRAINERS[method].preset("digits")
    assert config.network == "mlp"


@pytest.mark.parametrize(
    ("options", "lr"),
    [("--network T/2", 4e-4), ("--network conv", None), ("--network T/2 --lr 1e-3", 1e-3)],
)
def test_transformers_have_a_learning_rate(options: str, lr: float | None) -> None:
    arguments = ["train", "wflow", "--data", "digits", "--out", "run", *options.split()]
    command = commands.parse(arguments)
    assert isinstance(command, commands.Train)
    config = command.method.config()
    assert config.lr == (wflow.preset("digits").lr if lr is None else lr)
    assert config.network == options.split()[1]


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_fit(
    method: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    cases = {
        "--network unet": "network must be one of ('mlp', 'conv', 'T', 'S', 'B', 'L', 'XL')",
        "--network B/3": "network: patches of 'B/3' must divide the images, got 3 for 4 x 4",
        "--network conv --width 8": "width is for network mlp, got 8 for conv",
        "--network conv --depth 1": "depth is for network mlp, got 1 for conv",
    }
    for options, message in cases.items():
        assert train(method, data, out, *options.split()) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (out / "checkpoint.safetensors").exists()


def test_a_teacher_of_another_network(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    assert train("lines", data, teacher, "--network", "conv/4") == 0
    capsys.readouterr()
    own = ("--teacher", str(teacher), "--overwrite")
    assert train("lines", data, tmp_path / "student", *own) == 2
    assert "has network conv/4, not mlp" in capsys.readouterr().err.splitlines()[-1]
    assert train("lines", data, tmp_path / "student", *own, "--network", "conv/4") == 0


def test_noise_of_a_generator() -> None:
    config = replace(wflow.preset("digits"), network="conv/4", noise_dim=3)
    run = Run(config, (1, 8, 8), ("a", "b"), 0.25)
    network = wflow.TRAINER.networks(run)[""].module()
    _, noise, _ = wflow._draw(config, [torch.zeros(9, 1, 8, 8)] * 2, 0)
    assert noise.shape == (2, 2, 64, network.noise_dim)
    assert wflow.sample(network, run, 3).shape == (3, 1, 8, 8)
