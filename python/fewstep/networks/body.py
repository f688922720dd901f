"""What the networks of images share: patches, a condition, and calls in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep._checks import count
from fewstep.networks.mlp import like

_MOST_BYTES = 2**28  # of the widest activations of a call without gradient


class ImageBody(nn.Module):
    """The part of a network that maps images and a condition to images of the same shape.

    Subclasses are called with images `[B, C, H, W]` and a condition `[B, width]`. An image is cut
    into patches, and a patch is a vector of `C patch^2` values.

    Args:
        image_shape (tuple): shape `(C, H, W)` of an image.
        patch (int): width of a patch, a divisor of H and W.
        width (int): dimension of the condition.
        extra (int): number of tokens beside those of the patches.

    Attributes:
        grid: numbers `(h, w)` of patches along H and W.
        most: number of samples that a call without gradient should take at once.
        embedding_std: standard deviation of the first embeddings of classes and styles.

    Raises:
        ValueError: image_shape is not three positive integers, or patch does not divide H and W.
    """

    embedding_std = 1.0

    def __init__(
        self, image_shape: Sequence[int], *, patch: int, width: int, extra: int = 0
    ) -> None:
        super().__init__()
        who = type(self).__name__
        if len(image_shape) != 3:
            raise ValueError(f"{who}: image_shape must be (C, H, W), got {tuple(image_shape)}")
        channels, h, w = (count(who, "image_shape", size) for size in image_shape)
        self.patch = count(who, "patch", patch)
        if h % self.patch or w % self.patch:
            raise ValueError(
                f"{who}: patch must divide the height and width of an image, got {self.patch}"
                f" for {h} x {w}"
            )
        self.image_shape = (channels, h, w)
        self.grid = (h // self.patch, w // self.patch)
        self.width = count(who, "width", width)
        tokens = self.grid[0] * self.grid[1] + extra
        self.most = max(1, _MOST_BYTES // (4 * tokens * 8 * self.width))

    def patches(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` as the values of patches, `[B, C, patch, patch, h, w]`.

        Raises:
            ValueError: the images have another shape.
        """
        if tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(
                f"{type(self).__name__}: x must be [B, {', '.join(map(str, self.image_shape))}],"
                f" got {tuple(x.shape)}"
            )
        (h, w), p = self.grid, self.patch
        return x.reshape(x.shape[0], x.shape[1], h, p, w, p).permute(0, 1, 3, 5, 2, 4)

    def images(self, patches: Tensor) -> Tensor:
        """Images `[B, C, H, W]` of the values of patches `[B, C, patch, patch, h, w]`."""
        return patches.permute(0, 1, 4, 2, 5, 3).reshape(patches.shape[0], *self.image_shape)


class RMSNorm(nn.RMSNorm):
    """An `nn.RMSNorm` whose weight is in the dtype of x, which the fused kernels need."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, like(self.weight, x), self.eps)


def in_batches(network: nn.Module) -> Callable[..., Tensor]:
    """A network that takes no more samples at once than its body should.

    Every argument is a tensor `[B, ...]` or None, and the result is a tensor `[B, ...]`. A network
    without an `ImageBody` is returned as it is.

    >>> import torch
    >>> from fewstep.networks import in_batches, velocity
    >>> network = velocity("B/2", (4, 32, 32))
    >>> network.body.most
    40
    >>> with torch.no_grad():
    ...     in_batches(network)(torch.randn(2, 4, 32, 32), torch.rand(2)).shape
    torch.Size([2, 4, 32, 32])
    """
    sizes = [module.most for module in network.modules() if isinstance(module, ImageBody)]
    if not sizes:
        return network
    most = min(sizes)

    def call(*inputs: Tensor | None) -> Tensor:
        count = max(len(t) for t in inputs if t is not None)
        cut = [slice(k, k + most) for k in range(0, count, most)]
        parts = ([None if t is None else t[k] for t in inputs] for k in cut)
        return torch.cat([network(*part) for part in parts])

    return call
