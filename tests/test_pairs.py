"""Pairs on disk: the same bytes however they are split or interrupted, and damage is named."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import fewstep
from fewstep import cli
from fewstep._files import one_writer
from fewstep.data import pairs
from fewstep.data.generate import Teacher, generate, worker
from fewstep.data.pairs import PairDataset, PairsConfig
from support.pairs import CONFIG, SHAPE, Denoiser


def make(out: Path, config: PairsConfig = CONFIG, *, classes: int = 0, **options: object) -> int:
    teacher = Teacher(Denoiser(classes), SHAPE, classes)
    return generate(teacher, config, out, device="cpu", progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "pairs"
    assert make(out) == 0
    return out


def test_pairs_are_the_teachers(whole: Path) -> None:
    data = PairDataset(whole)
    assert (len(data), data.shape, data.classes) == (37, SHAPE, 0)
    x0, x1 = data.batch(torch.tensor([36, 0, 11, 12, 12]))
    assert torch.equal(x0, fewstep.latents(torch.tensor([41, 5, 16, 17, 17]), SHAPE))
    expected = fewstep.edm_sample(Denoiser(), x0, steps=3)
    torch.testing.assert_close(x1, expected, rtol=1e-5, atol=1e-5)
    for got, row in zip(data[-1], (x0[0], x1[0]), strict=True):
        assert torch.equal(got, row)
    with pytest.raises(IndexError, match="within 37 pairs, got 37"):
        data[37]
    assert len({tuple(t[0].flatten().tolist()) for t in data}) == 37


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_shares_give_the_same_files(whole: Path, tmp_path: Path, workers: int) -> None:
    torch.set_num_threads(2)
    for index in reversed(range(workers)):
        missing = make(tmp_path / "pairs", worker=(index, workers))
        assert (missing == 0) == (index == 0)
    assert contents(tmp_path / "pairs") == contents(whole)


def test_a_pair_depends_on_its_seed_and_batch_alone(whole: Path, tmp_path: Path) -> None:
    make(tmp_path, replace(CONFIG, n=23, shard_size=8))
    some = torch.arange(23)
    for a, b in zip(PairDataset(whole).batch(some), PairDataset(tmp_path).batch(some), strict=True):
        assert torch.equal(a, b)


def test_labels_and_half_precision(tmp_path: Path) -> None:
    make(tmp_path, replace(CONFIG, dtype="float16"), classes=3)
    data = PairDataset(tmp_path)
    data.verify()
    x0, x1, labels = data.batch(torch.arange(37))
    assert labels.tolist() == [(5 + i) % 3 for i in range(37)]
    assert x0.dtype == x1.dtype == torch.float32
    assert torch.equal(x0, x0.half().float())
    teacher = Denoiser(3)
    expected = fewstep.edm_sample(lambda x, s: teacher(x, s, labels), x0, steps=3)
    torch.testing.assert_close(x1, expected, rtol=2e-3, atol=2e-3)


def test_a_raw_network_is_preconditioned_by_the_sampler(whole: Path, tmp_path: Path) -> None:
    raw = Denoiser().inner.network
    generate(Teacher(raw, SHAPE, precondition=0.7), CONFIG, tmp_path, progress=False)
    a, b = (PairDataset(folder).batch(torch.arange(37))[1] for folder in (whole, tmp_path))
    # Two orders of float32 arithmetic, on states that begin at 80.
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_loader_in_other_processes(whole: Path) -> None:
    data = pickle.loads(pickle.dumps(PairDataset(whole)))
    loader = DataLoader(data, batch_size=10, num_workers=2, multiprocessing_context="fork")
    read = torch.cat([x1 for _, x1 in loader])
    assert torch.equal(read, data.batch(torch.arange(37))[1])


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.pairs import CONFIG, SHAPE, Denoiser
from fewstep import pairs
teacher = pairs.Teacher(Denoiser(pause=float(sys.argv[3])), SHAPE)
pairs.generate(teacher, CONFIG, Path(sys.argv[2]), worker=pairs.worker(), progress=False)
"""


def start(out: Path, pause: float = 0.0, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(out), str(pause)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2", **environment})


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    process = start(out, pause=0.05)
    while process.poll() is None and not list(out.glob("*.safetensors")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 1 <= len(done) < CONFIG.shards
    (out / ".pairs-00003-of-00004.safetensors.tmp").write_bytes(b"half")
    (out / ".pairs-00003-of-00004.safetensors.d").mkdir(exist_ok=True)
    (out / ".pairs-00003-of-00004.safetensors.d" / ".tmp123").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"holds no complete pairs.*manifest"):
        PairDataset(out)
    assert make(out) == 0
    assert contents(out) == contents(whole)
    assert all((out / name).stat().st_mtime_ns == when for name, when in done.items())


@pytest.mark.slow
def test_ranks_of_torchrun(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    processes = [start(out, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(out) == contents(whole)


def test_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker("2/3") == (2, 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert worker("2/3") == (9, 12)
    for shard in ("3/3", "0/0", "1", "-1/3", "a/b"):
        with pytest.raises(ValueError, match=re.escape(f"got {shard!r}")):
            worker(shard)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    out = tmp_path / "copy"
    out.mkdir()
    for name, content in contents(whole).items():
        (out / name).write_bytes(content)
    return out


def test_damaged_files_are_named(copy: Path) -> None:
    path = copy / "pairs-00002-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    damaged = rf"{path.name} is damaged, its checksum does not match"
    with pytest.raises(ValueError, match=damaged):
        PairDataset(copy).verify()
    with pytest.raises(ValueError, match=damaged):
        make(copy)
    path.write_bytes(content[:-40])
    for read in (lambda: PairDataset(copy), lambda: make(copy)):
        with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
            read()
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is missing"):
        PairDataset(copy)
    assert make(copy) == 0
    PairDataset(copy).verify()


def test_files_in_the_wrong_place(copy: Path, tmp_path: Path) -> None:
    first, second = (copy / f"pairs-0000{k}-of-00004.safetensors" for k in (0, 1))
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"pairs-00001.*is not file 1 of these pairs"):
        PairDataset(copy)
    second.write_bytes(kept)
    make(tmp_path / "other", replace(CONFIG, seed=6))
    first.write_bytes((tmp_path / "other" / first.name).read_bytes())
    for read in (lambda: PairDataset(copy), lambda: make(copy)):
        with pytest.raises(ValueError, match=r"pairs-00000.*is not file 0 of these pairs"):
            read()


def test_manifest(copy: Path) -> None:
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    assert content["config"]["seed"] == 5
    assert content["sigmas"] == fewstep.karras_sigmas(3).tolist()
    assert [shard["pairs"] for shard in content["shards"]] == [12, 12, 12, 1]
    crc = content["shards"][1]["crc32"]
    path.write_text(path.read_text().replace(crc, "00000000"))
    with pytest.raises(ValueError, match=r"pairs-00001.*is not the one of the manifest"):
        PairDataset(copy)
    path.write_text(json.dumps({**content, "shards": content["shards"][:2]}))
    with pytest.raises(ValueError, match="must list 4 files, got 2"):
        PairDataset(copy)
    for text in ("{}", "not json", '{"format": "another"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a manifest of pairs"):
            PairDataset(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "[" * 100_000, '{"config": 1}'])
def test_a_damaged_manifest_is_written_anew(copy: Path, whole: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="is not a manifest of pairs"):
        PairDataset(copy)
    assert make(copy) == 0
    assert contents(copy) == contents(whole)


def test_a_manifest_of_another_version_stays(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fewstep": "0.0.1"}))
    before = path.read_bytes()
    assert make(copy) == 0
    assert path.read_bytes() == before


def test_files_from_elsewhere_are_bounded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = copy / "pairs-00000-of-00004.safetensors"
    content = first.read_bytes()
    first.write_bytes((17 << 20).to_bytes(8, "little") + content[8:])
    with pytest.raises(
        ValueError, match=r"pairs-00000.* is damaged.*its header has 17825792 bytes"
    ):
        PairDataset(copy)
    tensors, label = pairs._tensors(copy / "pairs-00001-of-00004.safetensors")
    short = {name: t[:-1] for name, t in tensors.items()}
    label["shard"] = 0
    save_file(short, first, {"fewstep": json.dumps(label)})
    with pytest.raises(ValueError, match=r"pairs-00000.* must have .*\(12, 1, 3, 5\).*\(11,"):
        PairDataset(copy)
    monkeypatch.setattr(pairs, "MOST_MANIFEST", 100)
    with pytest.raises(ValueError, match="manifest of pairs: it has more than 100 bytes"):
        PairDataset(copy)
    (copy / "config.json").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(ValueError, match=r"configuration of pairs: it has more than 1048576 bytes"):
        make(copy)


def test_files_have_the_mode_of_any_other(whole: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in whole.iterdir()}
    other = whole.parent / "other"
    other.touch()
    assert modes == {other.stat().st_mode & 0o777}


class Remembering(Denoiser):
    """Keeps what it was called with in itself, as caches and parametrizations do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.calls = way, 0
        if way == "hook":
            self.inner.register_forward_pre_hook(lambda module, inputs: self.keep(inputs[1]))

    def keep(self, sigma: torch.Tensor) -> None:
        self.sigma = sigma
        time.sleep(0.002)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.way == "attribute":
            self.keep(sigma)
            return super().forward(x, self.sigma)
        if self.way == "count":  # of calls since it was made
            return super().forward(x, sigma) * (1 + self.calls)
        out = super().forward(x, sigma)
        return out + self.sigma[:, None, None, None]


@pytest.mark.parametrize("way", ["attribute", "hook", "function", "count"])
def test_a_teacher_with_state_makes_the_same_pairs(tmp_path: Path, way: str) -> None:
    files = []
    for threads, share in ((1, (0, 1)), (4, (0, 1)), (4, (1, 2))):
        network = Remembering("attribute" if way == "function" else way)
        denoiser = (lambda x, s, n=network: n(x, s)) if way == "function" else network
        teacher = Teacher(denoiser, SHAPE, digest="state")
        out = tmp_path / f"{threads}-{share[1]}"
        torch.set_num_threads(threads)
        generate(teacher, CONFIG, out, worker=share, device="cpu", progress=False)
        files.append(contents(out))
        assert way != "count" or network.calls == 0
    torch.set_num_threads(1)
    if way == "attribute":
        make(tmp_path / "plain")
        plain = PairDataset(tmp_path / "plain").batch(torch.arange(37))
        kept = PairDataset(tmp_path / "4-1").batch(torch.arange(37))
        assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert files[0] == files[1]
    shared = files[2].keys() & files[0].keys()
    assert len([name for name in shared if name.endswith(".safetensors")]) == 2
    assert all(files[2][name] == files[0][name] for name in shared)


def test_images_beyond_the_dtype_of_the_files(tmp_path: Path) -> None:
    half = replace(CONFIG, dtype="float16")
    large = Teacher(lambda x, sigma: x * 0 + 7e4, SHAPE, digest="large")
    with pytest.raises(ValueError, match=r"finite in float16, got 70000: dtype 'float32' has them"):
        generate(large, half, tmp_path, device="cpu", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    generate(large, CONFIG, tmp_path / "float32", device="cpu", progress=False)


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_full_disk(whole: Path, tmp_path: Path, failure: Exception) -> None:
    def fail(tensors: object, target: Path, metadata: object) -> None:
        target.write_bytes(b"half")
        raise failure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert make(tmp_path) == 0
    assert contents(tmp_path) == contents(whole)


def test_one_writer(whole: Path, tmp_path: Path) -> None:
    with one_writer(tmp_path):
        for share in ((0, 1), (1, 2)):
            with pytest.raises(ValueError, match="is in use: another process is writing there"):
                make(tmp_path, worker=share)
        assert not list(tmp_path.glob("*.json"))
    with one_writer(tmp_path, (0, 2)):
        make(tmp_path, worker=(1, 2))
        for share in ((0, 1), (0, 2), (2, 3)):
            with pytest.raises(ValueError, match="is in use"):
                make(tmp_path, worker=share)
    for name in (".lock-0-of-1", ".lock-1-of-7"):
        (tmp_path / name).touch()  # as a process leaves it that is killed
    assert make(tmp_path) == 0
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
def test_a_process_that_dies_lets_go_of_its_folder(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path, pause=0.2)
    while process.poll() is None and not list(tmp_path.glob(".lock*")):
        time.sleep(0.01)
    time.sleep(0.05)
    with pytest.raises(ValueError, match="is in use"):
        make(tmp_path)
    process.kill()
    process.wait()
    assert make(tmp_path) == 0
    assert contents(tmp_path) == contents(whole)


def test_other_pairs_in_the_folder(copy: Path, tmp_path: Path) -> None:
    before = contents(copy)
    for name, value in (("seed", 6), ("n", 38), ("batch", 2), ("steps", 4), ("rho", 3.0)):
        with pytest.raises(ValueError, match=rf"config.{name} is .*, not {value}"):
            make(copy, replace(CONFIG, **{name: value}))  # type: ignore[arg-type]
    other = Denoiser()
    with torch.no_grad():
        other.inner.network.last.bias += 1e-6
    another = Denoiser()
    another.inner.sigma_data = 0.8
    for network in (other, another):
        with pytest.raises(ValueError, match=r"teacher.digest is"):
            generate(Teacher(network, SHAPE), CONFIG, copy, progress=False)
    assert contents(copy) == before
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds a.safetensors but no config.json"):
        make(tmp_path)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the configuration of pairs"):
        make(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 2**63 - 1}, "seed must leave room"),
        ({"seed": 10**20}, "seed must be an integer of at most 9223372036854775807"),
        ({"n": True}, "n must be an integer of at least 1, got True"),
        ({"steps": 2.5}, "steps must be an integer of at least 1, got 2.5"),
        ({"shard_size": 10}, "shard_size must be a multiple of batch, 4, got 10"),
        ({"rho": 1e-320}, "PairsConfig: rho must be one by which .* got 1e-320"),
        ({"sigma_min": 0.0}, "sigma_min and sigma_max must be 0 < sigma_min"),
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
        ({"dtype": None}, "PairsConfig: dtype must be one of .* got None"),
        ({"sigma_max": "a"}, "PairsConfig: sigma_max must be a number, got 'a'"),
        ({"rho": True}, "PairsConfig: rho must be a number, got True"),
    ],
)
def test_bad_numbers(change: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        replace(CONFIG, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "teacher": (None, "a", Denoiser()),
        "config": (None, "a", {}),
        "out": (None, 1, b"pairs"),
        "worker": (None, "a", 1, (0,), (0.0, 1), (2, 2), (True, 2), (-1, 2)),
        "device": (None, 1, "quantum", "cuda:99"),
        "progress": (None, "no", 0),
    }.items(),
)
def test_wrong_values_are_named(name: str, values: tuple[object, ...], tmp_path: Path) -> None:
    given = {"teacher": Teacher(Denoiser(), SHAPE), "config": CONFIG, "out": tmp_path / "pairs"}
    for value in values:
        with pytest.raises(
            (ValueError, TypeError), match=rf"{name}\b.* {re.escape(repr(value)[:9])}"
        ):
            generate(**{**given, name: value})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "denoiser": (None, "a", 1.0),
        "shape": (None, 2, "a", (2.5,), (-1,), (True,)),
        "classes": (None, "a", -1, 1.5, True),
        "precondition": ("a", 0.0, math.nan, [0.5], True),
        "digest": (None, 1, b"x"),
    }.items(),
)
def test_wrong_teachers_are_named(name: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises((ValueError, TypeError), match=rf"^Teacher: .*\b{name}\b"):
            Teacher(**{"denoiser": Denoiser(), "shape": SHAPE, name: value})  # type: ignore[arg-type]


def test_indices_are_looked_at(whole: Path) -> None:
    data = PairDataset(whole)
    for right in ([3, 1], np.array([3, 1]), torch.tensor([3, 1], dtype=torch.int32)):
        assert all(map(torch.equal, data.batch(right), data.batch(torch.tensor([3, 1]))))
    for wrong in (torch.tensor([True, False]), torch.tensor([1.0]), torch.tensor(1), [1.0], 1):
        with pytest.raises(TypeError, match="PairDataset: indices must be integers"):
            data.batch(wrong)  # type: ignore[arg-type]
    for index in (-1, 37):
        with pytest.raises(IndexError, match=rf"indices must be in \[0, 37\), got {index}"):
            data.batch(torch.tensor([0, index]))
    for one in ("a", None, True, 1.0, torch.tensor(True)):
        with pytest.raises(TypeError, match="PairDataset: index must be an integer, got"):
            data[one]  # type: ignore[index]
        with pytest.raises(TypeError, match="PairDataset: indices must be"):
            data.__getitems__([one])  # type: ignore[list-item]
    assert data.batch(torch.empty(0, dtype=torch.int64)) == ()
    for folder in (None, 1, b"x", ""):
        with pytest.raises(TypeError, match="PairDataset: folder must be a path, got"):
            PairDataset(folder)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"digest: module must be an nn\.Module, got None"):
        pairs.digest(None)  # type: ignore[arg-type]


def test_bad_teachers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="digest must be given"):
        Teacher(lambda x, sigma: x, SHAPE)
    with pytest.raises(ValueError, match=r"worker must be \(i, n\)"):
        make(tmp_path, worker=(2, 2))
    nan = Teacher(lambda x, sigma: x * torch.nan, SHAPE, digest="nan")
    with pytest.raises(ValueError, match="edm_sample: the state is not finite at step 0"):
        generate(nan, CONFIG, tmp_path, device="cpu", progress=False)
    assert not list(tmp_path.glob("*pairs-*"))


def fixed_teacher() -> Teacher:
    return Teacher(Denoiser(), SHAPE)


def test_command(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--n 37 --seed 5 --steps 3 --batch 4 --shard-size 12 --device cpu"
    out = str(tmp_path / "pairs")
    command = ["pairs", "--teacher", f"{__name__}:fixed_teacher", "--out", out]
    command += options.split()
    assert cli.main([*command, "--shard", "1/2"]) == 0
    assert "2 files to be made by others" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "manifest.json" in capsys.readouterr().out
    assert contents(tmp_path / "pairs") == contents(whole)
    for teacher, message in (
        (f"{__name__}:nothing", "cannot be imported"),
        (f"{__name__}:CONFIG", "not callable"),
        (
            "json:dumps",
            "teacher: json:dumps must be a fewstep.data.generate.Teacher, or return one",
        ),
        (":x", "teacher: must be a folder, a checkpoint or MODULE:NAME, got ':x'"),
        ("", "teacher: must be a folder, a checkpoint or MODULE:NAME, got ''"),
        (".x:y", "teacher: .x:y cannot be imported"),
        (f"{__name__}:Denoiser", "when called without arguments, got Denoiser"),
        (str(tmp_path), "holds no run of fewstep"),
    ):
        assert cli.main(["pairs", "--teacher", teacher, "--out", out]) == 2
        assert message in capsys.readouterr().err


def test_the_earlier_path_has_all_names() -> None:
    names: dict[str, object] = {}
    exec("from fewstep.pairs import *", names)
    assert names["generate"] is generate
    assert names["PairDataset"] is PairDataset
