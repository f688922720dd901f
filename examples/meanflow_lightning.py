"""MeanFlow as a Lightning module, with `fewstep.methods.MeanFlow`.

Replaced: the body of `training_step`, some ten lines of times, noise, `torch.func.jvp` and weights,
by one call.
"""

from __future__ import annotations

import logging
import tempfile

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fewstep.methods import MeanFlow, meanflow_sample
from fewstep.networks import AverageVelocityMLP


class Trainee(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network: nn.Module = AverageVelocityMLP((2,), width=64, depth=2)
        self.loss = MeanFlow(power=0.0, std=1.6)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss, _ = self.loss(self.network, batch[0])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    points = torch.randn(4096, 2) * 0.3 + torch.tensor([1.0, -1.0])
    loader = DataLoader(TensorDataset(points), batch_size=256, shuffle=True)
    trainee = Trainee()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=4,
            accelerator="auto",
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(trainee, loader)
    samples = meanflow_sample(trainee.network, torch.randn(1000, 2))
    print(f"mean of the samples {samples.mean(0).tolist()}, of the data [1, -1]")


if __name__ == "__main__":
    main()
