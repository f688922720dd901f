"""`fewstep.sinkhorn_drift` in C++: against the reference at every shape, range and dtype."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import Drift, sinkhorn_drift
from fewstep.reference.costs import OF_DISTANCE
from support.drift import FORMS, STATISTICS, clouds
from tolerances import assert_contract, assert_no_worse_than_eager

# G, N, M, N', U, D: single points, below and above every tile, rows left over, several chunks.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 5, 7, 6, 4, 2),
    (2, 33, 65, 40, 3, 19),
    (1, 150, 130, 100, 9, 3),
    (2, 64, 64, 64, 16, 32),
]
Case = tuple[tuple[int, ...], str, str]
CASES = [(s, f, c) for s in SHAPES for f in FORMS for c in OF_DISTANCE]


@functools.cache
def solved(
    case: Case, variant: str, rounded: torch.dtype, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Any], Drift]:
    """Inputs rounded to `rounded`, the call's options, and the reference's answer in `dtype`."""
    (groups, *sizes, d), form, cost = case
    x, y, x_self, uncond = clouds(groups, *sizes, d=d)
    points = [t.to(rounded).to(dtype) for t in (x, y, x_self)]
    options: dict[str, Any] = {"eps": [0.05, 0.5], "form": form, "cost": cost, "max_iter": 7}
    if variant == "all":
        generator = torch.Generator().manual_seed(1)
        weights = torch.rand(groups, sum(sizes[1:]), generator=generator, dtype=torch.float64) + 0.1
        if sizes[1] > 2:
            weights[:, 1] = 0
        options |= {
            "uncond": uncond.to(rounded).to(dtype),
            "guidance": torch.linspace(0, 1, groups, dtype=torch.float64).to(dtype),
            "weights": weights.to(rounded).to(dtype),
            "normalize": "scale",
            "exclude_diagonal": sizes[0] > 1,
        }
    return points, options, sinkhorn_drift(*points, backend="reference", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_against_reference(capability: str, case: Case, dtype: torch.dtype) -> None:
    for variant in ("plain", "all"):
        _, _, exact = solved(case, variant, dtype, torch.float64)
        points, options, eager = solved(case, variant, dtype, dtype)
        for memory_limit in (2**26, 0):
            drift = sinkhorn_drift(*points, backend="cpp", memory_limit=memory_limit, **options)
            assert drift.velocity.dtype == dtype
            if case[0][1:4] == (1, 1, 1) and dtype == torch.float32:
                continue  # T is each cloud's one point
            assert_contract("gradient", drift.velocity, exact.velocity)
            if dtype == torch.float32:
                velocities = drift.velocity, eager.velocity, exact.velocity
                assert_no_worse_than_eager(*velocities, scale=exact.velocity)
            for name in STATISTICS:
                expected, found = getattr(exact, name), getattr(drift, name)
                assert found.shape == expected.shape
                tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
                torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_tiles_of_few_rows(form: str, capability: str) -> None:
    """More columns than a cache has room for in `lanes` rows; the small eps underflows too."""
    x, y, x_self = clouds(1, 21, 9000, 7, d=2)
    options = {"eps": [1e-3, 0.1], "form": form, "max_iter": 3, "exclude_diagonal": 2}
    exact = sinkhorn_drift(x, y, x_self, backend="reference", **options)
    for memory_limit in (0, 21 * 9024 * 8, 2**26):
        drift = sinkhorn_drift(x, y, x_self, backend="cpp", memory_limit=memory_limit, **options)
        assert_contract("gradient", drift.velocity, exact.velocity)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [3, -3])
def test_diagonal_with_an_offset(form: str, offset: int) -> None:
    """Points of weight zero before x_self, or before x a cut, move the diagonal."""
    x, y = clouds(2, 9, 8, d=3)
    options = {"eps": 0.3, "form": form, "normalize": False, "backend": "cpp"}
    if offset > 0:
        plain = sinkhorn_drift(x, y, x, exclude_diagonal=True, **options)
        more = torch.cat([torch.zeros(2, offset, 3, dtype=x.dtype), x], 1)
        weights = torch.ones(8 + offset + 9, dtype=x.dtype)
        weights[8 : 8 + offset] = 0
        moved = sinkhorn_drift(x, y, more, weights=weights, exclude_diagonal=offset, **options)
        torch.testing.assert_close(moved.velocity, plain.velocity, rtol=1e-12, atol=1e-12)
    args = (x, y, x[:, -offset:] if offset < 0 else x)
    options["exclude_diagonal"] = offset
    options.pop("backend")
    exact = sinkhorn_drift(*args, backend="reference", **options)
    for memory_limit in (2**26, 0):
        drift = sinkhorn_drift(*args, backend="cpp", memory_limit=memory_limit, **options)
        torch.testing.assert_close(drift.velocity, exact.velocity, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eps", [1e-4, 1e-3])
def test_small_eps_underflows_and_recovers(form: str, eps: float, capability: str) -> None:
    """Column sums of the first iterations underflow in float32, and scalings leave their range."""
    x, y, x_self = clouds(1, 70, 90, 50, d=2, dtype=torch.float32)
    y = 2 * y + 3
    options = {"eps": eps, "form": form, "max_iter": 30, "normalize": "scale"}
    points = (x, y, x_self)
    exact = sinkhorn_drift(*(t.double() for t in points), backend="reference", **options)
    eager = sinkhorn_drift(*points, backend="reference", **options)
    for memory_limit in (2**26, 0):
        drift = sinkhorn_drift(*points, backend="cpp", memory_limit=memory_limit, **options)
        velocities = drift.velocity, eager.velocity, exact.velocity
        assert_no_worse_than_eager(*velocities, scale=exact.velocity)
    wide = sinkhorn_drift(*(t.double() for t in points), backend="cpp", **options)
    assert_contract("gradient", wide.velocity, exact.velocity)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cost", OF_DISTANCE)
def test_far_offset_loses_nothing(capability: str, form: str, cost: str) -> None:
    """At an offset of 8192 multiples of 2^-10 are still exact in float32, so are distances."""
    points = [torch.randint(0, 4096, (2, n, 3)) / 1024 for n in (40, 30, 20)]
    options = {"eps": [0.02, 0.2], "form": form, "cost": cost, "backend": "cpp"}
    near = sinkhorn_drift(*points, **options)
    far = sinkhorn_drift(*(p + 8192 for p in points), **options)
    torch.testing.assert_close(far.scale, near.scale, rtol=1e-6, atol=0)
    assert_contract("gradient", far.velocity, near.velocity.double())


def test_groups_and_threads_do_not_change_bits() -> None:
    x, y, x_self = clouds(5, 200, 70, 90, d=20, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(sinkhorn_drift(x, y, x_self, eps=[0.05, 0.2], backend="cpp"))
        alone = sinkhorn_drift(x[:1], y[:1], x_self[:1], eps=0.4, normalize=False, backend="cpp")
        results.append(alone)
    for other in results[2:]:
        expected = results[0] if other.rms.ndim else results[1]
        assert torch.equal(other.velocity, expected.velocity)
        assert torch.equal(other.rms, expected.rms)
    whole = sinkhorn_drift(x, y, x_self, eps=0.4, normalize=False, backend="cpp")
    assert torch.equal(whole.velocity[:1], results[1].velocity)


def test_large_calls_write_past_the_caches() -> None:
    x, y, x_self = clouds(600, 16, 8, 8, d=150, dtype=torch.float32)
    whole = sinkhorn_drift(x, y, x_self, eps=[0.1, 0.3], normalize=False, max_iter=2)
    part = sinkhorn_drift(
        *(t[-3:] for t in (x, y, x_self)), eps=[0.1, 0.3], normalize=False, max_iter=2
    )
    assert torch.equal(whole.velocity[:, -3:], part.velocity)


@pytest.mark.parametrize("form", FORMS)
def test_triton_solves_and_the_reference_combines(form: str) -> None:
    pytest.importorskip("triton")
    x, y, x_self, u = clouds(1, 5, 6, 7, 3, d=3)
    weights = torch.rand(1, 16, dtype=x.dtype)
    weights[:, 2] = 0
    options = {"eps": [0.05, 0.3], "form": form, "max_iter": 3, "uncond": u, "guidance": 0.3}
    options["weights"] = weights
    exact = sinkhorn_drift(x, y, x_self, backend="reference", **options)
    drift = sinkhorn_drift(x, y, x_self, backend="triton", **options)
    torch.testing.assert_close(drift.velocity, exact.velocity, rtol=1e-10, atol=1e-12)
