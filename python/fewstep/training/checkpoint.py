"""Checkpoints in the safetensors format, whole or absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewstep._files import checksum, replacing

_FORMAT = "fewstep 1"


def save(path: Path, tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Write named tensors and the number of steps done, with a checksum.

    Raises:
        ModuleNotFoundError: safetensors is missing.
    """
    from safetensors.torch import save_file

    arrays = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"format": _FORMAT, "step": str(step), "crc32": checksum(arrays)}
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata)


def load(path: Path) -> tuple[dict[str, Tensor], int]:
    """Read what `save` wrote: the tensors, on the CPU, and the number of steps.

    Raises:
        ValueError: missing, damaged, or not written by `save`.
        ModuleNotFoundError: safetensors is missing.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is not a checkpoint of fewstep")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
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
    for name, live in state.items():
        saved = tensors.get(name)
        if saved is None:
            raise ValueError(f"{path} is not a checkpoint of this run: {name} is missing")
        if saved.shape != live.shape or saved.dtype != live.dtype:
            expected, got = (f"{tuple(t.shape)} {t.dtype}" for t in (live, saved))
            raise ValueError(
                f"{path} is not a checkpoint of this run: {name} must be {expected}, got {got}"
            )
    for name, live in state.items():
        live.copy_(tensors[name])
    return step
