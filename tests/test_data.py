from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.conversions import convert
from fewstep.data.images import Images, load
from fewstep.data.toys import GaussianMixture

X = torch.zeros(4, 1)
mixture = GaussianMixture(torch.zeros(2, 1), torch.ones(2, 1))


def check(data: Images) -> None:
    assert data.images.dtype == torch.float32
    assert data.images.min() >= -1
    assert data.images.max() <= 1
    if data.labels is not None:
        assert data.labels.dtype == torch.int64
        assert data.labels.unique().tolist() == list(range(len(data.names)))


@pytest.mark.parametrize(("name", "count", "size"), [("digits", 1797, 8), ("mnist5k", 5000, 28)])
def test_builtin(name: str, count: int, size: int) -> None:
    data = load(name)
    check(data)
    assert data.images.shape == (count, 1, size, size)
    assert data.names == tuple("0123456789")
    assert data.images.min() == -1
    assert data.images.max() == 1
    assert data.labels is not None
    # Zeros have an empty centre, ones do not: images and labels belong together.
    middle = data.images[:, 0, size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1]
    centre = middle.mean((1, 2))
    assert centre[data.labels == 0].mean() < -0.8
    assert centre[data.labels == 1].mean() > 0.3


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 1, 4, 5), (6, 3, 4, 5)])
def test_array(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    data = load(str(tmp_path / "a.npy"))
    check(data)
    assert data.labels is None
    expected = torch.from_numpy(pixels).reshape(6, -1, 4, 5) / 127.5 - 1
    torch.testing.assert_close(data.images, expected)

    np.save(tmp_path / "b.npy", np.asfortranarray(expected.double().numpy()))
    np.save(tmp_path / "b_labels.npy", np.array([7, -2, 7, 7, -2, 9], np.int16))
    data = load(str(tmp_path / "b.npy"))
    check(data)
    torch.testing.assert_close(data.images, expected)
    assert data.names == ("-2", "7", "9")
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0, 1, 1, 0, 2]


def save(path: Path, mode: str = "L", size: tuple[int, int] = (5, 4), value: int = 51) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("L", size, value).convert(mode).save(path)


def test_folder(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/1.png", "cat/2.PNG", "dog/1.png", ".cache/x.png")):
        save(tmp_path / name, value=51 * i)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    data = load(str(tmp_path))
    check(data)
    assert data.images.shape == (3, 1, 4, 5)
    assert data.names == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1]
    torch.testing.assert_close(data.images[:, 0, 0, 0], torch.tensor([-1.0, -0.6, -0.2]))

    save(tmp_path / "dog" / "2.png", "RGB")
    assert load(str(tmp_path)).images.shape == (4, 3, 4, 5)

    flat = load(str(tmp_path / "cat"))
    assert flat.labels is None
    assert flat.names == ()


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "table.csv").write_text("1,2")
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"data: must be one of .* got ''"):
        load("")
    for name in ("mnist", str(tmp_path / "missing.npy"), str(tmp_path / "table.csv")):
        with pytest.raises(ValueError, match=name):
            load(name)
    for name in ("empty", "text.npy", "pickled.npy"):
        with pytest.raises(ValueError, match=name):
            load(str(tmp_path / name))


@pytest.mark.parametrize("source", [None, True, 1, b"digits", ["digits"], np.zeros(2)])
def test_sources_that_are_no_paths(source: object) -> None:
    with pytest.raises(TypeError, match="data: must be a name or a path, got"):
        load(source)  # type: ignore[arg-type]


def test_a_name_that_no_file_can_have() -> None:
    for name in ("a" * 5000, "a\0b", "a" * 5000 + ".npy"):
        with pytest.raises(ValueError, match="data: must be one of"):
            load(name)


TOY = {"means": torch.zeros(2, 1), "variances": torch.ones(2, 1)}
CONVERTED = {"value": X, "x": X, "t": 0.5, "source": "velocity", "target": "score"}


@pytest.mark.parametrize(
    ("function", "given", "name", "values"),
    [
        (GaussianMixture, TOY, "means", (None, "a", [0.0], torch.zeros(2, 1).long())),
        (GaussianMixture, TOY, "variances", (None, 1.0, torch.ones(2, 1) * 1j, torch.ones(3, 1))),
        (GaussianMixture, TOY, "weights", ("a", [1.0, 1.0], np.ones(2), torch.ones(3))),
        (GaussianMixture, TOY, "path", (None, "a", ["ve"])),
        (mixture.log_prob, {"x": X, "t": 0.5}, "x", (None, [0.0], X.long(), torch.zeros(4, 2))),
        (mixture.log_prob, {"x": X, "t": 0.5}, "t", (None, "a", True, 1j, [1.0], X, 10**400)),
        (mixture.velocity, {"x": X, "t": 0.5}, "t", (None, "a", True, torch.ones(3))),
        (mixture.sample, {"n": 3}, "n", (None, "a", True, 0, 1.5, 10**400)),
        (mixture.sample, {"n": 3}, "t", (None, "a", [1.0], torch.ones(2))),
        (mixture.sample, {"n": 3}, "generator", (1, "a", np.random.default_rng(0))),
        (convert, CONVERTED, "value", (None, 1.0, X.long(), torch.zeros(3, 1))),
        (convert, CONVERTED, "x", (None, 1.0, X.to_sparse(), torch.zeros(()))),
        (convert, CONVERTED, "t", (None, "a", True, 1j, torch.ones(2), torch.ones(4).bool())),
        (convert, CONVERTED, "source", (None, "a", ["noise"])),
        (convert, CONVERTED, "target", (None, "a", ["noise"])),
        (convert, CONVERTED, "path", (None, "a", ["ve"])),
    ],
)
def test_wrong_values_are_named(
    function: Callable[..., object], given: dict[str, object], name: str, values: tuple[object, ...]
) -> None:
    who = "convert" if function is convert else "GaussianMixture"
    for value in values:
        with pytest.raises((ValueError, TypeError), match=rf"^{who}.*: .*\b{name}\b"):
            function(**{**given, name: value})


BAD_ARRAYS = [
    (np.zeros((4, 4), np.uint8), ValueError, r"\(4, 4\)"),
    (np.zeros((4, 2, 4, 4), np.uint8), ValueError, r"\(4, 2, 4, 4\)"),
    (np.zeros((0, 4, 4), np.uint8), ValueError, r"\(0, 4, 4\)"),
    (np.full((4, 4, 4), 255.0), ValueError, r"\[255, 255\]"),
    (np.full((4, 4, 4), np.nan), ValueError, "nan"),
    (np.zeros((4, 4, 4), np.int64), TypeError, "int64"),
    (np.zeros((4, 4, 4), np.complex64), TypeError, "complex64"),
]


@pytest.mark.parametrize(("array", "error", "message"), BAD_ARRAYS)
def test_bad_arrays(
    tmp_path: Path, array: np.ndarray, error: type[Exception], message: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(error, match=message):
        load(str(tmp_path / "a.npy"))


def test_bad_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 4), np.uint8))
    np.save(tmp_path / "a_labels.npy", np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"a_labels.npy must be \(4,\), got \(3,\)"):
        load(str(tmp_path / "a.npy"))
    np.save(tmp_path / "a_labels.npy", np.zeros(4))
    with pytest.raises(TypeError, match="float64"):
        load(str(tmp_path / "a.npy"))


def test_bad_images(tmp_path: Path) -> None:
    save(tmp_path / "size" / "1.png")
    save(tmp_path / "size" / "2.png", size=(4, 4))
    with pytest.raises(ValueError, match=r"2.png must be 5x4 .*got 4x4"):
        load(str(tmp_path / "size"))
    save(tmp_path / "mode" / "1.png", "I;16")
    with pytest.raises(TypeError, match=r"1.png .*'I"):
        load(str(tmp_path / "mode"))
    save(tmp_path / "torn" / "1.png")
    torn = tmp_path / "torn" / "1.png"
    torn.write_bytes(torn.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1.png cannot be read"):
        load(str(tmp_path / "torn"))
    save(tmp_path / "classes" / "1.png")
    (tmp_path / "classes" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"bird must hold images"):
        load(str(tmp_path / "classes"))
    save(tmp_path / "classes" / "bird" / "1.png")
    with pytest.raises(ValueError, match=r"got 1.png beside bird"):
        load(str(tmp_path / "classes"))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is as large as that."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IEND", b"")]
    framed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_images_that_are_not_what_they_say(tmp_path: Path) -> None:
    for i, content in enumerate(
        (bomb(30_000, 30_000), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"P5 1 1 255 a")
    ):
        file = tmp_path / str(i) / "1.png"
        file.parent.mkdir()
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"1.png cannot be read as an image"):
            load(str(file.parent))


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "bmp", "gif", "tif", "tiff"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / f"a.{suffix}", value=255)
    (tmp_path / "a.eps").write_text("%!PS")  # Pillow would run a program for it
    (tmp_path / "a.fits").write_text("not looked at")
    data = load(str(tmp_path))
    assert data.images.shape[2:] == (4, 5)
    torch.testing.assert_close(data.images, torch.ones_like(data.images), rtol=0, atol=0.05)


def test_arrays_with_channels_last(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(load(str(tmp_path / "a.npy")).images, expected)


def test_floats_from_zero_to_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.linspace(0, 1, 4 * 16, dtype=np.float32).reshape(4, 4, 4)
    np.save(tmp_path / "a.npy", pixels)
    images = load(str(tmp_path / "a.npy")).images[:, 0]
    torch.testing.assert_close(images, 2 * torch.from_numpy(pixels) - 1)
    assert "a.npy is taken to lie in [0, 1]" in capsys.readouterr().err
    np.save(tmp_path / "a.npy", 2 * pixels - 1)
    torch.testing.assert_close(load(str(tmp_path / "a.npy")).images[:, 0], images)
    assert capsys.readouterr().err == ""


def test_size(tmp_path: Path) -> None:
    wide = Image.new("L", (12, 6), 0)
    wide.paste(255, (3, 0, 9, 6))  # white in the middle square
    wide.save(tmp_path / "1.png")
    save(tmp_path / "2.png", size=(5, 9), value=255)
    turned = Image.new("L", (4, 8), 0)
    turned.paste(255, (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "3.png", exif=exif)
    images = load(str(tmp_path), size=4).images
    assert images.shape == (3, 1, 4, 4)
    assert images[:2].min() > 0.9
    assert images[2, 0, 0].max() < -0.5
    assert images[2, 0, 3].min() > 0.5
    for source, size in (("digits", 4), (str(tmp_path), -1)):
        with pytest.raises(ValueError, match="size"):
            load(source, size=size)


def test_folder_with_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(("train/cat/1.png", "train/dog/1.png", "val/cat/1.png")):
        (tmp_path / name).parent.mkdir(parents=True)
        save(tmp_path / name, value=51 * i)
    data = load(str(tmp_path))
    assert data.names == ("cat", "dog")
    assert len(data.images) == 2
    assert "train is read" in capsys.readouterr().err
