"""Counted accesses of the CUDA kernels at the shapes of GPU_STATUS.md, per group or problem."""

from __future__ import annotations

import collections

import torch

import fewstep
from ptx import project, sim

project.use_cuda()
sim.option("races", 0), sim.option("global_races", 0), sim.option("resident", 1)


def show(title: str, units: int, kernel: str) -> None:
    rows = [r for r in sim.counters() if kernel in r.kernel or kernel == ""]
    print(f"\n## {title}")
    for name in sorted({r.kernel for r in rows}):
        own = [r for r in rows if r.kernel == name]
        total = {
            k: sum(getattr(r, k) for r in own) / units
            for k in ("warps", "wavefronts", "ideal", "sectors", "needed")
        }
        by_kind = collections.Counter()
        for r in own:
            by_kind[r.kind] += r.warps
        kinds = ", ".join(f"{k} {v / units:,.0f}" for k, v in by_kind.most_common(9))
        print(f"{name}: " + ", ".join(f"{k} {v:,.0f}" for k, v in total.items()) + f"; {kinds}")
        lines: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0, 0])
        for r in own:
            if r.wavefronts:
                place = r.where[r.where.index("(") :]
                for k, v in enumerate((r.warps, r.wavefronts, r.ideal)):
                    lines[place][k] += v / units
        for place, n in sorted(lines.items(), key=lambda item: -item[1][1])[:14]:
            print(f"    {place}: {n[0]:,.0f} accesses, {n[1]:,.0f} wavefronts, ideal {n[2]:,.0f}")


def drift(cost: str, form: str, groups: int = 2) -> None:
    x, y, s, u = (torch.randn(groups, n, 512) for n in (64, 64, 64, 16))
    fewstep.sinkhorn_drift(
        x,
        y,
        s,
        eps=[0.02, 0.05, 0.2],
        max_iter=20,
        cost=cost,
        uncond=u,
        guidance=0.5,
        form=form,
        backend="cuda",
    )
    show(
        f"drift {form} {cost}, 64 x 144, C = 512, 3 temperatures x 20 iterations, per group",
        groups,
        "",
    )


def solve(batch: int, n: int, m: int, d: int, iterations: int) -> None:
    x, y = torch.randn(batch, n, d), torch.randn(batch, m, d)
    fewstep.sinkhorn(x, y, eps=float(d), max_iter=iterations, backend="cuda")
    show(f"solve {n} x {m}, d = {d}, {iterations} iterations, per problem", batch, "")


drift("half_sqeuclidean", "joint")
drift("euclidean", "joint", 1)
solve(1, 256, 256, 64, 100)
solve(2, 64, 64, 16, 100)
