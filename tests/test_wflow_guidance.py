from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.methods import Queues, WFlow, sample_scales


def drawn(seed: int = 0, **options: Any) -> Tensor:
    return sample_scales(20000, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("power", [-2.0, 0.0, 0.5, 1.0, 1 + 1e-9, 3.0, 5.0])
def test_scales_have_the_density(power: float) -> None:
    """The share below t is that of the integral of a^-power."""
    a = drawn(high=4, power=power)
    q = 1 - power
    for t in (1.2, 2.0, 3.5):
        share = (t**q - 1) / (4**q - 1) if abs(q) > 1e-6 else math.log(t) / math.log(4)
        assert (a < t).float().mean().item() == pytest.approx(share, abs=0.015)
    assert a.min() >= 1
    assert a.max() <= 4


def test_some_scales_are_one() -> None:
    a = drawn(low=1.5, high=4, none=0.3)
    assert (a == 1).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert ((a == 1) | (a >= 1.5)).all()
    assert torch.equal(drawn(high=1), torch.ones(20000))
    assert torch.equal(drawn(high=3), drawn(high=3))
    assert drawn(high=4, power=5000.0).isfinite().all()
    assert drawn(high=4, power=-5000.0).isfinite().all()
    assert sample_scales(0).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.9}, "low must be at least 1 and finite, got 0.9"),
        ({"low": 2, "high": 1.5}, "high must be at least low = 2 and finite, got 1.5"),
        ({"high": math.inf}, "high must be .* finite, got inf"),
        ({"power": math.nan}, "power must be finite, got nan"),
        ({"none": 1.5}, "none must be from 0 to 1, got 1.5"),
    ],
)
def test_bad_scales(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"sample_scales: {message}"):
        sample_scales(3, **options)


def clouds(groups: int = 3, n: int = 8, u: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, groups, n, 2, generator=generator, dtype=torch.float64)
    real = torch.randn(groups, n, 2, generator=generator, dtype=torch.float64) + 1
    return noise, real, torch.randn(groups, u, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("labels", [None, torch.tensor([4, 2, 7])])
def test_the_generator_takes_the_scale(labels: Tensor | None) -> None:
    noise, real, uncond = clouds()
    scale = torch.tensor([1.0, 1.5, 3.0])
    seen: list[tuple[Any, ...]] = []

    def generator(z: Tensor, *condition: Any) -> Tensor:
        seen.append(condition)
        return z

    loss, _ = WFlow()(generator, noise, real, labels, uncond=uncond, scale=scale)
    assert len(seen) == 2
    for own, a in seen:
        assert a.tolist() == scale.repeat_interleave(8).tolist()
        assert a.dtype == noise.dtype
        assert own is None if labels is None else own.tolist() == [4] * 8 + [2] * 8 + [7] * 8
    plain = WFlow()(lambda z: z, noise, real, uncond=uncond, guidance=scale - 1)[0]
    assert torch.equal(loss, plain)
    one, _ = WFlow()(generator, noise, real, labels, uncond=uncond, scale=2.0)
    assert torch.equal(one, WFlow()(lambda z: z, noise, real, uncond=uncond, guidance=1.0)[0])


@pytest.mark.parametrize("guide", ["velocity", "distribution"])
def test_a_guided_generator_has_the_mean_of_both_rules(guide: str) -> None:
    """At equilibrium the mean is `m_c + w (m_c - m_0)` under either, by exact columns."""
    torch.manual_seed(0)
    w, shift = 0.25, nn.Parameter(torch.zeros(2, dtype=torch.float64))
    flow = WFlow(eps=0.3, max_iter=50, normalize=False, guide=guide)
    optimizer = torch.optim.SGD([shift], lr=0.5)
    base = 0.6 * torch.randn(256, 2, dtype=torch.float64)
    base -= base.mean(0)
    uncond = torch.randn(256, 2, dtype=torch.float64)
    uncond -= uncond.mean(0)
    real = base + torch.tensor([2.0, -1.0])
    for _ in range(120):
        loss, metrics = flow(
            lambda z: z + shift, torch.stack([base, base]), real, uncond=uncond, guidance=w
        )
        optimizer.zero_grad()
        (loss * metrics["scale"].square()).backward()
        optimizer.step()
    expected = (1 + w) * torch.tensor([2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(shift.detach(), expected, rtol=0, atol=0.02)


def test_no_guidance_is_no_guidance_by_either_rule() -> None:
    noise, real, uncond = clouds()
    expected, _ = WFlow()(lambda z: z, noise, real)
    for guide in ("velocity", "distribution"):
        loss, metrics = WFlow(guide=guide, normalize=False)(
            lambda z: z, noise, real, uncond=uncond, guidance=0.0
        )
        plain, own = WFlow(normalize=False)(lambda z: z, noise, real)
        torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
        torch.testing.assert_close(metrics["scale"], own["scale"], rtol=1e-12, atol=0)
    assert expected.isfinite()


def test_one_batch_is_biased_and_joint_leaves_out_the_diagonal() -> None:
    noise, real, _ = clouds()
    calls: list[int] = []

    def generator(z: Tensor) -> Tensor:
        calls.append(len(z))
        return z

    split, _ = WFlow(resample=False)(generator, noise, real)
    assert calls == [24]
    same = torch.stack([noise[0], noise[0]])
    assert torch.equal(split, WFlow()(lambda z: z, same, real)[0])
    joint, _ = WFlow(resample=False, form="joint", normalize=False)(generator, noise, real)
    assert joint != WFlow(form="joint", normalize=False)(lambda z: z, same, real)[0]


def test_one_domain_is_carried_into_another() -> None:
    """Images of the source take the place of noise, and the transfer starts at the identity."""
    torch.manual_seed(0)
    net = nn.Linear(8, 8)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    flow = WFlow(normalize=False)

    def transfer(x: Tensor) -> Tensor:
        return x + net(x.flatten(1)).reshape(x.shape)

    for _ in range(150):
        source = 0.3 * torch.randn(2, 1, 32, 2, 2, 2)
        target = 0.3 * torch.randn(1, 32, 2, 2, 2) + 1
        loss, _ = flow(transfer, source, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = transfer(0.3 * torch.randn(500, 2, 2, 2)).detach()
    torch.testing.assert_close(moved.mean(0), torch.ones(2, 2, 2), rtol=0, atol=0.15)
    assert 0.2 < moved.std(0).mean() < 0.4


def test_half_noise_does_not_round_the_guidance() -> None:
    noise, real, uncond = clouds()
    noise = noise.bfloat16()
    w = torch.tensor([0.3, 0.7, 1.1])

    def drift(noise: Tensor, **options: Any) -> Tensor:
        flow = WFlow(normalize=False)
        return flow(lambda z, *_: z.double(), noise, real, uncond=uncond, **options)[0]

    expected = drift(noise.double(), guidance=w)
    assert torch.equal(drift(noise, guidance=w), expected)
    torch.testing.assert_close(drift(noise, scale=1 + w), expected, rtol=1e-6, atol=0)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"scale": 0.9}, "scale must be at least 1 and finite, got 0.9"),
    ({"scale": torch.tensor([1.0, 0.5, 2.0])}, r"scale must be at least 1 .*\[1.0, 0.5, 2.0\]"),
    ({"scale": torch.ones(2)}, r"scale must be a number or \(3,\), got \(2,\)"),
    ({"scale": math.nan}, "scale must be at least 1 and finite, got nan"),
    ({"scale": 2.0, "guidance": 1.0}, "scale is 1 \\+ guidance: give one of them, got 1.0 too"),
    ({"scale": 2.0, "uncond": None}, "scale needs uncond, got 2.0 without"),
    ({"guidance": -0.5}, "guidance must be at least 0 and finite, got -0.5"),
    ({"guidance": torch.full((3,), math.inf)}, "guidance must be at least 0 and finite, got"),
    ({"guidance": torch.ones(3), "uncond": None}, "guidance needs uncond"),
    ({"uncond": torch.ones(3, 5, 7)}, r"uncond must have samples .*\(3, 5, 7\)"),
    ({"uncond": torch.ones(2, 5, 2)}, r"uncond must be \(3, 'U', '...'\) .*\(2, 5, 2\)"),
    ({"uncond": torch.ones(3, 0, 2)}, r"uncond must not be empty, got \(3, 0, 2\)"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_guidance(options: dict[str, Any], message: str) -> None:
    noise, real, uncond = clouds()

    def untouched(*_: Any) -> Tensor:
        raise AssertionError("called before the check")

    with pytest.raises(ValueError, match=f"WFlow: {message}"):
        WFlow()(untouched, noise, real, **{"uncond": uncond, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "magic"}, "guide must be one of .* got 'magic'"),
        ({"guide": "velocity", "form": "joint"}, "guide must be distribution in the joint form"),
        ({"reduction": "none"}, "reduction must be one of .* got 'none'"),
        ({"memory_limit": 0}, "memory_limit must be positive and finite, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"WFlow: {message}"):
        WFlow(**options)


def queues(**options: Any) -> Queues:
    return Queues((2,), classes=3, capacity=4, **options)


def rows(*numbers: int) -> Tensor:
    return torch.tensor([[float(k), 10.0 * k] for k in numbers])


def test_a_queue_keeps_the_newest_of_each_class() -> None:
    own = queues()
    own.push(rows(0, 1, 2, 3, 4), torch.tensor([1, 0, 1, 1, 0]))
    own.push(rows(5, 6, 7), torch.tensor([1, 1, 1]))
    assert own.counts.tolist() == [2, 4, 0]
    kept = {tuple(row) for row in own.samples[1].tolist()}
    assert kept == {tuple(row) for row in rows(3, 5, 6, 7).tolist()}
    own.push(rows(*range(20, 31)), torch.full((11,), 2))  # more than it holds
    assert own.samples[2, :, 0].sort().values.tolist() == [27, 28, 29, 30]
    own.push(rows(31), torch.tensor([2]))
    assert own.samples[2, :, 0].sort().values.tolist() == [28, 29, 30, 31]
    own.push(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert own.counts.tolist() == [2, 4, 4]


def test_draws_are_without_replacement_where_they_can_be() -> None:
    own = queues()
    own.push(rows(0, 1, 2, 3, 4), torch.tensor([1, 1, 1, 1, 0]))
    generator = torch.Generator().manual_seed(0)
    drawn = own.draw(4, torch.tensor([1, 0, 1]), generator=generator)
    assert drawn.shape == (3, 4, 2)
    assert drawn[0, :, 0].sort().values.tolist() == [0, 1, 2, 3]
    assert drawn[1, :, 0].tolist() == [4] * 4
    more = own.draw(9, torch.tensor([1]), generator=generator)
    assert set(more[0, :, 0].tolist()) <= {0, 1, 2, 3}

    single = Queues((), capacity=5, dtype=torch.int64)
    single.push(torch.arange(7))
    assert single.draw(5).sort().values.tolist() == [2, 3, 4, 5, 6]


def test_a_queue_resumes_to_the_same_draws() -> None:
    first, second = queues(), queues()
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        labels = torch.randint(3, (6,), generator=generator)
        first.push(torch.randn(6, 2, generator=generator), labels)
    for name, t in second.state().items():
        t.copy_(first.state()[name])
    for own in (first, second):
        own.push(rows(1, 2, 3), torch.tensor([0, 1, 2]))
    labels = torch.tensor([2, 0])
    draws = [
        own.draw(3, labels, generator=torch.Generator().manual_seed(1)) for own in (first, second)
    ]
    assert torch.equal(*draws)


def test_bad_queues() -> None:
    own = queues()
    own.push(rows(1), torch.tensor([1]))
    label = torch.tensor
    for call, message in (
        (lambda: own.draw(2, label([1, 2, 0])), r"labels must have samples, got \[0, 2\] that"),
        (lambda: own.draw(2, label([3, -1])), r"labels must be from 0 to 2, got \[-1, 3\]"),
        (lambda: own.draw(0, label([1])), "n must be an integer of at least 1, got 0"),
        (lambda: own.draw(2), "labels must be given for 3 classes, got None"),
        (lambda: own.draw(2, label([1.0])), r"labels must be integers \(G,\), got torch.float32"),
        (lambda: own.push(rows(1, 2), label([1])), r"labels must be \(2,\), got \(1,\)"),
        (lambda: own.push(torch.ones(2, 3), label([1, 1])), r"samples .*'B', 2.*\(2, 3\)"),
        (lambda: own.draw(2, label([1])[:0]), r"labels must not be empty, got \(0,\)"),
        (lambda: Queues((2,), capacity=2, dtype=torch.int64).push(rows(1)), "samples .*float32"),
        (lambda: own.push([1.0], label([1])), r"samples must be .*, got list"),
        (lambda: Queues((2,), capacity=0), "capacity must be an integer of at least 1, got 0"),
        (lambda: Queues((2,), capacity=2, classes=0), "classes must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=f"Queues: {message}"):
            call()
    assert own.counts.tolist() == [0, 1, 0]
