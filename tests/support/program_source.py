"""A random velocity as Python source, what its source may name, and the call that it makes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.support import rows
from tests.support.functions import Reversed, Saved, Stair, Swish
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PREAMBLE = """
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from collections.abc import Sequence
"""


def const(shape: Sequence[int], dtype: torch.dtype, k: int) -> Tensor:
    """Eighths, which every dtype has."""
    n = torch.arange(torch.Size(shape).numel())
    v = (n * (2 * k + 1) + k) % 17 - 8
    out = v > 0 if dtype == torch.bool else v % 3 if dtype == torch.int64 else v / 8
    return out.to(dtype).view(tuple(shape))


def gated(a: Tensor) -> Tensor:
    return a * torch.sigmoid(a)


with rows.quiet():
    scripted = torch.jit.script(gated)


def recomputed(f: Callable[..., Any], *args: Any, use_reentrant: bool, **_: Any) -> Any:
    """A checkpoint that autograd.grad takes; a reentrant one of constants has no gradient."""
    live = not use_reentrant or any(a.requires_grad for a in args)
    with torch.set_grad_enabled(torch.is_grad_enabled() and live):
        return f(*args)


def space(plain: bool) -> dict[str, Any]:
    """What a program's source may name."""
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "np": np,
        "const": const,
        "scripted": gated if plain else scripted,
        "Swish": Swish,
        "Saved": Saved,
        "Stair": Stair,
        "Reversed": Reversed,
        "checkpoint": recomputed if plain else checkpoint,
    }


@dataclass(frozen=True)
class Program:
    """A velocity as source, and how its divergence is asked for."""

    init: tuple[str, ...]
    steps: tuple[str, ...]
    result: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    t: Any
    options: dict[str, Any]
    grad: bool
    x_grad: bool
    module: bool
    frozen: bool

    @property
    def source(self) -> str:
        body = ["h = x", *(line for step in self.steps for line in step.split("\n")), self.result]
        text = "\n".join(body)
        used = (line for line in self.init if re.search(rf"{line.split(' ')[0]}\b", text))
        init = ["super().__init__()", *used]
        return "\n".join(
            [
                "class Net(nn.Module):",
                "    def __init__(self):",
                *(f"        {line}" for line in init),
                "    def forward(self, x, t):",
                *(f"        {line}" for line in body),
            ]
        )

    def describe(self) -> str:
        """As it could be run."""
        t = repr(self.t) if not isinstance(self.t, Tensor) else f"torch.{self.t!r}"
        options = "".join(f", {k}={v!r}" for k, v in self.options.items())
        return (
            f"{self.source}\n# x {self.shape} {self.dtype}, t={t}{options}, grad={self.grad},"
            f" x_grad={self.x_grad}, module={self.module}, frozen={self.frozen}"
        )

    def build(self, plain: bool = False) -> Callable[[torch.dtype], rows.Built]:
        code = compile(self.source, "<program>", "exec")

        def make(dtype: torch.dtype) -> rows.Built:
            names = space(plain)
            exec(code, names)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(self.source))
                net = names["Net"]().to(dtype).eval()
            parameters = list(net.parameters())
            if self.frozen:
                for p in parameters[::2]:
                    p.requires_grad_(False)
            return (net if self.module else lambda x, t: net(x, t)), parameters

        return make

    def call(self) -> rows.Call:
        generator = torch.Generator().manual_seed(len(self.source))
        x = torch.randn(self.shape, generator=generator).to(self.dtype)
        r = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return rows.Call(
            *(self.build(), x, self.t, self.build(plain=True), self.options),
            *(self.grad, self.x_grad, r),
        )
