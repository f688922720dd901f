from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.cli import main
from fewstep.methods import WFlow, problems
from fewstep.training import checkpoint, plots, wflow
from fewstep.training.loop import CHECKPOINT


@pytest.fixture(autouse=True)
def _measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wflow, "report", lambda real, generated, **_: [])
    monkeypatch.setattr(plots, "save_comparison", lambda path, *_, **__: path.touch())


@pytest.fixture
def config(tmp_path: Path) -> wflow.WFlowConfig:
    """Three classes of 4x4 images, of different brightness."""
    rng = np.random.default_rng(0)
    levels = np.repeat([-0.5, 0.0, 0.5], 30)
    np.save(tmp_path / "a.npy", levels[:, None, None] + rng.uniform(-0.2, 0.2, (90, 4, 4)))
    np.save(tmp_path / "a_labels.npy", np.repeat([0, 1, 2], 30))
    options: dict[str, Any] = {"log_every": 1, "checkpoint_every": 7, "device": "cpu"}
    options |= {"queue": 12, "push": 5, "scale_high": 3.0, "scale_none": 0.2, "uncond": 6}
    return wflow.WFlowConfig(str(tmp_path / "a.npy"), steps=14, batch=8, width=16, **options)


def assert_same(a: Path, b: Path) -> None:
    first, second = (checkpoint.load(out / CHECKPOINT) for out in (a, b))
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    for name, tensor in first[0].items():
        assert torch.equal(tensor, second[0][name]), name


@pytest.mark.parametrize("guide", ["velocity", "distribution"])
def test_queues_and_guidance_resume_to_the_same_numbers(
    config: wflow.WFlowConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guide: str
) -> None:
    config = replace(config, flow=WFlow(eps=0.02, guide=guide))
    wflow.train(config, tmp_path / "whole", progress=False)
    names = checkpoint.load(tmp_path / "whole" / CHECKPOINT)[0]
    assert {f"queues.{i}.{name}" for i in (0, 1) for name in ("samples", "pushed")} < set(names)
    assert names["queues.0.pushed"].sum() == 3 * 12 + 14 * 5
    draw = wflow._draw

    def interrupted(own: wflow.WFlowConfig, classes: list[torch.Tensor], at: int) -> object:
        if at == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(own, classes, at)

    with monkeypatch.context() as patch:
        patch.setattr(wflow, "_draw", interrupted)
        with pytest.raises(KeyboardInterrupt, match="step 10 of 14"):
            wflow.train(config, tmp_path / "stopped", progress=False)
    wflow.train(config, tmp_path / "stopped", resume=True, progress=False)
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_a_guided_run_draws_at_a_scale(
    config: wflow.WFlowConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The classes are of brightness -0.5, 0, 0.5: guidance drives the outer ones apart."""
    config = replace(config, steps=250, batch=16, width=32, queue=None, uncond=16, scale_none=0.3)
    config = replace(config, scale_high=2.0, scale_power=0.0, noise_dim=4, flow=WFlow(eps=0.2))
    out = tmp_path / "run"
    wflow.train(config, out, progress=False)
    trained = fewstep.load(out)

    def brightness(label: int, **options: Any) -> float:
        return trained.sample(200, labels=label, **options).mean().item()

    assert brightness(2) == brightness(2, scale=1.0) == pytest.approx(0.5, abs=0.15)
    assert brightness(2, scale=2.0) > brightness(2) + 0.05
    assert brightness(0, scale=2.0) < brightness(0) - 0.05
    picture = tmp_path / "grid.png"
    assert main(["sample", str(out), "--out", str(picture), "--scale", "1.5"]) == 0
    assert picture.exists()
    capsys.readouterr()
    for scale in ("0.5", "2.5", "nan"):
        assert main(["sample", str(out), "--out", str(picture), "--scale", scale]) == 2
        assert "scale must be from 1 to 2.0, as the run was trained" in capsys.readouterr().err


def test_other_numbers_of_positives(
    config: wflow.WFlowConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problems, "_warned", False)
    config = replace(config, positives=20, scale_high=1.0, queue=None, steps=2)
    with pytest.warns(UserWarning, match="20 real beside 8 generated"):
        wflow.train(config, tmp_path / "run", progress=False)
    run = wflow.read_run(tmp_path / "run")
    assert run.config == config
    with pytest.raises(ValueError, match=r"scale must be from 1 to 1\.0"):
        fewstep.load(tmp_path / "run").sample(2, scale=1.5)


def test_patches_beside_whole_images(config: wflow.WFlowConfig, tmp_path: Path) -> None:
    config = replace(config, steps=2, patches=(2,))
    wflow.train(config, tmp_path / "run", progress=False)
    assert wflow.read_run(tmp_path / "run").config == config
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert "drift/image" in rows
    assert "drift/patches2" in rows
    with pytest.raises(ValueError, match="size must divide H and W, got 3"):
        wflow.train(replace(config, patches=(3,)), tmp_path / "bad", progress=False)


def test_bad_settings(config: wflow.WFlowConfig, tmp_path: Path) -> None:
    for options, message in (
        ({"queue": 0}, "queue must be an integer of at least 1, got 0"),
        ({"positives": -1}, "positives must be an integer of at least 1, got -1"),
        ({"patches": (2, 0)}, "patches must be an integer of at least 1, got 0"),
        ({"push": 0}, "push must be an integer of at least 1, got 0"),
        ({"scale_high": 0.5}, "high must be at least low = 1.0 and finite, got 0.5"),
        ({"scale_none": 2.0}, "none must be from 0 to 1, got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **options)
    (tmp_path / "a_labels.npy").unlink()
    with pytest.raises(ValueError, match=r"scale_high: .* classes, got 3\.0"):
        wflow.train(config, tmp_path / "run", progress=False)
