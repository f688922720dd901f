"""Random problems for the Triton kernels, compiled for PTX_DEVICE, on the interpreter.

make fuzz-triton SECONDS=60 SEED=1 KINDS="solve many" DEVICES=h100
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"

import torch

import fewstep
from fewstep.reference import sinkhorn as reference
from ptx import project
from ptx.fuzz import common
from ptx.fuzz.common import COSTS, R, check, dim, solve_case, some, weights

project.use_triton()


def solve() -> None:
    solve_case("triton")


def many() -> None:
    """So many problems that launches take their large tiles; on an H100 those are wgmma."""
    batch, n, m, d = 136, R.choice([60, 64]), R.choice([5, 17, 33]), R.choice([17, 20, 32, 40, 70])
    x, y = some((batch, n, d)), some((batch, m, d), shift=0.3)
    a, b = weights((batch, n)), weights((batch, m))
    o = {
        "cost": R.choice(COSTS),
        "max_iter": R.randint(1, 3),
        "update": R.choice(["alternating", "symmetric"]),
    }
    if R.random() < 0.3:
        o["exclude_diagonal"] = True
    eps = torch.full((batch,), 0.4 * d)
    v = some((batch, m, R.choice([1, 10, 40])))
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = x.to(dtype).detach().requires_grad_()
        own = [t.to(dtype) for t in (y, a, b, eps)]
        r = fewstep.sinkhorn(leaf, own[0], a=own[1], b=own[2], eps=own[3], backend=backend, **o)
        (grad,) = torch.autograd.grad(r.value.sum(), leaf)
        found.append((r, grad, r.transport(v.to(dtype)).detach()))
    (r, grad, moved), (e, slope, exact) = found
    what = f"{list(x.shape)} {list(y.shape)} {o}"
    scale = reference.cost_matrix(x.double(), y.double(), o["cost"]).max()
    check("many", "potential", r.f, e.f.detach(), what, scale)
    check("many", "potential", r.g, e.g.detach(), what, scale)
    check("many", "value", r.value.detach(), e.value.detach(), what, scale)
    check("many", "gradient", grad, slope, what)
    check("many", "plan", moved, exact, what, v)


def double() -> None:
    batch, n, m, d = R.randint(1, 3), R.randint(1, 70), R.randint(1, 90), dim()
    x, y = (
        some((batch, n, d), torch.float64).requires_grad_(),
        some((batch, m, d), torch.float64, 0.3),
    )
    o = {
        "cost": R.choice(COSTS),
        "max_iter": R.randint(1, 5),
        "update": R.choice(["alternating", "symmetric"]),
    }
    found = []
    for backend in ("triton", "reference"):
        r = fewstep.sinkhorn(x, y, eps=0.5 * d, backend=backend, **o)
        (grad,) = torch.autograd.grad(r.value.sum(), x)
        found.append((r, grad))
    (r, grad), (e, slope) = found
    scale = reference.cost_matrix(x.detach(), y, o["cost"]).max()
    what = f"{list(x.shape)} {list(y.shape)} {o}"
    check("double", "potential", r.f, e.f.detach(), what, scale)
    check("double", "potential", r.g, e.g.detach(), what, scale)
    check("double", "value", r.value.detach(), e.value.detach(), what, scale)
    if slope.norm() > 1e-3:
        check("double", "gradient", grad, slope, what)


common.main("fuzz_triton", {f.__name__: f for f in (solve, many, double)})
