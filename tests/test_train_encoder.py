from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.cli import main
from fewstep.networks import ImageEncoder, MaskedAutoencoder, masked_error, patch_masks
from fewstep.training import checkpoint, encoder, plots, wflow
from fewstep.training.encoder import EncoderConfig, features_of
from fewstep.training.loop import CHECKPOINT
from fewstep.training.runs import PICTURE, REPORT


def saved(folder: Path, channels: int = 1) -> str:
    """Stripes of 8x8, upright or lying, in two classes: each pixel follows from its neighbours."""
    rng = np.random.default_rng(0)
    phase, upright = rng.integers(0, 4, (40, 1, 1)), np.arange(40).reshape(-1, 1, 1) % 2
    i, j = np.mgrid[:8, :8]
    images = np.where((np.where(upright, j, i) + phase) % 4 < 2, 0.8, -0.8)
    np.save(folder / "a.npy", np.repeat(images[:, None], channels, 1))
    np.save(folder / "a_labels.npy", upright.reshape(-1))
    return str(folder / "a.npy")


def config_of(data: str) -> EncoderConfig:
    small = {"width": 8, "stages": 2, "depth": 1, "patch": 2}
    return EncoderConfig(data, steps=60, batch=16, lr=1e-2, ema=0.8, device="cpu", **small)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderConfig, Path]:
    folder = tmp_path_factory.mktemp("encoder")
    config = config_of(saved(folder))
    encoder.train(config, folder / "run", progress=False)
    return config, folder / "run"


def test_masks_and_their_error() -> None:
    x = torch.zeros(400, 3, 7, 6)
    masks = patch_masks(x, patch=3, share=0.25, generator=torch.Generator().manual_seed(0))
    assert masks.shape == (400, 1, 7, 6)
    assert torch.equal(masks[:, :, 0:3, 3:6], masks[:, :, :1, 3:4].expand(-1, -1, 3, 3))
    assert torch.equal(masks[:, 0, 6, 0], masks[:, 0, 6, 2])
    share = masks[:, 0, ::3, ::3].double().mean()
    assert abs(share - 0.25) < 4.5 * (0.25 * 0.75 / 2400) ** 0.5
    error = masked_error(x + torch.where(masks, 2.0, 7.0), x, masks)
    torch.testing.assert_close(error, torch.tensor(4.0))
    assert masked_error(x + 1, x, torch.zeros_like(masks)) == 0


def test_masked_values_are_not_seen() -> None:
    network = MaskedAutoencoder(ImageEncoder(1, width=8, stages=3, depth=2))
    x = torch.randn(3, 1, 7, 9)
    masks = patch_masks(x, patch=2, share=0.5)
    other = torch.where(masks, torch.randn_like(x), x)
    assert torch.equal(network(x, masks), network(other, masks))
    assert not torch.equal(network(x, masks), network(x + 1, masks))


def test_maps_of_every_other_block() -> None:
    maps = ImageEncoder(1, width=8, stages=2, depth=4)(torch.randn(2, 1, 7, 8))
    assert {name: tuple(t.shape) for name, t in maps.items()} == {
        "stage1/block2": (2, 8, 7, 8),
        "stage1": (2, 8, 7, 8),
        "stage2/block2": (2, 16, 4, 4),
        "stage2": (2, 16, 4, 4),
    }


def test_a_run_restores_what_it_does_not_see(trained: tuple[EncoderConfig, Path]) -> None:
    config, out = trained
    assert {PICTURE, REPORT, CHECKPOINT} <= {path.name for path in out.iterdir()}
    assert not (out / "grids").exists()
    lines = (out / "metrics.csv").read_text().splitlines()[1:]
    errors = [float(line.split(",")[2]) for line in lines if ",loss," in line]
    assert errors[-1] < 0.3 * errors[0]
    assert encoder.read_run(out).config == config


def test_its_features(trained: tuple[EncoderConfig, Path]) -> None:
    network = fewstep.load(trained[1]).network
    x = torch.randn(3, 1, 8, 8, requires_grad=True)
    maps = network(x)
    assert {name: tuple(t.shape) for name, t in maps.items()} == {
        "stage1": (3, 8, 8, 8),
        "stage2": (3, 16, 4, 4),
    }
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    maps["stage2"].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    own = features_of(str(trained[1]), 1)
    assert all(torch.equal(own(x)[name], maps[name]) for name in maps)
    saved_, _ = checkpoint.load(trained[1] / CHECKPOINT)
    weight = saved_["encoder.ema.module.encoder.first.weight"]
    assert torch.equal(network.first.weight, weight)


def test_a_stopped_run_resumes_to_the_same_bits(
    trained: tuple[EncoderConfig, Path], tmp_path: Path
) -> None:
    config, out = trained
    calls: list[int] = []
    draw = encoder.patch_masks

    def failing(*arguments: object, **options: object) -> Tensor:
        calls.append(1)
        if len(calls) == 31:
            raise KeyboardInterrupt
        return draw(*arguments, **options)  # type: ignore[arg-type]

    short = replace(config, checkpoint_every=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "patch_masks", failing)
        with pytest.raises(KeyboardInterrupt):
            encoder.train(short, tmp_path / "run", progress=False)
    encoder.train(short, tmp_path / "run", resume=True, progress=False)
    first, second = (checkpoint.load(path / CHECKPOINT)[0] for path in (out, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parts_of_a_batch_count_by_what_is_masked(
    trained: tuple[EncoderConfig, Path], tmp_path: Path
) -> None:
    losses = []
    for parts in (1, 4):
        config = replace(trained[0], steps=3, log_every=1, accumulate=parts)
        encoder.train(config, tmp_path / str(parts), progress=False)
        lines = (tmp_path / str(parts) / "metrics.csv").read_text().splitlines()[1:]
        losses.append(torch.tensor([float(line.split(",")[2]) for line in lines]))
    assert len(losses[0]) == 3
    torch.testing.assert_close(*losses)


class Maps(nn.Module):
    """A user's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 3, 2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layer(x)]


class Numbers(Maps):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layer(x).sum()]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setitem(sys.modules, "own_features", sys.modules[__name__])
    return "own_features"


@pytest.mark.parametrize("source", ["RUN", "MODULE:Maps"])
@pytest.mark.parametrize("method", ["wflow", "drifting"])
def test_generators_compare_features(
    trained: tuple[EncoderConfig, Path],
    tmp_path: Path,
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    source: str,
) -> None:
    monkeypatch.setattr(wflow, "report", lambda *_, **__: [])
    monkeypatch.setattr(plots, "save_comparison", lambda path, *_, **__: path.touch())
    source = source.replace("RUN", str(trained[1])).replace("MODULE", module)
    out = tmp_path / "run"
    command = ["train", method, "--data", trained[0].data, "--out", str(out), "--batch", "6"]
    command += ["--steps", "2", "--width", "8", "--log-every", "1", "--device", "cpu"]
    assert main([*command, "--features", source]) == 0
    names = {line.split(",")[1] for line in (out / "metrics.csv").read_text().splitlines()[1:]}
    first = "drift/stage1/std2" if source == str(trained[1]) else "drift/0/std2"
    assert {"drift/input", "drift/input/rms", first} <= names
    tensors, _ = checkpoint.load(out / CHECKPOINT)
    assert any(name.startswith("features.") for name in tensors)
    assert fewstep.load(out).sample(3).shape == (3, 1, 8, 8)


def test_a_resumed_generator_keeps_its_features(
    trained: tuple[EncoderConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the run's checkpoint, though the encoder's run is another by then."""
    monkeypatch.setattr(wflow, "report", lambda *_, **__: [])
    monkeypatch.setattr(plots, "save_comparison", lambda path, *_, **__: path.touch())
    other = tmp_path / "encoder"
    encoder.train(replace(trained[0], steps=1, seed=5), other, progress=False)
    config = wflow.WFlowConfig(
        trained[0].data, steps=2, batch=6, width=8, features=str(other), device="cpu"
    )
    wflow.train(config, tmp_path / "run", progress=False)
    encoder.train(replace(trained[0], steps=1, seed=6), other, overwrite=True, progress=False)
    before, _ = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    wflow.train(replace(config, steps=3), tmp_path / "run", resume=True, progress=False)
    after, step = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert step == 3
    own = [name for name in before if name.startswith("features.")]
    assert own
    assert all(torch.equal(before[name], after[name]) for name in own)


def test_what_names_no_features(
    trained: tuple[EncoderConfig, Path],
    tmp_path: Path,
    module: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = trained[0].data, tmp_path / "run"
    (tmp_path / "colour").mkdir()
    colour = saved(tmp_path / "colour", channels=3)
    cases = [
        (data, "nowhere", "nowhere holds no run of fewstep"),
        (data, "no.such:net", "features: no.such:net cannot be imported"),
        (data, f"{module}:saved", f"{module}:saved must be a torch.nn.modules.module.Module"),
        (data, f"{module}:sys", "or return one when called without arguments: TypeError"),
        (data, f"{module}:Numbers", "encoder must return [B, C], [B, L, C] or [B, C, H, W]"),
        (colour, str(trained[1]), "is for images of 1 channels, got 3"),
        (data, f"{module}:Maps --patches 2", "patches must be None beside features"),
    ]
    for source, features, message in cases:
        command = ["train", "wflow", "--data", source, "--out", str(out), "--overwrite"]
        assert main([*command, "--features", *features.split()]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1], features


def test_an_encoder_draws_nothing(
    trained: tuple[EncoderConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(trained[1]), "--out", str(tmp_path / "a.png")]) == 2
    assert "a run of encoder draws no images" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match="draws no images"):
        fewstep.load(trained[1]).sample(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1.0}, r"share must be in \(0, 1\), got 1.0"),
        ({"share": float("nan")}, r"share must be in \(0, 1\)"),
        ({"width": 12}, "width must be a multiple of 8, got 12"),
        ({"patch": 0}, "patch must be an integer of at least 1, got 0"),
        ({"stages": 0}, "stages must be an integer of at least 1, got 0"),
    ],
)
def test_settings_out_of_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig("digits", **change)  # type: ignore[arg-type]


def test_images_of_other_channels() -> None:
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\], got \(2, 1, 8, 8\)"):
        ImageEncoder(3)(torch.randn(2, 1, 8, 8))
    with pytest.raises(ValueError, match="width must be a multiple of 8, got 4"):
        ImageEncoder(3, width=4)
