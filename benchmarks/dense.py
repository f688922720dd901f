"""Plain torch as training codes write it: what compiled kernels and libraries are compared with.

Points are `[B, N, D]` and `[B, M, D]`, weights uniform, the cost `scale * |x - y|^2`, values `[B]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sinkhorn_eager(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    """Log-domain Sinkhorn for `|x-y|^2`: f, then g, `iterations` times."""
    log_k = torch.cdist(x, y).square() / -eps
    log_a, log_b = -math.log(x.shape[1]), -math.log(y.shape[1])
    g = x.new_zeros(y.shape[:2])
    for _ in range(iterations):
        f = -torch.logsumexp(log_k + (g + log_b)[:, None, :], 2)
        g = -torch.logsumexp(log_k + (f + log_a)[:, :, None], 1)
    return eps * (f.mean(1) + g.mean(1))


def soft_min(cost: Tensor, potential: Tensor, eps: float) -> Tensor:
    """`f_i = -eps log mean_j exp((potential_j - C_ij) / eps)` of costs `[B, N, M]`."""
    log_weight = -math.log(cost.shape[2])
    return -eps * torch.logsumexp((potential[:, None, :] - cost) / eps + log_weight, 2)


def averaged(cost: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """geomloss's iteration: both potentials from the last ones, then averaged with them.

    One soft-min of each side per temperature, the first from no potential.
    Feydy, Geometric data analysis (2020), figures 3.25 and 3.26.
    """
    transposed = cost.mT
    f, g = cost.new_zeros(cost.shape[:2]), cost.new_zeros(transposed.shape[:2])
    f, g = soft_min(cost, g, temperatures[0]), soft_min(transposed, f, temperatures[0])
    for eps in temperatures[1:]:
        f_next, g_next = soft_min(cost, g, eps), soft_min(transposed, f, eps)
        f, g = (f + f_next) / 2, (g + g_next) / 2
    return f, g


def sinkhorn_averaged(x: Tensor, y: Tensor, temperatures: Sequence[float], scale: float) -> Tensor:
    """geomloss without debiasing: the last temperature extrapolates and carries the gradient."""
    with torch.no_grad():
        f, g = averaged(scale * torch.cdist(x, y).square(), temperatures[:-1])
    eps = temperatures[-1]
    rows = scale * torch.cdist(x, y.detach()).square()
    columns = scale * torch.cdist(y, x.detach()).square()
    return soft_min(rows, g, eps).mean(1) + soft_min(columns, f, eps).mean(1)


def divergence_averaged(
    x: Tensor, y: Tensor, temperatures: Sequence[float], scale: float
) -> Tensor:
    """geomloss with debiasing: `<a, f_xy - f_xx> + <b, g_xy - g_yy>`.

    In the problems of a cloud with itself both potentials are one, and the gradient that flows
    through one of the two sides is half of theirs: that of `OT(x, x) / 2`.
    """

    def self_potential(points: Tensor) -> Tensor:
        cost = scale * torch.cdist(points, points.detach()).square()
        with torch.no_grad():
            potential = soft_min(cost, cost.new_zeros(cost.shape[:2]), temperatures[0])
            for eps in temperatures[1:-1]:
                potential = (potential + soft_min(cost, potential, eps)) / 2
        return soft_min(cost, potential, temperatures[-1])

    cross = sinkhorn_averaged(x, y, temperatures, scale)
    return cross - self_potential(x).mean(1) - self_potential(y).mean(1)


def divergence_dual(x: Tensor, y: Tensor, temperatures: Sequence[float], scale: float) -> Tensor:
    """OTT-JAX's divergence: dual objectives of averaged updates without extrapolation.

    Its potentials include the log-weights, which a falling temperature mixes with the averages.
    The gradient holds the potentials fixed.
    """
    eps = temperatures[-1]

    def dual(points: Tensor, others: Tensor) -> Tensor:
        cost = scale * torch.cdist(points, others).square()
        log_a, log_b = -math.log(cost.shape[1]), -math.log(cost.shape[2])
        with torch.no_grad():
            f, g = cost.new_zeros(cost.shape[:2]), cost.new_zeros(cost.mT.shape[:2])
            for t in temperatures:
                # soft_min adds a weight to its potential, which here is there already.
                f_next = soft_min(cost, g - t * log_b, t) + t * log_a
                g_next = soft_min(cost.mT, f - t * log_a, t) + t * log_b
                f, g = (f + f_next) / 2, (g + g_next) / 2
        mass = torch.exp((f[:, :, None] + g[:, None, :] - cost) / eps).sum((1, 2))
        return f.mean(1) + g.mean(1) - eps * (log_a + log_b + mass - 1)

    return dual(x, y) - (dual(x, x) + dual(y, y)) / 2


def dense_drift(
    x: Tensor,
    y: Tensor,
    x_self: Tensor,
    temperatures: Sequence[float],
    iterations: int,
    form: str = "split",
) -> tuple[Tensor, Tensor]:
    """The rms per temperature `[T]` and the velocity `[B, N, D]` of `fewstep.sinkhorn_drift`.

    As the public codes of drifting models have it: `torch.cdist` once, then per temperature a plan
    by log-sum-exp, in place on the logits (split) or on potentials (joint), and two products.
    """
    d = x.shape[2]
    squared = [torch.cdist(x, z).square_() for z in (x, y, x_self)]
    mean = torch.stack([s.sum() for s in squared]).sum() / sum(s.numel() for s in squared)
    scale = (mean / d).sqrt().clamp(min=1e-3)
    y, x_self = y / scale, x_self / scale
    costs = [s.div_(2 * scale**2) for s in squared[1:]]
    total, rms = torch.zeros_like(x), []
    for t in temperatures:
        if form == "split":
            v = _plan_in_place(costs[0] / -(t * d), iterations) @ y
            v -= _plan_in_place(costs[1] / -(t * d), iterations) @ x_self
        else:
            plan = _plan_of_potentials(torch.cat(costs, 2) / -(t * d), iterations)
            positive, negative = torch.split(plan, [y.shape[1], x_self.shape[1]], 2)
            v = (positive * negative.sum(2, keepdim=True)) @ y
            v -= (negative * positive.sum(2, keepdim=True)) @ x_self
        rms.append(v.square().mean().clamp(min=1e-8).sqrt())
        total += v / rms[-1]
    return torch.stack(rms), total


def _plan_in_place(logits: Tensor, iterations: int) -> Tensor:
    """Rows sum to 1: uniform marginals need no weights then."""
    for _ in range(iterations):
        logits -= torch.logsumexp(logits, 2, keepdim=True)
        logits -= torch.logsumexp(logits, 1, keepdim=True)
    plan = logits.exp_()
    return plan / plan.sum(2, keepdim=True)


def _plan_of_potentials(logits: Tensor, iterations: int) -> Tensor:
    """N times the plan, so that rows sum to about 1."""
    n, m = logits.shape[1:]
    log_v = torch.zeros_like(logits[:, 0])
    for _ in range(iterations):
        log_u = -torch.logsumexp(logits + log_v[:, None, :], 2)
        log_v = math.log(n / m) - torch.logsumexp(logits + log_u[:, :, None], 1)
    return (logits + log_u[:, :, None] + log_v[:, None, :]).exp_()
