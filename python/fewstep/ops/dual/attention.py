"""Attention of dual numbers by its kernels, with their derivatives of every order."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fewstep.ops.dual.dispatch import COMPILED, Maybe, attach, call_op, through_reference
from fewstep.reference import attention as reference


def _ops(backend: str) -> Any:
    if backend == "cpp":
        return torch.ops.fewstep
    importlib.import_module("fewstep.kernels.attention")
    _register("fewstep_triton")
    return torch.ops.fewstep_triton


def serves(backend: str, *tensors: Maybe) -> bool:
    """Whether a backend has a kernel for such tensors."""
    devices = {t.device for t in tensors if t is not None}
    if backend == "triton":
        return len(devices) == 1
    return backend == "cpp" and all(device.type == "cpu" for device in devices)


def attention(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Maybe,
    tk: Maybe,
    tv: Maybe,
    mask: Maybe,
    *,
    causal: bool,
    scale: float,
    tangents: int,
    constant: bool = False,
) -> tuple[Tensor, Tensor]:
    """`fewstep.reference.attention.attention` by a backend, on tensors of one dtype.

    Args:
        constant: the tangents are constants for autograd, which keeps none of them.

    Raises:
        ValueError: shapes that do not match.
    """
    _check(q, k, v, tq, tk, tv, mask, tangents)
    options = (causal, scale, tangents)
    if backend not in COMPILED:
        if not constant:
            return reference.attention(q, k, v, tq, tk, tv, mask, *options)
        out = reference.attention(q, k, v, None, None, None, mask, causal, scale, 0)[0]
        with torch.no_grad():
            return out, reference.attention(q, k, v, tq, tk, tv, mask, *options)[1]
    # A float mask in the kernels' dtype; sums are in float32 at least.
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    given = (q, k, v, tq, tk, tv, mask)
    wide = [t if t is None or t.dtype in (dtype, torch.bool) else t.to(dtype) for t in given]
    out, moved, _, _ = call_op(_ops(backend).dual_attention.default, *wide, *options, constant)
    return out.to(q.dtype), moved.to(q.dtype)


def _check(
    q: Tensor, k: Tensor, v: Tensor, tq: Maybe, tk: Maybe, tv: Maybe, mask: Maybe, tangents: int
) -> None:
    def refuse(name: str, expected: str, got: Any) -> None:
        raise ValueError(f"attention: {name} must be {expected}, got {got}")

    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4:
            refuse(name, "[B, H, N, D]", tuple(t.shape))
        if not t.is_floating_point() or t.dtype != q.dtype:
            refuse(name, "floating, of q's dtype", t.dtype)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        refuse("k", f"[{q.shape[0]}, G, M, {q.shape[3]}]", tuple(k.shape))
    if v.shape[:3] != k.shape[:3]:
        refuse("v", f"[{', '.join(map(str, k.shape[:3]))}, E]", tuple(v.shape))
    if (q.shape[1] % k.shape[1] if k.shape[1] else q.shape[1]) != 0:
        refuse("k", f"of heads that divide the {q.shape[1]} of q", k.shape[1])
    for name, u, of in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v)):
        if u is not None and u.shape != (tangents, *of.shape):
            refuse(name, str((tangents, *of.shape)), tuple(u.shape))
    if mask is not None:
        whole = (*q.shape[:3], k.shape[2])
        if mask.ndim != 4 or any(m not in (1, n) for m, n in zip(mask.shape, whole, strict=True)):
            refuse("mask", f"broadcastable to {whole}", tuple(mask.shape))
        if mask.dtype not in (torch.bool, q.dtype):
            refuse("mask", f"bool or {q.dtype}", mask.dtype)


# Inputs of the ops: q, k, v, tq, tk, tv, mask, causal, scale, tangents, constant.
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tangents, shape = rest[-2], (*q.shape[:3], v.shape[3])
    return (
        q.new_empty(shape),
        q.new_empty((tangents, *shape)),
        q.new_empty(shape[:3]),
        q.new_empty((tangents, *shape[:3])),
    )


def _fake_backward(
    go: Tensor,
    gt: Maybe,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Maybe,
    tk: Maybe,
    tv: Maybe,
    *rest: Any,
) -> tuple[Tensor, ...]:
    own = [q.new_empty(z.shape) for z in (q, k, v)]
    return *own, *(q.new_empty((0,) if z is None else z.shape) for z in (tq, tk, tv))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.tangents, ctx.constant = inputs
    out, moved, lse, mean = output
    ctx.set_materialize_grads(False)
    if ctx.constant:
        ctx.mark_non_differentiable(moved, lse, mean)
        ctx.save_for_backward(*tensors[:3], tensors[6], out, lse)
    else:
        ctx.mark_non_differentiable(lse, mean)
        ctx.save_for_backward(*tensors, *output)


def _backward(
    ops: Any, ctx: Any, go: Maybe, gt: Maybe, g_lse: Maybe, g_mean: Maybe
) -> tuple[Any, ...]:
    if ctx.constant:
        q, k, v, mask, out, lse = ctx.saved_tensors
        tq = tk = tv = moved = mean = gt = None
    else:
        q, k, v, tq, tk, tv, mask, out, moved, lse, mean = ctx.saved_tensors
    if go is None and gt is None:
        return (None,) * 11
    if ctx.needs_input_grad[6]:
        raise NotImplementedError("dual_attention: the mask has no gradient")
    whole = gt is not None and ctx.tangents > 0
    given = (tq, tk, tv) if whole else (None, None, None)
    rest = (moved, lse, mean, ctx.causal, ctx.scale, ctx.tangents)
    rest = rest if whole else (None, lse, None, ctx.causal, ctx.scale, 0)
    go = torch.zeros_like(out) if go is None else go
    grads = ops.dual_attention_backward.default(
        go, gt if whole else None, q, k, v, *given, mask, out, *rest
    )
    moves = (g if t is not None else None for g, t in zip(grads[3:], given, strict=True))
    return *grads[:3], *moves, *(None,) * 5


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.tangents = inputs
    ctx.save_for_backward(*tensors[:9])


def _backward_second(_: Any, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Of the backward, by the reference: once more, and no further. What the forward has kept is
    computed again, as functions of its inputs."""
    *live, mask = ctx.saved_tensors
    given = [i for i, t in enumerate(live[5:]) if t is not None]

    def gradient(
        go: Tensor,
        gt: Maybe,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tq: Maybe,
        tk: Maybe,
        tv: Maybe,
    ) -> tuple[Tensor, ...]:
        moves = (tq, tk, tv)
        out, moved = reference.attention(q, k, v, *moves, mask, ctx.causal, ctx.scale, ctx.tangents)
        own = [q, k, v, *(t for t in moves if t is not None)]
        outs, ups = ((out, moved), (go, gt)) if ctx.tangents else ((out,), (go,))
        found = torch.autograd.grad(outs, own, ups, create_graph=True, allow_unused=True)
        return tuple(
            torch.zeros_like(z) if g is None else g for z, g in zip(own, found, strict=True)
        )

    wanted = (*grads[:3], *(grads[3 + i] for i in given))
    found = through_reference(gradient, tuple(live), wanted)
    return *found, *(None,) * 8


_registered: set[str] = set()


def _register(namespace: str) -> None:
    """Attach fake kernels and derivatives to the ops of a namespace, once."""
    if namespace in _registered:
        return
    _registered.add(namespace)
    attach(namespace, "dual_attention", _fake, _setup, _backward)
    attach(namespace, "dual_attention_backward", _fake_backward, _setup_backward, _backward_second)


_register("fewstep")
