"""`SinkhornResult`: potentials, value, plan, barycentres."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep._checks import flags
from fewstep._results import brief
from fewstep._torch import exactly
from fewstep.ops.sinkhorn import autograd
from fewstep.ops.sinkhorn.inputs import check_dense
from fewstep.ops.sinkhorn.problem import (
    Constants,
    Problem,
    check_digits,
    to_points,
    transposed,
)
from fewstep.reference.sinkhorn import Inputs, exponent


class Versions:
    """Counts of the in-place changes of tensors, to find later ones; copies start without any."""

    def __init__(self, tensors: dict[str, Tensor | None] | None = None) -> None:
        # Inference tensors have no count.
        self._seen = [
            (name, t, t._version)
            for name, t in (tensors or {}).items()
            if t is not None and not t.is_inference()
        ]

    def __reduce__(self) -> tuple[type[Versions], tuple[()]]:
        return Versions, ()

    def changed(self) -> str | None:
        """The name of a tensor that has changed."""
        return next((name for name, t, version in self._seen if t._version != version), None)


@dataclass(frozen=True, kw_only=True)
class CanonicalProblem(Inputs):
    """What a user gave, in canonical form, and what results take from it."""

    targets: Tensor | None  # y as given, [B, M, D]; None with a cost matrix
    backend: str
    batch: tuple[int, ...]  # leading shape of the caller's points
    temperatures: tuple[int, ...]  # (T,) where several were given

    def versions(self, f: Tensor, g: Tensor) -> Versions:
        """Of all tensors that the methods of a result read."""
        p = self.points
        tensors = {"x": p.x, "y": p.y, "C": p.matrix, "a": self.a, "b": self.b, "eps": self.eps}
        if self.targets is not p.y:
            tensors["y as given"] = self.targets
        tensors |= {"f": f, "g": g}
        if p.segments is not None:
            tensors |= zip(("cu_x", "cu_y"), p.segments, strict=True)
        if p.labels is not None:
            tensors |= zip(("lx", "ly"), p.labels, strict=True)
            tensors["label_cost"] = p.label_cost
        return Versions(tensors)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading shape of the caller's potentials."""
        return (*self.batch, *self.temperatures)

    @property
    def values(self) -> tuple[int, ...]:
        """Shape of one number for each problem."""
        ragged = () if self.points.segments is None else (self.points.count,)
        return (*self.batch, *ragged, *self.temperatures)


def _times_k(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}, K)"


def _rescaled(p: Problem, c: Constants, implicit: bool) -> Tensor:
    """f, and where x has no weight one whose row of the plan neither over- nor underflows."""
    if c.backend in ("cpp", "reference") and not implicit:  # which find it then
        own: Tensor | float = torch.inf
    elif c.rho_x is None:
        return p.f
    else:  # what it was before it was damped
        own = p.f.detach() * (1 + to_points(p.eps, p.f, p.segment_x) / c.rho_x)
    return torch.where(p.a > 0, p.f, own)


@dataclass(frozen=True, eq=False)
class SinkhornResult:
    """What `sinkhorn` returns.

    `[..]` is `[B]` for a batch of problems and nothing for a single one. `[T]` follows if T
    temperatures were given. With `cu_seqlens` the potentials are flat, `[N]` or `[T, N]`, and the
    other tensors are `[B]` or `[B, T]`.

    Attributes:
        f: potential on x, `[.., N]`.
        g: potential on y, `[.., M]`.
        value: entropic transport cost, the dual objective at f and g, `[..]`. It is differentiable.
        residual: L1 error of the row marginal, as a fraction of the mass, `[..]`. The columns are
            exact; with a single potential they are off by as much, and with averaged updates it is
            the larger error of the two. A point lighter than a thousandth of the heaviest raises it
            to `(step / eps)^2` at least, where step is how far the next update would move the
            point's potential.
        iterations: number of iterations done, those of annealing included, int64 `[..]`.
        converged: whether `residual <= tol`, or 1e-3 without `tol`, bool `[..]`.
        eps: temperatures used, `[..]`.

    The methods read the tensors that `sinkhorn` was given. They raise RuntimeError if one of them
    has changed in place since, as parameters do in an optimizer's step. Torch does not count
    changes through `.data`, by numpy or by optimizers with `fused=True`, so these are not seen.
    """

    f: Tensor
    g: Tensor
    value: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor
    _problem: CanonicalProblem = field(repr=False)
    _versions: Versions = field(default_factory=Versions, repr=False)

    __repr__ = brief

    @property
    def eps(self) -> Tensor:
        return self._problem.eps.reshape(self._problem.values)

    def _check_unchanged(self, what: str) -> None:
        if torch.compiler.is_compiling():
            return
        name = self._versions.changed()
        if name is not None:
            raise RuntimeError(
                f"{what}: {name} has changed in place since sinkhorn solved the problem, as an"
                f" optimizer's step does; call {what} before, or give sinkhorn a clone"
            )

    def _potentials(self) -> tuple[Tensor, Tensor]:
        """f and g as the kernels have them, `[P, N]` and `[P, M]`."""
        f, g = self.f.detach(), self.g.detach()
        count = math.prod(f.shape[:-1])
        return f.reshape(count, f.shape[-1]), g.reshape(count, g.shape[-1])

    def _solved(self, implicit: bool) -> tuple[list[Problem], Constants]:
        """What `autograd` needs; a constant plan, or one that depends on the inputs."""
        p = self._problem
        points, a, b = p.points, p.a, p.b
        if not implicit:
            points, a, b = points.detached(), a.detach(), b.detach()
        solved = autograd.problems(points, a, b, *self._potentials(), p.eps)
        return solved, autograd.constants(p.backend, points, p.schedule.rho)

    def _apply(self, v: Tensor, axis: int, implicit: bool, rescale: bool = False) -> Tensor:
        """`sum_j p_ij v_j [P, N, K]` with p = P / a, or that with the roles of x and y swapped.

        With `rescale` rows without weight may be off by a factor.
        """
        solved, constants = self._solved(implicit)
        parts = []
        for problem, w in zip(solved, v.chunk(len(solved)), strict=True):
            c = constants
            check_digits(problem, c)
            if implicit:
                f, g = autograd.potentials(problem, c)
                problem = problem._replace(f=f, g=g)
            if rescale:
                problem = problem._replace(f=_rescaled(problem, c, implicit))
            if axis == 1:
                problem, c = transposed(problem, c)
            through = autograd.product_through_plan if implicit else autograd.product
            parts.append(through(w, problem, c))
        return torch.cat(parts)

    def _per_problem(self, t: Tensor) -> Tensor:
        """`[B, ..]` repeated to `[P, ..]`; flat `[1, ..]` to `[T, ..]`."""
        T = math.prod(self._problem.temperatures)
        return t if T == 1 else t[:, None].expand(-1, T, *t.shape[1:]).flatten(0, 1)

    def potentials(self) -> tuple[Tensor, Tensor]:
        """f and g as functions of x, y, a, b and C, differentiable once.

        The derivatives are implicit ones, at convergence, on every backend. If both marginals are
        fixed, f and g are unique up to a constant. It is chosen such that `<a, f> = <b, g>`.

        Raises:
            ConvergenceError: in the backward pass or forward mode, far from convergence.

        >>> import torch, fewstep
        >>> x, y = torch.rand(5, 2, requires_grad=True), torch.rand(7, 2)
        >>> f, g = fewstep.sinkhorn(x, y, eps=0.1).potentials()
        >>> torch.autograd.grad(f.square().sum(), x)[0].shape
        torch.Size([5, 2])
        """
        self._check_unchanged("potentials")
        solved, constants = self._solved(implicit=True)
        parts = zip(*(autograd.potentials(p, constants) for p in solved), strict=True)
        f, g = (torch.cat(t) for t in parts)
        return f.reshape(self.f.shape), g.reshape(self.g.shape)

    def transport(self, v: Tensor, axis: int = 0, implicit: bool = False) -> Tensor:
        """`P v` (axis 0: v lives on y) or `P' v` (axis 1: v lives on x), without forming P.

        Args:
            v (Tensor): `[.., M, K]` for axis 0, `[.., N, K]` for axis 1, of the potentials' dtype.
                K may be left out, and so may T, unless the shape could mean either.
            axis (int): axis of P that the result keeps. Default 0.
            implicit (bool): treat the plan as a function of x, y, a, b and C, with implicit first
                derivatives at convergence. Otherwise the plan is a constant, and gradients flow
                into `v` alone. Default False.

        Returns:
            Tensor: `[.., N, K]` for axis 0, `[.., M, K]` for axis 1.

        Raises:
            ValueError: a shape or axis that does not fit, or a shape with two meanings.
            TypeError: another dtype.

        >>> import torch, fewstep
        >>> x, y = torch.rand(5, 2), torch.rand(7, 2)
        >>> plan = fewstep.sinkhorn(x, y, eps=0.1)
        >>> torch.allclose(plan.transport(torch.ones(5), axis=1), torch.full((7,), 1 / 7))
        True
        """
        p = self._problem
        self._check_unchanged("transport")
        if not isinstance(v, Tensor):
            raise TypeError(f"transport: v must be a Tensor, got {type(v).__name__}")
        if isinstance(axis, bool) or axis not in (0, 1):
            raise ValueError(f"transport: axis must be 0 or 1, got {axis!r}")
        flags("transport", implicit=implicit)
        count = (p.points.y if axis == 0 else p.points.x).shape[1]
        shared, own = (*p.batch, count), (*p.lead, count)
        vector = tuple(v.shape) in (shared, own)
        if tuple(v.shape) == own != shared and tuple(v.shape[:-1]) == shared:
            raise ValueError(
                f"transport: v must be {_times_k(own)} here, since {tuple(v.shape)} may be {own}"
                f" without K or {_times_k(shared)} without the temperatures"
            )
        v = v[..., None] if vector else v
        if tuple(v.shape[:-1]) not in (shared, own) or v.ndim == 0:
            got = tuple(v.shape[:-1] if vector else v.shape)
            raise ValueError(f"transport: v must be {_times_k(own)} for axis {axis}, got {got}")
        if v.dtype != self.f.dtype:
            raise TypeError(f"transport: v must be {self.f.dtype}, got {v.dtype}")
        check_dense("transport", "v", v)
        if v.device != self.f.device:
            raise ValueError(f"transport: v must be on {self.f.device}, got {v.device}")
        if v.shape[:-1] != own:
            v = v.unsqueeze(len(p.batch)).expand(*own, v.shape[-1])
        out = self._apply(v.reshape(math.prod(p.lead), *v.shape[-2:]), axis, implicit)
        weights = self._per_problem(p.a if axis == 0 else p.b)
        if implicit:
            out = weights[..., None] * out
        else:  # without weight the sums may have overflowed
            w = weights.detach()[..., None]
            out = torch.where(w > 0, w * out, 0.0)
        out = out.reshape(*p.lead, *out.shape[1:])
        return out[..., 0] if vector else out

    def plan(self) -> Tensor:
        """The dense plan `P [.., N, M]`, without gradients. It takes memory for all pairs.

        `transport(torch.eye(M), implicit=True)` is the same plan with derivatives.

        Raises:
            ValueError: problems of different sizes (`cu_seqlens`), whose plans have no one shape.
        """
        p = self._problem
        if p.points.segments is not None:
            raise ValueError("plan: ragged problems have plans of several shapes, got cu_seqlens")
        self._check_unchanged("plan")
        solved, constants = self._solved(implicit=False)
        for problem in solved:
            check_digits(problem, constants)
        a, b = self._per_problem(p.a.detach()), self._per_problem(p.b.detach())
        with exactly(a.device):
            C = self._per_problem(p.points.detached().costs())
            z = exponent(C, *self._potentials(), p.eps)
        # Where both weights are tiny, or 0, the exponential may overflow before they multiply it.
        log_w = a.log()[..., :, None] + b.log()[..., None, :]
        plan = torch.where(log_w == -torch.inf, 0.0, (z + log_w).exp())
        return plan.reshape(*p.lead, *plan.shape[1:])

    def barycenter(self, normalize: bool = True, implicit: bool = False) -> Tensor:
        """The barycentric projection `T(x_i) = sum_j P_ij y_j / sum_j P_ij`, `[.., N, D]`.

        The y_j are those given, for the cosine cost too. If `reach` leaves a point no mass, it has
        no average, and its row is NaN. A point without weight has the average that the exponents of
        the plan give.

        Args:
            normalize (bool): divide by the mass that the row has, so that every `T(x_i)` is an
                average even before convergence. Otherwise divide by its target a_i. Default True.
            implicit (bool): differentiable once in x, y, a and b, as in `transport`. Default False.

        Raises:
            ValueError: a cost matrix was given, which has no points to average.
        """
        p = self._problem
        if p.targets is None:
            raise ValueError("barycenter: needs points, got a problem with a cost matrix C")
        flags("barycenter", normalize=normalize)
        flags("barycenter", implicit=implicit)
        self._check_unchanged("barycenter")
        y = p.targets if implicit else p.targets.detach()
        y = torch.cat([y, torch.ones_like(y[..., :1])], -1)
        T = math.prod(p.temperatures)
        y = y[:, None].expand(-1, T, -1, -1).flatten(0, 1)
        product = self._apply(y, 0, implicit, rescale=normalize or not implicit)
        out, mass = product[..., :-1], product[..., -1:]
        # A point that keeps no mass has NaN, but not in the gradients of others. Products with less
        # mass than this one are among the numbers that lack digits.
        kept = mass >= 2**16 * torch.finfo(mass.dtype).tiny
        mean = torch.where(kept, out / torch.where(kept, mass, 1.0), torch.nan)
        if normalize:
            out = mean
        elif not implicit:  # without weight f is the transform of g, which says what mass there is
            own = torch.ones_like(mass)
            if (rho := p.schedule.rho[0]) is not None:
                own = torch.exp(-self._potentials()[0] / rho)[..., None]
            weightless = self._per_problem(p.a.detach())[..., None] == 0
            out = torch.where(weightless, torch.where(kept, own * mean, 0.0), out)
        return out.reshape(*p.lead, *out.shape[1:])
