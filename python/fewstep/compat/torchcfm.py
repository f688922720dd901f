"""`OTPlanSampler` of torchcfm with fewstep's kernels: pairs for minibatch OT-CFM.

    from torchcfm.optimal_transport import OTPlanSampler   # before
    from fewstep.compat.torchcfm import OTPlanSampler      # after

The flow matchers of torchcfm take it as their `ot_sampler`. Arguments, methods and results are
those of torchcfm 1.0.7, and with the same plan and seed of NumPy the same pairs are drawn. Plans
are those of POT's methods, as in `fewstep.compat.pot`, in float64 on the points' device.

Where reg is so small for the costs that K underflows, torchcfm falls back to the uniform plan, or
samples an early iterate. Here the plan is that of the problem.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep._checks import count, flags, floating, one_of
from fewstep.compat.pot_problem import canonical, positive, run

__all__ = ["OTPlanSampler", "wasserstein"]

_Indices = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
# Of the generator whose seed users of torchcfm set.
_choice = np.random.choice
_INSTEAD = "method='sinkhorn' with a small reg"


class OTPlanSampler:
    """Draws pairs from the transport plan between two minibatches, for squared distances.

    Args:
        method (str): "sinkhorn" or "unbalanced". "exact" and "partial" raise NotImplementedError.
        reg (float): temperature, in units of the squared distance.
        reg_m (float): penalty of the marginals of "unbalanced".
        normalize_cost (bool): divide the costs by the largest.
        num_threads (int | str): has no effect; torch.set_num_threads has.
        warn (bool): warn where the plan has not converged, or has no mass and becomes uniform.

    >>> import torch
    >>> x0, x1 = torch.tensor([[0.0], [9.0]]), torch.tensor([[9.0], [0.0]])
    >>> i, j = OTPlanSampler("sinkhorn", reg=0.1).sample_plan(x0, x1)
    >>> torch.equal(i, j)
    True
    """

    def __init__(
        self,
        method: str,
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool = False,
        num_threads: int | str = 1,
        warn: bool = True,
    ) -> None:
        who = "OTPlanSampler"
        one_of(who, "method", method, ("exact", "sinkhorn", "unbalanced", "partial"))
        if method in ("exact", "partial"):
            raise NotImplementedError(
                f"{who}: method={method!r} of torchcfm is not served here; use {_INSTEAD}, or"
                " torchcfm's own"
            )
        flags(who, normalize_cost=normalize_cost, warn=warn)
        self.method = method
        self.reg, self.reg_m = positive(who, "reg", reg), positive(who, "reg_m", reg_m)
        self.normalize_cost, self.warn = normalize_cost, warn

    def get_map(self, x0: Tensor, x1: Tensor) -> np.ndarray[Any, Any]:
        """The plan between x0 `[N, ...]` and x1 `[M, ...]` with equal weights, `[N, M]`."""
        x0, x1 = _flat("get_map", x0, x1)
        largest = 1.0
        if self.normalize_cost and x0.numel():
            largest = torch.cdist(x0, x1).max().item() ** 2 or 1.0
        penalty = self.reg_m * largest if self.method == "unbalanced" else None
        plan = _plan("get_map", x0, x1, self.reg * largest, penalty, "sqeuclidean", warn=self.warn)
        if abs(plan.sum()) < 1e-8:
            if self.warn:
                warnings.warn("get_map: the plan has no mass; it is uniform now", stacklevel=2)
            plan = np.full_like(plan, 1 / plan.size)
        return plan

    def sample_map(
        self, pi: np.ndarray[Any, Any], batch_size: int, replace: bool = True
    ) -> _Indices:
        """Indices `(i, j)` of pairs drawn from a plan, with NumPy's global generator."""
        p = np.asarray(pi).ravel()
        total = p.sum()
        if not (np.isfinite(p).all() and total > 0):
            raise ValueError(f"sample_map: pi must be finite and have mass, got a sum of {total}")
        size = count("sample_map", "batch_size", batch_size)
        return np.divmod(_choice(p.size, p=p / total, size=size, replace=replace), pi.shape[1])

    def sample_plan(self, x0: Tensor, x1: Tensor, replace: bool = True) -> tuple[Tensor, Tensor]:
        """As many pairs of rows of x0 and x1 as x0 has, drawn from their plan."""
        return self.sample_plan_with_labels(x0, x1, replace=replace)[:2]

    def sample_plan_with_labels(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        replace: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The same with the labels of the rows."""
        i, j = self.sample_map(self.get_map(x0, x1), x0.shape[0], replace=replace)
        return x0[i], x1[j], None if y0 is None else y0[i], None if y1 is None else y1[j]

    def sample_trajectory(self, X: Tensor) -> np.ndarray[Any, Any]:
        """Rows of X `[N, T, ...]` chained through the plans from each time to the next."""
        rows = np.arange(X.shape[0])
        out = [X[:, 0]]
        for t in range(X.shape[1] - 1):
            pi = self.get_map(X[:, t], X[:, t + 1])
            rows = np.array([_choice(pi.shape[1], p=pi[i] / pi[i].sum()) for i in rows])
            out.append(X[:, t + 1][rows])
        return torch.stack(out, 1).detach().cpu().numpy()


def wasserstein(
    x0: Tensor,
    x1: Tensor,
    method: str | None = None,
    reg: float = 0.05,
    power: int = 2,
    **kwargs: Any,
) -> float:
    """The distance of order 1 or 2 by the entropic plan of `method="sinkhorn"`.

    Raises:
        NotImplementedError: method "exact" or None.
    """
    who = "wasserstein"
    if method is None or method == "exact":
        raise NotImplementedError(
            f"{who}: method={method!r} of torchcfm is not served here; use {_INSTEAD}, or"
            " fewstep.metrics.exact_w2"
        )
    one_of(who, "method", method, ("exact", "sinkhorn"))
    if power not in (1, 2):
        raise ValueError(f"{who}: power must be 1 or 2, got {power!r}")
    x0, x1 = _flat(who, x0, x1)
    cost = "euclidean" if power == 1 else "sqeuclidean"
    points = {"x": x0, "y": x1, "cost": cost}
    problem = canonical(who, None, None, None, reg, points=points)
    solved = run(problem, -math.log(len(x0)), 10**7, 1e-9, columns=True)
    linear = solved.linear(solved.plan(differentiable=False)).item()
    return math.sqrt(linear) if power == 2 else linear


def _flat(who: str, x0: Any, x1: Any) -> tuple[Tensor, Tensor]:
    """Rows `[N, D]` in float64."""
    out = []
    for name, t in (("x0", x0), ("x1", x1)):
        floating(who, name, t)
        if t.ndim < 2 or not t.shape[0]:
            raise ValueError(f"{who}: {name} must be [N, ...] with N > 0, got {tuple(t.shape)}")
        out.append(t.detach().reshape(t.shape[0], -1).double())
    if out[0].shape[1] != out[1].shape[1]:
        got = f"{tuple(x0.shape)} and {tuple(x1.shape)}"
        raise ValueError(f"{who}: x0 and x1 must have rows of one size, got {got}")
    return out[0], out[1]


def _plan(
    who: str, x0: Tensor, x1: Tensor, reg: float, reg_m: float | None, cost: str, *, warn: bool
) -> np.ndarray[Any, Any]:
    points = {"x": x0, "y": x1, "cost": cost}
    problem = canonical(who, None, None, None, reg, reg_m, points=points)
    balanced = reg_m is None
    start, tol = (-math.log(len(x0)), 1e-9) if balanced else (None, 1e-6)
    solved = run(problem, start, 1000, tol, columns=balanced, warn=warn, stacklevel=4)
    out: np.ndarray[Any, Any] = solved.plan(differentiable=False).cpu().numpy()
    return out
