"""Forward-mode duals: a network's own `forward`, run on [primal; K tangents].

A `Dual` stands in for the batch `x`. It is no tensor, but PyTorch's functions know it by
`__torch_function__` and hand it to the rule of each: linear layers act on the primal and its
tangents in one product, activations and norms in one fused kernel. Whatever else a `forward`
computes, from t or from a context, stays plain tensors. So any module joins whose forward calls
functions with a rule here, residuals, gates, concatenation and attention among them; any other
function raises `UnsupportedError` with its name. `register` adds rules.

Tangents of x's own dtype are stacked below it, `[(K + 1) B, ...]`: one product for both. Those of
bfloat16 stand apart, `[K B, ...]`: on a GPU products have bfloat16 copies of what they multiply
with, all else is computed in float32 and rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fewstep.ops.dual.source import Source, Stack, plain, redrawing, stacked


class UnsupportedError(AttributeError, NotImplementedError):
    """A forward asked for something that duals have no rule for; the message says what."""


Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[Any, Rule] = {}
# Names of NumPy's that torch takes for its own.
NUMPY = {"axis": "dim", "keepdims": "keepdim"}


def register(*functions: Any) -> Callable[[R], R]:
    """Add a rule for functions of torch: called with their arguments where one is a `Dual`."""

    def add(rule: R) -> R:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return add


class Traced:
    """What a forward sees in place of x: its shape, and functions that have rules."""

    primal_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    rules = RULES
    requires_grad = False
    aliased = False  # whether others share its memory, as far as the user sees
    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = cls.rules.get(func)
        if rule is None:
            raise UnsupportedError(f"no rule for {getattr(func, '__name__', func)}")
        if not kwargs:
            return rule(*args)
        return rule(*args, **{NUMPY.get(name, name): value for name, value in kwargs.items()})

    @property
    def shape(self) -> torch.Size:
        return self.primal_shape

    @property
    def ndim(self) -> int:
        return len(self.primal_shape)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, dim: int | None = None) -> Any:
        return self.primal_shape if dim is None else self.primal_shape[dim]

    def dim(self) -> int:
        return len(self.primal_shape)

    def numel(self) -> int:
        return self.primal_shape.numel()

    def __len__(self) -> int:
        return self.primal_shape[0]

    def __bool__(self) -> bool:
        raise UnsupportedError("no rule for bool: control flow on values has no tangent")

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(f"no rule for Tensor.{name}")

    def overwritten_by(self, result: Any) -> Any:
        """This object, for all who hold it, after a change in place to `result`."""
        if self.aliased or type(result) is not type(self):
            raise UnsupportedError("no rule for a change in place of x, or of what has views")
        self.__dict__.update(result.__dict__)
        return self

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).__torch_function__(func, (), args, kwargs)

    @property
    def mT(self) -> Any:  # noqa: N802
        return self._call(torch.Tensor.mT.__get__, self)  # type: ignore[attr-defined]


OPERATORS = (
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow ipow matmul"
    " rmatmul mod rmod floordiv rfloordiv neg abs invert getitem setitem eq ne lt le gt ge and or"
    " xor float int index complex array"
)


def _method(name: str) -> Callable[..., Any]:
    function = getattr(torch.Tensor, name)

    def call(self: Traced, *args: Any, **kwargs: Any) -> Any:
        return self._call(function, self, *args, **kwargs)

    call.__name__ = name
    return call


for _name in dir(torch.Tensor):
    _own = getattr(Traced, _name, None)
    if _name.startswith("_") and _name.strip("_") not in OPERATORS.split():
        continue
    if callable(getattr(torch.Tensor, _name)) and (_own is None or hasattr(object, _name)):
        setattr(Traced, _name, _method(_name))


class Dual(Traced):
    """A primal `[B, ...]` and its K tangents.

    Attributes:
        source: where the tangents come from.
        flat: `[(K + 1) B, ...]`, or the primal alone where tangents are shared or apart.
        apart: `[K B, ...]`, tangents of another dtype.
        shared: `[K, ...]`, tangents that all samples share.
        shift: still to be added to the primal, which it broadcasts with; activations and norms
            take it along.
        pending: a linear layer's weight that the tangents in `flat` still lack: of the last layer
            only products with probes may be wanted.
    """

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
        self.shift = shift
        self.pending = pending
        self.owned = owned
        self.dtype, self.device = flat.dtype, flat.device
        alone = shared is not None or apart is not None
        lead = flat.shape[0] if alone else flat.shape[0] // (source.count + 1)
        last = () if pending is None else (pending.shape[0],)
        inner = flat.shape[1:] if pending is None else flat.shape[1:-1]
        self.primal_shape = torch.Size((lead, *inner, *last))

    def joined(self) -> Tensor:
        """`[(K + 1) B, ...]`, still without the shift."""
        if self.apart is not None:
            return torch.cat([self.flat, self.apart.to(self.dtype)])
        if self.pending is not None:
            flat = F.linear(self.flat, self.pending)
            self.flat, self.pending, self.owned = flat, None, True
        if self.shared is not None:
            tangents = self.shared[:, None].expand(-1, *self.flat.shape)
            self.flat = torch.cat([self.flat[None], tangents]).flatten(0, 1)
            self.shared, self.owned = None, True
        return self.flat

    def stack(self) -> Tensor:
        """`[(K + 1) B, ...]` with everything in it."""
        if self.apart is not None:
            self.pieces()
        flat = self.joined()
        if self.shift is not None:
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

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        source = _beginning((*args, *(kwargs or {}).values()))
        with contextlib.nullcontext() if source is None else redrawing(source):
            return super().__torch_function__(func, types, args, kwargs)

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
            self.flat, self.shift = self.flat + self.shift, None
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
        if source.dtype is not None:
            if apart is None:
                batch = flat.shape[0] // (source.count + 1)
                flat, apart = flat[:batch], flat[batch:]
            apart = source.lower(apart)
        return Dual(source, flat, apart=apart, shift=shift, owned=owned)

    def of_halves(self, primal: Tensor, tangents: Tensor) -> Dual:
        """A dual of `[1, B, ...]` and `[K, B, ...]`."""
        if self.source.dtype is not None:
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
        source.batch = primal.shape[0]
        self.dtype, self.device = primal.dtype, primal.device
        self.primal_shape = primal.shape
        self.pending = self.shared = self.shift = self.apart = None
        self._made: Tensor | None = None

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
    return type(outs[0])(h.like(*own) for own in zip(*outs, strict=True))


def broadcast(h: Traced, other: Tensor) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(h.shape, other.shape)  # type: ignore[no-untyped-call]
    return shape
