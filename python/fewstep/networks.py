"""Generators for small images."""

from __future__ import annotations

import math

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
