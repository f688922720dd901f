"""The arguments and results that the launchers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .layout import Clouds


@dataclass(frozen=True)
class Solve:
    """What both kinds of iteration are given; points are padded."""

    clouds: Clouds
    weights: tuple[Tensor, Tensor]  # a and b over the mass of a, [B, points]
    light: Tensor  # weights of x below it are hardly seen by the error, [B]
    logs: tuple[Tensor, Tensor]
    f0: Tensor | None
    g: Tensor  # [P, points of y]
    each: Tensor  # temperatures of the steps, the last one for all later ones, [steps, P]
    annealing: Tensor  # steps before eps, [P]
    settings: Tensor  # of the first step and of the others, [2, 4]
    last_steps: int  # alternating ones at most, after symmetric ones
    single: bool  # f and g are to stay the same
    kept: bool  # costs are in memory
    max_iter: int
    temperatures: int
    constants: tuple[int, float]
    rows: dict[str, Any]  # launch parameters
    cols: dict[str, Any]

    @property
    def steps(self) -> int:
        """As many as a problem can make."""
        return self.each.shape[0] - 1 + self.max_iter

    def eps(self, step: int) -> Tensor:
        return self.each[min(step, self.each.shape[0] - 1)]

    def setting(self, step: int) -> Tensor:
        return self.settings[int(step > 0 or self.f0 is not None)]

    def blocks(self, side: int) -> int:
        block: int = (self.rows, self.cols)[side]["BLOCK_M"]
        return (self.clouds.n, self.clouds.m)[side] // block


Solved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # f, g, residual, mass, iterations
