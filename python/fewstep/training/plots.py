"""Pictures of images in [-1, 1], as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fewstep._files import replacing

_GAP = 4  # pixels between the images of a grid
_LEAST_PIXELS = 64  # of one image's longer side in a picture


def montage(images: Tensor, columns: int, *, gap: int = 0) -> Tensor:
    """Images `[n, C, H, W]` in [-1, 1], row by row, as one `[rows H, columns W, 3]` in [0, 1].

    With a gap, white lines of so many pixels are between them.

    >>> import torch
    >>> montage(torch.zeros(5, 1, 8, 8), columns=3).shape
    torch.Size([16, 24, 3])
    """
    n, (h, w) = len(images), images.shape[2:]
    rows = -(-n // columns)
    tiles = images.new_ones(rows * columns, 3, h + gap, w + gap)
    tiles[:n, :, :h, :w] = (images.clamp(-1, 1) + 1) / 2
    h, w = h + gap, w + gap
    tiles = tiles.reshape(rows, columns, 3, h, w)
    whole = tiles.permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, 3)
    return whole[: rows * h - gap, : columns * w - gap]


def save_grid(path: Path, images: Tensor, *, columns: int) -> None:
    """Write a grid of images `[n, C, H, W]`. Small ones are enlarged by a whole factor.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.image import imsave

    factor = -(-_LEAST_PIXELS // max(images.shape[2:]))
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    picture = montage(large, columns, gap=_GAP)
    with replacing(path) as temporary:
        imsave(temporary, picture.numpy(), format="png")


def save_comparison(
    path: Path,
    real: Tensor,
    generated: Tensor,
    *,
    columns: int,
    names: Sequence[str] = (),
    real_names: Sequence[str] | None = None,
) -> None:
    """Write real and generated images side by side, row by row.

    Args:
        path (Path): path of the PNG.
        real (Tensor): real images `[rows columns, C, H, W]`.
        generated (Tensor): generated images, of the same shape.
        columns (int): number of images in a row.
        names (Sequence[str]): names of the rows. An empty sequence shows none.
        real_names (Sequence[str] | None): names of the real rows. None takes the same.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    h, w = real.shape[2:]
    rows = -(-len(real) // columns)
    inch = 0.55 / max(h, w)
    figure = Figure((2 * columns * w * inch + 1, rows * h * inch + 0.6), dpi=120)
    FigureCanvasAgg(figure)
    real_names = names if real_names is None else real_names
    sides = ((real, "real", real_names), (generated, "generated", names))
    for axes, (images, title, own) in zip(figure.subplots(1, 2), sides, strict=True):
        axes.imshow(montage(images, columns).numpy(), interpolation="nearest")
        axes.set_title(title)
        for draw, side, count in ((axes.axhline, h, rows), (axes.axvline, w, columns)):
            for k in range(1, count):  # images that fill their frame are told apart by lines
                draw(side * k - 0.5, color="tab:blue", linewidth=1)
        axes.set_xticks([])
        axes.set_yticks([h * (i + 0.5) for i in range(len(own))], own)
        axes.tick_params(length=0)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
