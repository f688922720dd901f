"""What `benchmarks.gpu` measures on a device: cases, floors by count, and how a case is timed."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.contenders import CONTENDERS
from benchmarks.registry import CASES, GRAD_RTOL, VALUE_RTOL, Case, Problem, schedule

# Errors at which a peer is still timed: TF32 is the default of some. Ours keep the contract.
PEER_RTOL = 1e-2
# Points of several input sets together, so that no set is still in L2 when its turn comes.
ROTATED_BYTES = 256 << 20
MAX_SETS = 8
# A call that takes more than so many budgets is timed once.
SLOW_BUDGETS = 4
wait = torch.cuda.synchronize
OURS = ("cuda", "triton")
_drift = replace(CASES["drift_joint_b256_n64_d256"], contenders=())
_divergence = CASES["divergence_n1024_d64"]
LARGE = ("triton", "flash-sinkhorn", "flash-sinkhorn-fp32", "geomloss-online", "pykeops", "eager")
SMALL = ("cuda", *LARGE)
# torch.compile takes minutes for a hundred unrolled iterations.
COMPILED = (*SMALL, "compile")


GPU_CASES = {
    case.name: case
    for case in (
        Case("n10000_d64", 1, 10_000, 10_000, 64, 100, contenders=LARGE),
        replace(_divergence, name="divergence_n10000_d64", n=10_000, m=10_000, contenders=LARGE),
        Case("b256_n256_d64", 256, 256, 256, 64, 100, contenders=SMALL),
        replace(CASES["b10000_n64_d32"], contenders=COMPILED),
        # One feature map of 16 x 16 of the drifting codes: 64 x 144 pairs in each problem.
        replace(
            _drift,
            name="drift_joint_b26752_n64_m72_d512",
            batch=26_752,
            m=72,
            d=512,
            contenders=SMALL,
        ),
        replace(
            _drift,
            name="drift_split_b4096_n64_d256",
            batch=4096,
            form="split",
            contenders=COMPILED,
        ),
        # Through all iterations of dense torch a gradient does not fit in memory in float64.
        Case(
            "n10000_d64_grad",
            *(1, 10_000, 10_000, 64, 20),
            backward=True,
            contenders=("triton", "geomloss-online"),
        ),
    )
}


def least_bytes(case: Case) -> int:
    """Device memory that must be moved: points and weights in, what is asked for out, once."""
    points = case.batch * (case.n + case.m)
    floats = {
        "solve": points * (case.d + 2) + case.batch,
        "divergence": points * (case.d + 1),
        "drift": (points + case.batch * (case.m + case.n)) * case.d,
    }[case.workload]
    gradients = points * case.d if case.backward else 0
    return np.dtype(case.dtype).itemsize * (floats + gradients)


def least_flops(case: Case, iterations: int) -> int:
    """Operations of the cheapest known way: distances once, two multiply-adds per pair and
    iteration, and D multiply-adds per pair for a gradient or a barycentre."""
    temperatures = len(case.eps_of_mean)
    pairs = case.pairs // temperatures
    products = temperatures if case.workload == "drift" else 2 * case.backward
    return 2 * pairs * (case.d * (1 + products) + 2 * temperatures * iterations)


def draw(case: Case, device: str, copies: int = 1) -> list[Problem]:
    """`registry.draw` on the device, for sizes that take minutes on a host; and the same points in
    another order at other addresses, as further input sets with the same value."""
    rng = torch.Generator(device).manual_seed(0)
    dtype = {"float32": torch.float32, "float64": torch.float64}[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device, dtype=dtype)

    def sample(centres: Tensor, count: int) -> Tensor:
        mode = torch.randint(8, (case.batch, count, 1), generator=rng, device=device)
        return normal(case.batch, count, case.d).add_(
            centres.gather(1, mode.expand(-1, -1, case.d))
        )

    centres = 2 * normal(case.batch, 8, case.d)
    x = sample(centres, case.n)
    x_self = sample(centres, case.m) if case.workload == "drift" else x[:, :0]
    if case.workload != "solve":
        centres = 2 * normal(case.batch, 8, case.d)
    y = sample(centres, case.m)
    means = [p.mean(1, dtype=torch.float64) for p in (x, y)]
    squares = [p.square().sum(2).mean(1, dtype=torch.float64) for p in (x, y)]
    mean_cost = case.scale * float((sum(squares) - 2 * (means[0] * means[1]).sum(1)).mean())
    eps = mean_cost * case.eps_of_mean[-1]
    temperatures: tuple[float, ...] = (eps,)
    if case.workload == "divergence":
        both = torch.cat([x, y], 1)
        corners = torch.stack([both.amin((0, 1)), both.amax((0, 1))])[None].double().cpu().numpy()
        temperatures = schedule(corners, corners, eps)
    elif case.workload == "drift":
        temperatures = case.eps_of_mean
    problems = [Problem(case, x, y, x_self, temperatures, device)]
    for k in range(1, copies):
        x_k, y_k, x_self_k = (p.roll(k, 1).contiguous() for p in (x, y, x_self))
        problems.append(Problem(case, x_k, y_k, x_self_k, temperatures, device))
    return problems


def expected(problem: Problem, definition: str) -> list[np.ndarray]:
    """Outputs in float64 by one of `peers.DEFINITIONS`; a drift in slices of its groups."""
    from benchmarks.peers import DEFINITIONS, numpy_outputs

    if definition == "drift":
        return numpy_outputs(exact_drift(problem))
    x, y, x_self = (p.double() for p in (problem.x, problem.y, problem.x_self))
    return numpy_outputs(DEFINITIONS[definition](replace(problem, x=x, y=y, x_self=x_self))())


def exact_drift(problem: Problem, slice_groups: int = 512) -> tuple[Tensor, Tensor]:
    """Rms and velocity of the normalised drift: one scale, and one rms per temperature, for all."""
    from fewstep.reference import drift as reference

    case = problem.case
    clouds = (problem.x, problem.y, problem.x_self)
    slices = [slice(i, i + slice_groups) for i in range(0, case.batch, slice_groups)]
    total, pairs = 0.0, case.batch * case.n * (case.n + 2 * case.m)
    for part in slices:
        x, *others = (p[part].double() for p in clouds)
        total += sum(float(torch.cdist(x, z).square().sum()) for z in (x, *others))
    scale = max(math.sqrt(total / pairs / case.d), reference.MIN_SCALE)
    eps = torch.tensor(problem.temperatures, device=problem.device, dtype=torch.float64) * case.d
    velocities = []
    for part in slices:
        x, y, x_self = (p[part].double() / scale for p in clouds)
        ones = x.new_ones((x.shape[0], 2 * case.m))
        out = reference.drift(
            *(x, y, x_self, None, ones, ones[:, 0], eps),
            cost=case.cost,
            max_iter=problem.iterations,
            joint=case.form == "joint",
            scaled=False,
            unit=False,
            diagonal=None,
        )
        velocities.append(out[0].float())
    v = torch.cat(velocities, 1)
    rms = torch.stack([t.square().mean(dtype=torch.float64).sqrt() for t in v])
    velocity = sum(t / r for t, r in zip(v, rms.clamp(min=reference.MIN_RMS), strict=True))
    return rms, velocity


def flash_sinkhorn(problem: Problem, tf32: bool) -> Callable[[], tuple[Tensor, ...]]:
    """flash-sinkhorn 0.4.1 as its README calls it: batches one problem after the other."""
    case, device = problem.case, problem.device
    x, y = (p.detach().requires_grad_(case.backward) for p in (problem.x, problem.y))

    if case.workload == "divergence":
        from flash_sinkhorn import SamplesLoss

        loss = SamplesLoss(
            "sinkhorn",
            p=2,
            blur=math.sqrt(problem.eps),
            half_cost=True,
            debias=True,
            eps_list=list(problem.temperatures[1:-1]),
            allow_tf32=tf32,
        )

        def run() -> tuple[Tensor, ...]:
            value = loss(x[0], y[0])
            return value.detach()[None], *torch.autograd.grad(value, (x, y))

        return run
    from flash_sinkhorn.sinkhorn_solvers import sinkhorn_flashstyle_alternating

    a = torch.full((case.n,), 1 / case.n, device=device)
    b = torch.full((case.m,), 1 / case.m, device=device)

    def solve() -> tuple[Tensor, ...]:
        values = []
        for p, q in zip(problem.x, problem.y, strict=True):
            f, g = sinkhorn_flashstyle_alternating(
                *(p, q, a, b),
                eps=problem.eps,
                n_iters=problem.iterations,
                cost_scale=case.scale,
                allow_tf32=tf32,
            )
            values.append(f.mean() + g.mean())
        return (torch.stack(values),)

    if case.backward:
        raise NotImplementedError("its alternating solver has no gradient")
    return solve


def build(name: str, problem: Problem) -> Callable[[], tuple[Any, ...]]:
    """The function that contender `name` is timed by."""
    if name.startswith("flash-sinkhorn"):
        return flash_sinkhorn(problem, tf32=name == "flash-sinkhorn")
    from benchmarks.peers import BUILDERS

    return BUILDERS[problem.case.workload, name](problem)


def packages_of(name: str) -> tuple[str, ...]:
    """The package of a contender, and those that it needs beside its own."""
    if name.startswith("flash-sinkhorn"):
        return ("flash-sinkhorn",)
    return CONTENDERS[name].package, *CONTENDERS[name].also


def definition_of(name: str, case: Case) -> str | None:
    """What a contender must agree with on a case, None where it does not take part."""
    if name.startswith("flash-sinkhorn"):
        served = {"solve": "alternating", "divergence": "geomloss"}
        return None if case.backward and case.workload == "solve" else served.get(case.workload)
    contender = CONTENDERS[name]
    # All of ours serve a drift, by the kernels of the op or by those of the solve.
    served = {str(work): name for work, name in contender.definitions.items()}
    if contender.kind == "fewstep":
        served |= {"divergence": "symmetric", "drift": "drift"}
    definition = served.get(case.workload)
    return "alternating" if definition == "unrolled" and not case.backward else definition


def event_times(calls: Sequence[Callable[[], Any]], budget: float, least: int = 5) -> list[float]:
    """Milliseconds per call between events on the stream, the calls of `calls` in turn.

    Calls are queued without waiting, as in a training loop: at least `least`, for `budget` seconds.
    """
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    gc.collect()
    wait()
    start = time.perf_counter()
    while len(pairs) < least or time.perf_counter() - start < budget:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        calls[len(pairs) % len(calls)]()
        end.record()
        pairs.append((begin, end))
        if len(pairs) % 10 == 0:
            end.synchronize()  # the queue stays short
        if len(pairs) == 1000:
            break
    wait()
    return [begin.elapsed_time(end) for begin, end in pairs]


def measure(name: str, problems: Sequence[Problem], want: list[np.ndarray], budget: float) -> Any:
    """A CSV row of one contender: errors first, then the time where these are small."""
    from benchmarks.peers import numpy_outputs
    from benchmarks.worker import errors

    case = problems[0].case
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    runs = [build(name, problem) for problem in problems]
    outputs = runs[0]()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    value_error, grad_error = errors(numpy_outputs(outputs), want)
    row: dict[str, Any] = {"value_error": value_error, "first_call_s": first, "sets": len(runs)}
    if len(outputs) > 1:
        row["grad_error"] = grad_error
    del outputs
    ours = not name.startswith("flash") and CONTENDERS[name].kind == "fewstep"
    limits = (VALUE_RTOL, GRAD_RTOL) if ours else (PEER_RTOL, PEER_RTOL)
    if not (value_error <= limits[0] and grad_error <= limits[1]):
        return row | {"note": "disagrees with the float64 reference: not timed"}
    # Contenders of `peers` wait for the device at the end of a call; a training loop does not.
    with mock.patch.object(torch.cuda, "synchronize"):
        times = event_times(runs[:1], 0.0, least=1)
        if times[0] < 1e3 * SLOW_BUDGETS * budget:
            for run in runs[1:]:
                run()
            times = event_times(runs, budget)
    peak = torch.cuda.max_memory_allocated() - before
    return row | timing(times, case, problems[0].iterations, peak)


def timing(times: Sequence[float], case: Case, iterations: int, peak: int) -> dict[str, Any]:
    q20, median, q80 = np.quantile(times, (0.2, 0.5, 0.8)).tolist()
    gigabytes, teraflops = least_bytes(case) / 1e9, least_flops(case, iterations) / 1e12
    return {
        "median_ms": median,
        "q20_ms": q20,
        "q80_ms": q80,
        "repeats": len(times),
        "peak_mb": peak / 2**20,
        "least_gb": gigabytes,
        "gb_per_s": gigabytes / (median * 1e-3),
        "least_tflop": teraflops,
        "tflop_per_s": teraflops / (median * 1e-3),
    }


def sets_for(case: Case) -> int:
    """Input sets that are rotated: three where they are large, more where L2 would hold three."""
    points = np.dtype(case.dtype).itemsize * case.batch * (case.n + 2 * case.m) * case.d
    return 1 if points > 4 << 30 else min(MAX_SETS, max(3, math.ceil(ROTATED_BYTES / points)))


def measure_case(name: str, contenders: Sequence[str], result: Path, budget: float) -> None:
    """Append a JSON row per contender to `result`: one process, so that a crash costs one case."""
    case = GPU_CASES[name]
    problems = draw(case, "cuda", sets_for(case))
    wanted: dict[str, list[np.ndarray]] = {}
    for contender in contenders:
        with result.open("a") as file:
            file.write(json.dumps({"begun": contender}) + "\n")
        definition = definition_of(contender, case)
        assert definition is not None
        try:
            if definition not in wanted:
                wanted[definition] = expected(problems[0], definition)
                gc.collect()
                torch.cuda.empty_cache()
            row = measure(contender, problems, wanted[definition], budget)
        except Exception as error:
            first = str(error).strip().split("\n", 1)[0]
            row = {"note": f"{type(error).__name__}: {first[:160]}"}
        row |= {
            "contender": contender,
            "version": importlib.metadata.version(packages_of(contender)[0]),
        }
        with result.open("a") as file:
            file.write(json.dumps(case.columns() | {"iterations": problems[0].iterations} | row))
            file.write("\n")


def ceilings() -> dict[str, float]:
    """What this device reaches: GB/s of a copy, read and written; TFLOP/s of large products."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    other = torch.empty_like(big)
    copy = float(np.median(event_times([partial(other.copy_, big)], 0.3)))
    found = {"copy_gb_per_s": 2 * big.numel() / 1e6 / copy}
    del big, other
    for label, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        product = float(np.median(event_times([partial(torch.mm, a, b)], 0.3)))
        found[f"{label}_tflop_per_s"] = 2 * 8192**3 / 1e9 / product
    torch.backends.cuda.matmul.allow_tf32 = False
    return found
