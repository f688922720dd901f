"""Generators of a swiss roll and a checkerboard."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.baselines import Drifting
from fewstep.methods import WFlow
from fewstep.metrics import mmd_rbf, sliced_w2
from fewstep.reproduce.experiment import Check, Experiment, Outcome, Table
from fewstep.reproduce.training import mlp, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def swiss_roll(n: int) -> Tensor:
    """Points of a spiral in the unit disc, with noise of 0.03."""
    t = math.pi * (0.5 + 4 * torch.rand(n))
    points = t[:, None] * torch.stack([t.cos(), t.sin()], 1) / (4.5 * math.pi)
    return points + 0.03 * torch.randn(n, 2)


def checkerboard(n: int) -> Tensor:
    """Points of the four squares of side 1/2 on diagonals of [-1, 1]^2, with noise of 0.05."""
    column, upper = torch.randint(4, (n,)), torch.randint(2, (n,))
    corner = torch.stack([column, 2 * upper + column % 2], 1)
    return (corner + torch.rand(n, 2)) / 2 - 1 + 0.05 * torch.randn(n, 2)


_LAWS: dict[str, Callable[[int], Tensor]] = {
    "swiss roll": swiss_roll,
    "checkerboard": checkerboard,
}
_METHODS: dict[str, Callable[..., tuple[Tensor, Any]]] = {
    "Drifting, tau 0.05": Drifting(tau=0.05, normalize=False),
    "Drifting, three tau": Drifting(),
    "W-Flow": WFlow(eps=0.01),
}


@dataclass(frozen=True)
class Settings:
    points: int = 256
    steps: int = 1000
    drawn: int = 20_000
    kernel: float = 0.1


def _learned(settings: Settings, law: str, name: str) -> Tensor:
    net, n = mlp(32, 2), settings.points

    def step(i: int) -> Tensor:
        return _METHODS[name](net, torch.randn(2, n, 32), _LAWS[law](n))[0]

    train(net, step, steps=settings.steps)
    with torch.no_grad():
        x: Tensor = net(torch.randn(settings.drawn, 32))
    return x


def _run(settings: Settings, seed: int) -> Outcome:
    rows: dict[str, dict[str, float]] = {}
    arrays: dict[str, Tensor] = {}
    for law, name in itertools.product(_LAWS, ("data", "one Gaussian", *_METHODS)):
        real = _LAWS[law](settings.drawn)
        if name == "data":
            x = _LAWS[law](settings.drawn)
        elif name == "one Gaussian":
            x = real.mean(0) + real.std(0) * torch.randn_like(real)
        else:
            x = _learned(settings, law, name)
        rows[f"{law}: {name}"] = {
            "sliced W2^2": sliced_w2(x, real),
            "MMD^2": mmd_rbf(x[:4000], real[:4000], bandwidth=settings.kernel),
        }
        if name != "one Gaussian":
            arrays[f"{law}: {name}"] = x[:3000].clone()
    return Outcome(rows, arrays)


def _check(table: Table) -> Sequence[Check]:
    checks = []
    for law, column in itertools.product(_LAWS, ("sliced W2^2", "MMD^2")):
        floor = table[f"{law}: data", column].mean
        start = table[f"{law}: one Gaussian", column].mean
        left = {
            name: (table[f"{law}: {name}", column].mean - floor) / (start - floor)
            for name in _METHODS
        }
        drifting = min((name for name in left if name != "W-Flow"), key=lambda name: left[name])
        for name in (drifting, "W-Flow"):
            checks.append(
                Check(
                    f"{name} leaves less than a tenth of a Gaussian's {column} on the {law}",
                    left[name] < 0.1,
                    f"{left[name]:.1%}",
                    strict=column == "MMD^2",
                )
            )
    return checks


def _draw(figure: Figure, table: Table, arrays: Mapping[str, Tensor]) -> None:
    axes = figure.subplots(2, len(arrays) // 2).flat
    for ax, (name, x) in zip(axes, arrays.items(), strict=True):
        ax.scatter(*x.T.numpy(), s=1, linewidths=0)
        ax.set_title(name)
        ax.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
        ax.set_axis_off()


OWN = [
    Experiment(
        name="swiss-roll-checkerboard",
        claim="A generator of one step learns a swiss roll and a checkerboard by drifting.",
        source="arXiv 2602.04770, toy experiments",
        setting="The laws, network and learning rate are those of the authors' notebook, with"
        " batches of 256 instead of 2048 and fewer steps, and W-Flow beside it.",
        full=Settings(),
        fast=Settings(points=128, steps=150, drawn=2000),
        run=_run,
        check=_check,
        draw=_draw,
        columns={
            "sliced W2^2": "squared sliced Wasserstein distance to as many samples of the data",
            "MMD^2": "squared maximum mean discrepancy with a Gaussian kernel of width 0.1",
        },
        size=(9.0, 4.6),
    )
]
