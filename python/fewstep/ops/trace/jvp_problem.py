"""What `jvp` is given: a network with its inputs and their tangents, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep._checks import is_number, strided
from fewstep._tree import mapped


@dataclass(frozen=True)
class Problem:
    """What `jvp` was given, checked.

    Attributes:
        tangents: `[K, *shape]` of each input, or None.
        kept: gradients flow through the tangents, if there are any.
    """

    network: Callable[..., Any]
    inputs: tuple[Any, ...]
    tangents: tuple[Tensor | None, ...]
    kwargs: Mapping[str, Any]
    through: bool

    @property
    def live(self) -> list[Tensor]:
        """Inputs that have tangents."""
        return [x for x, u in zip(self.inputs, self.tangents, strict=True) if u is not None]

    @property
    def moved(self) -> list[Tensor]:
        return [u for u in self.tangents if u is not None]

    @property
    def batch(self) -> int | None:
        """B of the first input with a tangent that is no scalar."""
        return next((x.shape[0] for x in self.live if x.ndim), None)

    def fresh(self) -> Problem:
        """With copies of what a network could change in place."""
        inputs = [
            _copy(x) if u is None else x for x, u in zip(self.inputs, self.tangents, strict=True)
        ]
        kwargs = {name: _copy(value) for name, value in self.kwargs.items()}
        return replace(self, inputs=tuple(inputs), kwargs=kwargs)

    def run(self, *live: Tensor) -> tuple[list[Tensor], Any]:
        """The floating tensors of the result for other inputs with tangents, and the result."""
        own = self.fresh()
        given = iter(live)
        inputs = [
            x if u is None else next(given) for x, u in zip(own.inputs, self.tangents, strict=True)
        ]
        out = self.network(*inputs, **own.kwargs)
        return [z for z in tensors_of(out) if z.is_floating_point()], out

    def few(self, rows: int) -> Problem:
        """The first samples, with Gaussian tangents, K = 2."""
        batch = self.batch

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            whole = batch is None or value.ndim == 0 or value.shape[0] != batch
            return (value if whole else value[:rows]).detach().clone()

        inputs = tuple(map(cut, self.inputs))
        tangents = tuple(
            None if u is None else torch.randn_like(x.expand(2, *x.shape))
            for x, u in zip(inputs, self.tangents, strict=True)
        )
        inputs = tuple(
            x if u is None else x.requires_grad_(True)
            for x, u in zip(inputs, tangents, strict=True)
        )
        kwargs = {name: cut(value) for name, value in self.kwargs.items()}
        return replace(self, inputs=inputs, tangents=tangents, kwargs=kwargs)


def tensors_of(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def take(z: Tensor) -> Tensor:
        found.append(z)
        return z

    mapped(tree, take)
    return found


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def checked(
    network: Callable[..., Any],
    inputs: Any,
    tangents: Any,
    through: bool,
    kwargs: Mapping[str, Any],
) -> tuple[Problem, bool]:
    """The problem, and whether its tangents have an axis K."""
    for name, given in (("inputs", inputs), ("tangents", tangents)):
        if not isinstance(given, (tuple, list)):
            raise TypeError(f"jvp: {name} must be a tuple, got {type(given).__name__}")
    if len(inputs) != len(tangents):
        raise ValueError(
            f"jvp: tangents must be {len(inputs)}, one for each input, got {len(tangents)}"
        )
    counts: dict[int, int] = {}
    for i, (x, u) in enumerate(zip(inputs, tangents, strict=True)):
        if u is None:
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"jvp: tangents[{i}] must be None, since inputs[{i}] is no floating tensor, got"
                f" {kind}"
            )
        strided("jvp", f"inputs[{i}]", x)
        if not isinstance(u, Tensor):
            if not is_number(u):
                raise TypeError(
                    f"jvp: tangents[{i}] must be a tensor, a number or None, got {type(u).__name__}"
                )
            continue
        strided("jvp", f"tangents[{i}]", u)
        if u.dtype != x.dtype or u.device != x.device:
            raise ValueError(
                f"jvp: tangents[{i}] must be {x.dtype} on {x.device} like its input, got {u.dtype}"
                f" on {u.device}"
            )
        if u.shape != x.shape and u.shape[1:] != x.shape:
            shape = tuple(x.shape)
            raise ValueError(
                f"jvp: tangents[{i}] must be {shape} like its input, or K of them, got"
                f" {tuple(u.shape)}"
            )
        counts[i] = 0 if u.shape == x.shape else u.shape[0]
        if u.shape != x.shape and counts[i] == 0:
            raise ValueError(f"jvp: tangents[{i}] must be one at least, got {tuple(u.shape)}")
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"jvp: all tangents must have the same axis K in front, or none, got {counts}"
        )
    count = max([0, *counts.values()])
    many = count > 0
    if all(u is None for u in tangents):
        raise ValueError("jvp: tangents must be for one input at least, got None for each")

    def whole(x: Any, u: Any) -> Tensor | None:
        if u is None or isinstance(u, Tensor):
            return u if u is None or many else u[None]
        return x.new_full((max(count, 1), *x.shape), u)  # type: ignore[no-any-return]

    moved = tuple(whole(x, u) for x, u in zip(inputs, tangents, strict=True))
    return Problem(network, tuple(inputs), moved, kwargs, through), many
