"""The kernels behind the public ops: canonical tensors in, whichever backend computes.

Shapes are those of `fewstep.reference.sinkhorn`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep._library import is_cuda, shared_memory
from fewstep._torch import below_autograd
from fewstep.reference import part as reference_part
from fewstep.reference import sinkhorn as reference
from fewstep.reference.costs import COSTS
from fewstep.reference.sinkhorn import PRECISIONS, Inputs, Outputs, Points


def resident(points: Points) -> bool:
    """Whether the CUDA kernels keep these problems on chip, with all options.

    Segments count: those that are too large are solved all the same, slowly.
    """
    x, y = points.x, points.y
    if not is_cuda(x.device) or x.dtype != torch.float32:
        return False
    if "cuda" not in COSTS[points.cost].backends or points.labels is not None:
        return False
    n, m = x.shape[1], y.shape[1]
    if points.segments is not None or (n <= 128 and m <= 128):
        return True
    # A block has up to 96 rows, and each of the 8 of a cluster 64.
    rows = 512 if torch.cuda.get_device_properties(x.device).major in (9, 10) else 96
    return m <= 256 and n <= rows and shared_memory(x.device) > 130 * 1024


def arithmetic(x: Tensor, precision: str) -> str:
    """How the GPU kernels find the distances of points x `[.., D]`."""
    dots = x.dtype == torch.float32 and x.shape[-1] > 16
    return precision if dots and precision != "float32" else "differences"


def group(points: Points) -> tuple[str, ...]:
    """The kernels of a call, for `fewstep.verification`: problems of a block, a cluster, larger."""
    x, y = points.x, points.y
    n, m = x.shape[1], y.shape[1]
    size = "large"
    if points.segments is not None:
        size = "segments"
    elif n <= 512 and m <= 256:
        size = "small" if n <= 128 and m <= 128 else "medium"
    dtype = str(x.dtype).removeprefix("torch.")
    return "sinkhorn", dtype, size, arithmetic(x, points.precision)


def solve(backend: str, inputs: Inputs) -> Outputs:
    """`f, g, value, residual, iterations, converged` of `fewstep.reference.sinkhorn.solve`."""
    out: Outputs
    if (python := _in_python(backend)) is not None:
        out = python.solve(inputs)
    elif backend == "triton":
        out = _triton().sinkhorn.default(*_solve_arguments(inputs, _cost))
    else:
        op = torch.ops.fewstep.sinkhorn.default
        out = below_autograd(op, *_solve_arguments(inputs, _geometry), _closing(inputs))
    return out


def solve_with_gradient(
    backend: str, inputs: Inputs, need: tuple[bool, bool]
) -> tuple[Outputs, tuple[Tensor | None, Tensor | None]]:
    """`solve`, and the value's gradients for x and y where they are needed and cheaper now.

    Of a problem with itself, a single potential, that for x is the gradient for both its roles.
    """
    if backend != "cpp" or not any(need):
        return solve(backend, inputs), (None, None)
    op = torch.ops.fewstep.sinkhorn_with_grad.default
    arguments = _solve_arguments(inputs, _geometry)
    *out, grad_x, grad_y = below_autograd(op, *arguments, _closing(inputs), *need)
    f, g, value, residual, iterations, converged = out
    grads = (grad_x if need[0] else None, grad_y if need[1] else None)
    return (f, g, value, residual, iterations, converged), grads


def _solve_arguments(
    inputs: Inputs, described: Callable[[Points], tuple[Any, ...]]
) -> tuple[Any, ...]:
    i, p, s = inputs, inputs.points, inputs.schedule
    tensors = (p.x, p.y, i.a, i.b, i.eps, i.f0, i.g0)
    steps = (s.max_iter, s.tol, s.start, s.factor, s.temperatures)
    how = (s.simultaneous, s.single, s.memory_limit, PRECISIONS.index(p.precision))
    return *tensors, *described(p), *steps, *s.rho, s.relax, *how


def _closing(inputs: Inputs) -> bool:
    return inputs.schedule.simultaneous and inputs.schedule.closing


def transport(
    backend: str, points: Points, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """`sum_j p_ij v_j` and `sum_j p_ij` of `fewstep.reference.sinkhorn.transport`."""
    if (python := _in_python(backend)) is not None:
        return python.transport(points, f, g, b, eps, v)  # type: ignore[no-any-return]
    tensors = (points.x, points.y, f, g, b, eps, v)
    out: tuple[Tensor, Tensor]
    if backend == "triton":
        how = (*_cost(points), PRECISIONS.index(points.precision))
        out = _triton().sinkhorn_transport.default(*tensors, *how)
    else:
        op = torch.ops.fewstep.sinkhorn_transport.default
        out = below_autograd(op, *tensors, *_geometry(points))
    return out


def gradient(
    backend: str, points: Points, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor
) -> Tensor:
    """`sum_j P_ij dC_ij/dx_i` of `fewstep.reference.sinkhorn.gradient`."""
    if (python := _in_python(backend)) is not None:
        return python.gradient(points, f, g, a, b, eps)  # type: ignore[no-any-return]
    tensors = (points.x, points.y, f, g, a, b, eps)
    out: Tensor
    if backend == "triton":
        how = (*_cost(points), PRECISIONS.index(points.precision))
        out = _triton().sinkhorn_grad.default(*tensors, *how)
    else:
        op = torch.ops.fewstep.sinkhorn_grad.default
        out = below_autograd(op, *tensors, *_geometry(points))
    return out


def part(
    backend: str,
    points: Points,
    a: Tensor,
    h: Tensor,
    f: Tensor | None,
    scale: float,
    damping: float,
    target: float,
    want_columns: bool,
) -> reference_part.Part:
    """`fewstep.reference.part.part`, of any number of rows."""
    if points.x.shape[1] == 0:
        return a, h.new_zeros(len(h) if want_columns else 0), a.new_zeros(3, dtype=torch.float64)
    numbers = (scale, damping, target, want_columns)
    if backend == "reference":
        return reference_part.part(points, a, h, f, *numbers)
    op, cost = torch.ops.fewstep.sinkhorn_part.default, COSTS[points.cost].index
    out: reference_part.Part = below_autograd(op, points.x, points.y, a, h, f, cost, *numbers)
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
    op = torch.ops.fewstep_triton.sinkhorn_hessian.default
    out: Tensor = op(points.x, points.y, *u, f, g, a, b, *change, eps, *_cost(points), sums)
    return out


def _cost(points: Points) -> tuple[int, int | None]:
    return COSTS[points.cost].index, points.diagonal


def _geometry(points: Points) -> tuple[Any, ...]:
    cu_x, cu_y = (None, None) if points.segments is None else points.segments
    lx, ly = (None, None) if points.labels is None else points.labels
    return points.matrix, cu_x, cu_y, lx, ly, points.label_cost, *_cost(points)


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

    def part_fake(x: Tensor, y: Tensor, a: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        columns = h.new_empty(len(h) if rest[-1] else 0)
        return torch.empty_like(a), columns, h.new_empty(3, dtype=torch.float64)

    for name, fake in (
        ("sinkhorn", solve_fake),
        ("sinkhorn_transport", transport_fake),
        ("sinkhorn_grad", gradient_fake),
        *([("sinkhorn_with_grad", solve_with_gradient_fake)] if full else []),
        *([("sinkhorn_part", part_fake)] if full else []),
    ):
        torch.library.register_fake(f"{namespace}::{name}", fake)
        torch.library.register_autograd(f"{namespace}::{name}", refuse)


register("fewstep")
