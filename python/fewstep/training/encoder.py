"""`fewstep train encoder`: an encoder of images, trained as a masked autoencoder."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fewstep._torch import seeded
from fewstep.metrics.tables import aligned
from fewstep.networks import ImageEncoder, MaskedAutoencoder, masked_error, patch_masks
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
)

_MEASURED, _COLUMNS = 2000, 10  # images
K = TypeVar("K")


@dataclass(frozen=True)
class EncoderConfig(RunConfig):
    """Settings of `fewstep train encoder`.

    Attributes:
        steps: number of optimizer steps.
        batch: number of images per step.
        width: number of channels of the first stage, a multiple of 8. Each further one has twice
            as many.
        stages: number of stages. Each further one has a grid half as wide.
        depth: number of residual blocks of a stage.
        patch: width of the patches that are masked.
        share: probability of a patch to be masked, above 0 and below 1.

    Raises:
        ValueError: a number is outside its range.
    """

    steps: int = 2000
    batch: int = 128
    width: int = 32
    stages: int = 4
    depth: int = 2
    patch: int = 4
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"share must be in (0, 1), got {self.share}")
        if self.width % 8:
            raise ValueError(f"width must be a multiple of 8, got {self.width}")


PRESETS = {
    "digits": EncoderConfig("digits", steps=1000, stages=3, patch=2),
    "mnist5k": EncoderConfig("mnist5k"),
}


@dataclass(frozen=True)
class EncoderReport(Report):
    """How well masked values are restored, by mean squared errors over up to 2000 images.

    Attributes:
        error: that of the network.
        mean_error: that of the mean image.
    """

    error: float
    mean_error: float


@torch.no_grad()
def evaluate(session: Session[EncoderConfig], networks: dict[str, nn.Module]) -> EncoderReport:
    """Restore masked images, and picture some: real, masked and restored in turn."""
    network, config, data = networks["encoder"], session.run.config, session.data.images
    rng = seeded(config.seed, 0)
    images = data[torch.randperm(len(data), generator=rng)[:_MEASURED]]
    masks = patch_masks(images, patch=config.patch, share=config.share, generator=rng)
    at = range(0, len(images), config.batch)
    parts = ((t[k : k + config.batch] for t in (images, masks)) for k in at)
    restored = torch.cat([network(*part) for part in parts])
    mean = images.mean(0).expand_as(images)
    error, mean_error = (masked_error(t, images, masks).item() for t in (restored, mean))
    picture = session.out / PICTURE
    title = "real, masked and restored in turn"
    shown = (images, images.masked_fill(masks, 0), restored)
    columns = min(_COLUMNS, len(images))
    turns = [t[k : k + columns] for k in range(0, 4 * columns, columns) for t in shown]
    plots.save_grid(picture, torch.cat(turns), columns=columns, title=title)
    lines = [("masked error", "network", "mean image"), ("", f"{error:.3g}", f"{mean_error:.3g}")]
    return EncoderReport(aligned(lines), picture, error, mean_error)


def sample(network: nn.Module, run: Run[EncoderConfig], n: int, *, seed: int = 0) -> Tensor:
    """Raise ValueError: an encoder draws nothing."""
    raise ValueError("sample: a run of encoder draws no images; its maps are for --features")


def _networks(run: Run[EncoderConfig]) -> dict[str, NetworkRecipe]:
    config = run.config

    def make() -> MaskedAutoencoder:
        width, stages, depth = config.width, config.stages, config.depth
        return MaskedAutoencoder(
            ImageEncoder(run.image_shape[0], width=width, stages=stages, depth=depth)
        )

    return {"encoder": NetworkRecipe(make, config.seed, config.lr, config.ema)}


def _stages(session: Session[EncoderConfig]) -> list[Stage]:
    config, data, network = session.run.config, session.data, session.networks["encoder"]

    def update(step: int) -> dict[str, Tensor]:
        rng = seeded(config.seed, step + 1)
        chosen = torch.randint(len(data.images), (config.batch,), generator=rng)
        images = data.images[chosen]
        masks = patch_masks(images, patch=config.patch, share=config.share, generator=rng)

        def loss(rows: slice, ids: Tensor, rng: torch.Generator) -> Losses:
            own, hidden = images[rows].to(session.device), masks[rows].to(session.device)
            error = masked_error(network.model(own, hidden), own, hidden)
            # Parts count by the values that are masked in them, as in a batch of all.
            share = masks[rows].float().mean() / masks.float().mean().clamp_min(1e-12)
            return error * share.to(session.device), {}

        parts = session.parts(config.batch, rng)
        return network.step([partial(loss, *part) for part in parts], step / config.steps, step)

    return [Stage("", config.steps, update)]


TRAINER = Trainer(
    name="encoder",
    summary="Train an encoder on masked images, whose features wflow and drifting can compare.",
    config=EncoderConfig,
    presets=PRESETS,
    networks=_networks,
    stages=_stages,
    report=evaluate,
    sample=sample,
    network="encoder",
    conditional=lambda config: False,
)
preset, read_run, train = TRAINER.preset, TRAINER.read_run, TRAINER.train


def features_of(source: str, channels: int) -> nn.Module:
    """What `--features` names, frozen and in evaluation mode.

    Args:
        source (str): folder of a run of `fewstep train encoder`, or MODULE:NAME of an `nn.Module`
            or of a function that returns one.
        channels (int): number of channels of the images it is for.

    Raises:
        ValueError: there is neither, or the encoder is for images of other channels.
    """
    if ":" in source and not Path(source).exists():
        return imported("features", source, nn.Module).eval().requires_grad_(False)
    network, _ = TRAINER.load(Path(source))
    assert isinstance(network, MaskedAutoencoder)
    encoder = network.encoder.requires_grad_(False)
    if encoder.channels != channels:
        raise ValueError(
            f"features: {source} is for images of {encoder.channels} channels, got {channels}"
        )
    return encoder


def imported(option: str, source: str, kind: type[K]) -> K:
    """What MODULE:NAME names, in a module of the current folder or an installed one.

    Raises:
        ValueError: it cannot be imported, or is neither of the kind nor a function that returns one
            when called without arguments.
    """
    module, _, name = source.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # which a script does not have
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"{option}: {source} cannot be imported: {error}") from error
    expected = (
        f"{option}: {source} must be a {kind.__module__}.{kind.__name__}, or return one when called"
        " without arguments"
    )
    if not isinstance(found, kind):
        try:
            found = found()
        except Exception as error:
            raise ValueError(f"{expected}: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{expected}, got {type(found).__name__}")
    return found
