"""`sinkhorn_drift`: where the gradient flow of the Sinkhorn divergence moves generated points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep._checks import integer
from fewstep._names import Backend, DistanceCost, Form, Precision
from fewstep._results import brief, takes_arrays
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
from fewstep.verification.choice import choose_backend

FORMS = ("split", "joint")
NORMALIZE = (True, False, "scale")


@dataclass(frozen=True, eq=False)
class Drift:
    """What `sinkhorn_drift` returns, without gradients.

    `[..]` are the leading dimensions of x. `[T]` is there only for several temperatures. P counts
    the plans. The split form has one for y, one for x_self and one for uncond if it was given. The
    joint form has a single plan.

    Attributes:
        velocity: V, `[.., N, D]`, or `[T, .., N, D]` for several temperatures with
            `normalize=False`.
        scale: s, `[]`. It is 1 with `normalize=False`.
        rms: root mean square of V over the whole call, before V is divided by it, `[T]`, in the
            units of `velocity`. It goes to zero as the generated law approaches the real one.
        residual: L1 error of the row marginal, `[T, .., P]`. The columns are exact.
        entropy: mean over i of `-sum_j p_ij log p_ij` in nats, `[T, .., P]`, where the rows of the
            plan are divided by their sums. `exp(entropy)` is the number of points that attract x_i.
        peak: mean over i of `max_j p_ij`, `[T, .., P]`.
    """

    velocity: Tensor
    scale: Tensor
    rms: Tensor
    residual: Tensor
    entropy: Tensor
    peak: Tensor

    __repr__ = brief


@takes_arrays
def sinkhorn_drift(
    x: Tensor,
    y: Tensor,
    x_self: Tensor,
    *,
    eps: float | Sequence[float] | Tensor,
    max_iter: int = 10,
    cost: DistanceCost = "half_sqeuclidean",
    uncond: Tensor | None = None,
    guidance: float | Tensor = 0.0,
    form: Form = "split",
    weights: Tensor | None = None,
    normalize: bool | Literal["scale"] = True,
    exclude_diagonal: bool | int = False,
    memory_limit: int = 2**26,
    precision: Precision | None = None,
    backend: Backend | None = None,
) -> Drift:
    """The velocity that carries generated points x to real ones y, for many groups in one call.

    For each group and temperature, P is the plan of `max_iter` iterations of `fewstep.sinkhorn`
    between x, with uniform weights, and a cloud whose points are the columns. The columns have the
    weights b: `weights` divided by their sum. The iterations start at `v_j = 1`:

        u_i = 1 / sum_j exp(-C_ij / eps) v_j          rows sum to 1
        v_j = N b_j / sum_i exp(-C_ij / eps) u_i      columns sum to N b_j

    The columns of `A = N P` are exact, its rows nearly so. Let
    `T_z(x_i) = sum_j A_ij z_j / sum_j A_ij`.

    The split form has a plan for each cloud. It moves x along the gradient flow of the Sinkhorn
    divergence, or with guidance w of `(1 + w) S(q, p) - w S(q, p_uncond)`:

        V = T_y - T_self + w (T_y - T_uncond)

    The joint form has one plan. Its columns are all clouds, those of y marked + and the others -:

        V_i = (sum_j A-_ij) (sum_j A+_ij y_j) - (sum_j A+_ij) (sum_j A-_ij z_j)

    Its guidance acts on the columns: a point of uncond counts `w n / U` times, with n the number of
    points of x_self that a row of the plan sees. (In the split form the same is done by appending
    such points to x_self, with `weights`.) Points of weight zero take no part at all.

    `normalize=True` is the recipe for features of any scale. One number s serves the whole call.
    Coordinates are divided by s, and temperatures are `eps D` in the new units (`eps sqrt(D)` for
    the euclidean cost). The V of each temperature is divided by its rms over the whole call, and
    the results are summed:

        s = max(sqrt(mean |x_i - u|^2) / sqrt(D), 1e-3)     (euclidean: mean |x_i - u|)
        velocity = sum_t V_t / max(rms(V_t), 1e-4)

    The mean is weighted. It is over all groups, x_i in x, and u in y and x_self (and uncond in the
    joint form) of the same group. With "scale", V is neither divided nor summed. With False,
    coordinates and eps are not scaled either: points, eps and V are in the caller's units.

    V is exactly zero where `x_self` equals y. Its mean is zero where y and x_self are independent
    draws of one law and of one size, at any temperature and number of iterations. x_self should
    therefore be a second batch, independent of x. `x_self=x` with `exclude_diagonal=True` is the
    single batch of drifting models.

    Source: arXiv 2605.11755, Algorithm 2 and Equation 16 (split), in the form of its released code;
    arXiv 2602.04770, Algorithm 2 and Appendix A.6 and A.7, with the coupling of arXiv 2603.12366
    (joint). `guidance` is their scale less 1.

    Args:
        x (Tensor): generated points `[.., N, D]`. Leading dimensions are independent groups.
        y (Tensor): real points `[.., M, D]`.
        x_self (Tensor): generated points `[.., N', D]`, of the same law as x.
        eps (float | Sequence | Tensor): temperature, or T of them.
        max_iter (int): number of iterations; exactly that many are done.
        cost (str): "half_sqeuclidean" = `|x-y|^2 / 2`, "sqeuclidean" = `|x-y|^2`, "euclidean" =
            `|x-y|`. V is made of barycentres for all three. For "euclidean" it is therefore a drift
            but not the gradient flow of that cost's divergence.
        uncond (Tensor | None): points `[.., U, D]` to be guided away from.
        guidance (float | Tensor): w, at least 0; `[..]` for one per group. Needs uncond.
        form (str): "split" or "joint".
        weights (Tensor | None): relative weights `[.., M + N' (+ U)]` of the points of y, x_self
            and uncond, in this order; the leading dimensions may be left out. Each plan divides by
            its own sum. In the joint form those of uncond count `w n / U` times. Default: ones.
        normalize (bool | str): True, "scale" or False, as above.
        exclude_diagonal (bool | int): leaves out the pairs `j == i` of x and x_self, or
            `j == i + k` for an int k, which are the same points. x_self then stands for x in s.
        memory_limit (int): bytes that each thread may use for the distances and kernels of the
            group it works on. What does not fit is computed again in every iteration.
        precision (str | None): precision of distances and barycentres on GPUs, "tf32x3", "tf32" or
            "float32", as for `sinkhorn`. Default: "tf32x3".
        backend (str | None): "reference", "cpp", "cuda" or "triton". "cuda" keeps groups of up to
            64 points and plans of up to 256 columns on chip, in float32. Beyond that, "cuda" and
            "triton" run the iterations by the kernels of `sinkhorn` and then form the plans.
            Default: the environment variable FEWSTEP_BACKEND, else the fastest backend, on a
            GPU of those that have matched float64 there; see `sinkhorn`.

    Returns:
        Drift: velocity, scale, rms, residual, entropy, peak. No gradient flows through any.

    float64 stays float64. float32, bfloat16 and float16 are computed in float32 and return float32.
    The velocity of "cpp" is within 1e-4 of float64 (relative norm). "cpp" never holds a matrix of
    all pairs beyond what `memory_limit` allows for the groups in work. Several temperatures with
    `normalize=True` also need T - 1 times the memory of the velocity, of which the calling thread
    keeps up to 64 MB for the next call.

    Raises:
        ValueError: shapes, devices, eps, weights, guidance, cost, form, backend, iteration counts
            that do not fit. Signs and sums of tensors are looked at on the CPU alone.
        TypeError: a dtype that is not floating, or differs from that of x.

    >>> import torch, fewstep
    >>> x, x_self = torch.randn(2, 5, 64, 3).unbind()  # 5 groups of 64 points in 3 dimensions
    >>> drift = fewstep.sinkhorn_drift(x, torch.randn(5, 64, 3) + 9, x_self, eps=[0.05, 0.2])
    >>> drift.velocity.shape, drift.rms.shape, drift.entropy.shape
    (torch.Size([5, 64, 3]), torch.Size([2]), torch.Size([2, 5, 2]))
    >>> bool((drift.velocity > 0).all())
    True
    """
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
    diagonal = _diagonal(exclude_diagonal, x, x_self, form)
    lead, n, d = x.shape[:-2], x.shape[-2], x.shape[-1]
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
    if readable(x, columns):
        _check_weights(columns, counts, form)
        if diagonal is not None and form == "split":
            _check_partners(columns[:, counts[0] : counts[0] + counts[1]], diagonal, n)

    velocity, scale, rms, *plans = dispatch_drift.drift(
        chosen,
        flat["x"],
        flat["y"],
        flat["x_self"],
        flat.get("uncond"),
        columns,
        w,
        temperatures,
        cost=cost,
        max_iter=max_iter,
        joint=form == "joint",
        scaled=normalize is not False,
        unit=normalize is True,
        diagonal=diagonal,
        memory_limit=memory_limit,
        precision=kept_precision,
    )
    velocity = velocity.reshape(velocity.shape[0], *lead, n, d)
    plans = [t.reshape(t.shape[0], *lead, t.shape[2]) for t in plans]
    if not several:
        velocity, rms, *plans = (t[0] for t in (velocity, rms, *plans))
    elif normalize is True:
        velocity = velocity[0]
    return Drift(velocity, scale, rms, *plans)


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


def _diagonal(exclude: bool | int, x: Tensor, x_self: Tensor, form: str) -> int | None:
    diagonal = excluded("sinkhorn_drift", exclude)
    if diagonal is None:
        return None
    if x.shape[-2] < 2 or (form == "split" and x_self.shape[-2] < 2):
        raise ValueError(
            "sinkhorn_drift: exclude_diagonal leaves a point without a partner, got x"
            f" {tuple(x.shape)} and x_self {tuple(x_self.shape)}"
        )
    return diagonal


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
