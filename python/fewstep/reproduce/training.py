"""What experiments share: small networks, and the loop that trains them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor, nn

from fewstep.training.loop import TrainedNetwork


def mlp(inputs: int, outputs: int, *, width: int = 256, depth: int = 3) -> nn.Sequential:
    """Linear layers with SiLU between them.

    >>> mlp(32, 2, width=8, depth=1)
    Sequential(
      (0): Linear(in_features=32, out_features=8, bias=True)
      (1): SiLU()
      (2): Linear(in_features=8, out_features=2, bias=True)
    )
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([inputs, *[width] * depth]):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def train(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    clip: float | None = None,
    ema: float | None = None,
    every: Callable[[int], None] = lambda step: None,
) -> nn.Module:
    """Train by Adam with a cosine schedule, and return the network, or its average over steps.

    Args:
        model (nn.Module): network.
        loss (Callable): loss of step i.
        steps (int): number of steps.
        lr (float): peak learning rate.
        clip (float | None): largest norm of a gradient.
        ema (float | None): decay of the average. None keeps none.
        every (Callable): called after step i.
    """
    network = TrainedNetwork(model, lr=lr, ema=ema, clip=clip)
    for step in range(steps):
        network.step([lambda: (loss(step), {})], step / steps, step)  # noqa: B023
        every(step)
    return model if ema is None else network.averaged
