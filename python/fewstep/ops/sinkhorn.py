"""`sinkhorn`: entropic optimal transport between point clouds, and the plan it leaves behind."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep._library import choose_backend
from fewstep.reference import sinkhorn as reference

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_HALF = (torch.bfloat16, torch.float16)
# Largest deviation of a weight vector's sum from 1 that is taken for rounding.
_MASS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class _Problem:
    """The inputs in canonical form: batched, one compute dtype, weights filled in."""

    x: Tensor  # [B, N, D]
    y: Tensor  # [B, M, D]
    a: Tensor  # [B, N]
    b: Tensor  # [B, M]
    eps: Tensor  # [B]
    g0: Tensor | None  # [B, M]
    cost: str
    backend: str
    batched: bool


@dataclass(frozen=True)
class SinkhornResult:
    """What `sinkhorn` returns. `[..]` is `[B]` for batched input and nothing otherwise.

    Attributes:
        f: potential on x, `[.., N]`.
        g: potential on y, `[.., M]`.
        value: `<a, f> + <b, g>`, the entropic transport cost, `[..]`; differentiable.
        residual: L1 error of the row marginal, `[..]`; the columns are exact.
        iterations: iterations done, int64 `[..]`.
        converged: `residual <= tol` (1e-3 where `tol` is None), bool `[..]`.
    """

    f: Tensor
    g: Tensor
    value: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor
    _problem: _Problem = field(repr=False)

    def _potentials(self) -> tuple[Tensor, Tensor]:
        f, g = self.f.detach(), self.g.detach()
        return (f, g) if self._problem.batched else (f[None], g[None])

    def transport(self, v: Tensor, axis: int = 0) -> Tensor:
        """`P v` (axis 0: v lives on y) or `P' v` (axis 1: v lives on x), without forming P.

        The plan is a constant: gradients flow into `v` alone.

        Args:
            v (Tensor): `[.., M, K]` for axis 0, `[.., N, K]` for axis 1; the trailing K may be
                left out. Same dtype as the potentials.
            axis (int): the axis of P that the result keeps.

        Returns:
            Tensor: `[.., N, K]` for axis 0, `[.., M, K]` for axis 1.

        Raises:
            ValueError: a shape or axis that does not fit.

        >>> import torch, fewstep
        >>> x, y = torch.rand(5, 2), torch.rand(7, 2)
        >>> plan = fewstep.sinkhorn(x, y, eps=0.1)
        >>> torch.allclose(plan.transport(torch.ones(5), axis=1), torch.full((7,), 1 / 7))
        True
        """
        p = self._problem
        if axis not in (0, 1):
            raise ValueError(f"transport: axis must be 0 or 1, got {axis}")
        rows = (p.y if axis == 0 else p.x).shape[:2]
        expected = rows if p.batched else rows[1:]
        if tuple(v.shape[: len(expected)]) != tuple(expected) or v.ndim - len(expected) > 1:
            shape = (*expected, "K")
            raise ValueError(f"transport: v must be {shape} for axis {axis}, got {tuple(v.shape)}")
        if v.dtype != self.f.dtype:
            raise TypeError(f"transport: v must be {self.f.dtype}, got {v.dtype}")
        vector = v.ndim == len(expected)
        v = v[..., None] if vector else v
        v = v if p.batched else v[None]
        f, g = self._potentials()
        x, y, a, b = p.x.detach(), p.y.detach(), p.a.detach(), p.b.detach()
        apply = _transport(p.backend)
        if axis == 0:
            out = a[..., None] * apply(x, y, f, g, b, p.eps, v, cost=p.cost)[0]
        else:
            out = b[..., None] * apply(y, x, g, f, a, p.eps, v, cost=p.cost)[0]
        out = out[..., 0] if vector else out
        return out if p.batched else out[0]

    def plan(self) -> Tensor:
        """The dense plan `P [.., N, M]`, detached; for looking at, not for large problems."""
        p = self._problem
        f, g = self._potentials()
        C = reference.cost_matrix(p.x.detach(), p.y.detach(), p.cost)
        k = ((f[..., :, None] + g[..., None, :] - C) / p.eps[:, None, None]).exp()
        plan = p.a.detach()[..., :, None] * p.b.detach()[..., None, :] * k
        return plan if p.batched else plan[0]

    def barycenter(self, normalize: bool = True) -> Tensor:
        """The barycentric projection `T(x_i) = sum_j P_ij y_j / sum_j P_ij`, `[.., N, D]`.

        Args:
            normalize (bool): divide by the row mass that the plan has, so that every `T(x_i)` is
                a true average before convergence too; otherwise by its target a_i.
        """
        p = self._problem
        f, g = self._potentials()
        x, y, b = p.x.detach(), p.y.detach(), p.b.detach()
        out, mass = _transport(p.backend)(x, y, f, g, b, p.eps, y, cost=p.cost)
        out = out / mass[..., None] if normalize else out
        return out if p.batched else out[0]


def sinkhorn(
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: str = "sqeuclidean",
    max_iter: int = 100,
    tol: float | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
    check_finite: bool = False,
) -> SinkhornResult:
    """Entropic optimal transport between weighted point clouds, in the log domain.

    Solves `min_P <P, C> + eps KL(P | a b')` over plans with marginals a and b. The plan is
    `P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)` and one iteration is

        f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)        rows exact
        g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)        columns exact

    Source: Peyre and Cuturi, Computational Optimal Transport (2019), equations 4.43 and 4.44.

    Args:
        x (Tensor): points `[N, D]` or `[B, N, D]` (B independent problems).
        y (Tensor): points `[M, D]` or `[B, M, D]`.
        eps (float | Tensor): temperature, in units of the cost; `[B]` for one per problem.
        a (Tensor | None): weights `[.., N]` that sum to 1, zeros allowed. Default: uniform.
        b (Tensor | None): weights `[.., M]`, likewise.
        cost (str): "sqeuclidean" = `|x-y|^2`, "half_sqeuclidean" = `|x-y|^2 / 2`,
            "euclidean" = `|x-y|`.
        max_iter (int): iterations, at least 1; exactly that many where `tol` is None.
        tol (float | None): stop a problem, on the device, once its `residual` is at most this.
        init (tuple | None): potentials (f, g) to start from, shaped like the result's. The first
            update overwrites f, so only g matters. Default: zeros.
        backend (str | None): "reference", "cpp", "triton" or "cuda". Default: the environment
            variable FEWSTEP_BACKEND, else the fastest one for the device.
        check_finite (bool): look for NaN and inf first; on a GPU also check the signs and sums of
            weights and the sign of eps, which costs a synchronisation there.

    Returns:
        SinkhornResult: potentials, value, residual, iterations, converged; methods
        `transport`, `plan`, `barycenter`.

    The gradient of `value` for x, y, a, b is the envelope theorem's: `sum_j P_ij dC_ij/dx_i` for x,
    `f` for a (defined up to a constant, since a sums to 1). "reference" also gives gradients of f
    and g and second derivatives, through the iterations; the kernels raise there.

    float64 stays float64; float32, bfloat16 and float16 are computed in float32 and return
    float32. Kernel against float64: potentials within 2e-5 of the cost's scale after one step and
    2e-4 at convergence, value 1e-5, gradients 1e-4 (relative norm).

    Raises:
        ValueError: shapes, devices, eps, weights, cost, backend, iteration counts that do not fit.
        TypeError: a dtype that is not floating, or x and y of different dtypes.

    >>> import torch, fewstep
    >>> x = torch.tensor([[0.0], [1.0]])
    >>> y = torch.tensor([[0.0], [3.0]])
    >>> result = fewstep.sinkhorn(x, y, eps=1.0, tol=1e-4)
    >>> round(result.value.item(), 3), result.converged.item()
    (2.645, True)
    >>> [[round(p, 3) for p in row] for row in result.plan().tolist()]
    [[0.476, 0.024], [0.024, 0.476]]
    """
    problem = _canonical(x, y, eps, a, b, cost, max_iter, tol, init, backend, check_finite)
    p = problem
    solve = _solve(p.backend)
    out = solve(p.x, p.y, p.a, p.b, p.eps, p.g0, cost=cost, max_iter=max_iter, tol=tol)
    if not p.batched:
        out = tuple(t[0] for t in out)  # type: ignore[assignment]
    return SinkhornResult(*out, _problem=problem)


def _canonical(
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    a: Tensor | None,
    b: Tensor | None,
    cost: str,
    max_iter: int,
    tol: float | None,
    init: tuple[Tensor, Tensor] | None,
    backend: str | None,
    check_finite: bool,
) -> _Problem:
    for name, t in (("x", x), ("y", y)):
        if not isinstance(t, Tensor):
            raise TypeError(f"sinkhorn: {name} must be a Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"sinkhorn: {name} must have a floating dtype, got {t.dtype}")
        if t.ndim not in (2, 3):
            raise ValueError(f"sinkhorn: {name} must be [N, D] or [B, N, D], got {tuple(t.shape)}")
        if 0 in t.shape[-2:]:
            raise ValueError(f"sinkhorn: {name} must have points and D > 0, got {tuple(t.shape)}")
    if x.dtype != y.dtype:
        raise TypeError(f"sinkhorn: y must have the dtype of x, {x.dtype}, got {y.dtype}")
    if y.device != x.device:
        raise ValueError(f"sinkhorn: y must be on {x.device} with x, got {y.device}")
    if y.ndim != x.ndim or y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"sinkhorn: y must match x {tuple(x.shape)} except in its points, got {tuple(y.shape)}"
        )
    if cost not in reference.COSTS:
        raise ValueError(f"sinkhorn: cost must be one of {reference.COSTS}, got {cost!r}")
    if max_iter < 1:
        raise ValueError(f"sinkhorn: max_iter must be at least 1, got {max_iter}")
    if tol is not None and not tol >= 0:
        raise ValueError(f"sinkhorn: tol must be None or at least 0, got {tol}")
    chosen = choose_backend("sinkhorn", x.device.type, backend)

    batched = x.ndim == 3
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    lead = x.shape[:-2]
    # Reading values costs a synchronisation on a GPU and breaks a compiled graph.
    read = (check_finite or x.device.type == "cpu") and not torch.compiler.is_compiling()
    weights = [
        _weights(name, w, (*lead, n), x, dtype, read)
        for name, w, n in (("a", a, x.shape[-2]), ("b", b, y.shape[-2]))
    ]
    e = _eps(eps, lead, x, dtype, read)
    g0 = None if init is None else _initial(init, lead, x, y, dtype)
    if check_finite:
        for name, checked in (("x", x), ("y", y), ("init g", g0)):
            bad = 0 if checked is None else int((~torch.isfinite(checked)).sum())
            if bad:
                raise ValueError(f"sinkhorn: {name} must be finite, got {bad} NaN or inf values")
    x, y = x.to(dtype), y.to(dtype)
    if not batched:
        x, y, weights = x[None], y[None], [w[None] for w in weights]
        g0 = None if g0 is None else g0[None]
    return _Problem(x, y, weights[0], weights[1], e, g0, cost, chosen, batched)


def _weights(
    name: str,
    w: Tensor | None,
    shape: tuple[int, ...],
    x: Tensor,
    dtype: torch.dtype,
    read: bool,
) -> Tensor:
    if w is None:
        return x.new_full(shape, 1 / shape[-1], dtype=dtype)
    if not isinstance(w, Tensor) or not w.is_floating_point():
        got = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"sinkhorn: {name} must be a floating Tensor, got {got}")
    if w.device != x.device:
        raise ValueError(f"sinkhorn: {name} must be on {x.device} with x, got {w.device}")
    if tuple(w.shape) != shape:
        raise ValueError(f"sinkhorn: {name} must have shape {shape}, got {tuple(w.shape)}")
    if read and w.numel() > 0:
        low = w.detach().min().item()
        if low < 0:
            raise ValueError(f"sinkhorn: {name} must not be negative, got {low}")
        total = w.detach().double().sum(-1)
        worst = total.flatten()[(total - 1).abs().argmax()].item()
        if not abs(worst - 1) <= _MASS_TOLERANCE.get(w.dtype, 3e-2):
            raise ValueError(f"sinkhorn: {name} must sum to 1, got a sum of {worst}")
    return w.to(dtype)


def _eps(
    eps: float | Tensor, lead: torch.Size, x: Tensor, dtype: torch.dtype, read: bool
) -> Tensor:
    count = lead[0] if lead else 1
    if not isinstance(eps, Tensor):
        if not 0 < eps < float("inf"):
            raise ValueError(f"sinkhorn: eps must be positive and finite, got {eps}")
        return x.new_full((count,), eps, dtype=dtype)
    if eps.requires_grad:
        raise ValueError("sinkhorn: eps must not require a gradient, got one that does")
    if eps.device != x.device and eps.ndim > 0:
        raise ValueError(f"sinkhorn: eps must be on {x.device} with x, got {eps.device}")
    if eps.ndim > 0 and tuple(eps.shape) != tuple(lead):
        raise ValueError(f"sinkhorn: eps must have shape {tuple(lead)}, got {tuple(eps.shape)}")
    if read and not bool(((eps > 0) & eps.isfinite()).all()):
        raise ValueError(f"sinkhorn: eps must be positive and finite, got {eps.min().item()}")
    return eps.to(device=x.device, dtype=dtype).expand(count)


def _initial(
    init: tuple[Tensor, Tensor], lead: torch.Size, x: Tensor, y: Tensor, dtype: torch.dtype
) -> Tensor:
    for name, t, points in (("f", init[0], x), ("g", init[1], y)):
        expected = (*lead, points.shape[-2])
        if tuple(t.shape) != expected:
            raise ValueError(f"sinkhorn: init {name} must be {expected}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"sinkhorn: init {name} must be on {x.device}, got {t.device}")
    return init[1].detach().to(dtype)


def _solve(backend: str) -> Callable[..., _Outputs]:
    if backend == "reference":
        return reference.solve
    op = _namespace(backend).sinkhorn.default

    def solve(
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        eps: Tensor,
        g0: Tensor | None,
        *,
        cost: str,
        max_iter: int,
        tol: float | None,
    ) -> _Outputs:
        out: _Outputs = op(x, y, a, b, eps, g0, reference.COSTS.index(cost), max_iter, tol)
        return out

    return solve


def _transport(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if backend == "reference":
        return reference.transport
    op = _namespace(backend).sinkhorn_transport.default

    def transport(
        x: Tensor,
        y: Tensor,
        f: Tensor,
        g: Tensor,
        b: Tensor,
        eps: Tensor,
        v: Tensor,
        *,
        cost: str,
    ) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = op(x, y, f, g, b, eps, v, reference.COSTS.index(cost))
        return out

    return transport


def _namespace(backend: str) -> Any:
    if backend == "triton":
        importlib.import_module("fewstep.kernels.sinkhorn")
        register_autograd("fewstep_triton")
        return torch.ops.fewstep_triton
    return torch.ops.fewstep


_registered: set[str] = set()


def register_autograd(namespace: str) -> None:
    """Attach fake kernels and gradients to `sinkhorn*` of a namespace of torch.ops, once."""
    if namespace in _registered:
        return
    _registered.add(namespace)
    ops = getattr(torch.ops, namespace)

    def solve_setup(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
        x, y, a, b, eps, _, cost, _, _ = inputs
        f, g, _, residual, iterations, converged = output
        ctx.mark_non_differentiable(f, g, residual, iterations, converged)
        ctx.save_for_backward(x, y, a, b, f, g, eps)
        ctx.cost = cost

    def solve_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, a, b, f, g, eps = ctx.saved_tensors
        w = grads[2][:, None]  # type: ignore[index]
        need = ctx.needs_input_grad
        gradient = ops.sinkhorn_grad.default
        grad_x = w[..., None] * gradient(x, y, f, g, a, b, eps, ctx.cost) if need[0] else None
        grad_y = w[..., None] * gradient(y, x, g, f, b, a, eps, ctx.cost) if need[1] else None
        return grad_x, grad_y, w * f, w * g, None, None, None, None, None

    def transport_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, y, f, g, b, eps, _, cost = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, y, f, g, b, eps)
        ctx.cost = cost

    def transport_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, f, g, b, eps = ctx.saved_tensors
        ones = torch.ones_like(f)
        grad_v = ops.sinkhorn_transport.default(y, x, g, f, ones, eps, grads[0], ctx.cost)[0]
        return None, None, None, None, None, None, b[..., None] * grad_v, None

    def refuse(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "sinkhorn: kernels have no second derivative of value; backend='reference' has"
        )

    register = torch.library.register_autograd
    register(f"{namespace}::sinkhorn", solve_backward, setup_context=solve_setup)
    register(f"{namespace}::sinkhorn_transport", transport_backward, setup_context=transport_setup)
    register(f"{namespace}::sinkhorn_grad", refuse)

    def solve_fake(
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        eps: Tensor,
        g0: Tensor | None,
        cost: int,
        max_iter: int,
        tol: float | None,
    ) -> _Outputs:
        batch = x.shape[0]
        return (
            x.new_empty((batch, x.shape[1])),
            x.new_empty((batch, y.shape[1])),
            x.new_empty((batch,)),
            x.new_empty((batch,)),
            x.new_empty((batch,), dtype=torch.int64),
            x.new_empty((batch,), dtype=torch.bool),
        )

    def transport_fake(
        x: Tensor,
        y: Tensor,
        f: Tensor,
        g: Tensor,
        b: Tensor,
        eps: Tensor,
        v: Tensor,
        cost: int,
    ) -> tuple[Tensor, Tensor]:
        return x.new_empty((*x.shape[:2], v.shape[2])), x.new_empty(x.shape[:2])

    def gradient_fake(
        x: Tensor,
        y: Tensor,
        f: Tensor,
        g: Tensor,
        a: Tensor,
        b: Tensor,
        eps: Tensor,
        cost: int,
    ) -> Tensor:
        return x.new_empty(x.shape)

    for name, fake in (
        ("sinkhorn", solve_fake),
        ("sinkhorn_transport", transport_fake),
        ("sinkhorn_grad", gradient_fake),
    ):
        torch.library.register_fake(f"{namespace}::{name}", fake)


register_autograd("fewstep")
