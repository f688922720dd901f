"""What the autograd Functions share: vmap, gradients placed by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep._torch import without_autocast
from fewstep.ops.sinkhorn.problem import (
    VARIABLES,
    Constants,
    Flags,
    Problem,
    Tensors,
    to_points,
    total,
    transposed,
)


def call(function: Any, *args: Any) -> Any:
    return function.apply(*args)


FIELDS = len(Problem._fields)
Grads = tuple[Tensor | None, ...]


class Batched(torch.autograd.Function):
    """A Function of `lead` tensors and a Problem, whose vmap is a larger batch.

    Nothing of it is lowered by autocast, in whichever region a rule is called.
    """

    lead = 0

    def __init_subclass__(cls) -> None:
        for name in cls.__dict__.keys() & {"forward", "backward", "jvp"}:
            setattr(cls, name, staticmethod(without_autocast(getattr(cls, name))))

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        count, field = info.batch_size, cls.lead + Problem._fields.index("segment_x")
        ragged = args[field] is not None

        def mapped(t: Tensor, dim: int | None) -> Tensor:
            return t.expand(count, *t.shape) if dim is None else t.movedim(dim, 0)

        def fold(t: Tensor) -> Tensor:  # [V, B, ..] -> [V B, ..], flat points [V, T, N] -> [T, V N]
            if ragged and t.ndim > 2:
                return t.movedim(0, 1).flatten(1, 2)
            return t.flatten(0, 1)

        def unfold(t: Tensor) -> Tensor:
            if ragged and t.ndim > 1:
                return t.reshape(len(t), count, t.shape[1] // count, *t.shape[2:]).movedim(1, 0)
            return t.reshape(count, t.shape[0] // count, *t.shape[1:])

        # Problem i of the v-th call begins behind all points of the calls before.
        def join(cu: Tensor, points: int) -> Tensor:  # [V, B + 1] -> [V B + 1]
            starts = torch.arange(count, device=cu.device)[:, None] * points
            return torch.cat([cu[0, :1], (cu[:, 1:] + starts).flatten()])

        folded = list(args)
        for i, (t, dim) in enumerate(zip(args, in_dims, strict=True)):
            if not isinstance(t, Tensor):
                continue
            name = (("",) * cls.lead + Problem._fields + ("shared",) * len(args))[i]
            if name in ("label_cost", "shared"):
                if dim is not None:
                    what = "label_cost" if name == "label_cost" else "anneal"
                    raise NotImplementedError(f"sinkhorn: {what} must not be mapped by vmap")
            elif name in ("segment_x", "segment_y"):
                k = cls.lead + (0 if name == "segment_x" else 1)
                folded[i] = join(mapped(t, dim), mapped(args[k], in_dims[k]).shape[2])
            else:
                folded[i] = fold(mapped(t, dim))
        out = call(cls, *folded)
        if isinstance(out, Tensor):
            return unfold(out), 0
        return tuple(unfold(t) for t in out), (0,) * len(out)


def save(ctx: Any, tensors: Any) -> None:
    """For reverse and forward mode, which hand over None, not zeros, for what has no derivative."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


def placed(parts: Any, need: Flags) -> Grads:
    """The parts that were needed, each in its place among the variables."""
    it = iter(parts)
    return tuple(next(it) if needed else None for needed in need)


def completed(known: Any, need: Flags, compute: Callable[[Flags], Tensors]) -> Tensors:
    """The needed gradients, of which the first may be known."""
    have = (*known, *[None] * (VARIABLES - len(known)))
    unknown = tuple(n and k is None for n, k in zip(need, have, strict=True))
    it = iter(compute(unknown) if any(unknown) else ())
    return tuple(next(it) if k is None else k for n, k in zip(need, have, strict=True) if n)


def scaled(w: Tensor, parts: Tensors, p: Problem, need: Flags) -> Tensors:
    """`w [B]` times per-point parts of the variables that were needed."""
    out = []
    for part, k in zip(parts, (k for k in range(VARIABLES) if need[k]), strict=True):
        weight = to_points(w, part, (p.segment_x, p.segment_y)[k % 2] if k < 4 else None)
        out.append(weight.reshape(*weight.shape, *[1] * (part.ndim - 2)) * part)
    return tuple(out)


def inner(parts: Tensors, tangents: Any, p: Problem) -> Tensor:
    """Inner products of gradients and directions, summed for every problem, `[B]`."""
    it = iter(parts)
    terms = [
        total(next(it) * t, (p.segment_x, p.segment_y)[k % 2] if k < 4 else None)
        for k, t in enumerate(tangents)
        if t is not None
    ]
    return torch.stack(terms).sum(0)


class Refuse(torch.autograd.Function):
    """Identity without a derivative: an error where one is asked for, not zeros."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor:
        raise NotImplementedError("sinkhorn: value has no third derivative")

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None) -> Tensor:
        raise NotImplementedError("sinkhorn: value has no third derivative")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor) -> tuple[Tensor, int | None]:
        return call(Refuse, x), in_dims[0]


class Once(Batched):
    """A derivative that has no derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "sinkhorn: potentials, and products through the plan, have no second derivative"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return Once.backward(ctx)


def transpose(p: Problem, c: Constants) -> tuple[Problem, Constants]:
    """With which `product` is `sum_i e_ij u_i`, and 0 for y_j without weight.

    For two points without weight e may overflow.
    """
    q, d = transposed(p._replace(g=torch.where(p.b > 0, p.g, -1e30)), c)
    return q._replace(b=torch.ones_like(q.b)), d
