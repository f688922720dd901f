"""Rules of complex numbers that depend on x: rotary embeddings and Fourier transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.ops.dual.engine import COMPLEX, OF_PAIRS, Complex, Dual, Moved, of_pairs, same
from fewstep.ops.dual.rules.plain import inside, refuse
from fewstep.ops.dual.rules.shapes import view
from fewstep.ops.dual.traced import Rule, UnsupportedError, register


def _on(*functions: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        COMPLEX.update(dict.fromkeys(functions, rule))
        return rule

    return add


def _numbers(z: Tensor) -> Tensor:
    return torch.view_as_complex(z.contiguous())


def _linear(h: Complex, function: Callable[[Tensor], Tensor]) -> Dual:
    """Of a function that is linear in each sample's complex numbers, and has such."""
    return of_pairs(same(h.pairs, lambda z: torch.view_as_real(function(_numbers(z)))))


def _known(h: Dual) -> None:
    if isinstance(h, (Moved, Complex)) or h.dtype not in OF_PAIRS or h.source.dtype is not None:
        raise UnsupportedError(f"no rule for complex numbers of {h.dtype}")


@register(torch.view_as_complex)
def _view_as_complex(input: Dual) -> Dual:
    _known(input)
    if input.ndim < 2 or input.shape[-1] != 2:
        raise UnsupportedError(f"no rule for complex numbers of {tuple(input.shape)}")
    return of_pairs(input)


@_on(torch.view_as_real)
def _view_as_real(input: Complex) -> Dual:
    return input.pairs


_on(torch.is_complex, torch.Tensor.is_complex)(lambda input: True)
_on(torch.is_floating_point, torch.Tensor.is_floating_point)(lambda input: False)


def _part(index: int) -> Rule:
    return lambda input: view(input.pairs, lambda z: z.select(-1, index))


_on(torch.real, torch.Tensor.real.__get__)(_part(0))  # type: ignore[attr-defined]
_on(torch.imag, torch.Tensor.imag.__get__)(_part(1))  # type: ignore[attr-defined]


def _factor(h: Complex, other: Any) -> Any:
    if isinstance(other, (int, float, complex)) and not isinstance(other, bool):
        return other
    if not isinstance(other, Tensor) or isinstance(other, Dual) or other.device != h.device:
        raise UnsupportedError("no rule for a product of complex numbers that depend on x")
    if torch.promote_types(other.dtype, h.dtype) != h.dtype or other.ndim > h.ndim:
        raise UnsupportedError(f"no rule for {h.dtype} with {other.dtype}")
    shape = tuple(h.shape)
    if torch.broadcast_shapes(other.shape, shape) != shape:  # type: ignore[no-untyped-call]
        raise UnsupportedError(f"no rule for {shape} with {tuple(other.shape)}")
    return other


def _scaled(function: Callable[..., Tensor]) -> Rule:
    def rule(input: Any, other: Any, *, out: None = None) -> Dual:
        refuse({"out": out})
        if not isinstance(input, Complex):
            if function is not torch.mul:
                raise UnsupportedError("no rule for a quotient by what is complex")
            input, other = other, input
        c = _factor(input, other)

        def apply(z: Tensor) -> Tensor:
            of_each = isinstance(c, Tensor) and c.ndim == z.ndim and c.shape[0] > 1
            own = z.unflatten(0, (-1, c.shape[0])) if of_each else z  # type: ignore[no-untyped-call]
            scaled = function(own, c)
            return scaled.flatten(0, 1) if of_each else scaled

        return _linear(input, apply)

    return rule


_on(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)(_scaled(torch.mul))
_on(torch.div, torch.Tensor.div, torch.Tensor.__truediv__)(_scaled(torch.div))


@_on(torch.conj, torch.Tensor.conj)
def _conj(input: Complex) -> Dual:
    return _linear(input, lambda z: z.conj().resolve_conj())


@_on(torch.Tensor.reshape, torch.Tensor.view)
def _reshape(input: Complex, *sizes: Any) -> Dual:
    own = sizes if isinstance(sizes[0], int) else tuple(sizes[0])
    if -1 in own:
        known = -torch.Size(own).numel()
        own = tuple(input.numel() // max(known, 1) if s == -1 else s for s in own)
    return of_pairs(input.pairs.reshape(*own, 2))


@_on(torch.Tensor.flatten, torch.flatten)
def _flatten(input: Complex, start_dim: int = 0, end_dim: int = -1) -> Dual:
    return of_pairs(input.pairs.flatten(start_dim % input.ndim, end_dim % input.ndim))


@_on(torch.transpose, torch.Tensor.transpose)
def _transpose(input: Complex, dim0: int, dim1: int) -> Dual:
    return of_pairs(input.pairs.transpose(*inside(input, dim0, dim1)))


@_on(torch.unsqueeze, torch.Tensor.unsqueeze)
def _unsqueeze(input: Complex, dim: int) -> Dual:
    return of_pairs(input.pairs.unsqueeze(dim % (input.ndim + 1)))


def _fourier(name: str) -> None:
    """A transform along axes that are not the batch."""
    function = getattr(torch.fft, name)
    many = name.endswith(("2", "n"))
    to_real, of_real = name.startswith("irfft"), name.startswith("rfft")

    def along(h: Dual, n: Any, dim: Any) -> dict[str, Any]:
        dims = tuple(dim) if many and dim is not None else (dim,)
        if dim is None:
            raise UnsupportedError(f"no rule for {name} over the batch")
        own: Any = inside(h, *dims)
        return {"s": n, "dim": own} if many else {"n": n, "dim": own[0]}

    def run(h: Dual, n: Any, dim: Any, norm: Any) -> Dual:
        options = {**along(h, n, dim), "norm": norm}
        if to_real:
            assert isinstance(h, Complex)
            return same(h.pairs, lambda z: function(_numbers(z), **options))  # type: ignore[no-any-return]
        if isinstance(h, Complex):
            return _linear(h, lambda z: function(z, **options))
        _known(h)
        return of_pairs(same(h, lambda z: torch.view_as_real(function(z, **options))))

    def once(input: Any, n: Any = None, dim: Any = -1, norm: Any = None, *, out: Any = None) -> Any:
        refuse({"out": out})
        return run(input, n, dim, norm)

    def twice(
        input: Any, s: Any = None, dim: Any = (-2, -1), norm: Any = None, *, out: Any = None
    ) -> Any:
        refuse({"out": out})
        return run(input, s, dim, norm)

    def several(
        input: Any, s: Any = None, dim: Any = None, norm: Any = None, *, out: Any = None
    ) -> Any:
        refuse({"out": out})
        return run(input, s, dim, norm)

    rule = twice if name.endswith("2") else several if many else once
    if not to_real:
        register(function)(rule)
    if not of_real:
        COMPLEX[function] = rule


_NAMES: Sequence[str] = ("rfft", "irfft", "fft", "ifft")
for _name in (*_NAMES, *(f"{n}2" for n in _NAMES), *(f"{n}n" for n in _NAMES)):
    _fourier(_name)
