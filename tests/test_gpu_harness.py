"""`benchmarks.gpu` and `benchmarks.occupancy`, as far as they go without a device."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import gpu, occupancy
from benchmarks.contenders import CONTENDERS
from benchmarks.gpu_cases import (
    GPU_CASES,
    definition_of,
    draw,
    exact_drift,
    expected,
    least_bytes,
    least_flops,
    timing,
)
from benchmarks.occupancy import Kernel
from benchmarks.peers import BUILDERS, numpy_outputs
from benchmarks.registry import CASES, GRAD_RTOL, VALUE_RTOL
from benchmarks.worker import errors

from fewstep.verification.contract import CONTRACT

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "benchmarks.gpu: torch.cuda.is_available() is False: a CUDA device is needed\n"
    )


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--out", str(tmp_path), "--wheels", str(tmp_path / "none")]):
        with pytest.raises(SystemExit):
            gpu.parse(arguments)
    assert "--wheels must be a folder" in capsys.readouterr().err
    assert gpu.parse(["--out", str(tmp_path)]).minutes < 10


def test_a_failed_stage_does_not_stop_the_others() -> None:
    def broken() -> gpu.Stage:
        raise RuntimeError("first line\nCUDA error: an illegal memory access was encountered")

    reports: list[int] = []
    stages = [("a", broken), ("b", lambda: gpu.Stage("b", True, "fine"))]
    done = gpu.run_stages(stages, lambda stages: reports.append(len(stages)))
    assert [stage.ok for stage in done] == [False, True]
    assert done[0].summary == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert reports == [1, 2]


def test_commands_are_logged_and_limited(tmp_path: Path) -> None:
    runner = gpu.Runner(tmp_path, tmp_path, minutes=1)
    program = "import sys; print('said'); sys.exit(3)"
    assert runner.run("log", [sys.executable, "-c", program], 30) == (3, "said\n")
    assert "said" in (tmp_path / "log").read_text()
    code, text = runner.run("log", [sys.executable, "-c", "import time; time.sleep(60)"], 5)
    assert code is None
    assert gpu.last_line(text) == "stopped after 5 s"
    late = gpu.Runner(tmp_path, tmp_path, minutes=0)
    assert late.run("log", [sys.executable, "-c", program], 30) == (None, "no time left")


def test_first_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = gpu.Runner(tmp_path, tmp_path, minutes=5)
    monkeypatch.setattr(gpu, "FIRST_CALL_SECONDS", 60.0)
    stage = gpu.stage_first_call(runner, "cpu", ["cpp"])
    assert stage.ok, (tmp_path / "first_call.log").read_text()
    assert re.fullmatch(r"cpp [\d.]+ s, then [\d.e-]+ s \(imports [\d.]+ s\)", stage.summary)
    monkeypatch.setattr(gpu, "FIRST_CALL_SECONDS", 0.0)
    stage = gpu.stage_first_call(runner, "cpu", ["none", "cpp"])
    assert not stage.ok
    assert "none failed: ValueError" in stage.summary
    assert "; cpp " in stage.summary


def test_a_crash_costs_one_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(GPU_CASES["n10000_d64"], contenders=("triton", "eager", "compile"))

    class Crashing(gpu.Runner):
        def run(self, log: str, command: object, limit: float) -> tuple[int | None, str]:
            words = list(command)  # type: ignore[call-overload]
            todo = words[words.index("--measure") + 2 : words.index("--result")]
            result = Path(words[words.index("--result") + 1])
            lines: list[dict[str, object]] = []
            for name in todo:
                lines.append({"begun": name})
                if name == "eager":
                    break
                times = timing([2.0 if name == "triton" else 6.0], case, 100, 0)
                lines.append(case.columns() | {"contender": name} | times)
            result.write_text("\n".join(map(json.dumps, lines)))
            return (1, "CUDA error") if "eager" in todo else (0, "")

    stage = gpu.stage_case(Crashing(tmp_path, tmp_path, 1), case, 1.0)
    assert stage.ok
    assert [row["contender"] for row in stage.rows] == ["triton", "eager", "compile"]
    assert stage.rows[1]["note"] == "exit code 1: CUDA error"
    assert stage.rows[0]["speedup_vs_best_peer"] == 3.0
    assert stage.summary == "triton 2 ms; the best peer takes 3.0x as long"

    device = dict.fromkeys(("device", "driver", "torch", "triton", "commit", "date"), "some")
    limits = {"copy_gb_per_s": 3000.0, "tf32_tflop_per_s": 400.0}
    page = gpu.page([stage, gpu.Stage("memcheck", None, "not installed")], limits, device)
    assert "| memcheck | not run | 0 | not installed |" in page
    assert "| triton | 2 (2, 2) |" in page
    assert "exit code 1: CUDA error |" in page
    gpu.write_csv([row | device for row in stage.rows], tmp_path / "gpu.csv")
    with (tmp_path / "gpu.csv").open() as file:
        assert [row["median_ms"] for row in csv.DictReader(file)] == ["2", "", "6"]


def test_floors_are_counted_by_hand() -> None:
    solve = replace(CASES["n512_d64"], batch=2, n=10, m=20, d=3)
    assert least_bytes(solve) == 4 * (2 * 30 * 3 + 2 * 30 + 2 * 30 + 2)
    assert least_flops(solve, 7) == 2 * 10 * 20 * (2 * 3 + 7 * 4)
    drift = replace(CASES["drift_joint_b256_n64_d256"], batch=2, n=10, m=20, d=3)
    assert least_bytes(drift) == 4 * 2 * 3 * (10 + 20 + 20 + 10)
    assert least_flops(drift, 7) == 2 * 10 * 40 * (2 * 3 * 4 + 3 * 7 * 4)


@pytest.mark.parametrize(
    "name", ["b256_n64_d32", "divergence_n256_d64", "drift_joint_b256_n64_d256"]
)
def test_points_of_every_set_have_one_value(name: str) -> None:
    case = replace(CASES[name], batch=3 if CASES[name].batch > 1 else 1, n=12, m=9, d=5)
    definition = definition_of("eager", case)
    assert definition is not None
    problems = draw(case, "cpu", copies=2)
    assert not torch.equal(problems[0].x, problems[1].x)
    first, second = (expected(problem, definition) for problem in problems)
    np.testing.assert_allclose(first[0], second[0], rtol=1e-6)
    # The definition in slices is what the dense one gives on the same points.
    outputs = numpy_outputs(BUILDERS[case.workload, "eager"](problems[0])())
    value_error, grad_error = errors(outputs, first)
    assert value_error < 1e-5
    assert grad_error < 1e-4


def test_slices_of_groups_do_not_matter() -> None:
    case = replace(CASES["drift_split_b16_n64_d256"], batch=5, n=12, m=9, d=5)
    (problem,) = draw(case, "cpu")
    whole, sliced = exact_drift(problem), exact_drift(problem, slice_groups=2)
    torch.testing.assert_close(whole[0], sliced[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(whole[1], sliced[1])


def test_who_takes_part() -> None:
    for case in GPU_CASES.values():
        for name in case.contenders:
            definition = definition_of(name, case)
            if definition is not None and not name.startswith("flash"):
                assert (case.workload, name) in BUILDERS
                assert "cuda" in CONTENDERS[name].devices
    for name in ("b256_n256_d64", "drift_joint_b26752_n64_m72_d512"):
        assert {"cuda", "triton"} <= set(GPU_CASES[name].contenders)
    assert definition_of("flash-sinkhorn", GPU_CASES["n10000_d64"]) == "alternating"
    assert definition_of("flash-sinkhorn", GPU_CASES["n10000_d64_grad"]) is None


def test_resident_blocks() -> None:
    """Against figures of NVIDIA's cuda_occupancy.h, and of AMD's ISA guide."""
    for kernel, dynamic, blocks in (
        (Kernel("sm_80", "", 255, 0, 0, 128), 0, 2),
        (Kernel("sm_90", "", 96, 0, 16640, 256), 0, 2),
        (Kernel("sm_90", "", 64, 0, 64, 512), 116 << 10, 1),
        (Kernel("sm_100", "", 32, 0, 0, 1024), 0, 2),
        (Kernel("sm_80", "", 32, 0, 0, 32), 0, 32),
        (Kernel("gfx942", "", 128, 0, 0, 256), 0, 4),
        (Kernel("gfx942", "", 40, 0, 40 << 10, 256), 0, 1),
    ):
        assert occupancy.resident(kernel, dynamic) == blocks, kernel
    share, dynamic = occupancy.occupancy(Kernel("sm_90", "", 128, 0, 1024, 512))
    assert share == 0.25
    assert dynamic == (228 << 10) - 2048


def test_compiler_output_is_read() -> None:
    log = """
ptxas info    : Compiling entry function '_ZN1a1kIfEEvi' for 'sm_90'
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 33280 bytes smem
ptxas info    : Compiling entry function '_ZN1a1kIdEEvi' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers
"""
    assert occupancy.parse_ptxas(log) == {
        "_ZN1a1kIfEEvi": (168, 40, 33280),
        "_ZN1a1kIdEEvi": (96, 0, 0),
    }
    ptx = ".visible .entry _ZN1a1kIfEEvi(\n.param .u32 p\n)\n.maxntid 512, 1, 1\n{\n}"
    assert occupancy.parse_threads(ptx) == {"_ZN1a1kIfEEvi": 512}


@pytest.mark.skipif(occupancy.nvcc() is None, reason="no nvcc")
def test_compiled_source_has_bounds_and_no_spills(tmp_path: Path) -> None:
    source = tmp_path / "k.cu"
    source.write_text(
        "template <class T> __global__ void __launch_bounds__(96) twice(T* p) "
        "{ __shared__ T s[8]; s[threadIdx.x % 8] = p[0]; __syncthreads(); p[0] = s[1]; }\n"
        "template __global__ void twice(float*);\n"
    )
    (kernel,) = occupancy.compile_cuda(source, "sm_90")
    assert (kernel.name, kernel.threads, kernel.shared, kernel.spills) == (
        "twice<float>",
        96,
        32,
        0,
    )
    assert kernel.registers > 0
    source.write_text("broken")
    with pytest.raises(RuntimeError, match=r"occupancy: k\.cu for sm_90"):
        occupancy.compile_cuda(source, "sm_90")


@pytest.mark.parametrize(
    ("code", "words", "ok"), [(0, "yes yes", True), (1, "yes NO", False), (1, "yes not", None)]
)
def test_the_verification_is_a_stage(
    code: int, words: str, ok: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"heun float{32 << i}  cuda {w} 48\n" for i, w in enumerate(words.split()))
    runner = gpu.Runner(tmp_path, tmp_path, 1.0)
    monkeypatch.setattr(runner, "run", lambda *_: (code, "calls\n" + text))
    stage = gpu.stage_verify(runner)
    assert stage.ok is ok
    assert stage.summary.startswith(f"{words.count('yes')} matched, {words.count('NO')} did not")
    assert runner.env["FEWSTEP_CACHE"] == str(tmp_path)


def test_bounds_are_those_of_the_contract() -> None:
    assert (CONTRACT["value"], CONTRACT["gradient"]) == (VALUE_RTOL, GRAD_RTOL)
