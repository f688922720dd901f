"""Perceptrons for small images: a generator, a velocity, a denoiser, an average velocity."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


class MLPGenerator(nn.Module):
    """A generator that maps noise and a class to an image in [-1, 1], in one pass.

    It has `depth` hidden layers with LayerNorm and SiLU, then a linear layer and tanh to pixels. An
    embedding of the class is added to the first layer.

    Args:
        image_shape (tuple): shape `(C, H, W)` of the output.
        classes (int): number of classes to condition on; 0 for none.
        noise_dim (int): dimension Z of the noise.
        width (int): width of the hidden layers.
        depth (int): number of hidden layers, at least 1.

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
        """Map noise `[n, Z]` and labels int64 `[n]` (with classes only) to `[n, C, H, W]`."""
        hidden = self.first(noise)
        if self.embedding is not None:
            hidden = hidden + self.embedding(labels)
        out: Tensor = self.layers(hidden)
        return out.reshape(-1, *self.image_shape)


class VelocityMLP(nn.Module):
    """A velocity field `v(x, t)` of small images, made of linear layers with SiLU between them.

    The first layer takes the pixels and Fourier features of t, `cos` and `sin` of `pi 2^k t`. Every
    layer has a fused dual in `fewstep.divergence`. With one or two hidden layers the trace is exact
    and cheap.

    Args:
        image_shape (tuple): shape `(C, H, W)` of an image.
        width (int): width of the hidden layers.
        depth (int): number of hidden layers, at least 1.
        frequencies (int): number of frequencies of t.

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
        """Map x `[B, C, H, W]` and t `[B]` to velocities `[B, C, H, W]`."""
        angles = t[:, None] * self.frequencies
        features = (like(part, x) for part in (angles.cos(), angles.sin()))
        out: Tensor = self.layers(torch.cat([x.flatten(1), *features], 1))
        return out.view(x.shape)


class ResidualMLP(nn.Module):
    """A network `F(x, t, labels)` that maps images to images of the same shape.

    It has `depth` residual blocks. Each has a LayerNorm, a scale and shift by t and class, and two
    linear layers with SiLU between them. The features of t are those of `VelocityMLP`. A skip
    `gain(t, class) x`, with a gain for each value, passes noise that has more dimensions than the
    residual stream. Blocks and outputs start at zero, so F does too.

    Args:
        image_shape (tuple): shape `(C, H, W)` of an image, or `(D,)` for vectors.
        classes (int): number of classes to condition on; 0 for none.
        width (int): width of the residual stream. Blocks are twice as wide inside.
        depth (int): number of blocks, at least 1.
        frequencies (int): number of frequencies of t.

    >>> import torch
    >>> network = ResidualMLP((1, 8, 8), classes=10)
    >>> network(torch.randn(5, 1, 8, 8), torch.rand(5), torch.arange(5)).shape
    torch.Size([5, 1, 8, 8])
    """

    frequencies: Tensor

    def __init__(
        self,
        image_shape: tuple[int, ...],
        *,
        classes: int = 0,
        width: int = 256,
        depth: int = 3,
        frequencies: int = 6,
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        d = math.prod(self.image_shape)
        self.register_buffer(
            "frequencies", math.pi * 2.0 ** torch.arange(frequencies), persistent=False
        )
        self.level = nn.Sequential(nn.Linear(1 + 2 * frequencies, width), nn.SiLU())
        self.embedding = nn.Embedding(classes, width) if classes else None
        self.gain = nn.Linear(width, d)
        self.first = nn.Linear(d, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.last = nn.Linear(width, d)
        for layer in (self.gain, self.last, *(block[2] for block in self.blocks)):  # type: ignore[index]
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map x `[B, ...]`, t `[B]` and labels int64 `[B]` (with classes only) to `[B, ...]`."""
        return self._blocks(x, self._condition(fourier(t, self.frequencies), x, labels))

    def _condition(self, features: Tensor, x: Tensor, labels: Tensor | None) -> Tensor:
        condition: Tensor = self.level(like(features, x))
        return condition if self.embedding is None else condition + self.embedding(labels)

    def _blocks(self, x: Tensor, condition: Tensor) -> Tensor:
        flat = x.flatten(1)
        hidden = self.first(flat)
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            scale, shift = modulation(condition).chunk(2, 1)
            hidden = hidden + block(self.norm(hidden) * (1 + scale) + shift)
        out: Tensor = self.last(self.norm(hidden)) + self.gain(condition) * flat
        return out.view(x.shape)


class AverageVelocityMLP(ResidualMLP):
    """A network `u(z, t, r, labels)` for MeanFlow, a `ResidualMLP` of two times.

    It has the features of t and of t - r. Their frequencies are few, for the derivative along t
    grows with the highest.

    Args:
        image_shape (tuple): shape `(C, H, W)` of an image, or `(D,)` for vectors.
        classes (int): number of classes to condition on; 0 for none. Label `classes`, one past the
            last, stands for no class.
        width (int): width of the residual stream. Blocks are twice as wide inside.
        depth (int): number of blocks, at least 1.
        frequencies (int): number of frequencies of t and of t - r.

    >>> import torch
    >>> network = AverageVelocityMLP((1, 8, 8), classes=10)
    >>> t = torch.ones(5)
    >>> network(torch.randn(5, 1, 8, 8), t, 0 * t, torch.tensor([0, 1, 2, 3, 10])).shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        *,
        classes: int = 0,
        width: int = 256,
        depth: int = 3,
        frequencies: int = 2,
    ) -> None:
        super().__init__(
            image_shape,
            classes=classes + 1 if classes else 0,
            width=width,
            depth=depth,
            frequencies=frequencies,
        )
        self.level = nn.Sequential(nn.Linear(2 * (1 + 2 * frequencies), width), nn.SiLU())

    def forward(  # type: ignore[override]
        self, z: Tensor, t: Tensor, r: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Map z `[B, ...]`, times `[B]` and labels int64 `[B]` (if any) to `[B, ...]`."""
        features = torch.cat([fourier(s, self.frequencies) for s in (t, t - r)], 1)
        return self._blocks(z, self._condition(features, z, labels))


def fourier(t: Tensor, frequencies: Tensor) -> Tensor:
    """Features `[B, 1 + 2 K]` of times `[B]`: the times, cosines and sines at K frequencies."""
    angles = t[:, None] * frequencies
    return torch.cat([t[:, None], angles.cos(), angles.sin()], 1)


def like(value: Tensor, x: Tensor) -> Tensor:
    """A value in the dtype of x. Levels are float32 where x has half precision."""
    return value if value.dtype == x.dtype else value.to(x.dtype)
