"""The resident CUDA solver and drift on a device, if there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.ops.sinkhorn import dispatch
from fewstep.reference import sinkhorn as reference
from fewstep.reference.sinkhorn import Inputs, Points, Schedule
from support.emulation import wide
from support.resident import COSTS, SHAPES, make
from tolerances import assert_contract

# Those called small also run under compute-sanitizer. The last three take a cluster of blocks.
DEVICE_SHAPES = [
    *(pytest.param(shape, id=f"small-{shape}") for shape in SHAPES),
    *((700, 64, 64, 16), (40, 128, 100, 33), (9, 90, 200, 5)),
    *((5, 256, 256, 64), (2, 190, 129, 7), (1, 500, 256, 20)),
]


def fewstep_and_exact(
    inputs: tuple[Tensor, ...], **options: Any
) -> tuple[fewstep.SinkhornResult, fewstep.SinkhornResult]:
    """On the device by the CUDA kernels, and in float64 on the CPU by the reference."""
    found = []
    for backend, device, dtype in (
        ("cuda", "cuda", torch.float32),
        ("reference", "cpu", torch.float64),
    ):
        x, y, a, b, eps = (t.to(device, dtype) for t in inputs)
        moved = {k: t.to(device, dtype) if isinstance(t, Tensor) else t for k, t in options.items()}
        if "cu_seqlens" in options:
            moved["cu_seqlens"] = tuple(cu.to(device) for cu in options["cu_seqlens"])
        x.requires_grad_()
        found.append((fewstep.sinkhorn(x, y, a=a, b=b, eps=eps, backend=backend, **moved), x))
    (result, x), (exact_result, exact_x) = found
    (grad,) = torch.autograd.grad(result.value.sum(), x)
    (slope,) = torch.autograd.grad(exact_result.value.sum(), exact_x)
    assert_contract("gradient", grad.cpu(), slope)
    scale = reference.cost_matrix(*wide(inputs[:2]), options.get("cost", "sqeuclidean")).max()
    assert_contract("potential", result.f.cpu(), exact_result.f.detach(), scale=scale)
    assert_contract("potential", result.g.cpu(), exact_result.g.detach(), scale=scale)
    assert_contract("value", result.value.detach().cpu(), exact_result.value.detach(), scale=scale)
    assert torch.equal(result.iterations.cpu(), exact_result.iterations)
    v = torch.randn_like(inputs[1])
    moved_v = result.transport(v.cuda()).cpu()
    assert_contract("plan", moved_v, exact_result.transport(v.double()).detach(), scale=v)
    return result, exact_result


@pytest.mark.gpu
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", DEVICE_SHAPES)
def test_device_solve(shape: tuple[int, ...], cost: str) -> None:
    fewstep_and_exact(make(*shape, torch.float32), cost=cost, max_iter=15)


def skip_without_clusters(shape: tuple[int, ...]) -> None:
    """With options, a problem of more rows than a block holds takes a cluster of blocks."""
    if shape[1] > 128 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("clusters of blocks need compute capability 9")


DEVICE_OPTIONS: dict[str, dict[str, Any]] = {
    "small-anneal": {"anneal": 0.4},
    "small-temperatures": {"anneal": torch.tensor([2.0, 0.5])},
    "small-reach": {"reach": (0.7, 0.9)},
    "small-relax": {"relax": 1.3},
    "small-diagonal": {"exclude_diagonal": 1},
    "small-precision": {"precision": "float32"},
    "small-symmetric": {"update": "symmetric"},
    "small-symmetric-reach": {"update": "symmetric", "reach": (0.7, 0.9), "tol": 1e-3},
}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 9, 13, 4), (2, 250, 140, 20)], ids=["few", "cluster"])
@pytest.mark.parametrize("options", DEVICE_OPTIONS.values(), ids=DEVICE_OPTIONS)
def test_device_options(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    if "precision" not in options:
        skip_without_clusters(shape)
    fewstep_and_exact(make(*shape, torch.float32), max_iter=9, **options)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:sinkhorn.*not converged")
@pytest.mark.parametrize("update", ["alternating", "symmetric"])
def test_device_small_points_without_a_partner(update: str) -> None:
    x, y, a, b, eps = make(2, 8, 11, 20, torch.float32)
    only, none = torch.zeros_like(a), b.clone()
    only[:, 3] = 1
    none[:, 2] = 0
    none /= none.sum(1, keepdim=True)
    options: dict[str, Any] = {"exclude_diagonal": -1, "max_iter": 6, "update": update}
    moved = {k: t.cuda() for k, t in (("a", only), ("b", b), ("eps", eps))}
    result = fewstep.sinkhorn(x.cuda(), y.cuda(), **moved, **options, backend="cuda")
    assert result.value.isinf().all()
    assert not result.converged.any()
    assert not torch.cat([result.f, result.g], 1).isnan().any()
    # Nothing is asked of the point without a partner, and what has no weight is far away.
    x[only == 0] = 1e6
    y[none == 0] = 1e6
    result = fewstep.sinkhorn(
        *(x.cuda(), y.cuda()), **moved | {"b": none.cuda()}, **options, backend="cuda"
    )
    part = x[:, 3:4].double(), y.double()[none > 0].view(2, -1, 20)
    weights = none.double()[none > 0].view(2, -1)
    true = fewstep.sinkhorn(*part, b=weights, eps=eps.double(), max_iter=6, update=update)
    assert_contract("value", result.value.cpu(), true.value)
    assert torch.equal(result.converged.cpu(), true.converged)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 9, 13, 4), (2, 250, 140, 20)], ids=["small", "cluster"])
@pytest.mark.parametrize("reach", [None, 0.8])
def test_device_divergence(shape: tuple[int, ...], reach: float | None) -> None:
    """Its problems of x with x and y with y keep one potential."""
    skip_without_clusters(shape)
    inputs, found = make(*shape, torch.float32), []
    for backend, device, dtype in (
        ("cuda", "cuda", torch.float32),
        ("reference", "cpu", torch.float64),
    ):
        x, y, a, b, eps = (t.to(device, dtype) for t in inputs)
        x.requires_grad_()
        result = fewstep.sinkhorn_divergence(
            *(x, y), eps=eps, a=a, b=b, reach=reach, max_iter=12, backend=backend
        )
        found.append((result, torch.autograd.grad(result.value.sum(), x)[0]))
    (mine, slope), (true, wanted) = found
    scale = reference.cost_matrix(*wide(inputs[:2]), "sqeuclidean").max()
    assert torch.equal(mine.xx.f, mine.xx.g)
    assert_contract("potential", true.xx.f, true.xx.g, scale=scale)
    assert_contract("value", mine.value.detach().cpu(), true.value.detach(), scale=scale)
    assert_contract("gradient", slope.cpu(), wanted)


@pytest.mark.gpu
def test_device_small_segments_and_temperatures() -> None:
    """One of the problems is empty, and one too large to stay on chip."""
    sizes_x, sizes_y = torch.tensor([5, 0, 300, 64]), torch.tensor([9, 0, 40, 70])
    cu = tuple(
        torch.cat([torch.zeros(1, dtype=torch.int64), s.cumsum(0)]) for s in (sizes_x, sizes_y)
    )
    x, y = torch.randn(369, 3), torch.randn(119, 3) + 0.3
    weights = [torch.repeat_interleave(1 / s.float(), s) for s in (sizes_x, sizes_y)]
    for eps in (torch.full((4,), 0.5), torch.rand(4, 3) + 0.2):
        inputs = (x, y, *weights, eps)
        if eps.ndim == 1:
            fewstep_and_exact(inputs, cu_seqlens=cu, max_iter=9)
        moved = {"eps": eps.cuda(), "cu_seqlens": tuple(c.cuda() for c in cu)}
        result = fewstep.sinkhorn(x.cuda(), y.cuda(), **moved, max_iter=9, backend="cuda")
        exact_result = fewstep.sinkhorn(
            x.double(), y.double(), eps=eps.double(), cu_seqlens=cu, max_iter=9
        )
        assert_contract("potential", result.f.cpu(), exact_result.f, scale=x.square().sum(1).max())
    batch = make(3, 9, 13, 4, torch.float32)
    several = torch.rand(3, 2) + 0.1
    fewstep_and_exact((*batch[:4], several), max_iter=9, tol=1e-3)


@pytest.mark.gpu
def test_device_runs_repeat() -> None:
    x, y, a, b, eps = (t.cuda() for t in make(50, 64, 60, 24, torch.float32))
    assert dispatch.resident(Points(x, y))
    options: dict[str, Any] = {"a": a, "b": b, "eps": eps, "max_iter": 20}
    one, other = (fewstep.sinkhorn(x, y, **options, backend="cuda") for _ in range(2))
    assert torch.equal(one.f, other.f)
    assert torch.equal(one.g, other.g)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["split", "joint"])
@pytest.mark.parametrize(
    ("groups", "n", "counts", "d"),
    [
        pytest.param(2, 5, (6, 5, 0), 7, id="small"),
        pytest.param(3, 60, (64, 64, 16), 200, id="joint-144"),
        pytest.param(150, 64, (64, 100, 0), 32, id="many"),
    ],
)
def test_device_drift(groups: int, n: int, counts: tuple[int, int, int], d: int, form: str) -> None:
    x, y, x_self, uncond = (torch.randn(groups, c, d) + 3 for c in (n, *counts))
    for normalize in (True, False, "scale"):
        for diagonal, cost in ((False, "half_sqeuclidean"), (True, "euclidean")):
            options: dict[str, Any] = {
                "eps": [0.1, 0.5] if normalize is not False else [1.0, 5.0],
                "max_iter": 8,
                "form": form,
                "cost": cost,
                "normalize": normalize,
                "exclude_diagonal": diagonal,
            }
            guided = {"guidance": 0.5} if counts[2] > 0 else {}
            clouds = [x, y, x_self]
            mine = fewstep.sinkhorn_drift(
                *(t.cuda() for t in clouds),
                **options,
                **guided,
                **({"uncond": uncond.cuda()} if guided else {}),
                backend="cuda",
            )
            true = fewstep.sinkhorn_drift(
                *(t.double() for t in clouds),
                **options,
                **guided,
                **({"uncond": uncond.double()} if guided else {}),
                backend="reference",
            )
            assert_contract("gradient", mine.velocity.cpu(), true.velocity)
            assert_contract("gradient", mine.rms.cpu(), true.rms)
            for name in ("scale", "residual", "entropy", "peak"):
                found, wanted = getattr(mine, name).cpu(), getattr(true, name)
                assert_contract("plan", found, wanted, scale=wanted.max().clamp_min(1.0))


@pytest.mark.gpu
def test_device_small_capture_in_a_graph() -> None:
    x, y, a, b, eps = (t.cuda() for t in make(4, 30, 40, 3, torch.float32))
    schedule = Schedule(max_iter=20, tol=1e-4, start=torch.full((4,), 3.0).cuda(), factor=0.5)

    def work() -> tuple[Tensor, ...]:
        drift = fewstep.sinkhorn_drift(x, y, y, eps=0.1, backend="cuda")
        inputs = Inputs(Points(x, y), a, b, eps, schedule=schedule)
        return *dispatch.solve("cuda", inputs), drift.velocity

    wanted = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, wanted, strict=True):
        assert torch.equal(one, other)
