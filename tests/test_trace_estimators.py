"""Estimators of `divergence`: means and spreads of probes and sketches, draws, which is chosen."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewstep
from fewstep.reference import trace as reference
from support.traces import F64, case
from support.velocity_nets import TimeMLP


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


@pytest.mark.parametrize(("d", "count"), [(3, 2), (4, 2), (3, 3)])
def test_xtrace_over_all_signs_is_the_trace(d: int, count: int) -> None:
    """Parallel probes among them, alone and beside others."""
    torch.manual_seed(0)
    J = torch.randn(d, d, dtype=F64)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=d)), dtype=F64)
    all_of_them = torch.cartesian_prod(*[torch.arange(len(signs))] * count)
    v = signs[all_of_them].movedim(1, 0)

    def estimates(v: Tensor) -> Tensor:
        return reference.xtrace(lambda u: u @ J.T, v)

    found = estimates(v)
    torch.testing.assert_close(found.mean(), J.trace())
    alone = torch.cat([estimates(v[:, k : k + 1]) for k in range(v.shape[1])], 1)
    torch.testing.assert_close(alone, found)


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


@pytest.mark.parametrize("estimator", ["hutch++", "xtrace"])
def test_as_many_products_as_dimensions_are_all_of_them(estimator: str) -> None:
    """Leaving out one of few signs is no draw of its own: the mean would be off."""
    x = torch.randn(5, 4, dtype=F64)
    out = fewstep.divergence(lambda x, t: x, x, 0.0, estimator=estimator, probes=4)
    assert out.value.tolist() == [4.0] * 5
