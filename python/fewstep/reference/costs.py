"""Costs between points: one row each, which all that depends on a cost reads.

A backend that serves a cost has its formula too: csrc/shared/cost.h and the bodies that switch over
it, and `pair_cost` of kernels/sinkhorn/tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep._torch import InJvp, exactly

Pair = tuple[Tensor, Tensor]


class Derivatives(Protocol):
    """First and second derivatives of costs `C [b, n, M]` between `x [b, n, D]` and `y [b, M, D]`.

    Made of x, y, centred where the row says so, and C. Those at distance 0 are taken as 0, which is
    right for a point and itself.
    """

    def pull(self, w: Tensor) -> Pair:
        """`sum_j w_ij dC_ij/dx_i` and `sum_i w_ij dC_ij/dy_j`."""

    def push(self, ux: Tensor, uy: Tensor) -> Tensor:
        """`dC_ij` along `ux [b, n, D]` and `uy [b, M, D]`."""

    def bend(self, w: Tensor, ux: Tensor, uy: Tensor, dC: Tensor) -> Pair:
        """The derivative of `pull(w)` along (ux, uy), where `dC = push(ux, uy)`."""


@dataclass(frozen=True)
class Cost:
    """A row.

    Attributes:
        name: what a user writes, or "matrix" and "formula" for what is not named.
        index: the number that kernels know it by, `fewstep::Cost` in C++; -1: none does.
        matrix: costs `C [.., N, M]` of `x [.., N, D]` and `y [.., M, D]`, differentiable twice.
        gradient: `sum_j w_ij dC_ij/dx_i [.., N, D]` from `w, x, y` and the weights b of y, which
            say where the middle of the points is; None: by autograd.
        derivatives: both orders, for implicit differentiation.
        span: from the lowest and highest coordinates of x and of y, `[B, D]`, a bound on what
            costs differ by, `[B]`.
        backends: those that serve it; the reference serves all.
        scale: it is this times `|x - y|^2`, or where not `squared` `|x - y|`; None for others.
        squared: its unit is that of a squared length, and so is that of a penalty.
        centred: depends on `x - y` alone, so that a common offset may be taken off.
        directions: the cost of the points over their lengths that it is.
    """

    name: str
    index: int
    matrix: Callable[[Tensor, Tensor], Tensor] | None
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None
    derivatives: Callable[[Tensor, Tensor, Tensor], Derivatives]
    span: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None
    backends: tuple[str, ...]
    scale: float | None = None
    squared: bool = False
    centred: bool = True
    directions: str | None = None

    def of_distance(self, d: Tensor) -> Tensor:
        """Costs at distances d, where they have a scale."""
        assert self.scale is not None
        return self.scale * (d.square() if self.squared else d)

    @property
    def traced(self) -> bool:
        """Whether derivatives are autograd's, so that C needs a graph."""
        return self.derivatives is Traced


class _OfPairs(torch.autograd.Function):
    """A Function of x and y of any leading dimensions, which broadcast."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        rank = max(t.ndim + (dim is None) for t, dim in zip(args, in_dims, strict=True))
        pair = (
            t[None] if dim is None else t.movedim(dim, 0)
            for t, dim in zip(args, in_dims, strict=True)
        )
        x, y = (t.reshape(len(t), *[1] * (rank - t.ndim), *t.shape[1:]) for t in pair)
        return cls.apply(x.expand(info.batch_size, *x.shape[1:]), y), 0  # type: ignore[no-untyped-call]

    @staticmethod
    def setup_context(ctx: Any, inputs: Pair, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @classmethod
    def along(cls, x: Tensor, y: Tensor, ux: Tensor, uy: Tensor) -> Tensor:
        """The derivative along (ux, uy)."""
        raise NotImplementedError

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Tensor | None) -> Tensor:
        with InJvp() as here:
            x, y = here.primals(ctx.saved_tensors)
            ux, uy = here.primals(tangents)
            assert x is not None
            assert y is not None
            ux, uy = (torch.zeros_like(t) if u is None else u for t, u in ((x, ux), (y, uy)))
            return cls.along(x, y, ux, uy)


class _Traced(torch.autograd.Function):
    """A Function of x and y for Dynamo, which traces none that has a forward derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Pair, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class _TracedDistance(_Traced):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return distances(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Pair:
        x, y = ctx.saved_tensors
        w = _over_distance(grad, x, y)
        return _pull(w, x, y), _pull(w.mT, y, x)


class _Distance(_OfPairs):
    """Euclidean distance by differences, so that it is exact for near points far from the origin.

    `torch.cdist` has no second derivative; this backward is made of differentiable ops.
    The derivative at coinciding points is taken as 0.
    """

    forward, backward = _TracedDistance.forward, _TracedDistance.backward

    @classmethod
    def along(cls, x: Tensor, y: Tensor, ux: Tensor, uy: Tensor) -> Tensor:
        return _over_distance(_push(x, y, ux, uy), x, y)


class _TracedSquaredDistance(_Traced):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return distances(x, y).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Pair:
        x, y = ctx.saved_tensors
        return 2 * _pull(grad, x, y), 2 * _pull(grad.mT, y, x)


class _SquaredDistance(_OfPairs):
    forward, backward = _TracedSquaredDistance.forward, _TracedSquaredDistance.backward

    @classmethod
    def along(cls, x: Tensor, y: Tensor, ux: Tensor, uy: Tensor) -> Tensor:
        return 2 * _push(x, y, ux, uy)


class _TracedProduct(_Traced):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        with exactly(x.device):
            return x @ y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Pair:
        x, y = ctx.saved_tensors
        return _product(grad, y.mT), _product(x.mT, grad)


class _Product(_OfPairs):
    """`x @ y` in their own dtype, whatever autocast says, and so are its derivatives."""

    forward, backward = _TracedProduct.forward, _TracedProduct.backward

    @classmethod
    def along(cls, x: Tensor, y: Tensor, ux: Tensor, uy: Tensor) -> Tensor:
        return _product(ux, y) + _product(x, uy)


def _applied(traced: type[_Traced], of_pairs: type[_OfPairs], x: Tensor, y: Tensor) -> Tensor:
    of = traced if torch.compiler.is_compiling() else of_pairs
    out: Tensor = of.apply(x, y)  # type: ignore[no-untyped-call]
    return out


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return _applied(_TracedDistance, _Distance, x, y)


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    return _applied(_TracedSquaredDistance, _SquaredDistance, x, y)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return _applied(_TracedProduct, _Product, x, y)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """`|x_i - y_j| [.., N, M]` by differences, without second derivatives."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _over_distance(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`w_ij / |x_i - y_j|`, 0 at coinciding points."""
    d = _distance(x, y)
    near = d == 0
    return torch.where(near, 0.0, w / torch.where(near, 1.0, d))


def _pull(w: Tensor, x: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
    """`sum_j w_ij (x_i - y_j)`, centred so that a large common offset does not cancel.

    The centre is weighted by b or what w sums to: points without weight may be far away.
    """
    mass = w.detach().abs().sum(-2, keepdim=True) if b is None else b[..., None, :]
    total = mass.sum(-1, keepdim=True)
    centre = _product(mass / torch.where(total > 0, total, 1.0), y.detach())
    return w.sum(-1, keepdim=True) * (x - centre) - _product(w, y - centre)


def _quadratic_pull(w: Tensor, x: Tensor, y: Tensor) -> Pair:
    """`sum_j w_ij (x_i - y_j)` and `sum_i w_ij (y_j - x_i)`, of points that are centred."""
    return w.sum(-1)[..., None] * x - w @ y, w.sum(-2)[..., None] * y - w.mT @ x


def _quadratic_push(x: Tensor, y: Tensor, ux: Tensor, uy: Tensor) -> Tensor:
    """`(x_i - y_j) . (ux_i - uy_j)`."""
    out = -_product(ux, y.mT) - _product(x, uy.mT)
    return out + (x * ux).sum(-1)[..., :, None] + (y * uy).sum(-1)[..., None, :]


def _push(x: Tensor, y: Tensor, ux: Tensor, uy: Tensor) -> Tensor:
    """The same of points that are not centred, of which few may be far away, without weight."""
    centre = y.detach().median(-2, keepdim=True).values
    return _quadratic_push(x - centre, y - centre, ux, uy)


class _OfSquares:
    """`t |x - y|^2 / 2`, whose second derivative is a constant."""

    def __init__(self, x: Tensor, y: Tensor, C: Tensor, t: float) -> None:
        self.x, self.y, self.t = x, y, t

    def pull(self, w: Tensor) -> Pair:
        x, y = _quadratic_pull(w, self.x, self.y)
        return self.t * x, self.t * y

    def push(self, ux: Tensor, uy: Tensor) -> Tensor:
        return self.t * _quadratic_push(self.x, self.y, ux, uy)

    def bend(self, w: Tensor, ux: Tensor, uy: Tensor, dC: Tensor) -> Pair:
        x, y = _quadratic_pull(w, ux, uy)
        return self.t * x, self.t * y


class _OfDistances:
    """`|x - y|`, the root of a square: it bends across the line between two points alone."""

    def __init__(self, x: Tensor, y: Tensor, C: Tensor) -> None:
        self.x, self.y, self.inverse = x, y, torch.where(C > 0, 1 / C, 0.0)

    def pull(self, w: Tensor) -> Pair:
        return _quadratic_pull(w * self.inverse, self.x, self.y)

    def push(self, ux: Tensor, uy: Tensor) -> Tensor:
        return self.inverse * _quadratic_push(self.x, self.y, ux, uy)

    def bend(self, w: Tensor, ux: Tensor, uy: Tensor, dC: Tensor) -> Pair:
        w = w * self.inverse
        straight = _quadratic_pull(w, ux, uy)
        turned = _quadratic_pull(w * dC * self.inverse, self.x, self.y)
        return straight[0] - turned[0], straight[1] - turned[1]


class _OfProducts:
    """`-x.y`."""

    def __init__(self, x: Tensor, y: Tensor, C: Tensor) -> None:
        self.x, self.y = x, y

    def pull(self, w: Tensor) -> Pair:
        return -(w @ self.y), -(w.mT @ self.x)

    def push(self, ux: Tensor, uy: Tensor) -> Tensor:
        return -(ux @ self.y.mT) - self.x @ uy.mT

    def bend(self, w: Tensor, ux: Tensor, uy: Tensor, dC: Tensor) -> Pair:
        return -(w @ uy), -(w.mT @ ux)


Elementwise = Callable[[Tensor], Tensor]


class _OfCoordinates:
    """`sum_c h(x_c - y_c)`, by h' and h'' (None: 0 but at kinks), one coordinate after another."""

    def __init__(
        self, x: Tensor, y: Tensor, C: Tensor, slope: Elementwise, curvature: Elementwise | None
    ) -> None:
        self.x, self.y, self.slope, self.curvature = x, y, slope, curvature

    @staticmethod
    def _differences(x: Tensor, y: Tensor) -> Iterator[Tensor]:
        for k in range(x.shape[-1]):  # [b, n, M] each, since all D of them may not fit in memory
            yield x[..., :, None, k] - y[..., None, :, k]

    @staticmethod
    def _sums(parts: Iterator[Tensor]) -> Pair:
        sums = [(part.sum(-1), -part.sum(-2)) for part in parts]
        x, y = (torch.stack(t, -1) for t in zip(*sums, strict=True))
        return x, y

    def pull(self, w: Tensor) -> Pair:
        return self._sums(w * self.slope(d) for d in self._differences(self.x, self.y))

    def push(self, ux: Tensor, uy: Tensor) -> Tensor:
        out = ux.new_zeros(*ux.shape[:-1], uy.shape[-2])
        both = (self._differences(self.x, self.y), self._differences(ux, uy))
        for d, change in zip(*both, strict=True):
            out += self.slope(d) * change
        return out

    def bend(self, w: Tensor, ux: Tensor, uy: Tensor, dC: Tensor) -> Pair:
        if (curvature := self.curvature) is None:
            return torch.zeros_like(ux), torch.zeros_like(uy)
        both = (self._differences(self.x, self.y), self._differences(ux, uy))
        return self._sums(w * curvature(d) * change for d, change in zip(*both, strict=True))


class Traced:
    """Any cost whose C has a graph, by autograd."""

    def __init__(self, x: Tensor, y: Tensor, C: Tensor) -> None:
        self.x, self.y, self.C = x, y, C

    def _differentiate(self, out: Tensor, w: Tensor | None, *of: Tensor, graph: bool) -> Any:
        return torch.autograd.grad(
            out, of, w, retain_graph=True, create_graph=graph, materialize_grads=True
        )

    def _change(self, w: Tensor, ux: Tensor, uy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of `sum_ij w_ij dC_ij` for w, x and y."""
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            x, y = self._differentiate(self.C, w, self.x, self.y, graph=True)
            change = (x * ux).sum() + (y * uy).sum()
        w, x, y = self._differentiate(change, None, w, self.x, self.y, graph=False)
        return w, x, y

    def pull(self, w: Tensor) -> Pair:
        x, y = self._differentiate(self.C, w, self.x, self.y, graph=False)
        return x, y

    def push(self, ux: Tensor, uy: Tensor) -> Tensor:
        return self._change(torch.ones_like(self.C), ux, uy)[0]

    def bend(self, w: Tensor, ux: Tensor, uy: Tensor, dC: Tensor) -> Pair:
        return self._change(w, ux, uy)[1:]


def _across(side: Elementwise) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The `span` that is a function of the sides `[B, D]` of the box around all points."""

    def span(low_x: Tensor, high_x: Tensor, low_y: Tensor, high_y: Tensor) -> Tensor:
        return side(torch.maximum(high_x, high_y) - torch.minimum(low_x, low_y))

    return span


def _dot_span(low_x: Tensor, high_x: Tensor, low_y: Tensor, high_y: Tensor) -> Tensor:
    x, y = torch.maximum(low_x.abs(), high_x.abs()), torch.maximum(low_y.abs(), high_y.abs())
    return 2 * (x * y).sum(-1)


_KERNELS = ("cpp", "cuda", "triton")


def squared_distance(name: str, index: int, scale: float) -> Cost:
    """The row of `scale |x - y|^2`."""

    def scaled(c: Tensor) -> Tensor:
        return c if scale == 1 else scale * c

    return Cost(
        name,
        index,
        matrix=lambda x, y: scaled(_squared_distance(x, y)),
        gradient=lambda w, x, y, b: _pull(2 * scale * w, x, y, b),
        derivatives=partial(_OfSquares, t=2 * scale),
        span=_across(lambda side: scaled(side.square().sum(-1))),
        backends=_KERNELS,
        scale=scale,
        squared=True,
    )


def elementwise(
    name: str,
    index: int,
    value: Elementwise,
    slope: Elementwise,
    curvature: Elementwise | None = None,
    backends: tuple[str, ...] = (),
) -> Cost:
    """The row of `sum_c h(x_c - y_c)`, h even and rising, by h, h' and h'' (None: 0)."""

    def matrix(x: Tensor, y: Tensor) -> Tensor:
        return value(x[..., :, None, :] - y[..., None, :, :]).sum(-1)

    def gradient(w: Tensor, x: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return (w[..., None] * slope(x[..., :, None, :] - y[..., None, :, :])).sum(-2)

    return Cost(
        name,
        index,
        matrix=matrix,
        gradient=gradient,
        derivatives=partial(_OfCoordinates, slope=slope, curvature=curvature),
        span=_across(lambda side: value(side).sum(-1)),
        backends=backends,
    )


_HALF = squared_distance("half_sqeuclidean", 1, 0.5)
_ROWS = (
    squared_distance("sqeuclidean", 0, 1.0),
    _HALF,
    Cost(
        "euclidean",
        2,
        matrix=_distance,
        gradient=lambda w, x, y, b: _pull(_over_distance(w, x, y), x, y, b),
        derivatives=_OfDistances,
        span=_across(lambda side: side.square().sum(-1).sqrt()),
        backends=_KERNELS,
        scale=1.0,
    ),
    # Half the squared distance of directions is no squared length.
    replace(_HALF, name="cosine", squared=False, directions="half_sqeuclidean"),
    Cost(
        "dot",
        3,
        matrix=lambda x, y: -_product(x, y.mT),
        gradient=lambda w, x, y, b: -(w @ y),
        derivatives=_OfProducts,
        span=_dot_span,
        backends=("cpp",),
        centred=False,
    ),
    elementwise("l1", 4, torch.abs, torch.sign, backends=("cpp",)),
    # Points of a matrix have no coordinates, by which to differentiate.
    Cost("matrix", 5, None, None, _OfProducts, None, ("cpp",), centred=False),
    Cost("formula", -1, None, None, Traced, None, ("keops",), centred=False),
)
COSTS = {row.name: row for row in _ROWS}
# What a user may write.
NAMES = tuple(row.name for row in _ROWS if row.matrix is not None)
# Those that kernels know by themselves, and of these the functions of the distance.
OF_POINTS = tuple(name for name in NAMES if COSTS[name].directions is None)
OF_DISTANCE = tuple(name for name in OF_POINTS if COSTS[name].scale is not None)


def served(backend: str) -> tuple[str, ...]:
    """The costs of points that a backend serves."""
    return tuple(name for name in OF_POINTS if backend in COSTS[name].backends)


def of_index(index: int) -> Cost:
    """The row of a kernel's number."""
    return next(row for row in _ROWS if row.index == index)


def cost_matrix(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """`C [B, N, M]` of one of `NAMES`, of points as they are."""
    matrix = COSTS[cost].matrix
    assert matrix is not None
    return matrix(x, y)
