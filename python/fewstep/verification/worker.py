"""A process that judges cases; `supervisor` starts it, talks to it and ends it."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fewstep._names import Backend
from fewstep.verification import cases, catalogue, contract
from fewstep.verification.cases import Case, Output
from fewstep.verification.record import MATCH, UNSERVED

_NO_DEVICE = 3
_SECONDS = 0.2  # of timed calls
_BYTES = 24  # of memory for each element of a case of large indices


def compare(found: Sequence[Output], exact: Sequence[Output], tf32: bool) -> tuple[float, str]:
    """The largest error as a part of what the contract allows, and of which result."""
    worst, where = 0.0, ""
    for mine, true in zip(found, exact, strict=True):
        part = _part(mine, true, tf32)
        if not part <= worst:  # also where it is NaN
            worst, where = part, mine.name
            if part != part:
                return float("inf"), f"{where}: NaN"
    return worst, where


def _part(mine: Output, true: Output, tf32: bool) -> float:
    a, b = mine.tensor.detach(), true.tensor.detach()
    if a.shape != b.shape:
        return float("inf")
    if mine.kind == "same":
        return 0.0 if torch.equal(a, b) else float("inf")
    if a.numel() == 0:
        return 0.0
    kind = mine.kind
    bound = contract.TF32[kind] if tf32 else contract.bound(kind, a.dtype)
    error = contract.error(kind, a, b, true.scale)
    return error / (bound + mine.unit)


def judge(
    case: Case, backend: Backend, device: torch.device, exact: Callable[[], Any]
) -> dict[str, Any]:
    """A verdict: the status, and what it is about."""
    runs: list[list[Output]] = []
    for _ in range(2 if case.bits else 1):
        try:
            runs.append(case.run(backend, device, False))
            _wait(device)
        except ValueError as error:
            if "cannot serve this call" in str(error):
                return {"status": UNSERVED, "note": str(error)}
            raise
    worst, where = compare(runs[0], exact(), "tf32" in case.group)
    verdict = {"status": MATCH, "error": min(worst, 1e30), "where": where}
    if not worst <= 1:
        note = f"{where} is off by {worst:.3g} of what is allowed"
        return verdict | {"status": "wrong", "note": note}
    for one, other in zip(runs[0], runs[-1], strict=True):
        if not torch.equal(one.tensor, other.tensor):
            return verdict | {"status": "unequal", "note": f"{one.name} differs between two runs"}
    return verdict


def milliseconds(call: Callable[[], object], device: torch.device, most: int) -> float:
    """The median time of a call: between events on a GPU, elsewhere by a clock."""
    call(), call()
    _wait(device)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - start < _SECONDS and len(times) < most):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            before = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - before))
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _enough_memory(case: Case, device: torch.device) -> bool:
    if device.type != "cuda" or not case.elements:
        return True
    return torch.cuda.mem_get_info(device)[0] > _BYTES * case.elements


def serve(request: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """Judge what is asked for; the process is over after a case that raised."""
    device = torch.device(request["device"])
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).add_(1)
        _wait(device)
    except (RuntimeError, AssertionError) as error:
        say({"cannot": f"the device is not to be had by another process: {_line(error)}"})
        sys.exit(_NO_DEVICE)
    say({"ready": True})
    groups = [g for g in map(tuple, request["groups"]) if g in catalogue.table()]
    skip = {tuple(map(_hashable, entry)) for entry in request["skip"]}
    lost = {tuple(map(_hashable, entry)) for entry in request["lost"]}
    known: dict[str, list[Output]] = {}
    for group in groups:
        for case, backend in catalogue.of([group], full=request["full"], only=request["only"]):
            wanted = backend in request["backends"] and (group, backend) not in lost
            if wanted and (group, case.name, backend) not in skip:
                if case.name not in known:
                    known.clear()
                _one(case, backend, device, known, say)
        timing = catalogue.table()[group][1]
        for backend in (*cases.backends(group), "reference"):
            wanted = backend in (*request["backends"], "reference") and (group, backend) not in lost
            if wanted and not request["only"] and (group, "time", backend) not in skip:
                say({"begin": [group, "time", backend]})
                found = {"group": group, "case": "time", "backend": backend, "status": "timed"}
                try:
                    call = timing.make(backend, device)
                    say(found | {"ms": milliseconds(call, device, timing.repeats)})
                except torch.OutOfMemoryError:
                    say(found | {"ms": float("inf")})
                except Exception as error:
                    _ended(found | {"ms": float("inf")}, error, say)
                gc.collect()
    say({"finished": True})


def _one(
    case: Case,
    backend: Backend,
    device: torch.device,
    known: dict[str, list[Output]],
    say: Callable[[dict[str, Any]], None],
) -> None:
    found = {"group": case.group, "case": case.name, "backend": backend}
    say({"begin": [case.group, case.name, backend]})

    def exact() -> list[Output]:
        if case.name not in known:
            known[case.name] = case.run("reference", device, True)
        return known[case.name]

    if not _enough_memory(case, device):
        say(found | {"status": UNSERVED, "note": "it needs more memory than is free"})
        return
    try:
        say(found | judge(case, backend, device, exact))
    except torch.OutOfMemoryError as error:
        status = UNSERVED if case.elements else "memory"
        say(found | {"status": status, "note": _line(error)})
    except Exception as error:
        _ended(
            found | {"status": "error", "note": f"{type(error).__name__}: {_line(error)}"},
            error,
            say,
        )
    gc.collect()


def _ended(found: dict[str, Any], error: Exception, say: Callable[[dict[str, Any]], None]) -> None:
    """After an error the context may be of no more use: another process goes on."""
    say(found)
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    os._exit(0)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def main() -> None:
    """Answer one request on the standard input, and end when that is closed."""
    request = json.loads(sys.stdin.buffer.readline())
    os.set_inheritable(request["answers"], False)  # what this starts may outlive it
    answers = os.fdopen(request["answers"], "w", buffering=1)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    warnings.simplefilter("ignore")  # one that the user has made an error is none of a kernel's
    threading.Thread(target=end_with_parent, daemon=True).start()
    serve(request, lambda message: (answers.write(json.dumps(message) + "\n"), None)[1])
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
