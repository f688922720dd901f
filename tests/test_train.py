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

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fewstep
from fewstep.data.images import Images, load
from fewstep.methods import WFlow
from fewstep.networks import MLPGenerator
from fewstep.training import checkpoint, plots, wflow
from fewstep.training.loop import CHECKPOINT, GRIDS, LOGS, NUMBERS
from fewstep.training.runs import CONFIG, PICTURE, REPORT, TABLE, Run, Session, TrainResult


@pytest.fixture
def measured() -> bool:
    return False


def measure_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(wflow, "report", lambda real, generated, **_: [])
    patch.setattr(plots, "save_comparison", lambda path, *_, **__: path.touch())


@pytest.fixture(autouse=True)
def _report(measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of metrics and plotting are spent only by tests that are `measured`."""
    if not measured:
        measure_nothing(monkeypatch)


def configured(folder: Path) -> wflow.WFlowConfig:
    """Two classes of 4x4 images, light on dark left or right, 40 and 20 of them."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, -0.6, (60, 4, 4))
    images[:40, :, :2] += 1.2 * rng.uniform(0.8, 1, (40, 1, 1))
    images[40:, :, 2:] += 1.2 * rng.uniform(0.8, 1, (20, 1, 1))
    np.save(folder / "a.npy", images)
    np.save(folder / "a_labels.npy", np.repeat([3, 5], (40, 20)))
    options = {"log_every": 1, "checkpoint_every": 10, "device": "cpu"}
    return wflow.WFlowConfig(str(folder / "a.npy"), steps=24, batch=8, width=16, **options)


@pytest.fixture
def config(tmp_path: Path) -> wflow.WFlowConfig:
    return configured(tmp_path)


@pytest.fixture
def data(config: wflow.WFlowConfig) -> str:
    return config.data


def run(config: wflow.WFlowConfig, out: Path, **options: bool) -> TrainResult[wflow.WFlowReport]:
    return wflow.train(config, out, progress=False, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[wflow.WFlowConfig, Path]:
    """A run that was never stopped. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("whole")
    config = configured(folder)
    with pytest.MonkeyPatch.context() as patch:
        measure_nothing(patch)
        run(config, folder / "run")
    return config, folder / "run"


@pytest.fixture
def finished(
    whole: tuple[wflow.WFlowConfig, Path], tmp_path: Path
) -> tuple[wflow.WFlowConfig, Path]:
    return whole[0], shutil.copytree(whole[1], tmp_path / "finished")


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def curves(out: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(out / LOGS))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def assert_same_state(a: Path, b: Path) -> None:
    first, second = (checkpoint.load(out / CHECKPOINT) for out in (a, b))
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    for name, tensor in first[0].items():
        assert torch.equal(tensor, second[0][name]), name


def start(config: wflow.WFlowConfig, out: Path) -> subprocess.Popen[str]:
    """A run in another process, returned once it has written a checkpoint."""
    options = f"--data {config.data} --out {out} --steps {config.steps} --batch {config.batch}"
    options += f" --width {config.width} --checkpoint-every {config.checkpoint_every}"
    options += f" --log-every {config.log_every} --device cpu"
    code = "from fewstep.cli import main; raise SystemExit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "wflow", *options.split()],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (out / CHECKPOINT).exists():
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("measured", [True])
def test_a_run_leaves_everything(config: wflow.WFlowConfig, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    result = run(config, out)
    names = {path.name for path in out.iterdir()}
    assert names == {CHECKPOINT, CONFIG, LOGS, PICTURE, NUMBERS, GRIDS, TABLE, REPORT}
    assert sorted(path.name for path in (out / GRIDS).iterdir()) == [
        f"{step:06d}.png" for step in (10, 20, 24)
    ]
    rows = json.loads((out / REPORT).read_text())["rows"]
    assert [row["value"] for row in rows] == [row.value for row in result.report.rows]
    assert (out / TABLE).read_text() == result.report.table + "\n"
    assert result.report.picture == out / PICTURE
    assert picture_size(result.report.picture)[0] > 500
    assert {row.name for row in result.report.rows} >= {"sliced W2^2", "exact W2^2"}
    spread = float(load(config.data).images.std())
    assert wflow.read_run(out) == Run(config, (1, 4, 4), ("3", "5"), spread)
    loss = curves(out)["loss"]
    assert [step for step, _ in loss] == list(range(24))
    assert len({value for _, value in curves(out)["drift"]}) == 24

    loaded, its_run = wflow.TRAINER.load(out)
    expected = wflow.sample(result.network, its_run, 6, seed=3)
    assert torch.equal(wflow.sample(loaded, its_run, 6, seed=3), expected)
    assert not torch.equal(wflow.sample(loaded, its_run, 6, seed=4), expected)
    assert expected.shape == (6, 1, 4, 4)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_curve(config: wflow.WFlowConfig, tmp_path: Path) -> None:
    config = replace(config, steps=600, checkpoint_every=50)
    process = start(config, tmp_path / "killed")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    _, done = checkpoint.load(tmp_path / "killed" / CHECKPOINT)
    assert done < config.steps
    time.sleep(1.1)  # TensorBoard reads its files in the order of their seconds
    run(config, tmp_path / "killed", resume=True)
    run(config, tmp_path / "whole")
    assert_same_state(tmp_path / "killed", tmp_path / "whole")
    assert curves(tmp_path / "killed") == curves(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_in_the_shell(config: wflow.WFlowConfig, tmp_path: Path) -> None:
    process = start(replace(config, steps=100_000), tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    _, done = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert errors.splitlines()[-1] == (
        f"fewstep: stopped after step {done} of 100000; --resume continues"
    )
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 4, 13])
def test_a_stopped_run_resumes(
    whole: tuple[wflow.WFlowConfig, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    step: int,
) -> None:
    config, draw, before = whole[0], wflow._draw, signal.getsignal(number)

    def interrupted(config: wflow.WFlowConfig, classes: list[torch.Tensor], at: int) -> object:
        if at == step:
            os.kill(os.getpid(), number)
        return draw(config, classes, at)

    with monkeypatch.context() as patch:
        patch.setattr(wflow, "_draw", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"step {step + 1} of 24"):
            run(config, tmp_path / "stopped")
    assert signal.getsignal(number) is before
    assert checkpoint.load(tmp_path / "stopped" / CHECKPOINT)[1] == step + 1
    run(config, tmp_path / "stopped", resume=True)
    assert_same_state(tmp_path / "stopped", whole[1])


def test_a_finished_run_resumes_to_its_report(finished: tuple[wflow.WFlowConfig, Path]) -> None:
    config, out = finished
    before = (out / CHECKPOINT).read_bytes()
    (out / PICTURE).unlink()
    assert run(config, out, resume=True).report.picture.exists()
    assert (out / CHECKPOINT).read_bytes() == before


def test_steps_draw_afresh(config: wflow.WFlowConfig, data: str) -> None:
    classes = wflow._classes(load(data))
    draws = [wflow._draw(config, classes, step) for step in (0, 1, 1)]
    assert all(torch.equal(a, b) for a, b in zip(draws[1], draws[2], strict=True))
    noise, real = draws[0][1:]
    assert noise.shape == (2, 2, 8, wflow.preset("digits").noise_dim)
    assert real.shape == (2, 8, 1, 4, 4)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, draws[1][1])
    for label, images in zip(draws[0][0].tolist(), real.flatten(2), strict=True):
        assert len(images.unique(dim=0)) == 8
        left = images.reshape(8, 4, 4)[:, :, :2].mean((1, 2))
        assert torch.all((left > 0) == (label == 0))

    few = wflow._draw(replace(config, batch=30, groups=1), classes, 0)
    assert few[2].shape == (1, 30, 1, 4, 4)


def test_generator_learns_its_classes(config: wflow.WFlowConfig, tmp_path: Path) -> None:
    config = replace(config, steps=300, batch=16, width=64, ema=0.95, log_every=50)
    result = run(config, tmp_path / "run")
    real = load(config.data)
    images = wflow.sample(result.network, wflow.read_run(tmp_path / "run"), 200)
    for k in range(2):
        fake, true = images[k::2], real.images[real.labels == k]
        torch.testing.assert_close(fake.mean(0), true.mean(0), rtol=0, atol=0.1)
        assert fake.std(0).mean() > 0.5 * true.std(0).mean()


@pytest.mark.parametrize("shape", [(14, 4, 5), (14, 3, 4, 5)])
def test_images_without_labels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    config = wflow.WFlowConfig(str(tmp_path / "a.npy"), steps=3, batch=8, width=16, device="cpu")
    result = run(config, tmp_path / "run")
    its_run = wflow.read_run(tmp_path / "run")
    assert its_run.classes == ()
    assert wflow.sample(result.network, its_run, 3).shape == (3, *its_run.image_shape)


@pytest.mark.parametrize("measured", [True])
def test_a_class_of_one_image(tmp_path: Path, config: wflow.WFlowConfig, data: str) -> None:
    np.save(data.replace(".npy", "_labels.npy"), np.repeat([3, 5, 7], (40, 19, 1)))
    assert run(config, tmp_path / "run").report.picture.exists()


def test_divergence_is_an_error_and_keeps_the_checkpoint(
    config: wflow.WFlowConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = wflow._draw

    def poisoned(
        config: wflow.WFlowConfig, classes: list[torch.Tensor], step: int
    ) -> tuple[torch.Tensor, ...]:
        labels, noise, real = draw(config, classes, step)
        return labels, noise, real * (torch.nan if step >= 15 else 1)

    monkeypatch.setattr(wflow, "_draw", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 15.*nan"):
        run(config, tmp_path / "run")
    tensors, done = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert done == 10
    assert all(t.isfinite().all() for t in tensors.values())


def test_folder_in_use(config: wflow.WFlowConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config, out)
    before = (out / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match="--resume or --overwrite"):
        run(config, out)
    with pytest.raises(ValueError, match=r"another configuration.*lr"):
        run(replace(config, lr=0.1), out, resume=True)
    with pytest.raises(ValueError, match=r"another configuration.*flow"):
        run(replace(config, flow=WFlow(eps=0.1)), out, resume=True)
    assert (out / CHECKPOINT).read_bytes() == before

    np.save(config.data, np.zeros((60, 5, 4), np.uint8))
    with pytest.raises(ValueError, match="image_shape"):
        run(config, out, resume=True)

    run(replace(config, steps=3), out, overwrite=True)
    assert checkpoint.load(out / CHECKPOINT)[1] == 3
    assert [step for step, _ in curves(out)["loss"]] == [0, 1, 2]


def test_foreign_folder(config: wflow.WFlowConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"run holds no run"):
        run(config, out, resume=True)
    out.mkdir()
    for text in ('{"name": "theirs"}', "[1, 2]", "not json", "{"):
        (out / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=r"config.json is not the configuration of a run"):
            run(config, out, overwrite=True)
        assert (out / CONFIG).read_text() == text


def test_data_that_changed(finished: tuple[wflow.WFlowConfig, Path], tmp_path: Path) -> None:
    config, out = finished
    content = json.loads((out / CONFIG).read_text())
    spread = content["sigma_data"]
    for noted in (spread * (1 + 1e-7), None):  # of another machine, of an earlier version
        content.pop("sigma_data")
        content |= {} if noted is None else {"sigma_data": noted}
        (out / CONFIG).write_text(json.dumps(content))
        run(config, out, resume=True)
        content["sigma_data"] = spread
    content["sigma_data"] = 1.01 * spread
    (out / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another configuration: sigma_data is"):
        run(config, out, resume=True)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[-5] ^= 64
        path.write_bytes(content)
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, path)
    elif how == "other shape":
        checkpoint.save(path, {"ema.module.layers.0.weight": torch.zeros(3)}, step=1)
    elif how == "missing":
        path.unlink()


@pytest.mark.parametrize(
    "how", ["torn", "flipped", "text", "empty", "foreign", "other shape", "missing"]
)
def test_damaged_checkpoint(finished: tuple[wflow.WFlowConfig, Path], how: str) -> None:
    config, out = finished
    path = out / CHECKPOINT
    damage(path, how)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(ValueError, match="checkpoint"):
        wflow.TRAINER.load(out)
    if before is not None:
        with pytest.raises(ValueError, match="checkpoint"):
            run(config, out, resume=True)
        assert path.read_bytes() == before


def test_a_failed_save_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"w": torch.ones(2), "n": torch.tensor(3)}, step=7)

    def fail(tensors: object, target: Path, metadata: object) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"w": torch.zeros(2)}, step=8)
    tensors, step = checkpoint.load(path)
    assert step == 7
    assert tensors["w"].tolist() == [1, 1]
    assert tensors["n"].item() == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("most", [0, 700, 3000])
def test_a_disk_that_is_full(config: wflow.WFlowConfig, tmp_path: Path, most: int) -> None:
    """Files may have so many bytes: none, a configuration, logs. One line, no traceback."""
    options = f"--data {config.data} --out {tmp_path / 'run'} --steps 40 --batch 8 --width 16"
    options += " --checkpoint-every 5 --log-every 1 --device cpu"
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}));"
        "from fewstep.cli import main; raise SystemExit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "wflow", *options.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fewstep: ")
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left <= {CONFIG, LOGS, NUMBERS}


BAD_CONFIG = [
    ("steps", 0),
    ("steps", 2.5),
    ("batch", -1),
    ("seed", -1),
    ("lr", 0.0),
    ("lr", float("nan")),
    ("ema", 1.0),
    ("ema", -0.1),
]


@pytest.mark.parametrize(("name", "value"), BAD_CONFIG)
def test_bad_config(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*got {value}"):
        wflow.WFlowConfig("digits", **{name: value})


def test_bad_device_and_small_data(config: wflow.WFlowConfig, tmp_path: Path) -> None:
    for device in ("quantum", "cuda:99"):
        with pytest.raises(ValueError, match=device):
            run(replace(config, device=device), tmp_path / "run")
    np.save(tmp_path / "b.npy", np.zeros((11, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="at least 12 images, got 11"):
        run(replace(config, data=str(tmp_path / "b.npy")), tmp_path / "run")


@pytest.mark.parametrize("measured", [True])
def test_evaluation_shows_at_most_twenty_classes(tmp_path: Path) -> None:
    data = Images(
        torch.rand(90, 1, 4, 4), torch.arange(90) % 30, tuple(f"class {k}" for k in range(30))
    )
    generator = MLPGenerator((1, 4, 4), classes=30, width=8)
    its_run = Run(wflow.preset("digits"), (1, 4, 4), data.names)
    session = Session(its_run, data, {}, tmp_path, torch.device("cpu"), progress=False)
    picture = wflow.evaluate(session, {"": generator}).picture
    assert 20 * 60 < picture_size(picture)[1] < 25 * 60


def test_numbers_in_a_file(
    finished: tuple[wflow.WFlowConfig, Path], config: wflow.WFlowConfig
) -> None:
    """Also of a run that is trained longer, whose steps are there once."""
    before, out = finished
    run(replace(before, steps=30), out, resume=True)
    assert wflow.read_run(out).config.steps == 30
    assert checkpoint.load(out / CHECKPOINT)[1] == 30
    head, *lines = (out / NUMBERS).read_text().splitlines()
    assert head == "step,name,value"
    rows = [line.split(",") for line in lines]
    own = {int(step): float(value) for step, name, value in rows if name == "loss"}
    assert [int(step) for step, name, _ in rows if name == "loss"] == list(range(30))
    assert own == pytest.approx(dict(curves(out)["loss"]), rel=1e-5)
    assert (out / GRIDS / "000030.png").exists()
    with pytest.raises(ValueError, match="steps is 30, not 29"):
        run(replace(before, steps=29), out, resume=True)


def test_a_run_is_loaded(finished: tuple[wflow.WFlowConfig, Path]) -> None:
    _, out = finished
    trained = fewstep.load(str(out))
    images = trained.sample(6, seed=3)
    network, own = wflow.TRAINER.load(out)
    assert torch.equal(images, wflow.sample(network, own, 6, seed=3))
    assert trained.run.classes == ("3", "5")
    one, several = trained.sample(2, labels=1), trained.sample(2, labels=[1, 1])
    assert torch.equal(one, several)
    assert not torch.equal(one, trained.sample(2, labels=torch.tensor([1, 0])))
    for labels in (2, -1, [0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="sample: labels must be 2 from 0 to 1"):
            trained.sample(2, labels=labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sample: steps is no option of wflow"):
        trained.sample(2, steps=2)
    with pytest.raises(ValueError, match="holds no run"):
        fewstep.load(out / "none")
