"""Generators and velocities of images around a body, and bodies by name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep._checks import count
from fewstep.networks.body import ImageBody, RMSNorm
from fewstep.networks.conv import ImageConvNet
from fewstep.networks.mlp import fourier, like
from fewstep.networks.transformer import ImageTransformer

_SIZES = {  # width, depth, heads; those of DiT, but for T
    "T": (192, 6, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
STYLES = 32  # of a generator by name
_SCALED, _ANGLES, _SLOWEST = 0.02, 256, 1e-4  # of the scale of guidance


class ImageGenerator(nn.Module):
    """A one-step generator `g(noise, labels, scale)` of images around a body.

    The condition of the body is the sum of an embedding of the class, of one vector from a codebook
    for each of `styles` discrete variables, and of `0.02 rms_norm(mlp(...))` of sines and cosines
    of the scale of guidance, at 128 frequencies from 1 to 1e-4.

    The noise of a sample is a vector. Its first `C H W` values are the image that the body gets.
    Each of the others is a standard normal z, and its style is number `floor(codebook P(z))` of the
    codebook, where P is the normal distribution function. Styles are so uniform, and a sample is a
    function of its noise alone.

    Source: as `ImageTransformer`. Released generators have 32 styles from codebooks of 64.

    Args:
        body (ImageBody): network from an image of noise and a condition to an image.
        classes (int): number of classes to condition on; 0 for none.
        guided (bool): take the scale of guidance as an input.
        styles (int): number of discrete variables.
        codebook (int): number of values of each.

    Attributes:
        noise_dim: dimension `C H W + styles` of the noise.

    Raises:
        ValueError: a number is out of range.

    >>> import torch
    >>> from fewstep.networks import ImageConvNet, ImageGenerator
    >>> generator = ImageGenerator(ImageConvNet((1, 8, 8)), classes=10, guided=True, styles=4)
    >>> noise = torch.randn(5, generator.noise_dim)
    >>> generator(noise, torch.arange(5), torch.ones(5)).shape
    torch.Size([5, 1, 8, 8])
    """

    frequencies: Tensor

    def __init__(
        self,
        body: ImageBody,
        *,
        classes: int = 0,
        guided: bool = False,
        styles: int = 0,
        codebook: int = 64,
    ) -> None:
        super().__init__()
        who, width = "ImageGenerator", body.width
        self.body = body
        self.styles = count(who, "styles", styles, 0)
        self.codebook = count(who, "codebook", codebook)
        self.noise_dim = math.prod(body.image_shape) + self.styles
        self.embedding = _embedding(count(who, "classes", classes, 0), body)
        self.style = _embedding(self.styles * self.codebook, body)
        self.scale: nn.Sequential | None = None
        if guided:
            mlp = (nn.Linear(_ANGLES, width), nn.SiLU(), nn.Linear(width, width))
            self.scale = nn.Sequential(*mlp, RMSNorm(width, eps=1e-6))
            frequencies = torch.arange(_ANGLES // 2) * (2 * math.log(_SLOWEST) / _ANGLES)
            self.register_buffer("frequencies", frequencies.exp(), persistent=False)

    def forward(
        self, noise: Tensor, labels: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Map noise to images `[n, C, H, W]`.

        Args:
            noise (Tensor): standard normals `[n, noise_dim]`, or `[n, C, H, W]` without styles.
            labels (Tensor | None): classes, int64 `[n]`, with classes only.
            scale (Tensor | None): scale of guidance `[n]`, for guided generators; 1 if none.

        Raises:
            ValueError: noise has another shape, or labels or a scale do not fit the generator.
        """
        shape = self.body.image_shape
        allowed = {(self.noise_dim,)} | (set() if self.styles else {shape})
        if tuple(noise.shape[1:]) not in allowed:
            expected = f"[n, {self.noise_dim}]" + ("" if self.styles else f" or [n, *{shape}]")
            raise ValueError(f"ImageGenerator: noise must be {expected}, got {tuple(noise.shape)}")
        flat = noise.flatten(1)
        pixels = flat[:, : self.noise_dim - self.styles].reshape(-1, *shape)
        condition = _of_class("ImageGenerator", self.embedding, labels, pixels, self.body.width)
        if self.style is not None:
            share = torch.special.ndtr(flat[:, self.noise_dim - self.styles :].float())
            code = (share * self.codebook).long().clamp(0, self.codebook - 1)
            first = self.codebook * torch.arange(self.styles, device=code.device)
            condition = condition + self.style(first + code).sum(1)
        if self.scale is not None:
            given = torch.ones_like(flat[:, 0]) if scale is None else scale
            angles = given[:, None].to(self.frequencies.dtype) * self.frequencies
            turned = torch.cat([angles.cos(), angles.sin()], 1)
            condition = condition + _SCALED * self.scale(like(turned, pixels))
        elif scale is not None:
            raise ValueError("ImageGenerator: scale is for guided generators, got one")
        out: Tensor = self.body(pixels, condition)
        return out


class ImageField(nn.Module):
    """A network `F(x, t, labels)` of images around a body: a velocity, a student, a raw denoiser.

    The condition of the body is `mlp(features of t)` plus an embedding of the class. The features
    are t, `cos` and `sin` of `pi 2^k t`. F starts at 0.

    Args:
        body (ImageBody): network from an image and a condition to an image. Its last layer is set
            to 0.
        classes (int): number of classes to condition on; 0 for none.
        frequencies (int): number of frequencies of t.

    Raises:
        ValueError: a number is out of range.

    >>> import torch
    >>> from fewstep.networks import ImageConvNet, ImageField
    >>> field = ImageField(ImageConvNet((1, 8, 8)), classes=10)
    >>> field(torch.randn(5, 1, 8, 8), torch.rand(5), torch.arange(5)).shape
    torch.Size([5, 1, 8, 8])
    """

    frequencies: Tensor
    times = 1

    def __init__(self, body: ImageBody, *, classes: int = 0, frequencies: int = 6) -> None:
        super().__init__()
        who, width = type(self).__name__, body.width
        self.body = body
        powers = math.pi * 2.0 ** torch.arange(count(who, "frequencies", frequencies))
        self.register_buffer("frequencies", powers, persistent=False)
        features = self.times * (1 + 2 * frequencies)
        self.level = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        self.embedding = _embedding(count(who, "classes", classes, 0), body)
        nn.init.zeros_(body.last.weight)  # type: ignore[arg-type, union-attr]
        nn.init.zeros_(body.last.bias)  # type: ignore[arg-type, union-attr]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map x `[B, C, H, W]`, t `[B]` and labels int64 `[B]` (with classes only) to `[B, ...]`.

        Raises:
            ValueError: x has another shape, or labels do not fit the network.
        """
        return self._at(x, fourier(t, self.frequencies), labels)

    def _at(self, x: Tensor, features: Tensor, labels: Tensor | None) -> Tensor:
        condition = self.level(like(features, x))
        own = _of_class(type(self).__name__, self.embedding, labels, x, self.body.width)
        out: Tensor = self.body(x, condition + own)
        return out


class ImageAverageField(ImageField):
    """A network `u(z, t, r, labels)` for MeanFlow, an `ImageField` of t and of t - r.

    Frequencies are few, for the derivative along t grows with the highest.

    Args:
        body (ImageBody): network from an image and a condition to an image.
        classes (int): number of classes to condition on; 0 for none. Label `classes`, one past the
            last, stands for no class.
        frequencies (int): number of frequencies of t and of t - r.

    >>> import torch
    >>> from fewstep.networks import ImageAverageField, ImageConvNet
    >>> field = ImageAverageField(ImageConvNet((1, 8, 8)), classes=10)
    >>> t = torch.ones(5)
    >>> field(torch.randn(5, 1, 8, 8), t, 0 * t, torch.tensor([0, 1, 2, 3, 10])).shape
    torch.Size([5, 1, 8, 8])
    """

    times = 2

    def __init__(self, body: ImageBody, *, classes: int = 0, frequencies: int = 2) -> None:
        super().__init__(body, classes=classes + 1 if classes else 0, frequencies=frequencies)

    def forward(  # type: ignore[override]
        self, z: Tensor, t: Tensor, r: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Map z `[B, C, H, W]`, times `[B]` and labels int64 `[B]` (if any) to `[B, C, H, W]`."""
        features = torch.cat([fourier(s, self.frequencies) for s in (t, t - r)], 1)
        return self._at(z, features, labels)


def image_body(name: str, image_shape: Sequence[int]) -> ImageBody:
    """A body by name, with first weights.

    | name | what | width | depth | heads |
    |---|---|---:|---:|---:|
    | `"conv/P"` | `ImageConvNet` | 32 channels | 4 | |
    | `"T/P"` | `ImageTransformer` | 192 | 6 | 3 |
    | `"S/P"` | | 384 | 12 | 6 |
    | `"B/P"` | | 768 | 12 | 12 |
    | `"L/P"` | | 1024 | 24 | 16 |
    | `"XL/P"` | | 1152 | 28 | 16 |

    P is the width of a patch, such as 2 in `"B/2"`, and 2 where it is left out.

    Args:
        name (str): name of the table.
        image_shape (tuple): shape `(C, H, W)` of an image or latent.

    Raises:
        ValueError: the name is unknown, or the patch does not divide H and W.

    >>> from fewstep.networks import image_body
    >>> sum(p.numel() for p in image_body("T/2", (4, 32, 32)).parameters())
    4123984
    """
    size, patch = _size_and_patch(name)
    if size == "conv":
        return ImageConvNet(image_shape, patch=patch)
    width, depth, heads = _SIZES[size]
    return ImageTransformer(image_shape, patch=patch, width=width, depth=depth, heads=heads)


def _size_and_patch(name: str, others: tuple[str, ...] = ()) -> tuple[str, int]:
    sizes = ("conv", *_SIZES)
    match = re.fullmatch(rf"({'|'.join(sizes)})(?:/([1-9]\d{{0,3}}))?", str(name))
    if match is None:
        raise ValueError(
            f"network must be one of {others + sizes}, and the width of a patch as in 'B/2',"
            f" got {name!r}"
        )
    return match[1], int(match[2] or 2)


def check_network(name: str, image_shape: Sequence[int] = ()) -> None:
    """Check what `--network` names, and that images of a shape have its patches.

    Raises:
        ValueError: the name is neither "mlp" nor that of a body, or the patch does not divide H
            and W.
    """
    if name == "mlp":
        return
    _, patch = _size_and_patch(name, ("mlp",))
    for size in image_shape[1:]:
        if size % patch:
            raise ValueError(
                f"network: patches of {name!r} must divide the images, got {patch} for"
                f" {' x '.join(map(str, image_shape[1:]))}"
            )


def generator_noise(image_shape: Sequence[int]) -> int:
    """The dimension of the noise of `generator`."""
    return math.prod(image_shape) + STYLES


def generator(
    name: str,
    image_shape: Sequence[int],
    *,
    classes: int = 0,
    guided: bool = False,
    styles: int = STYLES,
) -> ImageGenerator:
    """An `ImageGenerator` around the body of a name. The arguments and errors are those of both.

    >>> from fewstep.networks import generator
    >>> generator("T/2", (4, 32, 32), classes=1000, guided=True).noise_dim
    4128
    """
    return ImageGenerator(
        image_body(name, image_shape), classes=classes, guided=guided, styles=styles
    )


def velocity(name: str, image_shape: Sequence[int], *, classes: int = 0) -> ImageField:
    """An `ImageField` around the body of a name. The arguments and errors are those of both."""
    return ImageField(image_body(name, image_shape), classes=classes)


def average_velocity(
    name: str, image_shape: Sequence[int], *, classes: int = 0
) -> ImageAverageField:
    """An `ImageAverageField` around the body of a name, with the arguments and errors of both."""
    return ImageAverageField(image_body(name, image_shape), classes=classes)


def _embedding(entries: int, body: ImageBody) -> nn.Embedding | None:
    if not entries:
        return None
    embedding = nn.Embedding(entries, body.width)
    nn.init.normal_(embedding.weight, std=body.embedding_std)
    return embedding


def _of_class(
    who: str, embedding: nn.Embedding | None, labels: Tensor | None, x: Tensor, width: int
) -> Tensor:
    """The embedding `[B, width]` of labels, or zeros without classes.

    Raises:
        ValueError: there are labels and no classes, or classes and no labels.
    """
    if embedding is None:
        if labels is not None:
            raise ValueError(f"{who}: labels are for networks with classes, got {labels.shape}")
        return x.new_zeros(len(x), width)
    if labels is None or tuple(labels.shape) != (len(x),):
        got = None if labels is None else tuple(labels.shape)
        raise ValueError(
            f"{who}: labels must be ({len(x)},) for its {embedding.num_embeddings} classes,"
            f" got {got}"
        )
    out: Tensor = embedding(labels)
    return out
