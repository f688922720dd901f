"""Which kernels a process takes by default: what a record says, or a process that judges them.

The first call of a group waits for that, where no record of this device and build has it.

With a process group of torch.distributed the first rank that decides puts its choice into the
group's store, and the others take it. That is no collective, which would wait forever where only
some ranks make a call; nor need rank 0 be among them. A rank takes no kernel that has not matched
on its own device. Ranks of one machine share a record by its lock.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch

from fewstep._files import locked
from fewstep._library import KERNELS, unavailable
from fewstep._torch import compare_set
from fewstep.verification import record, supervisor
from fewstep.verification.record import Entry, Group

MODES = ("auto", "off", "force")
SECONDS = 60.0  # that a first call waits at most
CASE_SECONDS = 30.0
ENDED = ("crash", "hang", "error")  # after which no more of a kernel is run

_STARTED = time.time()
_UNABLE: dict[str, str] = {}  # devices that no other process could use, and why


def mode() -> str:
    """`FEWSTEP_VERIFY`.

    Raises:
        ValueError: it is none of the modes.
    """
    found = os.environ.get("FEWSTEP_VERIFY") or "auto"
    if found not in MODES:
        raise ValueError(f"FEWSTEP_VERIFY must be one of {MODES}, got {found!r}")
    return found


def decide(device: torch.device, group: Group) -> tuple[str, ...] | None:
    """Kernels by preference; None where it is not for this call to say."""
    how = mode()
    if not torch.cuda.is_available():  # tensors without memory
        return None
    of = record.identity(device)
    entry = _entry(of, group, how)
    if entry is None:
        if how == "off":
            return ()
        if torch.cuda.is_current_stream_capturing():
            _say(f"{_named(group, of)} is plain torch in this graph: call it once before capture")
            return None
        entry = _verified(device, group, of, how)
    own = record.order(entry)
    text = " ".join(own)
    theirs = compare_set(f"fewstep/{of['fewstep']}/{record.title(group)}", text or "plain")
    if theirs is None:
        return own
    return tuple(b for b in theirs.split() if b in KERNELS and record.matched(entry, b))


def _entry(of: dict[str, str], group: Group, how: str) -> Entry | None:
    """What the record has of a group, if it was judged to the end, and since when it counts."""
    entry = record.read(of).get(record.title(group), record.new_entry())
    return entry if entry["done"] > (_STARTED if how == "force" else 0) else None


def _verified(device: torch.device, group: Group, of: dict[str, str], how: str) -> Entry:
    """What a process of its own finds, or what another process has found meanwhile."""
    if (why := _UNABLE.get(of["gpu"])) is not None:
        return record.new_entry() | {"note": why}
    deadline = time.monotonic() + SECONDS
    lock = record.path(of).with_suffix(".lock")
    with locked(lock, SECONDS) as held:
        if (known := _entry(of, group, how)) is not None:
            return known
        if not held:
            reason = f"another process was verifying for {SECONDS:.0f} s"
            _say(f"{_named(group, of)} is plain torch in this process: {reason}")
            return record.new_entry() | {"note": reason}
        _say(
            f"verifying {_named(group, of)} against float64, once for this GPU, driver and build,"
            f" {SECONDS:.0f} s at most; FEWSTEP_VERIFY=off skips this"
        )
        begun = {} if how == "force" else record.read(of)
        entries = {group: begun.get(record.title(group), record.new_entry())}
        verify_groups(device, entries, of, deadline=deadline, case_seconds=CASE_SECONDS)
    entry = entries[group]
    for backend in KERNELS:
        for case, v in list(record.failures(entry, backend).items())[:1]:
            _say(
                f"{backend} does not serve {_named(group, of)}: {v['status']} in {case!r}"
                f" ({v.get('note', '')}); `fewstep verify` says more"
            )
    if not entry["done"]:
        _say(f"{_named(group, of)} is plain torch in this process: {entry['note']}")
    return entry


def verify_groups(
    device: torch.device,
    entries: dict[Group, Entry],
    of: dict[str, str],
    *,
    deadline: float,
    case_seconds: float,
    full: bool = False,
    only: str = "",
    take: Callable[[supervisor.Message], None] = lambda _: None,
) -> str:
    """Judge groups in processes of their own and keep it in `entries` and in the record.

    Returns "", or why not all of it was judged. Verdicts that entries have are kept.
    """
    backends = [b for b in KERNELS if unavailable(b, device.type) is None]

    def keep(message: supervisor.Message) -> None:
        entry = entries[tuple(message["group"])]
        if message["status"] == "timed":
            entry["ms"][message["backend"]] = message["ms"]
        else:
            verdict = {k: v for k, v in message.items() if k not in ("group", "case", "backend")}
            entry["verdicts"].setdefault(message["case"], {})[message["backend"]] = verdict
        take(message)

    job = supervisor.Job(list(entries), backends, _name(device), full, only, case_seconds, deadline)
    for group, entry in entries.items():
        judged = [(case, b) for case, own in entry["verdicts"].items() for b in own]
        job.skip += [(group, *one) for one in (*judged, *(("time", b) for b in entry["ms"]))]
        ended = {b: record.failures(entry, b).values() for b in backends}
        job.lost += [
            (group, b) for b, own in ended.items() if any(v["status"] in ENDED for v in own)
        ]
    note = supervisor.run(job, keep)
    if note not in ("", supervisor.OUT_OF_TIME):
        _UNABLE[of["gpu"]] = note
    for entry in entries.values():
        short = [
            own.pop(b) for own in entry["verdicts"].values() for b in list(own) if _short(own[b])
        ]
        entry["note"] = note or (short and short[0]["note"]) or ""
        if not entry["note"] and not only:
            entry["done"] = time.time()
    if only:
        return note
    try:
        record.write(of, {record.title(group): entry for group, entry in entries.items()})
    except OSError as error:
        _say(f"what was verified counts for this process alone: {error}")
    return note


def summary(device: torch.device) -> list[str]:
    """What the record of a device says, for people."""
    of = record.identity(device)
    entries = record.read(of)
    lines = [
        f"Kernels on {of['gpu']}, by {record.path(of)} (FEWSTEP_VERIFY={mode()}); calls of other"
        " groups are verified when one is made, or by `fewstep verify`:"
    ]
    for name, entry in sorted(entries.items()):
        own, plain = record.order(entry), entry["ms"].get("reference", float("inf"))
        says = [f"{b} {plain / entry['ms'][b]:.1f}x plain torch" for b in own]
        for backend in KERNELS:
            if failed := record.failures(entry, backend):
                case, verdict = next(iter(failed.items()))
                says.append(f"{backend} {verdict['status']} in {case!r}: {verdict.get('note', '')}")
            elif backend not in own and record.matched(entry, backend):
                says.append(f"{backend} is not faster than plain torch")
        if not entry["done"]:
            says.append(f"not verified to the end: {entry['note']}")
        lines.append(f"  {name:<44}{'; '.join(says)}")
    return lines if entries else [*lines, "  none yet"]


def _short(verdict: Entry) -> bool:
    """Whether a verdict says nothing of a kernel: another process may have the memory."""
    return bool(verdict["status"] == "memory")


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def _named(group: Group, of: dict[str, str]) -> str:
    return f"{record.title(group)} on {of['gpu']}"


def _say(text: str) -> None:
    sys.stderr.write(f"fewstep: {text}\n")
    sys.stderr.flush()
