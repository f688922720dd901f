"""Rules of activations, arithmetic, comparisons and changes in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual import dispatch
from fewstep.ops.dual.activations import activation_rules
from fewstep.ops.dual.dispatch import kernel_shift
from fewstep.ops.dual.engine import Dual, Seed
from fewstep.ops.dual.rules.plain import (
    aligned,
    is_number,
    matched,
    operand,
    primal,
    promoted,
    refuse,
)
from fewstep.ops.dual.rules.shapes import chunk, spread
from fewstep.ops.dual.source import plain
from fewstep.ops.dual.traced import Rule, UnsupportedError, register, unchanged
from fewstep.reference import dual as reference

Scalar = Callable[..., Tensor]

_aten = torch.ops.aten
# Torch's own functions, and tangents u times their slopes, of z, the result a and options.
_SLOPES: dict[str, tuple[Scalar, Scalar]] = {
    "silu": (lambda z, *_: F.silu(z), lambda u, z, a, *_: _aten.silu_backward(u, z)),
    "gelu": (lambda z, *_: F.gelu(z), lambda u, z, a, *_: _aten.gelu_backward(u, z)),
    "gelu_tanh": (
        lambda z, *_: F.gelu(z, approximate="tanh"),
        lambda u, z, a, *_: _aten.gelu_backward(u, z, approximate="tanh"),
    ),
    "tanh": (lambda z, *_: z.tanh(), lambda u, z, a, *_: _aten.tanh_backward(u, a)),
    "softplus": (F.softplus, lambda u, z, a, *own: _aten.softplus_backward(u, z, *own)),
    "relu": (lambda z, *_: z.relu(), lambda u, z, a, *_: _aten.threshold_backward(u, z, 0)),
    "sigmoid": (lambda z, *_: z.sigmoid(), lambda u, z, a, *_: _aten.sigmoid_backward(u, a)),
}


def _as_plain(kind: str, h: Dual, beta: float, threshold: float) -> Dual:
    """The primal as in a plain call, with constant tangents beside it."""
    z, u = h.pieces()
    if kind not in _SLOPES:
        a, s = reference.derivative(z, kind, beta, threshold)
        return h.like(a, (s.detach() * u.reshape(-1, *z.shape)).flatten(0, 1))
    f, slope = _SLOPES[kind]
    a = f(z, beta, threshold)
    with torch.no_grad():  # torch's own functions take tensors of one shape
        parts = [slope(v, z, a, beta, threshold) for v in u.reshape(-1, *z.shape)]
        t = parts[0] if len(parts) == 1 else torch.cat(parts)
    return h.like(a, t)


def _activation(
    kind: str, h: Dual, beta: float = 1.0, threshold: float = 20.0, inplace: bool = False
) -> Dual:
    if h.source.constant:
        result = _as_plain(kind, h, beta, threshold)
        return h.overwritten_by(result) if inplace else result
    if h.source.dtype is not None:
        shift, inner = kernel_shift(h.shift, h.primal_shape)
        z, u = h.pieces(shifted=False)
        options = (shift, kind, beta, threshold, inner)
        result = h.like(*dispatch.activate_pair(h.source.kernels(z.dtype), z, u, *options))
        return h.overwritten_by(result) if inplace else result
    flat, shared = (h.stack(), None) if isinstance(h, Seed) else (h.flat, h.shared)
    if h.pending is not None:
        flat = h.joined()
    if shared is not None and torch.is_grad_enabled() and shared.requires_grad:
        flat, shared = h.joined(), None
    shift, inner = kernel_shift(h.shift, h.primal_shape)
    backend = h.source.kernels(flat.dtype)
    out = dispatch.activate(
        backend, flat, shared, shift, h.source.count, kind, beta, threshold, inner
    )
    result = h.like(out, owned=True)
    return h.overwritten_by(result) if inplace else result


for _f, _rule in activation_rules(_activation).items():
    register(_f)(_rule)


def _mapped(h: Dual, f: Scalar, slope: Scalar) -> Dual:
    """`f(z)` of each element, with `f'(z)` by `slope(z, f(z))`."""
    z, tangents = h.halves()
    a = f(z)
    if not h.source.constant:
        return h.of_halves(a, slope(z, a) * tangents)
    with torch.no_grad():
        t = slope(z, a) * tangents
    return h.of_halves(a, t)


def _below(z: Tensor) -> Tensor:
    """Where an exponential is that of negative numbers."""
    return z.clamp_max(0)


# Of one argument and `out`, in torch, as a method and perhaps in `torch.special`.
UNARY: dict[str, Scalar] = {
    "exp": lambda z, a: a,
    "exp2": lambda z, a: a * math.log(2),
    "expm1": lambda z, a: z.exp(),
    "log": lambda z, a: 1 / z,
    "log2": lambda z, a: 1 / (z * math.log(2)),
    "log10": lambda z, a: 1 / (z * math.log(10)),
    "log1p": lambda z, a: 1 / (z + 1),
    "sqrt": lambda z, a: 0.5 / a,
    "rsqrt": lambda z, a: -0.5 * a / z,
    "reciprocal": lambda z, a: -a * a,
    "square": lambda z, a: 2 * z,
    "abs": lambda z, a: z.sign(),
    "sin": lambda z, a: z.cos(),
    "cos": lambda z, a: -z.sin(),
    "tan": lambda z, a: 1 + a * a,
    "sinh": lambda z, a: z.cosh(),
    "cosh": lambda z, a: z.sinh(),
    "asin": lambda z, a: (1 - z * z).rsqrt(),
    "acos": lambda z, a: -(1 - z * z).rsqrt(),
    "atan": lambda z, a: 1 / (1 + z * z),
    "asinh": lambda z, a: (1 + z * z).rsqrt(),
    "atanh": lambda z, a: 1 / (1 - z * z),
    "erf": lambda z, a: 2 / math.sqrt(math.pi) * (-z * z).exp(),
    "erfc": lambda z, a: -2 / math.sqrt(math.pi) * (-z * z).exp(),
}


def _unary(name: str) -> Rule:
    f, slope = getattr(torch, name), UNARY[name]

    def rule(input: Dual, *, out: None = None) -> Dual:
        refuse({"out": out})
        return _mapped(input, f, slope)

    return rule


for _name in UNARY:
    register(getattr(torch, _name), getattr(torch.Tensor, _name))(_unary(_name))


register(torch.absolute, torch.Tensor.absolute, torch.Tensor.__abs__)(_unary("abs"))


def _inside(z: Tensor, least: float, most: float) -> Tensor:
    return ((z > least) & (z < most)).to(z.dtype)


def _mish_slope(z: Tensor, a: Tensor) -> Tensor:
    t = F.softplus(z).tanh()
    return t + z * z.sigmoid() * (1 - t * t)


SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)

# Of torch.nn.functional: options with their defaults, and slopes of z, f(z) and these.
ACTIVATIONS: dict[Any, tuple[dict[str, float], Scalar]] = {
    F.elu: ({"alpha": 1.0}, lambda z, a, alpha: torch.where(z > 0, 1.0, alpha * _below(z).exp())),
    F.celu: (
        {"alpha": 1.0},
        lambda z, a, alpha: torch.where(z > 0, 1.0, (_below(z) / alpha).exp()),
    ),
    F.selu: ({}, lambda z, a: SELU[1] * torch.where(z > 0, 1.0, SELU[0] * _below(z).exp())),
    F.leaky_relu: (
        {"negative_slope": 0.01},
        lambda z, a, negative_slope: torch.where(z > 0, torch.ones_like(z), negative_slope),
    ),
    F.relu6: ({}, lambda z, a: _inside(z, 0.0, 6.0)),
    F.hardtanh: (
        {"min_val": -1.0, "max_val": 1.0},
        lambda z, a, min_val, max_val: _inside(z, min_val, max_val),
    ),
    F.hardsigmoid: ({}, lambda z, a: _inside(z, -3.0, 3.0) / 6),
    F.hardswish: ({}, lambda z, a: torch.where(z < -3, 0.0, torch.where(z > 3, 1.0, z / 3 + 0.5))),
    F.mish: ({}, _mish_slope),
}


def _with_options(f: Scalar, defaults: dict[str, float], slope: Scalar) -> Rule:
    names = tuple(defaults)

    def rule(input: Dual, *args: Any, inplace: bool = False, **kwargs: Any) -> Dual:
        if len(args) > len(names):
            *args, inplace = args  # type: ignore[assignment]
        own = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if not all(map(is_number, own.values())) or len(own) > len(names):
            raise UnsupportedError(f"no rule for {f.__name__} with {own}")
        out = _mapped(input, lambda z: f(z, **own), lambda z, a: slope(z, a, **own))
        return input.overwritten_by(out) if inplace else out

    return rule


for _f, (_defaults, _slope) in ACTIVATIONS.items():
    register(_f)(_with_options(_f, _defaults, _slope))


register(torch.selu)(_with_options(F.selu, *ACTIVATIONS[F.selu]))


register(torch.celu)(_with_options(F.celu, *ACTIVATIONS[F.celu]))


register(F.logsigmoid)(lambda input: _mapped(input, F.logsigmoid, lambda z, a: (-z).sigmoid()))


register(F.tanhshrink)(lambda input: _mapped(input, F.tanhshrink, lambda z, a: z.tanh() ** 2))


register(F.softsign)(lambda input: _mapped(input, F.softsign, lambda z, a: (1 + z.abs()) ** -2))


@register(F.prelu, torch.prelu, torch.Tensor.prelu)
def _prelu(input: Dual, weight: Tensor) -> Dual:
    matched(input, weight)
    if weight.numel() not in (1, input.shape[1] if input.ndim > 1 else 1):
        raise UnsupportedError(f"no rule for prelu with {weight.numel()} slopes")
    w = weight.reshape(-1, *(1,) * max(input.ndim - 2, 0))

    def slope(z: Tensor, a: Tensor) -> Tensor:
        return torch.where(z > 0, torch.ones_like(w), w)

    return _mapped(input, lambda z: torch.where(z > 0, z, w * z), slope)


def _broadcast(h: Dual, other: Any) -> tuple[Dual, Any]:
    """A dual and a plain factor or term that broadcasts with it: of one dtype, and no larger."""
    h = promoted(h, other)
    other = operand(h, other)
    if isinstance(other, Tensor) and other.shape != h.shape[h.ndim - other.ndim :]:
        h = spread(h, torch.broadcast_shapes(h.shape, other.shape))  # type: ignore[no-untyped-call]
    return h, other


@register(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def add(input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Dual:
    refuse({"out": out})
    if isinstance(input, Dual) and isinstance(other, Dual):
        a, b = promoted(input, other), promoted(other, input)
        b = b if alpha == 1 else mul(b, alpha)
        if a.shape != b.shape:
            if a.ndim != b.ndim:
                raise UnsupportedError(f"no rule for {tuple(a.shape)} + {tuple(b.shape)}")
            pairs = zip(a.copies(), b.copies(), strict=True)
            return a.like(*((x + y).flatten(0, 1) for x, y in pairs), owned=True)
        shift = a.shift if b.shift is None else b.shift if a.shift is None else a.shift + b.shift
        pairs = zip(a.pieces(shifted=False), b.pieces(shifted=False), strict=True)
        return a.like(*(x + y for x, y in pairs), shift=shift, owned=True)
    if isinstance(input, Dual):
        h, other = _broadcast(input, other)
        other = other if alpha == 1 else other * alpha
    else:
        h, other = _broadcast(other if alpha == 1 else mul(other, alpha), input)
    if not isinstance(other, Tensor):
        other = torch.full((), other, dtype=h.dtype, device=h.device)
    shift = other if h.shift is None else h.shift + other
    pieces = h.pieces(shifted=False)
    h.owned = False  # two see it now
    return h.like(*pieces, shift=shift)


def _minus(a: Any, b: Any, alpha: float) -> Dual:
    if isinstance(b, Tensor) and b.dtype == torch.bool:
        raise UnsupportedError("no rule for a difference of truth values")
    return add(a, b, alpha=-alpha)


@register(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__, torch.subtract, torch.Tensor.subtract)
def _sub(input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Dual:
    refuse({"out": out})
    return _minus(input, other, alpha)


@register(torch.rsub, torch.Tensor.__rsub__)
def _rsub(input: Any, other: Any, *, alpha: float = 1) -> Dual:
    return _minus(other, input, alpha)


@register(torch.neg, torch.Tensor.neg, torch.Tensor.__neg__, torch.negative, torch.Tensor.negative)
def _neg(input: Dual, *, out: None = None) -> Dual:
    refuse({"out": out})
    return input.like(*(-z for z in input.pieces()), owned=True)


def _scaled(h: Dual, other: Any, function: Callable[[Tensor, Any], Tensor]) -> Dual:
    """A product with, or quotient by, what is plain, which may be larger, but for the batch."""
    h = promoted(h, other)
    other = operand(h, other)
    if not isinstance(other, Tensor) or other.ndim < h.ndim:
        return h.like(*(function(z, other) for z in h.pieces()), owned=True)
    return h.like(*(function(z, other).flatten(0, 1) for z in h.copies()), owned=True)


@register(
    *(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__),
    *(torch.multiply, torch.Tensor.multiply),
)
def mul(input: Any, other: Any, *, out: None = None) -> Dual:
    refuse({"out": out})
    if isinstance(input, Dual) and isinstance(other, Dual):
        a, b = input, other
        if a.ndim != b.ndim:
            raise UnsupportedError(f"no rule for {tuple(a.shape)} * {tuple(b.shape)}")
        (x, dx), (y, dy) = a.halves(), b.halves()
        if a.source.constant and a.dtype == b.dtype and not plain():
            with torch.no_grad():
                t = (dx * y).addcmul_(x, dy)
            return a.of_halves(x * y, t)
        if a.source.apart or a.dtype != b.dtype:
            return a.of_halves(x * y, dx * y + x * dy)
        if plain() or torch.is_grad_enabled():
            return a.of_halves(x * y, torch.addcmul(dx * y, x, dy))
        shape = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
        both = x.new_empty((a.source.count + 1, *shape[1:]))
        torch.mul(x, y, out=both[:1])
        torch.mul(dx, y, out=both[1:]).addcmul_(x, dy)
        return a.like(both.flatten(0, 1), owned=True)
    h, other = (input, other) if isinstance(input, Dual) else (other, input)
    return _scaled(h, other, torch.mul)


@register(torch.outer, torch.Tensor.outer, torch.ger, torch.Tensor.ger)
def _outer(input: Any, vec2: Any, *, out: None = None) -> Dual:
    refuse({"out": out})
    if not isinstance(input, Dual) or isinstance(vec2, Dual) or input.ndim != 1:
        raise UnsupportedError("no rule for an outer product that mixes samples")
    return mul(input.unsqueeze(1), vec2[None])


@register(
    *(torch.div, torch.Tensor.div, torch.Tensor.__truediv__, torch.Tensor.__div__),
    *(torch.true_divide, torch.Tensor.true_divide, torch.divide, torch.Tensor.divide),
)
def div(input: Any, other: Any, *, rounding_mode: None = None, out: None = None) -> Dual:
    refuse({"rounding_mode": rounding_mode, "out": out})
    if not isinstance(other, Dual):
        return _scaled(input, other, torch.div)
    if isinstance(input, Dual):
        if input.ndim != other.ndim:
            raise UnsupportedError(f"no rule for {tuple(input.shape)} / {tuple(other.shape)}")
        (x, dx), (y, dy) = input.halves(), other.halves()
        q = x / y
        return other.of_halves(q, (dx - q * dy) / y)
    h, above = _broadcast(other, input)
    return _mapped(h, lambda z: above / z, lambda z, a: -a / z)


@register(torch.Tensor.__rtruediv__, torch.Tensor.__rdiv__)
def _rdiv(input: Any, other: Any) -> Dual:
    return div(other, input)


@register(torch.pow, torch.Tensor.pow, torch.Tensor.__pow__)
def _pow(input: Any, exponent: Any, *, out: None = None) -> Dual:
    refuse({"out": out})
    if isinstance(exponent, Dual):
        if isinstance(input, Tensor) and not isinstance(input, Dual):
            h, base = _broadcast(exponent, input)
            # As torch has it: the derivative is 0 where the base is.
            slope = lambda z, a: torch.where(base == 0, 0.0, a * base.log())  # noqa: E731
            return _mapped(h, lambda z: base**z, slope)
        if isinstance(input, Dual) or not is_number(input) or input <= 0:
            raise UnsupportedError("no rule for powers of what depends on x, or is not positive")
        return _mapped(exponent, lambda z: input**z, lambda z, a: a * math.log(input))
    if isinstance(exponent, Tensor):
        h, e = _broadcast(input, exponent)
        return _mapped(h, lambda z: z**e, lambda z, a: torch.where(e == 0, 0.0, e * z ** (e - 1)))
    if not is_number(exponent):
        raise UnsupportedError("no rule for powers that are no numbers")
    if exponent == 0:
        return _mapped(input, lambda z: z**0, lambda z, a: torch.zeros_like(z))
    return _mapped(input, lambda z: z**exponent, lambda z, a: exponent * z ** (exponent - 1))


@register(torch.Tensor.__rpow__)
def _rpow(input: Any, other: Any) -> Dual:
    return _pow(other, input)


def _modulo(name: str) -> Rule:
    function = getattr(torch, name)

    def rule(input: Any, other: Any, *, out: None = None) -> Dual:
        refuse({"out": out})
        if not is_number(other) or not isinstance(input, Dual):
            raise UnsupportedError(f"no rule for {name} but by a number")
        first, t = input.halves()
        return input.of_halves(function(first, other), t)

    return rule


register(torch.remainder, torch.Tensor.remainder, torch.Tensor.__mod__)(_modulo("remainder"))


register(torch.fmod, torch.Tensor.fmod)(_modulo("fmod"))


@register(torch.clamp, torch.Tensor.clamp, torch.clip, torch.Tensor.clip)
def clamp(input: Dual, min: Any = None, max: Any = None, *, out: None = None) -> Dual:
    refuse({"out": out})
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    if not is_number(low) or not is_number(high):
        if isinstance(low, Dual) or isinstance(high, Dual):
            raise UnsupportedError("no rule for clamp by what depends on x")
        input, low = _broadcast(input, low)
        input, high = _broadcast(input, high)
        like = input.halves()[0].detach()
        low, high = (torch.as_tensor(m, dtype=like.dtype, device=like.device) for m in (low, high))
    f = lambda z: z.clamp(low, high)  # noqa: E731
    return _mapped(input, f, lambda z, a: ((z >= low) & (z <= high)).to(z.dtype))


@register(torch.clamp_min, torch.Tensor.clamp_min)
def _clamp_min(input: Dual, min: Any, *, out: None = None) -> Dual:
    return clamp(input, min, out=out)


@register(torch.clamp_max, torch.Tensor.clamp_max)
def _clamp_max(input: Dual, max: Any, *, out: None = None) -> Dual:
    return clamp(input, None, max, out=out)


def _chosen(mask: Tensor, a: Any, b: Any) -> Dual:
    """a where the mask is, else b; one at least is a dual."""
    h: Dual = a if isinstance(a, Dual) else b
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.device != h.device:
        raise UnsupportedError("no rule for a choice by what is no plain mask")
    aligned(h, mask)
    own = [m if isinstance(m, Dual) else operand(h, m) for m in (a, b)]
    if any(isinstance(m, Dual) and m.ndim != h.ndim for m in own):
        raise UnsupportedError("no rule for a choice between others than of as many axes")
    (x, dx), (y, dy) = (m.halves() if isinstance(m, Dual) else (m, 0.0) for m in own)
    return h.of_halves(torch.where(mask, x, y), torch.where(mask, dx, dy))


@register(torch.where)
def _where(condition: Any, input: Any, other: Any, *, out: None = None) -> Dual:
    refuse({"out": out})
    return _chosen(condition, input, other)


@register(torch.Tensor.where)
def _where_method(input: Any, condition: Any, other: Any) -> Dual:
    return _chosen(condition, input, other)


@register(torch.masked_fill, torch.Tensor.masked_fill)
def _masked_fill(input: Any, mask: Any, value: Any) -> Dual:
    return _chosen(mask, value, input)


def _extreme(name: str, sign: int) -> Rule:
    function = getattr(torch, name)

    def rule(input: Any, other: Any, *, out: None = None) -> Dual:
        """Where both are equal, each gets half, as in torch."""
        refuse({"out": out})
        h = input if isinstance(input, Dual) else other
        a, b = (m if isinstance(m, Dual) else operand(h, m) for m in (input, other))
        if any(isinstance(m, Dual) and m.ndim != h.ndim for m in (a, b)):
            raise UnsupportedError(f"no rule for {name} of duals of other axes")
        (x, dx), (y, dy) = (m.halves() if isinstance(m, Dual) else (m, 0.0) for m in (a, b))
        own = 0.5 * (1 + sign * (x - y).sign())
        return h.of_halves(function(x, y), own * dx + (1 - own) * dy)

    return rule


register(torch.maximum, torch.Tensor.maximum)(_extreme("maximum", 1))


register(torch.minimum, torch.Tensor.minimum)(_extreme("minimum", -1))


@register(torch.atan2, torch.Tensor.atan2, torch.arctan2, torch.Tensor.arctan2)
def _atan2(input: Any, other: Any, *, out: None = None) -> Dual:
    refuse({"out": out})
    h: Dual = input if isinstance(input, Dual) else other
    y, x = (m if isinstance(m, Dual) else operand(h, m) for m in (input, other))
    if any(not isinstance(m, (Dual, Tensor)) or m.ndim > h.ndim for m in (y, x)) or (
        isinstance(y, Dual) and isinstance(x, Dual) and y.ndim != x.ndim
    ):
        raise UnsupportedError("no rule for atan2 of duals of other axes")
    (y, dy), (x, dx) = (m.halves() if isinstance(m, Dual) else (m, 0.0) for m in (y, x))
    return h.of_halves(torch.atan2(y, x), (dy * x - dx * y) / (x * x + y * y))


@register(torch.nan_to_num, torch.Tensor.nan_to_num)
def _nan_to_num(
    input: Dual, nan: Any = None, posinf: Any = None, neginf: Any = None, *, out: None = None
) -> Dual:
    refuse({"out": out})
    f = lambda z: torch.nan_to_num(z, nan, posinf, neginf)  # noqa: E731
    return _mapped(input, f, lambda z, a: z.isfinite().to(z.dtype))


@register(torch.lerp, torch.Tensor.lerp)
def _lerp(input: Any, end: Any, weight: Any, *, out: None = None) -> Dual:
    refuse({"out": out})
    step = end - input
    return add(input, step * weight)


@register(torch.addcmul, torch.Tensor.addcmul)
def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1, out: None = None) -> Dual:
    refuse({"out": out})
    return add(input, tensor1 * tensor2, alpha=value)


# Functions of values without derivatives: what they return is plain.
STEPS = ("floor", "ceil", "round", "trunc", "sign", "isnan", "isinf", "isfinite", "logical_not")
COMPARED = ("gt", "ge", "lt", "le", "eq", "ne", "isclose")


def _step(function: Callable[..., Any]) -> Rule:
    def rule(*args: Any, **kwargs: Any) -> Any:
        refuse({"out": kwargs.pop("out", None)})
        kwargs = {name: primal(value) for name, value in kwargs.items()}
        out = function(*map(primal, args), **kwargs)
        return out.detach() if isinstance(out, Tensor) else out

    return rule


for _name in (*STEPS, *COMPARED):
    _functions = getattr(torch, _name), getattr(torch.Tensor, _name)
    register(*_functions)(_step(getattr(torch, _name)))


for _name in COMPARED[:-1]:
    register(getattr(torch.Tensor, f"__{_name}__"))(_step(getattr(torch.Tensor, f"__{_name}__")))


@register(torch.detach, torch.Tensor.detach, torch.Tensor.data.__get__)  # type: ignore[attr-defined]
def _detach(input: Dual) -> Tensor:
    """A copy: to the user it shares memory with h, so that neither may be changed in place."""
    input.aliased = True
    return unchanged(primal(input).detach().clone())


for _name in ("zeros_like", "ones_like", "empty_like", "full_like"):
    register(getattr(torch, _name))(_step(getattr(torch, _name)))


for _name in ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"):
    register(getattr(torch.Tensor, _name))(_step(getattr(torch.Tensor, _name)))


def _dropout(function: Callable[..., Tensor]) -> Rule:
    def rule(input: Dual, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dual:
        """In training with the mask that a plain call draws."""
        if not training or p == 0:
            return input
        ones = torch.ones(input.shape, dtype=input.dtype, device=input.device)
        out = mul(input, function(ones, p, True))
        return input.overwritten_by(out) if inplace else out

    return rule


for _f in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
    register(_f)(_dropout(_f))


@register(F.alpha_dropout, F.feature_alpha_dropout)
def _alpha_dropout(
    input: Dual, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Dual:
    if training and p > 0:
        raise UnsupportedError("no rule for alpha dropout in training")
    return input


@register(F.glu)
def _glu(input: Dual, dim: int = -1) -> Dual:
    value, gate = chunk(input, 2, dim)
    return mul(value, _activation("sigmoid", gate))


def _in_place(rule: Rule) -> Rule:
    def change(input: Any, *args: Any, **kwargs: Any) -> Dual:
        if not isinstance(input, Dual):
            raise UnsupportedError("no rule for a change in place by what depends on x")
        out = rule(input, *args, **kwargs)
        if out.shape != input.shape:
            raise UnsupportedError(
                f"no rule for {tuple(out.shape)} in place of {tuple(input.shape)}"
            )
        return input.overwritten_by(out)  # type: ignore[no-any-return]

    return change


IN_PLACE: dict[str, Rule] = {
    "add_": add,
    "__iadd__": add,
    "sub_": _sub,
    "__isub__": _sub,
    "neg_": _neg,
    "mul_": mul,
    "__imul__": mul,
    "div_": div,
    "__itruediv__": div,
    "__idiv__": div,
    "pow_": _pow,
    "__ipow__": _pow,
    "clamp_": clamp,
    "clip_": clamp,
    "clamp_min_": _clamp_min,
    "clamp_max_": _clamp_max,
    "masked_fill_": _masked_fill,
    **{f"{name}_": _unary(name) for name in UNARY},
}
for _name, _rule in IN_PLACE.items():
    register(getattr(torch.Tensor, _name))(_in_place(_rule))


for _f in (F.elu, F.leaky_relu, F.hardtanh, F.selu, F.celu):
    _rule = _in_place(_with_options(_f, *ACTIVATIONS[_f]))
    register(getattr(F, f"{_f.__name__}_"))(_rule)
