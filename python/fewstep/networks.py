"""Generators, velocity fields, denoisers and discriminators for small images."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


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
        features = (_like(part, x) for part in (angles.cos(), angles.sin()))
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
        return self._blocks(x, self._condition(self._features(t), x, labels))

    def _features(self, t: Tensor) -> Tensor:
        """Features of times `[B]`, `[B, 1 + 2 frequencies]`."""
        angles = t[:, None] * self.frequencies
        return torch.cat([t[:, None], angles.cos(), angles.sin()], 1)

    def _condition(self, features: Tensor, x: Tensor, labels: Tensor | None) -> Tensor:
        condition: Tensor = self.level(_like(features, x))
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
        features = torch.cat([self._features(t), self._features(t - r)], 1)
        return self._blocks(z, self._condition(features, z, labels))


class EDMPrecond(nn.Module):
    """A denoiser from a raw network, `D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4)`.

    With `r^2 = sigma^2 + sigma_data^2` the coefficients are `c_skip = sigma_data^2 / r^2`,
    `c_out = sigma sigma_data / r` and `c_in = 1 / r`. The kernels of the sampler can do the same to
    the raw network, by `fewstep.edm_sample(d.network, latents, precondition=d.sigma_data)`.

    Source: Karras et al., EDM, arXiv 2206.00364, table 1.

    Args:
        network (nn.Module): raw network `F(x [B, ...], t [B], *condition)`.
        sigma_data (float): standard deviation of the data.

    >>> import torch
    >>> denoiser = EDMPrecond(ResidualMLP((2,)), sigma_data=0.5)
    >>> denoiser(torch.ones(1, 2), torch.tensor([0.5]))  # F starts at 0
    tensor([[0.5000, 0.5000]], grad_fn=<AddBackward0>)
    """

    def __init__(self, network: nn.Module, *, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not 0 < sigma_data < math.inf:
            raise ValueError(
                f"EDMPrecond: sigma_data must be positive and finite, got {sigma_data}"
            )
        self.network = network
        self.sigma_data = sigma_data

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data}"

    def forward(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """Map x `[B, ...]` and sigma `[B]` to denoised images `[B, ...]`."""
        wide = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        square = wide.square() + self.sigma_data**2
        skip, scale = self.sigma_data**2 / square, wide * self.sigma_data * square.rsqrt()
        out = self.network(x * _like(square.rsqrt(), x), sigma.log() / 4, *condition)
        denoised: Tensor = _like(skip, x) * x + _like(scale, x) * out
        return denoised


class LinePrecond(nn.Module):
    """An endpoint predictor with the skip of the unified frame, `N(x, sigma) = z - s F(z, s)`.

    Here `z = x / (1 + sigma)` and `s = sigma / (1 + sigma)`. On the line `z = (1 - s) x1 + s x0`
    the right F is `x0 - x1` at every s. Coordinates that the map leaves alone therefore cost F
    nothing. With a squared error, N is 2-rectified flow with weight s^2.

    Args:
        network (nn.Module): raw network `F(z [B, ...], s [B], *condition)`.

    >>> import torch
    >>> predictor = LinePrecond(ResidualMLP((2,)))
    >>> predictor(torch.ones(1, 2), torch.ones(1))  # F starts at 0
    tensor([[0.5000, 0.5000]], grad_fn=<SubBackward0>)
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """Map x `[B, ...]` and sigma `[B]` to endpoints `[B, ...]`."""
        s = sigma / (1 + sigma)
        wide = s.reshape(-1, *(1,) * (x.ndim - 1))
        z = x * _like(1 - wide, x)
        out: Tensor = z - _like(wide, x) * self.network(z, s, *condition)
        return out


def _like(value: Tensor, x: Tensor) -> Tensor:
    """A value in the dtype of x. Levels are float32 where x has half precision."""
    return value if value.dtype == x.dtype else value.to(x.dtype)


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
