"""`sinkhorn_drift` of a batch that is spread over the ranks of a process group."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep._ranks import agreed, check_group, checksum, gathered, summed
from fewstep._torch import untraced, wide
from fewstep.ops.sinkhorn.drift_inputs import CanonicalDrift, canonical_drift
from fewstep.reference.costs import COSTS, distances
from fewstep.reference.drift import MIN_RMS, MIN_SCALE, Outputs

HOLD = ("points", "groups")
_PAIRS = 2**22  # times coordinates, whose distances are formed at a time


@untraced
def drift(
    group: Any, hold: str | None, clouds: tuple[Any, ...], options: dict[str, Any]
) -> tuple[CanonicalDrift, Outputs]:
    """The problem as this rank has its results, and these."""
    x, y, x_self = clouds
    named = {"x": x, "y": y, "x_self": x_self, "uncond": options["uncond"]}
    check_group("sinkhorn_drift", group, named)

    def local() -> tuple[tuple[CanonicalDrift, str], dict[str, str], dict[str, Any]]:
        d = canonical_drift(x, y, x_self, **options, part=hold != "groups")
        own = hold if hold is not None or d.lead else "points"
        if own not in HOLD:
            where = "" if hold is not None else f" for x {tuple(x.shape)}, which has groups"
            raise ValueError(
                f"sinkhorn_drift: ranks_hold must be one of {HOLD}{where}, got {hold!r}"
            )
        counts = {name: t.shape[-2] for name, t in named.items() if t is not None}
        facts = {
            "ranks_hold": own,
            "the dtype of x": str(x.dtype),
            "the device of x": x.device.type,
            "the coordinates of x": str(x.shape[-1]),
            "uncond": "None" if options["uncond"] is None else "a Tensor",
            "eps": str(d.eps.tolist()),
        }
        facts |= {name: str(d.options[name]) for name in ("cost", "max_iter", "joint")}
        facts |= {name: repr(options[name]) for name in ("normalize", "exclude_diagonal")}
        if own == "groups":
            facts |= {f"the points of {name}": str(count) for name, count in counts.items()}
            return (d, own), facts, counts
        facts["the groups of x"] = str(d.lead)
        facts["guidance"] = checksum(d.guidance)
        facts["weights"] = "None" if options["weights"] is None else "a Tensor"
        diagonal = d.options["diagonal"]
        if diagonal is not None and (diagonal != 0 or counts["x"] != counts["x_self"]):
            raise ValueError(
                "sinkhorn_drift: exclude_diagonal must be True with process_group, of as many"
                f" points of x_self as of x, got {options['exclude_diagonal']!r} of"
                f" {counts['x_self']} and {counts['x']}"
            )
        return (d, own), facts, counts

    (d, hold), told = agreed("sinkhorn_drift", group, x, local)
    if hold == "groups":
        return d, _of_groups(d, group)
    return _of_points(d, group, told, named, options)


def _of_points(
    d: CanonicalDrift,
    group: Any,
    told: list[dict[str, Any]],
    named: dict[str, Any],
    options: dict[str, Any],
) -> tuple[CanonicalDrift, Outputs]:
    """Every rank has all points, solves its share of the groups, or all, and keeps its rows."""

    def every(name: str, t: Tensor) -> Tensor:
        """`[.., N, K]` of all ranks."""
        parts = gathered(t.movedim(-2, 0), [own[name] for own in told], group)
        return torch.cat(parts).movedim(0, -2)

    here = {name: t.detach() for name, t in named.items() if t is not None}
    whole = {name: every(name, t.to(wide(t.dtype))) for name, t in here.items()}
    own = dict(options, uncond=whole.pop("uncond", None))
    if options["weights"] is not None:
        sizes = [t.shape[-2] for name, t in here.items() if name != "x"]
        given = options["weights"].detach().to(d.x.dtype)
        weights = given.expand(*d.lead, given.shape[-1]).split(sizes, -1)
        names = [name for name in here if name != "x"]
        parts = [every(n, w[..., None])[..., 0] for n, w in zip(names, weights, strict=True)]
        own["weights"] = torch.cat(parts, -1)
    whole_problem = canonical_drift(whole["x"], whole["y"], whole["x_self"], **own)
    shared = len(whole_problem.x) >= len(told)
    velocity, *rest = _shared(whole_problem, group) if shared else whole_problem.solve()
    counts, rank = [own["x"] for own in told], dist.get_rank(group)
    first = sum(counts[:rank])
    rows = velocity[:, :, first : first + counts[rank]]
    scale, rms, residual, entropy, peak = rest
    return whole_problem, (rows, scale, rms, residual, entropy, peak)


def _shared(d: CanonicalDrift, group: Any) -> Outputs:
    """Of groups that all ranks have, each solves some."""
    count, ranks, rank = len(d.x), dist.get_world_size(group), dist.get_rank(group)
    sizes = [count // ranks + (r < count % ranks) for r in range(ranks)]
    some = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, y, x_self, weights, guidance = (t[some] for t in (d.x, d.y, d.x_self, d.weights, d.guidance))
    uncond = None if d.uncond is None else d.uncond[some]
    own = replace(d, x=x, y=y, x_self=x_self, weights=weights, guidance=guidance, uncond=uncond)
    velocity, scale, rms, *plans = _of_groups(own, group)
    of_groups = [
        torch.cat(gathered(t.movedim(1, 0).contiguous(), sizes, group)).movedim(0, 1)
        for t in (velocity, *plans)
    ]
    velocity, residual, entropy, peak = of_groups
    return velocity, scale, rms, residual, entropy, peak


def _of_groups(d: CanonicalDrift, group: Any) -> Outputs:
    """Each rank solves its groups, in the units of all of them."""
    of_pair = COSTS[d.options["cost"]]
    scaled, unit, size = d.options["scaled"], d.options["unit"], d.x.shape[2]
    scale = d.x.new_ones(())
    if scaled:
        lengths, pairs = summed(_lengths(d), group)
        mean = lengths / pairs
        mean = mean.sqrt() if of_pair.squared else mean
        scale = (mean / math.sqrt(size)).clamp(min=MIN_SCALE).to(d.x.dtype)
        centre = d.x.mean(1, keepdim=True)
        x, y, x_self = ((t - centre) / scale for t in (d.x, d.y, d.x_self))
        uncond = None if d.uncond is None else (d.uncond - centre) / scale
        eps = d.eps * (size if of_pair.squared else math.sqrt(size))
        d = replace(d, x=x, y=y, x_self=x_self, uncond=uncond, eps=eps)
    plain = replace(d, options=dict(d.options, scaled=False, unit=False))
    velocity, _, _, residual, entropy, peak = plain.solve()
    squares = velocity.double().square().flatten(1).sum(1)
    entries = squares.new_full((1,), velocity[0].numel())
    total = summed(torch.cat([squares, entries]), group)
    rms = (total[:-1] / total[-1]).sqrt().to(velocity.dtype)
    if unit:
        velocity = (velocity / rms.clamp(min=MIN_RMS)[:, None, None, None]).sum(0, keepdim=True)
    return velocity, scale, rms, residual, entropy, peak


def _lengths(d: CanonicalDrift) -> Tensor:
    """Weighted sums over pairs of what the scale is a mean of, and of 1, float64."""
    clouds = [d.y, d.x_self] + ([d.uncond] if d.options["joint"] and d.uncond is not None else [])
    points = torch.cat(clouds, 1)
    w = d.weights[:, : points.shape[1]]
    if d.options["diagonal"] is None:
        points = torch.cat([d.x, points], 1)
        w = torch.cat([torch.ones_like(d.x[..., 0]), w], 1)
    centre = d.x.double().mean(1, keepdim=True)
    x, points, w = d.x.double() - centre, points.double() - centre, w.double()
    n, mass = x.shape[1], w.sum(1)
    if COSTS[d.options["cost"]].squared:
        moved = (w[..., None] * points).sum(1)
        squares = mass * x.square().sum((1, 2)) + n * (w * points.square().sum(2)).sum(1)
        total = (squares - 2 * (x.sum(1) * moved).sum(1)).sum()
    else:
        step = max(1, _PAIRS // (points.shape[1] * max(x.shape[0], 1)))
        parts = [(w[:, None] * distances(t, points)).sum() for t in torch.split(x, step, 1)]
        total = torch.stack(parts).sum()
    return torch.stack([total, n * mass.sum()])
