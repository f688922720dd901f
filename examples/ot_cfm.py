"""OT-CFM: a flow trained on pairs of noise and data that are drawn from their transport plan.

What is replaced in a trainer that uses torchcfm: one line, the import of `OTPlanSampler`. Before it
was `from torchcfm.optimal_transport import OTPlanSampler`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.compat.torchcfm import OTPlanSampler


def data(count: int) -> Tensor:
    """Eight Gaussians on a circle."""
    angle = torch.randint(8, (count,)) * (torch.pi / 4)
    return 3 * torch.stack([angle.cos(), angle.sin()], 1) + 0.2 * torch.randn(count, 2)


def main() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    sampler = OTPlanSampler("sinkhorn", reg=1.0)
    for step in range(200):
        x0, x1 = sampler.sample_plan(torch.randn(128, 2), data(128))
        t = torch.rand(128, 1)
        velocity = net(torch.cat([t * x1 + (1 - t) * x0, t], 1))
        loss = (velocity - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    x, steps = torch.randn(500, 2), 10
    with torch.no_grad():
        for k in range(steps):
            x = x + net(torch.cat([x, torch.full((500, 1), k / steps)], 1)) / steps
    radius = x.norm(dim=1).median().item()
    print(f"the median radius of samples is {radius:.2f}, that of the data 3")
    assert 2 < radius < 4


if __name__ == "__main__":
    main()
