"""Pictures of images in [-1, 1], as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep._files import replacing

_GAP = 4  # pixels between the images of a grid
_LEAST_PIXELS = 64  # of one image's longer side in a picture
_MARGIN, _LINE = 8, 20  # pixels around a picture and between its parts, and of a line of text
_LONGEST = 24  # characters of a row's name


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


@dataclass(frozen=True)
class _Panel:
    """Images `[n, C, H, W]` in rows, with a title and names of the rows and columns, or without."""

    images: Tensor
    columns: int
    title: str = ""
    rows: Sequence[str] = ()
    names: Sequence[str] = ()


def save_grid(
    path: Path, images: Tensor, *, columns: int, title: str = "", names: Sequence[str] = ()
) -> None:
    """Write a grid of images `[n, C, H, W]`. Small ones are enlarged by a whole factor.

    Args:
        path (Path): path of the PNG.
        images (Tensor): images `[n, C, H, W]`.
        columns (int): number of images in a row.
        title (str): line above the grid.
        names (Sequence[str]): names of the columns. An empty sequence shows none.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    _save(path, [_Panel(images, columns, title, names=names)])


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
        names (Sequence[str]): names of the rows. Rows of one name that follow each other show it
            once. An empty sequence shows none.
        real_names (Sequence[str] | None): names of the real rows. None takes the same.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    real_names = names if real_names is None else real_names
    panels = (real, "real", real_names), (generated, "generated", names)
    _save(path, [_Panel(images, columns, title, own) for images, title, own in panels])


def _save(path: Path, panels: Sequence[_Panel]) -> None:
    """Write panels side by side, pixel for pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=100)
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    font: dict[str, Any] = {"fontsize": 9.0, "parse_math": False}  # a name may hold a $

    def length(text: str) -> int:
        own = figure.text(0, 0, text, **font)
        box = own.get_window_extent(renderer)
        own.remove()
        return int(box.width) + 1

    def fitting(text: str, room: float) -> str:
        shorter = (text[:k].rstrip() + "…" for k in range(len(text) - 1, 0, -1))
        return next((t for t in (text, *shorter) if length(t) <= room), "")

    texts: list[tuple[float, float, str, dict[str, Any]]] = []
    pictures = []
    left, lowest = _MARGIN, 0
    for panel in panels:
        factor = -(-_LEAST_PIXELS // max(panel.images.shape[2:]))
        images = panel.images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        h, w = (side + _GAP for side in images.shape[2:])
        whole = (montage(images, panel.columns, gap=_GAP) * 255).round().byte().numpy()
        top = _MARGIN + _LINE * (bool(panel.title) + bool(panel.names))
        rows = [(row[:_LONGEST], len(list(own))) for row, own in itertools.groupby(panel.rows)]
        start = left + max((length(row) + _MARGIN for row, _ in rows), default=0)
        below = float(top)
        for row, count in rows:
            texts.append((start - _MARGIN, below + (count * h - _GAP) / 2, row, {"ha": "right"}))
            below += count * h
        for k, name in enumerate(panel.names):
            at = start + k * w + (w - _GAP) / 2
            texts.append((at, top - _LINE / 2, fitting(name, w), {"ha": "center"}))
        texts.append((start, _MARGIN + _LINE / 2 - 2, panel.title, {"ha": "left"}))
        pictures.append((whole, start, top))
        left = start + max(whole.shape[1], length(panel.title)) + 2 * _MARGIN
        lowest = max(lowest, top + whole.shape[0] + _MARGIN)
    width, height = left - _MARGIN, lowest
    figure.set_size_inches(width / figure.dpi, height / figure.dpi)
    for whole, x, y in pictures:
        figure.figimage(whole, x, height - y - whole.shape[0], origin="upper")
    for across, down, text, options in texts:
        figure.text(across / width, 1 - down / height, text, va="center", **options, **font)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=figure.dpi)
