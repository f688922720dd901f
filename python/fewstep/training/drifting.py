"""`fewstep train drifting`: the trainer of W-Flow with `fewstep.baselines.Drifting` as its loss."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fewstep.baselines import Drifting
from fewstep.training import wflow


@dataclass(frozen=True)
class DriftingConfig(wflow.WFlowConfig):
    """Settings of `fewstep train drifting`.

    Attributes:
        batch: number of points of each class per step, in each cloud.
        flow: settings of the loss.
    """

    flow: Drifting = field(default_factory=Drifting)  # type: ignore[assignment]


TRAINER = replace(
    wflow.TRAINER,
    name="drifting",
    summary="Train a one-step generator by drifting, a baseline for wflow.",
    config=DriftingConfig,
    presets={
        "digits": DriftingConfig("digits", steps=1000, batch=64),
        "mnist5k": DriftingConfig("mnist5k"),
    },
)
preset, read_run, train = TRAINER.preset, TRAINER.read_run, TRAINER.train
