"""`fewstep.verify` and the command of that name: every kernel on this device, and a table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep import __version__
from fewstep._files import locked
from fewstep._library import KERNELS, unavailable
from fewstep.verification import cases, catalogue, record, supervisor
from fewstep.verification.decision import verify_groups
from fewstep.verification.record import Entry, Group

CASE_SECONDS = 120.0
HEADER = (
    f"{'calls':<42}{'backend':<9}{'match':<9}{'cases':>6}{'error':>8}{'ms':>10}{'over torch':>12}"
)


@dataclass(frozen=True)
class Verification:
    """What `verify` returns.

    Attributes:
        matched: whether all kernels matched in all cases that this device serves.
        table: a line for the kernels of each group of calls, then each case that did not match.
        record: the file that later processes choose by.
    """

    matched: bool
    table: str
    record: Path


def verify(
    device: torch.device | str = "cuda",
    *,
    only: str = "",
    minutes: float = 60.0,
    say: Callable[[str], None] | None = None,
) -> Verification:
    """Run every GPU kernel on a device and compare it with float64.

    Forward and backward, by the contract of docs/numerics.md, twice for equal bits, and timed
    beside plain torch. The cases run in a process of their own, and another one goes on where a
    kernel crashes, hangs or raises. What matched and is faster than plain torch is the default on
    this device from then on: see docs/gpu.md.

    Args:
        device (torch.device | str): a CUDA device.
        only (str): cases whose line has this text. The record is then left as it is.
        minutes (float): how long it may take.
        say (Callable | None): is given each line as it is known.

    Returns:
        Verification: `matched`, `table` and `record`.

    Raises:
        ValueError: no device or no kernels, no such case, or another process is verifying.
    """
    if not torch.cuda.is_available():
        raise ValueError("verify: torch finds no CUDA device")
    device = torch.device(device)
    available = [b for b in KERNELS if unavailable(b, device.type) is None]
    if not available:
        whys = "; ".join(f"{b}: {unavailable(b, device.type)}" for b in KERNELS)
        raise ValueError(f"verify: no kernels for this device: {whys}")
    wanted = [g for g in catalogue.table() if set(cases.backends(g)) & set(available)]
    wanted = [g for g in wanted if next(catalogue.of([g], full=True, only=only), None) is not None]
    if not wanted:
        raise ValueError(f"verify: no case has {only!r} in its line")
    of = record.identity(device)
    lines: list[str] = []

    def add(line: str) -> None:
        lines.append(line)
        if say is not None:
            say(line)

    add(f"fewstep {__version__} ({of['fewstep']}) on {of['gpu']}, {of['capability']}")
    add(f"{of['driver']}; torch {of['torch']}, triton {of['triton']}")
    add("")
    add(HEADER)
    deadline = time.monotonic() + 60 * minutes
    failed: list[str] = []
    with locked(record.path(of).with_suffix(".lock"), 1.0) as held:
        if not held:
            raise ValueError("verify: another process is verifying this device")
        for group in wanted:
            entry = record.new_entry()
            note = verify_groups(
                *(device, {group: entry}, of),
                deadline=deadline,
                case_seconds=CASE_SECONDS,
                full=True,
                only=only,
            )
            for backend in (b for b in cases.backends(group) if b in available):
                state, line = row(group, backend, entry, bool(only))
                add(line)
                if state not in ("yes", "unserved"):
                    failed += problems(group, backend, entry)
            if note not in ("", supervisor.OUT_OF_TIME):
                break  # the next group would not get a process either
    for line in ["", *failed] if failed else []:
        add(line)
    return Verification(not failed, "\n".join(lines), record.path(of))


def row(group: Group, backend: str, entry: Entry, some: bool = False) -> tuple[str, str]:
    """Whether kernels matched, and their line of the table."""
    verdicts = [v[backend] for v in entry["verdicts"].values() if backend in v]
    judged = [v for v in verdicts if v["status"] != record.UNSERVED]
    if record.failures(entry, backend):
        state = "NO"
    elif not (entry["done"] or (some and not entry["note"])):
        state = "not run"
    else:
        state = "yes" if judged else "unserved"
    errors = [float(v["error"]) for v in judged if "error" in v]
    error = f"{max(errors):.2g}" if errors else ""
    ms, plain = (entry["ms"].get(name) for name in (backend, "reference"))
    timed = f"{ms:.3g}" if ms is not None else ""
    speed = f"{plain / ms:.1f}x" if ms and plain is not None else ""
    line = f"{record.title(group):<42}{backend:<9}{state:<9}{len(judged):>6}{error:>8}"
    return state, f"{line}{timed:>10}{speed:>12}".rstrip()


def problems(group: Group, backend: str, entry: Entry) -> list[str]:
    """Each case that did not match, as the options of the command that runs it again."""
    found = []
    for case, verdict in record.failures(entry, backend).items():
        found.append(f"{backend}, {verdict['status']}: {verdict.get('note', '')}")
        found.append(f'    fewstep verify --only "{record.title(group)}: {case}"')
    if not found:
        found.append(f"{backend}, not run: {record.title(group)}: {entry['note']}")
    return found


def main(argv: list[str]) -> int:
    """The command; returns 0 if all matched, 1 if not.

    Raises:
        ValueError: there is nothing to verify.
    """
    parser = argparse.ArgumentParser(
        prog="fewstep verify", description="Run every GPU kernel here and compare it with float64."
    )
    parser.add_argument(
        "--device", default="cuda", help="device to verify, such as cuda:1 (default: cuda)"
    )
    parser.add_argument(
        "--only", default="", help="text that the line of a case must have (default: all run)"
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="minutes that it may take (default: 60)"
    )
    args = parser.parse_args(argv)

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    found = verify(args.device, only=args.only, minutes=args.minutes, say=say)
    kept = "" if args.only else f"; the record is {found.record}"
    say(f"\n{'all kernels matched' if found.matched else 'not all kernels matched'}{kept}")
    return 0 if found.matched else 1
