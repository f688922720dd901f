"""Jacobian-vector products against float64 of torch's own, by every engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewstep
import fewstep.func
from support.jvp import (
    F32,
    F64,
    NETS,
    filled,
    flat,
    net_of,
    problem,
    right,
    rows,
)
from tolerances import assert_contract, assert_no_worse_than_eager

ENGINES = ("duals", "func", "reverse")
# Of torch.func.jvp, when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_values_tangents_and_gradients(name: str, through: bool, dtype: torch.dtype) -> None:
    own = problem(name)
    value, tangent, expected = own.exact(through)
    net, inputs, tangents = own.to(dtype)
    for engine in (None, *ENGINES):
        if engine == "func" and dtype == F32:
            continue
        out = fewstep.jvp(net, inputs, tangents, through=through, engine=engine)
        assert out.engine == (engine or "duals")
        assert out.info == "" or engine in ("func", "reverse")
        assert_contract("gradient", out.value, value)
        assert_contract("gradient", out.tangent, tangent)
        assert out.tangent.requires_grad is through
        loss = (out.value * own.w).sum()
        loss = loss + (out.tangent * own.w).sum() if through else loss
        leaves = [*inputs, *net.parameters()]
        found = filled(torch.autograd.grad(loss, leaves, allow_unused=True), leaves)
        assert_contract("gradient", flat(found), flat(expected))
        with torch.no_grad():
            out = fewstep.jvp(net, inputs, tangents, through=through, engine=engine)
        assert not out.value.requires_grad
        assert_contract("gradient", out.value, value)
        assert_contract("gradient", out.tangent, tangent)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("name", ["mlp", "unet", "transformer"])
def test_many_tangents_are_each_alone(name: str, through: bool, engine: str) -> None:
    own = problem(name, batch=3)
    net, inputs, (v, _, _) = own.to(F64)
    several = torch.stack([v, v.sin(), -2 * v]), 1.0, torch.randn(3, 3, dtype=F64)
    out = fewstep.jvp(net, inputs, several, through=through, engine=engine)
    assert out.tangent.shape == (3, *v.shape)
    options: dict[str, Any] = {"through": through, "engine": engine}
    alone = [
        fewstep.jvp(net, inputs, (several[0][k], 1.0, several[2][k]), **options) for k in range(3)
    ]
    assert_contract("gradient", out.tangent, torch.stack([a.tangent for a in alone]))
    if through:
        leaves = list(net.parameters())
        pair = []
        for t in (out.tangent, torch.stack([a.tangent for a in alone])):
            found = torch.autograd.grad(t.sin().sum(), leaves, allow_unused=True)
            pair.append(flat(filled(found, leaves)))
        assert_contract("gradient", *pair)


@pytest.mark.parametrize("name", ["mlp", "unet", "transformer"])
def test_nothing_of_a_constant_tangent_is_kept(name: str) -> None:
    net, inputs, tangents = problem(name).to(F32)

    def kept(call: Callable[[], Any]) -> int:
        sizes: dict[int, int] = {}

        def pack(z: Tensor) -> Tensor:
            sizes[z.untyped_storage()._cdata] = z.untyped_storage().nbytes()
            return z

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
            out = call()
        del out
        return sum(sizes.values())

    fewstep.jvp(net, inputs, tangents)
    own = kept(lambda: fewstep.jvp(net, inputs, tangents).value)
    through = kept(lambda: fewstep.jvp(net, inputs, tangents, through=True).tangent)
    plain = kept(lambda: net(*inputs))
    assert own <= plain
    assert through > 1.5 * plain


def test_embeddings_of_a_time_are_as_exact_as_eager_ones() -> None:
    torch.manual_seed(0)
    rates = 2 * math.pi * 16 * torch.randn(64)

    def features(t: Tensor) -> Tensor:
        angle = t[:, None] * rates.to(t.dtype)
        return torch.cat([angle.sin(), angle.cos()], 1)

    t = torch.rand(32)
    exact = torch.func.jvp(features, (t.double(),), (torch.ones(32, dtype=F64),))[1]
    eager = torch.func.jvp(features, (t,), (torch.ones(32),))[1]
    for through in (False, True):
        out = fewstep.jvp(features, (t,), (1.0,), through=through)
        assert out.engine == "duals"
        assert_no_worse_than_eager(out.tangent, eager, exact, scale=exact)


def test_scalar_times_that_a_network_expands() -> None:
    net, x = net_of(4, 8), rows(5, 4)
    t, one = torch.tensor(0.3, dtype=F64, requires_grad=True), torch.ones((), dtype=F64)

    def expands(x: Tensor, t: Tensor) -> Tensor:
        return net(x * t.expand(x.shape[0])[:, None])  # type: ignore[no-any-return]

    out = right(expands, (x, t), (x.cos(), one))
    assert out.engine == "duals"
    (found,) = torch.autograd.grad(out.value.sum(), t)
    assert_contract("gradient", found, torch.autograd.grad(expands(x, t).sum(), t)[0])
    assert "scalar" in right(expands, (x, t), (x, one), check="never").info
    many = fewstep.jvp(expands, (x, t), (torch.stack([x, x.cos()]), torch.ones(2, dtype=F64)))
    assert_contract("gradient", many.tangent[1], out.tangent)


@pytest.mark.parametrize("batch", [4, 40])
def test_scalar_times_that_a_network_uses_as_they_are(batch: int) -> None:
    """Four frequencies, or four samples: the same where the time has a row for each."""
    rates, one = torch.arange(1.0, 5.0, dtype=F64), torch.ones((), dtype=F64)
    x, t = rows(batch, 4), torch.tensor(0.3, dtype=F64)
    for network in (lambda x, t: x * torch.sin(t * rates), lambda x, t: (x * t).sin()):
        assert right(network, (x, t), (x, one)).engine == "func"


@dataclass
class Output:
    sample: Tensor
    steps: int = 3


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_structures(engine: str, through: bool) -> None:
    net, x, v = net_of(4, 8), rows(5, 4), rows(5, 4)
    expected = right(net, (x,), (v,))
    made: dict[str, Callable[[Tensor], Any]] = {
        "tuple": lambda y: (y, [2 * y, None]),
        "dict": lambda y: {"a": y, "b": (2 * y, "s")},
        "dataclass": lambda y: Output(y),
        "index": lambda y: (y, torch.arange(3), y.detach()),
    }
    for name, make in made.items():
        out = fewstep.jvp(lambda x, m=make: m(net(x)), (x,), (v,), engine=engine, through=through)
        value, tangent = out.value, out.tangent
        if name == "dataclass":
            assert (type(value), value.steps, type(tangent)) == (Output, 3, Output)
            value, tangent = (value.sample,), (tangent.sample,)
        elif name == "dict":
            assert (value["b"][1], list(tangent)) == ("s", ["a", "b"])
            value, tangent = (value["a"], value["b"]), (tangent["a"], tangent["b"])
        elif name == "tuple":
            assert value[1][1] is None
            assert isinstance(tangent[1], list)
        else:
            assert torch.equal(value[1], torch.arange(3))
            assert tangent[1] is None
            assert torch.equal(tangent[2], torch.zeros_like(v))
        assert_contract("gradient", value[0], expected.value.detach())
        assert_contract("gradient", tangent[0], expected.tangent)
        if name in ("tuple", "dict"):
            assert_contract("gradient", tangent[1][0], 2 * expected.tangent)
        assert value[0].requires_grad
        assert tangent[0].requires_grad is through


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        s = z.sigmoid()
        return g * (s + z * s * (1 - s))


def test_each_engine_serves_what_those_before_cannot() -> None:
    net, x, v = net_of(4, 8), rows(5, 4), rows(5, 4)
    out = right(lambda x: net(x).cumsum(1), (x,), (v,))
    assert (out.engine, out.info) == ("func", "torch.func: no rule for cumsum")
    out = fewstep.jvp(lambda x: Swish.apply(net(x)), (x,), (v,))
    assert out.engine == "reverse"
    assert "another grad mode" in out.info
    assert "setup_context" in out.info
    assert_contract(
        "gradient", out.tangent, torch.func.jvp(lambda x: F.silu(net(x)), (x,), (v,))[1].detach()
    )
    for engine in ("duals", "func"):
        with pytest.raises(ValueError, match=f"engine '{engine}' cannot serve"):
            fewstep.jvp(lambda x: Swish.apply(net(x)), (x,), (v,), engine=engine)


def test_batch_norm_in_training_is_differentiated_as_it_is() -> None:
    """Samples may depend on each other; statistics are updated once."""
    norm, x, v = nn.BatchNorm1d(4).double(), rows(6, 4), rows(6, 4)
    out = fewstep.jvp(norm, (x,), (v,))
    assert out.engine == "reverse"
    assert int(norm.num_batches_tracked) == 1
    plain = partial(F.batch_norm, running_mean=None, running_var=None, training=True)
    assert_contract("gradient", out.tangent, torch.func.jvp(plain, (x,), (v,))[1])


@pytest.mark.parametrize("engine", ["func", "reverse"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_gradients_through_tangents_of_norms(norm: type[nn.Module], engine: str) -> None:
    """Torch's own formulas have wrong ones."""
    net, x, v, w = net_of(4, 8, norm=norm), rows(6, 4), rows(6, 4), rows(6, 4)
    for m in net:
        if isinstance(m, nn.BatchNorm1d):
            m.running_mean = m.running_var = m.num_batches_tracked = None
    y = x.clone().requires_grad_()
    row = torch.autograd.grad(net(y), y, w, create_graph=True)[0]
    exact = torch.autograd.grad((row * v).sum(), [y, *net.parameters()], allow_unused=True)
    out = fewstep.jvp(net, (y,), (v,), through=True, engine=engine)
    found = torch.autograd.grad((out.tangent * w).sum(), [y, *net.parameters()], allow_unused=True)
    leaves = [y, *net.parameters()]
    assert_contract("gradient", flat(filled(found, leaves)), flat(filled(exact, leaves)))


class Normed(nn.Module):
    """A norm of x `[B, 6, *inner]`, shifted by the time first."""

    def __init__(self, kind: str, inner: tuple[int, ...], affine: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"eps": 1e-2, "affine": affine}
        own = {"eps": 1e-2, "elementwise_affine": affine}
        self.norm = {
            "group": lambda: nn.GroupNorm(2, 6, **options),
            "instance": lambda: nn.InstanceNorm2d(6, **options),
            "layer": lambda: nn.LayerNorm(inner, **own),
            "last": lambda: nn.LayerNorm(inner[-1], **own),
            "rms": lambda: nn.RMSNorm(inner[-1], **own),
        }[kind]()
        for w in self.norm.parameters():
            nn.init.normal_(w)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(x * x + t.sin()[:, None, None, None])
        return torch.tanh(h)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("inner", [(8, 9), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["group", "instance", "layer", "last", "rms"])
def test_norms_of_any_layout(
    kind: str, inner: tuple[int, ...], affine: bool, last: bool, capability: str
) -> None:
    if kind == "instance" and inner == (1, 1):
        pytest.skip("torch refuses it")
    torch.manual_seed(5)
    net = Normed(kind, inner, affine).double()
    x, t, v = torch.randn(3, 6, *inner), torch.rand(3), torch.randn(2, 3, 6, *inner)
    w = torch.randn(3, 6, *inner)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
        v = v.movedim(2, -1).contiguous().movedim(-1, 2)
    for through in (False, True):
        found = []
        for dtype in (F64, F32):
            own = [z.to(dtype) for z in (x, t)]
            leaf = own[0].requires_grad_()
            moved = v.to(dtype), torch.ones(2, 3, dtype=dtype)
            engine = "reverse" if dtype == F64 else "duals"
            out = fewstep.jvp(net.to(dtype), tuple(own), moved, through=through, engine=engine)
            loss = (out.value * w).sum()
            loss = loss + (out.tangent * w).sum() if through else loss
            leaves = [leaf, *net.parameters()]
            found.append((out.value, out.tangent, flat(torch.autograd.grad(loss, leaves))))
        for exact, actual in zip(*found, strict=True):
            assert_contract("gradient", actual.detach(), exact.detach())


@pytest.mark.parametrize("through", [False, True])
def test_another_branch_for_stand_ins_is_seen(through: bool) -> None:
    x, v = rows(5, 4), rows(5, 4)

    def network(x: Tensor) -> Tensor:
        return x.sin() if type(x) is Tensor else x.cos()

    with pytest.warns(RuntimeWarning, match="jvp: duals and plain autograd disagree"):
        out = fewstep.jvp(network, (x,), (v,), through=through)
    assert out.engine == "func"
    assert_contract("gradient", out.tangent, x.cos() * v)


def test_gradients_are_compared() -> None:
    """A rule whose tangents have no gradient."""

    def jvp(d: list[Any], x: Tensor) -> Tensor:
        return d[0] * x.detach().cos()

    sine = fewstep.register_rule(lambda x: x.sin(), jvp, example=[rows(3, 2)])
    x, v = rows(5, 4).requires_grad_(), rows(5, 4)
    assert fewstep.jvp(sine, (x,), (v,)).engine == "duals"
    with pytest.warns(RuntimeWarning, match="a gradient"):
        out = fewstep.jvp(sine, (x,), (v,), through=True)
    (found,) = torch.autograd.grad(out.tangent.sum(), x)
    assert_contract("gradient", found, (-x.sin() * v).detach())


def test_checks() -> None:
    x, v = rows(5, 4), rows(5, 4)
    calls: list[int] = []

    def network(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()

    def called(**options: Any) -> int:
        calls.clear()
        fewstep.jvp(network, (x,), (v,), **options)
        return len(calls)

    assert called(check="never") == 1
    assert called() > 1
    assert called() == 1
    assert called(check="always") > 1


def test_random_masks_are_those_of_a_plain_call() -> None:
    net, x, v = nn.Sequential(net_of(4, 8), nn.Dropout(0.4)), rows(5, 4), rows(5, 4)
    for engine in ENGINES:
        torch.manual_seed(3)
        expected = net(x)
        torch.manual_seed(3)
        out = fewstep.jvp(net, (x,), (v,), engine=engine)
        assert_contract("gradient", out.value, expected.detach())
        assert torch.equal(out.tangent == 0, out.value == 0)
    image = nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(3, 3, 1).double())
    assert fewstep.jvp(image, (rows(4, 3, 2, 2),), (rows(4, 3, 2, 2),)).engine == "duals"


@pytest.mark.parametrize("through", [False, True])
def test_checkpoints(through: bool) -> None:
    own = problem("mlp")
    net, inputs, tangents = own.to(F64)

    def around(*inputs: Tensor) -> Tensor:
        return checkpoint(net, *inputs, use_reentrant=False)  # type: ignore[no-any-return]

    pair = []
    for network in (around, net):
        out = fewstep.jvp(network, inputs, tangents, through=through)
        assert out.engine == "duals"
        loss = out.value.square().sum() + (out.tangent.square().sum() if through else 0)
        pair.append(flat(list(torch.autograd.grad(loss, list(net.parameters())))))
    assert_contract("gradient", *pair)


@pytest.mark.parametrize(
    ("name", "through"), [("mlp", False), ("mlp", True), ("unet", True), ("transformer", False)]
)
def test_compiled(name: str, through: bool) -> None:
    torch.compiler.reset()
    net, inputs, tangents = problem(name).to(F32)

    def step(*inputs: Tensor) -> tuple[Tensor, Tensor, str]:
        out = fewstep.jvp(net, inputs, tangents, through=through)
        return out.value, out.tangent, out.engine

    value, tangent, engine = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    expected = fewstep.jvp(net, inputs, tangents, through=through)
    assert engine == "duals"
    assert tangent.requires_grad is through
    parameters = list(net.parameters())
    pair = []
    for v, u in ((value, tangent), (expected.value, expected.tangent)):
        loss = v.square().sum() + (u.square().sum() if through else 0)
        pair.append(flat(list(torch.autograd.grad(loss, parameters))).double())
    assert_contract("gradient", tangent, expected.tangent.detach().double())
    assert_contract("gradient", pair[0].float(), pair[1])


def test_compiled_without_a_rule() -> None:
    torch.compiler.reset()
    net, x, v = net_of(4, 8), rows(5, 4), rows(5, 4)

    def step(x: Tensor, through: bool) -> tuple[Tensor, str]:
        out = fewstep.jvp(lambda x: net(x).cumsum(1), (x,), (v,), through=through)
        return out.tangent, out.info

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tangent, info = compiled(x, False)
    assert info == "torch.func: no rule for cumsum; not compared with plain autograd"
    assert_contract("gradient", tangent, step(x, False)[0])
    with pytest.raises(Exception, match="leave jvp outside of"):
        compiled(x, True)


def test_transforms_around_it() -> None:
    net, x, v = net_of(4, 8, norm=nn.LayerNorm), rows(5, 4), rows(5, 4)

    def tangent(x: Tensor, through: bool = False) -> Tensor:
        return fewstep.jvp(net, (x,), (v,), through=through).tangent  # type: ignore[no-any-return]

    both = torch.func.vmap(tangent)(torch.stack([x, 2 * x]))
    assert_contract("gradient", both[1].detach(), tangent(2 * x))
    inner = torch.func.grad(lambda x: tangent(x, True).square().sum())(x)
    y = x.clone().requires_grad_()
    (outer,) = torch.autograd.grad(tangent(y, True).square().sum(), y)
    assert_contract("gradient", inner.detach(), outer)
    value = torch.func.grad(lambda x: fewstep.jvp(net, (x,), (v,)).value.square().sum())(x)
    (plain,) = torch.autograd.grad(net(y).square().sum(), y)
    assert_contract("gradient", value.detach(), plain)


def test_values_have_second_derivatives() -> None:
    own = problem("mlp")
    net, (x, t, r), (v, *rest) = own.to(F64)
    found = []
    for value in (fewstep.jvp(net, (x, t, r), (v, *rest)).value, net(x, t, r)):
        (row,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(row.square().sum(), x)[0])
    assert_contract("gradient", *found)
