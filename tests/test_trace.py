"""`divergence`: against whole Jacobians in float64, its estimators' laws, and where it runs."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fewstep
from fewstep.reference import trace as reference
from fewstep.reference.probe import probes
from support.velocity_nets import Attention, Convolutions, Film, Residual, TimeMLP, Unknown
from tolerances import TANGENTS, assert_contract, error

F64 = torch.float64
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "two hidden layers": (lambda: TimeMLP(5, 7, 2), (4, 5)),
    "one hidden layer": (lambda: TimeMLP(5, 7, 1, nn.Tanh), (4, 5)),
    "three hidden layers": (lambda: TimeMLP(5, 7, 3, nn.Softplus), (4, 5)),
    "film": (lambda: Film(5, 6), (4, 5)),
    "residual": (lambda: Residual(5, 6), (4, 5)),
    "convolutions": (lambda: Convolutions(1, 4), (3, 1, 4, 4)),
    "attention": (lambda: Attention(3, 4), (2, 5, 3)),
    "causal attention": (lambda: Attention(3, 4, True), (2, 5, 3)),
    "unknown": (lambda: Unknown(4), (3, 4)),
}


def jacobians(net: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
    """`[B, D, D]`, differentiable."""

    def one(xi: Tensor, ti: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(  # type: ignore[no-any-return]
            lambda y: net(y[None], ti[None])[0].flatten(), xi, create_graph=True
        ).flatten(1)

    return torch.stack([one(xi, ti) for xi, ti in zip(x, t, strict=True)])


def case(name: str, dtype: torch.dtype = F64) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = NETS[name]
    return make().to(dtype), torch.randn(shape, dtype=dtype), torch.rand(shape[0], dtype=dtype)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("way", ["exact", "hutchinson", "hadamard", "auto"])
def test_value_and_gradients(name: str, backend: str | None, way: str) -> None:
    net, x, t = case(name)
    if name == "unknown" and backend is not None:
        pytest.skip("a named backend refuses it")
    x.requires_grad_()
    d = x[0].numel()
    options: dict[str, Any] = {
        "exact": {"estimator": "exact"},
        "hutchinson": {"estimator": "hutchinson", "probes": 3},
        "hadamard": {"estimator": "hutchinson", "probes": d, "probe": "hadamard"},
        "auto": {"probes": d},
    }[way]
    w, wv = torch.randn(x.shape[0], dtype=F64), torch.randn_like(x)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        J = jacobians(net, x, t)
        exact = J.diagonal(dim1=1, dim2=2).sum(1)
        if way == "hutchinson":
            v = probes(torch.zeros(3, dtype=torch.int64), None, (3, *x.shape), "rademacher", F64)
            exact = torch.einsum("kbi,bij,kbj->kb", v.flatten(2), J, v.flatten(2)).mean(0)
        velocity = net(x, t)
        inputs = [x, *net.parameters()]
        expected = torch.autograd.grad(
            (w * exact).sum() + (wv * velocity).sum(), inputs, allow_unused=True
        )
        out = fewstep.divergence(net, x, t, backend=backend, **options)
        found = torch.autograd.grad(
            (w * out.value).sum() + (wv * out.velocity).sum(), inputs, allow_unused=True
        )
        with torch.no_grad():
            plain = fewstep.divergence(net, x, t, backend=backend, **options)
    assert bool(out.info) == (name == "unknown" and "structural" not in out.estimator)
    torch.testing.assert_close(out.velocity, velocity, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.value, exact, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(plain.value, exact, rtol=1e-11, atol=1e-11)
    for actual, want in zip(found, expected, strict=True):
        assert (actual is None) == (want is None)
        if actual is not None:
            torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-10)
    if way != "hutchinson":
        assert out.estimator.startswith("exact")
        assert torch.equal(out.stderr, torch.zeros(x.shape[0], dtype=F64))


@pytest.mark.parametrize("name", NETS)
def test_float32_keeps_the_contract(name: str, capability: str) -> None:
    net, x, t = case(name, torch.float32)
    out = fewstep.divergence(net, x, t, estimator="exact")
    net64 = net.to(F64)
    with sdpa_kernel(SDPBackend.MATH):
        exact = jacobians(net64, x.double(), t.double()).diagonal(dim1=1, dim2=2).sum(1)
    assert_contract("value", out.value, exact.detach())


def test_which_networks_are_structural() -> None:
    for name, structural in (
        ("two hidden layers", True),
        ("one hidden layer", True),
        ("film", True),
        ("three hidden layers", False),
        ("residual", False),
        ("convolutions", False),
    ):
        net, x, t = case(name)
        used = fewstep.divergence(net, x, t, estimator="exact").estimator
        assert (used == "exact (structural)") == structural, name


def test_sequential_and_linear_are_structural() -> None:
    x = torch.randn(3, 2, 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Unflatten(1, (2, 2)))
    out = fewstep.divergence(net, x, 0.0, estimator="exact")
    torch.testing.assert_close(out.value, net[1].weight.trace().expand(3))


def test_second_derivatives() -> None:
    net, x, t = case("two hidden layers")
    x.requires_grad_()

    def value(x: Tensor, estimator: str) -> Tensor:
        return fewstep.divergence(net, x, t, estimator=estimator, probes=2).value

    for estimator in ("exact", "hutchinson"):
        assert torch.autograd.gradcheck(lambda x, e=estimator: value(x, e), x)
        assert torch.autograd.gradgradcheck(lambda x, e=estimator: value(x, e), x)


def linear_field(J: Tensor) -> nn.Module:
    """A field with Jacobian J that no one recognises as linear, `v = J x + 0 * sin`."""

    class Field(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return F.linear(x, J) + 0.0 * torch.sin(x)

    return Field()


def test_mean_and_variance_of_the_probes() -> None:
    """Rademacher `2 (|A|^2 - sum A_ii^2)`, Gaussian `2 |A|^2`, `A = (J + J') / 2`."""
    torch.manual_seed(3)
    J = torch.randn(6, 6, dtype=F64)
    A = (J + J.T) / 2
    n = 40_000
    x, t = torch.zeros(n, 6, dtype=F64), torch.zeros(n, dtype=F64)
    frobenius, diagonal = A.square().sum(), A.diagonal().square().sum()
    for probe, variance in (
        ("rademacher", 2 * (frobenius - diagonal)),
        ("gaussian", 2 * frobenius),
        ("hadamard", None),
        ("sphere", None),
    ):
        out = fewstep.divergence(
            linear_field(J), x, t, estimator="hutchinson", probe=probe, seed=11
        )
        spread = out.value.std() / math.sqrt(n)
        assert abs(out.value.mean() - J.trace()) < 4 * spread, probe
        if variance is not None:
            torch.testing.assert_close(out.value.var(), variance, rtol=0.05, atol=0)


def test_standard_error_is_that_of_the_mean() -> None:
    torch.manual_seed(3)
    J = torch.randn(6, 6, dtype=F64)
    n = 4000
    x, t = torch.zeros(n, 6, dtype=F64), torch.zeros(n, dtype=F64)
    out = fewstep.divergence(linear_field(J), x, t, estimator="hutchinson", probes=4)
    torch.testing.assert_close(out.stderr.square().mean(), out.value.var(), rtol=0.1, atol=0)
    single = fewstep.divergence(linear_field(J), x, t, estimator="hutchinson")
    assert single.stderr.isnan().all()


def test_sketches_are_unbiased_and_exact_on_low_rank() -> None:
    torch.manual_seed(0)
    low = torch.randn(12, 2, dtype=F64) @ torch.randn(2, 12, dtype=F64)
    full = torch.randn(12, 12, dtype=F64)
    x, t = torch.zeros(3000, 12, dtype=F64), torch.zeros(3000, dtype=F64)
    for estimator, count in (("hutch++", 9), ("xtrace", 8)):
        out = fewstep.divergence(
            linear_field(full), x, t, estimator=estimator, probes=count, probe="gaussian"
        )
        assert abs(out.value.mean() - full.trace()) < 4 * out.value.std() / math.sqrt(3000)
    out = fewstep.divergence(
        linear_field(low), x[:5], t[:5], estimator="hutch++", probes=9, probe="gaussian"
    )
    torch.testing.assert_close(out.value, low.trace().expand(5), rtol=1e-8, atol=1e-8)


SKETCHES: dict[str, dict[str, Any]] = {
    "hutch++": {"estimator": "hutch++", "probes": 6},
    "xtrace": {"estimator": "xtrace", "probes": 4},
}


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("low", ["zero layer", "zero", "rank one", "identity"])
def test_sketches_of_jacobians_of_low_rank(name: str, low: str) -> None:
    """No NaN, and gradients whose mean is that of the trace's."""
    torch.manual_seed(0)
    d, n = 8, 4000
    net = nn.Sequential(nn.Linear(d, 6), nn.Tanh(), nn.Linear(6, d)).to(F64)
    nn.init.zeros_(net[2].weight)
    one = torch.randn(d, 1, dtype=F64) @ torch.randn(1, d, dtype=F64)
    J = {"rank one": one, "identity": torch.eye(d, dtype=F64)}.get(low, torch.zeros_like(one))
    J.requires_grad_()
    velocity = net if low == "zero layer" else linear_field(J)
    leaf = net[2].weight if low == "zero layer" else J
    x = torch.randn(1, d, dtype=F64).expand(n, d)
    exact = fewstep.divergence(velocity, x[:1], 0.0, estimator="exact")
    (want,) = torch.autograd.grad(exact.value.sum(), leaf)
    y = x.clone().requires_grad_()
    out = fewstep.divergence(velocity, y, 0.0, probe="gaussian", **SKETCHES[name])
    off = (out.value - exact.value).detach()
    assert off.abs().mean() < 1e-12 or abs(off.mean()) < 4 * off.std() / math.sqrt(n)
    assert out.stderr.isfinite().all()
    assert torch.autograd.grad(out.value.sum(), y, retain_graph=True)[0].isfinite().all()
    parts = torch.stack(
        [torch.autograd.grad(v.mean(), leaf, retain_graph=True)[0] for v in out.value.chunk(50)]
    )
    error = 5 * parts.std(0) / math.sqrt(50) + 1e-12
    assert ((parts.mean(0) - want).abs() <= error).all()


def test_xtrace_where_probes_are_equal_is_hutchinson() -> None:
    J = torch.randn(4, 4, dtype=F64)
    v = torch.ones(2, 1, 4, dtype=F64)
    v[1] *= -1
    found = reference.xtrace(lambda u: u @ J.T, v)
    torch.testing.assert_close(found, J.sum().expand(2, 1))


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["duals", "torch.func", "autocast"])
def test_sketches_in_half_precision(name: str, dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(0)
    J = torch.eye(8) + 0.2 * torch.randn(8, 8)
    n = 1000
    x = torch.zeros(n, 8)
    low = mode != "autocast"
    J, x = (J.to(dtype), x.to(dtype)) if low else (J, x)
    twice = (lambda x: x.cumsum(1).diff(dim=1, prepend=x[:, :1] * 0)) if mode[0] == "t" else None
    field = lambda x, t: F.linear(x if twice is None else twice(x), J) + 0.0 * torch.sin(x)  # noqa: E731
    if low:
        out = fewstep.divergence(field, x, 0.0, **SKETCHES[name])
    else:
        with torch.autocast("cpu", dtype=dtype):
            out = fewstep.divergence(field, x, 0.0, **SKETCHES[name])
    assert out.value.dtype == out.stderr.dtype == torch.float32
    off = abs(out.value.double().mean() - J.double().trace())
    assert off < 4 * out.value.double().std() / math.sqrt(n) + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("engine", [None, "reverse"])
@pytest.mark.parametrize("draws", ["dropout", "noise"])
def test_sketches_are_of_one_network_whatever_it_draws(
    name: str, engine: str | None, draws: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=F64)
    drop = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).to(F64)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return drop(x) if draws == "dropout" else torch.sin(x) * torch.randn_like(x)

    def frozen(x: Tensor, t: Tensor) -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(7)
            return net(x, t)

    options: dict[str, Any] = {"engine": engine, **SKETCHES[name]}
    same = fewstep.divergence(frozen, x, 0.0, **options)
    fewstep.divergence(net, x, 0.0, **options)  # compared once
    torch.manual_seed(7)
    out = fewstep.divergence(net, x, 0.0, **options)
    after = torch.rand(1)
    torch.manual_seed(7)
    torch.testing.assert_close(out.velocity, net(x, torch.zeros(5)))
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(out.value, same.value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside forward mode
def test_chunks_and_tangents_are_of_one_network_whatever_it_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fewstep.ops.trace.estimator._CHUNK", 30)  # 2 tangents of 3
    x = torch.randn(5, 3, dtype=F64)

    def noisy(x: Tensor, t: Tensor) -> Tensor:
        return x * torch.randn(x.shape, dtype=F64)

    fewstep.divergence(noisy, x, 0.0, estimator="exact")  # compared once
    basis = torch.eye(3, dtype=F64)[:, None].expand(3, 5, 3).contiguous()
    for way in (0, 1):
        torch.manual_seed(7)
        if way:
            columns = reference.forward_products(noisy, x, torch.zeros(5), basis)[1]
            value = columns.diagonal(dim1=0, dim2=2).sum(1)
        else:
            out = fewstep.divergence(noisy, x, 0.0, estimator="exact")
            value = out.value
            assert out.info == ""
        after = torch.rand(1)
        torch.manual_seed(7)
        torch.testing.assert_close(value, torch.randn(x.shape, dtype=F64).sum(1))
        assert torch.equal(torch.rand(1), after)


def test_a_sample_has_the_same_value_in_any_batch() -> None:
    net, x, t = case("residual")
    ids = torch.tensor([7, 3, 2**40, 0])
    options: dict[str, Any] = {"estimator": "hutchinson", "probes": 2, "seed": 5}
    whole = fewstep.divergence(net, x, t, sample_ids=ids, **options)
    for part in ([0], [2, 1], [3]):
        own = fewstep.divergence(net, x[part], t[part], sample_ids=ids[part], **options)
        torch.testing.assert_close(own.value, whole.value[part], rtol=1e-13, atol=1e-13)
    other = fewstep.divergence(net, x, t, sample_ids=ids, **options | {"seed": 6})
    assert not torch.allclose(other.value, whole.value)


def test_auto_takes_what_costs_less() -> None:
    x, t = torch.randn(64, 8), torch.rand(64)
    assert fewstep.divergence(TimeMLP(8, 16, 2), x, t).estimator == "exact (structural)"
    deep = TimeMLP(8, 16, 3)
    assert fewstep.divergence(deep, x, t).estimator == "hutchinson"
    assert fewstep.divergence(deep, x, t, probes=8).estimator == "exact (8 tangents)"
    # One sample in many dimensions: the product of the outer weights costs more than a probe.
    wide = TimeMLP(512, 256, 2)
    assert fewstep.divergence(wide, torch.randn(1, 512), t[:1]).estimator == "hutchinson"


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", ["two hidden layers", "three hidden layers", "residual"])
def test_compiles_into_one_graph(name: str, estimator: str) -> None:
    net, x, t = case(name)
    seed = torch.tensor(3)

    def loss(x: Tensor, t: Tensor, seed: Tensor) -> Tensor:
        out = fewstep.divergence(net, x, t, estimator=estimator, probes=2, seed=seed)
        return (out.value * out.velocity.sum(1)).sum()

    torch._dynamo.reset()
    parameters = list(net.parameters())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for s in (seed, seed + 1):
        expected = torch.autograd.grad(loss(x, t, s), parameters)
        actual = torch.autograd.grad(compiled(x, t, s), parameters)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def _operators(x: Tensor, t: Tensor) -> Tensor:
    w = torch.ones(3, dtype=x.dtype) * 2
    a = (1 - x) + (w - x) + (x - 1) + (1 + x) * 2
    b = (w / x) + 1 / x + x / 2 + x**3 + 2**x - x % 2
    return a * b + abs(-x)


def _methods(x: Tensor, t: Tensor) -> Tensor:
    y = (x * 1).relu_() + x.clamp(-1, 1) + x.abs() + x.clone() * x.norm(dim=1, keepdim=True)
    y = y + torch.where(x > 0, x, 2 * x) + torch.stack([x, x * x], 1).sum(1)
    y = y + torch.stack(x.unbind(1), 1).exp() + torch.cat(x.chunk(3, 1), 1)
    y = y + torch.cat(x.split(1, 1), 1) ** 2 + x.view(-1, 1, 3).squeeze(1).reshape(x.shape)
    y = y + x.unflatten(1, (3, 1)).flatten(1)
    y *= 2
    y -= x
    return y


@pytest.mark.parametrize("velocity", [_operators, _methods])
def test_operators_compile(velocity: Callable[..., Tensor]) -> None:
    x = torch.tensor([[0.5, -0.3, 2.0], [1.5, 0.2, -0.7]], dtype=torch.float64)

    def run(x: Tensor) -> tuple[Tensor, Tensor, str]:
        out = fewstep.divergence(velocity, x, 0.5, estimator="exact")
        return out.velocity, out.value, out.info

    torch._dynamo.reset()
    *actual, note = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    *expected, info = run(x)
    assert (info, note) == ("", "not compared with plain autograd")
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("velocity", [lambda x, t: +x, lambda x, t: x ** (2 + 0 * t[:, None])])
def test_operators_without_a_rule_compile(velocity: Callable[..., Tensor]) -> None:
    x, t = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, dtype=torch.float64)

    def run(x: Tensor, t: Tensor) -> tuple[Tensor, str]:
        out = fewstep.divergence(velocity, x, t, estimator="exact")
        return out.value, out.info

    torch._dynamo.reset()
    actual, note = torch.compile(run, fullgraph=True, backend="aot_eager")(x, t)
    assert note.startswith("torch.func: no rule for")
    torch.testing.assert_close(actual, run(x, t)[0], rtol=1e-11, atol=1e-11)


class Twice(torch.autograd.Function):
    """2 x, without a derivative in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside forward mode
@pytest.mark.parametrize("estimator", ["exact", "hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_unknown_functions_under_checkpointing(estimator: str, reentrant: bool) -> None:
    net, x, t = case("unknown")
    x.requires_grad_()
    inputs = [x, *net.parameters()]
    infos = []

    def value(x: Tensor) -> Tensor:
        out = fewstep.divergence(net, x, t, estimator=estimator, probes=4)
        infos.append(out.info)
        return torch.cat([out.value[:, None], out.velocity], 1)

    sketch = estimator in ("hutch++", "xtrace") and not reentrant  # of J there, of J' outside
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda z: z, lambda z: z)
    with hooks if sketch else contextlib.nullcontext():
        plain = value(x)
        w = torch.randn_like(plain)
        expected = torch.autograd.grad((w * plain).sum(), inputs)
    again = checkpoint(value, x, use_reentrant=reentrant)
    assert isinstance(again, Tensor)
    torch.testing.assert_close(again, plain)
    (w * again).sum().backward()
    for p, want in zip(inputs, expected, strict=True):
        torch.testing.assert_close(p.grad, want)
    ways = ["torch.func: no rule for cumsum", "torch.autograd.forward_ad: no rule for cumsum"]
    assert infos[0] == ways[sketch]
    assert set(infos[1:]) == {ways[not reentrant]}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside forward mode
def test_no_forward_derivative_under_checkpointing() -> None:
    linear, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)

    def value(x: Tensor) -> Tensor:
        net = lambda x, t: Twice.apply(torch.cumsum(linear(x), -1))  # noqa: E731
        return fewstep.divergence(net, x, 0.3, estimator="exact").value.sum()

    expected = 4 * torch.cumsum(linear.weight, 0).trace()  # two samples
    torch.testing.assert_close(value(x), expected)
    (want,) = torch.autograd.grad(expected, linear.weight)
    for reentrant in (True, False):
        linear.weight.grad = None
        again = checkpoint(value, x, use_reentrant=reentrant)
        assert isinstance(again, Tensor)
        torch.testing.assert_close(again, expected)
        again.backward()
        torch.testing.assert_close(linear.weight.grad, want)


def test_activation_checkpointing() -> None:
    net, x, t = case("residual")

    def value(x: Tensor) -> Tensor:
        return fewstep.divergence(net, x, t, estimator="hutchinson", probes=2).value

    parameters = list(net.parameters())
    expected = torch.autograd.grad(value(x).sum(), parameters)
    again = checkpoint(value, x, use_reentrant=False)
    assert isinstance(again, Tensor)
    for a, b in zip(torch.autograd.grad(again.sum(), parameters), expected, strict=True):
        assert torch.equal(a, b)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        net, x, t = case("two hidden layers")
        wrapped = nn.parallel.DistributedDataParallel(net)
        for estimator in ("exact", "hutchinson"):
            net.zero_grad()
            out = fewstep.divergence(wrapped, x, t, estimator=estimator)
            (out.value.sum() + out.velocity.sum()).backward()
            found = [p.grad.clone() for p in net.parameters()]
            net.zero_grad()
            out = fewstep.divergence(net, x, t, estimator=estimator)
            (out.value.sum() + out.velocity.sum()).backward()
            for a, p in zip(found, net.parameters(), strict=True):
                torch.testing.assert_close(a, p.grad)
    finally:
        torch.distributed.destroy_process_group()


def saved(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `run` returns, and what it keeps for backward, once for each storage."""
    seen: dict[int, Tensor] = {}

    def pack(z: Tensor) -> Tensor:
        seen.setdefault(z.untyped_storage().data_ptr(), z)
        return z

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
        out = run()
    return out, list(seen.values())


def test_no_probe_is_kept_for_backward() -> None:
    """Saved: x, and the stack before and after each activation, twice what plain training keeps."""
    net = TimeMLP(64, 32, 2)
    x, t = torch.randn(16, 64), torch.rand(16)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def size(run: Callable[[], Tensor]) -> int:
        storages = [z.untyped_storage() for z in saved(run)[1]]
        return sum(s.nbytes() for s in storages if s.data_ptr() not in own)

    plain = size(lambda: net(x, t))
    ours = size(lambda: fewstep.divergence(net, x, t, estimator="hutchinson").value)
    hidden = 4 * 16 * 32 * 4  # bytes: four stacks of activations
    assert ours <= plain + hidden + 64


FIRST: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: Convolutions(3, 6), (4, 3, 4, 4)),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 48)), (4, 48)),
    "activation": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(48, 48)), (4, 48)),
    "tokens": (lambda: Attention(8, 6), (4, 6, 8)),
    "linear": (lambda: Residual(48, 7), (4, 48)),
}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("estimator", ["hutchinson", "exact"])
def test_no_network_keeps_the_stack_that_it_starts_with(name: str, estimator: str) -> None:
    """The gradients are those with the stack kept: where hooks are forbidden it is."""
    make, shape = FIRST[name]
    net, x, t = make().to(F64), torch.randn(shape, dtype=F64), torch.rand(4, dtype=F64)
    x.requires_grad_()
    inputs = [x, *net.parameters()]
    probes_ = 3 if estimator == "hutchinson" else 48

    if estimator == "exact":
        v = torch.eye(48, dtype=F64)[:, None].expand(-1, 4, -1)
    else:
        v = probes(torch.zeros(3, dtype=torch.int64), None, (3, 4, 48), "rademacher", F64)

    def drawn(z: Tensor) -> bool:
        return z.numel() >= v.numel() and torch.equal(z.flatten()[-v.numel() :], v.flatten())

    def value() -> Tensor:
        out = fewstep.divergence(net, x, t, estimator=estimator, probes=probes_)
        assert not out.info
        return out.value.square().sum()

    out, seen = saved(value)
    assert not any(map(drawn, seen))
    with torch.autograd.graph.disable_saved_tensors_hooks("none"):
        expected = torch.autograd.grad(value(), inputs, allow_unused=True)
    for again in (True, False):  # the graph is kept for a second backward
        found = torch.autograd.grad(out, inputs, allow_unused=True, retain_graph=again)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_stacks_are_made_again_under_hooks_and_checkpoints() -> None:
    make, shape = FIRST["convolution"]
    net, t = make().to(F64), torch.rand(4, dtype=F64)
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    ids = torch.tensor([7, 3, 2**40, 0])
    inputs = [x, *net.parameters()]

    def value(x: Tensor) -> Tensor:
        out = fewstep.divergence(net, x, t, estimator="hutchinson", probes=2, sample_ids=ids)
        return out.value.square().sum()

    expected = torch.autograd.grad(value(x), inputs)
    moved = 0

    def pack(z: Tensor) -> Tensor:
        nonlocal moved
        moved += 1
        return z.clone()

    def hooked(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
            return value(x)

    for way in (
        hooked,
        lambda x: checkpoint(value, x, use_reentrant=False),
        lambda x: checkpoint(value, x, use_reentrant=True),
    ):
        for p in inputs:
            p.grad = None
        way(x).backward()
        for p, want in zip(inputs, expected, strict=True):
            torch.testing.assert_close(p.grad, want)
    assert moved > 15  # hooks around ours get all that is kept
    checkpointed = saved(lambda: checkpoint(value, x, use_reentrant=False))[1]  # type: ignore[arg-type]
    assert len([p for p in checkpointed if p.numel() > 0]) <= 1

    def parts(x: Tensor) -> Tensor:
        return fewstep.divergence(net, x, t[:1], estimator="hutchinson").value

    own = torch.randn(1, 3, 2, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(parts, own)


@pytest.mark.parametrize("name", ["convolution", "norm"])
def test_inputs_changed_in_place_are_refused(name: str) -> None:
    make, shape = FIRST[name]
    net, x, t = make(), torch.randn(shape), torch.rand(4)
    for changed in (x, next(iter(net.parameters()))):
        out = fewstep.divergence(net, x, t, estimator="hutchinson", probes=2)
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="inplace"):
            out.value.sum().backward()
    grads = []
    for change in (0, 1):
        ids = torch.arange(4)
        out = fewstep.divergence(net, x, t, estimator="hutchinson", sample_ids=ids)
        ids += change
        grads.append(torch.autograd.grad(out.value.sum(), list(net.parameters())[:1]))
    assert torch.equal(*grads[0], *grads[1])


LOW = {"tangent_dtype": torch.bfloat16}


@pytest.fixture(params=["widened", "narrow"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a CPU multiplies tangents of bfloat16, and how a GPU does."""
    if request.param == "narrow":
        monkeypatch.setattr("fewstep.ops.dual.source.WIDENED", ())


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", [n for n in NETS if n != "unknown"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("estimator", ["exact", "hutchinson", "hutch++"])
def test_tangents_in_bfloat16(name: str, backend: str | None, estimator: str) -> None:
    net, x, t = case(name, torch.float32)
    options: dict[str, Any] = {"estimator": estimator, "probes": 3}
    found = []
    for low in (True, False):
        own = net if low else copy.deepcopy(net).double()
        y = x.to(torch.float32 if low else F64).requires_grad_()
        more: dict[str, Any] = {"backend": backend, **LOW} if low else {"backend": "reference"}
        out = fewstep.divergence(own, y, t.to(y.dtype), **options, **more)
        loss = out.value.sum() + out.velocity.square().sum()
        inputs = [y, *own.parameters()]
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(grads[0].square().sum(), y)[0]
        found.append((out, [*grads, second]))
    (out, grads), (exact, grads64) = found
    assert out.value.dtype == out.velocity.dtype == torch.float32
    assert out.estimator == exact.estimator
    plain = fewstep.divergence(net, x, t, **options, backend=backend).velocity
    torch.testing.assert_close(out.velocity, plain)
    with sdpa_kernel(SDPBackend.MATH):
        J = jacobians(copy.deepcopy(net).double(), x.detach().double(), t.double())
    scale = math.sqrt(x[0].numel()) * J.flatten(1).norm(dim=1)
    assert error("value", out.value, exact.value, scale) <= TANGENTS["value"]
    assert all(a is None or a.dtype == torch.float32 for a in grads)
    assert [a is None for a in grads] == [b is None for b in grads64]
    if estimator == "hutch++":  # which is continuous in J, but of rounded products of its own
        grads, grads64 = grads[:-1], grads64[:-1]
    first, right = (
        torch.cat([g.detach().flatten() for g in own if g is not None]) for own in (grads, grads64)
    )
    assert error("gradient", first, right) <= TANGENTS["gradient"]


def test_tangents_in_bfloat16_are_unbiased() -> None:
    net, x, t = case("residual", torch.float32)
    n = 20_000
    y, s = x[:1].expand(n, -1), t[:1].expand(n)
    exact = fewstep.divergence(net, x[:1], t[:1], estimator="exact").value.detach()
    for probe in ("rademacher", "gaussian"):
        with torch.no_grad():
            out = fewstep.divergence(net, y, s, estimator="hutchinson", probe=probe, **LOW)
        off = (out.value.double().mean() - exact).abs()
        assert off < 4 * out.value.std() / math.sqrt(n) + 2**-9 * exact.abs()


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", FIRST)
def test_tangents_in_bfloat16_take_half_for_backward(name: str) -> None:
    make, shape = FIRST[name]
    net, x, t = make(), torch.randn(shape), torch.rand(4)
    weights = {p.shape for p in net.parameters()}

    def run(**options: Any) -> tuple[int, list[Tensor]]:
        seen = saved(
            lambda: (
                fewstep.divergence(net, x, t, estimator="hutchinson", probes=16, **options).value
            )
        )[1]
        seen = [z for z in seen if z.shape not in weights and z.shape[::-1] not in weights]
        return sum(z.untyped_storage().nbytes() for z in seen), seen

    whole, (half, seen) = run()[0], run(**LOW)
    assert half < 0.56 * whole + 512  # 16 tangents at half and the primal
    v = probes(torch.zeros(3, dtype=torch.int64), None, (16, 4, 48), "rademacher", torch.bfloat16)
    assert not any(z.shape[:1] == (64,) and torch.equal(z.flatten(), v.flatten()) for z in seen)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", ["three hidden layers", "residual", "convolutions"])
def test_tangents_in_bfloat16_compile_and_checkpoint(name: str) -> None:
    net, x, t = case(name, torch.float32)
    parameters = [p for p in net.parameters() if p.requires_grad]

    def loss(x: Tensor) -> Tensor:
        out = fewstep.divergence(net, x, t, estimator="hutchinson", probes=2, **LOW)
        return (out.value * out.velocity.flatten(1).sum(1)).sum()

    def grads(value: Tensor) -> tuple[Tensor | None, ...]:
        return value.detach(), *torch.autograd.grad(value, parameters, allow_unused=True)

    expected = grads(loss(x))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    ways = (compiled(x), checkpoint(loss, x, use_reentrant=False))
    for way in ways:
        assert isinstance(way, Tensor)
        for a, b in zip(grads(way), expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None and b.norm() > 1e-6:
                assert error("gradient", a, b) <= TANGENTS["gradient"]

    def value(xi: Tensor) -> Tensor:
        return fewstep.divergence(net, xi[None], t[:1], estimator="exact", **LOW).value[0]

    gradient = torch.func.vmap(torch.func.grad(value))(x.detach()[:2])
    out = fewstep.divergence(net, x[:2], t[:1].expand(2), estimator="exact").value.sum()
    right = torch.autograd.grad(out, x)[0][:2]
    assert error("gradient", gradient, right) <= TANGENTS["gradient"]


def test_unknown_functions_fall_back_and_say_so() -> None:
    net, x, t = case("unknown")
    for estimator, probes_ in (("exact", 1), ("hutchinson", 2), ("hutch++", 6), ("xtrace", 4)):
        out = fewstep.divergence(net, x, t, estimator=estimator, probes=probes_)
        assert out.info == "torch.func: no rule for cumsum"
    for backend in ("cpp", "reference"):
        with pytest.raises(ValueError, match="cannot serve this velocity: no rule for cumsum"):
            fewstep.divergence(net, x, t, estimator="exact", backend=backend)


def test_a_function_that_mixes_samples_is_refused() -> None:
    x, t = torch.randn(4, 3), torch.rand(4)
    for velocity in (
        lambda x, t: x - x.mean(0, keepdim=True),
        lambda x, t: x[torch.tensor([1, 0, 2, 3])],
        lambda x, t: x.transpose(0, 1).transpose(0, 1),
        lambda x, t: torch.cat([x[:, :1], x[:, 1:]], 0),
        lambda x, t: x if x.sum(1) else -x,
    ):
        refusals = r"no rule|mixes samples|Sizes of tensors|is ambiguous"  # the last two: eager's
        with pytest.raises((ValueError, RuntimeError), match=refusals):
            fewstep.divergence(velocity, x, t, estimator="hutchinson", backend="cpp")


def test_values_shared_by_two_branches() -> None:
    """A pending bias is added once for each that reads it, whatever the order."""
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        h = a(x)
        u = h + t[:, None]
        return h * h + F.silu(u) + b(F.silu(h)) + u - torch.tanh(h) + h

    x, t = torch.randn(4, 3, dtype=F64), torch.rand(4, dtype=F64)
    exact = jacobians(velocity, x, t).diagonal(dim1=1, dim2=2).sum(1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = fewstep.divergence(velocity, x, t, estimator="exact", backend="cpp")
        torch.testing.assert_close(out.value, exact)
        torch.testing.assert_close(out.velocity, velocity(x, t))


def test_inside_transforms() -> None:
    net, x, t = case("three hidden layers")

    def value(xi: Tensor) -> Tensor:
        return fewstep.divergence(net, xi[None], t[:1], estimator="exact").value[0]

    x.requires_grad_()
    expected = torch.autograd.grad(
        fewstep.divergence(net, x, t[:1].expand(4), estimator="exact").value.sum(), x
    )[0]
    found = torch.func.vmap(torch.func.grad(value))(x.detach())
    torch.testing.assert_close(found, expected)


def test_strided_expanded_empty() -> None:
    net = TimeMLP(4, 8, 2).double()
    x = torch.randn(4, 6, dtype=F64).T[:, :4]
    t = torch.rand(1, dtype=F64).expand(6)
    for estimator in ("exact", "hutchinson"):
        out = fewstep.divergence(net, x, t, estimator=estimator)
        same = fewstep.divergence(net, x.contiguous(), t.contiguous(), estimator=estimator)
        torch.testing.assert_close(out.value, same.value)
        empty = fewstep.divergence(net, x[:0], t[:0], estimator=estimator)
        assert empty.value.shape == (0,)
        assert empty.velocity.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"estimator": "magic"}, ValueError, "estimator must be one of"),
        ({"probe": "uniform"}, ValueError, "probe must be one of"),
        ({"probes": 0}, ValueError, "probes must be an integer from 1"),
        ({"probes": 6, "probe": "hadamard"}, ValueError, "probes must be at most D = 5"),
        (
            {"estimator": "xtrace", "probes": 4, "probe": "hadamard"},
            ValueError,
            "another than 'hadamard' for 'xtrace'",
        ),
        ({"estimator": "hutch++", "probes": 2}, ValueError, "at least 3 for 'hutch"),
        ({"estimator": "xtrace", "probes": 5}, ValueError, "must be even"),
        ({"t": math.nan}, ValueError, "t must be finite"),
        ({"t": torch.full((4,), math.inf, dtype=F64)}, ValueError, "t must be finite"),
        ({"t": torch.zeros(3)}, ValueError, "t must be a scalar or"),
        ({"x": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "x must have a floating dtype"),
        ({"x": torch.zeros(4)}, ValueError, "x must be"),
        ({"sample_ids": torch.zeros(4)}, TypeError, "sample_ids must be int64"),
        ({"sample_ids": torch.arange(3)}, ValueError, "sample_ids must be"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"seed": torch.zeros(())}, TypeError, "seed must be an int64 scalar"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot serve"),
        ({"tangent_dtype": torch.bfloat16}, ValueError, "tangent_dtype must be .* torch.float64"),
        ({"tangent_dtype": torch.float16}, ValueError, "tangent_dtype must be .* torch.float16"),
        ({"velocity": lambda x, t: x[:, :2]}, ValueError, "velocity must return"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    net, x, t = case("two hidden layers")
    arguments: dict[str, Any] = {"velocity": net, "x": x, "t": t} | change
    with pytest.raises(error, match=message):
        fewstep.divergence(
            arguments.pop("velocity"), arguments.pop("x"), arguments.pop("t"), **arguments
        )


def test_reference_is_differentiable_twice() -> None:
    net, x, t = case("one hidden layer")
    x.requires_grad_()

    def value(x: Tensor) -> Tensor:
        basis = torch.eye(x[0].numel(), dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
        rows = reference.transposed_products(net, x, t, basis.expand(-1, *x.shape))[1]
        return rows.flatten(2).diagonal(dim1=0, dim2=2).sum(1)

    assert torch.autograd.gradcheck(value, x)
    assert torch.autograd.gradgradcheck(value, x)


@pytest.mark.parametrize(
    "divisor", [torch.tensor([3]), torch.tensor(3), torch.tensor([0.1])], ids=str
)
def test_division_is_not_rounded_to_the_dtype_of_the_divisor(divisor: Tensor) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    out = fewstep.divergence(lambda x, t: x * x / divisor, x, 0.0, estimator="exact")
    assert torch.allclose(out.velocity, x * x / divisor, rtol=1e-15, atol=0)
    assert torch.allclose(out.value, (2 * x / divisor.double()).sum(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("estimator", ["hutch++", "xtrace"])
def test_as_many_products_as_dimensions_are_all_of_them(estimator: str) -> None:
    """Leaving out one of few signs is no draw of its own: the mean would be off."""
    x = torch.randn(5, 4, dtype=F64)
    out = fewstep.divergence(lambda x, t: x, x, 0.0, estimator=estimator, probes=4)
    assert out.value.tolist() == [4.0] * 5
