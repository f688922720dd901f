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
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fewstep._torch import is_transformed
from fewstep.ops.dual import dispatch

# Devices whose products of bfloat16 are slower than of float32: tangents are widened for them.
WIDENED = ("cpu",)
Remake = Callable[[Tensor], Tensor]


class UnsupportedError(AttributeError, NotImplementedError):
    """A forward asked for something that duals have no rule for; the message says what."""


@dataclass
class Source:
    """The tangents that a forward starts with.

    Attributes:
        backend: of the kernels, "cpp", "triton" or "reference".
        count: K.
        key: of probes that are drawn where they are needed, int64 `(seed, step, stage)`.
        ids: of the samples, or None.
        kind: of the probes.
        tangents: given ones, `[K, B, ...]`, or `[K, 1, ...]`, the same for all samples.
        cache: products of fixed probes and weights, kept over a solve without gradients.
        dtype: of the tangents where it is not x's: bfloat16.
        copies: of weights in that dtype, where products have them.
        stacks: of tangents as they start, by their storage: backward makes them again.
    """

    backend: str
    count: int
    key: Tensor | None = None
    ids: Tensor | None = None
    kind: str = "rademacher"
    tangents: Tensor | None = None
    cache: dict[Any, Tensor] | None = None
    dtype: torch.dtype | None = None
    copies: dict[Any, Tensor] | None = None
    stacks: dict[int, _Stack] = field(default_factory=dict)

    def draw(self, x: Tensor) -> Tensor:
        """The tangents of x `[B, ...]`: `[K, B, ...]`."""
        if self.tangents is not None:
            return self.lower(self.tangents.expand(self.count, *x.shape))
        assert self.key is not None
        like = x if self.dtype is None else x.new_empty(x.shape, dtype=self.dtype)
        return dispatch.probe(self.backend, like, self.key, self.ids, self.count, self.kind)

    @property
    def counts(self) -> tuple[int, ...]:
        """How often the batch is in each of a dual's pieces."""
        return (self.count + 1,) if self.dtype is None else (1, self.count)

    def lower(self, z: Tensor) -> Tensor:
        """As tangents are kept, and multiply."""
        return z if self.dtype is None else z.to(self.dtype)

    def copy(self, other: Tensor) -> Tensor:
        """What tangents multiply with, in their dtype."""
        return _kept(self.copies, "copy", (other,), lambda: self.lower(other))

    def product(
        self, function: Callable[[Tensor, Tensor], Tensor], z: Tensor, other: Tensor
    ) -> Tensor:
        """A function that is linear in z, and in what z multiplies with, of the dtype of z."""
        if z.dtype == other.dtype:
            return function(z, other)
        if z.device.type not in WIDENED:
            return function(z, self.copy(other))
        wide = z.to(other.dtype)
        with _widened(z, wide):
            return function(wide, other).to(z.dtype)

    @property
    def basis(self) -> bool:
        """Whether all samples have the same tangents."""
        return self.tangents is not None and self.tangents.shape[1] == 1


@dataclass(frozen=True)
class _Stack:
    """What `[x; tangents]` is made of.

    Attributes:
        storage: of the stack, while anyone holds it.
        dtype, version: of the stack.
        source, primal, low, width: as of `Seed`.
    """

    storage: StorageWeakRef
    dtype: torch.dtype
    version: int
    source: Source
    primal: Tensor
    low: int
    width: int

    @torch.no_grad()
    def make(self, primal: Tensor) -> Tensor:
        return _stacked(self.source, primal, self.low, self.width)


def _stacked(source: Source, primal: Tensor, low: int, width: int) -> Tensor:
    """`[(K + 1) B, ...]`, or `[K B, ...]` of tangents apart; they are 0 outside x's columns."""
    tangents = source.draw(primal[..., low : low + width])
    right = primal.shape[-1] - low - width
    if low or right:
        tangents = F.pad(tangents, (low, right))
    if source.dtype is not None:
        return tangents.flatten(0, 1).contiguous()
    return torch.cat([primal[None], tangents]).flatten(0, 1)


def _keep(z: Tensor, hooks: Any) -> Callable[[], Tensor]:
    """z for backward, as autograd keeps it, or as other hooks do that are at work."""
    if hooks is not None:
        pack, unpack = hooks
        packed = pack(z)
        return lambda: unpack(packed)
    version = z._version

    def get() -> Tensor:
        if z._version != version:
            raise RuntimeError(
                "divergence: a tensor needed for gradients has been modified by an inplace"
                f" operation: {tuple(z.shape)} is at version {z._version}, expected {version}"
            )
        return z

    return get


@contextlib.contextmanager
def _remaking(origin: Callable[[Tensor], tuple[Tensor, Remake] | None]) -> Iterator[None]:
    """What is kept for backward within is what a tensor is made of, where `origin` knows that."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        yield
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(z: Tensor) -> Callable[[], Tensor]:
        found = origin(z)
        if found is None:
            return _keep(z, hooks)
        get, remake = _keep(found[0], hooks), found[1]
        layout = z.shape, z.stride(), z.storage_offset()
        return lambda: remake(get()).as_strided(*layout)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda get: get()):
        yield


def _redrawing(source: Source) -> contextlib.AbstractContextManager[None]:
    """Keeps x and how to draw, wherever it would be the stack."""

    def origin(z: Tensor) -> tuple[Tensor, Remake] | None:
        stack = source.stacks.get(z.untyped_storage()._cdata)
        if stack is None or (z.dtype, z._version) != (stack.dtype, stack.version):
            return None
        return stack.primal, stack.make

    return _remaking(origin)


def _widened(low: Tensor, wide: Tensor) -> contextlib.AbstractContextManager[None]:
    """Keeps tangents of bfloat16 wherever it would be their float32 copy."""
    if _plain() or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    own, version, dtype = wide.untyped_storage()._cdata, wide._version, wide.dtype

    def origin(z: Tensor) -> tuple[Tensor, Remake] | None:
        if (z.untyped_storage()._cdata, z._version, z.dtype) != (own, version, dtype):
            return None
        return low, lambda kept: kept.to(dtype)

    return _remaking(origin)


Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[Any, Rule] = {}


def register(*functions: Any) -> Callable[[R], R]:
    """Add a rule for functions of torch: called with their arguments where one is a `Dual`."""

    def add(rule: R) -> R:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return add


class _Traced:
    """What a forward sees in place of x: its shape, and functions that have rules."""

    primal_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    rules = RULES
    requires_grad = False

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = cls.rules.get(func)
        if rule is None:
            raise UnsupportedError(f"no rule for {getattr(func, '__name__', func)}")
        return rule(*args, **(kwargs or {}))

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

    def __neg__(self) -> Any:
        return self._call(torch.neg, self)

    def __matmul__(self, other: Any) -> Any:
        return self._call(torch.matmul, self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return self._call(torch.matmul, other, self)

    def __getitem__(self, index: Any) -> Any:
        return self._call(torch.Tensor.__getitem__, self, index)


def _method(name: str) -> Callable[..., Any]:
    function = getattr(torch.Tensor, name)

    def call(self: _Traced, *args: Any, **kwargs: Any) -> Any:
        return self._call(function, self, *args, **kwargs)

    call.__name__ = name
    return call


for _name in (
    *("add", "sub", "mul", "div", "neg", "matmul", "view", "reshape", "flatten", "unflatten"),
    *("transpose", "permute", "unsqueeze", "squeeze", "movedim", "chunk", "split", "contiguous"),
    *("mean", "sum", "tanh", "relu", "sigmoid", "softmax", "exp", "sin", "cos", "square"),
    *("to", "float", "clone", "expand_as", "type_as"),
):
    setattr(_Traced, _name, _method(_name))


class Dual(_Traced):
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
            if _plain():
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
        with contextlib.nullcontext() if source is None else _redrawing(source):
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
            self._made = z = _stacked(source, primal, *place)
            if torch.is_grad_enabled() and not _plain():
                storage = StorageWeakRef(z.untyped_storage())  # type: ignore[no-untyped-call]
                own = replace(source, stacks={})
                stack = _Stack(storage, z.dtype, z._version, own, primal.detach(), *place)
                source.stacks[storage.cdata] = stack
        return self._made

    def joined(self) -> Tensor:
        if self.source.dtype is None:
            return self.made()
        return torch.cat([self.primal, self.made().to(self.dtype)])

    def pieces(self, *, shifted: bool = True) -> tuple[Tensor, ...]:
        return (self.made(),) if self.source.dtype is None else (self.primal, self.made())

    def begins(self) -> bool:
        return torch.is_grad_enabled() and not _plain()

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


def _plain() -> bool:
    """Whether to use torch's own derivatives: compilers and transforms plan what they keep."""
    return torch.compiler.is_compiling() or is_transformed()


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


class _ProbeLinear(torch.autograd.Function):
    """`[x W'; v W_x']` for probes v that backward draws again."""

    @staticmethod
    def forward(
        ctx: Any, primal: Tensor, weight: Tensor, source: Source, low: int, width: int
    ) -> Tensor:
        ctx.save_for_backward(primal, weight)
        ctx.source, ctx.low, ctx.width = source, low, width
        return _probe_linear(primal, weight, source, low, width)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        primal, weight = ctx.saved_tensors
        low, width = ctx.low, ctx.width
        batch = primal.shape[0]
        gx = g[:batch] @ weight if ctx.needs_input_grad[0] else None
        gw = None
        if ctx.needs_input_grad[1]:
            v = ctx.source.draw(primal[:, low : low + width].detach()).flatten(0, 1)
            if width == primal.shape[1]:
                gw = g.T @ torch.cat([primal, v])
            else:
                gw = g[:batch].T @ primal
                gw = gw + F.pad(g[batch:].T @ v, (low, primal.shape[1] - low - width))
        return gx, gw, None, None, None


def _probe_linear(primal: Tensor, weight: Tensor, source: Source, low: int, width: int) -> Tensor:
    own = primal[:, low : low + width]
    v = source.draw(own).flatten(0, 1)
    part = weight if width == weight.shape[1] else weight[:, low : low + width]
    if _plain():
        return torch.cat([primal @ weight.T, v @ part.T])
    batch = primal.shape[0]
    out = primal.new_empty((batch * (source.count + 1), weight.shape[0]))
    torch.mm(primal, weight.T, out=out[:batch])
    torch.mm(v, part.T, out=out[batch:])
    return out


class _LowLinear(torch.autograd.Function):
    """`t W'` by a copy of W in the dtype of t; the gradient of W is that of a float32 product."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(t, copy)
        return F.linear(t, copy)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        t, copy = ctx.saved_tensors
        gt = g @ copy if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return gt, None, None
        rows, columns = g.reshape(-1, g.shape[-1]), t.reshape(-1, t.shape[-1])
        if g.is_cuda and not torch.is_grad_enabled():
            return gt, torch.mm(rows.T, columns, out_dtype=torch.float32), None
        return gt, (rows.T @ columns).float(), None


def _linear_pieces(source: Source, pieces: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Each piece times W'."""
    out = [F.linear(pieces[0], weight)]
    for t in pieces[1:]:
        if t.device.type in WIDENED or _plain() or not torch.is_grad_enabled():
            out.append(source.product(F.linear, t, weight))
        else:
            copy = source.copy(weight)
            out.append(_LowLinear.apply(t, weight, copy))  # type: ignore[no-untyped-call]
    return out


def _same(h: Dual, function: Callable[[Tensor], Any]) -> Any:
    """A function that is linear in each sample by itself."""
    outs = [function(z) for z in h.pieces()]
    if isinstance(outs[0], Tensor):
        return h.like(*outs)
    return type(outs[0])(h.like(*own) for own in zip(*outs, strict=True))


@register(F.linear)
def _linear(h: Any, weight: Any, bias: Tensor | None = None) -> Dual:
    if isinstance(weight, Dual) or isinstance(bias, Dual) or not isinstance(h, Dual):
        raise UnsupportedError("no rule for linear with a weight that depends on x")
    source = h.source
    if isinstance(h, Seed) and h.ndim == 2:
        return _first(h, weight, bias)
    if source.dtype is not None:
        return h.like(*_linear_pieces(source, h.pieces(), weight), shift=bias)
    lazy = source.basis or source.cache is not None
    if lazy and not torch.is_grad_enabled() and h.ndim == 2:
        return Dual(source, h.stack(), shift=bias, pending=weight)
    return Dual(source, F.linear(h.stack(), weight), shift=bias, owned=True)


def _first(h: Seed, weight: Tensor, bias: Tensor | None) -> Dual:
    """The first layer: tangents go through the weight's own columns."""
    source, primal = h.source, h.primal
    if source.dtype is not None:
        if not source.basis:
            return h.like(*_linear_pieces(source, h.pieces(), weight), shift=bias)
        assert source.tangents is not None
        t = source.lower(source.tangents[:, 0])
        part = weight[:, h.low : h.low + h.width]
        rows = source.product(F.linear, t, part)[:, None].expand(-1, primal.shape[0], -1)
        return h.like(F.linear(primal, weight), rows.flatten(0, 1), shift=bias)
    if source.basis:
        assert source.tangents is not None
        part = weight[:, h.low : h.low + h.width]
        shared = source.tangents[:, 0] @ part.T
        return Dual(source, F.linear(primal, weight), shared=shared, shift=bias, owned=True)
    if source.tangents is not None:
        return Dual(source, F.linear(h.stack(), weight), shift=bias, owned=True)
    if source.cache is not None and not torch.is_grad_enabled() and not _plain():
        part = weight[:, h.low : h.low + h.width]
        fixed = _kept(
            source.cache, "first", (weight,), lambda: source.draw(h.own).flatten(0, 1) @ part.T
        )
        batch = primal.shape[0]
        flat = primal.new_empty((batch + fixed.shape[0], weight.shape[0]))
        torch.mm(primal, weight.T, out=flat[:batch])
        flat[batch:] = fixed
        return Dual(source, flat, shift=bias, owned=True)
    wanted = torch.is_grad_enabled() and (weight.requires_grad or primal.requires_grad)
    if wanted and not _plain():
        flat = _ProbeLinear.apply(primal, weight, source, h.low, h.width)  # type: ignore[no-untyped-call]
    else:
        flat = _probe_linear(primal, weight, source, h.low, h.width)
    return Dual(source, flat, shift=bias, owned=True)


def _kept(
    cache: dict[Any, Tensor] | None,
    name: str,
    weights: Sequence[Tensor],
    compute: Callable[[], Tensor],
) -> Tensor:
    """A product with parameters, kept in the cache of a solve: they do not change within one."""
    owners = [w if w._base is None else w._base for w in weights]
    if cache is None or not all(isinstance(w, torch.nn.Parameter) for w in owners):
        return compute()
    key = (name, *((w.data_ptr(), w.shape, w.stride()) for w in weights))
    if key not in cache:
        cache[key] = compute()
    return cache[key]


def _convolution(function: Callable[..., Tensor]) -> Rule:
    def rule(h: Any, weight: Any, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Dual:
        if not isinstance(h, Dual) or isinstance(weight, Dual):
            raise UnsupportedError(
                f"no rule for {function.__name__} with a weight that depends on x"
            )

        def convolve(z: Tensor, w: Tensor) -> Tensor:
            return function(z, w, None, *args, **kwargs)

        outs = [h.source.product(convolve, z, weight) for z in h.pieces()]
        if bias is not None:
            bias = bias.reshape(-1, *(1,) * (outs[0].ndim - 2))
        return h.like(*outs, shift=bias, owned=True)

    return rule


for _f in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d):
    register(_f)(_convolution(_f))


def _kernel_shift(shift: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, int]:
    """A shift as the kernels take it, with the elements that share each value of it."""
    if shift is None:
        return None, 1
    own = tuple(shift.shape)
    while own and own[0] == 1:
        own = own[1:]
    if own == tuple(shape[len(shape) - len(own) :]):
        return shift, 1
    if len(own) == len(shape) - 1 and own[0] == shape[1] and max(own[1:], default=1) == 1:
        return shift, math.prod(shape[2:])
    return shift.expand(shape), 1


def _activation(kind: str, h: Dual, beta: float = 1.0, threshold: float = 20.0) -> Dual:
    if h.source.dtype is not None:
        shift, inner = _kernel_shift(h.shift, h.primal_shape)
        z, u = h.pieces(shifted=False)
        options = (shift, kind, beta, threshold, inner)
        return h.like(*dispatch.activate_pair(h.source.backend, z, u, *options))
    flat, shared = (h.stack(), None) if isinstance(h, Seed) else (h.flat, h.shared)
    if h.pending is not None:
        flat = h.joined()
    if shared is not None and torch.is_grad_enabled() and shared.requires_grad:
        flat, shared = h.joined(), None
    shift, inner = _kernel_shift(h.shift, h.primal_shape)
    out = dispatch.activate(
        h.source.backend, flat, shared, shift, h.source.count, kind, beta, threshold, inner
    )
    return h.like(out, owned=True)


@register(F.silu)
def _silu(h: Dual, inplace: bool = False) -> Dual:
    return _activation("silu", h)


@register(F.gelu)
def _gelu(h: Dual, approximate: str = "none") -> Dual:
    return _activation("gelu" if approximate == "none" else "gelu_tanh", h)


@register(torch.tanh, torch.Tensor.tanh, F.tanh)
def _tanh(h: Dual) -> Dual:
    return _activation("tanh", h)


@register(torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid)
def _sigmoid(h: Dual) -> Dual:
    return _activation("sigmoid", h)


@register(torch.relu, torch.Tensor.relu, F.relu)
def _relu(h: Dual, inplace: bool = False) -> Dual:
    return _activation("relu", h)


@register(F.softplus)
def _softplus(h: Dual, beta: float = 1.0, threshold: float = 20.0) -> Dual:
    return _activation("softplus", h, float(beta), float(threshold))


def _unary(f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Rule:
    def rule(h: Dual) -> Dual:
        primal, tangents = h.halves()
        return h.of_halves(f(primal), slope(primal) * tangents)

    return rule


register(torch.exp, torch.Tensor.exp)(_unary(torch.exp, torch.exp))
register(torch.sin, torch.Tensor.sin)(_unary(torch.sin, torch.cos))
register(torch.cos, torch.Tensor.cos)(_unary(torch.cos, lambda z: -z.sin()))
register(torch.square, torch.Tensor.square)(_unary(torch.square, lambda z: 2 * z))


def _normed(
    h: Dual,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    centred: bool,
    eps: float,
) -> Dual:
    shift = h.shift
    if shift is not None:
        shift, inner = _kernel_shift(shift, h.primal_shape)
        if inner > 1:
            h.pieces()
            shift = None
    if h.source.dtype is not None:
        z, u = h.pieces(shifted=False)
        options = (shift, weight, bias, groups, centred, eps)
        return h.like(*dispatch.norm_pair(h.source.backend, z, u, *options))
    flat = h.joined()
    out = dispatch.norm(
        h.source.backend, flat, shift, weight, bias, h.source.count, groups, centred, eps
    )
    return h.like(out, owned=True)


def _last(shape: torch.Size, normalized_shape: Sequence[int]) -> int:
    """Rows of a sample where the last axes are normalised."""
    own = tuple(normalized_shape)
    if len(own) >= len(shape) or tuple(shape[len(shape) - len(own) :]) != own:
        raise UnsupportedError(f"no rule for a norm over {own} of {tuple(shape)}")
    return math.prod(shape[1 : len(shape) - len(own)])


def _per_row(w: Tensor | None, rows: int) -> Tensor | None:
    return w if w is None or rows == 1 else w.flatten().expand(rows, -1)


@register(F.layer_norm)
def _layer_norm(
    input: Dual,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Dual:
    rows = _last(input.shape, normalized_shape)
    return _normed(input, _per_row(weight, rows), _per_row(bias, rows), rows, True, eps)


@register(F.rms_norm)
def _rms_norm(
    input: Dual,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Dual:
    rows = _last(input.shape, normalized_shape)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _normed(input, _per_row(weight, rows), None, rows, False, eps)


@register(F.group_norm)
def _group_norm(
    input: Dual,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Dual:
    inner = math.prod(input.shape[2:])

    def spread(w: Tensor | None) -> Tensor | None:
        return w if w is None or inner == 1 else w[:, None].expand(-1, inner)

    return _normed(input, spread(weight), spread(bias), num_groups, True, eps)


@register(F.batch_norm)
def _batch_norm(
    input: Dual,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Dual:
    if training or running_mean is None or running_var is None:
        raise UnsupportedError("no rule for batch_norm in training: it mixes samples")
    scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
    shift = -running_mean * scale + (0 if bias is None else bias)
    per = (-1, *(1,) * (input.ndim - 2))
    return _add(_mul(input, scale.reshape(per)), shift.reshape(per))


def _broadcast(h: _Traced, other: Tensor) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(h.shape, other.shape)  # type: ignore[no-untyped-call]
    return shape


def _aligned(h: Dual, other: Any) -> Any:
    """A plain factor or term; one that would make the batch larger has no rule."""
    if isinstance(other, Tensor) and other.ndim > 0:
        if other.ndim > h.ndim or (other.ndim == h.ndim and other.shape[0] not in (1, h.shape[0])):
            raise UnsupportedError(f"no rule for {tuple(h.shape)} with {tuple(other.shape)}")
        if _broadcast(h, other) != h.shape:
            raise UnsupportedError(f"no rule for {tuple(h.shape)} with {tuple(other.shape)}")
    return other


@register(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _add(a: Any, b: Any, *, alpha: float = 1) -> Dual:
    if alpha != 1:
        b = b * alpha
    if isinstance(a, Dual) and isinstance(b, Dual):
        if a.shape != b.shape:
            if a.ndim != b.ndim:
                raise UnsupportedError(f"no rule for {tuple(a.shape)} + {tuple(b.shape)}")
            pairs = zip(a.copies(), b.copies(), strict=True)
            return a.like(*((x + y).flatten(0, 1) for x, y in pairs), owned=True)
        shift = a.shift if b.shift is None else b.shift if a.shift is None else a.shift + b.shift
        pairs = zip(a.pieces(shifted=False), b.pieces(shifted=False), strict=True)
        return a.like(*(x + y for x, y in pairs), shift=shift, owned=True)
    h, other = (a, b) if isinstance(a, Dual) else (b, a)
    other = _aligned(h, other)
    if not isinstance(other, Tensor):
        other = torch.full((), other, dtype=h.dtype, device=h.device)
    shift = other if h.shift is None else h.shift + other
    pieces = h.pieces(shifted=False)
    h.owned = False  # two see it now
    return h.like(*pieces, shift=shift)


@register(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)
def _sub(a: Any, b: Any, *, alpha: float = 1) -> Dual:
    return _add(a, _neg(b) if isinstance(b, Dual) else -b, alpha=alpha)


@register(torch.neg, torch.Tensor.neg)
def _neg(h: Dual) -> Dual:
    return h.like(*(-z for z in h.pieces()), owned=True)


@register(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def _mul(a: Any, b: Any) -> Dual:
    if isinstance(a, Dual) and isinstance(b, Dual):
        if a.ndim != b.ndim:
            raise UnsupportedError(f"no rule for {tuple(a.shape)} * {tuple(b.shape)}")
        (x, dx), (y, dy) = a.halves(), b.halves()
        return a.of_halves(x * y, dx * y + x * dy)
    h, other = (a, b) if isinstance(a, Dual) else (b, a)
    other = _aligned(h, other)
    if not isinstance(other, Tensor) or other.ndim < h.ndim:
        return h.like(*(z * other for z in h.pieces()), owned=True)
    return h.like(*((z * other).flatten(0, 1) for z in h.copies()), owned=True)


@register(torch.div, torch.Tensor.div, torch.Tensor.__truediv__, torch.true_divide)
def _div(a: Any, b: Any) -> Dual:
    if isinstance(b, Dual):
        raise UnsupportedError("no rule for division by what depends on x")
    return _mul(a, 1 / b)


@register(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> Dual:
    first: Dual = next(h for h in tensors if isinstance(h, Dual))
    dim = dim if axis is None else axis
    dim = dim % first.ndim
    if dim == 0:
        raise UnsupportedError("no rule for cat along the batch")
    alone = sum(isinstance(h, Dual) for h in tensors) == 1
    if alone and isinstance(first, Seed) and dim == first.ndim - 1:
        at = next(i for i, h in enumerate(tensors) if h is first)
        low = first.low + sum(h.shape[dim] for h in tensors[:at])
        whole = torch.cat([first.primal if h is first else h for h in tensors], dim)
        return Seed(first.source, whole, low, first.width)

    def piece(h: Any, i: int, m: int) -> Tensor:
        """Of a dual, or of what has no tangents, `[m, B, ...]`."""
        if isinstance(h, Dual):
            return list(h.copies())[i]
        zeros: Tensor = h.new_zeros((m - (i == 0), *h.shape))
        return zeros if i else torch.cat([h[None], zeros])

    return first.like(
        *(
            torch.cat([piece(h, i, m) for h in tensors], dim + 1).flatten(0, 1)
            for i, m in enumerate(first.source.counts)
        ),
        owned=True,
    )


def _sizes(h: Dual, shape: Sequence[Any]) -> tuple[int, ...]:
    """The shape that a view asks for: the batch comes first in both."""
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    sizes = [int(s) for s in shape]
    rest = math.prod(s for s in sizes if s != -1)
    sizes = [h.numel() // max(rest, 1) if s == -1 else s for s in sizes]
    batch = h.shape[0]
    if sizes[0] % max(batch, 1) and batch % max(sizes[0], 1):
        raise UnsupportedError(f"no rule for a view of {tuple(h.shape)} as {tuple(sizes)}")
    return tuple(sizes)


@register(torch.reshape, torch.Tensor.reshape, torch.Tensor.view)
def _reshape(h: Dual, *shape: Any) -> Dual:
    first, *rest = sizes = _sizes(h, shape)
    own = isinstance(h, Seed) and h.width == h.shape[-1] and h.source.tangents is None
    if isinstance(h, Seed) and own and first == h.shape[0]:
        return Seed(h.source, h.primal.reshape(sizes), 0, sizes[-1])
    pieces = zip(h.pieces(), h.source.counts, strict=True)
    return h.like(*(z.reshape(m * first, *rest) for z, m in pieces))


@register(torch.flatten, torch.Tensor.flatten)
def _flatten(h: Dual, start_dim: int = 0, end_dim: int = -1) -> Dual:
    start, end = start_dim % h.ndim, end_dim % h.ndim
    shape = h.shape
    return _reshape(h, *shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


@register(torch.unflatten, torch.Tensor.unflatten)
def _unflatten(h: Dual, dim: int, sizes: Sequence[int]) -> Dual:
    dim = dim % h.ndim
    rest = math.prod(s for s in sizes if s != -1)
    own = [h.shape[dim] // rest if s == -1 else s for s in sizes]
    return _reshape(h, *h.shape[:dim], *own, *h.shape[dim + 1 :])


def _inside(h: Dual, *dims: int) -> tuple[int, ...]:
    own = tuple(d % h.ndim for d in dims)
    if 0 in own:
        raise UnsupportedError("no rule along the batch")
    return own


@register(torch.transpose, torch.Tensor.transpose)
def _transpose(h: Dual, dim0: int, dim1: int) -> Dual:
    dims = _inside(h, dim0, dim1)
    return _same(h, lambda z: z.transpose(*dims))  # type: ignore[no-any-return]


@register(torch.permute, torch.Tensor.permute)
def _permute(h: Dual, *dims: Any) -> Dual:
    order = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    if order[0] % h.ndim != 0:
        raise UnsupportedError("no rule along the batch")
    return _same(h, lambda z: z.permute(order))  # type: ignore[no-any-return]


@register(torch.movedim, torch.Tensor.movedim)
def _movedim(h: Dual, source: int, destination: int) -> Dual:
    dims = _inside(h, source, destination)
    return _same(h, lambda z: z.movedim(*dims))  # type: ignore[no-any-return]


@register(torch.unsqueeze, torch.Tensor.unsqueeze)
def _unsqueeze(h: Dual, dim: int) -> Dual:
    own = dim % (h.ndim + 1)
    if own == 0:
        raise UnsupportedError("no rule along the batch")
    return _same(h, lambda z: z.unsqueeze(own))  # type: ignore[no-any-return]


@register(torch.squeeze, torch.Tensor.squeeze)
def _squeeze(h: Dual, dim: int) -> Dual:
    (own,) = _inside(h, dim)
    return _same(h, lambda z: z.squeeze(own))  # type: ignore[no-any-return]


@register(torch.chunk, torch.Tensor.chunk)
def _chunk(h: Dual, chunks: int, dim: int = 0) -> Any:
    (own,) = _inside(h, dim)
    return _same(h, lambda z: z.chunk(chunks, own))


@register(torch.split, torch.Tensor.split)
def _split(h: Dual, split_size_or_sections: Any, dim: int = 0) -> Any:
    (own,) = _inside(h, dim)
    return _same(h, lambda z: torch.split(z, split_size_or_sections, own))


@register(torch.Tensor.__getitem__)
def _getitem(h: Dual, index: Any) -> Dual:
    own = index if isinstance(index, tuple) else (index,)
    whole = isinstance(own[0], slice) and own[0] == slice(None)
    if not (whole or own[0] is Ellipsis) or any(isinstance(i, (Tensor, _Traced)) for i in own):
        raise UnsupportedError("no rule for indexing the batch, or by tensors")
    if own[0] is Ellipsis and len([i for i in own if i is not None]) > h.ndim:
        raise UnsupportedError("no rule along the batch")
    return _same(h, lambda z: z[index])  # type: ignore[no-any-return]


def _reduced(name: str) -> Rule:
    def rule(h: Dual, dim: Any = None, keepdim: bool = False) -> Dual:
        if dim is None:
            raise UnsupportedError(f"no rule for {name} over the batch")
        dims = _inside(h, *((dim,) if isinstance(dim, int) else dim))
        return _same(h, lambda z: getattr(z, name)(dims, keepdim))  # type: ignore[no-any-return]

    return rule


register(torch.sum, torch.Tensor.sum)(_reduced("sum"))
register(torch.mean, torch.Tensor.mean)(_reduced("mean"))


@register(torch.Tensor.contiguous, torch.Tensor.clone, torch.clone)
def _identity(h: Dual, *_: Any, **__: Any) -> Dual:
    return h


@register(torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as)
def _to(h: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(h, Tensor):  # to the dtype and device of a dual
        like = args[0] if args else kwargs["other"]
        return h.to(dtype=like.dtype, device=like.device)
    probe = torch.empty(0, dtype=h.dtype, device=h.device)
    moved = probe.to(*args, **kwargs) if args or kwargs else probe.float()
    if moved.dtype != h.dtype or moved.device != h.device:
        raise UnsupportedError(f"no rule for a change to {moved.dtype} on {moved.device}")
    return h


@register(F.dropout)
def _dropout(input: Dual, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dual:
    if training and p > 0:
        raise UnsupportedError("no rule for dropout in training")
    return input


def _each(function: Callable[..., Tensor]) -> Rule:
    def rule(h: Dual, *args: Any, **kwargs: Any) -> Dual:
        return _same(h, lambda z: function(z, *args, **kwargs))  # type: ignore[no-any-return]

    return rule


for _pool in (F.avg_pool1d, F.avg_pool2d, F.interpolate, F.pixel_shuffle, F.pixel_unshuffle):
    register(_pool)(_each(_pool))


@register(F.glu)
def _glu(input: Dual, dim: int = -1) -> Dual:
    value, gate = _chunk(input, 2, dim)
    return _mul(value, _sigmoid(gate))


@register(F.softmax, torch.softmax, torch.Tensor.softmax)
def _softmax(input: Dual, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Dual:
    (own,) = _inside(input, dim)
    primal, t = input.halves()
    p = primal.softmax(own + 1)
    change = input.source.lower(t - (p * t).sum(own + 1, keepdim=True))
    return input.of_halves(p, p * change)


def _times(h: Dual, t: Tensor, other: Tensor) -> Tensor:
    """`t[k] @ other` for t `[K, B, ..., N, D]` and other `[B, ..., D, M]`, which is not copied."""
    rows = t.movedim(0, -3).flatten(-3, -2)
    out = h.source.product(torch.matmul, rows, other)
    shape = (*out.shape[:-2], t.shape[0], t.shape[-2], out.shape[-1])
    return out.reshape(shape).movedim(-3, 0)


@register(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)
def _matmul(a: Any, b: Any) -> Dual:
    if isinstance(a, Dual) and isinstance(b, Dual):
        if a.ndim < 3 or a.ndim != b.ndim:
            raise UnsupportedError("no rule for a product that mixes samples")
        (x, dx), (y, dy) = a.halves(), b.halves()
        return a.of_halves(x @ y, _times(a, dx, y[0]) + _times(a, dy.mT, x[0].mT).mT)
    h = a if isinstance(a, Dual) else b
    if isinstance(a, Dual) and a.ndim >= 2 and b.ndim == 2:
        product = a.source.product
        return a.like(*(product(torch.matmul, z, b) for z in a.pieces()), owned=True)
    if h.ndim < 3 or (a.ndim != b.ndim and (b if h is a else a).ndim != 2):
        raise UnsupportedError("no rule for a product that mixes samples")
    outs = (_times(h, z, b) if h is a else _times(h, z.mT, a.mT).mT for z in h.copies())
    return h.like(*(z.flatten(0, 1) for z in outs), owned=True)


@register(F.scaled_dot_product_attention)
def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Dual:
    """`P = softmax(Q K' s)`, `dO = dP V + P dV`, `dP = P (dS - <P, dS>)`."""
    if dropout_p > 0 or enable_gqa:
        raise UnsupportedError("no rule for attention with dropout or grouped queries")
    h = next(m for m in (query, key, value) if isinstance(m, Dual))
    if h.ndim < 3:
        raise UnsupportedError("no rule for attention that mixes samples")
    (q, dq), (k, dk), (v, dv) = (
        m.halves() if isinstance(m, Dual) else (m[None], None) for m in (query, key, value)
    )
    s = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.mT * s
    if is_causal:
        n, m = scores.shape[-2:]
        attn_mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
    p, lower = scores.softmax(-1), h.source.lower
    moved: Any = 0
    if dq is not None or dk is not None:
        change: Any = 0
        if dq is not None:
            change = _times(h, dq, k[0].mT)
        if dk is not None:
            change = change + _times(h, dk, q[0].mT).mT
        change = lower(change - (p * change).sum(-1, keepdim=True))
        moved = _times(h, lower(s * p * change), v[0])
    if dv is not None:
        moved = moved + _times(h, dv.mT, p[0].mT).mT
    return h.of_halves(p @ v, moved)


class _Head(torch.autograd.Function):
    """Velocity and products of its tangents with the probes, from the stack of both."""

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, shift: Tensor | None, source: Source
    ) -> tuple[Tensor, Tensor]:
        batch = flat.shape[0] // (source.count + 1)
        ctx.source, ctx.batch, ctx.inner = source, batch, flat.shape[1:]
        ctx.shape = None if shift is None else shift.shape
        return _head(flat, shift, source)

    @staticmethod
    def backward(ctx: Any, gv: Tensor, gd: Tensor) -> tuple[Any, ...]:
        source = ctx.source
        v = dispatch.probe_scale(
            source.backend, gd, source.key, source.ids, ctx.inner.numel(), source.kind
        )
        g = torch.cat([gv, v.reshape(-1, *ctx.inner)])
        gs = gv.sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None
        return g, gs, None


def _head(flat: Tensor, shift: Tensor | None, source: Source) -> tuple[Tensor, Tensor]:
    batch = flat.shape[0] // (source.count + 1)
    velocity = flat[:batch].clone() if shift is None else flat[:batch] + shift
    assert source.key is not None
    dots = dispatch.probe_dot(
        source.backend, flat[batch:], source.key, source.ids, source.count, source.kind
    )
    return velocity, dots


def _checked(out: Any, x: Tensor) -> Dual:
    if not isinstance(out, Dual):
        if isinstance(out, Tensor):
            raise UnsupportedError(
                "what velocity returns does not depend on x by differentiable steps"
            )
        raise ValueError(f"velocity must return one tensor, got {type(out).__name__}")
    if out.shape != x.shape:
        raise ValueError(f"velocity must return {tuple(x.shape)} like x, got {tuple(out.shape)}")
    return out


def products(
    velocity: Callable[..., Any], x: Tensor, t: Any, source: Source
) -> tuple[Tensor, Tensor]:
    """Velocity `[B, ...]` and `J v_k`, `[K, B, ...]`, for the tangents of `source`."""
    out = _checked(velocity(Seed(source, x, 0, x.shape[-1]), t), x)
    primal, tangents = out.halves()
    return primal[0], tangents.to(x.dtype)


def probe_products(
    velocity: Callable[..., Any], x: Tensor, t: Any, source: Source
) -> tuple[Tensor, Tensor]:
    """Velocity `[B, ...]` and `<v_k, J v_k>`, `[K, B]`, for the probes of `source`."""
    out = _checked(velocity(Seed(source, x, 0, x.shape[-1]), t), x)
    if out.pending is not None and source.cache is not None:
        return _fixed_head(out, x)
    if source.dtype is not None:
        assert source.key is not None
        primal, tangents = out.pieces()
        return primal, dispatch.probe_dot(
            *(source.backend, tangents, source.key, source.ids, source.count, source.kind)
        )
    flat = out.joined()
    if torch.is_grad_enabled() and flat.requires_grad and not _plain():
        return _Head.apply(flat, out.shift, source)  # type: ignore[no-any-return,no-untyped-call]
    return _head(flat, out.shift, source)


def _fixed_head(out: Dual, x: Tensor) -> tuple[Tensor, Tensor]:
    """`<v, W h> = <W' v, h>` with `W' v` kept over a solve."""
    source, weight, cache = out.source, out.pending, out.source.cache
    assert weight is not None
    assert cache is not None
    kept = _kept(cache, "last", (weight,), lambda: source.draw(x).flatten(0, 1) @ weight)
    batch = x.shape[0]
    velocity = F.linear(out.flat[:batch], weight, out.shift)
    dots = torch.linalg.vecdot(kept, out.flat[batch:])
    return velocity, dots.reshape(source.count, batch)


def exact_by_tangents(
    velocity: Callable[..., Any], x: Tensor, t: Any, source: Source, chunk: int
) -> tuple[Tensor, Tensor]:
    """Velocity and `sum_i e_i' J e_i`, `[B]`, by D tangents, `chunk` at a time, as `source` has
    them otherwise."""
    d = x[0].numel() if x.ndim > 1 else 1
    basis = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])
    total: Any = 0
    for first in range(0, d, chunk):
        own = basis[first : first + chunk]
        part = replace(source, count=own.shape[0], tangents=own, stacks={})
        out = _checked(velocity(Seed(part, x, 0, x.shape[-1]), t), x)
        if out.pending is not None:
            rows = out.pending[first : first + chunk, :, None]
            batch = x.shape[0]
            tangents = out.flat[batch:].reshape(own.shape[0], batch, -1)
            total = total + (tangents @ rows)[..., 0].sum(0)
            primal = F.linear(out.flat[:batch], out.pending, out.shift)
        else:
            (primal,), columns = out.halves()
            diagonal = columns.flatten(2)[:, :, first : first + chunk]
            total = total + diagonal.diagonal(dim1=0, dim2=2).sum(-1, dtype=x.dtype)
    return primal, total


@dataclass(frozen=True)
class Budget:
    """What probes would cost: `structural` gives way to them where it costs more.

    Attributes:
        probes: each costs as much as the velocity itself.
        kept: the product of the outer weights is made once for a whole solve.
    """

    probes: int
    kept: bool

    def allows(self, batch: int, weights: Sequence[Tensor]) -> bool:
        if len(weights) < 3:
            return True
        width, depth = weights[0].shape[0], weights[2].shape[1]
        cost = batch * width * depth
        if not self.kept:
            cost += weights[0].numel() * depth
        return cost <= self.probes * batch * sum(w.numel() for w in weights)


STRUCTURAL: dict[Any, Rule] = {}


def _structural(*functions: Any) -> Callable[[R], R]:
    def add(rule: R) -> R:
        STRUCTURAL.update(dict.fromkeys(functions, rule))
        return rule

    return add


@dataclass
class _Factors:
    """`J = A_n diag(d_n) ... diag(d_1) A_0`: weights and derivatives, in the order of layers."""

    weights: list[Tensor] = field(default_factory=list)
    diagonals: list[Tensor] = field(default_factory=list)


class Chain(_Traced):
    """A primal whose Jacobian is kept as its factors: weights, and diagonals of derivatives.

    Attributes:
        primal: `[B, ...]`, still without the shift.
        shift: as of `Dual`.
        factors: None before the first layer.
    """

    rules = STRUCTURAL

    def __init__(
        self,
        backend: str,
        primal: Tensor,
        factors: _Factors | None,
        *,
        low: int = 0,
        width: int = 0,
        shift: Tensor | None = None,
    ) -> None:
        self.backend, self.primal, self.factors = backend, primal, factors
        self.low, self.width, self.shift = low, width, shift
        self.primal_shape, self.dtype, self.device = primal.shape, primal.dtype, primal.device

    def complete(self) -> bool:
        """Whether the last factor is a weight."""
        return self.factors is not None and len(self.factors.weights) > len(self.factors.diagonals)


@_structural(F.linear)
def _chain_linear(h: Any, weight: Tensor, bias: Tensor | None = None) -> Chain:
    if not isinstance(h, Chain) or h.ndim != 2 or h.complete():
        raise UnsupportedError("not a chain of linear layers with activations between them")
    if h.factors is None:
        part = weight if h.width == weight.shape[1] else weight[:, h.low : h.low + h.width]
        factors = _Factors([part])
    else:
        factors = _Factors([*h.factors.weights, weight], h.factors.diagonals)
        if len(factors.weights) > 3:
            raise UnsupportedError("more than two hidden layers")
    return Chain(h.backend, F.linear(h.primal, weight), factors, shift=bias)


def _chain_activation(kind: str, h: Chain, beta: float = 1.0, threshold: float = 20.0) -> Chain:
    if not h.complete() or h.factors is None:
        raise UnsupportedError("not a chain of linear layers with activations between them")
    shift, inner = _kernel_shift(h.shift, h.primal_shape)
    ones = h.primal.new_ones((1, h.primal_shape[1]))
    both = dispatch.activate(
        h.backend, h.primal, ones, shift, 1, kind, beta, threshold, inner
    ).reshape(2, *h.primal_shape)
    a, slope = both.unbind(0)
    return Chain(h.backend, a, _Factors(h.factors.weights, [*h.factors.diagonals, slope]))


_structural(F.silu)(lambda h, inplace=False: _chain_activation("silu", h))
_structural(F.relu, torch.relu, torch.Tensor.relu)(
    lambda h, inplace=False: _chain_activation("relu", h)
)
_structural(F.gelu)(
    lambda h, approximate="none": _chain_activation(
        "gelu" if approximate == "none" else "gelu_tanh", h
    )
)
_structural(torch.tanh, torch.Tensor.tanh, F.tanh)(lambda h: _chain_activation("tanh", h))
_structural(torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid)(
    lambda h: _chain_activation("sigmoid", h)
)
_structural(F.softplus)(
    lambda h, beta=1.0, threshold=20.0: _chain_activation(
        "softplus", h, float(beta), float(threshold)
    )
)


@_structural(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _chain_add(a: Any, b: Any) -> Chain:
    h, other = (a, b) if isinstance(a, Chain) else (b, a)
    if isinstance(other, Chain) or h.factors is None:
        raise UnsupportedError("not a chain: a sum of two branches")
    if isinstance(other, Tensor) and _broadcast(h, other) != h.shape:
        raise UnsupportedError(f"no rule for {tuple(h.shape)} with {tuple(other.shape)}")
    if not isinstance(other, Tensor):
        other = torch.full((), other, dtype=h.dtype, device=h.device)
    shift = other if h.shift is None else h.shift + other
    return Chain(h.backend, h.primal, h.factors, shift=shift)


@_structural(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def _chain_mul(a: Any, b: Any) -> Chain:
    """A gate that does not depend on x: one more diagonal, merged with that before it."""
    h, other = (a, b) if isinstance(a, Chain) else (b, a)
    if isinstance(other, Chain) or h.factors is None or h.complete():
        raise UnsupportedError(
            "not a chain: a gate that depends on x, or is outside the hidden layers"
        )
    if isinstance(other, Tensor) and _broadcast(h, other) != h.shape:
        raise UnsupportedError(f"no rule for {tuple(h.shape)} with {tuple(other.shape)}")
    *before, last = h.factors.diagonals
    primal = h.primal if h.shift is None else h.primal + h.shift
    return Chain(h.backend, primal * other, _Factors(h.factors.weights, [*before, last * other]))


@_structural(torch.cat, torch.concat, torch.concatenate)
def _chain_cat(tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> Chain:
    h: Chain = next(h for h in tensors if isinstance(h, Chain))
    dim = dim if axis is None else axis
    alone = sum(isinstance(c, Chain) for c in tensors) == 1
    if h.factors is not None or not alone or dim % h.ndim != 1 or h.ndim != 2:
        raise UnsupportedError("not a chain: concatenation after the first layer")
    at = next(i for i, c in enumerate(tensors) if c is h)
    low = h.low + sum(c.shape[1] for c in tensors[:at])
    whole = torch.cat([h.primal if c is h else c for c in tensors], 1)
    return Chain(h.backend, whole, None, low=low, width=h.width)


@_structural(torch.flatten, torch.Tensor.flatten)
def _chain_flatten(h: Chain, start_dim: int = 0, end_dim: int = -1) -> Chain:
    if start_dim != 1 or end_dim % h.ndim != h.ndim - 1:
        raise UnsupportedError("not a chain: a view of the batch")
    return _chain_view(h, h.shape[0], -1)


@_structural(torch.reshape, torch.Tensor.reshape, torch.Tensor.view)
def _chain_view(h: Chain, *shape: Any) -> Chain:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    primal = h.primal.reshape(sizes)
    if primal.shape[0] != h.shape[0]:
        raise UnsupportedError("not a chain: a view of the batch")
    if h.factors is None:
        if h.width != h.shape[1:].numel():
            raise UnsupportedError("not a chain: a view after concatenation")
    else:
        if not h.complete():
            raise UnsupportedError("not a chain: a view of hidden features")
        primal = primal if h.shift is None else (h.primal + h.shift).reshape(sizes)
    return Chain(h.backend, primal, h.factors, width=h.width)


@_structural(F.dropout)
def _chain_dropout(
    input: Chain, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Chain:
    if training and p > 0:
        raise UnsupportedError("no rule for dropout in training")
    return input


def structural(
    velocity: Callable[..., Any],
    x: Tensor,
    t: Any,
    backend: str,
    cache: dict[Any, Tensor] | None = None,
    budget: Budget | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Velocity and the exact trace, `[B]`, of at most two hidden layers, whatever D.

    `tr(W3 D2 W2 D1 W1) = d2' [W2 o (W1 W3)'] d1`: one more product of the hidden width. `cache`
    keeps its matrix over a solve. None where that costs more than `budget` has.
    """
    d = x.shape[1:].numel()
    out = velocity(Chain(backend, x, None, width=d), t)
    if not isinstance(out, Chain) or not out.complete() or out.factors is None:
        raise UnsupportedError("not a chain of linear layers with activations between them")
    if out.shape != x.shape:
        raise ValueError(f"velocity must return {tuple(x.shape)} like x, got {tuple(out.shape)}")
    weights, diagonals = out.factors.weights, out.factors.diagonals
    if budget is not None and not budget.allows(x.shape[0], weights):
        return None

    def core() -> Tensor:
        if len(weights) == 1:
            return weights[0].diagonal().sum()
        if len(weights) == 2:
            return (weights[0] * weights[1].T).sum(1)
        return (weights[0] @ weights[2]) * weights[1].T  # [H1, H2]

    middle = _kept(cache, "structural", weights, core)
    if len(weights) == 1:
        value = middle.expand(x.shape[0])
    elif len(weights) == 2:
        value = diagonals[0] @ middle
    else:
        value = torch.linalg.vecdot(diagonals[0] @ middle, diagonals[1])
    velocity_out = out.primal if out.shift is None else out.primal + out.shift
    return velocity_out, value
