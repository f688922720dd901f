"""How the samplers of a student do beside its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep._torch import seeded
from fewstep.data.images import Images
from fewstep.metrics.straightness import Straightness, straightness
from fewstep.metrics.summary import MetricRow, report
from fewstep.metrics.tables import aligned
from fewstep.ops.heun.solve import heun_solve
from fewstep.samplers.seeds import latents
from fewstep.training import plots
from fewstep.training.lines_run import (
    EVALUATION,
    SAMPLERS,
    Run,
    conditioned,
    most_steps,
    sample,
    teach,
)
from fewstep.training.runs import PICTURE

_STRAIGHT, _NODES = 256, 50  # paths and steps by which straightness is measured


@dataclass(frozen=True)
class Outcome:
    """A sampler's numbers: distances of its samples from the data, and of each from the teacher's.

    Attributes:
        rows: of `fewstep.metrics.report`.
        error: rms difference, over pixels, from the teacher's image of the same noise.
    """

    rows: list[MetricRow]
    error: float


@torch.no_grad()
def evaluate(
    run: Run, data: Images, teacher: nn.Module, student: nn.Module, out: Path
) -> tuple[dict[str, Outcome], dict[str, Straightness], Path]:
    """Teacher and student against the data, straightness of their paths, and a picture."""
    config, n = run.config, len(data.images)
    m = min(2000, n)
    labels = None
    if run.classes and data.labels is not None:
        labels = data.labels.sort().values[torch.arange(m) * n // m]
    seeds = torch.arange(m) + (config.seed << 32) + EVALUATION
    of_teacher = teach(teacher, run, seeds, labels)

    def measure(images: Tensor) -> Outcome:
        rows = report(
            data.images,
            images.clamp(-1, 1),
            real_labels=data.labels,
            generated_labels=labels,
            seed=config.seed,
        )
        return Outcome(rows, (images - of_teacher.clamp(-1, 1)).square().mean().sqrt().item())

    outcomes = {f"teacher, {2 * config.lines.levels - 1}": measure(of_teacher.clamp(-1, 1))}
    counts = [k for k in (1, 2, 3) if k <= most_steps(config.lines)]
    for steps in counts:
        for mode in SAMPLERS if steps > 1 else SAMPLERS[:1]:
            images = sample(student, run, seeds, labels=labels, steps=steps, mode=mode)
            outcomes[f"{steps} {mode}" if steps > 1 else "1"] = measure(images)
    straight = {
        name: _straightness(network, run, seeds[:_STRAIGHT], labels)
        for name, network in (("teacher", teacher), ("student", student))
    }
    picture = out / PICTURE
    columns, rows = 10, 3
    shown = torch.arange(columns * rows) % m
    classes = torch.arange(len(shown)) % len(run.classes) if run.classes else None
    groups = {"teacher": teach(teacher, run, seeds[shown], classes)}
    for steps in counts:
        images = sample(student, run, seeds[shown], labels=classes, steps=steps)
        groups[f"{steps} step{'s' * (steps > 1)}"] = images
    chosen = torch.randperm(n, generator=seeded(config.seed, 1))
    if run.classes and data.labels is not None:
        turns = torch.stack([(data.labels[chosen] == k).cumsum(0) for k in range(len(run.classes))])
        # Each image's place among its own class's: columns are classes, as those generated are.
        order = turns.gather(0, data.labels[chosen][None])[0] * len(run.classes)
        chosen = chosen[(order + data.labels[chosen]).argsort()]
    plots.save_comparison(
        picture,
        data.images[chosen[torch.arange(len(groups) * len(shown)) % n]],
        torch.cat(list(groups.values())).clamp(-1, 1),
        columns=columns,
        names=[name for name in groups for _ in range(rows)],
        real_names=(),
    )
    return outcomes, straight, picture


def format_outcomes(outcomes: dict[str, Outcome], straight: dict[str, Straightness]) -> str:
    """A table of all samplers with the real-vs-real floor, and one of the paths' straightness."""
    first = next(iter(outcomes.values()))
    lines: list[tuple[str, ...]] = [("metric", *outcomes, "real vs real")]
    for i, row in enumerate(first.rows):
        values = (f"{outcome.rows[i].value:.3g}" for outcome in outcomes.values())
        lines.append((row.name, *values, f"{row.floor:.3g}"))
    errors = (f"{outcome.error:.3g}" for outcome in outcomes.values())
    lines.append(("rms from teacher", *errors, ""))
    names = {"s1": "S1", "s1_rms": "S1/sqrt(D)", "s2": "S2/D", "speed": "speed's variation"}
    paths: list[tuple[str, ...]] = [("straightness", *straight)]
    for key, name in names.items():
        paths.append((name, *(f"{getattr(s, key):.3g}" for s in straight.values())))
    return f"{aligned(lines)}\n\n{aligned(paths)}"


def _straightness(
    network: nn.Module, run: Run, seeds: Tensor, labels: Tensor | None
) -> Straightness:
    """Of Heun's paths of `dz/ds = (z - N) / s` from noise to nearly s = 0."""
    predict = conditioned(network, None if labels is None else labels[: len(seeds)])

    def velocity(z: Tensor, s: Tensor) -> Tensor:
        wide = s[:, None, None, None]
        return (z - predict(z / (1 - wide), s / (1 - s))) / wide

    lines = run.config.lines
    high, low = (v / (1 + v) for v in (lines.sigma_max, lines.sigma_min))
    times = torch.linspace(high, low, _NODES + 1)
    solved = heun_solve(velocity, high * latents(seeds, run.image_shape), times, keep=True)
    assert solved.path is not None
    return straightness(solved.path, times)
