"""What the trainers share: settings, run folders, data."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import fewstep
from fewstep._files import read_json, replacing
from fewstep.data.images import Images, load
from fewstep.training.loop import CHECKPOINT, LOGS

CONFIG, PAIRS, PICTURE = "config.json", "pairs", "samples.png"
T = TypeVar("T")
EXTRA = ("matplotlib", "mlxtend", "ot", "PIL", "safetensors", "sklearn", "tensorboard", "tqdm")


def read_config(out: Path, parse: Callable[[dict[str, Any]], T], *, kind: str = "a run") -> T:
    """What `parse` makes of a run's `config.json`.

    Raises:
        ValueError: it is missing, or `parse` takes exception to it.
    """
    path = out / CONFIG
    try:
        return parse(read_json(path))
    except FileNotFoundError as error:
        raise ValueError(f"{out} holds no run of fewstep: {CONFIG} is missing") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not the configuration of {kind}: {error}") from error


def shape_in(content: dict[str, Any]) -> tuple[int, ...]:
    """`[C, H, W]` of a run's images."""
    shape = tuple(map(int, content["image_shape"]))
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"image_shape must be [C, H, W], got {content['image_shape']}")
    return shape


def classes_in(content: dict[str, Any]) -> tuple[str, ...]:
    """The names of a run's classes."""
    classes = content["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes must be a list of names, got {classes}")
    return tuple(classes)


def method_of(out: Path) -> str:
    """The method of a run, by its `config.json`; "wflow" where that cannot tell."""
    try:
        return str(read_json(out / CONFIG)["method"])
    except (OSError, ValueError, TypeError, KeyError):
        return "wflow"


def require_extra() -> None:
    """Raise ModuleNotFoundError if a package of `fewstep[train]` is not installed."""
    for name in EXTRA:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load_enough(source: str) -> Images:
    """`fewstep.data.images.load`, of as many images as the metrics take.

    Raises:
        ValueError: data that cannot be loaded, fewer than 12 images.
    """
    data = load(source)
    if len(data.images) < 12:
        raise ValueError(f"data: must have at least 12 images, got {len(data.images)}")
    return data


def open_run(out: Path, method: str, run: Any, *, began: Any | None, overwrite: bool) -> None:
    """Make `out` hold this run and nothing of another; refuse where that is not asked for.

    Args:
        out (Path): folder of the run.
        method (str): its name.
        run (dataclass): what `config.json` is to hold: a `config`, itself a dataclass, and more.
        began (dataclass | None): likewise, of the run in `out` that is to be resumed.
        overwrite (bool): replace a run that is in `out`.

    Raises:
        ValueError: `out` is in use, or holds a run of another configuration.
    """
    if began is not None:
        before, asked = ({**vars(r.config), **vars(r)} for r in (began, run))
        for name in sorted(asked.keys() - {"config"}):
            if before[name] != asked[name]:
                raise ValueError(
                    f"{out} holds a run of another configuration: {name} is {before[name]},"
                    f" not {asked[name]}"
                )
        return
    path = out / CONFIG
    if path.exists() or (out / CHECKPOINT).exists():
        read_config(out, lambda content: content["fewstep"])
        if (out / CHECKPOINT).exists() and not overwrite:
            raise ValueError(f"{out} holds a run already: give --resume or --overwrite")
        for file in (out / CHECKPOINT, out / PICTURE):
            file.unlink(missing_ok=True)
        for folder in (LOGS, PAIRS):
            shutil.rmtree(out / folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    content = {"fewstep": fewstep.__version__, "method": method, **asdict(run)}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
