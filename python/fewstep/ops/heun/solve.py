"""Heun steps: one step, and whole solves of an ODE with its log-density beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep._checks import flags, function
from fewstep._names import Backend, Check, Engine, Estimator, Probe, State
from fewstep._results import brief
from fewstep._torch import wide
from fewstep.ops.heun.engine import FIRST, Run, Tracker, rows
from fewstep.ops.heun.inputs import as_vector, check_log_density, check_state, pick
from fewstep.ops.trace import replicas
from fewstep.ops.trace.estimator import Solver
from fewstep.ops.trace.inputs import (
    Options,
    check_ids,
    check_options,
    check_problem,
    check_times,
    make_keys,
)

Velocity = Callable[..., Any]


@dataclass(frozen=True)
class HeunResult:
    """What `heun_solve` returns, and samplers with a log-density.

    Attributes:
        x: state at the last time, of the shape and dtype of the input.
        log_density: log-density at the last time, `[B]`; None where it was not asked for.
        stderr: standard error of `log_density` over the probes, `[B]`. It is 0 where traces are
            exact and NaN for a single probe.
        path: states at all times, `[S + 1, B, ...]`, with `keep=True`.
        estimator: estimator of the traces, or "logdet".
        nonpositive: share of steps whose determinant is not positive, `[B]`, for "logdet" of
            `fewstep.edm_sample` and `flow_sample`. Such a step is not invertible along the path.
    """

    x: Tensor
    log_density: Tensor | None = None
    stderr: Tensor | None = None
    path: Tensor | None = None
    estimator: str = ""
    nonpositive: Tensor | None = None

    __repr__ = brief


def heun_step(
    velocity: Velocity,
    x: Tensor,
    t: float | Tensor,
    dt: float | Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """One step of Heun's method, second order in dt, by two evaluations of the velocity.

        x + dt/2 (v1 + v2),    v1 = v(x, t),    v2 = v(x + dt v1, t + dt)

    Each half is one fused pass over the state, apart from the network.

    Args:
        velocity (Callable): `velocity(x, t)` with t `[B]`, of the shape of x.
        x (Tensor): `[B, ...]`, of any floating dtype.
        t (float | Tensor): time, a scalar or `[B]`.
        dt (float | Tensor): length of the step, a scalar or `[B]`, of either sign, or 0.
        backend (str | None): backend as for `heun_solve`.

    Returns:
        Tensor: the state at `t + dt`, differentiable with respect to x, parameters, t and dt.

    Raises:
        ValueError: an argument that `heun_solve` refuses; on the CPU, t or dt that is not finite.

    >>> import fewstep
    >>> x = torch.ones(3, 2)
    >>> fewstep.heun_step(lambda x, t: -x, x, 0.0, 0.1)[0, 0].item()  # 1 - 0.1 + 0.01 / 2
    0.9049999713897705
    """
    function("heun_step", "velocity", velocity)
    check_state("heun_step", x, "float32")
    start, step = (as_vector(name, value, x) for name, value in (("t", t), ("dt", dt)))
    start, step = torch.broadcast_tensors(start, step)  # type: ignore[no-untyped-call]
    nodes = torch.stack((start, start + step), 1)
    return _solve("heun_step", velocity, x, nodes, backend=backend).x


def heun_solve(
    velocity: Velocity,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    log_density: Tensor | None = None,
    estimator: Estimator = "auto",
    probes: int = 1,
    probe: Probe = "rademacher",
    fresh: bool = True,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    engine: Engine | None = None,
    check: Check = "first",
    state: State = "float32",
    keep: bool = False,
    check_finite: bool | None = None,
    backend: Backend | None = None,
) -> HeunResult:
    """Solve `dx/dt = v(x, t)` by Heun steps at given times, in either direction.

    A log-density can go along, by `d log q / dt = -tr(dv/dx)` and the same method on the pair. Each
    step is two fused passes over the state, apart from the network. Without gradients the passes
    write into buffers that the next step uses again. A network that keeps its input must therefore
    clone it, and no network may write into it. The first input is x itself.

    Args:
        velocity (Callable): `velocity(x, t)` with t `[B]`, float32 at least, of the shape of x.
        x (Tensor): `[B, ...]` at the first time. The network is called with its dtype. In half
            precision what it returns may be float32.
        times (Tensor | Sequence[float]): nodes of the steps, `[S + 1]`, or `[B, S + 1]` for nodes
            of each sample. They increase, or decrease, at every step of a sample.
        log_density (Tensor | None): log-density `[B]` at the first time. The result has its dtype,
            or float32 for half precision. Default: it is not tracked.
        estimator, probes, probe, seed, sample_ids, engine, check: options of the traces, as for
            `fewstep.divergence`.
        fresh (bool): whether each evaluation has new probes, as for `fewstep.log_density`.
        state (str): precision of the state. "float32"; "compensated", a pair of float32 whose sum
            is the state, so that rounding does not add up over steps; or "float64". A float64 x has
            a float64 state.
        keep (bool): whether to return the states at all times.
        check_finite (bool | None): whether to raise where a state is not finite. On the CPU the
            error names the step; elsewhere the check comes at the end and waits for the device.
            Default: on the CPU, outside of graphs of autograd and of `torch.compile`.
        backend (str | None): "cpp", "cuda", "triton" or "reference". Default: the environment
            variable FEWSTEP_BACKEND, else the fastest backend, on a GPU of those that have
            matched float64 there; see `fewstep.sinkhorn`.

    Returns:
        HeunResult: differentiable with respect to x, parameters and log_density, and with respect
        to times that require a gradient.

    Raises:
        ValueError: an unknown state or backend; fewer than two times, or on the CPU times that are
            not finite or not strictly monotone; a velocity of another shape than x, or not finite,
            with the step; arguments of the traces that `fewstep.divergence` refuses.
        TypeError: x that is not floating.

    Source: Karras et al., EDM, arXiv 2206.00364, algorithm 1; Chen et al., Neural ODEs, 2018,
    theorem 1.

    >>> import fewstep
    >>> x = torch.ones(3, 2)
    >>> out = fewstep.heun_solve(lambda x, t: -x, x, [0.0, 0.5, 1.0], log_density=torch.zeros(3))
    >>> out.x[0, 0].item(), out.log_density[0].item()  # 0.625^2; log q rises by D t
    (0.390625, 2.0)
    """
    function("heun_solve", "velocity", velocity)
    check_state("heun_solve", x, state)
    flags("heun_solve", fresh=fresh, keep=keep)
    nodes = check_times("heun_solve", times, x)
    options = Options(estimator, probes, probe, engine=engine, check=check)
    check_options(options, "heun_solve")
    traced = None
    ids = check_ids(sample_ids, x, "heun_solve")
    if log_density is not None:
        check_problem(options, x, "heun_solve")
        check_log_density("heun_solve", log_density, x)
        traced = Solver(velocity, options, ids, fixed=not fresh, cache={})
    solve = functools.partial(
        _solve,
        *("heun_solve", velocity, x, nodes, traced),
        log_density=log_density,
        seed=seed,
        state=state,
        keep=keep,
        check_finite=check_finite,
        backend=backend,
    )
    return solve() if traced is None else replicas.together(velocity, solve)


def _solve(
    who: str,
    velocity: Velocity,
    x: Tensor,
    nodes: Tensor,
    traced: Solver | None = None,
    *,
    log_density: Tensor | None = None,
    seed: int | Tensor = 0,
    state: State = "float32",
    keep: bool = False,
    check_finite: bool | None = None,
    backend: Backend | None = None,
) -> HeunResult:
    """`heun_solve` at nodes float64 `[1 or B, S + 1]`, which may repeat."""
    name = pick(who, x, backend)
    h = nodes.diff(dim=1).T  # [S, 1 or B]
    table = _table(h)
    evaluations = torch.stack((nodes[:, :-1].T, nodes[:, 1:].T), 1).flatten(0, 1)
    levels = evaluations.to(wide(x.dtype)).expand(-1, x.shape[0]).contiguous().unbind()
    run = Run(who, name, x, table, state, check_finite)
    keys = make_keys(seed, h.shape[0], fresh=traced is None or not traced.fixed, who=who)
    tracker = None if log_density is None else Tracker(name, log_density, _log_table(h))
    path = [x] if keep else []

    def evaluate(net: Tensor, index: int) -> list[Tensor]:
        if traced is None:
            return [run.call(velocity, levels[index], index // 2)]
        assert tracker is not None
        found = traced(net, levels[index], keys[index])
        tracker.advance([found], [h[index // 2] / 2], FIRST + index)
        return [run.accept(found.velocity, index // 2)]

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
