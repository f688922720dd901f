"""Discriminators of vectors and of small images."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class MLPDiscriminator(nn.Module):
    """A discriminator of vectors, with three layers of LeakyReLU(0.2).

    Train it with R1, as `LinesMatching(r1=0.1)` does.

    Args:
        features (int): number D of values of a sample.
        classes (int): number of classes to condition on, by projection; 0 for none.
        width (int): width of the hidden layers.

    >>> import torch
    >>> MLPDiscriminator(2)(torch.randn(5, 2)).shape
    torch.Size([5, 1])
    """

    def __init__(self, features: int, *, classes: int = 0, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (features, width, width):
            layers += [nn.Linear(before, width), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1)
        self.embedding = nn.Embedding(classes, width) if classes else None
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map x `[B, ...]` of D values and labels int64 `[B]` (with classes only) to `[B, 1]`."""
        return _logits(self, self.body(x.flatten(1)), labels)


class ConvDiscriminator(nn.Module):
    """A discriminator of small images, with three 3 x 3 convolutions under spectral norms.

    The last two convolutions have stride 2.

    Source: Miyato et al., Spectral normalization, arXiv 1802.05957, and for classes Miyato and
    Koyama, cGANs with projection discriminator, arXiv 1802.05637.

    Args:
        image_shape (tuple): shape `(C, H, W)` of an image.
        classes (int): number of classes to condition on, by projection; 0 for none.
        width (int): number of channels of the first layer.

    >>> import torch
    >>> ConvDiscriminator((1, 8, 8))(torch.randn(5, 1, 8, 8)).shape
    torch.Size([5, 1])
    """

    def __init__(self, image_shape: tuple[int, ...], *, classes: int = 0, width: int = 32) -> None:
        super().__init__()
        channels, h, w = image_shape
        widths = (channels, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            convolution = nn.Conv2d(before, after, 3, stride=min(i + 1, 2), padding=1)
            layers += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        features = 4 * width * -(-h // 4) * -(-w // 4)
        self.head = spectral_norm(nn.Linear(features, 1))
        self.embedding = spectral_norm(nn.Embedding(classes, features)) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map x `[B, C, H, W]` and labels int64 `[B]` (with classes only) to `[B, 1]`."""
        return _logits(self, self.body(x), labels)


def _logits(
    network: MLPDiscriminator | ConvDiscriminator, hidden: Tensor, labels: Tensor | None
) -> Tensor:
    out: Tensor = network.head(hidden)
    if network.embedding is not None:
        out = out + (hidden * network.embedding(labels)).sum(1, keepdim=True)
    return out
