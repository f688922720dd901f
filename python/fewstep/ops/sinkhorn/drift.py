"""`sinkhorn_drift`: where the gradient flow of the Sinkhorn divergence moves generated points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fewstep._names import Backend, DistanceCost, Form, Precision
from fewstep._ranks import warn_of_ranks
from fewstep._results import brief, takes_arrays
from fewstep.ops.sinkhorn import drift_ranks
from fewstep.ops.sinkhorn.drift_inputs import FORMS, canonical_drift

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FORMS", "Drift", "sinkhorn_drift"]


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
    process_group: ProcessGroup | None = None,
    ranks_hold: Literal["points", "groups"] | None = None,
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
        process_group (ProcessGroup | None): ranks of torch.distributed whose points are one batch:
            scale, rms and plans are those of all. Default: of this process alone.
        ranks_hold (str | None): with `process_group`, what each rank has its own of. "points": its
            part of the points of every group, and of their weights, in any number; all ranks have
            the same groups. Every rank gathers all points. It then solves its share of the groups
            and gathers all velocities, or, where ranks are more than groups, solves all of them,
            with the bits of one process. velocity is that of the rank's x.
            "groups": groups of its own, in any number, of as many points. It solves these, and
            ranks reduce a number for the scale and one for each temperature. Default: "points" for
            a single group; for more it must be given.

    Returns:
        Drift: velocity, scale, rms, residual, entropy, peak. No gradient flows through any.

    float64 stays float64. float32, bfloat16 and float16 are computed in float32 and return float32.
    The velocity of "cpp" is within 1e-4 of float64 (relative norm). "cpp" never holds a matrix of
    all pairs beyond what `memory_limit` allows for the groups in work. Several temperatures with
    `normalize=True` also need T - 1 times the memory of the velocity, of which the calling thread
    keeps up to 64 MB for the next call.

    Under DDP, which takes means over ranks, a loss that is a mean over the rank's points is that of
    the global batch where ranks have as many points; else multiply it by the rank's share of the
    points times the number of ranks. All ranks must make the call. Without `process_group` a
    warning says once, where there are several ranks, that each computes for itself.

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
    options: dict[str, Any] = {
        "eps": eps,
        "max_iter": max_iter,
        "cost": cost,
        "uncond": uncond,
        "guidance": guidance,
        "form": form,
        "weights": weights,
        "normalize": normalize,
        "exclude_diagonal": exclude_diagonal,
        "memory_limit": memory_limit,
        "precision": precision,
        "backend": backend,
    }
    if process_group is not None:
        d, out = drift_ranks.drift(process_group, ranks_hold, (x, y, x_self), options)
    else:
        if ranks_hold is not None:
            raise ValueError(
                f"sinkhorn_drift: ranks_hold must be None without process_group, got {ranks_hold!r}"
            )
        d = canonical_drift(x, y, x_self, **options)
        out = d.solve()
        warn_of_ranks("sinkhorn_drift", "scale, rms and plans")
    velocity, scale, rms, *plans = out
    velocity = velocity.reshape(velocity.shape[0], *d.lead, *velocity.shape[2:])
    plans = [t.reshape(t.shape[0], *d.lead, t.shape[2]) for t in plans]
    if not d.several:
        velocity, rms, *plans = (t[0] for t in (velocity, rms, *plans))
    elif d.options["unit"]:
        velocity = velocity[0]
    return Drift(velocity, scale, rms, *plans)
