from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from fewstep.baselines import Drifting, FlowMatching, KernelFlow, optimal_assignment
from fewstep.baselines.kernels import Energy
from fewstep.methods.problems import Problems


def dense_velocity(flow: Drifting, clouds: list[Tensor], w: Tensor) -> tuple[Tensor, Tensor]:
    """s and V before the rms, `[T, G, N, C]`, as Algorithm 2 has it, without logarithms."""
    x, y, x2, *u = clouds
    groups, n, d = x.shape
    seen = n - (not flow.resample)
    weights, lengths, targets = [], [], []
    for g in range(groups):
        own = [torch.ones(len(y[g])).double(), torch.ones(n).double()]
        own += [w[g] * seen / len(u[0][g]) * torch.ones(len(u[0][g])).double()] if u else []
        weights.append(torch.cat(own))
        targets.append(torch.cat([y[g], x2[g]] + [t[g] for t in u]))
        lengths.append((x[g][:, None] - targets[g][None]).norm(dim=2))
    total = sum((weights[g] * lengths[g]).sum() for g in range(groups))
    mean = total / (n * sum(own.sum() for own in weights))
    s, m = mean / math.sqrt(d), len(y[0])
    taus = flow.tau if isinstance(flow.tau, tuple) else (flow.tau,)
    out = torch.zeros(len(taus), groups, n, d, dtype=x.dtype)
    for t, tau in enumerate(taus):
        for g in range(groups):
            k = (-lengths[g] / mean / tau).exp()
            if not flow.resample:
                k[torch.arange(n), m + torch.arange(n)] = 0
            counted = k * (weights[g] > 0)
            a = (k / k.sum(0) * counted / counted.sum(1, keepdim=True)).sqrt() * weights[g]
            positive, negative = a[:, :m], a[:, m:]
            v = (positive * negative.sum(1, keepdim=True)) @ targets[g][:m]
            out[t, g] = v - (negative * positive.sum(1, keepdim=True)) @ targets[g][m:]
    return s, out / s


def inputs(groups: int = 2, n: int = 7, d: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, groups, n, d, generator=generator, dtype=torch.float64)
    real = torch.randn(groups, n, d, generator=generator, dtype=torch.float64) + 0.5
    return noise, real, torch.randn(groups, 4, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("memory_limit", [1, 2**28])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resample": True},
        {"tau": 0.1, "normalize": False},
        {"tau": [0.1, 0.5], "step_size": 0.5},
    ],
    ids=str,
)
def test_loss_and_gradient_against_loops(
    options: dict[str, Any], guided: bool, memory_limit: int
) -> None:
    noise, real, uncond = inputs()
    w = torch.tensor([0.0, 0.8], dtype=torch.float64)
    flow = Drifting(**options, memory_limit=memory_limit)
    own = noise.clone().requires_grad_()
    guidance: dict[str, Any] = {"uncond": uncond, "guidance": w} if guided else {}
    loss, metrics = flow(lambda z: z, own, real, **guidance)
    (actual,) = torch.autograd.grad(loss, own)

    x, x2 = noise
    clouds = [x, real, x2 if flow.resample else x] + ([uncond] if guided else [])
    s, v = dense_velocity(flow, clouds, w)
    rms = v.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(metrics["drift"], rms.square().mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(metrics["scale"], s, rtol=1e-12, atol=0)
    v = (v / rms[:, None, None, None] if flow.normalize else v).sum(0) * flow.step_size
    torch.testing.assert_close(loss, v.square().mean(), rtol=1e-10, atol=0)
    expected = -2 * v / s / v.numel()
    torch.testing.assert_close(actual[0], expected, rtol=1e-9, atol=1e-13)
    assert torch.count_nonzero(actual[1]) == 0


def test_features_groups_and_sums() -> None:
    """A type is a call of its own; so is a group with `per_group`, and problems of locations."""
    noise, real, _ = inputs(d=6)

    def call(take: Any, per_group: bool = False, part: slice = slice(None)) -> Tensor:
        flow = Drifting(per_group=per_group)
        return flow(lambda z: z, noise[:, part], real[part], features=take)[0]

    def maps(t: Tensor) -> Tensor:
        return t.reshape(-1, 3, 1, 2)

    both = call(lambda t: {"maps": maps(t), "all": t})
    torch.testing.assert_close(both, call(maps) + call(lambda t: t))
    each = (call(maps, part=slice(0, 1)) + call(maps, part=slice(1, 2))) / 2
    torch.testing.assert_close(call(maps, per_group=True), each)
    assert not torch.isclose(call(maps), each)


@pytest.mark.parametrize("distance", [3.0, 30.0])
def test_far_data_still_draw(distance: float) -> None:
    """Clusters so far apart that the affinities underflow, in float32."""
    noise = 0.01 * torch.randn(2, 16, 2)
    real = 0.01 * torch.randn(16, 2) + torch.tensor([distance, 0.0])
    own = noise.clone().requires_grad_()
    loss, _ = Drifting(tau=0.02)(lambda z: z, own, real)
    loss.backward()
    assert own.grad is not None
    assert loss.item() == pytest.approx(1, abs=1e-4)
    assert (own.grad[0, :, 0] < 0).float().mean() > 0.8  # downhill is towards the data


def test_modes_do_not_collapse_to_their_mean() -> None:
    """Samples reach four modes of a square, where a floor of the affinities pulls to the middle."""
    torch.manual_seed(0)
    modes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    flow = Drifting()
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 250)
        real = modes[torch.randint(4, (128,))] + 0.05 * torch.randn(128, 2)
        loss, _ = flow(net, torch.randn(2, 128, 2), real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    apart = torch.cdist(net(torch.randn(1000, 2)).detach(), modes)
    assert (apart.min(1).values < 0.35).float().mean() > 0.6


def test_no_drift_without_a_point_of_weight_zero() -> None:
    noise, real, uncond = inputs()
    loss, metrics = Drifting(normalize=False)(lambda z: z, noise, real)
    away, own = Drifting(normalize=False)(lambda z: z, noise, real, uncond=uncond, guidance=0.0)
    torch.testing.assert_close(away, loss)
    torch.testing.assert_close(own["scale"], metrics["scale"])


def test_bad_options_and_inputs() -> None:
    for options, message in (
        ({"tau": 0.0}, "tau must be positive and finite, got 0.0"),
        ({"tau": ()}, r"tau must be positive and finite, got \(\)"),
        ({"step_size": math.inf}, "step_size must be positive and finite, got inf"),
        ({"reduction": "none"}, "reduction must be one of"),
        ({"memory_limit": 0}, "memory_limit must be positive"),
    ):
        with pytest.raises(ValueError, match=f"Drifting: {message}"):
            Drifting(**options)  # type: ignore[arg-type]
    noise, real, _ = inputs()
    with pytest.raises(ValueError, match=r"Drifting: noise must have 2 points .*\(2, 1, 3\)"):
        Drifting()(lambda z: z, noise[:, 0, :1], real[0])
    with pytest.raises(ValueError, match=r"Drifting: real must be \(2, 'M', '...'\)"):
        Drifting()(lambda z: z, noise, real[:1])
    x = noise.clone()
    x[0, 0, 0] = math.nan
    assert Drifting()(lambda z: z, x, real)[0].isnan()


@pytest.mark.parametrize("energy", ["mmd", "kl"])
def test_kernel_flows_follow_the_gradient_of_their_energy(energy: Energy) -> None:
    torch.manual_seed(0)
    x, other, y = torch.randn(3, 40, 2, dtype=torch.float64)
    flow = KernelFlow(energy, bandwidth=0.3, normalize=False)
    p = Problems(x[None, None], other[None, None], y[None, None], None, torch.zeros(1))
    found = flow._velocity(p)
    s = found.scale
    points = (x / s).requires_grad_()

    def kernel(z: Tensor) -> Tensor:
        return (-(points[:, None] - z / s).square().sum(2) / (2 * 2 * 0.3**2)).exp()

    k, k_self = kernel(y), kernel(other)
    energies = {"mmd": k_self.mean(1) - k.mean(1), "kl": k_self.mean(1).log() - k.mean(1).log()}
    (slope,) = torch.autograd.grad(energies[energy].sum(), points)
    torch.testing.assert_close(found.v[0, 0], -slope, rtol=1e-10, atol=1e-12)


def test_kernel_flows_are_at_rest_between_equal_clouds() -> None:
    x, y = torch.randn(2, 40, 2)
    for energy in get_args(Energy):
        p = Problems(x[None, None], y[None, None], y[None, None], None, torch.zeros(1))
        assert KernelFlow(energy, normalize=False)._velocity(p).v.abs().max() < 1e-5


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan])
def test_kernel_flows_refuse_bandwidths(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="KernelFlow: bandwidth must be"):
        KernelFlow(bandwidth=bandwidth)


def test_optimal_pairs_are_the_nearest_permutation() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 3)
    cost = torch.cdist(x, y).square()
    every = torch.tensor(list(itertools.permutations(range(6))))
    best = every[cost[torch.arange(6), every].sum(1).argmin()]
    assert torch.equal(optimal_assignment(x, y), best)


def test_flow_matching_of_pairs_has_no_other_noise() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(2, 64, 3)
    # With v = noise - x itself the loss is 0 whatever t was drawn.
    assert FlowMatching()(lambda z, t: noise - x, x, noise)[0].item() == 0
    assert FlowMatching()(lambda z, t: noise - x, x)[0].item() > 0.1


def test_flow_matching_learns_the_velocity_at_noise() -> None:
    torch.manual_seed(0)
    x = torch.full((4000, 1), 3.0)
    seen = []

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        seen.append((z, t))
        return (z - x) / t[:, None]  # right for data at one point

    loss, _ = FlowMatching("optimal")(velocity, x)
    (z, t), *_ = seen
    assert loss.item() < 1e-6
    assert 0.3 < t.mean() < 0.7
    assert z[t > 0.98].mean() < 0.5 < z[t < 0.5].mean()


def test_flow_matching_refuses_pairs_that_are_given_and_optimal() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="noise must be"):
        FlowMatching("optimal")(lambda z, t: z, x, x)
    with pytest.raises(ValueError, match="noise must be"):
        FlowMatching()(lambda z, t: z, x, x[:2])
    with pytest.raises(ValueError, match="pairing must be one of"):
        FlowMatching("nearest")  # type: ignore[arg-type]
