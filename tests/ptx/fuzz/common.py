"""Random problems and how errors are judged, for both fuzzers."""

from __future__ import annotations

import collections
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

import fewstep
from fewstep.reference import sinkhorn as reference
from fewstep.reference.costs import served
from ptx import benign, sim
from tolerances import CONTRACT, CONTRACT64, error

torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)
COSTS = served("triton")
largest: dict[tuple[str, str], tuple[float, str]] = collections.defaultdict(lambda: (0.0, ""))
R = random.Random()


def some(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, shift: float = 0, scale: float = 1
) -> torch.Tensor:
    """Normal numbers, at an address that is aligned to 64 bytes or only to an element."""
    size = torch.Size(shape).numel()
    off = R.choice([0, 0, 1, 2])
    out = torch.empty(size + off, dtype=dtype)[off:]
    out.copy_(scale * torch.randn(size, dtype=torch.float64) + shift)
    return out.view(shape)


def weights(shape: tuple[int, int]) -> torch.Tensor:
    w = torch.rand(shape) + 0.05
    if R.random() < 0.4 and shape[1] > 2:
        w[:, R.randrange(shape[1]) :: R.randrange(2, 9)] = 0
        w[:, R.randrange(shape[1])] = 1
    return w / w.sum(-1, keepdim=True)


def check(
    kind: str,
    name: str,
    actual: torch.Tensor,
    exact: torch.Tensor,
    what: str,
    scale: Any = None,
    slack: float = 1,
) -> None:
    if not torch.isfinite(exact).all() or (scale is not None and not scale.abs().max() > 1e-9):
        return  # such as potentials without weight; or a cloud of one point with itself
    bound = (CONTRACT64 if actual.dtype == torch.float64 else CONTRACT)[name] * slack
    found = error(name, actual, exact, scale) / bound
    if not found <= largest[kind, name][0]:
        largest[kind, name] = (found, what)
    if not found <= 1:
        print(f"OVER: {kind} {name} {found:.2f} times the contract: {what}", flush=True)


def size(most: int) -> int:
    edges = [
        v
        for v in (
            1,
            2,
            3,
            7,
            8,
            9,
            15,
            16,
            17,
            31,
            32,
            33,
            63,
            64,
            65,
            95,
            96,
            97,
            127,
            128,
            129,
            255,
            256,
        )
        if v <= most
    ]
    return R.choice(edges) if R.random() < 0.6 else R.randint(1, most)


def dim() -> int:
    return R.choice(
        [1, 2, 3, 4, 5, 8, 15, 16, 17, 18, 20, 24, 31, 32, 33, 40, 47, 48, 63, 64, 65, 80, 100, 129]
    )


def options_for(n: int, m: int) -> dict[str, Any]:
    o: dict[str, Any] = {"cost": R.choice(COSTS), "max_iter": R.randint(1, 9)}
    if R.random() < 0.3:
        o["anneal"] = R.choice([0.4, [3.0, 1.5]])
    if R.random() < 0.3:
        o["update"] = "symmetric"
    elif R.random() < 0.3:
        o["relax"] = R.choice([0.7, 1.4])
    if R.random() < 0.3:
        o["reach"] = R.choice([0.9, (0.7, None), (None, 1.1), (2.0, 0.8)])
    if R.random() < 0.25 and n > 1 and m > 1:
        o["exclude_diagonal"] = R.choice([True, 1, -1])
    if R.random() < 0.25:
        o["precision"] = "float32"
    return o


def solve_case(backend_name: str) -> None:
    big = R.random() < 0.25
    n, m, d, batch = size(300 if big else 96), size(256), dim(), R.randint(1, 2 if big else 4)
    x, y = some((batch, n, d)), some((batch, m, d), shift=R.choice([0, 0.5, 20]))
    if R.random() < 0.1:
        x, y = x + 1000, y + 1000
    o, symmetric = options_for(n, m), False
    if o.get("update") == "symmetric" and R.random() < 0.5:
        y, m, symmetric = x, n, True
    a, b = weights((batch, n)), weights((batch, m))
    if symmetric:
        b = a
    scale = reference.cost_matrix(x.double(), y.double(), o["cost"])
    eps = (
        scale.mean((1, 2))
        * torch.tensor([R.choice([0.05, 0.2, 1.0]) for _ in range(batch)]).double()
    ).clamp_min(1e-3)
    if R.random() < 0.2:
        eps = eps[:, None] * torch.tensor([1.0, 2.0, 0.5])
    found = []
    for backend, dtype in ((backend_name, torch.float32), ("reference", torch.float64)):
        own = [t.to(dtype) for t in (x, y, a, b, eps)]
        if symmetric:
            own[1], own[3] = own[0], own[2]
        leaf = own[0].detach()
        if not symmetric:
            leaf = leaf.requires_grad_()
            own[0] = leaf
        found.append(
            (
                fewstep.sinkhorn(
                    own[0],
                    own[1],
                    a=own[2],
                    b=own[3],
                    eps=own[4].float().to(dtype),
                    backend=backend,
                    **o,
                ),
                leaf,
            )
        )
    (r, rx), (e, ex) = found
    what = f"x {list(x.shape)} y {list(y.shape)} eps {eps.flatten().tolist()} {o} {symmetric=}"
    most = scale.max()
    check("solve", "potential", r.f, e.f.detach(), what, most)
    check("solve", "potential", r.g, e.g.detach(), what, most)
    check("solve", "value", r.value.detach(), e.value.detach(), what, most)
    if not symmetric and n > 1:
        (grad,), (slope,) = (
            torch.autograd.grad(r.value.sum(), rx),
            torch.autograd.grad(e.value.sum(), ex),
        )
        if slope.norm() > 1e-3 * x.norm():
            check("solve", "gradient", grad, slope, what)
    if eps.ndim == 1:
        v = some((batch, m, R.choice([1, 3, 40, 70])))
        check("solve", "plan", r.transport(v), e.transport(v.double()).detach(), what, v)


def main(name: str, cases: dict[str, Callable[[], None]]) -> None:
    """Cases of each kind in turn until the time is over, then findings, errors and counters.

    Exits with 1 where a case failed or something was found; results over the contract are printed.
    """
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    kinds = sys.argv[3:] or list(cases)
    sim.options_of_environment()
    end, done, found = time.time() + seconds, collections.Counter(), collections.Counter()
    case = seed * 1000003
    while time.time() < end:
        case += 1
        R.seed(case), torch.manual_seed(case)
        kind = kinds[case % len(kinds)]
        try:
            cases[kind]()
            done[kind] += 1
        except Exception as exception:
            if "for more than small float32 problems" in str(exception):
                continue  # an A100 keeps fewer of them on chip
            done[kind + " failed"] += 1
            print(
                f"FAILED: {kind} case {case}: {type(exception).__name__}: {str(exception)[:600]}",
                flush=True,
            )
            if os.environ.get("TRACE"):
                traceback.print_exc()
        for f in sim.findings():
            if benign.reason(f) is not None:
                continue
            if found[f.kind, f.kernel, f.place] == 0:
                print(
                    f"FOUND: {f.kind}: {f.kernel}: {f.where}: {f.detail} [{kind} case {case}]",
                    flush=True,
                )
            found[f.kind, f.kernel, f.place] += f.count
    print(dict(done))
    for key, count in sorted(found.items()):
        print("found", count, "times:", *key)
    for (kind, quantity), (part, what) in sorted(largest.items()):
        print(f"{kind} {quantity}: at most {part:.3f} of the contract: {what}")
    rows = sim.counters()
    print(f"{sum(r.threads for r in rows) / 1e6:.0f} million instructions of threads")
    (sim.OUT / f"{name}_{sim.DEVICE}.md").write_text(
        sim.table(rows) + "\n\n" + sim.worst(rows, 40) + "\n"
    )
    sys.exit(bool(found) or any(kind.endswith(" failed") for kind in done))
