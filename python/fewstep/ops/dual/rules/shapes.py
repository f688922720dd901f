"""Rules of shapes and slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual.engine import Dual, Seed, same
from fewstep.ops.dual.rules.plain import cast, inside, of_dtype, primal, refuse
from fewstep.ops.dual.traced import Traced, UnsupportedError, note, register


def view(h: Dual, function: Callable[[Tensor], Any]) -> Any:
    """As `same`, for what shares memory with h: neither is then changed in place."""
    outs = same(h, function)
    h.aliased = True
    for out in (outs,) if isinstance(outs, Dual) else outs:
        out.aliased = True
    return outs


def _parts(tensors: Sequence[Any]) -> tuple[Dual, list[Any]]:
    """What is to be joined, in the dtype of its duals, of which the first comes first."""
    first: Dual = next(h for h in tensors if isinstance(h, Dual))
    for h in tensors:
        if h.ndim != first.ndim or h.shape[0] != first.shape[0]:
            raise UnsupportedError(f"no rule for {tuple(first.shape)} beside {tuple(h.shape)}")
    return first, [h if isinstance(h, Dual) else of_dtype(first, h) for h in tensors]


@register(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Any], dim: int = 0, **rest: Any) -> Dual:
    refuse(rest)
    first, parts = _parts(tensors)
    (dim,) = inside(first, dim)
    alone = sum(isinstance(h, Dual) for h in parts) == 1
    if alone and isinstance(first, Seed) and dim == first.ndim - 1:
        at = next(i for i, h in enumerate(parts) if h is first)
        low = first.low + sum(h.shape[dim] for h in parts[:at])
        whole = torch.cat([first.primal if h is first else h for h in parts], dim)
        return first.moved(whole, low, first.width)

    def piece(h: Any, i: int, m: int) -> Tensor:
        """Of a dual, or of what has no tangents, `[m, B, ...]`."""
        if isinstance(h, Dual):
            return list(h.copies())[i]
        zeros: Tensor = h.new_zeros((m - (i == 0), *h.shape))
        return zeros if i else torch.cat([h[None], zeros])

    return first.like(
        *(
            torch.cat([piece(h, i, m) for h in parts], dim + 1).flatten(0, 1)
            for i, m in enumerate(first.source.counts)
        ),
        owned=True,
    )


@register(torch.stack)
def _stack(tensors: Sequence[Any], dim: int = 0, **rest: Any) -> Dual:
    first, _ = _parts(tensors)
    own = _new_axis(first, dim)
    return cat([h.unsqueeze(own) for h in tensors], own, **rest)


def _sizes(h: Dual, shape: Sequence[Any]) -> tuple[int, ...]:
    """The shape that a view asks for: in both the first axis has whole samples, one by one."""
    if len(shape) == 1 and not isinstance(shape[0], (int, torch.SymInt)):
        shape = shape[0]
        if isinstance(shape, torch.dtype):
            raise UnsupportedError(f"no rule for a view as {shape}")
    sizes = [int(s) for s in shape]
    rest = math.prod([s for s in sizes if s != -1])
    sizes = [h.numel() // max(rest, 1) if s == -1 else s for s in sizes]
    batch = h.source.batch
    if not sizes or (sizes[0] % batch if batch else sizes[0]) or math.prod(sizes) != h.numel():
        raise UnsupportedError(f"no rule for a view of {tuple(h.shape)} as {tuple(sizes)}")
    return tuple(sizes)


def _viewed(h: Dual, shape: Sequence[Any]) -> Dual:
    first, *rest = sizes = _sizes(h, shape)
    own = isinstance(h, Seed) and h.width == h.shape[-1] and h.source.tangents is None
    if isinstance(h, Seed) and own and first == h.shape[0]:
        return h.moved(h.primal.reshape(sizes), 0, sizes[-1])
    pieces = zip(h.pieces(), h.source.counts, strict=True)
    out = h.like(*(z.reshape(m * first, *rest) for z, m in pieces))
    h.aliased = out.aliased = True
    return out


@register(torch.reshape)
def _reshape(input: Dual, shape: Sequence[int]) -> Dual:
    return _viewed(input, (shape,))


@register(torch.Tensor.reshape, torch.Tensor.view)
def _reshape_method(
    input: Dual, *sizes: Any, shape: Any = None, size: Any = None, dtype: Any = None
) -> Dual:
    refuse({"dtype": dtype})
    return _viewed(input, sizes or (size if shape is None else shape,))


@register(torch.Tensor.view_as, torch.Tensor.reshape_as)
def _as_other(input: Any, other: Any) -> Any:
    if not isinstance(input, Dual):
        return input.reshape(other.shape)
    return _viewed(input, (other.shape,))


@register(torch.flatten, torch.Tensor.flatten)
def _flatten(input: Dual, start_dim: int = 0, end_dim: int = -1) -> Dual:
    h, shape = input, input.shape
    start, end = start_dim % h.ndim, end_dim % h.ndim
    return _viewed(h, (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]))


@register(torch.unflatten, torch.Tensor.unflatten)
def _unflatten(input: Dual, dim: int, sizes: Sequence[int]) -> Dual:
    if not isinstance(dim, int) or not all(isinstance(s, (int, torch.SymInt)) for s in sizes):
        raise UnsupportedError("no rule for axes that have names")
    shape, dim = input.shape, dim % input.ndim
    rest = math.prod([s for s in sizes if s != -1])
    own = [shape[dim] // max(rest, 1) if s == -1 else s for s in sizes]
    return _viewed(input, (*shape[:dim], *own, *shape[dim + 1 :]))


def _transposed(h: Dual, first: int, second: int) -> Dual:
    dims = inside(h, first, second)
    return view(h, lambda z: z.transpose(*dims))  # type: ignore[no-any-return]


@register(torch.transpose, torch.Tensor.transpose, torch.swapdims, torch.Tensor.swapdims)
def _transpose(input: Dual, dim0: int, dim1: int) -> Dual:
    return _transposed(input, dim0, dim1)


@register(torch.swapaxes, torch.Tensor.swapaxes)
def _swapaxes(input: Dual, axis0: int, axis1: int) -> Dual:
    return _transposed(input, axis0, axis1)


@register(torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
def _turned(input: Dual) -> Dual:
    return _transposed(input, -2, -1)


def _permuted(h: Dual, order: Sequence[int]) -> Dual:
    if len(order) != h.ndim or order[0] % h.ndim != 0:
        raise UnsupportedError("no rule along the batch")
    return view(h, lambda z: z.permute(*order))  # type: ignore[no-any-return]


@register(torch.permute)
def _permute(input: Dual, dims: Sequence[int]) -> Dual:
    return _permuted(input, dims)


@register(torch.Tensor.permute)
def _permute_method(input: Dual, *order: Any, dims: Any = None) -> Dual:
    if order:
        dims = order if isinstance(order[0], (int, torch.SymInt)) else order[0]
    return _permuted(input, dims)


@register(torch.movedim, torch.Tensor.movedim, torch.moveaxis, torch.Tensor.moveaxis)
def _movedim(input: Dual, source: Any, destination: Any) -> Dual:
    both = [inside(input, *((d,) if isinstance(d, int) else d)) for d in (source, destination)]
    return view(input, lambda z: z.movedim(*both))  # type: ignore[no-any-return]


def _new_axis(h: Traced, dim: int) -> int:
    if not -h.ndim - 1 <= dim <= h.ndim:
        raise UnsupportedError(f"axis {dim} of {h.ndim}")
    own = dim % (h.ndim + 1)
    if own == 0:
        raise UnsupportedError("no rule along the batch")
    return own


@register(torch.unsqueeze, torch.Tensor.unsqueeze)
def _unsqueeze(input: Dual, dim: int) -> Dual:
    own = _new_axis(input, dim)
    return view(input, lambda z: z.unsqueeze(own))  # type: ignore[no-any-return]


@register(torch.squeeze, torch.Tensor.squeeze)
def _squeeze(input: Dual, dim: int | Sequence[int] | None = None) -> Dual:
    dims = range(input.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    wanted = [d % input.ndim for d in dims if input.shape[d] == 1]
    own = inside(input, *wanted)
    return view(input, lambda z: z.squeeze(own))  # type: ignore[no-any-return]


@register(torch.chunk, torch.Tensor.chunk)
def chunk(input: Dual, chunks: int, dim: int = 0) -> Any:
    (own,) = inside(input, dim)
    return view(input, lambda z: z.chunk(chunks, own))


def _cut(h: Dual, sizes: Any, dim: int) -> Any:
    (own,) = inside(h, dim)
    return view(h, lambda z: torch.split(z, sizes, own))


@register(torch.split)
def _split(tensor: Dual, split_size_or_sections: Any, dim: int = 0) -> Any:
    return _cut(tensor, split_size_or_sections, dim)


@register(torch.Tensor.split)
def _split_method(input: Dual, split_size: Any, dim: int = 0) -> Any:
    return _cut(input, split_size, dim)


@register(torch.unbind, torch.Tensor.unbind)
def _unbind(input: Dual, dim: int = 0) -> Any:
    (own,) = inside(input, dim)
    return view(input, lambda z: z.unbind(own))


@register(torch.narrow, torch.Tensor.narrow)
def _narrow(input: Dual, dim: int, start: int, length: int) -> Dual:
    (own,) = inside(input, dim)
    return view(input, lambda z: z.narrow(own, start, length))  # type: ignore[no-any-return]


@register(torch.select, torch.Tensor.select)
def _select(input: Dual, dim: int, index: int) -> Dual:
    (own,) = inside(input, dim)
    return view(input, lambda z: z.select(own, index))  # type: ignore[no-any-return]


@register(torch.index_select, torch.Tensor.index_select)
def _index_select(input: Dual, dim: int, index: Tensor, **rest: Any) -> Dual:
    refuse(rest)
    (own,) = inside(input, dim)
    return same(input, lambda z: z.index_select(own, index))  # type: ignore[no-any-return]


def _used(index: Any) -> int:
    """Axes that a part of an index is for."""
    if index is None or index is Ellipsis:
        return 0
    return index.ndim if isinstance(index, Tensor) and index.dtype == torch.bool else 1


@register(torch.Tensor.__getitem__)
def _getitem(input: Dual, index: Any) -> Dual:
    own = index if isinstance(index, tuple) else (index,)
    whole = isinstance(own[0], slice) and own[0] == slice(None)
    if not (whole or own[0] is Ellipsis) or sum(map(_used, own)) >= input.ndim + whole:
        raise UnsupportedError("no rule for indexing the batch")
    known = (int, slice, Tensor, list, type(None), type(Ellipsis), torch.SymInt)
    if any(isinstance(i, bool) or not isinstance(i, known) for i in own):
        raise UnsupportedError("no rule for indexing by what depends on x")
    if any(isinstance(i, (Tensor, list)) for i in own):
        # Axes of tensors that are not side by side would come before the batch.
        at = [n for n, i in enumerate(own) if isinstance(i, (Tensor, list, int, torch.SymInt))]
        if at != list(range(at[0], at[-1] + 1)):
            raise UnsupportedError("no rule for indexing by tensors that are not side by side")
        return same(input, lambda z: z[index])  # type: ignore[no-any-return]
    return view(input, lambda z: z[index])  # type: ignore[no-any-return]


def spread(h: Dual, shape: Sequence[int]) -> Dual:
    """h broadcast to a shape with its batch."""
    if tuple(shape) == tuple(h.shape):
        return h
    if len(shape) != h.ndim or shape[0] not in (-1, h.shape[0]):
        raise UnsupportedError(f"no rule for {tuple(h.shape)} as {tuple(shape)}")
    return view(h, lambda z: z.expand(-1, *shape[1:]))  # type: ignore[no-any-return]


def _listed(sizes: Sequence[Any], named: Any) -> Sequence[int]:
    if not sizes:
        return named  # type: ignore[no-any-return]
    return sizes if isinstance(sizes[0], (int, torch.SymInt)) else sizes[0]


@register(torch.Tensor.expand)
def _expand(input: Dual, *sizes: Any, size: Any = None, implicit: bool = False) -> Dual:
    return spread(input, _listed(sizes, size))


@register(torch.Tensor.expand_as)
def _expand_as(input: Any, other: Any) -> Any:
    return spread(input, other.shape) if isinstance(input, Dual) else input.expand(other.shape)


@register(torch.broadcast_to, torch.Tensor.broadcast_to)
def _broadcast_to(input: Dual, size: Sequence[int]) -> Dual:
    return spread(input, size)


@register(torch.Tensor.repeat)
def _repeat(input: Dual, *sizes: Any, repeats: Any = None) -> Dual:
    own = _listed(sizes, repeats)
    if len(own) != input.ndim or own[0] != 1:
        raise UnsupportedError("no rule for repeating the batch")
    return same(input, lambda z: z.repeat(*own))  # type: ignore[no-any-return]


@register(torch.roll, torch.Tensor.roll)
def _roll(input: Dual, shifts: Any, dims: Any = None) -> Dual:
    own = inside(input, *((dims,) if isinstance(dims, int) else dims or (0,)))
    shifts = (shifts,) if isinstance(shifts, int) else shifts
    return same(input, lambda z: z.roll(shifts, own))  # type: ignore[no-any-return]


@register(torch.flip)
def _flip(input: Dual, dims: Sequence[int]) -> Dual:
    own = inside(input, *dims)
    return same(input, lambda z: z.flip(own))  # type: ignore[no-any-return]


@register(torch.Tensor.flip)
def _flip_method(input: Dual, *order: Any, dims: Any = None) -> Dual:
    return _flip(input, _listed(order, dims))


@register(F.pad)
def _pad(
    input: Dual, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Dual:
    if len(pad) // 2 >= input.ndim or (mode != "constant" and len(pad) // 2 > input.ndim - 2):
        raise UnsupportedError("no rule for padding the batch")
    if not value or mode != "constant":
        return same(input, lambda z: F.pad(z, list(pad), mode, value))  # type: ignore[no-any-return]
    first, t = input.halves()
    return input.of_halves(F.pad(first, list(pad), value=value), F.pad(t, list(pad)))


@register(torch.Tensor.clone, torch.clone)
def clone(input: Dual, *, memory_format: Any = None) -> Dual:
    own = input.twin()
    own.owned = input.owned = False  # two see it now
    own.aliased = False
    return own


@register(torch.Tensor.contiguous)
def _contiguous(input: Dual, memory_format: Any = None) -> Dual:
    input.aliased = True  # a copy or not, as the user's own strides are
    return input


def _moved(name: str) -> Callable[..., Any]:
    """A conversion by a method of tensors."""

    def empty(v: Any) -> Any:
        return torch.empty(0, dtype=v.dtype, device=v.device) if isinstance(v, Dual) else v

    def rule(input: Any, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
        layout = kwargs.pop("memory_format", None)
        moved = getattr(empty(input), name)(
            *map(empty, args), **{k: empty(v) for k, v in kwargs.items()}
        )
        if not isinstance(input, Dual) or not isinstance(moved, Tensor):
            return moved
        if moved.device != input.device:
            raise UnsupportedError(f"no rule for a change to {moved.device}")
        if not moved.dtype.is_floating_point and not moved.dtype.is_complex:
            if moved.dtype != torch.bool:
                note(f"Tensor.{name} to {moved.dtype} has no derivative")
            return primal(input).detach().to(moved.dtype)
        if moved.dtype != input.dtype:
            return cast(input, moved.dtype)
        return clone(input) if copy or layout not in (None, torch.preserve_format) else input

    return rule


for _name in (
    *("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"),
    *("long", "int", "short", "char", "byte", "bool"),
):
    register(getattr(torch.Tensor, _name))(_moved(_name))


@register(torch.is_floating_point, torch.Tensor.is_floating_point)
def _is_floating_point(input: Dual) -> bool:
    return input.dtype.is_floating_point


@register(torch.is_complex, torch.Tensor.is_complex)
def _is_complex(input: Dual) -> bool:
    return False


@register(torch.numel, torch.Tensor.nelement)
def _numel(input: Dual) -> int:
    return input.numel()
