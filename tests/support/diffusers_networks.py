"""Networks of diffusers, each small, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Sampled(nn.Module):
    """A model of diffusers: t goes from 0 to 1000, the result has a field."""

    def __init__(self, model: Any, *args: str, **inputs: Any) -> None:
        super().__init__()
        self.model, self.names, self.inputs = model, args, inputs

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        times = (t * 1000).long() if "whole" in self.names else t * 1000
        own = {
            k: v.to(x.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in self.inputs.items()
        }
        out: Tensor = self.model(x, timestep=times, **own).sample
        return out[:, : x.shape[1]]


def words(width: int) -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * width).view(2, 3, width).sin()


def unet2d(diffusers: Any) -> nn.Module:
    model = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return Sampled(model)


def conditioned(diffusers: Any, checkpointed: bool = False) -> nn.Module:
    model = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=4,
    )
    if checkpointed:
        model.enable_gradient_checkpointing()
    return Sampled(model, "whole", encoder_hidden_states=words(4))


def dit(diffusers: Any) -> nn.Module:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        norm_num_groups=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return Sampled(model, "whole", class_labels=torch.tensor([1, 2]))


def sd3(diffusers: Any) -> nn.Module:
    model = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=4,
        pos_embed_max_size=4,
    )
    inputs = {"encoder_hidden_states": words(8), "pooled_projections": words(4)[:, 0]}
    return Sampled(model, **inputs)


def pixart(diffusers: Any) -> nn.Module:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=2,
        num_layers=1,
        norm_num_groups=2,
        sample_size=4,
        patch_size=2,
        cross_attention_dim=8,
        caption_channels=4,
        use_additional_conditions=False,
    )
    added = {"resolution": None, "aspect_ratio": None}
    return Sampled(model, encoder_hidden_states=words(4), added_cond_kwargs=added)


class Flux(nn.Module):
    """Tokens of 4 channels, with positions."""

    def __init__(self, diffusers: Any) -> None:
        super().__init__()
        self.model = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=4,
            pooled_projection_dim=4,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=False,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        text = words(4).to(x.dtype)
        out: Tensor = self.model(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=text,
            pooled_projections=text[:, 0],
            txt_ids=torch.zeros(3, 3),
            img_ids=torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 1, 0]]),
            return_dict=False,
        )[0]
        return out


DIFFUSERS: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = {
    "UNet2DModel": (unet2d, (2, 1, 4, 4)),
    "UNet2DConditionModel": (conditioned, (2, 1, 4, 4)),
    "UNet2DConditionModel, checkpointed": (partial(conditioned, checkpointed=True), (2, 1, 4, 4)),
    "DiTTransformer2DModel": (dit, (2, 1, 4, 4)),
    "SD3Transformer2DModel": (sd3, (2, 1, 4, 4)),
    "PixArtTransformer2DModel": (pixart, (2, 1, 4, 4)),
    "FluxTransformer2DModel": (Flux, (2, 3, 4)),
}
ROUNDED = ("FluxTransformer2DModel",)  # rotates positions in float32, whatever it is in
