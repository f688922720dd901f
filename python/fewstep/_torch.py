"""Where torch's transforms, threads, devices and seeds are touched."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def one_thread() -> Iterator[None]:
    # A small net gains no speed from threads, and its bits then do not depend on their number.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def unpack_dual(t: Tensor) -> Any:
    return forward_ad.unpack_dual(t)  # type: ignore[no-untyped-call]


def is_transformed() -> bool:
    """Whether a transform of functorch (vmap, grad, jvp) is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_dual(t: Tensor | None) -> bool:
    if t is None or torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return unpack_dual(t).tangent is not None


class InJvp:
    """Inside a jvp: saved tensors and tangents without the tangents of this level.

    torch turns forward mode off inside a Function's jvp, for outer levels of functorch too, which
    makes `jvp(jvp(f))` silently zero. It is turned on again here.
    """

    def __init__(self) -> None:
        self._nested = is_transformed()
        self._enabled = forward_ad._set_fwd_grad_enabled(self._nested)

    def __enter__(self) -> InJvp:
        self._enabled.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._enabled.__exit__(*error)

    def primals(self, tensors: Any) -> list[Tensor | None]:
        if not self._nested:
            return list(tensors)
        return [t if t is None else unpack_dual(t).primal for t in tensors]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, states and times beside tensors of a dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def readable(*tensors: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a graph."""
    if torch.compiler.is_compiling() or any(t.device.type != "cpu" for t in tensors):
        return False
    return not is_transformed() or not any(map(_is_mapped, tensors))


def _is_mapped(t: Tensor) -> bool:
    """Whether a tensor stands for many, at any level of functorch's transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Outside of autocast, which is for the products of networks."""
    # A compiled graph is told always: where a backward pass runs in it is not known yet.
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The same of a function, on whichever device; not for what is compiled."""

    @functools.wraps(rule)
    def exact(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return rule(*args)

    return exact


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """An op past autograd where it has nothing to refuse: a rule in Python takes some 20 us."""
    if torch.compiler.is_compiling() or any(
        isinstance(t, Tensor) and t.requires_grad for t in args
    ):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def to_random_state(x: Tensor) -> Callable[[], None]:
    """What sets torch's random states, of the CPU and x's device, to those of now again.

    Nothing while compiling, under transforms or in a capture.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return lambda: None
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return lambda: None
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(x.device) if x.is_cuda else None

    def back() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, x.device)

    return back


def seeded(seed: int, step: int) -> torch.Generator:
    """A generator for one step: its draws depend on (seed, step) alone."""
    word = np.random.SeedSequence([seed, step]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(word))


def torch_device(name: str) -> torch.device:
    """The device of a name; "auto" takes a GPU where there is one.

    Raises:
        ValueError: it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        known = "auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        why = str(error).split("\n")[0].split(". ")[0]
        why = "" if len(why) > 100 else f": {why}"  # torch lists all its types, or all its kernels
        raise ValueError(
            f"device must be one of {', '.join(known)} on this machine, got {name!r}{why}"
        ) from error
    return device


def constant(f: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.assume_constant_result`, without its import of half a second."""
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return f


def untraced(f: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`, whose import takes half a second, where something is compiled."""

    @functools.wraps(f)
    def outside(*args: P.args, **options: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return f(*args, **options)
        disabled: Callable[P, R] = torch.compiler.disable(f)  # type: ignore[no-untyped-call]
        return disabled(*args, **options)

    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    return outside


def compare_set(key: str, value: str) -> str | None:
    """What the store of the process group has for a key, which is `value` where it had nothing.

    None without a process group, and where its store cannot do this.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    try:
        store = distributed.distributed_c10d._get_default_store()
        found: bytes = store.compare_set(key, "", value)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    return found.decode()
