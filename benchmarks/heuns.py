"""Contenders of the heun family: EDM's sampler around one small network, and what others do.

A builder `HeunProblem -> Run` makes the network, untimed. Outputs are the samples, flat; of "plain"
those of as many evaluations of the network alone. All have the same raw network F and EDM's
preconditioning, sigma_data 1/2. `Run.more` has the time over that of the network alone, both in one
process and in turn: between processes a virtual machine's speed differs more than samplers do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.registry import HeunProblem
from benchmarks.timing import Beside, Run

Network = Callable[[Tensor, Tensor], Tensor]
_DATA = 0.5
_SEED = 0


class MLP(nn.Module):
    """Three hidden layers of SiLU on `[x, c]`."""

    def __init__(self, d: int, width: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(d + 1, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU()),
            nn.Linear(width, d),
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x, c[:, None]], 1))
        return out


class ConvNet(nn.Module):
    """Four convolutions of 32 channels, SiLU between them; c is a channel."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(channels + 1, width, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.SiLU()),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        plane = c[:, None, None, None].expand(-1, 1, *x.shape[2:])
        out: Tensor = self.net(torch.cat([x, plane], 1))
        return out


def network(problem: HeunProblem) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        shape = problem.case.state
        net: nn.Module = ConvNet(shape[1]) if len(shape) == 4 else MLP(shape[1])
    return net.to(device=problem.device, dtype=torch.as_tensor(problem.x).dtype)


def preconditioned(net: Network) -> Network:
    """EDM's denoiser `D(x, sigma)`, sigma a scalar or `[B]`, as its users write it."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        total = sigma**2 + _DATA**2
        noise = (sigma.flatten().log() / 4).expand(x.shape[0])
        out = net(x / total.sqrt(), noise)
        return _DATA**2 / total * x + sigma * _DATA / total.sqrt() * out

    return denoiser


def karras(problem: HeunProblem) -> Tensor:
    steps = problem.case.steps
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    levels = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return torch.cat((levels, levels.new_zeros(1))).to(problem.device)


def latents(problem: HeunProblem) -> Tensor:
    return torch.as_tensor(problem.x).to(problem.device)


def plain(problem: HeunProblem) -> Run:
    """The network's evaluations alone, on a few inputs in turn as a sampler's are new."""
    net, x = network(problem), latents(problem)
    inputs = [x.roll(i, 0).clone() for i in range(4)]
    c = x.new_full((x.shape[0],), math.log(0.5) / 4)

    @torch.no_grad()
    def run() -> tuple[Tensor]:
        for i in range(2 * problem.case.steps - 1):
            out = net(inputs[i % 4], c)
        return (out.flatten(),)

    return run


def fewstep_sampler(problem: HeunProblem, backend: str) -> Run:
    import fewstep

    net, x = network(problem), latents(problem)
    steps = problem.case.steps

    def run() -> tuple[Tensor]:
        out = fewstep.edm_sample(net, x, steps=steps, precondition=_DATA, backend=backend)
        return (out.flatten(),)

    return run


def edm_step(
    denoiser: Network, x: Tensor, now: Tensor, after: Tensor, last: bool, dtype: torch.dtype
) -> Tensor:
    """One deterministic step, the state in float64 and the network in dtype."""
    d = (x - denoiser(x.to(dtype), now).to(x.dtype)) / now
    following = x + (after - now) * d
    if last:
        return following
    d2 = (following - denoiser(following.to(dtype), after).to(x.dtype)) / after
    return x + (after - now) * (d + d2) / 2


def edm(problem: HeunProblem, *, compiled: bool = False) -> Run:
    """EDM's own sampler; compiled, a step with its network is one graph."""
    denoiser, x, sigmas = preconditioned(network(problem)), latents(problem), karras(problem)
    step: Callable[..., Tensor] = torch.compile(edm_step) if compiled else edm_step

    @torch.no_grad()
    def run() -> tuple[Tensor]:
        y = x.double() * sigmas[0]
        for i in range(len(sigmas) - 1):
            y = step(denoiser, y, sigmas[i], sigmas[i + 1], i == len(sigmas) - 2, x.dtype)
        return (y.to(x.dtype).flatten(),)

    return run


def k_diffusion(problem: HeunProblem) -> Run:
    """Its `sample_heun` without churn: state in the network's dtype, sigmas as tensors `[B]`."""
    denoiser, x = preconditioned(network(problem)), latents(problem)
    sigmas = karras(problem).to(x.dtype)
    ones = x.new_ones([x.shape[0]])

    def derivative(y: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
        return (y - denoised) / sigma[(...,) + (None,) * y.ndim]

    @torch.no_grad()
    def run() -> tuple[Tensor]:
        y = x * sigmas[0]
        for i in range(len(sigmas) - 1):
            d = derivative(y, sigmas[i], denoiser(y, sigmas[i] * ones)).reshape(y.shape)
            dt = sigmas[i + 1] - sigmas[i]
            if sigmas[i + 1] == 0:
                y = y + d * dt
            else:
                y2 = y + d * dt
                d2 = derivative(y2, sigmas[i + 1], denoiser(y2, sigmas[i + 1] * ones))
                y = y + (d + d2.reshape(y.shape)) / 2 * dt
        return (y.flatten(),)

    return run


def diffusers(problem: HeunProblem) -> Run:
    from diffusers import HeunDiscreteScheduler

    denoiser, x = preconditioned(network(problem)), latents(problem)
    levels = karras(problem).to(x.dtype)
    doubled = torch.cat((levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]))
    scheduler = HeunDiscreteScheduler(prediction_type="sample")

    @torch.no_grad()
    def run() -> tuple[Tensor]:
        scheduler.set_timesteps(problem.case.steps)
        scheduler.sigmas = doubled.cpu()
        scheduler.set_begin_index(0)
        y = x * levels[0]
        for i in range(len(doubled) - 1):
            y = scheduler.step(denoiser(y, doubled[i]), scheduler.timesteps[i], y).prev_sample
        return (y.flatten(),)

    return run


def torchdiffeq(problem: HeunProblem) -> Run:
    """Its heun2 on the grid of levels above 0, then the last step to 0."""
    from torchdiffeq import odeint

    denoiser, x = preconditioned(network(problem)), latents(problem)
    levels = karras(problem).to(x.dtype)

    def derivative(sigma: Tensor, y: Tensor) -> Tensor:
        return (y - denoiser(y, sigma)) / sigma

    @torch.no_grad()
    def run() -> tuple[Tensor]:
        y = odeint(derivative, x * levels[0], levels[:-1], method="heun2")[-1]
        return (denoiser(y, levels[-2]).flatten(),)

    return run


_SAMPLERS: dict[str, Callable[[HeunProblem], Run]] = {
    "eager": edm,
    "compile": functools.partial(edm, compiled=True),
    "k-diffusion": k_diffusion,
    "diffusers": diffusers,
    "torchdiffeq": torchdiffeq,
    **{
        backend: functools.partial(fewstep_sampler, backend=backend)
        for backend in ("cpp", "cuda", "triton", "reference")
    },
}
BUILDERS: dict[tuple[str, str], Callable[[HeunProblem], Any]] = {
    ("edm", "plain"): plain,
    **{
        ("edm", who): functools.partial(Beside, build=build, alone=plain)
        for who, build in _SAMPLERS.items()
    },
}
DEFINITIONS: dict[str, Callable[[HeunProblem], Any]] = {"edm": edm, "plain-edm": plain}
