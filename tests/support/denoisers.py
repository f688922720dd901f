"""Denoisers that are known in closed form, and the sampler of EDM line by line."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.ops.heun.engine import FIRST
from fewstep.reference import heun as reference

Network = Callable[[Tensor, Tensor], Tensor]
GUIDANCE = torch.tensor([0.0, 1.0, 2.0, 7.5])  # a weight for each sample


def wide(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *(1,) * (x.ndim - 1))


def gaussian(sd: float) -> Network:
    """The exact denoiser of N(0, sd^2 I)."""
    return lambda x, sigma: x * (sd**2 / (sd**2 + wide(sigma, x).square())).to(x.dtype)


class Raw(nn.Module):
    """A network that wants scaled inputs and `ln(sigma) / 4`."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d + 1, d)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.layer(torch.cat((x, noise[:, None]), 1)))
        return out


def edm(
    denoiser: Network,
    latents: Tensor,
    sigmas: Tensor,
    *,
    churn: tuple[float, float, float, float] = (0.0, 0.0, math.inf, 1.0),
    seeds: Tensor | None = None,
) -> Tensor:
    """Algorithm 2 of EDM, line by line in float64; sigmas `[N + 1]` or `[B, N + 1]`."""
    amount, low, high, size = churn
    levels = sigmas.double().expand(latents.shape[0], -1).T
    steps = len(levels) - 1
    x = latents.double() * wide(levels[0], latents)

    def noise(i: int) -> Tensor:
        if seeds is None:
            return torch.zeros_like(x)
        row = 1 if i == 0 else FIRST + 2 * (i - 1) + 1  # of the pass that adds it
        return reference.noise(seeds, row, tuple(x.shape[1:]))

    for i in range(steps):
        now, after = levels[i], levels[i + 1]
        inside = (now >= low) & (now <= high)
        gamma = min(amount / steps, math.sqrt(2) - 1) * inside.double()
        hat = now * (1 + gamma)
        x = x + wide((hat**2 - now**2).sqrt(), x) * size * noise(i)
        d1 = (x - denoiser(x, hat)) / wide(hat, x)
        following = x + wide(after - hat, x) * d1
        if bool((after > 0).all()):
            d2 = (following - denoiser(following, after)) / wide(after, x)
            following = x + wide(after - hat, x) * (d1 + d2) / 2
        x = following
    return x
