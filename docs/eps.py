"""Draw `docs/eps.png`, plans at small and large eps: `python docs/eps.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

import fewstep

OUT = Path(__file__).with_suffix(".png")


def main() -> None:
    rng = torch.Generator().manual_seed(1)
    angle = torch.linspace(0, 3.1, 24)
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.06 * torch.randn(24, 2, generator=rng)
    y = torch.stack([1 - angle.cos(), 0.4 - angle.sin()], 1)
    y = y + 0.06 * torch.randn(24, 2, generator=rng)
    mean = 20 * fewstep.sinkhorn(x, y, eps="auto").eps.item()
    figure = Figure((9, 2.6), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, share in zip(figure.subplots(1, 3), (0.002, 0.05, 1.0), strict=True):
        ot = fewstep.sinkhorn(x, y, eps=share * mean, max_iter=5000, tol=1e-3)
        plan = ot.plan() * len(x)
        ends = torch.stack([x[:, None].expand(-1, 24, -1), y[None].expand(24, -1, -1)], 2)
        lines = LineCollection(ends.flatten(0, 1).numpy(), colors="grey", linewidths=0.8)
        lines.set_alpha(plan.flatten().clamp(0, 1).numpy())
        axes.add_collection(lines)
        for points, colour in ((x, "tab:blue"), (y, "tab:orange"), (ot.barycenter(), "tab:green")):
            axes.scatter(*points.T.numpy(), s=9, color=colour, zorder=2)
        axes.set_title(f"{share:g} of the mean cost, {int(ot.iterations)} iterations", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(OUT)
    with Image.open(OUT) as picture:
        small = picture.convert("RGB").quantize(64, method=Image.Quantize.FASTOCTREE)
    small.save(OUT, optimize=True)


if __name__ == "__main__":
    main()
