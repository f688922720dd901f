"""The random velocity of a seed, drawn step by step from tables of what networks do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tests.support.program_source import Program

SHAPES = ((1,), (2,), (3,), (4,), (6,), (2, 3), (3, 4), (4, 2), (1, 2, 2), (2, 2, 2), (2, 2, 4))
# "Rule": functions that duals know; "Other": some that they do not.
UNARY = {
    "Rule": """
        F.silu(h) | F.silu(input=h) | F.gelu(h) | F.gelu(h, approximate="tanh") | torch.tanh(h)
        h.tanh() | torch.sigmoid(h) | h.sigmoid() | F.relu(h) | torch.relu(h) | h.relu()
        F.softplus(h) | F.softplus(h, beta=2.0, threshold=5.0) | F.softplus(h, 2) | nn.SiLU()(h)
        torch.exp(-h) | (h / 2).exp() | torch.sin(h) | h.cos() | torch.square(h) | h.square() | -h
        torch.neg(h) | h.clone() | h.contiguous() | h.to(x.dtype) | h.type_as(x) | h.to(x)
        F.dropout(h, 0.5, False) | F.dropout(h, p=0.1, training=self.training) | h * h | h + h
        torch.add(h, h, alpha=0.5) | torch.sub(h, 1, alpha=2) | torch.add(input=h, other=0.5)
        torch.mul(input=h, other=0.5) | torch.div(h, 2.0) | torch.div(h, other=3) | h - h.sin()
        h.add(1) | h.sub(0.5) | h.mul(-1) | h.div(4) | h + 0.5 * h.cos() | h * torch.sigmoid(h)
    """,
    "Operator": """
        h ** 2 | h ** 3 | 2 ** h.tanh() | 1 / (1 + h * h) | 1 - h | 2 * h - 1 | 1e-3 + h | abs(h)
        h % 1.0 | +h | h * (h > 0) | h * (h >= 0.1) | (h < 0.2) * h
        torch.where(h == 0, h, 2 * h) | torch.where(h != 0, h, 2 * h) | h / (1 + abs(h))
        pow(h, 2) | h / (h * h + 1) | h * True | np.float64(0.5) * h | h * np.float32(0.5)
        h + np.int64(2) | h + h.detach() // 2 | h * torch.tensor(0.5) | torch.tensor(2) * h
        h + torch.tensor(True) | 3 - (h - 1) | h - torch.tensor(0.5, dtype=torch.float64)
        h * torch.tensor(0.5, dtype=torch.float32) | h * (~(h > 0)) | h + (h > 0)
        h * (h > 0).to(h.dtype) | (h > 0).float() * h | (h > 0) * h
    """,
    "Other": """
        F.elu(h) | F.leaky_relu(h, 0.1) | F.selu(h) | F.mish(h) | F.hardswish(h) | torch.erf(h)
        torch.log1p(h * h) | torch.sqrt(1 + h * h) | h.clamp(-1, 1) | h.clamp(min=0) | h.abs()
        torch.atan2(h, 1 + h * h) | torch.lerp(h, h.sin(), 0.3) | torch.cumsum(h, -1)
        h.sign() * h | torch.pow(h, 2) | h.pow(3) | torch.atan(h) | h.expm1()
        torch.rsqrt(1 + h * h) | h.trunc() + h | torch.where(h > 0, h, 0.1 * h)
        h.masked_fill(h > 1, 0.5) | torch.roll(h, 1, -1) | h.flip(-1)
        torch.logaddexp(h, h.sin()) | torch.maximum(h, h.sin())
        torch.addcmul(h, h, h.cos(), value=0.1) | torch.zeros_like(h) + h | torch.ones_like(h) * h
        torch.full_like(h, 0.5) * h | h.new_ones(()) * h | F.logsigmoid(h)
        F.threshold(h, 0.1, 0.0) | F.hardtanh(h) | F.prelu(h, h.new_full((1,), 0.2))
        torch.special.expit(h) | torch.nan_to_num(h) | F.softsign(h) | h.tan().tanh()
    """,
    "Row": """
        h - h.mean(-1, keepdim=True) | h - h.mean(dim=-1, keepdim=True)
        h * h.sum(-1, keepdim=True) | h * h.sum(axis=-1, keepdim=True)
        h - h.mean(-1, keepdims=True) | torch.mean(h, dim=-1, keepdim=True) + h
        h * torch.sum(h, -1, True) / 4 | h.softmax(-1) | torch.softmax(h, dim=-1)
        F.softmax(h, -1) * h | F.softmax(input=h, dim=-1) | torch.log_softmax(h, -1)
        h - torch.logsumexp(h, -1, keepdim=True) | h / (1 + h.norm(dim=-1, keepdim=True))
        h / h.square().mean(-1, keepdim=True).add(1).sqrt() | h - h.amax(-1, keepdim=True)
        torch.sort(h, -1)[0] | h.cumsum(dim=-1) | h * h.prod(-1, keepdim=True)
        h.sum(-1, True, dtype=h.dtype) + h | h[..., :1] * h | h[..., -1:] + h
        h.narrow(-1, 0, 1) * h | h * h.flatten(1).mean(1).reshape(-1, *[1] * (h.ndim - 1))
        h.unsqueeze(1).squeeze(1) * 2 | h.unsqueeze(-1).sum(-1) | h[:, None].mean(1)
        torch.stack([h, h.sin()], -1).sum(-1) | h.var(-1, keepdim=True) * 0 + h
        torch.cat([h, h.cos()], -1)[..., :h.shape[-1]] * 1.5
        torch.cat((h, h), dim=-1).chunk(2, dim=-1)[1]
        torch.concat([h.sin(), h], dim=-1).split(h.shape[-1], -1)[0]
        F.glu(torch.cat([h, h], -1), -1) | F.glu(torch.cat([h, h.sin()], -1))
        torch.cat([h, h], -1).split(split_size=h.shape[-1], dim=-1)[0] | h.expand_as(h)
        h.repeat(*[1] * h.ndim) | h.reshape(h.shape[0], -1).reshape(h.shape)
        h.flatten(1).view(h.shape) | h.view(size=h.shape) * 1 | h.reshape(shape=h.shape)
        torch.reshape(h, h.shape) | torch.flatten(h, 1).view_as(h) | h.view(-1).view(h.shape)
        h.transpose(0, 1).tanh().transpose(0, 1) | h.movedim(-1, 1).movedim(1, -1) * 0.5
        h.T.sin().T if h.ndim == 2 else h | h.index_select(-1, torch.arange(h.shape[-1]).flip(0))
        h[..., torch.arange(h.shape[-1])] | h[..., [0]] * h | h.gather(-1, h.argsort(-1))
        F.pad(h, (1, 1))[..., 1:-1] | torch.diff(h, dim=-1, prepend=h[..., :1])
        torch.einsum("b...,b...->b...", h, h.sin())
        (h.flatten(1) @ h.new_ones(h[0].numel(), h[0].numel())).view(h.shape) / 4
        torch.stack([row.tanh() for row in h]) | torch.stack(h.unbind(-1), -1)
        torch.vmap(lambda a: a * a.sum())(h) | torch.vmap(torch.sin)(h)
        torch.outer(h.flatten(), h.new_ones(1)).view(h.shape) | h.swapaxes(0, -1).swapaxes(-1, 0)
        torch.squeeze(h[..., None], -1) | h[..., None].squeeze() if 1 not in h.shape else h
        h.unflatten(-1, (1, -1)).flatten(-2) | h.permute(*range(h.ndim)) * 2
        torch.permute(h, dims=tuple(range(h.ndim)))
        h.permute(0, *reversed(range(1, h.ndim))).reshape(h.shape)
        torch.cdist(h.flatten(1)[..., None], h.flatten(1)[..., None] + 2).sum(2).view(h.shape)
    """,
    "Tensor": """
        3 * h if isinstance(h, torch.Tensor) else 5 * h | 3 * h if torch.is_tensor(h) else 5 * h
        2 * h if type(h) is torch.Tensor else -h | h * (2 if h.requires_grad or True else 3)
        h * h.shape[-1] | h * h.size(-1) / 2 | h / h.numel() * 3 | h * h.ndim | h * len(h) / 3
        h if torch.isfinite(h).all() else 0 * h | h if not (h != h).any() else -h
        h * 2 if h.is_floating_point() else h | h.detach() * h | h + h.detach()
        h.detach() + 0 * h | h.data * h | h - h.detach() + h.detach().round()
        h * float(h.dtype.itemsize) | Swish.apply(h) | Stair.apply(h) | Reversed.apply(h)
        Saved.apply(h) * 2 | scripted(h) | -h if hasattr(h, "nothing") else h.sin()
        checkpoint(F.silu, h, use_reentrant=False) | checkpoint(F.silu, h, use_reentrant=True)
        checkpoint(lambda a: a * a.cos(), h, use_reentrant=False)
        checkpoint(lambda a: F.elu(a) * 2, h, use_reentrant=True)
        checkpoint(torch.tanh, h, use_reentrant=False, preserve_rng_state=False)
        h * h.item() if h.numel() == 1 else h | h if h.device.type == "cpu" else -h
        h.to(device="cpu") | h.to(h.device, h.dtype) * 2
        h.to(memory_format=torch.channels_last) if h.ndim == 4 else h
        h.contiguous(memory_format=torch.contiguous_format) | h.cpu()
    """,
}
BINARY = """
    a + b | a - b | a * b | a + 0.1 * b | b.sigmoid() * a | torch.add(a, b, alpha=0.5)
    torch.sub(a, b, alpha=2) | torch.add(input=a, other=b) | torch.mul(a, other=b)
    a / (1 + b * b) | torch.where(b > 0, a, b) | a.lerp(b, 0.5) | torch.stack([a, b]).mean(0)
    torch.maximum(a, b) | torch.cat([a, b], 1).chunk(2, 1)[0] | a.addcmul(a, b)
    torch.cat([a, b], dim=-1)[..., 1:a.shape[-1] + 1] | sum([a, b])
    torch.addcdiv(a, b, 1 + b * b) | a.mul(b).add(a)
"""
NORMS = """
    F.layer_norm(h, (n,)) | F.layer_norm(h, [n], eps=1e-3) | F.rms_norm(h, (n,))
    F.rms_norm(h, (n,), eps=1e-2) | F.layer_norm(input=h, normalized_shape=h.shape[1:])
    F.group_norm(h, 1) | F.group_norm(h, num_groups=1, eps=1e-2) | F.normalize(h, dim=-1)
    h / (h.std(-1, keepdim=True) + 1)
"""
CHANGES = """
    a += c | a *= c | a -= c | a += 1 | a *= 0.5 | a /= 2 | a **= 2 | a.add_(c) | a.mul_(c)
    a.sub_(0.5) | a.relu_() | a.tanh_() | a.sigmoid_() | F.relu(a, inplace=True)
    F.silu(a, inplace=True) | nn.ReLU(inplace=True)(a) | torch.relu_(a) | F.elu(a, inplace=True)
    a.clamp_(-1, 1) | a[..., 0] = 0 | a[..., :1] = 0.5 | a[..., 0] += 1 | a[:, 0] = a[:, -1]
    a[..., :1] *= 2 | a[...] = a * 2 | a[a > 1] = 0 | a[:, :1].add_(1) | a.copy_(h.sin())
    a.masked_fill_(a > 0.5, 0.25) | a.square_() | a.exp_() | a.neg_()
    F.dropout(a, 0.5, False, inplace=True) | a.addcmul_(h, h) | a.view(-1).mul_(2)
    a.flatten()[:1] += 1 | a.transpose(0, 1).add_(0.5) | a.unsqueeze(0).mul_(2) | a.zero_()
"""


@dataclass
class _Writer:
    """Draws the steps of a program.

    `shape` is that of `h` without the batch; `named` are earlier values, with theirs.
    """

    rng: np.random.Generator
    batch: int
    shape: tuple[int, ...]
    time: str
    init: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    named: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def __call__(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def of(self, *values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def line(self, text: str) -> str:
        """One of the alternatives of a table."""
        return str(self.of(*re.split(r"\s+\|\s+|\n\s*", text.strip())))

    def name(self) -> str:
        return f"h{len(self.steps)}"

    def layer(self, made: str) -> str:
        self.init.append(f"self.l{len(self.init)} = {made}")
        return f"self.l{len(self.init) - 1}"

    def weight(self, *shape: int) -> str:
        return self.layer(f"nn.Parameter(torch.randn{shape} / {max(shape[0], 1)})")

    def constant(self, dtypes: Sequence[str] = ("x.dtype",)) -> str:
        """A plain tensor that broadcasts to h."""
        s = self.shape
        full = (self.batch, *s)
        choices: list[tuple[int, ...]] = [(), (1,), s[-1:], s, (1, *s), full]
        choices += [(self.batch, *[1] * len(s)), (1, s[0], *[1] * (len(s) - 1)), (*s[:-1], 1)]
        own = self.of(*choices)
        return f"const({own}, {self.of(*dtypes)}, {int(self.rng.integers(9))})"

    def term(self) -> str:
        """Of any dtype that h does not change by; mostly tensors."""
        if self(0.1):
            return str(self.of("0.5", "2", "-1.5", "True"))
        kinds = ("x.dtype", "x.dtype", "torch.int64", "torch.bool", "torch.float32")
        return self.constant(dtypes=kinds)

    def unary(self, h: str = "h") -> str:
        text = self.line(UNARY[self.of("Rule", "Rule", "Operator", "Other", "Row", "Tensor")])
        return _renamed(text, "h", h)

    def add(self, text: str) -> None:
        self.steps.append(text)
        if self(0.35):
            name = self.name()
            self.steps.append(f"{name} = h")
            self.named.append((name, self.shape))

    # Steps

    def a_unary(self) -> None:
        self.add(f"h = {self.unary()}")

    def a_rule(self) -> None:
        self.add(f"h = {self.line(UNARY['Rule'])}")

    def a_binary(self) -> None:
        own = [n for n, s in self.named if s == self.shape]
        other = self.of(*own) if own else self.unary()
        pair = ("h", f"({other})") if self(0.5) else (f"({other})", "h")
        self.add(f"h = {_renamed(self.line(BINARY), 'ab', *pair)}")

    def a_term(self) -> None:
        form = self.of(
            "h + c", "c + h", "h - c", "c - h", "h * c", "c * h", "h / (c + 3)", "torch.add(h, c)"
        )
        c = self.term()
        if "bool" in c or c == "True":
            masks = "h + c", "c * h", "h * c", "torch.where(c, h, -h)", "h.masked_fill(c, 0.0)"
            form = self.of(*masks) if c != "True" else "h * c"
        self.add(f"h = {_renamed(form, 'c', c)}")

    def a_term_then(self) -> None:
        """A term of any dtype right before an activation, a norm, a linear layer or a product."""
        kinds = ("torch.float64", "torch.float32", "torch.int64", "torch.bool", "x.dtype")
        c = self.of(self.constant(dtypes=kinds), "0.5", "1e-6", self.time)
        inner = self.of("h + c", "c + h", "2 * h + c", "h * c" if self(0.3) else "h + c")
        outer = self.of(
            "F.silu(h)", "torch.tanh(h)", "F.gelu(h)", "F.softplus(h)", "h.sigmoid()", "F.relu(h)"
        )
        if self(0.5) and math.prod(self.shape) > 3:
            outer = self.norm()
        self.add(f"h = {_renamed(outer, 'h', _renamed(inner, 'c', c))}.to(x.dtype)")

    def norm(self) -> str:
        """Over three values or more: of two it is a sign, nearly."""
        n = self.shape[-1]
        if n < 3:
            return "F.group_norm(h, 1)"
        text = self.line(NORMS)
        if self(0.3):
            layer = self.layer(self.of(f"nn.LayerNorm({n})", f"nn.RMSNorm({n})"))
            text = f"{layer}(h)"
        elif self(0.3) and self.shape[0] % 2 == 0 and math.prod(self.shape[1:]) > 2:
            text = f"{self.layer(f'nn.GroupNorm({self.of(1, 2)}, {self.shape[0]})')}(h)"
        return f"({_renamed(text, 'n', str(n))})"

    def a_norm(self) -> None:
        self.add(f"h = {self.norm()}" if math.prod(self.shape) > 3 else "h = h.tanh()")

    def a_time(self) -> None:
        form = self.of(
            "h + t", "h * t", "h * (1 + t)", "F.silu(h + t)", "torch.sin(t) * h", "t - h"
        )
        self.add(f"h = ({_renamed(form, 't', self.time)}).to(x.dtype)")

    def a_linear(self) -> None:
        n = self.shape[-1]
        m = self.of(n, n, 2, 3, 5)
        w = self.weight(n, m)
        text = self.of(
            f"{self.layer(f'nn.Linear({n}, {m}, bias={self(0.7)})')}(h)",
            *(f"h @ {w}", f"F.linear(h, {w}.T)", f"torch.matmul(h, {w})", f"h.matmul({w})"),
            f"torch.einsum('...i,ij->...j', h, {w})",
            f"F.linear(h, weight={w}.t(), bias={self.weight(m)})",
        )
        self.shape = (*self.shape[:-1], m)
        self.add(f"h = {text}")

    def a_gate(self) -> None:
        n = self.shape[-1]
        layer = self.layer(f"nn.Linear({n}, {2 * n})")
        split = self.of(
            "chunk(2, -1)",
            "chunk(2, dim=-1)",
            f"split({n}, -1)",
            f"split([{n}, {n}], dim=-1)",
            "tensor_split(2, -1)",
        )
        form = self.of("a * torch.sigmoid(b)", "h * (1 + a) + b", "F.silu(a) * b", "a + b.tanh()")
        self.add(f"a, b = {layer}(h).{split}\nh = {form}")

    def a_change(self) -> None:
        """In place, on a value that is used again or not, itself or by a view."""
        start = self.of("2 * h", "h + 0", "h.clone()", "h * 1", "h.sin()", "h", self.unary())
        change = _renamed(self.line(CHANGES), "c", self.constant())
        view = self.of(
            "a",
            "a",
            "a",
            "a.view(a.shape)",
            "a[:]",
            "a[..., :1]",
            "a.detach()",
            "a.reshape(a.shape)",
            "a.transpose(0, 1)",
            "a.contiguous()",
        )
        after = self.of(
            "h = a",
            "h = a + b",
            "h = a * 2",
            "h = a + h",
            "h = b.sum() * 0 + a",
            "h = F.silu(a) + a",
        )
        if start == "h" and self(0.7):
            start = "h * 1"
        if "+ b" in after and view not in ("a", "a.view(a.shape)", "a[:]", "a.detach()"):
            after = "h = a"
        self.add(f"a = {start}\nb = {view}\n{change}\n{after}")

    def a_block(self) -> None:
        inner = self.unary()
        self.add(
            self.of(
                f"with torch.no_grad():\n    s = {inner}\nh = h * s.tanh()",
                "with torch.no_grad():\n    s = h.mean(-1, keepdim=True)\nh = h - s",
                f"with torch.no_grad():\n    h = {inner}",
                f"with torch.enable_grad():\n    h = {inner}",
                f"with torch.autograd.set_grad_enabled(torch.is_grad_enabled()):\n    h = {inner}",
                "for i in range(3):\n    h = h + 0.1 * torch.tanh(h * i)",
                "h = torch.stack([p * i for i, p in enumerate(h.unbind(-1))], -1)",
                "h = sum(torch.sin(h * k) for k in (1, 2)) / 2",
                "if bool((h > -100).all()):\n    h = h * 1.5",
                "for k in (0.5, 2.0):\n    h = h + F.relu(h - k)",
                f"assert isinstance(h, torch.Tensor) and h.shape[0] == x.shape[0]\nh = {inner}",
                "with torch.enable_grad():\n    e = h.clone().requires_grad_(True)\n"
                "    h = torch.autograd.grad(e.sin().square().sum(), e, create_graph=True)[0]",
            )
        )

    def a_checkpoint(self) -> None:
        n, kind = self.shape[-1], self.of("True", "False", "False", "False")
        layer = self.layer(f"nn.Sequential(nn.Linear({n}, 3), nn.SiLU(), nn.Linear(3, {n}))")
        self.add(f"h = checkpoint({layer}, h, use_reentrant={kind})")

    def a_attention(self) -> None:
        tokens, n = self.shape
        heads = 2 if n % 2 == 0 else 1
        head = f"view(len(h), {tokens}, {heads}, {n // heads}).transpose(1, 2)"
        qkv = self.layer(f"nn.Linear({n}, {3 * n})")
        q = [f"{self.layer(f'nn.Linear({n}, {n})')}(h)" for _ in range(3)]
        whole = self.layer(f"nn.MultiheadAttention({n}, {heads}, batch_first=True)")
        own = f"q, k, v = {', '.join(q)}\n"
        fused = f"reshape(len(h), {tokens}, 3, {heads}, {n // heads}).permute(2, 0, 3, 1, 4)"
        mask = f", attn_mask=const(({tokens}, {tokens}), x.dtype, 3)"
        causal = self.of("", ", is_causal=True", ", dropout_p=0.0", mask)
        self.add(
            self.of(
                f"q, k, v = (m.{head} for m in {qkv}(h).chunk(3, -1))\n"
                f"h = F.scaled_dot_product_attention(q, k, v{causal})\n"
                "h = h.transpose(1, 2).flatten(2)",
                f"{own}h = (q @ k.transpose(-2, -1) / {n}**0.5).softmax(-1) @ v",
                f"{own}h = torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v)",
                f"h = h + {whole}(h, h, h, need_weights=False)[0]",
                f"q, k, v = {qkv}(h).{fused}.unbind(0)\n"
                "h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)",
                "h = torch.einsum('btc,bsc->bts', h, h).softmax(-1) @ h",
            )
        )

    def a_convolution(self) -> None:
        c, *rest = self.shape
        rank = len(rest)
        m = self.of(c, c, 2, 4)
        conv = self.layer(f"nn.Conv{rank}d({c}, {m}, 3, padding={self.of(1, repr('same'))})")
        if rank == 1 or self(0.6):
            self.shape = (m, *rest)
            self.add(f"h = {self.of(f'{conv}(h)', f'F.silu({conv}(h) + 0.5)')}")
            return
        pooled = all(n % 2 == 0 for n in rest)
        text = self.of(
            "h + F.interpolate(F.avg_pool2d(h, 2), scale_factor=2)",
            "F.pixel_shuffle(F.pixel_unshuffle(h, 2), 2) * 2",
            "F.interpolate(F.max_pool2d(h, kernel_size=2), scale_factor=2.0, mode='nearest')",
            "F.adaptive_avg_pool2d(h, 1) * h",
            f"{self.layer(f'nn.ConvTranspose2d({c}, {c}, 2, stride=2)')}(F.avg_pool2d(h, 2))",
        )
        self.add(f"h = {text if pooled else 'h.mean((2, 3), keepdim=True) * h'}")

    def step(self) -> None:
        kinds: list[Callable[[], None]] = [self.a_unary] * 4 + [self.a_rule] * 3
        kinds += [self.a_binary, self.a_linear, self.a_term, self.a_term_then, self.a_change] * 2
        kinds += [self.a_norm, self.a_time, self.a_gate, self.a_block, self.a_checkpoint]
        if len(self.shape) == 2:
            kinds += [self.a_attention] * 3 + [self.a_convolution]
        if len(self.shape) == 3:
            kinds += [self.a_convolution] * 4
        self.of(*kinds)()

    def result(self, shape: tuple[int, ...]) -> str:
        if self.shape == shape:
            return str(
                self.of("return h", "return h", "return h + x", "return x - h", "return h * 1")
            )
        flat = self.of("h.flatten(1)", "h.reshape(x.shape[0], -1)", "torch.flatten(h, 1)")
        layer = self.layer(f"nn.Linear({math.prod(self.shape)}, {math.prod(shape)})")
        back = self.of("view(x.shape)", "reshape(x.shape)", "view_as(x)", f"view(-1, *{shape})")
        return f"return {layer}({flat}).{back}"


def _renamed(text: str, names: str, *values: str) -> str:
    """`text` with its one-letter names replaced."""
    table = dict(zip(names, values, strict=True))
    pattern = rf"(?<![\w.'\"])([{names}])(?![\w'\"=])"
    compound = {k: v if re.fullmatch(r"[\w.]+(\(.*\))?", v) else f"({v})" for k, v in table.items()}
    return re.sub(pattern, lambda m: compound[m[1]], text)


def draw(seed: int) -> Program:
    """The program of a seed, the same on every machine."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    w = _Writer(rng, int(rng.choice([1, 3])), shape, "")
    axes = ", ".join(["None"] * len(shape))
    kind = w.of("number", "scalar", "rows", "rows", "steps", "other")
    dtype = w.of(torch.float32, torch.float64)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    eighths = torch.arange(1, w.batch + 1)
    t: Any = {
        "number": 0.25,
        "scalar": torch.tensor(0.375, dtype=dtype),
        "rows": (eighths / 8).to(dtype),
        "steps": eighths,
        "other": (eighths / 8).to(other),
    }[kind]
    w.time = "t" if kind == "scalar" else f"t[:, {axes}]"
    for _ in range(int(rng.integers(3, 13))):
        w.step()
    result = w.result(shape)
    options: dict[str, Any] = {}
    estimator = w.of("auto", "exact", "exact", "hutchinson", "hutchinson", "full")
    d = math.prod(shape)
    if estimator == "full":
        options |= {"estimator": "hutchinson", "probes": d, "probe": "hadamard"}
    elif estimator == "hutchinson":
        probe = w.of("rademacher", "hadamard", "gaussian", "sphere")
        options |= {"estimator": "hutchinson", "probes": min(w.of(1, 2, 3), d), "probe": probe}
        options["seed"] = int(rng.integers(1000))
    elif estimator == "exact" or w(0.5):
        options["estimator"] = estimator
    grad = w(0.65)
    return Program(
        *(tuple(w.init), tuple(w.steps), result, (w.batch, *shape), dtype, t, options),
        *(grad, w(0.5), w(0.5), w(0.2)),
    )
