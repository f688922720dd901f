"""A gradient flow of points by the Sinkhorn divergence of geomloss, with fewstep's kernels.

What is replaced: one line, the import. Before it was `from geomloss import SamplesLoss`.
"""

from __future__ import annotations

import torch

from fewstep.compat.geomloss import SamplesLoss


def main() -> None:
    torch.manual_seed(0)
    angle = 6.2832 * torch.rand(500)
    target = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(500, 2)
    x = (0.1 * torch.randn(400, 2)).requires_grad_()
    loss = SamplesLoss("sinkhorn", p=2, blur=0.05, scaling=0.7)
    for step in range(20):
        value = loss(x, target)
        (grad,) = torch.autograd.grad(value, x)
        if step % 5 == 0:
            print(f"step {step:2d}: divergence {value.item():.5f}")
        with torch.no_grad():
            x -= 0.7 * len(x) * grad
    left = loss(x, target).item()
    print(f"at the end: divergence {left:.5f}")
    assert left < 0.01


if __name__ == "__main__":
    main()
