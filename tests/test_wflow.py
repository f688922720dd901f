from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.methods import WFlow

BACKENDS = ("reference", "cpp")
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def clouds(*lead: int, n: int = 16, d: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, x2, y = torch.randn(3, *lead, n, d, generator=generator, dtype=torch.float64)
    return x, x2, 0.5 * y + 1


def velocity(flow: WFlow, x: Tensor, x2: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """V in units of the scale, read off the gradient of the loss at an identity generator."""
    noise = torch.stack([x, x2]).requires_grad_()
    loss, metrics = flow(lambda z: z, noise, y)
    loss.backward()
    assert noise.grad is not None
    assert torch.count_nonzero(noise.grad[1]) == 0
    v = -noise.grad[0] * metrics["scale"] * x.numel() / (2 * flow.step_size)
    return v, metrics


def entropic_cost(x: Tensor, y: Tensor, eps: float, iterations: int = 1500) -> Tensor:
    """Dense, unrolled and differentiable, independent of the op: `OT(x, y)` of uniform weights."""
    cost = (x[:, None] - y[None]).square().sum(-1) / 2
    log_n, log_m = torch.tensor([float(len(x)), float(len(y))], dtype=x.dtype).log()
    f, g = torch.zeros_like(cost[:, 0]), torch.zeros_like(cost[0])
    for i in range(iterations):
        # Only the last iterations matter to the gradient, which is exact at convergence.
        with torch.set_grad_enabled(i >= iterations - 20):
            f = -eps * torch.logsumexp((g[None] - cost) / eps - log_m, 1)
            g = -eps * torch.logsumexp((f[:, None] - cost) / eps - log_n, 0)
    return f.mean() + g.mean()


@pytest.mark.parametrize(("n", "m"), [(16, 16), (5, 9)])
def test_plan_has_its_marginals_and_ignores_a_constant_cost(backend: str, n: int, m: int) -> None:
    x, y = clouds(n=n)[0], clouds(n=m)[2]
    a, b = torch.rand(2, max(n, m), dtype=torch.float64)
    a, b = a[:n] / a[:n].sum(), b[:m] / b[:m].sum()

    def solve(height: float) -> fewstep.SinkhornResult:
        # One more coordinate, apart by `height`, adds height^2 / 2 to every cost.
        lifted = torch.cat([y, torch.full_like(y[:, :1], height)], 1)
        flat = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        options = {"eps": 0.2, "cost": "half_sqeuclidean", "max_iter": 1000, "backend": backend}
        return fewstep.sinkhorn(flat, lifted, a=a, b=b, **options)

    plan = solve(0.0).plan()
    torch.testing.assert_close(plan.sum(0), b, rtol=0, atol=1e-14)
    torch.testing.assert_close(plan.sum(1), a, rtol=0, atol=1e-10)
    torch.testing.assert_close(solve(3.0).plan(), plan, rtol=0, atol=1e-12)


def test_velocity_is_the_gradient_of_the_energy(backend: str) -> None:
    x, x2, y = clouds()
    flow = WFlow(eps=0.1, max_iter=1500, normalize=False, backend=backend)
    v, metrics = velocity(flow, x, x2, y)
    s, eps = metrics["scale"], flow.eps * x.shape[1]
    points = (x / s).requires_grad_()
    energy = entropic_cost(points, y / s, eps) - entropic_cost(points, x2 / s, eps)
    (grad,) = torch.autograd.grad(energy, points)
    torch.testing.assert_close(v, -len(x) * grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(metrics["drift"], v.square().mean())


def test_loss_gradient_is_that_of_the_frozen_energy(backend: str) -> None:
    groups, n, d = 2, 8, 3
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4 + groups, 16), nn.SiLU(), nn.Linear(16, d)).double()

    def generator(z: Tensor, labels: Tensor) -> Tensor:
        return net(torch.cat([z, nn.functional.one_hot(labels, groups)], 1))

    noise = torch.randn(2, groups, n, 4, dtype=torch.float64)
    y = torch.randn(groups, n, d, dtype=torch.float64) + 1
    labels = torch.arange(groups)
    flow = WFlow(eps=0.1, max_iter=1500, step_size=0.7, normalize=False, backend=backend)
    loss, metrics = flow(generator, noise, y, labels)
    actual = torch.autograd.grad(loss, net.parameters())

    s, eps = metrics["scale"], flow.eps * d
    x, x2 = (generator(z.flatten(0, 1), labels.repeat_interleave(n)) for z in noise)
    x, x2 = x.reshape(groups, n, d) / s, x2.detach().reshape(groups, n, d) / s
    energy = sum(
        entropic_cost(x[g], y[g] / s, eps) - entropic_cost(x[g], x2[g], eps) for g in range(groups)
    )
    expected = torch.autograd.grad(2 * flow.step_size / d * energy / groups, net.parameters())
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_no_velocity_where_both_batches_coincide(
    backend: str, normalize: bool, dtype: torch.dtype
) -> None:
    # Points in whole vectors, so that ATen rounds every problem of the batch alike.
    x, x2, _ = (t.to(dtype) for t in clouds(3, n=32, d=5))
    v, metrics = velocity(WFlow(normalize=normalize, backend=backend), x, x2, x2)
    assert torch.count_nonzero(v) == 0
    assert metrics["drift"] == 0


@pytest.mark.parametrize("max_iter", [1, 10])
def test_equilibrium_is_unbiased_with_two_batches_only(backend: str, max_iter: int) -> None:
    redraws = 400
    x, x2, y = torch.randn(3, redraws, 32, 2, dtype=torch.float64)
    x = x[:1].expand_as(x2)
    flow = WFlow(eps=0.1, max_iter=max_iter, normalize=False, backend=backend)

    def bias(x2: Tensor) -> tuple[float, float]:
        v, _ = velocity(flow, x, x2, y)
        floor = (v.var(0) / redraws).mean().sqrt()
        return v.mean(0).square().mean().sqrt().item(), floor.item()

    two, floor = bias(x2)
    assert two < 1.5 * floor
    one, floor = bias(x)
    assert one > 3 * floor


def test_gradient_reaches_the_first_batch_only(backend: str) -> None:
    calls: list[tuple[Tensor, bool]] = []

    def generator(z: Tensor) -> Tensor:
        calls.append((z.detach(), torch.is_grad_enabled()))
        return z

    x, x2, y = clouds()
    noise, y = torch.stack([x, x2]).requires_grad_(), y.requires_grad_()
    loss, metrics = WFlow(backend=backend)(generator, noise, y)
    loss.backward()
    assert torch.equal(calls[0][0], x)
    assert torch.equal(calls[1][0], x2)
    assert [grad for _, grad in calls] == [True, False]
    assert y.grad is None
    assert not any(t.requires_grad for t in metrics.values())


def test_mean_velocity_is_the_difference_of_means(backend: str) -> None:
    x, x2, y = clouds()
    flow = WFlow(eps=0.2, max_iter=2000, normalize=False, backend=backend)
    v, metrics = velocity(flow, x, x2, y)
    assert metrics["residual"] < 1e-13
    expected = (y.mean(0) - x2.mean(0)) / metrics["scale"]
    torch.testing.assert_close(v.mean(0), expected, rtol=0, atol=1e-12)


def test_infinite_temperature_moves_all_by_the_difference_of_means(backend: str) -> None:
    x, x2, y = clouds()
    v, metrics = velocity(WFlow(eps=1e9, normalize=False, backend=backend), x, x2, y)
    expected = ((y.mean(0) - x2.mean(0)) / metrics["scale"]).expand_as(v)
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-8)


def test_scale_is_the_mean_squared_distance(backend: str) -> None:
    x, x2, y = clouds(3, n=7, d=5)
    _, metrics = velocity(WFlow(backend=backend), x, x2, y)
    distances = torch.cdist(x, torch.cat([x, x2, y], 1))
    torch.testing.assert_close(metrics["scale"], (distances.square().mean() / 5).sqrt())


@pytest.mark.parametrize("normalize", [True, False])
def test_shift_and_scale_of_the_data(backend: str, normalize: bool) -> None:
    x, x2, y = clouds(2)
    flow = WFlow(normalize=normalize, step_size=0.5, backend=backend)
    v, metrics = velocity(flow, x, x2, y)
    moved, moved_metrics = velocity(flow, *(40 * t - 1000 for t in (x, x2, y)))
    torch.testing.assert_close(moved, v, rtol=0, atol=1e-10)
    torch.testing.assert_close(moved_metrics["scale"], 40 * metrics["scale"])
    if normalize:
        torch.testing.assert_close(v.square().mean(), torch.ones_like(v[0, 0, 0]))


def test_groups_are_independent_problems_with_one_scale(backend: str) -> None:
    x, x2, y = clouds(3)
    flow = WFlow(normalize=False, backend=backend)
    v, _ = velocity(flow, x, x2, y)
    order = torch.tensor([2, 0, 1])
    permuted, _ = velocity(flow, x[order], x2[order], y[order])
    torch.testing.assert_close(permuted, v[order], rtol=0, atol=1e-14)
    single, _ = velocity(flow, x[0], x2[0], y[0])
    twice, _ = velocity(flow, *(t[:1].expand(2, -1, -1) for t in (x, x2, y)))
    torch.testing.assert_close(twice[1], single, rtol=0, atol=1e-14)


def test_labels_and_image_shapes_reach_the_generator(backend: str) -> None:
    seen: list[Tensor] = []

    def generator(z: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return z.reshape(-1, 1, 2, 2)

    noise = torch.randn(2, 3, 5, 4, requires_grad=True)
    labels = torch.tensor([7, 2, 4])
    loss, _ = WFlow(backend=backend)(generator, noise, torch.randn(3, 5, 1, 2, 2), labels)
    assert loss.shape == ()
    assert seen[0].tolist() == [7] * 5 + [2] * 5 + [4] * 5


def test_sinkhorn_runs_in_float32_under_autocast(backend: str) -> None:
    net = nn.Linear(4, 3)
    noise, y = torch.randn(2, 16, 4), torch.randn(16, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = WFlow(backend=backend)(net, noise, y)
    loss.backward()
    assert loss.dtype == metrics["scale"].dtype == torch.float32
    assert net.weight.grad is not None


def test_affine_generator_learns_a_gaussian(backend: str) -> None:
    truth_mean, truth_std = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.5])

    def learn(second: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        mean, std = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
        optimizer = torch.optim.Adam([mean, std], lr=0.1)
        flow = WFlow(eps=0.05, normalize=False, backend=backend)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
            z, z2, w = torch.randn(3, 16, 2, generator=generator)
            noise = torch.stack([z, second(z2) if step else z2])
            loss, _ = flow(lambda z: mean + std * z, noise, truth_mean + truth_std * w)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return mean.detach(), std.detach().abs()

    mean, std = learn(lambda z2: z2)
    torch.testing.assert_close(mean, truth_mean, rtol=0, atol=0.1)
    torch.testing.assert_close(std, truth_std, rtol=0.1, atol=0)


BAD_OPTIONS = [
    ("eps", 0.0),
    ("eps", float("nan")),
    ("max_iter", 0),
    ("step_size", -1.0),
    ("step_size", float("inf")),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_bad_options(backend: str, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"WFlow: {name} .*{value}"):
        WFlow(backend=backend, **{name: value})


BAD_INPUT = [
    ((3, 8, 4), (8, 2), None, r"noise .*\(3, 8, 4\)"),
    ((2, 8), (8, 2), None, r"noise .*\(2, 8\)"),
    ((2, 8, 4), (8,), None, r"real .*\(8,\)"),
    ((2, 3, 8, 4), (16, 2), None, r"real .*\(16, 2\)"),
    ((2, 3, 8, 4), (2, 8, 2), None, r"real .*\(2, 8, 2\)"),
    ((2, 0, 4), (0, 2), None, r"noise .*empty.*\(2, 0, 4\)"),
    ((2, 8, 4), (0, 2), None, r"real .*empty.*\(0, 2\)"),
    ((2, 3, 8, 4, 4), (3, 8, 2), None, r"noise .*labels.*\(2, 3, 8, 4, 4\)"),
    ((2, 3, 8, 4), (3, 8, 2), (24,), r"labels .*\(24,\)"),
    ((2, 8, 4), (8, 5), None, r"generator must return 8 samples of 5.*\(8, 2\)"),
]


@pytest.mark.parametrize(("noise", "real", "labels", "message"), BAD_INPUT)
def test_bad_shapes(
    backend: str,
    noise: tuple[int, ...],
    real: tuple[int, ...],
    labels: tuple[int, ...] | None,
    message: str,
) -> None:
    given = None if labels is None else torch.zeros(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        WFlow(backend=backend)(nn.Linear(4, 2), torch.zeros(noise), torch.zeros(real), given)


def test_bad_dtypes_devices_and_backend(backend: str) -> None:
    net, noise, real = nn.Linear(4, 2), torch.zeros(2, 8, 4), torch.zeros(8, 2)
    with pytest.raises(TypeError, match=r"noise .*int64"):
        WFlow(backend=backend)(net, noise.long(), real)
    with pytest.raises(TypeError, match=r"real .*uint8"):
        WFlow(backend=backend)(net, noise, real.byte())
    with pytest.raises(ValueError, match=r"real .*meta"):
        WFlow(backend=backend)(net, noise, real.to("meta"))
    with pytest.raises(ValueError, match="'magic'"):
        WFlow(backend="magic")(net, noise, real)


def test_nan_comes_out_as_nan(backend: str) -> None:
    x, x2, y = clouds()
    loss, _ = WFlow(backend=backend)(lambda z: z, torch.stack([x * torch.nan, x2]), y)
    assert loss.isnan()
