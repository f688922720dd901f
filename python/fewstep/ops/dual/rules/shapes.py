"""Rules of shapes and slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual.engine import Dual, Moved, Seed, placed, same
from fewstep.ops.dual.rules.plain import inside, of_dtype, primal, refuse
from fewstep.ops.dual.traced import UnsupportedError, note, register


def view(h: Dual, function: Callable[[Tensor], Any]) -> Any:
    """As `same`, for what shares memory with h: neither is then changed in place."""
    outs = same(h, function)
    h.aliased = True
    for out in (outs,) if isinstance(outs, Dual) else outs:
        out.aliased = True
    return outs


def laid_out(h: Dual) -> tuple[Dual, int, int]:
    """A dual with its batch first, the axis where that is in h, and what stands before it there."""
    return (h.rows, h.at, h.pre) if isinstance(h, Moved) else (h, 0, 1)


def _axis(h: Dual, dim: int, ndim: int | None = None) -> int:
    """Counted from the first."""
    n = h.ndim if ndim is None else ndim
    if not isinstance(dim, (int, torch.SymInt)) or isinstance(dim, bool) or not -n <= dim < n:
        raise UnsupportedError(f"axis {dim} of {n}")
    return int(dim) % n


def permuted(h: Dual, order: Sequence[int]) -> Dual:
    inner, at, pre = laid_out(h)
    own = [_axis(h, d) for d in order]
    if sorted(own) != list(range(h.ndim)):
        raise UnsupportedError(f"no rule for {tuple(order)} as an order of {h.ndim} axes")
    of_inner = [0, *(d + (d < at) for d in own if d != at)]
    if of_inner != list(range(h.ndim)):
        inner = view(inner, lambda z: z.permute(of_inner))
    inner.aliased = True
    return placed(inner, own.index(at), pre)


def unsqueezed(h: Dual, dim: int) -> Dual:
    inner, at, pre = laid_out(h)
    own = _axis(h, dim, h.ndim + 1)
    place = own + (own <= at)
    return placed(view(inner, lambda z: z.unsqueeze(place)), at + (own <= at), pre)


def _whole_sizes(h: Dual, shape: Sequence[Any]) -> list[int]:
    if len(shape) == 1 and not isinstance(shape[0], (int, torch.SymInt)):
        shape = shape[0]
        if isinstance(shape, torch.dtype):
            raise UnsupportedError(f"no rule for a view as {shape}")
    sizes = [int(s) for s in shape]
    rest = math.prod([s for s in sizes if s != -1])
    return [h.numel() // max(rest, 1) if s == -1 else s for s in sizes]


def reshaped(h: Dual, sizes: Sequence[int]) -> Dual:
    """A shape in which some axis has the batch as it is, `(pre, b, post)`."""
    inner, at, pre = laid_out(h)
    batch, shape = h.source.batch, tuple(h.shape)
    before, after = shape[:at], shape[at + 1 :]
    left = math.prod(before) * pre
    edges = [1]
    for s in sizes:
        edges.append(edges[-1] * s)
    found = [
        (edges[j + 1] // edges[j], j == len(sizes) - 1, j)
        for j in range(len(sizes))
        if edges[j]
        and left % edges[j] == 0
        and edges[j] <= left
        and edges[j + 1]
        and edges[j + 1] % (left * batch) == 0
    ]
    if not found or not batch or edges[-1] != h.numel():
        raise UnsupportedError(f"no rule for a view of {shape} as {tuple(sizes)}")
    j = min(found, key=lambda f: (f[1], f[0], f[2]))[2]
    own_pre, own_post = left // edges[j], edges[j + 1] // (left * batch)
    nb, na, lefts, rights = at, len(after), list(sizes[:j]), list(sizes[j + 1 :])
    # [m, b, pre, post, before, after] to [m, b, before, pre, post, after].
    there = [0, 1, *range(4, 4 + nb), 2, 3, *range(4 + nb, 4 + nb + na)]
    # [m, b, left, pre, post, right] to [m, b, pre, post, left, right].
    back = [0, 1, 2 + j, 3 + j, *range(2, 2 + j), *range(4 + j, 4 + j + len(rights))]

    def turn(z: Tensor) -> Tensor:
        m = z.shape[0] // inner.shape[0]
        z = z.reshape(m, batch, pre, -1, *before, *after).permute(there)
        z = z.reshape(m, batch, *lefts, own_pre, own_post, *rights).permute(back)
        return z.reshape(m * batch * own_pre * own_post, *lefts, *rights)

    out = view(inner, turn)
    return placed(out, j, own_pre)


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
    if any(isinstance(h, Moved) for h in tensors):
        return _joined(tensors, dim)
    first, parts = _parts(tensors)
    if _axis(first, dim) == 0:
        return _joined(tensors, dim)
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


def _joined(tensors: Sequence[Any], dim: int) -> Dual:
    """Where the batch is not first, or is what grows."""
    first = next(h for h in tensors if isinstance(h, Dual))
    _, at, pre = laid_out(first)
    own = _axis(first, dim)
    for h in tensors:
        same_place = not isinstance(h, Dual) or laid_out(h)[1:] == (at, pre)
        if not same_place or h.ndim != first.ndim or h.shape[at] != first.shape[at]:
            raise UnsupportedError(f"no rule for {tuple(first.shape)} beside {tuple(h.shape)}")
    if own == at:
        out = stacked(tensors, at)
        shape = first.shape
        return reshaped(out, (*shape[:at], len(tensors) * shape[at], *shape[at + 1 :]))
    frame = first if isinstance(first, Moved) else None
    parts = [
        laid_out(h)[0] if isinstance(h, Dual) else h if frame is None else frame.settled(h)
        for h in tensors
    ]
    return placed(cat(parts, own + (own < at)), at, pre)


def stacked(tensors: Sequence[Any], dim: int) -> Dual:
    first = next(h for h in tensors if isinstance(h, Dual))
    own = _axis(first, dim, first.ndim + 1)
    if any(tuple(h.shape) != tuple(first.shape) for h in tensors):
        raise UnsupportedError("no rule for a stack of others than of one shape")
    return cat([h.unsqueeze(own) for h in tensors], own)


@register(torch.stack)
def _stack(tensors: Sequence[Any], dim: int = 0, **rest: Any) -> Dual:
    refuse(rest)
    return stacked(tensors, dim)


def _viewed(h: Dual, shape: Sequence[Any]) -> Dual:
    """Of whole samples one by one in the first axis, where both are so."""
    first, *rest = sizes = _whole_sizes(h, shape) or [0]
    batch = h.source.batch
    if isinstance(h, Moved) or (first % batch if batch else first):
        return reshaped(h, sizes)
    if math.prod(sizes) != h.numel():
        raise UnsupportedError(f"no rule for a view of {tuple(h.shape)} as {tuple(sizes)}")
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
    a, b = _axis(h, first), _axis(h, second)
    if isinstance(h, Moved) or 0 in (a, b):
        order = list(range(h.ndim))
        order[a], order[b] = b, a
        return permuted(h, order)
    return view(h, lambda z: z.transpose(a, b))  # type: ignore[no-any-return]


@register(torch.transpose, torch.Tensor.transpose, torch.swapdims, torch.Tensor.swapdims)
def _transpose(input: Dual, dim0: int, dim1: int) -> Dual:
    return _transposed(input, dim0, dim1)


@register(torch.swapaxes, torch.Tensor.swapaxes)
def _swapaxes(input: Dual, axis0: int, axis1: int) -> Dual:
    return _transposed(input, axis0, axis1)


@register(torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
def _turned(input: Dual) -> Dual:
    return _transposed(input, -2, -1)


@register(torch.t, torch.Tensor.t, torch.Tensor.T.__get__)  # type: ignore[attr-defined]
def _reversed(input: Dual) -> Dual:
    if input.ndim > 2:
        raise UnsupportedError("no rule for T of more than two axes")
    return permuted(input, range(input.ndim)[::-1])


@register(torch.permute)
def _permute(input: Dual, dims: Sequence[int]) -> Dual:
    return permuted(input, dims)


@register(torch.Tensor.permute)
def _permute_method(input: Dual, *order: Any, dims: Any = None) -> Dual:
    if order:
        dims = order if isinstance(order[0], (int, torch.SymInt)) else order[0]
    return permuted(input, dims)


@register(torch.movedim, torch.Tensor.movedim, torch.moveaxis, torch.Tensor.moveaxis)
def _movedim(input: Dual, source: Any, destination: Any) -> Dual:
    given = [[d] if isinstance(d, int) else list(d) for d in (source, destination)]
    own, to = ([_axis(input, d) for d in dims] for dims in given)
    left = iter(d for d in range(input.ndim) if d not in own)
    if len(own) != len(to) or len(set(own)) != len(own) or len(set(to)) != len(to):
        raise UnsupportedError(f"no rule for axes {own} at {to}")
    placed_at = dict(zip(to, own, strict=True))
    return permuted(
        input, [placed_at[d] if d in placed_at else next(left) for d in range(input.ndim)]
    )


@register(torch.unsqueeze, torch.Tensor.unsqueeze)
def _unsqueeze(input: Dual, dim: int) -> Dual:
    return unsqueezed(input, dim)


@register(torch.squeeze, torch.Tensor.squeeze)
def _squeeze(input: Dual, dim: int | Sequence[int] | None = None) -> Dual:
    dims = range(input.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    inner, at, pre = laid_out(input)
    wanted = [own for own in (_axis(input, d) for d in dims) if input.shape[own] == 1]
    if at in wanted:
        raise UnsupportedError("no rule along the batch")
    own = tuple(d + (d < at) for d in wanted)
    return placed(view(inner, lambda z: z.squeeze(own)), at - sum(d < at for d in wanted), pre)


@register(torch.chunk, torch.Tensor.chunk)
def chunk(input: Dual, chunks: int, dim: int = 0) -> Any:
    (own,) = inside(input, dim)
    return view(input, lambda z: z.chunk(chunks, own))


def _cut(h: Dual, sizes: Any, dim: int) -> Any:
    (own,) = inside(h, dim)
    return view(h, lambda z: torch.split(z, sizes, own))


@register(torch.split, torch.functional.split)
def _split(tensor: Dual, split_size_or_sections: Any, dim: int = 0) -> Any:
    return _cut(tensor, split_size_or_sections, dim)


@register(torch.split_with_sizes, torch.Tensor.split_with_sizes)
def _split_with_sizes(input: Dual, split_sizes: Any, dim: int = 0) -> Any:
    return _cut(input, split_sizes, dim)


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
    if isinstance(input, Moved) or own[0] is None:
        return _indexed(input, own)
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


def _indexed(h: Dual, index: tuple[Any, ...]) -> Dual:
    """Of a batch that is not first, or that comes to be so."""
    inner, at, pre = laid_out(h)
    index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
    if sum(i is Ellipsis for i in index) > 1 or any(
        isinstance(i, bool) or (isinstance(i, Tensor) and i.dtype == torch.bool) for i in index
    ):
        raise UnsupportedError("no rule for indexing the batch")
    whole = slice(None)
    missing = h.ndim - sum(i is not None and i is not Ellipsis for i in index)
    if missing < 0:
        raise UnsupportedError("no rule for so many indices")
    if Ellipsis not in [i for i in index if not isinstance(i, Tensor)]:
        index = (*index, Ellipsis)
    where = next(n for n, i in enumerate(index) if i is Ellipsis)
    index = (*index[:where], *(whole,) * missing, *index[where + 1 :])
    advanced = [i for i in index if isinstance(i, Tensor)]
    known = (int, slice, Tensor, type(None), torch.SymInt)
    numbers = [i for i in index if isinstance(i, (int, torch.SymInt))]
    if any(not isinstance(i, known) or isinstance(i, Dual) for i in index) or (
        advanced and (len(advanced) > 1 or numbers)
    ):
        raise UnsupportedError("no rule for indexing by what depends on x")
    own: list[Any] = [whole]
    axis = new_at = 0
    for i in index:
        if i is not None:
            axis += 1
        if i is not None and axis - 1 == at:
            if not isinstance(i, slice) or i != whole:
                raise UnsupportedError("no rule for indexing the batch")
            continue
        own.append(i)
        if axis <= at:
            width = i.ndim if isinstance(i, Tensor) else 0 if i in numbers else 1
            new_at += width
    picked = (
        same(inner, lambda z: z[tuple(own)]) if advanced else view(inner, lambda z: z[tuple(own)])
    )
    return placed(picked, new_at, pre)


def spread(h: Dual, shape: Sequence[int]) -> Dual:
    """h broadcast to a shape with its batch."""
    if tuple(shape) == tuple(h.shape):
        return h
    inner, at, pre = laid_out(h)
    new = len(shape) - h.ndim
    if new < 0 or shape[at + new] not in (-1, h.shape[at]):
        raise UnsupportedError(f"no rule for {tuple(h.shape)} as {tuple(shape)}")
    sizes = (*shape[: at + new], *shape[at + new + 1 :])
    for _ in range(new):
        inner = unsqueezed(inner, 1)
    return placed(view(inner, lambda z: z.expand(-1, *sizes)), at + new, pre)


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
    return _repeated(input, _listed(sizes, repeats))


@register(torch.tile)
def _tile(input: Dual, dims: Sequence[int]) -> Dual:
    return _repeated(input, (*(1,) * (input.ndim - len(dims)), *dims))


@register(torch.Tensor.tile)
def _tile_method(input: Dual, *sizes: Any, dims: Any = None) -> Dual:
    return _tile(input, _listed(sizes, dims))


def _repeated(h: Dual, sizes: Sequence[int]) -> Dual:
    if len(sizes) < h.ndim or min(sizes) < 1:
        raise UnsupportedError(f"no rule for repeating {tuple(sizes)} times")
    for _ in range(len(sizes) - h.ndim):
        h = unsqueezed(h, 0)
    inner, at, pre = laid_out(h)
    own = (1, *sizes[:at], *sizes[at + 1 :])
    out = placed(same(inner, lambda z: z.repeat(own)) if max(own) > 1 else inner, at, pre)
    if sizes[at] == 1:
        return out
    whole = unsqueezed(out, at)
    shape = out.shape
    whole = spread(whole, (*shape[:at], sizes[at], *shape[at:]))
    return reshaped(whole, (*shape[:at], sizes[at] * shape[at], *shape[at + 1 :]))


@register(torch.repeat_interleave, torch.Tensor.repeat_interleave)
def _repeat_interleave(
    input: Dual, repeats: Any, dim: int | None = None, *, output_size: int | None = None
) -> Dual:
    if not isinstance(repeats, int) or dim is None:
        raise UnsupportedError("no rule for repeats that are tensors")
    own = _axis(input, dim)
    shape = tuple(input.shape)
    whole = spread(unsqueezed(input, own + 1), (*shape[: own + 1], repeats, *shape[own + 1 :]))
    return _viewed(whole, (*shape[:own], repeats * shape[own], *shape[own + 1 :]))


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
            return input.cast(moved.dtype)
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
