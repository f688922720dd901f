"""Jacobian-vector products by duals: each input with tangents is a dual of one source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep._tree import mapped
from fewstep.ops.dual.engine import Dual, DualTensor, Moved
from fewstep.ops.dual.source import Source
from fewstep.ops.dual.traced import UnsupportedError, run_on


def _batch(inputs: Sequence[Any], tangents: Sequence[Tensor | None], *, expand: bool) -> int:
    """B of the inputs that have tangents."""
    shapes = [x.shape for x, u in zip(inputs, tangents, strict=True) if u is not None]
    leads: set[int] = {shape[0] for shape in shapes if len(shape) > 0}
    if len(leads) != 1:
        raise UnsupportedError(f"no rule for inputs of {[tuple(shape) for shape in shapes]}")
    if not expand and not all(map(len, shapes)):
        raise UnsupportedError("no rule for a scalar with a tangent that is compared with nothing")
    return leads.pop()


def by_duals(
    network: Callable[..., Any],
    inputs: Sequence[Any],
    tangents: Sequence[Tensor | None],
    kwargs: Mapping[str, Any],
    source: Source,
    *,
    expand: bool,
) -> tuple[Any, list[tuple[Tensor, Tensor | None]]]:
    """What the network returns, and the value of each tensor in it, `[B, ...]`, with its tangents.

    Args:
        inputs: of the network, in its order.
        tangents: `[K, *shape]` of each input, or None.
        source: with K and B; its own tangents are not used.
        expand: scalars with tangents are `[B]` to the network.

    Raises:
        UnsupportedError: the network asked for something that has no rule.
    """
    source.batch = _batch(inputs, tangents, expand=expand)
    source.chosen = next(x.dtype for x, u in zip(inputs, tangents, strict=True) if u is not None)
    kind = Dual if torch.compiler.is_compiling() else DualTensor

    def stand_in(x: Any, u: Tensor | None) -> Any:
        if u is None:
            return x
        if x.ndim == 0:
            x, u = x.expand(source.batch), u[:, None].expand(-1, source.batch)
        if source.constant:
            return kind(source, x, apart=u.detach().flatten(0, 1))
        return kind(source, torch.cat([x[None], u]).flatten(0, 1))

    def whole(own: Sequence[Any], named: Mapping[str, Any]) -> Any:
        return network(*own, **named)

    out = run_on([stand_in(x, u) for x, u in zip(inputs, tangents, strict=True)], whole, kwargs)
    found: list[tuple[Tensor, Tensor | None]] = []

    def take(z: Any) -> Any:
        if isinstance(z, Moved):
            primal, t = z.rows.halves()
            found.append((z.placed(primal[0]), z.placed(t, 1)))
        elif isinstance(z, Dual):
            primal, t = z.halves()
            found.append((primal[0], t))
        elif z.is_floating_point():
            found.append((z, z.new_zeros((source.count, *z.shape))))
        else:
            found.append((z, None))
        return z

    return mapped(out, take, (Tensor, Dual)), found
