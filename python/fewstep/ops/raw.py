"""The kernels behind the public ops: canonical tensors in, whichever backend computes.

Shapes are those of `fewstep.reference.sinkhorn`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fewstep.reference import sinkhorn as reference
from fewstep.reference.sinkhorn import Points, Schedule

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def solve(
    backend: str,
    points: Points,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    schedule: Schedule,
) -> Outputs:
    """`f, g, value, residual, iterations, converged` of `fewstep.reference.sinkhorn.solve`."""
    s = schedule
    if backend == "reference":
        return reference.solve(points, a, b, eps, f0, g0, s)
    if backend == "keops":
        from fewstep.ops import keops

        return keops.solve(points, a, b, eps, f0, g0, s)
    x, y = points.x, points.y
    if backend == "triton":
        cost = reference.COSTS.index(points.cost)
        op = _triton().sinkhorn.default
        out: Outputs = op(x, y, a, b, eps, g0, cost, s.max_iter, s.tol)
        return out
    out = torch.ops.fewstep.sinkhorn.default(
        *(x, y, a, b, eps, f0, g0, *_geometry(points), s.max_iter, s.tol, s.start, s.factor),
        *(s.temperatures, *s.rho, s.relax, s.simultaneous, s.single, s.memory_limit),
    )
    f, g, value, residual, iterations, converged = out
    return f, g, value, residual, iterations, converged


def transport(
    backend: str, points: Points, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """`sum_j p_ij v_j` and `sum_j p_ij` of `fewstep.reference.sinkhorn.transport`."""
    if backend == "reference":
        return reference.transport(points, f, g, b, eps, v)
    if backend == "keops":
        from fewstep.ops import keops

        return keops.transport(points, f, g, b, eps, v)
    x, y = points.x, points.y
    out: tuple[Tensor, Tensor]
    if backend == "triton":
        cost = reference.COSTS.index(points.cost)
        out = _triton().sinkhorn_transport.default(x, y, f, g, b, eps, v, cost)
    else:
        op = torch.ops.fewstep.sinkhorn_transport.default
        out = op(x, y, f, g, b, eps, v, *_geometry(points))
    return out


def gradient(
    backend: str, points: Points, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor
) -> Tensor:
    """`sum_j P_ij dC_ij/dx_i` of `fewstep.reference.sinkhorn.gradient`."""
    if backend == "reference":
        return reference.gradient(points, f, g, a, b, eps)
    if backend == "keops":
        from fewstep.ops import keops

        return keops.gradient(points, f, g, a, b, eps)
    x, y = points.x, points.y
    out: Tensor
    if backend == "triton":
        cost = reference.COSTS.index(points.cost)
        out = _triton().sinkhorn_grad.default(x, y, f, g, a, b, eps, cost)
    else:
        out = torch.ops.fewstep.sinkhorn_grad.default(x, y, f, g, a, b, eps, *_geometry(points))
    return out


def _geometry(points: Points) -> tuple[Any, ...]:
    cu_x, cu_y = (None, None) if points.segments is None else points.segments
    lx, ly = (None, None) if points.labels is None else points.labels
    cost = reference.COSTS.index(points.cost)
    return points.matrix, cu_x, cu_y, lx, ly, points.label_cost, cost, points.diagonal


def _points(x: Tensor, y: Tensor, geometry: tuple[Any, ...]) -> Points:
    matrix, cu_x, cu_y, lx, ly, label_cost, cost, diagonal = geometry
    segments = None if cu_x is None else (cu_x, cu_y)
    labels = None if lx is None else (lx, ly)
    name = reference.COSTS[cost]
    return Points(x, y, name, matrix, segments, labels, label_cost, diagonal)


def _triton() -> Any:
    importlib.import_module("fewstep.kernels.sinkhorn")
    register("fewstep_triton")
    return torch.ops.fewstep_triton


_GEOMETRY = 8  # arguments that `_geometry` makes
_registered: set[str] = set()


def register(namespace: str) -> None:
    """Attach fake kernels and gradients to `sinkhorn*` of a namespace of torch.ops, once.

    The ops of "fewstep" take what `_geometry` makes, those of "fewstep_triton" a cost alone.
    """
    if namespace in _registered:
        return
    _registered.add(namespace)
    full = namespace == "fewstep"
    backend = "cpp" if full else "triton"  # "fewstep" serves CUDA tensors as well

    def geometry(inputs: tuple[Any, ...], first: int) -> tuple[Any, ...]:
        if full:
            return inputs[first : first + _GEOMETRY]
        return (None, None, None, None, None, None, inputs[first], None)

    def leads(x: Tensor, eps: Tensor, shape: tuple[Any, ...]) -> Any:
        """Rows of the potentials: problems, or temperatures of flat points."""
        cu_x = shape[1]
        return eps.shape[0] if cu_x is None else eps.shape[0] // (cu_x.shape[0] - 1)

    def solve_setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        x, y, a, b, eps = inputs[:5]
        f, g, _, residual, iterations, converged = output
        ctx.mark_non_differentiable(f, g, residual, iterations, converged)
        ctx.geometry = geometry(inputs, 7 if full else 6)
        ctx.rho = inputs[20:22] if full else (None, None)
        ctx.count = len(inputs)
        ctx.save_for_backward(x, y, a, b, f, g, eps)

    def solve_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, a, b, f, g, eps = ctx.saved_tensors
        points = _points(x, y, ctx.geometry)
        need = ctx.needs_input_grad
        grad = grads[2]
        assert grad is not None
        T = eps.shape[0] // max(points.count, 1)
        out: list[Tensor | None] = [None] * ctx.count

        def weighted(t: Tensor, cu: Tensor | None) -> Tensor:
            """`[B, n, ..]`: times the gradient of its problem, summed over temperatures."""
            w = _spread(grad, T, cu, t.shape[1])
            t = w.reshape(*w.shape, *[1] * (t.ndim - 2)) * t
            if cu is not None:
                return t.sum(0, keepdim=True)
            return t.reshape(points.count, T, *t.shape[1:]).sum(1)

        cu_x, cu_y = ctx.geometry[1:3]
        if need[0]:
            out[0] = weighted(gradient(backend, points, f, g, a, b, eps), cu_x)
        if need[1]:
            out[1] = weighted(gradient(backend, points.swapped(), g, f, b, a, eps), cu_y)
        for i, potential, other, rho, cu, cu_other in (
            (2, f, b, ctx.rho[0], cu_x, cu_y),
            (3, g, a, ctx.rho[1], cu_y, cu_x),
        ):
            if not need[i]:
                continue
            n = potential.shape[1]
            mass = _spread(_repeat(_total(other, cu_other), T), T, cu, n)
            e = _spread(eps, T, cu, n)
            grad_weight = reference.weight_gradient(potential, mass, e, rho, ctx.rho)
            out[i] = weighted(grad_weight, cu)
        if full and need[7]:
            C, f_, g_ = points.costs(), f[..., :, None], g[..., None, :]
            plan = (
                _repeat(a[..., :, None] * b[..., None, :], T)
                * ((f_ + g_ - _repeat(C, T)) / eps[:, None, None]).exp()
            )
            out[7] = weighted(plan, None)
        return tuple(out)

    def transport_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, y, f, g, b, eps, _, *_ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.geometry, ctx.count = geometry(inputs, 7), len(inputs)
        ctx.save_for_backward(x, y, f, g, b, eps)

    def transport_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, f, g, b, eps = ctx.saved_tensors
        swapped = _points(x, y, ctx.geometry).swapped()
        ones = torch.ones_like(x[..., 0])
        grad_v = transport(backend, swapped, g, f, ones, eps, grads[0])[0]
        T = 1 if swapped.segments is not None else eps.shape[0] // max(swapped.count, 1)
        out: list[Tensor | None] = [None] * ctx.count
        out[6] = _repeat(b, T)[..., None] * grad_v
        return tuple(out)

    def refuse(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "sinkhorn: kernels have no second derivative of value; backend='reference' has"
        )

    register = torch.library.register_autograd
    register(f"{namespace}::sinkhorn", solve_backward, setup_context=solve_setup)
    register(f"{namespace}::sinkhorn_transport", transport_backward, setup_context=transport_setup)
    register(f"{namespace}::sinkhorn_grad", refuse)

    def solve_fake(*inputs: Any) -> Outputs:
        x, y, _, _, eps = inputs[:5]
        lead = leads(x, eps, geometry(inputs, 7 if full else 6))
        numbers = (eps.shape[0],)
        return (
            x.new_empty((lead, x.shape[1])),
            x.new_empty((lead, y.shape[1])),
            x.new_empty(numbers),
            x.new_empty(numbers),
            x.new_empty(numbers, dtype=torch.int64),
            x.new_empty(numbers, dtype=torch.bool),
        )

    def transport_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
        x, eps, v = inputs[0], inputs[5], inputs[6]
        lead = leads(x, eps, geometry(inputs, 7))
        return x.new_empty((lead, x.shape[1], v.shape[2])), x.new_empty((lead, x.shape[1]))

    def gradient_fake(*inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        eps = inputs[6]
        return x.new_empty((leads(x, eps, geometry(inputs, 7)), *x.shape[1:]))

    for name, fake in (
        ("sinkhorn", solve_fake),
        ("sinkhorn_transport", transport_fake),
        ("sinkhorn_grad", gradient_fake),
    ):
        torch.library.register_fake(f"{namespace}::{name}", fake)


def _spread(t: Tensor, T: int, cu: Tensor | None, n: int) -> Tensor:
    """A number for each problem `[P]`, to go with points: `[P, 1]`, or flat `[T, n]`."""
    if cu is None:
        return t[:, None]
    problem = torch.bucketize(torch.arange(n, device=cu.device), cu[1:], right=True)
    return t.reshape(-1, T)[problem].mT


def _total(w: Tensor, cu: Tensor | None) -> Tensor:
    """Mass of each point cloud, `[B]`."""
    if cu is None:
        return w.sum(-1)
    problem = torch.bucketize(torch.arange(w.shape[1], device=cu.device), cu[1:], right=True)
    return w.new_zeros(cu.shape[0] - 1).index_add(0, problem, w[0])


def _repeat(t: Tensor, T: int) -> Tensor:
    return t if T == 1 else t.repeat_interleave(T, 0)


register("fewstep")
