"""`fewstep.sinkhorn_drift`: definitions from the papers' codes, and what follows from them."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep import sinkhorn_drift
from fewstep.reference.costs import OF_DISTANCE
from support.drift import BACKENDS, FORMS, STATISTICS, clouds


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
