"""Log-densities of samples: by the trace, and by the determinant of the sampler's Jacobian."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from support.denoisers import GUIDANCE, Raw, edm, gaussian, wide
from tolerances import assert_contract


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


@pytest.mark.parametrize("tracker", ["trace", "logdet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precondition", [None, 0.5])
def test_log_density_of_half_precision_samples(
    dtype: torch.dtype, tracker: str, precondition: float | None
) -> None:
    latents = torch.randn(3, 4).to(dtype)
    for start in (torch.zeros(3), torch.zeros(3, dtype=dtype)):
        options: dict[str, Any] = {"log_density": start, "tracker": tracker}
        options["precondition"] = precondition
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


def bent_flow(x: Tensor, t: Tensor) -> Tensor:
    """A velocity whose Jacobian is not symmetric."""
    return torch.tanh(x.flip(-1)) * (1 + wide(t, x).to(x.dtype)) - 0.4 * x


@pytest.mark.parametrize("tracker", ["trace", "logdet"])
@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_log_density_of_flow_samples(
    tracker: Any, data_at: int, shape: tuple[int, ...], guided: bool, own: bool
) -> None:
    """Against `log_density` of the same steps; in each batch with times of its own, and guided."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return -bent_flow(x, 1 - t) if data_at else bent_flow(x, t)

    def other(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * velocity(x, t)

    def whole(x: Tensor, t: Tensor) -> Tensor:
        return bent_flow(x, t) * (1.25 if guided else 1)  # 1.5 v + (1 - 1.5) v / 2

    latents, start = torch.randn(5, *shape).double(), torch.randn(5).double()
    times = torch.tensor([0.96, 0.7, 0.35, 0.0], dtype=torch.float64)
    if own:
        times = times * torch.linspace(0.8, 1, 5, dtype=torch.float64)[:, None]
    options: dict[str, Any] = {"guidance": 1.5, "uncond": other} if guided else {}
    options |= {"times": 1 - times if data_at else times, "data_at": data_at}
    out = fewstep.flow_sample(
        *(velocity, latents), log_density=start, tracker=tracker, estimator="exact", **options
    )
    assert_contract("value", out.x, fewstep.flow_sample(velocity, latents, **options))
    exact = fewstep.log_density(
        *(whole, wide(times.expand(5, -1)[:, 0], latents) * latents),
        times=times,
        tracker=tracker,
        estimator="exact",
        base=lambda x: start,
        base_at="start",
    )
    assert_contract("value", out.x, exact.x)
    assert_contract("value", out.log_density, exact.log_prob)
    assert not out.stderr.any()
    assert (out.nonpositive is None) == (tracker == "trace")


def test_log_density_of_flow_samples_in_closed_form() -> None:
    """Gaussian data of standard deviation 1/2, from noise at 1 to data at 0."""
    latents = torch.randn(7, 3, dtype=torch.float64)
    start = fewstep.ops.trace.log_density.standard_normal(latents)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = wide(t, x)
        return (t - (1 - t) / 4) / (t**2 + (1 - t) ** 2 / 4) * x

    for tracker in ("trace", "logdet"):
        out = fewstep.flow_sample(
            *(velocity, latents), steps=200, log_density=start, tracker=tracker, estimator="exact"
        )
        law = torch.distributions.Normal(0.0, torch.tensor(0.5, dtype=torch.float64))
        exact = law.log_prob(out.x).sum(1)
        torch.testing.assert_close(out.log_density, exact, rtol=0, atol=1e-3)


def test_bad_log_densities_of_flows() -> None:
    x, start = torch.randn(4, 2), torch.zeros(4)
    for options, message in (
        ({"S_churn": 1.0}, "S_churn must be 0 with log_density, got 1.0"),
        ({"solver": "dpm++2m"}, "plain Heun steps, got solver='dpm"),
        ({"callback": lambda _: None}, "plain Heun steps, got init, mask or callback"),
        ({"tracker": "series"}, "tracker must be one of .* got 'series'"),
        ({"log_density": start[:2]}, r"log_density must be \(4,\), got \(2,\)"),
        ({"probes": 0}, "probes"),
    ):
        with pytest.raises(ValueError, match=f"flow_sample: .*{message}"):
            fewstep.flow_sample(bent_flow, x, **{"log_density": start, **options})
