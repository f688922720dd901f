"""`edm_sample`: the sampler of EDM, Heun steps from noise to data with churn and guidance."""

from __future__ import annotations

import functools
import math
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
from fewstep.ops.trace.inputs import Options
from fewstep.samplers.cuda_graph import replay
from fewstep.samplers.inputs import (
    check_churn,
    check_density,
    check_edits,
    check_guidance,
    check_multistep,
    check_precondition,
    check_schedule,
    check_sigmas,
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
    preconditioning,
    sample,
    stacked,
    table_row,
)
from fewstep.samplers.schedules import levels_of
from fewstep.samplers.seeds import seeds_for


@overload
def edm_sample(
    denoiser: Network, latents: Tensor, *, log_density: None = None, **options: Any
) -> Tensor: ...
@overload
def edm_sample(
    denoiser: Network, latents: Tensor, *, log_density: Tensor, **options: Any
) -> HeunResult: ...
@torch.no_grad()  # type: ignore[misc]
def edm_sample(
    denoiser: Network,
    latents: Tensor,
    *,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigmas: Tensor | Sequence[float] | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    solver: SamplerSolver = "heun",
    lower_order_final: bool = False,
    guidance: float | Tensor | Callable[[float], float] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    uncond: Network | None = None,
    init: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    callback: Callback | None = None,
    seeds: Tensor | None = None,
    precondition: float | None = None,
    state: State = "compensated",
    cuda_graph: bool = False,
    log_density: Tensor | None = None,
    tracker: SamplerTracker = "trace",
    estimator: Estimator = "auto",
    probes: int = 1,
    sample_ids: Tensor | None = None,
    progress: bool = False,
    check_finite: bool | None = None,
    backend: Backend | None = None,
) -> Tensor | HeunResult:
    """Draw samples of a diffusion model by EDM's second-order sampler, in 2 N - 1 evaluations.

    The sampler starts from `x = sigma_0 latents`. For each level `sigma` and the next one `sigma'`:

        sigma^ = sigma (1 + gamma),    x^ = x + sqrt(sigma^^2 - sigma^2) S_noise n
        d1 = (x^ - D(x^, sigma^)) / sigma^,    x2 = x^ + (sigma' - sigma^) d1
        d2 = (x2 - D(x2, sigma')) / sigma',    x  = x^ + (sigma' - sigma^) (d1 + d2) / 2

    with `gamma = min(S_churn / N, sqrt 2 - 1)` where `S_min <= sigma <= S_max`, and 0 elsewhere. A
    last step to 0 is `x = x2`. `solver="euler"` takes `x = x2` in every step, in N evaluations.
    `solver="dpm++2m"` takes, with `q = sigma' / sigma` and D- at the level sigma- before,

        x = q x + (1 - q) ((1 + k) D - k D-),    k = ln(sigma / sigma') / (2 ln(sigma- / sigma))

    in N evaluations, with k = 0 in the first step and in a last one to 0. It is of second order.

    Each evaluation is followed by one fused pass over the state, which includes noise, guidance and
    preconditioning. There are no gradients; `fewstep.heun_solve` has them. The network's input is a
    buffer of the sampler. A network that keeps it must clone it, and no network may write into it.

    Args:
        denoiser (Callable): `D(x, sigma)` with sigma `[B]`, float32 at least, of the shape of x. It
            predicts `E[data | x]`. `fewstep.conversions.convert` makes that of noise, v or scores.
        latents (Tensor): standard normal noise `[B, ...]`; see `fewstep.latents`. The network is
            called with its dtype. It may return another, which is not rounded to that of latents.
            In half precision the slopes of "heun" and "euler" are those at the rounded x and x2,
            which the network sees, and the state stays in float32.
        steps (int): number N of steps. sigma_min, sigma_max and rho are those of `karras_sigmas`.
        sigmas (Tensor | Sequence[float] | None): decreasing levels in place of these, `[N + 1]`, or
            `[B, N + 1]` for levels of each sample. The last one may be 0.
        S_churn, S_min, S_max, S_noise (float): amount, range and scale of the noise that is added
            on the way.
        solver (str): "heun", "euler" or "dpm++2m", as above.
        lower_order_final (bool): whether the last step of "dpm++2m" has k = 0 above 0 too.
        guidance (float | Tensor | Callable | None): weight w of classifier-free guidance, a scalar,
            `[B]`, or a function of the level:
            `D = uncond(x, sigma) + w (denoiser(x, sigma) - uncond(x, sigma))`.
        guidance_interval (tuple | None): levels `(low, high)` between which guidance acts, both
            included. Outside w is 1. Where w is 1 uncond is not called.
        uncond (Callable | None): unconditional denoiser.
        init (Tensor | None): data `[B, ...]` to start from: `x = init + sigma_0 latents`.
        known (Tensor | None): data `[B, ...]`, of which mask says what samples must have. There x
            is `known + sigma latents` at the beginning of each step and at the end.
        mask (Tensor | None): bool, of a shape that broadcasts to that of latents; true where
            known.
        callback (Callable | None): is called with a `SamplerStep` (index, steps, level, x,
            denoised) after the first evaluation of each step. True ends sampling. The result is
            `denoised` then, and `known` where mask is true. A tensor takes the place of x. It has
            x's shape and dtype, and the network is called there again.
        seeds (Tensor | None): int64 `[B]`, seeds of the noise. A sample has the same noise in any
            batch. Default: drawn from torch's generator where there is noise.
        precondition (float | None): standard deviation s of the data, where denoiser and uncond are
            the raw networks F of EDM's preconditioning. With `r^2 = sigma^2 + s^2`,
            `D = s^2/r^2 x + sigma s/r F(x/r, ln(sigma)/4)`.
        state (str): precision of the state, as for `fewstep.heun_solve`.
        cuda_graph (bool): whether to capture the sampler and its network in one CUDA graph at the
            first call of a denoiser with a shape, and to replay it afterwards. Schedules of as many
            steps share a graph.
        log_density (Tensor | None): log-density `[B]` of `sigma_0 latents` under its law. The
            result then has the log-density at the last level above 0, where sampling ends. It has
            no meaning at 0. S_churn must be 0. Its dtype is float32 at least.
        tracker (str): "trace" follows `d log q = -tr J` by the sampler's method. That is the
            density of the flow, and of the samples only in the limit of many steps; it is off by
            several nats in 64 dimensions at 18 steps. "logdet" is the density of the samples
            themselves, by `log |det|` of each step, and takes D tangents an evaluation.
        estimator (str), probes (int), sample_ids (Tensor | None): options of the traces, as for
            `fewstep.divergence`.
        progress (bool): whether to show a progress bar, by tqdm.
        check_finite (bool | None): check of the states, as for `fewstep.heun_solve`.
        backend (str | None): backend as for `fewstep.heun_solve`.

    Returns:
        Tensor | HeunResult: samples of the shape and dtype of latents; with log_density a result.

    Raises:
        ValueError: steps below 1; levels that are not positive and decreasing; negative S_churn or
            S_noise; guidance without uncond or the other way round; seeds of the wrong length;
            precondition not positive; an unknown tracker; ids out of range; a denoiser's output of
            another shape, or not finite, with the step; cuda_graph off CUDA.
        TypeError: latents or a log_density that are not floating, seeds or ids that are not int64.

    Source: Karras et al., EDM, arXiv 2206.00364, algorithms 1 and 2, table 1; Lu et al.,
    DPM-Solver++, arXiv 2211.01095, algorithm 2; Kynkaanniemi et al., limited intervals of guidance,
    arXiv 2404.07724.

    >>> import fewstep
    >>> wide = lambda x, sigma: x / (1 + sigma[:, None] ** 2)  # of data N(0, I)
    >>> x = fewstep.edm_sample(wide, torch.randn(1000, 2), steps=40)
    >>> abs(x.std().item() - 1.008) < 0.05  # 1.008: what 40 steps make of standard deviation 1
    True
    """
    function("edm_sample", "denoiser", denoiser)
    flags(
        "edm_sample",
        cuda_graph=cuda_graph,
        progress=progress,
        lower_order_final=lower_order_final,
    )
    check_state("edm_sample", latents, state, "latents")
    levels = None if sigmas is None else check_sigmas("edm_sample", sigmas, latents)
    if levels is None:
        steps = count("edm_sample", "steps", steps)
    schedule = (steps, *check_schedule("edm_sample", sigma_min, sigma_max, rho))
    churn = check_churn("edm_sample", S_churn, S_min, S_max, S_noise)
    one_of("edm_sample", "solver", solver, SOLVERS)
    weight = check_guidance("edm_sample", guidance, uncond, latents, guidance_interval)
    edits = check_edits("edm_sample", latents, init, known, mask, callback)
    precondition = check_precondition("edm_sample", precondition)
    check_multistep("edm_sample", solver, churn, lower_order_final)
    seeds = seeds_for("edm_sample", seeds, latents, churn.amount > 0)
    options = Options(estimator, probes)
    density = check_density(
        *("edm_sample", latents, log_density, tracker, options, sample_ids, churn, solver, edits)
    )
    if density is not None:
        levels = levels_of(*schedule)[None] if levels is None else levels
        if bool((levels[:, -1] == 0).all()):
            levels = levels[:, :-1]
        if levels.shape[1] < 2:
            raise ValueError("edm_sample: log_density needs two levels above 0")
    name = pick("edm_sample", latents, backend)
    networks: tuple[Network, ...] = (denoiser,) if uncond is None else (denoiser, uncond)
    if solver == "dpm++2m" and precondition is not None:  # its state has no x by itself
        networks = tuple(_preconditioned(network, precondition) for network in networks)
        precondition = None
    half = latents.dtype.itemsize < 4
    if levels is None and weight is None and not torch.compiler.is_compiling():
        own = (churn, precondition, solver, latents.device, half, lower_order_final)
        plan = _known_plan(schedule, *own)
    else:
        levels = levels_of(*schedule)[None] if levels is None else levels
        plan = edm_plan(levels, churn, weight, precondition, solver, half, lower_order_final)
    if cuda_graph:
        if latents.device.type != "cuda" or log_density is not None or not edits.none:
            raise ValueError(
                "edm_sample: cuda_graph needs latents on a CUDA device, and no log_density, init,"
                f" mask or callback, got {latents.device}"
            )
        with torch.cuda.device(latents.device):
            return replay(networks, latents, plan, seeds, state, name)
    return sample(
        *("edm_sample", networks, latents, plan, (name, state, check_finite)),
        seeds=seeds,
        edits=edits,
        density=density,
        progress=progress,
    )


def _preconditioned(network: Network, data: float) -> Network:
    """The denoiser of a raw network."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        wide = (-1, *(1,) * (x.ndim - 1))
        skip, out, scale = (
            t.reshape(wide).to(x.dtype) for t in preconditioning(sigma.double(), data)
        )
        return skip * x + out * network(scale * x, sigma.log() / 4)

    return denoiser


def edm_plan(
    levels: Tensor,
    churn: Churn,
    guidance: Guidance | None,
    precondition: float | None,
    solver: SamplerSolver = "heun",
    half: bool = False,
    lower: bool = False,
) -> Plan:
    """The plan of EDM's sampler at levels `[R, N + 1]`, both halves of a step as combinations.

    With `D = skip x + out F(c_in x)` and `h = sigma' - sigma^`, the derivative at sigma^ is
    `((1 - skip) x^ - out F1) / sigma^`, so that `x2 = (1 + a) x^ + b F1`, and the second one is
    linear in x2 and F2. For networks in half precision it is `-out (F - p z) / sigma` of their
    rounded input z.
    """
    sigma = levels.T  # [N + 1, R]
    if solver == "dpm++2m":
        one = torch.ones_like(sigma)
        return multistep_plan(one, sigma, sigma, (None, one[:-1]), guidance, lower)
    steps = sigma.shape[0] - 1
    euler = bool((sigma[-1] == 0).all())
    hat = sigma[:-1] * (1 + churn.gamma(sigma[:-1], steps))
    noise = churn.noise * (hat.square() - sigma[:-1].square()).clamp_min(0).sqrt()
    after = sigma[1:]
    h = after - hat
    divisor = torch.where(after > 0, after, 1)  # the last step to 0 has no second evaluation
    skip1, out1, in1 = preconditioning(hat, precondition)
    skip2, out2, in2 = preconditioning(divisor, precondition)
    a, b = h * (1 - skip1) / hat, -h * out1 / hat
    second = h / 2 * (1 - skip2) / divisor
    pull = None
    if half:
        factors = ((1 - skip1) / (in1 * out1), (1 - skip2) / (in2 * out2))
        pull = factors[0] if solver == "euler" else torch.stack(factors, 1).flatten(0, 1)
        a, second = torch.zeros_like(a), torch.zeros_like(a)
    own, first = 1 + a / 2 + second * (1 + a), b / 2 + second * b
    if euler:
        own[-1], first[-1] = 1 + a[-1], b[-1]
    zero, one = torch.zeros_like(h), torch.ones_like(h)
    noise_after, scale_after = torch.cat((noise[1:], zero[:1])), torch.cat((in1[1:], one[:1]))
    start = table_row(sigma[:1], one[:1], None, noise=noise[:1], scale=in1[:1])[0]
    single = solver == "euler"
    given = hat if single else torch.stack((hat, divisor), 1).flatten(0, 1)
    weight, plain = needless(guidance, given)
    if single:
        table = table_row(1 + a, b, weight, noise=noise_after, scale=scale_after)[:, None]
        of_first = weight
    else:
        of_first, of_second = (None, None) if weight is None else (weight[::2], weight[1::2])
        predictor = table_row(own, first, of_first, net=(in2 * (1 + a), in2 * b))
        corrector = table_row(
            one, -h / 2 * out2 / divisor, of_second, noise=noise_after, scale=scale_after
        )
        table = torch.stack((predictor, corrector), 1)
    traces = torch.stack((h / 2 * out1 * in1 / hat, h / 2 * out2 * in2 / divisor), 1)
    constant = -(h / 2 * ((1 - skip1) / hat + (1 - skip2) / divisor)).sum(0)

    def describe() -> tuple[Tensor, Tensor]:
        weights = one if of_first is None else of_first
        return _path(torch.cat((hat, sigma[-1:]))), stacked(1 / in1, skip1, out1, weights)

    return Plan(
        rows(table, start),
        given if precondition is None else given.log() / 4,
        steps,
        euler,
        precondition is not None,
        describe,
        single=single,
        plain=plain,
        traces=traces.flatten(0, 1),
        constant=constant,
        weight=weight,
        pull=pull,
    )


def _path(sigma: Tensor) -> Tensor:
    one = torch.ones_like(sigma)
    return stacked(sigma, one, sigma, one)


@functools.lru_cache(maxsize=64)
def _known_plan(
    schedule: tuple[int, float, float, float],
    churn: Churn,
    precondition: float | None,
    solver: SamplerSolver,
    device: torch.device,
    half: bool,
    lower: bool,
) -> Plan:
    """EDM's own schedules, whose tables take longer to make than a step of a small network.

    They are where the samples are: a graph of CUDA cannot capture copies from the host.
    """
    plan = edm_plan(levels_of(*schedule)[None], churn, None, precondition, solver, half, lower)
    pull = None if plan.pull is None else plan.pull.to(device)
    return replace(plan, table=plan.table.to(device), levels=plan.levels.to(device), pull=pull)
