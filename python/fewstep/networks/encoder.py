"""An encoder of images, and the masked autoencoder that trains it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep._checks import count

_GROUPS = 8


class ImageEncoder(nn.Module):
    """A residual network whose maps are features, for `features=` of `fewstep.methods.WFlow`.

    Stage k has `2^(k-1) width` channels on a grid that is half as wide as that of stage k - 1,
    rounded up. Blocks are `h + conv(silu(norm(conv(silu(norm(h))))))` with group norms. A map
    follows every other block and every stage.

    Source: arXiv 2602.04770, Appendix A.5, where the network has 4 stages and a width of 256 or
    640; the form of a block and the doubling of channels are chosen.

    Args:
        channels (int): number of channels of an image.
        width (int): number of channels of the first stage, a multiple of 8.
        stages (int): number of stages.
        depth (int): number of blocks of a stage.

    Raises:
        ValueError: a number is out of range.

    >>> import torch
    >>> from fewstep.networks import ImageEncoder
    >>> maps = ImageEncoder(3, width=16, stages=3)(torch.randn(5, 3, 32, 32))
    >>> {name: tuple(t.shape[1:]) for name, t in maps.items()}
    {'stage1': (16, 32, 32), 'stage2': (32, 16, 16), 'stage3': (64, 8, 8)}
    """

    def __init__(self, channels: int, *, width: int = 32, stages: int = 4, depth: int = 2) -> None:
        super().__init__()
        who = "ImageEncoder"
        self.channels = count(who, "channels", channels)
        width, stages = count(who, "width", width), count(who, "stages", stages)
        depth = count(who, "depth", depth)
        if width % _GROUPS:
            raise ValueError(f"{who}: width must be a multiple of {_GROUPS}, got {width}")
        self.widths = tuple(width * 2**k for k in range(stages))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                _Block(before if k == 0 else own, own, 2 if k == 0 and own > width else 1)
                for k in range(depth)
            )
            for before, own in zip((width, *self.widths), self.widths, strict=False)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images `[B, C, H, W]` to maps `[B, width, h, w]` by name, such as "stage2".

        A stage of more than two blocks has maps such as "stage2/block2" too.

        Raises:
            ValueError: x has another number of channels.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"ImageEncoder: x must be [B, {self.channels}, H, W], got {tuple(x.shape)}"
            )
        maps, found = self.first(x), {}
        for k, blocks in enumerate(self.stages, 1):
            assert isinstance(blocks, nn.ModuleList)
            for i, block in enumerate(blocks, 1):
                maps = block(maps)
                if i == len(blocks):
                    found[f"stage{k}"] = maps
                elif i % 2 == 0:
                    found[f"stage{k}/block{i}"] = maps
        return found


class MaskedAutoencoder(nn.Module):
    """An `ImageEncoder` with a decoder that restores images of which it sees a part.

    The encoder gets images with 0 where they are masked. From its last map upwards the decoder
    widens each to the grid of the stage before, adds a linear map of that stage's, and has a block.

    Source: as `ImageEncoder`; the decoder is chosen.

    Args:
        encoder (ImageEncoder): encoder, whose features are what is wanted.

    >>> import torch
    >>> from fewstep.networks import ImageEncoder, MaskedAutoencoder, patch_masks
    >>> network = MaskedAutoencoder(ImageEncoder(1, width=8, stages=2))
    >>> images = torch.randn(5, 1, 28, 28)
    >>> masks = patch_masks(images, patch=4, share=0.5)
    >>> network(images, masks).shape
    torch.Size([5, 1, 28, 28])
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        widths = encoder.widths
        pairs = [*zip(widths[1:], widths[:-1], strict=True)][::-1]
        self.ups = nn.ModuleList(nn.Conv2d(above, below, 1) for above, below in pairs)
        self.skips = nn.ModuleList(nn.Conv2d(below, below, 1) for _, below in pairs)
        self.blocks = nn.ModuleList(_Block(below, below, 1) for _, below in pairs)
        self.last = nn.Conv2d(widths[0], encoder.channels, 3, padding=1)

    def forward(self, x: Tensor, masks: Tensor) -> Tensor:
        """Restore images `[B, C, H, W]` from where masks, bool `[B, 1, H, W]`, are False."""
        found = self.encoder(x.masked_fill(masks, 0))
        stages = [found[f"stage{k}"] for k in range(len(self.encoder.widths), 0, -1)]
        maps = stages[0]
        for up, skip, block, stage in zip(
            self.ups, self.skips, self.blocks, stages[1:], strict=True
        ):
            maps = block(F.interpolate(up(maps), stage.shape[2:]) + skip(stage))
        out: Tensor = self.last(F.silu(maps))
        return out


def patch_masks(
    x: Tensor, *, patch: int, share: float, generator: torch.Generator | None = None
) -> Tensor:
    """Masks, bool `[B, 1, H, W]`, that are True in each patch with probability `share`.

    Args:
        x (Tensor): images `[B, C, H, W]`.
        patch (int): width of a patch. Those at the right and at the bottom may be narrower.
        share (float): probability, above 0 and below 1.
        generator (torch.Generator | None): generator of the draws, on the CPU.

    Raises:
        ValueError: a number is out of range.
    """
    patch = count("patch_masks", "patch", patch)
    if not 0 < share < 1:
        raise ValueError(f"patch_masks: share must be in (0, 1), got {share}")
    b, _, h, w = x.shape
    drawn = torch.rand(b, 1, -(-h // patch), -(-w // patch), generator=generator) < share
    wide = drawn.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return wide[:, :, :h, :w].to(x.device)


def masked_error(restored: Tensor, x: Tensor, masks: Tensor) -> Tensor:
    """The mean squared error over the values that were masked; 0 if none were."""
    square = ((restored - x) * masks).square().sum()
    return square / (masks.sum() * x.shape[1]).clamp_min(1)


class _Block(nn.Module):
    def __init__(self, before: int, own: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(_GROUPS, n) for n in (before, own))
        self.conv1 = nn.Conv2d(before, own, 3, stride, 1)
        self.conv2 = nn.Conv2d(own, own, 3, padding=1)
        same = before == own and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(before, own, 1, stride)

    def forward(self, maps: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(maps)))
        out: Tensor = self.skip(maps) + self.conv2(F.silu(self.norm2(hidden)))
        return out
