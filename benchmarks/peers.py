"""Every contender as a function that solves one drawn problem and returns only when it is done.

A builder `Problem -> Run` converts the inputs and chooses the options, untimed; the `Run` that it
returns computes everything from the points on: `(value [B],)` or `(value, grad_x, grad_y)`.
Libraries solve `|x-y|^2` at `eps / scale`, which is the same problem in another unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.registry import Problem

Run = Callable[[], tuple[Any, ...]]


def sinkhorn_eager(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    """Dense log-domain Sinkhorn for `|x-y|^2` as training codes write it; value `[B]`."""
    log_k = torch.cdist(x, y).square() / -eps
    log_a, log_b = -math.log(x.shape[1]), -math.log(y.shape[1])
    g = x.new_zeros(y.shape[:2])
    for _ in range(iterations):
        f = -torch.logsumexp(log_k + (g + log_b)[:, None, :], 2)
        g = -torch.logsumexp(log_k + (f + log_a)[:, :, None], 1)
    return eps * (f.mean(1) + g.mean(1))


def sinkhorn_averaged(x: Tensor, y: Tensor, eps: float, sweeps: int) -> Tensor:
    """geomloss's iteration for `|x-y|^2`, dense: both potentials from the last ones, then averaged.

    A sweep is two soft-mins; the first starts from no potential and the last, which carries the
    gradient, is not averaged. Feydy, Geometric data analysis (2020), figures 3.25 and 3.26.
    """
    log_a, log_b = -math.log(x.shape[1]), -math.log(y.shape[1])

    def sweep(x: Tensor, y: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cdist(x, y.detach()).square() / -eps
        columns = torch.cdist(y, x.detach()).square() / -eps
        f_next = -torch.logsumexp(rows + (g + log_b)[:, None, :], 2)
        return f_next, -torch.logsumexp(columns + (f + log_a)[:, None, :], 2)

    with torch.no_grad():
        f, g = sweep(x, y, x.new_zeros(x.shape[:2]), x.new_zeros(y.shape[:2]))
        for _ in range(sweeps - 2):
            f_next, g_next = sweep(x, y, f, g)
            f, g = (f + f_next) / 2, (g + g_next) / 2
    f, g = sweep(x, y, f, g)
    return eps * (f.mean(1) + g.mean(1))


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


def _fewstep(problem: Problem, backend: str) -> Run:
    import fewstep

    def solve(x: Tensor, y: Tensor) -> Tensor:
        return fewstep.sinkhorn(
            x,
            y,
            eps=problem.eps,
            cost=problem.case.cost,
            max_iter=problem.case.iterations,
            backend=backend,
        ).value

    return _run_torch(problem, solve)


def _torch(problem: Problem, solver: Callable[[Tensor, Tensor, float, int], Tensor]) -> Run:
    scale, iterations = problem.scale, problem.case.iterations
    return _run_torch(problem, lambda x, y: scale * solver(x, y, problem.eps / scale, iterations))


def _compiled(problem: Problem) -> Run:
    return _torch(problem, torch.compile(sinkhorn_eager, dynamic=False))


def _geomloss(problem: Problem, backend: str) -> Run:
    """Its cost is `|x-y|^2 / 2`, and its number of steps follows from an annealing schedule.

    A schedule that starts within 1e-5 of the target temperature keeps eps and sets the number.
    It takes a sweep of 2 soft-mins per step, one before the first and one after the last.
    """
    from geomloss import SamplesLoss

    blur = math.sqrt(problem.eps / problem.scale / 2)
    diameter = blur * (1 + 1e-5)
    steps = problem.case.iterations - 2
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


def _pykeops(problem: Problem) -> Run:
    from pykeops.torch import LazyTensor

    eps, case = problem.eps, problem.case
    log_a, log_b = -math.log(case.n), -math.log(case.m)
    unit = math.sqrt(problem.scale / eps)

    def solve(x: Tensor, y: Tensor) -> Tensor:
        x_i, y_j = LazyTensor(unit * x[:, :, None, :]), LazyTensor(unit * y[:, None, :, :])
        cost = ((x_i - y_j) ** 2).sum(-1)
        g = x.new_zeros(y.shape[:2])
        for _ in range(case.iterations):
            f = -(LazyTensor((g + log_b)[:, None, :, None]) - cost).logsumexp(2)[..., 0]
            g = -(LazyTensor((f + log_a)[:, :, None, None]) - cost).logsumexp(1)[..., 0]
        return eps * (f.mean(1) + g.mean(1))

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
            numItermax=case.iterations,
            stopThr=0,
            log=True,
            warn=False,
        )
        return log["log_u"][None], log["log_v"][None]

    def batched(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        result = ot.batch.solve_sample_batch(x, y, max_iter=case.iterations, tol=0, **options)
        potentials: tuple[Tensor, Tensor] = result.potentials
        return potentials

    def solve(x: Tensor, y: Tensor) -> Tensor:
        u, v = (single if case.batch == 1 else batched)(x, y)
        return eps * (u.mean(1) + v.mean(1) + math.log(case.n) + math.log(case.m))

    return _run_torch(problem, solve)


def _ott(problem: Problem) -> Run:
    """It updates columns first: swap x, y. A fixed number of iterations is one XLA scan."""
    import jax
    import jax.numpy as jnp
    from ott.geometry import costs, pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    case, scale = problem.case, problem.scale
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    count = case.iterations
    solver = sinkhorn.Sinkhorn(
        threshold=0.0, inner_iterations=count, min_iterations=count, max_iterations=count
    )

    def value(x: Any, y: Any) -> Any:
        geometry = pointcloud.PointCloud(
            y, x, cost_fn=costs.SqEuclidean(), epsilon=problem.eps / scale
        )
        return scale * solver(linear_problem.LinearProblem(geometry)).reg_ot_cost

    function = jax.value_and_grad(value, argnums=(0, 1)) if case.backward else value
    single = case.batch == 1
    solve = jax.jit(function if single else jax.vmap(function))
    x, y = (jnp.asarray(p[0] if single else p) for p in (problem.x, problem.y))

    def run() -> tuple[Any, ...]:
        out = jax.block_until_ready(solve(x, y))
        return (out[0], *out[1]) if case.backward else (out,)

    return run


BUILDERS: dict[str, Callable[[Problem], Run]] = {
    **{name: partial(_fewstep, backend=name) for name in ("reference", "cpp", "triton", "cuda")},
    "eager": partial(_torch, solver=sinkhorn_eager),
    "compile": _compiled,
    "geomloss-tensorized": partial(_geomloss, backend="tensorized"),
    "geomloss-online": partial(_geomloss, backend="online"),
    "pykeops": _pykeops,
    "pot": _pot,
    "ott-jax": _ott,
}

# What each contender is held to, run on float64 points.
DEFINITIONS: dict[str, Callable[[Problem], Run]] = {
    "alternating": BUILDERS["reference"],
    "unrolled": BUILDERS["eager"],
    "averaged": partial(_torch, solver=sinkhorn_averaged),
}


def numpy_outputs(outputs: tuple[Any, ...]) -> list[np.ndarray]:
    """Outputs of a `Run` in float64: `value [B]`, then gradients `[B, N, D]`, `[B, M, D]`."""
    arrays = [np.asarray(t.cpu() if isinstance(t, Tensor) else t, "f8") for t in outputs]
    return [arrays[0].reshape(-1), *(a.reshape(-1, *a.shape[-2:]) for a in arrays[1:])]
