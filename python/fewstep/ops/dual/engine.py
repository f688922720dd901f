"""Forward-mode duals: a network's own `forward`, run on [primal; K tangents].

A `Dual` stands in for the batch `x`, as `traced` says. Linear layers act on the primal and its
tangents in one product, activations and norms in one fused kernel. Whatever else a `forward`
computes, from t or from a context, stays plain tensors. So any module joins whose forward calls
functions with a rule here, residuals, gates, concatenation and attention among them; any other
function raises `UnsupportedError` with its name. `register` adds rules.

Tangents of x's own dtype are stacked below it, `[(K + 1) B, ...]`: one product for both. Those of
bfloat16 stand apart, `[K B, ...]`: on a GPU products have bfloat16 copies of what they multiply
with, all else is computed in float32 and rounded. Those that are constants for autograd stand apart
too: the primal then has the graph of a plain call, and its tangents have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fewstep.ops.dual.autocasting import converted, result_dtype
from fewstep.ops.dual.dispatch import present
from fewstep.ops.dual.source import Source, Stack, plain, redrawing, stacked
from fewstep.ops.dual.traced import Opaque, Rule, Traced, UnsupportedError, without_data

# Functions whose rules call functions that have rules of their own.
COMPOSED: set[Any] = set()


class Dual(Traced):
    """A primal `[B, ...]` and its K tangents.

    Attributes:
        source: where the tangents come from.
        flat: `[(K + 1) B, ...]`, or the primal alone where tangents are shared or apart.
        apart: `[K B, ...]`, tangents of another dtype, or without a graph.
        shared: `[K, ...]`, tangents that all samples share.
        shift: still to be added to the primal, which it broadcasts with; activations and norms
            take it along.
        pending: a linear layer's weight that the tangents in `flat` still lack: of the last layer
            only products with probes may be wanted.
        spread, whole: `joined()` and `stack()`, once they were asked for. The dual itself stays: a
            checkpoint runs its forward on it again.
    """

    direct = False

    def __init__(
        self,
        source: Source,
        flat: Tensor,
        *,
        apart: Tensor | None = None,
        shared: Tensor | None = None,
        shift: Tensor | None = None,
        pending: Tensor | None = None,
        owned: bool = False,
    ) -> None:
        self.source = source
        self.flat = flat
        self.apart = apart
        self.shared = shared
        self.shift = shift.clone() if source.prompt and shift is not None else shift
        self.pending = pending
        self.owned = owned
        self.spread: Tensor | None = None
        self.whole: Tensor | None = None
        self.own_dtype, self.own_device = flat.dtype, flat.device
        alone = shared is not None or apart is not None
        lead = flat.shape[0] if alone else flat.shape[0] // (source.count + 1)
        last = () if pending is None else (pending.shape[0],)
        inner = flat.shape[1:] if pending is None else flat.shape[1:-1]
        self.primal_shape = torch.Size((lead, *inner, *last))

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        kind = next((type(a) for a in args if isinstance(a, (Moved, Complex))), type(self))
        return kind.__torch_function__(func, (), args, kwargs)

    def of_flat(self, flat: Tensor, **fields: Any) -> Dual:
        """A dual of the same source, and as this one a tensor or none."""
        return (DualTensor if isinstance(self, Opaque) else Dual)(self.source, flat, **fields)

    def joined(self) -> Tensor:
        """`[(K + 1) B, ...]`, still without the shift."""
        if self.apart is not None:
            return torch.cat([self.flat, self.apart.to(self.dtype)])
        if self.pending is not None:
            flat = F.linear(self.flat, self.pending)
            self.flat, self.pending, self.owned = flat, None, True
        if self.shared is not None:
            if self.spread is None:
                tangents = self.shared[:, None].expand(-1, *self.flat.shape)
                self.spread = torch.cat([self.flat[None], tangents]).flatten(0, 1)
            if torch.is_grad_enabled():
                return self.spread
            self.flat, self.owned, self.shared, self.spread = self.spread, True, None, None
        return self.flat

    def stack(self) -> Tensor:
        """`[(K + 1) B, ...]` with everything in it."""
        if self.apart is not None:
            primal, tangents = self.pieces()
            return torch.cat([primal, tangents.to(self.dtype)])
        flat = self.joined()
        if self.shift is None:
            return flat
        if self.whole is not None:
            return self.whole
        present(self.shift)
        batch = self.primal_shape[0]
        if plain():
            flat = torch.cat([flat[:batch] + self.shift, flat[batch:]])
        elif torch.is_grad_enabled():
            flat = _Shifted.apply(flat, self.shift, batch)  # type: ignore[no-untyped-call]
        else:
            flat = flat if self.owned else flat.clone()
            flat[:batch] += self.shift
            self.flat, self.shift, self.owned = flat, None, False
            return flat
        self.whole = flat
        return flat

    @classmethod
    def call(
        cls, func: Any, rule: Rule | None, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Any:
        source = _beginning((*args, *kwargs.values()) if kwargs else args)
        if source is None:
            if rule is not None and not kwargs:
                return rule(*args)
            return super().call(func, rule, args, kwargs)
        with redrawing(source):
            return super().call(func, rule, args, kwargs)

    @classmethod
    def under_autocast(
        cls, func: Any, rule: Rule | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The rule on arguments of the dtype that autocast gives them."""
        if rule is None or func in COMPOSED:
            return cls.call(func, rule, args, kwargs)
        dtype = result_dtype(func, args, kwargs)
        if dtype is not None:

            def cast(z: Any) -> Any:
                return z.cast(dtype) if isinstance(z, Dual) else z.to(dtype)

            args, kwargs = converted(args, cast), converted(kwargs, cast)
        with torch._C._DisableAutocast():
            return cls.call(func, rule, args, kwargs)

    def cast(self, dtype: torch.dtype) -> Dual:
        """This in another dtype, as a network changes it."""
        if dtype == self.own_dtype:
            return self
        if not dtype.is_floating_point or self.source.dtype is not None:
            raise UnsupportedError(f"no rule for a change of {self.own_dtype} to {dtype}")
        return same(self, lambda z: z.to(dtype))  # type: ignore[no-any-return]

    def parts(self) -> list[Tensor]:
        """What the primal is computed from."""
        return [z for z in (self.flat, self.shift, self.pending) if z is not None]

    def begins(self) -> bool:
        """Whether it is a view of the input's stack."""
        stacks = self.source.stacks
        if not stacks:
            return False
        own = self.flat if self.apart is None else self.apart
        return own.untyped_storage()._cdata in stacks

    def pieces(self, *, shifted: bool = True) -> tuple[Tensor, ...]:
        """The stack, or the primal and its tangents apart; all with the batch first."""
        if self.apart is None:
            return (self.stack() if shifted else self.joined(),)
        if shifted and self.shift is not None:
            if self.whole is None:
                present(self.shift)
                self.whole = self.flat + self.shift
            return self.whole, self.apart
        return self.flat, self.apart

    def copies(self) -> Iterator[Tensor]:
        """The pieces as `[m, B, ...]`."""
        for z, m in zip(self.pieces(), self.source.counts, strict=True):
            yield z.reshape(m, *self.primal_shape)

    def halves(self) -> tuple[Tensor, Tensor]:
        """The primal `[1, B, ...]` and its tangents `[K, B, ...]`."""
        primal, *rest = self.copies()
        return (primal, rest[0]) if rest else (primal[:1], primal[1:])

    def like(
        self,
        flat: Tensor,
        apart: Tensor | None = None,
        *,
        shift: Tensor | None = None,
        owned: bool = False,
    ) -> Dual:
        """A dual of pieces, or of a stack."""
        source = self.source
        if source.apart:
            if apart is None:
                batch = flat.shape[0] // (source.count + 1)
                flat, apart = flat[:batch], flat[batch:]
            apart = apart.detach().to(flat.dtype) if source.constant else source.lower(apart)
        return self.of_flat(flat, apart=apart, shift=shift, owned=owned)

    def of_halves(self, primal: Tensor, tangents: Tensor) -> Dual:
        """A dual of `[1, B, ...]` and `[K, B, ...]`."""
        if self.source.apart:
            return self.like(primal[0], tangents.flatten(0, 1))
        return self.like(torch.cat([primal, tangents]).flatten(0, 1), owned=True)


class Seed(Dual):
    """The input: x, or x beside other features, with tangents that are not written yet.

    Attributes:
        primal: `[B, ...]`, or `[B, ... + D + ...]` after a concatenation.
        low: where x begins in the last axis.
        width: of x in the last axis.
    """

    def __init__(self, source: Source, primal: Tensor, low: int, width: int) -> None:
        self.source, self.primal, self.low, self.width = source, primal, low, width
        source.batch, source.chosen = primal.shape[0], primal.dtype
        self.own_dtype, self.own_device = primal.dtype, primal.device
        self.primal_shape = primal.shape
        self.pending = self.shared = self.shift = self.apart = None
        self._made: Tensor | None = None

    def moved(self, primal: Tensor, low: int, width: int) -> Seed:
        """x elsewhere: in another shape, or beside other features."""
        return type(self)(self.source, primal, low, width)

    def parts(self) -> list[Tensor]:
        return [self.primal]

    @property
    def own(self) -> Tensor:
        """x itself."""
        return self.primal[..., self.low : self.low + self.width]

    def made(self) -> Tensor:
        """As `_stacked`."""
        if self._made is None:
            source, primal, place = self.source, self.primal, (self.low, self.width)
            self._made = z = stacked(source, primal, *place)
            if torch.is_grad_enabled() and not plain():
                storage = StorageWeakRef(z.untyped_storage())  # type: ignore[no-untyped-call]
                own = replace(source, stacks={})
                stack = Stack(storage, z.dtype, z._version, own, primal.detach(), *place)
                source.stacks[storage.cdata] = stack
        return self._made

    def joined(self) -> Tensor:
        if self.source.dtype is None:
            return self.made()
        return torch.cat([self.primal, self.made().to(self.dtype)])

    def pieces(self, *, shifted: bool = True) -> tuple[Tensor, ...]:
        return (self.made(),) if self.source.dtype is None else (self.primal, self.made())

    def begins(self) -> bool:
        return torch.is_grad_enabled() and not plain()

    def stack(self) -> Tensor:
        return self.joined()


class DualTensor(Opaque, Dual, Tensor):  # type: ignore[misc, override]
    slots: tuple[str, ...] = (
        *("source", "flat", "apart", "shared", "shift", "pending", "owned", "spread", "whole"),
        *("own_dtype", "own_device", "primal_shape"),
    )
    __slots__ = slots


class SeedTensor(Opaque, Seed, Tensor):  # type: ignore[misc, override]
    slots = __slots__ = (
        *("source", "primal", "low", "width", "pending", "shared", "shift", "apart", "_made"),
        *("own_dtype", "own_device", "primal_shape"),
    )


MOVED: dict[Any, Rule] = {}


class Moved(Dual):
    """A dual whose batch is not its first axis, or has other axes merged in front of it.

    It has none of a dual's fields: a rule that reads them is refused, and those that know of it
    stand in a table of their own.

    Attributes:
        rows: the same with its lead `(b, pre, post)` first, `[B pre post, ...]`.
        at: the axis where that is here, as `(pre, b, post)`.
        pre: the size of what is merged in front of the batch.
    """

    rules = MOVED
    aliased = True

    def __init__(self, rows: Dual, at: int, pre: int) -> None:
        self.rows, self.at, self.pre = rows, at, pre
        self.source, self.primal_shape = rows.source, _moved_shape(rows.shape, at)
        self.own_dtype, self.own_device = rows.own_dtype, rows.own_device

    def begins(self) -> bool:
        return self.rows.begins()

    def _refused(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError("no rule along the batch")

    joined = stack = pieces = copies = halves = like = of_flat = of_halves = _refused

    def cast(self, dtype: torch.dtype) -> Dual:
        return placed(self.rows.cast(dtype), self.at, self.pre)

    def placed(self, z: Tensor, lead: int = 0) -> Tensor:
        """What is as `rows`, behind `lead` axes, as this is."""
        if self.pre > 1:
            own = (self.source.batch, self.pre, -1)
            z = torch.unflatten(z, lead, own).transpose(lead, lead + 1).flatten(lead, lead + 2)
        return z.movedim(lead, lead + self.at)

    def settled(self, z: Tensor) -> Tensor:
        """What is as this, as `rows` is: the opposite of `placed`."""
        z = z.movedim(self.at, 0)
        if self.pre > 1:
            z = (
                torch.unflatten(z, 0, (self.pre, self.source.batch, -1))
                .transpose(0, 1)
                .flatten(0, 2)
            )
        return z


def _moved_shape(shape: torch.Size, at: int) -> torch.Size:
    return torch.Size((*shape[1 : at + 1], shape[0], *shape[at + 1 :]))


class MovedTensor(Moved, DualTensor):  # type: ignore[misc, override]
    slots: tuple[str, ...] = (
        *("rows", "at", "pre", "source"),
        *("own_dtype", "own_device", "primal_shape"),
    )
    __slots__ = ("at", "pre", "rows")

    def __new__(cls, rows: Dual, at: int, pre: int) -> Any:
        shape = _moved_shape(rows.shape, at)
        return without_data(cls, shape, dtype=rows.dtype, device=rows.device)


def placed(rows: Dual, at: int, pre: int = 1) -> Dual:
    """A dual with its batch at an axis."""
    if at == 0 and pre == 1:
        return rows
    return (MovedTensor if isinstance(rows, Opaque) else Moved)(rows, at, pre)


COMPLEX: dict[Any, Rule] = {}
OF_PAIRS = {torch.float32: torch.complex64, torch.float64: torch.complex128}


class Complex(Dual):
    """Complex numbers that depend on x, by their real and imaginary parts.

    As of `Moved`, rules that do not know of it are refused.

    Attributes:
        pairs: both parts in the last axis, `[B, ..., 2]`.
    """

    rules = COMPLEX
    aliased = True

    def __init__(self, pairs: Dual) -> None:
        self.pairs, self.source, self.own_device = pairs, pairs.source, pairs.own_device
        self.primal_shape, self.own_dtype = pairs.shape[:-1], OF_PAIRS[pairs.own_dtype]

    def begins(self) -> bool:
        return self.pairs.begins()

    def _refused(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError("no rule for complex numbers here")

    joined = stack = pieces = copies = halves = like = of_flat = of_halves = _refused


class ComplexTensor(Complex, DualTensor):  # type: ignore[misc, override]
    slots: tuple[str, ...] = ("pairs", "source", "own_dtype", "own_device", "primal_shape")
    __slots__ = ("pairs",)

    def __new__(cls, pairs: Dual) -> Any:
        dtype = OF_PAIRS[pairs.own_dtype]
        return without_data(cls, pairs.shape[:-1], dtype=dtype, device=pairs.device)


def of_pairs(pairs: Dual) -> Complex:
    return (ComplexTensor if isinstance(pairs, Opaque) else Complex)(pairs)


def seed(source: Source, x: Tensor) -> Seed:
    """What a forward begins with."""
    compiling = torch.compiler.is_compiling()
    return (Seed if compiling else SeedTensor)(source, x, 0, x.shape[-1])


def _beginning(values: Iterable[Any]) -> Source | None:
    """The source of an argument that is the input's stack, or a view of it."""
    for value in values:
        if isinstance(value, Dual) and value.begins():
            return value.source
        if isinstance(value, (tuple, list)):
            found = _beginning(value)
            if found is not None:
                return found
    return None


class _Shifted(torch.autograd.Function):
    """Adds to the primal; keeps nothing but a shape."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, shift: Tensor, batch: int) -> Tensor:
        ctx.batch, ctx.shape = batch, shift.shape
        out = flat.clone()
        out[:batch] += shift
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        return g, g[: ctx.batch].sum_to_size(ctx.shape), None


def same(h: Dual, function: Callable[[Tensor], Any]) -> Any:
    """A function that is linear in each sample by itself."""
    outs = [function(z) for z in h.pieces()]
    if isinstance(outs[0], Tensor):
        return h.like(*outs)
    # Compilers find stand-ins in lists alone.
    kind = list if torch.compiler.is_compiling() else type(outs[0])
    return kind([h.like(*own) for own in zip(*outs, strict=True)])
