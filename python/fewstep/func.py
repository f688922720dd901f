"""Transforms with the signatures of `torch.func`, by the engines of fewstep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewstep.ops.trace.jvp import jvp as _jvp

__all__ = ["jvp"]


def jvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    strict: bool = False,
    has_aux: bool = False,
) -> Any:
    """`torch.func.jvp` for codes that call it, by `fewstep.jvp`.

    Gradients flow through the value and the tangent, as they do there. Where the tangent is used as
    a constant, `fewstep.jvp` costs less: call it in place of this one.

    Args:
        func (Callable): called as `func(*primals)`.
        primals (tuple): tensors.
        tangents (tuple): a tensor of the same shape for each, or what `fewstep.jvp` takes.
        strict (bool): raise where the output does not depend on the primals, by `torch.func.jvp`
            itself.
        has_aux (bool): func returns a pair, of which the second has no tangents.

    Returns:
        tuple: output and tangent, and what func returned beside the output with `has_aux`.

    Raises:
        ValueError, TypeError: as `fewstep.jvp`.
        RuntimeError: as `torch.func.jvp`, with `strict`.

    >>> import fewstep.func
    >>> fewstep.func.jvp(torch.sin, (torch.zeros(2),), (torch.ones(2),))
    (tensor([0., 0.]), tensor([1., 1.]))
    """
    if strict:
        return torch.func.jvp(func, primals, tangents, strict=True, has_aux=has_aux)
    found = _jvp(func, primals, tangents, through=True)
    if not has_aux:
        return found.value, found.tangent
    if not isinstance(found.value, tuple) or len(found.value) != 2:
        raise ValueError(
            f"jvp: func must return a pair with has_aux=True, got {type(found.value).__name__}"
        )
    output, aux = found.value
    return output, found.tangent[0], aux
