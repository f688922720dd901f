"""Velocity networks that between them use every function that duals know."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeMLP(nn.Module):
    """Linear layers and activations on `[x, t]`."""

    def __init__(
        self, d: int, width: int, hidden: int, activation: type[nn.Module] = nn.SiLU
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(d + 1, width), activation()]
        for _ in range(hidden - 1):
            layers += [nn.Linear(width, width), activation()]
        self.net = nn.Sequential(*layers, nn.Linear(width, d))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x, t.expand(x.shape[0])[:, None]], -1))
        return out


class Film(nn.Module):
    """Fourier features of t that scale and shift two hidden layers."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(d, width), nn.Linear(width, width), nn.Linear(width, d)
        self.embed = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 2 * width))
        self.register_buffer("frequencies", torch.randn(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        scale, shift = self.embed(torch.cat([angle.sin(), angle.cos()], -1)).chunk(2, -1)
        h = F.gelu(self.a(x)) * (1 + scale)
        out: Tensor = self.c(torch.tanh(self.b(h) + shift))
        return out


class Residual(nn.Module):
    """Residuals, norms, gated units, an embedding, products and means of features."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(d, width), nn.Linear(width, d)
        self.layer, self.rms = nn.LayerNorm(width), nn.RMSNorm(width)
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.embedding = nn.Embedding(10, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) + self.embedding((t * 9).long())
        g = h + F.glu(self.a(self.layer(h)), -1)
        g = g + F.softplus(self.b(self.rms(g)), 2.0)
        gate = torch.relu(g).mean(-1, keepdim=True)
        return (
            x - 0.3 * self.out(torch.sigmoid(g)) * gate / 2 + g.exp().sum(-1, keepdim=True) * 0.01
        )


class Convolutions(nn.Module):
    """Convolutions, a group norm, a norm with statistics, a shift of channels, pooling."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, channels, 1)
        self.group, self.batch = nn.GroupNorm(2, width), nn.BatchNorm2d(width).eval()
        self.time = nn.Linear(1, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.group(self.a(x)))
        h = F.gelu(self.b(h) + self.time(t[:, None])[:, :, None, None], approximate="tanh")
        low = F.interpolate(F.avg_pool2d(self.batch(h), 2), scale_factor=2)
        out: Tensor = self.c(torch.cat([h, low], 1)[:, : h.shape[1]] + low) + x
        return out


class Attention(nn.Module):
    """Tokens `[B, T, C]`, self-attention and a softmax gate."""

    def __init__(self, channels: int, width: int, causal: bool = False) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.causal = causal

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        batch, tokens, width = h.shape
        qkv = self.qkv(self.norm(h)).view(batch, tokens, 3, 2, width // 2)
        q, k, v = (m.squeeze(2).transpose(1, 2) for m in qkv.chunk(3, 2))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        a = a.transpose(1, 2).reshape(batch, tokens, width)
        out: Tensor = self.out(h + a * h.softmax(-1)) * (1 + t[:, None, None])
        return out


class Unknown(nn.Module):
    """A network with a function that duals do not know."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, d)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cumsum(torch.tanh(self.linear(x)), -1) * (1 + t[:, None])
