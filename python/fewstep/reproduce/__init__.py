"""The papers' small experiments, each with its claim, its numbers, and a verdict by a rule."""

from __future__ import annotations

import importlib
from typing import Any

from fewstep.reproduce.experiment import Experiment

# Experiments by name, and the module of each, which is imported when it is asked for.
EXPERIMENTS = {
    "one-vs-two-batch": "batches",
    "guidance": "guidance",
    "underdetermination": "closed_forms",
    "tracker-bias": "closed_forms",
    "perflow-ring": "windows",
    "mode-coverage": "modes",
    "oval-to-circle": "transfer",
    "eight-gaussians": "modes",
    "energies": "modes",
    "swiss-roll-checkerboard": "shapes",
    "batch-ot-bound": "straight",
    "straightness": "straight",
}


def find(name: str) -> Experiment[Any]:
    """The experiment of a name.

    Raises:
        ValueError: there is none; the message lists those there are.

    >>> find("one-vs-two-batch").source
    'arXiv 2605.11755, figure 3'
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"reproduce: name must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    module = importlib.import_module(f"fewstep.reproduce.{EXPERIMENTS[name]}")
    own: dict[str, Experiment[Any]] = {one.name: one for one in module.OWN}
    return own[name]
