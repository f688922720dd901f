"""Log-densities along the steps of an ODE solver, by traces or by the steps' own determinants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep._names import Backend, Check, Engine, Estimator, OdeMethod, Probe, Tracker
from fewstep._results import brief
from fewstep._torch import exactly, to_random_state, wide
from fewstep.ops.dual import dispatch
from fewstep.ops.trace import replicas
from fewstep.ops.trace.estimator import Divergence, Solver, population
from fewstep.ops.trace.inputs import (
    Options,
    check_ids,
    check_problem,
    check_times,
    make_keys,
)
from fewstep.ops.trace.steps import euler, heun
from fewstep.reference import trace as reference

METHODS = ("euler", "heun")
TRACKERS = ("trace", "logdet", "series")
_TERMS = 8  # of the series; the radius estimated from them must stay below 1


@dataclass(frozen=True)
class LogDensity:
    """What `log_density` returns.

    Attributes:
        x: state at the last time, of the shape and dtype of the input.
        log_prob: log-density `[B]` of the input, or with `base_at="start"` of x, in float32 at
            least.
        stderr: standard error of `log_prob` over the probes, `[B]`. It is 0 where traces are exact
            and NaN for a single probe.
        nonpositive: share of steps whose determinant is not positive, `[B]`, for "logdet". Such a
            step is not invertible along the path. None for other trackers.
        estimator: estimator of the traces, as in `fewstep.divergence`, or the tracker.
        info: note on the engine, as in `fewstep.divergence`.
    """

    x: Tensor
    log_prob: Tensor
    stderr: Tensor
    nonpositive: Tensor | None
    estimator: str
    info: str = ""

    __repr__ = brief


@dataclass(frozen=True)
class Path:
    """A tracked path: where it ends, and `change = log q(x_end) - log q(x_start)`, `[B]`."""

    x: Tensor
    change: Tensor
    variance: Tensor
    nonpositive: Tensor | None
    estimator: str
    info: str


def standard_normal(x: Tensor) -> Tensor:
    """Log-density of `N(0, I)`, `[B]`."""
    flat = x.flatten(1)
    return -0.5 * flat.square().sum(1) - 0.5 * flat.shape[1] * math.log(2 * math.pi)


def log_density(
    velocity: Callable[..., Any],
    x: Tensor,
    *,
    times: Tensor | Sequence[float],
    base: Callable[[Tensor], Tensor] | None = None,
    base_at: str = "end",
    method: OdeMethod = "heun",
    tracker: Tracker = "trace",
    estimator: Estimator = "auto",
    probes: int = 1,
    probe: Probe = "rademacher",
    fresh: bool = True,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    tangent_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    engine: Engine | None = None,
    check: Check = "first",
) -> LogDensity:
    """Log-density of samples that a velocity field carries from or to a known law.

    Along `dx/dt = v(x, t)` log-densities change by `-int tr J dt`, with J the Jacobian of v. A step
    `x + h v` changes them by exactly `-log |det(I + h J)|`. Three trackers are available:

        trace   -h tr J (Euler), -h/2 (tr J1 + tr J2) (Heun): the solver on the pair (x, log q). It
                is off by `h^2 / 2 tr J^2` a step, which few-step students learn to exploit.
        logdet  -log |det M|, M = I + h J (Euler), I + h/2 (J1 + J2 (I + h J1)) (Heun): the density
                of the sampler that is run, where its steps are injective. It takes D tangents and a
                determinant a step, so it is for small D.
        series  the same for large D, by `log det(I + A) = sum_n (-1)^(n+1) tr A^n / n` with probes,
                cut after 8 terms. The spectral radius of A must be below 1.

    Args:
        velocity (Callable): velocity as for `fewstep.divergence`, called with x in its dtype and t
            `[B]`.
        x (Tensor): `[B, ...]`, at the first time. For bfloat16 and float16 the state, times and
            densities are float32.
        times (Tensor | Sequence[float]): nodes of the steps, `[S + 1]`, or `[B, S + 1]` for nodes
            of each sample. They increase, or decrease, at every step of a sample. With the
            default base and `base_at` they go from the data to the noise: from 1 to 0 where a flow
            has its data at 1.
        base (Callable | None): log-density `[B]` of the known law. Default: that of N(0, I).
        base_at (str): "end" if the law at the last time is known; `log_prob` is then that of x.
            "start" if x was drawn from the known law; `log_prob` is then that of the samples at the
            last time.
        method (str): "heun" or "euler".
        tracker (str): "trace", "logdet" or "series", as above.
        estimator, probes, probe, sample_ids, tangent_dtype, backend, engine, check: options of
            `fewstep.divergence`. Estimators are for "trace", probes for "series" too.
        fresh (bool): whether each stage has new probes, so that their errors average out over a
            path. Otherwise all stages have those of the first. Adaptive solvers need that, and
            products of probes with the first and last layer's weights are then kept.
        seed (int | Tensor): seed of the probes. Steps and stages count on from it.

    Returns:
        LogDensity: differentiable with respect to parameters and x.

    Raises:
        ValueError: an argument that `fewstep.divergence` refuses; fewer than two times, or on the
            CPU times that are not finite or not strictly monotone; an unknown method or tracker; a
            base of another shape; "series" with a spectral radius of 1 or more.

    Source: Chen et al., Neural ODEs, 2018, theorem 1; Grathwohl et al., FFJORD, 2019.

    >>> import fewstep
    >>> decay = lambda x, t: -x  # x(t) = e^-t x(0), and log q rises by D t
    >>> x = torch.zeros(3, 2)
    >>> out = fewstep.log_density(decay, x, times=torch.linspace(0, 1, 21), base_at="start")
    >>> bool((out.log_prob - (2.0 - math.log(2 * math.pi))).abs().max() < 1e-5)
    True
    """
    options = Options(estimator, probes, probe, backend, tangent_dtype, engine, check)
    check_problem(options, x, "log_density")
    nodes = check_times("log_density", times, x)
    if method not in METHODS:
        raise ValueError(f"log_density: method must be one of {METHODS}, got {method!r}")
    if tracker not in TRACKERS:
        raise ValueError(f"log_density: tracker must be one of {TRACKERS}, got {tracker!r}")
    if base_at not in ("start", "end"):
        raise ValueError(f"log_density: base_at must be 'start' or 'end', got {base_at!r}")
    base = standard_normal if base is None else base
    path = track(
        *(velocity, x, nodes, options),
        method=method,
        tracker=tracker,
        fresh=fresh,
        seed=seed,
        ids=check_ids(sample_ids, x, "log_density"),
    )
    known = base(x.to(path.x.dtype) if base_at == "start" else path.x)
    if not isinstance(known, Tensor) or tuple(known.shape) != (x.shape[0],):
        got = tuple(known.shape) if isinstance(known, Tensor) else type(known).__name__
        raise ValueError(f"log_density: base must return ({x.shape[0]},), got {got}")
    log_prob = known + path.change if base_at == "start" else known - path.change
    error = path.variance.sqrt()
    rest = path.nonpositive, path.estimator, path.info
    return LogDensity(path.x.to(x.dtype), log_prob, error, *rest)


def track(
    velocity: Callable[..., Any],
    x: Tensor,
    times: Tensor,
    options: Options,
    *,
    method: OdeMethod = "euler",
    tracker: Tracker = "trace",
    fresh: bool = True,
    seed: int | Tensor = 0,
    ids: Tensor | None = None,
) -> Path:
    """Steps through times `[1 or B, S + 1]` and the change of log-density along them.

    The state and all sums are in float32 at least; the velocity is called with x's dtype.
    """
    solver = _Wide(Solver(velocity, options, ids, fixed=not fresh, cache={}), x.dtype)
    rest = method, tracker, fresh, seed
    return replicas.together(velocity, lambda: _track(solver, x, times, options, *rest))


def _track(
    solver: _Wide,
    x: Tensor,
    times: Tensor,
    options: Options,
    method: OdeMethod,
    tracker: str,
    fresh: bool,
    seed: int | Tensor,
) -> Path:
    x = x.to(solver.dtype)
    change = x.new_zeros(x.shape[0])
    variance = torch.zeros_like(change)
    crossed: Tensor | None = None
    name: str = tracker
    twice = method == "heun"
    nodes = times.expand(x.shape[0], -1).T
    lengths = nodes.diff(dim=0).to(x.dtype).contiguous()
    nodes = nodes.to(x.dtype).contiguous()
    steps = lengths.shape[0]
    keys = make_keys(seed, steps, fresh=fresh)
    for step, (t, following, h) in enumerate(zip(nodes[:-1], nodes[1:], lengths, strict=True)):
        if tracker == "trace":
            first = solver(x, t, keys[2 * step])
            name = first.estimator
            if twice:
                middle = euler(x, first.velocity, h)
                second = solver(middle, following, keys[2 * step + 1])
                x = heun(x, first.velocity, second.velocity, h)
                change = heun(change, first.value, second.value, -h)
            else:
                x, change = euler(x, first.velocity, h), euler(change, first.value, -h)
            if options.probes > 1 and not name.startswith("exact"):
                spread = first.stderr.square()
                if twice:
                    spread = (spread + second.stderr.square()) / 4
                variance = variance + h.square() * spread
            continue
        if tracker == "logdet":
            x, log_det, sign = _determinant(solver, x, t, following, h, twice)
            below = (sign <= 0).to(x.dtype)
            crossed = below if crossed is None else crossed + below
        else:
            x, log_det, spread = _series(solver, x, t, following, h, twice, keys[2 * step])
            variance = variance + spread
        change = change - log_det
    if tracker == "trace" and options.probes == 1 and not name.startswith("exact"):
        variance = torch.full_like(variance, math.nan)
    crossed = None if crossed is None else crossed / steps
    return Path(x, change, variance, crossed, name, solver.solver.info)


@dataclass
class _Wide:
    """A solver called in the dtype `low` whose results have that of the state, `dtype`."""

    solver: Solver
    low: torch.dtype

    def __post_init__(self) -> None:
        self.dtype = wide(self.low)
        self.same = self.dtype == self.low

    def __call__(self, x: Tensor, t: Tensor, key: Tensor) -> Divergence:
        found = self.solver(x if self.same else x.to(self.low), t, key)
        if found.velocity.dtype == found.value.dtype == self.dtype:
            return found
        return replace(
            found,
            velocity=found.velocity.to(self.dtype),
            value=found.value.to(self.dtype),
            stderr=found.stderr.to(self.dtype),
        )

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        v = reference.checked(self.solver.run(x.to(self.low), t), x)
        return v.to(self.dtype)

    def jacobian(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        v, j = jacobian(self.solver, x.to(self.low), t)
        return v.to(self.dtype), j.to(self.dtype)

    def products(self, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, bool]:
        """`J v_k`, or `J' v_k` and True where duals do not serve."""
        _, found, transposed = self.solver.products(x.to(self.low), t, v.to(self.low))
        return found.to(self.dtype), transposed

    def probes(self, x: Tensor, key: Tensor) -> tuple[Tensor, float]:
        """Probes `[K, B, ...]`, and how many there are where they are drawn without replacement.

        As many "hadamard" ones as dimensions are the coordinates themselves, scaled: exact.
        """
        options, d = self.solver.options, x.shape[1:].numel()
        if options.probe == "hadamard" and options.probes == d:
            basis = math.sqrt(d) * torch.eye(d, dtype=x.dtype, device=x.device)
            return basis.reshape(d, 1, *x.shape[1:]).expand(d, *x.shape), d
        like = x.detach().to(self.low)
        name = self.solver.backend(like)
        v = dispatch.probe(name, like, key, self.solver.ids, options.probes, options.probe)
        return v.to(self.dtype), population(options.probe, d)


def jacobian(solver: Solver, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and `J`, `[B, D, D]`, by D tangents."""
    d = x.shape[1:].numel()
    basis = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])
    v, columns, transposed = solver.products(x, t, basis)
    return v, columns.flatten(2).movedim(0, 1 if transposed else 2)


def _determinant(
    solver: _Wide, x: Tensor, t: Tensor, following: Tensor, h: Tensor, twice: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The next x, and `log |det M|` and the determinant's sign, `[B]`."""
    hm = h.reshape(-1, 1, 1)
    v1, j1 = solver.jacobian(x, t)
    eye = torch.eye(j1.shape[-1], dtype=x.dtype, device=x.device)
    if twice:
        v2, j2 = solver.jacobian(euler(x, v1, h), following)
        x = heun(x, v1, v2, h)
        with exactly(x.device):
            m = eye + hm / 2 * (j1 + j2 @ (eye + hm * j1))
    else:
        x = euler(x, v1, h)
        m = eye + hm * j1
    sign, log_det = torch.linalg.slogdet(m)
    return x, log_det, sign.detach()


def _series(
    solver: _Wide, x: Tensor, t: Tensor, following: Tensor, h: Tensor, twice: bool, key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The next x, and `log det(I + A)` and its variance over probes, `[B]`."""
    long = h.reshape(-1, *(1,) * (x.ndim - 1))
    v, count = solver.probes(x, key)
    to_first = to_random_state(x)
    k1 = solver.velocity(x, t)
    end = middle = euler(x, k1, h)
    to_second = to_random_state(x)
    if twice:
        end = heun(x, k1, solver.velocity(middle, following), h)
    to_end = to_random_state(x)

    def first(u: Tensor) -> tuple[Tensor, bool]:
        to_first()
        return solver.products(x, t, u)

    def second(u: Tensor) -> Tensor:
        to_second()
        return solver.products(middle, following, u)[0]

    w, total = v, x.new_zeros(v.shape[:2])
    for n in range(1, _TERMS + 1):
        own, transposed = first(w)
        if twice and transposed:  # A' = h/2 (J1' + (I + h J1') J2')
            u = second(w)
            own = (first(w + long * u)[0] + u) / 2
        elif twice:
            own = (own + second(w + long * own)) / 2
        w = long * own
        total = total + (-1) ** (n + 1) / n * (v * w).flatten(2).sum(2)
    to_end()
    size = w.detach().flatten(2).norm(dim=2) / v.flatten(2).norm(dim=2)
    radius = size.max() ** (1 / _TERMS) if size.numel() else size.sum()
    if not torch.compiler.is_compiling() and not float(radius) < 1:
        raise ValueError(
            f"log_density: tracker 'series' needs steps with a spectral radius of h J below 1,"
            f" got {float(radius):.3g}; take shorter steps or tracker 'logdet'"
        )
    return end, total.mean(0), reference.standard_error(total, count).square()
