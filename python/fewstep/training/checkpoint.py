"""Checkpoints in the safetensors format, whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fewstep._files import checksum, read_tensors, write_tensors

M = TypeVar("M", bound=nn.Module)
_FORMAT = "fewstep 1"


def save(path: Path, tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Write named tensors and the number of steps done, with a checksum.

    Raises:
        OSError: it cannot be written.
        ModuleNotFoundError: safetensors is missing.
    """
    arrays = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"format": _FORMAT, "step": str(step), "crc32": checksum(arrays)}
    write_tensors(path, arrays, metadata)


def load(path: Path) -> tuple[dict[str, Tensor], int]:
    """Read what `save` wrote: the tensors, on the CPU, and the number of steps.

    Raises:
        ValueError: missing, damaged, or not written by `save`.
        ModuleNotFoundError: safetensors is missing.
    """
    try:
        tensors, metadata = read_tensors(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of fewstep")
    if metadata.get("crc32") != checksum(tensors) or not metadata.get("step", "").isdecimal():
        raise ValueError(f"{path} is damaged: its checksum does not match")
    return tensors, int(metadata["step"])


@torch.no_grad()
def restore(path: Path, state: Mapping[str, Tensor]) -> int:
    """Copy a checkpoint into the live tensors of `state`, in place; returns the steps done.

    The checkpoint may hold more than `state`.

    Raises:
        ValueError: as `load`, or a tensor that is missing or of another shape or dtype.
    """
    tensors, step = load(path)
    _check(path, state, tensors)
    for name, live in state.items():
        live.copy_(tensors[name])
    return step


@torch.no_grad()
def restored(path: Path, prefix: str, make: Callable[[], M]) -> M:
    """The module that `make` makes, in evaluation mode, with the weights `prefix...` of a file.

    It is made only once its shapes are known to be those of the file: a configuration from
    elsewhere allocates no more than came with it.

    Raises:
        ValueError: as `restore`, or the module cannot be made.
    """
    tensors, _ = load(path)
    check_shapes(path, {prefix: make}, tensors)
    module = make()
    for name, live in module.state_dict().items():
        live.copy_(tensors[prefix + name])
    return module.eval()


def check_shapes(
    path: Path,
    modules: Mapping[str, Callable[[], nn.Module]],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise ValueError unless a checkpoint has what modules, by prefixes of names, would have."""
    tensors = load(path)[0] if tensors is None else tensors
    for prefix, make in modules.items():
        try:
            with torch.device("meta"):
                like = make()
        except (RuntimeError, OverflowError) as error:
            raise ValueError(f"{path} cannot be of its configuration: {error}") from error
        _check(path, {prefix + name: t for name, t in like.state_dict().items()}, tensors)


def _check(path: Path, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, live in state.items():
        saved = tensors.get(name)
        if saved is None:
            raise ValueError(f"{path} is not a checkpoint of this run: {name} is missing")
        if saved.shape != live.shape or saved.dtype != live.dtype:
            expected, got = (f"{tuple(t.shape)} {t.dtype}" for t in (live, saved))
            raise ValueError(
                f"{path} is not a checkpoint of this run: {name} must be {expected}, got {got}"
            )
