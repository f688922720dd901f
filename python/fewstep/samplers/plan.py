"""The passes over a state between two calls of a network, as tables of coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fewstep._names import SamplerTracker
from fewstep._torch import is_transformed, wide
from fewstep.ops.heun.engine import FIRST, Run, Tracker, rows
from fewstep.ops.heun.solve import HeunResult
from fewstep.ops.trace.estimator import Solver
from fewstep.ops.trace.inputs import Options, make_keys
from fewstep.ops.trace.log_density import jacobian
from fewstep.reference.heun import NET, SCALE

Network = Callable[[Tensor, Tensor], Tensor]
_MOST_CHURN = math.sqrt(2) - 1  # of a level, a step: Karras et al., section 4
SOLVERS = ("heun", "euler", "dpm++2m")


@dataclass(frozen=True)
class Churn:
    """Noise that a sampler adds on the way: `S_churn, S_min, S_max, S_noise` of EDM."""

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def gamma(self, level: Tensor, steps: int) -> Tensor:
        """How much the noise grows, relative to what there is."""
        inside = (level >= self.low) & (level <= self.high)
        return min(self.amount / steps, _MOST_CHURN) * inside.to(level.dtype)


@dataclass(frozen=True)
class Guidance:
    """The weight w of classifier-free guidance at each level; 1 outside of an interval.

    Attributes:
        weight: w, float64 `[1 or B]`, or a function of the level.
        low, high: interval of levels, both ends included.
    """

    weight: Tensor | Callable[[float], float]
    low: float = -math.inf
    high: float = math.inf

    @property
    def constant(self) -> bool:
        everywhere = self.low == -math.inf and self.high == math.inf
        return isinstance(self.weight, Tensor) and everywhere

    def at(self, levels: Tensor) -> Tensor:
        """w at float64 levels `[S, R]`, `[S, R or B]`."""
        weight = self.weight
        if self.constant:
            assert isinstance(weight, Tensor)
            return weight.to(levels.device).expand(len(levels), -1)
        inside = (levels >= self.low) & (levels <= self.high)
        if not isinstance(weight, Tensor):
            found = [weight(level) for level in levels.flatten().tolist()]
            weight = levels.new_tensor(found).reshape(levels.shape)
        return torch.where(inside, weight.to(levels.device), 1.0)


@dataclass(frozen=True)
class SamplerStep:
    """What a callback of a sampler sees, after the first evaluation of each step.

    Attributes:
        index (int): number of the step, from 0.
        steps (int): number of steps.
        level (Tensor): noise level, or time, of x: `[B]`.
        x (Tensor): state `[B, ...]`, a copy.
        denoised (Tensor): the network's estimate of the data there, `[B, ...]`, with guidance.
    """

    index: int
    steps: int
    level: Tensor
    x: Tensor
    denoised: Tensor


Callback = Callable[[SamplerStep], bool | Tensor | None]


@dataclass(frozen=True)
class Edits:
    """What of a sampler's way a user changes.

    Attributes:
        start: data to start from.
        known, mask: data that stays as it is, where mask is true.
        callback: called in each step; True ends sampling, a tensor is the state there.
    """

    start: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None
    callback: Callback | None = None

    @property
    def none(self) -> bool:
        return self.start is None and self.mask is None and self.callback is None


@dataclass(frozen=True)
class Density:
    """What a log-density along a sampler is found by."""

    start: Tensor
    tracker: SamplerTracker
    options: Options
    ids: Tensor | None


@dataclass(frozen=True)
class Plan:
    """A sampler as a table of passes and what its network is called with.

    Attributes:
        table: float64 `[K, R, 8]`, see `fewstep.reference.heun`.
        levels: what evaluation i of step s is called with, float64 `[E S, R]`, E = 1 or 2.
        steps: number S of steps.
        euler: whether the last step has one evaluation.
        scaled: whether the network's input is not the state itself.
        single: whether each step has one evaluation.
        plain: numbers of the evaluations that need no unconditional network.
        describe: makes two tables in float64 for what a user does on the way. The path
            `[4, S + 1, R]`, of each step's beginning and of the end: the level as the user counts
            it, alpha and sigma of `x_t = alpha x_data + sigma noise`, and the factor of x in the
            state. The estimate `[4, S, R]` at the first evaluation of each step:
            `D = e_1 x + e_2 F` with x = e_0 times the network's input; e, and the weight of
            guidance.
        traces: weights of the traces of each evaluation in the change of log-density, `[2 S, R]`.
        constant: part of that change that depends on no trace, for each dimension, `[R]`.
        weight: weights of guidance at the evaluations, `[E S, R]`.
        pull: factors p, `[E S, R]`, where the network's part in the table is `F - p z` with its
            input z: where the state does not hold x, and in half precision, where z is rounded.
            A slope of x and F, each of another point, would magnify that by the ratio of two
            levels.
    """

    table: Tensor
    levels: Tensor
    steps: int
    euler: bool
    scaled: bool
    describe: Callable[[], tuple[Tensor, Tensor]]
    single: bool = False
    plain: frozenset[int] = frozenset()
    traces: Tensor | None = None
    constant: Tensor | None = None
    weight: Tensor | None = None
    pull: Tensor | None = None

    def pulls(self, latents: Tensor) -> Tensor | None:
        """p of each evaluation beside the network's outputs, `[E S, R, 1, ...]`."""
        if self.pull is None:
            return None
        own = self.pull.to(latents.device, wide(latents.dtype))
        return own.reshape(*own.shape, *(1,) * (latents.ndim - 1))

    def inputs(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Levels or times of each evaluation, `[B]`."""
        levels = self.levels.to(latents.device, wide(latents.dtype))
        own = levels.expand(-1, latents.shape[0]).contiguous()
        return own.unbind()


def table_row(
    own: Tensor,
    part: Tensor | None,
    guidance: Tensor | None,
    *,
    noise: Tensor | None = None,
    net: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Rows of a table, `[S, R, 8]`, from the factors of state and network in y and in the input.

    With guidance w the network's part is `w F + (1 - w) U`.
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


def stacked(*parts: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*parts))  # type: ignore[no-untyped-call]


def preconditioning(sigma: Tensor, data: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of EDM, or those of a denoiser."""
    if data is None:
        return torch.zeros_like(sigma), torch.ones_like(sigma), torch.ones_like(sigma)
    total = sigma.square() + data**2
    return data**2 / total, sigma * data / total.sqrt(), total.rsqrt()


def multistep_plan(
    alpha: Tensor,
    sigma: Tensor,
    levels: Tensor,
    estimate: tuple[Tensor | None, Tensor],
    guidance: Guidance | None,
    lower_order_final: bool = False,
) -> Plan:
    """The plan of DPM-Solver++(2M) on `x = alpha x_data + sigma eps`, one pass a step.

    With `q = sigma' / sigma`, `w = alpha' - alpha q` and `c = w (1 + k)` the state is
    `y = q x - w k D-`. The network's next input is `x' = y + c D`, and the next state
    `q' x' - w' k' D`: both are linear in y and D.

    Args:
        alpha, sigma: at the nodes, `[S + 1, R]`.
        levels: of the nodes, as the network has them.
        estimate: e_1, or None for 0, and e_2 of `D = e_1 x + e_2 F`, `[S, R]`.
        guidance: of the network's outputs.
        lower_order_final: whether k is 0 in the last step.
    """
    one, zero = torch.ones_like(sigma[:1]), torch.zeros_like(sigma[:1])
    q = sigma[1:] / sigma[:-1]
    w = alpha[1:] - alpha[:-1] * q
    h = (alpha / sigma).log().diff(dim=0)  # inf in a first step from noise alone, and in one to 0
    k = h[1:] / (2 * h[:-1])
    k = torch.cat((zero, torch.where(h[1:].isfinite() & h[:-1].isfinite(), k, 0.0)))
    if lower_order_final:
        k[-1] = 0.0
    c = w * (1 + k)
    own, out = estimate
    given = levels[:-1]
    weight, plain = needless(guidance, given)
    part = torch.cat((q[1:], one)) * c - torch.cat((w[1:] * k[1:], zero))
    table = table_row(
        torch.cat((q[1:], one)), part * out, weight, net=(torch.ones_like(q), c * out)
    )
    first, begun = sigma[:1], alpha[:1]
    start = table_row(q[:1] * first, q[:1] * begun, None, net=(first, begun))[0]
    ones = torch.ones_like(q)

    def describe() -> tuple[Tensor, Tensor]:
        path = stacked(levels, alpha, sigma, torch.cat((q, one)))
        of_x = torch.zeros_like(q) if own is None else own
        return path, stacked(ones, of_x, out, ones if weight is None else weight)

    return Plan(
        rows(table[:, None], start),
        given,
        sigma.shape[0] - 1,
        euler=False,
        scaled=True,
        describe=describe,
        single=True,
        plain=plain,
        pull=None if own is None else -own / out,
    )


class Traces:
    """A log-density along a plan by traces, as the flow has it in the limit of many steps.

    A denoiser's derivative `(x - D)/sigma` has the trace `(dim (1 - skip) - out in tr F)/sigma`;
    what does not depend on the network is known before. A velocity has nothing of that.
    """

    def __init__(
        self,
        networks: tuple[Network, ...],
        plan: Plan,
        density: Density,
        backend: str,
    ) -> None:
        assert plan.traces is not None
        self.plan, log_density = plan, density.start
        self.solvers = [Solver(network, density.options, density.ids) for network in networks]
        self.keys = make_keys(0, plan.steps)
        weights = plan.traces.to(log_density.device)
        row = table_row(torch.ones_like(weights), weights, plan.weight)
        table = rows(row.reshape(-1, 2, *row.shape[1:]))
        self.tracker = Tracker(backend, log_density, table)
        # What the traces are weighed by, once for all evaluations.
        weights = table[FIRST:, :, 1 : 1 + len(networks)]
        self.weights = weights.to(wide(log_density.dtype)).unbind()

    def call(self, net: Tensor, level: Tensor, index: int) -> list[Tensor]:
        found = [solver(net, level, self.keys[index]) for solver in self.solvers]
        self.tracker.advance(found, list(self.weights[index].unbind(-1)), FIRST + index)
        return [one.velocity for one in found]

    def result(self, x: Tensor) -> HeunResult:
        assert self.plan.constant is not None
        change = self.plan.constant.to(x.device) * x.shape[1:].numel()
        return HeunResult(x, *self.tracker.result(change), None, self.tracker.estimator)


class Determinants:
    """A log-density along a plan by the determinants of its steps: that of what is sampled.

    A step is two rows of the table, which are linear in the state and in the network's outputs: so
    are its Jacobians with respect to where it begins, of the state and of the network's input.
    """

    def __init__(
        self, networks: tuple[Network, ...], plan: Plan, log_density: Tensor, latents: Tensor
    ) -> None:
        self.solvers = [Solver(network, Options("exact")) for network in networks]
        table = plan.table.to(log_density.device, torch.float64)
        self.table = table[..., None, None].unbind()  # rows [R, 8, 1, 1]
        pull = plan.pull
        self.pull = None if pull is None else pull[..., None, None].to(table.device)
        self.log_density = log_density.double()
        self.dtype = wide(log_density.dtype)
        self.crossed = torch.zeros_like(self.log_density)
        self.steps = plan.steps
        d = latents.shape[1:].numel()
        self.eye = torch.eye(d, dtype=torch.float64, device=latents.device)
        self.state, self.input = self._begin(1)

    def _begin(self, row: int) -> tuple[Tensor, Tensor]:
        return self.eye, self.table[row][:, SCALE] * self.eye

    def call(self, net: Tensor, level: Tensor, index: int) -> list[Tensor]:
        found = [jacobian(solver, net, level) for solver in self.solvers]
        row = FIRST + index
        c = self.table[row]
        state, following = c[:, 0] * self.state, c[:, NET] * self.state
        for k, (_, own) in enumerate(found):
            moved = own.double() @ self.input
            if self.pull is not None:
                moved = moved - self.pull[index] * self.input
            state = state + c[:, 1 + k] * moved
            following = following + c[:, NET + 1 + k] * moved
        self.state, self.input = state, c[:, SCALE] * state + following
        if index % 2:
            sign, log_det = torch.linalg.slogdet(state)
            self.log_density = self.log_density - log_det
            self.crossed = self.crossed + (sign <= 0)
            self.state, self.input = self._begin(row)
        return [v for v, _ in found]

    def result(self, x: Tensor) -> HeunResult:
        log_density = self.log_density.to(self.dtype)
        error, share = torch.zeros_like(log_density), self.crossed.to(self.dtype) / self.steps
        return HeunResult(x, log_density, error, None, "logdet", share)


class _Editor:
    """Makes what a user wants of the states of a run."""

    def __init__(self, run: Run, plan: Plan, latents: Tensor, edits: Edits) -> None:
        self.run, self.plan, self.latents, self.edits = run, plan, latents, edits
        like = (latents.device, run.high.dtype)
        shape = (-1, *(1,) * (latents.ndim - 1))
        self.path, self.estimate = (
            [[row.reshape(shape) for row in part.to(*like)] for part in table]
            for table in plan.describe()
        )

    def put(self, x: Tensor, step: int, mask: Tensor | None = None) -> None:
        """x at the beginning of a step, or where mask is true."""
        run, factor = self.run, self.path[3][step]
        x = x.to(run.high.dtype)
        last = step == self.plan.steps
        back = 1 if last else self.estimate[0][step]
        high = factor * x
        if not last and not bool((factor == 1).all()):  # beside what is left of an output before
            high = run.high + factor * (x - back * run.net)
        net, low = x / back, None if run.low is None else torch.zeros_like(run.low)
        if mask is not None:
            high, net = torch.where(mask, high, run.high), torch.where(mask, net, run.net)
            low = None if run.low is None else torch.where(mask, 0, run.low)
        run.high, run.low, run.net = high, low, net.to(run.dtype)

    def hold(self, step: int) -> None:
        """What is known takes the noise that the others have at the beginning of a step."""
        mask, known = self.edits.mask, self.edits.known
        if mask is None:
            return
        assert known is not None
        _, alpha, sigma, _ = (part[step] for part in self.path)
        self.put(alpha * known + sigma * self.latents, step, mask)

    def ask(self, outs: list[Tensor], step: int) -> tuple[Tensor | None, bool]:
        """The samples, if a callback wants no more steps; whether it moved the state."""
        callback = self.edits.callback
        if callback is None:
            return None, False
        back, own, part, weight = (row[step] for row in self.estimate)
        x = back * self.run.net
        out = outs[0] if len(outs) == 1 else weight * outs[0] + (1 - weight) * outs[1]
        denoised: Tensor = (own * x + part * out).to(self.run.dtype)
        x = x.to(self.run.dtype)
        level = self.path[0][step].flatten().expand(x.shape[0])
        answer = callback(SamplerStep(step, self.plan.steps, level, x, denoised.clone()))
        verdict = _verdict(self.run.who, answer, denoised)
        if isinstance(verdict, Tensor):
            self.put(verdict.detach(), step)
            self.hold(step)
            return None, True
        if not verdict:
            return None, False
        mask, known = self.edits.mask, self.edits.known
        if mask is None:
            return denoised, False
        assert known is not None
        return torch.where(mask, known.to(denoised.dtype), denoised), False


def _verdict(who: str, answer: Any, like: Tensor) -> bool | Tensor:
    """What a callback returned: a bool of Python, NumPy or torch, None, or a state."""
    if answer is None or isinstance(answer, bool | np.bool_):
        return bool(answer)
    wanted, got = "True, False, None or the state", type(answer).__name__
    if isinstance(answer, np.ndarray | Tensor):
        if answer.ndim == 0 and answer.dtype in (torch.bool, np.bool_):
            return bool(answer)
        got += f" {tuple(answer.shape)} of {answer.dtype}"
    if isinstance(answer, Tensor) and answer.dtype == like.dtype:
        if answer.shape == like.shape and answer.device == like.device:
            return answer
        shape = f"{tuple(like.shape)} on {like.device}"
        raise ValueError(
            f"{who}: callback must return {wanted}, {shape}, got {got} on {answer.device}"
        )
    raise TypeError(f"{who}: callback must return {wanted}, of {like.dtype}, got {got}")


def follow(
    run: Run,
    networks: tuple[Network, ...],
    inputs: tuple[Tensor, ...],
    plan: Plan,
    tracked: Traces | Determinants | None,
    progress: bool,
    editor: _Editor | None = None,
    pulls: Tensor | None = None,
) -> Tensor:
    """Take a plan's steps."""

    def evaluate(net: Tensor, index: int, step: int) -> list[Tensor]:
        if tracked is not None:
            return [run.accept(out, step) for out in tracked.call(net, inputs[index], index)]
        called = networks[:1] if index in plan.plain else networks
        outs = [run.call(network, inputs[index], step) for network in called]
        if len(outs) == 2 and _share_memory(*outs):
            raise ValueError(
                f"{run.who}: the networks must return tensors of their own, got one buffer from"
                f" both at step {step}"
            )
        return outs

    def pulled(outs: list[Tensor], index: int) -> list[Tensor]:
        return outs if pulls is None else [out - pulls[index] * run.net for out in outs]

    def alone(net: Tensor, index: int, step: int) -> list[Tensor]:
        return [run.call(network, inputs[index], step)]

    network, advance = networks[0], run.advance
    call = alone if tracked is None and len(networks) == 1 else evaluate
    start = None if editor is None else editor.edits.start
    advance([] if start is None else [start], 1, 0)
    for step in _steps(plan.steps, progress):
        index = step if plan.single else 2 * step
        if editor is not None:
            editor.hold(step)
        first = call(run.net, index, step)
        if editor is not None:
            ended, moved = editor.ask(first, step)
            if ended is not None:
                return ended
            if moved:
                first = call(run.net, index, step)
        first = pulled(first, index)
        if plan.single or (plan.euler and step == plan.steps - 1):
            advance(first, FIRST + index, step)
            continue
        advance(first, FIRST + index, step, middle=True)
        second = pulled(call(run.net, index + 1, step), index + 1)
        advance(second, FIRST + index + 1, step)
    if editor is not None:
        editor.hold(plan.steps)
    return run.finish()


def sample(
    who: str,
    networks: tuple[Network, ...],
    latents: Tensor,
    plan: Plan,
    how: tuple[str, str, bool | None],
    *,
    seeds: Tensor | None,
    edits: Edits,
    density: Density | None = None,
    progress: bool = False,
) -> Tensor | HeunResult:
    """Follow a plan from noise; `how` is the backend, the state's precision, and the check."""
    backend, state, check_finite = how
    tracked: Traces | Determinants | None = None
    if density is not None and density.tracker == "logdet":
        tracked = Determinants(networks, plan, density.start, latents)
    elif density is not None:
        tracked = Traces(networks, plan, density, backend)
    table = plan.table.to(latents.device)
    run = Run(*(who, backend, latents, table, state, check_finite), scaled=plan.scaled, seeds=seeds)
    editor = None if edits.none else _Editor(run, plan, latents, edits)
    inputs, pulls = plan.inputs(latents), plan.pulls(latents)
    out = follow(run, networks, inputs, plan, tracked, progress, editor, pulls)
    return out if tracked is None else tracked.result(out)


def needless(guidance: Guidance | None, levels: Tensor) -> tuple[Tensor | None, frozenset[int]]:
    """Weights at the levels of all evaluations, and those where all are 1."""
    if guidance is None:
        return None, frozenset()
    weight = guidance.at(levels)
    if guidance.constant:
        return weight, frozenset(range(len(levels)) if bool((weight[0] == 1).all()) else ())
    return weight, frozenset((weight == 1).all(-1).nonzero().flatten().tolist())


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_compiling() or is_transformed() or not a.numel():
        return False
    return a.data_ptr() == b.data_ptr()


def _steps(count: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(count)
    from tqdm import tqdm  # type: ignore[import-untyped]

    return cast(Iterable[int], tqdm(range(count), desc="sampling", unit="step"))
