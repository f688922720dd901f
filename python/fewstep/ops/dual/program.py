"""What a forward does, where it is linear layers with activations between them: a `Program`.

A `Recorded` stands in for x as a `Dual` does, but computes nothing: it notes weights, shifts,
activations and gates. From a program the C++ op of `mlp` takes tiles of samples, with their
tangents, through all layers while they are in cache, and `structural` has exact traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual import dispatch
from fewstep.ops.dual.activations import activation_rules
from fewstep.ops.dual.rules.plain import matched, of_dtype, operand
from fewstep.ops.dual.traced import (
    Opaque,
    Rule,
    Traced,
    UnsupportedError,
    broadcast,
    run_on,
    without_data,
)
from fewstep.reference import dual as reference


@dataclass(frozen=True)
class Program:
    """n layers, each but the last with an activation after it, and perhaps a gate after that.

    Attributes:
        x: `[B, in]`, x itself in columns `low` to `low + D`.
        low: see x.
        shape: of the result.
        weights: `[out, in]` each.
        shifts: of each layer, `[out]`, `[B, out]` or None.
        kinds: of the activations, by their index in `fewstep.reference.dual.ACTIVATIONS`.
        options: beta and threshold of each, of softplus.
        gates: what each activation is multiplied by, which does not depend on x, or None; () where
            there are none.
    """

    x: Tensor
    low: int
    shape: torch.Size
    weights: tuple[Tensor, ...] = ()
    shifts: tuple[Tensor | None, ...] = ()
    kinds: tuple[int, ...] = ()
    options: tuple[float, ...] = ()
    gates: tuple[Any, ...] = ()

    def arguments(self) -> tuple[Any, ...]:
        """Of the ops."""
        return self.x, self.low, self.weights, self.shifts, self.kinds, self.options

    def differentiable(self) -> bool:
        """Whether any tensor wants a gradient."""
        tensors = (self.x, *self.weights, *self.shifts)
        return torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in tensors)

    @property
    def gated(self) -> bool:
        return any(gate is not None for gate in self.gates)

    @property
    def outer(self) -> tuple[Tensor, ...]:
        """The weights, the first one's columns those of x alone."""
        first, d = self.weights[0], self.shape[1:].numel()
        if first.shape[1] != d:
            first = first[:, self.low : self.low + d]
        return first, *self.weights[1:]


RECORDED: dict[Any, Rule] = {}
_REFUSAL = "not linear layers with activations between them"
Layer = tuple[Tensor, Tensor | None]  # weight, shift
Step = tuple[int, float, float, Any]  # kind, beta, threshold, gate


class Recorded(Traced):
    """What a forward sees in place of x.

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
    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]

    @classmethod
    def begin(cls, x: Tensor, low: int, width: int) -> Any:
        """Before the first layer."""
        own = cls.blank(x.shape, x.dtype, x.device)
        own.x, own.low, own.width, own.primal_shape = x, low, width, x.shape
        own.own_dtype, own.own_device = x.dtype, x.device
        own.layers, own.steps = (), ()
        return own

    @classmethod
    def blank(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
        return cls()

    def after(self, shape: torch.Size, layers: tuple[Layer, ...], steps: tuple[Step, ...]) -> Any:
        """With more layers or steps."""
        own = self.blank(shape, self.own_dtype, self.own_device)
        own.x, own.low, own.width, own.primal_shape = self.x, self.low, self.width, shape
        own.own_dtype, own.own_device = self.own_dtype, self.own_device
        own.layers, own.steps = layers, steps
        return own

    def parts(self) -> list[Tensor]:
        """What it is computed from."""
        inner = [z for layer in self.layers for z in layer]
        inner += [step[3] for step in self.steps]
        return [self.x, *(z for z in inner if isinstance(z, Tensor))]

    def complete(self) -> bool:
        """Whether a layer came last."""
        return len(self.layers) > len(self.steps)


class RecordedTensor(Opaque, Recorded, Tensor):  # type: ignore[misc, override]
    slots = __slots__ = (
        *("x", "low", "width", "layers", "steps"),
        *("own_dtype", "own_device", "primal_shape"),
    )

    @classmethod
    def blank(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
        return without_data(cls, shape, dtype=dtype, device=device)


def _refuse_unless(condition: bool) -> None:
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
    before, shape, layers, steps = h.primal_shape, weight.shape, h.layers, h.steps
    if len(before) != 2 or len(shape) != 2 or len(layers) > len(steps):
        raise UnsupportedError(_REFUSAL)
    matched(h, weight, bias, low=True)
    if bias is not None and bias.shape != shape[:1]:
        raise UnsupportedError(_REFUSAL)
    if shape[1] != before[1]:
        raise ValueError(f"velocity: a linear layer takes {shape[1]} features, got {before[1]}")
    found: Recorded = h.after(torch.Size((before[0], shape[0])), (*layers, (weight, bias)), steps)
    return found


def _activation(kind: str, h: Any, beta: float, threshold: float, inplace: bool) -> Recorded:
    if len(h.primal_shape) != 2 or len(h.layers) == len(h.steps):
        raise UnsupportedError(_REFUSAL)
    step = (reference.ACTIVATIONS.index(kind), beta, threshold, None)
    out: Recorded = h.after(h.primal_shape, h.layers, (*h.steps, step))
    return h.overwritten_by(out) if inplace else out


RECORDED.update(activation_rules(_activation))


def _operand(h: Recorded, other: Any) -> Any:
    """A plain factor or term as torch casts it, no larger than h."""
    _refuse_unless(not isinstance(other, Recorded) and len(h.primal_shape) == 2)
    other = operand(h, other)
    if isinstance(other, Tensor) and broadcast(h, other) != h.shape:
        raise UnsupportedError(f"no rule for {tuple(h.shape)} with {tuple(other.shape)}")
    return other


@_record(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _add(a: Any, b: Any) -> Recorded:
    h, other = (a, b) if isinstance(a, Recorded) else (b, a)
    _refuse_unless(h.complete())
    other = _operand(h, other)
    batch, width = h.primal_shape
    if not isinstance(other, Tensor):
        other = torch.full((width,), other, dtype=h.dtype, device=h.device)
    alone = other.ndim < 2 or other.shape[0] == 1
    other = other.reshape(other.shape[-1:]).expand(width) if alone else other.expand(batch, width)
    *before, (weight, shift) = h.layers
    layer = (weight, other if shift is None else shift + other)
    found: Recorded = h.after(h.primal_shape, (*before, layer), h.steps)
    return found


@_record(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def _mul(a: Any, b: Any) -> Recorded:
    """A gate that does not depend on x, of hidden features."""
    h, other = (a, b) if isinstance(a, Recorded) else (b, a)
    _refuse_unless(bool(h.steps) and not h.complete())
    other = _operand(h, other)
    *before, (kind, beta, threshold, gate) = h.steps
    step = (kind, beta, threshold, other if gate is None else gate * other)
    found: Recorded = h.after(h.primal_shape, h.layers, (*before, step))
    return found


@_record(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> Recorded:
    h: Recorded = next(h for h in tensors if isinstance(h, Recorded))
    dim = dim if axis is None else axis
    _refuse_unless(not h.layers and len(h.primal_shape) == 2 and dim % 2 == 1)
    low, found = h.low, False
    whole = []
    for c in tensors:
        if isinstance(c, Recorded):
            _refuse_unless(not found)
            found = True
            whole.append(c.x)
            continue
        if not found:
            low += c.shape[1]
        whole.append(of_dtype(h, c))
    x = torch.cat(whole, 1)
    return h.begin(x, low, h.width)  # type: ignore[no-any-return]


@_record(torch.flatten, torch.Tensor.flatten)
def _flatten(h: Recorded, start_dim: int = 0, end_dim: int = -1) -> Recorded:
    _refuse_unless(start_dim == 1 and end_dim % h.ndim == h.ndim - 1)
    return _viewed(h, (h.shape[0], -1))


@_record(torch.reshape, torch.Tensor.reshape, torch.Tensor.view)
def _view(h: Recorded, *shape: Any) -> Recorded:
    return _viewed(h, shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)


def _viewed(h: Recorded, sizes: Sequence[int]) -> Recorded:
    batch = h.primal_shape[0]
    if h.layers:
        _refuse_unless(h.complete())
        whole = h.primal_shape.numel()
        rest = torch.Size(s for s in sizes if s != -1).numel()
        own = torch.Size(whole // max(rest, 1) if s == -1 else s for s in sizes)
        _refuse_unless(own.numel() == whole and own[0] == batch)
        out: Recorded = h.after(own, h.layers, h.steps)
        h.aliased = out.aliased = True
        return out
    _refuse_unless(h.width == h.primal_shape[1:].numel())
    x = h.x.reshape(sizes)
    _refuse_unless(x.shape[0] == batch)
    return h.begin(x, 0, h.width)  # type: ignore[no-any-return]


@_record(F.dropout)
def _dropout(
    input: Recorded, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Recorded:
    _refuse_unless(not training or p == 0)
    return input


def record(run: Callable[..., Any], x: Tensor, t: Any) -> Program:
    """The program of `run(x, t)`.

    Raises:
        UnsupportedError: it is none.
    """
    kind = Recorded if torch.compiler.is_compiling() else RecordedTensor
    h = run_on(kind.begin(x, 0, x.shape[1:].numel()), run, t)
    if not isinstance(h, Recorded) or not h.complete():
        raise UnsupportedError(_REFUSAL)
    if h.shape != x.shape:
        raise ValueError(f"velocity must return {tuple(x.shape)} like x, got {tuple(h.shape)}")
    weights, shifts = zip(*h.layers, strict=True)
    options = tuple([number for _, beta, threshold, _ in h.steps for number in (beta, threshold)])
    kinds, gates = tuple([step[0] for step in h.steps]), tuple([step[3] for step in h.steps])
    return Program(h.x, h.low, h.shape, weights, shifts, kinds, options, gates)


def values_and_slopes(program: Program, backend: str) -> tuple[Tensor, list[Tensor]]:
    """The velocity, and the derivative `[B, H]` of each hidden layer's units. Differentiable."""
    dispatch.present(*program.weights, *program.shifts)
    h, slopes = program.x, []
    last = len(program.weights) - 1
    for i, (weight, shift) in enumerate(zip(program.weights, program.shifts, strict=True)):
        h = F.linear(h, weight)
        if i == last:
            h = h if shift is None else h + shift
            break
        name, (beta, threshold) = (
            reference.ACTIVATIONS[program.kinds[i]],
            program.options[2 * i :][:2],
        )
        ones = h.new_ones((1, h.shape[1]))
        both = dispatch.activate(backend, h, ones, shift, 1, name, beta, threshold)
        h, slope = both.reshape(2, *h.shape).unbind(0)
        gate = program.gates[i] if program.gates else None
        h, slope = (h, slope) if gate is None else (h * gate, slope * gate)
        slopes.append(slope)
    return h.reshape(program.shape), slopes
