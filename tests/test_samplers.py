"""Samplers against plain loops in float64, with Gaussian data as the oracle."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.data.toys import GaussianMixture
from fewstep.networks import EDMPrecond, LinePrecond, ResidualMLP, VelocityMLP
from fewstep.ops.heun.engine import FIRST
from fewstep.reference import heun as reference
from fewstep.samplers.multistep import MODES
from support.denoisers import GUIDANCE, Raw, edm, gaussian, wide
from tolerances import assert_contract


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.0, 1.5]], dtype=torch.float64)
    return GaussianMixture(means, torch.full_like(means, 0.05), path="ve")


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


def test_guidance_is_that_of_denoisers() -> None:
    latents = torch.randn(4, 3, dtype=torch.float64)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        none = gaussian(0.5)(x, sigma)
        return none + 1.7 * (gaussian(1.0)(x, sigma) - none)

    own = fewstep.edm_sample(gaussian(1.0), latents, guidance=1.7, uncond=gaussian(0.5))
    assert_contract("value", own, edm(guided, latents, fewstep.karras_sigmas(18)))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("returned", ["float32", "half"])
@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("steps", [4, 18])
@pytest.mark.parametrize("state", ["float32", "compensated", "float64"])
def test_slopes_in_half_precision(
    dtype: torch.dtype, returned: str, solver: Any, steps: int, state: Any
) -> None:
    """Those at the rounded states, which the network sees: 4 steps have levels 200 apart."""

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == dtype
        out = gaussian(1.0)(x.float(), sigma)
        return out if returned == "float32" else out.to(dtype)

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        seen = x.to(dtype)
        return (seen.double() - network(seen, sigma.float().expand(len(x))).double()) / sigma

    def line_by_line(slope: Any) -> Tensor:
        x = latents.double() * levels[0]
        for now, after in itertools.pairwise(levels):
            h, d = after - now, slope(x, now)
            if solver == "heun" and after > 0:
                d = (d + slope(x + h * d, after)) / 2
            x = x + h * d
        return x

    latents, levels = torch.randn(63, 5).to(dtype), fewstep.karras_sigmas(steps)
    out = fewstep.edm_sample(network, latents, steps=steps, solver=solver, state=state)
    assert out.dtype == dtype
    error = (out.double() - line_by_line(slope)).abs()
    assert float(error.max()) <= torch.finfo(dtype).eps * float(out.abs().max())
    once = fewstep.edm_sample(network, latents[:1], steps=steps, solver=solver, state=state)
    assert torch.equal(once, out[:1])
    for options in ({"guidance": 3.0, "uncond": network}, {"log_density": torch.zeros(63)}):
        if solver == "heun" or "guidance" in options:
            options |= {"sigmas": levels[:-1], "solver": solver, "state": state}
            same = fewstep.edm_sample(network, latents, **options)
            same = same if isinstance(same, Tensor) else same.x
            plain = {key: options[key] for key in ("sigmas", "solver", "state")}
            own = fewstep.edm_sample(network, latents, **plain)
            assert float((same.double() - own).abs().max()) <= 8 * torch.finfo(dtype).eps * float(
                own.abs().max()
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    latents = torch.ones(2, 3, dtype=dtype)
    one = torch.tensor(1 + 2**-12)

    def constant(x: Tensor, t: Tensor) -> Tensor:
        return one.expand(x.shape)

    for solver in ("heun", "euler"):  # 1 - 1024 (1 / 1024) (1 + 2^-12)
        out = fewstep.flow_sample(constant, latents, solver=solver, steps=8)
        assert torch.equal(out, torch.full((2, 3), -(2.0**-12)).to(dtype))
    out = fewstep.heun_solve(constant, latents, [1.0, 0.5, 0.0]).x
    assert torch.equal(out, torch.full((2, 3), -(2.0**-12)).to(dtype))


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
