"""LinesMatching: its levels, its adversarial part, its networks, and what it learns on toys."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.data.toys import GaussianMixture
from fewstep.methods import LinesMatching
from fewstep.methods.augment import diff_augment
from fewstep.methods.lines import adaptive_weight, pseudo_huber
from fewstep.metrics.straightness import straightness
from fewstep.networks import (
    ConvDiscriminator,
    EDMPrecond,
    LinePrecond,
    MLPDiscriminator,
    ResidualMLP,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(n: int = 16, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x0 = torch.randn(n, *(shape or (3,)), generator=seeded(1), dtype=dtype)
    return x0, 0.3 * x0.sin() + 1


class Spy:
    """A network that keeps what it was asked."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.sigma: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, *labels: Tensor) -> Tensor:
        self.x.append(x.clone())  # samplers use the memory again
        self.sigma.append(sigma)
        return torch.zeros_like(x)


def test_the_loss_is_the_endpoints_error() -> None:
    x0, x1 = pair()
    network, spy = torch.nn.Linear(3, 3).double(), Spy()
    lines = LinesMatching()
    lines(spy, x0, x1, generator=seeded(7))
    sigma = spy.sigma[0]
    assert torch.equal(spy.x[0], x1 + sigma[:, None] * x0)
    loss, metrics = lines(lambda x, s: network(x), x0, x1, generator=seeded(7))
    expected = (network(x1 + sigma[:, None] * x0) - x1).square().mean()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(metrics["lines"], loss)
    assert not metrics["output"].requires_grad


def test_uniform_levels() -> None:
    spy, (x0, x1) = Spy(), pair(4000, 1)
    LinesMatching(sigma_min=0.5, sigma_max=9.0)(spy, x0, x1)
    s = (spy.sigma[0] / (1 + spy.sigma[0])).sort().values
    expected = torch.linspace(1 / 3, 0.9, 4000, dtype=s.dtype)
    torch.testing.assert_close(s, expected, rtol=0, atol=0.03)


def test_levels_of_the_teacher() -> None:
    spy, (x0, x1) = Spy(), pair(2000, 1)
    LinesMatching(law="levels", levels=18)(spy, x0, x1)
    levels, counts = spy.sigma[0].unique(return_counts=True)
    torch.testing.assert_close(levels, fewstep.karras_sigmas(18)[:-1].flip(0))
    assert counts.min() > 60
    x = spy.x[0]
    assert torch.equal(x, x1 + spy.sigma[0][:, None] * x0)


@pytest.mark.parametrize("indices", [(0,), (0, 3, 5), (2, 17)])
def test_sampling_optimised_training_sees_its_levels_alone(indices: tuple[int, ...]) -> None:
    spy, (x0, x1) = Spy(), pair(500, 2)
    LinesMatching(law="sot", indices=indices)(spy, x0, x1)
    (x,), (sigma,) = spy.x, spy.sigma
    levels = fewstep.karras_sigmas(18)[list(indices)]
    assert set(sigma.tolist()) == set(levels.tolist())
    top = sigma == 80.0
    assert top.any() == (0 in indices)
    # A sampler starts from noise alone.
    assert torch.equal(x[top], 80.0 * x0[top])
    assert torch.equal(x[~top], x1[~top] + sigma[~top, None] * x0[~top])


def test_metrics_of_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    x0, x1 = pair(5, 4)
    zero = Spy()
    squared = x1.square().sum(1)
    c = 0.00054 * 4
    expected = (((squared + c * c).sqrt() - c) / 4).mean()
    loss, _ = LinesMatching(metric="pseudo_huber")(zero, x0, x1)
    torch.testing.assert_close(loss, expected)
    loss, _ = LinesMatching()(zero, x0, x1, metric=lambda a, b: (a - b).abs().amax(1))
    torch.testing.assert_close(loss, x1.abs().amax(1).mean())
    exact = x1.clone().requires_grad_()
    (slope,) = torch.autograd.grad(pseudo_huber(exact, x1).sum(), exact)
    assert torch.equal(slope, torch.zeros_like(x1))


def test_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    x0, x1 = pair(2, 1, 8, 8)
    lines = LinesMatching(metric="lpips")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="needs the package lpips: pip install lpips"):
        lines(Spy(), x0, x1)
    with pytest.raises(ValueError, match=r"takes images \[B, 1 or 3, H, W\], got \(16, 3\)"):
        lines(Spy(), *pair())

    class Network(nn.Module):
        def __init__(self, **options: object) -> None:
            super().__init__()
            assert options == {"net": "vgg", "verbose": False}

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert a.shape == b.shape == (2, 3, 224, 224)
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    loss, _ = lines(lambda x, s: x1 + 0.5, x0, x1)
    torch.testing.assert_close(loss, torch.tensor(0.25))


def test_adaptive_weight() -> None:
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    a, b = (3 * weight).sum(), weight.square().sum()
    lam = adaptive_weight(a, b, weight)
    expected = 6 / (2 * weight.norm() + 1e-4)  # |(3, 3, 3, 3)| = 6
    torch.testing.assert_close(lam, expected.detach())
    assert not lam.requires_grad
    for c in (0.5, 2.0):  # 1 / c, up to the 1e-4
        torch.testing.assert_close(adaptive_weight(a, c * b, weight), lam / c, rtol=1e-4, atol=0)
    assert adaptive_weight(a, 1e-9 * b, weight) == 10
    assert adaptive_weight(a, 1e9 * b, weight) == 0.01


class Critic(nn.Module):
    """Two heads of different sizes, as feature networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 1)]).double()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [5 * head(x) for head in self.heads]


def test_the_adversarial_loss() -> None:
    x0, x1 = pair()
    network, critic = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double(), Critic()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return self.inner(x / (1 + sigma[:, None]))

    lines, options = LinesMatching(start=10), {"discriminator": critic, "generator": seeded(4)}
    early, metrics = lines(Own(), x0, x1, step=9, **options)
    assert sorted(metrics) == ["lines", "output"]
    assert torch.equal(early, metrics["lines"])
    options["generator"] = seeded(4)
    loss, metrics = lines(Own(), x0, x1, step=10, **options)
    assert torch.equal(metrics["lines"], early)
    logits = critic(metrics["output"])
    adversarial = -torch.cat([t.flatten() for t in logits]).mean()
    torch.testing.assert_close(metrics["adversarial"], adversarial.detach())
    torch.testing.assert_close(loss, 0.5 * early + metrics["lam"] * adversarial)
    assert 0.01 < metrics["lam"] < 10
    half, _ = LinesMatching(start=10, warmup=4)(
        Own(), x0, x1, step=11, discriminator=critic, generator=seeded(4)
    )
    torch.testing.assert_close(half, 0.5 * early + 0.5 * metrics["lam"] * adversarial)
    own = [torch.autograd.grad(t, network[2].weight, retain_graph=True)[0] for t in (early, loss)]
    # At the last layer the adversarial part is as long as the whole of L.
    rest = own[1] - 0.5 * own[0]
    torch.testing.assert_close(rest.norm(), own[0].norm(), rtol=1e-2, atol=0)


def test_the_discriminators_loss() -> None:
    real, fake = pair()
    critic = Critic()
    loss, metrics = LinesMatching().discriminator_loss(critic, real, fake.requires_grad_())
    flat = [torch.cat([t.flatten() for t in critic(x)]) for x in (real, fake)]
    torch.testing.assert_close(loss, (1 - flat[0]).relu().mean() + (1 + flat[1]).relu().mean())
    torch.testing.assert_close(metrics["real"], flat[0].mean().detach())
    assert sorted(metrics) == ["fake", "real"]
    loss.backward()
    assert fake.grad is None

    class Quadratic(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return 0.5 * x.square().sum(1) * labels

    labels = (torch.full((16,), 2.0), torch.full((16,), 3.0))
    plain, _ = LinesMatching().discriminator_loss(Quadratic(), real, fake, labels)
    penalised, metrics = LinesMatching(r1=0.4).discriminator_loss(Quadratic(), real, fake, labels)
    squared = (2 * real).square().sum(1).mean()
    torch.testing.assert_close(metrics["r1"], squared)
    torch.testing.assert_close(penalised - plain, 0.2 * squared)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_discriminators_learn(kind: str, classes: int) -> None:
    torch.manual_seed(0)
    shape = (2,) if kind == "mlp" else (1, 5, 6)
    network = {"mlp": MLPDiscriminator, "conv": ConvDiscriminator}[kind](
        *((2,) if kind == "mlp" else (shape,)), classes=classes, width=16
    )
    lines = LinesMatching(r1=0.1 if kind == "mlp" else 0.0, augment=())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    labels = torch.arange(60) % max(classes, 1)
    # With classes, only their pairing with the sign tells real from fake.
    sign = (labels - 1.0 if classes else torch.ones(60)).reshape(-1, *(1,) * len(shape))
    real = sign + 0.1 * torch.randn(60, *shape)
    fake = -sign + 0.1 * torch.randn(60, *shape)
    both = (labels, labels) if classes else None
    losses = []
    for _ in range(60):
        loss, _ = lines.discriminator_loss(network, real, fake, both)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # A third of the classes are at 0 for both, where nothing can be told.
    assert losses[-1] < (1.2 if classes else 0.5) < losses[0]


def test_spectral_norms_bound_the_slope() -> None:
    network = ConvDiscriminator((1, 8, 8), width=8)
    for _ in range(50):
        network(torch.randn(2, 1, 8, 8))
    network.eval()
    x = torch.randn(64, 1, 8, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x).sum(), x)
    # A 3 x 3 convolution's norm is at most 3 times that of its matrix.
    assert slope.flatten(1).norm(dim=1).max() <= 27
    weights = [m.weight.flatten(1) for m in network.modules() if isinstance(m, nn.Conv2d)]
    for w in weights:
        torch.testing.assert_close(torch.linalg.svdvals(w)[0], torch.ones(()), rtol=1e-2, atol=0)


POLICY = ("colour", "translation", "cutout")


@pytest.mark.parametrize("policy", [*((name,) for name in POLICY), POLICY])
def test_augmentations_are_shared_and_differentiable(policy: tuple[str, ...]) -> None:
    x = torch.rand(6, 3, 16, 9, dtype=torch.float64) + 0.5
    one, two = diff_augment(x, x.clone(), policy=policy, generator=seeded())
    assert torch.equal(one, two)
    assert one.shape == x.shape
    assert len({tuple(t.flatten().tolist()) for t in one / x}) == 6  # each sample has its own
    (again,) = diff_augment(x, policy=policy, generator=seeded())
    assert torch.equal(again, one)
    few = x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: diff_augment(t, policy=policy, generator=seeded(1))[0], few
    )


def test_each_augmentation() -> None:
    x = torch.rand(200, 3, 16, 8) + 0.5
    (moved,) = diff_augment(x, policy=["translation"])
    shifts = set()
    for before, after in zip(x, moved, strict=True):
        down, right = ((after[0] != 0).any(axis).long().argmax() for axis in (1, 0))
        bottom, end = ((after[0] != 0).any(axis).long().flip(0).argmax() for axis in (1, 0))
        dy, dx = int(down - bottom), int(right - end)
        shifts.add((dy, dx))
        kept = after[:, down : 16 - bottom, right : 8 - end]
        top, left = max(-dy, 0), max(-dx, 0)
        height, width = kept.shape[1:]
        assert (height, width) == (16 - abs(dy), 8 - abs(dx))
        assert torch.equal(kept, before[:, top : top + height, left : left + width])
    assert shifts == {(dy, dx) for dy in range(-2, 3) for dx in range(-1, 2)}

    (cut,) = diff_augment(x, policy=["cutout"])
    sizes = (cut == 0).any(1).flatten(1).sum(1)
    assert sizes.max() == 3 * 2
    assert sizes.min() >= 1
    assert ((cut == 0) | (cut == x)).all()

    (coloured,) = diff_augment(x, policy=["colour"])
    mean, before = (t.mean((1, 2, 3)) for t in (coloured, x))
    assert (mean - before).abs().max() <= 0.5 + 1e-6
    contrast = (coloured.mean(1) - mean[:, None, None]) / (x.mean(1) - before[:, None, None])
    low, high = contrast.flatten(1).min(1).values, contrast.flatten(1).max(1).values
    torch.testing.assert_close(low, high, rtol=1e-2, atol=1e-2)
    assert 0.5 < low.min() < 0.6 < 1.4 < high.max() < 1.5 + 1e-2


def test_preconditioning() -> None:
    torch.manual_seed(0)
    x, sigma = torch.randn(4, 2, 3), torch.tensor([0.01, 0.5, 2.0, 80.0])
    wide, sd = sigma[:, None, None], 0.7

    class Raw(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x.cos() + t[:, None, None]

    raw = Raw()
    root = (wide**2 + sd**2).sqrt()
    expected = sd**2 / root**2 * x + wide * sd / root * raw(x / root, sigma.log() / 4)
    torch.testing.assert_close(EDMPrecond(raw, sigma_data=sd)(x, sigma), expected)
    z, s = x / (1 + wide), sigma / (1 + sigma)
    expected = z - s[:, None, None] * raw(z, s)
    torch.testing.assert_close(LinePrecond(raw)(x, sigma), expected)

    # The right F is the line's own velocity, whatever the level.
    x0, x1 = pair(4, 2, 3, dtype=torch.float32)
    line = LinePrecond(Frozen(x0 - x1))
    torch.testing.assert_close(line(x1 + wide * x0, sigma), x1, rtol=0, atol=1e-5)


class Frozen(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Tensor) -> Tensor:
        return self.value


def table_one(n: int = 400) -> tuple[GaussianMixture, Tensor]:
    """The toy of table 1 and noise: two modes in 2 of 128 dimensions, N(0, 1) in the others."""
    means = torch.zeros(2, 128, dtype=torch.float64)
    means[0, :2], means[1, :2] = -1, 1
    variances = torch.ones_like(means)
    variances[:, :2] = 0.1**2
    return GaussianMixture(means, variances), torch.randn(n, 128, generator=seeded()).double()


def flow_path(mixture: GaussianMixture, x0: Tensor, steps: int = 100) -> tuple[Tensor, Tensor]:
    times = torch.linspace(1, 1e-6, steps + 1, dtype=torch.float64)
    path = [x0]
    for a, b in itertools.pairwise(times):
        first = mixture.velocity(path[-1], a)
        second = mixture.velocity(path[-1] + (b - a) * first, b)
        path.append(path[-1] + (b - a) / 2 * (first + second))
    return torch.stack(path), times


def test_the_exact_flow_is_as_curved_as_its_closed_form() -> None:
    mixture, x0 = table_one()
    path, times = flow_path(mixture, x0)
    measured = straightness(path, times)
    assert measured.s1 == pytest.approx(6.64, abs=0.1)
    assert measured.s2 == pytest.approx(0.430, abs=0.01)
    assert measured.s1_rms == pytest.approx(measured.s1 / math.sqrt(128))
    # In a coordinate of N(0, 1) the path is x0 sqrt((1 - s)^2 + s^2), and it ends where it began.
    lengths = path[:, :, 2:].diff(dim=0).abs().sum(0)
    expected = (2 - math.sqrt(2)) * x0[:, 2:].abs()
    torch.testing.assert_close(lengths, expected, rtol=5e-3, atol=5e-3)
    ends = (path[-1, :, :2].abs() - 1).square().mean().sqrt()
    assert ends * math.sqrt(2) == pytest.approx(0.141, abs=0.01)


def test_one_ode_in_the_unified_frame() -> None:
    mixture, z = table_one(50)
    edm = GaussianMixture(mixture.means, mixture.variances, path="ve")
    s = torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
    sigma, x = s / (1 - s), z / (1 - s)[:, None]
    # dz/ds = (1 + sigma) dx/dsigma - x, with z = x / (1 + sigma)
    of_edm = (1 + sigma)[:, None] * edm.velocity(x, sigma) - x
    assert (of_edm - mixture.velocity(z, s)).abs().max() < 1e-5


def test_straight_paths() -> None:
    x0, x1 = pair(6, 4)
    s = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64)
    lines = s[:, None, None] * x0 + (1 - s)[:, None, None] * x1
    for path, times in ((lines, s), (lines.flip(0), s.flip(0))):
        assert max(vars(straightness(path, times)).values()) < 1e-12
    uneven = straightness(lines, torch.tensor([1.0, 0.5, 0.25, 0.0]))
    assert uneven.speed > 0.1
    # Half the time at rest, half at twice the speed: off by the chord at all times.
    stop = torch.stack([x0, x0, x1])
    halves = straightness(stop, torch.tensor([1.0, 0.5, 0.0]))
    lengths = (x0 - x1).norm(dim=1)
    assert halves.s1 == pytest.approx(lengths.mean().item())
    assert halves.s2 == pytest.approx(lengths.square().mean().item() / 4)
    assert halves.speed == pytest.approx(1.0)
    assert straightness(torch.stack([x0, x0]), torch.tensor([1.0, 0.0])).speed == 0


BAD_PATHS = [
    (torch.zeros(3, 4), torch.arange(3.0), r"path must be \[K \+ 1, B, ...\], got \(3, 4\)"),
    (torch.zeros(1, 4, 2), torch.arange(1.0), r"path must be .* got \(1, 4, 2\)"),
    (torch.zeros(3, 4, 2), torch.arange(2.0), r"times must be \(3,\), got \(2,\)"),
    (torch.zeros(3, 4, 2), torch.tensor([0.0, 1.0, 1.0]), r"times must be monotone, got \[0.0"),
]


@pytest.mark.parametrize(("path", "times", "message"), BAD_PATHS)
def test_bad_paths(path: Tensor, times: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        straightness(path, times)


def gain(sd: float, steps: int) -> float:
    """Standard deviation, over sd, of the sampler with the exact denoiser of N(0, sd^2)."""
    x0 = torch.tensor([[1.0]], dtype=torch.float64)
    x1 = fewstep.edm_sample(
        lambda x, sigma: sd**2 / (sd**2 + sigma[:, None] ** 2) * x, x0, steps=steps
    )
    return x1.item() / sd


@pytest.mark.parametrize(
    ("sd", "gains"),
    [
        (0.25, (1.272, 1.068, 1.012, 1.003, 1.001)),
        (0.5, (1.220, 1.055, 1.010, 1.002, 1.001)),
        (1.0, (1.175, 1.045, 1.008, 1.002, 1.000)),
        (2.0, (1.142, 1.036, 1.006, 1.001, 1.000)),
    ],
)
def test_the_samplers_gain(sd: float, gains: tuple[float, ...]) -> None:
    found = tuple(round(gain(sd, steps), 3) for steps in (10, 18, 40, 80, 160))
    assert found == gains


def exact_map(mixture: GaussianMixture, x0: Tensor) -> Tensor:
    edm = GaussianMixture(mixture.means, mixture.variances, path="ve")
    return fewstep.edm_sample(edm.denoiser, x0, steps=40)


def test_line_and_reuse_coincide_for_the_exact_map() -> None:
    mixture = GaussianMixture(torch.tensor([[-1.0, 0], [1, 0]]), torch.full((2, 2), 0.01))
    x0 = torch.randn(64, 2, generator=seeded(), dtype=torch.float64)
    x1 = exact_map(mixture, x0)
    sigmas = fewstep.karras_sigmas(18)[[0, 3, 5]]
    seen: dict[str, list[Tensor]] = {}
    for mode in ("line", "reuse", "fresh"):
        spy = Spy()
        fewstep.multistep_sample(
            lambda x, s, spy=spy: spy(x, s) + x1,
            x0,
            sigmas=sigmas,
            mode=mode,
            seeds=torch.arange(64),
        )
        seen[mode] = spy.x
    # sigma_0 x0 is off the line of x0 by x1, and "line" keeps its share of that.
    for k in (1, 2):
        gap = seen["line"][k] - seen["reuse"][k]
        torch.testing.assert_close(gap, -sigmas[k] / sigmas[0] * x1, rtol=1e-6, atol=1e-9)
    assert (seen["fresh"][1] - seen["line"][1]).abs().mean() > 10


@pytest.mark.slow
def test_one_step_beats_the_denoisers() -> None:
    """Denoisers fall to the mean at the top level; LinesMatching keeps to the teacher's map."""
    torch.manual_seed(0)
    mixture = GaussianMixture(
        torch.tensor([[-1.0, -1.0, 0, 0], [1.0, 1.0, 0, 0]]),
        torch.tensor([[0.01, 0.01, 1, 1]]).expand(2, 4).contiguous(),
    )
    x0 = torch.randn(5000, 4, generator=seeded())
    x1 = exact_map(mixture, x0)
    lines = LinesMatching(law="sot", indices=(0, 3, 5))
    network = LinePrecond(ResidualMLP((4,), width=64, depth=2))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        chosen = torch.randint(4500, (256,), generator=seeded(step))
        loss, _ = lines(network, x0[chosen], x1[chosen], generator=seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x0, x1 = x0[4500:], x1[4500:]
    with torch.no_grad():
        of_lines = fewstep.multistep_sample(network, x0, sigmas=torch.tensor([80.0]))
        # What rectified flow between independent points makes in one step: x0 - v = E[x_data].
        of_flow = x0 - mixture.velocity(x0, torch.tensor(1.0))
    error, of_others = ((x - x1).square().sum(1).mean().sqrt() for x in (of_lines, of_flow))
    assert error < 0.3 * of_others
    assert torch.corrcoef(torch.stack([of_lines[:, 0], x1[:, 0]]))[0, 1] > 0.95
    torch.testing.assert_close(of_flow, torch.zeros_like(of_flow), rtol=0, atol=1e-4)


X0, X1 = pair()
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: LinesMatching(law="cosine"), "law must be one of .* got 'cosine'"),
    (lambda: LinesMatching(metric="l1"), "metric must be one of .* got 'l1'"),
    (lambda: LinesMatching(levels=0), "levels must be an integer of at least 1, got 0"),
    (lambda: LinesMatching(start=-1), "start must be an integer of at least 0, got -1"),
    (lambda: LinesMatching(warmup=-1), "warmup must be an integer of at least 0, got -1"),
    (lambda: LinesMatching(indices=(3, 0)), r"indices must increase .* got \(3, 0\)"),
    (lambda: LinesMatching(indices=(18,)), r"indices must .* 0 and 17, got \(18,\)"),
    (lambda: LinesMatching(indices=()), r"indices must .* got \(\)"),
    (lambda: LinesMatching(sigma_min=0.0), "sigma_min and sigma_max .* got 0.0 and 80.0"),
    (lambda: LinesMatching(sigma_max=math.inf), "sigma_max .* got 0.002 and inf"),
    (lambda: LinesMatching(rho=0.0), "rho must be positive, got 0.0"),
    (lambda: LinesMatching(r1=-1.0), "r1 must be .* got -1.0"),
    (lambda: LinesMatching(augment=("flip",)), "policy must be of .* got 'flip'"),
    (lambda: LinesMatching()(Spy(), X0, X1[:5]), r"x1 must be \(16, 3\) .* got \(5, 3\)"),
    (lambda: LinesMatching()(Spy(), X0, X1.float()), "x1 must be .* got .* torch.float32"),
    (lambda: LinesMatching()(Spy(), X0[:0], X1[:0]), r"x0 must be .* got \(0, 3\)"),
    (lambda: LinesMatching()(Spy(), X0, X1, X0[:3, 0]), r"labels must be \(16,\), got \(3,\)"),
    (
        lambda: LinesMatching()(lambda x, s: x[:, :2], X0, X1),
        r"network must return \(16, 3\), got \(16, 2\)",
    ),
    (
        lambda: LinesMatching()(Spy(), X0, X1, discriminator=Critic()),
        "last_layer must be given",
    ),
    (
        lambda: LinesMatching().discriminator_loss(Critic(), X0, X1[:4]),
        r"fake must be \(16, 3\) like real, got \(4, 3\)",
    ),
    (lambda: diff_augment(X0), r"images must be \[B, C, H, W\] of one shape, got \[\(16, 3\)\]"),
    (lambda: diff_augment(), r"images must be .* got \[\]"),
    (lambda: EDMPrecond(nn.Identity(), sigma_data=0.0), "sigma_data must be .* got 0.0"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"x0 must have a floating dtype, got torch.int64"):
        LinesMatching()(Spy(), X0.long(), X1)


@pytest.mark.parametrize("law", ["uniform", "levels", "sot"])
def test_ranks_with_their_own_ids_draw_what_one_process_would(law: str) -> None:
    """Levels and augmentations, of the student's loss and of the discriminator's."""
    x0, x1 = pair(6, 1, 8, 8)
    ids = torch.tensor([4, 0, 17, 2**48 - 1, 5, 9])
    lines = LinesMatching(law=law, indices=(0, 3, 5), augment=("colour", "translation", "cutout"))
    network, critic = nn.Conv2d(1, 1, 3, padding=1).double(), nn.Conv2d(1, 1, 3).double()
    found = []
    for split in ((slice(0, 6),), (slice(0, 2), slice(2, 4), slice(4, 6))):
        parts = []
        for rows in split:
            options = {"generator": seeded(3), "sample_ids": ids[rows]}
            _, metrics = lines(
                lambda x, s: network(x / (1 + s[:, None, None, None])),
                x0[rows],
                x1[rows],
                discriminator=critic,
                last_layer=network.weight,
                **options,
            )
            hinge, _ = lines.discriminator_loss(critic, x1[rows], metrics["output"], **options)
            x, sigma = lines.points(x0[rows], x1[rows], **options)
            parts.append((metrics["output"], x, sigma, metrics["adversarial"], hinge.detach()))
        found.append([torch.cat([p[i] for p in parts]) for i in range(3)])
        found[-1] += [torch.stack([p[i] for p in parts]).mean() for i in (3, 4)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("law", ["uniform", "levels", "sot"])
def test_levels_of_half_precision_are_float32(dtype: torch.dtype, law: str) -> None:
    x0, x1 = (t.to(dtype) for t in pair(64))
    lines, spy = LinesMatching(law=law, indices=(0, 3, 5)), Spy()
    lines(spy, x0, x1, generator=seeded(7))
    exact = Spy()
    lines(exact, x0.float(), x1.float(), generator=seeded(7))
    assert spy.x[0].dtype == dtype
    assert spy.sigma[0].dtype == torch.float32
    assert torch.equal(spy.sigma[0], exact.sigma[0])
    assert torch.equal(spy.x[0], exact.x[0].to(dtype))


def test_ids_of_augmentations_and_levels_are_checked() -> None:
    x0, x1 = pair(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"LinesMatching: sample_ids must be \(4,\), got \(3,\)"):
        LinesMatching()(lambda x, s: x, x0, x1, sample_ids=torch.arange(3))
    with pytest.raises(TypeError, match=r"diff_augment: sample_ids must be int64"):
        diff_augment(x0, sample_ids=torch.zeros(4))
