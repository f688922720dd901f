"""A UNet of diffusers, sampled by `fewstep.edm_sample` and from within its own loop.

Replaced: the loop over `scheduler.timesteps` (five lines), by `denoiser` and `edm_sample` (two); or
the scheduler's class (one line), by `HeunScheduler`. All three make the same images.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HeunDiscreteScheduler, UNet2DModel
from torch import Tensor

import fewstep
from fewstep.compat.diffusers import HeunScheduler, denoiser


def loop(unet: UNet2DModel, scheduler: Any, noise: Tensor) -> Tensor:
    """What a pipeline does."""
    scheduler.set_timesteps(10)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = unet(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(out, t, x).prev_sample
    return x


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = HeunDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True)
    noise = torch.randn(4, 1, 8, 8)
    before = loop(unet, scheduler, noise)

    sigmas = torch.cat((scheduler.sigmas[:1], scheduler.sigmas[1::2]))  # each once
    after = fewstep.edm_sample(denoiser(unet, scheduler), noise, sigmas=sigmas)

    inside = loop(unet, HeunScheduler.from_config(scheduler.config), noise)

    for name, images in (("edm_sample", after), ("HeunScheduler", inside)):
        error = (images - before).norm() / before.norm()
        print(f"{name}: images of norm {images.norm():.3f}, {error:.1e} from those of diffusers")
        assert error < 1e-4


if __name__ == "__main__":
    main()
