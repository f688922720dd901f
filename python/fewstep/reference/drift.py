"""The drift along the gradient flow of the Sinkhorn divergence, written for reading.

Canonical shapes, batched over independent groups: `x [G, N, D]`, the clouds `y [G, M, D]`,
`x_self [G, N', D]` and `uncond [G, U, D]`, the relative weights of all their points
`[G, M + N' (+ U)]` in that order, `guidance [G]`, `eps [T]`. Nothing here carries a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep._torch import exactly
from fewstep.reference.costs import COSTS, Cost, distances

MIN_SCALE = 1e-3
MIN_RMS = 1e-4

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# (x, points, C, b, eps) -> A [G, N, C]: N times the plan between x and the weighted points.
Couple = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _scale(x: Tensor, points: Tensor, w: Tensor, cost: Cost) -> Tensor:
    """The mean distance from x to the points, weighted, over sqrt(D): one number."""
    n, d = x.shape[1:]
    lengths = distances(x, points)
    lengths = lengths.square() if cost.squared else lengths
    mean = (w[:, None] * lengths).sum() / (n * w.sum())
    mean = mean.sqrt() if cost.squared else mean
    return (mean / math.sqrt(d)).clamp(min=MIN_SCALE)


def coupling(log_k: Tensor, b: Tensor, max_iter: int) -> Tensor:
    """`A [G, N, C]`, N times the plan: columns sum to N b, rows to 1 but for the residual."""
    log_b = b.log() + math.log(log_k.shape[1])
    log_v = torch.where(b > 0, 0.0, log_b)  # a column of weight zero is left out from the start
    for _ in range(max_iter):
        log_u = -torch.logsumexp(log_k + log_v[:, None, :], 2)
        log_v = log_b - torch.logsumexp(log_k + log_u[:, :, None], 1)
    return (log_u[:, :, None] + log_k + log_v[:, None, :]).exp()


def _split(plans: list[Tensor], clouds: list[Tensor], guidance: Tensor) -> Tensor:
    """`T_y - T_self + w (T_y - T_uncond)`, T the barycentres of the plans."""
    y, x_self, *uncond = (
        plan / plan.sum(2, keepdim=True) @ cloud for plan, cloud in zip(plans, clouds, strict=True)
    )
    v = y - x_self
    return v + guidance[:, None, None] * (y - uncond[0]) if uncond else v


def _joint(plan: Tensor, clouds: list[Tensor]) -> Tensor:
    """`sum(A_neg) (A_pos y) - sum(A_pos) (A_neg z)`, z the points of x_self and uncond."""
    positive, *negatives = torch.split(plan, [cloud.shape[1] for cloud in clouds], 2)
    mass = positive.sum(2, keepdim=True)
    other = torch.stack([a.sum(2, keepdim=True) for a in negatives]).sum(0)
    v = (positive * other) @ clouds[0]
    for a, cloud in zip(negatives, clouds[1:], strict=True):
        v = v - (a * mass) @ cloud
    return v


def drift(
    x: Tensor,
    y: Tensor,
    x_self: Tensor,
    uncond: Tensor | None,
    weights: Tensor,
    guidance: Tensor,
    eps: Tensor,
    *,
    cost: str,
    max_iter: int,
    joint: bool,
    scaled: bool,
    unit: bool,
    diagonal: int | None,
    couple: Couple | None = None,
) -> Outputs:
    """Returns `velocity [T, G, N, D]` (T = 1 with `unit`), `scale []`, `rms [T]`, and for each of
    the P plans `residual`, `entropy` and `peak`, `[T, G, P]`.

    `scaled` measures coordinates in units of `scale` and eps in units of D; `unit` divides each
    temperature's velocity by its rms and sums them. Pairs `j == i + diagonal` of x and x_self are
    left out, and x_self then stands for x in the scale. `couple` replaces the iterations.
    """
    if couple is None:
        couple = lambda x, z, C, b, e: coupling(-C / e, b, max_iter)  # noqa: E731
    of_pair = COSTS[cost]
    with torch.no_grad(), exactly(x.device):
        n, d = x.shape[1:]
        clouds = [y, x_self] if uncond is None else [y, x_self, uncond]
        sizes = [cloud.shape[1] for cloud in clouds]
        centre = x.mean(1, keepdim=True)  # of no consequence but to rounding
        scale = x.new_ones(())
        if scaled:
            counted = sum(sizes if joint else sizes[:2])
            points, w = torch.cat(clouds, 1)[:, :counted], weights[:, :counted]
            if diagonal is None:
                points, w = torch.cat([x, points], 1), torch.cat([torch.ones_like(x[..., 0]), w], 1)
            scale = _scale(x, points, w, of_pair)
            eps = eps * (d if of_pair.squared else math.sqrt(d))
        x, *clouds = ((points - centre) / scale for points in (x, *clouds))

        costs = [of_pair.of_distance(distances(x, cloud)) for cloud in clouds]
        if diagonal is not None:
            i, j = (torch.arange(count, device=x.device) for count in (n, sizes[1]))
            costs[1] = costs[1].masked_fill(j == i[:, None] + diagonal, math.inf)
        marginals, targets = list(torch.split(weights, sizes, 1)), clouds
        if joint:
            costs, marginals, targets = [torch.cat(costs, 2)], [weights], [torch.cat(clouds, 1)]
        marginals = [w / w.sum(1, keepdim=True) for w in marginals]

        velocities, metrics = [], []
        for e in eps:
            plans = [
                couple(x, z, C, b, e) for z, C, b in zip(targets, costs, marginals, strict=True)
            ]
            v = _joint(plans[0], clouds) if joint else _split(plans, clouds, guidance)
            velocities.append(v)
            for plan in plans:
                row = plan.sum(2, keepdim=True)
                p = plan / row
                residual, entropy = (row - 1).abs().mean((1, 2)), torch.special.entr(p).sum(2)
                metrics.append(torch.stack([residual, entropy.mean(1), p.amax(2).mean(1)]))
        velocity = torch.stack(velocities)
        rms = velocity.square().mean((1, 2, 3)).sqrt()
        if unit:
            velocity = (velocity / rms.clamp(min=MIN_RMS)[:, None, None, None]).sum(0, keepdim=True)
        by_plan = torch.stack(metrics).reshape(len(eps), len(costs), 3, -1)  # [T, P, 3, G]
        residual, entropy, peak = by_plan.permute(2, 0, 3, 1)
        return velocity, scale, rms, residual, entropy, peak
