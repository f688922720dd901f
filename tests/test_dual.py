"""Dual numbers: kernels against the reference in float64, their derivatives, and the registry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.ops import raw_dual
from fewstep.reference import dual as reference
from tolerances import assert_contract

DTYPES = [torch.float32, torch.float64]
# batch, width, tangents, inner, what is shifted
SHAPES = [
    (1, 1, 1, 1, "none"),
    (5, 37, 2, 1, "channels"),
    (3, 40, 3, 1, "full"),
    (2, 24, 1, 6, "channels"),
    (4, 33, 5, 1, "shared"),
    (3, 7, 0, 1, "channels"),
    (0, 3, 2, 1, "none"),
]


def inputs(
    shape: tuple[int, int, int, int, str], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch, width, tangents, inner, shift = shape
    alone = shift == "shared"
    z = 3 * torch.randn(batch * (1 if alone else tangents + 1), width, dtype=dtype)
    shared = torch.randn(tangents, width, dtype=dtype) if alone else None
    size = {"none": None, "channels": (width // inner,), "full": (batch, width)}
    own = size.get(shift, (width,))
    return z, shared, None if own is None else torch.randn(own, dtype=dtype)


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
        out = raw_dual.activate(backend, *own, tangents, kind, 1.3, 20.0, inner)  # type: ignore[arg-type]
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
    actual = raw_dual.activate("cpp", stack, None, None, 1, kind)
    exact = reference.activate(stack.double(), None, None, 1, kind)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)
    bad = raw_dual.activate("cpp", torch.tensor([float("nan"), 1.0]), None, None, 1, kind)
    assert bad[0].isnan()


NORMS = [
    # batch, groups, n, tangents, centred, elements of the shift, affine
    (1, 1, 5, 1, True, None, True),
    (4, 1, 33, 2, True, 33, True),
    (3, 4, 18, 2, True, None, True),
    (5, 1, 64, 3, False, 64, True),
    (2, 2, 7, 0, True, None, False),
    (6, 1, 16, 2, True, 96, True),
    (0, 1, 4, 1, True, None, True),
]


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
        out = raw_dual.norm(backend, *own, tangents, groups, centred, 1e-5)  # type: ignore[arg-type]
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
            return raw_dual.activate(backend, z, None, shift, 2, kind)

        assert torch.autograd.gradcheck(run, (z, shift))
        assert torch.autograd.gradgradcheck(run, (z, shift))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_derivatives_of_norms_and_dots(backend: str) -> None:
    z, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 4), 4, 4))
    for centred in (True, False):

        def run(z: Tensor, w: Tensor, b: Tensor, centred: bool = centred) -> Tensor:
            return raw_dual.norm(backend, z, None, w, b, 2, 1, centred, 1e-2)

        assert torch.autograd.gradcheck(run, (z, w, b))
        assert torch.autograd.gradgradcheck(run, (z, w, b))
    key = torch.tensor((1, 0, 0))

    def dot(y: Tensor) -> Tensor:
        return raw_dual.probe_dot(backend, y, key, None, 3, "gaussian")

    assert torch.autograd.gradcheck(dot, (z,))
    assert torch.autograd.gradgradcheck(dot, (z,))


def test_shared_tangents_refuse_a_gradient() -> None:
    shared = torch.randn(2, 3, requires_grad=True)
    out = raw_dual.activate("cpp", torch.randn(4, 3), shared, None, 2, "silu")
    with pytest.raises(NotImplementedError, match="shared tangents"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised inside torch 2.14's opcheck
def test_opcheck() -> None:
    z = torch.randn(6, 5, requires_grad=True)
    s = torch.randn(5, requires_grad=True)
    key, g = torch.tensor((1, 0, 0)), torch.randn(3, 2, requires_grad=True)
    ops = torch.ops.fewstep
    for op, arguments in (
        (ops.dual_activate, (z, None, s, 2, 0, 1.0, 20.0, 1)),
        (ops.dual_activate_backward, (torch.randn(6, 5), z, None, s, 2, 0, 1.0, 20.0, 1)),
        (ops.dual_norm, (z, None, s, s, 2, 1, True, 1e-5)),
        (ops.dual_norm_backward, (torch.randn(6, 5), z, None, s, 2, 1, True, 1e-5)),
        (ops.probe, (torch.randn(2, 5), key, None, 3, 0)),
        (ops.probe_dot, (z, key, None, 3, 0)),
        (ops.probe_scale, (g, key, None, 5, 0)),
    ):
        torch.library.opcheck(op.default, arguments)
