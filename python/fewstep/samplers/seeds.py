"""Latents and noise by the seeds of the samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep._checks import strided
from fewstep._names import Backend
from fewstep.ops.heun import dispatch
from fewstep.ops.heun.inputs import pick
from fewstep.reference.heun import COLUMNS, NOISE
from fewstep.samplers.inputs import check_shape


def latents(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> Tensor:
    """Draw standard normal noise that depends on a sample's seed and nothing else.

    The noise of a seed is the same in any batch and, within rounding, on any device. It is
    independent of the noise that `edm_sample` adds.

    Args:
        seeds (Tensor): int64 `[B]`, at least 0.
        shape (Sequence[int]): shape of a sample.
        dtype (torch.dtype): floating dtype of the noise.
        backend (str | None): backend as for `fewstep.heun_solve`.

    Returns:
        Tensor: `[B, *shape]`, on the device of seeds.

    Raises:
        ValueError: seeds that are not `[B]` or, on the CPU, negative; a negative size.
        TypeError: seeds that are not an int64 tensor, a shape that is not a sequence of integers,
            a dtype that is not floating.

    >>> a, b = latents(torch.tensor([7, 8]), (2,)), latents(torch.tensor([8]), (2,))
    >>> torch.equal(a[1:], b)
    True
    """
    own = _check_seeds("latents", seeds)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"latents: dtype must be floating, got {dtype!r}")
    return normals(own, check_shape("latents", shape), dtype=dtype, backend=backend)


def normals(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype,
    row: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Standard normals `[B, *shape]` that a sampler would add at a row of its table."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.zeros((seeds.shape[0], *shape), dtype=wide, device=seeds.device)
    table = x.new_zeros((row + 1, 1, COLUMNS), dtype=torch.float64)
    table[row, :, NOISE] = 1
    name = pick("latents", x, backend)
    dispatch.into(name, wide)(x, None, [], table, row, seeds, x, None, None, None)
    return x.to(dtype)


def _check_seeds(who: str, seeds: Tensor, batch: int | None = None) -> Tensor:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        got = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"{who}: seeds must be an int64 tensor, got {got}")
    strided(who, "seeds", seeds)
    if seeds.ndim != 1 or batch not in (None, seeds.shape[0]):
        wanted = "[B]" if batch is None else f"({batch},)"
        raise ValueError(f"{who}: seeds must be {wanted}, got {tuple(seeds.shape)}")
    if seeds.device.type == "cpu" and bool((seeds < 0).any()):
        raise ValueError(f"{who}: seeds must be at least 0, got {seeds.min().item()}")
    return seeds.contiguous()


def seeds_for(who: str, seeds: Tensor | None, latents: Tensor, noisy: bool) -> Tensor | None:
    """The given seeds, or drawn ones; None where no noise is added."""
    if seeds is not None:
        seeds = _check_seeds(who, seeds, latents.shape[0]).to(latents.device)
    elif noisy:
        seeds = torch.randint(2**62, (latents.shape[0],), device=latents.device)
    return seeds if noisy else None
