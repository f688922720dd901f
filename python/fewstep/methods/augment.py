"""DiffAugment augments images at random, and gradients flow through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.methods.draws import Draws

_SHIFT, _HOLE = 0.125, 0.2  # of a side


def diff_augment(
    *images: Tensor,
    policy: Sequence[str] = ("translation", "cutout"),
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Augment batches of images at random. Sample i has the same parameters in every batch.

    "colour" adds a brightness from U(-0.5, 0.5). It then scales the saturation by U(0, 2) around
    the mean over channels, and the contrast by U(0.5, 1.5) around the mean of the image.
    "translation" shifts by whole pixels, up to an eighth of a side, and fills with 0. "cutout" sets
    a square with a fifth of the sides to 0.

    A discriminator overfits later if all images that it sees, real and generated, are augmented.

    Source: Zhao et al., Differentiable Augmentation for Data-Efficient GAN Training, arXiv
    2006.10738, section 3.

    Args:
        images (Tensor): one or more batches `[B, C, H, W]` of equal shape.
        policy (Sequence[str]): augmentations from "colour", "translation" and "cutout". They are
            applied in this order.
        generator (torch.Generator | None): generator of the parameters.
        sample_ids (Tensor | None): ids of the samples, int64 `[B]` in `[0, 2^48)`. The parameters
            of a sample then depend on its id, in any batch; see `fewstep.methods.LinesMatching`.
            None takes the places in the batch.

    Returns:
        tuple[Tensor, ...]: the augmented batches, differentiable in `images`.

    Raises:
        ValueError: a name in the policy is unknown, or shapes differ or are not `[B, C, H, W]`.

    >>> import torch
    >>> fake, real = diff_augment(torch.ones(3, 1, 8, 8), torch.ones(3, 1, 8, 8))
    >>> torch.equal(fake, real), int((fake == 0).sum((1, 2, 3)).min()) >= 1
    (True, True)
    """
    for name in policy:
        if name not in _AUGMENTATIONS:
            known = tuple(_AUGMENTATIONS)
            raise ValueError(f"diff_augment: policy must be of {known}, got {name!r}")
    shapes = [tuple(t.shape) for t in images]
    if not shapes or any(len(shape) != 4 or shape != shapes[0] for shape in shapes):
        raise ValueError(f"diff_augment: images must be [B, C, H, W] of one shape, got {shapes}")
    draws = Draws("diff_augment", images[0], generator, sample_ids)
    for name in _AUGMENTATIONS:
        if name in policy:
            count, augment = _AUGMENTATIONS[name]
            parameters = draws.uniform(count, dtype=torch.float32)
            images = tuple(augment(t, parameters) for t in images)
    return images


def _colour(x: Tensor, u: Tensor) -> Tensor:
    brightness, saturation, contrast = u[:, :, None, None, None].to(x.dtype).unbind()
    x = x + brightness - 0.5
    mean = x.mean(1, keepdim=True)
    x = mean + (x - mean) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (0.5 + contrast)


def _translate(x: Tensor, u: Tensor) -> Tensor:
    for axis, share in zip((2, 3), u.unbind(), strict=True):
        side = x.shape[axis]
        reach = int(side * _SHIFT + 0.5)
        shift = (share * (2 * reach + 1)).long() - reach
        source = torch.arange(side, device=x.device) + shift[:, None]  # [B, side]
        wide = source.reshape(len(x), 1, *((side, 1) if axis == 2 else (1, side)))
        inside = (wide >= 0) & (wide < side)
        x = x.gather(axis, wide.clamp(0, side - 1).expand(x.shape)) * inside
    return x


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    holes = []
    for axis, share in zip((2, 3), u.unbind(), strict=True):
        side = x.shape[axis]
        size = int(side * _HOLE + 0.5)
        # The centre is any pixel, so a hole may reach over the edge.
        low = (share * (side + 1 - size % 2)).long() - size // 2
        pixel = torch.arange(side, device=x.device)
        holes.append((pixel >= low[:, None]) & (pixel < low[:, None] + size))
    return x.masked_fill((holes[0][:, :, None] & holes[1][:, None, :])[:, None], 0)


_AUGMENTATIONS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "colour": (3, _colour),
    "translation": (2, _translate),
    "cutout": (2, _cutout),
}
