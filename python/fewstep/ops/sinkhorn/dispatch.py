"""The kernels behind the public ops: canonical tensors in, whichever backend computes.

Shapes are those of `fewstep.reference.sinkhorn`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fewstep._library import is_cuda, shared_memory
from fewstep.ops.sinkhorn.inputs import PRECISIONS
from fewstep.reference import sinkhorn as reference
from fewstep.reference.sinkhorn import Points, Schedule

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def resident(points: Points) -> bool:
    """Whether the CUDA kernels keep these problems on chip, with all options.

    Segments count: those that are too large are solved all the same, slowly.
    """
    x, y = points.x, points.y
    if not is_cuda(x.device) or x.dtype != torch.float32:
        return False
    if points.cost not in reference.COSTS[:3] or points.labels is not None:
        return False
    n, m = x.shape[1], y.shape[1]
    if points.segments is not None or (n <= 128 and m <= 128):
        return True
    # A block has up to 96 rows, and each of the 8 of a cluster 64.
    rows = 512 if torch.cuda.get_device_properties(x.device).major in (9, 10) else 96
    return m <= 256 and n <= rows and shared_memory(x.device) > 130 * 1024


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
    if (python := _in_python(backend)) is not None:
        return python.solve(points, a, b, eps, f0, g0, s)  # type: ignore[no-any-return]
    if backend == "triton":
        x, y, cost = points.x, points.y, reference.COSTS.index(points.cost)
        out: Outputs = _triton().sinkhorn.default(
            *(x, y, a, b, eps, f0, g0, cost, points.diagonal, s.max_iter, s.tol),
            *(s.start, s.factor, s.temperatures, *s.rho, s.relax, s.simultaneous, s.single),
            *(s.memory_limit, PRECISIONS.index(points.precision)),
        )
        return out
    return _direct(  # type: ignore[no-any-return]
        torch.ops.fewstep.sinkhorn.default, *_solve_arguments(points, a, b, eps, f0, g0, s)
    )


def solve_with_gradient(
    backend: str,
    points: Points,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    schedule: Schedule,
    need: tuple[bool, bool],
) -> tuple[Outputs, tuple[Tensor | None, Tensor | None]]:
    """`solve`, and the value's gradients for x and y where they are needed and cheaper now.

    Of a problem with itself, a single potential, that for x is the gradient for both its roles.
    """
    args = (points, a, b, eps, f0, g0, schedule)
    if backend != "cpp" or not any(need):
        return solve(backend, *args), (None, None)
    op = torch.ops.fewstep.sinkhorn_with_grad.default
    *out, grad_x, grad_y = _direct(op, *_solve_arguments(*args), *need)
    f, g, value, residual, iterations, converged = out
    grads = (grad_x if need[0] else None, grad_y if need[1] else None)
    return (f, g, value, residual, iterations, converged), grads


def _solve_arguments(
    points: Points,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    s: Schedule,
) -> tuple[Any, ...]:
    tensors = (points.x, points.y, a, b, eps, f0, g0, *_geometry(points))
    steps = (s.max_iter, s.tol, s.start, s.factor, s.temperatures)
    how = (s.simultaneous, s.single, s.memory_limit, PRECISIONS.index(points.precision))
    return *tensors, *steps, *s.rho, s.relax, *how


def transport(
    backend: str, points: Points, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """`sum_j p_ij v_j` and `sum_j p_ij` of `fewstep.reference.sinkhorn.transport`."""
    if (python := _in_python(backend)) is not None:
        return python.transport(points, f, g, b, eps, v)  # type: ignore[no-any-return]
    x, y = points.x, points.y
    out: tuple[Tensor, Tensor]
    if backend == "triton":
        how = (reference.COSTS.index(points.cost), points.diagonal)
        precision = PRECISIONS.index(points.precision)
        out = _triton().sinkhorn_transport.default(x, y, f, g, b, eps, v, *how, precision)
    else:
        op = torch.ops.fewstep.sinkhorn_transport.default
        out = _direct(op, x, y, f, g, b, eps, v, *_geometry(points))
    return out


def gradient(
    backend: str, points: Points, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor
) -> Tensor:
    """`sum_j P_ij dC_ij/dx_i` of `fewstep.reference.sinkhorn.gradient`."""
    if (python := _in_python(backend)) is not None:
        return python.gradient(points, f, g, a, b, eps)  # type: ignore[no-any-return]
    x, y = points.x, points.y
    out: Tensor
    if backend == "triton":
        how = (reference.COSTS.index(points.cost), points.diagonal)
        precision = PRECISIONS.index(points.precision)
        out = _triton().sinkhorn_grad.default(x, y, f, g, a, b, eps, *how, precision)
    else:
        op = torch.ops.fewstep.sinkhorn_grad.default
        out = _direct(op, x, y, f, g, a, b, eps, *_geometry(points))
    return out


def hessian(
    points: Points,
    u: tuple[Tensor, Tensor],
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    change: tuple[Tensor, Tensor, Tensor, Tensor],
    eps: Tensor,
    sums: bool,
) -> Tensor:
    """The derivative of `gradient` along u and `change` (of f, g, a, b), or sums; by Triton.

    See `fewstep.kernels.sinkhorn.hessian`.
    """
    importlib.import_module("fewstep.kernels.sinkhorn.hessian")
    how = (reference.COSTS.index(points.cost), points.diagonal, sums)
    op = torch.ops.fewstep_triton.sinkhorn_hessian.default
    out: Tensor = op(points.x, points.y, *u, f, g, a, b, *change, eps, *how)
    return out


def _geometry(points: Points) -> tuple[Any, ...]:
    cu_x, cu_y = (None, None) if points.segments is None else points.segments
    lx, ly = (None, None) if points.labels is None else points.labels
    cost = reference.COSTS.index(points.cost)
    return points.matrix, cu_x, cu_y, lx, ly, points.label_cost, cost, points.diagonal


def _direct(op: Any, *args: Any) -> Any:
    """An op past autograd where it has nothing to refuse: its rule, in Python, takes some 20 us."""
    if torch.compiler.is_compiling() or any(
        isinstance(t, Tensor) and t.requires_grad for t in args
    ):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _in_python(backend: str) -> Any:
    """The module of a backend that is no op of torch, or None."""
    if backend == "keops":
        return importlib.import_module("fewstep.ops.sinkhorn.keops")
    return reference if backend == "reference" else None


def _triton() -> Any:
    importlib.import_module("fewstep.kernels.sinkhorn")
    register("fewstep_triton")
    return torch.ops.fewstep_triton


_registered: set[str] = set()


def register(namespace: str) -> None:
    """Attach fake kernels to `sinkhorn*` of a namespace of torch.ops, once, and refuse gradients.

    Left alone, torch returns zeros. The ops of "fewstep" take what `_geometry` makes, those of
    "fewstep_triton" a cost alone.
    """
    if namespace in _registered:
        return
    _registered.add(namespace)
    full = namespace == "fewstep"

    def leads(x: Tensor, eps: Tensor, cu_x: Tensor | None) -> Any:
        """Rows of the potentials: problems, or temperatures of flat points."""
        return eps.shape[0] if cu_x is None else eps.shape[0] // (cu_x.shape[0] - 1)

    def refuse(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"torch.ops.{namespace}.sinkhorn* have no gradients; what fewstep.sinkhorn returns has"
        )

    def solve_fake(*inputs: Any) -> Outputs:
        x, y, _, _, eps = inputs[:5]
        lead = leads(x, eps, inputs[8] if full else None)
        numbers = (eps.shape[0],)
        return (
            x.new_empty((lead, x.shape[1])),
            x.new_empty((lead, y.shape[1])),
            x.new_empty(numbers),
            x.new_empty(numbers),
            x.new_empty(numbers, dtype=torch.int64),
            x.new_empty(numbers, dtype=torch.bool),
        )

    def solve_with_gradient_fake(*inputs: Any) -> tuple[Tensor, ...]:
        x, y, want_x, want_y = *inputs[:2], *inputs[-2:]
        out = solve_fake(*inputs)
        lead = out[0].shape[0]
        grad_x = x.new_empty((lead if want_x else 0, *x.shape[1:]))
        return *out, grad_x, y.new_empty((lead if want_y else 0, *y.shape[1:]))

    def transport_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
        x, eps, v = inputs[0], inputs[5], inputs[6]
        lead = leads(x, eps, inputs[8] if full else None)
        return x.new_empty((lead, x.shape[1], v.shape[2])), x.new_empty((lead, x.shape[1]))

    def gradient_fake(*inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        eps = inputs[6]
        return x.new_empty((leads(x, eps, inputs[8] if full else None), *x.shape[1:]))

    for name, fake in (
        ("sinkhorn", solve_fake),
        ("sinkhorn_transport", transport_fake),
        ("sinkhorn_grad", gradient_fake),
        *([("sinkhorn_with_grad", solve_with_gradient_fake)] if full else []),
    ):
        torch.library.register_fake(f"{namespace}::{name}", fake)
        torch.library.register_autograd(f"{namespace}::{name}", refuse)


register("fewstep")
