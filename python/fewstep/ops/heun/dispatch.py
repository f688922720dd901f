"""The kernels behind the samplers, each on whichever backend; see `fewstep.reference.heun`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fewstep.reference import heun as reference

Maybe = Tensor | None
STATES = ("float32", "compensated", "float64")
_LOW = (torch.float16, torch.bfloat16)
_combine_out = torch.ops.fewstep.heun_combine_out.default


def group(network: torch.dtype) -> tuple[str, ...]:
    """The kernels of a call, for `fewstep.verification`."""
    return "heun", str(network).removeprefix("torch.")


def into(backend: str, network: torch.dtype) -> Callable[..., None]:
    """What makes one pass, without gradients, into buffers, which may be its inputs.

    Arguments `x, low, terms, table, row, seeds`, then what is written, each None where not wanted:

        high     y in the state's dtype
        out_low  what rounding left of y
        net      the network's next input, in the network's dtype
        wrong    int32 `[1]`, set to 1 where a result is not finite
    """
    if backend == "triton":
        return cast(Callable[..., None], _triton().heun_combine_out.default)
    if network in _LOW and backend in ("cpp", "cuda"):
        return _through_float32 if backend == "cpp" else _through_float32_if_mixed
    if backend in ("cpp", "cuda"):
        return _combine_out
    return _by_reference


def _through_float32(
    x: Tensor,
    low: Maybe,
    terms: list[Tensor],
    table: Tensor,
    row: int,
    seeds: Maybe,
    high: Maybe,
    out_low: Maybe,
    net: Maybe,
    wrong: Maybe,
) -> None:
    """The CPU's kernels read and write float32 for networks in half precision.

    So do those of CUDA beside a term in float32: they take one dtype for terms and net.
    """
    wide = None if net is None else net.float()
    own = [term.float() for term in terms]
    _combine_out(x, low, own, table, row, seeds, high, out_low, wide, wrong)
    if net is not None and wide is not None:
        net.copy_(wide)


def _through_float32_if_mixed(x: Tensor, low: Maybe, terms: list[Tensor], *rest: Any) -> None:
    mixed = any(term.dtype not in _LOW for term in terms)
    (_through_float32 if mixed else _combine_out)(x, low, terms, *rest)


def _by_reference(
    x: Tensor,
    low: Maybe,
    terms: list[Tensor],
    table: Tensor,
    row: int,
    seeds: Maybe,
    high: Maybe,
    out_low: Maybe,
    net: Maybe,
    wrong: Maybe,
) -> None:
    dtype = torch.float32 if _plain(x, low, out_low) else torch.float64
    noise = None if seeds is None else reference.noise(seeds, row, tuple(x.shape[1:])).to(dtype)
    y, z = reference.combine(x, low, terms, table[row].to(dtype), noise)
    if net is not None:
        net.copy_(z)
    if wrong is not None:
        wrong.bitwise_or_((~y.isfinite()).any().to(torch.int32))
    for target, part in zip((high, out_low), reference.split(y, x.dtype), strict=True):
        if target is not None:
            target.copy_(part)


def _plain(x: Tensor, low: Maybe, out_low: Maybe) -> bool:
    """Whether arithmetic is in float32: that of a float32 state with nothing kept of its rest."""
    return x.dtype == torch.float32 and low is None and out_low is None


def combine(
    backend: str,
    x: Tensor,
    low: Maybe,
    terms: list[Tensor],
    table: Tensor,
    row: int,
    *,
    seeds: Maybe = None,
    want_low: bool = False,
    want_net: bool = False,
) -> tuple[Tensor, Maybe, Maybe]:
    """One pass to new tensors: y, what rounding left of it, the network's next input.

    Gradients go through y and the network's input; low is taken for a constant. Noise is made by
    the reference.
    """
    if backend != "reference" and seeds is None and not table.requires_grad:
        ops = _triton() if backend == "triton" else torch.ops.fewstep
        own = [term.float() if term.dtype in _LOW else term for term in terms]
        high, rest, net = ops.heun_combine.default(x, low, own, table, row, want_low, want_net)
        return high, rest if want_low else None, net if want_net else None
    wide = torch.float32 if _plain(x, low, x if want_low else None) else torch.float64
    noise = None if seeds is None else reference.noise(seeds, row, tuple(x.shape[1:])).to(wide)
    y, z = reference.combine(x, low, terms, table[row].to(wide), noise)
    high, rest = reference.split(y, x.dtype)
    net = z.to(terms[0].dtype if terms else x.dtype)
    return high, rest.detach() if want_low else None, net if want_net else None


def _fake_combine(
    x: Tensor,
    low: Maybe,
    terms: list[Tensor],
    table: Tensor,
    row: int,
    want_low: bool,
    want_net: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    like = terms[0] if terms else x
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if want_low else (0,)),
        like.new_empty(x.shape if want_net else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, terms, table, ctx.row, _, ctx.want_net = inputs
    ctx.dtypes = [x.dtype, *(term.dtype for term in terms)]
    ctx.save_for_backward(table)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, g: Tensor, _: Any, g_net: Tensor) -> tuple[Any, ...]:
    """A combination is linear: nothing but its coefficients is saved."""
    if ctx.needs_input_grad[3]:
        raise NotImplementedError("heun_combine: the table has no gradient")
    (table,) = ctx.saved_tensors
    c = table[ctx.row].to(g.dtype).T.reshape(reference.COLUMNS, -1, *(1,) * (g.ndim - 1))
    if ctx.want_net:
        g_net = g_net.to(g.dtype)
        g = g + c[reference.SCALE] * g_net
    grads = []
    for j, dtype in enumerate(ctx.dtypes):
        own = c[j] * g
        if ctx.want_net:
            own = own + c[reference.NET + j] * g_net
        grads.append(own.to(dtype))
    return grads[0], None, grads[1:], *(None,) * 4


@functools.cache
def _triton() -> Any:
    importlib.import_module("fewstep.kernels.heun")
    _register("fewstep_triton")
    return torch.ops.fewstep_triton


def _register(namespace: str) -> None:
    torch.library.register_fake(f"{namespace}::heun_combine", _fake_combine)
    torch.library.register_autograd(f"{namespace}::heun_combine", _backward, setup_context=_setup)


_register("fewstep")
torch.library.register_fake("fewstep::heun_combine_out", lambda *_: None)
