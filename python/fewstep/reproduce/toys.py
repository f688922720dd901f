"""Laws of points in the plane, and how much of them a generator has."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import fewstep
from fewstep.data.toys import GaussianMixture


def ring(modes: int, *, radius: float, std: float) -> GaussianMixture:
    """Equal Gaussians on a circle.

    >>> ring(8, radius=2.0, std=0.1).means[0].tolist()
    [2.0, 0.0]
    """
    angles = 2 * math.pi * torch.arange(modes) / modes
    means = radius * torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixture(means, torch.full_like(means, std**2))


def shares(x: Tensor, means: Tensor, within: float) -> Tensor:
    """Share of the points `[n, 2]` within a distance of each mean `[C, 2]`, `[C]`.

    >>> shares(torch.tensor([[0.0, 0], [0, 1], [5, 5]]), torch.tensor([[0.0, 0.1]]), 0.5)
    tensor([0.3333])
    """
    return (torch.cdist(x, means) < within).float().mean(0)


def divergence(x: Tensor, y: Tensor, *, eps: float) -> float:
    """The Sinkhorn divergence of two clouds at a temperature, converged."""
    result = fewstep.sinkhorn_divergence(
        x, y, eps=eps, cost="half_sqeuclidean", max_iter=2000, tol=5e-3, anneal=0.9
    )
    return float(result.value)
