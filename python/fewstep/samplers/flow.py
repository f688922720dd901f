"""`flow_sample`: a flow's velocity integrated from noise to data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep._checks import count, flags, function
from fewstep._names import Backend, State
from fewstep.ops.heun.engine import Run, rows
from fewstep.ops.heun.inputs import check_state, pick
from fewstep.ops.trace.inputs import check_times
from fewstep.samplers.inputs import check_churn, check_guidance
from fewstep.samplers.plan import Churn, Network, Plan, follow, table_row
from fewstep.samplers.seeds import seeds_for


@torch.no_grad()
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
    guidance: float | Tensor | None = None,
    uncond: Network | None = None,
    seeds: Tensor | None = None,
    state: State = "compensated",
    progress: bool = False,
    check_finite: bool | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Draw samples of a flow-matching model, noise at 1 and data at 0, by Heun steps with churn.

    `x_t = (1 - t) x_data + t eps` has noise of level `sigma = t / (1 - t)` relative to the data.
    Churn raises that level, as in EDM. The data's part of x must shrink with it:

        sigma^ = sigma (1 + gamma),    t^ = sigma^ / (1 + sigma^),    r = (1 - t^) / (1 - t)
        x^ = r x + sqrt(t^^2 - r^2 t^2) S_noise n

    A Heun step of `dx/dt = v` from t^ to the next time follows. At t = 1 there is nothing to raise.

    Args:
        velocity (Callable): `v(x, t)` with t `[B]`, float32 at least. It predicts
            `E[eps - data | x]`.
        latents (Tensor): standard normal noise `[B, ...]`. Sampling starts from `t_0 latents`.
        steps (int): number S of steps, of equal length from 1 to 0.
        times (Tensor | Sequence[float] | None): nodes in place of these, decreasing within [0, 1],
            `[S + 1]` or `[B, S + 1]`.
        S_churn, S_min, S_max, S_noise (float): churn as for `edm_sample`, with S_min and S_max as
            times.
        guidance, uncond, seeds, state, progress, check_finite, backend: options of `edm_sample`.

    Returns:
        Tensor: samples of the shape and dtype of latents.

    Raises:
        ValueError: an argument that `edm_sample` refuses; times that do not decrease within [0, 1].

    Source: derived from Karras et al., EDM, arXiv 2206.00364, algorithm 2, by the change of frame
    `x / (1 + sigma)`.

    >>> import fewstep
    >>> def v(x, t):  # of data N(0, I)
    ...     return (2 * t - 1)[:, None] / (t * t + (1 - t) ** 2)[:, None] * x
    >>> x = fewstep.flow_sample(v, torch.randn(1000, 2), S_churn=10)
    >>> abs(x.std().item() - 1) < 0.05
    True
    """
    function("flow_sample", "velocity", velocity)
    flags("flow_sample", progress=progress)
    check_state("flow_sample", latents, state, "latents")
    if times is None:
        steps = count("flow_sample", "steps", steps)
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    nodes = check_times("flow_sample", times, latents)
    if bool(
        (nodes[:, 0] > 1).any() | (nodes[:, -1] < 0).any() | (nodes[:, 0] < nodes[:, -1]).any()
    ):
        raise ValueError(f"flow_sample: times must decrease within [0, 1], got {times}")
    churn = check_churn("flow_sample", S_churn, S_min, S_max, S_noise)
    weight = check_guidance("flow_sample", guidance, uncond, latents)
    seeds = seeds_for("flow_sample", seeds, latents, churn.amount > 0)
    plan = flow_plan(nodes, churn, weight)
    networks = (velocity,) if uncond is None else (velocity, uncond)
    name = pick("flow_sample", latents, backend)
    table = plan.table.to(latents.device)
    run = Run("flow_sample", name, latents, table, state, check_finite, seeds=seeds)
    return follow(run, networks, plan.inputs(latents), plan, None, progress)


def flow_plan(times: Tensor, churn: Churn, guidance: Tensor | None) -> Plan:
    """The plan of `flow_sample` at times `[R, S + 1]`."""
    t = times.T
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
    predictor = table_row(one, h / 2, guidance, net=(one, h))
    corrector = table_row(keep_after, keep_after * h / 2, guidance, noise=noise_after, scale=one)
    start = table_row((keep * now)[:1], None, guidance, noise=noise[:1], scale=one[:1])[0]
    given = torch.stack((raised, after), 1).flatten(0, 1)
    table = rows(torch.stack((predictor, corrector), 1), start)
    return Plan(table, given, steps, euler=False, scaled=False)
