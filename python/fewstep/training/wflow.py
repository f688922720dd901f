"""Training a one-step generator from a configuration, with checkpoints, logs and a report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewstep._checks import check_config
from fewstep._files import one_writer
from fewstep._torch import seeded, torch_device
from fewstep.data.images import Images
from fewstep.methods import WFlow
from fewstep.metrics.summary import MetricRow, format_report, report
from fewstep.networks import MLPGenerator
from fewstep.training import checkpoint, plots
from fewstep.training.loop import CHECKPOINT, Network, Stage, fit
from fewstep.training.runs import (
    PICTURE,
    classes_in,
    load_enough,
    open_run,
    read_config,
    require_extra,
    shape_in,
)


@dataclass(frozen=True)
class TrainConfig:
    """What decides a run, all of it.

    Attributes:
        data: "digits", "mnist5k", a .npy file, or a folder of images.
        steps: optimizer steps.
        batch: points of each class per step, in each of the three clouds.
        groups: classes per step, drawn at random where there are more.
        lr: Adam's learning rate after 50 steps of warm-up; a cosine takes it to 0.
        ema: decay of the averaged weights, which make the samples.
        noise_dim: dimension of the noise.
        width: of the hidden layers.
        depth: hidden layers.
        seed: of the weights, the noise and the batches.
        log_every: steps between entries in the logs.
        checkpoint_every: steps between checkpoints.
        device: "auto" takes a GPU where there is one.
        flow: the method's own numbers.

    Raises:
        ValueError: a number outside its range.
    """

    data: str
    steps: int = 1500
    batch: int = 128
    groups: int = 10
    lr: float = 5e-3
    ema: float = 0.995
    noise_dim: int = 8
    width: int = 512
    depth: int = 3
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 250
    device: str = "auto"
    flow: WFlow = field(default_factory=lambda: WFlow(eps=0.02))

    def __post_init__(self) -> None:
        sizes = ("steps", "batch", "groups", "noise_dim", "width", "depth")
        check_config(self, *sizes, "log_every", "checkpoint_every")


PRESETS = {
    "digits": TrainConfig("digits", steps=1000, batch=64),
    "mnist5k": TrainConfig("mnist5k"),
}


@dataclass(frozen=True)
class Run:
    """A folder's `config.json`: the configuration and what the generator's shape needs."""

    config: TrainConfig
    image_shape: tuple[int, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        generator: with the averaged weights, on the CPU, in evaluation mode.
        rows: the metrics of `fewstep.metrics.report`.
        picture: path of the PNG with real and generated images side by side.
    """

    generator: MLPGenerator
    rows: list[MetricRow]
    picture: Path

    @property
    def table(self) -> str:
        """The metrics in plain text."""
        return format_report(self.rows)


def preset(data: str) -> TrainConfig:
    """The defaults for a data set: those of `PRESETS`, or of "mnist5k" for the user's own.

    >>> preset("digits").batch
    64
    """
    return PRESETS.get(data) or replace(PRESETS["mnist5k"], data=data)


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train a class-conditional one-step generator with `WFlow`, then measure and picture it.

    The folder `out` gets `config.json`, `checkpoint.safetensors` (every `checkpoint_every` steps,
    at the end, and on Ctrl-C or SIGTERM), TensorBoard `logs` and `samples.png`. Each step's batch
    and noise depend on (seed, step) alone, so a resumed run repeats the uninterrupted one bit for
    bit on the same machine and thread count.

    Args:
        config (TrainConfig): see there; `preset(data)` has the defaults.
        out (Path): folder of the run, made if need be.
        resume (bool): continue from the checkpoint in `out`, with the configuration it began with.
        overwrite (bool): replace a run that is in `out`.
        progress (bool): show a progress bar on stderr.

    Returns:
        TrainResult: generator, metrics, picture.

    Raises:
        ValueError: data that cannot be loaded, `out` in use, by a run that is done or by one that
            goes on, a checkpoint that is damaged or of another run.
        FloatingPointError: the drift is no longer finite; the last good checkpoint stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
        ModuleNotFoundError: a package of the extra `fewstep[train]` is missing.

    >>> import tempfile
    >>> config = replace(preset("digits"), steps=2, batch=8, width=16)
    >>> result = train(config, Path(tempfile.mkdtemp()), progress=False)
    >>> result.picture.name
    'samples.png'
    """
    require_extra()
    data = load_enough(config.data)
    device = torch_device(config.device)
    run = Run(config, tuple(data.images.shape[1:]), data.names)
    began = read_run(out) if resume else None
    with one_writer(out):
        open_run(out, "wflow", run, began=began, overwrite=overwrite)
        if (out / CHECKPOINT).exists():
            checkpoint.check_shapes(out / CHECKPOINT, {"model.": lambda: _generator(run)})
        generator = _fit(run, data, out, device, progress=progress)
        rows, picture = evaluate(generator, data, out, seed=config.seed)
    return TrainResult(generator, rows, picture)


def evaluate(
    generator: MLPGenerator, data: Images, out: Path, *, seed: int = 0
) -> tuple[list[MetricRow], Path]:
    """Metrics of up to 2000 samples against the data, and `samples.png`, one row per class.

    Classes are asked for in the proportions of the data.
    """
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
    picture = out / PICTURE
    pictured = sample(generator, len(real), labels=shown, seed=seed + 1)
    plots.save_comparison(picture, real, pictured, columns=columns, names=names)
    generated = sample(generator, m, labels=labels, seed=seed)
    table = report(
        data.images, generated, real_labels=data.labels, generated_labels=labels, seed=seed
    )
    return table, picture


@torch.no_grad()
def sample(
    generator: MLPGenerator, n: int, *, labels: Tensor | None = None, seed: int = 0
) -> Tensor:
    """n images `[n, C, H, W]` in [-1, 1] from seeded noise, of classes `labels [n]`.

    Without labels, a conditional generator's classes take turns.
    """
    noise = torch.randn(n, generator.noise_dim, generator=seeded(seed, 0))
    if labels is None and generator.classes:
        labels = torch.arange(n) % generator.classes
    images: Tensor = generator(noise, labels)
    return images


def read_run(out: Path) -> Run:
    """Read the `config.json` of a run.

    Raises:
        ValueError: it is missing, or is not one of this method.
    """

    def parse(content: dict[str, Any]) -> Run:
        if content.get("method", "wflow") != "wflow":
            raise ValueError(f"method is {content['method']}")
        config = TrainConfig(**{**content["config"], "flow": WFlow(**content["config"]["flow"])})
        return Run(config, shape_in(content), classes_in(content))

    return read_config(out, parse)


def load_generator(out: Path) -> MLPGenerator:
    """The generator of a run, with the averaged weights of its last checkpoint.

    Raises:
        ValueError: no run, or a checkpoint that is missing, damaged or of another run.
    """
    run = read_run(out)
    return checkpoint.restored(out / CHECKPOINT, "ema.module.", lambda: _generator(run))


def _fit(
    run: Run, data: Images, out: Path, device: torch.device, *, progress: bool
) -> MLPGenerator:
    config, classes = run.config, _classes(data)
    network = Network(_generator(run).to(device), lr=config.lr, ema=config.ema)

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

    fit(
        [Stage("", config.steps, update)],
        {"": network},
        out,
        title=config.data,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        progress=progress,
    )
    return cast(MLPGenerator, network.averaged.cpu().eval())


def _generator(run: Run) -> MLPGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        return MLPGenerator(
            run.image_shape,
            classes=len(run.classes),
            noise_dim=run.config.noise_dim,
            width=run.config.width,
            depth=run.config.depth,
        )


def _classes(data: Images) -> list[Tensor]:
    """The images of each class; all of them as one where there are no labels."""
    if data.labels is None:
        return [data.images]
    return [data.images[data.labels == k] for k in range(len(data.names))]


def _draw(config: TrainConfig, classes: list[Tensor], step: int) -> tuple[Tensor, Tensor, Tensor]:
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
