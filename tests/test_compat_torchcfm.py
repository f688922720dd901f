"""`fewstep.compat.torchcfm` against torchcfm: the same plans, and with a seed the same pairs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.compat.torchcfm import OTPlanSampler, wasserstein
from fewstep.ops.sinkhorn.convergence import ConvergenceWarning

# torchcfm itself asks for its networks' dependencies; its pairs need POT alone.
original = pytest.importorskip("torchcfm.optimal_transport", reason="needs torchcfm and POT")
seed = np.random.seed
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("sinkhorn", {"reg": 1.0}),
    ("sinkhorn", {"reg": 0.05, "normalize_cost": True}),
    ("unbalanced", {"reg": 1.0, "reg_m": 2.0}),
    ("unbalanced", {"reg": 0.1, "reg_m": 0.5, "normalize_cost": True}),
]


def batches(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x0, x1 = (torch.randn(48, 2, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    return x0, x1 + 1


@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
def test_plans_and_pairs(method: str, options: dict[str, Any]) -> None:
    x0, x1 = batches()
    mine, its = OTPlanSampler(method, **options), original.OTPlanSampler(method, **options)
    plan, expected = mine.get_map(x0, x1), its.get_map(x0, x1)
    assert type(plan) is type(expected)
    assert plan.dtype == expected.dtype
    assert np.abs(plan - expected).max() < 1e-5 * expected.max()  # by POT's rule of stopping
    labels = torch.arange(48), torch.arange(48) + 100
    for replace in (True, False):
        pairs = []
        for sampler in (mine, its):
            seed(3)
            pairs.append(sampler.sample_plan_with_labels(x0, x1, *labels, replace=replace))
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
        seed(3)
        x, y = mine.sample_plan(x0, x1, replace=replace)
        assert torch.equal(x, pairs[0][0])
        assert torch.equal(y, pairs[0][1])
    assert mine.sample_plan_with_labels(x0, x1, labels[0])[3] is None


def test_trajectories() -> None:
    X = torch.randn(20, 4, 2, dtype=torch.float64)
    found = []
    for library in (OTPlanSampler, original.OTPlanSampler):
        seed(0)
        found.append(library("sinkhorn", reg=0.5).sample_trajectory(X))
    assert type(found[0]) is type(found[1])
    assert np.array_equal(*found)


@pytest.mark.parametrize("power", [1, 2])
def test_distances(power: int) -> None:
    x0, x1 = batches()
    options: dict[str, Any] = {"method": "sinkhorn", "reg": 0.5, "power": power}
    assert wasserstein(x0, x1, **options) == pytest.approx(
        original.wasserstein(x0, x1, **options), rel=1e-8
    )


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_small_temperatures_do_not_become_uniform_plans() -> None:
    """torchcfm's K underflows in float32, and its plan is uniform then."""
    x0, x1 = (20 * t.float() for t in batches())
    with pytest.warns(UserWarning, match="numerical errors|reverting to uniform"):
        theirs = original.OTPlanSampler("sinkhorn", reg=1.0).get_map(x0, x1)
    assert np.ptp(theirs) == 0
    with pytest.warns(ConvergenceWarning, match="get_map: not converged"):
        mine = OTPlanSampler("sinkhorn", reg=1.0).get_map(x0, x1)
    cost = torch.cdist(x0.flatten(1), x1.flatten(1)).square().numpy()
    assert (mine * cost).sum() < 0.7 * (theirs * cost).sum()
    assert np.abs(mine.sum(1) - 1 / 48).max() < 1e-9
    quiet = OTPlanSampler("sinkhorn", reg=1.0, warn=False)
    assert np.array_equal(quiet.get_map(x0, x1), mine)


def test_a_plan_without_mass_becomes_uniform() -> None:
    x0, x1 = batches()
    sampler = OTPlanSampler("unbalanced", reg=0.05, reg_m=0.1)
    with pytest.warns(UserWarning, match="no mass"):
        plan = sampler.get_map(x0, x1 + 100)
    assert np.allclose(plan, 1 / 48**2)


def test_every_parameter_of_torchcfm_is_there() -> None:
    names = ("get_map", "sample_map", "sample_plan", "sample_plan_with_labels")
    names += ("sample_trajectory", "__init__")
    pairs = [(getattr(OTPlanSampler, n), getattr(original.OTPlanSampler, n)) for n in names]
    for mine, its in [*pairs, (wasserstein, original.wasserstein)]:
        both = (inspect.signature(function).parameters.values() for function in (mine, its))
        assert len({tuple((p.name, p.default) for p in values) for values in both}) == 1


# What torchcfm's own tests ask of a sampler.
def test_pairs_of_a_permutation_without_replacement_are_the_permutation() -> None:
    order = np.random.default_rng(0).permutation(np.eye(128), axis=1)
    i, j = OTPlanSampler("sinkhorn").sample_map(order, 128, replace=False)
    again = np.zeros_like(order)
    again[i, j] = 1
    assert np.array_equal(again, order)


def test_the_flow_matchers_of_torchcfm_take_it() -> None:
    matching = pytest.importorskip(
        "torchcfm.conditional_flow_matching", reason="needs torchcfm's dependencies"
    )
    flow = matching.ExactOptimalTransportConditionalFlowMatcher(sigma=0.1)
    flow.ot_sampler = OTPlanSampler("sinkhorn", reg=0.5)
    t, xt, ut = flow.sample_location_and_conditional_flow(*batches())
    assert t.shape == (48,)
    assert xt.shape == ut.shape == (48, 2, 3)


X = torch.zeros(3, 2)
UNSERVED: list[tuple[Callable[[], Any], str]] = [
    (lambda: OTPlanSampler("exact"), "method='exact' .* method='sinkhorn'"),
    (lambda: OTPlanSampler("partial"), "method='partial'"),
    (lambda: wasserstein(X, X), "method=None .* fewstep.metrics.exact_w2"),
    (lambda: wasserstein(X, X, "exact"), "method='exact'"),
]
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: OTPlanSampler("noname"), ValueError, "method must be one of .* got 'noname'"),
    (lambda: OTPlanSampler("sinkhorn", reg=0), ValueError, "reg must be positive .* got 0"),
    (lambda: OTPlanSampler("unbalanced", reg_m=-1), ValueError, "reg_m must be positive"),
    (lambda: OTPlanSampler("sinkhorn", warn=1), TypeError, "warn must be True or False"),
    (lambda: OTPlanSampler("sinkhorn").get_map(X, X[:, :1]), ValueError, "rows of one size"),
    (lambda: OTPlanSampler("sinkhorn").get_map(X.numpy(), X), TypeError, "x0 must be a tensor"),
    (lambda: OTPlanSampler("sinkhorn").get_map(X[:0], X), ValueError, r"N > 0, got \(0, 2\)"),
    (lambda: OTPlanSampler("sinkhorn").sample_map(np.zeros((2, 2)), 2), ValueError, "have mass"),
    (lambda: wasserstein(X, X, "noname"), ValueError, "method must be one of"),
    (lambda: wasserstein(X, X, "sinkhorn", power=3), ValueError, "power must be 1 or 2, got 3"),
]


@pytest.mark.parametrize(("call", "message"), UNSERVED, ids=[m for _, m in UNSERVED])
def test_what_is_not_served(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        call()


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m[:24] for *_, m in BAD])
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
