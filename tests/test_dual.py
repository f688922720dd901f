"""Dual numbers: kernels against the reference in float64, their derivatives, and the registry."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.ops.dual import dispatch
from fewstep.reference import dual as reference
from support.duals import NORMS, PAIRS, SHAPES, activate_pairs, assert_pairs, inputs, norm_pairs
from tolerances import TANGENTS, assert_contract, error

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(
    capability: str, kind: str, shape: tuple[int, int, int, int, str], dtype: torch.dtype
) -> None:
    z, shared, shift = inputs(shape, dtype)
    _, _, tangents, inner, _ = shape
    grads = []
    outs = []
    for backend, cast in (("cpp", dtype), ("reference", torch.float64)):
        own = [None if m is None else m.to(cast) for m in (z, shared, shift)]
        live = [m.requires_grad_() for m in (own[0], own[2]) if m is not None]
        out = dispatch.activate(backend, *own, tangents, kind, 1.3, 20.0, inner)  # type: ignore[arg-type]
        torch.manual_seed(1)
        g = torch.randn(out.shape, dtype=torch.float64).to(cast)
        grads.append(torch.autograd.grad(out, live, g))
        outs.append(out)
    if z.numel() == 0:
        assert outs[0].shape == outs[1].shape
        return
    assert_contract("value", outs[0], outs[1].detach())
    for actual, exact in zip(*grads, strict=True):
        assert_contract("gradient", actual, exact)


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_activation_far_out_and_nan(capability: str, kind: str) -> None:
    z = torch.tensor([-1e4, -88.0, -30.0, -0.0, 0.0, 1e-5, 30.0, 88.0, 1e4])
    stack = torch.cat([z, torch.ones(9)])
    actual = dispatch.activate("cpp", stack, None, None, 1, kind)
    exact = reference.activate(stack.double(), None, None, 1, kind)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)
    bad = dispatch.activate("cpp", torch.tensor([float("nan"), 1.0]), None, None, 1, kind)
    assert bad[0].isnan()


@pytest.mark.parametrize("shape", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(
    capability: str, shape: tuple[int, int, int, int, bool, int | None, bool], dtype: torch.dtype
) -> None:
    batch, groups, n, tangents, centred, shifted, affine = shape
    z = torch.randn((tangents + 1) * batch, groups * n, dtype=dtype) + 2
    shift = None if shifted is None else torch.randn(shifted, dtype=dtype)
    w, b = (torch.randn(groups * n, dtype=dtype) if affine else None for _ in range(2))
    outs, grads = [], []
    for backend, cast in (("cpp", dtype), ("reference", torch.float64)):
        own = [None if m is None else m.to(cast) for m in (z, shift, w, b)]
        live = [m.requires_grad_() for m in own if m is not None]
        out = dispatch.norm(backend, *own, tangents, groups, centred, 1e-5)  # type: ignore[arg-type]
        torch.manual_seed(1)
        g = torch.randn(out.shape, dtype=torch.float64).to(cast)
        grads.append(torch.autograd.grad(out, live, g))
        outs.append(out)
    if batch == 0:
        assert outs[0].shape == outs[1].shape
        return
    assert_contract("value", outs[0], outs[1].detach())
    for actual, exact in zip(*grads, strict=True):
        assert_contract("gradient", actual, exact)


BLOCKS = [
    # batch, groups, n, weights of a row, tangents, centred
    (2, 3, 35, 5, 1, True),
    (3, 2, 192, 3, 2, True),
    (2, 1, 130, 2, 3, False),
    (3, 4, 67, 1, 0, True),
    (1, 1, 1, 1, 1, True),
    (2, 3, 2, 1, 2, True),
    (0, 2, 6, 2, 1, True),
]


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_weights_for_blocks(
    capability: str, shape: tuple[int, int, int, int, int, bool], dtype: torch.dtype
) -> None:
    batch, groups, n, own, tangents, centred = shape
    z = torch.randn((tangents + 1) * batch, groups * n, dtype=dtype) + 2
    w, b = (torch.randn(groups * own, dtype=dtype) for _ in range(2))
    for weight, bias in ((w, b), (w, None), (None, b)):
        outs, grads = [], []
        for backend, cast in (("cpp", dtype), ("reference", torch.float64)):
            given = [None if m is None else m.to(cast) for m in (z, None, weight, bias)]
            live = [m.requires_grad_() for m in given if m is not None]
            out = dispatch.norm(backend, *given, tangents, groups, centred, 1e-3)  # type: ignore[arg-type]
            torch.manual_seed(1)
            g = torch.randn(out.shape, dtype=torch.float64).to(cast)
            grads.append(torch.autograd.grad(out, live, g))
            outs.append(out)
        assert outs[0].shape == outs[1].shape
        for actual, exact in zip(*grads, strict=True):
            assert actual.shape == exact.shape
            if batch:
                assert_contract("gradient", actual, exact)
        if batch:
            assert_contract("value", outs[0], outs[1].detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("laid", ["whole", "turned", "channels last"])
def test_tangents_of_norms_alone(capability: str, dtype: torch.dtype, laid: str) -> None:
    for batch, groups, n, own, tangents, centred in (*BLOCKS, (2, 2, 18, 18, 3, True)):
        z = torch.randn(batch, groups * own, n // own, 1, dtype=dtype) + 2
        u = torch.randn(tangents * batch, *z.shape[1:], dtype=dtype)
        if laid == "turned":
            z, u = (m.mT.contiguous().mT for m in (z, u))
        elif laid == "channels last":
            z, u = (m.contiguous(memory_format=torch.channels_last) for m in (z, u))
        for w in (torch.randn(groups * own, dtype=dtype), None):
            found = dispatch.norm_tangents(z, u, w, groups, centred, 1e-3)
            wide = [None if m is None else m.double() for m in (z, u, None, w, None)]
            exact = reference.norm_pair(*wide, groups, centred, 1e-3)[1]  # type: ignore[arg-type]
            assert found.shape == u.shape
            if u.numel():
                assert_contract("value", found, exact)


def test_weights_of_a_norm_fit_its_rows() -> None:
    z, w = torch.randn(4, 12), torch.randn(12)
    for weight, bias in ((w[:5], None), (w[:4], None), (w[:0], None), (w, w[:2]), (None, w[:8])):
        with pytest.raises(RuntimeError, match="weight and bias"):
            dispatch.norm("cpp", z, None, weight, bias, 1, 3, True, 1e-5)
    with pytest.raises(RuntimeError, match="weight and bias"):
        dispatch.norm("cpp", z[:, :0], None, w, None, 1, 1, True, 1e-5)
    with pytest.raises(RuntimeError, match="u must have"):
        dispatch.norm_tangents(z, torch.randn(4, 11), None, 3, True, 1e-5)
    with pytest.raises(RuntimeError, match="copies of the batch"):
        dispatch.norm_tangents(z, torch.randn(6, 12), None, 3, True, 1e-5)
    with pytest.raises(RuntimeError, match="u must be Float"):
        dispatch.norm_tangents(z, z.double(), None, 3, True, 1e-5)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [*(("silu", s) for s in PAIRS), *((kind, PAIRS[1]) for kind in reference.ACTIVATIONS[1:])],
    ids=str,
)
def test_activation_of_tangents_in_bfloat16(
    capability: str, kind: str, shape: tuple[int, int, int, int, str]
) -> None:
    assert_pairs(activate_pairs("cpp", shape, kind), activate_pairs("reference", shape, kind))


@pytest.mark.parametrize("shape", [*NORMS, (130, 2, 9, 2, True, None, True)], ids=str)
def test_norm_of_tangents_in_bfloat16(
    capability: str, shape: tuple[int, int, int, int, bool, int | None, bool]
) -> None:
    assert_pairs(norm_pairs("cpp", shape), norm_pairs("reference", shape))


def test_strided_pairs_and_their_second_derivatives() -> None:
    """Which are those of the reference that rounds at the same points."""
    found = []
    for backend in ("cpp", "reference"):
        torch.manual_seed(3)
        z = torch.randn(5, 3).T.requires_grad_()
        u = torch.randn(5, 6).bfloat16().T.requires_grad_()
        w = torch.randn(5, requires_grad=True)
        a, t = dispatch.activate_pair(backend, z, u, None, "tanh")
        a, t = dispatch.norm_pair(backend, a, t, None, w, None, 1, True, 1e-2)
        loss = a.square().sum() + t.float().square().sum()
        first = torch.autograd.grad(loss, (z, u, w), create_graph=True)
        second = torch.autograd.grad(sum(g.float().square().sum() for g in first), (z, u, w))
        found.append([a, *first, *second])
    for actual, right in zip(*found, strict=True):
        assert actual.dtype == right.dtype
        assert error("gradient", actual, right.detach()) <= TANGENTS["gradient"]


def test_rounding_is_to_the_nearest() -> None:
    """As torch rounds, NaN and infinity too; a slope of 1 keeps tangents as they are."""
    u = torch.tensor([[1.0, -3.0, 0.1, 7.0]]).bfloat16()
    ones, z = torch.ones(1, 1), torch.zeros(1, 1)
    for w in (1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.1**-8, 3.4e38, 1e-40, math.inf, math.nan):
        weight = torch.tensor([w])
        g = dispatch.norm_pair("cpp", z, ones.bfloat16(), None, weight, None, 1, False, 1.0)[1]
        torch.testing.assert_close(g, weight[None].bfloat16(), rtol=0, atol=0, equal_nan=True)
    s = torch.full((1, 4), 100.0)
    exact = dispatch.activate_pair("cpp", s, u, None, "softplus")[1]
    assert torch.equal(exact, u)


def test_reference_slopes_are_the_derivatives() -> None:
    z = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    for kind in reference.ACTIVATIONS:
        a, slope = reference.derivative(z, kind, 1.3, 20.0)
        (expected,) = torch.autograd.grad(a.sum(), z)
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_derivatives_of_activations(backend: str) -> None:
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for kind in set(reference.ACTIVATIONS) - {"relu"}:

        def run(z: Tensor, shift: Tensor, kind: str = kind) -> Tensor:
            return dispatch.activate(backend, z, None, shift, 2, kind)

        assert torch.autograd.gradcheck(run, (z, shift))
        assert torch.autograd.gradgradcheck(run, (z, shift))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_derivatives_of_norms_and_dots(backend: str) -> None:
    z, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 4), 4, 4))
    for centred in (True, False):

        def run(z: Tensor, w: Tensor | None, b: Tensor, centred: bool = centred) -> Tensor:
            return dispatch.norm(backend, z, None, w, b, 2, 1, centred, 1e-2)

        for weight, bias in ((w, b), (w[:2], b[:2]), (None, b[:2])):
            assert torch.autograd.gradcheck(run, (z, weight, bias))
            assert torch.autograd.gradgradcheck(run, (z, weight, bias))
        tangents = partial(dispatch.norm_tangents, groups=1, centred=centred, eps=1e-2)
        assert torch.autograd.gradcheck(tangents, (z[:2], z[2:], w))
    key = torch.tensor((1, 0, 0))

    def dot(y: Tensor) -> Tensor:
        return dispatch.probe_dot(backend, y, key, None, 3, "gaussian")

    assert torch.autograd.gradcheck(dot, (z,))
    assert torch.autograd.gradgradcheck(dot, (z,))


def test_shared_tangents_refuse_a_gradient() -> None:
    shared = torch.randn(2, 3, requires_grad=True)
    out = dispatch.activate("cpp", torch.randn(4, 3), shared, None, 2, "silu")
    with pytest.raises(NotImplementedError, match="shared tangents"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised inside torch 2.14's opcheck
def test_opcheck() -> None:
    z = torch.randn(6, 5, requires_grad=True)
    u = torch.randn(12, 5).bfloat16().requires_grad_()
    s = torch.randn(5, requires_grad=True)
    key, g = torch.tensor((1, 0, 0)), torch.randn(3, 2, requires_grad=True)
    ops = torch.ops.fewstep
    for op, arguments in (
        (ops.dual_activate, (z, None, s, 2, 0, 1.0, 20.0, 1)),
        (ops.dual_activate_backward, (torch.randn(6, 5), z, None, s, 2, 0, 1.0, 20.0, 1)),
        (ops.dual_norm, (z, None, s, s, 2, 1, True, 1e-5)),
        (ops.dual_norm, (z, None, s[:1], s[:1], 2, 1, True, 1e-5)),
        (ops.dual_norm_tangents, (z, torch.randn(12, 5), s, 1, True, 1e-5)),
        (ops.dual_norm_backward, (torch.randn(6, 5), z, None, s, 2, 1, True, 1e-5)),
        (ops.dual_norm_backward, (torch.randn(6, 5), z, None, s[:1], 2, 1, True, 1e-5)),
        (ops.dual_activate_pair, (z, u, s, 0, 1.0, 20.0, 1)),
        (ops.dual_activate_pair_backward, (z, u, z, u, s, 0, 1.0, 20.0, 1)),
        (ops.dual_norm_pair, (z, u, None, s, s, 1, True, 1e-5)),
        (ops.dual_norm_pair_backward, (z, u, z, u, None, s, 1, True, 1e-5)),
        (ops.probe, (torch.randn(2, 5), key, None, 3, 0)),
        (ops.probe, (torch.randn(2, 5).bfloat16(), key, None, 3, 2)),
        (ops.probe_dot, (u, key, None, 4, 2)),
        (ops.probe_dot, (z, key, None, 3, 0)),
        (ops.probe_scale, (g, key, None, 5, 0)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_activations_are_one_list() -> None:
    """An op's argument `kind` is an index into all of them."""
    root = Path(__file__).parents[1]
    header = (root / "csrc/cpu/dual.h").read_text().replace("\\\n", "")
    (names,) = re.findall(r"#define FEWSTEP_ACTIVATIONS\(each\)(.*)", header)
    assert tuple(re.findall(r"each\((\w+)\)", names)) == reference.ACTIVATIONS
