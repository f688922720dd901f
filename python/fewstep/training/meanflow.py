"""`fewstep train meanflow`: an average velocity, trained with `fewstep.methods.MeanFlow`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fewstep._torch import seeded
from fewstep.data.images import Images
from fewstep.methods import MeanFlow, meanflow_sample
from fewstep.metrics.summary import MetricRow, report
from fewstep.metrics.tables import aligned
from fewstep.networks import AverageVelocityMLP, average_velocity, check_network, in_batches
from fewstep.training import plots
from fewstep.training.loop import Losses, Stage
from fewstep.training.runs import (
    PICTURE,
    NetworkRecipe,
    Report,
    Run,
    RunConfig,
    Session,
    Trainer,
    sample_noise,
)

_COUNTS = (1, 2, 4)  # steps of the samplers in the report


@dataclass(frozen=True)
class MeanFlowConfig(RunConfig):
    """Settings of `fewstep train meanflow`.

    Attributes:
        steps: number of optimizer steps.
        batch: number of images per step.
        network: kind of network, "mlp" or a name of `fewstep.networks.image_body`, such as "conv"
            and "B/2", whose width and depth are in the name. In a shell, the default lr of
            transformers is at most 4e-4.
        width: number of units of the residual stream of network mlp.
        depth: number of residual blocks of network mlp.
        flow: settings of the loss.
    """

    steps: int = 6000
    batch: int = 256
    network: str = "mlp"
    width: int = 384
    depth: int = 3
    flow: MeanFlow = field(
        default_factory=lambda: MeanFlow(improved=True, ratio=0.5, std=1.6, power=0.5)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self.network)


PRESETS = {
    "digits": MeanFlowConfig("digits", lr=4e-3, steps=3500, width=256),
    "mnist5k": MeanFlowConfig("mnist5k"),
}


@dataclass(frozen=True)
class MeanFlowReport(Report):
    """How well a network does by the number of its steps.

    Attributes:
        samplers: rows of `fewstep.metrics.report` by number of steps, 1, 2 and 4.
    """

    samplers: dict[int, list[MetricRow]]


def evaluate(session: Session[MeanFlowConfig], networks: dict[str, nn.Module]) -> MeanFlowReport:
    """Measure up to 2000 samples of each sampler against the data, and picture them.

    The samples have the classes of the data in the same proportions.
    """
    network, run, data = networks[""], session.run, session.data
    n, seed = len(data.images), session.run.config.seed
    m = min(2000, n)
    labels = None
    if run.classes and data.labels is not None:
        labels = data.labels.sort().values[torch.arange(m) * n // m]
    samplers = {
        steps: report(
            data.images,
            sample(network, run, m, labels=labels, seed=seed, steps=steps),
            real_labels=data.labels,
            generated_labels=labels,
            seed=seed,
        )
        for steps in _COUNTS
    }
    _picture(session, network)
    names = [f"{steps} step{'s' * (steps > 1)}" for steps in samplers]
    lines: list[tuple[str, ...]] = [("metric", *names, "real vs real")]
    for rows in zip(*samplers.values(), strict=True):
        values = (f"{row.value:.3g}" for row in rows)
        lines.append((rows[0].name, *values, f"{rows[0].floor:.3g}"))
    return MeanFlowReport(aligned(lines), session.out / PICTURE, samplers)


def _picture(session: Session[MeanFlowConfig], network: nn.Module) -> None:
    """Rows of samples in 1, 2 and 4 steps from the same noise, beside real images."""
    run, data, seed = session.run, session.data, session.run.config.seed
    columns, rows = 10, 4
    shown = columns * rows
    images = [sample(network, run, shown, seed=seed + 1, steps=steps) for steps in _COUNTS]
    chosen = torch.randperm(len(data.images), generator=seeded(seed, 0))
    if run.classes and data.labels is not None:
        pools = [chosen[data.labels[chosen] == k] for k in range(len(run.classes))]
        at = torch.arange(len(_COUNTS) * shown)
        turns = [pools[i % len(pools)] for i in at.tolist()]
        places = (at // len(pools)).tolist()
        chosen = torch.stack([pool[k % len(pool)] for pool, k in zip(turns, places, strict=True)])
    plots.save_comparison(
        session.out / PICTURE,
        data.images[chosen[torch.arange(len(_COUNTS) * shown) % len(chosen)]],
        torch.cat(images),
        columns=columns,
        names=[f"{steps} step{'s' * (steps > 1)}" for steps in _COUNTS for _ in range(rows)],
        real_names=(),
    )


@torch.no_grad()
def sample(
    network: nn.Module,
    run: Run[MeanFlowConfig],
    n: int,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    steps: int = 1,
) -> Tensor:
    """Draw n images `[n, C, H, W]` in `steps` steps from seeded noise, clipped to [-1, 1].

    Without labels, the classes of a conditional network take turns.

    Raises:
        ValueError: steps is below 1.
    """
    noise = sample_noise(n, run.image_shape, seed=seed)
    if labels is None and run.classes:
        labels = torch.arange(n) % len(run.classes)
    return meanflow_sample(in_batches(network), noise, labels, steps=steps).clamp(-1, 1)


def _networks(run: Run[MeanFlowConfig]) -> dict[str, NetworkRecipe]:
    config = run.config
    check_network(config.network, run.image_shape)

    def make() -> nn.Module:
        if config.network != "mlp":
            return average_velocity(config.network, run.image_shape, classes=len(run.classes))
        return AverageVelocityMLP(
            run.image_shape, classes=len(run.classes), width=config.width, depth=config.depth
        )

    return {"": NetworkRecipe(make, config.seed, config.lr, config.ema)}


def _stages(session: Session[MeanFlowConfig]) -> list[Stage]:
    run, device, network = session.run, session.device, session.networks[""]
    config = run.config

    def update(step: int) -> dict[str, Tensor]:
        rng = seeded(config.seed, step + 1)
        chosen = torch.randint(len(session.data.images), (config.batch,), generator=rng)

        parts = [*session.parts(config.batch, rng)]
        diverged: list[FloatingPointError] = []

        def loss(rows: slice, ids: Tensor, rng: torch.Generator) -> Losses:
            images, labels = _some(session.data, chosen[rows])
            given = labels.to(device) if labels is not None and run.classes else None
            try:
                value, metrics = config.flow(
                    network.model,
                    images.to(device),
                    given,
                    null_label=len(run.classes) or None,
                    generator=rng,
                    sample_ids=ids,
                )
            except FloatingPointError as error:  # every sample of this part is left out
                diverged.append(error)
                if len(diverged) == len(parts):
                    raise
                none = torch.zeros((), device=device)
                zeros = dict.fromkeys(("error", "tangent"), none)
                return none.clone().requires_grad_(), zeros | {"skipped": none + 1}
            # A mean over the samples of all parts and ranks, where those left out count as 0.
            return value * (1 - metrics["skipped"]), metrics

        found = network.step([partial(loss, *part) for part in parts], step / config.steps, step)
        return {"error": found.pop("error"), **found}

    return [Stage("", config.steps, update)]


def _some(data: Images, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images `[B, C, H, W]` and their labels `[B]`."""
    return data.images[chosen], None if data.labels is None else data.labels[chosen]


TRAINER = Trainer(
    name="meanflow",
    summary="Train an average velocity that draws samples in one or a few steps, from data alone.",
    config=MeanFlowConfig,
    presets=PRESETS,
    networks=_networks,
    stages=_stages,
    report=evaluate,
    sample=sample,
    network="",
)
preset, read_run, train = TRAINER.preset, TRAINER.read_run, TRAINER.train
