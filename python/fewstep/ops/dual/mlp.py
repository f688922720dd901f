"""Linear layers with activations between them as one op, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.ops.dual import dispatch
from fewstep.ops.dual.program import Program
from fewstep.ops.dual.source import Source, kept_or_computed
from fewstep.reference import dual as reference

MOST_PROBES = 64  # a tile of 8 samples and their tangents must stay in cache


def serves(program: Program) -> bool:
    """Whether the op knows all that is in a program."""
    return len(program.weights) >= 2 and not program.gated


class _Probes(torch.autograd.Function):
    """Velocity and products with probes that backward draws again, of first derivatives.

    Derivatives of higher order are those of the reference.
    """

    @staticmethod
    def forward(
        ctx: Any, program: Program, source: Source, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.source, ctx.rest = source, (program.low, program.shape, program.kinds, program.options)
        velocity, dots, kept, last = _run(program, source, None, None, keep=True)
        ctx.save_for_backward(x, *tensors, last, kept)
        return velocity, dots

    @staticmethod
    def backward(ctx: Any, gv: Tensor, gd: Tensor) -> tuple[Any, ...]:
        source, (low, shape, kinds, options) = ctx.source, ctx.rest
        x, *tensors, last, kept = ctx.saved_tensors
        n = len(tensors) // 2
        program = Program(x, low, shape, tuple(tensors[:n]), tuple(tensors[n:]), kinds, options)
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_by_reference(program, source, wanted, (gv, gd))
        with torch._C._AutoDispatchBelowAutograd():
            grads = torch.ops.fewstep.mlp_backward.default(
                *(gv, gd, *program.arguments(), source.key, source.ids),
                *(dispatch.probe_index(source.kind), last, kept, wanted),
            )
        return None, None, *(g if want else None for g, want in zip(grads, wanted, strict=True))


def _by_reference(
    program: Program, source: Source, wanted: Sequence[bool], grads: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    v = _drawn(program, source)
    v = v.view(source.count, program.x.shape[0], v.shape[1])
    x, low, weights, shifts, kinds, options = program.arguments()
    out = reference.mlp_probes(x, low, weights, shifts, kinds, options, v)
    tensors = (program.x, *program.weights, *program.shifts)
    live = [t for t, want in zip(tensors, wanted, strict=True) if want and t is not None]
    found = iter(torch.autograd.grad(out, live, grads, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def _drawn(program: Program, source: Source) -> Tensor:
    """`[K B, D]`"""
    width = program.weights[-1].shape[0]
    own = program.x.detach()[:, program.low : program.low + width]
    return source.draw(own).flatten(0, 1)


def _run(
    program: Program, source: Source, first: Tensor | None, last: Tensor | None, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        out: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.fewstep.mlp_probes.default(
            *program.arguments(),
            *(source.key, source.ids, source.count),
            *(dispatch.probe_index(source.kind), first, last, keep),
        )
    return out


def probe_products(program: Program, source: Source) -> tuple[Tensor, Tensor]:
    """Velocity `[B, ...]` and `<v_k, J v_k>`, `[K, B]`, for the probes of `source`."""
    if program.differentiable():
        velocity, dots = _Probes.apply(  # type: ignore[no-untyped-call]
            program, source, program.x, *program.weights, *program.shifts
        )
    else:
        first = last = None
        if source.cache is not None:
            part, end = program.outer[0], program.weights[-1]
            first = kept_or_computed(
                source.cache, "first", (part,), lambda: _drawn(program, source) @ part.T
            )
            last = kept_or_computed(
                source.cache, "last", (end,), lambda: _drawn(program, source) @ end
            )
        velocity, dots, *_ = _run(program, source, first, last, keep=False)
    return velocity if velocity.shape == program.shape else velocity.view(program.shape), dots


def trace(program: Program, cache: dict[Any, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Velocity and the exact trace `[B]` of three layers, without derivatives."""
    core = None
    if cache is not None:
        a, b, c = program.outer
        core = kept_or_computed(cache, "structural", (a, b, c), lambda: (a @ c) * b.T)
    with torch._C._AutoDispatchBelowAutograd():
        velocity, value = torch.ops.fewstep.mlp_trace.default(*program.arguments(), core)
    return velocity.view(program.shape), value


def _fake_probes(x: Tensor, low: int, weights: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    *_, count, _, _, _, keep = rest
    batch = x.shape[0]
    hidden = sum(w.shape[0] for w in weights[:-1]) * (count + 1) * batch if keep else 0
    size = (batch, weights[-1].shape[0])
    made = (count if keep else 0, batch, weights[-1].shape[1])
    kept = x.new_empty((hidden,)), x.new_empty(made)
    return x.new_empty(size), x.new_empty((count, batch)), *kept


def _fake_backward(
    gv: Tensor,
    gd: Tensor,
    x: Tensor,
    low: int,
    weights: Sequence[Tensor],
    shifts: Sequence[Tensor | None],
    *rest: Any,
) -> list[Tensor]:
    like = (x, *weights, *(x if s is None else s for s in shifts))
    return [x.new_empty(t.shape if want else (0,)) for t, want in zip(like, rest[-1], strict=True)]


def _fake_trace(x: Tensor, low: int, weights: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], weights[-1].shape[0])), x.new_empty((x.shape[0],))


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("the ops of fewstep.ops.dual.mlp have no derivatives of their own")


for _name, _fake in (
    ("mlp_probes", _fake_probes),
    ("mlp_backward", _fake_backward),
    ("mlp_trace", _fake_trace),
):
    torch.library.register_fake(f"fewstep::{_name}", dispatch.on_one_device(_fake))
    torch.library.register_autograd(f"fewstep::{_name}", _refuse)
