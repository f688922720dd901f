"""Linear layers as one op: against the reference in float64, and when it is taken."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewstep
from fewstep.ops.dual import mlp, structural
from fewstep.ops.dual.program import Program, record
from fewstep.ops.dual.source import Source
from fewstep.ops.dual.traced import UnsupportedError
from fewstep.ops.trace.inputs import make_key, make_keys
from fewstep.reference import dual as reference
from fewstep.reference.probe import probes
from support.velocity_nets import Film, Residual, TimeMLP
from tolerances import assert_contract

# batch, features before x, D, features after it, hidden widths, probes
SHAPES = [
    (1, 0, 1, 0, (1,), 1),
    (5, 1, 3, 0, (37, 4), 2),
    (70, 0, 33, 2, (65, 40), 1),
    (3, 2, 7, 1, (5, 6, 7), 9),
    (0, 0, 2, 1, (3, 3), 2),
    (2, 0, 4, 0, (1024, 33), 64),
]
Shape = tuple[int, int, int, int, tuple[int, ...], int]


def program(shape: Shape, dtype: torch.dtype, kind: str = "silu") -> Program:
    """Weights and shifts drawn, of the kinds that an op takes."""
    batch, low, d, right, widths, _ = shape
    sizes = (low + d + right, *widths, d)
    weights = tuple(torch.randn(b, a, dtype=dtype) / a**0.5 for a, b in itertools.pairwise(sizes))
    shapes = [(widths[0],), *[(batch, w) for w in widths[1:]], None]
    shifts = tuple(None if s is None else torch.randn(s, dtype=dtype) for s in shapes)
    n = len(widths)
    kinds, options = (reference.ACTIVATIONS.index(kind),) * n, (1.3, 20.0) * n
    x = torch.randn(batch, sizes[0], dtype=dtype)
    return Program(x, low, torch.Size((batch, d)), weights, shifts, kinds, options)


def live(p: Program, dtype: torch.dtype) -> tuple[Program, list[Tensor]]:
    """A copy that wants gradients, and its tensors."""

    def own(t: Tensor) -> Tensor:
        return t.detach().to(dtype).requires_grad_()

    p = replace(
        p,
        x=own(p.x),
        weights=tuple(map(own, p.weights)),
        shifts=tuple(None if s is None else own(s) for s in p.shifts),
    )
    return p, [p.x, *p.weights, *(s for s in p.shifts if s is not None)]


def source_of(shape: Shape, kind: str = "rademacher") -> Source:
    ids = torch.arange(shape[0]) * 7 + 3
    return Source("cpp", shape[-1], make_keys(5, 3)[5], ids, kind)


def expected(p: Program, source: Source) -> tuple[Tensor, Tensor]:
    """By the reference, in the dtype of `p`."""
    assert source.key is not None
    size = (source.count, *p.shape)
    v = probes(source.key, source.ids, size, source.kind, p.x.dtype)
    return reference.mlp_probes(p.x, p.low, p.weights, p.shifts, p.kinds, p.options, v)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_and_gradients(capability: str, shape: Shape, dtype: torch.dtype) -> None:
    source = source_of(shape)
    p = program(shape, dtype)
    exact, tensors64 = live(p, torch.float64)
    want = expected(exact, source)
    found = mlp.probe_products(p, source)
    trained, tensors = live(p, dtype)
    kept = mlp.probe_products(trained, source)
    g = [torch.randn_like(w) for w in want]
    grads = torch.autograd.grad(kept, tensors, [u.to(dtype) for u in g])
    grads64 = torch.autograd.grad(want, tensors64, g)
    for a, b, c in zip(found, kept, want, strict=True):
        assert a.shape == b.shape == c.shape
        if c.numel():
            assert_contract("value", a, c.detach())
            assert_contract("value", b.detach(), c.detach())
    for actual, right in zip(grads, grads64, strict=True):
        assert actual.shape == right.shape
        if right.numel() and shape[0]:
            assert_contract("gradient", actual, right)


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_every_activation_and_kind_of_probe(kind: str) -> None:
    shape = (9, 1, 5, 0, (33, 18), 3)
    source = source_of(shape, {"silu": "hadamard", "gelu": "gaussian"}.get(kind, "sphere"))
    p = program(shape, torch.float64, kind)
    for actual, right in zip(mlp.probe_products(p, source), expected(p, source), strict=True):
        assert_contract("value", actual, right)


@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s[4]) == 2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_trace(capability: str, shape: Shape, dtype: torch.dtype) -> None:
    p = program(shape, dtype)
    p64, _ = live(p, torch.float64)
    d = shape[2]
    eye = torch.eye(d, dtype=torch.float64)[:, None].expand(d, *p.shape)
    arguments = (p64.x, p64.low, p64.weights, p64.shifts, p64.kinds, p64.options)
    velocity, products = reference.mlp_probes(*arguments, eye)
    for cache in (None, {}):
        v, value = mlp.trace(p, cache)
        if v.numel():
            assert_contract("value", v, velocity.detach())
            assert_contract("value", value, products.sum(0).detach())


def test_second_derivatives() -> None:
    shape = (3, 1, 2, 0, (4, 3), 2)
    p, tensors = live(program(shape, torch.float64), torch.float64)
    source = source_of(shape)

    def outputs(*own: Tensor) -> tuple[Tensor, Tensor]:
        x, *rest = own
        shifts = tuple(None if s is None else rest[3 + i] for i, s in enumerate(p.shifts))
        return mlp.probe_products(replace(p, x=x, weights=tuple(rest[:3]), shifts=shifts), source)

    assert torch.autograd.gradcheck(outputs, tensors)
    assert torch.autograd.gradgradcheck(outputs, tensors)


def test_tiles_do_not_show() -> None:
    shape = (41, 0, 6, 1, (20, 20), 1)
    p = program(shape, torch.float32)
    p = replace(p, shifts=(p.shifts[0], None, None))
    whole = mlp.probe_products(p, source_of(shape))
    ids = torch.arange(41) * 7 + 3
    part = replace(p, x=p.x[17:23], shape=torch.Size((6, 6)))
    own = mlp.probe_products(part, replace(source_of(shape), ids=ids[17:23]))
    assert torch.equal(own[0], whole[0][17:23])
    assert torch.equal(own[1], whole[1][:, 17:23])


def test_what_is_recorded() -> None:
    x, t = torch.randn(4, 6), torch.rand(4)
    net = TimeMLP(6, 16, 3)
    p = record(lambda h, t: net(h, t), x, t)
    assert (p.low, len(p.weights), p.x.shape) == (0, 4, (4, 7))
    torch.testing.assert_close(mlp.probe_products(p, Source("cpp", 1, make_key(0)))[0], net(x, t))

    def images(h: Tensor, t: Tensor) -> Tensor:
        flat = torch.cat([t[:, None], h.flatten(1)], 1)
        hidden = torch.tanh(net.net[0](flat) + t[:, None])
        return net.net[6](hidden + 0.5).reshape(h.shape)

    with pytest.raises(UnsupportedError):  # a shift after an activation
        record(images, x.view(4, 1, 2, 3), t)
    with pytest.raises(UnsupportedError):
        record(Residual(6, 8), x, t)
    assert not mlp.serves(record(Film(6, 8), x, t))  # it has a gate
    assert not mlp.serves(record(lambda h, t: F.linear(h, torch.eye(6)), x, t))
    with pytest.raises(ValueError, match="velocity must return"):
        record(lambda h, t: nn.Linear(8, 3)(torch.tanh(nn.Linear(6, 8)(h))), x, t)


def test_weights_changed_in_place_are_refused() -> None:
    net, x = TimeMLP(3, 8, 3), torch.randn(4, 3)
    out = fewstep.divergence(net, x, 0.5, estimator="hutchinson")
    with torch.no_grad():
        net.net[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.value.sum().backward()


def test_raw_ops() -> None:
    shape = (3, 1, 2, 0, (4, 3), 2)
    p, _ = live(program(shape, torch.float64), torch.float64)
    fixed = (make_key(0), None, 2, 0)  # key, ids, count, kind
    ops = torch.ops.fewstep
    tests = ("test_schema", "test_faketensor")
    arguments = (*p.arguments(), *fixed, None, None, True)
    torch.library.opcheck(ops.mlp_probes, arguments, test_utils=tests)
    torch.library.opcheck(ops.mlp_trace, (*p.arguments(), None), test_utils=tests)
    velocity, dots, kept, last = ops.mlp_probes(*arguments)
    with pytest.raises(NotImplementedError, match="no derivatives"):
        velocity.sum().backward()
    own = [t.detach() for t in (velocity, dots)]
    wanted = [True, False, True, True, False, True, False]
    arguments = (*own, *p.arguments(), make_key(0), None, 0, last.detach(), kept.detach(), wanted)
    torch.library.opcheck(ops.mlp_backward, arguments, test_utils=tests)
    x, low, weights, shifts, kinds, options = p.arguments()
    deeper = (x, low, (*weights, weights[-1].new_ones(2, 2)), (*shifts, None))
    with pytest.raises(RuntimeError, match="three layers have such a trace, got 4"):
        ops.mlp_trace(*deeper, (*kinds, 0), (*options, 1.0, 20.0), None)
    with pytest.raises(RuntimeError, match="4 weights, 4 shifts, 2 activations"):
        ops.mlp_trace(*deeper, kinds, options, None)
    with pytest.raises(RuntimeError, match="weight 1 must take"):
        ops.mlp_trace(x, low, weights[::-1], shifts, kinds, options, None)
    with pytest.raises(RuntimeError, match="are not among the"):
        ops.mlp_trace(x, x.shape[1], weights, shifts, kinds, options, None)


@pytest.mark.parametrize("widths", [(9, 2, 8), (2, 9, 8), (9, 8, 2), (1, 9, 8, 7)], ids=str)
def test_exact_through_the_narrowest_layer(widths: tuple[int, ...]) -> None:
    sizes = (6, *widths, 5)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
    net = nn.Sequential(*layers[:-1]).double()
    x, t = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, dtype=torch.float64)

    def velocity(h: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(torch.cat([t[:, None], h], 1))
        return out

    found = []
    for backend in ("cpp", "reference"):
        out = fewstep.divergence(velocity, x, t, estimator="exact", backend=backend)
        loss = out.value.square().sum() + out.velocity.sum()
        found.append((out.value.detach(), *torch.autograd.grad(loss, list(net.parameters()))))
        assert out.estimator == f"exact ({min(widths) if backend == 'cpp' else 5} tangents)"
    for actual, right in zip(*found, strict=True):
        torch.testing.assert_close(actual, right)
    own = record(velocity, x, t)
    torch.testing.assert_close(structural.trace_by_bottleneck(own, "cpp", 1)[1], found[0][0])
