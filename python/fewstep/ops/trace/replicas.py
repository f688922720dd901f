"""Networks in data-parallel wrappers of torch, whose own forwards are for plain tensors alone.

`together` runs a computation that calls a network as often, and on whatever, it likes. The wrapper
sees one forward with plain results, so that their gradients are reduced over ranks as those of any
loss:

    DistributedDataParallel  its forward is that of its module; what it does before and after a
                             forward is done once, before the first call and with the results.
    fully_shard              weights are gathered as the network is first called, stay whole to the
                             end, and are gathered again when the first gradient of a result
                             arrives; its hooks rest meanwhile, and reduce at backward's end.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.parallel import DistributedDataParallel

from fewstep.ops.trace import velocity as velocities

Module = torch.nn.Module
R = TypeVar("R")
_WAYS = ("mlp", "structural", "duals", "func")


@dataclass
class _Whole:
    """A computation that is under way.

    Attributes:
        grad: whether its results are differentiated.
        shards: states of `fully_shard` that are seen in the velocity; in the end, the whole ones.
        begun: DDP modules that were called, and whether for gradients.
        seen: DDP modules that a comparison has called.
        bare: a comparison, which no wrapper hears of.
    """

    grad: bool
    shards: list[Any]
    begun: dict[Any, bool] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)
    bare: bool = False

    def call(self, ddp: Any, inputs: Any, kwargs: Any) -> Any:
        """What stands in for the forward of a DDP module."""
        if getattr(ddp, "mixed_precision", None) is not None:
            raise ValueError(
                "divergence: DistributedDataParallel(mixed_precision=...) casts and copies weights"
                " by its own hooks, which are for its forward alone; use torch.autocast"
            )
        grad = self.grad and torch.is_grad_enabled()
        if self.bare:
            self.seen.append(ddp)
        elif ddp not in self.begun or (grad and not self.begun[ddp]):
            self.begun[ddp] = grad
            with torch.set_grad_enabled(grad), temporarily_clear_interpreter_stack():
                _private(ddp, "_pre_forward")(torch.empty(0, device=ddp.device))
                if not grad:
                    _private(ddp, "_post_forward")(())
        if ddp.device_ids:
            moved, named = ddp.to_kwargs(inputs, kwargs, ddp.device_ids[0])
            inputs, kwargs = moved[0], named[0]
        return ddp.module(*inputs, **kwargs)

    def finish(self, results: list[Tensor]) -> list[Tensor]:
        """The differentiable results, as what the wrappers' forwards return."""
        for ddp, grad in self.begun.items():
            if grad:
                results = list(_private(ddp, "_post_forward")(results))
        if self.shards:
            for z in results:
                hook: Any = functools.partial(_gather_again, self.shards)
                z.register_hook(hook)  # type: ignore[no-untyped-call]
        return results


class _Current(threading.local):
    whole: _Whole | None = None


_CURRENT = _Current()


def together(velocity: Callable[..., Any], compute: Callable[[], R]) -> R:
    """`compute()`, which calls the velocity, as one forward of the wrappers that it reaches.

    Results are tensors, or dataclasses, tuples and dicts of them. Within another, and without a
    process group, it is `compute()` alone.
    """
    if torch.compiler.is_compiling():
        _refuse_compiled(velocity)
        return compute()
    if _CURRENT.whole is not None or not _distributed():
        return compute()
    modules = velocities.signature(velocity)[1]
    _refuse(modules)
    with _gathered(modules) as shards, _rerouted():
        _CURRENT.whole = whole = _Whole(torch.is_grad_enabled(), shards)
        try:
            out = compute()
            whole.shards = _unsharded(shards)
        finally:
            _CURRENT.whole = None
    if not whole.grad or not (whole.begun or whole.shards):
        return out
    live: list[Tensor] = []
    _each(out, live.append)
    own = iter(whole.finish(live))
    done: R = _each(out, lambda z: next(own))
    return done


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """For calls of the velocity that no wrapper hears of."""
    whole = _CURRENT.whole
    if whole is None:
        yield
        return
    before, whole.bare = whole.bare, True
    try:
        yield
    finally:
        whole.bare = before


def alone() -> bool:
    """Whether other ranks need not take part in a call of the velocity that is `bare`."""
    return _CURRENT.whole is None or not _CURRENT.whole.shards


def meet(call: Callable[[], Any]) -> None:
    """Call a velocity on no samples, if it can be, for the wrappers that it reaches."""
    if _CURRENT.whole is not None:
        with bare(), torch.no_grad(), contextlib.suppress(Exception):
            call()


def _each(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """With each differentiable tensor replaced by what `function` has for it."""
    if isinstance(value, Tensor):
        return function(value) if value.grad_fn is not None else value
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: _each(getattr(value, f.name), function) for f in fields(value)}
        return replace(value, **own)
    if isinstance(value, tuple):
        return tuple(_each(v, function) for v in value)
    if isinstance(value, dict):
        return {k: _each(v, function) for k, v in value.items()}
    return value


def _private(owner: Any, name: str) -> Any:
    """What torch has no public name for."""
    found = getattr(owner, name, None)
    if found is None:
        raise NotImplementedError(
            f"divergence: {type(owner).__name__} of torch {torch.__version__} has no {name}; run"
            " the trace within the wrapped module's own forward: wrap a module that returns the"
            " loss"
        )
    return found


def _forward(whole: _Whole, plain: Any, ddp: Any, *inputs: Any, **kwargs: Any) -> Any:
    """In place of DistributedDataParallel.forward."""
    return whole.call(ddp, inputs, kwargs)


def _flat(whole: _Whole, plain: Any, module: Any, *inputs: Any, **kwargs: Any) -> Any:
    """In place of FullyShardedDataParallel.forward."""
    if torch.is_grad_enabled():
        raise ValueError(
            "divergence: FullyShardedDataParallel frees its weights between layers; use"
            " torch.distributed.fsdp.fully_shard"
        )
    return plain(module, *inputs, **kwargs)


def _hooked(whole: _Whole, plain: Any, state: Any, output: Any) -> Any:
    """In place of what a state of `fully_shard` does after a forward, unless it rests."""
    if torch.is_grad_enabled():
        raise ValueError(
            "divergence: velocity reaches a module of fully_shard that is not seen in it; hand over"
            " the module itself, or a function that closes over it"
        )
    return plain(state, output)


_PLACES = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "forward", _forward),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "forward", _flat),
    (
        *("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState"),
        *("_register_pre_backward_hook", _hooked),
    ),
)
_LOCK = threading.Lock()
_aside: list[tuple[Any, str, Any]] = []  # classes, and their own methods
_inside = 0


def _within(plain: Any, ours: Any) -> Any:
    """A method that is `ours` in a thread with a computation under way, else `plain`."""

    @functools.wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = _CURRENT.whole
        if whole is None:
            return plain(self, *args, **kwargs)
        return ours(whole, plain, self, *args, **kwargs)

    return method


@contextlib.contextmanager
def _rerouted() -> Iterator[None]:
    """Methods of the wrappers replaced in their class: whatever holds a module, it is found."""
    global _inside
    with _LOCK:
        if _inside == 0:
            for module, name, method, ours in _PLACES:
                owner = getattr(sys.modules.get(module), name, None)
                if owner is not None:
                    plain = _private(owner, method)
                    _aside.append((owner, method, plain))
                    setattr(owner, method, _within(plain, ours))
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                for owner, method, plain in _aside:
                    setattr(owner, method, plain)
                _aside.clear()


def _refuse(modules: Iterable[Module]) -> None:
    """Raise where a wrapper's hooks cannot be held."""
    composable = sys.modules.get("torch.distributed._composable.replicate")
    own = getattr(composable, "_ReplicateState", ())
    hooks = (hook for m in modules for hook in m._forward_pre_hooks.values())
    if any(isinstance(getattr(hook, "__self__", None), own) for hook in hooks):
        raise ValueError(
            "divergence: replicate() hooks a module's forward; use"
            " torch.nn.parallel.DistributedDataParallel"
        )


def _refuse_compiled(velocity: Any) -> None:
    """Raise where a graph would have the wrapper's forward, on what is no tensor."""
    ddp = isinstance(velocity, DistributedDataParallel)
    if (ddp and (velocity.static_graph or velocity.find_unused_parameters)) or hasattr(
        velocity, "_get_fsdp_state"
    ):
        raise ValueError(
            "divergence: torch.compile of a trace does not reach the hooks of a data-parallel"
            " wrapper; compile the wrapped module, and leave the trace outside"
        )


def _states(modules: Iterable[Module]) -> list[Any]:
    """Of `fully_shard`, outer ones first."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    found = (_private(m, "_get_fsdp_state")() for m in modules if isinstance(m, kind))
    return list(dict.fromkeys(found))


def _groups(state: Any) -> list[Any]:
    found = getattr(state, "_fsdp_param_groups", None)
    if found is None:
        own = _private(state, "_fsdp_param_group")
        found = [] if own is None else [own]
    return list(found)


def _unsharded(states: list[Any]) -> list[Any]:
    return [s for s in states if any(group.is_unsharded for group in _groups(s))]


@contextlib.contextmanager
def _gathered(modules: Iterable[Module]) -> Iterator[list[Any]]:
    """States of `fully_shard` whose hooks gather weights that are called, and no more.

    So they do where a checkpoint recomputes.
    """
    kept, opened = {}, []
    try:
        for state in _states(modules):
            _check_casts(state)
            _private(state, "_lazy_init")()
            for group in _groups(state):
                if not group.is_unsharded and group._reshard_after_forward:
                    opened.append(group)
            kept[state] = state._training_state
            state._training_state = type(kept[state]).PRE_BACKWARD
        yield list(kept)
    finally:
        for state, before in kept.items():
            state._training_state = before
        for group in opened:
            group.reshard()


def _check_casts(state: Any) -> None:
    policy = state._mp_policy
    casts = policy.output_dtype is not None or (policy.cast_forward_inputs and policy.param_dtype)
    if casts:
        _private(state, "_cast_forward_inputs")


def _gather_again(shards: list[Any], grad: Tensor) -> None:
    """When the first gradient arrives: what `fully_shard` does before a layer's backward."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "divergence: gradients of gradients need weights after fully_shard has freed them;"
            " use DistributedDataParallel"
        )
    for state in shards:
        _private(state, "_pre_backward")(grad)


_AGREED: weakref.WeakKeyDictionary[Any, dict[Any, dict[str, str]]] = weakref.WeakKeyDictionary()


def agree(
    mode: tuple[Any, ...],
    refused: dict[str, str],
    compare: Callable[[], None],
    called: list[weakref.ref[Any]],
    *,
    again: bool,
) -> dict[str, str]:
    """Compare, and what else is refused since another rank does.

    One reduction for each mode of a wrapped network, where every rank has collectives to come: none
    for plain networks, which one rank may evaluate alone.

    Args:
        mode (tuple): the same on all ranks.
        refused (dict): ways that this rank refuses, after `compare`.
        compare (Callable): may raise; other ranks then raise too.
        called (list): DDP modules that comparisons have called, which this adds to.
        again (bool): even if ranks have agreed before.
    """
    whole = _CURRENT.whole
    if whole is None:
        compare()
        return {}
    failed: BaseException | None = None
    try:
        compare()
    except Exception as error:
        failed = error
    before = [ref() for ref in called]
    called += [weakref.ref(ddp) for ddp in dict.fromkeys(whole.seen) if ddp not in before]
    ddps = [ddp for ref in called if (ddp := ref()) is not None and whole.grad and _syncs(ddp)]
    wrappers = [*ddps, *_unsharded(whole.shards)]
    if not wrappers:
        if failed is not None:
            raise failed
        return {}
    known = _AGREED.setdefault(wrappers[0], {})
    mode = (*mode, *_modes(wrappers[0]))
    if mode not in known or again:
        votes = [*(way in refused for way in _WAYS), failed is not None]
        found = _most(votes, wrappers)
        if failed is None and found[-1]:
            raise RuntimeError("divergence: another rank could not compare; see its error")
        if failed is None:
            known[mode] = {
                way: refused.get(way, "another rank refuses it")
                for way, vote in zip(_WAYS, found, strict=False)
                if vote
            }
    if failed is not None:
        raise failed
    return {way: reason for way, reason in known[mode].items() if way not in refused}


def _modes(wrapper: Any) -> Iterator[bool]:
    root = wrapper if isinstance(wrapper, Module) else _private(wrapper, "_modules")[0]
    return (m.training for m in root.modules())


def _syncs(ddp: Any) -> bool:
    joined = getattr(getattr(ddp, "_join_config", None), "enable", False)
    return bool(ddp.require_backward_grad_sync) and not joined


def _most(votes: list[bool], wrappers: list[Any]) -> list[int]:
    """The largest of all ranks' votes."""
    pairs: list[tuple[Any, torch.device]] = []
    for w in wrappers:
        if isinstance(w, DistributedDataParallel):
            pairs.append((w.process_group, w.device))
            continue
        for group in _groups(w):
            names = ("shard_process_group", "replicate_process_group")
            own = [getattr(group.mesh_info, name, None) for name in names]
            pairs += [(g, group.device) for g in own if g is not None]
    out = torch.tensor(votes, dtype=torch.int32)
    for group, device in dict(pairs).items():
        out = out.to(device)
        dist.all_reduce(out, op=dist.ReduceOp.MAX, group=group)
    return [int(v) for v in out.tolist()]
