"""The kernels behind the samplers, each on whichever backend; see `fewstep.reference.heun`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.reference import heun as reference

Maybe = Tensor | None
STATES = ("float32", "compensated", "float64")
_LOW = (torch.float16, torch.bfloat16)


def combine_into(
    backend: str,
    x: Tensor,
    low: Maybe,
    terms: list[Tensor],
    table: Tensor,
    row: int,
    *,
    seeds: Maybe = None,
    high: Maybe = None,
    out_low: Maybe = None,
    net: Maybe = None,
    wrong: Maybe = None,
) -> None:
    """One pass, without gradients, into buffers, which may be its inputs.

    Args:
        high (Tensor | None): receives y in the state's dtype.
        out_low (Tensor | None): what rounding left of y.
        net (Tensor | None): the network's input, `c_7 y`, in the network's dtype.
        wrong (Tensor | None): int32 `[1]`, set to 1 where a result is not finite.
    """
    if backend == "triton":
        from fewstep.kernels import heun as kernels  # type: ignore[import-not-found]

        kernels.combine(x, low, terms, table, row, seeds, high, out_low, net, wrong)
        return
    if backend in ("cpp", "cuda"):
        own, wide = terms, net
        if backend == "cpp":  # its kernels read and write float32 for networks in half precision
            own = [term.float() if term.dtype in _LOW else term for term in terms]
            wide = torch.empty_like(x) if net is not None and net.dtype in _LOW else net
        torch.ops.fewstep.heun_combine_out.default(
            x, low, own, table, row, seeds, high, out_low, wide, wrong
        )
        if net is not None and wide is not None and wide is not net:
            net.copy_(wide)
        return
    dtype = torch.float32 if _plain(x, low, out_low) else torch.float64
    own_row = table[row].to(dtype)
    noise = None if seeds is None else reference.noise(seeds, row, tuple(x.shape[1:])).to(dtype)
    y = reference.combine(x, low, terms, own_row, noise)
    if net is not None:
        net.copy_(own_row[:, reference.SCALE].reshape(-1, *(1,) * (x.ndim - 1)) * y)
    if wrong is not None:
        wrong.bitwise_or_((~y.isfinite()).any().to(torch.int32))
    for target, part in zip((high, out_low), reference.split(y, x.dtype), strict=True):
        if target is not None:
            target.copy_(part)


def _plain(x: Tensor, low: Maybe, out_low: Maybe) -> bool:
    """Whether arithmetic is in float32: that of a float32 state with nothing kept of its rest."""
    return x.dtype == torch.float32 and low is None and out_low is None


def combine(
    backend: str, x: Tensor, low: Maybe, terms: list[Tensor], table: Tensor, row: int, wanted: bool
) -> tuple[Tensor, Maybe]:
    """One pass to new tensors y and, where wanted, what rounding left of it; with gradients.

    Gradients reach x and the terms through y; low is taken for a constant.
    """
    if backend == "cpp" and not table.requires_grad:
        own = [term.float() if term.dtype in _LOW else term for term in terms]
        high, rest = torch.ops.fewstep.heun_combine.default(x, low, own, table, row, wanted)
        return high, rest if wanted else None
    wide = torch.float32 if _plain(x, low, x if wanted else None) else torch.float64
    y = reference.combine(x, low, terms, table[row].to(wide))
    high, rest = reference.split(y, x.dtype)
    return high, rest.detach() if wanted else None


def _fake_combine(
    x: Tensor, low: Maybe, terms: list[Tensor], table: Tensor, row: int, want_low: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if want_low else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, terms, table, ctx.row, _ = inputs
    ctx.dtypes = [term.dtype for term in terms]
    ctx.save_for_backward(table)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    """A combination is linear: nothing but its coefficients is saved."""
    if ctx.needs_input_grad[3]:
        raise NotImplementedError("heun_combine: the table has no gradient")
    (table,) = ctx.saved_tensors
    own = table[ctx.row].to(g.dtype).T.reshape(reference.COLUMNS, -1, *(1,) * (g.ndim - 1))
    terms = [(own[j + 1] * g).to(dtype) for j, dtype in enumerate(ctx.dtypes)]
    return own[0] * g, None, terms, None, None, None


torch.library.register_fake("fewstep::heun_combine", _fake_combine)
torch.library.register_autograd("fewstep::heun_combine", _backward, setup_context=_setup)
torch.library.register_fake("fewstep::heun_combine_out", lambda *_: None)
