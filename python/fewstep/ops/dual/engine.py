"""Forward-mode duals: a network's own `forward`, run on [primal; K tangents].

A `Dual` stands in for the batch `x`. To the network it is a tensor, whose functions, methods and
operators PyTorch hands to the rule of each by `__torch_function__`: linear layers act on the primal
and its tangents in one product, activations and norms in one fused kernel. Whatever else a
`forward` computes, from t or from a context, stays plain tensors. So any module joins whose forward
calls functions with a rule here, residuals, gates, concatenation and attention among them; any
other function raises `UnsupportedError` with its name. `register` adds rules.

It has no data of its own. Code in C++ that would read it arrives in `__torch_dispatch__` and is
refused, as is a forward that changes the grad mode (custom Functions and reentrant checkpoints run
without it) or turns on autocast. Compilers cannot trace such tensors: for them a stand-in is a
plain object, `isinstance(x, Tensor)` is False, and custom Functions go unseen.

Tangents of x's own dtype are stacked below it, `[(K + 1) B, ...]`: one product for both. Those of
bfloat16 stand apart, `[K B, ...]`: on a GPU products have bfloat16 copies of what they multiply
with, all else is computed in float32 and rounded. Those that are constants for autograd stand apart
too: the primal then has the graph of a plain call, and its tangents have none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fewstep.ops.dual.dispatch import present
from fewstep.ops.dual.source import Source, Stack, plain, redrawing, stacked


class UnsupportedError(AttributeError, NotImplementedError):
    """A forward asked for something that duals have no rule for; the message says what."""


class MixingError(ValueError):
    """A forward mixes samples, so that they have no Jacobians of their own."""


AUTOCAST = "no rules under autocast"
Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
H = TypeVar("H", bound="Traced")
RULES: dict[Any, Rule] = {}
NAMED: dict[str, Rule] = {}  # those of tensors' methods in Python, which compilers do not hash
# Names of NumPy's that torch takes for its own.
NUMPY = {"axis": "dim", "keepdims": "keepdim"}


def register(*functions: Any) -> Callable[[R], R]:
    """Add a rule for functions of torch: called with their arguments where one is a `Dual`."""

    def add(rule: R) -> R:
        RULES.update(dict.fromkeys(functions, rule))
        for function in functions:
            if getattr(function, "__module__", "") == "torch._tensor":
                NAMED[function.__name__] = rule
        return rule

    return add


@dataclass
class _Run:
    """A forward that is run on a stand-in.

    Attributes:
        grad: the grad mode at its beginning.
        refused: the first refusal: a forward that catches it has taken another branch.
        notes: what its user should know.
        copies: plain tensors, with their versions, that share memory with x in a plain call.
    """

    grad: bool
    refused: str | None = None
    notes: dict[str, None] = field(default_factory=dict)
    copies: list[tuple[Tensor, int]] = field(default_factory=list)


class _Current(threading.local):
    run: _Run | None = None
    notes: tuple[str, ...] = ()


_CURRENT = _Current()


def run_on(stand_in: Any, forward: Callable[..., Any], t: Any) -> Any:
    """`forward(stand_in, t)`, or what it was refused for.

    Raises:
        UnsupportedError: it asked for something without a rule.
    """
    if torch.compiler.is_compiling():
        return forward(stand_in, t)
    before = _CURRENT.run
    _CURRENT.run = run = _Run(torch.is_grad_enabled())
    try:
        out = forward(stand_in, t)
    finally:
        _CURRENT.run = before
    _CURRENT.notes = tuple(run.notes)
    if any(copy._version != version for copy, version in run.copies):
        raise UnsupportedError("no rule for a change in place of x by what was detached from it")
    if run.refused is not None:
        raise UnsupportedError(run.refused)
    return out


def unchanged(copy: Tensor) -> Tensor:
    """A plain tensor that the forward that is running must not change in place."""
    if not torch.compiler.is_compiling() and _CURRENT.run is not None:
        _CURRENT.run.copies.append((copy, copy._version))
    return copy


def note(text: str) -> None:
    """Something that the user of the forward that is running should know."""
    if not torch.compiler.is_compiling() and _CURRENT.run is not None:
        _CURRENT.run.notes[text] = None


def notes() -> tuple[str, ...]:
    """Those of the last forward, once."""
    found, _CURRENT.notes = _CURRENT.notes, ()
    return found


class Traced:
    """What a forward sees in place of x: its shape, and functions that have rules."""

    primal_shape: torch.Size
    own_dtype: torch.dtype
    own_device: torch.device
    rules = RULES
    slots: tuple[str, ...] = ()
    direct = True  # whether `call` does nothing but call rules
    requires_grad = False
    aliased = False  # whether others share its memory, as far as the user sees
    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch._tensor":
            rule = NAMED.get(func.__name__) if cls.rules is RULES else None
        else:
            rule = cls.rules.get(func)
        return cls.call(func, rule, args, kwargs)

    @classmethod
    def call(
        cls, func: Any, rule: Rule | None, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Any:
        """By the function's rule."""
        if rule is None:
            raise UnsupportedError(f"no rule for {name_of(func)}")
        if not kwargs:
            return rule(*args)
        if "axis" in kwargs or "keepdims" in kwargs:
            kwargs = {NUMPY.get(name, name): value for name, value in kwargs.items()}
        return rule(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        return self.own_dtype

    @property
    def device(self) -> torch.device:
        return self.own_device

    @property
    def shape(self) -> torch.Size:
        return self.primal_shape

    @property
    def ndim(self) -> int:
        return len(self.primal_shape)

    @property
    def is_cuda(self) -> bool:
        return self.own_device.type == "cuda"

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
        self._take(result)
        return self

    def twin(self: H) -> H:
        """Another object of the same value."""
        kind = type(self)
        if isinstance(self, Opaque):
            own: H = without_data(kind, self.shape, dtype=self.dtype, device=self.device)
        else:
            own = object.__new__(kind)
        own._take(self)
        return own

    def _take(self, other: Traced) -> None:
        for name in self.slots:
            setattr(self, name, getattr(other, name))
        self.__dict__.update(other.__dict__)

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).__torch_function__(func, (), args, kwargs)

    def __add__(self, other: Any) -> Any:
        return self._call(torch.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return self._call(torch.add, self, other)

    def __sub__(self, other: Any) -> Any:
        return self._call(torch.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._call(torch.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return self._call(torch.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._call(torch.mul, self, other)

    def __truediv__(self, other: Any) -> Any:
        return self._call(torch.div, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._call(torch.div, other, self)

    def __pow__(self, other: Any) -> Any:
        return self._call(torch.pow, self, other)

    def __rpow__(self, other: Any) -> Any:
        return self._call(torch.pow, other, self)

    def __mod__(self, other: Any) -> Any:
        return self._call(torch.remainder, self, other)

    def __matmul__(self, other: Any) -> Any:
        return self._call(torch.matmul, self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return self._call(torch.matmul, other, self)

    def __neg__(self) -> Any:
        return self._call(torch.neg, self)

    def __pos__(self) -> Any:
        return self._call(torch.positive, self)

    def __abs__(self) -> Any:
        return self._call(torch.abs, self)

    @property
    def mT(self) -> Any:  # noqa: N802
        return self._call(torch.Tensor.mT.__get__, self)  # type: ignore[attr-defined]


OPERATORS = (
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow ipow matmul"
    " rmatmul mod rmod floordiv rfloordiv neg abs invert getitem setitem eq ne lt le gt ge and or"
    " xor float int index complex array"
)


def name_of(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)  # of an attribute's getter
    return f"Tensor.{getattr(owner, '__name__', name)}" if name in ("__get__", "__set__") else name


# What is the same for every tensor that a stand-in stands for.
_CONSTANTS = {
    torch.Tensor.is_floating_point: True,
    torch.is_floating_point: True,
    torch.Tensor.is_complex: False,
    torch.is_complex: False,
    torch.Tensor.is_nested.__get__: False,  # type: ignore[attr-defined]
    torch.Tensor.is_sparse.__get__: False,  # type: ignore[attr-defined]
    torch.Tensor.is_quantized.__get__: False,  # type: ignore[attr-defined]
    torch.Tensor.is_mkldnn.__get__: False,  # type: ignore[attr-defined]
    torch.Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__: torch.strided,  # type: ignore[attr-defined]
}


def is_constant(func: Any) -> bool:
    return func in _CONSTANTS


without_data: Any = Tensor._make_wrapper_subclass
_autocasts = torch._C._is_any_autocast_enabled


class Opaque:
    """Makes a stand-in a tensor, without data, in whatever is not compiled.

    Its classes have slots: a dictionary for each object takes as long as all else of a rule.
    """

    def __new__(cls, source: Any, like: Tensor, *_: Any, **__: Any) -> Any:
        return without_data(cls, like.shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run = _CURRENT.run
        try:
            if run is not None and torch.is_grad_enabled() is not run.grad:
                raise UnsupportedError(
                    f"{name_of(func)} is called in another grad mode than forward: by a custom"
                    " autograd.Function, a reentrant checkpoint or no_grad"
                )
            if _autocasts():
                raise UnsupportedError(AUTOCAST)
            own: Any = cls
            rule = own.rules.get(func)
            if own.direct and rule is not None and not kwargs:
                return rule(*args)
            return own.call(func, rule, args, kwargs)
        except UnsupportedError as reason:
            if func in _CONSTANTS:
                return _CONSTANTS[func]
            if run is None:
                raise UnsupportedError(
                    f"{reason}: this is no tensor but the stand-in for one, which a network kept"
                    " from a forward that fewstep ran for its trace; keep what a plain call has"
                ) from reason
            if run.refused is None:
                run.refused = str(reason)
            raise

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        reason = f"no rule for {func}, called past Python's functions"
        if _CURRENT.run is not None and _CURRENT.run.refused is None:
            _CURRENT.run.refused = reason
        raise UnsupportedError(reason)


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
        source.batch = primal.shape[0]
        self.own_dtype, self.own_device = primal.dtype, primal.device
        self.primal_shape = primal.shape
        self.pending = self.shared = self.shift = self.apart = None
        self._made: Tensor | None = None

    def moved(self, primal: Tensor, low: int, width: int) -> Seed:
        """x elsewhere: in another shape, or beside other features."""
        return type(self)(self.source, primal, low, width)

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
    slots = __slots__ = (
        *("source", "flat", "apart", "shared", "shift", "pending", "owned", "spread", "whole"),
        *("own_dtype", "own_device", "primal_shape"),
    )


class SeedTensor(Opaque, Seed, Tensor):  # type: ignore[misc, override]
    slots = __slots__ = (
        *("source", "primal", "low", "width", "pending", "shared", "shift", "apart", "_made"),
        *("own_dtype", "own_device", "primal_shape"),
    )


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


def broadcast(h: Traced, other: Tensor) -> torch.Size:
    own, theirs = h.primal_shape, other.shape
    lead = len(own) - len(theirs)
    if lead >= 0 and all(n in (1, m) for n, m in zip(theirs, own[lead:], strict=True)):
        return own
    shape: torch.Size = torch.broadcast_shapes(own, theirs)  # type: ignore[no-untyped-call]
    return shape
