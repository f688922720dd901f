"""Generators and velocity fields for small images."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


class MLPGenerator(nn.Module):
    """Noise and class to an image in [-1, 1], in one pass.

    `depth` hidden layers of LayerNorm and SiLU, then a linear layer and tanh to pixels; an
    embedding of the class is added to the first layer.

    Args:
        image_shape (tuple): `(C, H, W)` of the output.
        classes (int): classes to condition on; 0 for none.
        noise_dim (int): dimension Z of the noise.
        width (int): of the hidden layers.
        depth (int): hidden layers, at least 1.

    >>> import torch
    >>> generator = MLPGenerator((1, 8, 8), classes=10)
    >>> generator(torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 4])).shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        *,
        classes: int = 0,
        noise_dim: int = 8,
        width: int = 512,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.classes = classes
        self.noise_dim = noise_dim
        self.first = nn.Linear(noise_dim, width)
        self.embedding = nn.Embedding(classes, width) if classes else None
        layers: list[nn.Module] = [nn.LayerNorm(width), nn.SiLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()]
        self.layers = nn.Sequential(
            *layers, nn.Linear(width, math.prod(self.image_shape)), nn.Tanh()
        )

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noise `[n, Z]` and labels int64 `[n]` (with classes only) to images `[n, C, H, W]`."""
        hidden = self.first(noise)
        if self.embedding is not None:
            hidden = hidden + self.embedding(labels)
        out: Tensor = self.layers(hidden)
        return out.reshape(-1, *self.image_shape)


class VelocityMLP(nn.Module):
    """A velocity field of small images, `v(x, t)`: linear layers with SiLU between them.

    Fourier features of t, `cos` and `sin` of `pi 2^k t`, stand beside the pixels. Every layer has a
    fused dual in `fewstep.divergence`; two hidden layers or fewer have their exact trace.

    Args:
        image_shape (tuple): `(C, H, W)`.
        width (int): of the hidden layers.
        depth (int): hidden layers, at least 1.
        frequencies (int): of t.

    >>> import torch
    >>> VelocityMLP((1, 8, 8))(torch.randn(5, 1, 8, 8), torch.rand(5)).shape
    torch.Size([5, 1, 8, 8])
    """

    frequencies: Tensor

    def __init__(
        self,
        image_shape: tuple[int, ...],
        *,
        width: int = 256,
        depth: int = 3,
        frequencies: int = 4,
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        d = math.prod(self.image_shape)
        widths = [d + 2 * frequencies, *[width] * depth]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, d))
        powers = math.pi * 2.0 ** torch.arange(frequencies)
        self.register_buffer("frequencies", powers, persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x `[B, C, H, W]` and t `[B]` to velocities `[B, C, H, W]`."""
        angles = t[:, None] * self.frequencies
        out: Tensor = self.layers(torch.cat([x.flatten(1), angles.cos(), angles.sin()], 1))
        return out.view(x.shape)
