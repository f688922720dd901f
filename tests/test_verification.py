"""The verification of kernels and the choice by it, with planted kernels in planted processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fewstep
from fewstep import info
from fewstep._files import locked
from fewstep.cli import main
from fewstep.ops.dual import dispatch as duals
from fewstep.ops.heun import dispatch as heun
from fewstep.ops.sinkhorn import dispatch as sinkhorn
from fewstep.ops.sinkhorn import dispatch_drift as drift
from fewstep.reference.sinkhorn import PRECISIONS, Points
from fewstep.verification import (
    catalogue,
    choice,
    decision,
    networks,
    record,
    report,
    supervisor,
    transport,
    worker,
)
from fewstep.verification.choice import PLAIN, choose_backend, default_order
from fewstep.verification.record import Entry
from support.verify_worker import GROUP, NAMES, TABLE

CPU = torch.device("cpu")
TITLE = record.title(GROUP)
BOTH = {"cuda": ["match", 10.0], "triton": ["match", 1.0], "reference": ["", 40.0]}


class Device:
    """A device that is not there, and what its kernels do."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.starts = folder / "starts"
        self.properties = SimpleNamespace(name="Planted", major=9, minor=0)
        monkeypatch.setattr(choice, "is_cuda", lambda device: True)
        for module in (choice, decision, report):
            monkeypatch.setattr(module, "unavailable", lambda backend, device: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: self.properties)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-m", "support.verify_worker"))
        monkeypatch.setenv("FEWSTEP_CACHE", str(folder / "cache"))
        monkeypatch.setenv("STARTS", str(self.starts))
        monkeypatch.delenv("FEWSTEP_VERIFY", raising=False)
        monkeypatch.delenv("FEWSTEP_BACKEND", raising=False)
        monkeypatch.setattr(choice, "_CHOSEN", {})
        monkeypatch.setattr(decision, "_UNABLE", {})
        monkeypatch.setattr(decision, "SECONDS", 300.0)  # on a busy machine a start takes long
        self.plant(BOTH)

    def plant(self, what: dict[str, Any]) -> None:
        self.monkeypatch.setenv("PLANTED", json.dumps(BOTH | what))

    def order(self) -> tuple[str, ...]:
        return default_order(CPU, GROUP)

    def started(self) -> int:
        return len(self.starts.read_text().splitlines()) if self.starts.exists() else 0

    def forget(self) -> None:
        """As in another process."""
        choice._CHOSEN.clear()

    @property
    def identity(self) -> dict[str, str]:
        return record.identity(CPU)

    @property
    def entry(self) -> Entry:
        return record.read(self.identity)[TITLE]

    def stub(self) -> list[supervisor.Job]:
        """Nothing is started: every kernel matches at once. Returns the jobs that were given."""
        jobs: list[supervisor.Job] = []

        def run(job: supervisor.Job, take: Callable[[supervisor.Message], None]) -> str:
            jobs.append(job)
            for backend, ms in (("cuda", 3.0), ("triton", 1.0), ("reference", 9.0)):
                own = {"group": list(GROUP), "backend": backend}
                if backend != "reference":
                    take(own | {"case": NAMES[0], "status": "match", "error": 0.1})
                take(own | {"case": "time", "status": "timed", "ms": ms})
            return ""

        self.monkeypatch.setattr(supervisor, "run", run)
        return jobs


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(tmp_path, monkeypatch)


def test_what_matched_serves_by_its_speed(
    device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device.order() == ("triton", "cuda", *PLAIN)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fewstep: verifying {TITLE} on Planted against float64")
    assert "FEWSTEP_VERIFY=off skips" in line
    assert set(device.entry["verdicts"]) == set(NAMES)
    for _ in range(2):
        device.forget()
        assert device.order() == ("triton", "cuda", *PLAIN)
    assert device.started() == 1
    assert capsys.readouterr().err == ""
    summary = "\n".join(decision.summary(CPU))
    assert f"  {TITLE}" in summary
    assert "x plain torch; cuda" in summary


@pytest.mark.parametrize(
    ("triton", "cuda"), [("wrong", "match"), ("nan", "unserved"), ("unequal", "slow")]
)
def test_wrong_and_slow_kernels_do_not_serve(
    device: Device, triton: str, cuda: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = cuda == "slow"
    device.plant({"triton": [triton, 0.1], "cuda": ["match", 150.0] if slow else [cuda, 1.0]})
    assert device.order() == (*(["cuda"] if cuda == "match" else []), *PLAIN)
    assert record.matched(device.entry, "cuda") == (cuda != "unserved")
    assert len(record.failures(device.entry, "triton")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"triton does not serve {TITLE} on Planted" in last
    assert NAMES[0] in last


def test_a_crash_and_a_hang_cost_no_other_kernel(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision, "CASE_SECONDS", 5.0)
    device.plant({"triton": ["crash", 0.1]})
    assert device.order() == ("cuda", *PLAIN)
    (failed,) = record.failures(device.entry, "triton").values()
    assert failed["status"] == "crash"
    assert failed["note"].startswith("SIGSEGV")
    assert device.started() == 2
    device.plant({"triton": ["hang", 0.1]})
    monkeypatch.setenv("FEWSTEP_VERIFY", "force")
    monkeypatch.setattr(decision, "_STARTED", time.time())
    device.forget()
    assert device.order() == ("cuda", *PLAIN)
    (failed,) = record.failures(device.entry, "triton").values()
    assert (failed["status"], failed["note"]) == ("hang", "no answer in 5 s")


def test_an_error_ends_its_process_and_another_one_goes_on(device: Device) -> None:
    device.plant({"cuda": ["raise", 0.1]})
    assert device.order() == ("triton", *PLAIN)
    (failed,) = record.failures(device.entry, "cuda").values()
    assert failed["status"] == "error"
    assert "illegal memory access" in failed["note"]
    assert device.started() == 2


def test_without_memory_nothing_is_said_of_a_kernel(device: Device) -> None:
    device.plant({"triton": ["memory", 0.1], "cuda": ["killed", 0.1]})
    assert device.order() == PLAIN
    assert not device.entry["done"]
    device.plant({"cuda": ["unserved", 0.1]})
    device.forget()
    assert device.order() == ("triton", *PLAIN)


def test_out_of_time_is_plain_torch_and_goes_on_later(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(job: supervisor.Job, take: Callable[[supervisor.Message], None]) -> str:
        own = {"group": list(GROUP), "case": NAMES[0], "backend": "cuda"}
        take(own | {"status": "match", "error": 0.1})
        return supervisor.OUT_OF_TIME

    monkeypatch.setattr(supervisor, "run", run)
    assert device.order() == PLAIN
    assert "plain torch in this process: out of time" in capsys.readouterr().err
    jobs = device.stub()
    assert device.order() == PLAIN  # the choice is that of the process
    device.forget()
    assert device.order() == ("triton", "cuda", *PLAIN)
    assert (GROUP, NAMES[0], "cuda") in jobs[0].skip


def test_a_deadline_ends_a_worker(device: Device) -> None:
    started = time.monotonic()
    job = supervisor.Job([GROUP], ["cuda"], "cpu", False, "", 60.0, started + 0.2)
    assert supervisor.run(job, lambda message: None) == supervisor.OUT_OF_TIME
    assert time.monotonic() < started + 5


@pytest.mark.parametrize(
    "command", [("/no/such/python",), (sys.executable, "-c", "raise SystemExit('no device')")]
)
def test_no_process_is_plain_torch(
    device: Device,
    command: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(supervisor, "COMMAND", command)
    assert device.order() == PLAIN
    last = capsys.readouterr().err.splitlines()[-1]
    assert "is plain torch in this process: " in last
    assert "no process can be started" in last or "exit code 1: no device" in last
    assert "not verified to the end" in "\n".join(decision.summary(CPU))
    assert default_order(CPU, ("heun", "float32")) == PLAIN  # and is not tried again
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace('"status"', '"state"'),
        lambda text: text.replace('"Planted"', '"Other"'),
        lambda text: "\0" * 100,
    ],
)
def test_a_corrupt_record_counts_for_nothing(device: Device, damage: Callable[[str], str]) -> None:
    jobs = device.stub()
    device.order()
    file = record.path(device.identity)
    whole = file.read_text()
    file.write_text(damage(whole))
    assert record.read(device.identity) == {}
    device.forget()
    assert device.order() == ("triton", "cuda", *PLAIN)
    assert len(jobs) == 2
    assert len(device.entry["verdicts"]) == 1


@pytest.mark.parametrize("what", ["build", "driver", "torch", "gpu"])
def test_a_record_of_another_build_or_device_counts_for_nothing(
    device: Device, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = device.stub()
    device.order()
    if what == "gpu":
        device.properties.name = "Other"
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "0.1")
    else:
        monkeypatch.setattr(record, {"build": "build", "driver": "_driver"}[what], lambda: "other")
    assert record.read(device.identity) == {}
    device.forget()
    device.order()
    assert len(jobs) == 2


def test_the_build_is_that_of_library_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    assert record.build() == record.build.__wrapped__()
    monkeypatch.setattr(record, "cuda_library", lambda: Path(__file__))
    assert record.build() != record.build.__wrapped__()


def test_a_cache_that_takes_no_files_is_one_line(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = device.stub()
    (device.folder / "file").touch()
    monkeypatch.setenv("FEWSTEP_CACHE", str(device.folder / "file"))
    for _ in range(2):
        assert device.order() == ("triton", "cuda", *PLAIN)
    assert len(jobs) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "counts for this process alone" in lines[1]


def test_where_the_record_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", "/a/b")
    assert record.folder() == Path("/a/b")
    monkeypatch.delenv("FEWSTEP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert record.folder() == Path("/c/fewstep")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/d")
    assert record.folder() == Path("/d/.cache/fewstep")


def test_off_and_force(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = device.stub()
    monkeypatch.setenv("FEWSTEP_VERIFY", "off")
    assert device.order() == PLAIN
    assert jobs == []
    device.forget()
    monkeypatch.setenv("FEWSTEP_VERIFY", "auto")
    device.order()
    device.forget()
    monkeypatch.setenv("FEWSTEP_VERIFY", "off")  # a record counts all the same
    assert device.order() == ("triton", "cuda", *PLAIN)
    monkeypatch.setenv("FEWSTEP_VERIFY", "force")
    monkeypatch.setattr(decision, "_STARTED", time.time())
    for _ in range(2):  # once in a process, and what another has done since counts
        device.forget()
        device.order()
    assert len(jobs) == 2
    monkeypatch.setenv("FEWSTEP_VERIFY", "yes")
    device.forget()
    with pytest.raises(ValueError, match="FEWSTEP_VERIFY must be one of"):
        device.order()


def test_a_capture_takes_plain_torch_and_decides_nothing(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device.stub()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert device.order() == PLAIN
    assert "plain torch in this graph" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert device.order() == ("triton", "cuda", *PLAIN)


def test_another_process_that_verifies_too_long_is_not_waited_for(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decision, "SECONDS", 0.2)
    with locked(record.path(device.identity).with_suffix(".lock"), 0.0) as held:
        assert held
        assert device.order() == PLAIN
    assert "another process was verifying" in capsys.readouterr().err


def test_choices_of_calls(device: Device) -> None:
    device.stub()

    def chosen(reason: Callable[[str], str | None], name: str | None = None) -> str:
        return choose_backend("sinkhorn", CPU, name, reason, lambda: GROUP)

    assert chosen(lambda b: None) == "triton"
    assert chosen(lambda b: "no" if b == "triton" else None) == "cuda"
    assert chosen(lambda b: None, "reference") == "reference"
    device.forget()
    assert chosen(lambda b: "no" if b in ("cuda", "triton", "keops") else None) == "reference"
    assert choice._CHOSEN == {}
    assert choose_backend("sinkhorn", CPU, None, lambda b: "no" if b == "keops" else None) == (
        "reference"
    )


def test_a_compiled_graph_has_the_choice_as_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def decide(*what: object) -> tuple[str, ...]:
        asked.append(what)
        return ("triton",)

    monkeypatch.setattr(choice, "is_cuda", lambda device: True)
    monkeypatch.setattr(choice, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(decision, "decide", decide)
    monkeypatch.setattr(choice, "_CHOSEN", {})

    @torch.compile(fullgraph=True, backend="eager")
    def double(x: torch.Tensor) -> torch.Tensor:
        name = choose_backend("sinkhorn", x.device, None, lambda _: None, lambda: GROUP)
        return 2 * x if name == "triton" else x

    assert double(torch.ones(1)).item() == 2
    assert asked == [(CPU, GROUP)]


@pytest.fixture
def store() -> Iterator[Any]:
    own = dist.HashStore()
    dist.init_process_group("gloo", store=own, rank=0, world_size=1)
    yield dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("others", "mine"),
    [("cuda", ("cuda",)), ("plain", ()), ("none cuda triton", ("cuda", "triton"))],
)
def test_the_first_rank_that_decides_chooses_for_all(
    device: Device, store: Any, others: str, mine: tuple[str, ...]
) -> None:
    device.stub()
    store.set(f"fewstep/{record.build()}/{TITLE}", others)
    assert device.order() == (*mine, *PLAIN)


def test_the_first_rank_tells_the_others(device: Device, store: Any) -> None:
    device.stub()
    assert device.order() == ("triton", "cuda", *PLAIN)
    assert store.get(f"fewstep/{record.build()}/{TITLE}") == b"triton cuda"


def test_no_rank_takes_what_did_not_match_here(device: Device, store: Any) -> None:
    device.plant({"cuda": ["wrong", 0.1]})
    store.set(f"fewstep/{record.build()}/{TITLE}", "cuda triton")
    assert device.order() == ("triton", *PLAIN)


PROCESS = """
import os, sys, torch
import torch.distributed as dist
from types import SimpleNamespace
from fewstep.verification import choice, decision, supervisor
from support.verify_worker import GROUP

choice.is_cuda = lambda device: True
decision.SECONDS = 300.0
for module in (choice, decision):
    module.unavailable = lambda backend, device: None
torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda _: SimpleNamespace(name="Planted", major=9, minor=0)
torch.cuda.is_current_stream_capturing = lambda: False
supervisor.COMMAND = (sys.executable, "-m", "support.verify_worker")
if rank := sys.argv[1:]:
    store = f"file://{os.environ['STARTS']}-store"
    dist.init_process_group("gloo", init_method=store, rank=int(rank[0]), world_size=2)
print(*choice.default_order(torch.device("cpu"), GROUP))
if rank:
    dist.barrier()
    dist.destroy_process_group()
"""


def processes(*own: tuple[dict[str, str], list[str]]) -> list[tuple[str, str]]:
    """What processes that run at once print, each with its environment and arguments."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    begun = [
        subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], env=env | more, **pipes)
        for more, arguments in own
    ]
    return [process.communicate(timeout=300) for process in begun]


def test_processes_at_once_share_one_verification(device: Device) -> None:
    said = processes(({}, []), ({}, []))
    assert [out.split() for out, _ in said] == [["triton", "cuda", *PLAIN]] * 2
    assert sum("verifying" in err for _, err in said) == 1
    assert device.started() == 1


def test_ranks_of_two_machines_agree(device: Device, tmp_path: Path) -> None:
    """Each has a record of its own, and finds another kernel faster."""
    other = json.dumps(BOTH | {"cuda": ["match", 0.1]})
    said = processes(
        ({}, ["0"]), ({"PLANTED": other, "FEWSTEP_CACHE": str(tmp_path / "other")}, ["1"])
    )
    orders = [out.split() for out, _ in said]
    assert orders[0] == orders[1]
    assert set(orders[0]) == {"triton", "cuda", *PLAIN}
    assert device.started() == 2


def test_the_command(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "table", lambda: TABLE)
    assert main(["verify", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == report.HEADER
    rows = [line.split()[4:] for line in lines[4:6]]
    assert [row[:3] for row in rows] == [["cuda", "yes", "2"], ["triton", "yes", "2"]]
    assert all(row[-1].endswith("x") for row in rows)
    assert lines[-1].startswith("all kernels matched; the record is ")
    before = record.path(device.identity).read_text()
    device.plant({"triton": ["wrong", 0.1]})
    assert main(["verify", "--device", "cpu", "--only", f"{TITLE}: {NAMES[1]}"]) == 1
    out = capsys.readouterr().out
    assert "triton, wrong: value is off by 100 of what is allowed" in out
    assert f'fewstep verify --only "{TITLE}: {NAMES[1]}"' in out
    assert record.path(device.identity).read_text() == before
    assert main(["verify", "--device", "cpu", "--only", "no such case"]) == 2
    assert device.order() == ("triton", "cuda", *PLAIN)


def test_the_page_of_info_has_the_record(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Planted")
    assert "none yet" in info.report()
    device.stub()
    device.order()
    page = info.report()
    assert f"  {TITLE}" in page
    assert "triton 9.0x plain torch; cuda 3.0x plain torch" in page


def test_without_a_device_the_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify"]) == 2
    assert capsys.readouterr() == ("", "fewstep: verify: torch finds no CUDA device\n")
    with pytest.raises(ValueError, match="no CUDA device"):
        fewstep.verify()


def test_cases_have_names_of_their_own() -> None:
    for group, (cases, timing) in catalogue.table().items():
        assert len({case.name for case in cases}) == len(cases)
        assert {case.group for case in cases} == {group} == {timing.group}


@pytest.mark.parametrize(
    "run", [transport._large_transport, transport._large_drift, networks._large_pass]
)
def test_cases_of_large_indices_are_right_where_they_are_small(run: Callable[..., Any]) -> None:
    found, exact = (run("cpp", CPU, wide, elements=2**18) for wide in (False, True))
    assert 0 < worker.compare(found, exact, tf32=False)[0] < 1


@pytest.mark.parametrize("group", catalogue.table(), ids=record.title)
def test_cases_hold_the_cpu_to_the_contract(group: record.Group) -> None:
    """A few of every group, by the kernels of the CPU, which have all options."""
    some = [case for case in catalogue.table()[group][0] if not case.elements]
    for case in some[:: max(len(some) // 3, 1)][:3]:
        exact = case.run("reference", CPU, True)
        verdict = worker.judge(case, "cpp", CPU, lambda exact=exact: exact)
        assert verdict["status"] in (record.MATCH, record.UNSERVED), (case.name, verdict)


def test_calls_are_of_groups_with_cases() -> None:
    known = set(catalogue.table())
    sizes = [(1, 1), (128, 128), (129, 128), (512, 256), (100, 257), (600, 3)]
    dtypes, dims = (torch.float32, torch.float64), (1, 16, 17, 300)
    for (n, m), d, dtype, how in itertools.product(sizes, dims, dtypes, PRECISIONS):
        x, y = torch.empty(2, n, d, dtype=dtype), torch.empty(2, m, d, dtype=dtype)
        assert sinkhorn.group(Points(x, y, precision=how)) in known
        for joint in (False, True):
            assert drift.group(x, [m, m], joint, how) in known
        if dtype == torch.float32:  # the kernels have no other
            ends = torch.tensor([0, n])
            ragged = Points(x[:1], y[:1], segments=(ends, ends), precision=how)
            assert sinkhorn.group(ragged) in known
    assert {heun.group(dtype) for dtype in networks.NETWORKS} <= known
    assert {duals.group(dtype) for dtype in dtypes} <= known
    assert duals.group(torch.float32, torch.bfloat16) in known


def test_a_group_without_cases_is_plain_torch(device: Device) -> None:
    assert default_order(CPU, ("heun", "float8_e4m3fn")) == PLAIN
    assert not decision._UNABLE
