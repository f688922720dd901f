"""`SinkhornResult`: potentials, value, plan, barycentres."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fewstep._checks import count, flags
from fewstep._results import brief
from fewstep._torch import exactly, is_transformed
from fewstep.ops.sinkhorn import autograd, plans
from fewstep.ops.sinkhorn.inputs import check_dense
from fewstep.ops.sinkhorn.problem import (
    Constants,
    Problem,
    to_points,
    transposed,
)
from fewstep.reference.sinkhorn import Inputs, exponent, weighted


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
    ranks: int = 1  # over which the points of x are spread

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

    def result(
        self,
        f: Tensor,
        g: Tensor,
        value: Tensor,
        residual: Tensor,
        iterations: Tensor,
        converged: Tensor,
    ) -> SinkhornResult:
        """What the kernels return, in the caller's shapes."""
        f, g = (t.reshape(*self.lead, t.shape[-1]) for t in (f, g))
        value, residual = value.reshape(self.values), residual.reshape(self.values)
        iterations, converged = iterations.reshape(self.values), converged.reshape(self.values)
        plain = not torch.compiler.is_compiling() and not is_transformed()
        versions = self.versions(f, g) if plain else Versions()
        return SinkhornResult(f, g, value, residual, iterations, converged, self, versions)


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

    `[..]` are the leading dimensions of x and y together, `[B]` for a batch and nothing for a
    single problem. `[T]` follows if T temperatures were given. With `cu_seqlens` the potentials are
    flat, `[N]` or `[T, N]`, and the other tensors are `[B]` or `[B, T]`.

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

    def _check_whole(self, what: str, needs_rows: bool = True) -> None:
        ranks = self._problem.ranks
        if ranks > 1 and needs_rows:
            raise ValueError(
                f"{what}: needs the rows of all ranks, got those of one of {ranks};"
                " transport(v), barycenter, plan and assignment() need those of this rank"
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
            autograd.check_digits(problem, c)
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
        self._check_whole("potentials")
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
        self._check_whole("transport with axis=1 or implicit", axis == 1 or implicit)
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

    def plan(self, implicit: bool = False) -> Tensor:
        """The dense plan `P [.., N, M]`. It takes memory for all pairs.

        Args:
            implicit (bool): differentiable once in x, y, a, b and C, as in `transport`. Otherwise
                without gradients. Default False.

        Raises:
            ValueError: problems of different sizes (`cu_seqlens`), whose plans have no one shape.
        """
        p = self._problem
        if p.points.segments is not None:
            raise ValueError("plan: ragged problems have plans of several shapes, got cu_seqlens")
        flags("plan", implicit=implicit)
        self._check_whole("plan with implicit", implicit)
        self._check_unchanged("plan")
        ((problem,), constants) = self._solved(implicit)
        autograd.check_digits(problem, constants)
        points = p.points if implicit else p.points.detached()
        f, g = autograd.potentials(problem, constants) if implicit else (problem.f, problem.g)
        with exactly(f.device):
            z = exponent(self._per_problem(points.costs()), f, g, p.eps)
            plan = weighted(z, problem.a[..., :, None], problem.b[..., None, :])
        return plan.reshape(*p.lead, *plan.shape[1:])

    def marginals(self, implicit: bool = False) -> tuple[Tensor, Tensor]:
        """Sums of the plan's rows `[.., N]` and columns `[.., M]`, without forming it.

        At convergence they are a and b where these are fixed, and what is left of them with
        `reach`.

        Args:
            implicit (bool): differentiable once in x, y, a, b and C, as in `transport`. Default
                False.
        """
        self._check_unchanged("marginals")
        self._check_whole("marginals")
        of_rows, of_columns = torch.ones_like(self.g), torch.ones_like(self.f)
        return self.transport(of_rows, 0, implicit), self.transport(of_columns, 1, implicit)

    def cost(self) -> Tensor:
        """The transport cost `<P, C>` without the entropy, `[..]`, without a matrix of all pairs.

        It is differentiable once in x, y, a, b and C: the plan depends on them, with implicit
        derivatives at convergence. `value`, whose derivatives hold the plan fixed, is cheaper to
        differentiate. Like `value`, it is inf where a point with weight has no partner.

        Raises:
            ConvergenceError: in the backward pass or forward mode, far from convergence.

        >>> import torch, fewstep
        >>> x, y = torch.rand(5, 2, requires_grad=True), torch.rand(7, 2)
        >>> ot = fewstep.sinkhorn(x, y, eps=0.1, tol=1e-4)
        >>> torch.allclose(ot.cost(), (ot.plan() * torch.cdist(x, y).square()).sum())
        True
        """
        self._check_unchanged("cost")
        self._check_whole("cost")
        solved, constants = self._solved(implicit=True)
        parts = []
        for problem in solved:
            autograd.check_digits(problem, constants)
            f, g = autograd.potentials(problem, constants)
            parts.append(autograd.plan_cost(problem._replace(f=f, g=g), constants))
        found = torch.stack(parts, 1).reshape(self._problem.values)
        # Points without a partner have potentials without digits.
        return torch.where(self.value.detach() == torch.inf, torch.inf, found)

    def entropy(self) -> Tensor:
        """How far the plan spreads, from 0 to 1 (to rounding) for independent marginals, `[..]`.

        It is `1 - I / min(H(r), H(c))`. I is the mutual information of the plan over its mass,
        `sum p log(p / r c')`, r and c are its marginals, and H is the entropy of these. With n
        points of equal weight on both sides this is `H(p) / log n - 1`, which is 0 for a
        permutation. A side with a single point has 1. It has no gradient and no matrix of all
        pairs.

        Source: the renormalised entropy of arXiv 2506.05526, extended to any marginals.
        """
        self._check_unchanged("entropy")
        self._check_whole("entropy")
        solved, constants = self._solved(implicit=False)
        for problem in solved:
            autograd.check_digits(problem, constants)
        parts = [autograd.read(plans.entropy, problem, constants) for problem in solved]
        return torch.stack(parts, 1).reshape(self._problem.values).to(self.f.dtype)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n random pairs (i, j) of each plan: `P_ij / sum P` is the law of each.

        A row is drawn by its mass and then a column of it, in float64, so that no matrix of all
        pairs is formed. The draws are independent. `x[i]` and `y[j]` are the pairs of points, also
        with `cu_seqlens`, where i and j count all points.

        Args:
            n (int): number of pairs.
            generator (torch.Generator | None): source of the random numbers. Default: torch's.

        Returns:
            tuple: i and j, int64 `[.., n]`.

        Raises:
            ValueError: a negative n, or a plan without mass.

        >>> import torch, fewstep
        >>> x, y = torch.rand(5, 2), torch.rand(7, 2)
        >>> i, j = fewstep.sinkhorn(x, y, eps=0.1).sample(20)
        >>> x[i].shape, y[j].shape
        (torch.Size([20, 2]), torch.Size([20, 2]))
        """
        p, n = self._problem, count("sample", "n", n, 0)
        if generator is not None and not isinstance(generator, torch.Generator):
            got = type(generator).__name__
            raise TypeError(f"sample: generator must be a torch.Generator, got {got}")
        self._check_unchanged("sample")
        self._check_whole("sample")
        rows = self.transport(torch.ones_like(self.g)).detach()
        solved, constants = self._solved(implicit=False)
        masses = rows.reshape(-1, rows.shape[-1]).chunk(len(solved))
        if p.points.segments is None:
            i, j = plans.draw(solved[0], constants, masses[0], n, generator)
            return i.reshape(*p.lead, n), j.reshape(*p.lead, n)
        out = rows.new_empty((2, p.points.count, len(solved), n), dtype=torch.int64)
        drawn = 0
        for t, (problem, mass) in enumerate(zip(solved, masses, strict=True)):
            for k, own, of_x, of_y in plans.alone(problem):
                i, j = plans.draw(own, constants, mass[:, of_x], n, generator)
                out[0, k, t], out[1, k, t] = i[0] + of_x.start, j[0] + of_y.start
                drawn += 1
        if n > 0 and drawn < out[0, ..., 0].numel():
            raise ValueError("sample: each problem must have points, got cu_seqlens with none")
        return out[0].reshape(*p.values, n), out[1].reshape(*p.values, n)

    def assignment(self, kind: Literal["argmax", "permutation"] = "argmax") -> Tensor:
        """A point of y for each point of x, int64 `[.., N]`; with `cu_seqlens` it counts all of y.

        Args:
            kind (str): "argmax" is the column of the largest entry of each row of the plan, the
                first of equal ones, or -1 where a row has none. Several rows may have the same.
                "permutation" assigns each point of y once. Of all permutations it is the one whose
                entries of the plan have the largest product, which is the one of least total cost
                `sum_i C_ij(i)`, exactly and whatever eps and the weights are. It needs N = M,
                float64 memory for all pairs of a problem and up to N^3 operations on the CPU, less
                where potentials are near their limits at a small eps.

        Raises:
            ValueError: another kind, N that is not M, no permutation of finite cost.

        >>> import torch, fewstep
        >>> x = torch.rand(5, 2)
        >>> fewstep.sinkhorn(x, x.flip(0), eps=0.1).assignment("permutation").tolist()
        [4, 3, 2, 1, 0]
        """
        if kind not in ("argmax", "permutation"):
            raise ValueError(f"assignment: kind must be 'argmax' or 'permutation', got {kind!r}")
        self._check_unchanged("assignment")
        self._check_whole("assignment('permutation')", kind == "permutation")
        p = self._problem
        solved, constants = self._solved(implicit=False)
        parts = []
        for problem in solved:
            if kind == "argmax":
                autograd.check_digits(problem, constants)
            found = autograd.read(partial(plans.assigned, kind=kind), problem, constants)
            if p.points.segments is not None:
                start = to_points(p.points.segments[1][:-1], found, problem.segment_x)
                found = torch.where(found < 0, found, found + start)
            parts.append(found)
        return torch.cat(parts).reshape(self.f.shape)

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
        self._check_whole("barycenter with implicit", implicit)
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
