"""A continuous normalizing flow on torchdiffeq, and its log-density by fewstep.

Replaced: the import of `odeint` (one line), or the augmented field with its traces by autograd and
the call of `odeint` (some fifteen lines), by `fewstep.log_density` (one). The numbers are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

import fewstep
import fewstep.compat.torchdiffeq as ours


class Velocity(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d + 1, 64), nn.Tanh(), nn.Linear(64, d))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat((x, t.expand(len(x))[:, None]), 1))
        return out


class Augmented(nn.Module):
    """dx/dt and d log q / dt, the trace by a pass of autograd for each coordinate."""

    def __init__(self, velocity: nn.Module) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].requires_grad_()
            v = self.velocity(x, t)
            trace = torch.zeros(len(x), dtype=x.dtype)
            for i in range(x.shape[1]):
                trace = trace + torch.autograd.grad(v[:, i].sum(), x, create_graph=True)[0][:, i]
        return v, -trace


def log_prob(odeint: Any, velocity: nn.Module, x: Tensor, times: Tensor) -> Tensor:
    """The density at x of the flow from x to N(0, I)."""
    start = x, torch.zeros(len(x), dtype=x.dtype)
    z, change = odeint(Augmented(velocity), start, times, method="heun2")
    base = torch.distributions.Normal(0, 1).log_prob(z[-1]).sum(1)
    return base - change[-1]


def main() -> None:
    torch.manual_seed(0)
    velocity, x = Velocity(6).double(), torch.randn(64, 6, dtype=torch.float64)
    times = torch.linspace(0, 1, 21, dtype=torch.float64)
    before = log_prob(torchdiffeq.odeint, velocity, x.clone(), times)
    replaced = log_prob(ours.odeint, velocity, x.clone(), times)
    after = fewstep.log_density(velocity, x, times=times).log_prob
    for name, value in (("odeint", replaced), ("log_density", after)):
        error = (value - before).abs().max().item()
        print(f"{name}: mean {value.mean().item():.6f}, {error:.1e} from torchdiffeq's")
        assert error < 1e-10


if __name__ == "__main__":
    main()
