"""Takes barriers out of a copy of the CUDA sources, one at a time: does the fuzzer notice?

    make mutants SECONDS=25 PLACES="shared/sinkhorn_block.h:120 cuda/sinkhorn.cu:50+53"

A place is a file of csrc/ and a line, or several for all of them at once. A mutant that nobody
notices is a barrier that is not needed, or a hole in these checks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from ptx import sim

WORK = sim.OUT / "mutants"
# What the fuzzer may also say of the sources as they are.
KNOWN = ("must not be zero", "extreme value")


def mutate(place: str) -> str:
    """Blank the lines in the copy; returns what they were."""
    name, numbers = place.split(":")
    path = WORK / "csrc" / name
    shutil.copy2(sim.ROOT / "csrc" / name, path)
    lines = path.read_text().splitlines()
    gone = []
    for number in map(int, numbers.split("+")):
        gone.append(lines[number - 1].strip())
        lines[number - 1] = "    ;"
    path.write_text("\n".join(lines) + "\n")
    return " and ".join(gone)


def judge(seconds: str, place: str) -> str:
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.copytree(sim.ROOT / "csrc", WORK / "csrc")
    shutil.copytree(sim.ROOT / "tests", WORK / "tests", ignore=shutil.ignore_patterns("out"))
    (WORK / "tests/ptx/out").mkdir()
    gone = mutate(place)
    command = ["make", "-C", WORK / "tests/ptx", "fuzz", f"SECONDS={seconds}", "SEED=77"]
    done = subprocess.run([*command, "DEVICES=h100"], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    cases = [line for line in lines if line.startswith("{")]
    if not cases:
        return f"{place}: {gone}: does not build: {done.stderr[-300:]}"
    hits = [
        line
        for line in lines
        if line.startswith(("FOUND", "OVER", "FAILED")) and not any(k in line for k in KNOWN)
    ]
    said = f"noticed: {hits[0][:170]}" if hits else f"NOT NOTICED in {cases[0]}"
    return f"{place}: {gone}: {said}"


for where in sys.argv[2:]:
    print(judge(sys.argv[1], where), flush=True)
