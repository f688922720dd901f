"""Attention of dual numbers: kernels against the reference in float64, and where they serve."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep
from fewstep.ops.dual import attention
from fewstep.reference import attention as reference
from tolerances import TANGENTS, assert_contract, error

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


class Case(NamedTuple):
    """Sizes, what masks, and which of q, k and v have tangents."""

    tangents: int
    batch: int
    heads: int
    groups: int
    n: int
    m: int
    d: int
    dv: int
    mask: str = "none"
    moved: str = "qkv"


CASES = [
    Case(1, 1, 1, 1, 2, 3, 1, 1),
    Case(1, 2, 2, 2, 37, 53, 20, 9),
    Case(2, 2, 4, 2, 150, 300, 33, 70, "bool"),
    Case(1, 1, 2, 1, 300, 130, 64, 64, "added"),
    Case(3, 1, 2, 2, 230, 130, 16, 16, "causal"),
    Case(1, 1, 1, 1, 129, 257, 256, 17, "causal", "k"),
    Case(1, 1, 3, 1, 65, 31, 8, 8, "added by row", "q"),
    Case(2, 1, 2, 2, 5, 140, 7, 40, "bool by column", "v"),
    Case(1, 1, 1, 1, 9, 16, 8, 8, "none", "qv"),
]
EMPTY = [
    Case(1, 0, 2, 2, 3, 3, 4, 4),
    Case(2, 1, 2, 2, 0, 3, 4, 4, "bool"),
    Case(1, 1, 2, 2, 3, 0, 4, 4),
    Case(1, 1, 2, 2, 3, 5, 4, 0),
]


def _mask(case: Case) -> Tensor | None:
    _, b, h, _, n, m, *_ = case
    if case.mask == "bool":
        mask = torch.rand(b, 1, n, m) > 0.4
        mask[:, :, :1] = False  # a row that attends to nothing
        return mask
    if case.mask == "bool by column":
        return torch.rand(b, h, 1, m) > 0.5
    if case.mask == "added":
        return torch.randn(1, h, m, n, dtype=F64).mT
    if case.mask == "added by row":
        return torch.randn(1, 1, n, 1, dtype=F64)
    return None


def _inputs(case: Case) -> tuple[list[Tensor | None], dict[str, Any]]:
    """q, k, v, their tangents and the mask, in float64, and the options."""
    k, b, h, g, n, m, d, dv = case[:8]
    shapes = {"q": (b, h, n, d), "k": (b, g, m, d), "v": (b, g, m, dv)}
    own = [torch.randn(shape, dtype=F64) for shape in shapes.values()]
    moves = [
        torch.randn(k, *shape, dtype=F64) if name in case.moved else None
        for name, shape in shapes.items()
    ]
    return [*own, *moves, _mask(case)], {
        "causal": case.mask == "causal",
        "scale": 0.3,
        "tangents": k,
    }


def _cast(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Any]:
    """Leaves of a dtype; a mask is none."""
    *own, mask = [t.to(dtype) if t is not None and t.dtype == F64 else t for t in tensors]
    return [None if t is None else t.detach().clone().requires_grad_() for t in own] + [mask]


def _run(
    backend: str, tensors: list[Any], options: dict[str, Any], **more: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients for what has one."""
    out = attention.attention(backend, *tensors, **options, **more)
    torch.manual_seed(1)
    ups = [torch.randn(o.shape, dtype=F64).to(o.dtype) for o in out]
    pairs = [(o, g) for o, g in zip(out, ups, strict=True) if o.requires_grad]
    live = [t for t in tensors[:6] if t is not None]
    live = live if len(pairs) == 2 else live[:3]
    outs, grads = zip(*pairs, strict=True)
    return [o.detach() for o in out], list(torch.autograd.grad(outs, live, grads))


def _compare(case: Case, dtype: torch.dtype, **more: Any) -> None:
    tensors, options = _inputs(case)
    found = _run("cpp", _cast(tensors, dtype), options, **more)
    exact = _run("reference", _cast(tensors, F64), options, **more)
    for kind, some, right in (("value", *pair) for pair in zip(found[:1], exact[:1], strict=True)):
        for a, b in zip(some, right, strict=True):
            assert_contract(kind, a, b)
    for a, b in zip(found[1], exact[1], strict=True):
        assert_contract("gradient", a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_attention(capability: str, case: Case, dtype: torch.dtype) -> None:
    _compare(case, dtype)


@pytest.mark.parametrize("case", CASES[2:5], ids=str)
def test_constant_tangents(case: Case) -> None:
    """Autograd has the gradient of the primal, and keeps no tangents."""
    _compare(case, torch.float32, constant=True)
    tensors, options = _inputs(case)
    own = _cast(tensors, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, moved = attention.attention("cpp", *own, **options, constant=True)
    assert not moved.requires_grad
    assert all(t.ndim < 5 for t in kept)
    plain = F.scaled_dot_product_attention(
        *own[:3],
        None if own[6] is None else own[6].expand(*out.shape[:3], -1),
        is_causal=options["causal"],
        scale=options["scale"],
        enable_gqa=True,
    )
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty(case: Case) -> None:
    tensors, options = _inputs(case)
    out, grads = _run("cpp", _cast(tensors, torch.float32), options)
    exact, right = _run("reference", _cast(tensors, F64), options)
    for a, b in zip([*out, *grads], [*exact, *right], strict=True):
        torch.testing.assert_close(a, b.float())


def test_random_options() -> None:
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(30):
        groups = draw.randint(1, 2)
        size = (draw.choice((1, 2, 31, 64, 113, 129, 200)) for _ in range(2))
        width = (draw.choice((1, 3, 16, 32, 40)) for _ in range(2))
        moved = "".join(c for c in "qkv" if draw.random() < 0.7) or "q"
        mask = draw.choice(("none", "bool", "added", "causal", "bool by column", "added by row"))
        heads = groups * draw.randint(1, 3)
        case = Case(
            *(draw.randint(1, 3), draw.randint(1, 2), heads, groups),
            *size,
            *width,
            mask,
            moved,
        )
        tensors, options = _inputs(case)
        for dtype, bound in ((F64, 1e-10), (torch.float32, 2e-4)):
            found = _run("cpp", _cast(tensors, dtype), options)
            exact = _run("reference", _cast(tensors, F64), options)
            scale = 1 + max(float(t.abs().max()) for t in exact[0])
            for a, b in zip([*found[0], *found[1]], [*exact[0], *exact[1]], strict=True):
                off = float((a.double() - b).abs().max())
                assert off <= bound * (scale + float(b.abs().max())), (case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    tensors, options = _inputs(CASES[3])
    low = [t if t is None else t.to(dtype) for t in tensors]
    found = attention.attention("cpp", *low, **options)  # type: ignore[arg-type]
    wide = [t if t is None else t.to(F64) for t in low]
    for a, b in zip(found, attention.attention("reference", *wide, **options), strict=True):  # type: ignore[arg-type]
        assert a.dtype == dtype
        assert error("gradient", a, b) <= TANGENTS["rounded"]


def test_strides_and_threads_change_no_bit() -> None:
    tensors, options = _inputs(Case(2, 2, 3, 3, 130, 140, 24, 24, "added"))
    own = [None if t is None else t.float() for t in tensors]
    strided = [
        None if t is None else t.transpose(-2, -3).contiguous().transpose(-2, -3) for t in own
    ]
    before = torch.get_num_threads()
    first = attention.attention("cpp", *own, **options)  # type: ignore[arg-type]
    try:
        torch.set_num_threads(1)
        second = attention.attention("cpp", *strided, **options)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_what_is_masked_out_counts_for_nothing() -> None:
    """Keys may be NaN there, as padding is, with their tangents."""
    tensors, options = _inputs(Case(1, 1, 1, 1, 6, 40, 8, 8))
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    mask[..., 30:] = False
    clean = [*(None if t is None else t.float() for t in tensors[:6]), mask]
    bad = [t if t is None else t.clone() for t in clean]
    for i in (1, 4):
        bad[i][..., 30:, :] = torch.nan  # type: ignore[index]
    found, right = (attention.attention("cpp", *t, **options) for t in (bad, clean))  # type: ignore[arg-type]
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a, b)
    clean[0][0, 0, 2, 3] = torch.nan  # type: ignore[index]
    for a in attention.attention("cpp", *clean, **options):  # type: ignore[arg-type]
        assert a[..., 2, :].isnan().all()
        assert a[..., 3, :].isfinite().all()


def test_large_scores_do_not_overflow() -> None:
    tensors, options = _inputs(CASES[1])
    own = [t if t is None else t.float() for t in tensors]
    own[0] = own[0] * 1e3  # type: ignore[operator]
    exact = attention.attention(
        "reference",
        *(t if t is None else t.double() for t in own),  # type: ignore[arg-type]
        **options,
    )
    for a, b in zip(attention.attention("cpp", *own, **options), exact, strict=True):  # type: ignore[arg-type]
        assert a.isfinite().all()
        assert error("gradient", a, b) <= 1e-3  # scores of 1e4 are rounded to 1e-3


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised inside torch 2.14's opcheck
@pytest.mark.parametrize(
    "case", [Case(2, 1, 2, 1, 3, 4, 3, 2, "bool"), Case(1, 1, 1, 1, 3, 2, 3, 2)]
)
def test_opcheck(case: Case) -> None:
    tensors, options = _inputs(case)
    own = _cast(tensors, torch.float32)
    ops, (causal, scale, tangents) = torch.ops.fewstep, options.values()
    for constant in (False, True):
        torch.library.opcheck(ops.dual_attention.default, (*own, causal, scale, tangents, constant))
    with torch.no_grad():
        kept = ops.dual_attention.default(*own, causal, scale, tangents, False)
    ups = [torch.randn_like(t).requires_grad_() for t in kept[:2]]
    arguments = (*ups, *own, *kept, causal, scale, tangents)
    torch.library.opcheck(ops.dual_attention_backward.default, arguments)


@pytest.mark.parametrize(
    "case", [Case(2, 1, 2, 1, 3, 4, 3, 2, "added"), Case(1, 1, 1, 1, 3, 4, 2, 2, "causal", "k")]
)
def test_derivatives_of_both_orders(case: Case) -> None:
    tensors, options = _inputs(case)
    live = [i for i, t in enumerate(tensors[:6]) if t is not None]

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        own = list(tensors)
        for i, t in zip(live, given, strict=True):
            own[i] = t
        return attention.attention("cpp", *own, **options)  # type: ignore[arg-type]

    given = [_cast(tensors, F64)[i] for i in live]
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_reference_is_the_derivative() -> None:
    for case in (CASES[1], CASES[2], CASES[4]):
        tensors, options = _inputs(case)
        own, moves, mask = tensors[:3], tensors[3:6], tensors[6]
        _, found = reference.attention(*tensors, *options.values())  # type: ignore[arg-type]

        rest = (None, None, None, mask, options["causal"], 0.3, 0)

        def plain(*given: Tensor, rest: tuple[Any, ...] = rest) -> Tensor:
            return reference.attention(*given, *rest)[0]

        for i in range(case.tangents):
            _, exact = torch.func.jvp(plain, tuple(own), tuple(t[i] for t in moves))  # type: ignore[index]
            torch.testing.assert_close(found[i], exact, rtol=1e-10, atol=1e-10)


BAD: dict[str, tuple[int, Any]] = {
    r"q must be \[B, H, N, D\], got \(3, 4\)": (0, torch.ones(3, 4)),
    r"k must be \[1, G, M, 4\], got \(1, 2, 3, 5\)": (1, torch.ones(1, 2, 3, 5)),
    r"k must be of heads that divide the 2 of q, got 3": (1, torch.ones(1, 3, 3, 4)),
    r"v must be \[1, 2, 3, E\], got \(1, 2, 4, 4\)": (2, torch.ones(1, 2, 4, 4)),
    r"v must be floating, of q's dtype, got torch.int64": (2, torch.ones(1, 2, 3, 4).long()),
    r"tq must be \(1, 1, 2, 3, 4\), got \(2, 1, 2, 3, 4\)": (3, torch.ones(2, 1, 2, 3, 4)),
    r"mask must be broadcastable to \(1, 2, 3, 3\), got \(1, 1, 2, 3\)": (
        6,
        torch.ones(1, 1, 2, 3),
    ),
    r"mask must be bool or torch.float32, got torch.int64": (6, torch.ones(1, 1, 3, 3).long()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    given: list[Any] = [torch.ones(1, 2, 3, 4)] * 3 + [None] * 4
    place, wrong = BAD[message]
    given[place] = wrong
    if "heads" in message:
        given[2] = wrong
    with pytest.raises(ValueError, match=message):
        attention.attention("cpp", *given, causal=False, scale=1.0, tangents=1)


class Attends(torch.nn.Module):
    """Grouped queries, a mask, and values of another width."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.q, self.k, self.v = (torch.nn.Linear(6, w) for w in (16, 8, 12))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 4).transpose(1, 2)
        k = self.k(x).view(b, n, 2, 4).transpose(1, 2)
        v = self.v(x).view(b, n, 2, 6).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self.options)
        return out.transpose(1, 2).flatten(2)[..., :6] + x


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
def test_networks_take_the_kernels(through: bool, mask: str, monkeypatch: Any) -> None:
    """Value, tangent and gradients are torch's own."""
    n = 5
    options: dict[str, Any] = {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": torch.ones(n, n, dtype=torch.bool).tril()},
        "added": {"attn_mask": torch.randn(3, 1, n, n, dtype=F64)},
    }[mask]
    net = Attends(**options).double()
    x, v = torch.randn(3, n, 6, dtype=F64), torch.randn(3, n, 6, dtype=F64)
    t = torch.zeros(3, dtype=F64)
    calls: list[int] = []
    kernel = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    out = fewstep.jvp(net, (x, t), (v, None), through=through, engine="duals", check="never")
    assert calls == [1]
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(lambda y: net(y, t), (x,), (v,))
    torch.testing.assert_close(out.value, value)
    torch.testing.assert_close(out.tangent, tangent)
    assert out.tangent.requires_grad == through
    loss, right = out.value.square().sum(), value.square().sum()
    if through:
        loss, right = loss + out.tangent.square().sum(), right + tangent.square().sum()
    parameters = list(net.parameters())
    for a, b in zip(*(torch.autograd.grad(z, parameters) for z in (loss, right)), strict=True):
        torch.testing.assert_close(a, b)
