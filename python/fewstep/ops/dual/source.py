"""The tangents that a forward starts with: drawn, kept, and made again in backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fewstep._torch import is_transformed
from fewstep.ops.dual import dispatch

# Devices whose products of bfloat16 are slower than of float32: tangents are widened for them.
WIDENED = ("cpu",)
_COMPILED = (torch.float32, torch.float64)  # dtypes of the kernels in C++
Remake = Callable[[Tensor], Tensor]


def widens(device: torch.device) -> bool:
    """Whether products of bfloat16 are computed in float32 on a device."""
    return device.type in WIDENED


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
        batch: B, once there is an input.
        chosen: the dtype of the input, for which the backend was chosen.
        prompt: weights are used within their own layer's forward, and not later.
        constant: tangents stand apart, in the dtype of their primal, and autograd keeps nothing of
            them: the primal is computed as in a plain call.
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
    stacks: dict[int, Stack] = field(default_factory=dict)
    batch: int = 0
    chosen: torch.dtype | None = None
    prompt: bool = False
    constant: bool = False

    def draw(self, x: Tensor) -> Tensor:
        """The tangents of x `[B, ...]`: `[K, B, ...]`."""
        if self.tangents is not None:
            return self.lower(self.tangents.expand(self.count, *x.shape))
        assert self.key is not None
        like = x if self.dtype is None else x.new_empty(x.shape, dtype=self.dtype)
        return dispatch.probe(self.backend, like, self.key, self.ids, self.count, self.kind)

    def kernels(self, dtype: torch.dtype) -> str:
        """The backend for what a network has in a dtype: those of a GPU are known for x's alone."""
        known = _COMPILED if self.backend == "cpp" else (self.chosen,)
        return self.backend if dtype in known else "reference"

    @property
    def apart(self) -> bool:
        """Whether tangents stand apart from the primal."""
        return self.constant or self.dtype is not None

    @property
    def counts(self) -> tuple[int, ...]:
        """How often the batch is in each of a dual's pieces."""
        return (1, self.count) if self.apart else (self.count + 1,)

    def lower(self, z: Tensor) -> Tensor:
        """As tangents are kept, and multiply."""
        return z if self.dtype is None else z.to(self.dtype)

    def copy(self, other: Tensor) -> Tensor:
        """What tangents multiply with, in their dtype."""
        return kept_or_computed(self.copies, "copy", (other,), lambda: self.lower(other))

    def product(
        self, function: Callable[[Tensor, Tensor], Tensor], z: Tensor, other: Tensor
    ) -> Tensor:
        """A function that is linear in z, and in what z multiplies with, of the dtype of z."""
        if z.dtype == other.dtype:
            return function(z, other)
        if not widens(z.device):
            return function(z, self.copy(other))
        wide = z.to(other.dtype)
        with _widened(z, wide):
            return function(wide, other).to(z.dtype)

    @property
    def basis(self) -> bool:
        """Whether all samples have the same tangents."""
        return self.tangents is not None and self.tangents.shape[1] == 1


@dataclass(frozen=True)
class Stack:
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
        return stacked(self.source, primal, self.low, self.width)


def stacked(source: Source, primal: Tensor, low: int, width: int) -> Tensor:
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


def redrawing(source: Source) -> contextlib.AbstractContextManager[None]:
    """Keeps x and how to draw, wherever it would be the stack."""

    def origin(z: Tensor) -> tuple[Tensor, Remake] | None:
        stack = source.stacks.get(z.untyped_storage()._cdata)
        if stack is None or (z.dtype, z._version) != (stack.dtype, stack.version):
            return None
        return stack.primal, stack.make

    return _remaking(origin)


def _widened(low: Tensor, wide: Tensor) -> contextlib.AbstractContextManager[None]:
    """Keeps tangents of bfloat16 wherever it would be their float32 copy."""
    if plain() or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    own, version, dtype = wide.untyped_storage()._cdata, wide._version, wide.dtype

    def origin(z: Tensor) -> tuple[Tensor, Remake] | None:
        if (z.untyped_storage()._cdata, z._version, z.dtype) != (own, version, dtype):
            return None
        return low, lambda kept: kept.to(dtype)

    return _remaking(origin)


def plain() -> bool:
    """Whether to use torch's own derivatives: compilers and transforms plan what they keep."""
    return torch.compiler.is_compiling() or is_transformed()


def _version(w: Tensor) -> int:
    """Rises with changes in place, but for those by `w.data`."""
    return -1 if w.is_inference() else w._version


def kept_or_computed(
    cache: dict[Any, Tensor] | None,
    name: str,
    weights: Sequence[Tensor],
    compute: Callable[[], Tensor],
) -> Tensor:
    """A product with parameters, kept in the cache of a solve: they do not change within one."""
    owners = [w if w._base is None else w._base for w in weights]
    if cache is None or not all(isinstance(w, torch.nn.Parameter) for w in owners):
        return compute()
    key = (name, *((w.data_ptr(), _version(w), w.shape, w.stride()) for w in weights))
    if key not in cache:
        cache[key] = compute()
    return cache[key]
