"""MeanFlow under accelerate, with `fewstep.meanflow_target`.

Replaced: `torch.func.jvp` and the target made of it (four lines), by one call on the prepared
network. Run it by `accelerate launch` on several devices: gradients are reduced over them.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import fewstep
from fewstep.networks import AverageVelocityMLP


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    network = AverageVelocityMLP((2,), width=64, depth=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    points = torch.randn(4096, 2) * 0.3 + torch.tensor([1.0, -1.0])
    loader = DataLoader(TensorDataset(points), batch_size=256, shuffle=True)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    for epoch in range(4):
        for (data,) in loader:
            noise = torch.randn_like(data)
            r, t = torch.rand(2, len(data), device=data.device).sort(0).values
            x = (1 - t)[:, None] * data + t[:, None] * noise
            out = fewstep.meanflow_target(network, x, t, r, noise - data)
            loss = (out.value - out.target).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
