"""Runs over several ranks: the losses of one process, files by one rank, and no hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.training import checkpoint
from support import train_ranks as cases
from support.processes import Found, of_processes

pytestmark = pytest.mark.filterwarnings("ignore:.*real beside")


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Found], Path]:
    """What each rank has found, by case, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("ranks")
    return of_processes(cases.__file__, request.param, folder), folder


def logged(text: str) -> dict[tuple[int, str], float]:
    rows = (line.split(",") for line in text.splitlines()[1:])
    return {(int(step), name): float(value) for step, name, value in rows}


def assert_same_log(found: str, want: str) -> None:
    a, b = logged(found), logged(want)
    assert a.keys() == b.keys()
    for key, value in b.items():
        if key[1] not in ("residual", "tangent"):  # a maximum near 0, and a root of a mean
            assert a[key] == pytest.approx(value, rel=2e-4, abs=1e-5), key


@pytest.mark.parametrize("name", cases.SETTINGS)
def test_the_losses_are_those_of_one_process(
    ranks: tuple[list[Found], Path], tmp_path: Path, name: str
) -> None:
    want = cases.train(name, tmp_path / "one", accumulate=1, shard=False)
    for rank in ranks[0]:
        assert_same_log(rank[name]["log"], want["log"])
        assert torch.equal(rank[name]["weights"], ranks[0][0][name]["weights"])


def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: tuple[list[Found], Path], tmp_path: Path
) -> None:
    cases.train("wflow", tmp_path / "run")
    want = cases.train("wflow", tmp_path / "run", resume=True, steps=6)
    assert_same_log(ranks[0][0]["longer"]["log"], want["log"])
    one = cases.train("wflow", ranks[1] / "wflow", resume=True, steps=8)
    assert_same_log(one["log"], cases.train("wflow", tmp_path / "run", resume=True, steps=8)["log"])
    # One process takes a folder that sharded ranks have left.
    assert ranks[0][0]["sharded, longer"]["log"].count("loss") == 6


REFUSED = {
    "shard": "shard needs several ranks and a method of one network",
    "batch": "batch must be divisible by",
    "points": "batch, for 5 classes on",
    "settings": "lr must be the same on all ranks of process_group, got 0.002 on rank 0",
    "used": "holds a run already: give --resume or --overwrite",
    "other": "is not the configuration of a run of lines",
    "group": "process_group must be a process group of torch.distributed, got 'gloo'",
    "folder": "the number of steps done must be the same on all ranks of process_group, got 6 on",
    "diverged": "FloatingPointError: not finite at step",
}


def test_what_is_wrong_raises_on_all_ranks(ranks: tuple[list[Found], Path]) -> None:
    for rank in ranks[0]:
        said = rank["refusals"]
        assert said.keys() == REFUSED.keys()
        assert {n: said[n] for n, text in REFUSED.items() if text not in said[n]} == {}


@pytest.mark.parametrize("name", ["meanflow", "reflow", "lines"])
def test_accumulated_gradients_are_those_of_the_batch(tmp_path: Path, name: str) -> None:
    logs = [cases.train(name, tmp_path / str(k), accumulate=k, batch=12)["log"] for k in (1, 3, 12)]
    for log in logs[1:]:
        assert_same_log(log, logs[0])


def test_clipped_gradients(tmp_path: Path) -> None:
    first = cases.train("meanflow", tmp_path / "a", accumulate=1)
    loose = cases.train("meanflow", tmp_path / "b", accumulate=1, clip=1e9)
    tight = cases.train("meanflow", tmp_path / "c", accumulate=1, clip=1e-12)
    assert torch.equal(first["weights"], loose["weights"])
    # Adam's step does not depend on the size of gradients well above its own 1e-8.
    assert (first["weights"] - tight["weights"]).abs().max() > 1e-5


@pytest.mark.parametrize("name", [n for n in cases.SETTINGS if "sharded" not in n])
def test_networks_in_bfloat16(tmp_path: Path, name: str) -> None:
    want = cases.train(name, tmp_path / "a", accumulate=1)
    found = cases.train(name, tmp_path / "b", accumulate=1, precision="bf16")
    a, b = logged(found["log"]), logged(want["log"])
    assert a.keys() == b.keys()
    assert a != b
    for key, value in b.items():
        if "loss" in key[1]:
            assert a[key] == pytest.approx(value, rel=0.1, abs=0.02), key
    assert found["weights"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wflow", "meanflow"])
def test_compiled_networks(tmp_path: Path, name: str) -> None:
    want = cases.train(name, tmp_path / "a", accumulate=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo looks at the .grad of what is no leaf
        found = cases.train(name, tmp_path / "b", accumulate=1, compile=True)
    assert_same_log(found["log"], want["log"])


def torchrun(out: Path, *more: str, ranks: int = 2) -> subprocess.Popen[str]:
    """`fewstep train wflow` under torchrun."""
    options = "--batch 12 --width 8 --depth 1 --log-every 1 --lr 0.001 --device cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "fewstep", "train", "wflow"]
    command += ["--data", cases.data(out.parent), "--out", str(out), *options.split(), *more]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("fewstep: ")]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def started(process: subprocess.Popen[str], out: Path) -> None:
    """Wait for a checkpoint."""
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    return out, err


@pytest.mark.slow
def test_torchrun_trains(tmp_path: Path) -> None:
    process = torchrun(tmp_path / "run", "--steps", "4")
    out, err = ended(process)
    assert process.returncode == 0, err
    assert out.count("samples.png") == 1
    assert lines(err) == []
    one = cases.registry.TRAINERS["wflow"]
    one.train(one.read_run(tmp_path / "run").config, tmp_path / "one", progress=False)
    logs = [(tmp_path / name / "metrics.csv").read_text() for name in ("run", "one")]
    assert_same_log(*logs)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all(tmp_path: Path, rank: int) -> None:
    process = torchrun(tmp_path / "run", "--steps", "100000", "--checkpoint-every", "3")
    started(process, tmp_path / "run")
    os.kill(children(process.pid)[rank], signal.SIGKILL)
    _, err = ended(process)
    assert process.returncode != 0
    (line,) = lines(err)
    assert "another rank ended" in line
    assert "--resume continues" in line
    done = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")[1]
    again = torchrun(tmp_path / "run", "--steps", "100000", "--resume", ranks=3)
    started(again, tmp_path / "run")
    deadline = time.monotonic() + 120
    while checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")[1] == done:
        assert again.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    again.send_signal(signal.SIGTERM)
    _, err = ended(again)
    assert len(lines(err)) == 1
    assert "stopped after step" in lines(err)[0]
    assert not [p for p in (tmp_path / "run").iterdir() if "tmp" in p.name]


@pytest.mark.slow
def test_a_full_disk_ends_all(tmp_path: Path) -> None:
    """A file may grow to 100 kB here, and a checkpoint is larger."""
    code = (
        "import resource, signal, sys;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from fewstep.cli import main; raise SystemExit(main())"
    )
    script = tmp_path / "limited.py"
    script.write_text(code)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), "train", "wflow", "--out", str(out)]
    command += ["--data", cases.data(tmp_path), "--steps", "20", "--checkpoint-every", "3"]
    command += ["--batch", "8", "--device", "cpu", "--lr", "0.001"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done: Any = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode != 0
    (line,) = lines(done.stderr)
    assert "File too large" in line or "cannot be written" in line
    assert [p.name for p in out.glob("*.safetensors*")] == []


@pytest.mark.slow
def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    process = torchrun(tmp_path / "run", "--steps", "4", "--groups", "5", "--batch", "7")
    _, err = ended(process)
    assert process.returncode != 0
    (line,) = lines(err)
    assert "batch, for 5 classes on 2 ranks, must be divisible by" in line
