"""The kernels behind dual numbers and probes, with their derivatives of every order.

Shapes are those of `fewstep.reference.dual` and `fewstep.reference.probe`.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep._torch import is_transformed, wide
from fewstep.reference import dual as reference
from fewstep.reference import probe as reference_probe

Maybe = Tensor | None
COMPILED = ("cpp", "triton")


def group(dtype: torch.dtype, tangents: torch.dtype | None = None) -> tuple[str, ...]:
    """The kernels of a call, for `fewstep.verification`."""
    low = () if tangents is None else (f"{tangents} tangents".removeprefix("torch."),)
    return "divergence", str(dtype).removeprefix("torch."), *low


def _ops(backend: str) -> Any:
    """The ops of a compiled backend."""
    if backend == "cpp":
        return torch.ops.fewstep
    for module in ("dual", "norms", "probe"):
        importlib.import_module(f"fewstep.kernels.{module}")
    _register("fewstep_triton")
    return torch.ops.fewstep_triton


def call_op(op: Callable[..., Any], *arguments: Any) -> Any:
    """Without gradients, past the Python that torch runs for them: half of a small call's time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def activate(
    backend: str,
    z: Tensor,
    shared: Maybe,
    shift: Maybe,
    tangents: int,
    kind: str,
    beta: float = 1.0,
    threshold: float = 20.0,
    inner: int = 1,
) -> Tensor:
    """`fewstep.reference.dual.activate` by a backend."""
    if backend in COMPILED:
        index = reference.ACTIVATIONS.index(kind)
        return call_op(  # type: ignore[no-any-return]
            *(_ops(backend).dual_activate.default, z, shared, shift),
            *(tangents, index, beta, threshold, inner),
        )
    return reference.activate(z, shared, shift, tangents, kind, beta, threshold, inner)


def activate_pair(
    backend: str,
    z: Tensor,
    u: Tensor,
    shift: Maybe,
    kind: str,
    beta: float = 1.0,
    threshold: float = 20.0,
    inner: int = 1,
) -> tuple[Tensor, Tensor]:
    """`fewstep.reference.dual.activate_pair` by a backend: z float32, u bfloat16."""
    if backend in COMPILED:
        index = reference.ACTIVATIONS.index(kind)
        op = _ops(backend).dual_activate_pair.default
        return call_op(op, z, u, shift, index, beta, threshold, inner)  # type: ignore[no-any-return]
    return reference.activate_pair(z, u, shift, kind, beta, threshold, inner)


def _fits(z: Tensor, groups: int) -> bool:
    """Whether Triton's kernels take rows so long; the reference serves others."""
    config = importlib.import_module("fewstep.kernels.config")
    most: int = config.LONGEST_ROW[str(z.dtype).removeprefix("torch.")]
    return 0 < z.shape[1:].numel() // groups <= most


def _weights(backend: str, z: Tensor, *weights: Maybe) -> list[Maybe]:
    """Of a norm, as a backend takes them: Triton's kernels know none of blocks."""
    if backend != "triton":
        return list(weights)
    return [reference.per_element(w, z.shape[1:].numel()) for w in weights]


def norm(
    backend: str,
    z: Tensor,
    shift: Maybe,
    weight: Maybe,
    bias: Maybe,
    tangents: int,
    groups: int,
    centred: bool,
    eps: float,
) -> Tensor:
    """`fewstep.reference.dual.norm` by a backend."""
    weight, bias = _weights(backend, z, weight, bias)
    if backend == "cpp" or (backend == "triton" and _fits(z, groups)):
        return call_op(  # type: ignore[no-any-return]
            *(_ops(backend).dual_norm.default, z, shift, weight, bias),
            *(tangents, groups, centred, eps),
        )
    return reference.norm(z, shift, weight, bias, tangents, groups, centred, eps)


def norm_pair(
    backend: str,
    z: Tensor,
    u: Tensor,
    shift: Maybe,
    weight: Maybe,
    bias: Maybe,
    groups: int,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`fewstep.reference.dual.norm_pair` by a backend: z float32, u bfloat16."""
    weight, bias = _weights(backend, z, weight, bias)
    if backend == "cpp" or (backend == "triton" and _fits(z, groups)):
        op = _ops(backend).dual_norm_pair.default
        return call_op(op, z, u, shift, weight, bias, groups, centred, eps)  # type: ignore[no-any-return]
    return reference.norm_pair(z, u, shift, weight, bias, groups, centred, eps)


def norm_tangents(
    z: Tensor, u: Tensor, weight: Maybe, groups: int, centred: bool, eps: float
) -> Tensor:
    """The tangents of `fewstep.reference.dual.norm_pair` alone, in C++: u of z's dtype."""
    op = torch.ops.fewstep.dual_norm_tangents.default
    return call_op(op, z, u, weight, groups, centred, eps)  # type: ignore[no-any-return]


def probe_index(kind: str) -> int:
    """Of a kind of probes, as the C++ ops take it."""
    return reference_probe.PROBES.index(kind)


def probe(backend: str, like: Tensor, key: Tensor, ids: Maybe, count: int, kind: str) -> Tensor:
    """`count` probes for each sample of `like` `[B, ...]`: `[K, B, ...]`."""
    if backend in COMPILED:
        index = reference_probe.PROBES.index(kind)
        return call_op(_ops(backend).probe.default, like, key, ids, count, index)  # type: ignore[no-any-return]
    shape, dtype = (count, *like.shape), wide(like.dtype)
    return reference_probe.probes(key.to(like.device), ids, shape, kind, dtype).to(like.dtype)


def probe_dot(backend: str, y: Tensor, key: Tensor, ids: Maybe, count: int, kind: str) -> Tensor:
    """`<v_k, y_k>` for y `[K B, ...]`: `[K, B]`; in float32 where y is less."""
    if backend in COMPILED:
        index = reference_probe.PROBES.index(kind)
        return call_op(_ops(backend).probe_dot.default, y, key, ids, count, index)  # type: ignore[no-any-return]
    like = y.detach().reshape(count, -1, *y.shape[1:])
    v = reference_probe.probes(key.to(y.device), ids, tuple(like.shape), kind, wide(y.dtype))
    return (v.flatten(2) * y.reshape(count, like.shape[1], -1)).sum(-1)


def probe_scale(backend: str, g: Tensor, key: Tensor, ids: Maybe, d: int, kind: str) -> Tensor:
    """`g_k v_k` for g `[K, B]`: `[K, B, D]`."""
    if backend in COMPILED:
        index = reference_probe.PROBES.index(kind)
        return call_op(_ops(backend).probe_scale.default, g, key, ids, d, index)  # type: ignore[no-any-return]
    v = reference_probe.probes(key.to(g.device), ids, (*g.shape, d), kind, g.dtype)
    return v * g[..., None]


def _fake_activate(z: Tensor, shared: Maybe, shift: Maybe, tangents: int, *_: Any) -> Tensor:
    lead = z.shape[0] * (1 if shared is None else tangents + 1)
    return z.new_empty((lead, *z.shape[1:]))


def _fake_activate_backward(g: Tensor, z: Tensor, *_: Any) -> Tensor:
    return z.new_empty(z.shape)


def _fake_pair(z: Tensor, u: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), u.new_empty(u.shape)


def _fake_pair_backward(ga: Tensor, gt: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_pair(*rest)


def _fake_weights(z: Tensor, weight: Maybe) -> tuple[Tensor, Tensor]:
    """Their gradients and those of a bias."""
    width = z.shape[1:].numel() if weight is None else weight.numel()
    return z.new_empty((width,)), z.new_empty((width,))


def _fake_norm_pair_backward(
    ga: Tensor, gt: Tensor, z: Tensor, u: Tensor, shift: Maybe, weight: Maybe, *_: Any
) -> tuple[Tensor, ...]:
    return *_fake_pair(z, u), *_fake_weights(z, weight)


def _fake_norm(z: Tensor, *_: Any) -> Tensor:
    return z.new_empty(z.shape)


def _fake_norm_tangents(z: Tensor, u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape)


def _fake_norm_backward(
    g: Tensor, z: Tensor, shift: Maybe, weight: Maybe, *_: Any
) -> tuple[Tensor, ...]:
    return z.new_empty(z.shape), *_fake_weights(z, weight)


def _fake_probe(like: Tensor, key: Tensor, ids: Maybe, count: int, kind: int) -> Tensor:
    return like.new_empty((count, *like.shape))


def _fake_probe_dot(y: Tensor, key: Tensor, ids: Maybe, count: int, kind: int) -> Tensor:
    return y.new_empty((count, y.shape[0] // count), dtype=wide(y.dtype))


def _fake_probe_scale(g: Tensor, key: Tensor, ids: Maybe, d: int, kind: int) -> Tensor:
    return g.new_empty((*g.shape, d))


def _as_shift(primal: Tensor, shift: Tensor, inner: int) -> Tensor:
    """The gradient of a shift from that of the primal."""
    own: Tensor = primal.reshape(-1, shift.numel(), inner).sum((0, 2)).reshape(shift.shape)
    return own


def _setup_activate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, shared, shift, *ctx.options = inputs
    ctx.save_for_backward(z, shared, shift)


def _backward_activate(ops: Any, ctx: Any, g: Tensor) -> tuple[Any, ...]:
    z, shared, shift = ctx.saved_tensors
    tangents, inner = ctx.options[0], ctx.options[-1]
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("dual_activate: shared tangents have no gradient; expand them")
    gz = ops.dual_activate_backward.default(g, z, shared, shift, *ctx.options)
    gs = None
    if ctx.needs_input_grad[2]:
        batch = z.shape[0] if shared is not None else z.shape[0] // (tangents + 1)
        gs = _as_shift(gz[:batch], shift, inner)
    return gz, None, gs, *(None,) * 5


def _as_weight(g: Tensor, w: Maybe) -> Maybe:
    """Of a weight, or of a bias without one beside it, whose gradient is by elements."""
    if w is None or g.numel() == w.numel():
        return w if w is None else g.reshape(w.shape)
    return g.reshape(w.numel(), -1).sum(1).reshape(w.shape)


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, shift, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(z, shift, weight, bias)


def _backward_norm(ops: Any, ctx: Any, g: Tensor) -> tuple[Any, ...]:
    z, shift, weight, bias = ctx.saved_tensors
    gz, gw, gb = ops.dual_norm_backward.default(g, z, shift, weight, *ctx.options)
    gs = None
    if shift is not None and ctx.needs_input_grad[1]:
        gs = _as_shift(gz[: z.shape[0] // (ctx.options[0] + 1)], shift, 1)
    return (
        gz,
        gs,
        *(_as_weight(g, w) for g, w in ((gw, weight), (gb, bias))),
        *(None,) * 4,
    )


def _setup_pair(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Tensors before options."""
    tensors = [v for v in inputs if v is None or isinstance(v, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.options = inputs[len(tensors) :]


def _backward_activate_pair(ops: Any, ctx: Any, ga: Tensor, gt: Tensor) -> tuple[Any, ...]:
    z, u, shift = ctx.saved_tensors
    gz, gu = ops.dual_activate_pair_backward.default(ga, gt, z, u, shift, *ctx.options)
    gs = _as_shift(gz, shift, ctx.options[-1]) if ctx.needs_input_grad[2] else None
    return gz, gu, gs, *(None,) * 4


def _backward_norm_pair(ops: Any, ctx: Any, ga: Tensor, gt: Tensor) -> tuple[Any, ...]:
    z, u, shift, weight, bias = ctx.saved_tensors
    gz, gu, gw, gb = ops.dual_norm_pair_backward.default(ga, gt, z, u, shift, weight, *ctx.options)
    return (
        *(gz, gu),
        _as_shift(gz, shift, 1) if ctx.needs_input_grad[2] else None,
        *(_as_weight(g, w) for g, w in ((gw, weight), (gb, bias))),
        *(None,) * 3,
    )


def through_reference(
    function: Callable[..., Any], tensors: tuple[Maybe, ...], grads: tuple[Maybe, ...]
) -> list[Maybe]:
    """Gradients of `function(*tensors)` with respect to each tensor, by torch's own rules."""
    with torch.enable_grad():
        own = [None if t is None else t.detach().requires_grad_(True) for t in tensors]
        out = function(*own)
        pairs = [(o, g) for o, g in zip(out, grads, strict=True) if g is not None]
        live = [t for t in own if t is not None]
        outputs, upstream = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, live, upstream, allow_unused=True))
    return [None if t is None else next(found) for t in own]


def _backward_second_activate(_: Any, ctx: Any, g: Tensor) -> tuple[Any, ...]:
    """Of `dual_activate_backward`, by the reference: once more, and no further."""
    tangents, kind, beta, threshold, inner = ctx.options

    def gradient(up: Tensor, z: Tensor, shared: Maybe, shift: Maybe) -> tuple[Tensor]:
        name = reference.ACTIVATIONS[kind]
        out = reference.activate(z, shared, shift, tangents, name, beta, threshold, inner)
        return torch.autograd.grad(out, (z,), up, create_graph=True)  # type: ignore[return-value]

    return *through_reference(gradient, ctx.saved_tensors, (g,)), *(None,) * 5


def _backward_second_norm(_: Any, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Of `dual_norm_backward`, by the reference: once more, and no further."""
    tangents, groups, centred, eps = ctx.options
    z, weight = ctx.saved_tensors[1], ctx.saved_tensors[3]
    width = z.shape[1:].numel()

    def gradient(up: Tensor, z: Tensor, shift: Maybe, weight: Maybe) -> tuple[Tensor, ...]:
        w = z.new_ones(width).requires_grad_(True) if weight is None else weight
        b = z.new_zeros(w.numel()).requires_grad_(True)
        out = reference.norm(z, shift, w, b, tangents, groups, centred, eps)
        return torch.autograd.grad(out, (z, w, b), up, create_graph=True)

    shaped = (grads[0], grads[1] if weight is None else grads[1].reshape(weight.shape), grads[2])
    return *through_reference(gradient, ctx.saved_tensors, shaped), *(None,) * 4


def _backward_second_activate_pair(_: Any, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    kind, *options = ctx.options

    def gradient(ga: Tensor, gt: Tensor, z: Tensor, u: Tensor, s: Maybe) -> tuple[Tensor, ...]:
        out = reference.activate_pair(z, u, s, reference.ACTIVATIONS[kind], *options)
        return torch.autograd.grad(out, (z, u), (ga, gt), create_graph=True)

    return *through_reference(gradient, ctx.saved_tensors, grads), *(None,) * 4


def _backward_second_norm_pair(_: Any, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    z, weight = ctx.saved_tensors[2], ctx.saved_tensors[5]
    width = z.shape[1:].numel()

    def gradient(
        ga: Tensor, gt: Tensor, z: Tensor, u: Tensor, shift: Maybe, weight: Maybe
    ) -> tuple[Tensor, ...]:
        w = z.new_ones(width).requires_grad_(True) if weight is None else weight
        b = z.new_zeros(w.numel()).requires_grad_(True)
        out = reference.norm_pair(z, u, shift, w, b, *ctx.options)
        return torch.autograd.grad(out, (z, u, w, b), (ga, gt), create_graph=True)

    gz, gu, gw, gb = grads
    shaped = (gz, gu, gw if weight is None else gw.reshape(weight.shape), gb)
    return *through_reference(gradient, ctx.saved_tensors, shaped), *(None,) * 3


def _backward_norm_tangents(_: Any, ctx: Any, g: Tensor) -> tuple[Any, ...]:
    """By the reference: once, and no further."""

    def tangents(z: Tensor, u: Tensor, weight: Maybe) -> tuple[Tensor]:
        return (reference.norm_pair(z, u, None, weight, None, *ctx.options)[1],)

    return *through_reference(tangents, ctx.saved_tensors, (g,)), *(None,) * 3


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _setup_dot(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, key, ids, _, ctx.kind = inputs
    ctx.shape, ctx.dtype = y.shape, y.dtype
    ctx.save_for_backward(key, ids)


def _backward_dot(ops: Any, ctx: Any, g: Tensor) -> tuple[Any, ...]:
    key, ids = ctx.saved_tensors
    d = ctx.shape[1:].numel()
    gy = ops.probe_scale.default(g, key, ids, d, ctx.kind)
    return gy.reshape(ctx.shape).to(ctx.dtype), *(None,) * 4


def _setup_scale(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, key, ids, _, ctx.kind = inputs
    ctx.save_for_backward(key, ids)


def _backward_scale(ops: Any, ctx: Any, g: Tensor) -> tuple[Any, ...]:
    key, ids = ctx.saved_tensors
    dots = ops.probe_dot.default(g.flatten(0, 1), key, ids, g.shape[0], ctx.kind)
    return dots, *(None,) * 4


def on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake kernel also runs where some tensors have no memory: then none may have any."""

    def run(*arguments: Any) -> Any:
        listed = (m for a in arguments for m in (a if isinstance(a, (list, tuple)) else (a,)))
        if len({m.device.type == "meta" for m in listed if isinstance(m, Tensor)}) > 1:
            raise RuntimeError("fewstep: tensors with memory beside tensors on the meta device")
        return fake(*arguments)

    return run


def attach(namespace: str, name: str, fake: Any, setup: Any, backward: Any) -> None:
    """A fake kernel and derivative, called with the ops of the namespace, for one op."""
    op, ops = f"{namespace}::{name}", getattr(torch.ops, namespace)
    torch.library.register_fake(op, on_one_device(fake))
    torch.library.register_autograd(op, functools.partial(backward, ops), setup_context=setup)


_registered: set[str] = set()


def _register(namespace: str) -> None:
    """Attach fake kernels and derivatives to the ops of a namespace, once."""
    if namespace in _registered:
        return
    _registered.add(namespace)
    pair = _setup_pair
    for name, fake, setup, backward in (
        ("dual_activate", _fake_activate, _setup_activate, _backward_activate),
        ("dual_activate_backward", _fake_activate_backward, pair, _backward_second_activate),
        ("dual_norm", _fake_norm, _setup_norm, _backward_norm),
        ("dual_norm_tangents", _fake_norm_tangents, pair, _backward_norm_tangents),
        ("dual_norm_backward", _fake_norm_backward, pair, _backward_second_norm),
        ("dual_activate_pair", _fake_pair, pair, _backward_activate_pair),
        (
            *("dual_activate_pair_backward", _fake_pair_backward),
            *(pair, _backward_second_activate_pair),
        ),
        ("dual_norm_pair", _fake_pair, pair, _backward_norm_pair),
        (
            *("dual_norm_pair_backward", _fake_norm_pair_backward),
            *(pair, _backward_second_norm_pair),
        ),
        ("probe", _fake_probe, _no_gradient, lambda ops, ctx, g: (None,) * 5),
        ("probe_dot", _fake_probe_dot, _setup_dot, _backward_dot),
        ("probe_scale", _fake_probe_scale, _setup_scale, _backward_scale),
    ):
        if hasattr(getattr(torch.ops, namespace), name):
            attach(namespace, name, fake, setup, backward)


_register("fewstep")


def present(*tensors: Tensor | None) -> None:
    """Raise where weights that are used after their layer's forward have no data any more."""
    if torch.compiler.is_compiling() or is_transformed():
        return
    for z in tensors:
        if z is not None and not z.untyped_storage().nbytes() and z.numel():
            raise RuntimeError(f"weights {tuple(z.shape)} are freed after their layer's forward")


def kernel_shift(
    shift: Tensor | None, shape: torch.Size, *, row: int | None = None
) -> tuple[Tensor | None, int]:
    """A shift as the kernels take it, with the elements that share each value of it.

    Args:
        row: elements of the rows that a norm is over: its shift is of whole rows.
    """
    if shift is None:
        return None, 1
    present(shift)
    own = tuple(shift.shape)
    while own and own[0] == 1:
        own = own[1:]
    if own == tuple(shape[len(shape) - len(own) :]):
        if row is None or row == 0 or shift.numel() % row == 0:
            return shift, 1
        return shift.expand(1, *shape[1:]), 1
    if len(own) == len(shape) - 1 and own[0] == shape[1] and max(own[1:], default=1) == 1:
        return (shift, math.prod(shape[2:])) if row is None else (shift.expand(1, *shape[1:]), 1)
    one = shift.ndim < len(shape) or shift.shape[0] == 1
    return shift.expand(1, *shape[1:]) if one else shift.expand(shape), 1
