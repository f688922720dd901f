"""Exact traces of chains of linear layers and activations, by the narrowest layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep._torch import wide
from fewstep.ops.dual import dispatch
from fewstep.ops.dual.dispatch import kernel_shift
from fewstep.ops.dual.engine import Opaque, R, Rule, Traced, UnsupportedError, broadcast, run_on
from fewstep.ops.dual.rules.plain import matched, of_dtype, operand
from fewstep.ops.dual.source import kept_or_computed


@dataclass(frozen=True)
class Budget:
    """What probes would cost: `structural` gives way to them where it costs more.

    Attributes:
        probes: each costs as much as the velocity itself.
        kept: the product of the outer weights is made once for a whole solve.
    """

    probes: int
    kept: bool

    def allows(self, batch: int, weights: Sequence[Tensor]) -> bool:
        if len(weights) < 3:
            return True
        width, depth = weights[0].shape[0], weights[2].shape[1]
        cost = batch * width * depth
        if not self.kept:
            cost += weights[0].numel() * depth
        return cost <= self.probes * batch * sum(w.numel() for w in weights)


STRUCTURAL: dict[Any, Rule] = {}


def _structural(*functions: Any) -> Callable[[R], R]:
    def add(rule: R) -> R:
        STRUCTURAL.update(dict.fromkeys(functions, rule))
        return rule

    return add


@dataclass
class _Factors:
    """`J = A_n diag(d_n) ... diag(d_1) A_0`: weights and derivatives, in the order of layers."""

    weights: list[Tensor] = field(default_factory=list)
    diagonals: list[Tensor] = field(default_factory=list)


class Chain(Traced):
    """A primal whose Jacobian is kept as its factors: weights, and diagonals of derivatives.

    Attributes:
        primal: `[B, ...]`, still without the shift.
        shift: as of `Dual`.
        factors: None before the first layer.
    """

    rules = STRUCTURAL

    def __init__(
        self,
        backend: str,
        primal: Tensor,
        factors: _Factors | None,
        *,
        low: int = 0,
        width: int = 0,
        shift: Tensor | None = None,
    ) -> None:
        self.backend, self.primal, self.factors = backend, primal, factors
        self.low, self.width, self.shift = low, width, shift
        self.primal_shape = primal.shape
        self.own_dtype, self.own_device = primal.dtype, primal.device

    def made(self, *parts: Any, **fields: Any) -> Chain:
        """As this one a tensor or none."""
        return type(self)(self.backend, *parts, **fields)

    def complete(self) -> bool:
        """Whether the last factor is a weight."""
        return self.factors is not None and len(self.factors.weights) > len(self.factors.diagonals)


class ChainTensor(Opaque, Chain, Tensor):  # type: ignore[misc, override]
    pass


@_structural(F.linear)
def _chain_linear(h: Any, weight: Tensor, bias: Tensor | None = None) -> Chain:
    if not isinstance(h, Chain) or h.ndim != 2 or h.complete():
        raise UnsupportedError("not a chain of linear layers with activations between them")
    matched(h, weight, bias, low=True)
    if h.factors is None:
        part = weight if h.width == weight.shape[1] else weight[:, h.low : h.low + h.width]
        factors = _Factors([part])
    else:
        factors = _Factors([*h.factors.weights, weight], h.factors.diagonals)
        if len(factors.weights) > 3:
            raise UnsupportedError("more than two hidden layers")
    return h.made(F.linear(h.primal, weight), factors, shift=bias)


def _chain_activation(
    kind: str, h: Chain, beta: float = 1.0, threshold: float = 20.0, inplace: bool = False
) -> Chain:
    if not h.complete() or h.factors is None:
        raise UnsupportedError("not a chain of linear layers with activations between them")
    shift, inner = kernel_shift(h.shift, h.primal_shape)
    ones = h.primal.new_ones((1, h.primal_shape[1]))
    both = dispatch.activate(
        h.backend, h.primal, ones, shift, 1, kind, beta, threshold, inner
    ).reshape(2, *h.primal_shape)
    a, slope = both.unbind(0)
    out = h.made(a, _Factors(h.factors.weights, [*h.factors.diagonals, slope]))
    return h.overwritten_by(out) if inplace else out


_structural(F.silu)(lambda input, inplace=False: _chain_activation("silu", input, inplace=inplace))


_structural(F.relu, torch.relu, torch.Tensor.relu)(
    lambda input, inplace=False: _chain_activation("relu", input, inplace=inplace)
)


_structural(F.gelu)(
    lambda h, approximate="none": _chain_activation(
        "gelu" if approximate == "none" else "gelu_tanh", h
    )
)


_structural(torch.tanh, torch.Tensor.tanh, F.tanh)(lambda h: _chain_activation("tanh", h))


_structural(torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid)(
    lambda h: _chain_activation("sigmoid", h)
)


_structural(F.softplus)(
    lambda h, beta=1.0, threshold=20.0: _chain_activation(
        "softplus", h, float(beta), float(threshold)
    )
)


def _operand(h: Chain, other: Any) -> Any:
    """A plain factor or term as torch casts it, no larger than h."""
    other = operand(h, other)
    if isinstance(other, Tensor) and broadcast(h, other) != h.shape:
        raise UnsupportedError(f"no rule for {tuple(h.shape)} with {tuple(other.shape)}")
    return other


@_structural(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _chain_add(a: Any, b: Any) -> Chain:
    h, other = (a, b) if isinstance(a, Chain) else (b, a)
    if isinstance(other, Chain) or h.factors is None:
        raise UnsupportedError("not a chain: a sum of two branches")
    other = _operand(h, other)
    if not isinstance(other, Tensor):
        other = torch.full((), other, dtype=h.dtype, device=h.device)
    shift = other if h.shift is None else h.shift + other
    return h.made(h.primal, h.factors, shift=shift)


@_structural(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def _chain_mul(a: Any, b: Any) -> Chain:
    """A gate that does not depend on x: one more diagonal, merged with that before it."""
    h, other = (a, b) if isinstance(a, Chain) else (b, a)
    if isinstance(other, Chain) or h.factors is None or h.complete():
        raise UnsupportedError(
            "not a chain: a gate that depends on x, or is outside the hidden layers"
        )
    other = _operand(h, other)
    *before, last = h.factors.diagonals
    primal = h.primal if h.shift is None else h.primal + h.shift
    return h.made(primal * other, _Factors(h.factors.weights, [*before, last * other]))


@_structural(torch.cat, torch.concat, torch.concatenate)
def _chain_cat(tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> Chain:
    h: Chain = next(h for h in tensors if isinstance(h, Chain))
    dim = dim if axis is None else axis
    alone = sum(isinstance(c, Chain) for c in tensors) == 1
    if h.factors is not None or not alone or dim % h.ndim != 1 or h.ndim != 2:
        raise UnsupportedError("not a chain: concatenation after the first layer")
    at = next(i for i, c in enumerate(tensors) if c is h)
    low = h.low + sum(c.shape[1] for c in tensors[:at])
    whole = torch.cat([h.primal if c is h else of_dtype(h, c) for c in tensors], 1)
    return h.made(whole, None, low=low, width=h.width)


@_structural(torch.flatten, torch.Tensor.flatten)
def _chain_flatten(h: Chain, start_dim: int = 0, end_dim: int = -1) -> Chain:
    if start_dim != 1 or end_dim % h.ndim != h.ndim - 1:
        raise UnsupportedError("not a chain: a view of the batch")
    return _chain_view(h, h.shape[0], -1)


@_structural(torch.reshape, torch.Tensor.reshape, torch.Tensor.view)
def _chain_view(h: Chain, *shape: Any) -> Chain:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    primal = h.primal.reshape(sizes)
    if primal.shape[0] != h.shape[0]:
        raise UnsupportedError("not a chain: a view of the batch")
    if h.factors is None:
        if h.width != h.shape[1:].numel():
            raise UnsupportedError("not a chain: a view after concatenation")
    else:
        if not h.complete():
            raise UnsupportedError("not a chain: a view of hidden features")
        primal = primal if h.shift is None else (h.primal + h.shift).reshape(sizes)
    out = h.made(primal, h.factors, width=h.width)
    h.aliased = out.aliased = True
    return out


@_structural(F.dropout)
def _chain_dropout(
    input: Chain, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Chain:
    if training and p > 0:
        raise UnsupportedError("no rule for dropout in training")
    return input


def structural(
    velocity: Callable[..., Any],
    x: Tensor,
    t: Any,
    backend: str,
    cache: dict[Any, Tensor] | None = None,
    budget: Budget | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Velocity and the exact trace, `[B]`, of at most two hidden layers, whatever D.

    `tr(W3 D2 W2 D1 W1) = d2' [W2 o (W1 W3)'] d1`: one more product of the hidden width. `cache`
    keeps its matrix over a solve. None where that costs more than `budget` has.
    """
    d = x.shape[1:].numel()
    begin = (Chain if torch.compiler.is_compiling() else ChainTensor)(backend, x, None, width=d)
    out = run_on(begin, velocity, t)
    if not isinstance(out, Chain) or not out.complete() or out.factors is None:
        raise UnsupportedError("not a chain of linear layers with activations between them")
    if out.shape != x.shape:
        raise ValueError(f"velocity must return {tuple(x.shape)} like x, got {tuple(out.shape)}")
    weights, diagonals = out.factors.weights, out.factors.diagonals
    dispatch.present(*weights, out.shift)
    if budget is not None and not budget.allows(x.shape[0], weights):
        return None

    summed = wide(x.dtype)

    def core() -> Tensor:
        if len(weights) == 1:
            return weights[0].diagonal().sum(dtype=summed)
        if len(weights) == 2:
            return (weights[0] * weights[1].T).sum(1, dtype=summed)
        return (weights[0] @ weights[2]) * weights[1].T  # [H1, H2]

    middle = kept_or_computed(cache, "structural", weights, core)
    if len(weights) == 1:
        value = middle.expand(x.shape[0])
    elif len(weights) == 2:
        value = diagonals[0].to(summed) @ middle
    else:
        value = torch.linalg.vecdot((diagonals[0] @ middle).to(summed), diagonals[1].to(summed))
    velocity_out = out.primal if out.shift is None else out.primal + out.shift
    return velocity_out, value
