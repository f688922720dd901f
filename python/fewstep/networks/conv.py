"""A small convolutional network on the patches of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fewstep._checks import count
from fewstep.networks.body import ImageBody

_GROUPS = 8


class ImageConvNet(ImageBody):
    """A residual network of 3 x 3 convolutions on the grid of patches, for images on a CPU.

    Each block is `h + conv(silu(norm(conv(silu(norm(h)))) (1 + a) + b))` with group norms of 8
    groups. Scale and shift come from the condition and from the mean of h over the grid,
    `(a, b) = linear(silu(c + linear(mean(h))))`. Distant patches meet in that mean alone. The
    blocks do nothing at first.

    Args:
        image_shape (tuple): shape `(C, H, W)` of an image.
        patch (int): width of a patch, a divisor of H and W. The time is about that of
            `H W / patch^2` positions.
        channels (int): number of channels, a multiple of 8.
        depth (int): number of blocks.

    Raises:
        ValueError: a size is out of range, or patch does not divide H and W.

    >>> import torch
    >>> from fewstep.networks import ImageConvNet
    >>> body = ImageConvNet((1, 28, 28))
    >>> body(torch.randn(5, 1, 28, 28), torch.randn(5, body.width)).shape
    torch.Size([5, 1, 28, 28])
    """

    def __init__(
        self, image_shape: Sequence[int], *, patch: int = 2, channels: int = 32, depth: int = 4
    ) -> None:
        who = type(self).__name__
        channels, depth = count(who, "channels", channels), count(who, "depth", depth)
        if channels % _GROUPS:
            raise ValueError(f"{who}: channels must be a multiple of {_GROUPS}, got {channels}")
        super().__init__(image_shape, patch=patch, width=4 * channels)
        values = self.image_shape[0] * self.patch**2
        self.first = nn.Conv2d(values, channels, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(channels, self.width) for _ in range(depth))
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.last = nn.Conv2d(channels, values, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` and a condition `[B, width]` to `[B, C, H, W]`."""
        maps = self.first(self.patches(x).flatten(1, 3))
        for block in self.blocks:
            maps = block(maps, condition)
        values = self.last(F.silu(self.norm(maps)))
        p = self.patch
        return self.images(values.reshape(len(x), -1, p, p, *self.grid))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(_GROUPS, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.context = nn.Linear(channels, width)
        self.modulation = nn.Linear(width, 2 * channels)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor, condition: Tensor) -> Tensor:
        """Map maps `[B, channels, h, w]` and a condition `[B, width]` to maps."""
        own = condition + self.context(maps.mean((2, 3)))
        a, b = self.modulation(F.silu(own))[:, :, None, None].chunk(2, 1)
        hidden = self.norm2(self.conv1(F.silu(self.norm1(maps)))) * (1 + a) + b
        out: Tensor = maps + self.conv2(F.silu(hidden))
        return out
