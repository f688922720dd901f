"""Triton's attention in its interpreter (on a GPU: compiled) against the reference in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

import fewstep
from fewstep.ops.dual import attention
from tolerances import assert_contract

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
F64 = torch.float64


class Case(NamedTuple):
    """Sizes, what masks, and which of q, k and v have tangents."""

    tangents: int
    heads: int
    groups: int
    n: int
    m: int
    d: int
    dv: int
    mask: str = "none"
    moved: str = "qkv"


CASES = [
    Case(1, 1, 1, 2, 3, 1, 1),
    Case(1, 2, 1, 35, 20, 17, 9, "bool"),
    Case(2, 1, 1, 20, 35, 8, 70, "added"),
    Case(1, 2, 2, 40, 33, 8, 8, "causal"),
    Case(1, 1, 1, 5, 20, 70, 8, "added", "k"),
    Case(2, 1, 1, 5, 18, 7, 4, "bool", "v"),
    Case(1, 1, 1, 9, 16, 8, 8, "none", "q"),
    Case(1, 2, 2, 0, 3, 4, 4),
    Case(1, 2, 2, 3, 0, 4, 4),
    Case(1, 2, 2, 3, 5, 4, 0),
]


def _inputs(case: Case) -> tuple[list[Tensor | None], dict[str, Any]]:
    """q, k, v, their tangents and the mask, in float64, and the options."""
    k, h, g, n, m, d, dv, mask, moved = case
    shapes = {"q": (2, h, n, d), "k": (2, g, m, d), "v": (2, g, m, dv)}
    own = [torch.randn(shape, dtype=F64) for shape in shapes.values()]
    moves = [
        torch.randn(k, *shape, dtype=F64) if name in moved else None
        for name, shape in shapes.items()
    ]
    masks: dict[str, Tensor] = {}
    if mask == "bool":
        masks["bool"] = torch.rand(2, 1, n, m) > 0.4
        masks["bool"][:, :, :1] = False  # a row that attends to nothing
    if mask == "added":
        masks["added"] = torch.randn(1, h, m, n, dtype=F64).mT
    options = {"causal": mask == "causal", "scale": 0.3, "tangents": k}
    return [*own, *moves, masks.get(mask)], options


def _run(
    backend: str, tensors: list[Tensor | None], dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients for what has one."""
    own: list[Any] = [
        None if t is None else t.to(DEVICE, dtype if t.dtype == F64 else t.dtype) for t in tensors
    ]
    live = [t.requires_grad_() for t in own[:6] if t is not None]
    out = attention.attention(backend, *own, **options)
    torch.manual_seed(1)
    ups = [torch.randn(o.shape, dtype=F64).to(o) for o in out]
    pairs = [(o, g) for o, g in zip(out, ups, strict=True) if o.requires_grad]
    outs, grads = zip(*pairs, strict=True)
    live = live if len(pairs) == 2 else live[:3]
    return [o.detach() for o in out], list(torch.autograd.grad(outs, live, grads))


def _compare(case: Case, dtype: torch.dtype, **more: Any) -> None:
    tensors, options = _inputs(case)
    found = _run("triton", tensors, dtype, **options, **more)
    exact = _run("reference", tensors, F64, **options, **more)
    for kind, *both in zip(("value", "gradient"), found, exact, strict=True):
        for a, b in zip(*both, strict=True):
            assert a.dtype == dtype
            assert a.shape == b.shape
            if b.numel():
                assert_contract(kind, a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    _compare(case, torch.float32)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_attention_in_float64(case: Case) -> None:
    _compare(case, F64)


def test_constant_tangents() -> None:
    _compare(CASES[3], torch.float32, constant=True)


def test_what_is_masked_out_counts_for_nothing() -> None:
    """Keys may be NaN there, as padding is, with their tangents; and the same bits twice."""
    tensors, options = _inputs(Case(1, 1, 1, 6, 20, 8, 8))
    mask = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    mask[..., 13:] = False
    clean = [*(None if t is None else t.to(DEVICE, torch.float32) for t in tensors[:6])]
    bad = [None if t is None else t.clone() for t in clean]
    for i in (1, 4):
        bad[i][..., 13:, :] = torch.nan  # type: ignore[index]
    found, right = (
        attention.attention("triton", *own, mask.to(DEVICE), **options)  # type: ignore[arg-type]
        for own in (bad, clean)
    )
    for a, b in zip(found, right, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


class _Attends(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(4, 8) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).mean(1) + x


def test_networks_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    net = _Attends().to(DEVICE, F64)
    x, t = (torch.randn(2, 5, 4, dtype=F64), torch.zeros(2, dtype=F64))
    x, t = x.to(DEVICE), t.to(DEVICE)
    calls: list[str] = []
    kernel = attention.attention
    monkeypatch.setattr(
        attention, "attention", lambda *a, **k: calls.append(a[0]) or kernel(*a, **k)
    )
    found = []
    for backend in ("triton", "reference"):
        how: dict[str, Any] = {"estimator": "hutchinson", "probes": 2, "seed": 4}
        out = fewstep.divergence(net, x, t, backend=backend, **how)  # type: ignore[arg-type]
        loss = out.value.sum() + out.velocity.square().sum()
        found.append((out.value.detach(), *torch.autograd.grad(loss, list(net.parameters()))))
    assert set(calls) == {"triton"}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised inside torch 2.14's opcheck
def test_opcheck() -> None:
    tensors, options = _inputs(Case(1, 2, 1, 3, 4, 3, 2, "bool"))
    attention._ops("triton")
    own = [t if t is None or t.dtype != F64 else t.to(DEVICE, torch.float32) for t in tensors]
    own[6] = None if own[6] is None else own[6].to(DEVICE)
    ops, rest = torch.ops.fewstep_triton, tuple(options.values())
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    live = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in own]
    torch.library.opcheck(ops.dual_attention.default, (*live, *rest, False), test_utils=tests)
    with torch.no_grad():
        kept = ops.dual_attention.default(*own, *rest, False)
    ups = [torch.randn_like(t) for t in kept[:2]]
    torch.library.opcheck(
        ops.dual_attention_backward.default, (*ups, *live, *kept, *rest), test_utils=tests
    )
