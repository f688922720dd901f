"""Bits per dimension of discrete data, from the log-density of a continuous model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep._checks import count


def dequantize(
    values: Tensor,
    *,
    levels: int = 256,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Uniformly dequantised data `x = 2 (k + u) / levels - 1` in [-1, 1), u uniform in [0, 1).

    A density of x gives an upper bound on the bits of the integers k, `bits_per_dim`.

    Args:
        values (Tensor): integers k from 0 to levels - 1, as uint8 images `[B, C, H, W]`.
        levels (int): how many there are. Default 256.
        dtype (torch.dtype): of the result. Default float32.
        generator (torch.Generator | None): source of u. Default: torch's.

    Returns:
        Tensor: x, of the shape of values.

    Raises:
        ValueError: values out of range, levels below 2.
        TypeError: values that are not integers, a dtype that is not floating.

    Source: Theis et al., A note on the evaluation of generative models, arXiv 1511.01844.

    >>> k = torch.tensor([[0, 255]], dtype=torch.uint8)
    >>> x = dequantize(k)
    >>> ((x + 1) * 128).floor().to(torch.uint8).tolist()
    [[0, 255]]
    """
    levels = count("dequantize", "levels", levels, 2)
    if not isinstance(values, Tensor) or values.is_floating_point() or values.is_complex():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"dequantize: values must be a Tensor of integers, got {got}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dequantize: dtype must be floating, got {dtype!r}")
    whole = values.long()
    if whole.numel() > 0:
        low, high = int(whole.min()), int(whole.max())
        if low < 0 or high >= levels:
            raise ValueError(
                f"dequantize: values must be from 0 to {levels - 1}, got {low} to {high}"
            )
    u = torch.rand(whole.shape, dtype=torch.float64, device=values.device, generator=generator)
    x = (2 * (whole + u) / levels - 1).to(dtype)
    edge = 2 * (whole + 1).to(torch.float64) / levels - 1  # that rounding must not reach
    below = torch.nextafter(edge.to(dtype), torch.full_like(edge, -2.0).to(dtype))
    return torch.where(x.double() < edge, x, below)


def bits_per_dim(log_density: Tensor, dimensions: int, *, levels: int = 256) -> Tensor:
    """Bits per dimension of discrete data, `-log p / (D ln 2) + log2(levels / 2)`.

    p is the density of dequantised data in [-1, 1), see `dequantize`, where a value has a width of
    `2 / levels`. On average over u it is an upper bound on the bits that the model's own
    probabilities of the integers take.

    Args:
        log_density (Tensor): `log p`, in nats, of any shape.
        dimensions (int): number D of values in a sample: C H W of an image.
        levels (int): number of values, as for `dequantize`. Default 256.

    Returns:
        Tensor: bits per dimension, of the shape of log_density.

    Raises:
        ValueError: dimensions below 1, levels below 2.
        TypeError: a log_density that is not floating.

    Source: Theis et al., arXiv 1511.01844, section 3.1.

    >>> uniform = torch.tensor([-3 * math.log(2.0)])  # density 1/2 on [-1, 1) in 3 dimensions
    >>> bits_per_dim(uniform, 3)
    tensor([8.])
    """
    dimensions = count("bits_per_dim", "dimensions", dimensions)
    levels = count("bits_per_dim", "levels", levels, 2)
    if not isinstance(log_density, Tensor) or not log_density.is_floating_point():
        got = log_density.dtype if isinstance(log_density, Tensor) else type(log_density).__name__
        raise TypeError(f"bits_per_dim: log_density must be a floating Tensor, got {got}")
    return math.log2(levels / 2) - log_density / (dimensions * math.log(2))
