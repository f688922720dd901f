"""`SamplesLoss` of geomloss with fewstep's kernels: the same schedule, iterations and numbers.

    from geomloss import SamplesLoss            # before
    from fewstep.compat.geomloss import SamplesLoss  # after

In float64 values, potentials and gradients agree with geomloss 0.3.1 (backend "tensorized") within
1e-10, converged or not. Where geomloss is off by the definitions in float64, this is not:

- With `reach`, geomloss multiplies gradients by `(rho + eps / 2) / (rho + eps)`. Here they are
  those of the converged value.
- With `reach` and `debias=False`, geomloss adds `eps (m_a + m_b) / 2` for masses m_a and m_b, and
  the definition `eps m_a m_b`. The two differ unless both masses are 1.
- With p=1, geomloss takes distances below 1e-4 as 1e-4, those of points to themselves among them.
- geomloss takes `log 0` of a weight as -1e5, which is not far from costs of 1e5 eps and more.
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

from fewstep._checks import flags, floating, number, one_of
from fewstep.ops.sinkhorn import dispatch
from fewstep.ops.sinkhorn.result import SinkhornResult
from fewstep.ops.sinkhorn.solve import sinkhorn
from fewstep.reference.sinkhorn import Points

CostFunction = Callable[[Tensor, Tensor], Tensor]
_WHO = "SamplesLoss"
_COSTS = {1: "euclidean", 2: "half_sqeuclidean"}
_MASSES = {torch.float64: 1e-6}  # how far equal masses may be apart, relatively; else 1e-2
_RANGE = 1e-25  # of masses whose logarithms have their digits
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
        potentials (bool): return the pair of dual potentials, `[B, N]` and `[B, M]`, or as geomloss
            does `[1, N]` and `[1, M]`.
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
        batched = x.ndim == 3
        x, y = (t if batched else t[None] for t in (x, y))
        dtype = torch.promote_types(x.dtype, torch.float32)
        a, b = (w.reshape(t.shape[:2]) for w, t in ((a, x), (b, y)))
        x, y, a, b = (t.to(dtype) for t in (x, y, a, b))
        schedule = self._schedule(x.detach(), y.detach())
        f, g = self._between(x, y, a, b, schedule)
        own: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.debias:
            own = (self._itself(x, a, schedule), self._itself(y, b, schedule))
        if self.potentials:
            f, g = (t if s is None else t - s for t, s in zip((f, g), own, strict=True))
            return f, g
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

    def _solve(self, schedule: list[float], **data: Any) -> SinkhornResult:
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
        return None if self.reach is None else math.pow(self.reach, self.p)

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
        w, v = a.detach(), b.detach()
        of_x = of_y = a.new_zeros(())
        if self.reach is None:
            of_a, of_b = (t.sum(1, keepdim=True) for t in (w, v))
            apart, limit = (of_a / of_b - 1).abs().max(), _MASSES.get(a.dtype, 1e-2)
            if not (apart <= limit and of_a.min() > 0):
                raise ValueError(
                    f"{_WHO}: a and b must have equal positive masses without reach, got"
                    f" {of_a.flatten()[0].item():.6g} and {of_b.flatten()[0].item():.6g}"
                )
            w, v = w / of_a, v / of_b
            of_x, of_y = _shifts(of_a.log(), of_b.log(), schedule)
        with torch.no_grad():
            last = self._solve(schedule, a=w, b=v, **costs)
        backend = last._problem.backend
        f = self._extrapolate(costs, v, last.f, last.g, schedule[-1], backend)
        g = self._extrapolate(back, w, last.g, last.f, schedule[-1], backend)
        return f - of_x, g - of_y

    def _itself(self, x: Tensor, a: Tensor, schedule: list[float]) -> Tensor:
        """The extrapolated potential of the problem of x with itself."""
        costs = self._costs(x, x.detach())
        w, shift = a.detach(), a.new_zeros(())
        if self.reach is None:
            mass = w.sum(1, keepdim=True)
            w, shift = w / mass, schedule[-1] / 2 * mass.log()  # as `_shifts` of equal masses
        with torch.no_grad():
            data = {"x": x.detach()} if self.cost is None else costs
            if self.cost is None:
                data["y"] = data["x"]
            last = self._solve(schedule, a=w, b=w, **data)
        backend = last._problem.backend
        return self._extrapolate(costs, w, last.f, last.g, schedule[-1], backend) - shift

    def _extrapolate(
        self, costs: dict[str, Tensor], b: Tensor, f: Tensor, g: Tensor, eps: float, backend: str
    ) -> Tensor:
        """The transform of g, differentiable in what moves the costs and holding g."""
        C, points = costs.get("C"), costs.get("x")
        moved = C if points is None else points
        assert moved is not None
        options = self._options(eps, by_points=C is None)
        return _transform(moved, costs.get("y"), b, f, g, options, self._rho, backend)

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
            return sum(
                ((w * (f if s is None else f - s)).sum(1) for w, f, s in pairs),
                start=a.new_zeros(len(a)),
            )
        # The values of converged problems, whose derivatives have rho + eps for rho + eps / 2.
        value = slope = a.new_zeros(len(a))
        for w, f, s in pairs:
            less = (-f / rho).exp() if s is None else (-f / rho).expm1() - (-s / rho).expm1()
            lost = (w * less).sum(1)
            value, slope = value - (rho + eps / 2) * lost, slope - (rho + eps) * lost
        value = value.detach() + (slope - slope.detach())
        if self.debias:
            return value
        of_a, of_b = a.sum(1), b.sum(1)
        whole: Tensor = value + rho * (of_a + of_b) + eps * of_a * of_b
        return whole


class _Transform(torch.autograd.Function):
    """`-eps log sum_j b_j exp((g_j - C_ij) / eps)`, damped by rho, as a function of x or C."""

    @staticmethod
    def forward(
        moved: Tensor,
        y: Tensor | None,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        options: dict[str, Any],
        rho: float | None,
        backend: Any,
    ) -> Tensor:
        eps = options["eps"]
        data: dict[str, Any] = {"C": moved} if y is None else {"x": moved, "y": y}
        data = {name: t.detach() for name, t in data.items()}
        damping = 1.0 if rho is None else rho / (rho + eps)
        out, in_range = f, False
        if y is not None:  # by the masses of rows that f gives, where they stay in range
            points = Points(moved.detach(), y, options["cost"])
            own, e = f / damping, b.new_full((len(b),), eps)
            mass = dispatch.transport(backend, points, own, g, b, e, b[..., None])[1]
            out = damping * (own - eps * mass.log())
            in_range = bool(((mass > _RANGE) & (mass < 1 / _RANGE)).all())
        if not in_range:
            out = sinkhorn(**data, b=b, init=(f, g), backend=backend, **options).f
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        moved, y, b, _, g, options, rho, backend = inputs
        ctx.save_for_backward(moved, y, b, output, g)
        eps = options["eps"]
        damping = 1.0 if rho is None else rho / (rho + eps)
        ctx.how = eps, damping, options.get("cost", "matrix"), backend

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        return (_gradient(u, *ctx.saved_tensors, ctx.how), *(None,) * 7)


class _Gradient(torch.autograd.Function):
    """The product of u with the derivative of `_Transform`, whose own would need the iterations."""

    @staticmethod
    def forward(
        u: Tensor,
        moved: Tensor,
        y: Tensor | None,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        how: tuple[float, float, str, str],
    ) -> Tensor:
        eps, damping, cost, backend = how
        f, w = f / damping, (damping * u)[..., None]  # the rows' plan then sums to 1
        if y is None:
            return w * ((f[..., None] + g[:, None] - moved) / eps + b.log()[:, None]).exp()
        points, ones = Points(moved.detach(), y, cost), torch.ones_like(f)
        e = b.new_full((len(b),), eps)
        grad: Tensor = w * dispatch.gradient(backend, points, f, g, ones, b, e)
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"{_WHO}: has no second derivatives, which would need the iterations; those of"
            " fewstep.sinkhorn_divergence are right"
        )


_gradient: Callable[..., Tensor] = _Gradient.apply
_transform: Callable[..., Tensor] = _Transform.apply


def _shifts(log_a: Tensor, log_b: Tensor, schedule: list[float]) -> tuple[Tensor, Tensor]:
    """How much lower geomloss's f and g are for weights of these masses than for masses of 1.

    A transform of `g - c`, by weights m times as large, is that of g, plus `c - eps log m`.
    """
    x, y = schedule[0] * log_b, schedule[0] * log_a
    for eps in schedule[1:]:
        x, y = (x - y + eps * log_b) / 2, (y - x + eps * log_a) / 2
    return schedule[-1] * log_b - y, schedule[-1] * log_a - x


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
        dtype = torch.promote_types(x.dtype, torch.float32)
        a, b = (t.new_full(t.shape[:-1], 1 / max(t.shape[-2], 1), dtype=dtype) for t in (x, y))
        return a, x, b, y
    a, b = args[0], args[2]
    for name, w, t in (("a", a, x), ("b", b, y)):
        floating(_WHO, name, w)
        if w.shape not in (t.shape[:-1], (*t.shape[:-1], 1)):
            needed = tuple(t.shape[:-1])
            raise ValueError(f"{_WHO}: {name} must be {needed}, got {tuple(w.shape)}")
    return a, x, b, y
