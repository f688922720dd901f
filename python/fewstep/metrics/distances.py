"""Distances between two sets of samples."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from fewstep.metrics.neighbours import BLOCK, squared_distances
from fewstep.metrics.samples import generator_of, pair, reduced


@torch.no_grad()
def sliced_w2(x: Tensor, y: Tensor, *, projections: int = 512, seed: int = 0) -> float:
    """Sliced squared 2-Wasserstein distance.

    `SW2^2 = E_u int_0^1 (Q_<u,x>(t) - Q_<u,y>(t))^2 dt` with u uniform on the unit sphere and Q the
    quantile functions. The integral is exact, also for n and m that differ.

    Source: Bonneel, Rabin, Peyre and Pfister, Sliced and Radon Wasserstein barycenters (2015).

    Args:
        x (Tensor): samples `[n, ...]`.
        y (Tensor): samples `[m, ...]`.
        projections (int): number of directions.
        seed (int): seed of the directions.

    Returns:
        float: distance in squared units of x. A shift by s adds `|s|^2 / d` on average.

    Raises:
        ValueError: empty, not finite, unequal d or device, projections below 1.
        TypeError: not a floating tensor.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [5.0]])
    >>> round(sliced_w2(x, x + 2), 6)
    4.0
    """
    x, y = pair("sliced_w2", x=x, y=y)
    if projections < 1:
        raise ValueError(f"sliced_w2: projections must be at least 1, got {projections}")
    (n, d), m = x.shape, len(y)
    directions = torch.randn(d, projections, generator=generator_of(seed), dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(x.device)  # [d, projections]
    # Both quantile functions are constant between these levels, in units of 1 / (n m).
    steps_x = torch.arange(1, n + 1, device=x.device) * m
    steps_y = torch.arange(1, m + 1, device=x.device) * n
    levels = torch.unique(torch.cat([steps_x, steps_y]))
    weights = levels.diff(prepend=levels.new_zeros(1)).double() / (n * m)  # sums to 1
    shift = y.mean(0)
    total = 0.0
    for u in torch.split(directions, max(1, BLOCK // (n + m)), dim=1):
        quantiles_x = (u.T @ (x - shift).T).sort(dim=1).values[:, (levels - 1) // m]
        quantiles_y = (u.T @ (y - shift).T).sort(dim=1).values[:, (levels - 1) // n]
        total += ((quantiles_x - quantiles_y).square_() @ weights).sum().item()
    return total / projections


@torch.no_grad()
def exact_w2(x: Tensor, y: Tensor, *, max_points: int = 2000, seed: int = 0) -> float:
    """Exact squared 2-Wasserstein distance `min_P sum_ij P_ij |x_i - y_j|^2` between samples.

    The network simplex of POT (`ot.emd2`) solves it, in about 1 s at 2000 points.

    Source: Peyre and Cuturi, Computational Optimal Transport (2019), equation 2.11 and section 3.5.

    Args:
        x (Tensor): samples `[n, ...]`.
        y (Tensor): samples `[m, ...]`.
        max_points (int): largest number of points. Larger samples are reduced to a random subset.
        seed (int): seed of the subsets.

    Returns:
        float: distance in squared units of x. A finite sample biases it upwards, so compare equal
        sizes.

    Raises:
        ValueError: empty, not finite, unequal d or device, max_points below 1.
        TypeError: not a floating tensor.
        ImportError: POT is missing.
        RuntimeError: the network simplex did not finish.

    >>> import torch
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> round(exact_w2(x, x.flip(0) + torch.tensor([0.0, 3.0])), 6)
    9.0
    """
    x, y = pair("exact_w2", x=x, y=y)
    if max_points < 1:
        raise ValueError(f"exact_w2: max_points must be at least 1, got {max_points}")
    try:
        ot = importlib.import_module("ot")
    except ImportError:
        raise ImportError("exact_w2: needs POT: pip install pot") from None
    generator = generator_of(seed)
    x, y = (reduced(t, torch.zeros(len(t)), max_points, generator)[0] for t in (x, y))
    cost = torch.cat([block for _, block in squared_distances(x, y)]).cpu().numpy()
    value, log = ot.emd2([], [], cost, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"exact_w2: POT stopped early: {log['warning']}")
    return float(value)


@torch.no_grad()
def mmd_rbf(x: Tensor, y: Tensor, *, bandwidth: float | None = None) -> float:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel.

    `MMD^2 = mean_{i!=j} k(x_i, x_j) + mean_{i!=j} k(y_i, y_j) - 2 mean_ij k(x_i, y_j)` with
    `k(x, y) = exp(-|x - y|^2 / (2 h^2))`. It is 0 on average for equal laws, and so often negative.

    Source: Gretton et al., A kernel two-sample test (2012), equation 3; the median heuristic as in
    Garreau, Jitkrittum and Kanagawa (2018).

    Args:
        x (Tensor): samples `[n, ...]`, n at least 2.
        y (Tensor): samples `[m, ...]`, m at least 2.
        bandwidth (float | None): bandwidth h, in units of x. Default: the median distance between
            two points of x and y together, or of 2000 of them where there are more.

    Returns:
        float: squared discrepancy, at most 2.

    Raises:
        ValueError: fewer than 2 samples, not finite, unequal d or device, a bandwidth that is not
            positive, or none given where the median distance is 0.
        TypeError: not a floating tensor.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0]])
    >>> round(mmd_rbf(x, x + 100, bandwidth=1.0), 4)
    1.2131
    """
    x, y = pair("mmd_rbf", least=2, x=x, y=y)
    h = median_distance(torch.cat([x, y])) if bandwidth is None else bandwidth
    if not 0 < h < float("inf"):
        source = "the median distance" if bandwidth is None else "bandwidth"
        raise ValueError(f"mmd_rbf: {source} must be positive and finite, got {h}")

    def kernel_sum(p: Tensor, q: Tensor) -> float:
        blocks = squared_distances(p, q)
        return sum((d2 / (-2 * h * h)).exp_().sum().item() for _, d2 in blocks)

    n, m = len(x), len(y)
    # k(x, x) = 1 on the diagonal, n times.
    within_x = (kernel_sum(x, x) - n) / (n * (n - 1))
    within_y = (kernel_sum(y, y) - m) / (m * (m - 1))
    return within_x + within_y - 2 * kernel_sum(x, y) / (n * m)


@torch.no_grad()
def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance (squared 2-Wasserstein) between Gaussians fitted to two samples.

    `|m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x^1/2 S_y S_x^1/2)^1/2)` with means m and unbiased
    covariances S. The last trace is the nuclear norm of `S_x^1/2 S_y^1/2`.

    Source: Dowson and Landau, The Frechet distance between multivariate normal distributions
    (1982), equation 4.

    Args:
        x (Tensor): samples `[n, ...]`, n at least 2.
        y (Tensor): samples `[m, ...]`, m at least 2.

    Returns:
        float: distance in squared units of x. A finite sample biases it upwards, so compare equal
        sizes.

    Raises:
        ValueError: fewer than 2 samples, not finite, unequal d or device.
        TypeError: not a floating tensor.

    >>> import torch
    >>> x = torch.tensor([[-1.0], [1.0]])
    >>> round(frechet_distance(x, 3 * x + 5), 6)
    33.0
    """
    x, y = pair("frechet_distance", least=2, x=x, y=y)
    x_root, y_root = _covariance_root(x), _covariance_root(y)
    # Singular values keep the digits that the root of an eigenvalue near 0 would lose.
    cross = torch.linalg.svdvals(x_root @ y_root).sum()
    spread = x_root.square().sum() + y_root.square().sum() - 2 * cross
    return float((x.mean(0) - y.mean(0)).square().sum() + spread.clamp_min(0))


def median_distance(x: Tensor) -> float:
    x = reduced(x, torch.zeros(len(x)), 2000, generator_of(0))[0]
    d2 = torch.cat([block for _, block in squared_distances(x, x)])
    above = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return d2[above[0], above[1]].median().sqrt().item()


def _covariance_root(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
