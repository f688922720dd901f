"""The drift workload: many small groups, and the dense torch that public training codes run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def draw(
    groups: int = 256, n: int = 64, m: int = 64, n_self: int = 64, d: int = 256, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Features `x [G, N, D]`, `y [G, M, D]`, `x_self [G, N', D]` in float32; groups have means."""
    generator = torch.Generator().manual_seed(seed)
    x, y, x_self = (torch.randn(groups, count, d, generator=generator) for count in (n, m, n_self))
    mean = torch.randn(groups, 1, d, generator=generator)
    return x + mean, y + mean + 0.5, x_self + mean


def dense_drift(
    x: Tensor,
    y: Tensor,
    x_self: Tensor,
    eps: Sequence[float],
    iterations: int,
    *,
    form: str = "split",
) -> Tensor:
    """`fewstep.sinkhorn_drift(..., cost="half_sqeuclidean").velocity` in dense batched torch.

    As the public codes of drifting models have it: `torch.cdist` once, then per temperature a plan
    by log-sum-exp, in place on the logits (split) or on potentials (joint), and two products.
    """
    d = x.shape[2]
    squared = [torch.cdist(x, z).square_() for z in (x, y, x_self)]
    mean = sum(s.sum() for s in squared) / sum(s.numel() for s in squared)
    scale = (mean / d).sqrt().clamp(min=1e-3)
    y, x_self = y / scale, x_self / scale
    costs = [s.div_(2 * scale**2) for s in squared[1:]]
    total = torch.zeros_like(x)
    for e in eps:
        if form == "split":
            v = _plan_in_place(costs[0] / -(e * d), iterations) @ y
            v -= _plan_in_place(costs[1] / -(e * d), iterations) @ x_self
        else:
            plan = _plan_of_potentials(torch.cat(costs, 2) / -(e * d), iterations)
            positive, negative = plan.split([y.shape[1], x_self.shape[1]], 2)
            v = (positive * negative.sum(2, keepdim=True)) @ y
            v -= (negative * positive.sum(2, keepdim=True)) @ x_self
        total += v / v.square().mean().clamp(min=1e-8).sqrt()
    return total


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
