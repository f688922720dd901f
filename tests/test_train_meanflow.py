from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data.images import load
from fewstep.methods import MeanFlow
from fewstep.training import checkpoint, meanflow, plots
from fewstep.training.loop import CHECKPOINT, LOGS
from fewstep.training.meanflow import MeanFlowConfig, MeanFlowReport
from fewstep.training.runs import CONFIG, PICTURE, TrainResult


@pytest.fixture
def measured() -> bool:
    return False


@pytest.fixture(autouse=True)
def _quick(measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of metrics and plotting are spent only by tests that are `measured`."""
    if not measured:
        monkeypatch.setattr(meanflow, "report", lambda *_, **__: [])
        monkeypatch.setattr(plots, "save_comparison", lambda path, *_, **__: path.touch())


@pytest.fixture
def config(tmp_path: Path) -> MeanFlowConfig:
    """Two classes of 4x4 images, light on the left or on the right."""
    images = np.random.default_rng(0).uniform(-1, -0.6, (60, 4, 4))
    images[:40, :, :2] += 1.2
    images[40:, :, 2:] += 1.2
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "a_labels.npy", np.repeat([3, 5], (40, 20)))
    options = {"log_every": 1, "checkpoint_every": 10, "device": "cpu"}
    return MeanFlowConfig(str(tmp_path / "a.npy"), steps=12, batch=16, width=16, depth=1, **options)


def run(config: MeanFlowConfig, out: Path, **options: bool) -> TrainResult[MeanFlowReport]:
    return meanflow.train(config, out, progress=False, **options)


@pytest.mark.parametrize("measured", [True])
def test_a_run_leaves_everything(config: MeanFlowConfig, tmp_path: Path) -> None:
    result = run(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {CHECKPOINT, CONFIG, LOGS, PICTURE, "grids", "report.json", "report.txt"}
    assert result.report.picture.stat().st_size > 1000
    assert list(result.report.samplers) == [1, 2, 4]
    for name in ("FD-local", "3-NN agreement", "1 step", "2 steps", "real vs real"):
        assert name in result.report.table
    loaded, its_run = meanflow.TRAINER.load(tmp_path / "run")
    assert its_run.config == config
    samples = [meanflow.sample(loaded, its_run, 6, steps=steps) for steps in (1, 2)]
    assert samples[0].shape == (6, 1, 4, 4)
    assert not torch.equal(*samples)
    assert torch.equal(samples[0], meanflow.sample(result.network, its_run, 6))


@pytest.mark.parametrize("step", [0, 4])
def test_a_stopped_run_resumes_to_the_same_bits(
    config: MeanFlowConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = replace(config, flow=MeanFlow(improved=True, ratio=0.5, omega=1.5, kappa=0.2))
    draw, calls = meanflow._some, []

    def interrupted(*arguments: object) -> object:
        calls.append(None)
        if len(calls) == step + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(meanflow, "_some", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"step {step + 1} of 12"):
            run(config, tmp_path / "stopped")
    run(config, tmp_path / "stopped", resume=True)
    run(config, tmp_path / "whole")
    first, second = (checkpoint.load(tmp_path / n / CHECKPOINT)[0] for n in ("stopped", "whole"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_network_learns_its_classes(config: MeanFlowConfig, tmp_path: Path) -> None:
    config = replace(
        config, steps=400, batch=64, width=32, ema=0.97, lr=5e-3, flow=MeanFlow(ratio=0.5)
    )
    result = run(config, tmp_path / "run")
    real = load(config.data)
    images = meanflow.sample(result.network, meanflow.read_run(tmp_path / "run"), 200)
    for k in range(2):
        true = real.images[real.labels == k]
        torch.testing.assert_close(images[k::2].mean(0), true.mean(0), rtol=0, atol=0.15)


def test_images_without_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (14, 4, 5), np.uint8))
    config = MeanFlowConfig(
        str(tmp_path / "a.npy"), steps=3, batch=8, width=16, depth=1, device="cpu"
    )
    result = run(config, tmp_path / "run")
    its_run = meanflow.read_run(tmp_path / "run")
    assert its_run.classes == ()
    assert meanflow.sample(result.network, its_run, 3, steps=2).shape == (3, 1, 4, 5)


def test_samples_that_are_left_out(
    config: MeanFlowConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step does not depend on the parts of a batch, of which some are left out as a whole."""
    own, gone = meanflow._some, [0.0]

    def loss(self: MeanFlow, network: Any, x: Any, labels: Any, **options: Any) -> Any:
        """Of samples that are darker than a number."""
        fine = x.mean((1, 2, 3)) < gone[0]
        if not fine.any():
            raise FloatingPointError("at every sample")
        t = torch.ones(len(x))
        square = (network(x, t, 0 * t, labels) - x).square().flatten(1).sum(1)
        value = torch.where(fine, square, 0).sum() / fine.sum()
        zero = value.detach() * 0
        return value, {"error": zero, "skipped": (~fine).float().mean(), "tangent": zero}

    def some(*arguments: Any) -> Any:
        images, labels = own(*arguments)
        return images - images.mean((1, 2, 3), keepdim=True) + labels[:, None, None, None], labels

    monkeypatch.setattr(MeanFlow, "__call__", loss)
    monkeypatch.setattr(meanflow, "_some", some)
    losses = []
    for k in (1, 2, 8):
        of_parts = replace(config, steps=1, batch=8, accumulate=k, lr=1e-3)
        gone[0] = 0.5  # class 0 alone
        run(of_parts, tmp_path / str(k))
        rows = (tmp_path / str(k) / "metrics.csv").read_text().splitlines()[1:]
        logged = {name: float(value) for _, name, value in (row.split(",") for row in rows)}
        assert 0 < logged["skipped"] < 1
        losses.append(logged["loss"])
        gone[0] = -0.5
        with pytest.raises(FloatingPointError, match="at every sample"):
            run(of_parts, tmp_path / f"all {k}")
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
