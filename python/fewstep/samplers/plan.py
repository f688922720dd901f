"""The passes over a state between two calls of a network, as tables of coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fewstep._torch import is_transformed, wide
from fewstep.ops.heun.engine import FIRST, Run, Tracker, rows
from fewstep.ops.heun.solve import HeunResult
from fewstep.ops.trace.estimator import Solver
from fewstep.ops.trace.inputs import Options, make_keys
from fewstep.ops.trace.log_density import jacobian
from fewstep.reference.heun import NET, SCALE

Network = Callable[[Tensor, Tensor], Tensor]
_MOST_CHURN = math.sqrt(2) - 1  # of a level, a step: Karras et al., section 4


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
class Plan:
    """A sampler as a table of passes and what its network is called with.

    Attributes:
        table: float64 `[K, R, 8]`, see `fewstep.reference.heun`.
        levels: level or time of evaluation 2 s + i, i = 0, 1, of step s, float64 `[2 S, R]`.
        steps: number S of steps.
        euler: whether the last step has one evaluation.
        scaled: whether the network's input is not the state itself.
        traces: weights of the traces of each evaluation in the change of log-density, `[2 S, R]`.
        constant: part of that change that depends on no trace, for each dimension, `[R]`.
    """

    table: Tensor
    levels: Tensor
    steps: int
    euler: bool
    scaled: bool
    traces: Tensor | None = None
    constant: Tensor | None = None

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


def preconditioning(sigma: Tensor, data: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of EDM, or those of a denoiser."""
    if data is None:
        return torch.zeros_like(sigma), torch.ones_like(sigma), torch.ones_like(sigma)
    total = sigma.square() + data**2
    return data**2 / total, sigma * data / total.sqrt(), total.rsqrt()


class Traces:
    """A log-density along a plan by traces, as the flow has it in the limit of many steps.

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
        ids: Tensor | None = None,
    ) -> None:
        assert plan.traces is not None
        self.plan = plan
        self.solvers = [Solver(network, options, ids) for network in networks]
        self.keys = make_keys(0, plan.steps)
        weights = plan.traces.to(log_density.device)
        row = table_row(torch.ones_like(weights), weights, guidance)
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


def follow(
    run: Run,
    networks: tuple[Network, ...],
    inputs: tuple[Tensor, ...],
    plan: Plan,
    tracked: Traces | Determinants | None,
    progress: bool,
) -> Tensor:
    """Take a plan's steps."""

    def evaluate(net: Tensor, index: int, step: int) -> list[Tensor]:
        if tracked is not None:
            return [run.accept(out, step) for out in tracked.call(net, inputs[index], index)]
        outs = [run.call(network, inputs[index], step) for network in networks]
        if len(outs) == 2 and _share_memory(*outs):
            raise ValueError(
                f"{run.who}: the networks must return tensors of their own, got one buffer from"
                f" both at step {step}"
            )
        return outs

    def alone(net: Tensor, index: int, step: int) -> list[Tensor]:
        return [run.call(network, inputs[index], step)]

    network, advance = networks[0], run.advance
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
