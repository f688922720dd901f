"""Solvers, guidance by level, known data, callbacks and the time of data against plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.samplers import SamplerStep
from support.denoisers import Raw, gaussian, wide
from tolerances import assert_contract

Network = Callable[[Tensor, Tensor], Tensor]
B, D = 5, 7
SIGMAS = torch.tensor([60.0, 17.0, 4.0, 1.1, 0.3, 0.02], dtype=torch.float64)
OWN = SIGMAS * torch.linspace(0.7, 1.2, B, dtype=torch.float64)[:, None]  # of each sample


def bent(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser that is not linear."""
    s = wide(sigma, x).to(x.dtype)
    return x / (1 + s * s) + 0.3 * torch.tanh(x / (1 + s))


def other(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.5 * bent(x, sigma)


def flow(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (1 + wide(t, x).to(x.dtype)) - 0.4 * x


def drawn(dtype: torch.dtype = torch.float64, *shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(len(shape) + 7)
    return torch.randn(*(shape or (B, D)), generator=rng, dtype=torch.float64).to(dtype)


def line_by_line(solver: str, D_of: Network, x: Tensor, sigmas: Tensor) -> Tensor:
    """Euler and DPM-Solver++(2M) as their papers have them, in float64."""
    levels = sigmas.expand(x.shape[0], -1).T
    x, before = x.double() * wide(levels[0], x), None
    for i in range(len(levels) - 1):
        now, after = wide(levels[i], x), wide(levels[i + 1], x)
        D1 = D_of(x, levels[i])
        if solver == "euler":
            x = x + (after - now) * (x - D1) / now
            continue
        if bool((after == 0).all()):
            x = D1
            continue
        h = (now / after).log()
        D2 = D1
        if before is not None:
            r = (wide(levels[i - 1], x) / now).log() / h
            D2 = (1 + 1 / (2 * r)) * D1 - 1 / (2 * r) * before
        x, before = after / now * x - torch.expm1(-h) * D2, D1
    return x


@pytest.mark.parametrize("solver", ["euler", "dpm++2m"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("sigmas", [SIGMAS, OWN, SIGMAS[:1]], ids=["shared", "own", "one"])
def test_solvers(solver: str, backend: str, zero: bool, sigmas: Tensor) -> None:
    if zero or sigmas.shape[-1] == 1:
        sigmas = torch.cat((sigmas, torch.zeros_like(sigmas[..., :1])), -1)
    for dtype in (torch.float64, torch.float32):
        latents = drawn(dtype)
        options: dict[str, Any] = {"sigmas": sigmas, "solver": solver, "backend": backend}
        out = fewstep.edm_sample(bent, latents, **options)
        exact = line_by_line(solver, bent, latents, sigmas)
        assert out.dtype == dtype
        assert_contract("value", out, exact, scale=exact.abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm++2m", 2), ("heun", 2)])
def test_orders(solver: str, order: int) -> None:
    """Halved steps have a 2^order-th of the error, on Gaussian data."""
    x = drawn()
    exact = x * 80 * math.hypot(0.5, 0.02) / math.hypot(80, 0.5)
    errors = []
    for steps in (80, 160, 320):
        sigmas = torch.logspace(math.log10(80), math.log10(0.02), steps + 1, dtype=torch.float64)
        sigmas[0] = 80
        out = fewstep.edm_sample(gaussian(0.5), x, sigmas=sigmas, solver=solver)
        errors.append(float((out - exact).norm()))
    for a, b in ((0, 1), (1, 2)):
        assert abs(math.log2(errors[a] / errors[b]) - order) < 0.2


def flow_of(sd: float) -> Network:
    """The exact velocity of N(0, sd^2 I)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        s = wide(t, x).to(x.dtype)
        return (s - (1 - s) * sd**2) / (s**2 + (1 - s) ** 2 * sd**2) * x

    return velocity


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm++2m", 2), ("heun", 2)])
@pytest.mark.parametrize("ends", [(0.99, 0.02), (1.0, 0.0)])
def test_orders_of_flows(solver: Any, order: int, ends: tuple[float, float]) -> None:
    high, low = ends
    x, size = drawn(), (lambda t: math.hypot(t, (1 - t) * 0.5))
    exact = x * high * size(low) / size(high)
    errors = []
    for steps in (160, 320, 640):
        times = torch.linspace(high, low, steps + 1, dtype=torch.float64)
        out = fewstep.flow_sample(flow_of(0.5), x, times=times, solver=solver)
        errors.append(float((out - exact).norm()))
    for a, b in ((0, 1), (1, 2)):
        # with infinite ln(1/t - 1) at the ends the order comes to 2 slowly
        assert abs(math.log2(errors[a] / errors[b]) - order) < 0.25, errors


def flow_by_multistep(x: Tensor, times: Tensor, velocity: Network, *, lower: bool) -> Tensor:
    """DPM-Solver++(2M) of data D in float64, by lambda = ln(alpha / sigma)."""
    nodes = times.expand(x.shape[0], -1).T
    x, before = x.double() * wide(nodes[0], x), None
    lambdas = (1 / nodes - 1).log()
    for i in range(len(nodes) - 1):
        now, after = wide(nodes[i], x), wide(nodes[i + 1], x)
        D1 = x - now * velocity(x, nodes[i])
        h, slope = wide(lambdas[i + 1] - lambdas[i], x), torch.zeros_like(x)
        last = lower and i == len(nodes) - 2
        if before is not None and bool(h.isfinite().all()) and not last:
            slope = (D1 - before) / wide(lambdas[i] - lambdas[i - 1], x)  # 0 after an infinite step
            slope = slope * h / 2
        x, before = after / now * x - (1 - after) * torch.expm1(-h) * (D1 + slope), D1
    return x


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.97, 0.03)])
@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_multistep_of_flows(
    backend: Any, ends: tuple[float, float], data_at: int, lower: bool, own: bool
) -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return -flow(x, 1 - t) if data_at else flow(x, t)

    for nodes in ((), (0.5,), (0.8, 0.55, 0.2)):
        times = torch.tensor([ends[0], *nodes, ends[1]], dtype=torch.float64)
        if own:
            times = times ** torch.linspace(0.7, 1.2, B, dtype=torch.float64)[:, None]
        for dtype in (torch.float64, torch.float32):
            out = fewstep.flow_sample(
                *(velocity, drawn(dtype)),
                times=1 - times if data_at else times,
                solver="dpm++2m",
                lower_order_final=lower,
                backend=backend,
                data_at=data_at,
            )
            exact = flow_by_multistep(drawn(dtype), times, flow, lower=lower)
            assert out.dtype == dtype
            assert_contract("value", out, exact, scale=exact.abs().max())


def test_multistep_of_flows_with_guidance_and_known_data() -> None:
    def twice(x: Tensor, t: Tensor) -> Tensor:
        return 2 * flow(x, t)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return 3 * flow(x, t) - 2 * twice(x, t)

    seen: list[SamplerStep] = []
    options: dict[str, Any] = {"steps": 7, "solver": "dpm++2m"}
    out = fewstep.flow_sample(flow, drawn(), guidance=3.0, uncond=twice, **options)
    assert_contract("value", out, fewstep.flow_sample(guided, drawn(), **options))
    known, mask = KNOWN["known"], torch.arange(D) % 3 == 1
    held = fewstep.flow_sample(
        flow, drawn(), known=known, mask=mask, callback=lambda s: seen.append(s), **options
    )
    free = fewstep.flow_sample(flow, drawn(), **options)
    assert_contract("value", held, torch.where(mask, known, free))
    for s in seen:
        t = s.level[:, None]
        assert_contract("value", s.x[:, mask], ((1 - t) * known + t * drawn())[:, mask])
        assert_contract("value", s.denoised, s.x - t * flow(s.x, s.level))


def test_lower_order_at_the_end() -> None:
    """The last step is the one to 0 of Euler's method, from where all before it lead."""
    options: dict[str, Any] = {"solver": "dpm++2m"}
    low = fewstep.edm_sample(bent, drawn(), sigmas=SIGMAS, lower_order_final=True, **options)
    part = fewstep.edm_sample(bent, drawn(), sigmas=SIGMAS[:-1], **options)
    q = SIGMAS[-1] / SIGMAS[-2]
    assert_contract("value", low, q * part + (1 - q) * bent(part, SIGMAS[-2].expand(B)))
    assert not torch.allclose(low, fewstep.edm_sample(bent, drawn(), sigmas=SIGMAS, **options))


def test_preconditioned_multistep() -> None:
    network = Raw(D).double()

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        s = wide(sigma, x)
        r = (s**2 + 0.25).sqrt()
        return 0.25 / r**2 * x + 0.5 * s / r * network(x / r, sigma.log() / 4)

    options: dict[str, Any] = {"sigmas": SIGMAS, "solver": "dpm++2m"}
    out = fewstep.edm_sample(network, drawn(), precondition=0.5, **options)
    assert_contract("value", out, fewstep.edm_sample(denoiser, drawn(), **options))


@pytest.mark.parametrize("solver", ["heun", "euler", "dpm++2m"])
@pytest.mark.parametrize("by", ["interval", "function"])
def test_guidance_by_level(solver: str, by: str) -> None:
    """Guidance of 3 within levels; where it is 1 the unconditional network is not called."""
    calls: list[float] = []

    def uncond(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma[0]))
        return other(x, sigma)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        w = torch.where((sigma >= 0.25) & (sigma <= 5), 3.0, 1.0)
        return wide(w, x) * bent(x, sigma) + (1 - wide(w, x)) * other(x, sigma)

    options: dict[str, Any] = {"sigmas": SIGMAS, "solver": solver}
    plain = fewstep.edm_sample(guided, drawn(), **options)
    if by == "interval":
        options |= {"guidance": 3.0, "guidance_interval": (0.25, 5.0)}
    else:
        options["guidance"] = lambda sigma: 3 if 0.25 <= sigma <= 5 else 1.0
    out = fewstep.edm_sample(bent, drawn(), uncond=uncond, **options)
    assert_contract("value", out, plain)
    assert set(calls) == {4.0, 1.1, 0.3}


def test_guidance_by_level_has_its_log_density() -> None:
    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        w = torch.where(sigma <= 5, 2.5, 1.0)
        return wide(w, x) * bent(x, sigma) + (1 - wide(w, x)) * other(x, sigma)

    start = torch.zeros(B, dtype=torch.float64)
    for tracker in ("trace", "logdet"):
        options: dict[str, Any] = {"sigmas": SIGMAS, "log_density": start, "tracker": tracker}
        plain = fewstep.edm_sample(guided, drawn(), **options)
        options |= {"guidance": 2.5, "guidance_interval": (0.0, 5.0), "uncond": other}
        own = fewstep.edm_sample(bent, drawn(), **options)
        assert_contract("value", own.log_density, plain.log_density)


@pytest.mark.parametrize("kind", ["noise", "v", "score", "velocity"])
def test_other_predictions(kind: Any) -> None:
    """A network that predicts something else, converted to what a sampler takes."""
    convert = fewstep.conversions.convert

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return convert(bent(x, sigma), x, sigma, source="denoiser", target=kind, path="ve")

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return convert(network(x, sigma), x, sigma, source=kind, target="denoiser", path="ve")

    for solver in ("heun", "dpm++2m"):
        options: dict[str, Any] = {"sigmas": SIGMAS, "solver": solver}
        out = fewstep.edm_sample(denoiser, drawn(), **options)
        assert_contract("value", out, fewstep.edm_sample(bent, drawn(), **options))

    def other_flow(x: Tensor, t: Tensor) -> Tensor:
        return convert(flow(x, t), x, t, source="velocity", target=kind)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return convert(other_flow(x, t), x, t, source=kind, target="velocity")

    times = torch.tensor([0.95, 0.6, 0.3, 0.05], dtype=torch.float64)
    own = fewstep.flow_sample(velocity, drawn(), times=times)
    assert_contract("value", own, fewstep.flow_sample(flow, drawn(), times=times))


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("churn", [0.0, 5.0])
def test_data_at_one(solver: str, churn: float) -> None:
    times = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    seeds = torch.arange(B)
    options: dict[str, Any] = {"solver": solver, "S_churn": churn, "seeds": seeds}
    calls: list[float] = []

    def theirs(x: Tensor, t: Tensor) -> Tensor:
        calls.append(round(float(t[0]), 6))
        return -flow(x, 1 - t)

    here = fewstep.flow_sample(flow, drawn(), times=1 - times, S_min=0.1, S_max=0.9, **options)
    there = fewstep.flow_sample(
        theirs, drawn(), times=times, S_min=0.1, S_max=0.9, data_at=1, **options
    )
    assert_contract("value", there, here)
    assert calls[0] == 0
    default = fewstep.flow_sample(theirs, drawn(), data_at=1, solver=solver)
    assert_contract("value", default, fewstep.flow_sample(flow, drawn(), solver=solver))


def test_flow_by_euler_line_by_line() -> None:
    times = torch.tensor([1.0, 0.6, 0.25, 0.0], dtype=torch.float64)
    x = drawn()
    for now, after in itertools.pairwise(times):
        x = x + (after - now) * flow(x, now.expand(B))
    assert_contract("value", fewstep.flow_sample(flow, drawn(), times=times, solver="euler"), x)


def test_start_in_the_middle() -> None:
    image = drawn(torch.float64, B, D, 1)[..., 0]
    solver: Any
    for solver in ("heun", "euler", "dpm++2m"):
        options: dict[str, Any] = {"sigmas": SIGMAS[2:], "solver": solver}
        own = fewstep.edm_sample(bent, drawn(), init=image, **options)
        assert_contract(
            "value", own, fewstep.edm_sample(bent, drawn() + image / SIGMAS[2], **options)
        )
    times = torch.tensor([0.5, 0.2, 0.0])
    for solver in ("heun", "euler", "dpm++2m"):
        options = {"times": times, "solver": solver}
        own = fewstep.flow_sample(flow, drawn(), init=image, **options)
        assert_contract("value", own, fewstep.flow_sample(flow, drawn() + image, **options))


@pytest.mark.parametrize("solver", ["heun", "euler", "dpm++2m"])
@pytest.mark.parametrize("state", ["float32", "compensated", "float64"])
@pytest.mark.parametrize("precondition", [None, 0.5])
def test_known_data(solver: str, state: str, precondition: float | None) -> None:
    """Known coordinates have the noise of their level; others do not feel it here."""
    exact, mask = drawn(torch.float64, B, D, 1)[..., 0].float().double(), torch.arange(D) % 3 == 1
    known, noise = exact.float(), drawn(torch.float32).double()
    seen: list[SamplerStep] = []
    network: Network = bent
    if precondition is not None:

        def raw(x: Tensor, noise: Tensor) -> Tensor:
            return torch.tanh(x + wide(noise, x).to(x.dtype))

        network = raw
    latents = drawn(torch.float32)
    options: dict[str, Any] = {"sigmas": SIGMAS, "solver": solver, "state": state}
    options["precondition"] = precondition
    out = fewstep.edm_sample(
        network, latents, known=known, mask=mask, callback=lambda s: seen.append(s), **options
    )
    free = fewstep.edm_sample(network, latents, **options)
    last = exact + SIGMAS[-1] * noise
    assert_contract("value", out, torch.where(mask, last, free.double()))
    assert [s.index for s in seen] == list(range(5))
    assert [round(float(s.level[0]), 3) for s in seen] == [60, 17, 4, 1.1, 0.3]
    for s in seen:
        held = exact + wide(s.level.double(), noise) * noise
        assert_contract("value", s.x[:, mask], held[:, mask], scale=held.abs().max())


def test_known_data_of_flows_with_churn() -> None:
    known, mask = drawn(torch.float64, B, D, 1)[..., 0], torch.arange(B)[:, None] > 2
    seen: list[SamplerStep] = []
    out = fewstep.flow_sample(
        flow, drawn(), known=known, mask=mask, steps=6, S_churn=3, callback=lambda s: seen.append(s)
    )
    assert torch.equal(out[3:], known[3:])
    assert not torch.equal(out[:3], known[:3])
    for s in seen:
        t = s.level[:, None]
        assert_contract("value", s.x[3:], ((1 - t) * known + t * drawn())[3:])
        assert_contract("value", s.denoised, s.x - t * flow(s.x, s.level))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_data_of_another_dtype(dtype: torch.dtype) -> None:
    """Data in float64 beside other latents, levels of each sample, one mask for all."""
    known, mask = drawn(torch.float64, B, D, 1)[..., 0], torch.arange(D) < 3
    for solver in ("heun", "euler", "dpm++2m"):
        options: dict[str, Any] = {"sigmas": OWN, "solver": solver}
        out = fewstep.edm_sample(bent, drawn(dtype), known=known, mask=mask, **options)
        held = known + OWN[:, -1:] * drawn(dtype).double()
        assert out.dtype == dtype
        assert torch.equal(out[:, :3], held.float().to(dtype)[:, :3])


@pytest.mark.parametrize("data_at", [0, 1])
def test_a_callback_sees_and_ends(data_at: int) -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return -flow(x, 1 - t) if data_at else flow(x, t)

    def twice(x: Tensor, t: Tensor) -> Tensor:
        return 2 * velocity(x, t)

    seen: list[SamplerStep] = []

    def callback(step: SamplerStep) -> bool:
        seen.append(step)
        return step.index == 2

    out = fewstep.flow_sample(
        *(velocity, drawn()), data_at=data_at, guidance=3.0, uncond=twice, callback=callback
    )
    assert len(seen) == 3
    assert seen[-1].steps == 18
    noise = 1 - seen[-1].level if data_at else seen[-1].level
    guided = -flow(seen[-1].x, noise)  # 3 v - 2 (2 v)
    assert_contract("value", seen[-1].denoised, seen[-1].x - noise[:, None] * guided)
    assert torch.equal(out, seen[-1].denoised)


@pytest.mark.parametrize("sample", ["edm_sample", "flow_sample"])
@pytest.mark.parametrize("end", [True, np.True_, torch.tensor(True), np.array(True)])
def test_what_is_known_stays_where_a_callback_ends(sample: str, end: Any) -> None:
    network, known, mask = {"edm_sample": bent, "flow_sample": flow}[sample], KNOWN["known"], None
    mask = torch.arange(D) % 2 == 0
    seen: list[SamplerStep] = []

    def callback(step: SamplerStep) -> Any:
        seen.append(step)
        return end if step.index == 2 else ~np.True_

    out = getattr(fewstep, sample)(
        *(network, drawn()), steps=5, known=known, mask=mask, callback=callback
    )
    assert len(seen) == 3
    assert torch.equal(out, torch.where(mask, known, seen[-1].denoised))


def test_states_of_a_callback_are_copies() -> None:
    seen: list[Tensor] = []

    def callback(step: SamplerStep) -> None:
        seen.append(step.x.clone())
        step.x.zero_()
        step.denoised.zero_()

    for state in ("float32", "compensated"):
        options: dict[str, Any] = {"steps": 5, "state": state}
        plain = fewstep.edm_sample(bent, drawn(torch.float32), **options)
        own = fewstep.edm_sample(bent, drawn(torch.float32), callback=callback, **options)
        assert torch.equal(own, plain)


@pytest.mark.parametrize("solver", ["heun", "euler", "dpm++2m"])
@pytest.mark.parametrize("sample", ["edm_sample", "flow_sample"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("own", [False, True])
def test_a_callback_replaces_the_state(
    solver: Any, sample: str, dtype: torch.dtype, own: bool
) -> None:
    """Steps go on from what it returned; earlier outputs of a multistep solver stay."""
    shift = drawn(torch.float64, B, D, 1)[..., 0]
    plan: dict[str, Any] = {"solver": solver}
    network: Network
    if sample == "edm_sample":
        network, nodes = bent, (OWN if own else SIGMAS)
        plan["sigmas"] = nodes
    else:
        network, nodes = flow, torch.tensor([0.95, 0.7, 0.4, 0.2, 0.05], dtype=torch.float64)
        nodes = nodes * torch.linspace(0.8, 1, B, dtype=torch.float64)[:, None] if own else nodes
        plan["times"] = nodes
    calls: list[Tensor] = []

    def counted(x: Tensor, level: Tensor) -> Tensor:
        calls.append(x.clone())
        return network(x, level)

    def callback(step: SamplerStep) -> Tensor | None:
        return step.x + shift.to(dtype) if step.index in (0, 2) else None

    kept = drawn(dtype)
    out = getattr(fewstep, sample)(counted, kept, callback=callback, **plan)
    levels, x, before = nodes.expand(B, -1).T, drawn().to(dtype).double(), None
    x = x * wide(levels[0], x)
    for i in range(len(levels) - 1):
        x = x + shift if i in (0, 2) else x
        now, after = wide(levels[i], x), wide(levels[i + 1], x)
        F, edm = network(x, levels[i]), sample == "edm_sample"
        data = F if edm else x - now * F
        alpha, following = (1, 1) if edm else (1 - now, 1 - after)
        slope = (x - F) / now if edm else F
        if solver == "dpm++2m":
            h, extra = (following / after / (alpha / now)).log(), 0 * x
            if before is not None:
                last = wide(levels[i - 1], x)
                extra = (
                    (data - before) * h / 2 / (alpha / now * last / (1 if edm else 1 - last)).log()
                )
            x, before = after / now * x - following * torch.expm1(-h) * (data + extra), data
        else:
            y = x + (after - now) * slope
            if solver == "heun":
                second = network(y, levels[i + 1])
                second = (y - second) / after if edm else second
                y = x + (after - now) * (slope + second) / 2
            x = y
    assert_contract("value", out, x, scale=x.abs().max())
    assert len(calls) == (len(levels) - 1) * (2 if solver == "heun" else 1) + 2
    assert torch.equal(kept, drawn(dtype))


def test_a_returned_state_is_only_read() -> None:
    own = drawn(torch.float32)
    before = own.clone()
    for state in ("float32", "compensated", "float64"):
        options: dict[str, Any] = {"steps": 3, "state": state}
        out = fewstep.edm_sample(
            *(bent, drawn(torch.float32)),
            callback=lambda s: own if s.index == 0 else None,
            **options,
        )
        assert torch.equal(own, before)
        again = fewstep.edm_sample(bent, own / 80, **options)
        assert_contract("value", out, again.double())
    known, mask = KNOWN["known"], torch.arange(D) < 2
    out = fewstep.edm_sample(
        bent, drawn(), known=known, mask=mask, callback=lambda s: torch.zeros_like(s.x)
    )
    assert_contract("value", out[:, :2], known[:, :2])


def test_bad_states_of_a_callback() -> None:
    for state in (drawn()[:2], drawn()[..., None]):
        with pytest.raises(ValueError, match=r"callback must return .* \(5, 7\) on cpu, got"):
            fewstep.edm_sample(bent, drawn(), callback=lambda _, own=state: own)
    with pytest.raises(TypeError, match=r"the state, of torch.float64, got .*float32"):
        fewstep.flow_sample(flow, drawn(), callback=lambda _: drawn(torch.float32))
    with pytest.raises(ValueError, match="the state is not finite at step 0"):
        fewstep.edm_sample(bent, drawn(), callback=lambda s: s.x * math.nan)


KNOWN = {"known": drawn(), "mask": torch.ones(D, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "solver must be one of"),
        ({"solver": "dpm++2m", "S_churn": 1.0}, "S_churn must be 0 with 'dpm\\+\\+2m', got 1.0"),
        (
            {"lower_order_final": True},
            "lower_order_final is an option of 'dpm\\+\\+2m', got 'heun'",
        ),
        ({"guidance_interval": (0.0, 1.0)}, "guidance_interval needs guidance"),
        ({"guidance": 2.0, "uncond": other, "guidance_interval": 3.0}, "must be a pair, got 3.0"),
        ({"guidance": 2.0, "uncond": other, "guidance_interval": (2, 1)}, "got 2 and 1"),
        ({"guidance": lambda _: math.nan, "uncond": other}, "guidance must be finite, got nan at"),
        ({"known": drawn()}, "known needs mask"),
        ({"mask": KNOWN["mask"]}, "mask needs known"),
        ({**KNOWN, "mask": torch.ones(D + 1, dtype=torch.bool)}, "mask must broadcast"),
        ({**KNOWN, "known": drawn()[:2]}, "known must be"),
        ({"init": drawn()[:2]}, "init must be"),
        ({**KNOWN, "log_density": torch.zeros(B)}, "log_density is that of plain Heun steps"),
        ({"solver": "euler", "log_density": torch.zeros(B)}, "got solver='euler'"),
        ({"callback": lambda _: None, "cuda_graph": True}, "cuda_graph needs"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fewstep.edm_sample(bent, drawn(), **options)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="mask must be a bool Tensor"):
        fewstep.edm_sample(bent, drawn(), known=drawn(), mask=drawn())
    with pytest.raises(TypeError, match="init must be a floating Tensor"):
        fewstep.edm_sample(bent, drawn(), init=drawn().long())
    with pytest.raises(TypeError, match=r"callback must return True, False, None or .* got int"):
        fewstep.edm_sample(bent, drawn(), callback=lambda _: 1)  # type: ignore[arg-type,return-value]
    for verdict in (torch.ones(2).bool(), torch.tensor(1), np.ones(2, dtype=bool), "yes"):
        with pytest.raises(TypeError, match=r"callback must return True, False, None or .* got"):
            fewstep.edm_sample(bent, drawn(), callback=lambda _, own=verdict: own)
    with pytest.raises(ValueError, match="times must begin after noise at 1 with init"):
        fewstep.flow_sample(flow, drawn(), init=drawn())
    with pytest.raises(ValueError, match="data_at must be 0 or 1, got 2"):
        fewstep.flow_sample(flow, drawn(), data_at=2)
    with pytest.raises(ValueError, match=r"times must increase within \[0, 1\]"):
        fewstep.flow_sample(flow, drawn(), data_at=1, times=[1.0, 0.0])
