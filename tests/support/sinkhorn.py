"""Clouds for `fewstep.sinkhorn`."""

from __future__ import annotations

import torch
from torch import Tensor


def clouds(shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Rounded to float32, with a zero among the weights of each side."""
    B, N, M, D = shape
    x, y = torch.randn(B, N, D), torch.randn(B, M, D) + 0.5
    a, b = torch.rand(B, N) + 0.1, torch.rand(B, M) + 0.1
    a[:, 0] = b[:, M // 2] = 0
    weights = {"a": a / a.sum(-1, keepdim=True), "b": b / b.sum(-1, keepdim=True)}
    return {k: t.double() for k, t in ({"x": x, "y": y} | weights).items()}
