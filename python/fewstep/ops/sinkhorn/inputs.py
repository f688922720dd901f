"""What a user wrote, as `Points` and `Schedule`, or an error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep import _checks
from fewstep._checks import check_real, integer, is_number, strided
from fewstep._torch import is_dual, is_transformed, wide
from fewstep.reference.costs import COSTS, NAMES
from fewstep.reference.sinkhorn import PRECISIONS, Points


def checked_precision(op: str, precision: str | None) -> str:
    """The precision that was asked for, or the default."""
    if precision is None:
        return PRECISIONS[0]
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {PRECISIONS}, got {precision!r}")
    return precision


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_dense(op: str, name: str, t: object) -> None:
    """Raise TypeError unless t is a dense Tensor of a dtype that is computed with."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating dtype, got {t.dtype}")
    if t.dtype not in DTYPES:
        names = "float32, float64, bfloat16 or float16"
        raise TypeError(f"{op}: {name} must be {names}, got {t.dtype}")
    strided(op, name, t)


def check_constant(op: str, name: str, t: Tensor) -> None:
    """Raise ValueError where a derivative is asked for that there is not."""
    if (t.requires_grad and torch.is_grad_enabled()) or is_dual(t):
        raise ValueError(f"{op}: {name} must not require a gradient, got one that does (detach it)")


def number(op: str, name: str, value: Any) -> float:
    """A number as one of Python."""
    if isinstance(value, Tensor):
        check_constant(op, name, value)
    return _checks.number(op, name, value)


def given_numbers(
    op: str, name: str, value: Any, constant: bool = True
) -> float | list[float] | Tensor:
    """A number, those of a sequence, or a tensor; an array of numpy is a tensor.

    `constant` where a derivative for it might be expected.
    """
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.ndim > 0):
        if isinstance(value, Tensor) and constant:
            check_constant(op, name, value)
        check_real(op, name, value)
        return value if isinstance(value, Tensor) else torch.tensor(value)
    if is_number(value):
        return number(op, name, value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        kinds = "a number, a sequence of numbers or a Tensor"
        raise TypeError(f"{op}: {name} must be {kinds}, got {type(value).__name__}")
    for one in value:
        if not is_number(one):
            raise TypeError(f"{op}: {name} must be a sequence of numbers, got {value!r}")
    return [number(op, name, one) for one in value]


def from_numbers(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[len(values)]`, filled on a device: a graph of CUDA cannot capture copies from the host."""
    if device.type == "cpu" or not values:
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def check_temperatures(
    op: str, name: str, given: float | Sequence[float] | Tensor, dtype: torch.dtype
) -> None:
    """Raise ValueError unless they are positive and finite, in dtype too."""
    info = torch.finfo(dtype)
    if isinstance(given, Tensor):
        flat = given.detach().flatten()
        bad: Sequence[float] = flat[~((flat >= info.tiny) & (flat <= info.max))].tolist()
    else:
        values = given if isinstance(given, Sequence) else [given]
        bad = [value for value in values if not info.tiny <= value <= info.max]
    if bad:
        where = f" in {dtype}" if 0 < bad[0] < math.inf else ""
        raise ValueError(f"{op}: {name} must be positive and finite{where}, got {bad[0]}")


_HALVES = {"sqeuclidean": 1.0, "half_sqeuclidean": 0.5}
# Largest difference of the sums of a and b, as a fraction of them, that is taken for rounding.
_MASS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def canonical_points(
    x: Tensor | None,
    y: Tensor | None,
    cost: str | Callable[[Any, Any], Any],
    C: Tensor | None,
    exclude_diagonal: bool | int,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    read: bool,
) -> tuple[Points, tuple[int, ...], torch.dtype]:
    """The points with a batch axis, the leading shape that they have together, and the dtype."""
    matrix = None
    formula = None if isinstance(cost, str) else cost
    if C is not None:
        if x is not None or y is not None:
            given = "x" if x is not None else "y"
            raise ValueError(f"sinkhorn: {given} must be None with a cost matrix C, got a Tensor")
        if cu_seqlens is not None:
            raise ValueError("sinkhorn: cu_seqlens needs points, got a cost matrix C")
        _check_tensor("C", C, "[.., N, M]")
        _check_device("C", C)
        batch = tuple(C.shape[:-2])
        matrix = spread(C, batch, 2)
        x, y = matrix.new_empty(*matrix.shape[:2], 0), matrix.new_empty(*matrix.mT.shape[:2], 0)
        cost = "matrix"
    else:
        for name, t in (("x", x), ("y", y)):
            _check_tensor(name, t, "[.., N, D]")
        assert x is not None
        assert y is not None
        if x.dtype != y.dtype:
            raise TypeError(f"sinkhorn: y must have the dtype of x, {x.dtype}, got {y.dtype}")
        if y.device != x.device:
            raise ValueError(f"sinkhorn: y must be on {x.device} with x, got {y.device}")
        _check_device("x", x)
        shared = _broadcast(x.shape[:-2], y.shape[:-2])
        if shared is None or y.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"sinkhorn: y must match x {tuple(x.shape)} except in its points and in leading"
                f" dimensions that broadcast, got {tuple(y.shape)}"
            )
        batch = shared
        if formula is not None:
            if not callable(formula):
                raise TypeError(f"sinkhorn: cost must be a name or a function, got {cost!r}")
            cost = "formula"
        elif cost not in NAMES:
            raise ValueError(f"sinkhorn: cost must be one of {NAMES}, got {cost!r}")
    dtype = wide(x.dtype)
    x, y, matrix = (None if t is None else t.to(dtype) for t in (x, y, matrix))
    assert x is not None
    assert y is not None
    assert isinstance(cost, str)
    if (of_directions := COSTS[cost].directions) is not None:
        x, y = _directions(x, y, read)
        cost = of_directions
    if C is None:
        x, y = spread(x, batch, 2), spread(y, batch, 2)
    diagonal = excluded("sinkhorn", exclude_diagonal)
    if diagonal is not None and min(x.shape[1], y.shape[1]) < 2:
        raise ValueError(
            "sinkhorn: exclude_diagonal needs two points on each side,"
            f" got {x.shape[1]} and {y.shape[1]}"
        )
    segments = None
    if cu_seqlens is not None:
        segments = _segments(cu_seqlens, batch, x, y, diagonal, read)
    points = Points(x, y, cost, matrix, segments, diagonal=diagonal, formula=formula)
    return points, batch, dtype


def _broadcast(p: Sequence[int], q: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that both broadcast to, or None."""
    if p == q:
        return tuple(p)
    pairs = [*itertools.zip_longest(reversed(p), reversed(q), fillvalue=1)]
    if any(i != j and 1 not in (i, j) for i, j in pairs):
        return None
    return tuple(j if i == 1 else i for i, j in reversed(pairs))


def spread(t: Tensor, batch: tuple[int, ...], own: int) -> Tensor:
    """`[prod batch, ..]` from `[.., ..]` that broadcasts to it, before the last `own` dimensions.

    What is shared by all problems is not copied.
    """
    tail = t.shape[-own:]
    if t.shape[:-own] == batch and len(batch) < 2:
        return t if batch else t[None]
    return t.expand(*batch, *tail).reshape(math.prod(batch), *tail)


def excluded(op: str, exclude_diagonal: bool | int) -> int | None:
    """The k of excluded pairs `j == i + k`."""
    if isinstance(exclude_diagonal, bool | np.bool_):
        return 0 if exclude_diagonal else None
    return integer(op, "exclude_diagonal", exclude_diagonal)


def _directions(x: Tensor, y: Tensor, read: bool) -> tuple[Tensor, Tensor]:
    """Points whose `|x - y|^2 / 2` is the cosine cost, with a gradient of 0 for zero vectors.

    Where there may be any, two coordinates more: zero vectors of x are 1 in the first, and those of
    y in the second, so that they are at a cost of 1 from everything.
    """

    def unit(t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.contiguous()  # by whose layout torch chooses the order of its sums
        # The length that is divided by, so that squares neither under- nor overflow, is of no
        # consequence, to derivatives either.
        largest = torch.linalg.vector_norm(t.detach(), torch.inf, -1, keepdim=True)
        zero = largest == 0
        t = torch.where(zero, 1.0, t / torch.where(zero, 1.0, largest))
        t = t / torch.linalg.vector_norm(t, dim=-1, keepdim=True)
        return torch.where(zero, 0.0, t), zero

    (x, zero_x), (y, zero_y) = unit(x), unit(y)
    if read and not bool(zero_x.any()) and not bool(zero_y.any()):
        return x, y
    zero_x, zero_y = zero_x.to(x.dtype), zero_y.to(y.dtype)
    x = torch.cat([x, zero_x, torch.zeros_like(zero_x)], -1)
    return x, torch.cat([y, torch.zeros_like(zero_y), zero_y], -1)


def _check_device(name: str, t: Tensor) -> None:
    if t.is_meta:
        raise ValueError(f"sinkhorn: {name} must be on a device that computes, got {t.device}")


def _check_tensor(name: str, t: object, shape: str) -> None:
    check_dense("sinkhorn", name, t)
    assert isinstance(t, Tensor)
    if t.ndim < 2:
        raise ValueError(f"sinkhorn: {name} must be {shape}, got {tuple(t.shape)}")
    if 0 in t.shape[-2:]:
        raise ValueError(f"sinkhorn: {name} must have points and D > 0, got {tuple(t.shape)}")


def _segments(
    cu_seqlens: tuple[Tensor, Tensor],
    batch: Sequence[int],
    x: Tensor,
    y: Tensor,
    diagonal: int | None,
    read: bool,
) -> tuple[Tensor, Tensor]:
    if not isinstance(cu_seqlens, tuple | list) or len(cu_seqlens) != 2:
        got = type(cu_seqlens).__name__
        raise TypeError(f"sinkhorn: cu_seqlens must be a pair (cu_x, cu_y), got {got}")
    if batch:
        raise ValueError(f"sinkhorn: cu_seqlens needs flat x [N, D], got {tuple(x.shape)}")
    for name, cu, points in zip(("cu_x", "cu_y"), cu_seqlens, (x, y), strict=True):
        if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64):
            got = cu.dtype if isinstance(cu, Tensor) else type(cu).__name__
            raise TypeError(f"sinkhorn: {name} must be an int64 Tensor, got {got}")
        if cu.ndim != 1 or cu.shape[0] < 2 or cu.shape != cu_seqlens[0].shape:
            raise ValueError(
                f"sinkhorn: {name} must be [B + 1] for B > 0 problems, as many as in cu_x,"
                f" got {tuple(cu.shape)}"
            )
        if cu.device != x.device:
            raise ValueError(f"sinkhorn: {name} must be on {x.device} with x, got {cu.device}")
        if not read:
            continue
        ends = cu.tolist()
        if ends[0] != 0 or ends[-1] != points.shape[1] or ends != sorted(ends):
            raise ValueError(
                f"sinkhorn: {name} must rise from 0 to the number of points, {points.shape[1]},"
                f" got {ends if len(ends) < 10 else [*ends[:4], '...', *ends[-4:]]}"
            )
    cu_x, cu_y = (cu.to(torch.int64) for cu in cu_seqlens)
    if read:
        n, m = cu_x.diff(), cu_y.diff()
        least = 1 if diagonal is None else 2
        bad = ((n < least) | (m < least)) & (n + m > 0)
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"sinkhorn: cu_seqlens must give both sides of a problem {least} or more points,"
                f" or none, got {int(n[i])} and {int(m[i])} in problem {i}"
            )
    return cu_x, cu_y


def labelled(
    points: Points,
    batch: tuple[int, ...],
    labels: tuple[Tensor, Tensor] | None,
    label_cost: Tensor | None,
    dtype: torch.dtype,
    read: bool,
) -> Points:
    if labels is None and label_cost is None:
        return points
    if labels is None or label_cost is None:
        missing = "labels" if labels is None else "label_cost"
        raise ValueError(f"sinkhorn: {missing} must be given with its counterpart, got None")
    if points.matrix is not None:
        raise ValueError("sinkhorn: labels need points, got a cost matrix C")
    if not isinstance(labels, tuple | list) or len(labels) != 2:
        raise TypeError(f"sinkhorn: labels must be a pair (lx, ly), got {type(labels).__name__}")
    for name, t in (("labels lx", labels[0]), ("labels ly", labels[1]), ("label_cost", label_cost)):
        if not isinstance(t, Tensor):
            raise TypeError(f"sinkhorn: {name} must be a Tensor, got {type(t).__name__}")
        if t.device != points.x.device:
            where = points.x.device
            raise ValueError(f"sinkhorn: {name} must be on {where} with x, got {t.device}")
    if label_cost.ndim != 2 or not label_cost.is_floating_point():
        raise ValueError(
            "sinkhorn: label_cost must be a floating [L, L'],"
            f" got {label_cost.dtype} {tuple(label_cost.shape)}"
        )
    check_constant("sinkhorn", "label_cost", label_cost)
    sides = zip(("lx", "ly"), labels, (points.x, points.y), label_cost.shape, strict=True)
    for name, classes, p, count in sides:
        if not _fits(classes, batch, p.shape[1]) or classes.dtype != torch.int64:
            raise ValueError(
                f"sinkhorn: labels {name} must be int64 {(*batch, p.shape[1])},"
                f" got {classes.dtype} {tuple(classes.shape)}"
            )
        if read and classes.numel() > 0:
            low, high = int(classes.min()), int(classes.max())
            if low < 0 or high >= count:
                raise ValueError(
                    f"sinkhorn: labels {name} must be from 0 to {count - 1} for this label_cost,"
                    f" got {low if low < 0 else high}"
                )
    lx, ly = (spread(t, batch, 1) for t in labels)
    return replace(points, labels=(lx, ly), label_cost=label_cost.to(dtype))


def canonical_weights(
    name: str,
    w: Tensor | None,
    batch: tuple[int, ...],
    points: Points,
    dtype: torch.dtype,
    read: bool,
    part: bool = False,
) -> Tensor:
    """Weights `[B, N]`, or flat `[1, N]`, of any mass; those of a part of the points may be 0."""
    own = points.x if name == "a" else points.y
    cu = None if points.segments is None else points.segments[0 if name == "a" else 1]
    shape = (*batch, own.shape[1])
    if w is None:
        if cu is None:
            return own.new_full((own.shape[0], shape[-1]), 1 / shape[-1], dtype=dtype)
        return cu.diff().to(dtype).reciprocal()[_problem_of(cu, shape[-1])][None]
    if not isinstance(w, Tensor) or not w.is_floating_point():
        got = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"sinkhorn: {name} must be a floating Tensor, got {got}")
    check_dense("sinkhorn", name, w)
    if w.device != own.device:
        raise ValueError(f"sinkhorn: {name} must be on {own.device} with x, got {w.device}")
    if not _fits(w, batch, own.shape[1]):
        raise ValueError(f"sinkhorn: {name} must have shape {shape}, got {tuple(w.shape)}")
    if read and w.numel() > 0:
        low = w.detach().min().item()
        if low < 0:
            raise ValueError(f"sinkhorn: {name} must not be negative, got {low}")
        if not part:
            check_masses(name, masses(w.detach(), cu), dtype)
    return spread(w.to(dtype), batch, 1)


def _fits(t: Tensor, batch: tuple[int, ...], count: int) -> bool:
    """Whether it has a number for each point, of each problem or of all that share a dimension."""
    return t.ndim > 0 and t.shape[-1] == count and _broadcast(t.shape[:-1], batch) == batch


def mass_range(dtype: torch.dtype) -> tuple[float, float]:
    """Between which gradients do not underflow, nor values, which have squares of it, overflow."""
    info = torch.finfo(dtype)
    return info.tiny * 2**48, info.max**0.5


def check_masses(name: str, total: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless sums of weights are in the range."""
    least, most = mass_range(dtype)
    bad = ~((total >= least) & (total <= most))
    if bool(bad.any()):
        raise ValueError(
            f"sinkhorn: {name} must have a mass from {least:.0e} to {most:.0e} in {dtype},"
            f" got a sum of {total[bad][0].item()}"
        )


def masses(w: Tensor, cu: Tensor | None) -> Tensor:
    """Sums of weights, of problems that have points, in float64."""
    w = w.double()
    if cu is None:
        return w.sum(-1, keepdim=True).flatten()
    total = w.new_zeros(cu.shape[0] - 1).index_add(0, _problem_of(cu, w.shape[-1]), w.flatten())
    return total[cu.diff() > 0]


def check_same_mass(given: tuple[Tensor | None, Tensor | None], of_a: Tensor, of_b: Tensor) -> None:
    """Raise ValueError unless the sums of a and b are the same, where some were `given`."""
    dtypes = [w.dtype for w in given if w is not None]
    if not dtypes:
        return
    allowed = max(_MASS_TOLERANCE.get(dtype, 3e-2) for dtype in dtypes)
    bad = (of_a - of_b).abs() > allowed * torch.maximum(of_a, of_b)
    if not bool(bad.any()):
        return
    sums = [
        f"{total[bad][0].item():.7g}" + ("" if w is not None else " (the default)")
        for w, total in zip(given, (of_a, of_b), strict=True)
    ]
    raise ValueError(
        f"sinkhorn: a and b must have the same mass, got sums of {sums[0]} and {sums[1]};"
        " scale one of them, or give reach, with which masses may differ"
    )


def _problem_of(cu: Tensor, count: int) -> Tensor:
    """The problem that each of `count` flat points belongs to."""
    return torch.bucketize(torch.arange(count, device=cu.device), cu[1:], right=True)


def canonical_eps(
    eps: float | Sequence[float] | Tensor,
    lead: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype,
    read: bool,
) -> tuple[Tensor, tuple[int, ...]]:
    """Temperatures `[P]`, and (T,) where there are several for each problem."""
    count = math.prod(lead)
    eps = given_numbers("sinkhorn", "eps", eps)
    if isinstance(eps, int | float):
        check_temperatures("sinkhorn", "eps", eps, dtype)
        return like.new_full((count,), eps, dtype=dtype), ()
    if read or isinstance(eps, list):
        check_temperatures("sinkhorn", "eps", eps, dtype)
    if isinstance(eps, list):  # for every problem
        e = from_numbers(eps, like.device, dtype).expand(*lead, -1)
    else:
        e = eps.detach()
    if e.device != like.device and e.ndim > 0:
        raise ValueError(f"sinkhorn: eps must be on {like.device} with x, got {e.device}")
    if e.ndim > 0 and (tuple(e.shape[: len(lead)]) != lead or e.ndim > len(lead) + 1):
        raise ValueError(
            f"sinkhorn: eps must have shape {lead}, or {(*lead, 'T')}, got {tuple(e.shape)}"
        )
    if e.ndim == len(lead) + 1 and e.shape[-1] == 0:
        raise ValueError(f"sinkhorn: eps must have a temperature, got {tuple(e.shape)}")
    temperatures = tuple(e.shape[len(lead) :])
    e = e.to(device=like.device, dtype=dtype)
    return e.expand((*lead, *temperatures)).reshape(-1), temperatures


_OF_MEAN = 1 / 20  # the share of the mean cost that "auto" is
_PAIRS = 2**22  # times coordinates, whose costs are formed at a time


def automatic_eps(eps: str, points: Points, a: Tensor, b: Tensor) -> Tensor:
    """`[B]`, a twentieth of the mean cost of each problem."""
    if eps != "auto":
        kinds = "a number, a sequence of numbers, a Tensor or 'auto'"
        raise TypeError(f"sinkhorn: eps must be {kinds}, got str {eps!r}")
    if torch.compiler.is_compiling() or is_transformed():
        raise ValueError(
            "sinkhorn: eps='auto' reads the costs, which a compiled graph or a transform does not"
            " have: give a number, as a result's `eps` of an earlier call"
        )
    return eps_of_mean(mean_costs(points.detached(), a.detach(), b.detach()), points.x.dtype)


def eps_of_mean(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """The temperatures that "auto" is, from mean costs."""
    bad = ~((mean > 0) & mean.isfinite())
    if bool(bad.any()):
        found = mean[bad][0].item()
        says = f"{found:g}: give a number"
        if math.isnan(found):
            says = "nan: inputs have NaN or inf, or no pair has a finite cost and weight"
        raise ValueError(f"sinkhorn: eps='auto' needs a positive mean cost, got {says}")
    return (_OF_MEAN * mean).to(dtype)


def mean_costs(points: Points, a: Tensor, b: Tensor) -> Tensor:
    """`sum_ij a_i b_j C_ij / sum_ij a_i b_j` over the pairs of finite cost, float64 `[B]`."""
    p = points
    if p.segments is not None:
        means = []
        for i in range(p.count):
            own, rows, columns = p.problem(i)
            empty = rows.start == rows.stop  # whose eps is of no consequence
            one = a.new_ones(1, dtype=torch.float64)
            means.append(one if empty else mean_costs(own, a[:, rows], b[:, columns]))
        return torch.cat(means) if means else a.new_zeros(0, dtype=torch.float64)
    a, b = (w.double() / w.double().sum(1, keepdim=True) for w in (a, b))
    if p.cost == "dot":  # whose own mean depends on the origin, as its plan does not
        p = replace(p, cost="half_sqeuclidean")
    if p.cost in _HALVES and p.labels is None and p.diagonal is None:
        middle = p.y.double().mean(1, keepdim=True)
        x, y = p.x.double() - middle, p.y.double() - middle
        square = sum(torch.einsum("bn,bnd->b", w, t * t) for w, t in ((a, x), (b, y)))
        cross = ((a[..., None] * x).sum(1) * (b[..., None] * y).sum(1)).sum(1)
        return _HALVES[p.cost] * (square - 2 * cross)
    count, n = p.x.shape[:2]
    step = max(1, _PAIRS // max(count * p.y.shape[1] * max(p.x.shape[2], 1), 1))
    total = mass = a.new_zeros(count)
    for i in range(0, n, step):
        part = slice(i, i + step)
        own = replace(
            p,
            x=p.x[:, part],
            matrix=None if p.matrix is None else p.matrix[:, part],
            labels=p.labels and (p.labels[0][:, part], p.labels[1]),
            diagonal=None if p.diagonal is None else p.diagonal + i,
        )
        C = own.costs().double()
        w = a[:, part, None] * b[:, None]
        w = torch.where(C.isfinite() | C.isnan(), w, 0.0)
        total = total + torch.where(w > 0, w * C, 0.0).sum((1, 2))
        mass = mass + w.sum((1, 2))
    return total / mass


def initial_potential(
    init: tuple[Tensor, Tensor],
    batch: tuple[int, ...],
    temperatures: tuple[int, ...],
    points: Points,
    dtype: torch.dtype,
    names: tuple[str, str] = ("init f", "init g"),
    op: str = "sinkhorn",
) -> tuple[Tensor, Tensor]:
    if not isinstance(init, tuple | list) or len(init) != 2:
        got = type(init).__name__
        raise TypeError(f"sinkhorn: init must be a pair of potentials (f, g), got {got}")
    out = []
    for name, t, p in zip(names, init, (points.x, points.y), strict=True):
        check_dense(op, name, t)
        check_constant(op, name, t)
        expected = (*batch, *temperatures, p.shape[1])
        if tuple(t.shape) != expected:
            raise ValueError(f"{op}: {name} must be {expected}, got {tuple(t.shape)}")
        if t.device != p.device:
            raise ValueError(f"{op}: {name} must be on {p.device}, got {t.device}")
        out.append(t.detach().to(dtype).reshape(math.prod(expected[:-1]), p.shape[1]))
    return out[0], out[1]
