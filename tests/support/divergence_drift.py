"""Divergences and drifts of random problems, against those of the reference in float64."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tests.support.agreement import (
    DTYPES,
    ONE,
    amplification,
    arguments,
    as_list,
    exponent_ulps,
    noise,
    slope,
)
from tests.support.problems import Problem
from tests.tolerances import assert_contract, assert_no_worse_than_eager
from torch import Tensor

import fewstep
from fewstep.ops.sinkhorn.divergence import ConvergenceWarning


def check_divergence(p: Problem) -> None:
    """`sinkhorn_divergence` of the kernels is that of the reference."""
    o = {
        k: v for k, v in p.options.items() if k not in ("init", "relax", "exclude_diagonal", "tol")
    }
    if "C" in p.tensors or isinstance(o.get("reach"), tuple):
        return
    if "label_cost" in o:
        W = o["label_cost"]
        if W.shape[0] != W.shape[1] or bool(W.isinf().any()):
            return
        o["label_cost"] = W + W.mT
    q = replace(p, options=o, same=False)
    scale = torch.zeros((), dtype=torch.float64)
    for *_, r in q.alone():
        z = torch.cat([r.tensors["x"], r.tensors["y"]])
        both = Problem({"x": z, "y": z}, {"cost": r.cost, "eps": 1.0})
        scale = torch.maximum(scale, both.scale())
    if "label_cost" in o:
        scale = scale + o["label_cost"].abs().max()
    eps = torch.as_tensor(o["eps"], dtype=torch.float64)
    scale = scale if scale > 0 else eps.max()
    scale = torch.stack([scale, *(scale.new_tensor(t) for t in as_list(o.get("anneal")))]).max()

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves, call = arguments(q, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            r = fewstep.sinkhorn_divergence(**call, backend=backend)
        return [r.value.detach(), *torch.autograd.grad(r.value.sum(), [leaves["x"], leaves["y"]])]

    exact = run(torch.float64, "reference")
    if not all((t.abs() < torch.finfo(torch.float32).max / 16).all() for t in exact):
        return  # updates of both potentials at once can be that far off at first
    exponent = amplification(scale, eps.min())
    mass = torch.stack([w.sum(-1).max() for w in q.weights()]).max().clamp(min=1)
    size = scale * mass * mass
    # A value beyond all costs is eps times the mass of a plan, and off by that times their errors.
    beyond = (exact[0].abs() - size).clamp(min=0)
    size = torch.maximum(size, (beyond * (scale / eps).clamp(min=1)).max() + exact[0].abs().max())
    for dtype in DTYPES:
        actual = run(dtype, "cpp")
        with noise(dtype) if dtype == torch.float64 else nullcontext():
            opinion = functools.cache(lambda dtype=dtype: run(dtype, "reference"))
            # Of potentials beyond the digits of the dtype plans are unknown, and residuals inf.
            known = bool(scale * torch.finfo(dtype).eps < eps.min())
            names = ("value", "gradient x", "gradient y") if known else ("value",)
            for i, name in enumerate(names):
                a, e = actual[i].double(), exact[i]
                assert bool(a.isfinite().all()), f"divergence {str(dtype)[6:]} {name}: not finite"
                within = (e + (a - e) / (exponent if i else 1)).to(dtype)
                try:
                    if i:
                        assert_contract("gradient", within, e)
                    else:
                        assert_contract("value", within, e, scale=size)
                except AssertionError as first:
                    # Gradients are differences of two, which may be all that there is.
                    terms = slope(q, scale) * mass * mass * exponent_ulps(scale, eps.min())
                    unit = size if i == 0 else terms
                    try:
                        assert_no_worse_than_eager(actual[i], opinion()[i], e, scale=unit)
                    except AssertionError as second:
                        raise AssertionError(
                            f"divergence {str(dtype)[6:]} {name}: {first}; {second}"
                        ) from None


def draw_drift(seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Clouds, and options of `fewstep.sinkhorn_drift`."""
    rng = np.random.default_rng([7, seed])
    of = lambda *v: v[int(rng.integers(len(v)))]  # noqa: E731
    size = lambda: int(of(1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 40))  # noqa: E731
    lead, D = of((), (2,), (3,), (2, 2)), of(1, 2, 3, 8, 17)
    n, sizes = size(), [size(), size(), size()]
    form, guided = of("split", "joint"), rng.random() < 0.3
    excluded = min(n, sizes[1]) >= 3 and rng.random() < 0.25
    if excluded:
        sizes[1] = n
    scale = 10.0 ** rng.uniform(-2, 2)
    clouds = {
        k: torch.from_numpy((rng.standard_normal((*lead, m, D)) + s) * scale).float().double()
        for k, m, s in zip(
            ("x", "y", "x_self", "uncond"), (n, *sizes), (0, 0.7, 0, -0.3), strict=True
        )
    }
    options: dict[str, Any] = {"form": form, "max_iter": int(of(1, 2, 5, 10, 20))}
    options["cost"] = of("half_sqeuclidean", "sqeuclidean", "euclidean")
    options["normalize"] = of(True, True, "scale", False)
    unit = (
        1.0 if options["normalize"] else scale ** (1 if options["cost"] == "euclidean" else 2) * D
    )
    eps = [float(np.float32(unit * 10.0 ** rng.uniform(-1.7, 0.5))) for _ in range(of(1, 1, 2, 3))]
    options["eps"] = eps if rng.random() < 0.6 else eps[0]
    if guided:
        options["guidance"] = of(0.0, 0.25, 1.5)
    else:
        del clouds["uncond"]
    if excluded:
        clouds["x_self"] = clouds["x"]
        options["exclude_diagonal"] = of(True, 1)
    if rng.random() < 0.4:
        columns = sum(sizes[: 3 if guided else 2])
        w = rng.random(columns) + 0.1
        if rng.random() < 0.5 and not excluded:
            zero = rng.random(columns) < 0.3
            zero[[0, sizes[0], *([sizes[0] + sizes[1]] if guided else [])]] = False
            w[zero] = 0
        options["weights"] = torch.from_numpy(w).float().double()
    if rng.random() < 0.3:
        options["memory_limit"] = 0
    return clouds, options


def check_drift(seed: int) -> None:
    """`sinkhorn_drift` of the kernels is that of the reference."""
    clouds, options = draw_drift(seed)

    def run(dtype: torch.dtype, backend: str) -> fewstep.Drift:
        o = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        return fewstep.sinkhorn_drift(
            **{k: t.to(dtype) for k, t in clouds.items()}, **o, backend=backend
        )

    exact = run(torch.float64, "reference")
    for dtype in DTYPES:
        actual = run(dtype, "cpp")
        for name in ("velocity", "scale", "rms", "residual", "entropy", "peak"):
            a, e = getattr(actual, name), getattr(exact, name)
            assert not bool(a.isnan().any()), f"drift {str(dtype)[6:]} {name}: NaN"
            try:
                if name == "velocity":
                    assert_contract("gradient", a, e)
                else:
                    assert_contract("plan", a, e, scale=e.abs().max().clamp(min=1))
            except AssertionError as first:
                eager = run(torch.float32, "reference") if dtype == torch.float32 else exact
                # Velocities are differences of points.
                size = clouds["x"].abs().max() / exact.scale if name in ("velocity", "rms") else ONE
                size = (
                    size / exact.rms.min().clamp(min=1e-4) if options["normalize"] is True else size
                )
                try:
                    assert_no_worse_than_eager(a, getattr(eager, name), e, scale=size)
                except AssertionError as second:
                    raise AssertionError(
                        f"drift {str(dtype)[6:]} {name}: {first}; {second}"
                    ) from None
