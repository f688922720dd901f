"""Rules of activations and arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual import dispatch
from fewstep.ops.dual.dispatch import kernel_shift
from fewstep.ops.dual.engine import Dual, Rule, Seed, UnsupportedError, broadcast, register
from fewstep.ops.dual.rules.shapes import chunk


def _activation(kind: str, h: Dual, beta: float = 1.0, threshold: float = 20.0) -> Dual:
    if h.source.dtype is not None:
        shift, inner = kernel_shift(h.shift, h.primal_shape)
        z, u = h.pieces(shifted=False)
        options = (shift, kind, beta, threshold, inner)
        return h.like(*dispatch.activate_pair(h.source.backend, z, u, *options))
    flat, shared = (h.stack(), None) if isinstance(h, Seed) else (h.flat, h.shared)
    if h.pending is not None:
        flat = h.joined()
    if shared is not None and torch.is_grad_enabled() and shared.requires_grad:
        flat, shared = h.joined(), None
    shift, inner = kernel_shift(h.shift, h.primal_shape)
    out = dispatch.activate(
        h.source.backend, flat, shared, shift, h.source.count, kind, beta, threshold, inner
    )
    return h.like(out, owned=True)


@register(F.silu)
def _silu(h: Dual, inplace: bool = False) -> Dual:
    return _activation("silu", h)


@register(F.gelu)
def _gelu(h: Dual, approximate: str = "none") -> Dual:
    return _activation("gelu" if approximate == "none" else "gelu_tanh", h)


@register(torch.tanh, torch.Tensor.tanh, F.tanh)
def _tanh(h: Dual) -> Dual:
    return _activation("tanh", h)


@register(torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid)
def _sigmoid(h: Dual) -> Dual:
    return _activation("sigmoid", h)


@register(torch.relu, torch.Tensor.relu, F.relu)
def _relu(h: Dual, inplace: bool = False) -> Dual:
    return _activation("relu", h)


@register(F.softplus)
def _softplus(h: Dual, beta: float = 1.0, threshold: float = 20.0) -> Dual:
    return _activation("softplus", h, float(beta), float(threshold))


def _unary(f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Rule:
    def rule(h: Dual) -> Dual:
        primal, tangents = h.halves()
        return h.of_halves(f(primal), slope(primal) * tangents)

    return rule


register(torch.exp, torch.Tensor.exp)(_unary(torch.exp, torch.exp))


register(torch.sin, torch.Tensor.sin)(_unary(torch.sin, torch.cos))


register(torch.cos, torch.Tensor.cos)(_unary(torch.cos, lambda z: -z.sin()))


register(torch.square, torch.Tensor.square)(_unary(torch.square, lambda z: 2 * z))


def _aligned(h: Dual, other: Any) -> Any:
    """A plain factor or term; one that would make the batch larger has no rule."""
    if isinstance(other, Tensor) and other.ndim > 0:
        if other.ndim > h.ndim or (other.ndim == h.ndim and other.shape[0] not in (1, h.shape[0])):
            raise UnsupportedError(f"no rule for {tuple(h.shape)} with {tuple(other.shape)}")
        if broadcast(h, other) != h.shape:
            raise UnsupportedError(f"no rule for {tuple(h.shape)} with {tuple(other.shape)}")
    return other


@register(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def add(a: Any, b: Any, *, alpha: float = 1) -> Dual:
    if alpha != 1:
        b = b * alpha
    if isinstance(a, Dual) and isinstance(b, Dual):
        if a.shape != b.shape:
            if a.ndim != b.ndim:
                raise UnsupportedError(f"no rule for {tuple(a.shape)} + {tuple(b.shape)}")
            pairs = zip(a.copies(), b.copies(), strict=True)
            return a.like(*((x + y).flatten(0, 1) for x, y in pairs), owned=True)
        shift = a.shift if b.shift is None else b.shift if a.shift is None else a.shift + b.shift
        pairs = zip(a.pieces(shifted=False), b.pieces(shifted=False), strict=True)
        return a.like(*(x + y for x, y in pairs), shift=shift, owned=True)
    h, other = (a, b) if isinstance(a, Dual) else (b, a)
    other = _aligned(h, other)
    if not isinstance(other, Tensor):
        other = torch.full((), other, dtype=h.dtype, device=h.device)
    shift = other if h.shift is None else h.shift + other
    pieces = h.pieces(shifted=False)
    h.owned = False  # two see it now
    return h.like(*pieces, shift=shift)


@register(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)
def _sub(a: Any, b: Any, *, alpha: float = 1) -> Dual:
    return add(a, _neg(b) if isinstance(b, Dual) else -b, alpha=alpha)


@register(torch.neg, torch.Tensor.neg)
def _neg(h: Dual) -> Dual:
    return h.like(*(-z for z in h.pieces()), owned=True)


@register(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def mul(a: Any, b: Any) -> Dual:
    if isinstance(a, Dual) and isinstance(b, Dual):
        if a.ndim != b.ndim:
            raise UnsupportedError(f"no rule for {tuple(a.shape)} * {tuple(b.shape)}")
        (x, dx), (y, dy) = a.halves(), b.halves()
        return a.of_halves(x * y, dx * y + x * dy)
    h, other = (a, b) if isinstance(a, Dual) else (b, a)
    other = _aligned(h, other)
    if not isinstance(other, Tensor) or other.ndim < h.ndim:
        return h.like(*(z * other for z in h.pieces()), owned=True)
    return h.like(*((z * other).flatten(0, 1) for z in h.copies()), owned=True)


@register(torch.div, torch.Tensor.div, torch.Tensor.__truediv__, torch.true_divide)
def _div(a: Any, b: Any) -> Dual:
    if isinstance(b, Dual):
        raise UnsupportedError("no rule for division by what depends on x")
    if isinstance(b, Tensor) and a.dtype == torch.float64:
        b = b.double()  # 1 / b would be rounded to the dtype of b
    return mul(a, 1 / b)


@register(torch.Tensor.contiguous, torch.Tensor.clone, torch.clone)
def _identity(h: Dual, *_: Any, **__: Any) -> Dual:
    return h


@register(torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as)
def _to(h: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(h, Dual):  # to the dtype and device of a dual
        like = args[0] if args else kwargs["other"]
        return h.to(dtype=like.dtype, device=like.device)
    probe = torch.empty(0, dtype=h.dtype, device=h.device)
    moved = probe.to(*args, **kwargs) if args or kwargs else probe.float()
    if moved.dtype != h.dtype or moved.device != h.device:
        raise UnsupportedError(f"no rule for a change to {moved.dtype} on {moved.device}")
    return h


@register(F.dropout)
def _dropout(input: Dual, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dual:
    if training and p > 0:
        raise UnsupportedError("no rule for dropout in training")
    return input


@register(F.glu)
def _glu(input: Dual, dim: int = -1) -> Dual:
    value, gate = chunk(input, 2, dim)
    return mul(value, _sigmoid(gate))
