"""Jacobian-vector products against float64 of torch's own, by every engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fewstep
import fewstep.func
from support import velocity_nets
from tolerances import assert_contract, assert_no_worse_than_eager

F32, F64 = torch.float32, torch.float64
ENGINES = ("duals", "func", "reverse")
# Of torch.func.jvp, when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


class Sinusoids(nn.Module):
    """Of a time `[B]`, up to 1000 radians."""

    def __init__(self, width: int, outer: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.outer = outer

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(1e4) * torch.arange(8, dtype=t.dtype) / 8)
        angle = torch.outer(1000 * t, rates) if self.outer else 1000 * t[:, None] * rates[None]
        return self.net(torch.cat([angle.sin(), angle.cos()], -1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, d: int = 4, width: int = 16) -> None:
        super().__init__()
        self.time, self.span = Sinusoids(width, True), Sinusoids(width, False)
        self.first, self.last = nn.Linear(d + 1, width), nn.Linear(width, d)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        c = self.time(t) + self.span(t - r)
        h = F.silu(self.first(torch.cat([x, t[:, None]], 1)) + c)
        return self.last(self.norm(h) * (1 + c)) * t.view(-1, 1)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, i: int, o: int, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.GroupNorm(2, i), nn.GroupNorm(2, o)
        self.c, self.d = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.time, self.skip = nn.Linear(width, 2 * o), nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.time(c)[:, :, None, None].chunk(2, 1)
        h = self.b(self.c(F.silu(self.a(x)))) * (1 + scale) + shift
        return self.skip(x) + self.d(F.silu(h))  # type: ignore[no-any-return]


class UNet(nn.Module):
    def __init__(self, channels: int = 2, width: int = 4) -> None:
        super().__init__()
        self.time, self.span = Sinusoids(8, True), Sinusoids(8, False)
        self.first, self.last = (
            nn.Conv2d(channels, width, 3, padding=1),
            nn.Conv2d(width, channels, 3, padding=1),
        )
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.a, self.b = Block(width, width, 8), Block(2 * width, 2 * width, 8)
        self.c, self.norm = Block(3 * width, width, 8), nn.GroupNorm(2, width)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        c = self.time(t) + self.span(t - r)
        high = self.a(self.first(x), c)
        low = F.interpolate(self.b(self.down(high), c), scale_factor=2)
        h = self.c(torch.cat([low, high], 1), c)
        return self.last(F.silu(self.norm(h)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A block with adaLN, QK norm, rotary embeddings and a context."""

    def __init__(self, d: int = 3, width: int = 8) -> None:
        super().__init__()
        self.time, self.span = Sinusoids(width, False), Sinusoids(width, True)
        self.first, self.last = nn.Linear(d, width), nn.Linear(width, d)
        self.modulation, self.qkv = nn.Linear(width, 6 * width), nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.second, self.heads = nn.RMSNorm(width), nn.RMSNorm(width // 2)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )

    def rotated(self, z: Tensor) -> Tensor:
        pairs = z.shape[-1] // 2
        places = torch.arange(z.shape[-2], dtype=z.dtype)[:, None]
        angle = places * torch.exp(-torch.arange(pairs, dtype=z.dtype))
        a, b = self.heads(z).chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        h = self.first(x)
        batch, tokens, width = h.shape
        c = self.modulation(F.silu(self.time(t) + self.span(t - r)))[:, None].chunk(6, -1)
        z = self.norm(h) * (1 + c[0]) + c[1]
        q, k, v = self.qkv(z).view(batch, tokens, 3, 2, width // 2).permute(0, 2, 3, 1, 4).unbind(1)
        a = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)
        h = h + c[2] * self.out(a.transpose(1, 2).reshape(batch, tokens, width))
        h = h + c[5] * self.mlp(self.second(h) * (1 + c[3]) + c[4])
        return self.last(h)  # type: ignore[no-any-return]


def no_span(net: Callable[[], nn.Module]) -> nn.Module:
    """A network of (x, t), as one of (x, t, r)."""

    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return self.net(x, t)  # type: ignore[no-any-return]

    return Ignoring()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (4,)),
    "unet": (UNet, (2, 4, 4)),
    "transformer": (Transformer, (5, 3)),
    "time mlp": (partial(no_span, partial(velocity_nets.TimeMLP, 4, 8, 3, nn.Softplus)), (4,)),
    "film": (partial(no_span, partial(velocity_nets.Film, 4, 8)), (4,)),
    "convolutions": (partial(no_span, partial(velocity_nets.Convolutions, 2, 4)), (2, 4, 4)),
    "attention": (partial(no_span, partial(velocity_nets.Attention, 4, 8, True)), (5, 4)),
}


@dataclass
class Problem:
    """A network, its inputs, tangents in all of them, and weights of a loss, in float64."""

    net: nn.Module
    inputs: tuple[Tensor, ...]
    tangents: tuple[Any, ...]
    w: Tensor

    def to(self, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Any, ...]]:
        own = [z.to(dtype).requires_grad_() for z in self.inputs]
        tangents = [u.to(dtype) if isinstance(u, Tensor) else u for u in self.tangents]
        return self.net.to(dtype), tuple(own), tuple(tangents)

    def exact(self, through: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Value and tangent by forward mode, gradients by reverse mode twice."""
        net, inputs, tangents = self.to(F64)
        full = tuple(
            u if isinstance(u, Tensor) else torch.full_like(x, u)
            for x, u in zip(inputs, tangents, strict=True)
        )
        with sdpa_kernel(SDPBackend.MATH):
            value, tangent = torch.func.jvp(net, inputs, full)
            loss = (net(*inputs) * self.w).sum()
            if through:
                rows = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
                pairs = zip(rows, full, strict=True)
                loss = loss + sum((row * u).sum() for row, u in pairs if row is not None)
            leaves = [*inputs, *net.parameters()]
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return value.detach(), tangent.detach(), _filled(grads, leaves)


def _filled(grads: Any, leaves: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(z) if g is None else g for g, z in zip(grads, leaves, strict=True)]


def problem(name: str, batch: int = 6) -> Problem:
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().to(F64)
    x, v, w = (torch.randn(batch, *shape, dtype=F64).to(F32).to(F64) for _ in range(3))
    t = torch.rand(batch).to(F64)
    r = t * torch.rand(batch).to(F64)
    return Problem(net, (x, t, r), (v, 1.0, -0.5), w)


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads])


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
        found = _filled(torch.autograd.grad(loss, leaves, allow_unused=True), leaves)
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
            pair.append(flat(_filled(found, leaves)))
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


def net_of(*widths: int, norm: type[nn.Module] | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), *([norm(o)] if norm else []), nn.SiLU()]
    return nn.Sequential(*layers[:-1], nn.Linear(widths[-1], widths[0])).double()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def right(
    network: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    **options: Any,
) -> fewstep.Jvp:
    """What `jvp` returns, if it agrees with torch's forward mode."""
    out = fewstep.jvp(network, inputs, tangents, **options)
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(network, inputs, tangents)
    assert_contract("gradient", out.value, value.detach())
    assert_contract("gradient", out.tangent, tangent.detach())
    return out


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
    assert_contract("gradient", flat(_filled(found, leaves)), flat(_filled(exact, leaves)))


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


def test_tangents_of_a_context_by_position_and_plain_ones_by_name() -> None:
    net, x, c, w = net_of(4, 8), rows(5, 4), rows(5, 3, 4), rows(5, 4)

    def network(x: Tensor, c: Tensor, label: int, *, weight: Tensor) -> Tensor:
        h = F.scaled_dot_product_attention(net(x)[:, None], c, c)[:, 0]
        return h * weight * label

    out = fewstep.jvp(network, (x, c, 2), (w, c.sin(), None), kwargs={"weight": w})
    assert (out.engine, out.info) == ("duals", "")
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(lambda x, c: network(x, c, 2, weight=w), (x, c), (w, c.sin()))[1]
    assert_contract("gradient", out.tangent, exact.detach())
    only = fewstep.jvp(network, (x, c, 2), (None, c.sin(), None), kwargs={"weight": w})
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(lambda c: network(x, c, 2, weight=w), (c,), (c.sin(),))[1]
    assert_contract("gradient", only.tangent, exact.detach())


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_are_not_changed(engine: str) -> None:
    x, t, v = rows(5, 4), torch.rand(5, dtype=F64), rows(5, 4)
    before = x.clone(), t.clone()

    def network(x: Tensor, t: Tensor) -> Tensor:
        t *= 1000
        x.mul_(2)
        return (x * t[:, None]).sin()

    out = fewstep.jvp(network, (x, t), (v, None), engine=engine)
    assert torch.equal(x, before[0])
    assert torch.equal(t, before[1])
    angle = 2000 * x * t[:, None]
    assert_contract("gradient", out.tangent, angle.cos() * 2000 * t[:, None] * v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_few_bits(dtype: torch.dtype) -> None:
    net, x, v = net_of(4, 8, norm=nn.LayerNorm), rows(5, 4), rows(5, 4)
    exact = torch.func.jvp(net, (x,), (v,))[1].detach()
    net = net.to(dtype)
    for through in (False, True):
        out = fewstep.jvp(lambda x: net(x.to(dtype)), (x.float(),), (v.float(),), through=through)
        assert (out.engine, out.tangent.dtype) == ("func" if through else "duals", dtype)
        assert (out.tangent.double() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("through", [False, True])
def test_autocast(through: bool) -> None:
    """Duals have no rules under it; what serves has the value and the gradients of a plain call."""
    net, x, v = net_of(4, 8, norm=nn.LayerNorm), rows(5, 4), rows(5, 4)
    exact = torch.func.jvp(net, (x,), (v,))[1].detach()
    net, x, v = net.float(), x.float(), v.float()
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = fewstep.jvp(net, (x,), (v,), through=through), net(x)
    assert out.engine != "duals"
    assert "autocast" in out.info
    assert (out.tangent.double() - exact).norm() < 0.05 * exact.norm()
    pair = [
        flat(list(torch.autograd.grad(value.float().square().sum(), list(net.parameters()))))
        for value in (out.value, plain)
    ]
    assert (pair[0] - pair[1]).norm() < 0.05 * pair[1].norm()


def test_empty_batches_and_tangents_of_a_network() -> None:
    net, inputs, tangents = problem("mlp").to(F64)
    none = tuple(z[:0].detach() for z in inputs)
    assert fewstep.jvp(net, none, (none[0], 1.0, None)).tangent.shape == (0, 4)
    v = tangents[0].clone().requires_grad_()
    assert not fewstep.jvp(net, inputs, (v, 1.0, None)).tangent.requires_grad
    out = fewstep.jvp(net, inputs, (v, 1.0, None), through=True)
    (found,) = torch.autograd.grad(out.tangent.sum(), v)
    (row,) = torch.autograd.grad(net(*inputs).sum(), inputs[0])
    assert_contract("gradient", found, row)


X, T = torch.zeros(6, 4), torch.zeros(6)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "count": (((X, T), (X,)), {}, "tangents must be 2, one for each input, got 1"),
    "shape": (((X, T), (X[:3], None)), {}, r"tangents\[0\] must be \(6, 4\).*got \(3, 4\)"),
    "dtype": (((X,), (X.double(),)), {}, r"tangents\[0\] must be torch.float32"),
    "integers": (((X, T.long()), (X, 1)), {}, r"inputs\[1\] is no floating tensor, got torch.int"),
    "number": (((X, 0.5), (X, 1.0)), {}, r"inputs\[1\] is no floating tensor, got float"),
    "no tangents": (((X, T), (None, None)), {}, "got None for each"),
    "K = 0": (((X,), (X.expand(0, 6, 4),)), {}, r"one at least, got \(0, 6, 4\)"),
    "axes": (((X, T), (X.expand(2, 6, 4), T)), {}, "the same axis K"),
    "counts": (((X, T), (X.expand(2, 6, 4), T.expand(3, 6))), {}, "the same axis K"),
    "engine": (((X,), (X,)), {"engine": "fast"}, "engine must be one of"),
    "check": (((X,), (X,)), {"check": "once"}, "check must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    given, options, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        fewstep.jvp(lambda *own: own[0], *given, **options)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="inputs must be a tuple, got Tensor"):
        fewstep.jvp(torch.sin, X, (X,))
    with pytest.raises(TypeError, match=r"tangents\[0\] must be a tensor, a number or None"):
        fewstep.jvp(torch.sin, (X,), ("x",))


@pytest.mark.parametrize(
    "network",
    [
        lambda x: x.long(),
        lambda x: None,
        lambda x: x.detach() * 2,
        lambda x: torch.no_grad()(torch.sin)(x + 1),
        lambda x: torch.from_numpy(x.detach().numpy() + 1),
        lambda x: object(),
    ],
)
@pytest.mark.filterwarnings("ignore:jvp")
def test_networks_without_a_derivative(network: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match="network must"):
        fewstep.jvp(network, (rows(6, 4),), (rows(6, 4),))


def test_a_network_that_does_not_see_an_input() -> None:
    x, t = rows(6, 4), torch.rand(6, dtype=F64)
    for engine in ENGINES:
        out = fewstep.jvp(lambda x, t: x.sin(), (x, t), (None, 1.0), engine=engine)
        assert torch.equal(out.tangent, torch.zeros_like(x))


def test_with_the_signature_of_torch_func() -> None:
    net, inputs, _ = problem("mlp").to(F64)
    ones = tuple(map(torch.ones_like, inputs))
    value, tangent = fewstep.func.jvp(net, inputs, ones)
    expected = torch.func.jvp(net, inputs, ones)
    assert_contract("gradient", value, expected[0].detach())
    assert_contract("gradient", tangent, expected[1].detach())
    assert tangent.requires_grad

    def pair(*own: Tensor) -> tuple[Tensor, dict[str, Any]]:
        out = net(*own)
        return out, {"twice": 2 * out, "name": "aux"}

    value, tangent, aux = fewstep.func.jvp(pair, inputs, ones, has_aux=True)
    assert_contract("gradient", tangent, expected[1].detach())
    assert_contract("gradient", aux["twice"], 2 * value.detach())
    assert aux["name"] == "aux"
    with pytest.raises(RuntimeError):
        fewstep.func.jvp(lambda x: torch.ones(2), (inputs[0],), (ones[0],), strict=True)
    with pytest.raises(ValueError, match="must return a pair"):
        fewstep.func.jvp(net, inputs, ones, has_aux=True)


def test_the_average_velocity_is_its_own_target() -> None:
    """For Gaussian data the flow map is known, and with it the average velocity."""
    mean, deviation = 0.7, 0.6

    def sigma(t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * deviation**2 + t**2).sqrt()

    def average(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t, r = t[:, None], r[:, None]
        moved = (1 - r) * mean + sigma(r) / sigma(t) * (x - (1 - t) * mean)
        return (x - moved) / (t - r)

    t = torch.rand(8, dtype=F64) * 0.5 + 0.5
    r, x = t * 0.4, rows(8, 3)
    up = t[:, None]
    v = -mean + (up - (1 - up) * deviation**2) / sigma(up) ** 2 * (x - (1 - up) * mean)
    out = fewstep.meanflow_target(average, x, t, r, v)
    assert (out.engine, out.info) == ("duals", "")
    assert_contract("gradient", out.target, out.value)
    same = fewstep.meanflow_target(lambda x, t, r: x.sin(), x, t, t, v)
    assert torch.equal(same.target, v)
    for given, text in (
        ((x, t[:3], r, v), r"t must be a scalar or \(8,\), got \(3,\)"),
        ((x, t, r, v[:3]), r"v must be \(8, 3\)"),
    ):
        with pytest.raises(ValueError, match=text):
            fewstep.meanflow_target(average, *given)
    with pytest.raises(ValueError, match="network must return"):
        fewstep.meanflow_target(lambda x, t, r: x[:, 0], x, t, r, v)


def test_a_consistency_function_is_its_own_target() -> None:
    """For Gaussian data the consistency function is known; for others g is `cos(t) df/dt`."""
    s, own = 0.5, 0.8

    def sigma(t: Tensor) -> Tensor:
        return ((t.cos() * own) ** 2 + (t.sin() * s) ** 2).sqrt()

    def network(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        return (t.cos() - own / sigma(t)) * x / t.sin()

    t, x = torch.rand(8, dtype=F64) + 0.2, rows(8, 3)
    up = t[:, None]
    v = (s**2 - own**2) * up.sin() * up.cos() / sigma(up) ** 2 * x
    out = fewstep.scm_target(network, x, t, v)
    assert out.engine == "duals"
    assert_contract("gradient", out.target, out.value)

    net = net_of(3, 8)

    def other(x: Tensor, t: Tensor) -> Tensor:
        return net(x * t[:, None])  # type: ignore[no-any-return]

    def consistency(x: Tensor, t: Tensor) -> Tensor:
        return t.cos()[:, None] * x - t.sin()[:, None] * s * other(x / s, t)

    found = fewstep.scm_target(other, x, t, v, c=0.3)
    g = up.cos() * torch.func.jvp(consistency, (x, t), (v, torch.ones_like(t)))[1]
    exact = other(x / s, t) + g / (g.norm(dim=1, keepdim=True) + 0.3)
    assert_contract("gradient", found.target, exact.detach())
    none = fewstep.scm_target(other, x, t, v, c=0.3, warmup=0.0)
    g = -(up.cos() ** 2) * (s * none.value - v)
    exact = none.value + g / (g.norm(dim=1, keepdim=True) + 0.3)
    assert_contract("gradient", none.target, exact.detach())
    for options, text in (
        ({"data_std": 0.0}, "data_std"),
        ({"warmup": 2.0}, "warmup"),
        ({"c": 0.0}, "c "),
    ):
        with pytest.raises(ValueError, match=text):
            fewstep.scm_target(other, x, t, v, **options)
