"""The training methods, a row each. The commands find a method here and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep._checks import count
from fewstep.networks import MaskedAutoencoder
from fewstep.training import drifting, encoder, lines, meanflow, reflow, wflow
from fewstep.training.runs import Run, Trainer, method_in, read_config

TRAINERS: dict[str, Trainer[Any, Any]] = {
    trainer.name: trainer
    for trainer in (
        wflow.TRAINER,
        reflow.TRAINER,
        lines.TRAINER,
        meanflow.TRAINER,
        drifting.TRAINER,
        encoder.TRAINER,
    )
}


@dataclass(frozen=True)
class Trained:
    """A trained run, as `fewstep.load` returns it.

    Attributes:
        method: name of the training method.
        network: network that draws samples, with averaged weights, on the CPU. That of a run of
            encoder is frozen, and maps images to features `{name: [B, C, H, W]}`.
        run: settings, image shape and classes of the run.
    """

    method: str
    network: nn.Module = field(repr=False)
    run: Run[Any]

    def sample(
        self,
        n: int,
        *,
        labels: Sequence[int] | int | Tensor | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Tensor:
        """Draw n images `[n, C, H, W]` in [-1, 1]. The first k of them do not depend on n.

        Args:
            n (int): number of images.
            labels (Sequence | int | Tensor | None): class of each image, or one for all, as indices
                of `run.classes`. Without them the classes of a conditional network take turns.
            seed (int): seed of the noise.
            options: those of the method, as `steps` and `sampler` of lines.

        Raises:
            ValueError: labels that the run does not have, or an option that is none of the method.
        """
        n = count("sample", "n", n)
        draw = TRAINERS[self.method].sample
        known = inspect.signature(draw).parameters
        for name in options:
            if name not in known:
                raise ValueError(f"sample: {name} is no option of {self.method}")
        if labels is not None:
            if "labels" not in known or not self.run.classes:
                raise ValueError(f"sample: labels are for conditional runs, got {labels}")
            own = torch.as_tensor(labels)
            own = own.expand(n) if own.ndim == 0 else own
            high = len(self.run.classes)
            if own.shape != (n,) or own.is_floating_point() or own.min() < 0 or own.max() >= high:
                raise ValueError(f"sample: labels must be {n} from 0 to {high - 1}, got {labels}")
            options["labels"] = own.long()
        images: Tensor = draw(self.network, self.run, n, seed=seed, **options)
        return images


def load(folder: str | Path) -> Trained:
    """The network of a finished or stopped run, to draw samples with.

    Args:
        folder (str | Path): folder that `fewstep train` made.

    Raises:
        ValueError: there is no run, or its checkpoint is missing or damaged.

    >>> import tempfile
    >>> from dataclasses import replace
    >>> config = replace(wflow.preset("digits"), steps=2, batch=8, width=16)
    >>> out = Path(tempfile.mkdtemp())
    >>> _ = wflow.train(config, out, progress=False)
    >>> load(out).sample(4, labels=3).shape
    torch.Size([4, 1, 8, 8])
    """
    trainer = trainer_of(Path(folder))
    network, run = trainer.load(Path(folder))
    if isinstance(network, MaskedAutoencoder):
        network = network.encoder.requires_grad_(False)
    return Trained(trainer.name, network, run)


def trainer_of(out: Path) -> Trainer[Any, Any]:
    """The method of the run in a folder.

    Raises:
        ValueError: there is no run, or its method is unknown.
    """

    def parse(content: dict[str, Any]) -> Trainer[Any, Any]:
        if (method := method_in(content)) not in TRAINERS:
            raise ValueError(f"method must be one of {tuple(TRAINERS)}, got {method!r}")
        return TRAINERS[method]

    return read_config(out, parse)
