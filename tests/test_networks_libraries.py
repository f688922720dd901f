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
from support.diffusers_networks import DIFFUSERS, ROUNDED
from support.networks import ROW, WAYS, Of, assert_right, call, linear, normed, of, options_of


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
