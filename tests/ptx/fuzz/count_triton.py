"""Counted instructions of the streamed Triton kernels per million pairs, in large tiles."""

from __future__ import annotations

import collections
import os

os.environ["TRITON_INTERPRET"] = "0"

import torch

import fewstep
from ptx import project, sim

project.use_triton()
sim.option("races", 0), sim.option("global_races", 0)

for update, precision in (
    ("alternating", "tf32x3"),
    ("symmetric", "tf32x3"),
    ("alternating", "tf32"),
):
    batch, n = 17, 512
    x, y = torch.randn(batch, n, 64), torch.randn(batch, n, 64)
    sim.counters()
    result = fewstep.sinkhorn(
        x, y, eps=64.0, max_iter=1, update=update, precision=precision, backend="triton"
    )
    rows = sim.counters()
    print(f"\n## {update}, {precision}, {sim.DEVICE}, d = 64, per million pairs and launch")
    for name in sorted({r.kernel for r in rows}):
        own = [r for r in rows if r.kernel == name]
        launches = sum({r.entry: r.launches for r in own}.values())
        units = launches * batch * n * n / 1e6
        kinds = collections.Counter()
        for r in own:
            kinds[r.kind] += r.warps
        total = {
            k: sum(getattr(r, k) for r in own) / units
            for k in ("warps", "wavefronts", "ideal", "sectors", "needed")
        }
        print(
            f"{name} ({launches} launches): " + ", ".join(f"{k} {v:,.0f}" for k, v in total.items())
        )
        print("    " + ", ".join(f"{k} {v / units:,.0f}" for k, v in kinds.most_common(12)))
