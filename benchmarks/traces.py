"""Contenders of the trace family: the divergence of an MLP and what others do for it.

A builder `TraceProblem -> Run` makes the network and the probes, untimed. Outputs are the value
`[B]` and the velocity; of training the value and gradients; of a log-density that alone; of "plain"
what costs the same without a divergence. `Run.more` has further columns of the CSV file.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.registry import TraceProblem
from benchmarks.timing import Beside, saved_mb
from fewstep._names import Backend

Velocity = Callable[[Tensor, Tensor], Tensor]
_SEED = 0


class MLP(nn.Module):
    """Linear layers on `[x, t]` with SiLU between them, LayerNorm before it where `norm`."""

    def __init__(self, d: int, width: int, layers: int, norm: bool = False) -> None:
        super().__init__()
        widths = [d + 1, *[width] * (layers - 1), d]
        modules: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            if i > 0:
                modules += [nn.LayerNorm(a)] * norm + [nn.SiLU()]
            modules.append(nn.Linear(a, b))
        self.net = nn.Sequential(*modules)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x, t[:, None]], 1))
        return out


def network(problem: TraceProblem) -> MLP:
    """Of the seed's weights, scaled so that its Jacobian is not negligible; digits are fitted."""
    case = problem.case
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        net = MLP(case.d, case.width, case.layers, case.norm)
        if case.workload == "log-density":
            _fit(net)
    return net.to(torch.as_tensor(problem.x).dtype)


def _digits() -> Tensor:
    from fewstep.data.images import load

    return load("digits").images.flatten(1)


def _fit(net: MLP, steps: int = 400) -> None:
    """Flow matching on the digits, from data at 0 to noise at 1."""
    data, optimizer = _digits(), torch.optim.Adam(net.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(steps):
        x = data[torch.randint(len(data), (256,), generator=generator)]
        t, eps = torch.rand(256, generator=generator), torch.randn(x.shape, generator=generator)
        loss = (net(x + t[:, None] * (eps - x), t) - (eps - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def probes_of(problem: TraceProblem, kind: str, step: int = 0, stage: int = 0) -> Tensor:
    """`[K, B, D]`, those that `fewstep` draws for itself."""
    from fewstep.reference.probe import probes

    case, like = problem.case, torch.as_tensor(problem.x)
    key = torch.tensor((_SEED, step, stage))
    return probes(key, None, (case.probes, *like.shape), kind, like.dtype)


@dataclass(frozen=True)
class Setup:
    """What every contender of a problem starts from."""

    problem: TraceProblem
    net: MLP
    x: Tensor
    t: Tensor


def setup(problem: TraceProblem) -> Setup:
    x, t = torch.as_tensor(problem.x), torch.as_tensor(problem.t)
    if problem.case.workload == "log-density":
        x = _digits()[: problem.case.batch].to(x.dtype)
    return Setup(problem, network(problem), x, t)


Divergence = Callable[[Velocity, Tensor, Tensor], tuple[Tensor, Tensor]]


def reverse(v: Tensor | None, create_graph: bool) -> Divergence:
    """A reverse pass for each probe, or without probes for each dimension."""

    def divergence(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = x.detach().requires_grad_(True)
            out = velocity(y, t)
            total = torch.zeros(())
            count = y.shape[1] if v is None else len(v)
            for k in range(count):
                graph = create_graph or k < count - 1
                if v is None:
                    (g,) = torch.autograd.grad(
                        out[:, k].sum(), y, create_graph=create_graph, retain_graph=graph
                    )
                    total = total + g[:, k]
                else:
                    (g,) = torch.autograd.grad(
                        out, y, v[k], create_graph=create_graph, retain_graph=graph
                    )
                    total = total + (g * v[k]).sum(1)
        return out, total / (1 if v is None else count)

    return divergence


def torch_func(v: Tensor | None) -> Divergence:
    def divergence(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        def field(y: Tensor) -> Tensor:
            return velocity(y, t)

        if v is None:
            basis = torch.eye(x.shape[1], dtype=x.dtype)[:, None].expand(-1, *x.shape)
            out, pullback, *_ = torch.func.vjp(field, x)
            rows = torch.func.vmap(lambda u: pullback(u)[0])(basis)
            return out, rows.diagonal(dim1=0, dim2=2).sum(1)
        if len(v) == 1:
            out, tangent, *_ = torch.func.jvp(field, (x,), (v[0],))
            return out, (tangent * v[0]).sum(1)
        out = field(x)
        tangents = torch.func.vmap(lambda u: torch.func.jvp(field, (x,), (u,))[1])(v)
        return out, (tangents * v).sum(2).mean(0)

    return divergence


def batched(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """zuko's exact trace: one batched reverse pass with the identity."""
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        out = velocity(y, t)
        eye = torch.eye(y.shape[1], dtype=y.dtype)[:, None].expand(-1, *y.shape)
        (rows,) = torch.autograd.grad(out, y, eye, is_grads_batched=True)
    return out, rows.diagonal(dim1=0, dim2=2).sum(1)


def autocast(divergence: Divergence) -> Divergence:
    def cast(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16):
            out, value = divergence(velocity, x, t)
        return out.float(), value.float()

    return cast


def compiled(divergence: Divergence, net: MLP) -> Divergence:
    """The divergence of one network."""
    call = torch.compile(lambda x, t: divergence(net, x, t), fullgraph=True, dynamic=False)
    return lambda velocity, x, t: call(x, t)


def fewstep_divergence(
    problem: TraceProblem, backend: Backend, tangent_dtype: torch.dtype | None = None
) -> Divergence:
    import fewstep

    case = problem.case

    def divergence(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        out = fewstep.divergence(
            *(velocity, x, t),
            estimator=case.estimator,
            probes=case.probes,
            seed=_SEED,
            tangent_dtype=tangent_dtype,
            backend=backend,
        )
        return out.velocity, out.value

    return divergence


def _divergence_of(problem: TraceProblem, who: str) -> Divergence:
    exact = problem.case.estimator == "exact"
    ours: dict[str, Backend] = {"cpp": "cpp", "reference": "reference"}
    if who in ours:
        return fewstep_divergence(problem, ours[who])
    if who == "cpp-bf16":
        return fewstep_divergence(problem, "cpp", torch.bfloat16)
    if who == "zuko":
        return batched
    kind = "gaussian" if who == "ffjord" else "rademacher"
    v = None if exact else probes_of(problem, kind)
    training = problem.case.workload == "trace-training"
    if who in ("torch-func", "compile"):
        return torch_func(v)
    if who == "autocast":
        return autocast(reverse(v, create_graph=training))
    return reverse(v, create_graph=who == "ffjord" or training)


def trace(problem: TraceProblem, who: str) -> Callable[[], tuple[Any, ...]]:
    s = setup(problem)
    divergence = _divergence_of(problem, who)
    if who == "compile":
        divergence = compiled(divergence, s.net)

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        velocity, value = divergence(s.net, s.x, s.t)
        return value.detach(), velocity.detach()

    return run


def trace_in_solve(problem: TraceProblem) -> Callable[[], tuple[Any, ...]]:
    """A call in the middle of a solve with fixed probes: nothing that the weights give is new."""
    from fewstep.ops.trace.estimator import Solver
    from fewstep.ops.trace.inputs import Options, make_key

    s, case = setup(problem), problem.case
    solver = Solver(s.net, Options(case.estimator, case.probes), fixed=True, cache={})
    key = make_key(_SEED)

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        out = solver(s.x, s.t, key)
        return out.value, out.velocity

    return run


class Training:
    """Gradients of `mean v^2 + mean tr J`, and the bytes that forward keeps for them."""

    def __init__(self, problem: TraceProblem, who: str) -> None:
        self.s = setup(problem)
        self.divergence = None if who == "plain" else _divergence_of(problem, who)
        self.parameters = list(self.s.net.parameters())

    def forward(self) -> tuple[Tensor, Tensor]:
        s = self.s
        if self.divergence is None:
            velocity = s.net(s.x, s.t)
            return velocity, velocity.new_zeros(len(velocity))
        return self.divergence(s.net, s.x, s.t)

    def __call__(self) -> tuple[Any, ...]:
        velocity, value = self.forward()
        loss = velocity.square().mean() + value.mean()
        grads = torch.autograd.grad(loss, self.parameters)
        first = velocity if self.divergence is None else value
        return first.detach(), grads[0], grads[2], grads[-2]

    def more(self) -> dict[str, float]:
        return {"saved_mb": saved_mb(self.forward, self.parameters)}


def heun(s: Setup, divergence: Sequence[Divergence] | None) -> tuple[Tensor, Tensor]:
    """x and `int tr J dt` after the steps of Heun from 0 to 1; a divergence for each stage."""
    steps = s.problem.case.steps or 1
    h, x, total = 1 / steps, s.x, s.x.new_zeros(len(s.x))
    for step in range(steps):
        t = s.t.new_full((len(x),), step * h)
        if divergence is None:
            v1 = s.net(x, t)
            v2 = s.net(x + h * v1, t + h)
        else:
            v1, d1 = divergence[2 * step](s.net, x, t)
            v2, d2 = divergence[2 * step + 1](s.net, x + h * v1, t + h)
            total = total + h / 2 * (d1 + d2)
        x = (x + h / 2 * (v1 + v2)).detach()
    return x, total.detach()


def _normal(x: Tensor) -> Tensor:
    each: Tensor = torch.distributions.Normal(0.0, 1.0).log_prob(x)  # type: ignore[no-untyped-call]
    return each.sum(1)


class LogDensity:
    """`log p` of the digits, and its error against the exact trace."""

    def __init__(self, problem: TraceProblem, who: str) -> None:
        self.s, self.who, self.case = setup(problem), who, problem.case
        self.times = torch.linspace(0, 1, (self.case.steps or 1) + 1, dtype=self.s.x.dtype)
        stages = 2 * (self.case.steps or 1)
        self.divergence: Sequence[Divergence] | None = None
        if who in ("reverse", "ffjord"):
            self.divergence = [_divergence_of(problem, who)] * stages
        elif who == "fresh":
            self.divergence = [
                reverse(probes_of(problem, "rademacher", i // 2, i % 2), False)
                for i in range(stages)
            ]
        elif who == "exact":
            self.divergence = [reverse(None, False)] * stages

    def ours(self, estimator: str, backend: str, fresh: bool = True) -> Tensor:
        import fewstep

        probes = self.case.probes
        options: dict[str, Any] = {"estimator": estimator, "probes": probes, "backend": backend}
        return fewstep.log_density(
            *(self.s.net, self.s.x),
            times=self.times,
            fresh=fresh,
            seed=_SEED,
            **options,
        ).log_prob

    @torch.no_grad()
    def __call__(self) -> tuple[Any, ...]:
        if self.who in ("cpp", "cpp-solve", "reference"):
            backend = "reference" if self.who == "reference" else "cpp"
            return (self.ours(self.case.estimator, backend, self.who != "cpp-solve"),)
        x, total = heun(self.s, self.divergence)
        return (x,) if self.divergence is None else (_normal(x) + total,)

    @torch.no_grad()
    def more(self) -> dict[str, float]:
        if self.who == "plain":
            return {}
        error = self()[0] - self.ours("exact", "cpp")
        return {"rmse": float(error.square().mean().sqrt())}


def _plain(problem: TraceProblem) -> Callable[[], tuple[Any, ...]]:
    s = setup(problem)

    @torch.no_grad()
    def run() -> tuple[Tensor]:
        return (s.net(s.x, s.t),)

    return run


def _log_density(problem: TraceProblem) -> LogDensity:
    return LogDensity(problem, "exact" if problem.case.estimator == "exact" else "fresh")


_TRACED = (
    *("cpp", "cpp-bf16", "reference", "reverse", "ffjord", "autocast"),
    *("torch-func", "compile", "zuko"),
)
_PLAIN: dict[str, Callable[[TraceProblem], Any]] = {
    "trace": _plain,
    "trace-training": functools.partial(Training, who="plain"),
    "log-density": functools.partial(LogDensity, who="plain"),
}
_RUNS: dict[tuple[str, str], Callable[[TraceProblem], Any]] = {
    **{("trace", who): functools.partial(trace, who=who) for who in _TRACED},
    **{
        ("trace-training", who): functools.partial(Training, who=who)
        for who in ("cpp", "cpp-bf16", "reference", "reverse", "ffjord", "autocast")
    },
    **{
        ("log-density", who): functools.partial(LogDensity, who=who)
        for who in ("cpp", "cpp-solve", "reference", "reverse", "ffjord")
    },
    ("trace", "cpp-solve"): trace_in_solve,
}
BUILDERS: dict[tuple[str, str], Callable[[TraceProblem], Any]] = {
    **{(workload, "plain"): build for workload, build in _PLAIN.items()},
    **{
        (workload, who): functools.partial(Beside, build=build, alone=_PLAIN[workload])
        if who.startswith("cpp")
        else build
        for (workload, who), build in _RUNS.items()
    },
}
DEFINITIONS: dict[str, Callable[[TraceProblem], Any]] = {
    "trace": functools.partial(trace, who="reverse"),
    "trace-gaussian": functools.partial(trace, who="ffjord"),
    "trace-training": functools.partial(Training, who="reverse"),
    "trace-training-gaussian": functools.partial(Training, who="ffjord"),
    "log-density": _log_density,
    "log-density-fixed": functools.partial(LogDensity, who="reverse"),
    "log-density-fixed-gaussian": functools.partial(LogDensity, who="ffjord"),
    **{f"plain-{workload}": build for workload, build in _PLAIN.items()},
}
