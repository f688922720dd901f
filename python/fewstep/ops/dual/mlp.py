"""Linear layers with activations between them as one op, found by a walk that computes nothing.

A `Recorded` stands in for x as a `Dual` does, but only notes weights, shifts and activations. The
C++ op then takes tiles of samples, with their tangents, through all layers while they are in cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual import dispatch
from fewstep.ops.dual.engine import Opaque, Rule, Traced, UnsupportedError, run_on, without_data
from fewstep.ops.dual.rules.plain import matched
from fewstep.ops.dual.source import Source, kept_or_computed
from fewstep.reference import dual as reference

MOST_PROBES = 64  # a tile of 8 samples and their tangents must stay in cache
_REFUSAL = "not linear layers with activations between them"


@dataclass(frozen=True)
class Program:
    """What a forward does: n layers, each but the last with an activation after it.

    Attributes:
        x: `[B, in]`, x itself in columns `low` to `low + D`.
        low: see x.
        shape: of the result.
        weights: `[out, in]` each.
        shifts: of each layer, `[out]`, `[B, out]` or None.
        kinds: of the activations, by their index in `fewstep.reference.dual.ACTIVATIONS`.
        options: beta and threshold of each, of softplus.
    """

    x: Tensor
    low: int
    shape: torch.Size
    weights: tuple[Tensor, ...] = ()
    shifts: tuple[Tensor | None, ...] = ()
    kinds: tuple[int, ...] = ()
    options: tuple[float, ...] = ()

    def arguments(self) -> tuple[Any, ...]:
        """Of the ops."""
        return self.x, self.low, self.weights, self.shifts, self.kinds, self.options

    def differentiable(self) -> bool:
        """Whether any tensor wants a gradient."""
        tensors = (self.x, *self.weights, *self.shifts)
        return torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in tensors)

    @property
    def outer(self) -> tuple[Tensor, ...]:
        """The weights, the first one's columns those of x alone."""
        first = self.weights[0][:, self.low : self.low + self.shape[1:].numel()]
        return first, *self.weights[1:]


RECORDED: dict[Any, Rule] = {}


class Recorded(Opaque, Traced, Tensor):  # type: ignore[misc, override]
    """What a forward sees in place of x: see the module.

    Attributes:
        x: what comes before the first layer.
        low: where x itself begins in it.
        width: of x in it.
        primal_shape: of the features now.
    """

    rules = RECORDED
    x: Tensor
    low: int
    width: int
    layers: tuple[tuple[Tensor, Tensor | None], ...]
    activations: tuple[tuple[int, float, float], ...]

    def __new__(
        cls,
        x: Tensor,
        low: int,
        width: int,
        shape: torch.Size,
        layers: tuple[tuple[Tensor, Tensor | None], ...] = (),
        activations: tuple[tuple[int, float, float], ...] = (),
    ) -> Recorded:
        dtype, device = x.dtype, x.device
        self: Recorded = without_data(cls, shape, dtype=dtype, device=device)
        self.x, self.low, self.width, self.primal_shape = x, low, width, shape
        self.layers, self.activations = layers, activations
        self.own_dtype, self.own_device = dtype, device
        return self

    def complete(self) -> bool:
        """Whether the last step is a layer."""
        return len(self.layers) > len(self.activations)

    def refuse_unless(self, condition: bool) -> None:
        if not condition:
            raise UnsupportedError(_REFUSAL)


def _record(*functions: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RECORDED.update(dict.fromkeys(functions, rule))
        return rule

    return add


@_record(F.linear)
def _linear(h: Any, weight: Any, bias: Tensor | None = None) -> Recorded:
    if not isinstance(h, Recorded) or not isinstance(weight, Tensor):
        raise UnsupportedError(_REFUSAL)
    if len(h.primal_shape) != 2 or len(h.layers) > len(h.activations):
        raise UnsupportedError(_REFUSAL)
    matched(h, weight, bias, low=True)
    shape = weight.shape
    if len(shape) != 2 or not (bias is None or bias.shape == shape[:1]):
        raise UnsupportedError(_REFUSAL)
    (batch, width), (out, taken) = h.primal_shape, shape
    if taken != width:
        raise ValueError(f"velocity: a linear layer takes {taken} features, got {width}")
    layers, after = (*h.layers, (weight, bias)), torch.Size((batch, out))
    return Recorded(h.x, h.low, h.width, after, layers, h.activations)


def _activation(
    kind: int,
    input: Recorded,
    inplace: bool = False,
    *,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> Recorded:
    h = input
    if len(h.primal_shape) != 2 or len(h.layers) == len(h.activations):
        raise UnsupportedError(_REFUSAL)
    activations = (*h.activations, (kind, beta, threshold))
    out = Recorded(h.x, h.low, h.width, h.primal_shape, h.layers, activations)
    return h.overwritten_by(out) if inplace else out


def _kind(name: str) -> Rule:
    return functools.partial(_activation, reference.ACTIVATIONS.index(name))


_record(F.silu)(_kind("silu"))
_record(F.relu, torch.relu, torch.Tensor.relu)(_kind("relu"))
_record(torch.tanh, torch.Tensor.tanh, F.tanh)(_kind("tanh"))
_record(torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid)(_kind("sigmoid"))
_softplus = _kind("softplus")
_record(F.softplus)(
    lambda input, beta=1.0, threshold=20.0: _softplus(
        input, beta=float(beta), threshold=float(threshold)
    )
)
_GELU = {"none": _kind("gelu"), "tanh": _kind("gelu_tanh")}
_record(F.gelu)(lambda input, approximate="none": _GELU[approximate](input))


@_record(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _add(a: Any, b: Any) -> Recorded:
    h, other = (a, b) if isinstance(a, Recorded) else (b, a)
    h.refuse_unless(not isinstance(other, Recorded) and h.complete() and h.ndim == 2)
    batch, width = h.primal_shape
    if not isinstance(other, Tensor):
        other = torch.full((width,), other, dtype=h.dtype)
    h.refuse_unless(other.dtype == h.dtype)
    if other.ndim == 2 and other.shape[0] == 1:
        other = other[0]
    h.refuse_unless(other.ndim <= 2 and (other.ndim < 2 or other.shape[0] == batch))
    h.refuse_unless(other.ndim == 0 or other.shape[-1] in (1, width))
    other = other.expand((batch, width) if other.ndim == 2 else (width,))
    *before, (weight, shift) = h.layers
    layers = (*before, (weight, other if shift is None else shift + other))
    return Recorded(h.x, h.low, h.width, h.primal_shape, layers, h.activations)


@_record(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> Recorded:
    h: Recorded = next(h for h in tensors if isinstance(h, Recorded))
    dim = dim if axis is None else axis
    h.refuse_unless(not h.layers and h.ndim == 2 and dim % 2 == 1)
    low, found = h.low, False
    whole = []
    for c in tensors:
        if isinstance(c, Recorded):
            h.refuse_unless(not found)
            found = True
            whole.append(c.x)
            continue
        h.refuse_unless(c.dtype == h.dtype)
        low += 0 if found else c.shape[1]
        whole.append(c)
    x = torch.cat(whole, 1)
    return Recorded(x, low, h.width, x.shape)


@_record(torch.flatten, torch.Tensor.flatten)
def _flatten(h: Recorded, start_dim: int = 0, end_dim: int = -1) -> Recorded:
    h.refuse_unless(start_dim == 1 and end_dim % h.ndim == h.ndim - 1)
    return _viewed(h, (h.shape[0], -1))


@_record(torch.reshape, torch.Tensor.reshape, torch.Tensor.view)
def _view(h: Recorded, *shape: Any) -> Recorded:
    return _viewed(h, shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)


def _viewed(h: Recorded, sizes: Sequence[int]) -> Recorded:
    batch = h.primal_shape[0]
    if h.layers:
        h.refuse_unless(h.complete())
        whole = h.primal_shape.numel()
        rest = torch.Size(s for s in sizes if s != -1).numel()
        own = torch.Size(whole // max(rest, 1) if s == -1 else s for s in sizes)
        h.refuse_unless(own.numel() == whole and own[0] == batch)
        out = Recorded(h.x, h.low, h.width, own, h.layers, h.activations)
        h.aliased = out.aliased = True
        return out
    h.refuse_unless(h.width == h.primal_shape[1:].numel())
    x = h.x.reshape(sizes)
    h.refuse_unless(x.shape[0] == batch)
    return Recorded(x, 0, h.width, x.shape)


@_record(F.dropout)
def _dropout(
    input: Recorded, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Recorded:
    input.refuse_unless(not training or p == 0)
    return input


def record(run: Callable[..., Any], x: Tensor, t: Any) -> Program:
    """The program of `run(x, t)`.

    Raises:
        UnsupportedError: it is not one of at least two linear layers.
    """
    h = run_on(Recorded(x, 0, x.shape[1:].numel(), x.shape), run, t)
    if not isinstance(h, Recorded) or not h.complete() or len(h.layers) < 2:
        raise UnsupportedError(_REFUSAL)
    if h.shape != x.shape:
        raise ValueError(f"velocity must return {tuple(x.shape)} like x, got {tuple(h.shape)}")
    weights, shifts = zip(*h.layers, strict=True)
    dispatch.present(*weights, *shifts)
    options = tuple(number for _, *own in h.activations for number in own)
    kinds = tuple(kind for kind, _, _ in h.activations)
    return Program(h.x, h.low, h.shape, weights, shifts, kinds, options)


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


def narrowest(program: Program) -> int:
    """Width of the narrowest hidden layer."""
    return min(w.shape[0] for w in program.weights[:-1])


def trace_by_bottleneck(program: Program, chunk: int) -> tuple[Tensor, Tensor]:
    """Velocity and the exact trace `[B]` by a tangent for each unit of the narrowest hidden layer.

    `tr(A B) = tr(B A)`: from that layer to the outputs, on from the inputs, and back to it. `chunk`
    tangents at a time. Differentiable.
    """
    weights, n = program.outer, len(program.weights)
    h, slopes = program.x, []
    for i, (weight, shift) in enumerate(zip(program.weights, program.shifts, strict=True)):
        h = F.linear(h, weight)
        if i == n - 1:
            h = h if shift is None else h + shift
            continue
        kind, (beta, threshold) = program.kinds[i], program.options[2 * i : 2 * i + 2]
        ones, name = h.new_ones((1, h.shape[1])), reference.ACTIVATIONS[kind]
        both = dispatch.activate("cpp", h, ones, shift, 1, name, beta, threshold)
        h, slope = both.view(2, *h.shape).unbind(0)
        slopes.append(slope)
    own = min(range(n - 1), key=lambda i: weights[i].shape[0])
    parts = []
    for first in range(0, weights[own].shape[0], chunk):
        units = slice(first, first + chunk)
        t = weights[own + 1][:, units].T[:, None]  # [units, 1, features], the same for all samples
        for i in (*range(own + 1, n - 1), n - 1, *range(own)):
            t = t * slopes[i] if i < n - 1 else t
            following = weights[(i + 1) % n]
            t = t @ following.T if (i + 1) % n != own else t
        back = (t * weights[own][units, None]).sum(2)  # [units, B]
        parts.append((back.T * slopes[own][:, units]).sum(1))
    return h.view(program.shape), torch.stack(parts).sum(0)


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
