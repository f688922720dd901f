"""`flow_sample`: a flow's velocity integrated from noise to data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from fewstep._checks import count, flags, function, one_of
from fewstep._names import Backend, Estimator, SamplerSolver, SamplerTracker, State
from fewstep.ops.heun.engine import rows
from fewstep.ops.heun.inputs import check_state, pick
from fewstep.ops.heun.solve import HeunResult
from fewstep.ops.trace.inputs import Options, check_times
from fewstep.samplers.inputs import (
    check_churn,
    check_density,
    check_edits,
    check_guidance,
    check_multistep,
)
from fewstep.samplers.plan import (
    SOLVERS,
    Callback,
    Churn,
    Guidance,
    Network,
    Plan,
    multistep_plan,
    needless,
    sample,
    stacked,
    table_row,
)
from fewstep.samplers.seeds import seeds_for


@overload
def flow_sample(
    velocity: Network, latents: Tensor, *, log_density: None = None, **options: Any
) -> Tensor: ...
@overload
def flow_sample(
    velocity: Network, latents: Tensor, *, log_density: Tensor, **options: Any
) -> HeunResult: ...
@torch.no_grad()  # type: ignore[misc]
def flow_sample(
    velocity: Network,
    latents: Tensor,
    *,
    steps: int = 18,
    times: Tensor | Sequence[float] | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = 1.0,
    S_noise: float = 1.0,
    solver: SamplerSolver = "heun",
    lower_order_final: bool = False,
    data_at: int = 0,
    guidance: float | Tensor | Callable[[float], float] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    uncond: Network | None = None,
    init: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    callback: Callback | None = None,
    seeds: Tensor | None = None,
    state: State = "compensated",
    log_density: Tensor | None = None,
    tracker: SamplerTracker = "trace",
    estimator: Estimator = "auto",
    probes: int = 1,
    sample_ids: Tensor | None = None,
    progress: bool = False,
    check_finite: bool | None = None,
    backend: Backend | None = None,
) -> Tensor | HeunResult:
    """Draw samples of a flow-matching model, noise at 1 and data at 0, by Heun steps with churn.

    `x_t = (1 - t) x_data + t eps` has noise of level `sigma = t / (1 - t)` relative to the data.
    Churn raises that level, as in EDM. The data's part of x must shrink with it:

        sigma^ = sigma (1 + gamma),    t^ = sigma^ / (1 + sigma^),    r = (1 - t^) / (1 - t)
        x^ = r x + sqrt(t^^2 - r^2 t^2) S_noise n

    A Heun step of `dx/dt = v` from t^ to the next time follows, or with `solver="euler"` an Euler
    step. At t = 1 there is nothing to raise. `solver="dpm++2m"` takes, from t to t' and with
    `q = t' / t`, `D = x - t v`, and D- at the time before,

        x = q x + (1 - t' - q (1 - t)) ((1 + k) D - k D-),    k = h / (2 h-)

    where h is the growth of `ln(1/t - 1)` in a step, and h- in the one before. k is 0 where one of
    them is infinite. It is of second order, by one evaluation a step.

    Args:
        velocity (Callable): `v(x, t)` with t `[B]`, float32 at least. It predicts
            `E[eps - data | x]`, or `E[data - eps | x]` with data_at=1. Others are converted, as for
            `edm_sample`.
        latents (Tensor): standard normal noise `[B, ...]`. Sampling starts from `t_0 latents`.
        steps (int): number S of steps, of equal length from 1 to 0.
        times (Tensor | Sequence[float] | None): nodes in place of these, decreasing within [0, 1],
            `[S + 1]` or `[B, S + 1]`.
        S_churn, S_min, S_max, S_noise (float): churn as for `edm_sample`, with S_min and S_max as
            times.
        solver (str): "heun", "euler" or "dpm++2m".
        lower_order_final (bool): whether the last step of "dpm++2m" has k = 0 above time 0 too.
        data_at (int): the time of data, 0 or 1. With 1 all times are counted from noise at 0: those
            of velocity, `times`, which increase, S_min and S_max, and those of guidance.
        guidance, guidance_interval, uncond, known, mask, callback: options of `edm_sample`, with
            times for levels and `(1 - t) known + t latents` for what is known.
        init (Tensor | None): data to start from, `x = (1 - t_0) init + t_0 latents`.
        log_density (Tensor | None): log-density `[B]` of `t_0 latents` under its law. The result
            then has the log-density at the last time. S_churn must be 0.
        seeds, state, tracker, estimator, probes, sample_ids, progress, check_finite, backend:
            options of `edm_sample`.

    Returns:
        Tensor | HeunResult: samples of the shape and dtype of latents; with log_density a result.

    Raises:
        ValueError: an argument that `edm_sample` refuses; times that do not decrease within [0, 1],
            or that begin at noise with init.

    Source: derived from Karras et al., EDM, arXiv 2206.00364, algorithm 2, by the change of frame
    `x / (1 + sigma)`; Lu et al., DPM-Solver++, arXiv 2211.01095, algorithm 2.

    >>> import fewstep
    >>> def v(x, t):  # of data N(0, I)
    ...     return (2 * t - 1)[:, None] / (t * t + (1 - t) ** 2)[:, None] * x
    >>> x = fewstep.flow_sample(v, torch.randn(1000, 2), S_churn=10)
    >>> abs(x.std().item() - 1) < 0.05
    True
    """
    function("flow_sample", "velocity", velocity)
    flags("flow_sample", progress=progress, lower_order_final=lower_order_final)
    check_state("flow_sample", latents, state, "latents")
    one_of("flow_sample", "solver", solver, SOLVERS)
    data_at = count("flow_sample", "data_at", data_at, 0)
    if data_at > 1:
        raise ValueError(f"flow_sample: data_at must be 0 or 1, got {data_at}")
    if times is None:
        steps = count("flow_sample", "steps", steps)
        times = torch.linspace(1 - data_at, data_at, steps + 1, dtype=torch.float64)
    nodes = check_times("flow_sample", times, latents)
    nodes = 1 - nodes if data_at else nodes
    if bool(
        (nodes[:, 0] > 1).any() | (nodes[:, -1] < 0).any() | (nodes[:, 0] < nodes[:, -1]).any()
    ):
        way = "increase" if data_at else "decrease"
        raise ValueError(f"flow_sample: times must {way} within [0, 1], got {times}")
    churn = check_churn("flow_sample", S_churn, S_min, S_max, S_noise)
    if data_at:
        churn = replace(churn, low=1 - churn.high, high=1 - churn.low)
    weight = check_guidance("flow_sample", guidance, uncond, latents, guidance_interval)
    edits = check_edits("flow_sample", latents, init, known, mask, callback)
    if init is not None and bool((nodes[:, 0] == 1).any()):
        raise ValueError(
            f"flow_sample: times must begin after noise at {1 - data_at} with init, of which"
            f" nothing is left there, got {times}"
        )
    options = Options(estimator, probes)
    density = check_density(
        *("flow_sample", latents, log_density, tracker, options, sample_ids, churn, solver, edits)
    )
    seeds = seeds_for("flow_sample", seeds, latents, churn.amount > 0)
    check_multistep("flow_sample", solver, churn, lower_order_final)
    plan = flow_plan(nodes, churn, weight, solver, bool(data_at), lower_order_final)
    networks = (velocity,) if uncond is None else (velocity, uncond)
    how = (pick("flow_sample", latents, backend), state, check_finite)
    return sample(
        *("flow_sample", networks, latents, plan, how),
        seeds=seeds,
        edits=edits,
        density=density,
        progress=progress,
    )


def flow_plan(
    times: Tensor,
    churn: Churn,
    guidance: Guidance | None,
    solver: SamplerSolver = "heun",
    reversed_time: bool = False,
    lower: bool = False,
) -> Plan:
    """The plan of `flow_sample` at times `[R, S + 1]` from noise at 1.

    In reversed time the network has `1 - t` for t, and returns `-dx/dt`.
    """
    t = times.T
    if solver == "dpm++2m":
        estimate = torch.ones_like(t[:-1]), t[:-1] if reversed_time else -t[:-1]
        levels = 1 - t if reversed_time else t
        return multistep_plan(1 - t, t, levels, estimate, guidance, lower)
    now, after = t[:-1], t[1:]
    steps = now.shape[0]
    gamma = churn.gamma(now, steps)
    raised = now * (1 + gamma) / (1 + now * gamma)  # sigma^ / (1 + sigma^)
    keep = torch.where(now < 1, (1 - raised) / (1 - now).clamp_min(1e-300), 1)
    noise = churn.noise * (raised.square() - (keep * now).square()).clamp_min(0).sqrt()
    h = after - raised
    one, last = torch.ones_like(h), torch.zeros_like(h[:1])
    keep_after = torch.cat((keep[1:], one[:1]))
    noise_after = torch.cat((noise[1:], last))
    single = solver == "euler"
    given = raised if single else torch.stack((raised, after), 1).flatten(0, 1)
    given = 1 - given if reversed_time else given
    v = -h if reversed_time else h  # of the network's output
    weight, plain = needless(guidance, given)
    if single:
        of_first = weight
        row = table_row(keep_after, keep_after * v, weight, noise=noise_after, scale=one)
        table = row[:, None]
    else:
        of_first, of_second = (None, None) if weight is None else (weight[::2], weight[1::2])
        predictor = table_row(one, v / 2, of_first, net=(one, v))
        corrector = table_row(
            keep_after, keep_after * v / 2, of_second, noise=noise_after, scale=one
        )
        table = torch.stack((predictor, corrector), 1)
    first = (keep * now)[:1]
    begun = (keep * (1 - now))[:1]
    start = table_row(first, begun, None, noise=noise[:1], scale=one[:1])[0]

    def describe() -> tuple[Tensor, Tensor]:
        path = torch.cat((raised, t[-1:]))
        called, sign = (1 - path, 1) if reversed_time else (path, -1)
        weights = one if of_first is None else of_first
        estimate = stacked(one, one, sign * raised, weights)
        return stacked(called, 1 - path, path, torch.ones_like(path)), estimate

    return Plan(
        rows(table, start),
        given,
        steps,
        euler=False,
        scaled=False,
        describe=describe,
        single=single,
        plain=plain,
        weight=weight,
        traces=torch.stack((-v / 2, -v / 2), 1).flatten(0, 1),
        constant=torch.zeros_like(t[0]),
    )
