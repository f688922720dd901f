"""MeanFlow in a bare training loop, with `fewstep.meanflow_target`.

Replaced: `torch.func.jvp` and the target made of it (four lines), by one call, with the same loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fewstep
from fewstep.networks import AverageVelocityMLP


def batch(n: int) -> tuple[Tensor, ...]:
    """Points of the path from data at 0 to noise at 1, times r <= t, and velocities."""
    data, noise = torch.randn(n, 2) * 0.3 + torch.tensor([1.0, -1.0]), torch.randn(n, 2)
    times = torch.rand(2, n).sort(0).values
    r, t = times[0], times[1]
    x = (1 - t)[:, None] * data + t[:, None] * noise
    return x, t, r, noise - data


def before(u: nn.Module, x: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
    ones, zeros = torch.ones_like(t), torch.zeros_like(t)
    value, slope = torch.func.jvp(u, (x, t, r), (v, ones, zeros))
    target = (v - (t - r)[:, None] * slope).detach()
    return (value - target).square().mean()


def after(u: nn.Module, x: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
    out = fewstep.meanflow_target(u, x, t, r, v)
    return (out.value - out.target).square().mean()


def main() -> None:
    torch.manual_seed(0)
    network = AverageVelocityMLP((2,), width=64, depth=2)
    points = batch(64)
    print(f"loss before {before(network, *points):.6f}, after {after(network, *points):.6f}")
    torch.testing.assert_close(after(network, *points), before(network, *points))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(100):
        loss = after(network, *batch(256))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.4f}")
    noise, ones = torch.randn(1000, 2), torch.ones(1000)
    with torch.no_grad():
        samples = noise - network(noise, ones, 0 * ones)  # in one step
    print(f"mean of the samples {samples.mean(0).tolist()}, of the data [1, -1]")


if __name__ == "__main__":
    main()
