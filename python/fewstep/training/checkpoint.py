"""Checkpoints in the safetensors format, which are whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fewstep._files import checksum, read_tensors, write_tensors
from fewstep.training.ranks import is_sharded

M = TypeVar("M", bound=nn.Module)
_FORMAT = "fewstep 1"


def save(path: Path, tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Write named tensors and the number of steps done, with a checksum.

    Raises:
        OSError: the file cannot be written.
        ModuleNotFoundError: safetensors is missing.
    """
    arrays = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"format": _FORMAT, "step": str(step), "crc32": checksum(arrays)}
    write_tensors(path, arrays, metadata)


def load(path: Path) -> tuple[dict[str, Tensor], int]:
    """Read the tensors that `save` wrote, on the CPU, and the number of steps.

    Raises:
        ValueError: the file is missing, damaged, or not written by `save`.
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
    """Copy a checkpoint into the live tensors of `state`, and return the number of steps done.

    The checkpoint may hold more than `state`.

    Raises:
        ValueError: `load` raises, or a tensor is missing or of another shape or dtype.
    """
    tensors, step = load(path)
    _check(path, state, tensors)
    for name, live in state.items():
        own = tensors[name]
        if is_sharded(live):
            from torch.distributed.tensor import distribute_tensor

            where = live.device_mesh, live.placements  # type: ignore[attr-defined]
            own = distribute_tensor(own.to(live.device), *where, src_data_rank=None)
        live.copy_(own)
    return step


@torch.no_grad()
def restored(path: Path, prefix: str, make: Callable[[], M]) -> M:
    """The module that `make` makes, in evaluation mode, with the weights `prefix...` of a file.

    The module is made after its shapes were compared with those of the file. A configuration from
    elsewhere therefore allocates no more memory than its file has.

    Raises:
        ValueError: `restore` raises, or the module cannot be made.
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
    """Raise ValueError unless a checkpoint has the tensors of all modules, which are by prefix."""
    tensors = load(path)[0] if tensors is None else tensors
    for prefix, make in modules.items():
        try:
            with torch.device("meta"):
                like = make()
        except (RuntimeError, OverflowError, ValueError) as error:
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
