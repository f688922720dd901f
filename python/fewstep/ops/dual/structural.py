"""Exact traces of linear layers with activations between them, by their structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep._torch import wide
from fewstep.ops.dual.program import Program, values_and_slopes
from fewstep.ops.dual.source import kept_or_computed


@dataclass(frozen=True)
class Budget:
    """What probes would cost: a structural trace gives way to them where it costs more.

    Attributes:
        probes: each costs as much as the velocity itself.
        kept: the product of the outer weights is made once for a whole solve.
    """

    probes: int
    kept: bool

    def allows(self, batch: int, weights: Sequence[Tensor]) -> bool:
        if len(weights) < 3:
            return True
        width, depth = weights[0].shape[0], weights[2].shape[1]
        cost = batch * width * depth
        if not self.kept:
            cost += weights[0].numel() * depth
        return cost <= self.probes * batch * sum(w.numel() for w in weights)


def trace(
    program: Program, backend: str, cache: dict[Any, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Velocity and the exact trace, `[B]`, of at most three layers, whatever D.

    `tr(W3 D2 W2 D1 W1) = d2' [W2 o (W1 W3)'] d1`: one more product of the hidden width. `cache`
    keeps its matrix over a solve. Differentiable.
    """
    weights = program.outer
    velocity, diagonals = values_and_slopes(program, backend)
    summed = wide(velocity.dtype)

    def core() -> Tensor:
        if len(weights) == 1:
            return weights[0].diagonal().sum(dtype=summed)
        if len(weights) == 2:
            return (weights[0] * weights[1].T).sum(1, dtype=summed)
        return (weights[0] @ weights[2]) * weights[1].T  # [H1, H2]

    middle = kept_or_computed(cache, "structural", weights, core)
    if len(weights) == 1:
        return velocity, middle.expand(velocity.shape[0])
    if len(weights) == 2:
        return velocity, diagonals[0].to(summed) @ middle
    first, last = (diagonals[0] @ middle).to(summed), diagonals[1].to(summed)
    return velocity, torch.linalg.vecdot(first, last)


def narrowest(program: Program) -> int:
    """Width of the narrowest hidden layer."""
    return min(w.shape[0] for w in program.weights[:-1])


def trace_by_bottleneck(program: Program, backend: str, chunk: int) -> tuple[Tensor, Tensor]:
    """Velocity and the exact trace `[B]` by a tangent for each unit of the narrowest hidden layer.

    `tr(A B) = tr(B A)`: from that layer to the outputs, on from the inputs, and back to it. `chunk`
    tangents at a time. Differentiable.
    """
    weights, n = program.outer, len(program.weights)
    velocity, slopes = values_and_slopes(program, backend)
    own = min(range(n - 1), key=lambda i: weights[i].shape[0])
    parts = []
    for first in range(0, weights[own].shape[0], chunk):
        units = slice(first, first + chunk)
        t = weights[own + 1][:, units].T[:, None]  # [units, 1, features], the same for all samples
        for i in (*range(own + 1, n - 1), n - 1, *range(own)):
            t = t * slopes[i] if i < n - 1 else t
            following = weights[(i + 1) % n]
            t = t @ following.T if (i + 1) % n != own else t
        back = (t * weights[own][units, None]).sum(2)  # [units, B]
        parts.append((back.T * slopes[own][:, units]).sum(1))
    return velocity, torch.stack(parts).sum(0)
