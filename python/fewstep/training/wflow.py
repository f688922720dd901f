"""`fewstep train wflow`: a one-step generator, trained with `fewstep.methods.WFlow`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep._checks import count
from fewstep._torch import seeded
from fewstep.data.images import Images
from fewstep.methods import Queues, WFlow, features, sample_scales
from fewstep.methods.problems import Features
from fewstep.methods.ranks import Hold
from fewstep.metrics.summary import MetricRow, format_report, report
from fewstep.networks import MLPGenerator, check_network, generator_noise, in_batches
from fewstep.networks import generator as generator_of
from fewstep.training import plots
from fewstep.training.encoder import features_of
from fewstep.training.loop import Losses, Stage
from fewstep.training.ranks import Ranks
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

_OF_ALL = 1000  # images of the queue of all classes
_MORE = 2**40  # what is drawn beyond labels, noise and real images has generators of its own


@dataclass(frozen=True)
class WFlowConfig(RunConfig):
    """Settings of `fewstep train wflow`.

    Attributes:
        steps: number of optimizer steps.
        batch: number of points of each class per step, in each of three clouds: the generated one
            that moves, a second generated one, and the real one.
        groups: number of classes per step. They are drawn at random if the data has more.
        network: kind of network, "mlp" or a name of `fewstep.networks.image_body`, such as "conv"
            and "B/2", whose width and depth are in the name. In a shell, the default lr of
            transformers is at most 4e-4.
        noise_dim: dimension of the noise that network mlp takes. Others take an image of it.
        width: number of units of a hidden layer of network mlp.
        depth: number of hidden layers of network mlp.
        positives: number of real points of each class per step; as many as batch if not given.
        queue: number of images that a queue of each class holds. Real points are then drawn from
            the queues, and points to be guided away from out of one of 1000 images of all classes.
            Without it they are drawn from the data.
        push: number of images that come into the queues per step.
        scale_high: largest scale of guidance. Above 1 the generator takes the scale as an input,
            and each class of a step draws one from 1 to this.
        scale_power: exponent of the density of scales, which falls as scale^-power.
        scale_none: share of scales that are 1, which is no guidance.
        uncond: number of real points of all classes that guidance leads each class away from.
        patches: widths of square patches, divisors of the image's. Clouds of the patches at each
            place are compared beside those of whole images. "None" compares whole images alone.
        features: encoder whose maps are compared beside whole images, as
            `fewstep.methods.features.around` has them. It is the folder of a run of `fewstep train
            encoder`, or MODULE:NAME of a torch module or of a function that returns one, which maps
            images [B, C, H, W] to a map or to a dict or list of them.
        flow: settings of the loss.

    Raises:
        ValueError: a number is outside its range.
    """

    steps: int = 1500
    batch: int = 128
    groups: int = 10
    lr: float = 5e-3
    network: str = "mlp"
    noise_dim: int = 8
    width: int = 512
    depth: int = 3
    positives: int | None = None
    queue: int | None = None
    push: int = 64
    scale_high: float = 1.0
    scale_power: float = 3.0
    scale_none: float = 0.0
    uncond: int = 16
    patches: tuple[int, ...] | None = None
    features: str = ""
    flow: WFlow = field(default_factory=lambda: WFlow(eps=0.02))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self.network)
        for name in ("positives", "queue"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, count("WFlowConfig", name, getattr(self, name)))
        if self.patches is not None:  # JSON has lists
            own = tuple(count("WFlowConfig", "patches", size) for size in self.patches)
            object.__setattr__(self, "patches", own or None)
        if self.patches and self.features:
            raise ValueError(f"patches must be None beside features, got {self.patches}")
        sample_scales(0, high=self.scale_high, power=self.scale_power, none=self.scale_none)

    @property
    def guided(self) -> bool:
        return self.scale_high > 1


class GuidedGenerator(MLPGenerator):
    """An `MLPGenerator` that takes the scale of guidance, by its logarithm beside the noise."""

    def __init__(self, image_shape: tuple[int, ...], *, noise_dim: int, **options: int) -> None:
        super().__init__(image_shape, noise_dim=noise_dim + 1, **options)

    def forward(
        self, noise: Tensor, labels: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """As an `MLPGenerator`, for scales `[n]`, 1 if none are given."""
        scale = torch.ones_like(noise[:, 0]) if scale is None else scale
        return super().forward(torch.cat([noise, scale.log()[:, None]], 1), labels)


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
    scale: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw n images `[n, C, H, W]` in [-1, 1] from seeded noise, of classes `labels [n]`.

    Without labels, the classes of a conditional generator take turns. The noise of the first k
    samples does not depend on n. The scale of guidance is for runs that were trained with one, 1 if
    not given.

    Raises:
        ValueError: a scale that the run was not trained for.
    """
    noise = sample_noise(n, (_noise_dim(run.config, run.image_shape),), seed=seed)
    draw = in_batches(generator)
    if labels is None and run.classes:
        labels = torch.arange(n) % len(run.classes)
    if scale is None:
        return draw(noise, labels)
    if not 1 <= scale <= run.config.scale_high:
        raise ValueError(
            f"scale must be from 1 to {run.config.scale_high}, as the run was trained, got {scale}"
        )
    condition = (noise.new_full((n,), scale),) if run.config.guided else ()
    return draw(noise, labels, *condition)


def _networks(run: Run[WFlowConfig]) -> dict[str, NetworkRecipe]:
    config = run.config
    check_network(config.network, run.image_shape)

    def make() -> nn.Module:
        if config.network != "mlp":
            classes, guided = len(run.classes), config.guided
            return generator_of(config.network, run.image_shape, classes=classes, guided=guided)
        kind = GuidedGenerator if config.guided else MLPGenerator
        return kind(
            run.image_shape,
            classes=len(run.classes),
            noise_dim=config.noise_dim,
            width=config.width,
            depth=config.depth,
        )

    return {"": NetworkRecipe(make, config.seed, config.lr, config.ema)}


def _stages(session: Session[WFlowConfig]) -> list[Stage]:
    run, device, network = session.run, session.device, session.networks[""]
    config, data, classes = run.config, session.data, _classes(session.data)
    if config.guided and len(classes) < 2:
        raise ValueError(
            f"scale_high: guidance needs data with classes, got {config.scale_high}"
            f" for {config.data}"
        )
    queues = None if config.queue is None else _queues(config, data)
    encoder: nn.Module | None = None
    spaces: Features | None = partial(_with_patches, config.patches) if config.patches else None
    if config.features:
        encoder = features_of(config.features, run.image_shape[0]).to(device)
        spaces = features.around(encoder)
        with torch.no_grad():
            spaces(data.images[:2].to(device))  # before any step, an error of what it returns

    ranks, micro = session.ranks, config.accumulate
    flow = config.flow if micro == 1 else replace(config.flow, micro_batches=micro)
    groups = min(config.groups, len(classes))
    hold: Hold = "groups" if groups % ranks.world == 0 else "points"
    if hold == "points":
        ranks.divide(f"batch, for {groups} classes on {ranks.world} ranks,", config.batch, 1)
    # Of noise [2, G, N, Z] and real images [G, M, ...], and of [G, ..] besides.
    mine = {"groups": (1, 0), "points": (2, 1)}[hold]
    own = partial(_share, ranks)

    def update(step: int) -> dict[str, Tensor]:
        labels, noise, real = _draw(config, classes, step)
        rng = seeded(config.seed, _MORE + step)
        if queues is not None:
            _push(queues, data, config.push, rng)
            real = queues[0].draw(real.shape[1], labels, generator=rng)
        guidance: dict[str, Any] = {}
        if config.guided:
            high, power, none = config.scale_high, config.scale_power, config.scale_none
            scale = sample_scales(len(labels), high=high, power=power, none=none, generator=rng)
            total = len(labels) * config.uncond
            if queues is not None:
                away = queues[1].draw(total, generator=rng)
            else:
                away = data.images[torch.randint(len(data.images), (total,), generator=rng)]
            away = own(away.reshape(len(labels), config.uncond, *away.shape[1:]), mine[1])
            scale = own(scale, 0) if hold == "groups" else scale
            guidance = {"uncond": away.to(device), "scale": scale.to(device)}
        noise, real = own(noise, mine[0]), own(real, mine[1])
        labels = own(labels, 0) if hold == "groups" else labels

        def loss() -> Losses:
            return flow(
                network.model,
                noise.to(device),
                real.to(device),
                labels.to(device) if run.classes else None,
                features=spaces,
                process_group=ranks.group,
                ranks_hold=None if ranks.group is None else hold,
                **guidance,
            )

        found = network.step([loss], step / config.steps, step)
        return {"drift": found.pop("drift"), **found}

    def begin(step: int) -> None:
        if step == 0 and queues is not None:
            for images, k in zip(classes, range(len(classes)), strict=True):
                rng = seeded(config.seed, _MORE - 1 - k)
                some = images[torch.randperm(len(images), generator=rng)[: queues[0].capacity]]
                queues[0].push(some, torch.full((len(some),), k))
            rng = seeded(config.seed, _MORE - 1 - len(classes))
            order = torch.randperm(len(data.images), generator=rng)
            queues[1].push(data.images[order[:_OF_ALL]])

    state = {
        f"queues.{i}.{name}": t
        for i, queue in enumerate(queues or ())
        for name, t in queue.state().items()
    }
    if encoder is not None:  # a resumed run has the weights that it began with
        state |= {f"features.{name}": t for name, t in encoder.state_dict().items()}
    return [Stage("", config.steps, update, begin, state)]


def _share(ranks: Ranks, t: Tensor, axis: int) -> Tensor:
    """A rank's part of a tensor that all have."""
    return t.tensor_split(ranks.world, axis)[ranks.rank]


def _with_patches(sizes: tuple[int, ...], images: Tensor) -> dict[str, Tensor]:
    return {"image": images.flatten(1)} | {
        f"patches{size}": features.patch_vectors(images, size) for size in sizes
    }


def _queues(config: WFlowConfig, data: Images) -> tuple[Queues, Queues]:
    """A queue for each class, and one of all."""
    shape, classes = data.images.shape[1:], max(1, len(data.names))
    assert config.queue is not None
    return Queues(shape, classes=classes, capacity=config.queue), Queues(shape, capacity=_OF_ALL)


def _push(queues: tuple[Queues, Queues], data: Images, n: int, rng: torch.Generator) -> None:
    chosen = torch.randint(len(data.images), (n,), generator=rng)
    queues[0].push(data.images[chosen], None if data.labels is None else data.labels[chosen])
    queues[1].push(data.images[chosen])


def _classes(data: Images) -> list[Tensor]:
    """The images of each class, or all images as one class if there are no labels."""
    if data.labels is None:
        return [data.images]
    return [data.images[data.labels == k] for k in range(len(data.names))]


def _noise_dim(config: WFlowConfig, image_shape: Sequence[int]) -> int:
    return config.noise_dim if config.network == "mlp" else generator_noise(image_shape)


def _draw(config: WFlowConfig, classes: list[Tensor], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels `[G]`, noise `[2, G, N, Z]` and real images `[G, M, C, H, W]` of one step.

    Images are drawn without replacement, or with it from a class of fewer than M.
    """
    rng = seeded(config.seed, step + 1)
    groups, n = min(config.groups, len(classes)), config.batch
    labels = torch.randperm(len(classes), generator=rng)[:groups]

    def choose(images: Tensor) -> Tensor:
        total, m = len(images), config.positives or n
        if total < m:
            return images[torch.randint(total, (m,), generator=rng)]
        return images[torch.randperm(total, generator=rng)[:m]]

    real = torch.stack([choose(classes[k]) for k in labels.tolist()])
    dim = _noise_dim(config, classes[0].shape[1:])
    noise = torch.randn(2, groups, n, dim, generator=rng)
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
    batches=(),
)
preset, read_run, train = TRAINER.preset, TRAINER.read_run, TRAINER.train
