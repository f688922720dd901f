"""A transformer on the patches of an image, in the form of the released W-Flow generators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep._checks import count
from fewstep.networks.body import ImageBody, RMSNorm
from fewstep.networks.mlp import like

_EPS, _BASE, _STD = 1e-6, 10_000.0, 0.02


class ImageTransformer(ImageBody):
    """A transformer on patches, conditioned by scales, shifts and gates of its layers.

    With tokens h `[B, T, width]`, a condition c and `(a, b, g) = linear(silu(c))` of each layer,

        h = h + g1 attention(rms_norm(h) (1 + a1) + b1)
        h = h + g2 W3 (silu(W1 z) * W2 z),   z = rms_norm(h) (1 + a2) + b2
        patches = W4 (rms_norm(h) (1 + a3) + b3)

    Queries and keys are RMS-normalised over the dimensions of a head and then turned by angles of
    the patch's row and column (RoPE): the first half of a head by the row, the other by the column,
    at frequencies `10000^(-k / (d / 4))`. Sines and cosines of row and column are added to the
    tokens as well. Register tokens are `linear(c)` plus a vector of each. They take part in
    attention, are not turned, and are dropped at the end. Linear layers in z have `8 / 3 width`
    units, rounded up to a multiple of 32.

    All a, b and g start at 0, so the layers do nothing at first.

    Source: arXiv 2602.04770, Appendix A.2, and arXiv 2605.11755, in the form of their released
    code: `width`, `depth`, `heads` of B/2 are 768, 12, 12 and of L/2 1024, 24, 16, with 16
    registers. It follows LightningDiT, arXiv 2501.01423.

    Args:
        image_shape (tuple): shape `(C, H, W)` of an image or latent.
        patch (int): width of a patch, a divisor of H and W.
        width (int): dimension of a token and of the condition, a multiple of 4.
        depth (int): number of layers.
        heads (int): number of heads. `width / heads` must be a multiple of 4.
        registers (int): number of register tokens.

    Raises:
        ValueError: a size is out of range, or patch or heads do not divide.

    >>> import torch
    >>> from fewstep.networks import ImageTransformer
    >>> body = ImageTransformer((4, 8, 8), width=32, depth=2, heads=2)
    >>> body(torch.randn(5, 4, 8, 8), torch.randn(5, 32)).shape
    torch.Size([5, 4, 8, 8])
    """

    embedding_std = _STD
    positions: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        registers: int = 16,
    ) -> None:
        who = type(self).__name__
        registers = count(who, "registers", registers, 0)
        super().__init__(image_shape, patch=patch, width=width, extra=registers)
        depth, heads = count(who, "depth", depth), count(who, "heads", heads)
        if self.width % (4 * heads):
            raise ValueError(
                f"{who}: width / heads must be a multiple of 4, got {self.width} and {heads}"
            )
        values = self.image_shape[0] * self.patch**2
        self.registers = nn.Parameter(torch.randn(registers, self.width) * _STD)
        self.to_registers = nn.Linear(self.width, self.width) if registers else None
        self.first = nn.Linear(values, self.width)
        self.layers = nn.ModuleList(_Layer(self.width, heads) for _ in range(depth))
        self.norm = RMSNorm(self.width, eps=_EPS)
        self.modulation = nn.Linear(self.width, 2 * self.width)
        self.last = nn.Linear(self.width, values)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for modulated in (self, *self.layers):
            nn.init.zeros_(modulated.modulation.weight)

        h, w = self.grid
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).double()
        angles = _angles(place, self.width // 4)
        positions = torch.cat([angles.sin(), angles.cos()], 2).flatten(1)
        turned = _angles(place, self.width // heads // 4).flatten(1)
        turned = torch.cat([turned.new_zeros(registers, turned.shape[1]), turned])
        for name, table in (("positions", positions), ("cos", turned.cos()), ("sin", turned.sin())):
            self.register_buffer(name, table.float(), persistent=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` and a condition `[B, width]` to `[B, C, H, W]`."""
        active = F.silu(condition)
        tokens = self.first(self.patches(x).flatten(4).flatten(1, 3).transpose(1, 2))
        tokens = tokens + self.positions  # under autocast the sum is float32, and stays so
        count = len(self.registers)
        if self.to_registers is not None:
            own = self.to_registers(condition)[:, None] + self.registers
            tokens = torch.cat([own, tokens], 1)
        turn = like(self.cos, tokens), like(self.sin, tokens)
        for layer in self.layers:
            tokens = layer(tokens, active, *turn)
        a, b = self.modulation(active)[:, None].chunk(2, 2)
        values = self.last(self.norm(tokens[:, count:]) * (1 + a) + b)
        p = self.patch
        return self.images(values.transpose(1, 2).reshape(len(x), -1, p, p, *self.grid))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        hidden = -(-(8 * width // 3) // 32) * 32
        self.norm1, self.norm2 = (RMSNorm(width, eps=_EPS) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (RMSNorm(width // heads, eps=_EPS) for _ in range(2))
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, tokens: Tensor, active: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map tokens `[B, T, width]`, silu of the condition and tables `[T, d / 2]` to tokens."""
        a1, b1, g1, a2, b2, g2 = self.modulation(active)[:, None].chunk(6, 2)
        tokens = tokens + g1 * self.attention(self.norm1(tokens) * (1 + a1) + b1, cos, sin)
        gate, value = self.up(self.norm2(tokens) * (1 + a2) + b2).chunk(2, 2)
        out: Tensor = tokens + g2 * self.down(F.silu(gate) * value)
        return out

    def attention(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, width = tokens.shape
        qkv = self.qkv(tokens).reshape(b, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, T, d]
        q, k = _turned(self.q_norm(q), cos, sin), _turned(self.k_norm(k), cos, sin)
        heads = F.scaled_dot_product_attention(like(q, v), like(k, v), v)
        out: Tensor = self.out(heads.transpose(1, 2).reshape(b, t, width))
        return out


def _angles(place: Tensor, frequencies: int) -> Tensor:
    """Angles `[T, 2, frequencies]` of rows and columns `[T, 2]`."""
    powers = torch.arange(frequencies, dtype=torch.float64, device=place.device) / frequencies
    return place[:, :, None] * torch.exp(-math.log(_BASE) * powers)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of x `[..., T, d]`, value k with value k + d / 2, turned by angles `[T, d / 2]`."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
