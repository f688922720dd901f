"""What a user wrote, as a problem that a backend solves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep._checks import flags
from fewstep._names import Backend, CostName, Precision, Update
from fewstep._torch import is_transformed
from fewstep.ops.sinkhorn import dispatch
from fewstep.ops.sinkhorn.inputs import (
    automatic_eps,
    canonical_eps,
    canonical_points,
    canonical_weights,
    check_same_mass,
    checked_precision,
    initial_potential,
    labelled,
    masses,
    spread,
)
from fewstep.ops.sinkhorn.result import CanonicalProblem
from fewstep.ops.sinkhorn.schedule import annealed, checked_schedule, penalties
from fewstep.reference.costs import COSTS
from fewstep.reference.sinkhorn import Points, Schedule
from fewstep.verification.choice import choose_backend


def canonical_problem(
    x: Tensor | None,
    y: Tensor | None,
    *,
    eps: float | Sequence[float] | Tensor | Literal["auto"],
    a: Tensor | None,
    b: Tensor | None,
    cost: CostName | Callable[[Any, Any], Any],
    max_iter: int = 1,
    tol: float | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    anneal: float | Sequence[float] | Tensor | None = None,
    update: Update = "alternating",
    relax: float = 1.0,
    reach: float | tuple[float | None, float | None] | None,
    exclude_diagonal: bool | int,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    labels: tuple[Tensor, Tensor] | None,
    label_cost: Tensor | None,
    C: Tensor | None,
    memory_limit: int = 2**27,
    precision: Precision | None,
    backend: Backend | None,
    check_finite: bool,
    part: bool = False,
    op: str = "sinkhorn",
) -> CanonicalProblem:
    """The arguments of `fewstep.sinkhorn`; of a part of x and a, whose sum is not looked at.

    What starts as f and g is called `init` by it, and by no other op.
    """
    flags("sinkhorn", check_finite=check_finite)
    # Reading values costs a synchronisation on a GPU and breaks a compiled graph.
    device = next((t.device for t in (x, C) if isinstance(t, Tensor)), torch.device("cpu"))
    read = check_finite or device.type == "cpu"
    read = read and not torch.compiler.is_compiling() and not is_transformed()
    points, batch, dtype = canonical_points(x, y, cost, C, exclude_diagonal, cu_seqlens, read)
    row = COSTS[cost] if y is not None and isinstance(cost, str) else COSTS[points.cost]
    targets = None if y is None else points.y
    if row.directions is not None and y is not None:
        targets = spread(y.to(dtype), batch, 2)
    points = labelled(points, batch, labels, label_cost, dtype, read)
    points = replace(points, precision=checked_precision("sinkhorn", precision))
    lead = (points.count,) if points.segments is not None else batch
    rho = penalties(reach, row, dtype)
    weights = canonical_weights("a", a, batch, points, dtype, read, part)
    columns = canonical_weights("b", b, batch, points, dtype, read)
    some = a is not None or b is not None
    if some and read and rho == (None, None) and not part:
        cu_x, cu_y = points.segments or (None, None)
        sums = masses(weights.detach(), cu_x), masses(columns.detach(), cu_y)
        check_same_mass((a, b), *sums)
    if isinstance(eps, str):
        eps = automatic_eps(eps, points, weights, columns).reshape(lead)
    e, temperatures = canonical_eps(eps, lead, points.x, dtype, read)
    names = ("init f", "init g") if op == "sinkhorn" else ("f", "g")
    f0, g0 = (
        (None, None)
        if init is None
        else initial_potential(init, batch, temperatures, points, dtype, names, op)
    )
    # Label costs need not be symmetric, and looking would cost a synchronisation on a GPU.
    single = x is y and x is not None and a is b and labels is None
    single = single and (init is None or init[0] is init[1])
    single = single and (cu_seqlens is None or cu_seqlens[0] is cu_seqlens[1])
    single = single and not points.diagonal and rho[0] == rho[1]
    # Coordinates that tell zero vectors of x from those of y make clouds that are not the same.
    single = single and (x is None or points.x.shape[-1] == x.shape[-1])
    schedule = checked_schedule(max_iter, tol, rho, relax, update, single, memory_limit)
    schedule = annealed(schedule, anneal, points, (weights, columns), e, read)
    chosen = choose_backend(
        "sinkhorn",
        device,
        backend,
        lambda name: _unsupported(name, points, e, schedule, part),
        lambda: dispatch.group(points),
    )
    if check_finite:
        checked = {"x": x, "y": y, "C": C, **dict(zip(names, (f0, g0), strict=True))}
        for name, t in checked.items():
            bad = 0 if t is None else int((~torch.isfinite(t)).sum())
            if bad:
                raise ValueError(f"{op}: {name} must be finite, got {bad} NaN or inf values")
    return CanonicalProblem(
        *(points, weights, columns, e, f0, g0, schedule),
        targets=targets,
        backend=chosen,
        batch=batch,
        temperatures=temperatures,
    )


def _unsupported(
    backend: str, points: Points, eps: Tensor, schedule: Schedule, part: bool
) -> str | None:
    """What of a call a backend cannot do."""
    s = schedule
    if backend == "reference":
        return None
    if part and backend != "cpp":
        return "it does not serve process_group"
    served = backend in COSTS[points.cost].backends
    if backend == "keops" and not served:
        return "it serves costs given as functions, and the others have kernels of their own"
    cost = "costs given as functions" if points.formula is not None else f"cost {points.cost!r}"
    full = backend == "cpp"
    kept = backend == "triton" or (backend == "cuda" and dispatch.resident(points))
    asked = {
        cost: not served,
        "cu_seqlens": not (full or (backend == "cuda" and kept)) and points.segments is not None,
        "labels": not full and points.labels is not None,
        "exclude_diagonal": not (full or kept) and points.diagonal is not None,
    }
    if backend in ("triton", "cuda"):
        asked |= {
            "update='averaged'": not s.closing,
            "several eps": not kept and eps.shape[0] != points.count,
            "anneal": not kept and (s.start is not None or s.temperatures is not None),
            "reach": not kept and s.rho != (None, None),
            "update='symmetric'": not kept and s.simultaneous,
            "relax": not kept and s.relax != 1 and not s.simultaneous,
        }
    names = [name for name, used in asked.items() if used]
    size = " for more than small float32 problems" if backend == "cuda" and not kept else ""
    return f"it has no {', '.join(names)}{size}" if names else None
