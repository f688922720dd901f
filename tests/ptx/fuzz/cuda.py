"""Random problems for the CUDA kernels on the interpreter, against the reference in float64.

    make fuzz SECONDS=60 SEED=1 KINDS="solve drift" DEVICES=h100

Kinds: solve, extreme, segments, drift, places, apply, heun. Reports the largest errors as parts of
the project's contract.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

import fewstep
from fewstep.reference import costs
from fewstep.reference import sinkhorn as reference
from fewstep.reference.sinkhorn import Points
from ptx import project, sim
from ptx.fuzz import common
from ptx.fuzz.common import COSTS, R, check, dim, options_for, size, solve_case, some, weights
from support.heun import exact

project.use_cuda()
dispatch = project.defining("solve_with_gradient", "transport", "gradient")


def solve() -> None:
    solve_case("cuda")


def extreme() -> None:
    """Scalings of columns that leave float32: small eps, far points, tiny weights."""
    n, m, d, batch = (
        size(R.choice([60, 200])),
        size(R.choice([60, 256])),
        R.choice([1, 2, 3, 5, 20]),
        R.randint(1, 2),
    )
    x, y = some((batch, n, d)), some((batch, m, d), shift=R.choice([0, 1, 30]))
    if R.random() < 0.5:
        y[:, R.randrange(m) :: R.randrange(1, 7)] += R.choice([5, 50, 500])
    a, b = weights((batch, n)), weights((batch, m))
    for w in (a, b):
        if R.random() < 0.4:
            w[:, R.randrange(w.shape[1])] *= R.choice([1e-20, 1e-30])
            if (w.sum(-1) < 0.01).any():
                return
            w /= w.sum(-1, keepdim=True)
    scale = reference.cost_matrix(x.double(), y.double(), "sqeuclidean")
    eps = (scale.mean((1, 2)) * R.choice([1e-4, 1e-3, 1e-2])).clamp_min(1e-4).float()
    o = options_for(n, m) | {"cost": "sqeuclidean", "max_iter": R.randint(1, 12)}
    o.pop("exclude_diagonal", None)
    r = fewstep.sinkhorn(x, y, a=a, b=b, eps=eps, backend="cuda", **o)
    e = fewstep.sinkhorn(
        x.double(),
        y.double(),
        a=a.double(),
        b=b.double(),
        eps=eps.double(),
        backend="reference",
        **o,
    )
    what = f"x {list(x.shape)} y {list(y.shape)} eps {eps.tolist()} {o}"
    for mine, true in ((r.f, e.f), (r.g, e.g)):
        if torch.isfinite(true).all() and not torch.isfinite(mine).all():
            print("OVER: extreme: not finite:", what, flush=True)
    used = b > 0
    check("extreme", "potential", r.f, e.f, what, scale.max())
    check(
        "extreme",
        "potential",
        torch.where(used, r.g, 0),
        torch.where(used, e.g, 0),
        what,
        scale.max(),
    )
    if torch.isfinite(r.value).all() or not torch.isfinite(e.value.float()).all():
        check(
            "extreme",
            "value",
            r.value,
            e.value,
            what,
            torch.maximum(scale.max(), e.value.abs().max()),
        )
    else:
        print("OVER: extreme: value", r.value.tolist(), "for", e.value.tolist(), what, flush=True)


def segments() -> None:
    count, d = R.randint(1, 5), dim()
    sizes = [
        [0 if R.random() < 0.15 else size(R.choice([40, 130, 400])) for _ in range(count)]
        for _ in range(2)
    ]
    for k in range(count):
        if sizes[0][k] == 0 or sizes[1][k] == 0:
            sizes[0][k] = sizes[1][k] = 0
    if sum(sizes[0]) == 0:
        return
    cu = tuple(torch.tensor([0, *s]).cumsum(0) for s in sizes)
    x, y = some((sum(sizes[0]), d)), some((sum(sizes[1]), d), shift=0.4)
    a, b = (torch.cat([weights((1, s))[0] if s else torch.zeros(0) for s in own]) for own in sizes)
    o = options_for(2, 2)
    o.pop("exclude_diagonal", None)
    eps = torch.rand(count) * d + 0.3 * d
    found = []
    for backend, dtype in (("cuda", torch.float32), ("reference", torch.float64)):
        own = [t.to(dtype) for t in (x, y, a, b, eps)]
        leaf = own[0].requires_grad_()
        found.append(
            (
                fewstep.sinkhorn(
                    leaf,
                    own[1],
                    a=own[2],
                    b=own[3],
                    eps=own[4],
                    cu_seqlens=cu,
                    backend=backend,
                    **o,
                ),
                leaf,
            )
        )
    (r, rx), (e, ex) = found
    what = f"sizes {sizes} d {d} {o}"
    most = torch.cdist(x.double(), y.double()).max() ** (1 if o["cost"] == "euclidean" else 2)
    check("segments", "potential", r.f, e.f.detach(), what, most)
    check("segments", "potential", r.g, e.g.detach(), what, most)
    check("segments", "value", r.value.detach(), e.value.detach(), what, most)
    (grad,), (slope,) = (
        torch.autograd.grad(r.value.sum(), rx),
        torch.autograd.grad(e.value.sum(), ex),
    )
    check("segments", "gradient", grad, slope, what)
    v = some((sum(sizes[1]), R.choice([1, 5, 66])))
    check("segments", "plan", r.transport(v), e.transport(v.double()).detach(), what, v)


def drift() -> None:
    groups, n, d = R.choice([1, 2, 3, 7]), size(64), dim()
    joint = R.random() < 0.5
    counts = [size(80), size(80), R.choice([0, size(60)])]
    x, y, s = (
        some((groups, n, d), shift=2),
        some((groups, counts[0], d), shift=2.5),
        some((groups, counts[1], d), shift=2),
    )
    u = some((groups, counts[2], d), shift=1) if counts[2] else None
    o: dict[str, Any] = {
        "cost": R.choice(COSTS),
        "max_iter": R.randint(1, 8),
        "form": "joint" if joint else "split",
    }
    o["normalize"] = R.choice([True, False, "scale"])
    eps = R.choice([[0.3], [0.2, 0.5], [0.1, 0.3, 1.0], [0.1, 0.2, 0.4, 0.8]])
    eps = [v if o["normalize"] else v * d for v in eps]
    if R.random() < 0.3 and counts[1] > 2 and n > 2:
        o["exclude_diagonal"] = True
        s = x.clone()
        counts[1] = n
    w = weights((groups, sum(counts))) if R.random() < 0.4 else None
    guidance = torch.rand(groups) if u is not None else 0.0
    found = []
    for backend, dtype in (("cuda", torch.float32), ("reference", torch.float64)):
        own = [None if t is None else t.to(dtype) for t in (x, y, s, u, w)]
        extra = {} if u is None else {"uncond": own[3], "guidance": guidance.to(dtype)}
        if w is not None:
            extra["weights"] = own[4]
        found.append(fewstep.sinkhorn_drift(*own[:3], eps=eps, backend=backend, **extra, **o))
    r, e = found
    what = f"groups {groups} n {n} counts {counts} d {d} eps {eps} weights={w is not None} {o}"
    rough = 30 if n < 4 else 3  # a mean of few points has little to measure against
    if torch.isfinite(e.velocity).all() and e.velocity.norm() > 1e-3:
        check("drift", "gradient", r.velocity, e.velocity, what, slack=rough)
    elif torch.isfinite(e.velocity).all() != torch.isfinite(r.velocity).all():
        print("OVER: drift: not finite alike:", what)
    check("drift", "value", r.scale, e.scale, what)
    check("drift", "plan", r.residual, e.residual, what, torch.ones(()))


class Plan(ctypes.Structure):
    _fields_ = [
        ("place", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("shared", ctypes.c_int),
        ("blocks", ctypes.c_int64),
        ("slot", ctypes.c_int64),
    ]


STAGE = 4096  # at least block::kStageElements


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if t is None else t.data_ptr())


def places() -> None:
    """sinkhorn_kernel in each place, with fewer blocks than problems."""
    dtype = R.choice([torch.float32, torch.float64])
    batch, n, m, d = R.randint(1, 5), size(70), size(90), dim()
    place, threads = R.randrange(3), R.choice([64, 256])
    x, y, a, b = (
        some((batch, n, d), dtype),
        some((batch, m, d), dtype, 0.3),
        weights((batch, n)).to(dtype),
        weights((batch, m)).to(dtype),
    )
    cost, max_iter = R.choice(COSTS), R.randint(1, 6)
    scale = reference.cost_matrix(x.double(), y.double(), cost)
    eps = (scale.mean((1, 2)) * 0.3).to(dtype)
    g0 = some((batch, m), dtype, scale=0.1) if R.random() < 0.3 else None
    tol = R.choice([-1.0, 1e-2])
    size_ = 4 if dtype == torch.float32 else 8
    real = Plan()
    project.function("plan_sinkhorn")(
        *(ctypes.c_int64(v) for v in (batch, n, m, size_)), ctypes.byref(real)
    )
    vectors = (real.shared // size_ - n * m) if n * m < 3000 else 4 * (n + m) + STAGE  # generous
    vectors = max(vectors, 4 * (n + m) + STAGE) if place else vectors
    plan = Plan(place, real.threads if place == 0 else threads, 0, min(batch, R.randint(1, 3)), 0)
    if place == 0:
        plan.shared = real.shared
    elif place == 1:
        plan.shared, plan.slot = real.shared - n * m * size_, n * m + vectors
    else:
        plan.slot = vectors
    work = torch.empty(max(plan.blocks * plan.slot, 0), dtype=dtype)
    f, g = torch.empty(batch, n, dtype=dtype), torch.empty(batch, m, dtype=dtype)
    value, residual = torch.empty(batch, dtype=dtype), torch.empty(batch, dtype=dtype)
    its, conv = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.bool)
    call = project.function(f"sinkhorn<{'float' if dtype == torch.float32 else 'double'}>")
    sizes = (batch, n, m, d, costs.COSTS[cost].index, max_iter)
    rc = call(
        ctypes.byref(plan),
        *map(pointer, (x, y, a, b, eps, g0)),
        *map(ctypes.c_int64, sizes),
        *map(ctypes.c_double, (tol, 1e-3)),
        *map(pointer, (work, f, g, value, residual, its, conv, None)),
    )
    what = (
        f"place {place} batch {batch} n {n} m {m} d {d} {dtype} {cost} iterations {max_iter}"
        f" tol {tol} blocks {plan.blocks} threads {plan.threads}"
    )
    if rc:
        print("FAILED:", what, sim.lib.ptx_error().decode())
        return
    wide = [None if t is None else t.double() for t in (x, y, a, b, eps, g0)]
    schedule = reference.Schedule(max_iter=max_iter, tol=None if tol < 0 else tol)
    points = Points(wide[0], wide[1], cost)
    exact = reference.Inputs(points, *wide[2:5], None, wide[5], schedule)
    ef, eg, ev, er, ei, _ = reference.solve(exact)
    if not torch.equal(its, ei):
        print("iterations differ", what, its, ei, er)
        return
    check("places", "potential", f, ef, what, scale.max())
    check("places", "potential", g, eg, what, scale.max())
    check("places", "value", value, ev, what, scale.max())


def apply() -> None:
    dtype = R.choice([torch.float32, torch.float64])
    batch, n, m, d, k, temperatures = (
        R.randint(1, 3),
        size(140),
        size(140),
        dim(),
        R.choice([1, 2, 31, 32, 33, 64, 65, 130]),
        R.choice([1, 1, 3]),
    )
    x, y, b, a = (
        some((batch, n, d), dtype),
        some((batch, m, d), dtype, 0.3),
        weights((batch, m)).to(dtype),
        weights((batch, n)).to(dtype),
    )
    cost = R.choice(COSTS)
    points = Points(x, y, cost, diagonal=R.choice([None, None, 0, 3, -2]))
    exact = Points(x.double(), y.double(), cost, diagonal=points.diagonal)
    scale = reference.cost_matrix(x.double(), y.double(), cost)
    eps = (
        (scale.mean((1, 2), keepdim=True)[..., 0] * 0.4)
        .to(dtype)
        .expand(batch, temperatures)
        .flatten()
    )
    h = reference.solve(
        reference.Inputs(
            exact,
            a.double(),
            b.double(),
            eps.double(),
            schedule=reference.Schedule(max_iter=3, tol=None),
        )
    )
    f, g = h[0].to(dtype), h[1].to(dtype)
    v = some((batch * temperatures, m, k), dtype)
    what = (
        f"{dtype} batch {batch} n {n} m {m} d {d} k {k} temperatures {temperatures} {cost}"
        f" diagonal {points.diagonal}"
    )
    out, mass = dispatch.transport("cuda", points, f, g, b, eps, v)
    eo, em = reference.transport(
        exact, f.double(), g.double(), b.double(), eps.double(), v.double()
    )
    check(
        "apply",
        "plan",
        out,
        eo,
        what,
        torch.maximum(eo.abs().max(), em.abs().max()),
        slack=1 if dtype == torch.float32 else 10,
    )
    check("apply", "plan", mass, em, what)
    grad = dispatch.gradient("cuda", points, f, g, a, b, eps)
    eg = reference.gradient(exact, f.double(), g.double(), a.double(), b.double(), eps.double())
    if eg.norm() > 1e-3:
        check("apply", "gradient", grad, eg, what)


def heun() -> None:
    state = R.choice([torch.float32, torch.float64])
    net = R.choice(
        [torch.float32, torch.float16, torch.bfloat16]
        + ([torch.float64] if state == torch.float64 else [])
    )
    batch, d = R.choice([1, 2, 5, 300]), R.choice([1, 2, 3, 4, 5, 8, 12, 13, 64, 100])
    table = torch.randn(2, R.choice([1, batch]), 8, dtype=torch.float64)
    noisy, low = R.random() < 0.5, R.random() < 0.3
    if not noisy:
        table[..., 3] = 0
    x = some((batch, d), state)
    rest = some((batch, d), state, scale=1e-8) if low else None
    terms = [some((batch, d), net) for _ in range(R.randrange(3))]
    seeds = torch.randint(0, 2**62, (batch,)) if noisy else None
    high, out_low = torch.empty_like(x), torch.empty_like(x) if low else None
    z, wrong = (
        torch.empty(batch, d, dtype=net if terms else state),
        torch.zeros(1, dtype=torch.int32),
    )
    torch.ops.fewstep.heun_combine_out.default(
        x, rest, terms, table, 1, seeds, high, out_low, z, wrong
    )
    rows = torch.stack([table[0], table[0], table[1]])
    y, ez = exact(x, rest, terms, rows, seeds) if not noisy else (None, None)
    what = f"{state} {net} batch {batch} d {d} terms {len(terms)} rows {table.shape[1]} low {low}"
    if wrong.item() != 0:
        print("heun: flagged as not finite:", what)
    if y is not None:
        for actual, true in ((high, y), (z, ez)):
            if actual.dtype in (torch.float32, torch.float64):
                slack = 1 if actual.dtype == torch.float32 else 10
                check("heun", "value", actual, true.double(), what, slack=slack)


common.main(
    "fuzz_cuda", {f.__name__: f for f in (solve, extreme, segments, drift, places, apply, heun)}
)
