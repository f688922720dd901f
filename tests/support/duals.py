"""Inputs and comparisons of dual numbers, for every backend that has kernels of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.ops.dual import dispatch
from tolerances import CONTRACT, TANGENTS, assert_contract, error

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

Pair = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def assert_pairs(found: Pair, exact: Pair, unit: float = TANGENTS["rounded"]) -> None:
    """Primal and tangents, and gradients for z, u and others, against float64 from the same u."""
    (a, t), (a64, t64) = found[0], exact[0]
    assert (a.dtype, t.dtype) == (torch.float32, torch.bfloat16)
    assert (a.shape, t.shape) == (a64.shape, t64.shape)
    if a.numel() == 0:
        return
    assert_contract("value", a.detach(), a64.detach())
    slack = CONTRACT["value"] * t64.detach().abs().max() if t.numel() else 0
    assert ((t.double() - t64).abs() <= unit * t64.abs() + slack).all()
    for i, (actual, right) in enumerate(zip(found[1], exact[1], strict=True)):
        assert actual.shape == right.shape
        bound = CONTRACT["gradient"] + (unit if i == 1 else 0)
        assert right.numel() == 0 or error("gradient", actual, right) <= bound


def activate_pairs(backend: str, shape: tuple[int, int, int, int, str], kind: str) -> Pair:
    """Of a backend in float32 and bfloat16, or of the reference in float64 for the same input."""
    torch.manual_seed(2)
    batch, width, tangents, inner, shifted = shape
    z, _, shift = inputs((batch, width, tangents, inner, shifted), torch.float32)
    z, u = z[:batch], torch.randn(tangents * batch, width).bfloat16()
    low = backend != "reference"
    own = [m if low or m is None else m.double() for m in (z, u, shift)]
    live = [m.requires_grad_() for m in own if m is not None]
    out = dispatch.activate_pair(backend, *own, kind, 1.3, 20.0, inner)  # type: ignore[arg-type]
    g = [torch.randn(o.shape).bfloat16().to(o.dtype) for o in out]
    return out, torch.autograd.grad(out, live, g)


PAIRS = [s for s in SHAPES if s[4] != "shared"]


def norm_pairs(backend: str, shape: tuple[int, int, int, int, bool, int | None, bool]) -> Pair:
    """As `activate_pairs`."""
    torch.manual_seed(2)
    batch, groups, n, tangents, centred, shifted, affine = shape
    z, u = torch.randn(batch, groups * n) + 2, torch.randn(tangents * batch, groups * n)
    shift = None if shifted is None else torch.randn(shifted)
    w, b = (torch.randn(groups * n) if affine else None for _ in range(2))
    low = backend != "reference"
    tensors = (z, u.bfloat16(), shift, w, b)
    own = [m if low or m is None else m.double() for m in tensors]
    live = [m.requires_grad_() for m in own if m is not None]
    out = dispatch.norm_pair(backend, *own, groups, centred, 1e-5)  # type: ignore[arg-type]
    g = [torch.randn(o.shape).bfloat16().to(o.dtype) for o in out]
    return out, torch.autograd.grad(out, live, g)
