"""`odeint` of torchdiffeq on fixed grids, by Heun steps in fused passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep._checks import floating, function, number
from fewstep._torch import readable, wide
from fewstep.ops.heun.solve import heun_solve

METHODS = ("heun2", "euler")
_OTHERS = (
    *("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun", "midpoint", "heun3", "rk4"),
    *("explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"),
)
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
_HELD = 1 << 22  # elements of states that nobody asked for, which may be held
State = Tensor | tuple[Tensor, ...]


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Any] | None = None,
) -> Any:
    """`torchdiffeq.odeint` for the methods "heun2" and "euler", with the same result.

    `dy/dt = func(t, y)` is solved from `t[0]`. The steps are between the times t, or of a length
    `step_size` from `t[0]` on, with times within a step interpolated linearly. Numbers agree with
    those of torchdiffeq 0.2.5 to rounding.

    Gradients flow through the steps to y0, t and parameters. With "heun2" each step is two fused
    passes over the state beside the calls of func.

    Args:
        func (Callable): `func(t, y)` with t a scalar, of the structure and shape of y. For one
            tensor it may be a number or broadcast.
        y0 (Tensor | tuple[Tensor, ...]): state at `t[0]`, of any shape.
        t (Tensor): times `[T]`, increasing or decreasing.
        rtol, atol: tolerances, which no method on a fixed grid looks at.
        method (str | None): "heun2" or "euler". None is "dopri5" in torchdiffeq.
        options (Mapping[str, Any] | None): "step_size", or "grid_constructor", a function of
            `(func, y0, t)` that gives the grid from `t[0]` to `t[-1]`.
        event_fn (Callable | None): None.

    Returns:
        Tensor | tuple[Tensor, ...]: states at t, `[T, *y0.shape]`.

    Raises:
        NotImplementedError: another method, an event_fn, other options, callbacks of func, a
            complex state.
        ValueError: an unknown method; times or a grid that do not increase or decrease at every
            step; a step_size that is not positive.
        TypeError: y0 or t that is not floating.

    >>> from fewstep.compat.torchdiffeq import odeint
    >>> t = torch.tensor([0.0, 0.5, 1.0])
    >>> odeint(lambda t, y: -y, torch.ones(2), t, method="heun2")[-1]
    tensor([0.3906, 0.3906])
    """
    function("odeint", "func", func)
    _refuse(func, method, event_fn)
    several = not isinstance(y0, Tensor)
    parts: tuple[Tensor, ...] = tuple(y0) if several else (y0,)
    for k, part in enumerate(parts):
        if isinstance(part, Tensor) and part.is_complex():
            raise NotImplementedError(
                f"odeint: y0 of {part.dtype} is not served, torchdiffeq.odeint serves it"
            )
        floating("odeint", f"y0[{k}]" if several else "y0", part)
    floating("odeint", "t", t)
    if t.ndim != 1 or t.numel() < 1:
        raise ValueError(f"odeint: t must be [T] with a time, got {tuple(t.shape)}")
    shapes = [part.shape for part in parts]
    x = torch.cat([part.reshape(-1) for part in parts]) if several else y0
    t = t.to(x.device)
    _monotone("t", t)

    def unpacked(flat: Tensor, lead: Sequence[int] = ()) -> State:
        if not several:
            return flat
        own = torch.split(flat, [shape.numel() for shape in shapes], -1)
        return tuple(part.view((*lead, *shape)) for part, shape in zip(own, shapes, strict=True))

    def velocity(y: Tensor, time: Tensor) -> Tensor:
        out = func(time.to(wide(x.dtype)), unpacked(y))
        if not several and _expands(out, x.shape):
            return torch.as_tensor(out, dtype=x.dtype, device=x.device).expand(x.shape)
        found = tuple(out) if several else (out,)
        got = [tuple(part.shape) for part in found if isinstance(part, Tensor)]
        if got != [tuple(shape) for shape in shapes]:
            raise ValueError(
                f"odeint: func must return {[*map(tuple, shapes)]}, the shapes of y0, got {got}"
            )
        return torch.cat([part.reshape(-1) for part in found]).to(x.dtype)

    grid = _grid(func, unpacked(x), t, dict(options or {}))
    if len(t) == 1:
        return unpacked(x[None], (1,))
    solve = _heun if method == "heun2" else _euler
    if grid is t:
        return unpacked(solve(velocity, x, grid, True), (len(t),))
    after, before = _around(grid, t)
    wanted = torch.unique(torch.cat((before, after)))
    if len(grid) * x.numel() <= _HELD:
        path = solve(velocity, x, grid, True)[wanted]
    else:
        states = [x]
        for i, j in itertools.pairwise(wanted.tolist()):
            states.append(solve(velocity, states[-1], grid[i : j + 1], False)[0])
        path = torch.stack(states)
    i, j = torch.searchsorted(wanted, before), torch.searchsorted(wanted, after)
    span = grid[after] - grid[before]
    share = (t - grid[before]) / torch.where(span == 0, 1, span)
    shape = (-1, *(1,) * x.ndim)
    between = path[i] + share.to(path.dtype).view(shape) * (path[j] - path[i])
    states_at = torch.where((grid[after] == t).view(shape), path[j], between)
    return unpacked(states_at, (len(t),))


def odeint_adjoint(func: Callable[..., Any], *_: Any, **__: Any) -> Any:
    """Not served.

    Raises:
        NotImplementedError: always; it says what to call.
    """
    raise NotImplementedError(
        "odeint_adjoint: adjoint gradients are not served: fewstep.compat.torchdiffeq.odeint has"
        " those of the steps themselves, and torch.utils.checkpoint keeps their memory low"
    )


def _refuse(func: Callable[..., Any], method: str | None, event_fn: Any) -> None:
    if method not in METHODS:
        named = "dopri5" if method is None else method
        if named not in _OTHERS:
            raise ValueError(f"odeint: method must be one of {METHODS}, got {method!r}")
        raise NotImplementedError(
            f"odeint: method={method!r} is not served, but {METHODS}: fewstep.heun_solve takes any"
            f" grid of steps, torchdiffeq.odeint serves {named!r}"
        )
    if event_fn is not None:
        raise NotImplementedError(
            f"odeint: event_fn={event_fn!r} is not served, torchdiffeq.odeint serves it"
        )
    for name in _CALLBACKS:
        if hasattr(func, name):
            raise NotImplementedError(
                f"odeint: {name} of func is not served, torchdiffeq.odeint serves it;"
                " fewstep.heun_step takes one step at a time"
            )


def _expands(out: Any, shape: torch.Size) -> bool:
    """Whether it is a number or a tensor that broadcasts to a shape."""
    if not isinstance(out, Tensor):
        return isinstance(out, int | float)
    own = shape[len(shape) - out.ndim :]
    return out.ndim <= len(shape) and all(k in (1, n) for k, n in zip(out.shape, own, strict=True))


def _monotone(name: str, nodes: Tensor) -> None:
    steps = nodes.detach().diff()
    if readable(steps) and not bool((steps > 0).all() or (steps < 0).all()):
        raise ValueError(
            f"odeint: {name} must increase or decrease at every step, got {nodes.tolist()}"
        )


def _grid(func: Callable[..., Any], y0: State, t: Tensor, options: dict[str, Any]) -> Tensor:
    """Nodes of the steps from the first to the last time, in their dtype."""
    options.pop("norm", None)  # of adaptive methods
    step, made = options.pop("step_size", None), options.pop("grid_constructor", None)
    if options.get("interp") == "linear":
        options.pop("interp")
    if not options.get("perturb", True):
        options.pop("perturb")
    if options:
        name, value = next(iter(options.items()))
        raise NotImplementedError(
            f"odeint: options {name}={value!r} is not served, but step_size and grid_constructor:"
            " torchdiffeq.odeint serves what it knows"
        )
    if step is not None and made is not None:
        raise ValueError(
            f"odeint: step_size and grid_constructor must not both be given, got step_size={step!r}"
        )
    if made is not None:
        function("odeint", "grid_constructor", made)
        grid: Tensor = made(func, y0, t).to(t)
        if not len(grid) or not bool((grid[0] == t[0]) & (grid[-1] == t[-1])):
            raise ValueError(
                f"odeint: grid_constructor must give a grid from {t[0].item()} to {t[-1].item()},"
                f" got {grid.tolist()}"
            )
        if len(t) > 1:
            _monotone("grid_constructor", grid)
        return grid
    if step is None or len(t) == 1:
        return t
    length = number("odeint", "step_size", step)
    if not 0 < length < math.inf:
        raise ValueError(f"odeint: step_size must be positive and finite, got {length}")
    span = t[-1] - t[0]
    forward = 1.0 if bool(span > 0) else -1.0
    count = math.ceil(float((span.abs() / length + 1).detach()))
    grid = t[0] + (forward * length) * torch.arange(count, dtype=t.dtype, device=t.device)
    # Rounding may put the last but one node at the end, or beyond it.
    inside = ((t[-1] - grid) * forward > 0).detach()
    return torch.cat((grid[inside], t[-1:]))


def _around(grid: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the node at or after each time, and of the one before."""
    forward = (t[-1] - t[0]).sign()
    after = torch.searchsorted((forward * grid).detach(), (forward * t).detach())
    return after, (after - 1).clamp_min(0)


def _heun(velocity: Callable[..., Tensor], x: Tensor, grid: Tensor, keep: bool) -> Tensor:
    """States at all nodes, or at the last."""

    def one(net: Tensor, level: Tensor) -> Tensor:
        y = net[0] if torch.is_grad_enabled() else net[0].clone()  # func may keep it
        return velocity(y, level[0])[None]

    found = heun_solve(one, x[None], grid, keep=keep)
    return found.x if found.path is None else found.path[:, 0]


def _euler(velocity: Callable[..., Tensor], x: Tensor, grid: Tensor, keep: bool) -> Tensor:
    """States at all nodes, or at the last."""
    states = [x]
    for now, after in itertools.pairwise(grid):
        made = states[-1] + (after - now) * velocity(states[-1], now)
        states = [*(states if keep else ()), made]
    return torch.stack(states)
