"""Networks as they are met, each kind small: layers, attention, convolutions, graphs, energies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from support.functions import Rounded, Sine
from support.networks import (
    IMAGE,
    ROW,
    TOKENS,
    WAYS,
    Of,
    assert_right,
    inner,
    linear,
    normed,
    of,
    stack,
)
from support.vit import ViT

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


class LoRA(nn.Module):
    """Low-rank adapters as PEFT's: the input goes to the adapter's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 6)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        low = x.to(self.a.weight.dtype)
        return self.base(x) + self.b(self.a(low)) * 0.5  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Convolutions with group norms and a scale and shift from t."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, channels), nn.GroupNorm(2, width)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1)
        self.time = nn.Linear(4, 2 * width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * torch.tensor([1.0, 3.0], dtype=x.dtype)
        scale, shift = self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, :, None, None].chunk(
            2, 1
        )
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))  # type: ignore[no-any-return]


def attention(x: Tensor, t: Tensor, qkv: nn.Module, out: nn.Module, **options: Any) -> Tensor:
    B, T, C = x.shape
    q, k, v = (m.view(B, T, 2, C // 2).transpose(1, 2) for m in qkv(x).chunk(3, -1))
    return out(F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def by_hand(x: Tensor, t: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
    q, k, v = qkv(x).chunk(3, dim=-1)
    return out(torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1) @ v)  # type: ignore[no-any-return]


def seq_first(x: Tensor, t: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
    h = x.transpose(0, 1)
    q, k, v = (m.transpose(0, 1) for m in qkv(h).chunk(3, -1))
    h = (q @ k.mT).softmax(-1) @ v
    return out(h.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


def biased(x: Tensor, t: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
    q, k, v = qkv(x).chunk(3, dim=-1)
    far = torch.cdist(x, x + 1)
    return out(torch.softmax(q @ k.mT - far, -1) @ v)  # type: ignore[no-any-return]


def egnn(x: Tensor, t: Tensor, phi: nn.Module) -> Tensor:
    """Points that move along their differences, less their mean."""
    d = x[:, :, None] - x[:, None]
    w = phi(d.square().sum(-1, keepdim=True)).tanh()
    v = (d * w).sum(2)
    return v - v.mean(1, keepdim=True)


def messages(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
    graph = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=x.dtype)
    return F.silu(a(graph @ x)) + x


def sparse_messages(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
    source, target = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 2, 1])
    sent = a(x.index_select(1, source))
    return torch.zeros_like(x).index_add(1, target, sent).tanh() + x


def recurrent(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for i in range(x.shape[1]):
        h = torch.tanh(a(torch.cat([h, x[:, i]], -1)))
        out.append(h[:, None])
    return torch.cat(out, 1)


def energy(x: Tensor, t: Tensor, net: nn.Module) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        return -torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]


def experts(x: Tensor, t: Tensor, gate: nn.Module, a: nn.Module, b: nn.Module) -> Tensor:
    w = gate(x).softmax(-1)
    return w[:, :1] * a(x).tanh() + w[:, 1:] * F.silu(b(x))  # type: ignore[no-any-return]


def hyper(x: Tensor, t: Tensor, net: nn.Module) -> Tensor:
    """Weights that depend on t and x."""
    w = net(torch.cat([x, t[:, None]], 1)).view(-1, 4, 4)
    return torch.bmm(x[:, None], w)[:, 0].tanh()


def squeeze_excite(x: Tensor, t: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return x * torch.sigmoid(b(F.relu(a(x.mean((2, 3))))))[:, :, None, None]


def windows(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
    B, C, H, W = x.shape
    h = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, C)
    h = (h @ h.transpose(1, 2)).softmax(-1) @ a(h)
    return h.view(B, H // 2, W // 2, 2, 2, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)


def last_hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4))
    net[1].register_forward_hook(lambda m, i, o: o * 2)
    net[0].register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    return net


def conv(x: Tensor, t: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = F.silu(layer(x))
    return x * (1 + t.view(-1, *[1] * (x.ndim - 1)))


QKV = linear(4, 12), linear(4, 4)
BLOCKS: dict[str, Case] = {
    "MLP with t": (
        of(
            lambda x, t, a, b: b(F.silu(a(torch.cat([x, t[:, None]], -1)))),
            *(linear(5, 8), linear(8, 4)),
        ),
        ROW,
    ),
    "three hidden layers": (inner(nn.SiLU, linear(6, 5), nn.Tanh, linear(5, 6), nn.GELU), ROW),
    "sinusoids of t": (
        of(
            lambda x, t, a, b: a(x) * b(torch.cat([(t[:, None] * 3).sin(), t[:, None].cos()], 1)),
            *(linear(4, 4), linear(2, 4)),
        ),
        ROW,
    ),
    "LayerNorm": (inner(partial(nn.LayerNorm, 6), nn.SiLU), ROW),
    "RMSNorm": (inner(partial(nn.RMSNorm, 6), nn.SiLU), ROW),
    "GroupNorm": (inner(partial(nn.GroupNorm, 2, 6), nn.SiLU), ROW),
    "BatchNorm in evaluation": (inner(partial(nn.BatchNorm1d, 6), nn.SiLU), ROW),
    "Dropout in evaluation": (inner(nn.SiLU, partial(nn.Dropout, 0.3)), ROW),
    "FiLM": (
        of(
            lambda x, t, a, b, c: b(torch.addcmul(*c(t[:, None]).chunk(2, 1), F.silu(a(x)))),
            *(linear(4, 6), linear(6, 4), linear(1, 12)),
        ),
        ROW,
    ),
    "adaLN": (
        of(
            lambda x, t, a, n, c: x + F.gelu(n(a(x)) * (1 + c(t[:, None])[:, :4])),
            *(linear(4, 4), partial(nn.LayerNorm, 4, elementwise_affine=False), linear(1, 8)),
        ),
        ROW,
    ),
    "GLU": (stack(linear(4, 12), nn.GLU, linear(6, 4)), ROW),
    "SwiGLU": (
        of(lambda x, t, a, b, c: c(F.silu(a(x)) * b(x)), linear(4, 6), linear(4, 6), linear(6, 4)),
        ROW,
    ),
    "experts": (of(experts, linear(4, 2), linear(4, 4), linear(4, 4)), ROW),
    "class embedding": (
        of(
            lambda x, t, a, e: a(x) + e(torch.arange(len(x)) % 3),
            *(linear(4, 4), partial(nn.Embedding, 3, 4)),
        ),
        ROW,
    ),
    "hypernetwork": (of(hyper, linear(5, 16)), ROW),
    "LoRA": (inner(nn.SiLU, LoRA), ROW),
    "forward hooks": (last_hooked, ROW),
    "weight_norm": (normed(parametrizations.weight_norm), ROW),
    "orthogonal": (normed(parametrizations.orthogonal), ROW),
    "spectral_norm": (normed(parametrizations.spectral_norm), ROW),
    "old spectral_norm": (normed(spectral_norm), ROW),
    "Bilinear": (of(lambda x, t, a: a(x, x.sin()), partial(nn.Bilinear, 4, 4, 4)), ROW),
    "GRUCell": (of(lambda x, t, a: a(x, x.sin()), partial(nn.GRUCell, 4, 4)), ROW),
    "Function": (of(lambda x, t, a, b: b(Sine.apply(a(x))), linear(4, 6), linear(6, 4)), ROW),
    "straight-through Function": (
        of(lambda x, t, a, b: b(Rounded.apply(a(x))), linear(4, 6), linear(6, 4)),
        ROW,
    ),
    "energy": (of(energy, stack(linear(4, 6), nn.Tanh, linear(6, 1))), ROW),
    "DataParallel": (lambda: nn.DataParallel(Of(conv, nn.Linear(4, 6), nn.Linear(6, 4))), ROW),
    "two-dimensional product": (of(lambda x, t, w: torch.mm(x, w).tanh(), torch.eye(4) * 0.5), ROW),
    "matvec": (
        of(lambda x, t, w: torch.stack([torch.mv(w, r).tanh() for r in x]), torch.eye(4) * 0.5),
        ROW,
    ),
    "Fourier features of x": (
        of(lambda x, t, a: a(torch.cat([(2 * x).sin(), (2 * x).cos()], -1)), linear(8, 4)),
        ROW,
    ),
    "SDPA": (of(attention, *QKV), TOKENS),
    "causal SDPA": (of(partial(attention, is_causal=True), *QKV), TOKENS),
    "masked SDPA": (of(partial(attention, attn_mask=torch.ones(3, 3).tril() > 0), *QKV), TOKENS),
    "attention by hand": (of(by_hand, *QKV), TOKENS),
    "attention, sequence first": (of(seq_first, *QKV), TOKENS),
    "attention with distances": (of(biased, *QKV), TOKENS),
    "latent queries": (
        of(
            lambda x, t, k, o, q: o(((q @ k(x).mT).softmax(-1) @ x).mean(1, keepdim=True) + x),
            *(linear(4, 4), linear(4, 4), torch.ones(2, 4) * 0.3),
        ),
        TOKENS,
    ),
    "DeepSet": (
        of(lambda x, t, a, b: b(F.silu(a(x)).sum(1, keepdim=True) + x), linear(4, 4), linear(4, 4)),
        TOKENS,
    ),
    "EGNN": (of(egnn, linear(1, 1)), TOKENS),
    "message passing": (of(messages, linear(4, 4)), TOKENS),
    "sparse message passing": (of(sparse_messages, linear(4, 4)), TOKENS),
    "recurrence": (of(recurrent, linear(8, 4)), TOKENS),
    "MultiheadAttention": (
        of(lambda x, t, a: a(x, x, x)[0], partial(nn.MultiheadAttention, 4, 2, batch_first=True)),
        TOKENS,
    ),
    "MultiheadAttention, sequence first": (
        of(
            lambda x, t, a: a(*(x.transpose(0, 1),) * 3, need_weights=False)[0].transpose(0, 1),
            partial(nn.MultiheadAttention, 4, 2),
        ),
        TOKENS,
    ),
    "TransformerEncoderLayer": (
        of(
            lambda x, t, a: a(x),
            partial(nn.TransformerEncoderLayer, 4, 2, 6, dropout=0.1, batch_first=True),
        ),
        TOKENS,
    ),
    "TransformerEncoder": (
        of(
            lambda x, t, a: a(x),
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(
                    4, 2, 6, activation="gelu", batch_first=True, norm_first=True
                ),
                *(2, nn.LayerNorm(4)),
                enable_nested_tensor=False,
            ),
        ),
        TOKENS,
    ),
    "TransformerDecoderLayer": (
        of(
            lambda x, t, a: a(x, x.flip(1)),
            partial(nn.TransformerDecoderLayer, 4, 2, 6, batch_first=True),
        ),
        TOKENS,
    ),
    "LSTM": (of(lambda x, t, a: a(x)[0], partial(nn.LSTM, 4, 4, batch_first=True)), TOKENS),
    "GRU": (of(lambda x, t, a: a(x)[0], partial(nn.GRU, 4, 4, batch_first=True)), TOKENS),
    "Conv1d": (
        of(conv, partial(nn.Conv1d, 3, 4, 3, padding=1), partial(nn.Conv1d, 4, 3, 1)),
        (2, 3, 5),
    ),
    "ConvTranspose1d": (
        of(conv, partial(nn.Conv1d, 2, 3, 2, 2), partial(nn.ConvTranspose1d, 3, 2, 2, 2)),
        (2, 2, 4),
    ),
    "Conv2d": (
        of(conv, partial(nn.Conv2d, 2, 4, 3, padding="same"), partial(nn.Conv2d, 4, 2, 1)),
        IMAGE,
    ),
    "grouped, dilated Conv2d": (
        of(
            conv,
            partial(nn.Conv2d, 2, 4, 3, padding=2, dilation=2, groups=2),
            partial(nn.Conv2d, 4, 2, 1),
        ),
        IMAGE,
    ),
    "ConvTranspose2d": (
        of(conv, partial(nn.Conv2d, 2, 3, 2, 2), partial(nn.ConvTranspose2d, 3, 2, 2, 2)),
        IMAGE,
    ),
    "Conv3d": (
        of(conv, partial(nn.Conv3d, 1, 2, 3, padding=1), partial(nn.Conv3d, 2, 1, 1)),
        (2, 1, 2, 2, 2),
    ),
    "ConvTranspose3d": (
        of(conv, partial(nn.Conv3d, 1, 2, 2, 2), partial(nn.ConvTranspose3d, 2, 1, 2, 2)),
        (2, 1, 2, 2, 2),
    ),
    "circular padding": (
        of(conv, partial(nn.Conv2d, 2, 2, 3, padding=1, padding_mode="circular")),
        IMAGE,
    ),
    "reflect padding": (
        of(conv, partial(nn.Conv2d, 2, 2, 3, padding=1, padding_mode="reflect")),
        IMAGE,
    ),
    "channels last": (
        of(
            lambda x, t, a: F.silu(a(x.to(memory_format=torch.channels_last))),
            partial(nn.Conv2d, 2, 2, 3, padding=1),
        ),
        IMAGE,
    ),
    "Upsample nearest": (
        of(conv, partial(nn.AvgPool2d, 2), partial(nn.Upsample, scale_factor=2)),
        IMAGE,
    ),
    "Upsample bilinear": (
        of(conv, partial(nn.AvgPool2d, 2), partial(nn.Upsample, scale_factor=2, mode="bilinear")),
        IMAGE,
    ),
    "Upsample bicubic": (
        of(conv, partial(nn.AvgPool2d, 2), partial(nn.Upsample, scale_factor=2, mode="bicubic")),
        IMAGE,
    ),
    "PixelShuffle": (of(conv, partial(nn.PixelUnshuffle, 2), partial(nn.PixelShuffle, 2)), IMAGE),
    "MaxPool2d": (of(conv, partial(nn.MaxPool2d, 2), partial(nn.Upsample, scale_factor=2)), IMAGE),
    "AdaptiveAvgPool2d": (
        of(lambda x, t, a: a(x) * x.sin(), partial(nn.AdaptiveAvgPool2d, 1)),
        IMAGE,
    ),
    "InstanceNorm2d": (of(conv, partial(nn.InstanceNorm2d, 2, affine=True)), IMAGE),
    "BatchNorm2d in evaluation": (of(conv, partial(nn.BatchNorm2d, 2)), IMAGE),
    "Dropout2d in evaluation": (of(conv, partial(nn.Dropout2d, 0.5)), IMAGE),
    "squeeze and excite": (of(squeeze_excite, linear(2, 3), linear(3, 2)), IMAGE),
    "windows": (of(windows, linear(2, 2)), IMAGE),
    "residual convolutions": (partial(Residual, 2, 4), IMAGE),
    "ViT": (ViT, IMAGE),
}
UNTRAINED = ("attention with distances",)  # torch has no second derivative of it


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BLOCKS)
def test_networks(name: str, way: str) -> None:
    assert_right(*BLOCKS[name], way, name not in UNTRAINED)
