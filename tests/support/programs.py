"""Random velocities as Python source, each drawn from a seed and held against plain autograd.

`python -m tests.support.programs --seeds 0:100000` draws many; with `--resume FILE` the seeds that
are done are noted there, and a second run goes on behind them. `--show SEED` prints one.
"""

from __future__ import annotations

import argparse
import inspect
import re
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tests.support import rows
from tests.support.program_source import PREAMBLE, Program, const
from tests.support.program_writer import draw
from tests.support.search import CHUNK, earlier, note
from torch import Tensor

# What differences see and derivatives do not.
HIDDEN = r"detach|no_grad|data|autograd|Stair|Reversed|%|round|trunc|//"


@dataclass(frozen=True)
class Verdict:
    """`kind`: "right", "refused" (by a clear error), "undefined" (eager fails too) or "wrong"."""

    kind: str
    messages: tuple[str, ...] = ()


def verdict(p: Program) -> Verdict:
    """What becomes of a program, against plain autograd in float64."""
    torch.manual_seed(0)
    with rows.quiet():
        return _verdict(p)


def _verdict(p: Program) -> Verdict:
    call = p.call()
    laid_out = re.search(r"no_grad\(\):\n.*channels_last", p.source)
    if laid_out and re.search("GroupNorm|group_norm", p.source):
        # Torch's backward of that norm crashes where the weights alone want gradients.
        return Verdict("undefined", ("torch crashes",))
    try:
        eager, changed = _eager(p, call)
    except Exception as error:
        return Verdict("undefined", (f"eager: {_short(error)}",))
    gradient = True
    try:
        exact = rows.by_autograd(call, None)
    except rows.NoGradient:
        call, gradient = replace(call, grad=False), False
        exact = rows.by_autograd(call, None)
        call = replace(call, grad=p.grad)
    except RuntimeError as error:  # changed in place what it needs: there is a velocity alone
        exact = None
        gone = error
    if exact is not None and not rows.finite(exact):
        return Verdict("undefined", ("not finite",))
    try:
        out, found = rows.by_fewstep(call)
    except Exception as error:
        message = _short(error)
        if exact is None or not gradient:
            return Verdict("undefined", (message,))
        if isinstance(error, ValueError) and str(error).startswith(("divergence:", "fewstep")):
            return Verdict("refused", (message,))
        if isinstance(error, RuntimeError) and _same_error(call, error):
            return Verdict("refused", (message,))
        return Verdict("wrong", (f"raised {message}",))
    wrong = []
    if out.velocity.dtype != eager.dtype or out.velocity.shape != eager.shape:
        got, want = (f"{m.dtype} {tuple(m.shape)}" for m in (out.velocity, eager))
        wrong.append(f"velocity: {got} in place of {want}")
    if not torch.equal(found.x, call.x) and not torch.equal(found.x, changed):
        wrong.append("x: changed, and not as by eager")
    if exact is None:
        scale = float(eager.abs().max())
        if not float((out.velocity - eager).abs().max()) <= 1e-4 * scale:
            wrong.append(f"velocity: not eager's, which has no trace: {_short(gone)}")
        elif out.estimator.startswith("exact") and not re.search(HIDDEN, p.source):
            trace, scale = _by_differences(call)
            if not float((out.value - trace).abs().max()) <= 1e-4 * scale:
                wrong.append(f"value: {out.value.tolist()} for {trace.tolist()} by differences")
        return Verdict("wrong" if wrong else "undefined", tuple(wrong))
    probes = call.probes(out.estimator)
    judged = call if gradient else replace(call, grad=False)
    if not gradient:
        found = replace(found, gradients=[])
    exact = rows.by_autograd(judged, probes)
    way = f"({out.estimator}; {out.info[:60]!r})"
    wrong += [f"{m} {way}" for m in rows.differences(judged, found, exact, probes)]
    return Verdict("wrong" if wrong else "right", tuple(wrong))


def _same_error(call: rows.Call, error: RuntimeError) -> bool:
    """Whether plain autograd says the same of the velocity as it stands."""
    try:
        rows.by_autograd(replace(call, plain=None), None)
    except RuntimeError as own:
        return str(own)[:60] == str(error)[:60]
    return False


def _by_differences(call: rows.Call) -> tuple[Tensor, float]:
    """The trace by central differences in float64, and its scale."""
    velocity, _ = call.build(torch.float64)
    x, t = call.x.double(), call.time(torch.float64)
    columns = []
    with torch.no_grad():
        for e in 1e-6 * torch.eye(x.shape[1:].numel(), dtype=x.dtype).view(-1, *x.shape[1:]):
            columns.append((velocity(x + e, t) - velocity(x - e, t)).flatten(1) / 2e-6)
    jacobian = torch.stack(columns, 2)
    return jacobian.diagonal(dim1=1, dim2=2).sum(1), float(jacobian.abs().sum() + 1e-30)


def _eager(p: Program, call: rows.Call) -> tuple[Tensor, Tensor]:
    """The velocity alone, in the mode and dtype of the call, and x after it."""
    velocity, _ = call.build(p.dtype)
    x = call.x.clone().requires_grad_(p.grad and p.x_grad)
    with torch.set_grad_enabled(p.grad):
        v = velocity(x, call.time(p.dtype))
        if p.grad and v.requires_grad:
            v.sum().backward()
    return v.detach(), x.detach()


def _short(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


def minimised(p: Program, budget: float = 20.0) -> Program:
    """With fewer steps, and wrong still in the same quantity."""
    whole = verdict(p)
    if whole.kind != "wrong":  # what it reads changes from run to run
        return p
    key = whole.messages[0].split(":")[0]
    end = time.monotonic() + budget
    i = 0
    while i < len(p.steps) and time.monotonic() < end:
        q = replace(p, steps=p.steps[:i] + p.steps[i + 1 :])
        found = verdict(q)
        if found.kind == "wrong" and found.messages[0].split(":")[0] == key:
            p = q
        else:
            i += 1
    return p


def search(
    first: int, last: int, resume: Path | None, shrink: bool, options: dict[str, Any] | None = None
) -> int:
    """The number of seeds that are wrong, those of earlier runs among them."""
    done, failed = earlier(resume, first, last)
    start, kinds = time.process_time(), Counter[str]()
    for low in range(first, last, CHUNK):
        high = min(low + CHUNK, last)
        notes = []
        for seed in (s for s in range(low, high) if s not in done):
            p = draw(seed)
            p = replace(p, options=p.options | (options or {}))
            found = verdict(p)
            kinds[found.kind] += 1
            if found.kind == "refused":
                print(f"seed {seed}: refused: {found.messages[0]}", flush=True)  # noqa: T201
            if found.kind != "wrong":
                continue
            failed.add(seed)
            notes.append(f"failed {seed} {found.messages[0]}")
            p = minimised(p) if shrink else p
            print(f"seed {seed}:", *found.messages, p.describe(), sep="\n", flush=True)  # noqa: T201
        note(resume, notes, low, high)
    spent = time.process_time() - start
    rate = sum(kinds.values()) / max(spent, 1e-9)
    print(f"{dict(kinds)}, {rate:.0f} a second, {len(failed)} seeds failed")  # noqa: T201
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:10000", help="A:B, those from A to B - 1")
    parser.add_argument("--resume", type=Path, help="file that notes the seeds done")
    parser.add_argument("--shrink", action="store_true", help="print a smaller program of each")
    parser.add_argument("--show", type=int, help="print the program of a seed, and its verdict")
    parser.add_argument("--unchecked", action="store_true", help='with check="never"')
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.show is not None:
        p = draw(options.show)
        print(PREAMBLE, inspect.getsource(const), p.describe(), *verdict(p).messages, sep="\n")  # noqa: T201
        return 0
    first, last = (int(n) for n in options.seeds.split(":"))
    more = {"check": "never"} if options.unchecked else {}
    return int(search(first, last, options.resume, options.shrink, more) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
