"""Samplers against plain loops in float64, with Gaussian data as the oracle."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.data.toys import GaussianMixture
from fewstep.networks import EDMPrecond, LinePrecond, ResidualMLP, VelocityMLP
from fewstep.ops.heun.engine import FIRST
from fewstep.reference import heun as reference
from fewstep.samplers.multistep import MODES
from support.denoisers import Network, gaussian, wide
from tolerances import assert_contract


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.0, 1.5]], dtype=torch.float64)
    return GaussianMixture(means, torch.full_like(means, 0.05), path="ve")


def edm(
    denoiser: Network,
    latents: Tensor,
    sigmas: Tensor,
    *,
    churn: tuple[float, float, float, float] = (0.0, 0.0, math.inf, 1.0),
    seeds: Tensor | None = None,
) -> Tensor:
    """Algorithm 2 of EDM, line by line in float64; sigmas `[N + 1]` or `[B, N + 1]`."""
    amount, low, high, size = churn
    levels = sigmas.double().expand(latents.shape[0], -1).T
    steps = len(levels) - 1
    x = latents.double() * wide(levels[0], latents)

    def noise(i: int) -> Tensor:
        if seeds is None:
            return torch.zeros_like(x)
        row = 1 if i == 0 else FIRST + 2 * (i - 1) + 1  # of the pass that adds it
        return reference.noise(seeds, row, tuple(x.shape[1:]))

    for i in range(steps):
        now, after = levels[i], levels[i + 1]
        inside = (now >= low) & (now <= high)
        gamma = min(amount / steps, math.sqrt(2) - 1) * inside.double()
        hat = now * (1 + gamma)
        x = x + wide((hat**2 - now**2).sqrt(), x) * size * noise(i)
        d1 = (x - denoiser(x, hat)) / wide(hat, x)
        following = x + wide(after - hat, x) * d1
        if bool((after > 0).all()):
            d2 = (following - denoiser(following, after)) / wide(after, x)
            following = x + wide(after - hat, x) * (d1 + d2) / 2
        x = following
    return x


@pytest.mark.parametrize("state", ["float32", "compensated", "float64"])
@pytest.mark.parametrize("steps", [1, 2, 18, 512])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_edm_agrees_with_float64(state: str, steps: int, backend: str) -> None:
    """1e-6 relative against a float64 sampler of the same float32 denoiser."""
    teacher, latents = mixture(), torch.randn(64, 2)

    def single(x: Tensor, sigma: Tensor) -> Tensor:
        return teacher.denoiser(x.double(), sigma.double()).float()

    def rounded(x: Tensor, sigma: Tensor) -> Tensor:
        return single(x.float(), sigma).double()

    own = fewstep.edm_sample(single, latents, steps=steps, state=state, backend=backend)
    exact = edm(rounded, latents, fewstep.karras_sigmas(steps))
    assert own.dtype == torch.float32
    error = float((own - exact).norm() / exact.norm())
    assert error < (2e-5 if state == "float32" else 1e-6), error


def test_compensated_is_as_good_as_float64() -> None:
    teacher, latents = mixture(), torch.randn(500, 2)

    def single(x: Tensor, sigma: Tensor) -> Tensor:
        return teacher.denoiser(x.double(), sigma.double()).float()

    exact = edm(teacher.denoiser, latents, fewstep.karras_sigmas(512))
    errors = {
        state: float((fewstep.edm_sample(single, latents, steps=512, state=state) - exact).norm())
        for state in ("float32", "compensated", "float64")
    }
    assert errors["compensated"] < 2 * errors["float64"]


GAIN = {0.25: (1.272, 1.068, 1.012), 0.5: (1.220, 1.055, 1.010), 1.0: (1.175, 1.045, 1.008)}


@pytest.mark.parametrize("sd", GAIN)
def test_gain_on_gaussian_data(sd: float) -> None:
    """The table of METHODS.md 4.1: how much too wide N steps make N(0, sd^2)."""
    latents = torch.randn(1, 4, dtype=torch.float64)
    for steps, gain in zip((10, 18, 40), GAIN[sd], strict=True):
        out = fewstep.edm_sample(gaussian(sd), latents, steps=steps)
        ratio = (out / (sd * latents * 80 / math.hypot(80, sd))).mean()
        assert abs(float(ratio) - gain) < 1e-3


CHURN = (20.0, 0.05, 50.0, 1.003)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_churn_line_by_line(capability: str, backend: str) -> None:
    latents, seeds = torch.randn(7, 3, 5, dtype=torch.float64), torch.arange(7) * 2**40 + 3
    out = fewstep.edm_sample(
        *(gaussian(0.7), latents),
        S_churn=CHURN[0],
        S_min=CHURN[1],
        S_max=CHURN[2],
        S_noise=CHURN[3],
        seeds=seeds,
        backend=backend,
    )
    exact = edm(gaussian(0.7), latents, fewstep.karras_sigmas(18), churn=CHURN, seeds=seeds)
    assert_contract("value", out, exact)


@pytest.mark.parametrize("churn", [0.0, 10.0, 40.0])
def test_churn_keeps_the_law_of_gaussian_data(churn: float) -> None:
    """The oracle that noise added after the network ran, or not rescaled, fails."""
    latents, seeds = fewstep.latents(torch.arange(4000), (2,)), torch.arange(4000)
    out = fewstep.edm_sample(gaussian(1.0), latents, steps=80, S_churn=churn, seeds=seeds)
    assert abs(float(out.std()) - 1) < 0.025

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x * wide((2 * t - 1) / (t**2 + (1 - t) ** 2), x)

    flow = fewstep.flow_sample(velocity, latents, steps=80, S_churn=churn, seeds=seeds)
    assert abs(float(flow.std()) - 1) < 0.025


def test_per_sample_levels_guidance_and_batches() -> None:
    latents, seeds = torch.randn(5, 3), torch.arange(5) + 11
    levels = torch.stack([fewstep.karras_sigmas(6, sigma_max=80.0 / (i + 1)) for i in range(5)])
    weights = torch.linspace(0, 2, 5)
    options: dict[str, Any] = {"S_churn": 3.0, "uncond": gaussian(0.5)}
    whole = fewstep.edm_sample(
        gaussian(1.0), latents, sigmas=levels, seeds=seeds, guidance=weights, **options
    )
    for i in range(5):
        alone = fewstep.edm_sample(
            gaussian(1.0),
            latents[i : i + 1],
            sigmas=levels[i],
            seeds=seeds[i : i + 1],
            guidance=float(weights[i]),
            **options,
        )
        torch.testing.assert_close(alone[0], whole[i], rtol=2e-6, atol=1e-6)
    half = fewstep.edm_sample(
        gaussian(1.0),
        latents[2:],
        sigmas=levels[2:],
        seeds=seeds[2:],
        guidance=weights[2:],
        **options,
    )
    assert torch.equal(half, whole[2:])


GUIDANCE = torch.tensor([0.0, 1.0, 2.0, 7.5])


@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("options", [{}, {"precondition": 0.5}, {"S_churn": 4.0}])
def test_guidance_for_each_sample(batch: int, options: dict[str, Any]) -> None:
    """With the levels of all samples alike, each has what it has alone."""
    latents, seeds, weights = torch.randn(batch, 2), torch.arange(batch), GUIDANCE[:batch]
    for sample in (fewstep.edm_sample, fewstep.flow_sample):
        own = options if sample is fewstep.edm_sample else {"S_churn": options.get("S_churn", 0.0)}

        def call(rows: slice, guidance: Any, sample: Any = sample, own: Any = own) -> Tensor:
            out: Tensor = sample(
                gaussian(1.0),
                latents[rows],
                seeds=seeds[rows],
                guidance=guidance,
                uncond=gaussian(0.5),
                **own,
            )
            return out

        whole = call(slice(batch), weights)
        assert whole.shape == (batch, 2)
        for i in range(batch):
            alone = call(slice(i, i + 1), float(weights[i]))
            torch.testing.assert_close(alone[0], whole[i], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("tracker", ["trace", "logdet"])
def test_log_density_with_guidance_for_each_sample(tracker: str) -> None:
    latents, start = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    options: dict[str, Any] = {"uncond": gaussian(0.5), "tracker": tracker, "estimator": "exact"}
    whole = fewstep.edm_sample(
        gaussian(1.0), latents, guidance=GUIDANCE, log_density=start, **options
    )
    for i, weight in enumerate(GUIDANCE.tolist()):
        alone = fewstep.edm_sample(
            gaussian(1.0),
            latents[i : i + 1],
            guidance=weight,
            log_density=start[i : i + 1],
            **options,
        )
        torch.testing.assert_close(alone.log_density[0], whole.log_density[i])


def test_guidance_is_that_of_denoisers() -> None:
    latents = torch.randn(4, 3, dtype=torch.float64)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        none = gaussian(0.5)(x, sigma)
        return none + 1.7 * (gaussian(1.0)(x, sigma) - none)

    own = fewstep.edm_sample(gaussian(1.0), latents, guidance=1.7, uncond=gaussian(0.5))
    assert_contract("value", own, edm(guided, latents, fewstep.karras_sigmas(18)))


class Raw(nn.Module):
    """A network that wants scaled inputs and `ln(sigma) / 4`."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d + 1, d)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.layer(torch.cat((x, noise[:, None]), 1)))
        return out


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_preconditioning(backend: str) -> None:
    net, s = Raw(3).double(), 0.5

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        level = wide(sigma, x)
        total = level**2 + s**2
        out = net(x / total.sqrt(), sigma.log() / 4)
        return s**2 / total * x + level * s / total.sqrt() * out

    latents, seeds = torch.randn(6, 3, dtype=torch.float64), torch.arange(6)
    options: dict[str, Any] = {"S_churn": 5.0, "seeds": seeds, "backend": backend}
    own = fewstep.edm_sample(net, latents, precondition=s, **options)
    assert_contract("value", own, fewstep.edm_sample(denoiser, latents, **options))
    with torch.no_grad():
        exact = edm(denoiser, latents, fewstep.karras_sigmas(18), churn=(5, 0, 1e9, 1), seeds=seeds)
    assert_contract("value", own, exact)


def test_log_density_of_edm_samples() -> None:
    """Against the exact density of Gaussian data at the last level, and of the raw network."""
    d, steps = 3, 200
    latents = torch.randn(8, d, dtype=torch.float64)
    start = fewstep.ops.trace.log_density.standard_normal(latents) - d * math.log(80.0)
    out = fewstep.edm_sample(
        gaussian(1.0), latents, steps=steps, log_density=start, estimator="exact"
    )
    scale = torch.tensor(math.hypot(1, 0.002), dtype=torch.float64)
    exact = torch.distributions.Normal(0.0, scale).log_prob(out.x).sum(1)
    # At 80 the law is N(0, 1 + 80^2), not N(0, 80^2): 5e-4 of log-density
    torch.testing.assert_close(out.log_density, exact, rtol=0, atol=5e-3)
    assert out.estimator == "exact (3 tangents)"
    assert not out.stderr.any()

    net, s = Raw(d).double(), 0.5

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        level = wide(sigma, x)
        total = level**2 + s**2
        return s**2 / total * x + level * s / total.sqrt() * net(x / total.sqrt(), sigma.log() / 4)

    options: dict[str, Any] = {"log_density": start, "steps": 6}
    fused = fewstep.edm_sample(net, latents, precondition=s, **options)
    plain = fewstep.edm_sample(denoiser, latents, **options)
    assert_contract("value", fused.log_density, plain.log_density.detach())
    both = fewstep.edm_sample(*(denoiser, latents), guidance=1.0, uncond=gaussian(0.3), **options)
    assert_contract("value", both.log_density, plain.log_density.detach())


@pytest.mark.parametrize("precondition", [None, 0.5])
@pytest.mark.parametrize("steps", [4, 18])
def test_logdet_is_the_density_of_what_is_sampled(steps: int, precondition: float | None) -> None:
    """Against the determinant of the whole sampler's Jacobian; guided or not."""
    net, other = Raw(3).double(), Raw(3).double()
    latents, start = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    levels = fewstep.karras_sigmas(steps)[:-1]
    for guided in ({}, {"guidance": 1.5, "uncond": other}):
        options: dict[str, Any] = {"sigmas": levels, "precondition": precondition, **guided}
        out = fewstep.edm_sample(net, latents, log_density=start, tracker="logdet", **options)
        assert_contract("value", out.x, fewstep.edm_sample(net, latents, **options))
        assert out.estimator == "logdet"
        assert not out.stderr.any()
        x = latents.requires_grad_()
        end = whole_sampler(net, other, x, **options)
        rows = [torch.autograd.grad(end[:, i].sum(), x, retain_graph=True)[0] for i in range(3)]
        latents = latents.detach()
        change = torch.stack(rows, 1).slogdet()[1] - 3 * levels[0].log()  # from sigma_0 latents
        torch.testing.assert_close(out.log_density, start - change, rtol=1e-11, atol=1e-11)


def whole_sampler(
    net: nn.Module,
    other: nn.Module,
    latents: Tensor,
    *,
    sigmas: Tensor,
    precondition: float | None,
    guidance: float = 1.0,
    uncond: nn.Module | None = None,
) -> Tensor:
    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        level = wide(sigma, x)
        scale = 1.0 if precondition is None else (level**2 + precondition**2).rsqrt()
        given = sigma if precondition is None else sigma.log() / 4
        out = net(x * scale, given)
        if uncond is not None:
            out = guidance * out + (1 - guidance) * other(x * scale, given)
        if precondition is None:
            return out
        return precondition**2 * scale**2 * x + level * precondition * scale * out

    return edm(denoiser, latents, sigmas)


def test_logdet_differs_from_the_flows_density_at_few_steps() -> None:
    """Gaussian data: the sampler is linear, and its density known in closed form."""
    d = 64
    latents = torch.randn(3, d, dtype=torch.float64)
    start = fewstep.ops.trace.log_density.standard_normal(latents) - d * math.log(80.0)
    found = {}
    for tracker in ("trace", "logdet"):
        out = fewstep.edm_sample(gaussian(1.0), latents, log_density=start, tracker=tracker)
        gain = (out.x / latents).mean()
        exact = torch.distributions.Normal(0.0, gain).log_prob(out.x).sum(1)
        found[tracker] = float((out.log_density - exact).abs().max())
    assert found["logdet"] < 1e-9
    assert found["trace"] > 1


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_levels_reach_half_precision_networks_unrounded(dtype: torch.dtype) -> None:
    """sigma, t and `ln(sigma) / 4` in float32; 600 equal steps stay apart."""
    latents, seen = torch.randn(2, 3).to(dtype), []

    def network(x: Tensor, level: Tensor) -> Tensor:
        assert x.dtype == dtype
        assert level.dtype == torch.float32
        seen.append(float(level[0]))
        return x / 2

    levels = fewstep.karras_sigmas(5)
    fewstep.edm_sample(network, latents, sigmas=levels)
    assert seen[1::2] == levels[1:5].float().tolist()
    seen.clear()
    fewstep.edm_sample(network, latents, sigmas=levels, precondition=0.5)
    assert seen[1::2] == (levels[1:5].log() / 4).float().tolist()
    seen.clear()
    fewstep.flow_sample(network, latents, steps=600)
    assert seen[::2] == torch.linspace(1, 0, 601, dtype=torch.float64)[:-1].float().tolist()
    seen.clear()
    fewstep.multistep_sample(network, latents, sigmas=[80.0, 24.3, 1.7], seeds=torch.arange(2))
    assert seen == torch.tensor([80.0, 24.3, 1.7]).tolist()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", [EDMPrecond, LinePrecond, VelocityMLP])
def test_networks_of_the_package_in_half_precision(dtype: torch.dtype, kind: Any) -> None:
    """Levels in float32 beside weights in half precision; duals serve as they do in float32."""
    net = VelocityMLP((3,), width=16) if kind is VelocityMLP else kind(ResidualMLP((3,), width=16))
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    net.to(dtype)
    wide_net = copy.deepcopy(net).float()
    sample = fewstep.flow_sample if kind is VelocityMLP else fewstep.edm_sample
    latents = torch.randn(64, 3).to(dtype)
    low, exact = sample(net, latents), sample(wide_net, latents.float())
    assert low.dtype == dtype
    assert float((low.float() - exact).norm() / exact.norm()) < 0.05
    x = torch.randn(5, 3).to(dtype)
    found, same = (
        fewstep.divergence(n, z, 0.3, estimator="exact")
        for n, z in ((net, x), (wide_net, x.float()))
    )
    assert found.info == same.info == ""
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value, same.value, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tracker", ["trace", "logdet"])
@pytest.mark.parametrize("dtype", HALF)
def test_log_density_of_half_precision_samples(dtype: torch.dtype, tracker: str) -> None:
    latents = torch.randn(3, 4).to(dtype)
    for start in (torch.zeros(3), torch.zeros(3, dtype=dtype)):
        options: dict[str, Any] = {"log_density": start, "tracker": tracker}
        low = fewstep.edm_sample(gaussian(1.0), latents, **options)
        options["log_density"] = torch.zeros(3)
        exact = fewstep.edm_sample(gaussian(1.0), latents.float(), **options)
        assert low.log_density.dtype == torch.float32
        torch.testing.assert_close(low.log_density, exact.log_density, rtol=0, atol=0.1)


def test_probes_of_a_split_batch_are_those_of_the_whole() -> None:
    net, latents, ids = Raw(6).double(), torch.randn(6, 6, dtype=torch.float64), torch.arange(6) + 9
    start = torch.zeros(6, dtype=torch.float64)

    def density(rows: slice, ids: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"estimator": "hutchinson", "sample_ids": ids}
        out = fewstep.edm_sample(net, latents[rows], log_density=start[rows], **options)
        found: Tensor = out.log_density
        return found

    whole = density(slice(6), ids)
    parts = [density(rows, ids[rows]) for rows in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    assert not torch.equal(density(slice(6), None), whole)


def test_latents_are_those_of_the_seed(capability: str) -> None:
    seeds = torch.tensor([0, 5, 2**62, 77])
    own = fewstep.latents(seeds, (3, 11), dtype=torch.float64)
    torch.testing.assert_close(own, reference.noise(seeds, 0, (3, 11)), rtol=1e-14, atol=1e-14)
    assert torch.equal(fewstep.latents(seeds[2:], (3, 11), dtype=torch.float64), own[2:])
    many = fewstep.latents(torch.arange(2000), (50,))
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01
    assert abs(float(many[:, 0] @ many[:, 1])) / 2000 < 0.07


def test_samples_are_the_same_with_other_networks_inputs() -> None:
    """In half precision the state stays float32; strided tensors are read as they are."""
    latents = torch.randn(6, 8)
    exact = fewstep.edm_sample(gaussian(0.5), latents)
    for dtype in (torch.bfloat16, torch.float16):
        low = fewstep.edm_sample(gaussian(0.5), latents.to(dtype))
        assert low.dtype == dtype
        assert float((low.float() - exact).norm() / exact.norm()) < 0.02
    strided = torch.randn(8, 6).T

    def turned(x: Tensor, sigma: Tensor) -> Tensor:
        return gaussian(0.5)(x, sigma).T.contiguous().T

    for state in ("float32", "compensated", "float64"):
        torch.testing.assert_close(
            fewstep.edm_sample(turned, strided, state=state),
            fewstep.edm_sample(gaussian(0.5), strided.contiguous(), state=state),
        )
    empty = fewstep.edm_sample(gaussian(0.5), torch.randn(0, 3))
    assert empty.shape == (0, 3)


def test_a_network_may_return_one_buffer_or_its_input() -> None:
    latents, kept = torch.randn(2, 3), torch.empty(2, 3)
    own = fewstep.edm_sample(lambda x, sigma: torch.div(x, 2, out=kept), latents)
    assert torch.equal(own, fewstep.edm_sample(lambda x, sigma: x / 2, latents))
    own = fewstep.edm_sample(lambda x, sigma: x, latents)
    assert torch.equal(own, fewstep.edm_sample(lambda x, sigma: x.clone(), latents))


def test_evaluations_and_levels() -> None:
    seen: list[float] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (4,)
        assert x.dtype == sigma.dtype == torch.float32
        seen.append(float(sigma[0]))
        return x / 2

    before = torch.randn(4, 2)
    latents = before.clone()
    fewstep.edm_sample(denoiser, latents, steps=5)
    assert torch.equal(latents, before)
    levels = fewstep.karras_sigmas(5, dtype=torch.float32).tolist()
    assert seen == [levels[0], *[v for level in levels[1:5] for v in (level, level)]]


def test_multistep_modes() -> None:
    """The network's inputs, level by level."""
    latents, end = torch.randn(5, 3), torch.randn(5, 3)
    seeds, sigmas = torch.arange(5), fewstep.few_step_sigmas([0, 3, 5])
    for mode in MODES:
        seen: list[Tensor] = []

        def watch(x: Tensor, sigma: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.double())
            return end

        out = fewstep.multistep_sample(watch, latents, sigmas=sigmas, seeds=seeds, mode=mode)
        assert torch.equal(out, end)
        x = sigmas[0] * latents.double()
        for k, actual in enumerate(seen):
            torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-4)
            if k + 1 < len(sigmas):
                eta = reference.noise(seeds, FIRST + k, (3,))
                x = {
                    "fresh": end + sigmas[k + 1] * eta,
                    "line": end + sigmas[k + 1] / sigmas[k] * (x - end),
                    "reuse": end + sigmas[k + 1] * latents.double(),
                }[mode]
    assert fewstep.few_step_sigmas(1).tolist() == [80.0]
    s = fewstep.few_step_sigmas(4, grid="uniform_s")
    torch.testing.assert_close((s / (1 + s)).diff(), (s / (1 + s)).diff()[:1].expand(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"sigmas": [1.0, 2.0, 0.0]}, "sigmas must be finite"),
        ({"sigmas": [2.0, 1.0, -1.0]}, "sigmas must be finite"),
        ({"sigmas": [math.inf, 1.0]}, "sigmas must be finite"),
        ({"sigmas": [1.0]}, "sigmas must be"),
        ({"sigmas": torch.ones(3, 4)}, "sigmas must have 2 rows, got 3"),
        ({"S_churn": -1.0}, "S_churn must be at least 0 and finite, got -1.0"),
        ({"S_noise": math.nan}, "S_noise must be at least 0 and finite, got nan"),
        ({"guidance": 2.0}, "guidance needs uncond"),
        ({"uncond": gaussian(1.0)}, "uncond needs guidance"),
        ({"guidance": torch.ones(4)}, "guidance needs uncond"),
        ({"guidance": 0.0}, "guidance needs uncond, got guidance=0.0"),
        ({"guidance": torch.ones(3), "uncond": gaussian(1.0)}, "guidance must be finite"),
        ({"seeds": torch.arange(3)}, r"seeds must be \(2,\), got \(3,\)"),
        ({"seeds": torch.tensor([0, -1])}, "seeds must be at least 0, got -1"),
        ({"precondition": 0.0}, "precondition must be positive, got 0.0"),
        ({"state": "half"}, "state must be one of"),
        ({"sigma_min": 90.0}, "sigma_min and sigma_max"),
        ({"rho": 0.0}, "rho must be positive, got 0.0"),
        ({"log_density": torch.zeros(3)}, r"log_density must be \(2,\), got \(3,\)"),
        ({"log_density": torch.zeros(2), "S_churn": 1.0}, "S_churn must be 0"),
        ({"cuda_graph": True}, "cuda_graph needs latents on a CUDA device"),
        ({"backend": "cuda"}, "backend 'cuda' cannot serve"),
        ({"backend": "keops"}, "backend 'keops' cannot serve"),
        ({"tracker": "series"}, "tracker must be one of"),
        ({"sample_ids": torch.tensor([0, -1])}, "sample_ids must be in .* got -1"),
        ({"sample_ids": torch.tensor([2**48, 0])}, f"sample_ids must be in .* got {2**48}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    called: list[int] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        called.append(1)
        return x

    with pytest.raises(ValueError, match=message):
        fewstep.edm_sample(denoiser, torch.randn(2, 3), **options)
    assert not called


def test_bad_networks_are_named_with_their_step() -> None:
    latents = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"must return \(2, 3\), got \(2, 1\) at step 0"):
        fewstep.edm_sample(lambda x, sigma: x[:, :1], latents)

    def late(x: Tensor, sigma: Tensor) -> Tensor:
        return x / 2 if float(sigma[0]) > 1 else x * math.nan

    step = int((fewstep.karras_sigmas(18)[1:] <= 1).nonzero()[0])
    with pytest.raises(ValueError, match=f"not finite at step {step}"):
        fewstep.edm_sample(late, latents)
    with pytest.raises(ValueError, match="not finite at step 1"):
        fewstep.multistep_sample(
            lambda x, s: x * math.nan if float(s[0]) < 2 else x, latents, sigmas=[2.0, 1.0]
        )
    kept = torch.empty(2, 3)
    with pytest.raises(ValueError, match="one buffer from both at step 0"):
        fewstep.edm_sample(
            lambda x, s: torch.div(x, 2, out=kept),
            latents,
            guidance=2.0,
            uncond=lambda x, s: torch.div(x, 3, out=kept),
        )
    with pytest.raises(TypeError, match="floating"):
        fewstep.edm_sample(gaussian(1.0), torch.ones(2, 3, dtype=torch.int64))
    for times in ([0.0, 1.0], [1.5, 0.0], [1.0, -0.5]):
        with pytest.raises(ValueError, match="times must decrease"):
            fewstep.flow_sample(gaussian(1.0), latents, times=times)
    with pytest.raises(ValueError, match=r"times must be finite .* got 0.5 and then 0.5 at step 1"):
        fewstep.flow_sample(gaussian(1.0), latents, times=[1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="sigmas must be positive and decreasing"):
        fewstep.multistep_sample(gaussian(1.0), latents, sigmas=[1.0, 0.0])
    with pytest.raises(ValueError, match="mode must be one of"):
        fewstep.multistep_sample(gaussian(1.0), latents, sigmas=[1.0], mode="none")
    for steps, grid in (([0, 0], "edm_subset"), ([0, 18], "edm_subset"), ([1], "uniform_s")):
        with pytest.raises(ValueError, match="steps must be"):
            fewstep.few_step_sigmas(steps, grid=grid)


def test_wrong_types_are_named() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"seeds must be an int64 tensor, got torch.float32"):
        fewstep.latents(torch.zeros(2), (3,))
    for seeds, got in (([1, 2], "list"), (3, "int")):
        with pytest.raises(TypeError, match=f"seeds must be an int64 tensor, got {got}"):
            fewstep.latents(seeds, (3,))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"seeds must be an int64 tensor, got {got}"):
            fewstep.edm_sample(gaussian(1.0), x, seeds=seeds, S_churn=1.0)
    with pytest.raises(TypeError, match=r"dtype must be floating, got torch.int64"):
        fewstep.latents(torch.arange(2), (3,), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"seeds must be \[B\], got \(\)"):
        fewstep.latents(torch.tensor(2), (3,))
    for sample in (
        lambda latents: fewstep.edm_sample(gaussian(1.0), latents),
        lambda latents: fewstep.flow_sample(gaussian(1.0), latents),
        lambda latents: fewstep.multistep_sample(gaussian(1.0), latents, sigmas=[1.0]),
    ):
        with pytest.raises(TypeError, match="latents must be a tensor, got tuple"):
            sample((x, x))  # type: ignore[arg-type]
    for options, name in (
        ({"sigmas": "many"}, "sigmas must be numbers, got 'many'"),
        ({"guidance": "much", "uncond": gaussian(1.0)}, "guidance must be numbers, got 'much'"),
        ({"sample_ids": [0, 1]}, "sample_ids must be int64, got list"),
        ({"log_density": torch.zeros(2, dtype=torch.int64)}, "log_density must be .* floating"),
        ({"log_density": 0.0}, "log_density must be a tensor"),
    ):
        with pytest.raises(TypeError, match=name):
            fewstep.edm_sample(gaussian(1.0), x, **options)


WRONG_NUMBER = ("a", True, None, 1j, [1.0], torch.ones(2), np.array(["a"]), torch.tensor(True))
WRONG_FLAG = ("no", 0, None, torch.ones(2))
SAMPLE = {"latents": torch.zeros(2, 3)}
# The functions of this room, what they are called with, and what an argument must not be.
WRONG: list[tuple[Any, dict[str, Any], str, tuple[Any, ...]]] = [
    *(
        (fewstep.edm_sample, {"denoiser": gaussian(1.0), **SAMPLE}, name, values)
        for name, values in {
            "denoiser": ("a", None, 1),
            "latents": ("a", None, [1.0], torch.eye(2).to_sparse(), torch.ones(2).bool()),
            "steps": ("a", True, None, 2.5, -1, 10**400, 2**63, [1]),
            "sigmas": ("a", True, [1, "a"], [True, False], torch.ones(2) * 1j, [10**400, 1], 3.0),
            "precondition": ("a", True, [0.5], -1.0, math.nan, 10**400, 1e300, torch.ones(2)),
            "guidance": ("a", True, 1j, math.nan, np.array(["a"])),
            "uncond": ("a", 1.0),
            "seeds": ("a", 1, [1, 2], torch.ones(2)),
            "state": (None, True, ["float32"], torch.ones(2)),
            "tracker": (None, True, ["trace"], np.ones(2)),
            "estimator": (None, "a", ["exact"], np.ones(2)),
            "probes": (0, "a", None, True, 1.5),
            "log_density": ("a", True, torch.ones(2) * 1j, torch.eye(2).to_sparse()),
            "cuda_graph": WRONG_FLAG,
            "progress": WRONG_FLAG,
            "check_finite": ("no", 0, torch.ones(2)),
            "backend": ("gpu", 0, False, [], torch.ones(2)),
            **dict.fromkeys(("sigma_min", "sigma_max"), (*WRONG_NUMBER, math.nan, -1.0)),
            "rho": (*WRONG_NUMBER, math.nan, -1.0, 10**400, 1e-320, 1e300),
            **dict.fromkeys(("S_churn", "S_noise"), (*WRONG_NUMBER, math.nan, -1, math.inf)),
            **dict.fromkeys(("S_min", "S_max"), (*WRONG_NUMBER, math.nan)),
        }.items()
    ),
    *(
        (fewstep.flow_sample, {"velocity": gaussian(1.0), **SAMPLE}, name, values)
        for name, values in {
            "velocity": ("a", None, 1),
            "latents": ("a", None, torch.eye(2).to_sparse()),
            "steps": ("a", True, None, 2.5, 0, 10**400),
            "times": ("a", True, 3.0, [1, "a"], [10**400, 0]),
            "uncond": ("a", 1.0),
            "progress": WRONG_FLAG,
            "check_finite": ("no", 0, torch.ones(2)),
            "backend": ("gpu", 0, []),
            **dict.fromkeys(("S_churn", "S_noise"), (*WRONG_NUMBER, math.nan, -1, math.inf)),
            **dict.fromkeys(("S_min", "S_max"), (*WRONG_NUMBER, math.nan)),
        }.items()
    ),
    *(
        (
            fewstep.multistep_sample,
            {"network": gaussian(1.0), "sigmas": [4.0, 1.0], **SAMPLE},
            name,
            values,
        )
        for name, values in {
            "network": ("a", None, 1),
            "sigmas": ("a", None, 1.0, [True], [1.0, 2.0], [math.nan], torch.eye(2)),
            "mode": (None, "a", ["line"], torch.ones(2)),
            "check_finite": ("no", 0, torch.ones(2)),
            "backend": ("gpu", 0, []),
        }.items()
    ),
    *(
        (fewstep.karras_sigmas, {"steps": 3}, name, values)
        for name, values in {
            "steps": ("a", True, None, 2.5, 0, 10**400),
            "sigma_min": (*WRONG_NUMBER, 0, math.nan),
            "sigma_max": (*WRONG_NUMBER, math.inf, 10**400),
            "rho": (*WRONG_NUMBER, 0, 1e-320, 1e300),
            "dtype": ("a", None, torch.int32, torch.complex64),
            "device": ("a", 1.5, "cuda:99"),
        }.items()
    ),
    *(
        (fewstep.few_step_sigmas, {"steps": 3, "grid": grid}, name, values)
        for grid in ("edm_subset", "uniform_s")
        for name, values in {
            "steps": ("a", True, None, 2.5, 0, [0, 1.5], [True], [-1, 0], torch.ones(2), {}),
            "grid": (None, "a", ["uniform_s"], np.ones(2)),
            "teacher_steps": ("a", None, 0, 1.5),
            "sigma_min": (*WRONG_NUMBER, 0, math.nan),
            "sigma_max": (*WRONG_NUMBER, -1.0, math.nan, math.inf),
            "rho": (*WRONG_NUMBER, 0, math.nan),
        }.items()
    ),
    *(
        (fewstep.latents, {"seeds": torch.arange(2), "shape": (3,)}, name, values)
        for name, values in {
            "seeds": ("a", 1, torch.ones(2), torch.tensor([-1])),
            "shape": (2, None, "a", (-1,), (2.5,), (True,), {}, b"x", (2, 10**400)),
            "dtype": (None, "float32", torch.int32),
            "backend": ("gpu", 0, []),
        }.items()
    ),
]


def _words(value: Any) -> Iterator[str]:
    """What an error may say of a value: itself, one of its elements, its type, dtype or shape."""
    yield from (repr(value), type(value).__name__)
    if isinstance(value, list | tuple):
        yield from map(repr, value)
    elif hasattr(value, "dtype"):
        yield from (str(value.dtype), str(tuple(value.shape)))
        if getattr(value, "layout", torch.strided) == torch.strided:
            yield from (str(value.tolist()), *map(repr, value.flatten()))
            yield from map(repr, value.flatten().tolist())
        else:
            yield str(value.layout)
    elif isinstance(value, float):
        yield "()"  # the shape of a number where several are wanted


@pytest.mark.parametrize(
    ("function", "given", "name", "values"),
    WRONG,
    ids=[f"{function.__name__}-{name}-{i}" for i, (function, _, name, _) in enumerate(WRONG)],
)
def test_wrong_values_are_named(
    function: Any, given: dict[str, Any], name: str, values: tuple[Any, ...]
) -> None:
    """By the function that was called, the argument and the value, before the network runs."""
    called: list[int] = []
    network = next(iter(given))
    if callable(given[network]):
        given = {**given, network: lambda x, t: called.append(1) or x}
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"^{function.__name__}: .*{name}") as e:
            function(**{**given, name: value})
        got = str(e.value).split(": ", 1)[1]
        assert any(part in got for part in _words(value)), e.value
    assert not called


def test_a_backend_that_is_none_of_theirs_is_answered_with_theirs() -> None:
    theirs = r"\('reference', 'cpp', 'cuda', 'triton'\), got 'gpu'"
    with pytest.raises(ValueError, match=f"edm_sample: backend must be one of {theirs}"):
        fewstep.edm_sample(gaussian(1.0), torch.randn(2, 3), backend="gpu")
    with pytest.raises(ValueError, match=r"latents: backend 'keops' cannot serve"):
        fewstep.latents(torch.arange(2), (3,), backend="keops")


@pytest.mark.parametrize("number", [np.float64(2.0), np.float32(2.0), np.array(2.0), Fraction(2)])
def test_numbers_of_all_kinds_are_taken(number: Any) -> None:
    x = torch.randn(2, 3)
    for name in ("sigma_max", "rho", "S_churn", "S_noise", "S_max", "precondition"):
        own = fewstep.edm_sample(
            gaussian(1.0), x, seeds=torch.arange(2), **{"S_churn": 1.0, name: number}
        )
        same = fewstep.edm_sample(
            gaussian(1.0), x, seeds=torch.arange(2), **{"S_churn": 1.0, name: 2.0}
        )
        assert torch.equal(own, same)


def test_numpy_integers_are_taken() -> None:
    x, five = torch.randn(2, 3), np.int64(5)
    for sample in (fewstep.edm_sample, fewstep.flow_sample):
        assert torch.equal(sample(gaussian(1.0), x, steps=five), sample(gaussian(1.0), x, steps=5))
    assert torch.equal(fewstep.karras_sigmas(five), fewstep.karras_sigmas(5))
    assert torch.equal(fewstep.few_step_sigmas(five), fewstep.few_step_sigmas(5))
    options: dict[str, Any] = {"estimator": "hutchinson", "probes": np.int64(2), "seed": five}
    own = fewstep.divergence(gaussian(1.0), x, 0.5, **options).value
    assert torch.equal(
        own, fewstep.divergence(gaussian(1.0), x, 0.5, **options | {"probes": 2, "seed": 5}).value
    )


def churned(x: Tensor, seeds: Tensor) -> Tensor:
    return fewstep.edm_sample(gaussian(1.0), x, steps=4, S_churn=40.0, seeds=seeds)


def scaled(x: Tensor, seeds: Tensor) -> Tensor:
    return fewstep.edm_sample(lambda x, c: torch.tanh(x), x, steps=4, precondition=0.5)


def flowing(x: Tensor, seeds: Tensor) -> Tensor:
    return fewstep.flow_sample(lambda x, t: torch.tanh(x), x, steps=4, S_churn=20.0, seeds=seeds)


def renoised(x: Tensor, seeds: Tensor) -> Tensor:
    return fewstep.multistep_sample(gaussian(1.0), x, sigmas=[80.0, 5.0, 1.0], seeds=seeds)


@pytest.mark.parametrize("sample", [churned, scaled, flowing, renoised])
def test_compiled_and_mapped_samplers(sample: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, seeds = torch.randn(3, 2), torch.arange(3)
    plain = sample(x, seeds)
    torch.testing.assert_close(torch.compile(sample, backend="aot_eager")(x, seeds), plain)
    mapped = torch.func.vmap(lambda x: sample(x[None], seeds[:1])[0])(x)
    alone = torch.cat([sample(x[i : i + 1], seeds[:1]) for i in range(3)])
    torch.testing.assert_close(mapped, alone)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    fewstep.edm_sample(gaussian(1.0), torch.randn(2, 3), steps=3, progress=True)
    assert "sampling: 100%" in capsys.readouterr().err
