"""Networks of diffusers and einops, and those that torch's own tools rewrite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm

import fewstep
from support import rows
from support.networks import ROW, WAYS, Of, assert_right, call, linear, normed, of, options_of


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name: str, way: str) -> None:
    with rows.quiet():
        diffusers = pytest.importorskip("diffusers")
        make, shape = DIFFUSERS[name]
        dtype = torch.float32 if name in ROUNDED else torch.float64
        own = call(partial(make, diffusers), shape, options=options_of(way, shape), dtype=dtype)
        assert rows.wrong(own) == []


@pytest.mark.parametrize("way", WAYS)
def test_einops(way: str) -> None:
    einops = pytest.importorskip("einops")
    layers = pytest.importorskip("einops.layers.torch")

    def body(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
        h = einops.rearrange(a(x), "b (h w) -> b h w", h=2)
        h = h * einops.reduce(h, "b h w -> b h 1", "mean") + einops.repeat(
            t, "b -> b h w", h=2, w=2
        )
        h = einops.einsum(h, h, "b h w, b h v -> b w v")
        return layers.Rearrange("b w v -> b (v w)")(h)  # type: ignore[no-any-return]

    assert_right(of(body, linear(4, 4)), ROW, way)


def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def gated(own: Callable[[Tensor], Tensor] = gate) -> nn.Module:
    return Of(lambda x, t, a, b: b(own(a(x))), nn.Linear(4, 6), nn.Linear(6, 4))


class Timed(nn.Module):
    """For tools that want two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.b(F.silu(self.a(x))) * (1 + t[:, None])
        return out


def inputs(net: nn.Module) -> tuple[Tensor, Tensor]:
    dtype = next(net.parameters()).dtype
    return torch.zeros(ROW, dtype=dtype), torch.zeros(ROW[:1], dtype=dtype)


class Late(nn.Module):
    """Made when it is first called, and so in the dtype that it has by then."""

    def __init__(self, net: nn.Module, wrap: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.net, self.wrap = net, wrap
        self.made: dict[str, Any] = {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if not self.made:
            self.made["net"] = self.wrap(self.net)
        out: Tensor = self.made["net"](x, t)
        return out


TOOLS: dict[str, Callable[[], nn.Module]] = {
    "scripted function": lambda: gated(torch.jit.script(gate)),
    "scripted module": lambda: torch.jit.script(Timed()),
    "traced module": lambda: Late(Timed(), lambda m: torch.jit.trace(m, inputs(m))),
    "exported module": lambda: Late(Timed(), lambda m: torch.export.export(m, inputs(m)).module()),
    "symbolic trace": lambda: torch.fx.symbolic_trace(Timed()),
    "compiled module": lambda: torch.compile(Timed(), backend="eager"),  # type: ignore[dict-item]
    "compiled in place": lambda: compiled_in_place(Timed()),
    "compiled submodule": lambda: compiled_submodule(Timed()),
    "deep copy": lambda: copy.deepcopy(Timed()),
    "old weight_norm": normed(weight_norm),
    "frozen": lambda: Timed().requires_grad_(False),
}
PLAIN = {
    "scripted function": gated,
    "old weight_norm": TOOLS["old weight_norm"],
    "frozen": TOOLS["frozen"],
}


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def compiled_submodule(net: Timed) -> nn.Module:
    net.a = torch.compile(net.a, backend="eager")  # type: ignore[assignment]
    return net


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TOOLS)
def test_tools(name: str, way: str) -> None:
    torch.compiler.reset()
    with rows.quiet():
        plain = PLAIN.get(name, Timed)
        own = call(TOOLS[name], ROW, plain, options=options_of(way, ROW))
        assert rows.wrong(own) == []


def test_quantised() -> None:
    """Linear layers of 8 bits: piecewise constant, so that the trace is 0, or it is refused."""
    net = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)).eval()
    with rows.quiet():
        low = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
        x = torch.randn(3, 4)
        try:
            out = fewstep.divergence(low, x, 0.0, estimator="exact")
        except (ValueError, RuntimeError):
            return
        torch.testing.assert_close(out.velocity, low(x))
        assert torch.equal(out.value, torch.zeros(3))
