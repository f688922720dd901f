"""`fewstep train wflow`: a one-step generator, trained with `fewstep.methods.WFlow`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from fewstep._torch import seeded
from fewstep.data.images import Images
from fewstep.methods import WFlow
from fewstep.metrics.summary import MetricRow, format_report, report
from fewstep.networks import MLPGenerator
from fewstep.training import plots
from fewstep.training.loop import Stage
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


@dataclass(frozen=True)
class WFlowConfig(RunConfig):
    """Settings of `fewstep train wflow`.

    Attributes:
        steps: number of optimizer steps.
        batch: number of points of each class per step, in each of three clouds: the generated one
            that moves, a second generated one, and the real one.
        groups: number of classes per step. They are drawn at random if the data has more.
        noise_dim: dimension of the noise that the generator takes.
        width: number of units of a hidden layer.
        depth: number of hidden layers.
        flow: settings of the loss.
    """

    steps: int = 1500
    batch: int = 128
    groups: int = 10
    lr: float = 5e-3
    noise_dim: int = 8
    width: int = 512
    depth: int = 3
    flow: WFlow = field(default_factory=lambda: WFlow(eps=0.02))


PRESETS = {
    "digits": WFlowConfig("digits", steps=1000, batch=64),
    "mnist5k": WFlowConfig("mnist5k"),
}


@dataclass(frozen=True)
class WFlowReport(Report):
    """How well a generator does.

    Attributes:
        rows: rows of `fewstep.metrics.report`.
    """

    rows: list[MetricRow]


def evaluate(session: Session[WFlowConfig], networks: dict[str, nn.Module]) -> WFlowReport:
    """Measure up to 2000 samples against the data and picture them, one row per class.

    The samples have the classes of the data in the same proportions.
    """
    generator, data, seed = networks[""], session.data, session.run.config.seed
    n = len(data.images)
    m = min(2000, n)
    labels = None
    columns, rows = 10, 10
    real, names = data.images[: columns * rows], data.names[:20]
    shown: Tensor | None = None
    if data.labels is not None:
        labels = data.labels.sort().values[torch.arange(m) * n // m]
        pools = [(data.labels == k).nonzero()[:, 0] for k in range(len(names))]
        real = data.images[torch.cat([pool[torch.arange(columns) % len(pool)] for pool in pools])]
        shown = torch.arange(len(names)).repeat_interleave(columns)
    picture = session.out / PICTURE
    pictured = sample(generator, session.run, len(real), labels=shown, seed=seed + 1)
    plots.save_comparison(picture, real, pictured, columns=columns, names=names)
    generated = sample(generator, session.run, m, labels=labels, seed=seed)
    table = report(
        data.images, generated, real_labels=data.labels, generated_labels=labels, seed=seed
    )
    return WFlowReport(format_report(table), picture, table)


@torch.no_grad()
def sample(
    generator: nn.Module,
    run: Run[WFlowConfig],
    n: int,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw n images `[n, C, H, W]` in [-1, 1] from seeded noise, of classes `labels [n]`.

    Without labels, the classes of a conditional generator take turns. The noise of the first k
    samples does not depend on n.
    """
    noise = sample_noise(n, (run.config.noise_dim,), seed=seed)
    if labels is None and run.classes:
        labels = torch.arange(n) % len(run.classes)
    return cast(Tensor, generator(noise, labels))


def _networks(run: Run[WFlowConfig]) -> dict[str, NetworkRecipe]:
    config = run.config

    def make() -> MLPGenerator:
        return MLPGenerator(
            run.image_shape,
            classes=len(run.classes),
            noise_dim=config.noise_dim,
            width=config.width,
            depth=config.depth,
        )

    return {"": NetworkRecipe(make, config.seed, config.lr, config.ema)}


def _stages(session: Session[WFlowConfig]) -> list[Stage]:
    run, device, network = session.run, session.device, session.networks[""]
    config, classes = run.config, _classes(session.data)

    def update(step: int) -> dict[str, Tensor]:
        labels, noise, real = _draw(config, classes, step)
        loss, metrics = config.flow(
            network.model,
            noise.to(device),
            real.to(device),
            labels.to(device) if run.classes else None,
        )
        network.step(loss, step / config.steps, step)
        return {"drift": metrics.pop("drift"), "loss": loss, **metrics}

    return [Stage("", config.steps, update)]


def _classes(data: Images) -> list[Tensor]:
    """The images of each class, or all images as one class if there are no labels."""
    if data.labels is None:
        return [data.images]
    return [data.images[data.labels == k] for k in range(len(data.names))]


def _draw(config: WFlowConfig, classes: list[Tensor], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels `[G]`, noise `[2, G, N, Z]` and real images `[G, N, C, H, W]` of one step.

    Images are drawn without replacement, or with it from a class of fewer than N.
    """
    rng = seeded(config.seed, step + 1)
    groups, n = min(config.groups, len(classes)), config.batch
    labels = torch.randperm(len(classes), generator=rng)[:groups]

    def choose(images: Tensor) -> Tensor:
        count = len(images)
        if count < n:
            return images[torch.randint(count, (n,), generator=rng)]
        return images[torch.randperm(count, generator=rng)[:n]]

    real = torch.stack([choose(classes[k]) for k in labels.tolist()])
    noise = torch.randn(2, groups, n, config.noise_dim, generator=rng)
    return labels, noise, real


TRAINER = Trainer(
    name="wflow",
    summary="Train a one-step generator along the Wasserstein gradient flow.",
    config=WFlowConfig,
    presets=PRESETS,
    networks=_networks,
    stages=_stages,
    report=evaluate,
    sample=sample,
    network="",
)
preset, read_run, train = TRAINER.preset, TRAINER.read_run, TRAINER.train
