"""Modes of a mixture under W-Flow, Drifting, and flows of other energies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from fewstep.baselines import Drifting, KernelFlow
from fewstep.baselines.kernels import Energy
from fewstep.data.toys import GaussianMixture
from fewstep.methods import WFlow
from fewstep.metrics import exact_w2, sliced_w2
from fewstep.reproduce.experiment import Check, Experiment, Outcome, Table, below, estimate
from fewstep.reproduce.toys import divergence, ring, shares
from fewstep.reproduce.training import mlp, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Settings:
    points: int = 256
    steps: int = 3000
    drawn: int = 20_000
    compared: int = 2000


def learned(
    method: Loss,
    law: GaussianMixture,
    settings: Settings,
    every: Callable[[int, nn.Module], None] = lambda step, net: None,
) -> Tensor:
    """Samples of a generator of 32 dimensions that a method has trained on a law."""
    net, n = mlp(32, 2), settings.points

    def step(i: int) -> Tensor:
        return method(net, torch.randn(2, n, 32), law.sample(n))[0]

    train(net, step, steps=settings.steps, every=lambda i: every(i, net))
    with torch.no_grad():
        x: Tensor = net(torch.randn(settings.drawn, 32))
    return x


# Six modes hold 95 % of the mass, and two far ones 2.5 % each.
_FAR = 4.0
_RING = ring(6, radius=1.0, std=0.05)
SIX_AND_TWO = GaussianMixture(
    torch.cat([_RING.means, torch.tensor([[-_FAR, 0.0], [_FAR, 0.0]])]),
    torch.full((8, 2), 0.05**2),
    torch.tensor([0.95 / 6] * 6 + [0.025] * 2),
)
_COVERAGE: dict[str, Loss] = {
    "W-Flow": WFlow(eps=0.01, max_iter=20, normalize=False),
    "W-Flow, normalised": WFlow(eps=0.01),
    "W-Flow, normalised, 1 iteration": WFlow(eps=0.01, max_iter=1),
    "W-Flow, one batch": WFlow(eps=0.01, max_iter=20, normalize=False, resample=False),
    "Drifting, tau 0.05": Drifting(tau=0.05, normalize=False),
    "Drifting, three tau": Drifting(),
}


def _covered(x: Tensor, settings: Settings) -> dict[str, float]:
    n = settings.compared
    return {
        "near a mode": shares(x, SIX_AND_TWO.means, 0.25).sum().item(),
        "left": (x[:, 0] < -2.5).float().mean().item(),
        "right": (x[:, 0] > 2.5).float().mean().item(),
        "far": (x[:, 0].abs() > 2.5).float().mean().item(),
        "W2^2": exact_w2(x[:n], SIX_AND_TWO.sample(n)),
    }


def _run_coverage(settings: Settings, seed: int) -> Outcome:
    real = SIX_AND_TWO.sample(settings.drawn)
    rows, arrays = {"data": _covered(real, settings)}, {"data": real[:2000].clone()}
    for name, method in _COVERAGE.items():
        x = learned(method, SIX_AND_TWO, settings)
        rows[name], arrays[name] = _covered(x, settings), x[:2000].clone()
    return Outcome(rows, arrays)


def _rarer(table: Table, row: str) -> list[float]:
    """The share of the smaller of the two far modes, of each seed."""
    both = (table.values(row, side) for side in ("left", "right"))
    return [min(pair) for pair in zip(*both, strict=True)]


def _check_coverage(table: Table) -> Sequence[Check]:
    flow, drifting = "W-Flow", [row for row in table.rows if row.startswith("Drifting")]
    rarer = {row: estimate(_rarer(table, row)) for row in table.rows}
    checks = []
    for other in drifting:
        pairs = zip(_rarer(table, flow), _rarer(table, other), strict=True)
        more = estimate([a - b for a, b in pairs])
        says = f"W-Flow has more mass than {other} at the rarer of the two far modes"
        checks.append(Check(says, more.low > 0, f"difference {more}"))
    return [
        *checks,
        Check(
            "Drifting loses one of them: the rarer has less than a tenth of its mass, 0.025",
            all(rarer[row].mean < 0.0025 for row in drifting),
            f"largest {max(rarer[row].mean for row in drifting):.2g}",
        ),
        below(table, "W-Flow, one batch", flow, "far", "one batch has less at both", strict=True),
        Check(
            "W-Flow keeps at least half of the mass of the rarer",
            rarer[flow].mean > 0.0125,
            f"{rarer[flow]}",
            strict=True,
        ),
    ]


def _draw_coverage(figure: Figure, table: Table, arrays: Mapping[str, Tensor]) -> None:
    axes = list(figure.subplots(-(-len(arrays) // 2), 2, sharex=True, sharey=True).flat)
    for ax in axes:
        ax.set_axis_off()
    for ax, (name, x) in zip(axes, arrays.items(), strict=False):
        ax.scatter(*x.T.numpy(), s=2, linewidths=0)
        ax.set_title(name)
        ax.set(xlim=(-5, 5), ylim=(-1.3, 1.3), aspect="equal")


_EIGHT = ring(8, radius=2.0, std=0.05)
_TEMPERATURE = 0.1  # of the divergence that is reported


@dataclass(frozen=True)
class PathSettings(Settings):
    steps: int = 2000
    logs: int = 20
    grid: int = 12


_DESCENTS: dict[str, Loss] = {
    "W-Flow": WFlow(eps=0.01),
    "W-Flow, raw": WFlow(eps=0.01, max_iter=20, normalize=False),
    "W-Flow, one batch": WFlow(eps=0.01, resample=False),
    "Drifting, three tau": Drifting(),
}


def _in_ring(x: Tensor, real: Tensor) -> dict[str, float]:
    own = shares(x, _EIGHT.means, 0.25)
    return {
        "near a mode": own.sum().item(),
        "least mode": own.min().item(),
        "largest mode": own.max().item(),
        "S": divergence(x[: len(real)], real, eps=_TEMPERATURE),
    }


def _place(x: Tensor) -> list[float]:
    """Mean radius, and the deviation per axis from eight points of that radius."""
    radius = x.norm(dim=1).mean()
    nearest = torch.cdist(x, _EIGHT.means / 2 * radius).min(1).values
    return [radius.item(), (nearest.square().mean() / 2).sqrt().item()]


def _run_descents(settings: PathSettings, seed: int) -> Outcome:
    n = settings.compared
    # As many of each mode, for counts that vary would be most of the divergence.
    real = _EIGHT.means[torch.arange(n) % 8] + 0.05 * torch.randn(n, 2)
    other = _EIGHT.sample(settings.drawn)
    rows, arrays = {"data": _in_ring(other, real)}, {}
    probe = torch.randn(n, 32)
    for name, method in _DESCENTS.items():
        logged: list[list[float]] = []

        def log(step: int, net: nn.Module, logged: list[list[float]] = logged) -> None:
            # Steps of equal ratios, for most happens early.
            marks = [settings.steps ** (k / (settings.logs - 1)) for k in range(settings.logs)]
            if step + 1 in {round(mark) for mark in marks}:
                with torch.no_grad():
                    x = net(probe)
                value = divergence(x, real, eps=_TEMPERATURE)
                logged.append([step + 1, value, *_place(x)])

        x = learned(method, _EIGHT, settings, log)
        rows[name] = _in_ring(x, real)
        rows[name]["rises"] = float(sum(b[1] > 1.05 * a[1] for a, b in itertools.pairwise(logged)))
        arrays[f"path {name}"], arrays[name] = torch.tensor(logged), x[:2000].clone()
    radii = torch.linspace(0.1, 2.6, settings.grid)
    stds = torch.linspace(0.02, 1.0, settings.grid)
    noise, directions = torch.randn(n, 2), _EIGHT.means[torch.arange(n) % 8] / 2
    values = [
        [divergence(r * directions + s * noise, real, eps=_TEMPERATURE) for r in radii]
        for s in stds
    ]
    arrays |= {"radii": radii, "stds": stds, "landscape": torch.tensor(values)}
    return Outcome(rows, arrays)


def _check_descents(table: Table) -> Sequence[Check]:
    flow = table["W-Flow", "S"]
    share = table["W-Flow", "least mode"], table["W-Flow", "largest mode"]
    near, floor = table["W-Flow", "near a mode"], table["data", "S"]
    rises = max(table.values("W-Flow", "rises"))
    return [
        Check(
            "the divergence falls between logged steps of W-Flow, with one rise above 5 % at most",
            rises <= 1,
            f"{rises:.0f} rises at most",
        ),
        Check(
            "it ends within 0.02 of that between samples of the data",
            flow.mean - floor.mean < 0.02,
            f"{flow} and {floor}",
        ),
        Check(
            "W-Flow has half to twice the mass within 0.25 of each of the eight modes",
            share[0].low > 1 / 16 and share[1].high < 1 / 4,
            f"least {share[0]}, largest {share[1]} of 0.125",
            strict=True,
        ),
        Check("9 of 10 samples are near a mode", near.mean > 0.9, f"{near}", strict=True),
    ]


def _draw_descents(figure: Figure, table: Table, arrays: Mapping[str, Tensor]) -> None:
    cloud, fall, land = figure.subplots(1, 3)
    cloud.scatter(*arrays["W-Flow"].T.numpy(), s=2, linewidths=0)
    cloud.set_title("W-Flow at the end")
    cloud.set_aspect("equal")
    levels = arrays["landscape"].clamp(min=1e-3).log10()
    filled = land.contourf(arrays["radii"].numpy(), arrays["stds"].numpy(), levels.numpy(), 12)
    figure.colorbar(filled, ax=land, label="log10 of S")
    for name in _DESCENTS:
        step, value, radius, std = arrays[f"path {name}"].T.numpy()
        fall.plot(step, value, label=name, linewidth=1)
        if not name.startswith("W-Flow, "):
            land.plot(radius, std, ".-", linewidth=0.8, markersize=3, label=name)
    fall.axhline(table["data", "S"].mean, color="grey", linewidth=0.8, label="data")
    fall.set_xscale("log")
    fall.set_yscale("log")
    fall.set_xlabel("step")
    fall.set_title("divergence S from the data")
    fall.legend()
    land.set_xlabel("radius")
    land.set_ylabel("deviation from eight points")
    land.set_title("S of eight Gaussians, and paths")
    land.legend()


@dataclass(frozen=True)
class EnergySettings(Settings):
    steps: int = 800
    compared: int = 1000
    bandwidths: tuple[float, ...] = (0.1, 0.2)
    eps: float = 0.01


_LAWS = {"ring": _EIGHT, "six and two": SIX_AND_TWO}


def _run_energies(settings: EnergySettings, seed: int) -> Outcome:
    rows: dict[str, dict[str, float]] = {}
    arrays: dict[str, Tensor] = {}
    for title, law in _LAWS.items():
        methods: dict[str, Loss] = {"Sinkhorn": WFlow(eps=settings.eps)}
        for energy in get_args(Energy):
            for h in settings.bandwidths:
                methods[f"{energy.upper()}, h {h:g}"] = KernelFlow(energy, bandwidth=h)
        real = law.sample(settings.drawn)
        for name, method in {"data": None, **methods}.items():
            x = law.sample(settings.drawn) if method is None else learned(method, law, settings)
            n, own = settings.compared, shares(x, law.means, 0.25)
            rows[f"{title}: {name}"] = {
                "near a mode": own.sum().item(),
                "least mode": (own / shares(real, law.means, 0.25)).min().item(),
                "sliced W2^2": sliced_w2(x, real),
                "W2^2": exact_w2(x[:n], real[:n]),
            }
            arrays[f"{title}: {name}"] = x[:1000].clone()
    return Outcome(rows, arrays)


def _best(table: Table, law: str, energy: str) -> str:
    rows = [row for row in table.rows if row.startswith(f"{law}: {energy}")]
    return min(rows, key=lambda row: table[row, "sliced W2^2"].mean)


def _check_energies(table: Table) -> Sequence[Check]:
    checks = []
    for law in _LAWS:
        flow = f"{law}: Sinkhorn"
        for energy in ("MMD", "KL"):
            best = _best(table, law, energy)
            checks.append(
                below(table, flow, best, "sliced W2^2", f"Sinkhorn is closer than {best}")
            )
            more = f"Sinkhorn has more of its rarest mode than {best}"
            checks.append(below(table, best, flow, "least mode", more, strict=True))
    return checks


def _draw_energies(figure: Figure, table: Table, arrays: Mapping[str, Tensor]) -> None:
    names = [
        name
        for law in _LAWS
        for name in (
            *(f"{law}: data", f"{law}: Sinkhorn"),
            *(_best(table, law, energy) for energy in ("MMD", "KL")),
        )
    ]
    axes = figure.subplots(len(_LAWS), 4, sharex="row", sharey="row").flat
    for ax, name in zip(axes, names, strict=True):
        ax.scatter(*arrays[name].T.numpy(), s=2, linewidths=0)
        ax.set_title(name)
        ax.set_axis_off()


OWN = [
    Experiment(
        name="eight-gaussians",
        claim="Training a generator on the velocities of the flow takes it down the Sinkhorn"
        " divergence to the data, shown on eight Gaussians.",
        source="arXiv 2605.11755, figure 2b",
        setting="Eight Gaussians of deviation 0.05 on a circle of radius 2. S is the converged"
        f" Sinkhorn divergence at eps {_TEMPERATURE:g}, for the cost |x - y|^2 / 2.",
        full=PathSettings(),
        fast=PathSettings(128, 300, 4000, 500, logs=6, grid=4),
        run=_run_descents,
        check=_check_descents,
        draw=_draw_descents,
        columns={
            "near a mode": "share of samples within 0.25 of one",
            "least, largest mode": "share of a mode, 0.125 in the data",
            "S": "divergence from a sample of the data",
            "rises": "logged steps at which S rose by more than 5 %",
        },
        remark="2000 steps with batches of 256 leave a third of the samples between modes, which"
        " costs little energy. Normalised velocities are sharper than raw ones in as many steps."
        " Drifting ties with W-Flow here.",
        size=(11.0, 3.2),
    ),
    Experiment(
        name="energies",
        claim="Squared MMD and KL as energies, in the place of the Sinkhorn divergence, do worse.",
        source="arXiv 2605.11755, ablation of energies",
        setting="The eight Gaussians of `eight-gaussians` and the modes of `mode-coverage`, with"
        " one trainer, one batch size and normalised velocities. MMD and KL have a Gaussian kernel"
        " (`fewstep.baselines.KernelFlow`), whose bandwidth h is a share of the root of the mean"
        " squared distance. The best of two bandwidths is compared, by sliced W2^2.",
        full=EnergySettings(),
        fast=EnergySettings(128, 200, 4000, 500, bandwidths=(0.1,)),
        run=_run_energies,
        check=_check_energies,
        draw=_draw_energies,
        columns={
            "near a mode": "share of samples within 0.25 of one",
            "least mode": "smallest share of a mode, over that in the data",
            "sliced W2^2, W2^2": "squared distances to a sample of the data",
        },
        remark="With kernels this narrow the KL sees the nearest mode alone, and every generator"
        " collapses to one. MMD is close behind on the ring at the larger bandwidth. After these"
        " steps no method has samples at both far modes.",
        size=(9.0, 4.4),
    ),
    Experiment(
        name="mode-coverage",
        claim="On six large modes and two small distant ones, Drifting loses the small ones. The"
        " flow of the Sinkhorn divergence keeps them.",
        source="arXiv 2605.11755, figures 6a and 7",
        setting="Six modes on the unit circle hold 95 % of the mass, and two at (4, 0) and (-4, 0)"
        " the rest. The geometry of the figure is not public. Drifting is in its healthy form, in"
        " logarithms and without the floor of the released code.",
        full=Settings(),
        fast=Settings(points=128, steps=300, drawn=4000, compared=500),
        run=_run_coverage,
        check=_check_coverage,
        draw=_draw_coverage,
        columns={
            "near a mode": "share of samples within 0.25 of one",
            "left, right, far": "shares with x < -2.5, x > 2.5, and either; 0.025, 0.025 and 0.05"
            " in the data",
            "W2^2": "squared Wasserstein distance to as many samples of the data",
        },
        remark="The far modes have 6 of the 256 points of a batch. In as many steps W-Flow recovers"
        " 4 tenths of their mass, and is less sharp at the six than Drifting. Drifting at one"
        " temperature filled one of the far modes in one of the seeds.",
        size=(8.0, 5.0),
    ),
]
