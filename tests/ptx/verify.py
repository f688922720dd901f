"""The cases of `fewstep verify` on the interpreter.

    python -m ptx.verify [GROUPS] [CASES] [BACKENDS]

GROUPS is what the groups' names begin with, CASES what names of cases contain. No time is measured.
"""

from __future__ import annotations

import os
import sys
import time

from fewstep._library import KERNELS
from fewstep.verification import catalogue, record, supervisor

from . import sim


def main(groups: str = "", only: str = "", backends: str = ",".join(KERNELS)) -> int:
    os.environ |= {"PTX_CASES": os.environ.get("PTX_CASES", "1000"), "PTX_QUIET": "1"}
    supervisor.COMMAND = (sys.executable, "-m", "ptx.verify_worker")
    wanted = [g for g in catalogue.table() if record.title(g).startswith(groups)]
    counts: dict[tuple[str, str], list[int]] = {}
    wrong = 0

    def take(message: supervisor.Message) -> None:
        nonlocal wrong
        if message["status"] == "timed":
            return
        name, matched = record.title(message["group"]), message["status"] == record.MATCH
        own = counts.setdefault((name, message["backend"]), [0, 0])
        own[0] += matched
        own[1] += 1
        if not matched and message["status"] != record.UNSERVED:
            wrong += 1
            what = f"{message['status']}: {message['note']}"
            print(f"{name}: {message['case']}: {message['backend']}: {what}", flush=True)

    chosen = backends.split(",")
    for group in wanted:
        deadline = time.monotonic() + 3600
        job = supervisor.Job([group], chosen, "cpu", False, only, 900.0, deadline)
        if note := supervisor.run(job, take):
            wrong += 1
            print(f"{record.title(group)}: {note}")
    print(f"as {sim.DEVICE}:")
    for (name, backend), (matched, all_) in counts.items():
        print(f"{name:<44}{backend:<8}{matched} of {all_} match")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
