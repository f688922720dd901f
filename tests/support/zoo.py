"""Networks of (x, t) as their authors wrote them, each small."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.networks import ImageBody, ImageConvNet, ImageField, ImageTransformer
from support.networks import IMAGE, TOKENS, of


def sinusoids(t: Tensor, width: int) -> Tensor:
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2, dtype=t.dtype) / (width // 2))
    angle = t[:, None] * rates[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Legacy(nn.Module):
    """Attention of guided diffusion, heads in the batch; `late` splits heads after q, k and v."""

    def __init__(self, channels: int, heads: int, late: bool) -> None:
        super().__init__()
        self.norm, self.heads, self.late = nn.GroupNorm(2, channels), heads, late
        self.qkv, self.proj = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        bs, width, length = qkv.shape
        ch = width // (3 * self.heads)
        if self.late:
            q, k, v = (z.reshape(bs * self.heads, ch, length) for z in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(bs * self.heads, ch * 3, length).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        w = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        w = torch.softmax(w.to(torch.promote_types(w.dtype, torch.float32)), dim=-1).type(w.dtype)
        a = torch.einsum("bts,bcs->bct", w, v)
        return (x + self.proj(a.reshape(bs, -1, length))).reshape(b, c, *spatial)


class Guided(nn.Module):
    """A residual block of guided diffusion."""

    def __init__(self, channels: int, width: int, out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(2, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * out))
        self.last = nn.Sequential(
            *(nn.GroupNorm(2, out), nn.SiLU(), nn.Dropout(0.1)),
            nn.Conv2d(out, out, 3, padding=1),
        )
        self.skip = nn.Conv2d(channels, out, 1) if out != channels else nn.Identity()
        self.scale = scale

    def sized(self, h: Tensor) -> Tensor:
        if self.scale == 2:
            return F.interpolate(h, scale_factor=2, mode="nearest")
        return F.avg_pool2d(h, 2, 2) if self.scale == 0.5 else h

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.first[-1](self.sized(self.first[:-1](x)))
        x, own = self.sized(x), self.time(e).type(h.dtype)
        while len(own.shape) < len(h.shape):
            own = own[..., None]
        scale, shift = torch.chunk(own, 2, dim=1)
        return self.skip(x) + self.last[1:](self.last[0](h) * (1 + scale) + shift)  # type: ignore[no-any-return]


class GuidedUNet(nn.Module):
    def __init__(self, late: bool) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.high, self.down = Guided(4, 16, 4), Guided(4, 16, 4, 0.5)
        self.middle, self.attend = Guided(4, 16, 4), Legacy(4, 2, late)
        self.up, self.out = Guided(4, 16, 4, 2), Guided(8, 16, 4)
        self.last = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = self.time(sinusoids(1000 * t, 8))
        high = self.high(self.first(x), e)
        h = self.up(self.middle(self.attend(self.down(high, e)), e), e)
        return self.last(self.out(torch.cat([h, high], dim=1), e))  # type: ignore[no-any-return]


def normalized(x: Tensor, dim: Any = None, eps: float = 1e-4) -> Tensor:
    """EDM2's."""
    dim = list(range(1, x.ndim)) if dim is None else dim
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=x.dtype)
    norm = torch.add(eps, norm, alpha=np.sqrt(norm.numel() / x.numel()))
    return x / norm.to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.3) -> Tensor:
    return a.lerp(b, t) / np.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    n, m = a.shape[1], b.shape[1]
    c = np.sqrt((n + m) / 0.5)
    return torch.cat([c / np.sqrt(n) * 0.5 * a, c / np.sqrt(m) * 0.5 * b], dim=1)


class MPConv(nn.Module):
    def __init__(self, i: int, o: int, kernel: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i, *kernel))

    def forward(self, x: Tensor, gain: Any = 1) -> Tensor:
        w = normalized(self.weight)
        w = (w * (gain / np.sqrt(w[0].numel()))).to(x.dtype)
        if w.ndim == 2:
            return x @ w.t()
        return F.conv2d(x, w, padding=(w.shape[-1] // 2,))


class MPBlock(nn.Module):
    def __init__(self, i: int, o: int, encodes: bool, mode: str = "", heads: int = 0) -> None:
        super().__init__()
        self.encodes, self.mode, self.heads = encodes, mode, heads
        self.gain = nn.Parameter(torch.ones([]) * 0.3)
        self.a, self.b = MPConv(o if encodes else i, o, [3, 3]), MPConv(o, o, [3, 3])
        self.time, self.skip = MPConv(16, o, []), MPConv(i, o, [1, 1])
        self.qkv, self.proj = MPConv(o, 3 * o, [1, 1]), MPConv(o, o, [1, 1])

    def resampled(self, x: Tensor) -> Tensor:
        f = torch.full((x.shape[1], 1, 2, 2), 0.25, dtype=x.dtype)
        if self.mode == "down":
            return F.conv2d(x, f, groups=x.shape[1], stride=2)
        return F.conv_transpose2d(x, f * 4, groups=x.shape[1], stride=2) if self.mode else x

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = self.resampled(x)
        if self.encodes:
            x = normalized(self.skip(x), dim=1)
        c = self.time(e, gain=self.gain) + 1
        y = self.b(mp_silu(self.a(mp_silu(x)) * c.unsqueeze(2).unsqueeze(3)))
        x = mp_sum(x if self.encodes else self.skip(x), y)
        if self.heads:
            y = self.qkv(x)
            y = y.reshape(y.shape[0], self.heads, -1, 3, y.shape[2] * y.shape[3])
            q, k, v = normalized(y, dim=2).unbind(3)
            w = torch.einsum("nhcq,nhck->nhqk", q, k / np.sqrt(q.shape[2])).softmax(dim=3)
            y = torch.einsum("nhqk,nhck->nhcq", w, v)
            x = mp_sum(x, self.proj(y.reshape(*x.shape)))
        return x.clip_(-256, 256)


class EDM2(nn.Module):
    """In EDM's preconditioning, with sigma = t + 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", 2 * np.pi * torch.randn(8))
        self.register_buffer("phases", 2 * np.pi * torch.rand(8))
        self.embed, self.first = MPConv(8, 16, []), MPConv(3, 4, [3, 3])
        self.high, self.down = MPBlock(4, 4, True), MPBlock(4, 8, True, "down", 2)
        self.up, self.out = MPBlock(8, 8, False, "up"), MPBlock(12, 4, False, heads=2)
        self.last, self.gain = MPConv(4, 2, [3, 3]), nn.Parameter(torch.ones([]) * 0.7)

    def net(self, x: Tensor, noise: Tensor) -> Tensor:
        e = mp_silu(
            self.embed((noise.ger(self.rates) + self.phases).cos() * np.sqrt(2))  # type: ignore[arg-type]
        )
        high = self.high(self.first(torch.cat([x, torch.ones_like(x[:, :1])], dim=1)), e)
        h = self.out(mp_cat(self.up(self.down(high, e), e), high), e)
        return self.last(h, gain=self.gain)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = (t + 0.1).reshape(-1, 1, 1, 1)
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        c_in, c_noise = 1 / (0.25 + sigma**2).sqrt(), sigma.log() / 4
        return c_skip * x + c_out * self.net(c_in * x, c_noise.flatten())


class RMSNorm(nn.Module):
    """By hand, as in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


def rotated(z: Tensor, kind: str) -> Tensor:
    """z `[B, T, H, D]` by its positions."""
    pairs = z.shape[-1] // 2
    places = torch.arange(z.shape[1], dtype=z.dtype)
    angle = places[:, None] * torch.exp(-torch.arange(pairs, dtype=z.dtype))
    if kind == "complex":
        c = torch.polar(torch.ones_like(angle), angle)[None, :, None]
        return torch.view_as_real(
            torch.view_as_complex(z.reshape(*z.shape[:-1], -1, 2)) * c
        ).flatten(3)
    if kind == "halves":
        a, b = z.chunk(2, -1)
        angle, other = torch.cat([angle, angle], -1), torch.cat((-b, a), -1)
    else:
        a, b = z.reshape(*z.shape[:-1], -1, 2).unbind(-1)
        angle, other = angle.repeat_interleave(2, -1), torch.stack([-b, a], dim=-1).flatten(3)
    angle = angle[None, :, None]
    return z * angle.cos() + other * angle.sin()


class Rotary(nn.Module):
    def __init__(self, kind: str, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 4)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.heads, self.kind = heads, kind

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        b, n, c = h.shape
        q, k, v = self.qkv(h).view(b, n, 3, self.heads, c // self.heads).unbind(2)
        q, k = rotated(self.q_norm(q), self.kind), rotated(self.k_norm(k), self.kind)
        a = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))
        h = h + self.out(a.transpose(1, 2).reshape(b, n, c))
        return self.last(h) * (1 + t[:, None, None])  # type: ignore[no-any-return]


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj, self.heads = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            heads,
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        m = [z.unsqueeze(1) for z in self.modulation(c).chunk(6, dim=1)]
        b, n, w = x.shape
        qkv = self.qkv(self.norm1(x) * (1 + m[1]) + m[0])
        q, k, v = qkv.reshape(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w)
        x = x + m[2] * self.proj(a)
        return x + m[5] * self.mlp(self.norm2(x) * (1 + m[4]) + m[3])  # type: ignore[no-any-return]


class DiT(nn.Module):
    """As its authors': guidance within, on samples twice."""

    def __init__(self, width: int = 8, guided: bool = False) -> None:
        super().__init__()
        self.patches, self.guided = nn.Conv2d(2, width, 2, 2), guided
        self.register_buffer("places", torch.randn(1, 4, width))
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(5, width)
        self.blocks = nn.ModuleList([DiTBlock(width, 2) for _ in range(2)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.last = nn.Linear(width, 8)

    def net(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places
        c = self.time(sinusoids(1000 * t, 8)) + self.labels(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        h = self.last(self.norm(h) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        h = h.reshape(shape=(h.shape[0], 2, 2, 2, 2, 2))
        h = torch.einsum("nhwpqc->nchpwq", h)
        return h.reshape(shape=(h.shape[0], 2, 4, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = torch.arange(x.shape[0]) % 4
        if not self.guided:
            return self.net(x, t, y)
        out = self.net(torch.cat([x, x], 0), torch.cat([t, t]), torch.cat([y, y * 0 + 4]))
        given, free = torch.split(out, len(out) // 2, dim=0)
        return free + 1.5 * (given - free)


class ScoreNet(nn.Module):
    """With random Fourier features of t and the deviation of a VE process at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", 2 * torch.randn(4))
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.ConvTranspose2d(8, 2, 3, padding=1)
        self.time, self.norm = nn.Linear(8, 8), nn.GroupNorm(4, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.rates[None, :] * 2 * np.pi
        e = torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)
        h = self.a(x) + self.time(e * torch.sigmoid(e))[..., None, None]
        h = self.norm(h)
        deviation = torch.sqrt((25.0 ** (2 * t) - 0.9) / 2 / np.log(25.0))
        return self.b(h * torch.sigmoid(h)) / deviation[:, None, None, None]  # type: ignore[no-any-return]


class EGNN(nn.Module):
    """Messages along edges by index, added up at the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU())
        self.weight = nn.Linear(8, 1, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        batch, n, _ = x.shape
        row, column = torch.tensor([(i, j) for i in range(n) for j in range(n) if i != j]).T
        h = t[:, None, None].expand(batch, n, 1)
        step = x[:, row] - x[:, column]
        square = (step**2).sum(-1, keepdim=True)
        step = step / (torch.sqrt(square + 1e-8) + 1)
        sent = step * self.weight(self.edge(torch.cat([square, h[:, row]], -1)))
        out = torch.zeros_like(x).index_add(1, row, sent)
        return x + out - out.mean(1, keepdim=True)


def attention(batch_first: bool, **options: Any) -> Callable[[], nn.Module]:
    def body(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
        h = x * (1 + t[:, None, None])
        h = h if batch_first else h.transpose(0, 1)
        out: Tensor = a(h, h, h, **options)[0]
        return out if batch_first else out.transpose(0, 1)

    return of(body, partial(nn.MultiheadAttention, 4, 2, batch_first=batch_first))


def encoder(batch_first: bool, norm_first: bool) -> Callable[[], nn.Module]:
    def body(x: Tensor, t: Tensor, a: nn.Module) -> Tensor:
        h = x * (1 + t[:, None, None])
        return a(h) if batch_first else a(h.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            *(4, 2, 6), batch_first=batch_first, norm_first=norm_first
        )
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return of(body, make)


def of_images(body: Callable[[], ImageBody]) -> Callable[[], nn.Module]:
    """A velocity, whose weights have all left 0."""

    def make() -> nn.Module:
        field = ImageField(body())
        for parameter in field.parameters():
            nn.init.normal_(parameter, std=0.3)
        return field

    return make


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "guided diffusion": (partial(GuidedUNet, False), IMAGE),
    "guided diffusion, heads late": (partial(GuidedUNet, True), IMAGE),
    "EDM2": (EDM2, IMAGE),
    **{
        f"rotary, {kind}": (partial(Rotary, kind), TOKENS) for kind in ("complex", "halves", "even")
    },
    "DiT": (DiT, IMAGE),
    "DiT, guided": (partial(DiT, guided=True), IMAGE),
    "score": (ScoreNet, IMAGE),
    "EGNN": (EGNN, TOKENS),
    "ImageTransformer": (
        of_images(partial(ImageTransformer, IMAGE[1:], width=16, depth=2, heads=2, registers=1)),
        IMAGE,
    ),
    "ImageConvNet": (of_images(partial(ImageConvNet, IMAGE[1:], channels=8, depth=2)), IMAGE),
    "attention": (attention(True), TOKENS),
    "attention without weights": (attention(True, need_weights=False), TOKENS),
    "attention, sequence first": (attention(False), TOKENS),
    "attention, masked": (attention(False, attn_mask=torch.ones(3, 3).triu(1) > 0), TOKENS),
    **{
        f"encoder, {'batch' if b else 'sequence'} first, norm {'first' if n else 'last'}": (
            encoder(b, n),
            TOKENS,
        )
        for b in (True, False)
        for n in (True, False)
    },
}
