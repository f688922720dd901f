"""How a user wants the potentials iterated, as a `Schedule`, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fewstep._checks import integer
from fewstep.ops.sinkhorn.inputs import check_temperatures, from_numbers, given_numbers, number
from fewstep.reference.costs import COSTS, Cost
from fewstep.reference.sinkhorn import Points, Schedule

UPDATES = ("alternating", "symmetric", "averaged")


def penalties(
    reach: float | tuple[float | None, float | None] | None, cost: Cost, dtype: torch.dtype
) -> tuple[float | None, float | None]:
    """`rho` for a cost as named by the user; None for a constraint: so is what is too large."""
    if isinstance(reach, np.ndarray | Tensor) and reach.ndim == 1:
        given = given_numbers("sinkhorn", "reach", reach)
        reach = given.tolist() if isinstance(given, Tensor) else given
    pair = reach if isinstance(reach, tuple | list) else (reach, reach)
    if len(pair) != 2:
        raise ValueError(f"sinkhorn: reach must be a number or a pair, got {reach}")

    def penalty(r: float | None) -> float | None:
        if r is None:
            return None
        r = number("sinkhorn", "reach", r)
        if not r > 0:
            raise ValueError(f"sinkhorn: reach must be positive, got {r}")
        rho = float(r) * float(r) if cost.squared else float(r)
        if rho < torch.finfo(dtype).tiny:
            raise ValueError(f"sinkhorn: reach must be larger in {dtype}, got {r}")
        return rho if rho <= torch.finfo(dtype).max else None

    return penalty(pair[0]), penalty(pair[1])


def checked_schedule(
    max_iter: int,
    tol: float | None,
    rho: tuple[float | None, float | None],
    relax: float,
    update: str,
    single: bool,
    memory_limit: int,
) -> Schedule:
    """Without annealing; `single` where symmetric updates would keep one potential."""
    max_iter = integer("sinkhorn", "max_iter", max_iter)
    memory_limit = integer("sinkhorn", "memory_limit", memory_limit)
    tol = None if tol is None else number("sinkhorn", "tol", tol)
    relax = number("sinkhorn", "relax", relax)
    if max_iter < 1:
        raise ValueError(f"sinkhorn: max_iter must be at least 1, got {max_iter}")
    if tol is not None and not tol >= 0:
        raise ValueError(f"sinkhorn: tol must be None or at least 0, got {tol}")
    if memory_limit < 0:
        raise ValueError(f"sinkhorn: memory_limit must not be negative, got {memory_limit}")
    if update not in UPDATES:
        raise ValueError(f"sinkhorn: update must be one of {UPDATES}, got {update!r}")
    if not 0 < relax < 2:
        raise ValueError(f"sinkhorn: relax must be above 0 and below 2, got {relax}")
    simultaneous = update != "alternating"
    if simultaneous and relax != 1:
        raise ValueError(f"sinkhorn: relax must be 1 with {update} updates, got {relax}")
    return Schedule(
        max_iter=max_iter,
        tol=tol,
        rho=rho,
        relax=0.5 if simultaneous else relax,
        simultaneous=simultaneous,
        closing=update != "averaged",
        single=simultaneous and single,
        memory_limit=memory_limit,
    )


def annealed(
    schedule: Schedule,
    anneal: float | Sequence[float] | Tensor | None,
    points: Points,
    weights: tuple[Tensor, Tensor],
    eps: Tensor,
    read: bool,
) -> Schedule:
    if anneal is None:
        return schedule
    anneal = given_numbers("sinkhorn", "anneal", anneal)
    if isinstance(anneal, Tensor) and anneal.ndim == 0:
        anneal = number("sinkhorn", "anneal", anneal)
    if isinstance(anneal, int | float):
        # One that rounds to 1 would never end.
        if not 0 < anneal <= 1 - torch.finfo(eps.dtype).eps:
            raise ValueError(f"sinkhorn: anneal must be a factor in (0, 1), got {anneal}")
        if points.formula is not None:
            raise ValueError(
                f"sinkhorn: anneal must be temperatures for a cost function, got {anneal}"
            )
        T = eps.shape[0] // max(points.count, 1)
        start = largest_cost(points, *(w.detach() for w in weights)).repeat_interleave(T)
        # A temperature that is not positive, where that was not read, would never be reached.
        start = torch.where(eps > 0, start, -torch.inf)
        return replace(schedule, start=start, factor=float(anneal))
    if isinstance(anneal, Tensor):
        steps = anneal.detach().to(device=eps.device, dtype=eps.dtype)
    else:
        steps = from_numbers(anneal, eps.device, eps.dtype)
    if steps.ndim != 1:
        raise ValueError(
            f"sinkhorn: anneal must be a factor or temperatures [S], got {tuple(steps.shape)}"
        )
    if read or not isinstance(anneal, Tensor):
        check_temperatures("sinkhorn", "anneal", anneal, eps.dtype)
    return replace(schedule, temperatures=steps)


def largest_cost(points: Points, a: Tensor, b: Tensor) -> Tensor:
    """An upper bound on what differences of costs can be, `[B]`: across the bounding box.

    Pairs at an infinite cost are left out, so that annealing ends, and so are points without
    weight.
    """
    p = points
    if p.matrix is not None:
        C = p.matrix.detach()
        finite = C.isfinite() & (a > 0)[..., :, None] & (b > 0)[..., None, :]
        high = torch.where(finite, C, -torch.inf).amax((1, 2))
        return _finite(high - torch.where(finite, C, torch.inf).amin((1, 2)))

    def bounds(t: Tensor, w: Tensor, cu: Tensor | None) -> tuple[Tensor, Tensor]:
        kept, t = (w > 0)[..., None], t.detach()
        low, high = torch.where(kept, t, torch.inf), torch.where(kept, t, -torch.inf)
        if cu is None:
            return low.amin(1), high.amax(1)
        lengths = cu.diff()
        low = torch.segment_reduce(low[0], "min", lengths=lengths, axis=0)
        return low, torch.segment_reduce(high[0], "max", lengths=lengths, axis=0)

    cu_x, cu_y = (None, None) if p.segments is None else p.segments
    span = COSTS[p.cost].span
    assert span is not None
    out = span(*bounds(p.x, a, cu_x), *bounds(p.y, b, cu_y))
    if cu_x is not None:  # problems without points
        out = torch.where(cu_x.diff() > 0, out, 0.0)
    if p.label_cost is not None:
        W = p.label_cost.detach()
        out = out + torch.where(W.isfinite(), W, 0.0).abs().max()
    return _finite(out)


def _finite(t: Tensor) -> Tensor:
    return torch.nan_to_num(t, neginf=0.0)
