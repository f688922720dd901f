"""A ViT written as timm's is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.networks import DropPath


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """As timm's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.ls1, self.ls2, self.drop = LayerScale(width), LayerScale(width), DropPath(0.1)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def attend(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.ls1(self.attend(self.norm1(x))))
        return x + self.drop(self.ls2(self.fc2(F.gelu(self.fc1(self.norm2(x))))))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Patches by a convolution, a class token, positions, blocks, and patches put together."""

    def __init__(self, channels: int = 2, size: int = 4, patch: int = 2, width: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 2))
        self.norm, self.time = nn.LayerNorm(width), nn.Linear(1, width)
        self.head = nn.Linear(width, channels * patch * patch)
        self.grid, self.patch = size // patch, patch

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.patch_embed(x).flatten(2).transpose(1, 2)
        h = torch.cat((self.cls_token.expand(B, -1, -1), h), dim=1) + self.pos_embed
        h = self.norm(self.blocks(h + self.time(t[:, None])[:, None]))[:, 1:]
        h = self.head(h).reshape(B, self.grid, self.grid, C, self.patch, self.patch)
        return torch.einsum("bhwcpq->bchpwq", h).reshape(B, C, H, W)
