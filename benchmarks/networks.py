"""Small networks `u(x, t, r)` in the shapes that few-step models have, for the jvp family."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Of t and of t - r: sines and cosines of 32 frequencies from 1 to 30, then an MLP each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.logspace(0, 1.5, 32))
        self.t, self.span = (
            nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(2)
        )

    def forward(self, t: Tensor, r: Tensor) -> Tensor:
        angles = [z[:, None] * self.frequencies for z in (t, t - r)]
        a, b = (torch.cat([z.sin(), z.cos()], 1) for z in angles)
        out: Tensor = self.t(a) + self.span(b)
        return out


class MLP(nn.Module):
    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.embed = Embedding(width)
        self.first, self.last = nn.Linear(d, width), nn.Linear(width, d)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        h = F.silu(self.first(x) + self.embed(t, r))
        for layer in self.hidden:
            h = F.silu(layer(h))
        out: Tensor = self.last(h)
        return out


class ResBlock(nn.Module):
    """GroupNorm, SiLU and a convolution, twice; scale and shift by the embedding in between."""

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.embed = nn.Linear(width, 2 * outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.embed(c)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        out: Tensor = self.skip(x) + self.conv2(F.silu(h))
        return out


class Attention(nn.Module):
    """Of tokens `[B, N, C]` in heads of 32 or fewer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(h)
        return out


class UNet(nn.Module):
    """Two resolutions, with attention at the lower one where asked for."""

    def __init__(self, channels: int, base: int, attention: bool) -> None:
        super().__init__()
        width = 2 * base
        self.embed = Embedding(width)
        self.first = nn.Conv2d(channels, base, 3, padding=1)
        self.down = nn.Conv2d(base, width, 3, 2, 1)
        shapes = ((base, base), (width, width), (width, width), (width + base, base))
        self.blocks = nn.ModuleList(ResBlock(i, o, width) for i, o in shapes)
        self.attention = Attention(width) if attention else None
        self.norm, self.last = nn.GroupNorm(8, base), nn.Conv2d(base, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        c = self.embed(t, r)
        skip = self.blocks[0](self.first(x), c)
        h = self.blocks[1](self.down(skip), c)
        if self.attention is not None:
            tokens = h.flatten(2).transpose(1, 2)
            h = h + self.attention(tokens).transpose(1, 2).unflatten(2, h.shape[2:])
        h = F.interpolate(self.blocks[2](h, c), scale_factor=2)
        h = self.blocks[3](torch.cat([h, skip], 1), c)
        out: Tensor = self.last(F.silu(self.norm(h)))
        return out


class DiTBlock(nn.Module):
    """Attention and an MLP, each after a LayerNorm that the embedding scales and shifts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention = Attention(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        a1, b1, g1, a2, b2, g2 = self.modulation(c)[:, None].chunk(6, 2)
        h = h + g1 * self.attention(self.norm1(h) * (1 + a1) + b1)
        out: Tensor = h + g2 * self.mlp(self.norm2(h) * (1 + a2) + b2)
        return out


class DiT(nn.Module):
    """Patches of 2 x 2 pixels, four blocks."""

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        self.embed = Embedding(width)
        self.first = nn.Conv2d(channels, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // 2) ** 2, width))
        self.blocks = nn.ModuleList(DiTBlock(width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 4 * channels)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        c, side = self.embed(t, r), x.shape[2] // 2
        h = self.first(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            h = block(h, c)
        h = self.last(self.norm(h)).transpose(1, 2).unflatten(2, (side, side))
        return F.pixel_shuffle(h, 2)


def network(kind: str, state: tuple[int, ...], small: bool = False) -> nn.Module:
    """Of the seed's weights, for states `[B, ...]`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mlp":
            return MLP(state[1], 32 if small else 512)
        if kind == "dit":
            return DiT(state[1], state[2], 32 if small else 192)
        return UNet(state[1], 16 if small else 32, kind == "unet-attention")
