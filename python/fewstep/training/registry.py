"""The training methods, a row each. The commands find a method here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.training import lines, meanflow, reflow, wflow
from fewstep.training.runs import Trainer, method_in, read_config

TRAINERS: dict[str, Trainer[Any, Any]] = {
    trainer.name: trainer
    for trainer in (
        wflow.TRAINER,
        reflow.TRAINER,
        lines.TRAINER,
        meanflow.TRAINER,
    )
}


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
