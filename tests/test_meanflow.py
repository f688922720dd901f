from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.methods import MeanFlow, meanflow_sample
from fewstep.methods.draws import Draws, per_sample
from fewstep.networks import AverageVelocityMLP

KINDS = pytest.mark.parametrize("improved", [False, True])


class Gaussian(nn.Module):
    """The average velocity of data from N(m, s^2), times a gain that is 1.

    With y = z - (1 - t) m it is `(phi_{t->r} - z) / (r - t)` for the flow map
    `phi = (1 - r) m + y sigma_r / sigma_t`, and finite at r = t.
    """

    def __init__(self, m: float, s: float) -> None:
        super().__init__()
        self.m, self.s = m, s
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t, r, square = t[:, None], r[:, None], self.s**2
        top = ((1 - t) ** 2 * square + t**2).sqrt()
        low = ((1 - r) ** 2 * square + r**2).sqrt()
        slope = ((t + r) * (1 + square) - 2 * square) / (top * (top + low))
        return self.gain * ((z - (1 - t) * self.m) * slope - self.m)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(classes: int = 0) -> AverageVelocityMLP:
    torch.manual_seed(0)
    net = AverageVelocityMLP((3,), classes=classes, width=8, depth=2).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


def test_the_identity_holds_for_gaussian_data() -> None:
    rng = generator()
    z = torch.randn(200, 3, generator=rng, dtype=torch.float64)
    t, r = torch.rand(2, 200, generator=rng, dtype=torch.float64).sort(0, descending=True).values
    r[:20] = t[:20]
    exact = Gaussian(0.7, 0.4)
    v = exact(z, t, t).detach()
    out = fewstep.meanflow_target(exact, z, t, r, v)
    torch.testing.assert_close(out.value, out.target, rtol=0, atol=1e-10)


@KINDS
def test_nothing_is_left_to_learn_of_one_point(improved: bool) -> None:
    """Its conditional velocity is the marginal one, so the residual of each sample is 0."""
    exact = Gaussian(0.7, 0.0)
    x = torch.full((64, 3), 0.7, dtype=torch.float64)
    loss, metrics = MeanFlow(improved=improved, ratio=0.5)(exact, x, generator=generator())
    loss.backward()
    assert metrics["error"] < 1e-20
    assert exact.gain.grad is not None
    assert abs(exact.gain.grad) < 1e-9
    assert metrics["skipped"] == 0


@KINDS
def test_the_mean_gradient_vanishes_at_the_exact_velocity(improved: bool) -> None:
    exact, rng = Gaussian(0.7, 0.4), generator(1)
    flow = MeanFlow(improved=improved, ratio=0.5, power=0.0)
    slopes = []
    for gain in (1.0, 1.1):
        exact.gain.data.fill_(gain)
        own = []
        for _ in range(40):
            x = 0.7 + 0.4 * torch.randn(500, 1, generator=rng, dtype=torch.float64)
            (slope,) = torch.autograd.grad(flow(exact, x, generator=rng)[0], exact.gain)
            own.append(slope)
        slopes.append(torch.stack(own))
    z_scores = [(own.mean() / own.std() * math.sqrt(len(own))).item() for own in slopes]
    assert abs(z_scores[0]) < 4 < abs(z_scores[1])


def test_times_have_their_law() -> None:
    x = torch.zeros(40_000, 1, dtype=torch.float64)
    t, r = MeanFlow(ratio=0.25, mean=-0.4, std=1.0).times(x, generator=generator())
    assert torch.all((r >= 0) & (r <= t) & (t <= 1))
    apart = r < t
    assert abs(apart.double().mean() - 0.25) < 0.01
    both = torch.cat([t[apart], r[apart]]).logit()
    assert abs(both.mean() + 0.4) < 0.03
    assert abs(both.std() - 1) < 0.03
    # The larger of two normal numbers has mean 1 / sqrt(pi).
    assert abs(t.logit().mean() + 0.4 - math.pi**-0.5) < 0.03
    for ratio, expected in ((0.0, 0), (1.0, len(x))):
        t, r = MeanFlow(ratio=ratio).times(x, generator=generator())
        assert (r < t).sum() == expected


def test_a_sample_draws_the_same_in_any_batch() -> None:
    x, ids = torch.zeros(8, 2), torch.arange(8)
    flow = MeanFlow(ratio=0.5)
    t, r = flow.times(x, generator=generator(), sample_ids=ids)
    again = flow.times(x[5:], generator=generator(), sample_ids=ids[5:])
    assert torch.equal(torch.stack([t, r])[:, 5:], torch.stack(again))


def reference(
    flow: MeanFlow, net: AverageVelocityMLP, x: Tensor, labels: Tensor | None, null: int | None
) -> tuple[Tensor, Tensor]:
    """The loss and mean squared residual, with derivatives by double backward."""
    draws = Draws("test", x, generator(), None)
    t, r = flow._times(draws)
    noise = draws.normal()
    condition: tuple[Tensor, ...] = ()
    kept = torch.ones(len(x), dtype=torch.bool)
    if labels is not None:
        assert null is not None
        kept = draws.uniform(dtype=torch.float64) >= flow.drop
        condition = (labels.where(kept, torch.tensor(null)),)
    z = (1 - per_sample(t, x)) * x + per_sample(t, x) * noise
    v = noise - x
    if labels is not None:
        nothing = net(z, t, t, torch.full_like(labels, null or 0))
        of_class = net(z, t, t, labels)
        guided = flow.omega * v + flow.kappa * of_class
        guided = guided + (1 - flow.omega - flow.kappa) * nothing
        v = torch.where(kept[:, None], guided, v).detach()
    w = net(z, t, t, *condition).detach() if flow.improved else v
    zs, ts = z.clone().requires_grad_(), t.clone().requires_grad_()
    u = net(zs, ts, r, *condition)
    dummy = torch.ones_like(u, requires_grad=True)
    of_z, of_t = torch.autograd.grad(u, (zs, ts), dummy, create_graph=True)
    inner = (of_z * w).sum() + of_t.sum()
    (tangent,) = torch.autograd.grad(inner, dummy)
    value = net(z, t, r, *condition)
    target = v - per_sample(t - r, x) * tangent.detach()
    square = (value - target).square().sum(1)
    weight = (square.detach() + flow.offset) ** -flow.power
    return (weight * square).mean(), square.mean() / x.shape[1]


@KINDS
@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.0},
        {"ratio": 0.5, "power": 0.5, "offset": 0.1},
        {"ratio": 0.5, "power": 0.0},
        {"ratio": 0.5, "omega": 2.0, "drop": 0.3},
        {"ratio": 0.5, "omega": 0.8, "kappa": 0.6, "drop": 0.3},
    ],
)
def test_the_loss_is_that_of_double_backward(options: dict[str, Any], improved: bool) -> None:
    guided = "omega" in options
    flow = MeanFlow(improved=improved, **options)
    net = network(4 if guided else 0)
    x = torch.randn(32, 3, generator=generator(5), dtype=torch.float64)
    labels = torch.arange(32) % 4 if guided else None
    null = 4 if guided else None
    expected, error = reference(flow, net, x, labels, null)
    loss, metrics = flow(net, x, labels, null_label=null, generator=generator())
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(metrics["error"], error.detach(), rtol=1e-11, atol=0)
    own, its = (torch.autograd.grad(value, list(net.parameters())) for value in (loss, expected))
    for a, b in zip(own, its, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_weight_evens_out_large_residuals() -> None:
    net, x = network(), torch.randn(16, 3, dtype=torch.float64)
    loss, _ = MeanFlow()(net, 100 * x, generator=generator())
    assert abs(loss - 1) < 1e-3  # |delta|^2 / (|delta|^2 + offset)


@pytest.mark.parametrize("bad", [1e9, math.inf, math.nan])
def test_samples_whose_tangent_explodes_are_left_out(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(16, 3, dtype=torch.float64)
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)

    def part(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Its slope in t is `bad` at the first half of the times."""
        middle = t.detach().median()
        steep = torch.where(t <= middle, bad, 0.0)
        return gain * z + ((t - t.detach()) * steep)[:, None]

    flow = MeanFlow(ratio=1.0)
    loss, metrics = flow(part, x, generator=generator(), engine="reverse")
    loss.backward()
    assert metrics["skipped"] == 0.5
    assert all(value.isfinite() for value in (loss, metrics["error"], metrics["tangent"]))
    assert gain.grad is not None
    assert gain.grad.isfinite()

    def everywhere(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return gain * z + ((t - t.detach()) * 1e9)[:, None]

    with pytest.raises(FloatingPointError, match=r"at every sample; lower lr"):
        flow(everywhere, x, generator=generator(), engine="reverse")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    loss, metrics = flow(everywhere, x, generator=generator(), engine="reverse")
    assert loss.isnan()
    assert metrics["skipped"] == 1


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samples_of_the_exact_velocity_need_one_step(steps: int) -> None:
    noise = torch.randn(50, 2, generator=generator(), dtype=torch.float64)
    samples = meanflow_sample(Gaussian(0.7, 0.4), noise, steps=steps)
    torch.testing.assert_close(samples, 0.7 + 0.4 * noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 1.5}, ValueError, "ratio must be in [0, 1], got 1.5"),
        ({"mean": math.inf}, ValueError, "mean must be finite, got inf"),
        ({"std": 0}, ValueError, "std must be positive and finite, got 0"),
        ({"power": -1}, ValueError, "power must be at least 0 and finite, got -1"),
        ({"offset": 0}, ValueError, "offset must be positive and finite, got 0"),
        ({"omega": math.nan}, ValueError, "omega must be positive and finite, got nan"),
        ({"kappa": 1}, ValueError, "kappa must be in [0, 1), got 1"),
        ({"drop": 1}, ValueError, "drop must be in [0, 1), got 1"),
        ({"limit": 0}, ValueError, "limit must be positive, got 0"),
        ({"improved": 1}, TypeError, "improved must be True or False, got 1"),
        ({"ratio": "all"}, TypeError, "ratio must be a number, got 'all'"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        MeanFlow(**options)
    assert str(raised.value) == f"MeanFlow: {message}"


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, X), TypeError, "network must be callable"),
        ((lambda z, t, r: z[:, :2], X), ValueError, "network must return (4, 3), got (4, 2)"),
        ((network(), X.long()), TypeError, "x must have a floating dtype"),
        ((network(), X[:0]), ValueError, "not empty, got (0, 3)"),
        ((network(), X[:, 0]), ValueError, "got (4,)"),
        ((network(4), X, torch.zeros(4)), TypeError, "labels must be int64, got torch.float32"),
        ((network(4), X, torch.zeros(3).long()), ValueError, "labels must be (4,), got (3,)"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        MeanFlow()(*arguments)
    assert message in str(raised.value)


def test_guidance_without_labels_and_samples_without_steps() -> None:
    with pytest.raises(ValueError, match=r"omega 2\.0 and kappa 0\.0 need labels, got None"):
        MeanFlow(omega=2.0)(network(), X)
    with pytest.raises(ValueError, match=r"need null_label, got None"):
        MeanFlow(omega=2.0)(network(4), X, torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"steps must be an integer of at least 1, got 0"):
        meanflow_sample(network(), X, steps=0)
    with pytest.raises(FloatingPointError, match="samples are not finite after 2 steps"):
        meanflow_sample(lambda z, t, r: z * math.nan, X, steps=2)
