"""The kernel behind `sinkhorn_drift`: canonical tensors in, whichever backend computes.

Shapes are those of `fewstep.reference.drift`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep._library import is_cuda, shared_memory
from fewstep.ops.sinkhorn import dispatch
from fewstep.reference import drift as reference
from fewstep.reference.costs import COSTS
from fewstep.reference.sinkhorn import PRECISIONS, Inputs, Points, Schedule


def resident(x: Tensor, counts: list[int], joint: bool) -> bool:
    """Whether the CUDA kernels keep groups of x `[G, N, D]` and clouds of `counts` on chip."""
    if not is_cuda(x.device) or x.dtype != torch.float32 or x.shape[1] > 64:
        return False
    columns = sum(counts) if joint else max(counts)
    return columns <= (256 if shared_memory(x.device) >= 163 * 1024 else 128)


def group(x: Tensor, counts: list[int], joint: bool, precision: str) -> tuple[str, ...]:
    """The kernels of a call, for `fewstep.verification`."""
    columns = sum(counts) if joint else max(counts)
    size = "small" if x.shape[1] <= 64 and columns <= 256 else "large"
    dtype = str(x.dtype).removeprefix("torch.")
    return "sinkhorn_drift", dtype, size, dispatch.arithmetic(x, precision)


def drift(
    backend: str,
    x: Tensor,
    y: Tensor,
    x_self: Tensor,
    uncond: Tensor | None,
    weights: Tensor,
    guidance: Tensor,
    eps: Tensor,
    *,
    cost: str,
    max_iter: int,
    joint: bool,
    scaled: bool,
    unit: bool,
    diagonal: int | None,
    memory_limit: int,
    precision: str,
) -> reference.Outputs:
    """`fewstep.reference.drift.drift` by a backend."""
    clouds = [t.shape[1] for t in (y, x_self, uncond) if t is not None]
    if backend == "cpp" or (backend == "cuda" and resident(x, clouds, joint)):
        out: reference.Outputs = torch.ops.fewstep.sinkhorn_drift.default(
            *(x, y, x_self, uncond, weights, guidance, eps, COSTS[cost].index),
            *(max_iter, joint, scaled, unit, diagonal, memory_limit),
            PRECISIONS.index(precision),
        )
        return out

    def couple(x: Tensor, z: Tensor, C: Tensor, b: Tensor, e: Tensor) -> Tensor:
        """The iterations by the kernels of `sinkhorn`; it starts at `v = b` unless told."""
        a = torch.full_like(x[..., 0], 1 / x.shape[1])
        e = e.expand(x.shape[0])
        g0 = torch.where(b > 0, -e[:, None] * b.log(), 0.0)
        points = Points(x, z, cost, precision=precision)
        inputs = Inputs(points, a, b, e, None, g0, Schedule(max_iter=max_iter))
        f, g, *_ = dispatch.solve(backend, inputs)
        k = ((f[:, :, None] + g[:, None, :] - C) / e[:, None, None]).exp()
        return torch.where(b[:, None, :] > 0, b[:, None, :] * k, 0.0)

    return reference.drift(
        *(x, y, x_self, uncond, weights, guidance, eps),
        cost=cost,
        max_iter=max_iter,
        joint=joint,
        scaled=scaled,
        unit=unit,
        diagonal=diagonal,
        couple=None if backend == "reference" else couple,
    )


def _fake(
    x: Tensor,
    y: Tensor,
    x_self: Tensor,
    uncond: Tensor | None,
    weights: Tensor,
    guidance: Tensor,
    eps: Tensor,
    cost: int,
    max_iter: int,
    joint: bool,
    scaled: bool,
    unit: bool,
    diagonal: int | None,
    memory_limit: int,
    precision: int,
) -> reference.Outputs:
    groups, count = x.shape[0], eps.shape[0]
    plans = (count, groups, 1 if joint else 2 + (uncond is not None))
    return (
        x.new_empty((1 if unit else count, *x.shape)),
        x.new_empty(()),
        x.new_empty((count,)),
        x.new_empty(plans),
        x.new_empty(plans),
        x.new_empty(plans),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: reference.Outputs) -> None:
    ctx.mark_non_differentiable(*output)  # targets, by definition


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    return (None,) * 15


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], *inputs: Any
) -> tuple[reference.Outputs, tuple[int, ...]]:
    """Call by call, since a call has one scale and one rms."""

    def call(i: int) -> reference.Outputs:
        own = [
            t if axis is None else t.select(axis, i)
            for t, axis in zip(inputs, in_dims, strict=True)
        ]
        out: reference.Outputs = torch.ops.fewstep.sinkhorn_drift.default(*own)
        return out

    calls = [call(i) for i in range(info.batch_size)]
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * 6  # type: ignore[return-value]


torch.library.register_fake("fewstep::sinkhorn_drift", _fake)
torch.library.register_autograd("fewstep::sinkhorn_drift", _backward, setup_context=_setup)
torch.library.register_vmap("fewstep::sinkhorn_drift", _vmap)
