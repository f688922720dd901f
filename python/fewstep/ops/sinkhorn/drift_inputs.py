"""What a user wrote for a drift, as canonical tensors, or an error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep._checks import integer
from fewstep._torch import readable, wide
from fewstep.ops.sinkhorn import dispatch_drift
from fewstep.ops.sinkhorn.inputs import (
    check_dense,
    check_temperatures,
    checked_precision,
    excluded,
    from_numbers,
    given_numbers,
)
from fewstep.reference.costs import OF_DISTANCE
from fewstep.reference.drift import Outputs
from fewstep.verification.choice import choose_backend

FORMS = ("split", "joint")
NORMALIZE = (True, False, "scale")


@dataclass(frozen=True)
class CanonicalDrift:
    """Tensors of `fewstep.reference.drift`, and what its results are shaped by."""

    x: Tensor
    y: Tensor
    x_self: Tensor
    uncond: Tensor | None
    weights: Tensor
    guidance: Tensor
    eps: Tensor
    several: bool  # whether results have an axis for temperatures
    lead: tuple[int, ...]  # the caller's groups
    backend: str
    options: dict[str, Any]  # of `dispatch_drift.drift`

    def solve(self) -> Outputs:
        return dispatch_drift.drift(
            *(self.backend, self.x, self.y, self.x_self, self.uncond),
            *(self.weights, self.guidance, self.eps),
            **self.options,
        )


def canonical_drift(
    x: Tensor,
    y: Tensor,
    x_self: Tensor,
    *,
    eps: float | Sequence[float] | Tensor,
    max_iter: int,
    cost: str,
    uncond: Tensor | None,
    guidance: float | Tensor,
    form: str,
    weights: Tensor | None,
    normalize: bool | str,
    exclude_diagonal: bool | int,
    memory_limit: int,
    precision: str | None,
    backend: str | None,
    part: bool = False,
) -> CanonicalDrift:
    """The arguments of `fewstep.sinkhorn_drift`; of a part of the points, it may lack weight."""
    clouds = {"x": x, "y": y, "x_self": x_self} | ({} if uncond is None else {"uncond": uncond})
    _check_points(clouds)
    for name, value, allowed in (
        ("cost", cost, OF_DISTANCE),
        ("form", form, FORMS),
        ("normalize", normalize, NORMALIZE),
    ):
        if value not in allowed:
            raise ValueError(f"sinkhorn_drift: {name} must be one of {allowed}, got {value!r}")
    normalize = normalize if isinstance(normalize, str) else bool(normalize)  # 1, or numpy's True
    max_iter = integer("sinkhorn_drift", "max_iter", max_iter)
    memory_limit = integer("sinkhorn_drift", "memory_limit", memory_limit)
    if max_iter < 1:
        raise ValueError(f"sinkhorn_drift: max_iter must be at least 1, got {max_iter}")
    if memory_limit < 0:
        raise ValueError(f"sinkhorn_drift: memory_limit must not be negative, got {memory_limit}")
    kept_precision = checked_precision("sinkhorn_drift", precision)
    diagonal = excluded("sinkhorn_drift", exclude_diagonal)
    if diagonal is not None and not part:
        _check_diagonal(x, x_self, form)
    lead, n = x.shape[:-2], x.shape[-2]
    dtype = wide(x.dtype)
    groups = math.prod(lead)
    flat = {name: t.detach().to(dtype).reshape(groups, *t.shape[-2:]) for name, t in clouds.items()}
    counts = [t.shape[1] for t in flat.values()][1:]
    kept = dispatch_drift.resident(flat["x"], counts, form == "joint")
    chosen = choose_backend(
        "sinkhorn_drift",
        x.device,
        backend,
        lambda name: unsupported(name, diagonal, kept),
        lambda: dispatch_drift.group(flat["x"], counts, form == "joint", kept_precision),
    )
    temperatures, several = _temperatures(eps, x, dtype)
    w = _guidance(guidance, x, uncond, dtype).reshape(-1).expand(groups)
    columns = _weights(weights, lead, flat, dtype)
    if form == "joint" and uncond is not None:
        size = uncond.shape[-2]
        n_self = x_self.shape[-2] - (diagonal is not None)
        factor = (w * (n_self / size))[:, None].expand(groups, size)
        columns = torch.cat([columns[:, :-size], columns[:, -size:] * factor], 1)
    if readable(x, columns) and not part:
        _check_weights(columns, counts, form)
        if diagonal is not None and form == "split":
            _check_partners(columns[:, counts[0] : counts[0] + counts[1]], diagonal, n)

    options = {
        "cost": cost,
        "max_iter": max_iter,
        "joint": form == "joint",
        "scaled": normalize is not False,
        "unit": normalize is True,
        "diagonal": diagonal,
        "memory_limit": memory_limit,
        "precision": kept_precision,
    }
    return CanonicalDrift(
        *(flat["x"], flat["y"], flat["x_self"], flat.get("uncond"), columns, w),
        *(temperatures, several, tuple(lead), chosen, options),
    )


def _check_points(clouds: dict[str, Tensor]) -> None:
    x = clouds["x"]
    for name, t in clouds.items():
        check_dense("sinkhorn_drift", name, t)
        if t.ndim < 2:
            raise ValueError(f"sinkhorn_drift: {name} must be [.., N, D], got {tuple(t.shape)}")
        if 0 in t.shape[-2:]:
            raise ValueError(
                f"sinkhorn_drift: {name} must have points and D > 0, got {tuple(t.shape)}"
            )
        if t.dtype != x.dtype:
            raise TypeError(
                f"sinkhorn_drift: {name} must have the dtype of x, {x.dtype}, got {t.dtype}"
            )
        if t.device != x.device:
            raise ValueError(f"sinkhorn_drift: {name} must be on {x.device} with x, got {t.device}")
        if t.is_meta:
            where = f"a device that computes, got {t.device}"
            raise ValueError(f"sinkhorn_drift: {name} must be on {where}")
        if t.shape[:-2] != x.shape[:-2] or t.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"sinkhorn_drift: {name} must match x {tuple(x.shape)} except in its points,"
                f" got {tuple(t.shape)}"
            )


def _check_diagonal(x: Tensor, x_self: Tensor, form: str) -> None:
    if x.shape[-2] < 2 or (form == "split" and x_self.shape[-2] < 2):
        raise ValueError(
            "sinkhorn_drift: exclude_diagonal leaves a point without a partner, got x"
            f" {tuple(x.shape)} and x_self {tuple(x_self.shape)}"
        )


def unsupported(backend: str, diagonal: int | None, resident: bool = False) -> str | None:
    """What of a call a backend cannot do, where `resident` says that CUDA keeps it on chip."""
    if backend == "keops":
        return "it has no drift"
    if diagonal is None:
        return None
    if backend == "triton" or (backend == "cuda" and not resident):
        size = " for more than small float32 groups" if backend == "cuda" else ""
        return f"it does not support exclude_diagonal{size}"
    return None


def _numbers(name: str, value: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor argument in the compute dtype, on the device of x where it is a scalar."""
    if value.device != x.device and value.ndim > 0:
        raise ValueError(f"sinkhorn_drift: {name} must be on {x.device} with x, got {value.device}")
    return value.detach().to(device=x.device, dtype=dtype)


def _temperatures(
    eps: float | Sequence[float] | Tensor, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """`[T]`, and whether there is an axis for them."""
    eps = given_numbers("sinkhorn_drift", "eps", eps, constant=False)
    if isinstance(eps, Tensor):
        if eps.ndim > 1 or eps.numel() == 0:
            raise ValueError(f"sinkhorn_drift: eps must be one or [T], got {tuple(eps.shape)}")
        if readable(eps):
            check_temperatures("sinkhorn_drift", "eps", eps, dtype)
        return _numbers("eps", eps, x, dtype).reshape(-1), eps.ndim == 1
    values = eps if isinstance(eps, list) else [eps]
    if not values:
        raise ValueError(f"sinkhorn_drift: eps must be positive and finite, got {eps}")
    check_temperatures("sinkhorn_drift", "eps", eps, dtype)
    return from_numbers(values, x.device, dtype), isinstance(eps, list)


def _guidance(
    guidance: float | Tensor, x: Tensor, uncond: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`[]` or `[..]`."""
    given = given_numbers("sinkhorn_drift", "guidance", guidance, constant=False)
    if isinstance(given, list):
        raise TypeError(f"sinkhorn_drift: guidance must be a number or a Tensor, got {given}")
    guidance = given
    if not isinstance(guidance, Tensor):
        if not 0 <= guidance < math.inf:
            raise ValueError(
                f"sinkhorn_drift: guidance must be at least 0 and finite, got {guidance}"
            )
        if guidance != 0 and uncond is None:
            raise ValueError(f"sinkhorn_drift: guidance needs uncond, got {guidance} without")
        return x.new_full((), guidance, dtype=dtype)
    if uncond is None:
        raise ValueError(
            f"sinkhorn_drift: guidance needs uncond, got {tuple(guidance.shape)} without"
        )
    if guidance.ndim > 0 and guidance.shape != x.shape[:-2]:
        raise ValueError(
            f"sinkhorn_drift: guidance must have shape {tuple(x.shape[:-2])},"
            f" got {tuple(guidance.shape)}"
        )
    if readable(guidance) and not bool(((guidance >= 0) & guidance.isfinite()).all()):
        raise ValueError(
            "sinkhorn_drift: guidance must be at least 0 and finite,"
            f" got {guidance.min().item()} to {guidance.max().item()}"
        )
    return _numbers("guidance", guidance, x, dtype)


def _weights(
    weights: Tensor | None, lead: torch.Size, flat: dict[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """`[G, M + N' (+ U)]`."""
    x = flat["x"]
    count = sum(t.shape[1] for t in flat.values()) - x.shape[1]
    if weights is None:
        return x.new_ones((x.shape[0], count))
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"sinkhorn_drift: weights must be a floating Tensor, got {got}")
    check_dense("sinkhorn_drift", "weights", weights)
    if tuple(weights.shape) not in ((*lead, count), (count,)):
        raise ValueError(
            f"sinkhorn_drift: weights must have shape {(*lead, count)}, got {tuple(weights.shape)}"
        )
    columns = _numbers("weights", weights, x, dtype)
    return (columns if weights.ndim == 1 else columns.flatten(0, -2)).expand(x.shape[0], count)


def _check_weights(columns: Tensor, sizes: list[int], form: str) -> None:
    """Every plan needs mass, and the joint one some on both sides."""
    if columns.numel() == 0:
        return
    if not bool((columns >= 0).all()):
        raise ValueError(
            f"sinkhorn_drift: weights must not be negative or NaN, got {columns.min().item()}"
        )
    names = ["y", "x_self", "uncond"]
    if form == "joint":
        names, sizes = ["y", "x_self and uncond"], [sizes[0], sum(sizes[1:])]
    for name, part in zip(names, torch.split(columns, sizes, 1), strict=False):
        total = part.double().sum(1)
        bad = ~((total > 0) & total.isfinite())
        if bool(bad.any()):
            raise ValueError(
                f"sinkhorn_drift: weights of {name} must not be zero in every column, got a sum"
                f" of {total[bad][0].item()} in group {int(bad.nonzero()[0])}"
            )


def _check_partners(columns: Tensor, diagonal: int, rows: int) -> None:
    """The only point of x_self with weight must not be the one that a point of x does without."""
    own = columns > 0
    row = own.int().argmax(1) - diagonal
    bad = (own.sum(1) == 1) & (row >= 0) & (row < rows)
    if bool(bad.any()):
        i = int(row[bad][0])
        raise ValueError(
            f"sinkhorn_drift: exclude_diagonal leaves point {i} of x without a partner, got weights"
            f" of x_self that are zero but for point {i + diagonal} in group"
            f" {int(bad.nonzero()[0])}"
        )
