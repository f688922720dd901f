"""What a velocity is made of: which modules it calls, and by what it is known again."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from fewstep._library import load_cpp

_C = load_cpp()
Module = torch.nn.Module
_BatchNorm = torch.nn.modules.batchnorm._BatchNorm
_FUNCTIONS = (types.FunctionType, functools.partial, types.MethodType)
_PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device)
_DEPTH = 4  # of functions that close over functions
_WIDTH = 256  # values that are looked at, modules aside


def owner(velocity: Callable[..., Any]) -> Any:
    """What lives as long as the velocity: the module, the code of a function, or a class.

    A function that is written in a loop is another object each time, with the same code.
    """
    if isinstance(velocity, Module):
        return velocity
    if isinstance(velocity, functools.partial):
        return owner(velocity.func)
    if isinstance(velocity, types.MethodType):
        return velocity.__self__ if isinstance(velocity.__self__, Module) else velocity.__func__
    return velocity.__code__ if isinstance(velocity, types.FunctionType) else type(velocity)


def signature(
    velocity: Callable[..., Any], *, coarse: bool = False
) -> tuple[tuple[Hashable, ...], list[Module]]:
    """What its derivatives may depend on, but for numbers: modules, their modes, whether they have
    hooks, options; and the modules. `coarse`: integers and strings, which may count, aside."""
    parts: list[Any] = []
    modules: list[Module] = []
    _value(velocity, parts, modules, set(), 0)
    if coarse:
        counted = (int, str, bytes)
        parts = [p[0] if type(p) is tuple and p[0] in counted else p for p in parts]
    return tuple(parts), modules


def _value(value: Any, parts: list[Any], modules: list[Module], seen: set[int], depth: int) -> None:
    if isinstance(value, Module):
        parts.append(weakref.ref(value))
        _C.modes(value, parts, modules, seen)
    elif isinstance(value, Tensor):
        parts.append((value.dtype, value.ndim, value.requires_grad))
    elif isinstance(value, _PLAIN):
        parts.append((type(value), value))
    elif id(value) in seen or depth == _DEPTH or len(seen) > _WIDTH + len(modules):
        parts.append(type(value))
    else:
        seen.add(id(value))
        parts.append(_kind(value))
        for own in _within(value):
            _value(own, parts, modules, seen, depth + 1)


def _kind(value: Any) -> Hashable:
    """Functions are known by their code, everything else by its type."""
    if isinstance(value, types.FunctionType):
        return weakref.ref(value.__code__)
    own: Any = value if isinstance(value, types.BuiltinFunctionType) else type(value)
    return own  # type: ignore[no-any-return]


def _within(value: Any) -> list[Any]:
    """What a function closes over, and an object holds."""
    if isinstance(value, types.FunctionType):
        code, known = value.__code__, value.__globals__
        found: list[Any] = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
        found += value.__defaults__ or ()
        named = (known[name] for name in code.co_names if name in known)
        return found + [v for v in named if isinstance(v, (Module, *_FUNCTIONS))]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__.__name__, value.__self__]
    if isinstance(value, (list, tuple)) and len(value) <= 64:
        return list(value)
    if isinstance(value, dict) and len(value) <= 64:
        return list(value.values())
    own = getattr(value, "__dict__", None)
    return list(own.values()) if isinstance(own, dict) and not isinstance(value, type) else []


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def mixing(modules: list[Module]) -> str | None:
    """The module whose outputs depend on other samples, or None."""
    for m in modules:
        if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None):
            return type(m).__name__
    return None


def hooked(modules: list[Module]) -> bool:
    """Whether weights may be others after their layer than within it, by hooks, or FSDP's; or
    gradients others than those of what the layer computes."""
    return any(map(_C.is_hooked, modules))


def freed(modules: list[Module]) -> bool:
    """Whether there are weights that have data within their layer's forward alone."""
    weights = (p for m in modules for p in m._parameters.values() if type(p) is torch.nn.Parameter)
    return any(p.numel() and not p.untyped_storage().nbytes() for p in weights)


def compiled(modules: list[Module]) -> bool:
    """Whether `torch.compile` has been at work: stand-ins are not for its graphs."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return False
    return any(
        isinstance(m, dynamo.OptimizedModule) or m._compiled_call_impl is not None for m in modules
    )


def scripted(parts: tuple[Hashable, ...], modules: list[Module]) -> bool:
    """Whether TorchScript is at work: `torch.func` loses derivatives of what that optimises."""
    return torch.jit.ScriptFunction in parts or any(
        isinstance(m, torch.jit.ScriptModule) for m in modules
    )
