"""The kernels are judged on a device, if there is one, and then serve calls there by default."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.verification import choice, decision, record
from fewstep.verification.record import Entry

GROUP = ("sinkhorn", "float32", "small", "differences")
HEUN = ("heun", "float32")
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setenv("FEWSTEP_VERIFY", "auto")
    monkeypatch.delenv("FEWSTEP_BACKEND", raising=False)
    monkeypatch.setattr(choice, "_CHOSEN", {})


def interpreted() -> bool:
    return bool(torch.cuda.get_device_properties(0).name == "PTX interpreter")


def judged(group: record.Group, only: str) -> Entry:
    device, entry = torch.zeros(1, device="cuda").device, record.new_entry()
    of = record.identity(device)
    limits = {"deadline": time.monotonic() + 200, "case_seconds": 100.0}
    assert decision.verify_groups(device, {group: entry}, of, only=only, **limits) == ""
    return entry


@pytest.mark.parametrize(
    ("group", "only"), [(GROUP, "N, M, D = (1, 1, 9"), (HEUN, "(5, 7)")], ids=["sinkhorn", "heun"]
)
def test_kernels_match(group: record.Group, only: str) -> None:
    entry = judged(group, only)
    found = [(v["status"], v["error"]) for own in entry["verdicts"].values() for v in own.values()]
    assert len(found) >= 6
    assert {status for status, _ in found} == {record.MATCH}
    assert 0 < max(error for _, error in found) < 1


@pytest.mark.parametrize(("mistake", "status"), [("wrong", "wrong"), ("crash", "crash")])
def test_mistakes_are_found(mistake: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreted():
        pytest.skip("mistakes are planted on the interpreter")
    monkeypatch.setenv("PTX_PLANT", f"cuda:{mistake}")
    entry = judged(GROUP, "N, M, D = (1, 1, 9")
    assert {v["status"] for v in record.failures(entry, "cuda").values()} == {status}
    assert record.failures(entry, "triton") == {}


def test_a_first_call_waits_and_is_served_by_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PTX_CASES", "2")
    x, y = torch.randn(2, 1, 9, 3, device="cuda").unbind()
    result = fewstep.sinkhorn(x, y, eps=1.0, max_iter=3)
    err = capsys.readouterr().err
    assert "verifying sinkhorn float32 small differences on " in err
    entry = record.read(record.identity(x.device))[record.title(GROUP)]
    assert record.matched(entry, "cuda")
    if interpreted():
        assert result._problem.backend in ("cuda", "triton")
    again = fewstep.sinkhorn(x, y, eps=1.0, max_iter=3)
    assert torch.equal(again.f, result.f)
    assert capsys.readouterr().err == ""
