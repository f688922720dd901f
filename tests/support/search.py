"""Many random problems of entropic transport: `python -m tests.support.search --seeds 0:100000`.

With `--resume FILE` the seeds that are done are noted there, a line for each range and failure, and
a second run goes on behind them. Prints every failure with its seed, and ends with 1 after one.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tests.support.laws import problem_failures
from tests.support.problems import Problem, draw

CHUNK = 100


def failures(p: Problem, seed: int) -> list[str]:
    """Errors are failures too, but for those of what a dtype's digits cannot hold."""
    try:
        return problem_failures(p, seed)
    except Exception as e:
        if isinstance(e, ValueError) and "eps must be at least" in str(e):
            return []
        where = traceback.extract_tb(e.__traceback__)[-1]
        return [f"raised {type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"]


def smaller(p: Problem) -> Iterator[Problem]:
    """Problems with something less."""
    parts = p.alone()
    if parts and parts[0][-1] is not p:
        yield from (q for *_, q in parts)
    optional = [
        k for k in p.options if k not in ("eps", "cost", "cu_seqlens", "label_cost", "max_iter")
    ]
    for k in optional:
        gone = {k, "label_cost"} if k == "labels" else {k}
        yield replace(p, options={n: v for n, v in p.options.items() if n not in gone})
    if p.strided:
        yield replace(p, strided=False)
    if p.options["max_iter"] > 1:
        yield replace(p, options=p.options | {"max_iter": p.options["max_iter"] // 2})
    for k in "ab":
        if k in p.tensors and not p.same:
            yield replace(p, tensors={n: t for n, t in p.tensors.items() if n != k})
    if "x" in p.tensors and p.tensors["x"].shape[-1] > 1 and not p.same:
        yield replace(p, tensors={k: t[..., :1] if k in "xy" else t for k, t in p.tensors.items()})
    if not p.ragged and not p.same:
        for side, n in enumerate(p.points):
            for count in {n // 2, n - 1} - {0}:
                for kept in (slice(count), slice(n - count, n)):
                    yield cut(p, side, kept)


def cut(p: Problem, side: int, kept: slice) -> Problem:
    """Fewer points of x (0) or y (1), with the mass that there was."""
    t, o = dict(p.tensors), dict(p.options)
    point, weight = ("xa", "yb")[side]
    if "C" in t:
        t["C"] = t["C"][..., kept, :] if side == 0 else t["C"][..., kept]
    else:
        t[point] = t[point][..., kept, :]
    if weight in t:
        w = t[weight][..., kept].clone()
        w[..., 0] += t[weight].sum(-1) - w.sum(-1)
        t[weight] = w.float().double()
    for k in ("labels", "init"):
        if k in o:
            o[k] = tuple(v[..., kept] if i == side else v for i, v in enumerate(o[k]))
    return replace(p, tensors=t, options=o)


def minimised(p: Problem, seed: int, budget: float = 20.0) -> tuple[Problem, list[str]]:
    """A smaller problem that fails in the same quantity."""
    found = failures(p, seed)
    key = found[0].split(":")[0]
    end = time.monotonic() + budget
    shrunk = True
    while shrunk and time.monotonic() < end:
        shrunk = False
        for q in smaller(p):
            own = [m for m in failures(q, seed) if m.split(":")[0] == key]
            if own:
                p, found, shrunk = q, own, True
                break
    return p, found


def earlier(resume: Path | None, first: int, last: int) -> tuple[set[int], set[int]]:
    """Seeds that runs before have done, and those from first to last - 1 that failed then."""
    done: set[int] = set()
    failed: set[int] = set()
    if resume is not None and resume.exists():
        for line in resume.read_text().splitlines():
            word, *numbers = line.split()
            if word == "done":
                done |= set(range(int(numbers[0]), int(numbers[1])))
            elif word == "failed":
                failed.add(int(numbers[0]))
    return done, {s for s in failed if first <= s < last}


def note(resume: Path | None, notes: list[str], low: int, high: int) -> None:
    """That seeds from low to high - 1 are done, with what was found."""
    if resume is not None:
        with resume.open("a") as file:
            file.write("".join(f"{text}\n" for text in [*notes, f"done {low} {high}"]))


def search(first: int, last: int, resume: Path | None, shrink: bool) -> int:
    """The number of seeds that failed, those of earlier runs among them."""
    done, failed = earlier(resume, first, last)
    start, count = time.process_time(), 0
    for low in range(first, last, CHUNK):
        high = min(low + CHUNK, last)
        notes = []
        for seed in (s for s in range(low, high) if s not in done):
            p = draw(seed)
            found = failures(p, seed)
            count += 1
            if not found:
                continue
            failed.add(seed)
            notes.append(f"failed {seed} {found[0]}")
            if shrink:
                p, found = minimised(p, seed)
            print(f"seed {seed}: sinkhorn({p.describe()})", *found[:8], sep="\n    ", flush=True)  # noqa: T201
        note(resume, notes, low, high)
    spent = time.process_time() - start
    print(f"{count} problems, {count / max(spent, 1e-9):.0f} a second, {len(failed)} seeds failed")  # noqa: T201
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:10000", help="A:B, those from A to B - 1")
    parser.add_argument("--resume", type=Path, help="file that notes the seeds done")
    parser.add_argument("--shrink", action="store_true", help="print a smaller problem of each")
    options = parser.parse_args()
    first, last = (int(n) for n in options.seeds.split(":"))
    torch.set_num_threads(1)
    return int(search(first, last, options.resume, options.shrink) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
