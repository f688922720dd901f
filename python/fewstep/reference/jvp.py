"""Jacobian-vector products by torch's own derivatives: forward mode, and reverse mode twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewstep._torch import to_random_state
from fewstep.reference.trace import attention_by_math, own_saved_tensors

# Of some tensors to the floating tensors of a network's result, and to the others.
Run = Callable[..., tuple[list[Tensor], list[Tensor]]]
Found = tuple[list[Tensor], list[Tensor], list[Tensor]]  # values, tangents [K, ...], others


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _normalized(input, dims, weight, bias, eps)


def _normalized(
    x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    z = x - x.mean(dims, keepdim=True)
    z = z * (z.square().mean(dims, keepdim=True) + eps).rsqrt()
    z = z if weight is None else z * weight
    return z if bias is None else z + bias


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    statistics = running_mean, running_var
    if not training:
        return F.batch_norm(input, *statistics, weight, bias, False, momentum, eps)
    if running_mean is not None:  # which this updates
        F.batch_norm(input.detach(), *statistics, None, None, True, momentum, eps)
    per = (-1, *(1,) * (input.ndim - 2))
    weight, bias = (w if w is None else w.reshape(per) for w in (weight, bias))
    return _normalized(input, (0, *range(2, input.ndim)), weight, bias, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats or running_mean is not None:
        options = (use_input_stats, momentum, eps)
        return F.instance_norm(input, running_mean, running_var, weight, bias, *options)
    return F.group_norm(input, input.shape[1], weight, bias, eps)


# Torch 2.13 takes the statistics that these save for constants in the third derivative, and in
# the gradient of forward mode's tangents: both are wrong without a word.
_FORMULAS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}


class _ByFormulas(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _FORMULAS.get(func, func)(*args, **(kwargs or {}))


def _norms(through: bool) -> contextlib.AbstractContextManager[Any]:
    """Norms that can be differentiated after a tangent was taken."""
    return _ByFormulas() if through and torch.is_grad_enabled() else contextlib.nullcontext()


def forward_mode(
    run: Run, primals: Sequence[Tensor], tangents: Sequence[Tensor], *, through: bool
) -> Found:
    """By `torch.func.jvp`, one tangent after the other."""
    found: list[list[Tensor]] = []
    values: list[Tensor] = []
    others: list[Tensor] = []
    back = to_random_state(primals[0])
    for k in range(tangents[0].shape[0]):
        if k:
            back()
        grad = torch.is_grad_enabled() and (through or k == 0)
        with attention_by_math(), torch.set_grad_enabled(grad), _norms(through):
            both: Any = torch.func.jvp(
                lambda *own: run(*(x.clone() for x in own)),  # which may be changed in place
                tuple(primals),
                tuple(u[k] for u in tangents),
                has_aux=True,
            )
        v, t, o = both
        if k == 0:
            values, others = v, o
        found.append([z if through else z.detach() for z in t])
    return values, [torch.stack(own) for own in zip(*found, strict=True)], others


def reverse_mode(
    run: Run, primals: Sequence[Tensor], tangents: Sequence[Tensor], *, through: bool
) -> Found:
    """By plain autograd: `J' u` is linear in u, and `J v` is the gradient of `<J' u, v>`.

    What trains in eager PyTorch has them, if its backward has a derivative.
    """
    kept = torch.is_grad_enabled()
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        attention_by_math(),
        own_saved_tensors() if not torch.compiler.is_compiling() else contextlib.nullcontext(),
        _norms(through and kept),
    ):
        own = [x.clone() if x.is_inference() else x for x in primals]
        ys = [
            x.view_as(x) if kept and x.requires_grad else x.detach().requires_grad_(True)
            for x in own
        ]
        values, others = run(*(y.clone() for y in ys))  # which may be changed in place
        tangents = [u.clone() if u.is_inference() else u for u in tangents]
        moved = _twice(values, ys, tangents, create=through and kept)
    if not kept:
        values = [v.detach() for v in values]
    if not (through and kept):
        moved = [t.detach() for t in moved]
    return values, moved, others


def _twice(
    values: Sequence[Tensor], ys: Sequence[Tensor], tangents: Sequence[Tensor], *, create: bool
) -> list[Tensor]:
    count = tangents[0].shape[0]
    live = [v for v in values if v.requires_grad]
    found = {}
    if live:
        us = [torch.zeros_like(v, requires_grad=True) for v in live]
        rows = torch.autograd.grad(live, ys, us, create_graph=True, allow_unused=True)
        pairs = [
            (row, u)
            for row, u in zip(rows, tangents, strict=True)
            if row is not None and row.requires_grad
        ]
        if pairs:
            columns = [
                torch.autograd.grad(
                    [row for row, _ in pairs],
                    us,
                    [u[k] for _, u in pairs],
                    retain_graph=True,
                    create_graph=create,
                    allow_unused=True,
                )
                for k in range(count)
            ]
            for v, *own in zip(live, *columns, strict=True):
                if own[0] is not None:
                    found[id(v)] = torch.stack(own)
    zeros = [v.new_zeros((count, *v.shape)) for v in values]
    return [found.get(id(v), zero) for v, zero in zip(values, zeros, strict=True)]
