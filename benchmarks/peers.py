"""Every contender as a function that solves one drawn problem and returns only when it is done.

A builder `Problem -> Run` converts the inputs and chooses the options, untimed; the `Run` that it
returns computes everything from the points on: `(value [B],)` or `(value, grad_x, grad_y)` of a
solve or a divergence, `(rms, velocity)` of a drift. The other families say what theirs return in
their own modules. Libraries solve `|x-y|^2` at `eps / scale`,
which is the same problem in another unit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import attentions, heuns, jvps, traces
from benchmarks.dense import (
    dense_drift,
    divergence_averaged,
    divergence_dual,
    sinkhorn_averaged,
    sinkhorn_eager,
)
from benchmarks.registry import STREAMED, Problem
from fewstep._names import Backend

Run = Callable[[], tuple[Any, ...]]
Divergence = Callable[[Tensor, Tensor, Sequence[float], float], Tensor]


def _run_torch(problem: Problem, solve: Callable[[Tensor, Tensor], Tensor]) -> Run:
    backward = problem.case.backward
    x, y = (
        torch.as_tensor(p, device=problem.device).requires_grad_(backward)
        for p in (problem.x, problem.y)
    )

    def run() -> tuple[Tensor, ...]:
        value = solve(x, y)
        gradients = torch.autograd.grad(value.sum(), (x, y)) if backward else ()
        if x.is_cuda:
            torch.cuda.synchronize()
        return value.detach(), *gradients

    return run


def _run_drift(
    problem: Problem, drift: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Run:
    clouds = [
        torch.as_tensor(p, device=problem.device) for p in (problem.x, problem.y, problem.x_self)
    ]

    def run() -> tuple[Tensor, Tensor]:
        out = drift(*clouds)
        if clouds[0].is_cuda:
            torch.cuda.synchronize()
        return out

    return run


def _fewstep(problem: Problem, backend: Backend, memory_limit: int = 2**27) -> Run:
    import fewstep

    def solve(x: Tensor, y: Tensor) -> Tensor:
        return fewstep.sinkhorn(
            x,
            y,
            eps=problem.eps,
            cost=problem.case.cost,
            max_iter=problem.iterations,
            memory_limit=memory_limit,
            backend=backend,
        ).value

    return _run_torch(problem, solve)


def _fewstep_divergence(problem: Problem, backend: Backend) -> Run:
    """The schedule less its last two sweeps, which `max_iter=1` adds: average, then in full.

    The last one is alternating between x and y, where geomloss's takes both from the old ones.
    """
    import fewstep

    # geomloss's default schedule is short of convergence, for everybody alike.
    warnings.filterwarnings("ignore", "sinkhorn_divergence: not converged")

    def solve(x: Tensor, y: Tensor) -> Tensor:
        return fewstep.sinkhorn_divergence(
            x,
            y,
            eps=problem.eps,
            cost=problem.case.cost,
            update="symmetric",
            anneal=problem.temperatures[:-2],
            max_iter=1,
            backend=backend,
        ).value

    return _run_torch(problem, solve)


def _fewstep_drift(problem: Problem, backend: Backend) -> Run:
    import fewstep

    def drift(x: Tensor, y: Tensor, x_self: Tensor) -> tuple[Tensor, Tensor]:
        out = fewstep.sinkhorn_drift(
            x,
            y,
            x_self,
            eps=problem.temperatures,
            max_iter=problem.iterations,
            cost=problem.case.cost,
            form=problem.case.form,
            backend=backend,
        )
        return out.rms, out.velocity

    return _run_drift(problem, drift)


def _torch(problem: Problem, compiled: bool = False) -> Run:
    solver = torch.compile(sinkhorn_eager, dynamic=False) if compiled else sinkhorn_eager
    scale, iterations = problem.scale, problem.iterations
    return _run_torch(problem, lambda x, y: scale * solver(x, y, problem.eps / scale, iterations))


def _torch_averaged(problem: Problem) -> Run:
    """As many soft-mins as `iterations` alternating ones have, all at eps."""
    temperatures = (problem.eps,) * problem.iterations
    return _run_torch(problem, lambda x, y: sinkhorn_averaged(x, y, temperatures, problem.scale))


def _torch_divergence(problem: Problem, solver: Divergence, compiled: bool = False) -> Run:
    solver = torch.compile(solver, dynamic=False) if compiled else solver
    return _run_torch(problem, lambda x, y: solver(x, y, problem.temperatures, problem.scale))


def _torch_drift(problem: Problem, compiled: bool = False) -> Run:
    solver = torch.compile(dense_drift, dynamic=False) if compiled else dense_drift
    options = (problem.temperatures, problem.iterations, problem.case.form)
    return _run_drift(problem, lambda x, y, x_self: solver(x, y, x_self, *options))


def _geomloss(problem: Problem, backend: str) -> Run:
    """Its cost is `|x-y|^2 / 2`, and its number of steps follows from an annealing schedule.

    A schedule that starts within 1e-5 of the target temperature keeps eps and sets the number.
    It takes a sweep of 2 soft-mins per step, one before the first and one after the last.
    """
    from geomloss import SamplesLoss

    blur = math.sqrt(problem.eps / problem.scale / 2)
    diameter = blur * (1 + 1e-5)
    steps = problem.iterations - 2
    # epsilon_schedule adds the first and the last temperature to those in between.
    scaling = (blur / diameter) ** (1 / (steps - 2.5))
    loss = SamplesLoss(
        "sinkhorn",
        p=2,
        blur=blur,
        diameter=diameter,
        scaling=scaling,
        debias=False,
        backend=backend,
    )
    return _run_torch(problem, lambda x, y: 2 * problem.scale * loss(x, y))


def _geomloss_divergence(problem: Problem, backend: str) -> Run:
    """Its defaults: debiased, `scaling=0.5`; `registry.schedule` holds the temperatures."""
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=2, blur=math.sqrt(problem.eps), scaling=0.5, backend=backend)
    return _run_torch(problem, loss)


def _pykeops(problem: Problem) -> Run:
    from pykeops.torch import LazyTensor

    eps, case = problem.eps, problem.case
    log_a, log_b = -math.log(case.n), -math.log(case.m)
    unit = math.sqrt(problem.scale / eps)

    def solve(x: Tensor, y: Tensor) -> Tensor:
        x_i, y_j = LazyTensor(unit * x[:, :, None, :]), LazyTensor(unit * y[:, None, :, :])
        cost = ((x_i - y_j) ** 2).sum(-1)
        g = x.new_zeros(y.shape[:2])
        for _ in range(problem.iterations):
            f = -(LazyTensor((g + log_b)[:, None, :, None]) - cost).logsumexp(2)[..., 0]
            g = -(LazyTensor((f + log_a)[:, :, None, None]) - cost).logsumexp(1)[..., 0]
        value: Tensor = eps * (f.mean(1) + g.mean(1))
        return value

    return _run_torch(problem, solve)


def _pot(problem: Problem) -> Run:
    """Its potentials are `f / eps + log a`. The single solver updates columns first: swap x, y."""
    import ot
    import ot.batch

    eps, case = problem.eps, problem.case
    options = {"reg": eps / problem.scale, "method": "log_sinkhorn", "grad": "detach"}

    def single(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        cost = ot.dist(y[0], x[0])
        _, log = ot.bregman.sinkhorn_log(
            [],
            [],
            cost,
            options["reg"],
            numItermax=problem.iterations,
            stopThr=0,
            log=True,
            warn=False,
        )
        return log["log_u"][None], log["log_v"][None]

    def batched(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        result = ot.batch.solve_sample_batch(x, y, max_iter=problem.iterations, tol=0, **options)
        potentials: tuple[Tensor, Tensor] = result.potentials
        return potentials

    def solve(x: Tensor, y: Tensor) -> Tensor:
        u, v = (single if case.batch == 1 else batched)(x, y)
        return eps * (u.mean(1) + v.mean(1) + math.log(case.n) + math.log(case.m))

    return _run_torch(problem, solve)


def _ott(problem: Problem) -> Run:
    """It updates columns first: swap x, y. A fixed number of iterations is one XLA scan."""
    from ott.geometry import costs, pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    count, scale = problem.iterations, problem.scale
    solver = sinkhorn.Sinkhorn(
        threshold=0.0, inner_iterations=count, min_iterations=count, max_iterations=count
    )

    def value(x: Any, y: Any) -> Any:
        geometry = pointcloud.PointCloud(
            y, x, cost_fn=costs.SqEuclidean(), epsilon=problem.eps / scale
        )
        return scale * solver(linear_problem.LinearProblem(geometry)).reg_ot_cost

    return _run_jax(problem, value)


def _ott_divergence(problem: Problem) -> Run:
    """The same updates at the same temperatures, all averaged. Its cost is `|x-y|^2`: scale eps."""
    import jax
    import jax.numpy as jnp
    from ott.geometry import costs, epsilon_scheduler, pointcloud
    from ott.solvers.linear import acceleration
    from ott.tools import sinkhorn_divergence

    temperatures = tuple(t / problem.scale for t in problem.temperatures)

    @jax.tree_util.register_pytree_node_class
    class Schedule(epsilon_scheduler.Epsilon):  # type: ignore[misc]
        def __call__(self, it: Any) -> Any:
            return self.target if it is None else jnp.asarray(temperatures)[it]

    count = problem.iterations
    options = {
        "threshold": 0.0,
        "inner_iterations": count,
        "min_iterations": count,
        "max_iterations": count,
        "parallel_dual_updates": True,
        "momentum": acceleration.Momentum(value=0.5),
    }

    def value(x: Any, y: Any) -> Any:
        divergence, _ = sinkhorn_divergence.sinkhorn_divergence(
            pointcloud.PointCloud,
            x,
            y,
            cost_fn=costs.SqEuclidean(),
            epsilon=Schedule(temperatures[-1]),
            solve_kwargs=options,
        )
        return problem.scale * divergence

    return _run_jax(problem, value)


def _run_jax(problem: Problem, value: Callable[[Any, Any], Any]) -> Run:
    import jax
    import jax.numpy as jnp

    case = problem.case
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    function = jax.value_and_grad(value, argnums=(0, 1)) if case.backward else value
    single = case.batch == 1
    solve = jax.jit(function if single else jax.vmap(function))
    x, y = (jnp.asarray(p[0] if single else p) for p in (problem.x, problem.y))

    def run() -> tuple[Any, ...]:
        out = jax.block_until_ready(solve(x, y))
        return (out[0], *out[1]) if case.backward else (out,)

    return run


_FEWSTEP = {"solve": _fewstep, "divergence": _fewstep_divergence, "drift": _fewstep_drift}
BACKENDS: tuple[Backend, ...] = ("reference", "cpp", "triton", "cuda")

# By workload and contender.
BUILDERS: dict[tuple[str, str], Callable[[Any], Run]] = {
    **{
        (workload, backend): partial(builder, backend=backend)
        for workload, builder in _FEWSTEP.items()
        for backend in BACKENDS
    },
    ("solve", STREAMED): partial(_fewstep, backend="cpp", memory_limit=0),
    ("solve", "eager"): _torch,
    ("solve", "compile"): partial(_torch, compiled=True),
    ("solve", "geomloss-tensorized"): partial(_geomloss, backend="tensorized"),
    ("solve", "geomloss-online"): partial(_geomloss, backend="online"),
    ("solve", "pykeops"): _pykeops,
    ("solve", "pot"): _pot,
    ("solve", "ott-jax"): _ott,
    ("divergence", "eager"): partial(_torch_divergence, solver=divergence_averaged),
    ("divergence", "compile"): partial(
        _torch_divergence, solver=divergence_averaged, compiled=True
    ),
    ("divergence", "geomloss-tensorized"): partial(_geomloss_divergence, backend="tensorized"),
    ("divergence", "geomloss-online"): partial(_geomloss_divergence, backend="online"),
    ("divergence", "ott-jax"): _ott_divergence,
    ("drift", "eager"): _torch_drift,
    ("drift", "compile"): partial(_torch_drift, compiled=True),
}

BUILDERS |= traces.BUILDERS | heuns.BUILDERS | jvps.BUILDERS | attentions.BUILDERS

# What contenders are held to, run on float64 points.
DEFINITIONS: dict[str, Callable[[Any], Run]] = {
    **traces.DEFINITIONS,
    **heuns.DEFINITIONS,
    **jvps.DEFINITIONS,
    **attentions.DEFINITIONS,
    "alternating": BUILDERS["solve", "reference"],
    "unrolled": BUILDERS["solve", "eager"],
    "averaged": _torch_averaged,
    "symmetric": BUILDERS["divergence", "reference"],
    "geomloss": BUILDERS["divergence", "eager"],
    "ott": partial(_torch_divergence, solver=divergence_dual),
    "drift": BUILDERS["drift", "eager"],
}


def numpy_outputs(outputs: tuple[Any, ...]) -> list[np.ndarray]:
    """Outputs of a `Run` in float64: values, flat, then gradients or velocities `[B, N, D]`."""
    arrays = [np.asarray(t.cpu() if isinstance(t, Tensor) else t, "f8") for t in outputs]
    return [arrays[0].reshape(-1), *(a.reshape(-1, *a.shape[-2:]) for a in arrays[1:])]
