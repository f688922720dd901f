"""Runs the cases in processes of their own: what a kernel breaks there is broken there alone.

A worker gets a request, one line of JSON on its standard input, and lives no longer than that input
is open. It answers with lines of JSON: what it begins, and what came of it. One that dies, or is
silent for too long, costs the kernels of the group it was at; another one does the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewstep.verification.record import Group

COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "fewstep.verification.worker")
OUT_OF_TIME = "out of time"
START_SECONDS = 120.0  # until a worker has its device: imports and the context
Message = dict[str, Any]


@dataclass
class Job:
    """What is to be run.

    Attributes:
        groups: classes of calls.
        backends: whose kernels are judged.
        device: the name of the device.
        full: also cases that need much memory.
        only: what the names of cases must contain.
        case_seconds: how long a case may take.
        deadline: when all has to be over, by `time.monotonic`.
        skip: pairs of a case and a backend that have been judged, by group.
        lost: groups and backends of which no more is run.
    """

    groups: Sequence[Group]
    backends: Sequence[str]
    device: str
    full: bool
    only: str
    case_seconds: float
    deadline: float
    skip: list[tuple[Group, str, str]] = field(default_factory=list)
    lost: list[tuple[Group, str]] = field(default_factory=list)

    def request(self, answers: int) -> bytes:
        names = ("groups", "backends", "device", "full", "only", "skip", "lost")
        own = {name: getattr(self, name) for name in names} | {"answers": answers}
        return json.dumps(own).encode() + b"\n"


def run(job: Job, take: Callable[[Message], None]) -> str:
    """Judge a job's cases; `take` gets each verdict. "", or why not all of them were judged."""
    if not sys.executable:
        return "this Python does not know its own executable"
    while True:
        before = len(job.skip) + len(job.lost)
        try:
            ended = _one_worker(job, take)
        except OSError as error:
            return f"no process can be started: {error}"
        if ended is not None:
            return ended
        if len(job.skip) + len(job.lost) == before:
            return "its processes end without an answer"


def _one_worker(job: Job, take: Callable[[Message], None]) -> str | None:
    """Until a worker ends: "" if it was done, a reason to give up, None if another is needed."""
    with _worker(job) as (process, log, answers):
        begun: list[Any] | None = None
        ready = False
        for message in _messages(answers, job):
            if message is None:
                if time.monotonic() >= job.deadline:
                    return OUT_OF_TIME
                if begun is None:
                    return "its process does not start in time"
                note = f"no answer in {job.case_seconds:.0f} s"
                take(_lost(job, begun, "hang", note))
                return None
            if "cannot" in message:
                return str(message["cannot"])
            if "finished" in message:
                return ""
            ready = True
            if "begin" in message:
                begun = message["begin"]
            elif "status" in message:
                group, backend = tuple(message["group"]), message["backend"]
                job.skip.append((group, message["case"], backend))
                if message["status"] == "error":
                    job.lost.append((group, backend))
                begun = None
                take(message)
        code = process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if begun is not None:
            # Where the host is short of memory, that is said of no kernel.
            status = "memory" if code == -signal.SIGKILL else "crash"
            take(_lost(job, begun, status, f"{how}: {_last_line(log)}"))
            return None
        return None if ready and code == 0 else f"its process ended by {how}: {_last_line(log)}"


def _lost(job: Job, begun: list[Any], status: str, note: str) -> Message:
    group, case, backend = begun
    job.lost.append((tuple(group), backend))
    return {"group": group, "case": case, "backend": backend, "status": status, "note": note}


def _environment() -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k != "FEWSTEP_BACKEND"}
    paths = [p or os.getcwd() for p in sys.path]
    return own | {"FEWSTEP_VERIFY": "off", "PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def _worker(job: Job) -> Iterator[tuple[subprocess.Popen[bytes], Any, int]]:
    """A process, what it prints, and where its answers come from."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        answers, write = os.pipe()
        stack.callback(os.close, answers)
        try:
            process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(),
                pass_fds=(write,),
                start_new_session=True,  # so that compilers it started end with it
            )
        finally:
            os.close(write)
        stack.callback(_end, process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its exit code says more
            process.stdin.write(job.request(write))
            process.stdin.flush()
        yield process, log, answers


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(BrokenPipeError):
        if process.stdin is not None:
            process.stdin.close()


def _messages(answers: int, job: Job) -> Iterator[Message | None]:
    """What a worker writes; None where it is silent for too long."""
    heard, patience, rest = time.monotonic(), START_SECONDS, b""
    while True:
        wait = min(heard + patience, job.deadline) - time.monotonic()
        if wait <= 0 or not select.select([answers], [], [], wait)[0]:
            yield None
            return
        chunk = os.read(answers, 1 << 16)
        if not chunk:
            return
        heard, patience = time.monotonic(), job.case_seconds
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _last_line(log: Any) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "no output")
