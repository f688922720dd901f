"""What a first call meets: the temperature, arrays, reprs, and networks without a level."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep
import fewstep.methods.lines
import fewstep.methods.reflow
import fewstep.training.lines
from fewstep import _names, conversions, methods, training
from fewstep._library import BACKENDS
from fewstep.data import pairs
from fewstep.ops.heun.inputs import STATES
from fewstep.ops.sinkhorn import drift
from fewstep.ops.sinkhorn.schedule import UPDATES
from fewstep.ops.trace import inputs, log_density
from fewstep.reference.costs import NAMES, OF_DISTANCE
from fewstep.reference.sinkhorn import PRECISIONS
from fewstep.samplers import edm, multistep, schedules
from fewstep.samplers import inputs as sampler_inputs

rng = torch.Generator().manual_seed(0)
X, Y = torch.randn(2, 6, 3, generator=rng), torch.randn(2, 7, 3, generator=rng) + 1
A = torch.tensor([0.5, 0.5, 0, 0, 0, 0]).expand(2, 6)
CU = (torch.tensor([0, 2, 6]), torch.tensor([0, 4, 7]))
W = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
LABELS = (torch.arange(6) % 2, torch.arange(7) % 2)


def costs(x: Tensor, y: Tensor, cost: str) -> Tensor:
    d = x[..., :, None, :] - y[..., None, :, :]
    if cost == "cosine":
        similarity = torch.nn.functional.cosine_similarity
        return 1 - similarity(x[..., None, :], y[..., None, :, :], dim=-1)
    scale = {"half_sqeuclidean": 0.5}.get(cost, 1.0)
    power = {"l1": d.abs(), "euclidean": d.square()}.get(cost, d.square()).sum(-1)
    return power.sqrt() if cost == "euclidean" else scale * power


@pytest.mark.parametrize("cost", ["sqeuclidean", "half_sqeuclidean", "euclidean", "cosine", "l1"])
def test_auto_is_a_twentieth_of_the_mean_cost(cost: Any) -> None:
    C = costs(X, Y, cost)
    for mean, options in (
        (C.mean((1, 2)), {}),
        (C[:, :2].mean((1, 2)), {"a": A}),  # weight decides, not the number of points
        (C[:, ~torch.eye(6, 7, dtype=torch.bool)].mean(1), {"exclude_diagonal": True}),
    ):
        result = fewstep.sinkhorn(X, Y, eps="auto", cost=cost, **options)
        torch.testing.assert_close(result.eps, mean / 20)
        given = fewstep.sinkhorn(X, Y, eps=result.eps, cost=cost, **options)
        assert torch.equal(given.value, result.value)


def test_auto_of_other_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    C = costs(X[0], Y[0], "sqeuclidean")
    one = fewstep.sinkhorn(X[0], Y[0], eps="auto").eps
    assert one.shape == ()
    blocks = torch.stack([C[:2, :4].mean(), C[2:, 4:].mean()]) / 20
    ragged = fewstep.sinkhorn(X[0], Y[0], eps="auto", cu_seqlens=CU).eps
    torch.testing.assert_close(ragged, blocks)
    labelled = fewstep.sinkhorn(X[0], Y[0], eps="auto", labels=LABELS, label_cost=W).eps
    mean = (C + W[LABELS[0][:, None], LABELS[1]]).mean()
    torch.testing.assert_close(labelled, mean / 20)
    holes = C.clone()
    holes[0, 0] = torch.inf
    monkeypatch.setattr("fewstep.ops.sinkhorn.inputs._PAIRS", 14)  # two rows at a time
    matrix = fewstep.sinkhorn(C=holes, eps="auto").eps
    torch.testing.assert_close(matrix, holes[holes.isfinite()].mean() / 20)
    both = fewstep.sinkhorn_divergence(X, Y, eps="auto", max_iter=200)
    assert torch.equal(both.eps, both.xx.eps)
    assert torch.equal(both.eps, both.yy.eps)


@pytest.mark.parametrize("options", [{}, {"exclude_diagonal": True}, {"a": A.double()}], ids=str)
def test_auto_of_dot_does_not_depend_on_the_origin(options: Any) -> None:
    x, y = X.double(), Y.double()
    options = {"tol": 1e-9, "max_iter": 10000, **options}
    halves = fewstep.sinkhorn(x, y, eps="auto", cost="half_sqeuclidean", **options)
    for shift in (0.0, 5.0):
        dot = fewstep.sinkhorn(x + shift, y + shift, eps="auto", cost="dot", **options)
        torch.testing.assert_close(dot.eps, halves.eps)
        torch.testing.assert_close(dot.plan(), halves.plan(), rtol=1e-5, atol=1e-8)


def test_auto_is_a_constant() -> None:
    x = X.clone().requires_grad_()
    auto = fewstep.sinkhorn(x, Y, eps="auto")
    given = fewstep.sinkhorn(x, Y, eps=auto.eps)
    own, same = (torch.autograd.grad(r.value.sum(), x)[0] for r in (auto, given))
    assert torch.equal(own, same)


def test_auto_refuses() -> None:
    with pytest.raises(ValueError, match="needs a positive mean cost, got -"):
        fewstep.sinkhorn(C=-torch.ones(3, 4), eps="auto")
    with pytest.raises(ValueError, match="or no pair has a finite cost and weight"):
        fewstep.sinkhorn(C=torch.full((3, 4), torch.inf), eps="auto")
    with pytest.raises(ValueError, match="positive mean cost, got 0"):
        fewstep.sinkhorn(X[0] * 0, X[0] * 0, eps="auto")
    with pytest.raises(ValueError, match="positive mean cost, got nan"):
        fewstep.sinkhorn(X[0] * torch.nan, Y[0], eps="auto")
    with pytest.raises(ValueError, match="a compiled graph or a transform does not have"):
        torch.func.vmap(lambda x: fewstep.sinkhorn(x, Y[0], eps="auto").value)(X)


def test_arrays_in_arrays_out() -> None:
    tensors = fewstep.sinkhorn(X, Y, eps=1.0, a=A)
    arrays: Any = fewstep.sinkhorn(X.numpy(), Y.numpy(), eps=1.0, a=A.numpy())  # type: ignore[arg-type]
    for name in ("f", "g", "value", "residual", "iterations", "converged", "eps"):
        own = getattr(arrays, name)
        assert isinstance(own, np.ndarray)
        assert np.array_equal(own, getattr(tensors, name).numpy(), equal_nan=True)
    assert np.array_equal(arrays.plan(), tensors.plan().numpy())
    assert np.array_equal(arrays.barycenter(), tensors.barycenter().numpy())
    assert np.array_equal(arrays.transport(Y.numpy()), tensors.transport(Y).numpy())
    assert np.array_equal(fewstep.transport(arrays, Y.numpy()), tensors.transport(Y).numpy())  # type: ignore[arg-type]
    assert repr(arrays) == repr(tensors)
    matrix: Any = fewstep.sinkhorn(C=costs(X, Y, "l1").double().numpy(), eps=1.0)  # type: ignore[arg-type]
    assert matrix.value.dtype == np.float64
    divergence: Any = fewstep.sinkhorn_divergence(x=X.numpy(), y=Y.numpy(), eps=1.0, max_iter=200)  # type: ignore[arg-type]
    assert isinstance(divergence.xx.f, np.ndarray)
    drift: Any = fewstep.sinkhorn_drift(X.numpy(), Y.numpy(), X.numpy(), eps=1.0)  # type: ignore[arg-type]
    assert isinstance(drift.velocity, np.ndarray)
    for mixed in ((X.numpy(), Y), (X, Y.numpy())):
        with pytest.raises(TypeError, match=r"sinkhorn: .*array"):
            fewstep.sinkhorn(*mixed, eps=1.0)  # type: ignore[arg-type]


def test_reprs_are_short() -> None:
    x, y = torch.randn(500, 8), torch.randn(500, 8)
    results = (
        fewstep.sinkhorn(x, y, eps=10.0),
        fewstep.sinkhorn_divergence(x, y, eps=10.0),
        fewstep.sinkhorn_drift(x, y, x, eps=1.0),
        fewstep.heun_solve(torch.nn.Sequential(torch.nn.Tanh()), x, [1.0, 0.0]),
    )
    for result in results:
        text = repr(result)
        assert text.startswith(type(result).__name__)
        assert len(text) < 500
        assert "tensor" not in text
    assert "f=[500]" in repr(results[0])
    assert "iterations=100" in repr(results[0])


@pytest.mark.parametrize("grad", [False, True])
def test_sequential_takes_no_level(grad: bool) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
    x, times = X[0], [1.0, 0.5, 0.0]

    def same(sampler: Any, **options: Any) -> None:
        with torch.set_grad_enabled(grad):
            own = sampler(net, x, **options)
            expected = sampler(lambda z, t: net(z), x, **options)
        assert torch.equal(getattr(own, "x", own), getattr(expected, "x", expected))

    same(fewstep.heun_solve, times=times)
    same(fewstep.heun_step, t=1.0, dt=-0.5)
    same(fewstep.edm_sample, steps=3)
    same(fewstep.flow_sample, steps=3)
    same(fewstep.multistep_sample, sigmas=[80.0, 1.0], seeds=torch.arange(6))


def test_networks_called_otherwise() -> None:
    with pytest.raises(TypeError, match=r"flow_sample: the network is called as network\(x, t\)"):
        fewstep.flow_sample(lambda x: x, X[0])  # type: ignore[arg-type,misc]
    with pytest.raises(TypeError, match="unrelated"):
        fewstep.flow_sample(_raises, X[0])
    with pytest.raises(RuntimeError) as error:
        fewstep.edm_sample(lambda x, sigma: x / sigma, X[0])
    assert "level for each sample" in error.value.__notes__[0]


def _raises(x: Tensor, t: Tensor) -> Tensor:
    raise TypeError("unrelated")


@pytest.mark.parametrize(
    ("known", "names"),
    [
        (_names.Backend, BACKENDS),
        (_names.CostName, NAMES),
        (_names.DistanceCost, OF_DISTANCE),
        (_names.Update, UPDATES),
        (_names.Precision, PRECISIONS),
        (_names.Form, drift.FORMS),
        (_names.Estimator, inputs.ESTIMATORS),
        (_names.Engine, inputs.ENGINES),
        (_names.Check, inputs.CHECKS),
        (_names.Probe, inputs.PROBES),
        (_names.OdeMethod, log_density.METHODS),
        (_names.Tracker, log_density.TRACKERS),
        (_names.SamplerTracker, sampler_inputs.TRACKERS),
        (_names.SamplerSolver, edm.SOLVERS),
        (_names.State, STATES),
        (_names.Reuse, multistep.MODES),
        (_names.Grid, schedules.GRIDS),
        (_names.Kind, conversions.KINDS),
        (_names.TimePath, conversions.PATHS),
        (_names.Law, methods.lines.LAWS),
        (_names.Metric, methods.lines.METRICS),
        (_names.Start, methods.reflow.STARTS),
        (_names.WindowWeight, methods.reflow.WEIGHTS),
        (_names.Parameterisation, training.lines.PARAMETERISATIONS),
        (_names.PairsDtype, tuple(pairs.DTYPES)),
    ],
)
def test_types_have_the_names_that_are_checked(known: Any, names: tuple[str, ...]) -> None:
    assert sorted(get_args(known)) == sorted(names)


def test_arrays_of_any_strides_and_byte_order_and_no_masks() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 5, 3))
    expected = fewstep.sinkhorn(x[::-1].copy(), y, eps=0.5).value
    assert fewstep.sinkhorn(x[::-1], y, eps=0.5).value == expected
    assert fewstep.sinkhorn(x[::-1].astype(">f8"), y, eps=0.5).value == expected
    with pytest.raises(TypeError, match="masked arrays are not supported"):
        fewstep.sinkhorn(np.ma.masked_array(x, mask=x > 0), y, eps=0.5)
