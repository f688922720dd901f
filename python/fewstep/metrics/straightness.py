"""How straight the paths of samples are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Straightness:
    """What `straightness` returns. All are 0 for lines at constant speed.

    Attributes:
        s1: score `E int |z' - (x0 - x1)| ds` of arXiv 2412.06403, which grows as sqrt(D).
        s1_rms: score `s1 / sqrt(D)`, which does not grow with D.
        s2: mean squared deviation, `E int |z' - (x0 - x1)|^2 ds / D`.
        speed: standard deviation of `|z'|` along a path over its mean, averaged over paths.
    """

    s1: float
    s1_rms: float
    s2: float
    speed: float


@torch.no_grad()
def straightness(path: Tensor, times: Tensor) -> Straightness:
    """How far paths of a sampler are from straight lines at constant speed.

    Paths are measured in the unified frame `z_s = (1 - s) x1 + s x0`, from noise x0 at s = 1 to
    data x1 at s = 0. In this frame the probability flow of EDM and that of flow matching between
    independent points are the same. A path of `x_sigma = x1 + sigma x0` is brought to it by
    `z = x / (1 + sigma)` and `s = sigma / (1 + sigma)`. `x0 - x1` is the slope of the chord from
    the first node to the last. z' is constant between nodes, so coarse grids hide some curvature.

    Source: arXiv 2412.06403, table 1, whose frame is not stated.

    Args:
        path (Tensor): states at the nodes, `[K + 1, B, ...]`.
        times (Tensor): s at the nodes, `[K + 1]`, monotone.

    Returns:
        Straightness: averages over paths.

    Raises:
        ValueError: fewer than two nodes, no paths, times of another length or not monotone.

    >>> import torch
    >>> s = torch.linspace(1, 0, 11)
    >>> straightness(s[:, None, None] * torch.ones(5, 3), s).s1 < 1e-6
    True
    """
    if path.ndim < 3 or len(path) < 2 or path.numel() == 0:
        raise ValueError(f"straightness: path must be [K + 1, B, ...], got {tuple(path.shape)}")
    if times.shape != path.shape[:1]:
        raise ValueError(f"straightness: times must be ({len(path)},), got {tuple(times.shape)}")
    z, h = path.double().flatten(2), times.double().diff()[:, None]
    if not bool((h < 0).all() | (h > 0).all()):
        raise ValueError(f"straightness: times must be monotone, got {times.tolist()}")
    d, share = z.shape[2], h / h.sum()  # [K, 1], of the whole time
    slopes = z.diff(dim=0) / h[..., None]  # [K, B, D]
    chord = (z[-1] - z[0]) / h.sum()
    off = (slopes - chord).norm(dim=2)
    s1 = (share * off).sum(0).mean().item()
    s2 = (share * off.square()).sum(0).mean().item()
    speeds = slopes.norm(dim=2)
    mean = (share * speeds).sum(0)
    spread = (share * (speeds - mean).square()).sum(0).sqrt()
    at_rest = torch.finfo(torch.float64).tiny
    variation = (spread / mean.clamp_min(at_rest)).mean().item()
    return Straightness(s1, s1 / d**0.5, s2 / d, variation)
