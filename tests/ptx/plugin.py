"""A pytest plugin: the tests of devices (`-m gpu`) with the interpreter as the device.

Tensors stay on the CPU; what asks for "cuda" gets the CPU. A finding of the interpreter that is not
known to be benign fails its test. PTX_TABLE=file takes what was counted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import pytest
import torch
from torch.overrides import TorchFunctionMode

from . import benign, project, sim

CPU = torch.device("cpu")
_found: list[tuple[str, sim.Finding]] = []
_ran: list[str] = []
_rows: list[sim.Count] = []
_mode = pytest.StashKey["OnCpu"]()


def _here(value: Any) -> Any:
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return CPU
    return value


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: _here(v) for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0].clone()
        return func(*(_here(a) for a in args), **kwargs)


def _patch_torch() -> None:
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device = lambda *_: contextlib.nullcontext()
    cuda.synchronize = lambda *_: None
    cuda.current_device = lambda: 0
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = lambda *_: None
    to = torch.nn.Module.to
    torch.nn.Module.cuda = lambda self, *_: self
    torch.nn.Module.to = lambda self, *args, **options: to(
        self, *map(_here, args), **{name: _here(value) for name, value in options.items()}
    )


def pytest_configure(config: pytest.Config) -> None:
    from fewstep.verification import supervisor

    os.environ["FEWSTEP_CACHE"] = str(sim.OUT / "cache")
    sim.options_of_environment()
    project.use_cuda()
    if importlib.util.find_spec("triton") is not None:
        project.use_triton()
    supervisor.COMMAND = (sys.executable, "-m", "ptx.verify_worker")
    _patch_torch()
    config.stash[_mode] = OnCpu()
    config.stash[_mode].__enter__()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "graph" in item.name or "stream" in item.name:
            item.add_marker(pytest.mark.skip(reason="the interpreter has no graphs or streams"))
        elif sim.DEVICE == "b200" and "triton" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="the interpreter has no tcgen05"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    own: list[sim.Finding] = []
    try:
        yield
    except sim.InterpreterError as error:
        if "wgmma" in str(error) and "the opcode" in str(error):
            pytest.skip("the interpreter's wgmma takes tf32 only; PTX_DEVICE=a100 runs this")
        raise
    finally:
        own = sim.findings()
        _found.extend((item.nodeid, f) for f in own)
    _ran.append(item.nodeid)
    wrong = [f for f in own if benign.reason(f) is None]
    if wrong:
        pytest.fail("\n".join(map(_line, wrong)), pytrace=False)


def _line(f: sim.Finding) -> str:
    return f"{f.kind}: {f.kernel}: {f.place}: {f.source()}: {f.detail}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    _rows.extend(sim.counters())
    if _ran and not _rows:  # other code has served the calls
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    write = terminalreporter.write_line
    merged: dict[tuple[str, str, str], tuple[int, str, sim.Finding]] = {}
    for test, f in _found:
        count, first, one = merged.get((f.kind, f.kernel, f.place), (0, test, f))
        merged[f.kind, f.kernel, f.place] = count + f.count, first, one
    write(f"{len(merged)} findings of the interpreter as {sim.DEVICE}")
    for count, test, f in merged.values():
        why = benign.reason(f)
        judged = f"benign: {why}" if why else "NOT KNOWN TO BE BENIGN"
        write(f"- {_line(f)} [{count} times, first in {test}] {judged}")
    if path := os.environ.get("PTX_TABLE"):
        Path(path).write_text(sim.table(_rows) + "\n\n" + sim.worst(_rows, 40) + "\n")
    kernels, threads = len({r.kernel for r in _rows}), sum(r.threads for r in _rows)
    write(f"{kernels} kernels and {threads / 1e6:.0f} million instructions of threads were run")
