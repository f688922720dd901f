"""A teacher and what to make of it, also for processes that a test starts."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from fewstep.data.pairs import PairsConfig
from fewstep.networks import EDMPrecond, ResidualMLP

CONFIG = PairsConfig(n=37, seed=5, steps=3, batch=4, shard_size=12)
SHAPE = (1, 3, 5)


class Denoiser(nn.Module):
    """One whose GEMMs are wide enough that their rounding could depend on the batch."""

    def __init__(self, classes: int = 0, pause: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = EDMPrecond(ResidualMLP(SHAPE, classes=classes, width=64), sigma_data=0.7)
        nn.init.normal_(self.inner.network.last.weight, std=0.1)
        self.pause = pause

    def forward(self, x: Tensor, sigma: Tensor, *labels: Tensor) -> Tensor:
        time.sleep(self.pause)
        return self.inner(x, sigma, *labels)
