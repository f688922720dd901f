"""Heun steps: one step, and whole solves of an ODE with its log-density beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep._library import choose_backend
from fewstep._torch import is_dual, is_transformed
from fewstep.ops.heun import dispatch
from fewstep.ops.trace import divergence

STATES = dispatch.STATES
FIRST = 2  # row of the table for evaluation 0: row 0 draws latents, row 1 starts a sampler
Velocity = Callable[..., Any]


@dataclass(frozen=True)
class HeunResult:
    """What `heun_solve` returns.

    Attributes:
        x: the state at the last time, of the shape and dtype of the input.
        log_density: at the last time, `[B]`; None where it was not asked for.
        stderr: its standard error over the probes, `[B]`: 0 where traces are exact, NaN for a
            single probe.
        path: the states at all times, `[S + 1, B, ...]`, with `keep=True`.
        estimator: that of the traces.
    """

    x: Tensor
    log_density: Tensor | None = None
    stderr: Tensor | None = None
    path: Tensor | None = None
    estimator: str = ""


def heun_step(
    velocity: Velocity,
    x: Tensor,
    t: float | Tensor,
    dt: float | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of Heun's method, second order in dt, by two evaluations of the velocity.

        x + dt/2 (v1 + v2),    v1 = v(x, t),    v2 = v(x + dt v1, t + dt)

    Outside the network each half is one fused pass over the state.

    Args:
        velocity (Callable): `velocity(x, t)` with t `[B]`, of the shape of x.
        x (Tensor): `[B, ...]`, of any floating dtype.
        t (float | Tensor): a scalar or `[B]`.
        dt (float | Tensor): a scalar or `[B]`, of either sign.
        backend (str | None): as of `heun_solve`.

    Returns:
        Tensor: the state at `t + dt`; differentiable with respect to x, parameters, t and dt.

    Raises:
        ValueError: as `heun_solve`.

    >>> import fewstep
    >>> x = torch.ones(3, 2)
    >>> fewstep.heun_step(lambda x, t: -x, x, 0.0, 0.1)[0, 0].item()  # 1 - 0.1 + 0.01 / 2
    0.9049999713897705
    """
    start, step = (_vector(name, value, x) for name, value in (("t", t), ("dt", dt)))
    start, step = torch.broadcast_tensors(start, step)  # type: ignore[no-untyped-call]
    times = torch.stack((start, start + step), 1)
    times = times[0] if len(times) == 1 else times
    return heun_solve(velocity, x, times, backend=backend).x


def heun_solve(
    velocity: Velocity,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    log_density: Tensor | None = None,
    estimator: str = "auto",
    probes: int = 1,
    probe: str = "rademacher",
    fresh: bool = True,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    state: str = "float32",
    keep: bool = False,
    check_finite: bool | None = None,
    backend: str | None = None,
) -> HeunResult:
    """Solve `dx/dt = v(x, t)` by Heun steps at given times, in either direction.

    A log-density goes along as `d log q / dt = -tr(dv/dx)`, by the same method on the pair. Two
    fused passes over the state are all that a step does outside the network. Without gradients the
    passes write into buffers that the next step uses again: a network that keeps its input has to
    clone it, and none may write into it, which at first is x itself.

    Args:
        velocity (Callable): `velocity(x, t)` with t `[B]`, of the shape of x.
        x (Tensor): `[B, ...]` at the first time. The network is called with its dtype.
        times (Tensor | Sequence[float]): nodes of the steps, `[S + 1]`, or `[B, S + 1]` with those
            of each sample; each sample's in one direction.
        log_density (Tensor | None): `[B]` at the first time, whose dtype the result has; None: not
            tracked.
        estimator, probes, probe, seed, sample_ids: of the traces, as of `fewstep.divergence`.
        fresh (bool): new probes for each evaluation, whose errors average out; as of
            `fewstep.log_density`.
        state (str): "float32"; "compensated", a pair of float32 whose sum is the state, so that
            rounding does not add up over steps; or "float64". A float64 x has a float64 state.
        keep (bool): return the states at all times.
        check_finite (bool | None): raise where a state is not finite, at the step where it happens
            on the CPU, at the end (which waits for the device) elsewhere; None: on the CPU, outside
            of graphs of autograd and of `torch.compile`.
        backend (str | None): "cpp", "cuda", "triton", "reference"; None: the fastest one.

    Returns:
        HeunResult: differentiable with respect to x, parameters and log_density, and of times too,
        which are constants where they do not require a gradient.

    Raises:
        ValueError: an unknown state or backend; times that are fewer than two or, on the CPU, not
            finite or not monotone; a velocity of another shape than x, or not finite, with the
            step; arguments of the traces as in `fewstep.divergence`.
        TypeError: x that is not floating.

    Source: Karras et al., EDM, arXiv 2206.00364, algorithm 1; Chen et al., Neural ODEs, 2018,
    theorem 1.

    >>> import fewstep
    >>> x = torch.ones(3, 2)
    >>> out = fewstep.heun_solve(lambda x, t: -x, x, [0.0, 0.5, 1.0], log_density=torch.zeros(3))
    >>> out.x[0, 0].item(), out.log_density[0].item()  # 0.625^2; log q rises by D t
    (0.390625, 2.0)
    """
    check_state("heun_solve", x, state)
    nodes = check_nodes("heun_solve", times, x)
    options = divergence.Options(estimator, probes, probe, None)
    traced = None
    if log_density is not None:
        divergence.check(options, x, "heun_solve")
        check_log_density("heun_solve", log_density, x)
        ids = divergence.check_ids(sample_ids, x)
        traced = divergence.Solver(velocity, options, ids, fixed=not fresh, cache={})
    name = pick(x, backend)
    h = nodes.diff(dim=1).T  # [S, 1 or B]
    table = _table(h)
    evaluations = torch.stack((nodes[:, :-1].T, nodes[:, 1:].T), 1).flatten(0, 1)
    levels = evaluations.to(x.dtype).expand(-1, x.shape[0]).contiguous().unbind()
    run = Run("heun_solve", name, x, table, state, check_finite)
    keys = divergence.make_keys(seed, h.shape[0], fresh=fresh)
    tracker = None if log_density is None else Tracker(name, log_density, _log_table(h))
    path = [x] if keep else []

    def evaluate(net: Tensor, index: int) -> list[Tensor]:
        if traced is None:
            out = velocity(net, levels[index])
        else:
            assert tracker is not None
            found = traced(net, levels[index], keys[index])
            out = found.velocity
            tracker.advance([found], [h[index // 2] / 2], FIRST + index)
        return [run.accept(out, index // 2)]

    for step in range(h.shape[0]):
        for index in (2 * step, 2 * step + 1):
            run.advance(evaluate(run.net, index), FIRST + index, step, middle=index == 2 * step)
        if keep:
            path.append(run.high.to(x.dtype, copy=not run.functional))
    out = run.finish()
    kept = torch.stack(path) if keep else None
    if tracker is None:
        return HeunResult(out, path=kept)
    return HeunResult(out, *tracker.result(), kept, tracker.estimator)


class Run:
    """The state of a solve, and the passes over it that a table describes.

    A step is two passes. The first one leaves in the state what is known of the next one, and makes
    the network's input in the middle; the second one adds the rest, so that no output of the
    network is held while it runs again. With autograd or `torch.compile` every pass makes new
    tensors, else they write into buffers. Between steps the network's input is the state itself
    where that has its dtype and scale.

    Attributes:
        high: the state, without what rounding left of it.
        net: the network's next input.
    """

    def __init__(
        self,
        who: str,
        backend: str,
        x: Tensor,
        table: Tensor,
        state: str,
        check_finite: bool | None,
        *,
        scaled: bool = False,
        seeds: Tensor | None = None,
    ) -> None:
        self.who, self.backend, self.table, self.seeds = who, backend, table, seeds
        self.functional = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if is_transformed() or is_dual(x):
            self.functional, self.backend = True, "reference"
        self.combine = dispatch.into(self.backend, x.dtype)
        self.dtype = x.dtype
        wide = state == "float64" or x.dtype == torch.float64
        self.compensated = state == "compensated" and not wide
        self.high = x.to(torch.float64 if wide else torch.float32)
        self.low: Tensor | None = None
        self.scaled = scaled
        self.same = not scaled and self.high.dtype == x.dtype
        self.net = x
        # Whether the state's buffers are ours yet: the first one is the caller's, unless converted,
        # and as strided as the caller's then.
        converted = self.high is not x and self.high.is_contiguous()
        self.own = converted and not self.compensated
        self.buffer: Tensor | None = None  # for inputs that are not the state
        on_cpu = x.device.type == "cpu"
        default = on_cpu and not self.functional
        possible = not torch.compiler.is_compiling() and not is_transformed()
        self.checked = (default if check_finite is None else check_finite) and possible
        fused = self.checked and not self.functional
        self.wrong = x.new_zeros(1, dtype=torch.int32) if fused else None
        self.flag = self.wrong.numpy() if self.wrong is not None and on_cpu else None

    def accept(self, out: Any, step: int) -> Tensor:
        """What the network returned, if it has the state's shape."""
        if isinstance(out, Tensor) and out.shape == self.high.shape:
            return out if out.dtype == self.dtype else out.to(self.dtype)
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{self.who}: the network must return {tuple(self.high.shape)}, got {got}"
            f" at step {step}"
        )

    def advance(self, terms: list[Tensor], row: int, step: int, *, middle: bool = False) -> None:
        """The next state and the network's next input, by a row of the table."""
        if self.functional:
            self.high, self.low, net = dispatch.combine(
                *(self.backend, self.high, self.low, terms, self.table, row),
                seeds=self.seeds,
                want_low=self.compensated,
                want_net=middle or self.scaled,
            )
            self.net = self.high.to(self.dtype) if net is None else net.to(self.dtype)
            if self.checked and not bool(self.high.detach().isfinite().all()):
                raise ValueError(f"{self.who}: the state is not finite at step {step}")
            return
        high, low = self.high, self.low
        if not self.own:  # the first state stays as it was
            self.high = torch.empty_like(high, memory_format=torch.contiguous_format)
            self.low = torch.empty_like(self.high) if self.compensated else None
            self.own = True
        net = None
        if middle or not self.same:
            if self.buffer is None:
                self.buffer = torch.empty_like(self.high, dtype=self.dtype)
            net = self.buffer
        self.combine(
            high, low, terms, self.table, row, self.seeds, self.high, self.low, net, self.wrong
        )
        self.net = self.high if net is None else net
        if self.flag is not None and self.flag[0]:
            raise ValueError(f"{self.who}: the state is not finite at step {step}")

    def finish(self) -> Tensor:
        """The state in the dtype of the input."""
        if self.wrong is not None and self.flag is None and bool(self.wrong):
            raise ValueError(f"{self.who}: the state is not finite")
        return self.high.to(self.dtype)


class Tracker:
    """A log-density beside a state, `log q - h/2 (tr J1 + tr J2)`, and its variance over probes."""

    def __init__(self, backend: str, log_density: Tensor, table: Tensor) -> None:
        self.run = Run("log_density", backend, log_density.double(), table, "float64", False)
        self.variance, self.dtype = torch.zeros_like(log_density), log_density.dtype
        self.estimator = ""

    def advance(self, found: list[divergence.Divergence], weights: list[Tensor], row: int) -> None:
        """Past an evaluation; its traces' errors are weighed as the traces are."""
        for one, weight in zip(found, weights, strict=True):
            self.estimator = one.estimator
            if not one.estimator.startswith("exact"):
                self.variance = self.variance + (weight * one.stderr).square()
        self.run.advance([one.value.double() for one in found], row, 0)

    def result(self, constant: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """The log-density, with what does not depend on the network, and its standard error."""
        return (self.run.high + constant).to(self.dtype), self.variance.sqrt().to(self.dtype)


def _table(h: Tensor) -> Tensor:
    """Of steps h `[S, R]`: `x + h/2 v1` with the input `x + h v1`, then the state `+ h/2 v2`."""
    zero, one = torch.zeros_like(h), torch.ones_like(h)
    first = (one, h / 2, zero, zero, one, h, zero, zero)
    second = (one, h / 2, zero, zero, zero, zero, zero, one)
    return rows(torch.stack((torch.stack(first, -1), torch.stack(second, -1)), 1))


def _log_table(h: Tensor) -> Tensor:
    zero, one = torch.zeros_like(h), torch.ones_like(h)
    row = torch.stack((one, -h / 2, zero, zero, zero, zero, zero, one), -1)
    return rows(torch.stack((row, row), 1))


def rows(table: Tensor, start: Tensor | None = None) -> Tensor:
    """A whole table from the rows of the steps `[S, 2, R, 8]`: before them those of no step."""
    own = table.flatten(0, 1)
    lead = own.new_zeros((FIRST, *own.shape[1:]))
    if start is not None:
        lead = torch.cat((lead[:1], start[None]))
    return torch.cat((lead, own)).contiguous()


def pick(x: Tensor, backend: str | None) -> str:
    return choose_backend("heun", x.device.type, backend, unsupported)


def unsupported(backend: str) -> str | None:
    """Why a backend cannot serve Heun steps, or None."""
    if backend == "keops":
        return "Heun steps have the backends cpp, cuda, triton and reference"
    return None


def check_state(who: str, x: Tensor, state: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{who}: x must have a floating dtype, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"{who}: x must be [B, ...], got a scalar")
    if state not in STATES:
        raise ValueError(f"{who}: state must be one of {STATES}, got {state!r}")


def check_log_density(who: str, log_density: Tensor, x: Tensor) -> None:
    if tuple(log_density.shape) != (x.shape[0],):
        raise ValueError(
            f"{who}: log_density must be ({x.shape[0]},), got {tuple(log_density.shape)}"
        )


def check_nodes(who: str, times: Tensor | Sequence[float], x: Tensor) -> Tensor:
    """float64 `[1 or B, S + 1]`, each row in one direction."""
    nodes = torch.as_tensor(times, dtype=torch.float64, device=x.device)
    if nodes.ndim not in (1, 2) or nodes.shape[-1] < 2:
        raise ValueError(
            f"{who}: times must be [S + 1] or [B, S + 1] with S at least 1, got"
            f" {tuple(nodes.shape)}"
        )
    if nodes.ndim == 2 and nodes.shape[0] != x.shape[0]:
        raise ValueError(f"{who}: times must have {x.shape[0]} rows, got {nodes.shape[0]}")
    if nodes.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
        steps = nodes.detach().diff(dim=-1)
        one_way = (steps >= 0).all(-1) | (steps <= 0).all(-1)
        if not bool(one_way.all() & steps.isfinite().all()):
            raise ValueError(f"{who}: times must be finite and increase or decrease, got {times}")
    return nodes if nodes.ndim == 2 else nodes[None]


def _vector(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """float64 `[1 or B]`"""
    own = torch.as_tensor(value, dtype=torch.float64, device=x.device)
    if own.ndim == 0:
        return own[None]
    if tuple(own.shape) != (x.shape[0],):
        raise ValueError(
            f"heun_step: {name} must be a scalar or ({x.shape[0]},), got {tuple(own.shape)}"
        )
    return own
