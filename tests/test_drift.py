"""`fewstep.sinkhorn_drift`: definitions from the papers' codes, kernels against the reference."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fewstep
from fewstep import Drift, sinkhorn_drift
from fewstep.reference.costs import OF_DISTANCE
from tolerances import assert_contract, assert_no_worse_than_eager

BACKENDS = ("reference", "cpp")
FORMS = ("split", "joint")
# G, N, M, N', U, D: single points, below and above every tile, rows left over, several chunks.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 5, 7, 6, 4, 2),
    (2, 33, 65, 40, 3, 19),
    (1, 150, 130, 100, 9, 3),
    (2, 64, 64, 64, 16, 32),
]


def clouds(
    groups: int, *sizes: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Clouds apart by about their width: x, y, x_self, uncond."""
    generator = torch.Generator().manual_seed(seed)
    shifts = (0.0, 0.7, 0.0, -0.3)
    return [
        (torch.randn(groups, n, d, generator=generator, dtype=torch.float64) + shift).to(dtype)
        for n, shift in zip(sizes, shifts, strict=False)
    ]


def lse_plan(log_k: Tensor, b: Tensor, iterations: int) -> Tensor:
    """One group: plan with rows 1/N and columns b, log_u = log_v = 0, u first."""
    log_a, log_b = -math.log(log_k.shape[0]), b.log()
    log_v = torch.zeros_like(b)
    for _ in range(iterations):
        log_u = log_a - torch.logsumexp(log_k + log_v, 1)
        log_v = log_b - torch.logsumexp(log_k + log_u[:, None], 0)
    return (log_u[:, None] + log_k + log_v).exp()


def official_split(
    x: Tensor, y: Tensor, x2: Tensor, u: Tensor, w: float, eps: list[float], iterations: int
) -> Tensor:
    """The released code of arXiv 2605.11755, step by step, for the quadratic cost."""
    D = torch.cdist(x, torch.cat([x, x2, y], 1))
    s = (D.square().mean().sqrt() / math.sqrt(x.shape[2])).clamp(min=1e-3)
    total = torch.zeros_like(x)
    for e in eps:
        V = torch.empty_like(x)
        for g in range(len(x)):
            T = []
            for z in (y, x2, u):
                log_k = -((torch.cdist(x[g], z[g]) / s) ** 2) / 2 / (e * x.shape[2])
                plan = lse_plan(log_k, torch.full_like(z[g, :, 0], 1 / z.shape[1]), iterations)
                T.append(plan @ (z[g] / s) / plan.sum(1, keepdim=True).clamp(min=1e-12))
            V[g] = T[0] - T[1] + w * (T[0] - T[2])
        total += V / V.square().mean().clamp(min=1e-8).sqrt()
    return total


def official_joint(
    x: Tensor, y: Tensor, u: Tensor, w: float, eps: list[float], iterations: int
) -> Tensor:
    """Algorithm 2 of arXiv 2602.04770 with a Sinkhorn coupling, one batch, cost |x - y|^2."""
    G, n, d = x.shape
    columns = torch.cat([y, x, u], 1)
    weights = torch.ones(columns.shape[1], dtype=x.dtype)
    weights[-u.shape[1] :] = w * (n - 1) / u.shape[1]
    D2 = torch.cdist(x, columns).square()
    s = ((D2 * weights).mean() / weights.mean() / d).sqrt()
    total = torch.zeros_like(x)
    for e in eps:
        V = torch.empty_like(x)
        for g in range(G):
            log_k = -D2[g] / s**2 / (e * d)
            i = torch.arange(n)
            log_k[i, y.shape[1] + i] = -torch.inf
            A = n * lse_plan(log_k, weights / weights.sum(), iterations)
            pos, neg = A[:, : y.shape[1]], A[:, y.shape[1] :]
            V[g] = (pos * neg.sum(1, keepdim=True)) @ (y[g] / s)
            V[g] -= (neg * pos.sum(1, keepdim=True)) @ (columns[g, y.shape[1] :] / s)
        total += V / V.square().mean().clamp(min=1e-8).sqrt()
    return total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", [1, 10])
def test_split_is_what_the_official_code_computes(backend: str, iterations: int) -> None:
    x, y, x2, u = clouds(3, 12, 12, 12, 5, d=4)
    eps = [0.02, 0.2]
    options = {"eps": eps, "max_iter": iterations, "backend": backend}
    drift = sinkhorn_drift(x, y, x2, uncond=u, guidance=0.3, **options)
    expected = official_split(x, y, x2, u, 0.3, eps, iterations)
    torch.testing.assert_close(drift.velocity, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", [1, 10])
def test_joint_is_what_drifting_codes_compute(backend: str, iterations: int) -> None:
    x, y, u = clouds(3, 12, 9, 5, d=4)
    eps = [0.05, 0.2]
    drift = sinkhorn_drift(
        x,
        y,
        x,
        eps=eps,
        max_iter=iterations,
        cost="sqeuclidean",
        uncond=u,
        guidance=0.4,
        form="joint",
        exclude_diagonal=True,
        backend=backend,
    )
    expected = official_joint(x, y, u, 0.4, eps, iterations)
    torch.testing.assert_close(drift.velocity, expected, rtol=1e-10, atol=1e-11)


Case = tuple[tuple[int, ...], str, str]
CASES = [(s, f, c) for s in SHAPES for f in FORMS for c in OF_DISTANCE]
STATISTICS = ("scale", "rms", "residual", "entropy", "peak")


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


def entropic_cost(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    """Dense, unrolled and differentiable: `OT(x, y)` of uniform weights for |x - y|^2 / 2."""
    cost = (x[:, None] - y[None]).square().sum(-1) / 2
    log_n, log_m = math.log(len(x)), math.log(len(y))
    f, g = torch.zeros_like(cost[:, 0]), torch.zeros_like(cost[0])
    for i in range(iterations):
        with torch.set_grad_enabled(i >= iterations - 20):
            f = -eps * torch.logsumexp((g[None] - cost) / eps - log_m, 1)
            g = -eps * torch.logsumexp((f[:, None] - cost) / eps - log_n, 0)
    return f.mean() + g.mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_velocity_is_the_gradient_of_the_energy(backend: str) -> None:
    """Also with guidance, which is the flow of `(1 + w) S(q, p) - w S(q, p_0)`."""
    x, y, x_self, u = clouds(1, 11, 13, 9, 7, d=3)
    eps, w = 0.4, 0.6
    options = {"eps": eps, "max_iter": 3000, "normalize": False, "backend": backend}
    drift = sinkhorn_drift(x, y, x_self, uncond=u, guidance=w, **options)
    assert drift.residual.max() < 1e-12
    points = x[0].clone().requires_grad_()
    to_y, to_self, to_u = (entropic_cost(points, z[0], eps, 3000) for z in (y, x_self, u))
    (grad,) = torch.autograd.grad(to_y - to_self + w * (to_y - to_u), points)
    torch.testing.assert_close(drift.velocity[0], -len(points) * grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 13, 64])
def test_no_velocity_where_both_clouds_coincide(
    capability: str, form: str, dtype: torch.dtype, n: int
) -> None:
    x, y = clouds(3, 17, n, d=5, dtype=dtype)
    for memory_limit in (2**26, 0):
        drift = sinkhorn_drift(
            x, y, y.clone(), eps=[0.01, 0.3], form=form, backend="cpp", memory_limit=memory_limit
        )
        assert torch.count_nonzero(drift.velocity) == 0
        assert torch.count_nonzero(drift.rms) == 0


@pytest.mark.parametrize("form", FORMS)
def test_no_velocity_in_the_reference_either(form: str) -> None:
    x, y = clouds(3, 32, 32, d=5)  # whole vectors, so that ATen rounds both products alike
    drift = sinkhorn_drift(x, y, y.clone(), eps=0.05, form=form, backend="reference")
    assert torch.count_nonzero(drift.velocity) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_velocity_is_that_of_the_means(backend: str) -> None:
    x, y, x_self, u = clouds(2, 16, 12, 10, 5, d=3)
    options = {"eps": 0.5, "max_iter": 3000, "normalize": False, "backend": backend}
    w = torch.tensor([0.0, 0.8], dtype=x.dtype)
    drift = sinkhorn_drift(x, y, x_self, uncond=u, guidance=w, **options)
    assert drift.residual.max() < 1e-13
    mean_y, mean_self, mean_u = (z.mean(1) for z in (y, x_self, u))
    expected = mean_y - mean_self + w[:, None] * (mean_y - mean_u)
    torch.testing.assert_close(drift.velocity.mean(1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_infinite_temperature_moves_all_alike(backend: str, form: str) -> None:
    x, y, x_self = clouds(2, 16, 12, 10, d=3)
    drift = sinkhorn_drift(x, y, x_self, eps=1e9, form=form, normalize=False, backend=backend)
    share = 1 if form == "split" else 12 * 10 / 22**2  # of both in a row of the joint plan
    expected = share * (y.mean(1) - x_self.mean(1))[:, None].expand_as(x)
    torch.testing.assert_close(drift.velocity, expected, rtol=0, atol=1e-8)
    count = torch.tensor([12.0, 10.0] if form == "split" else [22.0], dtype=x.dtype)
    torch.testing.assert_close(drift.entropy, count.log().expand(2, -1))
    torch.testing.assert_close(drift.peak, (1 / count).expand(2, -1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_iter", [1, 10])
def test_equilibrium_is_unbiased_with_a_second_batch_only(form: str, max_iter: int) -> None:
    """Each group is a redraw of y and x_self for the same x."""
    redraws = 400
    x, y, x_self = torch.randn(3, redraws, 24, 2)
    x = x[:1].expand_as(y)

    def bias(second: Tensor) -> tuple[float, float]:
        options = {"eps": 0.1, "max_iter": max_iter, "form": form, "normalize": False}
        v = sinkhorn_drift(x, y, second, **options).velocity
        floor = (v.var(0) / redraws).mean().sqrt()
        return v.mean(0).square().mean().sqrt().item(), floor.item()

    two, floor = bias(x_self)
    assert two < 1.5 * floor
    one, floor = bias(x)
    assert one > 3 * floor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cost", OF_DISTANCE)
def test_normalisation(backend: str, form: str, cost: str) -> None:
    """`True` sums what "scale" returns, over its rms; "scale" is `False` on scaled points."""
    x, y, x_self = clouds(3, 9, 8, 7, d=4)
    options = {"form": form, "cost": cost, "backend": backend}
    eps = torch.tensor([0.03, 0.1, 0.4], dtype=x.dtype)
    whole = sinkhorn_drift(x, y, x_self, eps=eps, **options)
    scaled = sinkhorn_drift(x, y, x_self, eps=eps, normalize="scale", **options)
    distances = torch.cdist(x, torch.cat([x, y, x_self], 1))
    mean = distances.mean() if cost == "euclidean" else distances.square().mean().sqrt()
    s = mean / 2  # sqrt(D)
    torch.testing.assert_close(whole.scale, s)
    torch.testing.assert_close(whole.rms, scaled.velocity.square().mean((1, 2, 3)).sqrt())
    torch.testing.assert_close(
        whole.velocity, (scaled.velocity / whole.rms[:, None, None, None]).sum(0)
    )
    own = eps * (2 if cost == "euclidean" else 4)
    raw = sinkhorn_drift(x / s, y / s, x_self / s, eps=own, normalize=False, **options)
    torch.testing.assert_close(raw.velocity, scaled.velocity)
    assert raw.scale == 1
    for name in ("rms", "residual", "entropy", "peak"):
        torch.testing.assert_close(getattr(raw, name), getattr(scaled, name))
        torch.testing.assert_close(getattr(whole, name), getattr(scaled, name))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, "scale", False])
def test_several_temperatures_are_calls_of_their_own(backend: str, normalize: bool | str) -> None:
    x, y, x_self = clouds(2, 9, 8, 7, d=4)
    options = {"normalize": normalize, "backend": backend}
    together = sinkhorn_drift(x, y, x_self, eps=(0.05, 0.3), **options)
    apart = [sinkhorn_drift(x, y, x_self, eps=e, **options) for e in (0.05, 0.3)]
    velocities = torch.stack([drift.velocity for drift in apart])
    torch.testing.assert_close(
        together.velocity, velocities.sum(0) if normalize is True else velocities
    )
    for name in ("rms", "residual", "entropy", "peak"):
        expected = torch.stack([getattr(drift, name) for drift in apart])
        torch.testing.assert_close(getattr(together, name), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions(backend: str) -> None:
    x, y, x_self, u = (t.reshape(2, 3, *t.shape[1:]) for t in clouds(6, 5, 6, 7, 4, d=3))
    guidance = torch.rand(2, 3, dtype=x.dtype)
    options = {"eps": [0.1, 0.2], "normalize": "scale", "backend": backend}
    nested = sinkhorn_drift(x, y, x_self, uncond=u, guidance=guidance, **options)
    flat = sinkhorn_drift(
        *(t.flatten(0, 1) for t in (x, y, x_self)),
        uncond=u.flatten(0, 1),
        guidance=guidance.flatten(),
        **options,
    )
    assert nested.velocity.shape == (2, 2, 3, 5, 3)
    assert nested.entropy.shape == nested.residual.shape == nested.peak.shape == (2, 2, 3, 3)
    assert torch.equal(nested.velocity.flatten(1, 2), flat.velocity)
    assert torch.equal(nested.entropy.flatten(1, 2), flat.entropy)
    single = sinkhorn_drift(x[0, 0], y[0, 0], x_self[0, 0], eps=0.1, backend=backend)
    assert single.velocity.shape == (5, 3)
    assert single.rms.shape == single.scale.shape == ()
    assert single.entropy.shape == (2,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_guidance(backend: str, form: str) -> None:
    x, y, x_self, u = clouds(2, 9, 8, 6, 5, d=3)
    options = {"eps": 0.4, "form": form, "normalize": False, "backend": backend}
    plain = sinkhorn_drift(x, y, x_self, **options).velocity
    none = sinkhorn_drift(x, y, x_self, uncond=u, guidance=0.0, **options).velocity
    torch.testing.assert_close(none, plain, rtol=1e-13, atol=1e-13)
    w = torch.tensor([0.0, 0.7], dtype=x.dtype)
    guided = sinkhorn_drift(x, y, x_self, uncond=u, guidance=w, **options).velocity
    torch.testing.assert_close(guided[0], plain[0], rtol=1e-13, atol=1e-13)
    alone = sinkhorn_drift(x[1], y[1], x_self[1], uncond=u[1], guidance=0.7, **options).velocity
    torch.testing.assert_close(guided[1], alone, rtol=1e-13, atol=1e-13)
    if form == "split":
        centers = sinkhorn_drift(x, y, u, **options).velocity  # T_y - T_uncond
        expected = plain + w[:, None, None] * centers
    else:
        weights = torch.ones(2, 8 + 6 + 5, dtype=x.dtype)
        weights[:, 14:] = w[:, None] * 6 / 5
        expected = sinkhorn_drift(x, y, torch.cat([x_self, u], 1), weights=weights, **options)
        expected = expected.velocity
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", [True, False])
def test_points_of_weight_zero_are_not_there(
    backend: str, form: str, normalize: bool, capability: str
) -> None:
    x, y, x_self = clouds(2, 9, 8, 6, d=3)
    far = torch.full((2, 3, 3), 1e4, dtype=x.dtype)
    weights = torch.ones(8 + 3 + 6 + 3, dtype=x.dtype)
    weights[8:11] = weights[17:] = 0
    options = {"eps": 0.3, "form": form, "normalize": normalize, "backend": backend}
    padded = [torch.cat([z, far], 1) for z in (y, x_self)]
    drift = sinkhorn_drift(x, *padded, weights=weights, **options)
    plain = sinkhorn_drift(x, y, x_self, **options)
    torch.testing.assert_close(drift.velocity, plain.velocity, rtol=1e-11, atol=1e-11)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(drift, name), getattr(plain, name))


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


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    d=st.integers(1, 20),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25)
def test_invariances(n: int, m: int, d: int, form: str, seed: int) -> None:
    x, y, x_self = clouds(1, n, m, n, d=d, seed=seed)
    options = {"eps": [0.1, 1.0], "form": form}
    base = sinkhorn_drift(x, y, x_self, **options).velocity
    close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = sinkhorn_drift(x[:, order], y, x_self[:, order], **options)
    close(permuted.velocity, base[:, order])
    moved = sinkhorn_drift(*(40 * t - 300 for t in (x, y, x_self)), **options)
    close(moved.velocity, base)
    doubled = sinkhorn_drift(
        torch.cat([x, x], 1), *(torch.cat([z, z], 1) for z in (y, x_self)), **options
    )
    close(doubled.velocity[:, :n], base)


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


def test_strided_and_expanded_inputs() -> None:
    x = torch.randn(9, 4, 30).transpose(0, 1)[..., ::2]
    y = torch.randn(1, 8, 15).expand(4, 8, 15)
    x_self = torch.randn(4, 15, 7).mT
    weights = torch.rand(15).expand(4, 15) + 0.1
    options = {"eps": 0.2, "backend": "cpp"}
    strided = sinkhorn_drift(x, y, x_self, weights=weights, **options)
    dense = sinkhorn_drift(
        *(t.contiguous() for t in (x, y, x_self)), weights=weights.contiguous(), **options
    )
    assert torch.equal(strided.velocity, dense.velocity)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_no_groups(backend: str, form: str) -> None:
    x, y, x_self = clouds(0, 5, 4, 3, d=2)
    for normalize in (True, False):
        drift = sinkhorn_drift(
            x, y, x_self, eps=[0.1, 1], form=form, normalize=normalize, backend=backend
        )
        assert drift.velocity.shape == ((0, 5, 2) if normalize else (2, 0, 5, 2))
        assert drift.entropy.shape == (2, 0, 2 if form == "split" else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, y, x_self = clouds(2, 9, 8, 7, d=4, dtype=dtype)
    drift = sinkhorn_drift(x, y, x_self, eps=0.1)
    wide = sinkhorn_drift(x.float(), y.float(), x_self.float(), eps=0.1)
    assert drift.velocity.dtype == torch.float32
    assert torch.equal(drift.velocity, wide.velocity)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_nan_comes_out_as_nan(backend: str, form: str, capability: str) -> None:
    x, y, x_self = clouds(2, 9, 8, 7, d=3, dtype=torch.float32)
    for bad in (x, y, x_self):
        kept = bad[1, 2, 0].clone()
        bad[1, 2, 0] = math.nan
        options = {"eps": 0.1, "form": form, "max_iter": 30, "backend": backend}
        drift = sinkhorn_drift(x, y, x_self, normalize=False, **options)
        assert drift.velocity[0].isfinite().all()
        assert drift.velocity[1].isnan().any()
        assert sinkhorn_drift(x, y, x_self, **options).velocity.isnan().all()
        bad[1, 2, 0] = kept


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch.func.jvp
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows(backend: str) -> None:
    x, y, x_self = (t.requires_grad_() for t in clouds(2, 5, 6, 7, d=3))
    drift = sinkhorn_drift(x, y, x_self, eps=0.1, backend=backend)
    assert not any(t.requires_grad for t in vars(drift).values())

    def velocity(x: Tensor) -> Tensor:
        return sinkhorn_drift(x, y, x_self, eps=0.1, backend=backend).velocity

    _, tangent = torch.func.jvp(velocity, (x.detach(),), (torch.ones_like(x),))
    assert torch.count_nonzero(tangent) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_a_call_for_each(backend: str) -> None:
    x, y, x_self = (t.reshape(3, 2, *t.shape[1:]) for t in clouds(6, 5, 6, 7, d=3))
    weights = torch.rand(3, 13, dtype=x.dtype) + 0.1

    def drift(x: Tensor, x_self: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        d = sinkhorn_drift(x, y[0], x_self, eps=[0.1, 0.3], weights=weights, backend=backend)
        return d.velocity, d.scale

    together = torch.func.vmap(drift, in_dims=(0, 1, 0))(x, x_self.transpose(0, 1), weights)
    for i in range(3):
        for found, expected in zip(together, drift(x[i], x_self[i], weights[i]), strict=True):
            torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised inside torch 2.14's opcheck
def test_op_passes_opcheck() -> None:
    x, y, x_self, u = clouds(2, 9, 6, 7, 4, d=3)
    eps, w = torch.tensor([0.5, 1.0], dtype=x.dtype), torch.ones(2, dtype=x.dtype)
    op = torch.ops.fewstep.sinkhorn_drift.default
    rest = (2**26, 0)
    ones = torch.ones(2, 17, dtype=x.dtype)
    torch.library.opcheck(op, (x, y, x_self, u, ones, w, eps, 1, 5, False, True, True, None, *rest))
    leaf = x.clone().requires_grad_()
    ones = ones[:, :13]
    args = (leaf, y, x_self, None, ones, w, eps, 2, 5, True, False, False, 0, *rest)
    torch.library.opcheck(op, args)


def test_compiles_into_one_graph() -> None:
    def target(x: Tensor, y: Tensor, x_self: Tensor) -> Tensor:
        drift = sinkhorn_drift(x, y, x_self, eps=[0.1, 0.3], max_iter=3, backend="cpp")
        return x / drift.scale + drift.velocity

    compiled = torch.compile(target, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 12):
        points = clouds(2, n, n + 1, n + 2, d=3)
        points[0].requires_grad_()
        torch.testing.assert_close(compiled(*points), target(*points))


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


X, Y, S, U = torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(6, 2)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(4)}, ValueError, r"x must be \[.., N, D\], got \(4,\)"),
    ({"y": torch.zeros(0, 2)}, ValueError, r"y must have points and D > 0, got \(0, 2\)"),
    ({"y": torch.zeros(3, 5)}, ValueError, r"y must match x \(4, 2\).*got \(3, 5\)"),
    ({"x_self": torch.zeros(1, 5, 2)}, ValueError, r"x_self must match x .*got \(1, 5, 2\)"),
    ({"y": Y.double()}, TypeError, r"y must have the dtype of x.*float64"),
    ({"x": X.long()}, TypeError, r"x must have a floating dtype, got torch.int64"),
    ({"x_self": [[0.0]]}, TypeError, r"x_self must be a Tensor, got list"),
    ({"y": Y.to("meta")}, ValueError, r"y must be on cpu with x, got meta"),
    ({"uncond": torch.zeros(0, 2)}, ValueError, r"uncond must have points .* got \(0, 2\)"),
    ({"uncond": torch.zeros(6, 3)}, ValueError, r"uncond must match x .* got \(6, 3\)"),
    ({"guidance": 0.5}, ValueError, r"guidance needs uncond, got 0.5 without"),
    ({"guidance": torch.ones(())}, ValueError, r"guidance needs uncond, got \(\) without"),
    ({"uncond": U, "guidance": -0.5}, ValueError, r"guidance must be at least 0.*got -0.5"),
    ({"uncond": U, "guidance": math.nan}, ValueError, r"guidance must be at least 0.*got nan"),
    ({"uncond": U, "guidance": torch.tensor(-2.0)}, ValueError, r"guidance must .*got -2.0"),
    ({"uncond": U, "guidance": torch.ones(2)}, ValueError, r"guidance must have shape \(\)"),
    ({"eps": 0.0}, ValueError, r"eps must be positive and finite, got 0.0"),
    ({"eps": [0.1, -1.0]}, ValueError, r"eps must be positive and finite, got -1.0"),
    ({"eps": []}, ValueError, r"eps must be positive and finite, got \[\]"),
    ({"eps": torch.tensor([1.0, math.nan])}, ValueError, r"eps must be positive.*got nan"),
    ({"eps": torch.ones(1, 1)}, ValueError, r"eps must be one or \[T\], got \(1, 1\)"),
    ({"max_iter": 0}, ValueError, r"max_iter must be at least 1, got 0"),
    ({"cost": "l1"}, ValueError, r"cost must be one of .*got 'l1'"),
    ({"form": "both"}, ValueError, r"form must be one of .*got 'both'"),
    ({"normalize": "rms"}, ValueError, r"normalize must be one of .*got 'rms'"),
    ({"backend": "fast"}, ValueError, r"backend must be one of .*got 'fast'"),
    ({"backend": "keops"}, ValueError, r"backend 'keops' cannot serve this call"),
    ({"backend": "cuda"}, ValueError, r"backend 'cuda' cannot serve.*not cpu"),
    ({"memory_limit": -1}, ValueError, r"memory_limit must not be negative, got -1"),
    ({"precision": "bf16"}, ValueError, r"precision must be one of .*, got 'bf16'"),
    ({"weights": torch.ones(7)}, ValueError, r"weights must have shape \(8,\), got \(7,\)"),
    ({"weights": torch.zeros(8)}, ValueError, r"weights of y must not be zero.*sum of 0.0"),
    (
        {"weights": torch.tensor([1.0] * 3 + [0.0] * 5), "form": "joint"},
        ValueError,
        r"weights of x_self and uncond must not be zero in every column, got a sum of 0.0",
    ),
    ({"weights": torch.full((8,), -1.0)}, ValueError, r"weights must not be negative.*got -1.0"),
    ({"weights": torch.full((8,), math.nan)}, ValueError, r"weights must not be .*NaN, got nan"),
    ({"weights": torch.full((8,), math.inf)}, ValueError, r"weights of y .*got a sum of inf"),
    ({"weights": [1.0] * 8}, TypeError, r"weights must be a floating Tensor, got list"),
    ({"weights": torch.ones(8, device="meta")}, ValueError, r"weights must be on cpu"),
    (
        {"x_self": S[:1], "exclude_diagonal": True},
        ValueError,
        r"exclude_diagonal leaves a point without a partner, got x \(4, 2\) and x_self \(1, 2\)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:30] for b in BAD])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "y": Y, "x_self": S, "eps": 0.1} | change
    points = [arguments.pop(name) for name in ("x", "y", "x_self")]
    with pytest.raises(error, match=f"sinkhorn_drift: {message}"):
        fewstep.sinkhorn_drift(*points, **arguments)
