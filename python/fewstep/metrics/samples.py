"""Samples as the metrics take them: flat, checked, drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def flattened(function: str, name: str, x: Tensor, least: int = 1) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{function}: {name} must be a floating Tensor, got {got}")
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise ValueError(f"{function}: {name} must be [n, ...], got {tuple(x.shape)}")
    if len(x) < least:
        raise ValueError(f"{function}: {name} must have at least {least} samples, got {len(x)}")
    finite = x.isfinite()
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(f"{function}: {name} must be finite, got {bad} NaN or inf values")
    return x.detach().double().flatten(1)


def pair(function: str, least: int = 1, **samples: Tensor) -> tuple[Tensor, Tensor]:
    """Two named sets of samples as float64 `[n, d]` and `[m, d]`."""
    (name_x, x), (name_y, y) = samples.items()
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.device != y.device:
        raise ValueError(f"{function}: {name_y} must be on {x.device}, got {y.device}")
    flat_x, flat_y = flattened(function, name_x, x, least), flattened(function, name_y, y, least)
    if flat_x.shape[1] != flat_y.shape[1]:
        raise ValueError(
            f"{function}: {name_y} must have {flat_x.shape[1]} values per sample like {name_x}, "
            f"got {flat_y.shape[1]}"
        )
    return flat_x, flat_y


def check_labels(function: str, name: str, labels: Tensor, x: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{function}: {name} must be an integer Tensor, got {got}")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{function}: {name} must have shape ({len(x)},), got {tuple(labels.shape)}"
        )


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random indices without repetition, with the class shares of `labels`."""
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    # Evenly spaced places in the order of the classes: shares are right to one sample.
    order = order[labels[order].argsort(stable=True)]
    return order[torch.arange(count, device=labels.device) * len(labels) // count]


def reduced(
    x: Tensor, labels: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    x, labels = x.detach(), labels.to(x.device)
    if len(x) <= count:
        return x, labels
    kept = draw(labels, count, generator)
    return x[kept], labels[kept]
