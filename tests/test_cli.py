from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import fewstep
from fewstep import training
from fewstep._files import one_writer
from fewstep.cli import main
from fewstep.training import plots, runs, wflow
from fewstep.training.loop import CHECKPOINT, LOGS, NUMBERS
from fewstep.training.registry import TRAINERS, trainer_of
from fewstep.training.runs import CONFIG, EXTRA, PICTURE, Run, Trainer


def write_data(folder: Path) -> str:
    images = np.random.default_rng(0).integers(0, 256, (24, 4, 4), dtype=np.uint8)
    np.save(folder / "a.npy", images)
    np.save(folder / "a_labels.npy", np.arange(24) % 3)
    return str(folder / "a.npy")


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_data(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    config = wflow.WFlowConfig(write_data(folder), steps=2, batch=4, width=8, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wflow, "report", lambda real, generated, **_: [])
        patch.setattr(plots, "save_comparison", lambda path, *_, **__: path.touch())
        wflow.train(config, folder / "run", progress=False)
    return folder / "run"


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that printed nothing else."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fewstep: ")
    return lines[0]


def test_the_package_installs_the_command() -> None:
    (command,) = entry_points(group="console_scripts", name="fewstep")
    assert command.load() is main


def test_train_prints_a_table_and_the_picture(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = "--steps 3 --batch 4 --width 8 --eps 0.1 --no-normalize --device cpu"
    assert main(["train", "wflow", "--data", data, "--out", str(out), *options.split()]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert any(line.startswith("3-NN agreement") for line in lines)
    assert Path(lines[-2]) == out / PICTURE
    assert Path(lines[-2]).stat().st_size > 1000
    config = wflow.read_run(out).config
    assert (config.steps, config.width, config.flow.eps) == (3, 8, 0.1)
    assert not config.flow.normalize
    assert config.lr == wflow.preset(data).lr


@pytest.mark.parametrize("name", ["digits", "mnist5k", "own.npy"])
@pytest.mark.parametrize("method", TRAINERS)
def test_defaults_are_those_of_the_data_set(method: str, name: str) -> None:
    from fewstep.training import commands

    preset = TRAINERS[method].preset(name)
    assert preset.data == name
    for data, lr in (([f"--data={name}"], None), (["--data", name, "--lr", "1"], 1.0)):
        command = commands.parse(["train", method, *data, "--out", "run"])
        assert isinstance(command, commands.Train)
        expected = preset if lr is None else replace(preset, lr=lr)
        assert command.method.config() == expected


@pytest.mark.parametrize("method", TRAINERS)
def test_configurations_are_read_as_they_were_written(method: str, tmp_path: Path) -> None:
    trainer = TRAINERS[method]
    for name in ("digits", "mnist5k"):
        run = Run(trainer.preset(name), (1, 8, 8), ("a", "b"), 0.25)
        runs._begin(tmp_path, method, run, overwrite=False)
        assert trainer.read_run(tmp_path) == run
        assert trainer_of(tmp_path) is trainer


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (7, 3), (64, 8)])
def test_sample(finished: Path, tmp_path: Path, n: int, rows: int) -> None:
    """A title and names of the columns are above the images, which are pixel for pixel."""

    def draw(name: str, *options: str) -> np.ndarray:
        out = tmp_path / name
        assert main(["sample", str(finished), "--n", str(n), "--out", str(out), *options]) == 0
        with Image.open(out) as picture:
            return np.asarray(picture)

    first = draw("a.png")
    columns = {1: 1, 7: 3, 64: 9}[n]  # of three classes in turn
    images = fewstep.load(finished).sample(n).repeat_interleave(16, 2).repeat_interleave(16, 3)
    whole = (plots.montage(images, columns, gap=4) * 255).round().byte().numpy()
    height, width = rows * 68 - 4, columns * 68 - 4  # with 4 pixels between images
    assert whole.shape[:2] == (height, width)
    assert np.array_equal(first[48:-8, 8 : 8 + width, :3], whole)
    assert all(first[line : line + 20].min() < 128 for line in (8, 28))
    assert np.array_equal(draw("b.png", "--seed", "0"), first)
    assert not np.array_equal(draw("c.png", "--seed", "1"), first)


def test_sample_into_an_array(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.npy"
    assert main(["sample", str(finished), "--n", "5", "--seed", "7", "--out", str(out)]) == 0
    assert np.array_equal(np.load(out), fewstep.load(finished).sample(5, seed=7).numpy())


@pytest.mark.parametrize("method", sorted(TRAINERS.keys() - {"encoder"}))
def test_the_first_samples_do_not_depend_on_their_number(method: str) -> None:
    trainer = TRAINERS[method]
    config = replace(trainer.preset("digits"), width=8, depth=2)
    run = Run(config, (1, 8, 8), ("a", "b"), 0.25)
    network = trainer.networks(run)[trainer.network].module()
    few, many = (trainer.sample(network, run, n, seed=2**31 - 1) for n in (5, 40))
    torch.testing.assert_close(few, many[:5])
    assert not torch.allclose(few[:2], few[2:4])
    assert not torch.allclose(few, trainer.sample(network, run, 5, seed=0))


@pytest.mark.parametrize("of_python", [False, True])
def test_version(of_python: bool, capfd: pytest.CaptureFixture[str]) -> None:
    if of_python:
        subprocess.run([sys.executable, "-m", "fewstep", "--version"], check=True)
    else:
        assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"fewstep {fewstep.__version__}\n"


def test_resume_takes_the_settings_of_the_run(
    finished: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def stop(self: object, config: object, out: Path, **options: object) -> None:
        seen.append((config, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", stop)
    assert main(["train", "wflow", "--out", str(finished), "--resume"]) == 130
    options = {"resume": True, "overwrite": False, "process_group": None}
    assert seen == [(wflow.read_run(finished).config, options)]
    monkeypatch.undo()
    capsys.readouterr()
    assert main(["train", "wflow", "--out", str(finished), "--resume", "--lr", "0.5"]) == 2
    assert "lr is 0.005, not 0.5" in error_line(capsys)


def test_a_finished_folder_is_refused(
    finished: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert main(["train", "wflow", "--data", data, "--out", str(finished)]) == 2
    assert "--resume or --overwrite" in error_line(capsys)
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


BAD_ARGUMENTS = [
    ("", "Expected one of"),
    ("fly", "fly"),
    ("train", "Expected one of {wflow, reflow, lines, meanflow, drifting, encoder}"),
    ("train dance --data digits --out RUN", "dance"),
    ("train wflow --out RUN", "--data"),
    ("train wflow --data digits", "--out"),
    ("train wflow --data digits --out RUN --steps many", "many"),
    ("train wflow --data digits --out RUN --steps 0", "steps must be"),
    ("train wflow --data digits --out RUN --eps -1", "eps must be positive"),
    (
        "train wflow --data digits --out RUN --frobnicate",
        "fewstep: Unrecognized options: --frobnicate; see fewstep train wflow --help",
    ),
    ("train wflow --data digits --out RUN --step 3", "perhaps --step-size or --steps"),
    ("train wflow --data digits --out RUN --device gpu", "device must be one of auto, cpu"),
    ("train wflow --data digits --out RUN --resume", "holds no run"),
    (
        "train wflow --data digits --out RUN --backend magic",
        "'--backend'. Expected one of",
    ),
    ("train wflow --data digits --out RUN --device quantum", "quantum"),
    ("train wflow --data nowhere --out RUN", "nowhere"),
    ("train wflow --data digits --out FILE", "FILE"),
    ("sample", "--out"),
    ("sample RUN --out grid.png", "holds no run"),
    ("sample RUN --out grid.jpg", "grid.jpg"),
    ("sample RUN --out grid.png --n 0", "n must be"),
    ("sample RUN --out grid.png --seed -1", "seed must be"),
    ("train lines --out RUN", "--data"),
    (
        "train lines --data digits --out RUN --law cosine",
        "'--law'. Expected one of",
    ),
    ("train lines --data digits --out RUN --indices 5 3", "indices must increase"),
    ("train lines --data digits --out RUN --lr nan", "lr must be positive"),
    ("train lines --data digits --out RUN --rho 1e20", "rho must be one by which"),
    ("train reflow --data digits --out RUN --probes 0", "probes must be an integer from 1"),
    ("train reflow --data digits --out RUN --windows 9999999999999999999", "windows must fit"),
    ("train wflow --data digits --out RUN --max-iter 9999999999999999999", "max_iter must fit"),
    ("train lines --out RUN --resume", "holds no run"),
    ("train meanflow --data digits --out RUN --ratio 2", "ratio must be in [0, 1]"),
    ("train meanflow --data digits --out RUN --width 0", "width must be"),
    (
        "train wflow --data digits --out RUN --seed 99999999999999999999",
        "seed must be an integer of",
    ),
    ("train reflow --data digits --out RUN --seed 99999999999999999999", "seed must be an integer"),
    ("train lines --data digits --out RUN --seed 99999999999999999999", "seed must be an integer"),
    (
        "train wflow --data digits --out RUN --depth 1001",
        "depth must be an integer of at most 1000",
    ),
    ("sample RUN --out grid.png --seed 99999999999999999999", "seed must be at least 0 and below"),
    ("train wflow --data= --out RUN", "data: must not be empty, got ''"),
    ("train wflow --data digits --out=", "out: must not be empty, got ''"),
    ("pairs --teacher json:dumps --out PAIRS", "teacher: json:dumps must be a"),
    ("pairs --teacher :x --out PAIRS", "got ':x'"),
    ("pairs --out PAIRS", "--teacher"),
    ("pairs --teacher RUN --out PAIRS --n 0", "n must be an integer of at least 1"),
    ("pairs --teacher RUN --out PAIRS --sigma-max nan", "sigma_min and sigma_max must be"),
    ("pairs --teacher RUN --out PAIRS --shard 2/2", "shard must be i/n"),
    ("pairs --teacher RUN --out PAIRS", "holds no run"),
    ("pairs --teacher no.such.module:teacher --out PAIRS", "cannot be imported"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("in the way")
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_empty_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, arguments in (
        ("data", ["train", "wflow", "--data", "", "--out", "run"]),
        ("out", ["train", "wflow", "--data", "digits", "--out", ""]),
        ("out", ["sample", "run", "--out", ""]),
    ):
        assert main(arguments) == 2
        assert f"{name}: must not be empty, got ''" in error_line(capsys)


def test_half_of_the_variables_of_torchrun(
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "run"
    assert main(["train", "wflow", "--data", data, "--out", str(out)]) == 2
    assert "WORLD_SIZE needs RANK beside it, as torchrun sets them" in error_line(capsys)
    assert not out.exists()


def test_a_second_run_of_a_folder_is_refused(
    finished: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    command = ["train", "wflow", "--data", data, "--out", str(finished)]
    with one_writer(finished):
        for option in ("--resume", "--overwrite"):
            assert main([*command, option]) == 2
            assert "is in use: another process is writing there" in error_line(capsys)
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.parametrize("method", TRAINERS)
def test_resuming_a_run_of_another_method(
    finished: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    path = finished / CONFIG
    other = {"wflow": "lines", "reflow": "wflow", "lines": "reflow"}.get(method, "lines")
    path.write_text(json.dumps({**json.loads(path.read_text()), "method": other}))
    assert main(["train", method, "--out", str(finished), "--resume"]) == 2
    assert f"its method is {other}: name it in place of {method}" in error_line(capsys)


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left"), SafetensorError("No space left")]
)
def test_a_full_disk(
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    failure: Exception,
) -> None:
    def fail(tensors: object, target: Path, metadata: object) -> None:
        target.write_bytes(b"half")
        raise failure

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    out = tmp_path / "run"
    command = ["train", "wflow", "--data", data, "--out", str(out), "--steps", "2"]
    assert main([*command, "--batch", "4", "--width", "8", "--device", "cpu"]) == 2
    captured = capfd.readouterr()
    assert "No space left" in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert {path.name for path in out.iterdir()} == {CONFIG, LOGS, NUMBERS}


def test_too_little_memory_is_one_line(
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", "wflow", "--data", data, "--out", str(tmp_path / "run")]
    assert main([*command, "--width", str(10**9), "--device", "cpu"]) == 2
    assert "not enough memory" in error_line(capsys)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("another error")

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(RuntimeError, match="another error"):
        main([*command, "--overwrite"])


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    for name, value in values.items():
        (content if name in content else content["config"])[name] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "values",
    [
        {"width": 10**9},
        {"width": 10**18},
        {"depth": 10**9},
        {"noise_dim": 10**9},
        {"image_shape": [1, 10**6, 10**6]},
        {"image_shape": [1, -4, 4]},
        {"image_shape": [4]},
        {"image_shape": [1, 4, float("inf")]},
        {"classes": "abc"},
        {"classes": [0, 1, 2]},
        {"config": []},
        {"fewstep": "x" * (1 << 20)},
    ],
    ids=lambda values: str(values)[:30],
)
def test_runs_from_elsewhere_are_bounded(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, object],
) -> None:
    change(finished / CONFIG, **values)
    for command in (
        ["sample", str(finished), "--out", str(tmp_path / "a.png")],
        ["train", "wflow", "--out", str(finished), "--resume"],
    ):
        assert main(command) == 2
        line = error_line(capsys)
        assert str(finished) in line, line


def test_deeply_nested_configurations(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / CONFIG).write_text("[" * 200_000)
    assert main(["train", "wflow", "--out", str(finished), "--resume"]) == 2
    assert "nested too deeply" in error_line(capsys)


def test_files_have_the_mode_of_any_other(finished: Path) -> None:
    assert len({path.stat().st_mode for path in finished.iterdir() if path.is_file()}) == 1


def test_a_bad_checkpoint_is_refused_and_left(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    before = path.read_bytes()
    for arguments in (
        ["sample", str(finished), "--out", str(tmp_path / "a.png")],
        ["train", "wflow", "--out", str(finished), "--resume"],
    ):
        assert main(arguments) == 2
        assert str(path) in error_line(capsys)
        assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["tyro", "tqdm", "safetensors", "PIL"])
def test_a_missing_extra_is_named(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(training, "commands", raising=False)
    monkeypatch.delitem(sys.modules, "fewstep.training.commands", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", "wflow", "--data", "digits", "--out", str(tmp_path / "run")]) == 2
    line = error_line(capsys)
    assert line.startswith(f"fewstep: {name} is not installed: pip install ")
    assert "'.[train]'" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [[], ["train"], ["pairs"], ["sample"]], ids=str)
def test_help_of_every_command(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as error:
        main([*command, "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "usage: fewstep" in text
    if command == ["train"]:
        for trainer in TRAINERS.values():
            assert re.search(rf" {trainer.name} +{trainer.summary}", text)


@pytest.mark.parametrize("method", TRAINERS)
def test_every_option_of_a_method_is_explained(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["train", method, "--help"])
    text = capsys.readouterr().out
    groups, explained = set(), {}
    for line in map(str.strip, text.splitlines()):
        if line.endswith(" options"):
            groups.add(line)
        elif re.match("--[a-z]", line):
            name, *rest = re.split(" {2,}", line, maxsplit=1)
            explained[name] = rest
        elif explained and line and not line.startswith("-"):
            explained[name].append(line)
    loss = {"loss options"} if runs.nested(TRAINERS[method].config) else set()
    assert groups == {"run options", "training options"} | loss
    assert len(explained) > 15
    for name, parts in explained.items():
        assert re.match(r".{15,}\. \((required|default: .+)\)", " ".join(parts)), name


def test_steps_and_samplers_are_of_methods_that_have_them(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = (("steps", "2", "lines or meanflow"), ("sampler", "line", "lines"))
    for name, value, methods in cases:
        command = ["sample", str(finished), "--out", "grid.png", f"--{name}", value]
        assert main(command) == 2
        assert f"{name} is for runs of {methods}, got {value}" in error_line(capsys)


def test_a_run_without_a_teacher(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pairs", "--teacher", str(finished), "--out", str(tmp_path / "pairs")]) == 2
    assert "wflow, which has no teacher: give one of reflow or lines" in error_line(capsys)


def test_importing_the_package_loads_no_extra() -> None:
    code = "import fewstep, fewstep.cli, fewstep.training.wflow, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # torch loads tqdm by itself where it is installed.
    assert not {*EXTRA, "tyro"} & set(done.stdout.split()) - {"tqdm"}


def test_a_teacher_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from fewstep.data.generate import Teacher\n"
    code += 'teacher = Teacher(lambda x, sigma: x, (1, 4, 4), digest="x")\n'
    (tmp_path / "teacher_of_this_folder.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    source = "teacher_of_this_folder:teacher"
    assert main(["pairs", "--teacher", source, "--out", "pairs", "--n", "2", "--batch", "2"]) == 0
    assert (tmp_path / "pairs" / "manifest.json").exists()
