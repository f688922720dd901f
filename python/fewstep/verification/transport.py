"""Cases of `sinkhorn` and `sinkhorn_drift`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fewstep
from fewstep._names import Backend, Precision
from fewstep.ops.sinkhorn import implicit
from fewstep.ops.sinkhorn.problem import Constants, Problem
from fewstep.reference.costs import cost_matrix, served
from fewstep.verification.cases import BEYOND, Case, Output, Timing, described, normal
from fewstep.verification.record import Group

Shape = tuple[int, int, int, int]  # B, N, M, D
COSTS = served("cuda")
# Odd sizes and one point; of blocks, of clusters of blocks, of neither.
SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "small": [(1, 1, 1), (1, 1, 9), (3, 9, 13), (2, 35, 21), (40, 128, 100), (2, 97, 128)],
    "medium": [(9, 90, 200), (2, 190, 129), (1, 500, 256), (1, 1, 256)],
    "large": [(2, 515, 301), (1, 1, 1025), (1, 1031, 700)],
}
DIMENSIONS = {"differences": (2, 7, 16), "tf32x3": (17, 64, 100), "tf32": (17, 64)}
TIMED = {"small": (512, 64, 64), "medium": (64, 256, 256), "large": (1, 4096, 4096)}
OPTIONS: list[dict[str, Any]] = [
    {"update": "symmetric"},
    {"anneal": 0.4},
    {"anneal": [2.0, 0.5], "relax": 1.3},
    {"reach": (0.7, None), "update": "symmetric"},
    {"reach": 0.8},
    {"exclude_diagonal": 1},
    {"tol": 1e-3, "max_iter": 60},
    {"memory_limit": 0},
    {"eps": [0.2, 0.5, 1.0]},
]

RAGGED_OPTIONS: list[dict[str, Any]] = [{}, {"cost": "euclidean"}, {"reach": 0.8}]


def clouds(shape: Shape, seed: int) -> list[Tensor]:
    """x, y, a, b in float64: a weight of 0 and a point that both have, where there is room.

    Weights are not those of float32, whose sum is off by more than float64 would forgive.
    """
    batch, n, m, d = shape
    rng = torch.Generator().manual_seed(seed)
    x, y = normal(rng, batch, n, d) / d**0.5, normal(rng, batch, m, d) / d**0.5 + 0.3
    x[:, 0] = y[:, 0]
    a, b = torch.rand(batch, n, generator=rng) + 0.1, torch.rand(batch, m, generator=rng) + 0.1
    a[:, n // 2] *= n < 3
    b[:, -1] *= m < 3
    own = (w.double() / w.double().sum(-1, keepdim=True) for w in (a, b))
    return [x.float().double(), y.float().double(), *own]


def _solved(
    backend: Backend, inputs: list[Tensor], scale: Tensor, options: dict[str, Any]
) -> list[Output]:
    """All that a problem has, with its derivatives and products."""
    x, y, a, b = (t.requires_grad_() for t in inputs)
    kind = "one step" if options.get("max_iter") == 1 else "potential"
    result = fewstep.sinkhorn(x, y, a=a, b=b, backend=backend, **options)
    grads = torch.autograd.grad(result.value.sum(), (x, y, a, b))
    several = result.f.ndim > x.ndim - 1
    v = x.detach().cos() if not several else x.detach().cos()[:, None].expand(*result.f.shape, -1)
    w = y.detach().cos() if not several else y.detach().cos()[:, None].expand(*result.g.shape, -1)
    outputs = [
        Output("f", kind, result.f, scale),
        Output("g", kind, result.g, scale),
        Output("value", "value", result.value, scale),
        Output("gradient of x", "gradient", grads[0]),
        Output("gradient of y", "gradient", grads[1]),
        Output("gradient of a", kind, grads[2], scale),
        Output("gradient of b", kind, grads[3], scale),
        Output("residual", "plan", result.residual, torch.ones(())),
        Output("iterations", "same", result.iterations),
    ]
    if "cu_seqlens" not in options:
        outputs += [
            Output("transport", "plan", result.transport(w)),
            Output("transport back", "plan", result.transport(v, axis=1)),
        ]
    return outputs


def _solve(
    shape: Shape, seed: int, options: dict[str, Any], dtype: torch.dtype
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        rounded = (t.to(device, dtype) for t in clouds(shape, seed))
        inputs = [t.double() if exact else t for t in rounded]
        own = {"eps": 0.3, "max_iter": 12} | options
        scale = cost_matrix(inputs[0], inputs[1], own.get("cost", "sqeuclidean")).amax()
        return _solved(backend, inputs, scale.clamp_min(0.1), own)

    return run


def _ragged(
    sizes: tuple[tuple[int, ...], tuple[int, ...]], d: int, seed: int, options: dict[str, Any]
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        dtype = torch.float64 if exact else torch.float32
        x, y, *_ = (t[0] for t in clouds((1, sum(sizes[0]), sum(sizes[1]), d), seed))
        weights = [torch.cat([torch.full((n,), 1 / max(n, 1)) for n in own]) for own in sizes]
        ends = [[0, *itertools.accumulate(own)] for own in sizes]
        cu = tuple(torch.tensor(own, device=device) for own in ends)
        inputs = [t.float().to(device, dtype) for t in (x, y, *weights)]
        own: dict[str, Any] = {"eps": 0.3, "max_iter": 9, "cu_seqlens": cu} | options
        scale = inputs[0].square().sum(-1).max() + inputs[1].square().sum(-1).max()
        return _solved(backend, inputs, scale, own)

    return run


def _second(
    shape: Shape, seed: int, cost: str
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    """Second derivatives by the kernel that has them, against blocks of plain torch."""

    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        data = [t.to(device) for t in clouds(shape, seed)]
        eps = torch.full((shape[0],), 0.5, dtype=torch.float64, device=device)
        options: dict[str, Any] = {"cost": cost, "max_iter": 40, "backend": "reference"}
        x, y, a, b = data
        solved = fewstep.sinkhorn(x, y, a=a, b=b, eps=eps, **options)
        p = Problem(x, y, a, b, None, solved.f, solved.g, eps)
        rng = torch.Generator().manual_seed(seed)
        u = [normal(rng, *t.shape).to(device) for t in data]
        for weights in u[2:]:
            weights -= weights.mean(-1, keepdim=True)  # of no mass
        of = [normal(rng, *t.shape).to(device) for t in (solved.f, solved.g)]
        need = (True, True, True, True, False)
        c = Constants(cost, "triton" if exact else backend)
        with mock.patch.object(implicit, "BLOCKS_PAIRS", 2**62 if exact else 0):
            found = [
                *implicit.hessian_product((*u, None), p, c, need),
                *implicit.potentials_adjoint(of[0], of[1], p, c, need),
            ]
        return [Output(f"{i}", "gradient", t) for i, t in enumerate(found) if t is not None]

    return run


def _large_transport(
    backend: Backend, device: torch.device, exact: bool, *, elements: int
) -> list[Output]:
    """The last rows of a product with a plan that has 2^31 elements."""
    n, m, d = 2**15 + 3, 8, 3
    columns = elements // n + 1
    x, y, a, b = (t.to(device) for t in clouds((1, n, m, d), 5))
    rng = torch.Generator(device).manual_seed(6)
    v = torch.randn(1, m, columns, generator=rng, device=device)
    cast = torch.float64 if exact else torch.float32
    solved = fewstep.sinkhorn(*(x, y), a=a, b=b, eps=0.5, max_iter=3, backend="reference").plan()[
        :, -7:
    ]
    if exact:
        return [Output("last rows", "plan", solved @ v.double())]
    x, y, a, b = (t.to(cast) for t in (x, y, a, b))
    result = fewstep.sinkhorn(x, y, a=a, b=b, eps=0.5, max_iter=3, backend=backend)
    return [Output("last rows", "plan", result.transport(v)[:, -7:].clone())]


def _large_drift(
    backend: Backend, device: torch.device, exact: bool, *, elements: int
) -> list[Output]:
    """The last groups of clouds that have 2^31 elements."""
    n, d, last = 64, 512, 3
    groups = elements // (n * d) + 2
    rng = torch.Generator(device).manual_seed(7)
    x = torch.empty(groups, n, d, device=device).normal_(generator=rng)
    y, z = x.roll(1, -1), x.roll(2, -1)
    if exact:
        (x, y, z), backend = (t[-last:].double() for t in (x, y, z)), "reference"
    options: dict[str, Any] = {"normalize": False, "eps": 100.0, "max_iter": 5}
    drift = fewstep.sinkhorn_drift(x, y, z, **options, backend=backend)
    return [Output("last groups", "gradient", drift.velocity[-last:].clone())]


def _timed_solve(
    shape: Shape, dtype: torch.dtype, ragged: bool, precision: Precision
) -> Callable[[Backend, torch.device], Callable[[], object]]:
    def make(backend: Backend, device: torch.device) -> Callable[[], object]:
        x, y, *_ = (t.to(device, dtype) for t in clouds(shape, 1))
        cu: Any = None
        if ragged:
            ends = torch.arange(shape[0] + 1, device=device)
            cu = (ends * shape[1], ends * shape[2])
            x, y = x.flatten(0, 1), y.flatten(0, 1)
        x.requires_grad_(), y.requires_grad_()

        def call() -> object:
            out = fewstep.sinkhorn(
                *(x, y), eps=0.1, max_iter=20, cu_seqlens=cu, precision=precision, backend=backend
            )
            return torch.autograd.grad(out.value.sum(), (x, y))

        return call

    return make


def _solves(dtype: torch.dtype, size: str, how: str) -> Iterator[Case]:
    group = _group("sinkhorn", dtype, size, how)
    tf32 = {"precision": "tf32"} if how == "tf32" else {}
    seeds = itertools.count(1)

    def case(sizes: tuple[int, int, int], d: int, options: dict[str, Any]) -> Case:
        seed = next(seeds)
        shape = (*sizes, d)
        name = f"B, N, M, D = {shape}, {described(options)}, seed {seed}"
        return Case(group, name, _solve(shape, seed, options | tf32, dtype))

    for (sizes, cost), d in zip(
        itertools.product(SHAPES[size], COSTS), itertools.cycle(DIMENSIONS[how])
    ):
        yield case(sizes, d, {"cost": cost})
    # A block has 96 rows of 256 columns, and a cluster of blocks more.
    common = {"small": (3, 9, 13), "medium": (2, 90, 140), "large": (2, 261, 300)}[size]
    of_options = itertools.cycle((common, (2, 150, 140)) if size == "medium" else (common,))
    for options, sizes, d in zip(OPTIONS, of_options, itertools.cycle(DIMENSIONS[how])):
        yield case(sizes, d, options)
    plain = {"precision": "float32"} if how == "differences" else {}
    for d in (40, 96):  # costs that are kept, and those that are not
        yield case(common, d, {"memory_limit": 2**27} | plain)
        yield case(common, d, {"memory_limit": 0, "cost": "euclidean"} | plain)
    yield case(common, DIMENSIONS[how][0], {"max_iter": 1})
    for cost in ("sqeuclidean", "euclidean"):
        name = f"second derivatives, B, N, M, D = {(*common, 3)}, cost={cost!r}, seed 3"
        yield Case(group, name, _second((*common, 3), 3, cost))
    if size == "large" and how == "differences" and dtype == torch.float32:
        large = partial(_large_transport, elements=BEYOND)
        yield Case(group, "a product of 2^31 elements", large, elements=BEYOND)


def _ragged_solves(how: str) -> Iterator[Case]:
    group = _group("sinkhorn", torch.float32, "segments", how)
    sizes = ((5, 0, 300, 64, 1), (9, 0, 40, 70, 1))
    for seed, (d, options) in enumerate(itertools.product(DIMENSIONS[how], RAGGED_OPTIONS)):
        own = options | ({"precision": how} if how == "tf32" else {})
        name = f"cu_seqlens of {sizes}, D = {d}, {described(options)}, seed {seed}"
        yield Case(group, name, _ragged(sizes, d, seed, own))


def _drift(
    sizes: tuple[int, int, int, int, int],
    d: int,
    seed: int,
    options: dict[str, Any],
    dtype: torch.dtype,
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        rng = torch.Generator().manual_seed(seed)
        groups, *counts = sizes
        x, y, x_self, uncond = (
            (normal(rng, groups, n, d) + 3).to(device, torch.float64 if exact else dtype)
            for n in counts
        )
        more: dict[str, Any] = {"uncond": uncond, "guidance": 0.5} if counts[3] else {}
        out = fewstep.sinkhorn_drift(x, y, x_self, max_iter=8, backend=backend, **options, **more)
        names = ("scale", "residual", "entropy", "peak")
        return [
            Output("velocity", "gradient", out.velocity),
            Output("rms", "gradient", out.rms),
            *(
                Output(n, "plan", getattr(out, n), getattr(out, n).abs().amax().clamp_min(1.0))
                for n in names
            ),
        ]

    return run


def _drifts(dtype: torch.dtype, size: str, how: str) -> Iterator[Case]:
    group = _group("sinkhorn_drift", dtype, size, how)
    tf32 = {"precision": "tf32"} if how == "tf32" else {}
    shapes = {
        "small": [
            (2, 5, 6, 5, 0),
            (3, 60, 64, 64, 16),
            (20, 64, 100, 40, 0),
            (2, 63, 130, 101, 0),
            (1, 1, 3, 2, 0),
        ],
        "large": [(2, 70, 90, 75, 0), (1, 130, 301, 140, 9)],
    }[size]
    hows: list[dict[str, Any]] = [
        {"eps": 0.3},
        {"eps": [0.1, 0.5], "form": "joint"},
        {"eps": [0.1, 0.3, 0.5], "normalize": "scale", "cost": "half_sqeuclidean"},
        {"eps": [1.0, 2.0, 3.0, 5.0], "normalize": False, "cost": "euclidean", "form": "joint"},
    ]
    for seed, ((shape, options), d) in enumerate(
        zip(itertools.product(shapes, hows), itertools.cycle(DIMENSIONS[how]))
    ):
        own = dict(options)
        d = 40 if how == "differences" and seed % 5 == 4 else d
        if d == 40:
            own["precision"] = "float32"
        # Without a diagonal, where every point keeps a partner.
        if seed % 3 == 2 and min(shape[1:4]) > 4:
            own["exclude_diagonal"] = True
        name = f"G, N, M, S, U, D = {(*shape, d)}, {described(own)}, seed {seed}"
        yield Case(group, name, _drift(shape, d, seed, own | tf32, dtype))
    if size == "small" and how == "tf32x3":
        large = partial(_large_drift, elements=BEYOND)
        yield Case(group, "clouds of 2^31 elements", large, elements=BEYOND)


def _timed_drift(
    size: str, d: int, dtype: torch.dtype, precision: str
) -> Callable[[Backend, torch.device], Callable[[], object]]:
    def make(backend: Backend, device: torch.device) -> Callable[[], object]:
        rng = torch.Generator().manual_seed(0)
        groups, n = (256, 64) if size == "small" else (16, 256)
        x, y, z = (normal(rng, groups, n, d).to(device, dtype) for _ in range(3))
        options: dict[str, Any] = {"eps": [0.05, 0.2], "precision": precision}
        return lambda: fewstep.sinkhorn_drift(x, y, z, backend=backend, **options)

    return make


def _group(op: str, dtype: torch.dtype, size: str, how: str) -> Group:
    return op, str(dtype).removeprefix("torch."), size, how


def groups() -> Iterator[tuple[Group, list[Case], Timing]]:
    """Of `sinkhorn` and `sinkhorn_drift`; by the arithmetic of distances, where dtypes have one."""
    for dtype, hows in ((torch.float32, DIMENSIONS), (torch.float64, ("differences",))):
        for how in hows:
            deep = 16 if how == "differences" else 64
            precision: Precision = "tf32" if how == "tf32" else "tf32x3"
            for size, timed in TIMED.items():
                group = _group("sinkhorn", dtype, size, how)
                make = _timed_solve((*timed, deep), dtype, False, precision)
                yield group, list(_solves(dtype, size, how)), Timing(group, make)
            for size in ("small", "large"):
                group = _group("sinkhorn_drift", dtype, size, how)
                timing = Timing(group, _timed_drift(size, deep, dtype, precision))
                yield group, list(_drifts(dtype, size, how)), timing
            if dtype == torch.float32:
                group = _group("sinkhorn", dtype, "segments", how)
                make = _timed_solve((64, 100, 120, deep), dtype, True, precision)
                yield group, list(_ragged_solves(how)), Timing(group, make)
