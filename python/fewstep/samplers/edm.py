"""Samplers on the fused steps: EDM's, one for flow matching, and few-step re-noising."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
from torch import Tensor

from fewstep._torch import is_transformed
from fewstep.ops.heun import dispatch
from fewstep.ops.heun.engine import FIRST, Run, Tracker, rows
from fewstep.ops.heun.inputs import check_log_density, check_nodes, check_state, pick
from fewstep.ops.heun.solve import HeunResult
from fewstep.ops.trace import inputs as trace_inputs
from fewstep.ops.trace.estimator import Solver
from fewstep.ops.trace.inputs import Options, make_keys
from fewstep.reference.heun import COLUMNS, NOISE, SCALE

Network = Callable[[Tensor, Tensor], Tensor]
GRIDS = ("edm_subset", "uniform_sigma", "uniform_s")
MODES = ("fresh", "line", "reuse")
_MOST_CHURN = math.sqrt(2) - 1  # of a level, a step: Karras et al., section 4


def karras_sigmas(
    steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Noise levels of EDM, from sigma_max down to sigma_min and then 0.

        sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    Args:
        steps (int): N, at least 1; a single step starts from sigma_max.
        sigma_min, sigma_max (float): lowest and highest level, standard deviations of the noise.
        rho (float): how much denser low levels are.
        device, dtype: of the result.

    Returns:
        Tensor: `[N + 1]`.

    Raises:
        ValueError: steps below 1, levels that are not `0 < sigma_min < sigma_max`, or rho
            not positive.

    Source: Karras et al., EDM, arXiv 2206.00364, equation 5.

    >>> [round(s, 3) for s in karras_sigmas(3).tolist()]
    [80.0, 2.515, 0.002, 0.0]
    """
    _check_count("karras_sigmas", "steps", steps)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            "karras_sigmas: sigma_min and sigma_max must be 0 < sigma_min < sigma_max,"
            f" got {sigma_min} and {sigma_max}"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"karras_sigmas: rho must be positive, got {rho}")
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (high + ramp * (low - high)) ** rho
    levels[0] = sigma_max  # exactly
    return torch.cat((levels, levels.new_zeros(1))).to(device=device, dtype=dtype)


def few_step_sigmas(
    steps: int | Sequence[int],
    *,
    grid: str = "edm_subset",
    teacher_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Levels at which `multistep_sample` calls its network.

        edm_subset     the teacher's levels with these indices; a number K takes the first K
        uniform_sigma  equal decrements of sigma, from sigma_max to sigma_max / K
        uniform_s      equal decrements of s = sigma / (1 + sigma)

    On a straight line `x1 + sigma x0` both uniform grids make equal progress a step, each in its
    own frame: x, or `z = x / (1 + sigma)`.

    Args:
        steps (int | Sequence[int]): K, or for "edm_subset" increasing indices of levels.
        grid (str): see above.
        teacher_steps, sigma_min, sigma_max, rho: of the teacher's schedule, see `karras_sigmas`.

    Returns:
        Tensor: float64 `[K]`, decreasing, without a 0 at the end.

    Raises:
        ValueError: an unknown grid, indices with a uniform grid, out of range or not increasing.

    Source: Matityahu and Fattal, LMM, arXiv 2412.06403, table 7.

    >>> few_step_sigmas([0, 1]).tolist() == karras_sigmas(18)[:2].tolist()
    True
    >>> few_step_sigmas(4, grid="uniform_sigma").tolist()
    [80.0, 60.0, 40.0, 20.0]
    """
    if grid not in GRIDS:
        raise ValueError(f"few_step_sigmas: grid must be one of {GRIDS}, got {grid!r}")
    if isinstance(steps, int):
        _check_count("few_step_sigmas", "steps", steps)
    elif grid != "edm_subset":
        raise ValueError(f"few_step_sigmas: steps must be a number for {grid!r}, got {steps}")
    if grid == "edm_subset":
        levels = karras_sigmas(teacher_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
        indices = list(range(steps)) if isinstance(steps, int) else list(steps)
        increasing = all(a < b for a, b in itertools.pairwise(indices))
        if not indices or not increasing or indices[0] < 0 or indices[-1] >= teacher_steps:
            raise ValueError(
                "few_step_sigmas: steps must be increasing indices below"
                f" teacher_steps = {teacher_steps}, got {steps}"
            )
        return levels[indices]
    assert isinstance(steps, int)
    left = 1 - torch.arange(steps, dtype=torch.float64) / steps
    if grid == "uniform_sigma":
        return sigma_max * left
    s = sigma_max / (1 + sigma_max) * left
    return s / (1 - s)


def latents(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Standard normal noise that depends on a sample's seed and nothing else.

    Args:
        seeds (Tensor): int64 `[B]`, at least 0: the noise of a seed is the same in any batch and,
            within rounding, on any device. It is independent of what `edm_sample` adds.
        shape (Sequence[int]): of a sample.
        dtype (torch.dtype): of the noise.
        backend (str | None): as of `fewstep.heun_solve`.

    Returns:
        Tensor: `[B, *shape]`, on the device of seeds.

    Raises:
        ValueError: seeds that are not `[B]` or, on the CPU, negative.
        TypeError: seeds that are not int64.

    >>> a, b = latents(torch.tensor([7, 8]), (2,)), latents(torch.tensor([8]), (2,))
    >>> torch.equal(a[1:], b)
    True
    """
    own = _check_seeds("latents", seeds, seeds.shape[0] if seeds.ndim else 0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.zeros((seeds.shape[0], *shape), dtype=wide, device=seeds.device)
    row = x.new_zeros((1, 1, COLUMNS), dtype=torch.float64)
    row[..., NOISE] = 1
    name = pick(x, backend)
    dispatch.into(name, wide)(x, None, [], row, 0, own, x, None, None, None)
    return x.to(dtype)


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
    guidance: float | Tensor | None = None,
    uncond: Network | None = None,
    seeds: Tensor | None = None,
    precondition: float | None = None,
    state: str = "compensated",
    cuda_graph: bool = False,
    log_density: Tensor | None = None,
    estimator: str = "auto",
    probes: int = 1,
    progress: bool = False,
    check_finite: bool | None = None,
    backend: str | None = None,
) -> Tensor | HeunResult:
    """Samples of a diffusion model by EDM's second-order sampler, in 2 N - 1 evaluations.

    From `x = sigma_0 latents`, for each level `sigma` and the next one `sigma'`:

        sigma^ = sigma (1 + gamma),    x^ = x + sqrt(sigma^^2 - sigma^2) S_noise n
        d1 = (x^ - D(x^, sigma^)) / sigma^,    x2 = x^ + (sigma' - sigma^) d1
        d2 = (x2 - D(x2, sigma')) / sigma',    x  = x^ + (sigma' - sigma^) (d1 + d2) / 2

    with `gamma = min(S_churn / N, sqrt 2 - 1)` where `S_min <= sigma <= S_max`, else 0; a last step
    to 0 is `x = x2`. What is not the network, noise, guidance and preconditioning included, is two
    fused passes a step. There are no gradients (`fewstep.heun_solve` has them), and the network's
    input is a buffer of the sampler: a network that keeps it has to clone it, and none may write
    into it.

    Args:
        denoiser (Callable): `D(x, sigma)` with sigma `[B]`, of the shape of x: `E[data | x]`.
        latents (Tensor): `[B, ...]`, standard normal; see `fewstep.latents`. The network is called
            with its dtype.
        steps (int): N. With sigma_min, sigma_max and rho those of `karras_sigmas`.
        sigmas (Tensor | Sequence[float] | None): levels instead, decreasing, `[N + 1]` or
            `[B, N + 1]` with those of each sample; ends with 0, or does not.
        S_churn, S_min, S_max, S_noise (float): noise that is added on the way.
        guidance (float | Tensor | None): w, a scalar or `[B]`, of classifier-free guidance:
            `D = uncond(x, sigma) + w (denoiser(x, sigma) - uncond(x, sigma))`.
        uncond (Callable | None): the unconditional denoiser.
        seeds (Tensor | None): int64 `[B]`, of the noise: a sample has the same one in any batch.
            None: drawn from torch's generator where there is noise.
        precondition (float | None): sigma_data s of EDM's preconditioning, where denoiser and
            uncond are raw networks F: `D = s^2/(sigma^2+s^2) x + sigma s/sqrt(sigma^2+s^2)
            F(x/sqrt(sigma^2+s^2), ln(sigma)/4)`.
        state (str): as of `fewstep.heun_solve`.
        cuda_graph (bool): capture the sampler with its network in one CUDA graph at the first call
            of a denoiser with a shape, and replay it; schedules of as many steps go through the
            same graph.
        log_density (Tensor | None): `[B]` that of `sigma_0 latents` under its law. Then the result
            has the log-density at the last level above 0, where sampling ends: at 0 it has no
            meaning. No churn.
        estimator (str), probes (int): of its traces, as of `fewstep.divergence`.
        progress (bool): a progress bar, by tqdm.
        check_finite (bool | None): as of `fewstep.heun_solve`.
        backend (str | None): as of `fewstep.heun_solve`.

    Returns:
        Tensor | HeunResult: samples of the shape and dtype of latents; with log_density a result.

    Raises:
        ValueError: steps below 1; levels that are not positive and decreasing; negative S_churn or
            S_noise; guidance without uncond or the other way round; seeds of the wrong length;
            sigma_data not positive; a denoiser's output of another shape, or not finite, with the
            step; cuda_graph off CUDA.
        TypeError: latents that are not floating, seeds that are not int64.

    Source: Karras et al., EDM, arXiv 2206.00364, algorithms 1 and 2, table 1.

    >>> import fewstep
    >>> wide = lambda x, sigma: x / (1 + sigma[:, None] ** 2)  # of data N(0, I)
    >>> x = fewstep.edm_sample(wide, torch.randn(1000, 2), steps=40)
    >>> abs(x.std().item() - 1.008) < 0.05  # 1.008: what 40 steps make of standard deviation 1
    True
    """
    check_state("edm_sample", latents, state)
    levels = None if sigmas is None else _check_sigmas("edm_sample", sigmas, latents)
    schedule = (steps, sigma_min, sigma_max, rho)
    if levels is None:
        _check_count("edm_sample", "steps", steps)
    churn = Churn(S_churn, S_min, S_max, S_noise)
    churn.check("edm_sample")
    weight = _check_guidance("edm_sample", guidance, uncond, latents)
    if precondition is not None and not 0 < precondition < math.inf:
        raise ValueError(f"edm_sample: precondition must be positive, got {precondition}")
    seeds = _seeds_for("edm_sample", seeds, latents, churn.amount > 0)
    if log_density is not None:
        check_log_density("edm_sample", log_density, latents)
        trace_inputs.check(Options(estimator, probes), latents, "edm_sample")
        if churn.amount > 0:
            raise ValueError(f"edm_sample: S_churn must be 0 with log_density, got {churn.amount}")
        levels = _schedule(*schedule) if levels is None else levels
        if bool((levels[:, -1] == 0).all()):
            levels = levels[:, :-1]
        if levels.shape[1] < 2:
            raise ValueError("edm_sample: log_density needs two levels above 0")
    name = pick(latents, backend)
    if levels is None and weight is None and not torch.compiler.is_compiling():
        plan = _known_plan(schedule, churn, precondition)
    else:
        own = _schedule(*schedule) if levels is None else levels
        plan = edm_plan(own, churn, weight, precondition)
    networks = (denoiser,) if uncond is None else (denoiser, uncond)
    if cuda_graph:
        if latents.device.type != "cuda" or log_density is not None:
            raise ValueError(
                "edm_sample: cuda_graph needs latents on a CUDA device and no log_density,"
                f" got {latents.device}"
            )
        with torch.cuda.device(latents.device):
            return _replay(networks, latents, plan, seeds, state, name)
    tracked = None
    if log_density is not None:
        options = Options(estimator, probes)
        tracked = _Tracked(networks, plan, log_density, options, name, weight)
    table = plan.table.to(latents.device)
    run = Run(
        *("edm_sample", name, latents, table, state, check_finite),
        scaled=plan.scaled,
        seeds=seeds,
    )
    out = _follow(run, networks, plan.inputs(latents), plan, tracked, progress)
    return out if tracked is None else tracked.result(out)


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
    state: str = "compensated",
    progress: bool = False,
    check_finite: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Samples of a flow-matching model, noise at 1 and data at 0, by Heun steps with churn.

    `x_t = (1 - t) x_data + t eps` has noise of level `sigma = t / (1 - t)` relative to the data.
    Churn raises that, as EDM's does, and the data's part of x has to shrink with it:

        sigma^ = sigma (1 + gamma),    t^ = sigma^ / (1 + sigma^),    r = (1 - t^) / (1 - t)
        x^ = r x + sqrt(t^^2 - r^2 t^2) S_noise n

    then Heun's step of `dx/dt = v` from t^ to the next time. At t = 1 there is nothing to raise.

    Args:
        velocity (Callable): `v(x, t)` with t `[B]`: `E[eps - data | x]`.
        latents (Tensor): `[B, ...]`, standard normal; sampling starts from `t_0 latents`.
        steps (int): S, of equal length from 1 to 0.
        times (Tensor | Sequence[float] | None): nodes instead, decreasing within [0, 1], `[S + 1]`
            or `[B, S + 1]`.
        S_churn, S_min, S_max, S_noise (float): as of `edm_sample`, S_min and S_max as times.
        guidance, uncond, seeds, state, progress, check_finite, backend: as of `edm_sample`.

    Returns:
        Tensor: samples of the shape and dtype of latents.

    Raises:
        ValueError: as `edm_sample`; times that do not decrease within [0, 1].

    Source: derived from Karras et al., EDM, arXiv 2206.00364, algorithm 2, by the change of frame
    `x / (1 + sigma)`.

    >>> import fewstep
    >>> def v(x, t):  # of data N(0, I)
    ...     return (2 * t - 1)[:, None] / (t * t + (1 - t) ** 2)[:, None] * x
    >>> x = fewstep.flow_sample(v, torch.randn(1000, 2), S_churn=10)
    >>> abs(x.std().item() - 1) < 0.05
    True
    """
    check_state("flow_sample", latents, state)
    if times is None:
        _check_count("flow_sample", "steps", steps)
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    nodes = check_nodes("flow_sample", times, latents)
    if bool(
        (nodes[:, 0] > 1).any() | (nodes[:, -1] < 0).any() | (nodes[:, 0] < nodes[:, -1]).any()
    ):
        raise ValueError(f"flow_sample: times must decrease within [0, 1], got {times}")
    churn = Churn(S_churn, S_min, S_max, S_noise)
    churn.check("flow_sample")
    weight = _check_guidance("flow_sample", guidance, uncond, latents)
    seeds = _seeds_for("flow_sample", seeds, latents, churn.amount > 0)
    plan = flow_plan(nodes, churn, weight)
    networks = (velocity,) if uncond is None else (velocity, uncond)
    name = pick(latents, backend)
    table = plan.table.to(latents.device)
    run = Run("flow_sample", name, latents, table, state, check_finite, seeds=seeds)
    return _follow(run, networks, plan.inputs(latents), plan, None, progress)


@torch.no_grad()
def multistep_sample(
    network: Network,
    latents: Tensor,
    *,
    sigmas: Tensor | Sequence[float],
    mode: str = "fresh",
    seeds: Tensor | None = None,
    check_finite: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Samples of a few-step generator that predicts the clean endpoint at every level.

    From `x = sigma_0 latents`, `x1 = N(x, sigma)` at each level, which is the sample at the last
    one; before, at the next level sigma' with new noise eta,

        fresh   x = x1 + sigma' eta                    (consistency models, CTM, LMM)
        line    x = x1 + sigma' / sigma (x - x1)       (stays on the line through x and x1)
        reuse   x = x1 + sigma' latents                (the line through the first latents)

    Args:
        network (Callable): `N(x, sigma)` with sigma `[B]`.
        latents (Tensor): `[B, ...]`, standard normal.
        sigmas (Tensor | Sequence[float]): `[K]`, positive and decreasing; see `few_step_sigmas`.
        mode (str): see above. With levels near the first one "fresh" is close to a new draw.
        seeds, check_finite, backend: as of `edm_sample`.

    Returns:
        Tensor: samples of the shape and dtype of latents.

    Raises:
        ValueError: levels that are not positive and decreasing, an unknown mode, seeds of the wrong
            length, an output of another shape, or not finite, with the step.

    Source: Song et al., Consistency models, arXiv 2303.01469, algorithm 1; Matityahu and Fattal,
    LMM, arXiv 2412.06403, section 3.

    >>> import fewstep
    >>> half = lambda x, sigma: x / 2
    >>> fewstep.multistep_sample(half, torch.ones(1, 2), sigmas=[4.0, 1.0], mode="line")
    tensor([[1.2500, 1.2500]])
    """
    check_state("multistep_sample", latents, "float32")
    if mode not in MODES:
        raise ValueError(f"multistep_sample: mode must be one of {MODES}, got {mode!r}")
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    positive = levels.ndim == 1 and levels.numel() > 0 and bool((levels > 0).all())
    if not positive or not bool((levels.diff() < 0).all()) or not bool(levels.isfinite().all()):
        raise ValueError(
            f"multistep_sample: sigmas must be positive and decreasing, got {levels.tolist()}"
        )
    seeds = _seeds_for("multistep_sample", seeds, latents, mode == "fresh" and len(levels) > 1)
    table = levels.new_zeros((FIRST + len(levels), 1, COLUMNS))
    table[..., SCALE] = 1
    table[1, :, 0] = levels[0]
    ratio = (levels[1:] / levels[:-1])[:, None]
    if mode == "line":
        table[FIRST:-1, :, 0], table[FIRST:-1, :, 1] = ratio, 1 - ratio
    else:
        table[FIRST:-1, :, 1] = 1
        table[FIRST:-1, :, 2 if mode == "reuse" else NOISE] = levels[1:, None]
    table[-1, :, 1] = 1
    name = pick(latents, backend)
    table = table.to(latents.device)
    run = Run("multistep_sample", name, latents, table, "float32", check_finite, seeds=seeds)
    inputs = levels.to(latents)[:, None].expand(-1, latents.shape[0]).contiguous().unbind()
    run.advance([], 1, 0)
    for k in range(len(levels)):
        endpoint = run.accept(network(run.net, inputs[k]), k)
        run.advance([endpoint, latents] if mode == "reuse" else [endpoint], FIRST + k, k)
    return run.finish()


@dataclass(frozen=True)
class Churn:
    """Noise that a sampler adds on the way: `S_churn, S_min, S_max, S_noise` of EDM."""

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def check(self, who: str) -> None:
        for name, value in (("S_churn", self.amount), ("S_noise", self.noise)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{who}: {name} must be at least 0 and finite, got {value}")

    def gamma(self, level: Tensor, steps: int) -> Tensor:
        """How much the noise grows, relative to what there is."""
        inside = (level >= self.low) & (level <= self.high)
        return min(self.amount / steps, _MOST_CHURN) * inside.to(level.dtype)


@dataclass(frozen=True)
class Plan:
    """A sampler as a table of passes and what its network is called with.

    Attributes:
        table: float64 `[K, R, 8]`, see `fewstep.reference.heun`.
        levels: what evaluation 2 s + i, i = 0, 1, of step s is called with, float64 `[2 S, R]`.
        steps: S.
        euler: whether the last step has one evaluation.
        scaled: whether the network's input is not the state itself.
        traces: weights of the traces of each evaluation in the change of log-density, `[2 S, R]`.
        constant: what it has besides, for each dimension, `[R]`.
    """

    table: Tensor
    levels: Tensor
    steps: int
    euler: bool
    scaled: bool
    traces: Tensor | None = None
    constant: Tensor | None = None

    def inputs(self, latents: Tensor) -> tuple[Tensor, ...]:
        """`[B]` for each evaluation."""
        own = self.levels.to(latents).expand(-1, latents.shape[0]).contiguous()
        return own.unbind()


def edm_plan(
    levels: Tensor, churn: Churn, guidance: Tensor | None, precondition: float | None
) -> Plan:
    """Of EDM's sampler at levels `[R, N + 1]`: both halves of a step as combinations.

    With `D = skip x + out F(c_in x)` and `h = sigma' - sigma^`, the derivative at sigma^ is
    `((1 - skip) x^ - out F1) / sigma^`, so that `x2 = (1 + a) x^ + b F1`, and the second one is
    linear in x2 and F2.
    """
    sigma = levels.T  # [N + 1, R]
    steps = sigma.shape[0] - 1
    euler = bool((sigma[-1] == 0).all())
    hat = sigma[:-1] * (1 + churn.gamma(sigma[:-1], steps))
    noise = churn.noise * (hat.square() - sigma[:-1].square()).clamp_min(0).sqrt()
    after = sigma[1:]
    h = after - hat
    divisor = torch.where(after > 0, after, 1)  # the last step to 0 has no second evaluation
    skip1, out1, in1 = _preconditioning(hat, precondition)
    skip2, out2, in2 = _preconditioning(divisor, precondition)
    a, b = h * (1 - skip1) / hat, -h * out1 / hat
    half = h / 2 * (1 - skip2) / divisor
    own, first = 1 + a / 2 + half * (1 + a), b / 2 + half * b
    if euler:
        own[-1], first[-1] = 1 + a[-1], b[-1]
    zero, one = torch.zeros_like(h), torch.ones_like(h)
    noise_after, scale_after = torch.cat((noise[1:], zero[:1])), torch.cat((in1[1:], one[:1]))
    predictor = _row(own, first, guidance, net=(in2 * (1 + a), in2 * b))
    corrector = _row(one, -h / 2 * out2 / divisor, guidance, noise=noise_after, scale=scale_after)
    start = _row(sigma[:1], None, guidance, noise=noise[:1], scale=in1[:1])[0]
    given = torch.stack((hat, divisor), 1).flatten(0, 1)
    traces = torch.stack((h / 2 * out1 * in1 / hat, h / 2 * out2 * in2 / divisor), 1)
    constant = -(h / 2 * ((1 - skip1) / hat + (1 - skip2) / divisor)).sum(0)
    return Plan(
        rows(torch.stack((predictor, corrector), 1), start),
        given if precondition is None else given.log() / 4,
        steps,
        euler,
        precondition is not None,
        traces.flatten(0, 1),
        constant,
    )


def _schedule(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """`[1, N + 1]`"""
    return karras_sigmas(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)[None]


@functools.lru_cache(maxsize=64)
def _known_plan(
    schedule: tuple[int, float, float, float], churn: Churn, precondition: float | None
) -> Plan:
    """EDM's own schedules, whose tables take longer to make than a step of a small network."""
    return edm_plan(_schedule(*schedule), churn, None, precondition)


def flow_plan(times: Tensor, churn: Churn, guidance: Tensor | None) -> Plan:
    """Of `flow_sample` at times `[R, S + 1]`."""
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
    predictor = _row(one, h / 2, guidance, net=(one, h))
    corrector = _row(keep_after, keep_after * h / 2, guidance, noise=noise_after, scale=one)
    start = _row((keep * now)[:1], None, guidance, noise=noise[:1], scale=one[:1])[0]
    given = torch.stack((raised, after), 1).flatten(0, 1)
    table = rows(torch.stack((predictor, corrector), 1), start)
    return Plan(table, given, steps, euler=False, scaled=False)


def _row(
    own: Tensor,
    part: Tensor | None,
    guidance: Tensor | None,
    *,
    noise: Tensor | None = None,
    net: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Rows of a table, `[S, R, 8]`, from the factors of state and network in y and in the input.

    With guidance w the network's part is that of `w F + (1 - w) U`.
    """
    zero = torch.zeros_like(own)
    guidance = None if guidance is None else guidance.to(own.device)

    def shares(value: Tensor | None) -> tuple[Tensor, Tensor]:
        if value is None or guidance is None:
            return zero if value is None else value, zero
        return guidance * value, (1 - guidance) * value

    first = (own, *shares(part), zero if noise is None else noise)
    second = (zero, *shares(None)) if net is None else (net[0], *shares(net[1]))
    columns = (*first, *second, zero if scale is None else scale)
    return torch.stack(torch.broadcast_tensors(*columns), -1)  # type: ignore[no-untyped-call]


def _preconditioning(sigma: Tensor, data: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of EDM, or those of a denoiser."""
    if data is None:
        return torch.zeros_like(sigma), torch.ones_like(sigma), torch.ones_like(sigma)
    total = sigma.square() + data**2
    return data**2 / total, sigma * data / total.sqrt(), total.rsqrt()


class _Tracked:
    """A log-density along a plan: networks that return their traces too.

    A denoiser's derivative `(x - D)/sigma` has the trace `(dim (1 - skip) - out in tr F)/sigma`;
    what does not depend on the network is known before.
    """

    def __init__(
        self,
        networks: tuple[Network, ...],
        plan: Plan,
        log_density: Tensor,
        options: Options,
        backend: str,
        guidance: Tensor | None = None,
    ) -> None:
        assert plan.traces is not None
        self.plan = plan
        self.solvers = [Solver(network, options) for network in networks]
        self.keys = make_keys(0, plan.steps)
        weights = plan.traces.to(log_density.device)
        row = _row(torch.ones_like(weights), weights, guidance)
        table = rows(row.reshape(-1, 2, *row.shape[1:]))
        self.tracker = Tracker(backend, log_density, table)
        # What the traces are weighed by, once for all evaluations.
        self.weights = table[FIRST:, :, 1 : 1 + len(networks)].to(log_density).unbind()

    def call(self, net: Tensor, level: Tensor, index: int) -> list[Tensor]:
        found = [solver(net, level, self.keys[index]) for solver in self.solvers]
        self.tracker.advance(found, list(self.weights[index].unbind(-1)), FIRST + index)
        return [one.velocity for one in found]

    def result(self, x: Tensor) -> HeunResult:
        assert self.plan.constant is not None
        change = self.plan.constant.to(x.device) * x.shape[1:].numel()
        return HeunResult(x, *self.tracker.result(change), None, self.tracker.estimator)


def _follow(
    run: Run,
    networks: tuple[Network, ...],
    inputs: tuple[Tensor, ...],
    plan: Plan,
    tracked: _Tracked | None,
    progress: bool,
) -> Tensor:
    """Take a plan's steps."""

    def evaluate(net: Tensor, index: int, step: int) -> list[Tensor]:
        if tracked is not None:
            return [run.accept(out, step) for out in tracked.call(net, inputs[index], index)]
        outs = [run.accept(network(net, inputs[index]), step) for network in networks]
        if len(outs) == 2 and _share_memory(*outs):
            raise ValueError(
                f"{run.who}: the networks must return tensors of their own, got one buffer from"
                f" both at step {step}"
            )
        return outs

    def alone(net: Tensor, index: int, step: int) -> list[Tensor]:
        return [accept(network(net, inputs[index]), step)]

    network, accept, advance = networks[0], run.accept, run.advance
    call = alone if tracked is None and len(networks) == 1 else evaluate
    advance([], 1, 0)
    for step in _steps(plan.steps, progress):
        index = 2 * step
        first = call(run.net, index, step)
        if plan.euler and step == plan.steps - 1:
            advance(first, FIRST + index, step)
            continue
        advance(first, FIRST + index, step, middle=True)
        advance(call(run.net, index + 1, step), FIRST + index + 1, step)
    return run.finish()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_compiling() or is_transformed() or not a.numel():
        return False
    return a.data_ptr() == b.data_ptr()


def _steps(count: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(count)
    from tqdm import tqdm  # type: ignore[import-untyped]

    return cast(Iterable[int], tqdm(range(count), desc="sampling", unit="step"))


@dataclass
class _Graph:
    """A captured sampler: its inputs, where new ones are copied to, and where it leaves samples."""

    latents: Tensor
    table: Tensor
    inputs: Tensor
    seeds: Tensor | None
    graph: Any = None
    out: Tensor | None = None


_GRAPHS: weakref.WeakKeyDictionary[Any, dict[Any, _Graph]] = weakref.WeakKeyDictionary()


def _replay(
    networks: tuple[Network, ...],
    latents: Tensor,
    plan: Plan,
    seeds: Tensor | None,
    state: str,
    backend: str,
) -> Tensor:
    """Run a plan as one CUDA graph, captured the first time."""
    like = (tuple(latents.shape), latents.dtype, latents.device, tuple(plan.table.shape))
    key = (*like, plan.euler, plan.scaled, seeds is None, state, backend, networks[1:])
    known = _GRAPHS.setdefault(networks[0], {})
    inputs = torch.stack(plan.inputs(latents))
    if key not in known:
        table = plan.table.to(latents.device, copy=True)
        own = _Graph(latents.clone(), table, inputs, None if seeds is None else seeds.clone())

        def once() -> Tensor:
            run = Run(
                *("edm_sample", backend, own.latents, own.table, state, False),
                scaled=plan.scaled,
                seeds=own.seeds,
            )
            return _follow(run, networks, own.inputs.unbind(), plan, None, False)

        stream = torch.cuda.Stream(latents.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(stream):
            once()  # what is compiled or cached at a first call must not be captured
        torch.cuda.current_stream(latents.device).wait_stream(stream)
        own.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(own.graph, stream=stream):
            own.out = once()
        known[key] = own
    captured = known[key]
    captured.latents.copy_(latents)
    captured.table.copy_(plan.table)
    captured.inputs.copy_(inputs)
    if captured.seeds is not None and seeds is not None:
        captured.seeds.copy_(seeds)
    captured.graph.replay()
    assert captured.out is not None
    return captured.out.clone()


def _check_count(who: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{who}: {name} must be an integer of at least 1, got {value!r}")


def _check_sigmas(who: str, sigmas: Tensor | Sequence[float], latents: Tensor) -> Tensor:
    """float64 `[1 or B, N + 1]`"""
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.ndim not in (1, 2) or levels.shape[-1] < 2:
        raise ValueError(
            f"{who}: sigmas must be [N + 1] or [B, N + 1] with N at least 1,"
            f" got {tuple(levels.shape)}"
        )
    if levels.ndim == 2 and levels.shape[0] != latents.shape[0]:
        raise ValueError(f"{who}: sigmas must have {latents.shape[0]} rows, got {levels.shape[0]}")
    levels = levels if levels.ndim == 2 else levels[None]
    last = levels[:, -1]
    fine = bool((levels.diff(dim=1) < 0).all() & levels.isfinite().all() & (last >= 0).all())
    if not fine or (bool((last == 0).any()) and not bool((last == 0).all())):
        raise ValueError(
            f"{who}: sigmas must be finite, positive but for a last 0, and decreasing, got {sigmas}"
        )
    return levels


def _check_guidance(
    who: str, guidance: float | Tensor | None, uncond: Network | None, latents: Tensor
) -> Tensor | None:
    """w, float64 `[1 or B]`"""
    if guidance is None and uncond is None:
        return None
    if uncond is None or guidance is None:
        missing, given = ("uncond", "guidance") if uncond is None else ("guidance", "uncond")
        value = uncond if guidance is None else guidance
        raise ValueError(f"{who}: {given} needs {missing}, got {given}={value!r}")
    weight = torch.as_tensor(guidance, dtype=torch.float64, device="cpu")
    if tuple(weight.shape) not in ((), (latents.shape[0],)) or not bool(weight.isfinite().all()):
        raise ValueError(
            f"{who}: guidance must be finite, a scalar or ({latents.shape[0]},), got {guidance}"
        )
    return weight.reshape(-1)


def _check_seeds(who: str, seeds: Tensor, batch: int) -> Tensor:
    if seeds.dtype != torch.int64:
        raise TypeError(f"{who}: seeds must be int64, got {seeds.dtype}")
    if tuple(seeds.shape) != (batch,):
        raise ValueError(f"{who}: seeds must be ({batch},), got {tuple(seeds.shape)}")
    if seeds.device.type == "cpu" and bool((seeds < 0).any()):
        raise ValueError(f"{who}: seeds must be at least 0, got {seeds.min().item()}")
    return seeds.contiguous()


def _seeds_for(who: str, seeds: Tensor | None, latents: Tensor, noisy: bool) -> Tensor | None:
    """Seeds where there is noise: those given, or drawn."""
    if seeds is not None:
        seeds = _check_seeds(who, seeds, latents.shape[0]).to(latents.device)
    elif noisy:
        seeds = torch.randint(2**62, (latents.shape[0],), device=latents.device)
    return seeds if noisy else None
