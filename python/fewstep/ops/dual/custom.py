"""Rules of a user's own functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.ops.dual.engine import Dual
from fewstep.ops.dual.traced import RULES, Rule, Traced, UnsupportedError

Function = Callable[..., Tensor]
# Steps of central differences: errors of cut h^2 and of rounding eps / h are alike.
_STEPS = {torch.float64: 1e-5, torch.float32: 5e-3}
_BOUNDS = {torch.float64: 1e-6, torch.float32: 2e-2}


def register_rule(function: Function, jvp: Function, *, example: Sequence[Any]) -> Function:
    """Teach the duals of `fewstep.divergence` how tangents go through a function of your own.

    The function is `y = f(a, b, ...)`. The batch comes first in y and in each argument that depends
    on x, and samples do not mix. `jvp` gives `dy = J_a da + J_b db + ...` for K tangents at once.
    It is compared with central differences at `example` before it is accepted.

    Args:
        function (Callable): operator, such as `torch.ops.mine.scan`, or Python function, which may
            launch kernels or apply a `torch.autograd.Function`. In training its gradient is the one
            that autograd has for it.
        jvp (Callable): `jvp(tangents, *args)`. tangents is a list with `[K, B, ...]` for each
            argument that depends on x and None for the others. The result is `[K, B, ...]`. It must
            be differentiable if it is to be trained through.
        example (Sequence): arguments at which `jvp` is checked. Floating tensors `[B, ...]` with B
            at least 2 are taken to depend on x. float64 is checked more closely.

    Returns:
        Callable: what a network calls in place of a Python function, or the operator as it was.

    Raises:
        ValueError: `jvp` is off from central differences, a sample's output depends on another
            sample, or the example has no floating tensor of two samples.
        TypeError: `function` or `jvp` cannot be called, or does not return one tensor.

    >>> import fewstep
    >>> def cube(x):
    ...     return x**3
    >>> example = [torch.randn(4, 3, dtype=torch.float64)]
    >>> cube = fewstep.register_rule(cube, lambda d, x: 3 * x**2 * d[0], example=example)
    >>> out = fewstep.divergence(lambda x, t: cube(x), torch.ones(2, 3), 0.0, estimator="exact")
    >>> out.value.tolist(), out.info
    ([9.0, 9.0], '')
    """
    for name, given in (("function", function), ("jvp", jvp)):
        if not callable(given):
            raise TypeError(f"register_rule: {name} must be callable, got {type(given).__name__}")
    _check(function, jvp, tuple(example))

    def rule(*args: Any, **kwargs: Any) -> Dual:
        if any(isinstance(v, Traced) for v in kwargs.values()):
            raise UnsupportedError("a rule of one's own takes what depends on x by position")
        duals = [a for a in args if isinstance(a, Dual)]
        halves = [a.halves() if isinstance(a, Dual) else None for a in args]
        primals = [a if h is None else h[0][0] for a, h in zip(args, halves, strict=True)]
        tangents = [None if h is None else h[1].to(duals[0].dtype) for h in halves]
        out = function(*primals, **kwargs)
        return duals[0].of_halves(
            out[None], duals[0].source.lower(jvp(tangents, *primals, **kwargs))
        )

    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet: Any = getattr(function, "overloadpacket", function)
        _add(rule, packet, *(getattr(packet, name) for name in packet.overloads()))
        return function

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        own = next((a for a in (*args, *kwargs.values()) if isinstance(a, Traced)), None)
        if own is None:
            return function(*args, **kwargs)
        return type(own).__torch_function__(called, (), args, kwargs)

    _add(rule, called)
    return called


def _add(rule: Rule, *functions: Any) -> None:
    RULES.update(dict.fromkeys(functions, rule))


def _tensor(name: str, out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        raise TypeError(f"register_rule: {name} must return one tensor, got {type(out).__name__}")
    return out.detach()


def _check(function: Function, jvp: Function, example: tuple[Any, ...]) -> None:
    live = [
        isinstance(a, Tensor) and a.is_floating_point() and a.ndim > 0 and a.shape[0] > 1
        for a in example
    ]
    if not any(live):
        raise ValueError("register_rule: example has no floating tensor [B, ...] with B at least 2")
    generator = torch.Generator().manual_seed(0)

    def noise(a: Tensor) -> Tensor:
        return torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a)

    own = [a.detach() if isinstance(a, Tensor) else a for a in example]
    steps = [noise(a) if is_live else None for a, is_live in zip(own, live, strict=True)]
    dtype = next(a.dtype for a, is_live in zip(own, live, strict=True) if is_live)
    h = _STEPS.get(dtype, 0.1)

    def at(scale: float, *, first_only: bool = False) -> Tensor:
        moved = []
        for a, u in zip(own, steps, strict=True):
            if u is None:
                moved.append(a)
                continue
            v = u.clone()
            if first_only:
                v[1:] = 0
            moved.append(a + scale * v)
        return _tensor("function", function(*moved)).double()

    here, alone = at(0.0), at(1.0, first_only=True)
    lead = next(a.shape[0] for a, is_live in zip(own, live, strict=True) if is_live)
    if here.ndim == 0 or here.shape[0] != lead:
        raise ValueError(
            f"register_rule: function must return [{lead}, ...] like its arguments, got"
            f" {tuple(here.shape)}"
        )
    if not torch.allclose(alone[1:], here[1:], rtol=1e-5, atol=1e-6):
        raise ValueError("register_rule: function mixes samples: a row depends on other rows")
    slope = (at(h) - at(-h)) / (2 * h)
    tangents = [None if u is None else torch.stack([u, -2 * u]) for u in steps]
    found = _tensor("jvp", jvp(tangents, *own)).double()
    expected = torch.stack([slope, -2 * slope])
    if found.shape != expected.shape:
        raise ValueError(
            f"register_rule: jvp must return {tuple(expected.shape)}, got {tuple(found.shape)}"
        )
    off = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not off <= _BOUNDS.get(dtype, 0.2):
        raise ValueError(
            f"register_rule: jvp is off from central differences by {off:.2g} of their norm"
        )
