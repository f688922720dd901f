"""What a forward sees in place of x: a stand-in, whose functions go to rules.

To the network it is a tensor. PyTorch hands functions, methods and operators to the rule of each by
`__torch_function__`. It has no data of its own. Code in C++ that would read it arrives in
`__torch_dispatch__` and is refused, as is a forward that changes the grad mode (custom Functions
and reentrant checkpoints run without it). Compilers cannot trace such tensors: for them a stand-in
is a plain object, `isinstance(x, Tensor)` is False, and custom Functions go unseen.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from fewstep.reference.trace import cdist


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
        path: functions that arrived, where they were called, and with which weight.
    """

    grad: bool
    refused: str | None = None
    notes: dict[str, None] = field(default_factory=dict)
    copies: list[tuple[Tensor, int]] = field(default_factory=list)
    path: list[Any] = field(default_factory=list)


class _Current(threading.local):
    run: _Run | None = None
    notes: tuple[str, ...] = ()
    path: int = 0
    normed: bool = False
    autocast: bool = False


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
    _CURRENT.path = hash(tuple(run.path))
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


def path() -> int:
    """What tells the branches of forwards apart: a hash of the last one's functions."""
    return _CURRENT.path


def autocasts() -> bool:
    """Whether the last watched forward called functions under autocast."""
    return _CURRENT.autocast


# Of these torch 2.13 takes the saved statistics for constants in a third derivative.
_NORMS = frozenset((F.layer_norm, torch.layer_norm, F.instance_norm, torch.instance_norm))


# In place of functions whose derivatives by torch are wrong under vmap, or missing.
_DERIVABLE: dict[Any, Callable[..., Any]] = {torch.cdist: cdist}


class _Watch(TorchFunctionMode):
    """Notes the functions of a forward on tensors that are no stand-ins."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[Any] = []
        self.autocast = False

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        frame = _frame(1)
        self.path += (func, frame.f_lasti, id(frame.f_code))
        self.autocast = self.autocast or _autocasts()
        return _DERIVABLE.get(func, func)(*args, **(kwargs or {}))


class _ByFormulas(TorchFunctionMode):
    """As `_Watch` calls functions, where frames cannot be seen."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _DERIVABLE.get(func, func)(*args, **(kwargs or {}))


def watched(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose `path` is known, on any tensors, and whose derivatives by torch are right.

    While compiling it has no path.
    """

    def run(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            with _ByFormulas():
                return forward(*inputs)
        with _Watch() as watch:
            out = forward(*inputs)
        _CURRENT.path = hash(tuple(watch.path))
        _CURRENT.autocast = watch.autocast
        _CURRENT.normed = not _NORMS.isdisjoint(watch.path)
        return out

    return run


def normed() -> bool:
    """Whether the last watched forward has norms whose third derivative by torch is wrong."""
    return _CURRENT.normed


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

    @classmethod
    def under_autocast(
        cls, func: Any, rule: Rule | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        raise UnsupportedError(AUTOCAST)

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
_frame = sys._getframe


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
        if run is not None:
            frame = _frame(1)
            run.path += (func, frame.f_lasti, id(frame.f_code))
            if len(args) > 1 and type(args[1]) is Parameter:
                run.path.append(id(args[1]))
        try:
            if run is not None and torch.is_grad_enabled() is not run.grad:
                raise UnsupportedError(
                    f"{name_of(func)} is called in another grad mode than forward: by a custom"
                    " autograd.Function, a reentrant checkpoint or no_grad"
                )
            own: Any = cls
            rule = own.rules.get(func)
            if _autocasts():
                return own.under_autocast(func, rule, args, kwargs or {})
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

    @property
    def requires_grad(self) -> bool:
        """That of the tensor that a plain call has here."""
        own: Any = self
        return torch.is_grad_enabled() and any(z.requires_grad for z in own.parts())

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        if _CURRENT.run is not None:
            frame = _frame(2)  # of the operator
            _CURRENT.run.path += (frame.f_lasti, id(frame.f_code))
        return type(self).__torch_function__(func, (), args, kwargs)

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


def broadcast(h: Traced, other: Tensor) -> torch.Size:
    own, theirs = h.primal_shape, other.shape
    lead = len(own) - len(theirs)
    if lead >= 0 and all(n in (1, m) for n, m in zip(theirs, own[lead:], strict=True)):
        return own
    shape: torch.Size = torch.broadcast_shapes(own, theirs)  # type: ignore[no-untyped-call]
    return shape
