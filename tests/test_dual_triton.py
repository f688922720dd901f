"""Triton's duals and probes in its interpreter (on a GPU: compiled) against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import fewstep
from fewstep.ops.dual import dispatch
from fewstep.reference import dual as reference
from fewstep.reference.probe import PROBES, probes
from support.duals import (
    NORMS,
    PAIRS,
    SHAPES,
    activate_pairs,
    assert_pairs,
    inputs,
    norm_pairs,
)
from support.probes import IDS, KEY
from support.velocity_nets import Film, Residual
from tolerances import TANGENTS, assert_contract, error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = [torch.float32, torch.float64]
UNIT = TANGENTS["rounded" if DEVICE == "cuda" else "cut"]


def on(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [*(("silu", s) for s in SHAPES), *((kind, SHAPES[1]) for kind in reference.ACTIVATIONS[1:])],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(kind: str, shape: tuple[int, int, int, int, str], dtype: torch.dtype) -> None:
    z, shared, shift = inputs(shape, dtype)
    _, _, tangents, inner, _ = shape
    outs, grads = [], []
    for backend, cast in (("triton", dtype), ("reference", torch.float64)):
        own = [on(m, cast) for m in (z, shared, shift)]
        live = [m.requires_grad_() for m in (own[0], own[2]) if m is not None]
        out = dispatch.activate(backend, *own, tangents, kind, 1.3, 20.0, inner)  # type: ignore[arg-type]
        torch.manual_seed(1)
        g = torch.randn(out.shape, dtype=torch.float64).to(DEVICE, cast)
        grads.append(torch.autograd.grad(out, live, g))
        outs.append(out.detach())
    assert outs[0].shape == outs[1].shape
    if z.numel():
        assert_contract("value", outs[0], outs[1])
        for actual, exact in zip(*grads, strict=True):
            assert_contract("gradient", actual, exact)


@pytest.mark.parametrize("shape", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(shape: tuple[int, int, int, int, bool, int | None, bool], dtype: torch.dtype) -> None:
    batch, groups, n, tangents, centred, shifted, affine = shape
    tensors = [
        2 * torch.randn((tangents + 1) * batch, groups * n),
        None if shifted is None else torch.randn(shifted),
        torch.randn(groups, n) if affine else None,
        torch.randn(groups, n) if affine else None,
    ]
    outs, grads = [], []
    for backend, cast in (("triton", dtype), ("reference", torch.float64)):
        own = [on(m, cast) for m in tensors]
        live = [m.requires_grad_() for m in own if m is not None]
        out = dispatch.norm(backend, *own, tangents, groups, centred, 1e-5)  # type: ignore[arg-type]
        torch.manual_seed(1)
        g = torch.randn(out.shape, dtype=torch.float64).to(DEVICE, cast)
        grads.append(torch.autograd.grad(out, live, g))
        outs.append(out.detach())
    assert outs[0].shape == outs[1].shape
    if tensors[0] is not None and tensors[0].numel():
        assert_contract("value", outs[0], outs[1])
        for actual, exact in zip(*grads, strict=True):
            assert_contract("gradient", actual, exact)


@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_activation_of_tangents_in_bfloat16(shape: tuple[int, int, int, int, str]) -> None:
    with torch.device(DEVICE):
        found, exact = (activate_pairs(b, shape, "silu") for b in ("triton", "reference"))
    assert_pairs(found, exact, UNIT)


@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_norm_of_tangents_in_bfloat16(
    shape: tuple[int, int, int, int, bool, int | None, bool],
) -> None:
    with torch.device(DEVICE):
        found, exact = (norm_pairs(b, shape) for b in ("triton", "reference"))
    assert_pairs(found, exact, UNIT)


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("d", [1, 3, 513])
@pytest.mark.parametrize("dtype", DTYPES)
def test_probes(kind: str, d: int, dtype: torch.dtype) -> None:
    count = min(3, d)
    like = torch.empty(4, d, dtype=dtype, device=DEVICE)
    actual = dispatch.probe("triton", like, KEY, IDS, count, kind)
    expected = probes(KEY, IDS, (count, 4, d), kind, dtype).to(DEVICE)
    if kind in ("rademacher", "hadamard"):
        assert torch.equal(actual, expected)
    else:
        ulps = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual, expected, rtol=ulps, atol=ulps)
    y = torch.randn(count * 4, d, dtype=dtype, device=DEVICE)
    dots = dispatch.probe_dot("triton", y, KEY, IDS, count, kind)
    assert_contract("value", dots, (actual.double() * y.double().view(count, 4, d)).sum(2))
    g = torch.randn(count, 4, dtype=dtype, device=DEVICE)
    scaled = dispatch.probe_scale("triton", g, KEY, IDS, d, kind)
    torch.testing.assert_close(scaled, g[..., None] * actual)


@pytest.mark.parametrize("kind", PROBES)
def test_probes_in_bfloat16(kind: str) -> None:
    like = torch.empty(4, 130, device=DEVICE)
    wide = dispatch.probe("triton", like, KEY, IDS, 3, kind)
    low = dispatch.probe("triton", like.bfloat16(), KEY, IDS, 3, kind)
    assert low.dtype == torch.bfloat16
    assert ((low.float() - wide).abs() <= UNIT * wide.abs()).all()
    y = torch.randn(12, 130, device=DEVICE).bfloat16()
    dots = dispatch.probe_dot("triton", y, KEY, IDS, 3, kind)
    assert_contract("value", dots, (wide.double() * y.double().view(3, 4, 130)).sum(2))


@pytest.mark.parametrize("net", [Film(5, 8), Residual(5, 8)], ids=["film", "residual"])
def test_divergence_and_its_gradients(net: torch.nn.Module) -> None:
    net = net.to(DEVICE)
    x, t = torch.randn(3, 5, device=DEVICE), torch.rand(3, device=DEVICE)
    found = []
    for backend in ("triton", "reference"):
        out = fewstep.divergence(
            net, x, t, estimator="hutchinson", probes=2, seed=4, backend=backend
        )
        loss = out.value.sum() + out.velocity.square().sum()
        found.append((out.value.detach(), *torch.autograd.grad(loss, list(net.parameters()))))
    for actual, exact in zip(*found, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_divergence_with_tangents_in_bfloat16(estimator: str) -> None:
    net = Residual(5, 8).to(DEVICE)
    x, t = torch.randn(3, 5, device=DEVICE), torch.rand(3, device=DEVICE)
    found = []
    for backend, low in (("triton", torch.bfloat16), ("reference", None)):
        out = fewstep.divergence(
            net, x, t, estimator=estimator, probes=2, backend=backend, tangent_dtype=low
        )
        grads = torch.autograd.grad(out.value.sum(), list(net.parameters()), allow_unused=True)
        found.append((out.value, out.velocity, grads))
    (value, velocity, grads), (right, plain, exact) = found
    torch.testing.assert_close(velocity, plain)
    assert error("value", value, right) <= 2 * TANGENTS["value"]  # cut, not rounded
    for a, b in zip(grads, exact, strict=True):
        if b is not None:
            assert a is not None
            assert error("gradient", a, b) <= 2 * TANGENTS["gradient"]


def test_ops() -> None:
    ops = torch.ops.fewstep_triton
    z = torch.randn(6, 5, device=DEVICE)
    u = torch.randn(12, 5, device=DEVICE).bfloat16()
    dispatch.activate("triton", z, None, None, 1, "silu")  # registers them
    tests = ("test_schema", "test_faketensor")
    for op, arguments in (
        (ops.dual_activate, (z, None, None, 1, 0, 1.0, 20.0, 1)),
        (ops.dual_activate_backward, (z, z, None, None, 1, 0, 1.0, 20.0, 1)),
        (ops.dual_norm, (z, None, None, None, 1, 1, True, 1e-5)),
        (ops.dual_norm_backward, (z, z, None, None, 1, 1, True, 1e-5)),
        (ops.dual_activate_pair, (z, u, None, 0, 1.0, 20.0, 1)),
        (ops.dual_activate_pair_backward, (z, u, z, u, None, 0, 1.0, 20.0, 1)),
        (ops.dual_norm_pair, (z, u, None, None, None, 1, True, 1e-5)),
        (ops.dual_norm_pair_backward, (z, u, z, u, None, None, 1, True, 1e-5)),
        (ops.probe, (z, KEY, None, 2, 1)),
        (ops.probe_dot, (u, KEY, None, 2, 1)),
        (ops.probe_dot, (z, KEY, None, 2, 0)),
        (ops.probe_scale, (z, KEY, None, 4, 3)),
    ):
        torch.library.opcheck(op, arguments, test_utils=tests)


def test_weights_of_blocks_are_spread() -> None:
    z, w = torch.randn(4, 12, device=DEVICE), torch.randn(3, 2, device=DEVICE).unbind(1)
    actual = dispatch.norm("triton", z, None, *w, 1, 3, True, 1e-5)
    torch.testing.assert_close(actual, reference.norm(z, None, *w, 1, 3, True, 1e-5))
    u = z.bfloat16()
    pairs = [dispatch.norm_pair(b, z, u, None, *w, 3, True, 1e-5) for b in ("triton", "reference")]
    torch.testing.assert_close(*pairs)


def test_long_rows_are_left_to_the_reference() -> None:
    z = torch.randn(2, 2049, device=DEVICE)
    actual = dispatch.norm("triton", z, None, None, None, 1, 1, True, 1e-5)
    torch.testing.assert_close(actual, reference.norm(z, None, None, None, 1, 1, True, 1e-5))
