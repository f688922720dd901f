"""`SamplesLoss` of geomloss with fewstep's kernels: the same schedule, iterations and numbers.

    from geomloss import SamplesLoss            # before
    from fewstep.compat.geomloss import SamplesLoss  # after

In float64 values, potentials and gradients agree with geomloss 0.3.1 (backend "tensorized") within
1e-10, converged or not. Where geomloss is off by the definitions in float64, this is not:

- With `reach`, geomloss multiplies gradients by `(rho + eps / 2) / (rho + eps)`. Here they are those
  of the converged value.
- With `reach` and `debias=False`, geomloss adds `eps (m_a + m_b) / 2` for masses m_a and m_b, and
  the definition `eps m_a m_b`. The two differ unless both masses are 1.
- With p=1, geomloss takes distances below 1e-4 as 1e-4, those of points to themselves among them.
- Points that are all equal raise in geomloss, since their diameter is 0. Their loss is 0 here.
- Second derivatives are silently wrong in geomloss. Here they raise NotImplementedError;
  `fewstep.sinkhorn_divergence` has them.
- In bfloat16 and float16 geomloss computes in that dtype. Here results are float32.

No backend forms the N x M costs on CPUs, except for a `cost` function. `truncate` and
`cluster_scale` have no effect, as in geomloss's backends "tensorized" and "online".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewstep._checks import flags, floating, number, one_of
from fewstep.ops.sinkhorn import dispatch
from fewstep.ops.sinkhorn.result import SinkhornResult
from fewstep.ops.sinkhorn.solve import sinkhorn
from fewstep.reference.sinkhorn import Points

CostFunction = Callable[[Tensor, Tensor], Tensor]
_WHO = "SamplesLoss"
_COSTS = {1: "euclidean", 2: "half_sqeuclidean"}
_MASSES = {torch.float64: 1e-6}  # how far equal masses may be apart, relatively; else 1e-2
_INSTEAD = {
    "energy": "fewstep.metrics.report, or geomloss itself",
    "gaussian": "fewstep.metrics.mmd_rbf",
    "laplacian": "geomloss itself",
    "hausdorff": "geomloss itself",
}


class SamplesLoss(torch.nn.Module):
    """The Sinkhorn divergence, or the entropic transport cost, of geomloss.

    Args:
        loss (str): "sinkhorn". The losses of kernels raise NotImplementedError.
        p (int): 1 or 2, for the cost `|x - y|^p / p`. Any number with `cost`.
        blur (float): temperature `eps = blur^p`.
        reach (float | None): distance of unbalanced transport, `rho = reach^p`.
        diameter (float | None): where the schedule starts. Default: the diagonal of the bounding
            box of all points.
        scaling (float): ratio of successive blurs, in (0, 1).
        cost (Callable | None): function of points `[B, N, D]` and `[B, M, D]` with costs
            `[B, N, M]`.
        debias (bool): the divergence; otherwise the transport cost.
        potentials (bool): return the pair of dual potentials.
        backend (str): "auto", "tensorized" or "online", which are the same here.

    Called as `loss(x, y)` or `loss(a, x, b, y)`, with points `[N, D]` or `[B, N, D]` and weights
    `[N]`, `[N, 1]`, `[B, N]` or `[B, N, 1]`.

    Raises:
        NotImplementedError: an option that geomloss accepts and this does not serve.
        ValueError: a value or a shape that does not fit.

    >>> import torch
    >>> x, y = torch.zeros(3, 2), torch.ones(4, 2)
    >>> round(SamplesLoss()(x, y).item(), 5)
    1.0
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: float = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: CostFunction | str | None = None,
        kernel: Any = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        one_of(_WHO, "loss", loss, ("sinkhorn", *_INSTEAD))
        one_of(_WHO, "backend", backend, ("auto", "tensorized", "online", "multiscale"))
        flags(_WHO, debias=debias, potentials=potentials, verbose=verbose)
        if loss != "sinkhorn":
            raise _unserved("loss", loss, _INSTEAD[loss])
        if kernel is not None:
            raise _unserved("kernel", kernel, "loss='sinkhorn', which has no kernel")
        if backend == "multiscale":
            raise _unserved("backend", backend, "'auto', which is exact and keeps no N x M costs")
        if isinstance(cost, str):
            raise _unserved("cost", cost, "fewstep.sinkhorn_divergence(cost=) for named costs")
        if cost is not None and not callable(cost):
            raise TypeError(f"{_WHO}: cost must be callable, got {cost!r}")
        self.loss, self.p, self.cost = loss, _positive("p", p), cost
        if cost is None and self.p not in _COSTS:
            raise ValueError(f"{_WHO}: p must be 1 or 2 without a cost, got {p!r}")
        self.blur = _positive("blur", blur)
        self.reach = None if reach is None else _positive("reach", reach)
        self.diameter = None if diameter is None else _positive("diameter", diameter)
        self.scaling = _positive("scaling", scaling)
        if not self.scaling < 1:
            raise ValueError(f"{_WHO}: scaling must be in (0, 1), got {scaling!r}")
        self.truncate, self.kernel, self.cluster_scale = truncate, kernel, cluster_scale
        self.debias, self.potentials, self.verbose = debias, potentials, verbose
        self.backend = backend

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        a, x, b, y = _arguments(args)
        shapes, batched = (a.shape, b.shape), x.ndim == 3
        x, y = (t if batched else t[None] for t in (x, y))
        a, b = (w.reshape(t.shape[:2]).to(t.dtype) for w, t in ((a, x), (b, y)))
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, y, a, b = (t.to(dtype) for t in (x, y, a, b))
        schedule = self._schedule(x.detach(), y.detach())
        f, g = self._between(x, y, a, b, schedule)
        own: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.debias:
            own = (self._itself(x, a, schedule), self._itself(y, b, schedule))
        if self.potentials:
            f, g = (t if s is None else t - s for t, s in zip((f, g), own, strict=True))
            return f.reshape(shapes[0]), g.reshape(shapes[1])
        value = self._value(a, b, (f, g), own)
        return value if batched else value[0]

    def _schedule(self, x: Tensor, y: Tensor) -> list[float]:
        """Temperatures: one for the start, then one for each averaged update."""
        p, blur, diameter = self.p, self.blur, self.diameter
        if diameter is None:
            points = torch.cat([x.flatten(0, 1), y.flatten(0, 1)])
            if not len(points):
                raise ValueError(f"{_WHO}: x and y must have points, got {tuple(x.shape)}")
            diameter = (points.amax(0) - points.amin(0)).norm().item()
            if not math.isfinite(diameter):
                raise ValueError(f"{_WHO}: x and y must be finite, got a diameter of {diameter}")
        if diameter == 0:
            return [blur**p] * 2
        exponents = np.arange(p * np.log(diameter), p * np.log(blur), p * np.log(self.scaling))
        first = diameter**p
        if not 0 < first < math.inf or not 0 < blur**p < math.inf:
            raise ValueError(f"{_WHO}: blur and diameter must have powers, got {blur}, {diameter}")
        return [first, first, *np.exp(exponents).tolist(), blur**p]

    def _solve(self, schedule: list[float], **data: Tensor) -> SinkhornResult:
        return sinkhorn(
            **data,
            **self._options(schedule[-1], by_points="C" not in data),
            anneal=schedule[:-1],
            update="averaged",
        )

    def _options(self, eps: float, *, by_points: bool) -> dict[str, Any]:
        reach, rho = self.reach, self._rho
        cost = {"cost": _COSTS[int(self.p)]} if by_points else {}
        return {"eps": eps, "max_iter": 1, "reach": reach if by_points else rho, **cost}

    @property
    def _rho(self) -> float | None:
        return None if self.reach is None else self.reach**self.p

    def _costs(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.cost is None:
            return {"x": x, "y": y}
        assert callable(self.cost)
        C = self.cost(x, y)
        shape = (*x.shape[:2], y.shape[1])
        if not isinstance(C, Tensor) or C.shape != shape:
            got = tuple(C.shape) if isinstance(C, Tensor) else type(C).__name__
            raise ValueError(f"{_WHO}: cost must return a Tensor {shape}, got {got}")
        return {"C": C.to(x.dtype)}

    def _between(
        self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, schedule: list[float]
    ) -> tuple[Tensor, Tensor]:
        """Extrapolated potentials of the problem between x and y."""
        costs = self._costs(x, y.detach())
        back = self._costs(y, x.detach())
        w, v, shift = a.detach(), b.detach(), 0.0
        if self.reach is None:
            of_a, of_b = (t.sum(1, keepdim=True) for t in (w, v))
            apart, limit = (of_a / of_b - 1).abs().max(), _MASSES.get(a.dtype, 1e-2)
            if not apart <= limit:
                raise ValueError(
                    f"{_WHO}: a and b must have equal masses without reach, got"
                    f" {of_a.flatten()[0].item():.6g} and {of_b.flatten()[0].item():.6g}"
                )
            # Masses m move both potentials by as much: their kernel is of the plan over a b'.
            w, v, shift = w / of_a, v / of_b, schedule[-1] / 2 * (of_a * of_b).log() / 2
        with torch.no_grad():
            last = self._solve(schedule, a=w, b=v, **costs)
        f = self._extrapolate(costs, v, last.f, last.g, schedule[-1])
        g = self._extrapolate(back, w, last.g, last.f, schedule[-1])
        return f - shift, g - shift

    def _itself(self, x: Tensor, a: Tensor, schedule: list[float]) -> Tensor:
        """The extrapolated potential of the problem of x with itself."""
        costs = self._costs(x, x.detach())
        w, shift = a.detach(), 0.0
        if self.reach is None:
            mass = w.sum(1, keepdim=True)
            w, shift = w / mass, schedule[-1] / 2 * mass.log()
        with torch.no_grad():
            data = {"x": x.detach()} if self.cost is None else costs
            if self.cost is None:
                data["y"] = data["x"]
            last = self._solve(schedule, a=w, b=w, **data)
        return self._extrapolate(costs, w, last.f, last.g, schedule[-1]) - shift

    def _extrapolate(
        self, costs: dict[str, Tensor], b: Tensor, f: Tensor, g: Tensor, eps: float
    ) -> Tensor:
        """The transform of g, differentiable in what moves the costs and holding g."""
        C, points = costs.get("C"), costs.get("x")
        moved = C if points is None else points
        assert moved is not None
        options = self._options(eps, by_points=C is None)
        out: Tensor = _Transform.apply(moved, costs.get("y"), b, f, g, options, self._rho)
        return out

    def _value(
        self,
        a: Tensor,
        b: Tensor,
        potentials: tuple[Tensor, Tensor],
        own: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        rho, eps = self._rho, self.blur**self.p
        pairs = zip((a, b), potentials, own, strict=True)
        if rho is None:
            sums = [(w * (f if s is None else f - s)).sum(1) for w, f, s in pairs]
            return sums[0] + sums[1]
        # The values of converged problems, whose derivatives have rho + eps for rho + eps / 2.
        value: Tensor | float = 0.0
        slope: Tensor | float = 0.0
        for w, f, s in pairs:
            less = (-f / rho).exp() if s is None else (-f / rho).expm1() - (-s / rho).expm1()
            sum_ = (w * less).sum(1)
            value, slope = value - (rho + eps / 2) * sum_, slope - (rho + eps) * sum_
        assert isinstance(value, Tensor) and isinstance(slope, Tensor)
        value = value.detach() + (slope - slope.detach())
        if self.debias:
            return value
        of_a, of_b = a.sum(1), b.sum(1)
        return value + rho * (of_a + of_b) + eps * of_a * of_b


class _Transform(torch.autograd.Function):
    """`-eps log sum_j b_j exp((g_j - C_ij) / eps)`, damped by rho, as a function of x or C."""

    @staticmethod
    def forward(
        ctx: Any,
        moved: Tensor,
        y: Tensor | None,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        options: dict[str, Any],
        rho: float | None,
    ) -> Tensor:
        eps = options["eps"]
        data = {"C": moved} if y is None else {"x": moved, "y": y}
        data = {name: t.detach() for name, t in data.items()}
        result = sinkhorn(**data, b=b, init=(f, g), **options)
        ctx.save_for_backward(*data.values(), b, result.f, g)
        ctx.eps, ctx.damping = eps, 1.0 if rho is None else rho / (rho + eps)
        ctx.cost, ctx.backend = result._problem.points.cost, result._problem.backend
        return result.f

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        *data, b, f, g = ctx.saved_tensors
        f, w = f / ctx.damping, (ctx.damping * u)[..., None]
        if len(data) == 1:  # of the rows' plan, whose sums are 1
            rows = (f[..., None] + g[:, None] - data[0]) / ctx.eps + b.log()[:, None]
            return (w * rows.exp(), *(None,) * 6)
        eps = b.new_full((len(b),), ctx.eps)
        ones = torch.ones_like(f)
        points = Points(data[0], data[1], ctx.cost)
        return (w * dispatch.gradient(ctx.backend, points, f, g, ones, b, eps), *(None,) * 6)


def _unserved(name: str, value: Any, instead: str) -> NotImplementedError:
    return NotImplementedError(
        f"{_WHO}: {name}={value!r} of geomloss is not served here; use {instead}"
    )


def _positive(name: str, value: Any) -> float:
    out = number(_WHO, name, value)
    if not 0 < out < math.inf:
        raise ValueError(f"{_WHO}: {name} must be positive and finite, got {value!r}")
    return out


def _arguments(args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, x, b and y, with shapes that fit."""
    if len(args) == 6:
        labels = "a coarser problem, or label_cost of fewstep.sinkhorn_divergence"
        raise _unserved("labels", "(l_x, a, x, l_y, b, y)", labels)
    if len(args) not in (2, 4):
        raise ValueError(f"{_WHO}: takes (x, y) or (a, x, b, y), got {len(args)} arguments")
    x, y = args[-3] if len(args) == 4 else args[0], args[-1]
    for name, t in (("x", x), ("y", y)):
        floating(_WHO, name, t)
        if t.ndim not in (2, 3):
            raise ValueError(f"{_WHO}: {name} must be [N, D] or [B, N, D], got {tuple(t.shape)}")
    if x.ndim != y.ndim or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        got = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"{_WHO}: x and y must have one D and one B, got {got}")
    if x.dtype != y.dtype:
        raise TypeError(f"{_WHO}: x and y must have one dtype, got {x.dtype} and {y.dtype}")
    if len(args) == 2:
        a, b = (t.new_full(t.shape[:-1], 1 / max(t.shape[-2], 1)) for t in (x, y))
        return a, x, b, y
    a, b = args[0], args[2]
    for name, w, t in (("a", a, x), ("b", b, y)):
        floating(_WHO, name, w)
        if w.shape not in (t.shape[:-1], (*t.shape[:-1], 1)):
            got = tuple(w.shape)
            raise ValueError(f"{_WHO}: {name} must be {tuple(t.shape[:-1])}, got {got}")
    return a, x, b, y
