"""Networks of images of any size: values, conditions, noise, names, and use in every method."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.methods import LinesMatching, MarginalReflow, MeanFlow, WFlow
from fewstep.networks import (
    EDMPrecond,
    ImageBody,
    ImageConvNet,
    ImageField,
    ImageGenerator,
    ImageTransformer,
    average_velocity,
    generator,
    image_body,
    in_batches,
    velocity,
)
from support import rows
from support.jvp import F64, Problem
from tolerances import assert_contract

# Of torch.func.jvp, when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
SHAPE = (2, 4, 8)
BODIES: dict[str, Callable[..., ImageBody]] = {
    "transformer": partial(ImageTransformer, width=16, depth=2, heads=2, registers=3),
    "convolutions": partial(ImageConvNet, channels=8, depth=2),
}


def filled(net: nn.Module, std: float = 0.3) -> nn.Module:
    """Weights that have all left 0."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std)
    return net


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest) -> ImageBody:
    made: ImageBody = BODIES[request.param](SHAPE)
    return made


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def by_formula(body: ImageTransformer, x: Tensor, condition: Tensor) -> Tensor:
    """The docstring's equations, a patch and a head at a time."""
    p, (rows_, columns), width = body.patch, body.grid, body.width
    place = [(i, j) for i in range(rows_) for j in range(columns)]

    def angles(i: int, j: int, count: int) -> Tensor:
        powers = 10_000 ** -(torch.arange(count, dtype=F64) / count)
        return torch.cat([i * powers, j * powers])

    def table(i: int, j: int) -> Tensor:
        turns = angles(i, j, width // 4).view(2, -1)
        return torch.cat([turns.sin(), turns.cos()], 1).flatten()

    cut = [x[:, :, i * p : i * p + p, j * p : j * p + p].flatten(1) for i, j in place]
    tokens = [body.first(part) + table(*at) for part, at in zip(cut, place, strict=True)]
    assert body.to_registers is not None
    own = [body.to_registers(condition) + vector for vector in body.registers]
    h = torch.stack([*own, *tokens], 1)
    active = nn.functional.silu(condition)
    for layer in body.layers:
        a1, b1, g1, a2, b2, g2 = (m[:, None] for m in layer.modulation(active).split(width, 1))
        z = rms(h, layer.norm1.weight) * (1 + a1) + b1
        q, k, v = layer.qkv(z).split(width, 2)
        d, heads = width // layer.heads, []
        for n in range(layer.heads):
            here = slice(n * d, n * d + d)
            turned = []
            for t, weight in ((q, layer.q_norm.weight), (k, layer.k_norm.weight)):
                first, second = rms(t[:, :, here], weight).split(d // 2, 2)
                turn = torch.stack(
                    [torch.zeros(d // 2, dtype=F64)] * len(own)
                    + [angles(i, j, d // 4) for i, j in place]
                )
                turned.append(
                    torch.complex(first, second) * torch.polar(torch.ones_like(turn), turn)
                )
            logits = (turned[0][:, :, None] * turned[1][:, None].conj()).real.sum(3) / math.sqrt(d)
            heads.append(logits.softmax(2) @ v[:, :, here])
        h = h + g1 * layer.out(torch.cat(heads, 2))
        z = rms(h, layer.norm2.weight) * (1 + a2) + b2
        gate, value = layer.up(z).chunk(2, 2)
        h = h + g2 * layer.down(gate * gate.sigmoid() * value)
    a3, b3 = (m[:, None] for m in body.modulation(active).split(width, 1))
    out = torch.empty_like(x)
    values = body.last(rms(h, body.norm.weight) * (1 + a3) + b3)[:, len(own) :]
    for k, (i, j) in enumerate(place):
        part = values[:, k].view(-1, x.shape[1], p, p)
        out[:, :, i * p : i * p + p, j * p : j * p + p] = part
    return out


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_transformer_is_its_formula(dtype: torch.dtype) -> None:
    body = filled(BODIES["transformer"](SHAPE)).to(F64)
    assert isinstance(body, ImageTransformer)
    x, condition = torch.randn(3, *SHAPE, dtype=F64), torch.randn(3, 16, dtype=F64)
    x, condition = (z.float().double() for z in (x, condition))
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.copy_(parameter.float())
        expected = by_formula(body, x, condition)
        found = body.to(dtype)(x.to(dtype), condition.to(dtype))
    # The tables of angles are those of float32.
    assert_contract("value", found.float() if dtype == F64 else found, expected)


@pytest.mark.parametrize("kind", [velocity, average_velocity])
@pytest.mark.parametrize("name", ["T/2", "conv/2"])
def test_products_and_traces_are_by_duals(name: str, kind: Callable[..., ImageField]) -> None:
    """Of the networks as they come by name, with classes."""
    net = filled(kind(name, (1, 4, 4), classes=3), std=0.1).eval()
    labels = torch.tensor([0, 1, 2, 0])
    x, v = torch.randn(2, 4, 1, 4, 4).double()
    t = torch.rand(4).double()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            times = (t,) if kind is velocity else (t, t / 2)
            out: Tensor = self.net(x, *times, labels)
            return out

    problem = Problem(Own(), (x, t), (v, 1.0), v)
    value, tangent, _ = problem.exact(False)
    leaf = x.requires_grad_()
    flat = problem.net(leaf, t).flatten(1)
    # Samples do not meet, so the gradient of a sum over them has a row of each one's Jacobian.
    of_rows = (torch.autograd.grad(flat[:, i].sum(), leaf, retain_graph=True)[0] for i in range(16))
    exact = torch.stack([row.flatten(1)[:, i] for i, row in enumerate(of_rows)]).sum(0)
    own, (x32, t32), tangents = problem.to(torch.float32)
    with rows.quiet():
        out = fewstep.jvp(own, (x32, t32), tangents)
        found = fewstep.divergence(own, x32.detach(), t32.detach(), estimator="exact")
        explanation = fewstep.explain(own, x32.detach(), t32.detach())
    assert (out.engine, out.info, found.info) == ("duals", "", "")
    assert (explanation.engine, explanation.reason) == ("duals", "")
    assert_contract("gradient", out.value, value)
    assert_contract("gradient", out.tangent, tangent)
    assert_contract("gradient", found.value, exact)


def test_the_registers_and_the_condition_take_part(body: ImageBody) -> None:
    filled(body)
    x, condition = torch.randn(2, *SHAPE), torch.randn(2, body.width)
    out = body(x, condition)
    assert out.shape == x.shape
    moved = x.clone()
    moved[0, :, -1, -1] += 1  # of the last patch, felt in the first
    far = body(moved, condition)
    assert not torch.allclose(out[0, :, :2, :2], far[0, :, :2, :2])
    assert torch.equal(out[1], far[1])
    assert not torch.allclose(out, body(x, condition + 1))


def test_what_starts_at_zero(body: ImageBody) -> None:
    x, t = torch.randn(3, *SHAPE), torch.rand(3)
    made = ImageGenerator(body)(x)
    assert made.std() > 0.1  # samples differ from the first step on
    assert torch.equal(ImageField(body)(x, t), torch.zeros_like(x))


@pytest.mark.parametrize("styles", [0, 3])
def test_a_generator_is_a_function_of_its_noise(body: ImageBody, styles: int) -> None:
    made = filled(ImageGenerator(body, classes=3, guided=True, styles=styles, codebook=4))
    assert made.noise_dim == 64 + styles
    noise, labels = torch.randn(4, made.noise_dim), torch.tensor([0, 1, 2, 2])
    scale = torch.tensor([1.0, 1.5, 2.0, 4.0])
    out = made(noise, labels, scale)
    assert out.shape == (4, *SHAPE)
    assert torch.equal(made(noise, labels), made(noise, labels, torch.ones(4)))
    for changed in (made(noise, (labels + 1) % 3, scale), made(noise, labels, scale + 0.5)):
        assert not any(torch.allclose(a, b) for a, b in zip(out, changed, strict=True))
    if not styles:
        assert torch.equal(made(noise.view(4, *SHAPE), labels, scale), out)
        return
    other = noise.clone()
    other[:, -1] = -noise[:, -1]  # P(-z) = 1 - P(z): another quarter
    far = made(other, labels, scale)
    assert not any(torch.allclose(a, b) for a, b in zip(out, far, strict=True))
    other[:, -1] = noise[:, -1].sign() * 0.6  # within the quarters next to the middle
    near = made(other, labels, scale)
    other[:, -1] = noise[:, -1].sign() * 0.1
    torch.testing.assert_close(made(other, labels, scale), near)


def test_autocast(body: ImageBody) -> None:
    """Without a warning that kernels are not fused; tokens are summed in float32."""
    made = filled(ImageGenerator(body, classes=3, guided=True, styles=2)).eval()
    noise, scale = torch.randn(4, made.noise_dim), torch.rand(4) + 1
    inputs = noise, torch.tensor([0, 1, 2, 2]), scale
    with torch.no_grad():
        exact = made(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = made(*inputs)
    assert (found - exact).norm() <= 4 * torch.finfo(torch.bfloat16).eps * exact.norm()


def test_styles_are_uniform() -> None:
    made = ImageGenerator(BODIES["convolutions"](SHAPE), styles=2, codebook=5)
    assert made.style is not None
    seen: list[Tensor] = []
    made.style.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    with torch.no_grad():
        made(torch.randn(4000, made.noise_dim))
    counts = seen[0].flatten().bincount(minlength=10)
    assert counts.sum() == 8000
    assert (counts - 800).abs().max() < 4.5 * math.sqrt(4000 * 0.2 * 0.8)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("T/2", 4.8), ("S/2", 33.8), ("B/2", 132.5), ("L/2", 462.6), ("XL/2", 678.6)],
)
def test_sizes_by_name(name: str, millions: float) -> None:
    """Of the released form, whose B/2 is said to have 133 million parameters."""
    with torch.device("meta"):
        made = generator(name, (4, 32, 32), classes=1000, guided=True)
        out = made(torch.empty(2, made.noise_dim), torch.zeros(2, dtype=torch.long))
    assert out.shape == (2, 4, 32, 32)
    assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_names_say_the_patch() -> None:
    assert [image_body(n, (1, 8, 8)).patch for n in ("T", "T/1", "conv/4", "conv")] == [2, 1, 4, 2]


@pytest.mark.parametrize("name", ["", "mlp", "B2", "B/0", "b/2", "B/2 ", "M/2", "B/-1"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match="network must be one of .*'B/2', got " + repr(name)):
        velocity(name, (1, 8, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: velocity("B/2", (4, 7, 8)), "patch must divide the height and .* got 2 for 7 x 8"),
        (lambda: generator("conv/3", (1, 8, 8)), "patch must divide .* got 3 for 8 x 8"),
        (lambda: velocity("T/2", (8, 8)), r"image_shape must be \(C, H, W\), got \(8, 8\)"),
        (lambda: velocity("T/2", (0, 8, 8)), "image_shape must be an integer of at least 1"),
        (lambda: ImageTransformer(SHAPE, width=30, heads=3), "a multiple of 4, got 30 and 3"),
        (lambda: ImageTransformer(SHAPE, depth=0), "depth must be an integer of at least 1, got 0"),
        (lambda: ImageConvNet(SHAPE, channels=12), "channels must be a multiple of 8, got 12"),
        (lambda: generator("T/2", SHAPE, styles=-1), "styles must be an integer of at least 0"),
        (lambda: generator("T/2", SHAPE, classes=-1), "classes must be an integer of at least 0"),
    ],
)
def test_sizes_that_do_not_fit(make: Callable[[], object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        make()


def test_inputs_that_do_not_fit(body: ImageBody) -> None:
    x, t, labels = torch.randn(3, *SHAPE), torch.rand(3), torch.zeros(3, dtype=torch.long)
    plain, field = ImageGenerator(body, styles=2), ImageField(body, classes=2)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: plain(x), r"noise must be \[n, 66\], got \(3, 2, 4, 8\)"),
        (lambda: plain(x.flatten(1)), r"noise must be \[n, 66\], got \(3, 64\)"),
        (lambda: plain(torch.randn(3, 66), labels), "labels are for networks with classes"),
        (lambda: plain(torch.randn(3, 66), None, t), "scale is for guided generators"),
        (lambda: ImageGenerator(body)(x[:, :1]), r"noise must be \[n, 64\] or .*\(3, 1, 4, 8\)"),
        (lambda: field(x, t), r"labels must be \(3,\) for its 2 classes, got None"),
        (lambda: field(x, t, labels[:2]), r"labels must be \(3,\) .* got \(2,\)"),
        (lambda: field(x[:, :1], t, labels), r"x must be \[B, 2, 4, 8\], got \(3, 1, 4, 8\)"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


@torch.no_grad()
def test_large_batches_are_cut(body: ImageBody, monkeypatch: pytest.MonkeyPatch) -> None:
    net = EDMPrecond(filled(ImageField(body)))
    x, sigma = torch.randn(7, *SHAPE), torch.rand(7)
    sizes: list[int] = []
    body.register_forward_hook(lambda module, inputs, out: sizes.append(len(inputs[0])))
    whole = in_batches(net)(x, sigma)
    body.most = 3
    torch.testing.assert_close(in_batches(net)(x, sigma), whole)
    assert sizes == [7, 3, 3, 1]
    plain = nn.Linear(2, 2)
    assert in_batches(plain) is plain


@pytest.mark.parametrize("name", ["T/4", "conv/4"])
def test_every_method_trains_them(name: str) -> None:
    shape = (1, 8, 8)
    x, noise = torch.randn(2, 6, *shape)
    labels = torch.arange(6) % 3
    made = generator(name, shape, classes=2, guided=True)
    flow = velocity(name, shape)
    losses = {
        "wflow": (
            made,
            lambda: WFlow()(
                made,
                torch.randn(2, 2, 4, made.noise_dim),
                torch.randn(2, 4, *shape),
                torch.arange(2),
                uncond=torch.randn(2, 4, *shape),
                scale=torch.tensor([1.0, 2.0]),
            ),
        ),
        "reflow": (flow, lambda: MarginalReflow(tracker="trace", steps=2)(flow, lambda x, t: x, x)),
        "lines": (
            lines := EDMPrecond(velocity(name, shape, classes=3)),
            lambda: LinesMatching()(lines, noise, x, labels),
        ),
        "meanflow": (
            average := average_velocity(name, shape, classes=3),
            lambda: MeanFlow()(average, x, labels, null_label=3),
        ),
    }
    for method, (net, loss) in losses.items():
        if method != "wflow":
            filled(net, std=0.05)
        value, _ = loss()
        value.backward()
        missing = [n for n, p in net.named_parameters() if p.grad is None]
        assert not missing, method
        assert all(p.grad.isfinite().all() for p in net.parameters()), method
